# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Summaries against what NumPy makes of all predictions at once."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import random
from numpyro.infer import MCMC
from scipy import special, stats

import numpyro_bdl as bdl
from numpyro_bdl import _accumulators, metrics, uncertainty

CHAINS, DRAWS, ROWS = 2, 7, 25
X = random.normal(random.key(100), (ROWS, 2))
TARGETS = random.normal(random.key(101), (ROWS, 2))
LABELS = random.randint(random.key(102), (ROWS,), 0, 3)
KEY = random.key(7)


def regression(x, y=None, offset=0.0):
    """Two outputs, of which each draw has its own scale."""
    w = numpyro.sample("w", dist.Normal().expand([2, 2]).to_event(2))
    sigma = numpyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("data", len(x)), numpyro.handlers.scale(scale=3.0):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", dist.Normal(offset + xb @ w, sigma).to_event(1), obs=yb)


def classifier(x, y=None):
    w = numpyro.sample("w", dist.Normal(0, 3).expand([2, 3]).to_event(2))
    with numpyro.plate("data", len(x)):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=xb @ w), obs=yb)


def single(law, value=0.0):
    """One row of a law at a latent mu."""

    def model():
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", 1):
            numpyro.sample("y", law(mu), obs=jnp.full(1, value))

    return model


def run(model, *args, num_samples=DRAWS, num_chains=CHAINS, step_size=1e-3, init_params=None, **kwargs):
    mcmc = MCMC(
        bdl.SGLD(model, step_size=step_size),
        num_warmup=0,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(0), *args, init_params=init_params, **kwargs)
    return mcmc


@pytest.fixture(scope="module")
def numbers():
    return run(regression, X, TARGETS)


@pytest.fixture(scope="module")
def classes():
    return run(classifier, X, LABELS)


def close(one, other, rtol=1e-12, atol=1e-13):
    np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


# ---- accumulators -------------------------------------------------------------------------------------------------


@st.composite
def blocks_of(draw, values):
    """Values (draw, ...) cut anywhere along the draws."""
    cuts = draw(st.sets(st.integers(1, len(values) - 1))) if len(values) > 1 else set()
    return np.split(values, sorted(cuts))


def taken(accumulator, blocks):
    for block in blocks:
        accumulator.add(block)
    return accumulator


few = settings(max_examples=40, deadline=None)


@few
@given(st.data(), st.integers(1, 40), st.sampled_from([0.0, 1e4, -1e7]), st.sampled_from([np.float32, np.float64]))
def test_moments_of_blocks_are_those_of_all(data, count, offset, dtype):
    values = (offset + np.random.default_rng(count).normal(size=(count, 3))).astype(dtype)
    moments = taken(_accumulators.Moments(), data.draw(blocks_of(values)))
    exact = values.astype(np.longdouble)
    close(moments.mean, exact.mean(0).astype(float))
    # each merge rounds the means; the second moment less the squared mean would be off by the square of the offset
    sd, eps = exact.std(0), np.finfo(float).eps
    assert (np.abs(moments.variance - sd**2) <= 4 * count * eps * sd * (sd + np.abs(exact.mean(0)))).all()


@few
@given(st.data(), st.integers(1, 12))
def test_log_mean_of_blocks_is_that_of_all(data, count):
    rng = np.random.default_rng(count)
    values = rng.choice([-np.inf, -1e5, -3.0, 0.5, 80.0], (count, 6)) + rng.normal(size=(count, 6))
    found = taken(_accumulators.LogMeanExp(), data.draw(blocks_of(values))).value
    close(found, metrics.log_predictive_density(values[None]))
    close(found, special.logsumexp(values, 0) - np.log(count))


@few
@given(st.data(), st.integers(1, 12), st.integers(1, 4))
def test_classes_of_blocks_are_those_of_all(data, count, num_classes):
    logits = 30 * np.random.default_rng(count).normal(size=(count, 5, num_classes))
    found = taken(_accumulators.Classes(), data.draw(blocks_of(logits)))
    each = special.softmax(logits, -1)
    close(found.mean_probabilities, each.mean(0))
    close(found.expected_entropy, stats.entropy(each, axis=-1).mean(0))
    divergences = stats.entropy(each, np.broadcast_to(each.mean(0), each.shape), axis=-1)
    close(found.mutual_information, divergences.mean(0), rtol=1e-9, atol=1e-12)
    assert (found.mutual_information >= 0).all()


