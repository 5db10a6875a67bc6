# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussian processes against Cholesky decompositions, scikit-learn, and the linear models that they are."""

import pickle
import warnings
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

import numpyro_bdl as bdl
from numpyro_bdl import gp
from numpyro_bdl.gp.features import FourierFeatures, draw_features, draw_prior
from numpyro_bdl.gp.system import KernelDual, product
from numpyro_bdl.linear import SGD, ConjugateGradient, DualDescent
from numpyro_bdl.linear.solvers.dual import State, _advance
from numpyro_bdl.linear.solvers.steps import stable_step

RNG = np.random.default_rng(0)
N = 60
X = RNG.uniform(0, 3, (N, 2))
NOISE = RNG.uniform(0.1, 0.3, N)
Y = np.sin(3 * X[:, 0]) + X[:, 1] - 1.5 + NOISE * RNG.normal(size=N)
KERNEL = gp.Matern(1.3, np.array([0.7, 1.5]), nu=1.5)
WHERE = RNG.uniform(-1, 4, (9, 2))
EXACT = ConjugateGradient(1e-13)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def sample(solver=EXACT, num_samples=3, kernel=KERNEL, x=X, y=Y, noise=NOISE, **settings):
    return gp.gp_posterior_samples(
        random.key(1), kernel, x, y, noise, num_samples=num_samples, solver=solver, progress_bar=False, **settings
    )


def posterior_by_cholesky(kernel, where=WHERE):
    k, across, there = (np.asarray(kernel(*pair)) for pair in ((X, X), (where, X), (where, where)))
    solved = np.linalg.solve(k + np.diag(NOISE**2), np.c_[Y, across.T])
    return across @ solved[:, 0], there - across @ solved[:, 1:]


# ---- kernels --------------------------------------------------------------------------------------------------------

PAIRS = {
    "rbf": (gp.RBF(2.0, np.array([0.5, 2.0])), kernels.RBF([0.5, 2.0])),
    "matern 1/2": (gp.Matern(2.0, 0.7, nu=0.5), kernels.Matern(0.7, nu=0.5)),
    "matern 3/2": (gp.Matern(2.0, 0.7, nu=1.5), kernels.Matern(0.7, nu=1.5)),
    "matern 5/2": (gp.Matern(2.0, np.array([0.5, 2.0]), nu=2.5), kernels.Matern([0.5, 2.0], nu=2.5)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_kernels_are_those_of_scikit_learn(name):
    ours, theirs = PAIRS[name]
    np.testing.assert_allclose(ours(X, WHERE), 2 * theirs(X, WHERE), atol=1e-12)
    # far from the origin, where rounding takes what distances are made of
    moved = np.float32(X + 1000), np.float32(WHERE + 1000)
    np.testing.assert_allclose(ours(*moved), 2 * theirs(*map(np.float64, moved)), atol=2e-3)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(gp.RBF(2.0, 3.0), kernels.RBF(3.0)), (gp.Matern(2.0, 3.0, nu=1.5), kernels.Matern(3.0, nu=1.5))],
    ids=["rbf", "matern"],
)
def test_many_inputs(ours, theirs):
    x, z = (np.random.default_rng(n).normal(size=(5 + n, 20)) for n in range(2))
    np.testing.assert_allclose(ours(x, z), 2 * theirs(x, z), atol=1e-12)
    np.testing.assert_allclose(ours(x + 1000, z + 1000), 2 * theirs(x, z), atol=1e-10)
    features = draw_features(random.key(0), ours, 20, 2**13)
    np.testing.assert_allclose(features(x) @ features(z).T, ours(x, z), atol=0.06)


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_not_a_number_stays_none(name):
    found = np.asarray(PAIRS[name][0](np.array([[np.nan, 0.0], [0.0, 0.0]]), np.zeros((2, 2))))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


@pytest.mark.parametrize("name", PAIRS)
def test_derivatives_are_finite_where_inputs_coincide(name):
    kernel = PAIRS[name][0]
    slopes = jax.grad(lambda k: jnp.sum(k(X, X)))(kernel)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(slopes))


