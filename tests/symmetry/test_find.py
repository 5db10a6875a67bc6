# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax, random
from networks import CASES, MLP, Layers, equal
from numpyro.contrib.module import random_flax_module

from numpyro_bdl.symmetry import (
    Element,
    UnitGroups,
    Units,
    apply,
    canonicalize,
    find_groups,
    find_model_groups,
    random_element,
)
from numpyro_bdl.symmetry.action import telling_elements
from numpyro_bdl.symmetry.groups import put_members
from numpyro_bdl.symmetry.signs import GRID, classify, solutions
from numpyro_bdl.symmetry.trace import Trace


@pytest.mark.filterwarnings("ignore:These symmetries are not removed")
@pytest.mark.parametrize("name", CASES)
def test_network(name):
    """Its groups; that copies compute the same function; that all of them lead to one network, bitwise."""
    case = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=case.shape).astype(np.float32)
    groups = find_groups(case.network, None, x)
    assert {g.name: (g.size, len(g.flips)) for g in groups} == case.groups
    assert not groups.left_out

    params = jax.jit(case.network.init)(random.key(1), x)
    params = jax.tree.map(lambda w: np.asarray(w) + rng.uniform(0.1, 0.4, w.shape).astype(w.dtype), params)
    function = jax.jit(jax.vmap(lambda p: case.network.apply(p, x)))
    copies = apply(random_element(random.key(2), groups, (12,)), params)
    networks = jax.tree.map(lambda one, some: jnp.concatenate([one[None], some]), params, copies)
    assert not equal(jax.tree.map(lambda w: w[:1], networks), jax.tree.map(lambda w: w[1:], networks))
    values = function(networks)
    np.testing.assert_allclose(values, values[:1].repeat(13, 0), atol=1e-5 * (1 + np.abs(values).max()))

    for domain in ("bias", "incoming", "outgoing"):
        folded = canonicalize(networks, groups, domain)
        assert equal(canonicalize(folded, groups, domain), folded)
        first = jax.tree.map(lambda w: w[:1], folded)
        if case.unique:
            assert equal(folded, jax.tree.map(lambda w: w.repeat(13, 0), first))
        np.testing.assert_allclose(function(folded), values, atol=1e-5 * (1 + np.abs(values).max()))


@pytest.mark.parametrize("name", ["attention", "group norm"])
def test_units_along_one_axis_are_sorted_and_their_signs_reported(name):
    """Heads and their features: exchanges are removed, and of the signs a warning tells."""
    case = CASES[name]
    params = jax.jit(case.network.init)(random.key(1), np.ones(case.shape, np.float32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: np.asarray(w) + rng.uniform(0.1, 0.4, w.shape).astype(w.dtype), params)
    groups = find_groups(case.network, params, jnp.ones(case.shape))
    element = random_element(random.key(5), groups, (12,))
    moved = Element(element.permutations, jax.tree.map(jnp.ones_like, element.signs), groups)
    with pytest.warns(UserWarning, match="not removed: .*: signs of units that lie along those of another group"):
        folded, copies = canonicalize(params, groups), canonicalize(apply(moved, params), groups)
    for one, other in zip(*map(jax.tree.leaves, (folded, copies)), strict=True):
        np.testing.assert_array_equal(jnp.abs(other), jnp.broadcast_to(jnp.abs(one), other.shape))


def kinds_of_sign(*layers, shape=(3, 4)):
    network = Layers((nn.Dense(5) if len(shape) == 2 else nn.Conv(5, (2, 2)), *layers, nn.Dense(2)))
    (first,) = [g for g in find_groups(network, None, jnp.ones(shape)) if g.size == 5]
    return len(first.flips), first.pointwise


@pytest.mark.parametrize(
    ("activation", "kinds", "name"),
    [
        (jnp.tanh, 1, "odd"),
        (jax.lax.erf, 1, "odd"),
        (nn.soft_sign, 1, "odd"),
        (nn.hard_tanh, 1, "odd"),
        (lambda x: x * jnp.abs(x), 1, "odd"),
        (lambda x: jnp.clip(x, -9.0, 9.0), 1, "odd"),
        (jnp.cos, 1, "even"),
        (jnp.square, 1, "even"),
        (nn.relu, 0, "homogeneous"),
        (nn.leaky_relu, 0, "homogeneous"),
        (nn.silu, 0, "other"),
        (nn.gelu, 0, "other"),
        (nn.elu, 0, "other"),
        (nn.sigmoid, 0, "other"),
        (lambda x: jnp.clip(x, -9.0, 10.0), 0, "other"),
    ],
)
def test_activations_are_told_apart_by_their_values(activation, kinds, name):
    assert kinds_of_sign(activation) == (kinds, name)


@pytest.mark.parametrize(
    ("layer", "kinds"),
    [
        (lambda x: nn.avg_pool(x, (2, 2)), 1),
        (lambda x: nn.max_pool(x, (2, 2)), 0),
        (nn.LayerNorm(use_scale=False, use_bias=False), 0),
        (nn.RMSNorm(use_scale=False), 1),
        (nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False), 1),
        (lambda x: x - x.max(-1, keepdims=True), 0),
        (lambda x: x + 1.0, 0),
        (lambda x: x + 0.0, 1),
        (lambda x: -2.0 * x, 1),
        (lambda x: x / jnp.sum(x**2), 1),
    ],
)
def test_what_layers_do_to_signs(layer, kinds):
    network = Layers((nn.Conv(5, (2, 2)), layer, jnp.tanh, nn.Dense(2)))
    x = random.normal(random.key(0), (3, 6, 6, 2))
    function = lambda p: network.apply({"params": p}, x, mutable=["batch_stats"])[0]
    params = network.init(random.key(0), x)["params"]
    (group,) = find_groups(function, params)
    assert len(group.flips) == kinds