@few
@given(st.data(), st.integers(1, 12))
def test_quantiles_of_blocks_are_those_of_all(data, count):
    values = np.random.default_rng(count).normal(size=(count, 3, 2)).astype(np.float32)
    levels = np.array([0.0, 0.3, 1.0])
    found = taken(_accumulators.Values(), data.draw(blocks_of(values))).quantiles(levels)
    close(found, np.moveaxis(np.quantile(values.astype(float), levels, 0), 0, -1))


# ---- of a run -----------------------------------------------------------------------------------------------------

splits = given(st.integers(1, CHAINS * DRAWS + 1), st.integers(1, ROWS + 1))
compiled = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@compiled
@splits
def test_a_summary_of_classes_is_that_of_all_draws(classes, draw_chunk, data_chunk):
    predictive = bdl.PosteriorPredictive(classes, draw_chunk=draw_chunk, data_chunk=data_chunk)
    found = predictive.summary(X, LABELS)["y"]
    logits = predictive.functions(X)["y"]
    probabilities = metrics.mean_probabilities(logits)
    assert probabilities.shape == found.mean_probabilities.shape == (ROWS, 3)
    close(found.mean_probabilities, probabilities)
    close(found.predictive_entropy, uncertainty.predictive_entropy(probabilities))
    close(found.expected_entropy, uncertainty.expected_entropy(logits))
    close(found.mutual_information, uncertainty.mutual_information(logits))
    close(found.log_predictive_density, np.log(probabilities[np.arange(ROWS), LABELS]), rtol=1e-5, atol=1e-6)
    assert predictive.summary(X)["y"].log_predictive_density is None


@compiled
@splits
def test_a_summary_of_numbers_is_that_of_all_draws(numbers, draw_chunk, data_chunk):
    predictive = bdl.PosteriorPredictive(numbers, draw_chunk=draw_chunk, data_chunk=data_chunk)
    found = predictive.summary(X, TARGETS)["y"]
    sigma = np.asarray(numbers.get_samples(group_by_chain=True)["sigma"])[..., None, None]
    means = predictive.functions(X)["y"]
    parts = uncertainty.variance_decomposition(means, np.square(sigma))
    close(found.mean, means.astype(float).mean((0, 1)))
    close(found.variance_of_means, parts.epistemic)
    close(found.mean_of_variances, parts.aleatoric, rtol=1e-6)
    close(found.variance, found.mean_of_variances + found.variance_of_means)
    # plate and scale factors are left out
    close(found.log_predictive_density, metrics.log_predictive_density(predictive.log_likelihood(X, TARGETS)["y"]))
    assert found.log_predictive_density.shape == (ROWS,)
    assert found.quantiles is None


@compiled
@splits
def test_quantiles_are_those_of_new_data(numbers, draw_chunk, data_chunk):
    predictive = bdl.PosteriorPredictive(numbers, draw_chunk=draw_chunk, data_chunk=data_chunk)
    levels = (0.05, 0.5, 1.0)
    found = predictive.summary(X, quantiles=levels, rng_key=KEY)["y"]
    new = predictive.sample(KEY, X)["y"].astype(float)
    close(found.quantiles, np.moveaxis(np.quantile(new, levels, (0, 1)), 0, -1))
    assert found.quantiles.shape == (ROWS, 2, 3)
    without = predictive.summary(X)["y"]
    close(found.mean, without.mean)
    close(found.variance, without.variance)


def test_quantiles_are_those_of_the_mixture():
    mcmc = run(regression, X, TARGETS, num_samples=2000, num_chains=1)
    predictive = bdl.PosteriorPredictive(mcmc, draw_chunk=500)
    levels = np.array([0.1, 0.5, 0.9])
    found = predictive.summary(X[:5], quantiles=levels, rng_key=KEY)["y"].quantiles
    mean = predictive.functions(X[:5])["y"][0]
    sigma = np.asarray(mcmc.get_samples()["sigma"])[:, None, None, None]
    at = stats.norm(mean[..., None], sigma).cdf(found).mean(0)
    # draws of mu are correlated, but the new values given them are not, and the mixture is that of these draws
    error = np.sqrt(levels * (1 - levels) / 2000)
    assert (np.abs(at - levels) < 4 * error).all()


