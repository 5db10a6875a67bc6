# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from jax import random
from numpyro.contrib.module import random_flax_module, random_nnx_module
from numpyro.infer import HMC, MCMC, NUTS, log_likelihood
from scipy import stats

import numpyro_bdl as bdl

CHAINS, DRAWS, ROWS = 2, 5, 25
X = random.normal(random.key(100), (ROWS, 2))
X_NEW = random.normal(random.key(101), (11, 2))
LABELS = random.randint(random.key(102), (ROWS,), 0, 3)
TARGETS = random.normal(random.key(103), (ROWS,))


# ---- models and their runs ----------------------------------------------------------------------------------------


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(x)))


def classifier(x, y=None, *, batch_size=None):
    net = random_flax_module("net", MLP(), dist.Normal(), input_shape=(2,))
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=net(xb)), obs=yb)


def several_sites(x, targets, counts=None, *, batch_size=None):
    slope = numpyro.sample("slope", dist.Normal())
    with numpyro.plate("data", len(x), subsample_size=batch_size), numpyro.handlers.scale(scale=3.0):
        xb, tb = numpyro.subsample(x, event_dim=1), numpyro.subsample(targets, event_dim=0)
        cb = None if counts is None else numpyro.subsample(counts, event_dim=0)
        rate = numpyro.deterministic("rate", jnp.exp(slope * xb[:, 0]))
        numpyro.sample("count", dist.Poisson(rate), obs=cb)
        numpyro.sample("target", dist.Normal(slope * xb[:, 1], 1), obs=tb)
    numpyro.sample("area", dist.Gamma(jnp.exp(slope), 1.0), obs=1.0)


def gaussian(x, y=None):
    mu = numpyro.sample("mu", dist.Normal())
    sigma = numpyro.sample("sigma", dist.HalfNormal())
    with numpyro.plate("data", len(x)):
        xb = numpyro.subsample(x, event_dim=0)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(mu + xb, sigma), obs=yb)


def without_subsample(x, y=None):
    w = numpyro.sample("w", dist.Normal().expand([2]).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(1, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, use_bias=False, use_scale=False)(x)
        return x[..., 0]


def normalized(x, y=None, *, batch_size=None, train=True):
    net = random_flax_module("net", Normalized(), dist.Normal(), mutable=["batch_stats"], input_shape=(2,), train=True)
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(net(xb, train=train), 1.0), obs=yb)


def run(kernel, *args, num_chains=CHAINS, num_warmup=0, num_samples=DRAWS, init_params=None, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(0), *args, init_params=init_params, **kwargs)
    return mcmc


def sgld(model, *args, **kwargs):
    return run(bdl.SGLD(model, step_size=1e-2), *args, **kwargs)


@pytest.fixture(scope="module")
def classified():
    kernel = bdl.FlatBasinSGLD(classifier, step_size=1e-2, eta=0.1, collect_anchor=True)
    return run(kernel, X, LABELS, batch_size=8)


@pytest.fixture(scope="module")
def several():
    return sgld(several_sites, X, TARGETS, LABELS, batch_size=8)


@pytest.fixture(scope="module")
def averaged():
    x = jnp.linspace(-1, 1, 100)
    return run(bdl.AveragedSGLD(gaussian, step_size=1e-3, anchor_steps=3), x, x + 1, num_samples=200)


@pytest.fixture(scope="module")
def uncut():
    return sgld(without_subsample, X, TARGETS)


@pytest.fixture(scope="module")
def normalized_run():
    return sgld(normalized, X, TARGETS, batch_size=8)


def network_parameters(samples, prefix="net/"):
    """Flax parameter trees, (chain, draw, ...), from NumPyro's sites."""
    sites = {tuple(k.removeprefix(prefix).split(".")): v for k, v in samples.items() if k.startswith(prefix)}
    return traverse_util.unflatten_dict(sites)


def over_draws(function):
    return jax.jit(jax.vmap(jax.vmap(function)))


def logits(parameters, x):
    return over_draws(lambda p: MLP().apply({"params": p}, x))(parameters)