@pytest.mark.parametrize("name", PAIRS)
def test_features_have_the_covariances_of_the_kernel(name):
    kernel = PAIRS[name][0]
    features = draw_prior(random.key(0), kernel, 2, 1, 2**15).features
    np.testing.assert_allclose(features(X) @ features(WHERE).T, kernel(X, WHERE), atol=0.05)
    np.testing.assert_allclose(np.sum(features(X) ** 2, 1), 2.0, rtol=1e-9)


def test_draws_of_the_prior_are_normal_and_independent():
    draws = draw_prior(random.key(0), KERNEL, 2, 4000, 500)
    features = np.asarray(draws.features(X[:5]))
    values = np.linalg.solve(np.linalg.cholesky(features @ features.T), np.asarray(draws(X[:5])))
    assert stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(values) - np.eye(5)).max() < 4.5 / np.sqrt(4000)
    with pytest.raises(ValueError, match=r"nu must be one of 0\.5, 1\.5, 2\.5"):
        gp.Matern(nu=2.0)


# ---- the posterior --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "batch_size"),
    [(EXACT, None), (DualDescent(steps=40_000, tolerance=1e-12), 20)],
    ids=["cg", "dual"],
)
def test_the_mean_and_the_samples_solve_their_systems(solver, batch_size):
    found, reference = sample(solver, batch_size=batch_size), sample()
    mean, _ = posterior_by_cholesky(KERNEL)
    np.testing.assert_allclose(found.mean(WHERE), mean, atol=1e-8)
    np.testing.assert_allclose(found.samples(WHERE), reference.samples(WHERE), atol=1e-8)
    assert found.error < 1e-8


def test_the_error_is_a_bound():
    """Of samples at the data, in posterior standard deviations."""
    _, covariance = posterior_by_cholesky(KERNEL, X)
    scale = np.sqrt(np.sum(np.diag(covariance) / NOISE**2))
    exact = sample(num_samples=64)
    for steps in (5, 100, 400, 1600):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sample(DualDescent(steps=steps, tolerance=1e-12), num_samples=64, batch_size=20)
        off = np.linalg.norm((found.samples(X) - exact.samples(X)) / NOISE, axis=1).max() / scale
        assert off < found.error
        assert found.error < 10 * off or found.error < 1e-3


@partial(jax.tree_util.register_dataclass, data_fields=("features",), meta_fields=())
@dataclass(frozen=True)
class OfFeatures:
    """A kernel that is its features, so that prior draws have no error."""

    features: FourierFeatures
    variance = 1.3

    def __call__(self, x, z):
        return self.features(x) @ self.features(z).T

    def frequencies(self, uniform):
        return self.features.frequencies

    def log_spectral_density(self, frequencies):
        return jnp.zeros(len(frequencies))


def test_a_process_of_features_is_the_linear_model_and_has_the_posterior_law(monkeypatch):
    count = 4000
    features = FourierFeatures(jnp.asarray(RNG.normal(size=(4, 2))), jnp.asarray([0.5, 0.4, 0.3, 0.1]))
    kernel = OfFeatures(features)
    monkeypatch.setattr("numpyro_bdl.gp.features.draw_features", lambda *_: features)
    found = sample(num_samples=count, kernel=kernel, num_features=8)
    mean, covariance = posterior_by_cholesky(kernel, WHERE[:5])
    linear = bdl.linear_posterior_samples(random.key(0), features(X), Y, NOISE, solver=EXACT, num_samples=2)
    np.testing.assert_allclose(found.mean(WHERE[:5]), mean, atol=1e-9)
    np.testing.assert_allclose(features(WHERE[:5]) @ linear.mean, mean, atol=1e-9)
    white = np.linalg.solve(np.linalg.cholesky(covariance), (np.asarray(found.samples(WHERE[:5])) - mean).T).T
    assert np.all(np.abs(white.mean(0)) < 4.5 / np.sqrt(count))
    error = np.linalg.norm(np.cov(white.T) - np.eye(5)) ** 2 * count
    assert abs(error - 30) < 4 * np.sqrt(8 * 30)
    assert stats.kstest(white.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(found.variance(WHERE[:5]), np.diag(covariance), rtol=4.5 * np.sqrt(2 / count))


@pytest.mark.parametrize("noise", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("name", PAIRS)
def test_random_features_keep_variances_where_data_leave_little(name, noise):
    """By the covariance that samples have in expectation, given their frequencies."""
    x = np.random.default_rng(1).normal(size=(500, 2))
    kernel = PAIRS[name][0]
    k = np.asarray(kernel(x, x))
    data, size = slice(0, 400), 400
    weights = np.linalg.solve(k[data, data] + noise**2 * np.eye(size), k[data]).T
    exact = np.diag(k) - np.sum(weights * k[:, data], 1)
    features = np.asarray(draw_features(random.key(0), kernel, 2, 1000)(x))
    found = np.sum((features - weights @ features[data]) ** 2, 1) + noise**2 * np.sum(weights**2, 1)
    ratio = found / exact
    assert abs(ratio[data].mean() - 1) < 0.03
    assert abs(np.log(np.median(ratio[size:]))) < 0.1
    assert np.log(ratio).std() < 0.3


def test_variances_by_random_features():
    found = sample(num_samples=1000)
    _, covariance = posterior_by_cholesky(KERNEL)
    np.testing.assert_allclose(found.variance(WHERE), np.diag(covariance), rtol=0.25)


def test_it_is_evaluated_in_blocks_and_is_a_pytree():
    found = sample()
    where = RNG.uniform(-1, 4, (1500, 2))  # more than one block, and a part of one
    everything = found.samples(where)
    np.testing.assert_allclose(everything[:, 1490:], found.samples(where[1490:]), atol=1e-10)
    np.testing.assert_allclose(jax.jit(lambda p, x: p.samples(x))(found, where), everything, atol=1e-10)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(found)).mean(where), found.mean(where), atol=1e-12)
    assert found.samples(where[:0]).shape == (3, 0)
    with pytest.raises(ValueError, match=r"x must have the shape \(n, 2\)"):
        found.mean(where[:, :1])


