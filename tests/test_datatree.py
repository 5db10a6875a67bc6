# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import subprocess
import sys

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray
from flax import linen as nn
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import HMC, MCMC

import numpyro_bdl as bdl

CHAINS, DRAWS, ROWS = 2, 40, 100
X = random.normal(random.key(100), (ROWS, 2))
LABELS = random.randint(random.key(101), (ROWS,), 0, 3)
Y = 1 + random.normal(random.key(102), (ROWS,))


def classifier(x, y=None, *, batch_size=None):
    net = random_flax_module("net", nn.Dense(3), dist.Normal(), input_shape=(2,))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=scale * net(xb)), obs=yb)


def gaussian(y, *, batch_size=None):
    mu = numpyro.sample("mu", dist.Normal())
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        numpyro.sample("y", dist.Normal(mu, 1), obs=numpyro.subsample(y, event_dim=0))


def run(kernel, *args, num_warmup=0, num_samples=DRAWS, init_params=None, extra_fields=(), **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(0), *args, init_params=init_params, extra_fields=extra_fields, **kwargs)
    return mcmc


@pytest.fixture(scope="module")
def classified():
    kernel = bdl.FlatBasinSGLD(classifier, step_size=1e-3, eta=0.1, temperature=0.5, collect_anchor=True)
    return run(kernel, X, LABELS, batch_size=10)


@pytest.fixture(scope="module")
def tree(classified):
    return bdl.to_datatree(classified, log_likelihood=True, posterior_predictive=True, draw_chunk=80, data_chunk=30)


@pytest.fixture(scope="module")
def sampled():
    kernel = bdl.SGLD(gaussian, step_size=2e-3, steps_per_draw=10, share_batch=True, minibatch="epoch")
    return run(kernel, Y, num_warmup=10, num_samples=200, batch_size=50)


# ---- groups -------------------------------------------------------------------------------------------------------


def test_the_groups_are_those_asked_for(classified, tree):
    always = {"posterior", "anchor", "sample_stats", "functions", "observed_data"}
    assert set(tree.children) == always | {"log_likelihood", "posterior_predictive"}
    assert set(bdl.to_datatree(classified, draw_chunk=80).children) == always


def test_every_group_of_draws_has_chains_and_draws(tree):
    for name, group in tree.children.items():
        if name != "observed_data":
            assert group.sizes["chain"] == CHAINS
            assert group.sizes["draw"] == DRAWS


def test_posterior_is_the_position_with_dots_for_slashes(classified, tree):
    samples = classified.get_samples(group_by_chain=True)
    assert set(samples) == {"net/kernel", "net/bias", "scale"}
    assert set(tree["posterior"].data_vars) == {"net.kernel", "net.bias", "scale"}
    for name, value in samples.items():
        np.testing.assert_array_equal(tree["posterior"][name.replace("/", ".")], value)


def test_anchor_is_constrained(classified, tree):
    anchor = classified.get_extra_fields(group_by_chain=True)["z_anchor"]
    assert set(tree["anchor"].data_vars) == set(tree["posterior"].data_vars)
    np.testing.assert_array_equal(tree["anchor"]["net.kernel"], anchor["net/kernel"])
    np.testing.assert_allclose(tree["anchor"]["scale"], np.exp(anchor["scale"]), rtol=1e-6)


def test_functions_are_taken_at_64_rows_of_the_run(classified, tree):
    functions = tree["functions"]["y"]
    assert functions.dims == ("chain", "draw", "point", "output")
    assert functions.shape == (CHAINS, DRAWS, 64, 3)
    point = functions["point"].values
    assert point[0] == 0
    assert point[-1] == ROWS - 1
    assert set(np.diff(point)) == {1, 2}
    whole = bdl.PosteriorPredictive(classified, draw_chunk=80).functions(X)["y"]
    np.testing.assert_allclose(functions, whole[:, :, point], rtol=1e-4, atol=1e-5)


def test_functions_are_taken_at_the_probe(classified):
    functions = bdl.to_datatree(classified, probe=(X[:7] + 1,), draw_chunk=80)["functions"]["y"]
    expected = bdl.PosteriorPredictive(classified, draw_chunk=80).functions(X[:7] + 1)["y"]
    assert functions.dims == ("chain", "draw", "point", "output")
    np.testing.assert_array_equal(functions, expected)


def test_sample_stats_are_the_scalars_of_the_state(classified, tree):
    fields = classified.get_extra_fields(group_by_chain=True)
    assert set(tree["sample_stats"].data_vars) == {"minibatch_energy", "step_size", "temperature"}
    for name, value in tree["sample_stats"].data_vars.items():
        assert value.dims == ("chain", "draw")
        np.testing.assert_array_equal(value, fields[name])


