# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Draws that no kernel of ours made."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from flax import linen as nn
from jax import random
from numpyro.contrib.einstein import SVGD, RBFKernel, SteinVI
from numpyro.contrib.module import flax_module, random_flax_module
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal

import numpyro_bdl as bdl

ROWS = 30
X = random.normal(random.key(100), (ROWS, 2))
LABELS = random.randint(random.key(101), (ROWS,), 0, 3)


def classifier(x, y=None, *, batch_size=None):
    net = random_flax_module("net", nn.Dense(3), dist.Normal(), input_shape=(2,))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.1))
    numpyro.deterministic("double", 2 * scale)
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        logits = numpyro.deterministic("logits", scale * net(xb))
        numpyro.sample("y", dist.Categorical(logits=logits), obs=yb)


def normal(y):
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    sigma = numpyro.sample("sigma", dist.HalfNormal())
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


Y = 3 + random.normal(random.key(102), (200,))


def draws_of_prior(chains=2, draws=5):
    keys = random.split(random.key(0), 3)
    return {
        "net/kernel": random.normal(keys[0], (chains, draws, 2, 3)),
        "net/bias": random.normal(keys[1], (chains, draws, 3)),
        "scale": jnp.exp(0.1 * random.normal(keys[2], (chains, draws))),
    }


def trained(guide, *args, model=classifier, steps=5, **kwargs):
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
    return svi, svi.run(random.key(0), steps, *args, progress_bar=False, **kwargs)


# ---- a dict and a tree ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    mcmc = MCMC(
        bdl.SGLD(classifier, step_size=1e-2),
        num_warmup=0,
        num_samples=5,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(0), X, LABELS, batch_size=10)
    return mcmc


def test_samples_of_a_run_give_the_tree_of_the_run(run):
    samples = bdl.Samples(classifier, run.get_samples(group_by_chain=True), (X, LABELS), {"batch_size": 10})
    expected = bdl.to_datatree(run, log_likelihood=True, posterior_predictive=True)
    tree = bdl.to_datatree(samples, log_likelihood=True, posterior_predictive=True)
    assert set(expected.children) - set(tree.children) == {"sample_stats"}
    for name in tree.children:
        xarray.testing.assert_equal(tree[name].to_dataset(), expected[name].to_dataset())
    assert set(tree.attrs) == {"inference_library", "inference_library_version"}


def test_a_tree_from_a_file_predicts(run, tmp_path):
    bdl.to_datatree(run).to_netcdf(tmp_path / "run.nc")
    x_new = X[:4] + 1
    expected = bdl.PosteriorPredictive(run).functions(x_new)["y"]
    with xarray.open_datatree(tmp_path / "run.nc") as tree:
        samples = bdl.Samples(classifier, tree, (X, LABELS))
        np.testing.assert_array_equal(bdl.PosteriorPredictive(samples).functions(x_new)["y"], expected)
        assert set(samples.draws()[0]) == {"net/kernel", "net/bias", "scale", "double"}


def test_quantities_that_are_no_sites_are_kept_for_the_tree():
    draws = draws_of_prior() | {"mine": np.arange(10.0, dtype=np.float32).reshape(2, 5)}
    tree = bdl.to_datatree(bdl.Samples(classifier, draws, (X, LABELS), attributes={"by": "hand"}))
    np.testing.assert_array_equal(tree["posterior"]["mine"], draws["mine"])
    assert tree.attrs["by"] == "hand"


def test_missing_sites_and_other_shapes_are_refused():
    draws = draws_of_prior()
    with pytest.raises(ValueError, match=r"no draws of 'net/bias', a latent site .* there are of: net/kernel, scale"):
        bdl.Samples(classifier, {k: v for k, v in draws.items() if k != "net/bias"}, (X, LABELS))
    flat = {name: value[0] for name, value in draws.items()}
    with pytest.raises(ValueError, match=r"arrays \(chain, draw, ...\)"):
        bdl.Samples(classifier, flat, (X, LABELS))
    with pytest.raises(ValueError, match=r"'net/bias' must have shape \(chain, draw, 3\), got \(2, 5, 4\)"):
        bdl.Samples(classifier, draws | {"net/bias": jnp.ones((2, 5, 4))}, (X, LABELS))
    with pytest.raises(TypeError, match=r"got an object of dict. Samples\(model, draws, model_args\) takes"):
        bdl.to_datatree(draws)
    with pytest.raises(ValueError, match="PosteriorPredictive: Samples has no anchors"):
        bdl.PosteriorPredictive(bdl.Samples(classifier, draws, (X, LABELS)), members="anchor")