def assert_close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# ---- functions ----------------------------------------------------------------------------------------------------


def test_functions_are_the_logits_of_a_linen_network(classified):
    functions = bdl.PosteriorPredictive(classified).functions(X_NEW)
    assert set(functions) == {"y"}
    assert isinstance(functions["y"], np.ndarray)
    assert functions["y"].shape == (CHAINS, DRAWS, 11, 3)
    assert_close(functions["y"], logits(network_parameters(classified.get_samples(group_by_chain=True)), X_NEW))


def test_functions_are_the_output_of_an_nnx_network():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 4, rngs=rngs), nnx.Linear(4, 1, use_bias=False, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](nnx.tanh(self.layers[0](x)))[..., 0]

    module = Net(nnx.Rngs(0))

    def regression(x, y=None):
        net = random_nnx_module("net", module, dist.Normal())
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(net(numpyro.subsample(x, event_dim=1)), 0.5), obs=y)

    mcmc = sgld(regression, X, TARGETS)
    w = mcmc.get_samples(group_by_chain=True)
    hidden = jnp.tanh(X_NEW @ w["net/layers.0.kernel"] + w["net/layers.0.bias"][:, :, None])
    functions = bdl.PosteriorPredictive(mcmc, draw_chunk=2, data_chunk=4).functions(X_NEW)
    assert_close(functions["y"], (hidden @ w["net/layers.1.kernel"])[..., 0])


def test_without_arguments_the_rows_are_all_those_of_the_run(classified):
    predictive = bdl.PosteriorPredictive(classified)
    np.testing.assert_array_equal(predictive.functions()["y"], predictive.functions(X)["y"])
    assert predictive.log_likelihood()["y"].shape == (CHAINS, DRAWS, ROWS)


def test_several_observed_sites_and_a_deterministic_one(several):
    slope = several.get_samples(group_by_chain=True)["slope"][..., None]
    predictive = bdl.PosteriorPredictive(several, draw_chunk=3, data_chunk=7)
    functions = predictive.functions(X, TARGETS, sites=("count", "rate", "target"))
    assert_close(functions["count"], slope * X[:, 0])
    assert_close(functions["rate"], np.exp(slope * X[:, 0]))
    assert_close(functions["target"], slope * X[:, 1])


def test_keywords_of_a_run_without_positional_arguments_are_kept():
    def model(x, y=None, flip=False):
        slope = numpyro.sample("slope", dist.Normal())
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal((-slope if flip else slope) * x, 1), obs=y)

    mcmc = sgld(model, x=X[:, 0], y=TARGETS)
    slope = mcmc.get_samples(group_by_chain=True)["slope"][..., None]
    predictive = bdl.PosteriorPredictive(mcmc)
    assert_close(predictive.functions()["y"], slope * X[:, 0])
    assert_close(predictive.functions(flip=True)["y"], -slope * X[:, 0])
    assert_close(predictive.functions(x=X_NEW[:, 0], flip=True)["y"], -slope * X_NEW[:, 0])


# ---- chunks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draw_chunk", "data_chunk"), [(3, 7), (1, 10), (100, 100)])
def test_chunks_change_nothing(classified, draw_chunk, data_chunk):
    whole = bdl.PosteriorPredictive(classified, draw_chunk=CHAINS * DRAWS, data_chunk=None)
    parts = bdl.PosteriorPredictive(classified, draw_chunk=draw_chunk, data_chunk=data_chunk)
    assert_close(parts.functions(X)["y"], whole.functions(X)["y"])
    assert_close(parts.log_likelihood()["y"], whole.log_likelihood()["y"])


def test_rows_of_the_run_can_be_picked(classified):
    predictive = bdl.PosteriorPredictive(classified, data_chunk=3)
    functions, rows = predictive.functions_at_rows(7)
    np.testing.assert_array_equal(rows, [0, 4, 8, 12, 16, 20, 24])
    assert_close(functions["y"], predictive.functions(X)["y"][:, :, rows])
    assert len(predictive.functions_at_rows(1000)[1]) == ROWS