def test_observed_data_are_all_rows_under_a_minibatch(tree):
    assert tree["observed_data"]["y"].dims == ("data",)
    np.testing.assert_array_equal(tree["observed_data"]["y"], LABELS)


def test_log_likelihood_and_replicates_are_by_row(classified, tree):
    for group in ("log_likelihood", "posterior_predictive"):
        assert tree[group]["y"].dims == ("chain", "draw", "data")
    expected = bdl.PosteriorPredictive(classified, draw_chunk=80).log_likelihood()["y"]
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-4, atol=1e-5)
    replicates = tree["posterior_predictive"]["y"]
    assert set(np.unique(replicates)) <= {0, 1, 2}
    assert np.any(replicates[0, 0] != replicates[0, 1])


def test_weights_can_be_left_out(classified):
    small = bdl.to_datatree(classified, weights=False, draw_chunk=80)
    assert set(small["posterior"].data_vars) == set(small["anchor"].data_vars) == {"scale"}
    assert small["functions"]["y"].shape == (CHAINS, DRAWS, 64, 3)


def test_collected_scalars_are_sample_stats():
    mcmc = run(bdl.SGHMC(gaussian, step_size=1e-3), Y, num_samples=3, extra_fields=("i", "momentum"))
    stats = bdl.to_datatree(mcmc)["sample_stats"]
    assert set(stats.data_vars) == {"minibatch_energy", "step_size", "temperature", "i"}
    np.testing.assert_array_equal(stats["i"], [[1, 2, 3]] * CHAINS)


def test_plates_name_the_dimensions_they_are_on():
    def model(x, y, *, batch_size=None):
        mu = numpyro.sample("mu", dist.Normal())
        # the inner plate lies to the left of the outer one
        with numpyro.plate("data", ROWS, subsample_size=batch_size) as rows, numpyro.plate("group", 3):
            numpyro.sample("y", dist.Normal(mu * x[rows, 0], 1), obs=y[:, rows])
        numpyro.sample("total", dist.Normal(mu * jnp.ones(4), 1).to_event(1), obs=jnp.zeros(4))

    y = random.normal(random.key(0), (3, ROWS))
    mcmc = run(bdl.SGLD(model, step_size=1e-3), X, y, num_samples=4, batch_size=10)
    tree = bdl.to_datatree(mcmc, log_likelihood=True)
    assert tree["observed_data"]["y"].dims == ("group", "data")
    np.testing.assert_array_equal(tree["observed_data"]["y"], y)
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "group", "data")
    assert tree["log_likelihood"]["total"].dims == ("chain", "draw")

    # points before outputs; a site outside of the plates has outputs alone, and is not filled up to the other's shape
    functions, mu = tree["functions"], mcmc.get_samples(group_by_chain=True)["mu"]
    assert functions["y"].dims == ("chain", "draw", "point", "output_y")
    assert functions["total"].dims == ("chain", "draw", "output_total")
    at_points = (mu[..., None] * X[functions["point"].values, 0])[..., None]
    np.testing.assert_allclose(functions["y"], np.broadcast_to(at_points, (CHAINS, 4, 64, 3)), rtol=1e-5)
    np.testing.assert_allclose(functions["total"], np.broadcast_to(mu[..., None], (CHAINS, 4, 4)), rtol=1e-5)


def test_sites_of_other_sizes_are_not_filled_up():
    def model(y, u):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        with numpyro.plate("others", len(u)):
            numpyro.sample("u", dist.Normal(mu, 1), obs=u)

    tree = bdl.to_datatree(run(bdl.SGLD(model, step_size=1e-3), Y[:5], Y[:3], num_samples=4))
    assert {name: value.shape[2:] for name, value in tree["functions"].data_vars.items()} == {"y": (5,), "u": (3,)}
    assert tree["functions"].to_dataset().notnull().all().to_array().all()


def test_a_batch_norm_network_is_evaluated_as_asked():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(1, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train, use_bias=False, use_scale=False)(x)[..., 0]

    def model(x, y=None, *, batch_size=None, train=True):
        net = random_flax_module("net", Net(), dist.Normal(), mutable=["batch_stats"], input_shape=(2,), train=True)
        with numpyro.plate("data", len(x), subsample_size=batch_size):
            xb = numpyro.subsample(x, event_dim=1)
            yb = None if y is None else numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", dist.Normal(net(xb, train=train), 1.0), obs=yb)

    mcmc = run(bdl.SGLD(model, step_size=1e-3), X, Y, num_samples=4, batch_size=10)
    tree = bdl.to_datatree(mcmc, train=False)
    assert "mutable" not in tree["sample_stats"].data_vars
    expected = bdl.PosteriorPredictive(mcmc).functions(X, train=False)["y"][:, :, tree["functions"]["point"].values]
    np.testing.assert_allclose(tree["functions"]["y"], expected, rtol=1e-4, atol=1e-5)
    # with the statistics of the batch itself the functions are others
    assert np.abs(bdl.to_datatree(mcmc)["functions"]["y"] - expected).max() > 1e-3