def test_an_offset_costs_no_digits(numbers):
    predictive = bdl.PosteriorPredictive(numbers, draw_chunk=3, data_chunk=4)
    means = predictive.functions(X, offset=1e4)["y"].astype(np.longdouble)
    found = predictive.summary(X, offset=1e4)["y"]
    close(found.mean, means.mean((0, 1)).astype(float))
    close(found.variance_of_means, means.var((0, 1)).astype(float), rtol=1e-9)
    plain = predictive.summary(X, offset=0.0)["y"]
    # what the offset does cost is the precision of the predictions themselves, half a unit in the last place each
    assert np.abs(np.sqrt(found.variance_of_means) - np.sqrt(plain.variance_of_means)).max() < 2**-10


def test_a_law_of_total_variance_by_hand():
    mcmc = run(single(lambda mu: dist.Poisson(jnp.exp(mu))), num_samples=50)
    found = bdl.PosteriorPredictive(mcmc).summary()["y"]
    rate = np.exp(np.asarray(mcmc.get_samples()["mu"], float))
    close(found.mean, [rate.mean()], rtol=1e-6)
    close(found.mean_of_variances, [rate.mean()], rtol=1e-6)
    close(found.variance_of_means, [rate.var()], rtol=1e-4)
    close(found.log_predictive_density, [np.log(np.exp(-rate).mean())], rtol=1e-5)


def test_a_bernoulli_site_has_two_classes():
    mcmc = run(single(lambda mu: dist.Bernoulli(logits=20 + mu), 1))
    found = bdl.PosteriorPredictive(mcmc).summary()["y"]
    logit = 20 + np.asarray(mcmc.get_samples()["mu"])
    close(found.mean_probabilities, [[special.expit(-logit).mean(), special.expit(logit).mean()]], rtol=1e-5)
    close(found.expected_entropy, [stats.bernoulli(special.expit(-logit.astype(float))).entropy().mean()], rtol=1e-5)


def test_one_draw_is_its_own_mixture():
    classified = run(classifier, X, LABELS, num_samples=1, num_chains=1)
    predictive = bdl.PosteriorPredictive(classified)
    found = predictive.summary(X[:1], LABELS[:1])["y"]
    close(found.mutual_information, [0.0])
    close(found.log_predictive_density, predictive.log_likelihood(X[:1], LABELS[:1])["y"][0, 0])
    predictive = bdl.PosteriorPredictive(run(regression, X, TARGETS, num_samples=1, num_chains=1))
    found = predictive.summary(X[:1], quantiles=(0.0, 1.0), rng_key=KEY)["y"]
    assert (found.variance_of_means == 0).all()
    new = predictive.sample(KEY, X[:1])["y"][0, 0]
    close(found.quantiles, np.stack([new, new], -1))


def test_one_class_is_certain():
    def model(x):
        w = numpyro.sample("w", dist.Normal())
        with numpyro.plate("data", len(x)):
            xb = numpyro.subsample(x, event_dim=1)
            numpyro.sample("y", dist.Categorical(logits=w * xb[:, :1]), obs=jnp.zeros(len(xb), int))

    found = bdl.PosteriorPredictive(run(model, X)).summary(X[:4])["y"]
    np.testing.assert_array_equal(found.mean_probabilities, np.ones((4, 1)))
    for values in found[1:]:
        np.testing.assert_array_equal(values, np.zeros(4))


def test_rows_come_first_and_sites_outside_of_the_plate_once():
    def model(x, y, counts=None):
        mu = numpyro.sample("mu", dist.Normal())
        data = numpyro.plate("data", len(x), dim=-1)
        with data as rows, numpyro.plate("group", 3, dim=-2):
            numpyro.sample("y", dist.Normal(mu * x[rows, 0] + jnp.arange(3.0)[:, None], 1), obs=y[:, rows])
        numpyro.sample("total", dist.Normal(mu, 2.0), obs=1.0)

    mcmc = run(model, X, jnp.zeros((3, ROWS)))
    mu = np.asarray(mcmc.get_samples()["mu"], float)
    for data_chunk in (None, 4):
        predictive = bdl.PosteriorPredictive(mcmc, draw_chunk=3, data_chunk=data_chunk)
        found = predictive.summary(quantiles=(0.5,), rng_key=KEY)
        close(found["y"].mean, mu.mean() * np.asarray(X[:, :1]) + np.arange(3), rtol=1e-5, atol=1e-5)
        assert found["y"].quantiles.shape == (ROWS, 3, 1)
        assert found["total"].mean.shape == ()
        close(found["total"].mean, mu.mean(), rtol=1e-6)
        close(found["total"].variance_of_means, mu.var(), rtol=1e-5)
        close(found["total"].quantiles, [np.median(predictive.sample(KEY)["total"])], rtol=1e-6)
        assert list(predictive.summary(sites=("total",))) == ["total"]


