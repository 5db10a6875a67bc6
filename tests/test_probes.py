# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from models import LABELS, NETWORKS, X
from numpyro.contrib.module import random_flax_module

from numpyro_bdl.potential import Potential
from numpyro_bdl.probes import _few_rows, _start, normal_scales, output_sites, sites_without_scale


class Net(nn.Module):
    kind: str = "deep"

    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(8, name="first")(x))
        if self.kind == "residual":
            h = h + nn.Dense(8, name="inner")(nn.tanh(nn.Dense(8, name="middle")(h)))
        if self.kind == "skip":
            return nn.Dense(2, name="out")(h) + nn.Dense(2, name="skip")(x)
        if self.kind == "norm":
            h = nn.relu(nn.LayerNorm()(nn.Dense(8, name="middle")(h)))
        if self.kind == "zero":  # an output layer that starts at zero
            return nn.Dense(2, name="out", kernel_init=nn.initializers.zeros)(h)
        return nn.Dense(2, name="out")(h)


def potential(kind, batch_size=None):
    def model(x, y, batch_size=None):
        net = random_flax_module("net", Net(kind), dist.Normal(0, 1), input_shape=(3,))
        with numpyro.plate("data", len(x), subsample_size=batch_size):
            rows = numpyro.subsample(x, event_dim=1)
            numpyro.sample("y", dist.Categorical(logits=net(rows)), obs=numpyro.subsample(y, event_dim=0))

    return Potential(model, (X, LABELS), {"batch_size": batch_size})


def kernels(sites):
    return {name.removeprefix("net/").removesuffix(".kernel") for name in sites if name.endswith("kernel")}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("deep", {"out"}),
        ("zero", {"out"}),
        ("skip", {"out", "skip"}),
        ("residual", {"out", "inner"}),
        ("norm", {"out"}),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 10])
def test_the_output_layer_is_where_the_function_is_affine(kind, expected, batch_size):
    assert kernels(output_sites(potential(kind, batch_size))) == expected


def whole_arrays(x, y):
    net = random_flax_module("net", Net(), dist.Normal(0, 1), input_shape=(3,))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Categorical(logits=net(x)), obs=y)


def local_sites(x, y):
    net = random_flax_module("net", Net(), dist.Normal(0, 1), input_shape=(3,))
    with numpyro.plate("data", len(x)):
        numpyro.sample("local", dist.Normal(0, 1))
        numpyro.sample("y", dist.Categorical(logits=net(numpyro.subsample(x, 1))), obs=numpyro.subsample(y, 0))


def another_plate(x, y):
    with numpyro.plate("latent", 300):
        numpyro.sample("shift", dist.Normal(0, 1))
    NETWORKS["linen"](x, y)


@pytest.mark.parametrize(
    ("model", "is_cut", "without_scale"),
    [
        (NETWORKS["linen with BatchNorm and dropout"], True, {"Dense_0"}),
        (another_plate, True, set()),
        (whole_arrays, False, set()),
        (local_sites, False, set()),
    ],
)
def test_few_rows_are_evaluated_where_the_model_can_be_cut(model, is_cut, without_scale):
    p = Potential(model, (np.tile(X, (10, 1)), np.tile(LABELS, 10)))
    rows = _few_rows(p, *_start(p))
    assert {name: len(index) for name, index in rows.items()} == ({"data": 256} if is_cut else {})
    if is_cut:
        assert (rows["data"][0], rows["data"][-1]) == (0, 599)
    assert len(kernels(output_sites(p))) == 1
    assert kernels(sites_without_scale(p, tuple(p.network))) == without_scale


def two_networks(x, y):
    mean, spread = (random_flax_module(n, Net(), dist.Normal(0, 1), input_shape=(3,)) for n in ("mean", "spread"))
    numpyro.sample("y", dist.Normal(mean(x)[:, 0], jnp.exp(spread(x)[:, 1])), obs=y)


def probabilities(x, y):
    net = random_flax_module("net", Net(), dist.Normal(0, 1), input_shape=(3,))
    numpyro.sample("y", dist.Categorical(probs=jax.nn.softmax(net(x))), obs=y)


def gamma(x, y):
    net = random_flax_module("net", Net(), dist.Normal(0, 1), input_shape=(3,))
    numpyro.sample("y", dist.Gamma(jnp.exp(net(x)[:, 0])), obs=y)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (two_networks, "does not depend on 'spread/"),
        (probabilities, "affine in no parameter of 'net"),
        (gamma, "no natural parameter is known"),
    ],
)
def test_where_the_output_layer_can_not_be_told(model, text):
    y = LABELS if model is probabilities else X[:, 0] ** 2 + 0.1
    with pytest.raises(ValueError, match=text):
        output_sites(Potential(model, (X, y)))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_output_layer_of_the_usual_networks(network):
    found = output_sites(Potential(NETWORKS[network], (X, LABELS), {"batch_size": 20}))
    names = {name for name in found if "kernel" in name}
    assert names in ({"net/Dense_1.kernel"}, {"net/layers.0.kernel"}, {"net/out.kernel"})


@pytest.mark.parametrize("network", NETWORKS)
def test_layers_without_a_scale_are_those_before_batch_norm(network):
    p = Potential(NETWORKS[network], (X, LABELS), {"batch_size": 20})
    names = tuple(name for name in p.network if "kernel" in name)
    first = {names[0]} if "BatchNorm" in network else set()
    assert sites_without_scale(p, names) == first


@pytest.mark.parametrize(("kind", "expected"), [("norm", {"middle"}), ("deep", set()), ("zero", set())])
def test_layer_norm_takes_the_scale_too(kind, expected):
    p = potential(kind)
    assert kernels(sites_without_scale(p, tuple(p.network))) == expected


def test_scales_of_priors():
    def model(y):
        numpyro.sample("plain", dist.Normal(0, 2))
        numpyro.sample("wide", dist.Normal(0, 0.5 * jnp.ones(3)).expand([2, 3]).to_event(2))
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        w = numpyro.sample("latent", dist.Normal(0, scale))
        numpyro.sample("shifted", dist.Normal(1e-3, 1))
        numpyro.sample("uneven", dist.Normal(0, jnp.array([1.0, 2.0])).to_event(1))
        with numpyro.handlers.scale(scale=2.0):
            numpyro.sample("scaled", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(w, 1), obs=y)

    scales = normal_scales(Potential(model, (jnp.zeros(()),)))
    assert list(scales) == ["plain", "wide", "scale", "latent", "shifted", "uneven", "scaled"]
    assert (scales["plain"], scales["wide"]) == (2.0, 0.5)
    assert "HalfNormal" in scales["scale"]
    assert "other latent sites" in scales["latent"]
    assert "location other than 0" in scales["shifted"]
    assert "differs between its entries" in scales["uneven"]
    assert "handlers.scale" in scales["scaled"]


def test_scales_of_priors_are_read_without_drawing_first_weights(compilations):
    assert normal_scales(potential("deep"))["net/out.kernel"] == 1
    assert not [name for name in compilations if "initial" in name]


def test_probes_give_numbers_inside_a_traced_program():
    p = potential("deep")
    seen = []

    @jax.jit
    def traced(x):
        seen.append((output_sites(p), normal_scales(p)["net/out.kernel"]))
        return x

    traced(1.0)
    assert kernels(seen[0][0]) == {"out"}
    np.testing.assert_equal(seen[0][1], 1.0)