def test_float32_stays():
    with jax.enable_x64(False):
        found = sample("dual", kernel=gp.RBF(1.3, 0.7), noise=0.2)
        assert found.samples(WHERE).dtype == found.mean(WHERE).dtype == jnp.float32
    kernel = jax.tree.map(np.float32, KERNEL)
    found = sample("cg", kernel=kernel, x=np.float32(X), y=np.float32(Y), noise=np.float32(NOISE))
    assert found.samples(WHERE).dtype == jnp.float32


# ---- dual descent ---------------------------------------------------------------------------------------------------


def dual_of(batch_size, vectors=2):
    b = jnp.asarray(np.random.default_rng(3).normal(size=(N, vectors)))
    return KernelDual(KERNEL, jnp.asarray(X), jnp.asarray(NOISE), b, jnp.zeros_like(b), jnp.zeros(batch_size, bool))


@pytest.fixture
def matrix(_x64):
    return np.asarray(KERNEL(X, X)) / NOISE[:, None] / NOISE + np.eye(N)


def test_full_products_in_blocks(monkeypatch, matrix):
    dual = dual_of(8)
    monkeypatch.setattr("numpyro_bdl.gp.system.BLOCK", 25)  # the last block has 10 rows of its own
    np.testing.assert_allclose(product(dual, dual.b) + dual.b, matrix @ dual.b, atol=1e-9)


def test_a_row_that_is_in_a_batch_twice_moves_twice(matrix):
    dual, rho, beta = dual_of(20), 0.9, 1e-3
    rows = np.asarray(dual.at(random.key(5), 0))
    assert len(set(rows)) < 20  # with replacement
    a, v = (np.random.default_rng(n).normal(size=(N, 2)) for n in (1, 2))
    state = State({"f": jnp.asarray(v)}, {"f": jnp.asarray(a)}, {}, {}, jnp.asarray(a))
    solver = DualDescent(averaging=0.3)
    found = _advance(solver, dual, state, random.key(5), beta, (0, 1), (0, 1))
    expected = rho * v
    for i in rows:
        expected[i] -= beta * N / 20 * (matrix[i] @ (a + rho * v) - np.asarray(dual.b)[i])
    np.testing.assert_allclose(found.velocity["f"], expected, atol=1e-10)
    np.testing.assert_allclose(found.a["f"], a + expected, atol=1e-10)
    np.testing.assert_allclose(found.average, a + 0.3 * expected, atol=1e-10)


