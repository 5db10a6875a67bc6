# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Small networks, and the groups of units that they must be found to have."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


def equal(one, other):
    """Whether two trees are the same bit for bit, in every leaf."""
    return all(bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


class MLP(nn.Module):
    widths: tuple[int, ...] = (5, 4)
    activation: Callable = jnp.tanh
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = self.activation(nn.Dense(width, use_bias=self.use_bias)(x))
        return nn.Dense(2)(x)


class Layers(nn.Module):
    """Functions and layers one after another, named by flax."""

    layers: tuple[Callable, ...]

    @nn.compact
    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=6)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.gelu(nn.Dense(7)(x.reshape(x.shape[0], -1)))
        return nn.Dense(2)(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        for _ in range(2):
            x = x + nn.Dense(6)(jnp.tanh(nn.Dense(5)(nn.RMSNorm()(x))))
        return nn.Dense(2)(x)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        x = x + nn.MultiHeadDotProductAttention(3, qkv_features=12)(nn.LayerNorm()(x))
        return nn.Dense(2)(x.mean(1))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.SimpleCell(5))(x)[:, -1])


class Shared(nn.Module):
    """One layer, used twice."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(4)
        x = jnp.tanh(shared(nn.Dense(4)(x)))
        return nn.Dense(2)(jnp.tanh(shared(x)))


class BatchNormed(nn.Module):
    """Two kinds of signs that both flip the bias of BatchNorm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False)(x)
        x = jnp.tanh(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(2)(x)


class GroupNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.GroupNorm(num_groups=2)(nn.Dense(6)(x))))


class Case(NamedTuple):
    network: nn.Module
    shape: tuple[int, ...]
    groups: dict[str, tuple[int, int]]
    """by name: units, and kinds of sign symmetry"""
    unique: bool = True
    """whether all symmetries can be removed"""


HEADS = "MultiHeadDotProductAttention_0"
CASES = {
    "tanh": Case(MLP(), (3, 2), {"Dense_0": (5, 1), "Dense_1": (4, 1)}),
    "relu": Case(MLP(activation=nn.relu), (3, 2), {"Dense_0": (5, 0), "Dense_1": (4, 0)}),
    "no bias": Case(MLP(use_bias=False), (3, 2), {"Dense_0": (5, 1), "Dense_1": (4, 1)}),
    "width 1": Case(MLP((1, 1)), (3, 2), {"Dense_0": (1, 1), "Dense_1": (1, 1)}),
    # the signs before BatchNorm, and those after it: tanh is odd, and so is the average
    "conv": Case(ConvNet(), (3, 8, 8, 3), {"Conv_0": (6, 2), "Dense_0": (7, 0)}),
    # of the stream, and between each scale of RMSNorm and the layer that reads it
    "residual": Case(Residual(), (3, 2), {"Dense_0": (6, 3), "Dense_2": (5, 1), "Dense_4": (5, 1)}),
    "attention": Case(
        Transformer(),
        (3, 4, 2),
        {"Dense_0": (6, 1), f"{HEADS}.query[1]": (3, 2), f"{HEADS}.query[2]": (4, 1), f"{HEADS}.value": (4, 1)},
        unique=False,
    ),
    "recurrent": Case(Recurrent(), (3, 4, 2), {"SimpleCell_0.i": (5, 1)}),
    "shared": Case(Shared(), (3, 2), {"Dense_1": (4, 1)}),
    "batch norm": Case(BatchNormed(), (3, 2), {"Dense_0": (4, 2)}),
    # whole groups are exchanged and flipped; within a group units are exchanged
    "group norm": Case(GroupNormed(), (3, 2), {"Dense_1[1][0]": (2, 1), "Dense_1[1][1]": (3, 0)}, unique=False),
}
