# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The formulas of the spike-and-slab prior."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from numpyro_bdl.inclusion import InclusionRate, SpikeSlab, _given_draws
from numpyro_bdl.weight_groups import partition


def prior(shape, kind="unstructured", slab=1.0, spike=0.01, model=1.0):
    return SpikeSlab(partition("test", {"w": kind}, {"w": shape})["w"], slab, spike, model)


def log_mixture(w, p, rate):
    """log of theta N(w; 0, s1 I) + (1 - theta) N(w; 0, s0 I), group by group."""
    square, size = p.groups.total(w**2), jnp.asarray(p.groups.size)

    def log_normal(variance):
        return -(size * jnp.log(2 * jnp.pi * variance) + square / variance) / 2

    return jnp.logaddexp(jnp.log(rate) + log_normal(p.slab), jnp.log1p(-rate) + log_normal(p.spike))


@pytest.mark.parametrize("kind", ["unstructured", "neuron_in", "neuron_out"])
@pytest.mark.parametrize("model", [1.0, 0.5])
def test_gradient_is_that_of_the_mixture_less_the_models_own_prior(kind, model):
    with jax.enable_x64(True):
        p = prior((4, 3), kind, slab=0.7, spike=0.02, model=model)
        w = jnp.asarray(np.random.default_rng(0).normal(0, 0.25, size=(4, 3)))
        inclusion = jax.nn.sigmoid(p.logit(p.groups.total(w**2), 0.3))
        exact = jax.grad(lambda w: -jnp.sum(log_mixture(w, p, 0.3)) - jnp.sum(w**2) / (2 * model))(w)
        np.testing.assert_allclose(p.gradient(w, inclusion), exact, rtol=1e-10)
        # the ratio of the components is the odds
        odds = jax.grad(lambda t: jnp.sum(log_mixture(w, p, jax.nn.sigmoid(t))))(jnp.log(0.3 / 0.7))
        np.testing.assert_allclose(odds, jnp.sum(inclusion - 0.3), rtol=1e-10)


@pytest.mark.parametrize(("size", "theta"), [(1, 0.5), (5, 0.01), (9, 0.3)])
def test_even_odds_on_the_threshold_sphere(size, theta):
    p = prior((size, 1), "neuron_out", slab=0.488, spike=0.00977)
    threshold = (np.log(p.slab / p.spike) + 2 / size * np.log((1 - theta) / theta)) / (1 / p.spike - 1 / p.slab)
    np.testing.assert_allclose(jax.nn.sigmoid(p.logit(jnp.array([size * threshold]), theta)), 0.5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "spike", "slab", "theta", "expected"),
    [(5, 0.00977, 0.488, 0.5, 0.0390), (5, 0.00977, 0.488, 0.01, 0.0573), (9, 0.02, 0.04, 0.5, 0.0277)],
)
def test_thresholds_of_the_papers_settings(size, spike, slab, theta, expected):
    p = prior((size, 1), "neuron_out", slab=slab, spike=spike)
    grid = np.linspace(0, 0.1, 100_001)
    included = np.asarray(p.logit(jnp.asarray(size * grid)[:, None], theta))[:, 0] > 0
    np.testing.assert_allclose(grid[included.argmax()], expected, atol=6e-5)


def test_limits_of_the_rate():
    p, square = prior((3,)), jnp.array([0.0, 0.05, 1.0])
    np.testing.assert_allclose(jax.nn.sigmoid(p.logit(square, 1e-37)), 0, atol=1e-10)
    np.testing.assert_allclose(jax.nn.sigmoid(p.logit(square, jnp.float32(1 - 2**-24))), 1, atol=1e-5)


@pytest.mark.parametrize("square", [0.0, 1e-30, 40.0, 1e8, 1e30])
def test_large_groups_and_weights_stay_finite(square):
    p = prior((4608, 1), "neuron_out")
    logit = p.logit(jnp.array([square], jnp.float32), 0.5)
    inclusion = jax.nn.sigmoid(logit)
    assert np.isfinite(logit).all()
    assert inclusion in (0.0, 1.0) or square == 40
    gradient = p.gradient(jnp.full((4608, 1), np.sqrt(square / 4608), jnp.float32), inclusion)
    assert np.isfinite(gradient).all()
    if square >= 1e8:
        np.testing.assert_array_equal(gradient, 0)  # the slab is the model's own prior


def test_m_step_is_the_mode():
    rate = InclusionRate.of("test", dist.Beta(1.0, 1000.0))
    inclusion = jnp.zeros(1000).at[:10].set(1.0)
    np.testing.assert_allclose(rate.m_step(inclusion), 10 / 1999, rtol=1e-6)
    alpha, beta, found = 2.0, 5.0, jnp.array([0.9, 0.2, 0.4])
    rate = InclusionRate.of("test", dist.Beta(alpha, beta))
    grid = np.linspace(0.001, 0.999, 9981)
    expected_log = (found.sum() + alpha - 1) * np.log(grid) + (3 - found.sum() + beta - 1) * np.log(1 - grid)
    np.testing.assert_allclose(rate.m_step(found), grid[expected_log.argmax()], atol=1e-4)


def test_m_step_is_bounded():
    rate = InclusionRate.of("test", dist.Beta(1.0, 1e6))
    np.testing.assert_allclose(rate.m_step(jnp.zeros(10)), 1e-4)
    np.testing.assert_allclose(InclusionRate.of("test", dist.Beta(1.0, 1.0)).m_step(jnp.ones(10)), 1 - 1e-4)


@pytest.mark.parametrize("kind", ["unstructured", "neuron_in", lambda name, shape: np.arange(12).reshape(shape) % 5])
@pytest.mark.parametrize("draws", [1, 64, 150])
def test_probabilities_of_draws_come_in_chunks_and_are_those_of_all_at_once(kind, draws, monkeypatch):
    p = prior((4, 3), kind)
    w = jnp.asarray(np.random.default_rng(0).normal(0, 0.25, size=(2, draws, 4, 3)), jnp.float32)
    rates = jnp.array([0.2, 0.6])
    at_once = jax.nn.sigmoid(p.logit(p.groups.total(w**2), rates.reshape(2, 1, *[1] * len(p.groups.shape))))
    seen, total = [], type(p.groups).total
    monkeypatch.setattr(type(p.groups), "total", lambda groups, x: seen.append(x.shape[1]) or total(groups, x))
    np.testing.assert_allclose(_given_draws(p, rates, w), at_once, rtol=1e-5)
    assert max(seen) == min(draws, 64)