# ---- ArviZ --------------------------------------------------------------------------------------------------------


def test_arviz_summarizes_functions(tree):
    summary = az.summary(tree, group="functions")
    assert len(summary) == 64 * 3
    assert {"mean", "r_hat", "ess_bulk"} <= set(summary.columns)


@pytest.mark.parametrize("diagnostic", [az.rhat, az.ess])
def test_arviz_diagnoses_functions(sampled, diagnostic):
    tree = bdl.to_datatree(sampled, draw_chunk=400)
    of_functions = diagnostic(tree, group="functions")["y"].values
    assert of_functions.shape == (64,)
    # the function of this model is its mean, at every point
    np.testing.assert_allclose(of_functions, diagnostic(tree, var_names="mu")["mu"].item(), rtol=1e-3)


def test_arviz_computes_loo(sampled):
    mu = sampled.get_samples(group_by_chain=True)["mu"]
    by_hand = {"posterior": {"mu": mu}, "log_likelihood": {"y": dist.Normal(mu[..., None]).log_prob(Y)}}
    expected = az.loo(az.from_dict({group: jax.tree.map(np.asarray, data) for group, data in by_hand.items()}))
    loo = az.loo(bdl.to_datatree(sampled, log_likelihood=True, draw_chunk=400))
    assert loo.n_data_points == ROWS
    assert loo.elpd == pytest.approx(expected.elpd, rel=1e-5)


def test_a_tree_survives_a_file(tree, tmp_path):
    tree.to_netcdf(tmp_path / "run.nc")
    with xarray.open_datatree(tmp_path / "run.nc") as loaded:
        assert set(loaded.children) == set(tree.children)
        for name in tree.children:
            xarray.testing.assert_equal(loaded[name].to_dataset(), tree[name].to_dataset())
        assert loaded.attrs == tree.attrs


# ---- attributes ---------------------------------------------------------------------------------------------------


def test_attributes_tell_kernel_and_temperature(tree, sampled):
    assert tree.attrs["kernel"] == "FlatBasinSGLD"
    assert tree.attrs["temperature"] == 0.5
    assert tree.attrs["chains_share_minibatches"] == 0
    shared = bdl.to_datatree(sampled).attrs
    assert shared["kernel"] == "SGLD"
    assert shared["temperature"] == 1.0
    assert shared["chains_share_minibatches"] == 1
    assert not {"bad_chains", "first_bad_steps"} & set(shared)
    assert shared["inference_library"] == "numpyro"


def test_a_schedule_of_temperatures_is_in_the_sample_stats():
    kernel = bdl.SGLD(gaussian, step_size=1e-3, temperature=optax.linear_schedule(2.0, 1.0, 2))
    tree = bdl.to_datatree(run(kernel, Y, num_samples=3))
    assert "temperature" not in tree.attrs
    np.testing.assert_allclose(tree["sample_stats"]["temperature"][0], [2.0, 1.5, 1.0])


def test_bad_chains_are_marked_and_their_draws_are_nan(tmp_path):
    mcmc = run(bdl.SGLD(gaussian, step_size=1e-3), Y, num_samples=4, init_params={"mu": jnp.array([0.0, 1e30])})
    with pytest.warns(UserWarning, match="Chain 1 met a gradient that was not finite at step 0"):
        tree = bdl.to_datatree(mcmc)
    assert tree.attrs["bad_chains"] == [1]
    assert tree.attrs["first_bad_steps"] == [0]
    for group in ("posterior", "functions"):
        values = tree[group].to_dataset().to_array()
        assert np.isfinite(values.sel(chain=0)).all()
        assert np.isnan(values.sel(chain=1)).all()
    tree.to_netcdf(tmp_path / "bad.nc")
    with xarray.open_datatree(tmp_path / "bad.nc") as loaded:
        assert np.atleast_1d(loaded.attrs["bad_chains"]).tolist() == [1]


# ---- runs ---------------------------------------------------------------------------------------------------------


def test_a_run_of_numpyro_becomes_a_tree():
    fields = ("potential_energy", "accept_prob", "adapt_state.step_size")
    kernel = HMC(gaussian, step_size=0.1, num_steps=1, trajectory_length=None)
    mcmc = run(kernel, Y, num_samples=10, extra_fields=fields)
    tree, collected = bdl.to_datatree(mcmc), mcmc.get_extra_fields(group_by_chain=True)
    assert tree.attrs["kernel"] == "HMC"
    assert set(tree.children) == {"posterior", "sample_stats", "functions", "observed_data"}
    np.testing.assert_allclose(tree["functions"]["y"][..., 0], tree["posterior"]["mu"], rtol=1e-5)
    assert set(tree["sample_stats"].data_vars) == {"diverging", "lp", "acceptance_rate", "step_size"}
    np.testing.assert_array_equal(tree["sample_stats"]["lp"], -collected["potential_energy"])


