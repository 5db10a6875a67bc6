# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Alignment: planted elements are found, every maximum over one group is that of brute force, functions stay."""

import itertools
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import random

from numpyro_bdl.symmetry import Element, UnitGroups, Units, align, aligning_element, apply, find_groups, random_element

X = random.normal(random.key(9), (7, 3))
IMAGES = random.normal(random.key(8), (3, 6, 6, 1))


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (8, 6, 5):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(2)(x)


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.tanh(nn.Conv(5, (3, 3), strides=2)(x))
        return nn.Dense(2)(nn.tanh(nn.Dense(7)(x.reshape(len(x), -1))))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        for width in (5, 4):
            x = x + nn.Dense(6)(nn.tanh(nn.Dense(width)(x)))
        return nn.Dense(2)(x)


class Doubled(nn.Module):
    """A stream that one dense layer both reads and writes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5)(x)
        x = x + nn.tanh(nn.Dense(5)(x))
        return nn.Dense(2)(x)


class Gated(nn.Module):
    """Two kinds of signs: each factor of a product can be flipped with what reads the product."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(3)(x)) * nn.tanh(nn.Dense(3)(x)))


class OneHidden(nn.Module):
    width: int
    activation: Callable = nn.tanh

    @nn.compact
    def __call__(self, x):
        x = self.activation(nn.Dense(self.width)(x))
        return nn.Dense(2)(x)


NETWORKS = {
    "one hidden layer": (OneHidden(12), X),
    "deep": (Deep(), X),
    "convolutional": (Conv(), IMAGES),
    "residual": (Residual(), X),
    "doubled": (Doubled(), X),
}
SIGNS = {
    "odd": (OneHidden(3), 1),
    "even": (OneHidden(3, jnp.cos), 1),
    "none": (OneHidden(3, nn.relu), 0),
    "two kinds": (Gated(), 2),
}


DEEP, SIX, THREE = NETWORKS["deep"][0], OneHidden(6), SIGNS["odd"][0]


@cache
def start_and_groups(network):
    x = IMAGES if isinstance(network, Conv) else X
    start = jax.jit(network.init)(random.key(0), x)
    return start, find_groups(network, start, x)


def draws_of(network, shape=(), seed=0):
    """Parameters that are normal throughout, biases too, and the groups."""
    (start, groups), rng = start_and_groups(network), np.random.default_rng(seed)
    normal = lambda leaf: (rng.normal(size=(*shape, *leaf.shape)) / np.sqrt(leaf.size)).astype(np.float32)
    return jax.tree.map(normal, start), groups


def drawn(groups, shape):
    return jax.jit(random_element, static_argnums=(1, 2))(random.key(3), groups, shape)


def inner(reference, draws, batch=0, without=()):
    """<reference, draw> over all parameters, for each draw."""
    total = 0.0
    for (path, r), d in zip(jax.tree_util.tree_leaves_with_path(reference), jax.tree.leaves(draws), strict=True):
        if jax.tree_util.keystr(path, simple=True, separator="/") not in without:
            r, d = np.asarray(r, float), np.asarray(d, float)
            total = total + (r * d).reshape(*d.shape[:batch], -1).sum(-1)
    return total


def one(tree, *index):
    return jax.tree.map(lambda x: x[index], tree)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def all_elements(groups):
    """Every element of the group of a network with one layer of three units."""
    (group,) = groups
    kinds = len(group.flips)
    orders = np.array(list(itertools.permutations(range(3))))
    signs = np.array(list(itertools.product((1, -1), repeat=3 * kinds)), np.int8).reshape(2 ** (3 * kinds), kinds, 3)
    repeated = {group.name: np.repeat(orders, len(signs), 0)}, {group.name: np.tile(signs, (len(orders), 1, 1))}
    return Element(*jax.tree.map(jnp.asarray, repeated), groups)


