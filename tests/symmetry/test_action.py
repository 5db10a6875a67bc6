# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from networks import MLP, equal
from scipy import stats

from numpyro_bdl.symmetry import (
    Element,
    UnitGroups,
    Units,
    apply,
    canonical_element,
    canonicalize,
    cardinality,
    find_groups,
    log_cardinality,
    random_element,
)


def one_layer(width=3, inputs=1):
    """The parameters of a tanh network, with its groups."""
    params = {
        "w1": random.normal(random.key(1), (inputs, width)),
        "b": random.normal(random.key(2), (width,)),
        "w2": random.normal(random.key(3), (width, 1)),
    }
    units = Units(writes={"b": 0, "w1": 1}, reads={"w2": 0}, flips=("b", "w1", "w2"))
    return params, UnitGroups.of(params, {"hidden": units})


def network(params, x):
    return jnp.tanh(x @ params["w1"] + params["b"]) @ params["w2"]


def test_membership_of_the_domains():
    params, groups = one_layer(5, 2)
    for domain, key in (("bias", "b"), ("incoming", "w1"), ("outgoing", "w2")):
        folded = canonicalize(params, groups, domain)
        keys = {"b": folded["b"], "w1": folded["w1"][0], "w2": folded["w2"][:, 0]}[key]
        assert (keys > 0).all()
        assert (jnp.diff(keys) > 0).all()


def test_all_48_images_of_a_small_network():
    """Distinct, of one function, and of one representative."""
    params, groups = one_layer()
    assert cardinality(groups) == 48
    elements = [
        Element({"hidden": jnp.array(order)}, {"hidden": jnp.array([signs], jnp.int8)}, groups)
        for order in itertools.permutations(range(3))
        for signs in itertools.product([1, -1], repeat=3)
    ]
    images = [apply(element, params) for element in elements]
    flat = {tuple(np.concatenate([w.ravel() for w in image.values()]).tolist()) for image in images}
    assert len(flat) == 48
    x = jnp.linspace(-2, 2, 11)[:, None]
    representative = canonicalize(params, groups)
    for image in images:
        np.testing.assert_allclose(network(image, x), network(params, x), atol=1e-6)
        assert equal(canonicalize(image, groups), representative)


@pytest.mark.parametrize(
    ("widths", "exact", "log10"),
    [
        ((2,), 8, 0.903),
        ((3,), 48, 1.681),
        ((8,), 10_321_920, 7.014),
        ((10,), 3_715_891_200, 9.570),
        ((64,), None, 108.369),
        ((128,), None, 254.118),
        ((10, 10, 10), None, 28.710),
        ((16, 16, 16), None, 54.411),
        ((32, 32, 32), None, 135.159),
    ],
)
def test_cardinality(widths, exact, log10):
    params, spec, before = {}, {}, 1
    for n, width in enumerate((*widths, 1)):
        params |= {f"w{n}": jnp.ones((before, width)), f"b{n}": jnp.ones(width)}
        before = width
    for n, _ in enumerate(widths):
        names = (f"b{n}", f"w{n}", f"w{n + 1}")
        spec[f"layer{n}"] = Units({names[0]: 0, names[1]: 1}, {names[2]: 0}, names)
    groups = UnitGroups.of(params, spec)
    assert exact in (None, cardinality(groups))
    assert log_cardinality(groups) / math.log(10) == pytest.approx(log10, abs=6e-4)
    assert math.log(cardinality(groups)) == pytest.approx(log_cardinality(groups), rel=1e-12)


