# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from models import LABELS, NETWORKS, X
from numpyro.infer import MCMC

import numpyro_bdl as bdl
from numpyro_bdl import pruning
from numpyro_bdl.weight_groups import partition

# ---- which groups go ----------------------------------------------------------------------------------------------

SHAPES = {"a": (4, 3), "b": (5,)}


def criteria(groups, seed=0):
    rng = np.random.default_rng(seed)
    kept = {n: jnp.ones(g.shape, bool) for n, g in groups.items()}
    return kept, *({n: jnp.asarray(rng.random(g.shape), jnp.float32) for n, g in groups.items()} for _ in range(2))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.75, 0.88])
def test_the_least_included_go(sparsity):
    groups = partition("test", {"*": "unstructured"}, SHAPES)
    kept, inclusion, square = criteria(groups)
    stays = pruning.keep_by_sparsity(groups, kept, inclusion, square, jnp.float32(sparsity), 1)
    values = np.concatenate([np.ravel(inclusion[n]) for n in groups])
    mask = np.concatenate([np.ravel(stays[n]) for n in groups])
    assert (~mask).sum() == int(sparsity * 17 + 0.5)
    assert all(s.any() for s in stays.values())
    if sparsity < 0.8:
        assert not mask[np.argsort(values)[: (~mask).sum()]].any()


def test_ties_are_broken_by_the_mean_square():
    groups = partition("test", {"b": "unstructured"}, SHAPES)
    kept, inclusion, square = criteria(groups)
    same = {"b": jnp.zeros(5)}
    stays = pruning.keep_by_sparsity(groups, kept, same, square, jnp.float32(0.4), 1)["b"]
    np.testing.assert_array_equal(np.flatnonzero(~stays), np.sort(np.argsort(square["b"])[:2]))


def test_ranks_are_those_of_both_criteria():
    rng = np.random.default_rng(0)
    inclusion = np.repeat(10.0 ** rng.uniform(-30, 0, 40), 5)
    square = 10.0 ** rng.uniform(-6, 3, 200)
    rank = np.asarray(pruning._rank(jnp.ones(200, bool), jnp.asarray(inclusion), jnp.asarray(square)))
    order, exact = np.argsort(rank), np.lexsort((square, inclusion))
    np.testing.assert_allclose(inclusion[order], inclusion[exact], rtol=0.005)
    np.testing.assert_allclose(square[order], square[exact], rtol=0.005)
    gone = pruning._rank(jnp.arange(3) > 0, jnp.zeros(3), jnp.zeros(3))
    np.testing.assert_array_equal(gone, [0, 1, 1])


def test_groups_count_by_their_weights():
    groups = partition("test", {"a": "neuron_out", "b": "unstructured"}, SHAPES)
    kept, _, square = criteria(groups)
    inclusion = {"a": jnp.array([0.0, 0.5, 0.9]), "b": jnp.array([0.1, 0.2, 0.6, 0.7, 0.8])}
    # 4 weights of the first neuron, 1 and 1 of b: 6 of 17; half of the next neuron makes 8
    for target, second in ((7.5 / 17, True), (8.5 / 17, False)):
        stays = pruning.keep_by_sparsity(groups, kept, inclusion, square, jnp.float32(target), 1)
        np.testing.assert_array_equal(stays["a"], [False, second, True])
        np.testing.assert_array_equal(stays["b"], [False, False, True, True, True])


def test_what_is_gone_stays_gone_and_some_always_stay():
    groups = partition("test", {"*": "unstructured"}, SHAPES)
    kept, inclusion, square = criteria(groups)
    kept = {"a": kept["a"].at[0, 0].set(False), "b": kept["b"].at[3].set(False)}
    inclusion = {"a": inclusion["a"].at[0, 0].set(2.0), "b": jnp.zeros(5)}
    bounds = {"a": 9.0, "b": 9.0}
    for rule, amount in ((pruning.keep_by_sparsity, jnp.float32(0.999)), (pruning.keep_by_threshold, bounds)):
        stays = rule(groups, kept, inclusion, square, amount, 2)
        assert {n: int(s.sum()) for n, s in stays.items()} == {"a": 2, "b": 2}
        assert not stays["a"][0, 0]
        assert not stays["b"][3]
    stays = pruning.keep_by_sparsity(groups, kept, inclusion, square, jnp.float32(0), 1)
    np.testing.assert_array_equal(np.concatenate([stays["a"].ravel(), stays["b"]]).sum(), 15)


def test_a_threshold_is_a_threshold():
    groups = partition("test", {"*": "unstructured"}, SHAPES)
    kept, inclusion, square = criteria(groups)
    stays = pruning.keep_by_threshold(groups, kept, inclusion, square, {"a": 0.3, "b": 0.6}, 1)
    for name, bound in (("a", 0.3), ("b", 0.6)):
        np.testing.assert_array_equal(stays[name], np.asarray(square[name]) >= bound)


