# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Small networks in NumPyro models, as users write them."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from numpyro.contrib.module import random_flax_module, random_nnx_module

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 3)).astype(np.float32)
LABELS = (X[:, 0] + 0.3 * RNG.normal(size=60) > 0).astype(np.int32)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(2)(x)


class LinenBatchNorm(nn.Module):
    """BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.tanh(x))
        return nn.Dense(2)(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x):
        return self.layers[0](nnx.tanh(self.hidden(x)))


class NnxBatchNorm(nnx.Module):
    """BatchNorm and dropout."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.tanh(self.norm(self.hidden(x)))))


def classifier(make_net):
    """A model of class labels over a network that ``make_net`` declares."""

    def model(x, y=None, *, batch_size=None, train=True):
        net = make_net(train)
        with numpyro.plate("data", x.shape[0], subsample_size=batch_size):
            rows = numpyro.subsample(x, event_dim=1)
            labels = None if y is None else numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", dist.Categorical(logits=net(rows)), obs=labels)

    return model


def _linen(train):
    return random_flax_module("net", LinenMLP(), dist.Normal(0, 1), input_shape=(3,))


def _linen_batch_norm(train):
    net = random_flax_module(
        "net", LinenBatchNorm(), dist.Normal(0, 1), jnp.ones((1, 3)), mutable=["batch_stats"], apply_rng=["dropout"]
    )
    return lambda x: net(x, train=train, rngs={"dropout": numpyro.prng_key()})


_NNX, _NNX_BATCH_NORM = NnxMLP(nnx.Rngs(0)), NnxBatchNorm(nnx.Rngs(0))

NETWORKS = {
    "linen": classifier(_linen),
    "nnx": classifier(lambda train: random_nnx_module("net", _NNX, dist.Normal(0, 1))),
    "linen with BatchNorm and dropout": classifier(_linen_batch_norm),
    "nnx with BatchNorm and dropout": classifier(
        lambda train: random_nnx_module("net", _NNX_BATCH_NORM, dist.Normal(0, 1))
    ),
}