def test_law_of_the_fold_of_prior_draws():
    """Biases are the order statistics of half-normals; what goes with a bias stays normal, its signs with it."""
    width, draws = 4, 4000
    keys = random.split(random.key(0), 3)
    shapes = {"w1": (1, width), "b": (width,), "w2": (width, 1)}
    params = {n: random.normal(k, (draws, *s)) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    groups = one_layer(width)[1]
    folded = jax.jit(lambda p: canonicalize(p, groups))(params)
    for n in range(width):
        # F(x)^k (1 - F(x))^(M - k) summed: the n-th smallest of M
        law = lambda x, n=n: stats.beta(n + 1, width - n).cdf(stats.halfnorm.cdf(x))
        assert stats.kstest(np.asarray(folded["b"][:, n]), law).pvalue > 1e-3
        assert stats.kstest(np.asarray(folded["w1"][:, 0, n]), stats.norm.cdf).pvalue > 1e-3
    # a random copy has the prior's law again
    unfolded = apply(random_element(random.key(1), groups, (draws,)), folded)
    assert stats.kstest(np.asarray(unfolded["b"]).ravel(), stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(np.asarray(unfolded["b"]).T)[np.triu_indices(width, 1)]).max() < 4 / math.sqrt(draws)


def test_random_elements_are_uniform():
    groups = one_layer()[1]
    element = random_element(random.key(0), groups, (6000,))
    codes = np.asarray(element.permutations["hidden"]) @ [9, 3, 1]
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.binomtest(int((np.asarray(element.signs["hidden"]) > 0).sum()), 18_000).pvalue > 1e-3


def test_jit_vmap_and_batches_agree():
    params, groups = one_layer(5, 2)
    batch = apply(random_element(random.key(0), groups, (2, 3)), params)
    batch = jax.tree.map(lambda w: w + 0.1 * random.normal(random.key(w.size), w.shape), batch)
    folded = canonicalize(batch, groups)
    one_by_one = jax.vmap(jax.vmap(lambda p: canonicalize(p, groups)))(batch)
    jitted = jax.jit(lambda p: canonicalize(p, groups))(batch)
    loop = [[canonicalize(jax.tree.map(lambda w: w[c, d], batch), groups) for d in range(3)] for c in range(2)]  # noqa: B023
    stacked = jax.tree.map(lambda *w: jnp.stack(w).reshape(2, 3, *w[0].shape), *itertools.chain(*loop))
    assert equal(folded, one_by_one)
    assert equal(folded, jitted)
    assert equal(folded, stacked)


def test_one_program_serves_all_draws(compilations):
    params, groups = one_layer()
    fold = jax.jit(lambda p: canonicalize(p, groups))
    fold(params)
    before = len(compilations)
    fold(jax.tree.map(lambda w: w + 1.0, params))
    assert len([c for c in compilations[before:] if "lambda" in str(c)]) == 0


def test_double_precision():
    with jax.enable_x64(True):
        params, groups = one_layer(16, 3)
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), params)
        copy = apply(random_element(random.key(0), groups), params)
        x = random.normal(random.key(1), (50, 3), jnp.float64)
        assert copy["b"].dtype == jnp.float64
        assert equal(canonicalize(copy, groups), canonicalize(params, groups))
        assert float(jnp.abs(network(copy, x) - network(params, x)).max()) < 1e-12


def test_zero_biases_go_by_incoming_weights():
    params, groups = one_layer(6, 2)
    params["b"] = jnp.zeros(6)
    copies = apply(random_element(random.key(0), groups, (10,)), params)
    folded = canonicalize(params, groups)
    assert (folded["w1"][0] > 0).all()
    assert (jnp.diff(folded["w1"][0]) > 0).all()
    assert equal(canonicalize(copies, groups), jax.tree.map(lambda w: jnp.broadcast_to(w, (10, *w.shape)), folded))


@pytest.mark.parametrize("zeros", [("b0", "mean"), ("b0", "b", "mean"), ("b0", "b")])
def test_two_kinds_of_signs_fall_back_together(zeros):
    """Dense, BatchNorm, tanh, Dense: signs before the scale and after it. Flax begins with biases and means of 0."""
    rng = np.random.default_rng(0)
    shapes = {"b0": (4,), "w": (2, 4), "b": (4,), "mean": (4,), "scale": (4,), "v": (4, 1)}
    params = {n: np.zeros(k) if n in zeros else rng.normal(size=k) for n, k in shapes.items()}
    axes = {"b0": 0, "w": 1, "b": 0, "mean": 0, "scale": 0}
    (group,) = UnitGroups.of(params, {"units": Units(axes, {"v": 0})})
    kinds = (True, True, False, True, True, False), (False, False, True, False, True, True)
    groups = UnitGroups((group._replace(flips=kinds),), tuple(((n,), k) for n, k in shapes.items()))
    copies = apply(random_element(random.key(1), groups, (8,)), params)
    for domain in ("bias", "incoming"):
        folded = canonicalize(params, groups, domain)
        assert equal(canonicalize(folded, groups, domain), folded)
        assert equal(canonicalize(copies, groups, domain), jax.tree.map(lambda w: jnp.stack([w] * 8), folded))


def test_duplicate_units_and_zeros_keep_the_function():
    params, groups = one_layer(4, 2)
    params["b"] = params["b"].at[1].set(params["b"][0]).at[3].set(0.0)
    params["w1"] = params["w1"].at[:, 1].set(params["w1"][:, 0]).at[:, 3].set(0.0)
    x = random.normal(random.key(0), (9, 2))
    folded = canonicalize(params, groups)
    assert equal(canonicalize(folded, groups), folded)
    np.testing.assert_allclose(network(folded, x), network(params, x), atol=1e-6)