def test_trained_parameters_and_statistics_are_put_in():
    class Features(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(x)

    def model(x, y=None, train=True):
        features = flax_module("features", Features(), mutable=["batch_stats"], input_shape=(2,), train=True)
        w = numpyro.sample("w", dist.Normal().expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(features(x, train=train) @ w, 1.0), obs=y)

    svi, result = trained(AutoNormal(model), X, X[:, 0], model=model, steps=30)
    params = result.params | result.state.mutable_state
    samples = bdl.Samples.from_svi(random.key(1), svi, params, (X, X[:, 0]), num_samples=4)
    assert samples.draws()[1]["features$state"]["batch_stats"]["BatchNorm_0"]["mean"].shape == (1, 4, 2)
    norm, stats = params["features$params"]["BatchNorm_0"], params["features$state"]["batch_stats"]["BatchNorm_0"]
    normalized = (X - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    found = bdl.PosteriorPredictive(samples).functions(X, train=False)["y"]
    np.testing.assert_allclose(found[0], samples.draws()[0]["w"][0] @ normalized.T, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"mutable collections \(BatchNorm\) of which there are no values"):
        bdl.Samples.from_svi(random.key(1), svi, result.params, (X, X[:, 0]))


# ---- SVI ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [AutoNormal, AutoDelta, AutoMultivariateNormal])
def test_draws_of_a_guide_are_those_of_sample_posterior(make):
    svi, result = trained(make(classifier), X, LABELS, batch_size=10)
    samples = bdl.Samples.from_svi(random.key(1), svi, result.params, (X, LABELS), {"batch_size": 10}, num_samples=6)
    draws, mutable = samples.draws()
    expected = svi.guide.sample_posterior(random.key(1), result.params, X, LABELS, sample_shape=(6,))
    assert mutable == {}
    # "logits" belongs to a minibatch
    assert set(draws) == {"net/kernel", "net/bias", "scale", "double"}
    for name, value in draws.items():
        np.testing.assert_allclose(value[0], expected[name], rtol=1e-6)
    tree = bdl.to_datatree(samples, log_likelihood=True)
    assert tree["functions"]["y"].shape == (1, 6, ROWS, 3)
    assert tree["log_likelihood"]["y"].shape == (1, 6, ROWS)
    assert (tree.attrs["inference"], tree.attrs["guide"]) == ("SVI", make.__name__)


def test_a_laplace_approximation_is_no_point():
    svi, result = trained(AutoLaplaceApproximation(normal), Y, model=normal, steps=2000)
    samples = bdl.Samples.from_svi(random.key(1), svi, result.params, (Y,), num_samples=2000)
    mu = samples.draws()[0]["mu"]
    sd = float(result.params["auto_loc"][1])
    sd = np.exp(sd) / np.sqrt(len(Y))  # sigma is sampled on the log scale
    # the prior's share of the precision is 1e-4 of it
    assert abs(mu.std() - sd) < 4 * sd / np.sqrt(2 * 2000)


def test_a_guide_of_ones_own():
    def guide(y):
        loc = numpyro.param("loc", 0.0)
        numpyro.sample("mu", dist.Normal(loc, 1e-3))
        numpyro.sample("sigma", dist.LogNormal(0, 1e-3))

    svi, result = trained(guide, Y, model=normal, steps=300)
    samples = bdl.Samples.from_svi(random.key(1), svi, result.params, (Y,), num_samples=10)
    draws, _ = samples.draws()
    assert draws["mu"].shape == draws["sigma"].shape == (1, 10)
    np.testing.assert_allclose(draws["mu"], result.params["loc"], atol=6e-3)
    assert len(np.unique(draws["mu"])) == 10
    assert samples.attributes()["guide"] == "guide"


# ---- SteinVI --------------------------------------------------------------------------------------------------------


def test_particles_of_svgd_are_draws():
    stein = SVGD(normal, numpyro.optim.Adagrad(0.5), RBFKernel(), num_stein_particles=5)
    result = stein.run(random.key(0), 20, Y, progress_bar=False)
    samples = bdl.Samples.from_stein(random.key(1), stein, result.params, (Y,))
    draws, _ = samples.draws()
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(draws[name][0], result.params[f"{name}_auto_loc"], rtol=1e-6)
    tree = bdl.to_datatree(samples, log_likelihood=True)
    expected = dist.Normal(draws["mu"][..., None], draws["sigma"][..., None]).log_prob(Y)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected, rtol=1e-4)
    assert tree.attrs["inference"] == "SVGD"
    assert tree.attrs["particles"] == 5


def test_a_stein_mixture_has_as_many_draws_of_each_particle():
    stein = SteinVI(
        normal,
        AutoNormal(normal, init_scale=1e-3),
        numpyro.optim.Adagrad(0.1),
        RBFKernel(),
        num_stein_particles=3,
        num_elbo_particles=2,
    )
    with pytest.raises(ValueError, match="has no particles yet; run it first"):
        bdl.Samples.from_stein(random.key(1), stein, {}, (Y,))
    result = stein.run(random.key(0), 2, Y, progress_bar=False)
    # one for all particles, as by non_mixture_guide_params_fn; NumPyro 0.22 can't train one
    stein.non_mixture_params_fn = lambda name: name == "mu_auto_scale"
    params = result.params | {"mu_auto_scale": result.params["mu_auto_scale"][0]}
    samples = bdl.Samples.from_stein(random.key(1), stein, params, (Y,), draws_per_particle=4)
    draws, _ = samples.draws()
    of_particle = draws["mu"].reshape(3, 4)
    distance = np.abs(of_particle - result.params["mu_auto_loc"][:, None])
    assert np.all(distance < 6 * params["mu_auto_scale"])
    assert np.all(np.ptp(of_particle, 1) > 0)
    # no two particles share their noise
    assert len(np.unique(np.round(distance / params["mu_auto_scale"], 3))) == 12


def test_samples_are_what_jax_made():
    samples = bdl.Samples(classifier, draws_of_prior(), (X, LABELS))
    assert {value.dtype for value in samples.draws()[0].values()} == {np.dtype(np.float32)}
    with jax.enable_x64(True):
        draws = {name: np.asarray(value, np.float64) for name, value in draws_of_prior().items()}
        x = np.asarray(X, np.float64)
        tree = bdl.to_datatree(bdl.Samples(classifier, draws, (x, LABELS)))
        assert tree["posterior"]["scale"].dtype == tree["functions"]["y"].dtype == np.float64


def test_what_is_not_svi_or_stein_is_refused_by_name():
    svi = SVI(normal, AutoNormal(normal), numpyro.optim.Adam(0.1), Trace_ELBO())
    result = svi.run(random.key(0), 2, Y, progress_bar=False)
    stein = SteinVI(normal, AutoNormal(normal), numpyro.optim.Adam(0.1), RBFKernel(), num_stein_particles=2)
    with pytest.raises(
        TypeError, match="from_svi needs an object of SVI, got an object of SteinVI, which Samples.from_s"
    ):
        bdl.Samples.from_svi(random.key(1), stein, result.params, (Y,))
    with pytest.raises(
        TypeError, match="needs an object of SteinVI, got an object of SVI, which Samples.from_svi takes"
    ):
        bdl.Samples.from_stein(random.key(1), svi, result.params, (Y,))
    with pytest.raises(TypeError, match=r"from_svi needs an object of SVI, got the class SVI\."):
        bdl.Samples.from_svi(random.key(1), SVI, result.params, (Y,))
    with pytest.raises(TypeError, match="params must be a mapping of what was trained, as result.params, got"):
        bdl.Samples.from_svi(random.key(1), svi, result, (Y,))
    with pytest.raises(ValueError, match="params is empty; hand in what was trained"):
        bdl.Samples.from_svi(random.key(1), svi, {}, (Y,))


def test_chains_with_draws_that_are_not_finite_are_told():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    draws = np.arange(15.0).reshape(3, 5)
    draws[1, 2:], draws[2, 4] = np.nan, np.inf
    with pytest.warns(UserWarning, match=r"chains \[1, 2\] have draws that are NaN or infinite, .* draws \[2, 4\]"):
        samples = bdl.Samples(model, {"mu": draws}, (Y,), attributes={"source": "file"})
    assert samples.attributes() == {"source": "file", "bad_chains": [1, 2], "first_bad_draws": [2, 4]}