# ---- the maximum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIGNS)
def test_over_one_group_it_is_the_maximum_by_brute_force(kind):
    network, kinds = SIGNS[kind]
    draws, groups = draws_of(network, (6,))
    reference, _ = draws_of(network, seed=1)
    assert [len(group.flips) for group in groups] == [kinds]
    found = inner(reference, align(draws, groups, reference), 1)
    copies = jax.jit(jax.vmap(apply, (None, 0)))(all_elements(groups), draws)
    best = inner(reference, copies, 2).max(1)
    np.testing.assert_allclose(found, best, rtol=1e-6)
    assert (best > inner(reference, draws, 1) + 1e-3).sum() >= 2


@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_element_is_undone(name):
    truth, groups = draws_of(NETWORKS[name][0])
    copies = jax.jit(apply)(drawn(groups, (50,)), truth)
    back = align(copies, groups, truth)
    assert_equal(back, jax.tree.map(lambda x: np.broadcast_to(x, (50, *x.shape)), truth))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_inner_product_never_falls_and_the_function_stays(name):
    network, x = NETWORKS[name]
    draws, groups = draws_of(network, (2, 10))
    reference, _ = draws_of(network, seed=1)
    without = ("params/Dense_1/kernel",) if name == "doubled" else ()
    values = [inner(reference, draws, 2, without)]
    for sweeps in (1, 2, 3, 100):
        aligned = align(draws, groups, reference, max_sweeps=sweeps)
        values.append(inner(reference, aligned, 2, without))
    assert (np.diff(values, axis=0) >= -1e-6).all()
    assert (values[-1] > values[0] + 1e-2).all()
    # with several groups one sweep is not enough, or the test would not see the others
    assert (values[-1] > values[1] + 1e-3).any() == (len(groups) > 1)
    # nothing is left to gain
    assert_equal(align(aligned, groups, reference), aligned)
    call = jax.jit(jax.vmap(jax.vmap(network.apply, (0, None)), (0, None)))
    np.testing.assert_allclose(call(aligned, x), call(draws, x), rtol=1e-4, atol=1e-5)


def test_what_goes_with_the_draws_is_moved_by_the_element():
    draws, groups = draws_of(DEEP, (4,))
    reference = one(draws, 0)
    element = aligning_element(draws, groups, reference)
    assert_equal(apply(element, draws), align(draws, groups, reference))
    # each kind of sign moves signs of its own, and units of other sizes are no obstacle
    scaled = jax.tree.map(lambda x: 2 * x, draws)
    assert_equal(apply(element, scaled), jax.tree.map(lambda x: 2 * x, align(draws, groups, reference)))


# ---- references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one hidden layer", "deep", "residual"])
def test_copies_of_noisy_draws_come_together_at_their_mean(name):
    network, _ = NETWORKS[name]
    truth, groups = draws_of(network)
    noise, _ = draws_of(network, (3, 20), seed=5)
    near = jax.tree.map(lambda t, e: t + 0.05 * e, truth, noise)
    copies = jax.jit(apply)(drawn(groups, (3, 20)), near)
    aligned = align(copies, groups)
    # all by one element: they are as far from their mean as before they were moved
    spread = lambda tree: sum(float(np.var(x, (0, 1)).sum()) for x in jax.tree.leaves(tree))
    assert spread(copies) > 20 * spread(near)
    np.testing.assert_allclose(spread(aligned), spread(near), rtol=1e-4)


def test_the_distance_to_the_mean_never_rises_until_none_moves():
    draws, groups = draws_of(SIX, (40,))
    scatter = lambda tree: sum(float(np.asarray(x, float).var(0).sum()) for x in jax.tree.leaves(tree))
    rounds = [align(draws, groups, "mean", max_sweeps=n) for n in (1, 2, 3, 4, 100)]
    distances = [scatter(align(draws, groups, one(draws, 0))), *map(scatter, rounds)]
    assert (np.diff(distances) <= 1e-9).all()
    assert distances[0] > distances[-1] + 1e-3
    mean = jax.tree.map(lambda x: np.asarray(x, float).mean(0), rounds[-1])
    assert_equal(align(rounds[-1], groups, mean), rounds[-1])


