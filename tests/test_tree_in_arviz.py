# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What ArviZ, NetCDF and Zarr make of a tree."""

import warnings

import arviz as az
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from flax import linen as nn
from flax import nnx
from jax import random
from models import NETWORKS
from numpyro.contrib.module import random_flax_module, random_nnx_module
from numpyro.infer import MCMC, NUTS, Predictive

import numpyro_bdl as bdl

ROWS, DRAWS = 40, 30
X = random.normal(random.key(100), (ROWS, 2))
LABELS = random.randint(random.key(101), (ROWS,), 0, 3)


def classifier(x, y=None, *, batch_size=None):
    net = random_flax_module("net", nn.Dense(3), dist.Normal(), input_shape=(2,))
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=net(xb)), obs=yb)


def run(kernel, *args, num_warmup=0, num_samples=DRAWS, num_chains=2, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(0), *args, **kwargs)
    return mcmc


@pytest.fixture(scope="module")
def mcmc():
    return run(bdl.SGLD(classifier, step_size=2e-2, steps_per_draw=4), X, LABELS, num_warmup=20, batch_size=20)


COLORS = {"output": ["red", "green", "blue"]}


@pytest.fixture(scope="module")
def tree(mcmc):
    return bdl.to_datatree(
        mcmc, log_likelihood=True, posterior_predictive=True, coords=COLORS | {"net_in": ["length", "width"]}
    )


@pytest.fixture(scope="module")
def small(mcmc):
    return bdl.to_datatree(mcmc, log_likelihood=True, posterior_predictive=True, weights=False, coords=COLORS)


# ---- names of axes --------------------------------------------------------------------------------------------------


def dims_of(model, *args):
    """Names of the axes of each site, from two draws of the prior."""
    sites = Predictive(model, num_samples=2)(random.key(0), *args)
    draws = {name: value[None] for name, value in sites.items() if name != "y"}
    posterior = bdl.to_datatree(bdl.Samples(model, draws, args, markov=False))["posterior"]
    return {str(name): value.dims[2:] for name, value in posterior.data_vars.items()}


def network_model(network, shape, classes=3):
    def model(x, y):
        net = random_flax_module("net", network, dist.Normal(), input_shape=(1, *shape))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Categorical(logits=net(x).reshape(len(x), -1)[:, :classes]), obs=y)

    return model


def test_kernels_and_biases_share_the_units_of_their_layer():
    assert dims_of(NETWORKS["linen"], X[:, [0, 0, 1]], LABELS % 2) == {
        "net.Dense_0.kernel": ("net.Dense_0_in", "net.Dense_0_out"),
        "net.Dense_0.bias": ("net.Dense_0_out",),
        "net.Dense_1.kernel": ("net.Dense_1_in", "net.Dense_1_out"),
        "net.Dense_1.bias": ("net.Dense_1_out",),
    }
    nnx_dims = dims_of(NETWORKS["nnx"], X[:, [0, 0, 1]], LABELS % 2)
    assert nnx_dims["net.layers.0.kernel"] == ("net.layers.0_in", "net.layers.0_out")
    assert nnx_dims["net.layers.0.bias"] == ("net.layers.0_out",)


def test_axes_of_convolutions_norms_and_tables():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.Conv(4, (3, 2))(x[..., None]))
            return x.sum((1, 2)) + nn.Embed(7, 4)(jnp.zeros(len(x), int))

    dims = dims_of(network_model(Network(), (5, 5)), random.normal(random.key(0), (6, 5, 5)), LABELS[:6])
    window = "net.Conv_0.kernel_dim_0", "net.Conv_0.kernel_dim_1"
    assert dims["net.Conv_0.kernel"] == (*window, "net.Conv_0_in", "net.Conv_0_out")
    assert dims["net.Conv_0.bias"] == ("net.Conv_0_out",)
    assert dims["net.LayerNorm_0.scale"] == dims["net.LayerNorm_0.bias"] == ("net.LayerNorm_0_out",)
    assert dims["net.Embed_0.embedding"] == ("net.Embed_0_in", "net.Embed_0_out")