def test_naming_a_sign_that_is_none_changes_the_function():
    """The negative controls: what is not found would be wrong."""
    x = random.normal(random.key(0), (20, 3))
    flips = ("b", "w1", "w2")
    params = {"w1": random.normal(random.key(1), (3, 4)), "b": jnp.ones(4), "w2": random.normal(random.key(2), (4, 1))}
    groups = UnitGroups.of(params, {"hidden": Units({"b": 0, "w1": 1}, {"w2": 0}, flips)})
    copy = apply(telling_elements(groups)[0], params)
    for activation, same in ((jnp.tanh, True), (nn.relu, False), (nn.sigmoid, False), (nn.silu, False)):
        f = lambda p, a=activation: a(x @ p["w1"] + p["b"]) @ p["w2"]
        assert (float(jnp.abs(f(copy) - f(params)).max()) < 1e-5) == same


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: jnp.concatenate([x, x], 1), "'concatenate' takes a part of it"),
        (lambda x: jnp.sort(x, 1), "no rule is known for the operation 'sort'"),
        (lambda x: jnp.cumsum(x, 1), "'cumsum' takes a part of it"),
        (lambda x: x * jnp.arange(5.0), "it is numbered"),
        (lambda x: x[:, ::-1], "'rev' takes a part of it"),
        (lambda x: x * np.array([1.0, 2, 3, 4, 5], np.float32), "a constant varies along it"),
    ],
)
def test_what_can_not_be_followed_is_left_out_and_said(operation, reason):
    groups = find_groups(Layers((nn.Dense(5), operation, nn.Dense(2))), None, jnp.ones((3, 4)))
    assert len(groups) == 0
    assert any("params/layers_0/kernel[1]" in line and line.endswith(reason) for line in groups.left_out)


def test_a_group_that_changes_the_function_is_left_out(monkeypatch):
    """As if the rule for reversing were wrong."""
    take_all = lambda self, params, args, shapes: [self._take(args[0], range(len(shapes[0])))]
    monkeypatch.setattr(Trace, "_rev", take_all)
    groups = find_groups(Layers((nn.Dense(5), lambda x: x[:, ::-1], nn.Dense(2))), None, jnp.ones((3, 4)))
    assert len(groups) == 0
    assert "layers_0: changes the function by" in groups.left_out[0]


def test_loops_and_branches():
    def function(params, x):
        h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params["w"] + x @ params["v"]), jnp.zeros((len(x), 4)))
        h = lax.cond(x.sum() > 0, lambda h: 2 * h, lambda h: h, h)
        h = lax.while_loop(lambda c: jnp.sum(c**2) < 5, lambda c: 1.5 * c + params["b"], h)
        return h @ params["out"]

    params = {"w": jnp.eye(4), "v": jnp.ones((2, 4)), "b": jnp.ones(4), "out": jnp.ones((4, 1))}
    (group,) = find_groups(function, params, jnp.ones((3, 2)))
    assert (group.size, len(group.flips)) == (4, 1)
    assert {str(m) for m in group.members} == {"v[1]", "w[1]", "w[0]", "b[0]", "out[0]"}


def test_embeddings_and_lookups():
    function = lambda p, ids: jnp.tanh(p["table"][ids] + p["position"]) @ p["table"].T
    params = {"table": jnp.ones((7, 4)), "position": jnp.ones((3, 4))}
    (group,) = find_groups(function, params, jnp.array([[0, 1, 6], [2, 2, 5]]))
    assert (group.size, len(group.flips)) == (4, 1)
    assert {str(m) for m in group.members} == {"table[1]", "position[1]"}