def test_the_error_falls_as_the_theory_says(matrix):
    """Without momentum its mean is (I - beta (K + I))^t times that at the start, since gradients are unbiased."""
    dual, steps, count = dual_of(20, 1), 30, 3000
    beta = 0.3 / np.linalg.eigvalsh(matrix)[-1]
    solver = DualDescent(momentum=0.0, averaging=1.0)
    zero, image = dual.zeros()
    start = State(zero, zero, image, image, dual.solution(zero, image))
    run = jax.jit(jax.vmap(lambda key: _advance(solver, dual, start, key, beta, (0, steps), (0, steps)).a["f"][:, 0]))
    found = np.asarray(run(random.split(random.key(0), count)))
    solution = np.linalg.solve(matrix, np.asarray(dual.b)[:, 0])
    expected = solution - np.linalg.matrix_power(np.eye(N) - beta * matrix, steps) @ solution
    z = (found.mean(0) - expected) / (found.std(0) / np.sqrt(count))
    assert np.abs(z).max() < 4.5
    assert np.mean(z**2) < 1 + 4.5 * np.sqrt(2 / N)
    # a factor 2 in the step would be seen
    double = solution - np.linalg.matrix_power(np.eye(N) - 2 * beta * matrix, steps) @ solution
    assert np.abs((found.mean(0) - double) / (found.std(0) / np.sqrt(count))).max() > 20


def test_the_step_is_stable(matrix):
    dual = dual_of(20)
    top = np.linalg.eigvalsh(matrix - np.eye(N))[-1]
    found = dual.eigenvalues(random.key(0))
    np.testing.assert_allclose(found.mean, top, rtol=0.02)
    assert found.batch > found.mean
    step = float(stable_step(found, 0.9, N / 20))
    assert step < 1 / (1 + top)
    with pytest.raises(ValueError, match=r"DualDescent: step_size=1 diverged\. A step that .* allow is 0\.0"):
        sample(DualDescent(step_size=1.0), batch_size=20)


def test_a_divergence_is_found_within_a_few_steps():
    shares = []
    with pytest.raises(ValueError, match="diverged"):
        DualDescent(steps=5000, step_size=1.0).descend(dual_of(20), random.key(0), shares.append)
    assert len(shares) <= 2  # of ten reports in the first 100 steps


# ---- hyperparameters ------------------------------------------------------------------------------------------------


def test_the_evidence_is_that_of_scikit_learn():
    theirs = 1.3 * kernels.Matern([0.7, 1.5], nu=1.5) + kernels.WhiteKernel(0.04)
    reference = GaussianProcessRegressor(theirs, alpha=0.0, optimizer=None).fit(X, Y)
    expected = reference.log_marginal_likelihood(theirs.theta)
    np.testing.assert_allclose(gp.log_evidence(KERNEL, 0.2, X, Y), expected, rtol=1e-4)


def test_hyperparameters_are_those_of_the_maximum():
    start = gp.Matern(1.0, jnp.ones(2), nu=1.5)
    found = gp.fit_hyperparameters(random.key(0), start, X, Y, 0.5, num_steps=300, progress_bar=False)
    theirs = 1.0 * kernels.Matern([1.0, 1.0], nu=1.5) + kernels.WhiteKernel(0.25)
    reference = GaussianProcessRegressor(theirs, alpha=0.0).fit(X, Y)
    np.testing.assert_allclose(found.kernel.lengthscale, reference.kernel_.k1.k2.length_scale, rtol=0.05)
    np.testing.assert_allclose(found.noise, reference.kernel_.k2.noise_level**0.5, rtol=0.02)
    best = gp.log_evidence(found.kernel, found.noise, X, Y)
    assert abs(best - reference.log_marginal_likelihood_value_) < 0.02
    assert found.kernel.nu == 1.5
    assert found.log_evidence[-1] > found.log_evidence[0]
    assert len(found.log_evidence) == 300


def test_the_noise_holds_what_rounding_adds():
    x = np.random.default_rng(0).uniform(-3, 3, (300, 1)).astype(np.float32)
    y = (4 * np.sin(2 * x[:, 0]) + 0.02 * np.random.default_rng(1).normal(size=300)).astype(np.float32)
    with jax.enable_x64(False):
        start = gp.Matern(5.0, jnp.ones(1), nu=2.5)
        found = gp.fit_hyperparameters(random.key(0), start, x, y, 0.1, num_steps=150, progress_bar=False)
    assert 0.015 < found.noise < 0.03