def test_a_model_without_subsample_is_taken_whole(uncut):
    w = uncut.get_samples(group_by_chain=True)["w"]
    predictive = bdl.PosteriorPredictive(uncut, data_chunk=ROWS)
    assert_close(predictive.functions(X)["y"], w @ X.T)
    # rows are then picked afterwards
    functions, rows = predictive.functions_at_rows(7)
    assert_close(functions["y"], (w @ X.T)[..., rows])
    assert len(rows) == 7


def test_a_model_without_subsample_and_many_rows_is_refused(uncut):
    predictive = bdl.PosteriorPredictive(uncut, data_chunk=10)
    text = "can't be cut into 10 of the 25 rows of its plate 'data': .*numpyro.subsample.*; or give data_chunk=None"
    with pytest.raises(ValueError, match=text):
        predictive.functions(X)
    with pytest.raises(ValueError, match=text):
        predictive.log_likelihood(X, TARGETS)


def test_observed_sites_in_plates_of_their_own_are_not_cut():
    def model(x, y, u, *, batch_size=None):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("rows", len(x), subsample_size=batch_size):
            numpyro.sample("y", dist.Normal(mu * numpyro.subsample(x, 0), 1), obs=numpyro.subsample(y, 0))
        with numpyro.plate("others", len(u)):
            numpyro.sample("u", dist.Normal(-mu, 1), obs=u)

    mcmc = sgld(model, X[:, 0], TARGETS, jnp.arange(4.0), batch_size=8)
    mu = mcmc.get_samples(group_by_chain=True)["mu"][..., None]
    functions = bdl.PosteriorPredictive(mcmc, draw_chunk=3, data_chunk=7).functions()
    assert_close(functions["y"], mu * X[:, 0])
    assert_close(functions["u"], -mu * jnp.ones(4))


def test_nested_plates_are_cut_along_the_subsampled_one():
    def model(x, y, *, batch_size=None):
        mu = numpyro.sample("mu", dist.Normal())
        data = numpyro.plate("data", len(x), subsample_size=batch_size, dim=-2)
        with data as rows, numpyro.plate("group", 30, dim=-1):
            numpyro.sample("y", dist.Normal(mu * x[rows, :1] * jnp.arange(30), 1), obs=y[rows])

    mcmc = sgld(model, X, jnp.zeros((ROWS, 30)), batch_size=8)
    expected = mcmc.get_samples(group_by_chain=True)["mu"][..., None, None] * X[:, :1] * jnp.arange(30)
    for data_chunk in (None, 7):
        predictive = bdl.PosteriorPredictive(mcmc, draw_chunk=3, data_chunk=data_chunk)
        assert_close(predictive.functions()["y"], expected)
        functions, rows = predictive.functions_at_rows(4)
        np.testing.assert_array_equal(rows, [0, 8, 16, 24])
        assert_close(functions["y"], expected[:, :, rows])


# ---- log likelihood and samples -----------------------------------------------------------------------------------


def test_log_likelihood_is_that_of_the_distribution(classified):
    y_new = LABELS[:11]
    predictive = bdl.PosteriorPredictive(classified, draw_chunk=3, data_chunk=4)
    expected = dist.Categorical(logits=predictive.functions(X_NEW)["y"]).log_prob(y_new)
    assert_close(predictive.log_likelihood(X_NEW, y_new)["y"], expected)


def test_log_likelihood_is_that_of_numpyro(classified):
    samples = classified.get_samples(group_by_chain=True)
    expected = log_likelihood(classifier, samples, X, LABELS, batch_ndims=2)["y"]
    assert_close(bdl.PosteriorPredictive(classified).log_likelihood()["y"], expected)


def test_log_likelihood_has_no_plate_or_scale_factors(several):
    slope, x = np.asarray(several.get_samples(group_by_chain=True)["slope"])[..., None], np.asarray(X)
    values = bdl.PosteriorPredictive(several).log_likelihood()
    assert_close(values["count"], stats.poisson(np.exp(slope * x[:, 0])).logpmf(LABELS))
    assert_close(values["target"], stats.norm(slope * x[:, 1]).logpdf(TARGETS))
    assert_close(values["area"], stats.gamma(np.exp(slope[..., 0])).logpdf(1.0))