def test_nnx_modules_have_the_groups_of_linen_ones():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Linear(2, 5, rngs=rngs), nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
            self.dropout, self.last = nnx.Dropout(0.5, deterministic=True, rngs=rngs), nnx.Linear(5, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))

    (group,) = find_groups(Network(nnx.Rngs(0)), None, jnp.ones((3, 2)))
    assert (group.name, group.size, len(group.flips)) == ("first", 5, 2)
    assert {"norm/mean", "norm/var", "norm/scale", "norm/bias"} < {"/".join(m.path) for m in group.members}


def test_parameters_that_the_function_does_not_use_are_no_group():
    groups = find_groups(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3)), "unused": jnp.ones((7, 7))}, jnp.ones((4, 2)))
    assert len(groups) == 0


def heteroscedastic(x, y):
    location = random_flax_module("location", MLP((3,)), dist.Normal(0, 1), input_shape=(1, 2))
    scale = random_flax_module("scale", MLP((4,), nn.relu), dist.Normal(0, 1), input_shape=(1, 2))
    gain = numpyro.sample("gain", dist.HalfNormal(1).expand([3]).to_event(1))
    weight = numpyro.sample("weight", dist.Normal(0, 1).expand([3]).to_event(1))
    with numpyro.plate("data", len(x)):
        loc = location(x)[:, 0] + jnp.tanh(x[:, :1] * gain) @ weight
        numpyro.sample("y", dist.Normal(loc, jnp.exp(scale(x)[:, 0])), obs=y)


def test_groups_of_a_model():
    """A network behind the scale is seen; a site that must be positive has no sign, whatever the function."""
    groups = find_model_groups(heteroscedastic, jnp.ones((10, 2)), jnp.ones(10))
    kinds = {g.name: (g.size, len(g.flips)) for g in groups}
    assert kinds == {"gain": (3, 0), "location/Dense_0": (3, 1), "scale/Dense_0": (4, 0)}


def bounded(x, y, low):
    """The transform of w to (low, low + 2) is odd only if that is (-1, 1)."""
    w = numpyro.sample("w", dist.Uniform(low, low + 2).expand([1, 3]).to_event(2))
    b = numpyro.sample("b", dist.Normal(0, 1).expand([3]).to_event(1))
    v = numpyro.sample("v", dist.Normal(0, 1).expand([3]).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(jnp.tanh(x @ (w - low - 1) + b) @ v, 0.3), obs=y)


@pytest.mark.parametrize(("low", "kinds"), [(-1.0, 1), (0.0, 0)])
def test_signs_of_a_bounded_site_are_those_of_its_values(low, kinds):
    """A flip in unconstrained space would take w to 2 - w, and draws are folded by their values."""
    groups = find_model_groups(bounded, jnp.ones((5, 1)), jnp.ones(5), low)
    assert (groups["w"].size, len(groups["w"].flips)) == (3, kinds)
    assert any("signs of w: the transform to its support is not odd" in line for line in groups.left_out) != kinds