def test_masked_rows_have_no_density():
    def model(mask):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", 3):
            numpyro.sample("y", dist.Normal(mu, 1).mask(numpyro.subsample(mask, 0)), obs=jnp.zeros(3))

    found = bdl.PosteriorPredictive(run(model, jnp.array([True, False, True]))).summary()["y"]
    assert found.log_predictive_density[1] == 0
    assert (found.log_predictive_density[[0, 2]] < -0.9).all()


def test_chains_can_be_left_out(numbers):
    found = bdl.PosteriorPredictive(numbers, chains=[1]).summary(X)["y"]
    close(found.mean, bdl.PosteriorPredictive(numbers).functions(X)["y"][1].astype(float).mean(0))


def test_a_law_without_a_mean_has_none():
    predictive = bdl.PosteriorPredictive(run(single(lambda mu: dist.Cauchy(mu, 1))))
    found = predictive.summary(quantiles=(0.5,), rng_key=KEY)["y"]
    assert np.isnan([found.mean, found.variance]).all()
    assert np.isfinite([found.log_predictive_density, found.quantiles[:, 0]]).all()


def test_an_infinite_variance_is_infinite():
    found = bdl.PosteriorPredictive(run(single(lambda mu: dist.StudentT(1.5, mu, 1)))).summary()["y"]
    assert found.variance == found.mean_of_variances == np.inf
    assert np.isfinite([found.mean, found.variance_of_means]).all()


# ---- memory and work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantiles", [(), (0.5,)])
def test_memory_holds_a_block_whatever_the_number_of_draws(monkeypatch, quantiles):
    mcmc = run(regression, X, TARGETS, num_samples=60)
    seen, most, largest = [], 0, 0

    def watched(add):
        def watch(self, values):
            nonlocal most, largest
            owner = values if values.base is None else values.base  # a view keeps it alive
            seen.append((weakref.ref(owner), values.nbytes))
            most = max(most, sum(size for owner, size in seen if owner() is not None))
            largest = max(largest, values.size)
            add(self, values)

        return watch

    for accumulator in (_accumulators.Mean, _accumulators.Moments, _accumulators.LogMeanExp, _accumulators.Values):
        monkeypatch.setattr(accumulator, "add", watched(accumulator.add))
    predictive = bdl.PosteriorPredictive(mcmc, draw_chunk=4, data_chunk=5)
    predictive.summary(X, TARGETS, quantiles=quantiles, rng_key=KEY)
    numbers = 4 * 5 * 2
    assert largest == numbers
    block = 4 * (2 * numbers + 4 * 5)  # means and variances in single precision, and a log density for each row
    kept = 4 * 120 * 5 * 2 if quantiles else 0  # new values of a chunk of rows, at all draws
    # the new values of all rows would be five times as much as those of a chunk
    assert block <= most <= block + kept


def test_each_draw_is_brought_to_the_device_once_unless_for_quantiles(numbers, monkeypatch):
    brought = []
    device_put = jax.device_put

    def put(values, *args):
        brought.append(values)
        return device_put(values, *args)

    predictive = bdl.PosteriorPredictive(numbers, draw_chunk=5, data_chunk=5)
    monkeypatch.setattr(jax, "device_put", put)
    predictive.summary(X)
    assert [len(values["w"]) for values, _ in brought] == [5, 5, 5]
    brought.clear()
    predictive.summary(X, quantiles=(0.5,), rng_key=KEY)
    assert len(brought) == 15