def test_axes_of_heads_and_of_layers_with_several_kernels():
    class Adapter(nn.Module):
        @nn.compact
        def __call__(self, x):
            down = self.param("down", nn.initializers.lecun_normal(), (4, 2))
            up = self.param("up", nn.initializers.lecun_normal(), (2, 4))
            return x + x @ down @ up

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Adapter()(nn.MultiHeadDotProductAttention(num_heads=2)(x)).sum(1)

    dims = dims_of(network_model(Network(), (3, 4)), random.normal(random.key(0), (6, 3, 4)), LABELS[:6])
    layer = "net.MultiHeadDotProductAttention_0"
    units = f"{layer}.query_out_0", f"{layer}.query_out_1"
    assert dims[f"{layer}.query.kernel"] == (f"{layer}.query_in", *units)
    assert dims[f"{layer}.query.bias"] == units
    assert dims[f"{layer}.out.kernel"] == (f"{layer}.out.kernel_dim_0", f"{layer}.out_in", f"{layer}.out_out")
    # "in" would be 4 places in one kernel and 2 in the other
    assert dims["net.Adapter_0.down"] == ("net.Adapter_0.down_dim_0", "net.Adapter_0.down_dim_1")


def test_sites_in_plates_and_their_events_are_named():
    def model(y):
        with numpyro.plate("group", 3):
            mu = numpyro.sample("mu", dist.Normal())
            numpyro.deterministic("double", 2 * mu)
            numpyro.deterministic("sum", mu.sum())
            numpyro.deterministic("two", mu[:2])
        numpyro.sample("w", dist.Normal().expand([2, 4]).to_event(1), infer={"event_dims": ["unit"]})
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu[0], 1), obs=y)

    assert dims_of(model, jnp.ones(5)) == {
        "mu": ("group",),
        "double": ("group",),
        "sum": (),
        "two": ("two_dim_0",),
        "w": ("w_dim_0", "unit"),
    }


def test_labels_and_names_of_ones_own(mcmc, tree):
    assert list(tree["functions"]["output"].values) == ["red", "green", "blue"]
    assert list(tree["posterior"]["net_in"].values) == ["length", "width"]
    assert tree["posterior"]["net.kernel"].sel(net_in="width", net_out=2).dims == ("chain", "draw")
    renamed = bdl.to_datatree(
        mcmc,
        log_likelihood=True,
        dims={"net/kernel": ["feature", "color"], "y": ["flower"]},
        coords={"color": ["r", "g", "b"], "flower": np.arange(ROWS) + 100},
    )
    assert renamed["posterior"]["net.kernel"].dims == ("chain", "draw", "feature", "color")
    assert renamed["posterior"]["net.bias"].dims == ("chain", "draw", "net_out")
    for group in ("log_likelihood", "observed_data"):
        assert list(renamed[group]["flower"].values) == list(range(100, 100 + ROWS))
    assert renamed["functions"]["y"].dims == ("chain", "draw", "point", "output")