@pytest.mark.parametrize("data_chunk", [None, 30])
def test_samples_follow_the_distribution_of_their_draw(averaged, data_chunk):
    predictive = bdl.PosteriorPredictive(averaged, draw_chunk=64, data_chunk=data_chunk)
    sigma = averaged.get_samples(group_by_chain=True)["sigma"][..., None]
    # the data of the run are observed, but new data are drawn all the same
    noise = (predictive.sample(random.key(1))["y"] - predictive.functions()["y"]) / sigma
    n = noise.size
    assert abs(noise.mean()) < 4 / np.sqrt(n)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / n)
    # rows and draws have noise of their own, across chunks too
    for one, other in ((noise[..., :30], noise[..., 30:60]), (noise[:, :-1], noise[:, 1:]), (noise[0], noise[1])):
        assert abs(np.mean(one * other)) < 4 / np.sqrt(one.size)


def test_samples_are_a_function_of_their_key(averaged):
    predictive = bdl.PosteriorPredictive(averaged)
    once, again, other = (predictive.sample(random.key(k), jnp.zeros(4))["y"] for k in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.all(once != other)


# ---- what a model keeps besides its latent sites ------------------------------------------------------------------


def test_each_draw_predicts_with_its_own_batch_statistics(normalized_run):
    parameters = network_parameters(normalized_run.get_samples(group_by_chain=True))
    statistics = normalized_run.get_extra_fields(group_by_chain=True)["mutable"]["net$state"]
    assert len(np.unique(jax.tree.leaves(statistics)[0])) == CHAINS * DRAWS

    def apply(p, s):
        return Normalized().apply({"params": p, **s}, X_NEW, train=False)

    predictive = bdl.PosteriorPredictive(normalized_run, draw_chunk=3, data_chunk=4)
    assert_close(predictive.functions(X_NEW, train=False)["y"], over_draws(apply)(parameters, statistics))


def test_keywords_alone_are_put_over_those_of_the_run(normalized_run):
    predictive = bdl.PosteriorPredictive(normalized_run)
    running, batch = predictive.functions(train=False)["y"], predictive.functions()["y"]
    np.testing.assert_array_equal(running, predictive.functions(X, TARGETS, train=False)["y"])
    assert np.abs(running - batch).max() > 1e-3
    # another value of a fixed argument is another program, and does not replace the first
    np.testing.assert_array_equal(batch, predictive.functions(train=True)["y"])


def test_a_kernel_that_keeps_no_batch_statistics_is_told_so():
    mcmc = run(HMC(normalized, num_steps=1, trajectory_length=None), X, TARGETS, num_samples=2, num_chains=1)
    with pytest.raises(ValueError, match=r"mutable collections \(BatchNorm\), which HMC does not keep with its draws"):
        bdl.PosteriorPredictive(mcmc)


def test_each_draw_has_a_dropout_mask_of_its_own():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(40, use_bias=False)(x))

    def model(x, train=True):
        net = random_flax_module("net", Dropped(), dist.Normal(), apply_rng=["dropout"], input_shape=(2,), train=True)
        with numpyro.plate("data", len(x)):
            xb = numpyro.subsample(x, event_dim=1)
            outputs = net(xb, train, rngs={"dropout": numpyro.prng_key()})
            numpyro.sample("y", dist.Normal(outputs, 1).to_event(1), obs=jnp.zeros((len(xb), 40)))

    predictive = bdl.PosteriorPredictive(sgld(model, X[:3]), draw_chunk=4)
    masks = (predictive.functions()["y"] == 0).reshape(CHAINS * DRAWS, -1)
    assert abs(masks.mean() - 0.5) < 4 * 0.5 / np.sqrt(masks.size)
    assert len({tuple(mask) for mask in masks}) == CHAINS * DRAWS
    assert not (predictive.functions(train=False)["y"] == 0).any()


