# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from numpyro_bdl.noise import normal, threefry_bits

SIZES = (1, 7, 1000)
TREE = {"b": jnp.zeros(3), "nested": (jnp.zeros(()), jnp.zeros((2, 5))), "w": jnp.zeros((4, 7, 2))}
SIZE = 3 + 1 + 10 + 56


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make_key", [random.key, random.PRNGKey], ids=["typed", "legacy"])
def test_bits_are_those_of_jax(make_key, size):
    key = make_key(12)
    np.testing.assert_array_equal(threefry_bits(key, size), random.bits(key, (size,), "uint32"))


def test_bits_are_those_of_jax_for_any_key_words():
    words = jnp.array([[0, 0], [0, 2**32 - 1], [2**32 - 1, 2**31], [2**31, 1]], jnp.uint32)
    for key in random.wrap_key_data(words, impl="threefry2x32"):
        np.testing.assert_array_equal(threefry_bits(key, 50), random.bits(key, (50,), "uint32"))


@pytest.mark.parametrize("make_key", [random.key, random.PRNGKey], ids=["typed", "legacy"])
def test_normal_is_the_flat_vector_of_jax_bit_for_bit(make_key):
    key = make_key(3)
    noise = normal(key, TREE)
    assert jax.tree.map(jnp.shape, noise) == jax.tree.map(jnp.shape, TREE)
    np.testing.assert_array_equal(flat(noise), random.normal(key, (SIZE,)))


def test_normal_is_the_same_inside_and_outside_of_a_compiled_program():
    key = random.key(4)
    np.testing.assert_array_equal(flat(jax.jit(normal)(key, TREE)), flat(normal(key, TREE)))


@pytest.mark.parametrize("size", SIZES)
def test_normal_of_one_leaf_is_that_of_jax(size):
    np.testing.assert_array_equal(normal(random.key(5), jnp.zeros(size)), random.normal(random.key(5), (size,)))


def test_shapes_without_values_are_enough():
    struct = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), TREE)
    np.testing.assert_array_equal(flat(normal(random.key(0), struct)), flat(normal(random.key(0), TREE)))


def test_normal_in_double_precision_is_that_of_jax():
    with jax.enable_x64(True):
        tree = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float64), TREE)
        noise = normal(random.key(6), tree)
        assert {leaf.dtype for leaf in jax.tree.leaves(noise)} == {jnp.dtype("float64")}
        np.testing.assert_array_equal(flat(noise), random.normal(random.key(6), (SIZE,), jnp.float64))


def test_leaves_of_mixed_precision_keep_their_dtypes():
    with jax.enable_x64(True):
        tree = {"single": jnp.zeros(4, jnp.float32), "double": jnp.zeros(5, jnp.float64)}
        noise = normal(random.key(7), tree)
        assert {name: leaf.dtype.name for name, leaf in noise.items()} == {"single": "float32", "double": "float64"}
        expected = random.normal(random.key(7), (9,), jnp.float64)
        np.testing.assert_array_equal(noise["double"], expected[:5])
        np.testing.assert_array_equal(noise["single"], expected[5:].astype(jnp.float32))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_another_implementation_are_accepted(impl):
    key = random.key(8, impl=impl)
    np.testing.assert_array_equal(flat(normal(key, TREE)), random.normal(key, (SIZE,)))


def test_legacy_keys_of_another_implementation_are_accepted():
    with jax.default_prng_impl("rbg"):
        key = random.PRNGKey(8)
        assert key.shape == (4,)
        np.testing.assert_array_equal(flat(normal(key, TREE)), random.normal(key, (SIZE,)))


@pytest.mark.parametrize("make_key", [random.key, random.PRNGKey], ids=["typed", "legacy"])
def test_chains_of_a_vmap_draw_what_each_draws_alone(make_key):
    keys = random.split(make_key(9), 3)
    together = jax.vmap(lambda key: normal(key, TREE))(keys)
    for chain, key in enumerate(keys):
        np.testing.assert_array_equal(
            flat(jax.tree.map(lambda x, c=chain: x[c], together)), random.normal(key, (SIZE,))
        )


def test_moments_and_distribution_are_standard_normal():
    n = 400_000
    x = np.asarray(normal(random.key(10), jnp.zeros(n)), float)
    # the k-th moment of n standard normals has variance (E x^2k - (E x^k)^2) / n
    for k, moment, second in ((1, 0, 1), (2, 1, 3), (3, 0, 15), (4, 3, 105)):
        assert abs(np.mean(x**k) - moment) < 4 * np.sqrt((second - moment**2) / n)
    # a p-value below this is as rare as four standard errors
    assert stats.kstest(x, "norm").pvalue > 2 * stats.norm.sf(4)


def test_tails_are_those_of_a_normal():
    n = 1_000_000
    x = np.asarray(normal(random.key(11), jnp.zeros(n)), float)
    for threshold in (3.0, 4.0):
        p = 2 * stats.norm.sf(threshold)
        assert abs(np.mean(np.abs(x) > threshold) - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_leaves_are_independent():
    n = 100_000
    noise = normal(random.key(12), [jnp.zeros(n) for _ in range(4)])
    for values in (np.stack(noise), np.stack(noise) ** 2):
        correlation = np.corrcoef(values)[np.triu_indices(4, 1)]
        assert np.abs(correlation).max() < 4 / np.sqrt(n)


def test_successive_keys_are_independent():
    n = 50_000
    noise = np.stack([normal(key, jnp.zeros(n)) for key in random.split(random.key(13), 5)])
    correlation = np.corrcoef(noise)[np.triu_indices(5, 1)]
    assert np.abs(correlation).max() < 4 / np.sqrt(n)