def test_a_model_without_observations_has_no_functions():
    def model():
        numpyro.sample("x", dist.Normal())

    tree = bdl.to_datatree(run(bdl.SGLD(model, step_size=0.1), num_samples=3))
    assert set(tree.children) == {"posterior", "sample_stats"}


def test_a_run_without_draws_is_refused():
    with pytest.raises(ValueError, match="holds no draws yet; run it first"):
        bdl.to_datatree(MCMC(bdl.SGLD(gaussian, step_size=0.1), num_warmup=0, num_samples=1))


def test_importing_the_package_loads_neither_arviz_nor_matplotlib():
    code = "import sys, numpyro_bdl; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpyro" in loaded
    assert not {"arviz", "arviz_base", "arviz_stats", "arviz_plots", "matplotlib"} & set(loaded)


# ---- what a review found --------------------------------------------------------------------------------------------


def test_observed_sites_without_a_plate():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    mcmc = MCMC(bdl.SGLD(model, step_size=1e-2), num_warmup=2, num_samples=3, progress_bar=False)
    mcmc.run(random.key(0), jnp.arange(6.0))
    tree = bdl.to_datatree(mcmc, log_likelihood=True)
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, np.arange(6.0))
    assert tree["log_likelihood"]["y"].shape == (1, 3, 6)


def test_a_model_that_takes_no_rows_through_its_plate():
    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(w * x, 1), obs=y)

    x = jnp.linspace(0, 1, 2000)
    mcmc = MCMC(bdl.SGLD(model, step_size=1e-4), num_warmup=2, num_samples=3, progress_bar=False)
    mcmc.run(random.key(0), x, x)
    tree = bdl.to_datatree(mcmc, log_likelihood=True)
    rows = tree["functions"]["point"].values
    assert len(rows) == 64
    expected = mcmc.get_samples()["w"][:, None] * x[rows]
    np.testing.assert_allclose(tree["functions"]["y"].values[0], expected, rtol=1e-5)
    assert tree["log_likelihood"]["y"].shape == (1, 3, 2000)


# ---- names ----------------------------------------------------------------------------------------------------


def named(site="y", plate="data", twice=False):
    """Samples of a model of two outputs, or one, whose site and plate have these names."""

    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate(plate, len(y)):
            law = dist.Normal(mu * jnp.ones((len(y), 2)), 1).to_event(1) if twice else dist.Normal(mu, 1)
            numpyro.sample(site, law, obs=y)

    draws = {"mu": np.linspace(0, 1, 10, dtype=np.float32).reshape(2, 5)}
    return bdl.Samples(model, draws, (jnp.ones((4, 2) if twice else 4),))


@pytest.mark.parametrize(
    ("site", "plate", "twice"),
    [("output", "data", True), ("point", "data", False), ("y", "point", False)],
)
def test_a_site_with_the_name_of_a_dimension_is_kept(site, plate, twice):
    tree = bdl.to_datatree(named(site, plate, twice), log_likelihood=True, posterior_predictive=True)
    assert tree["functions"].data_vars[site].shape == (2, 5, 4, 2)[: 3 + twice]
    assert tree["log_likelihood"].data_vars[site].shape == (2, 5, 4)
    assert tree["posterior_predictive"].data_vars[site].shape == (2, 5, 4, 2)[: 3 + twice]
    assert tree["observed_data"].data_vars[site].shape == (4, 2)[: 1 + twice]


@pytest.mark.parametrize("site", ["draw", "chain"])
def test_a_site_named_as_chain_or_draw_is_refused(site):
    with pytest.raises(ValueError, match=f"a site is named '{site}', as an axis of the tree is; rename it"):
        bdl.to_datatree(named(site))


@pytest.mark.parametrize("plate", ["draw", "chain"])
def test_a_plate_named_as_chain_or_draw_is_refused(plate):
    with pytest.raises(ValueError, match=f"a plate is named '{plate}', as an axis of the tree is; rename it"):
        bdl.to_datatree(named(plate=plate), log_likelihood=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dims": {"y": "abc"}}, r"dims\['y'\] must be a list of names, .* got 'abc'"),
        (
            {"dims": {"y": ["chain"]}},
            r"must name the axes after chain and draw, which are there .*, got \['chain'\]",
        ),
        ({"dims": {"y": [1]}}, r"must be a list of names, .* got \[1\]"),
        ({"coords": {"point": range(4)}, "dims": {"y": ["point"]}}, r"coords\['point'\] can't label a dimension"),
    ],
)
def test_dims_and_coords_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        bdl.to_datatree(named(), probe=(jnp.ones(3),), log_likelihood=True, **options)