def test_frozen_parameters_are_put_in():
    prior = {"Dense_0.bias": dist.Normal(), "Dense_1.bias": dist.Normal()}

    def model(x, y=None):
        net = random_flax_module("net", MLP(), prior, input_shape=(2,))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Categorical(logits=net(numpyro.subsample(x, event_dim=1))), obs=y)

    mcmc = run(bdl.SGLD(model, step_size=1e-2, frozen=("net/Dense_?.kernel",)), X, LABELS)
    frozen = mcmc.sampler.potential.frozen
    assert set(frozen) == {"net/Dense_0.kernel", "net/Dense_1.kernel"}
    drawn = mcmc.get_samples(group_by_chain=True)
    same = {name: jnp.broadcast_to(value, (CHAINS, DRAWS, *value.shape)) for name, value in frozen.items()}
    functions = bdl.PosteriorPredictive(mcmc).functions(X_NEW)
    assert_close(functions["y"], logits(network_parameters(drawn | same), X_NEW))


# ---- members ------------------------------------------------------------------------------------------------------


def test_anchors_predict_by_the_same_network(classified):
    anchor = network_parameters(classified.get_extra_fields(group_by_chain=True)["z_anchor"])
    assert_close(bdl.PosteriorPredictive(classified, members="anchor").functions(X_NEW)["y"], logits(anchor, X_NEW))


def test_both_members_are_positions_then_anchors(classified):
    position, anchor, both = (
        bdl.PosteriorPredictive(classified, members=m, draw_chunk=3).functions(X_NEW)["y"]
        for m in ("position", "anchor", "both")
    )
    assert both.shape == (CHAINS, 2 * DRAWS, 11, 3)
    assert_close(both, np.concatenate([position, anchor], axis=1))


def test_the_average_of_averaged_sgld_is_a_member_too_and_constrained(averaged):
    anchor = averaged.get_extra_fields(group_by_chain=True)["z_anchor"]
    predictive = bdl.PosteriorPredictive(averaged, members="anchor")
    y = np.zeros(3)
    expected = stats.norm(np.asarray(anchor["mu"])[..., None], np.exp(anchor["sigma"])[..., None]).logpdf(y)
    assert_close(predictive.log_likelihood(y, y)["y"], expected)


# ---- programs and runs --------------------------------------------------------------------------------------------


def test_a_second_call_of_equal_shapes_compiles_nothing(classified, compilations):
    predictive = bdl.PosteriorPredictive(classified, draw_chunk=3, data_chunk=7)
    predictive.functions(X)
    predictive.log_likelihood(X, LABELS)
    predictive.sample(random.key(0), X)
    assert compilations
    x, y = X + 1, LABELS * 0
    compilations.clear()
    predictive.functions(x)
    predictive.log_likelihood(x, y)
    predictive.sample(random.key(1), x)
    assert compilations == []


def test_a_run_of_nuts_is_accepted():
    mcmc = run(NUTS(without_subsample), X, TARGETS, num_warmup=5)
    w = mcmc.get_samples(group_by_chain=True)["w"]
    assert_close(bdl.PosteriorPredictive(mcmc).functions(X_NEW)["y"], w @ X_NEW.T)


def test_a_run_with_a_bad_chain_warns():
    start = {"w": jnp.array([[0.0, 0.0], [1e30, 0.0]])}
    mcmc = sgld(without_subsample, X, TARGETS, init_params=start)
    with pytest.warns(UserWarning, match="Chain 1 met a gradient that was not finite at step 0; its draws .* are NaN"):
        predictive = bdl.PosteriorPredictive(mcmc)
    functions = predictive.functions(X)["y"]
    assert np.isfinite(functions[0]).all()
    assert np.isnan(functions[1]).all()


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"members": "anchors"}, "members must be one of 'position', 'anchor', 'both', got 'anchors'"),
        ({"members": "anchor"}, "collected no anchor; make the kernel with collect_anchor=True"),
        ({"draw_chunk": 0}, "draw_chunk must be an integer of at least 1, got 0"),
        ({"data_chunk": 2.5}, "data_chunk must be an integer of at least 1, got 2.5"),
    ],
)
def test_arguments_are_refused(uncut, arguments, text):
    with pytest.raises(ValueError, match=text):
        bdl.PosteriorPredictive(uncut, **arguments)


