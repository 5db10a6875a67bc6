# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Posterior samples of linear models against dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

import numpyro_bdl as bdl
from numpyro_bdl.linear import SGD, ConjugateGradient, DualDescent

N, P = 40, 6
NOISE, SCALE, MEAN = 0.3, 2.0, 0.5
FEATURES = np.asarray(random.normal(random.key(0), (N, P)), float)
Y = FEATURES @ np.linspace(-1, 1, P) + NOISE * np.random.default_rng(0).normal(size=N)
PRECISION = FEATURES.T @ FEATURES / NOISE**2 + np.eye(P) / SCALE**2
EXACT = np.linalg.solve(PRECISION, FEATURES.T @ Y / NOISE**2 + MEAN / SCALE**2)
SETTINGS = {"prior_scale": SCALE, "prior_mean": MEAN}
CG = ConjugateGradient(1e-13)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def sample(solver=CG, num_samples=3, operator=FEATURES, y=Y, noise=NOISE, **settings):
    settings = SETTINGS | settings
    return bdl.linear_posterior_samples(
        random.key(1), operator, y, noise, num_samples=num_samples, solver=solver, **settings
    )


@pytest.mark.parametrize(
    ("solver", "batch_size"),
    [
        (CG, None),
        (CG, 7),
        (SGD(steps=6000, tolerance=1e-14, averaging=1.0), None),
        (DualDescent(steps=6000, tolerance=1e-14), None),
        (DualDescent(steps=20000, tolerance=1e-11), 20),
    ],
    ids=["cg", "cg, batches", "sgd", "dual", "dual, minibatches"],
)
def test_primal_and_dual_are_cholesky(solver, batch_size):
    found, reference = sample(solver, batch_size=batch_size), sample()
    np.testing.assert_allclose(found.mean, EXACT, atol=1e-8)
    np.testing.assert_allclose(found.samples, reference.samples, atol=1e-8)
    assert found.error < 1e-7


def test_samples_have_the_posterior_law():
    count = 4000
    found = sample(num_samples=count)
    white = (found.samples - EXACT) @ np.linalg.cholesky(PRECISION)
    assert np.all(np.abs(white.mean(0)) < 4.5 / np.sqrt(count))
    # the squared norm of P (P + 1) / 2 errors of covariances, each of variance 1 / K, 2 / K on the diagonal
    error = np.linalg.norm(np.cov(white.T) - np.eye(P)) ** 2 * count
    assert abs(error - P * (P + 1)) < 4 * np.sqrt(8 * P * (P + 1))
    dimension = np.trace(np.linalg.solve(PRECISION, FEATURES.T @ FEATURES)) / NOISE**2
    assert abs(found.effective_dimension - dimension) < 4 * np.sqrt(2 * dimension / count)


def test_an_operator_by_its_products():
    """Weights in a pytree, two outputs a row, noise and prior scales of their own, and a transpose by hand."""
    basis = jnp.asarray(np.random.default_rng(1).normal(size=(N, 2, P)))
    noise = np.random.default_rng(2).uniform(0.2, 0.5, (N, 2))
    y = np.random.default_rng(3).normal(size=(N, 2))
    like = {"slopes": jnp.zeros((2, 2)), "rest": [jnp.zeros(2)]}
    scale = {"slopes": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "rest": [jnp.array([0.5, 0.7])]}

    def product(w, rows):
        return basis[rows] @ jnp.concatenate([w["rest"][0], w["slopes"].ravel()])

    def transpose(u, rows):
        flat = jnp.einsum("nop,no->p", basis[rows], u)
        return {"slopes": flat[2:].reshape(2, 2), "rest": [flat[:2]]}

    settings = {"operator": product, "y": y, "noise": noise, "like": like, "prior_scale": scale, "prior_mean": 0.0}
    found, by_hand = sample(**settings), sample(**settings, transpose=transpose, batch_size=9, sample_chunk=2)
    for a, b in zip(*map(jax.tree.leaves, (found.samples, by_hand.samples)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    flat = np.reshape(basis, (-1, P)) / noise.reshape(-1, 1)
    prior = np.array([0.5, 0.7, 1.0, 2.0, 3.0, 4.0])
    mean = np.linalg.solve(flat.T @ flat + np.diag(prior**-2), flat.T @ (y / noise).ravel())
    np.testing.assert_allclose(found.mean["rest"][0], mean[:2], atol=1e-9)
    np.testing.assert_allclose(by_hand.mean["slopes"].ravel(), mean[2:], atol=1e-9)
    assert found.samples["slopes"].shape == (3, 2, 2)


def test_dtypes_are_those_of_the_features():
    with jax.enable_x64(False):
        found = bdl.linear_posterior_samples(random.PRNGKey(0), jnp.asarray(FEATURES), jnp.asarray(Y), NOISE)
        assert found.samples.dtype == found.mean.dtype == jnp.float32


def test_systems_that_are_not_solved_are_told():
    with pytest.warns(UserWarning, match="not solved: at the data their function"):
        sample(ConjugateGradient(max_iterations=1))


LIKE = {"operator": lambda w, rows: jnp.asarray(FEATURES)[rows] @ w, "like": np.zeros(P)}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"noise": 0.0}, "noise must be positive"),
        ({"noise": np.full(N, np.nan)}, "noise must be positive"),
        ({"noise": np.ones(3)}, "does not broadcast"),
        ({"y": np.where(np.arange(N) == 3, np.nan, Y)}, "y has numbers that are not finite"),
        ({"operator": FEATURES[:5]}, r"with the 40 rows of y"),
        ({"operator": FEATURES * np.inf}, "numbers that are not finite"),
        ({"prior_scale": -1.0}, "prior_scale must be positive"),
        ({"prior_scale": np.ones(3)}, "prior_scale does not broadcast"),
        ({"batch_size": N + 1}, "batch_size=41 is more than the 40 rows"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"operator": LIKE["operator"]}, "needs like"),
        (LIKE | {"operator": lambda w, rows: jnp.asarray(FEATURES)[rows] @ w + 1}, "it is not linear"),
        (LIKE | {"operator": lambda w, rows: jnp.asarray(FEATURES)[rows] @ w**2}, "it is not linear"),
        (LIKE | {"operator": lambda w, rows: jnp.asarray(FEATURES) @ w, "y": np.ones(100)}, "its product for 64 rows"),
        (LIKE | {"like": jnp.zeros(P + 1)}, "raised"),
        (LIKE | {"transpose": lambda u, rows: 2 * u @ jnp.asarray(FEATURES)[rows]}, "does not match the product"),
        (LIKE | {"transpose": lambda u, rows: u}, "the weights have"),
        ({"solver": "newton"}, "solver must be one of"),
        ({"solver": SGD(step_size=100.0)}, r"step_size=100 diverged\. A step that"),
        ({"solver": DualDescent(step_size=100.0)}, r"DualDescent: step_size=100 diverged\. A step that"),
    ],
)
def test_what_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        sample(**settings)


def test_a_solver_must_be_a_solver():
    with pytest.raises(TypeError, match="solver must be"):
        sample(3)