def test_chunks_are_even(numbers):
    # 15 draws in chunks of at most 10 would leave 5 of 20 idle
    predictive = bdl.PosteriorPredictive(numbers, draw_chunk=10, data_chunk=24)
    shapes = []

    class Watched(_accumulators.Moments):
        def add(self, values):
            shapes.append(values.shape[:2])
            super().add(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bdl.summary._ACCUMULATORS, "mean", Watched)
        predictive.summary(X)
    assert shapes == [(7, 13), (7, 12), (7, 13), (7, 12)]


def test_a_second_summary_of_equal_shapes_compiles_nothing(numbers, compilations):
    predictive = bdl.PosteriorPredictive(numbers, draw_chunk=3, data_chunk=7)
    predictive.summary(X, TARGETS)
    predictive.summary(X, quantiles=(0.5,), rng_key=KEY)
    x, y, key = X + 1, TARGETS * 2, random.key(8)
    assert compilations
    compilations.clear()
    predictive.summary(x, y)
    predictive.summary(x, quantiles=(0.1,), rng_key=key)
    assert compilations == []


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_draws_that_are_nan_are_refused_and_can_be_left_out():
    start = {"w": jnp.stack([jnp.zeros((2, 2)), jnp.full((2, 2), 1e30)]), "sigma": jnp.ones(2)}
    mcmc = run(regression, X, TARGETS, init_params=start)
    with pytest.warns(UserWarning, match="Chain 1 met a gradient that was not finite"):
        predictive = bdl.PosteriorPredictive(mcmc)
    text = r"7 of 14 draws are NaN or infinite, the first at chain 1, draw 0. Leave chains \[1\] out by .*chains=\.\.\."
    with pytest.raises(ValueError, match=text):
        predictive.summary(X)
    assert np.isfinite(bdl.PosteriorPredictive(mcmc, chains=[0]).summary(X)["y"].variance).all()


def test_predictions_that_overflow_are_refused(classes, numbers):
    huge = jnp.zeros((3, 2)).at[1].set(3e38)
    predictive = bdl.PosteriorPredictive(classes)
    chain, draw, row = np.argwhere(~np.isfinite(predictive.functions(huge)["y"].max(-1)))[0]
    text = f"the logits of site 'y' at chain {chain}, draw {draw}, row {row} is NaN or infinite, though the draw is"
    assert row == 1
    with pytest.raises(ValueError, match=text):
        predictive.summary(huge)


def test_densities_that_are_infinite_are_refused():
    def model(scale):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", len(scale)):
            law = dist.Normal(0 * mu, numpyro.subsample(scale, 0))
            numpyro.sample("y", law, obs=numpyro.subsample(jnp.zeros(len(scale)), 0))

    predictive = bdl.PosteriorPredictive(run(model, jnp.ones(5)), data_chunk=2, draw_chunk=3)
    with pytest.raises(ValueError, match="log likelihood of site 'y' at chain 0, draw 0, row 3 is NaN or infinite"):
        predictive.summary(jnp.ones(5).at[3].set(0.0))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"sites": ("f",)}, r"sites must be observed ones, \['y'\], got \['f'\]"),
        ({"quantiles": (0.5, 1.5), "rng_key": KEY}, r"quantiles must be levels from 0 to 1, got \(0.5, 1.5\)"),
        ({"quantiles": 0.5, "rng_key": KEY}, "quantiles must be levels from 0 to 1, got 0.5"),
        ({"quantiles": (np.nan,), "rng_key": KEY}, "quantiles must be levels from 0 to 1"),
        ({"quantiles": (0.5,)}, "quantiles are of new values; give an rng_key to draw them with"),
    ],
)
def test_arguments_are_refused(numbers, arguments, text):
    with pytest.raises(ValueError, match=text):
        bdl.PosteriorPredictive(numbers).summary(X, **arguments)


def test_quantiles_of_classes_are_refused(classes):
    with pytest.raises(ValueError, match=r"sites \['y'\] are of classes, without quantiles; name others by sites"):
        bdl.PosteriorPredictive(classes).summary(X, quantiles=(0.5,), rng_key=KEY)


@pytest.mark.parametrize("chains", [[], [2], [-1]])
def test_unknown_chains_are_refused(numbers, chains):
    with pytest.raises(ValueError, match="chains must be some of 0 to 1, got"):
        bdl.PosteriorPredictive(numbers, chains=chains)