def test_a_run_without_draws_is_refused():
    with pytest.raises(ValueError, match="holds no draws yet; run it first"):
        bdl.PosteriorPredictive(MCMC(bdl.SGLD(classifier, step_size=0.1), num_warmup=0, num_samples=1))


def test_unknown_sites_are_refused(classified):
    with pytest.raises(ValueError, match="The model has no site 'logits'; it has: .*y"):
        bdl.PosteriorPredictive(classified).functions(X, sites=("logits",))


def test_a_distribution_without_natural_parameter_is_refused(several):
    with pytest.raises(ValueError, match="'area' is a Gamma, of which no natural parameter is known; .*deterministic"):
        bdl.PosteriorPredictive(several).functions()


def test_log_likelihood_without_an_observation_is_refused(classified):
    with pytest.raises(ValueError, match="log_likelihood needs an observation at site 'y'"):
        bdl.PosteriorPredictive(classified).log_likelihood(X_NEW)


def test_bad_test_data_are_refused(classified):
    with pytest.raises(ValueError, match=r"argument 'x' has 1 NaN or infinite entries, the first at index \(3, 1\)"):
        bdl.PosteriorPredictive(classified).functions(X_NEW.at[3, 1].set(jnp.nan))


# ---- arguments, keys and pickles --------------------------------------------------------------------------------


def two_normals(x, y=None, z=None):
    slope = numpyro.sample("slope", dist.Normal())
    with numpyro.plate("data", len(x)):
        xb = numpyro.subsample(x, event_dim=0)
        yb, zb = (None if v is None else numpyro.subsample(v, event_dim=0) for v in (y, z))
        numpyro.sample("y", dist.Normal(slope * xb, 1), obs=yb)
        numpyro.sample("z", dist.Normal(slope * xb, 1), obs=zb)


def of_two(x=X[:6, 0], dtype=np.float32, **options):
    draws = {"slope": np.arange(6).reshape(2, 3).astype(dtype)}
    return bdl.PosteriorPredictive(bdl.Samples(two_normals, draws, (x, x, x)), progress_bar=False, **options)


def test_new_values_differ_between_chunks_of_rows():
    sampled = of_two(jnp.ones(4), data_chunk=2).sample(random.key(1))["y"]
    assert np.all(sampled[..., 0] != sampled[..., 2])


def test_new_values_of_a_site_are_the_same_whichever_sites_are_asked_for():
    predictive = of_two()
    sampled = predictive.sample(random.key(1))
    assert np.all(sampled["y"] != sampled["z"])
    for name in ("y", "z"):
        found = predictive.summary(sites=(name,), quantiles=(0.5,), rng_key=random.key(1))[name]
        expected = np.median(sampled[name].reshape(6, -1).astype(float), 0)
        np.testing.assert_allclose(found.quantiles[:, 0], expected, rtol=1e-6)


def test_a_chunk_may_be_an_integer_of_numpy():
    def uncut(y):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", 4):
            numpyro.sample("y", dist.Normal(mu * jnp.ones(4), 1), obs=y)

    samples = bdl.Samples(uncut, {"mu": np.zeros((1, 2))}, (jnp.ones(4),))
    with pytest.raises(ValueError, match="can't be cut into 2 of the 4 rows"):
        bdl.PosteriorPredictive(samples, data_chunk=np.int64(2), draw_chunk=np.int64(1)).functions()


def test_draws_may_be_integers():
    assert of_two(dtype=int).summary()["y"].mean.shape == (6,)


@pytest.mark.parametrize("chains", [0, [True], [0.0], [0, 0], "0", [[0]], [2]])
def test_chains_must_be_different_integers(chains):
    with pytest.raises(ValueError, match="chains must be some of 0 to 1, got .* different integers"):
        of_two(chains=chains)


def test_it_can_be_pickled_after_a_call():
    predictive = of_two()
    expected = predictive.functions()["y"]
    # the model is a function of this file
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(predictive)).functions()["y"], expected)