def test_names_and_labels_that_fit_nothing_are_refused(mcmc):
    with pytest.raises(ValueError, match="dims names 'net.kernels', which is not in the tree; it has: .* net.bias"):
        bdl.to_datatree(mcmc, dims={"net/kernels": ["a"]})
    with pytest.raises(ValueError, match="coords names 'outputs', which is no dimension .* net_out, output, point"):
        bdl.to_datatree(mcmc, coords={"outputs": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"coords\['output'\] must be 3 labels, .* got shape \(2,\)"):
        bdl.to_datatree(mcmc, coords={"output": ["a", "b"]})


# ---- ArviZ ----------------------------------------------------------------------------------------------------------


def quietly(function, *args, **kwargs):
    """Without ArviZ's remarks on few draws and influential rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def test_without_weights_the_posterior_is_that_of_the_functions(tree, small):
    assert set(tree["posterior"].data_vars) == {"net.kernel", "net.bias"}
    xarray.testing.assert_identical(small["posterior"].to_dataset(), small["functions"].to_dataset())
    for diagnostic in (az.rhat, az.ess):
        np.testing.assert_array_equal(diagnostic(small)["y"], diagnostic(tree, group="functions")["y"])
    assert list(az.summary(small).index[:2]) == ["y[0, red]", "y[0, green]"]


def test_loo_takes_the_relative_efficiency_of_the_functions(tree, small):
    efficiency = float(az.ess(tree, group="functions", method="mean")["y"].mean()) / (2 * DRAWS)
    expected = quietly(az.loo, tree, reff=efficiency, pointwise=True)
    found = quietly(az.loo, small, pointwise=True)
    np.testing.assert_array_equal(found.elpd_i, expected.elpd_i)
    np.testing.assert_array_equal(found.pareto_k, expected.pareto_k)
    assert found.n_data_points == ROWS


def test_runs_are_compared(small):
    def constant(x, y=None):
        logits = numpyro.sample("logits", dist.Normal(0, 3).expand([3]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Categorical(logits=logits), obs=y)

    other = run(bdl.SGLD(constant, step_size=2e-2, steps_per_draw=4), X, LABELS, num_warmup=20)
    other = bdl.to_datatree(other, log_likelihood=True)
    table = quietly(az.compare, {"network": small, "constant": other}, round_to="none")
    assert set(table.index) == {"network", "constant"}
    for name, of in (("network", small), ("constant", other)):
        assert table.elpd[name] == pytest.approx(quietly(az.loo, of).elpd)
    plots = quietly(az.plot_compare, table)
    assert len(plots.viz["figure"].item().axes) == 1


ONE = {"point": [0], "output": ["green"]}
PLOTS = {
    "forest": lambda tree: az.plot_forest(tree, group="functions", coords={"point": [0, 1], "output": ["red"]}),
    "forest of weights": lambda tree: az.plot_forest(tree, var_names="net.kernel", coords={"net_in": ["width"]}),
    "trace": lambda tree: az.plot_trace(tree, group="functions", coords=ONE),
    "rank": lambda tree: az.plot_rank(tree, group="functions", coords=ONE),
    "dist": lambda tree: az.plot_dist(tree, group="functions", coords=ONE),
    "ess": lambda tree: az.plot_ess(tree, group="functions", coords=ONE),
    "ppc_dist": az.plot_ppc_dist,
    "khat": lambda tree: az.plot_khat(az.loo(tree, pointwise=True)),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots_of_arviz_draw_it(tree, name):
    plots = quietly(PLOTS[name], tree)
    figure = plots.viz["figure"].item()
    drawn = [line for axes in figure.axes for line in [*axes.lines, *axes.collections] if line.get_visible()]
    assert drawn
    plt.close("all")


# ---- from_numpyro ---------------------------------------------------------------------------------------------------

NNX = nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def nnx_classifier(x, y=None, *, batch_size=None):
    """ArviZ takes no "/" in names."""
    net = random_nnx_module("net", NNX, dist.Normal(), scope_divider=":")
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=net(xb)), obs=yb)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: bdl.SGLD(model, step_size=1e-2),
        lambda model: bdl.FlatBasinSGLD(model, step_size=1e-2, eta=0.1, collect_anchor=True),
        lambda model: bdl.SpikeSlabSGHMC(model, step_size=1e-3, groups={"net:kernel": "unstructured"}),
        lambda model: bdl.WGFEnsemble(model, step_size=1e-2),
        lambda model: NUTS(model, step_size=0.1),
    ],
    ids=["SGLD", "FlatBasinSGLD", "SpikeSlabSGHMC", "WGFEnsemble", "NUTS"],
)
def test_from_numpyro_has_the_same_draws(make):
    mcmc = run(make(nnx_classifier), X, LABELS, num_samples=5)
    theirs, ours = az.from_numpyro(mcmc, log_likelihood=True), bdl.to_datatree(mcmc, log_likelihood=True)
    assert set(theirs["posterior"].data_vars) == set(ours["posterior"].data_vars) == {"net:kernel", "net:bias"}
    for name, value in theirs["posterior"].data_vars.items():
        np.testing.assert_array_equal(value, ours["posterior"][name])
    assert set(theirs["sample_stats"].data_vars) == set(ours["sample_stats"].data_vars)
    np.testing.assert_allclose(theirs["log_likelihood"]["y"], ours["log_likelihood"]["y"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(theirs["observed_data"]["y"], ours["observed_data"]["y"])


def test_where_from_numpyro_does_not_reach(mcmc):
    with pytest.raises(ValueError, match="containing the '/' character"):
        az.from_numpyro(mcmc)
    batches = run(bdl.SGLD(nnx_classifier, step_size=1e-2), X, LABELS, num_samples=5, batch_size=10)
    assert az.from_numpyro(batches)["observed_data"]["y"].shape == (10,)  # of 40
    with pytest.raises(ValueError, match="Missing random key to generate subsample indices"):
        az.from_numpyro(batches, log_likelihood=True)
    assert bdl.to_datatree(batches, log_likelihood=True)["log_likelihood"]["y"].shape == (2, 5, ROWS)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_floats_are_single_and_integers_stay(tree):
    for name, group in tree.children.items():
        kinds = {str(variable): value.dtype for variable, value in group.data_vars.items()}
        integers = name in ("observed_data", "posterior_predictive")
        assert set(kinds.values()) == {np.dtype(np.int32 if integers else np.float32)}, name


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part in the Zarr format 3")
@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_a_tree_comes_back_from_a_file_as_it_was(tree, small, tmp_path, kind):
    # of what kernels and guides write, lists and names of sites are the hard part
    origin = {"prior_precision net/kernel": 0.5, "guide": "mine", "bad_chains": [1, 2]}
    draws = {name: np.asarray(tree["posterior"][name]) for name in ("net.kernel", "net.bias")}
    marked = bdl.to_datatree(bdl.Samples(classifier, draws, (X, LABELS), attributes=origin))
    assert marked.attrs["prior_precision net.kernel"] == 0.5
    for n, written in enumerate((tree, small, marked)):
        path = tmp_path / f"{n}.{kind}"
        if kind == "zarr":
            written.to_zarr(path)
        else:
            written.to_netcdf(path, engine="h5netcdf")
        with xarray.open_datatree(path, engine="zarr" if kind == "zarr" else "h5netcdf") as read:
            lists = {name: list(value) for name, value in read.attrs.items() if np.ndim(value)}
            read.attrs |= lists  # NetCDF has arrays in place of lists
            xarray.testing.assert_identical(read.load(), written)
            for group in written.children:
                for name, value in written[group].variables.items():
                    assert read[group].variables[name].dtype == value.dtype, (group, name)


# ---- chains that stand still ----------------------------------------------------------------------------------------


def constant(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)


def test_chains_that_stand_still_are_told_of_once():
    draws = random.normal(random.key(0), (3, 50))
    draws = {"mu": 5 + draws * jnp.array([1.0, 1e-5, 1.0])[:, None].at[2, 0].set(jnp.nan)}
    with pytest.warns(UserWarning, match="draws that are NaN or infinite"):  # the third chain, which is another matter
        samples = bdl.Samples(constant, draws, (jnp.ones(4),))
    with pytest.warns(UserWarning, match=r"functions of 1 of 3 chains hardly differ .*: 1 \([12]\.\de-06\)") as caught:
        bdl.to_datatree(samples)
    assert [warning.filename for warning in caught] == [__file__]


def test_particles_may_stand_still():
    draws = {"mu": jnp.full((2, 50), 5.0)}
    bdl.to_datatree(bdl.Samples(constant, draws, (jnp.ones(4),), markov=False))
    ensemble = bdl.WGFEnsemble(constant, step_size=0.1, langevin=False, kl=1.0, steps_per_draw=100)
    ended = bdl.to_datatree(run(ensemble, jnp.ones(4), num_warmup=3, num_samples=3))
    assert float(ended["functions"]["y"].std("draw").max()) < 1e-5