def test_the_best_draw_stays_and_the_others_come_to_it():
    draws, groups = draws_of(DEEP, (2, 5))
    scores = np.zeros((2, 5))
    scores[1, 3] = 1
    scores[0, 0] = np.nan
    aligned = align(draws, groups, "best", scores=scores)
    assert_equal(aligned, align(draws, groups, one(draws, 1, 3)))
    assert_equal(one(aligned, 1, 3), one(draws, 1, 3))


def test_many_draws_go_through_in_chunks(monkeypatch):
    draws, groups = draws_of(DEEP, (23,))
    whole = align(draws, groups)
    size = sum(x[0].size for x in jax.tree.leaves(draws))
    monkeypatch.setattr("numpyro_bdl.symmetry.matching._CHUNK", 4 * size)
    assert_equal(align(draws, groups), whole)


# ---- what is not as it should be ------------------------------------------------------------------------------------


def test_draws_that_are_not_finite_are_flagged_and_stay():
    draws, groups = draws_of(DEEP, (6,))
    bad = np.array([np.inf, 1, np.nan, 1, 1, 1], np.float32)
    spoiled = jax.tree.map(lambda x: x * bad.reshape(-1, *[1] * (x.ndim - 1)), draws)
    with pytest.warns(UserWarning, match="2 of 6 draws are not finite"):
        aligned = align(spoiled, groups)
    rest = np.array([1, 3, 4, 5])
    assert_equal(one(aligned, np.array([0, 2])), one(spoiled, np.array([0, 2])))
    assert_equal(one(aligned, rest), align(one(draws, rest), groups))


def test_flipped_by_hand_written_groups_and_other_sites():
    params = {"w1": jnp.array([[1.0, -2.0]]), "w2": jnp.array([[5.0], [6.0]]), "noise": jnp.array(3.0)}
    groups = UnitGroups.of(params, {"hidden": Units(writes={"w1": 1}, reads={"w2": 0}, flips=("w1", "w2"))})
    reference = {"w1": jnp.array([[2.0, 1.0]]), "w2": jnp.array([[-6.0], [5.0]])}
    aligned = align(params, groups, reference)
    assert {name: x.ravel().tolist() for name, x in aligned.items()} == {"w1": [2, 1], "w2": [-6, 5], "noise": [3]}
    assert_equal(align(params, groups.only(), reference), params)


def test_bad_input():
    draws, groups = draws_of(THREE, (4,))
    reference = one(draws, 0)
    without = {"params": {k: v for k, v in reference["params"].items() if k != "Dense_0"}}
    cases = [
        ({"reference": "median"}, "'best' or 'mean', got 'median'"),
        ({"reference": "best"}, "needs scores"),
        ({"reference": "best", "scores": np.zeros(3)}, r"\(4,\), got \(3,\)"),
        ({"reference": "best", "scores": np.full(4, np.nan)}, "score that is a number"),
        ({"reference": draws}, r"no batch axes, got \(4,\)"),
        ({"reference": jax.tree.map(lambda x: x * np.nan, reference)}, "reference is not finite at 'params/Dense_0"),
        ({"reference": without}, "'params/Dense_0/.*' is missing in reference"),
        ({"reference": jax.tree.map(lambda x: x[..., :1], reference)}, "must have shape"),
        ({"max_sweeps": 0}, "max_sweeps must be an integer"),
    ]
    for settings, text in cases:
        with pytest.raises(ValueError, match=text):
            align(draws, groups, **settings)
    with pytest.raises(ValueError, match="missing in params"):
        align({"params": {"Dense_1": draws["params"]["Dense_1"]}}, groups, reference)
    with (
        pytest.warns(UserWarning, match="4 of 4"),
        pytest.raises(ValueError, match="no draw is finite"),
    ):
        align(jax.tree.map(lambda x: x * np.nan, draws), groups)