class Overwritten(nn.Module):
    """A statistic of the last batch, which training writes and evaluation reads."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4)(x)
        last = self.variable("stats", "mean", lambda: jnp.zeros(4))
        if not self.is_initializing():
            last.value = h.mean(0)
        return nn.Dense(1)(jnp.tanh(h - h.mean(0)))[:, 0]


def overwritten(x, y):
    net = random_flax_module("net", Overwritten(), dist.Normal(0, 1), input_shape=(4, 1), mutable=["stats"])
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(net(x), 0.3), obs=y)


def test_statistics_that_are_overwritten_belong_to_the_units():
    group = find_model_groups(overwritten, jnp.linspace(0, 1, 5)[:, None], jnp.ones(5))["net/Dense_0"]
    (stat,) = [n for n, m in enumerate(group.members) if m.path[-1] == "mean"]
    kernel, bias = (next(n for n, m in enumerate(group.members) if m.path[0] == f"net/Dense_0.{p}") for p in
                    ("kernel", "bias"))  # fmt: skip
    # a bias moves the statistic too, so that the kinds which flip one of them flip all
    assert all(kind[stat] == kind[kernel] == kind[bias] for kind in group.flips)
    assert len(group.flips) == 1


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            lambda p, x: (jnp.tanh(x @ p["a"])[:, :, None] * jnp.tanh(x @ p["c"])[:, None, :]).reshape(5, -1) @ p["o"],
            {"a": (3, 1), "c": (2, 1)},
        ),
        (
            lambda p, x: (lambda h: (h[:, :, None] * h[:, None, :]).reshape(5, -1) @ p["u"])(jnp.tanh(x @ p["a"])),
            {"a": (3, 1)},
        ),
        (
            lambda p, x: jnp.tanh(jnp.einsum("ni,io,h->noh", x, p["a"], np.ones(2)) * p["s"][:, None]).sum(2) @ p["v"],
            {"a": (3, 2)},
        ),
    ],
    ids=["outer product", "outer square", "channels first"],
)
def test_signs_where_axes_of_one_are_broadcast(function, expected):
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 3), "c": (4, 2), "o": (6, 2), "u": (9, 2), "s": (3,), "v": (3, 2)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    groups = find_groups(function, params, jnp.ones((5, 4)))
    assert {g.name: (g.size, len(g.flips)) for g in groups} == expected
    assert not groups.left_out


def test_axes_of_length_0_are_no_units():
    params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1)), "w0": jnp.ones((2, 0)), "v0": jnp.ones((0, 1))}
    function = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"] + jnp.tanh(x @ p["w0"]) @ p["v0"]
    groups = find_groups(function, params, jnp.ones((4, 2)))
    assert [g.name for g in groups] == ["w"]
    canonicalize(params, groups)


def test_a_function_that_is_finite_at_the_given_inputs_alone():
    function = lambda p, x: jnp.tanh(jnp.log(x) @ p["w"]) @ p["v"]
    params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}
    assert len(find_groups(function, params, jnp.array([[1.5, 2.0], [3.0, 0.5]]))) == 1


def test_rounding_errors_of_a_steep_network_are_no_change():
    sine = lambda x: jnp.sin(30 * x)
    network = Layers((nn.Dense(64), sine, nn.Dense(64), sine, nn.Dense(64), sine, nn.Dense(64), sine, nn.Dense(1)))
    assert len(find_groups(network, None, jnp.ones((3, 2)))) == 4


def test_a_table():
    table = str(find_groups(MLP((5,)), None, jnp.ones((3, 2))))
    assert table.splitlines() == [
        "group    units  signs  pointwise  axes",
        "Dense_0  5      yes    odd        params/Dense_0/kernel[1], params/Dense_0/bias[0], params/Dense_1/kernel[0]",
        "equivalent copies: 10^3.6",
    ]


def test_classify():
    assert classify(3 * GRID) == "linear"
    assert classify(np.full_like(GRID, 2.0)) == "constant"
    assert classify(np.where(GRID > 100, GRID + 1, GRID)) == "other"
    assert classify(np.clip(GRID, -5000, 3000)) == "other"
    assert classify(np.where(GRID > 5e-3, GRID, np.minimum(GRID, 0))) == "other"
    assert classify(GRID + 1e-5) == "other"
    with np.errstate(invalid="ignore"):
        assert classify(np.log(GRID)) == "other"


def test_values_that_are_used_twice_cost_no_more():
    """The number of evaluations doubled with each of forty steps."""

    def function(params, x):
        h = x @ params["w"]
        for _ in range(40):
            h = h + 0.1 * jnp.sin(h)
        return h @ params["v"]

    (group,) = find_groups(function, {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}, jnp.ones((4, 2)))
    assert (len(group.flips), group.pointwise) == (1, "odd")


def test_a_single_number_for_all_units():
    """An array of one entry is broadcast over the units."""
    function = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(1), "v": jnp.ones((3, 1))}
    (group,) = find_groups(function, params, jnp.ones((4, 2)))
    assert (group.size, len(group.flips)) == (3, 0)
    assert {str(m) for m in group.members} == {"w[1]", "v[0]"}


def test_a_network_of_small_variances():
    network = Layers((nn.Dense(5, use_bias=False), nn.BatchNorm(use_running_average=True), jnp.tanh, nn.Dense(1)))
    params = network.init(random.key(0), jnp.ones((3, 2)))
    params = put_members(params, {("batch_stats", "layers_1", "var"): jnp.full(5, 0.05)})
    (group,) = find_groups(network, params, jnp.ones((3, 2)))
    assert len(group.flips) == 2


def test_outputs_that_are_no_numbers():
    function = lambda p, x: (jnp.tanh(x @ p["w"]) @ p["v"] > 0, random.key(0))
    assert len(find_groups(function, {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 1))}, jnp.ones((4, 2)))) == 1


def test_solutions_over_gf2():
    """x1 + x2 = 0 and x2 + x3 + x4 = 0 with x4 unwanted: x1 = x2 and x3 are free."""
    bits = [1, 2, 4, 8]
    assert solutions([0b0011, 0b1110], bits[:3]) == [(True, True, False), (False, False, True)]
    assert solutions([0b0011, 0b0110, 0b0001], bits[:3]) == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: find_groups(3, {}), TypeError, "needs a function or a Flax module, got int"),
        (lambda: find_groups(lambda p: p, None), TypeError, "params=None is for Flax modules"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