def test_largest_sparsity():
    groups = partition("test", {"a": "neuron_out", "b": "unstructured"}, SHAPES)
    np.testing.assert_allclose(pruning.largest_sparsity(groups, 1), 1 - 5 / 17)
    np.testing.assert_allclose(pruning.largest_sparsity(groups, 2), 1 - 10 / 17)


def test_cubic_sparsity():
    schedule = pruning.cubic(0.2, 0.6)
    values = [float(schedule.sparsity(jnp.int32(i), 100, 0.8)) for i in (0, 19, 39, 59, 99)]
    np.testing.assert_allclose(values, [0, 0, 0.8 * (1 - 0.5**3), 0.8, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: pruning.cubic(start=-0.1), "pruning.cubic: start must be a number"),
        (lambda: pruning.cubic(end=1.0), "pruning.cubic: end must be a number"),
        (lambda: pruning.cubic(0.5, 0.4), "pruning.cubic: end must be a number in \\(0.5, 1\\)"),
        (lambda: pruning.cubic(min_keep=0), "pruning.cubic: min_keep must be an integer of at least 1"),
        (lambda: pruning.threshold(0.0), "pruning.threshold: mean_square must be a number"),
        (lambda: pruning.threshold(0.1, end=2), "pruning.threshold: end must be a number"),
    ],
)
def test_schedules_refuse(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# ---- what is left -------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    widths: tuple
    bias: bool = True
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x):
        for n, width in enumerate(self.widths):
            x = nn.Dense(width, use_bias=self.bias, bias_init=nn.initializers.normal(1.0))(x)
            if n < len(self.widths) - 1:
                x = getattr(jnp, self.activation, None)(x) if self.activation == "tanh" else nn.relu(x)
        return x