def test_a_flipped_zero_is_no_other_number():
    """-0.0 would differ from 0.0 in its bits, and a pruned weight is a zero."""
    params, groups = one_layer(2)
    params |= {"b": jnp.array([-1.0, 2.0]), "w2": jnp.zeros((2, 1))}
    assert not np.signbit(np.asarray(canonicalize(params, groups)["w2"])).any()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_draws_that_are_not_finite_are_left_as_they_are(bad):
    params, groups = one_layer()
    batch = jax.tree.map(lambda w: jnp.stack([w, -w, w]), params)
    batch["w2"] = batch["w2"].at[1, 0, 0].set(bad)
    folded = canonicalize(batch, groups)
    for name in params:
        np.testing.assert_array_equal(folded[name][1], batch[name][1])
    assert equal(jax.tree.map(lambda w: w[0], folded), canonicalize(params, groups))


def test_what_scales_is_permuted_and_not_flipped():
    params, groups = one_layer()
    element = canonical_element(params, groups)
    variance = jax.tree.map(jnp.square, params)
    expected = jax.tree.map(jnp.square, apply(element, params))
    assert equal(apply(element, variance, signs=False), expected)


def test_other_leaves_and_missing_ones():
    params, groups = one_layer()
    element = canonical_element(params, groups)
    assert apply(element, {"b": params["b"], "sigma": jnp.ones(3)})["sigma"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, g: canonicalize(p, g, "biases"), "domain must be one of 'bias', 'incoming', 'outgoing'"),
        (lambda p, g: canonicalize({"w1": p["w1"]}, g), "needs every parameter of the groups; 'b' is missing"),
        (lambda p, g: canonicalize({"x": p["w1"]}, g), "None of the parameters of the groups is there. They have"),
        (lambda p, g: canonicalize(p | {"b": jnp.ones(4)}, g), r"'b' must have shape \(3,\) behind any batch axes"),
        (lambda p, g: canonicalize(p | {"b": jnp.ones((2, 3))}, g), "All parameters must have the same batch axes"),
        (
            lambda p, g: apply(random_element(random.key(0), g, (2,)), jax.tree.map(lambda w: jnp.stack([w] * 3), p)),
            r"The element has batch axes \(2,\), the parameters have \(3,\)",
        ),
        (lambda p, g: g["nothing"], "There is no group 'nothing'; the groups are: hidden"),
        (
            lambda p, g: UnitGroups.of(p, {"a": Units({"bias": 0}, {})}),
            "names the parameter 'bias', which is not there",
        ),
        (lambda p, g: UnitGroups.of(p, {"a": Units({"b": 1}, {})}), r"'b' has shape \(3,\) and no axis 1"),
        (lambda p, g: UnitGroups.of(p, {"a": Units({"b": 0, "w1": 0}, {})}), r"one length, got b\[0\] of length 3, w1"),
        (lambda p, g: UnitGroups.of(p, {"a": Units({"b": 0}, {}, ("w2",))}), "flips names w2, which it does not have"),
        (
            lambda p, g: UnitGroups.of(p, {"a": Units({"b": 0}, {}), "c": Units({"w1": 1, "b": 0}, {})}),
            r"b\[0\] is named by 'a' and 'c'",
        ),
        (lambda p, g: UnitGroups.of(p, {"a": Units({"w1": 1}, {"w1": 1})}), r"w1\[1\] is named by 'a' twice"),
        (lambda p, g: UnitGroups.of(p, {"a": Units({"b": 0}, {}, "b")}), r"flips must be a tuple .* got the text 'b'"),
        (lambda p, g: UnitGroups.of(p, {"a": Units({"b": 0.0}, {})}), "the axis of 'b' must be an integer, got 0.0"),
        (lambda p, g: UnitGroups.of(p, {"a": {"b": 0}}), r"Group 'a' must be Units\(writes=.* got dict"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        call(*one_layer())


def test_only_some_groups():
    groups = find_groups(MLP(), None, jnp.ones((3, 2)))
    some = groups.only("Dense_1")
    assert [g.name for g in some] == ["Dense_1"]
    assert {"/".join(path) for path, _ in some.shapes} == {
        "params/Dense_1/kernel",
        "params/Dense_1/bias",
        "params/Dense_2/kernel",
    }