def test_a_probe_of_another_shape_is_refused(numbers):
    predictive = bdl.PosteriorPredictive(numbers)
    text = r"evaluated at these arguments: 'x' has shape \(25, 3\), in the run \(25, 2\). Only the number of rows"
    for method in (predictive.summary, predictive.functions):
        with pytest.raises(ValueError, match=text):
            method(jnp.ones((ROWS, 3)))


def test_observations_that_would_be_paired_each_with_each_are_refused(classes):
    predictive = bdl.PosteriorPredictive(classes)
    for method in (predictive.summary, predictive.log_likelihood):
        with pytest.raises(ValueError, match=r"'y' has shape \(25, 1\), in the run \(25,\). Only the number of rows"):
            method(X, LABELS[:, None])

    def model(data):
        classifier(*data)

    with pytest.raises(ValueError, match=r"observation at site 'y' has shape \(25, 1\), but its law is of \(25,\)"):
        bdl.PosteriorPredictive(run(model, (X, LABELS))).log_likelihood((X, LABELS[:, None]))


def test_a_law_whose_mean_is_not_known_is_refused():
    def law(mu):
        return dist.TransformedDistribution(dist.Normal(mu, 1), dist.transforms.SigmoidTransform())

    predictive = bdl.PosteriorPredictive(run(single(law, 0.5)))
    with pytest.raises(ValueError, match="no mean and variance of the observed site 'y', a TransformedDistribution"):
        predictive.summary()


# ---- shapes that pair each with each --------------------------------------------------------------------------


def head(x, y=None):
    """One number for each row, but (row, 1) if x is."""
    w = numpyro.sample("w", dist.Normal())
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(w * x, 1), obs=y)


def test_a_network_head_of_one_column_is_refused_before_a_run():
    text = r"observation at site 'y' has shape \(25,\), but its law is of \(25, 25\); reshape one"
    with pytest.raises(ValueError, match=text):
        run(head, X[:, :1], TARGETS[:, 0])
    with pytest.raises(ValueError, match=text):
        bdl.Samples(head, {"w": np.zeros((1, 2))}, (X[:, :1], TARGETS[:, 0]))


def test_one_number_may_be_observed_at_every_row():
    found = bdl.PosteriorPredictive(bdl.Samples(head, {"w": np.zeros((1, 2))}, (X[:, 0], 0.0))).log_likelihood()
    np.testing.assert_allclose(found["y"], stats.norm.logpdf(0) * np.ones((1, 2, ROWS)), rtol=1e-6)


def test_a_law_with_more_axes_than_in_the_run_is_refused():
    predictive = bdl.PosteriorPredictive(bdl.Samples(head, {"w": np.zeros((1, 2))}, (X[:, 0], TARGETS[:, 0])))
    text = r"site 'y' has other axes than in the run: 'x' has shape \(5, 1\), in the run \(25,\)"
    for method in (predictive.summary, predictive.functions):
        with pytest.raises(ValueError, match=text):
            method(X[:5, :1])
    assert predictive.functions(X[:5, 0])["y"].shape == (1, 2, 5)


def test_a_law_with_other_outputs_than_in_the_run_is_refused():
    def outputs(x, y=None):
        w = numpyro.sample("w", dist.Normal())
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(w * x, 1).to_event(1), obs=y)

    predictive = bdl.PosteriorPredictive(bdl.Samples(outputs, {"w": np.zeros((1, 2))}, (X, TARGETS)))
    with pytest.raises(ValueError, match="site 'y' has other axes than in the run"):
        predictive.summary(X[:, :1])


# ---- predictions that are NaN -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"quantiles": (0.5,), "rng_key": KEY}])
@pytest.mark.parametrize("where", ["location", "scale"])
def test_predictions_that_are_nan_are_refused_without_an_observation(options, where):
    def model(x, y=None):
        a = numpyro.sample("a", dist.Normal())
        zero = jnp.exp(200 * a) * x * 0
        with numpyro.plate("data", len(x)):
            law = dist.Normal(zero, 1) if where == "location" else dist.Cauchy(0, 1 + zero)
            numpyro.sample("y", law, obs=y)

    predictive = bdl.PosteriorPredictive(bdl.Samples(model, {"a": np.array([[0.0, 1.0]])}, (jnp.zeros(3), jnp.ones(3))))
    with pytest.raises(ValueError, match="location or scale of site 'y' at chain 0, draw 1, row 0 is NaN or infinite"):
        predictive.summary(jnp.ones(3), **options)
