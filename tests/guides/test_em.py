# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""EM against the evidence of linear regression, which is known."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from problems import FEATURES, TARGETS, N, P, log_evidence, regression, regression_posterior, system_of
from scipy.optimize import minimize

from numpyro_bdl import AutoLinearizedLaplace
from numpyro_bdl.guides.em import Expectation, expectation, new_noise_scale, new_precisions, whitened_again
from numpyro_bdl.guides.prior import Prior
from numpyro_bdl.linear import ConjugateGradient
from numpyro_bdl.linear.system import dots, products

pytestmark = pytest.mark.filterwarnings("ignore:The weights are far from an optimum")

CG = ConjugateGradient(tolerance=1e-12)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def noisy_regression(x, y=None):
    w = numpyro.sample("w", dist.Normal(jnp.zeros(P), 1).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    with numpyro.plate("data", len(x)):
        xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(xb @ w, sigma), obs=yb)


def optimum():
    """Logarithms of the precision and the noise variance that maximize the evidence."""
    loss = lambda t: -log_evidence(np.exp(t[0]), np.exp(t[1] / 2))
    return minimize(
        loss, [0.0, -2.0], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000}
    ).x


def exact_step(alpha, scale, batch_size=None):
    """The M-step after an E-step whose samples have exactly the posterior covariance."""
    settings = {"prior": "isotropic", "noise_site": "sigma"}
    values = {"w": jnp.zeros(P), "sigma": scale}
    system = system_of(noisy_regression, values, FEATURES, TARGETS, batch_size=batch_size, **settings)
    prior = Prior({"w": jnp.ones(P)}, {"weights": ("w",)}, {"weights": jnp.asarray(alpha)})
    system = system._replace(scale=prior.scale)
    mean, covariance = regression_posterior(alpha, scale)
    samples = {"w": np.sqrt(P * alpha) * jnp.asarray(np.linalg.cholesky(covariance)).T}
    dimension = {k: jnp.mean(d) for k, d in dots(samples, products(system, samples)).items()}
    found = Expectation({"w": np.sqrt(alpha) * jnp.asarray(mean)}, samples, dimension, jnp.zeros(()), jnp.zeros(()))
    gamma = P - alpha * np.trace(covariance)
    np.testing.assert_allclose(dimension["w"], gamma, rtol=1e-10)
    return float(new_precisions(prior, found)["weights"]), float(new_noise_scale(system, found, "sigma"))


@pytest.mark.parametrize("batch_size", [None, 7])
def test_the_maximum_of_the_evidence_is_the_fixed_point(batch_size):
    alpha, scale = np.exp(optimum()) ** np.array([1, 0.5])
    found = exact_step(alpha, scale, batch_size)
    np.testing.assert_allclose(found, (alpha, scale), rtol=1e-6)


def test_the_m_step_is_mackays():
    alpha, scale = 0.8, 0.5
    mean, covariance = regression_posterior(alpha, scale)
    gamma = P - alpha * np.trace(covariance)
    residual = np.sum((TARGETS - FEATURES @ mean) ** 2)
    expected = gamma / np.sum(mean**2), np.sqrt(residual / (N - gamma))
    np.testing.assert_allclose(exact_step(alpha, scale), expected, rtol=1e-9)


def test_without_an_estimate_that_is_positive_em_proper_takes_over():
    prior = Prior({"w": jnp.ones(3)}, {"g": ("w",)}, {"g": jnp.asarray(2.0)})
    found = Expectation(
        {"w": jnp.array([1.0, 2.0, 2.0])},
        {"w": jnp.ones((4, 3))},
        {"w": jnp.asarray(-0.1)},
        jnp.zeros(()),
        jnp.zeros(()),
    )
    np.testing.assert_allclose(new_precisions(prior, found)["g"], 2.0 * 3 / (9 + 3))


def test_effective_dimension_has_the_mean_and_the_variance_of_its_formula():
    count = 3000
    system = system_of(regression, {"w": jnp.zeros(P)}, FEATURES, TARGETS)
    start = {"w": jnp.zeros(P)}
    keys = random.key(1), random.key(2)
    found, _ = expectation(system, CG, keys, start, None, count, "map", lambda done: None)
    assert found.residual < 1e-11
    each = np.asarray(dots(found.samples, products(system, found.samples))["w"])
    _, covariance = regression_posterior()
    share = np.eye(P) - np.asarray(system.scale["w"])[:, None] ** -2 * covariance
    gamma, variance = np.trace(share), 2 * np.trace(share @ share)
    assert abs(each.mean() - gamma) < 4 * np.sqrt(variance / count)
    fourth = np.mean((each - each.mean()) ** 4) - variance**2
    assert abs(each.var() - variance) < 4 * np.sqrt(fourth / count)
    np.testing.assert_allclose(found.dimension["w"], each.mean())


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(True):
        params = {"auto_loc": jnp.concatenate([jnp.zeros(P), jnp.log(jnp.ones(1))])}
        guide = AutoLinearizedLaplace(
            noisy_regression,
            noise_site="sigma",
            solver=CG,
            em_steps=40,
            em_samples=64,
            num_samples=64,
            em_tolerance=1e-4,
        )
        return guide.fit(random.key(0), params, FEATURES, TARGETS, batch_size=16, progress_bar=False)


def test_em_by_samples_finds_the_maximum(fitted):
    log_alpha, log_variance = optimum()
    # three standard deviations of the estimate by 64 samples, as the specification has them
    assert abs(np.log(fitted.prior_precision["weights"]) - log_alpha) < 3 * 0.043
    assert abs(2 * np.log(fitted.noise_scale) - log_variance) < 3 * 0.020


def test_history_tells_of_every_step(fitted):
    history = fitted.history
    steps = len(history["residual"])
    assert 4 < steps < 41  # it stopped when nothing moved
    assert history["prior_precision"].shape == history["effective_dimension"].shape == (steps, 1)
    np.testing.assert_allclose(history["prior_precision"][-1], list(fitted.prior_precision.values()))
    np.testing.assert_allclose(history["noise_scale"][-1], fitted.noise_scale)
    assert abs(np.diff(np.log(history["prior_precision"][-2:, 0]))[0]) < 1e-4
    assert history["effective_dimension"][-1, 0] == pytest.approx(fitted.effective_dimension)


def test_the_samples_have_the_learned_noise_and_precision(fitted):
    alpha, scale = fitted.prior_precision["weights"], float(fitted.noise_scale)
    mean, _ = regression_posterior(alpha, scale)
    np.testing.assert_allclose(fitted.linear_mode["w"], mean, atol=1e-8)
    np.testing.assert_allclose(fitted.samples["sigma"], scale)
    np.testing.assert_allclose(fitted.params["auto_samples"][:, P], np.log(scale), rtol=1e-9)


def test_a_warm_start_is_the_same_weights():
    x, before, after = ({"w": np.random.default_rng(n).uniform(0.5, 2, 5)} for n in range(3))
    again = whitened_again(x, before, after)
    np.testing.assert_allclose(again["w"] * after["w"], x["w"] * before["w"], rtol=1e-6)