def test_the_evidence_refuses_other_shapes():
    for x, y in ((X, Y[:1]), (X, Y[:, None]), (X[:, :0], Y)):
        with pytest.raises(ValueError, match=r"log_evidence: x must be \(row, D\)"):
            gp.log_evidence(KERNEL, 0.2, x, y)


def test_subsets_have_no_rows_in_common(monkeypatch):
    seen = []

    def record(optimizer, state, x, y):
        seen.append(np.asarray(x))
        return state, jnp.zeros(())

    monkeypatch.setattr("numpyro_bdl.gp.evidence._step", record)
    gp.fit_hyperparameters(random.key(0), KERNEL, X, Y, subset=20, num_subsets=3, num_steps=1, progress_bar=False)
    assert seen[0].shape == (3, 20, 2)
    assert len(np.unique(seen[0].reshape(-1, 2), axis=0)) == N
    with pytest.raises(ValueError, match="need more than the 60 rows"):
        gp.fit_hyperparameters(random.key(0), KERNEL, X, Y, subset=31, num_subsets=2)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"noise": 0.0}, "noise must be positive and finite.*singular where rows are repeated"),
        ({"noise": np.where(np.arange(N) == 2, -1.0, 1.0)}, "noise must be positive"),
        ({"kernel": gp.RBF(0.0)}, "variance of the kernel must be positive"),
        ({"kernel": gp.RBF(1.0, -0.5)}, "lengthscale of the kernel must be positive"),
        ({"kernel": gp.RBF(1.0, jnp.ones(3))}, "one for each input"),
        ({"kernel": gp.RBF(jnp.ones(2))}, "a variance is one number"),
        ({"x": X[:, 0]}, r"x must be \(row, D\)"),
        ({"x": X[:9]}, r"x must be \(row, D\)"),
        ({"y": Y[:, None]}, r"x must be \(row, D\)"),
        ({"x": np.where(X > 2.9, np.nan, X)}, "x has numbers that are not finite"),
        ({"y": np.where(Y > 1, np.inf, Y)}, "y has numbers that are not finite"),
        ({"batch_size": N + 1}, "batch_size=61 is more than the 60 rows"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"num_features": 0}, "num_features must be"),
        ({"solver": "svgp"}, "solver must be one of 'dual', 'cg'"),
    ],
)
def test_what_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        sample(**settings)


def test_what_is_no_solver_and_no_key():
    with pytest.raises(TypeError, match=r"rng_key must be one PRNG key, as of jax\.random\.key\(0\), got 0"):
        gp.gp_posterior_samples(0, KERNEL, X, Y, NOISE)
    with pytest.raises(TypeError, match="rng_key must be one PRNG key"):
        gp.gp_posterior_samples(random.split(random.key(0)), KERNEL, X, Y, NOISE)
    for kernel in (gp.RBF, None, lambda x, z: x @ z.T):
        with pytest.raises(TypeError, match="kernel must be an RBF or Matern"):
            sample(kernel=kernel)
    with pytest.raises(TypeError, match="lengthscale of the kernel must be a number or an array"):
        sample(kernel=gp.RBF(1.0, [1.0, 2.0]))


def test_which_solver_it_takes(monkeypatch):
    taken = []
    monkeypatch.setattr("numpyro_bdl.gp.posterior.conjugate_gradients", lambda _, dual: taken.append("cg") or dual.b)
    monkeypatch.setattr(DualDescent, "descend", lambda _, dual, *__: taken.append("dual") or dual.b)
    for many in (N, N - 1):
        monkeypatch.setattr("numpyro_bdl.gp.posterior._MANY", many)
        with pytest.warns(UserWarning, match="not solved"):
            sample(None)
    assert taken == ["cg", "dual"]
    with pytest.raises(TypeError, match='solver must be "dual", "cg"'):
        sample(SGD())


def test_repeated_rows_are_no_trouble_with_noise():
    twice = sample(x=np.r_[X, X], y=np.r_[Y, Y], noise=np.r_[NOISE, NOISE] * np.sqrt(2))
    np.testing.assert_allclose(twice.mean(WHERE), sample().mean(WHERE), atol=1e-8)


def test_systems_that_are_not_solved_are_told():
    with pytest.warns(UserWarning, match="not solved"):
        sample(DualDescent(steps=5), batch_size=20)
