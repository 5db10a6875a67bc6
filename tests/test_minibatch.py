# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from numpyro_bdl.minibatch import epoch, full, independent

SIZES = [
    (1, 1),
    (2, 1),
    (5, 5),
    (7, 3),
    (10, 4),
    (65, 10),
    (97, 96),
    (997, 101),
    (60_000, 128),
]
RARE = 2 * stats.norm.sf(4)
"""The probability of being four standard errors off."""


@partial(jax.jit, static_argnums=(0, 3, 4))
def _steps(stream, key, i, size, batch):
    return jax.vmap(lambda i: stream(key, i, size, batch))(i)


def steps(stream, key, first, count, size, batch):
    return np.asarray(_steps(stream, key, first + np.arange(count), size, batch))


@cache
def first_epochs(size, keys=20_000):
    """The order of the first two epochs for many keys: (key, epoch, place)."""
    orders = jax.vmap(lambda key: _steps(epoch, key, jnp.arange(2), size, size))
    return np.asarray(jax.jit(orders)(random.split(random.key(0), keys)), int)


def assert_uniform(counts):
    counts = np.ravel(counts)
    assert stats.chisquare(counts).pvalue > RARE


# ---- epoch: each row once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_each_epoch_visits_every_row_once(size, batch):
    rows = math.lcm(size, batch)
    # also after many epochs, where the count starts in the midst of them
    for first in (0, 5 * rows // batch):
        seen = steps(epoch, random.key(1), first, rows // batch, size, batch)
        assert seen.shape == (rows // batch, batch)
        in_order = np.sort(seen.reshape(-1, size), axis=1)
        np.testing.assert_array_equal(in_order, np.broadcast_to(np.arange(size), in_order.shape))


def test_a_batch_may_span_two_epochs():
    seen = steps(epoch, random.key(2), 0, 5, 10, 4).ravel()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert len(set(seen[8:12])) <= 4


def test_two_epochs_have_different_orders():
    one, other = steps(epoch, random.key(3), 0, 2, 1347, 1347)
    # the number of fixed points is about Poisson(1)
    assert np.sum(one == other) < stats.poisson.isf(RARE, 1)


def test_two_keys_have_different_orders():
    one, other = (steps(epoch, random.key(k), 0, 2, 1347, 1347)[0] for k in (4, 5))
    assert np.sum(one == other) < stats.poisson.isf(RARE, 1)


def test_a_step_is_a_pure_function_of_key_and_count():
    key = random.key(6)
    walked = steps(epoch, key, 0, 40, 50, 8)
    one_step = jax.jit(epoch, static_argnums=(2, 3))
    for i in (0, 6, 39):
        np.testing.assert_array_equal(one_step(key, i, 50, 8), walked[i])


# ---- epoch: a random order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5, 8, 12, 100])
def test_every_row_is_as_likely_at_every_place(size):
    orders = first_epochs(size)[:, 0]
    for place in {0, 1, size // 2, size - 1}:
        assert_uniform(np.bincount(orders[:, place], minlength=size))


@pytest.mark.parametrize("size", [3, 5, 8, 12])
def test_every_pair_of_rows_is_as_likely_at_two_places(size):
    orders = first_epochs(size)[:, 0]
    for one, other in {(0, 1), (0, size - 1), (size // 2, size // 2 + 1)}:
        counts = np.bincount(orders[:, one] * size + orders[:, other], minlength=size**2).reshape(size, size)
        assert not np.diagonal(counts).any()
        assert_uniform(counts[~np.eye(size, dtype=bool)])


@pytest.mark.parametrize("size", [3, 5])
def test_every_permutation_is_as_likely(size):
    codes = first_epochs(size)[:, 0] @ size ** np.arange(size)
    counts = np.unique(codes, return_counts=True)[1]
    assert_uniform(np.pad(counts, (0, math.factorial(size) - len(counts))))


def test_neighbouring_places_and_rows_are_uncorrelated():
    size, keys = 1000, 200
    orders = first_epochs(size, keys)[:, 0].astype(float)
    ranks = (orders - (size - 1) / 2) / np.sqrt((size**2 - 1) / 12)
    # under a uniform order two places have correlation -1 / (size - 1)
    assert abs(np.mean(ranks[:, 1:] * ranks[:, :-1]) + 1 / (size - 1)) < 4 / np.sqrt(keys * (size - 1))
    place = (np.arange(size) - (size - 1) / 2) / np.sqrt((size**2 - 1) / 12)
    assert abs(np.mean(ranks * place)) < 4 / np.sqrt(keys * (size - 1))


@pytest.mark.parametrize("size", [5, 12])
def test_orders_of_successive_epochs_are_independent(size):
    orders = first_epochs(size)
    counts = np.bincount(orders[:, 0, 0] * size + orders[:, 1, 0], minlength=size**2)
    assert_uniform(counts)


# ---- epoch: cost --------------------------------------------------------------------------------------------------


def largest_array(jaxpr):
    """The size of the largest array in a program, inner programs included."""
    inner = [getattr(p, "jaxpr", p) for eqn in jaxpr.eqns for p in jax.tree.leaves(eqn.params)]
    variables = [v for eqn in jaxpr.eqns for v in (*eqn.invars, *eqn.outvars)]
    sizes = [math.prod(getattr(v.aval, "shape", ())) for v in variables]
    return max(sizes + [largest_array(p) for p in inner if hasattr(p, "eqns")], default=0)


@pytest.mark.parametrize("stream", [epoch, independent])
def test_memory_of_a_step_is_of_the_order_of_the_batch(stream):
    batch = 100
    sizes = {
        size: largest_array(jax.make_jaxpr(lambda key, i, n=size: stream(key, i, n, batch))(random.key(0), 0).jaxpr)
        for size in (10_000, 100_000_000)
    }
    assert len(set(sizes.values())) == 1
    assert max(sizes.values()) <= 8 * batch


def test_the_largest_array_of_a_permutation_is_found():
    # so that the test above means something
    program = jax.jit(lambda key: random.permutation(key, 5000)[:10])
    assert largest_array(jax.make_jaxpr(program)(random.key(0)).jaxpr) == 5000


def test_a_hundred_million_rows():
    size, batch = 100_000_000, 100
    seen = steps(epoch, random.key(7), size // batch - 50, 100, size, batch).reshape(2, -1)
    for part in seen:
        assert len(np.unique(part)) == part.size
        assert part.min() >= 0
        assert part.max() < size
        assert_uniform(np.bincount(part // (size // 10), minlength=10))


def test_places_beyond_32_bits_are_refused():
    with pytest.raises(
        ValueError, match="too many for 32 bits, with size=2147483647 and subsample_size=128; choose a subsample_size"
    ):
        epoch(random.key(0), 0, 2**31 - 1, 128)


# ---- independent and full -----------------------------------------------------------------------------------------


def test_independent_rows_are_uniform_with_replacement():
    size, batch, count = 23, 40, 500
    seen = steps(independent, random.key(8), 0, count, size, batch)
    assert seen.min() >= 0
    assert seen.max() < size
    assert_uniform(np.bincount(seen.ravel(), minlength=size))
    # a row is seen as often in a batch as a binomial variable says
    repeats = (np.sum(seen == 0, axis=1)).astype(float)
    expected = batch / size * (1 - 1 / size)
    assert abs(repeats.var(ddof=1) - expected) < 4 * expected * np.sqrt(3 / count)


def test_independent_steps_are_independent():
    size = 10
    seen = steps(independent, random.key(9), 0, 5001, size, 4)
    counts = np.bincount((seen[1:] * size + seen[:-1]).ravel(), minlength=size**2)
    assert_uniform(counts)


@pytest.mark.parametrize("stream", [epoch, independent])
def test_chains_of_a_vmap_see_what_each_sees_alone(stream):
    keys = random.split(random.key(10), 3)
    one_step = jax.jit(lambda key: stream(key, 5, 77, 10))
    together = jax.jit(jax.vmap(one_step))(keys)
    for seen, key in zip(together, keys, strict=True):
        np.testing.assert_array_equal(seen, one_step(key))
    assert len({tuple(seen) for seen in together.tolist()}) == 3


@pytest.mark.parametrize("stream", [epoch, independent])
def test_legacy_keys_see_what_typed_keys_see(stream):
    one_step = jax.jit(lambda key: stream(key, 9, 77, 10))
    np.testing.assert_array_equal(one_step(random.PRNGKey(3)), one_step(random.key(3)))


def test_full_takes_every_row_at_every_step():
    for i in (0, 12):
        np.testing.assert_array_equal(full(random.key(i), i, 7, 3), np.arange(7))


def test_epochs_are_the_same_in_double_precision():
    single = steps(epoch, random.key(11), 0, 10, 50, 8)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(steps(epoch, random.key(11), 0, 10, 50, 8), single)
