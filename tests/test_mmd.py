# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy.integrate import quad
from scipy.spatial.distance import cdist, pdist

from numpyro_bdl.mmd import IMQ, RBF, Discrepancy, Draws, Energy, Gaussian, Linear, median_bandwidth, squared_distances

RNG = np.random.default_rng(0)
PARTICLES = RNG.normal(size=(7, 3))
DRAWS = RNG.normal(0.3, 1.4, size=(50, 3))
H = 1.7

PLAIN = {
    "rbf": (RBF(H), lambda a, b: 3 * np.exp(-(cdist(a, b) ** 2) / (2 * H**2))),
    "rbf, scale": (RBF(H, 0.5), lambda a, b: 0.5 * np.exp(-(cdist(a, b) ** 2) / (2 * H**2))),
    "imq": (IMQ(H), lambda a, b: 3 / np.sqrt(1 + cdist(a, b) ** 2 / H**2)),
    "energy": (Energy(H), lambda a, b: -3 * cdist(a, b) / H),
    "linear": (Linear(), lambda a, b: a @ b.T),
    "linear, scale": (Linear(2.0), lambda a, b: 2 * a @ b.T),
    "callable": (lambda a, b: jnp.sum(a * b) ** 2, lambda a, b: (a @ b.T) ** 2),
}


@pytest.mark.parametrize("name", PLAIN)
def test_kernels_as_they_are_defined(name):
    kernel, plain = PLAIN[name]
    with jax.enable_x64():
        particles, discrepancy = jnp.asarray(PARTICLES), Discrepancy(kernel, Draws(jnp.asarray(DRAWS)))
        mean, embedding = jax.vmap(discrepancy, (0, None))(particles, particles)
        np.testing.assert_allclose(mean, plain(PARTICLES, PARTICLES).mean(1), rtol=1e-10)
        np.testing.assert_allclose(embedding, plain(PARTICLES, DRAWS).mean(1), rtol=1e-10)


@pytest.mark.parametrize("name", PLAIN)
def test_forces_are_the_gradient_of_the_discrepancy(name):
    """N times half the gradient of the squared discrepancy, by finite differences of its definition."""
    kernel, plain = PLAIN[name]

    def half_squared(flat):
        x = flat.reshape(PARTICLES.shape)
        return plain(x, x).mean() / 2 - plain(x, DRAWS).mean()

    with jax.enable_x64():
        discrepancy = Discrepancy(kernel, Draws(jnp.asarray(DRAWS)))
        witness = lambda t, ensemble: jnp.subtract(*discrepancy(t, ensemble))
        forces = jax.vmap(jax.grad(witness), (0, None))(jnp.asarray(PARTICLES), jnp.asarray(PARTICLES))
    eps = 1e-5 * np.eye(PARTICLES.size)
    flat = PARTICLES.ravel()
    numeric = np.array([(half_squared(flat + e) - half_squared(flat - e)) / 2e-5 for e in eps])
    np.testing.assert_allclose(np.ravel(forces), len(PARTICLES) * numeric, rtol=2e-6, atol=1e-8)


def test_embedding_under_a_normal_law_is_its_integral():
    mean, scale, h, t = 0.4, 1.3, 0.7, -0.8
    density = lambda x: np.exp(-((x - mean) ** 2) / (2 * scale**2)) / np.sqrt(2 * np.pi) / scale
    expected = quad(lambda x: np.exp(-((t - x) ** 2) / (2 * h**2)) * density(x), -12, 12, epsabs=1e-13)[0]
    with jax.enable_x64():
        discrepancy = Discrepancy(RBF(h), Gaussian(jnp.array([mean]), jnp.array([scale])))
        np.testing.assert_allclose(discrepancy(jnp.array([t]), jnp.zeros((2, 1)))[1], expected, rtol=1e-10)


def test_embedding_of_several_coordinates_is_near_that_of_many_draws():
    mean, scale = jnp.array([0.0, 1.0, -0.5]), jnp.array([0.5, 1.0, 2.0])
    draws = mean + scale * random.normal(random.key(0), (20_000, 3))
    for kernel in (RBF(1.5), Linear()):
        t = jnp.array([0.3, 0.2, -1.0])
        exact = Discrepancy(kernel, Gaussian(mean, scale))(t, draws[:2])[1]
        values = np.array([Discrepancy(kernel, Draws(draws[n : n + 1]))(t, draws[:2])[1] for n in range(400)])
        assert abs(exact - values.mean()) < 4 * values.std() / 20