class ConvNet(nn.Module):
    filters: tuple
    widths: tuple

    @nn.compact
    def __call__(self, x):
        for filters in self.filters:
            x = nn.relu(nn.Conv(filters, (3, 3), bias_init=nn.initializers.normal(1.0))(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(*x.shape[:-3], -1)
        for n, width in enumerate(self.widths):
            x = nn.Dense(width, bias_init=nn.initializers.normal(1.0))(x)
            x = nn.relu(x) if n < len(self.widths) - 1 else x
        return x


def random_mask(rng, params, units):
    """Prune whole rows and columns of every kernel."""
    mask = {}
    for name, layer in params.items():
        shape = layer["kernel"].shape
        keep_in, keep_out = (rng.random(n) > units for n in shape[-2:])
        keep_out |= name == list(params)[-1]
        mask[name] = {"kernel": np.broadcast_to(keep_in[:, None] & keep_out, shape)}
    return mask


@pytest.mark.parametrize(("bias", "activation"), [(True, "tanh"), (False, "tanh"), (True, "relu")])
@pytest.mark.parametrize("seed", range(3))
def test_compressed_dense_networks_have_the_same_output(bias, activation, seed):
    net, x = MLP((9, 8, 3), bias, activation), random.normal(random.key(1), (20, 6))
    params = net.init(random.key(seed), x)["params"]
    mask = random_mask(np.random.default_rng(seed), params, 0.4)
    small = pruning.compress(
        params, mask, ("Dense_0", "Dense_1", "Dense_2"), {"tanh": jnp.tanh, "relu": jax.nn.relu}[activation]
    )
    widths = tuple(layer["kernel"].shape[-1] for layer in small.values())
    assert widths[0] < 9
    assert widths[1] < 8
    assert widths[2] == 3
    expected = net.apply({"params": pruning.prune(params, mask)}, x)
    np.testing.assert_allclose(MLP(widths, bias, activation).apply({"params": small}, x), expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_compressed_conv_networks_have_the_same_output(seed):
    net, x = ConvNet((6, 5), (7, 3)), random.normal(random.key(1), (4, 8, 8, 2))
    params = net.init(random.key(seed), x)["params"]
    layers = ("Conv_0", "Conv_1", "Dense_0", "Dense_1")
    mask = random_mask(np.random.default_rng(seed), {k: params[k] for k in layers}, 0.3)
    # after Flatten a channel is read at each of 2 x 2 places
    rng = np.random.default_rng(seed)
    places = np.broadcast_to((rng.random(5) > 0.4)[None, :, None], (4, 5, 7)).reshape(20, 7)
    mask["Dense_0"]["kernel"] = mask["Dense_0"]["kernel"][:1] & places
    small = pruning.compress(params, mask, layers)
    sizes = [small[k]["kernel"].shape[-1] for k in layers]
    assert sizes[1] < 5
    assert sum(sizes) < 6 + 5 + 7 + 3
    expected = net.apply({"params": pruning.prune(params, mask)}, x)
    found = ConvNet(tuple(sizes[:2]), tuple(sizes[2:])).apply({"params": small}, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_layer_that_is_all_gone_keeps_one_unit():
    net, x = MLP((4, 2)), jnp.ones((3, 5))
    params = net.init(random.key(0), x)["params"]
    mask = {"Dense_0": {"kernel": np.zeros((5, 4), bool)}}
    small = pruning.compress(params, mask, ("Dense_0", "Dense_1"), jnp.tanh)
    assert small["Dense_0"]["kernel"].shape == (5, 1)
    np.testing.assert_allclose(
        MLP((1, 2)).apply({"params": small}, x), net.apply({"params": pruning.prune(params, mask)}, x), atol=1e-5
    )


@pytest.mark.parametrize(
    ("change", "layers", "text"),
    [
        ({}, ("Dense_0", "Dense_7"), "layer 'Dense_7' is not among the parameters"),
        ({}, ("Dense_0",), "layers must name every layer in order; 'Dense_1' is missing"),
        ({}, ("Dense_1", "Dense_0"), "'Dense_0' has 3 inputs, which do not fit the 2 units of 'Dense_1'"),
        ({"LayerNorm_0": {"scale": np.ones(4)}}, ("Dense_0", "Dense_1"), "'LayerNorm_0' holds scale"),
    ],
)
def test_what_can_not_be_compressed(change, layers, text):
    params = {"Dense_0": {"kernel": np.ones((3, 4))}, "Dense_1": {"kernel": np.ones((4, 2))}} | change
    with pytest.raises(ValueError, match=text):
        pruning.compress(params, {}, layers)


def test_prune_nested_parameters():
    params = {"net": {"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}}
    pruned = pruning.prune(params, {"net": {"Dense_0": {"kernel": np.eye(2) > 0}}})
    np.testing.assert_array_equal(pruned["net"]["Dense_0"]["kernel"], np.eye(2))
    np.testing.assert_array_equal(pruned["net"]["Dense_0"]["bias"], 1)
    with pytest.raises(ValueError, match="the mask names 'Dense_9', which is not among the parameters"):
        pruning.prune(params, {"net": {"Dense_9": True}})


def test_a_mask_must_fit():
    with pytest.raises(ValueError, match=r"mask of shape \(2, 3\) does not fit \(3,\).* take those of one chain"):
        pruning.prune({"w": np.ones(3)}, {"w": np.ones((2, 3), bool)})
    with pytest.raises(ValueError, match="does not fit the parameters \\['kernel'\\]"):
        pruning.prune({"a": {"kernel": np.ones(3)}}, {"a": np.ones(3, bool)})
    with pytest.raises(ValueError, match="the mask names kernel, where the parameters have an array"):
        pruning.prune({"a": np.ones(3)}, {"a": {"kernel": np.ones(3, bool)}})


def test_from_a_run_to_a_smaller_network():
    """The draw of a pruned chain, its mask, its Flax parameters, and the network that they leave."""
    kernel = bdl.SpikeSlabSGHMC(
        NETWORKS["linen"],
        step_size=1e-3,
        groups={"net/Dense_0.kernel": "neuron_out"},
        momentum=0.5,
        spike_variance=0.02,
        target_sparsity=0.5,
    )
    mcmc = MCMC(kernel, num_warmup=100, num_samples=3, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(random.key(0), X, LABELS, batch_size=20)
    masks = pruning.masks(mcmc)
    assert {name: mask.shape for name, mask in masks.items()} == {"net/Dense_0.kernel": (2, 3, 4)}
    draws = mcmc.get_samples(group_by_chain=True)
    chain = 1
    params = pruning.flax_parameters(mcmc, {name: value[chain, -1] for name, value in draws.items()})["net"]
    mask = pruning.flax_parameters(mcmc, {name: value[chain] for name, value in masks.items()})["net"]
    small = pruning.compress(params, mask, ("Dense_0", "Dense_1"), jnp.tanh)
    assert small["Dense_0"]["kernel"].shape == (3, 2)
    functions = bdl.PosteriorPredictive(mcmc).functions(X)["y"][chain, -1]
    np.testing.assert_allclose(MLP((2, 2)).apply({"params": small}, X), functions, atol=1e-5)


def test_masks_of_a_single_chain_have_a_chain_axis():
    kernel = bdl.SpikeSlabSGHMC(NETWORKS["linen"], step_size=1e-3, spike_variance=0.02, target_sparsity=0.5)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=1, progress_bar=False)
    mcmc.run(random.key(0), X, LABELS)
    assert pruning.masks(mcmc)["net/Dense_0.kernel"].shape == (1, 3, 4)