def test_embedding_in_many_dimensions_neither_overflows_nor_vanishes():
    d = 1_000_000
    prior = Gaussian(jnp.zeros(d), jnp.ones(d))
    gradient = jax.grad(lambda t: Discrepancy(RBF(), prior)(t, jnp.zeros((2, d)))[1])(jnp.ones(d))
    # h^2 = d: each coordinate is d sqrt(1 + 1/d)^-d exp(-1 / 2) / (d + 1)
    np.testing.assert_allclose(gradient, -np.exp(-1), rtol=1e-4)


@pytest.mark.parametrize("scale", [np.ones(1), np.full(40, 0.3), np.array([3.0, 0.1, 0.1]), np.linspace(0.1, 2, 100)])
def test_bandwidth_of_a_normal_prior_is_the_median_over_draws(scale):
    draws = scale * np.random.default_rng(1).normal(size=(4000, len(scale)))
    of_pairs = np.sqrt(np.median(np.sum((draws[::2] - draws[1::2]) ** 2, 1)) / 2)
    tolerance = 0.05 if len(set(scale)) == 1 else 0.1  # of two moments only, if the scales differ
    assert median_bandwidth(Gaussian(jnp.zeros(len(scale)), jnp.asarray(scale))) == pytest.approx(
        of_pairs, rel=tolerance
    )


def test_bandwidth_of_draws_is_half_their_median_squared_distance():
    expected = np.sqrt(np.median(pdist(DRAWS) ** 2) / 2)
    assert median_bandwidth(Draws(jnp.asarray(DRAWS))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [4, 64])
def test_distances_of_near_points_far_from_the_origin(size):
    points = 1000 + 1e-2 * RNG.normal(size=(5, size)).astype("f4")
    got = jax.vmap(squared_distances, (0, None))(jnp.asarray(points), jnp.asarray(points))
    np.testing.assert_allclose(got, cdist(points, points) ** 2, rtol=1e-3, atol=1e-8)


def test_distances_of_near_points_in_a_wide_ensemble():
    points = np.array([[-3000.0], [-2999.5], [10.0], [2500.0]], "f4")
    got = jax.vmap(squared_distances, (0, None))(jnp.asarray(points), jnp.asarray(points))
    np.testing.assert_allclose(got, cdist(points, points) ** 2, rtol=1e-5)


@pytest.mark.parametrize("kernel", [RBF(H), IMQ(H), Energy(H)])
def test_forces_between_pairs_cancel_and_particles_in_one_place_have_none(kernel):
    mean = lambda t, ensemble: Discrepancy(kernel, None)(t, ensemble)[0]
    forces = jax.vmap(jax.grad(mean), (0, None))(*2 * (jnp.asarray(PARTICLES, jnp.float32),))
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-6)
    together = jax.vmap(jax.grad(mean), (0, None))(*2 * (jnp.ones((4, 3)),))
    np.testing.assert_array_equal(together, 0)


def test_a_rolling_bandwidth_is_that_of_the_particles():
    particles = jnp.asarray(PARTICLES, jnp.float32)
    fixed = RBF(float(np.sqrt(np.median(pdist(PARTICLES) ** 2) / 2)))
    one, other = (
        jax.vmap(jax.grad(lambda t, e, k=k: Discrepancy(k, None)(t, e)[0]), (0, None))(particles, particles)
        for k in (RBF("rolling"), fixed)
    )
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_a_rolling_bandwidth_of_particles_in_one_place():
    gradient = jax.grad(lambda t: Discrepancy(RBF("rolling"), None)(t, jnp.ones((4, 2)))[0])(jnp.ones(2))
    np.testing.assert_array_equal(gradient, 0)


def test_bad_input():
    for kernel in (RBF, IMQ, Energy):
        for bad in ({"bandwidth": 0}, {"bandwidth": -1.0}, {"bandwidth": "wide"}, {"scale": 0.0}):
            with pytest.raises(ValueError, match=f"{kernel.__name__}: {next(iter(bad))} must be a number in"):
                kernel(**bad)
    with pytest.raises(ValueError, match="Linear: scale"):
        Linear(-1.0)
    with pytest.raises(ValueError, match="The prior is flat"):
        Discrepancy(RBF(), None)
    with pytest.raises(ValueError, match="flat prior has none"):
        Discrepancy(Linear(), None)
    with pytest.raises(ValueError, match="squared bandwidth 0"):
        Discrepancy(RBF(), Draws(jnp.ones((5, 2))))
    with pytest.raises(TypeError, match="no closed form"):
        Discrepancy(IMQ(), Gaussian(jnp.zeros(1), jnp.ones(1)))
