# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Energies and gradients of models: against closed forms, and against NumPyro's own potential on the full data."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from jax import random
from models import LABELS, NETWORKS, X
from numpyro import handlers
from numpyro.contrib.module import random_flax_module, random_nnx_module
from numpyro.infer import init_to_value
from numpyro.infer.util import potential_energy

from numpyro_bdl.minibatch import epoch
from numpyro_bdl.potential import Potential

KEY = random.key(0)


def gradient(potential, z, rows, args=None, kwargs=None):
    args, kwargs = args or potential.args, potential.kwargs if kwargs is None else kwargs
    _, g, _ = jax.jit(lambda z, rows: potential.gradient(z, rows, KEY, {}, args, kwargs))(z, rows)
    return g


def everything(potential, z):
    return potential.energies(z, {}, KEY, {}, potential.args, potential.kwargs)[0]


# ---- one subsampled plate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["linen", "nnx"])
@pytest.mark.parametrize("batch", [20, 14, 60])
def test_mean_over_epochs_is_the_full_gradient(network, batch):
    """Over lcm(N, B) / B steps every row is seen equally often; the mean of the gradients is exact to rounding."""
    potential = Potential(NETWORKS[network], (X, LABELS), {"batch_size": batch})
    z, _ = potential.initial(KEY)
    steps = math.lcm(60, batch) // batch
    total = jax.tree.map(jnp.zeros_like, z)
    for i in range(steps):
        rows = {"data": epoch(random.key(5), i, 60, batch)}
        total = jax.tree.map(lambda t, g: t + g / steps, total, gradient(potential, z, rows))
    full = jax.grad(lambda z: potential_energy(handlers.seed(NETWORKS[network], KEY), (X, LABELS), {}, z))(z)
    for name in z:
        np.testing.assert_allclose(total[name], full[name], rtol=2e-5, atol=2e-5)


def test_independent_rows_are_unbiased():
    """Over all N^2 equally likely pairs of rows, drawn with replacement."""

    def model(y, batch_size=None):
        w = numpyro.sample("w", dist.Normal(0, 1))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            numpyro.sample("y", dist.Normal(jnp.sin(w), 0.5), obs=numpyro.subsample(y, event_dim=0))

    y = jnp.array([0.3, -1.0, 2.0])
    potential = Potential(model, (y,), {"batch_size": 2})
    z = {"w": jnp.array(0.4)}
    pairs = [gradient(potential, z, {"data": jnp.array(p)})["w"] for p in itertools.product(range(3), repeat=2)]
    assert np.ptp(pairs) > 1  # each sees its own rows
    np.testing.assert_allclose(np.mean(pairs), gradient(potential, z, {})["w"], rtol=1e-5)


def test_all_rows_of_a_subsampled_plate_are_the_full_energy():
    subsampled = Potential(NETWORKS["linen"], (X, LABELS), {"batch_size": 7})
    full = Potential(NETWORKS["linen"], (X, LABELS))
    z, _ = full.initial(KEY)
    np.testing.assert_allclose(everything(subsampled, z), everything(full, z), rtol=1e-5)
    assert subsampled.subsampled["data"] == (60, 7)
    assert full.subsampled == {}


# ---- several plates, scale, factors, the split ----------------------------------------------------------------------


def two_plates(y, x, y_batch=None, x_batch=None):
    w = numpyro.sample("w", dist.Normal(0, 2))
    with numpyro.plate("ys", len(y), subsample_size=y_batch):
        numpyro.sample("y", dist.Normal(w, 1), obs=numpyro.subsample(y, event_dim=0))
    with numpyro.plate("xs", len(x), subsample_size=x_batch):
        numpyro.sample("x", dist.Normal(w**2, 1), obs=numpyro.subsample(x, event_dim=0))


def nested_plates(y, outer=None, inner=None):
    w = numpyro.sample("w", dist.Normal(0, 2))
    columns = numpyro.plate("columns", y.shape[1], subsample_size=outer, dim=-1)
    rows = numpyro.plate("rows", y.shape[0], subsample_size=inner, dim=-2)
    with columns, rows:
        numpyro.sample("y", dist.Normal(w, 1), obs=numpyro.subsample(y, event_dim=0))


def test_two_plates_are_unbiased_together():
    y, x, z = jnp.arange(4.0), jnp.array([1.0, -2.0, 0.5]), {"w": jnp.array(0.7)}
    potential = Potential(two_plates, (y, x), {"y_batch": 2, "x_batch": 1})
    batches = itertools.product(itertools.combinations(range(4), 2), [(0,), (1,), (2,)])
    mean = np.mean([gradient(potential, z, {"ys": jnp.array(a), "xs": jnp.array(b)})["w"] for a, b in batches])
    w = 0.7
    expected = w / 4 + np.sum(w - np.arange(4.0)) + np.sum((w**2 - np.array([1.0, -2.0, 0.5])) * 2 * w)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


def test_nested_plates_are_unbiased_together():
    y, z = jnp.arange(12.0).reshape(4, 3), {"w": jnp.array(0.7)}
    potential = Potential(nested_plates, (y,), {"outer": 2, "inner": 2})
    assert potential.subsampled == {"columns": (3, 2), "rows": (4, 2)}
    batches = itertools.product(itertools.combinations(range(3), 2), itertools.combinations(range(4), 2))
    mean = np.mean([gradient(potential, z, {"columns": jnp.array(a), "rows": jnp.array(b)})["w"] for a, b in batches])
    np.testing.assert_allclose(mean, 0.7 / 4 + np.sum(0.7 - np.arange(12.0)), rtol=1e-5)


def test_scale_factor_and_jacobian_fall_on_their_sides():
    def model(y):
        with handlers.scale(scale=0.5):
            s = numpyro.sample("s", dist.HalfNormal(1.0))
        numpyro.factor("penalty", -3.0 * s)
        with handlers.scale(scale=0.1), numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(0, s), obs=y)

    y, z = jnp.array([0.5, -1.0]), {"s": jnp.array(0.3)}
    s = np.exp(0.3)
    potential = Potential(model, (y,))
    prior, likelihood = everything(potential, z)
    # the density is scaled, its Jacobian is not: a change of variables happens once
    np.testing.assert_allclose(prior, -(0.5 * dist.HalfNormal(1.0).log_prob(s) + 0.3), rtol=1e-6)
    np.testing.assert_allclose(likelihood, 3 * s - 0.1 * dist.Normal(0, s).log_prob(y).sum(), rtol=1e-6)


def test_the_law_of_a_scaled_constrained_site():
    """Half the log density of a half-normal is that of one with twice its variance, in any coordinates."""

    def model():
        with handlers.scale(scale=0.5):
            numpyro.sample("s", dist.HalfNormal(1.0))

    z = jnp.linspace(-8, 3, 4001)
    potential = Potential(model)
    energy = jax.vmap(lambda z: sum(potential.energies({"s": z}, {}, KEY, {}, (), {})[0]))(z)
    weights = np.exp(-energy) / np.sum(np.exp(-energy))
    np.testing.assert_allclose(np.sum(weights * np.exp(2 * z)), 2.0, rtol=1e-3)


def constrained(y):
    low = numpyro.sample("low", dist.Normal(0, 1))
    numpyro.sample("above", dist.Uniform(low, low + 2))
    numpyro.sample("simplex", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("correlation", dist.LKJCholesky(3, 2.0))
    with numpyro.plate("groups", 4):
        numpyro.sample("positive", dist.LogNormal(0, 1))
    numpyro.sample("y", dist.Normal(low, 1), obs=y)
    numpyro.deterministic("twice", 2 * low)


def test_the_energy_is_numpyros_on_the_full_data():
    potential = Potential(constrained, (1.0,))
    z, _ = potential.initial(KEY)
    prior, likelihood = everything(potential, z)
    np.testing.assert_allclose(prior + likelihood, potential_energy(constrained, (1.0,), {}, z), rtol=1e-5)
    np.testing.assert_allclose(likelihood, -dist.Normal(z["low"], 1).log_prob(1.0), rtol=1e-5)


def test_constrain_follows_dynamic_supports_and_deterministic_sites():
    potential = Potential(constrained, (1.0,))
    z, _ = potential.initial(KEY)
    values = potential.constrain(z, (1.0,), {})
    assert values["low"] < values["above"] < values["low"] + 2
    np.testing.assert_allclose(values["simplex"].sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(values["twice"], 2 * values["low"])


def test_deterministic_sites_of_a_minibatch_are_left_out():
    def model(x, batch_size=None):
        w = numpyro.sample("w", dist.Normal(0, 1))
        numpyro.deterministic("outside", w + 1)
        with numpyro.plate("data", len(x), subsample_size=batch_size):
            f = numpyro.deterministic("inside", w * numpyro.subsample(x, event_dim=0))
            numpyro.sample("y", dist.Normal(f, 1), obs=0.0)

    x, z = jnp.arange(6.0), {"w": jnp.array(0.5)}
    for batch, sites in ((2, {"w", "outside"}), (None, {"w", "outside", "inside"})):
        kwargs = {"batch_size": batch}
        assert set(Potential(model, (x,), kwargs).constrain(z, (x,), kwargs)) == sites


# ---- starting points ------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(400)(x))
        return nn.Dense(1, bias_init=nn.initializers.constant(3.0))(x)


def test_chains_start_from_independent_draws_of_the_initializers():
    def model(x):
        net = random_flax_module("net", Wide(), dist.Normal(0, 1), input_shape=(100,))
        numpyro.sample("y", dist.Normal(net(x), 1).to_event(2), obs=jnp.zeros((5, 1)))

    potential = Potential(model, (jnp.ones((5, 100)),))
    one, other = (potential.initial(random.key(k))[0]["net/Dense_0.kernel"] for k in (0, 1))
    # lecun normal: variance 1 / 100, truncated and rescaled
    assert abs(np.std(one) - 0.1) < 4 * 0.1 / np.sqrt(2 * one.size)
    assert abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 4 / np.sqrt(one.size)
    np.testing.assert_array_equal(potential.initial(KEY)[0]["net/Dense_1.bias"], 3.0)


def test_chains_over_an_nnx_module_start_alike_but_not_from_the_same_point():
    module = nnx.Linear(100, 400, rngs=nnx.Rngs(0), bias_init=nnx.initializers.constant(3.0))

    def model(x):
        net = random_nnx_module("net", module, dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(net(x), 1).to_event(2), obs=jnp.zeros((5, 400)))

    potential = Potential(model, (jnp.ones((5, 100)),))
    one, other = (potential.initial(random.key(k))[0]["net/kernel"] for k in (0, 1))
    assert abs(np.std(one) - np.std(module.kernel[...])) < 4 * 0.1 * np.sqrt(2 / (2 * one.size))
    assert abs(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]) < 4 / np.sqrt(one.size)
    np.testing.assert_array_equal(potential.initial(KEY)[0]["net/bias"], 3.0)


def test_an_init_strategy_of_numpyro_takes_over():
    strategy = init_to_value(values={"net/Dense_0.bias": jnp.full(4, 2.0)})
    potential = Potential(NETWORKS["linen"], (X, LABELS), init_strategy=strategy)
    z, _ = potential.initial(KEY)
    np.testing.assert_array_equal(z["net/Dense_0.bias"], 2.0)
    assert np.abs(z["net/Dense_0.kernel"]).max() <= 2  # the rest by init_to_uniform


# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_network_sites_are_known_with_their_place(network):
    potential = Potential(NETWORKS[network], (X, LABELS), {"batch_size": 20})
    assert set(potential.network) == set(potential.latent)
    param_site, path = potential.network["net/layers.0.kernel" if network == "nnx" else potential.latent[0]]
    assert param_site == "net$params"
    if network == "nnx":
        assert path == ("layers", 0, "kernel")


def test_scopes_and_two_networks():
    def model(x):
        with handlers.scope(prefix="outer"):
            one = random_flax_module("net", nn.Dense(2), dist.Normal(0, 1), input_shape=(3,))
        two = random_flax_module("net", nn.Dense(2), dist.Normal(0, 1), input_shape=(3,))
        numpyro.sample("y", dist.Normal(one(x) + two(x), 1).to_event(2), obs=jnp.zeros((60, 2)))

    potential = Potential(model, (X,))
    assert potential.network["outer/net/kernel"] == ("outer/net$params", ("kernel",))
    assert potential.network["net/kernel"] == ("net$params", ("kernel",))


def partly_frozen(x, y):
    prior = {"Dense_1.kernel": dist.Normal(0, 1), "Dense_1.bias": dist.Normal(0, 1)}
    net = random_flax_module("net", Wide(), prior, input_shape=(3,))
    offset = numpyro.param("offset", 0.5)
    numpyro.sample("y", dist.Normal(net(x)[:, 0] + offset, 1).to_event(1), obs=y)


def test_frozen_parameters_keep_one_value_for_all_chains():
    frozen = ("net/Dense_0.*", "offset")
    potential = Potential(partly_frozen, (X, jnp.zeros(60)), frozen=frozen)
    assert set(potential.frozen) == {"net/Dense_0.kernel", "net/Dense_0.bias", "offset"}
    assert set(potential.latent) == {"net/Dense_1.kernel", "net/Dense_1.bias"}
    z, _ = potential.initial(KEY)
    hidden = np.maximum(X @ potential.frozen["net/Dense_0.kernel"] + potential.frozen["net/Dense_0.bias"], 0)
    f = hidden @ z["net/Dense_1.kernel"][:, 0] + z["net/Dense_1.bias"] + 0.5
    _, likelihood = everything(potential, z)
    np.testing.assert_allclose(likelihood, np.sum(f**2) / 2 + 60 * 0.5 * np.log(2 * np.pi), rtol=1e-4)
    again = Potential(partly_frozen, (X, jnp.zeros(60)), frozen=frozen)
    np.testing.assert_array_equal(again.frozen["net/Dense_0.kernel"], potential.frozen["net/Dense_0.kernel"])


@pytest.mark.parametrize("network", ["linen with BatchNorm and dropout", "nnx with BatchNorm and dropout"])
def test_mutable_collections_are_carried_and_dropout_is_fresh(network):
    potential = Potential(NETWORKS[network], (X, LABELS))
    z, mutable = potential.initial(KEY)
    energies, after = zip(
        *(potential.energies(z, {}, random.key(k), mutable, (X, LABELS), {}) for k in (1, 1, 2)), strict=True
    )
    assert energies[0] == energies[1]
    assert energies[0] != energies[2]
    assert jax.tree.structure(after[0]) == jax.tree.structure(mutable)
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(mutable), jax.tree.leaves(after[0]), strict=True)]
    assert all(moved)
    _, twice = potential.energies(z, {}, random.key(1), after[0], (X, LABELS), {})
    assert not np.array_equal(jax.tree.leaves(twice)[0], jax.tree.leaves(after[0])[0])


def test_the_structure_is_found_without_flops(compilations):
    Potential(NETWORKS["linen"], (X, LABELS), {"batch_size": 20})
    del compilations[:]
    Potential(NETWORKS["linen"], (X, LABELS), {"batch_size": 20})
    assert compilations == []


# ---- what a review found --------------------------------------------------------------------------------------------


def test_the_jacobian_is_known_inside_a_scope():
    def model():
        numpyro.sample("s", dist.LogNormal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(0, 1), obs=2.0)

    bare = everything(Potential(model), {"s": jnp.array(0.7)})
    scoped = Potential(handlers.scale(handlers.scope(model, prefix="a"), scale=3.0))
    prior, likelihood = everything(scoped, {"a/s": jnp.array(0.7)})
    np.testing.assert_allclose(likelihood, 3 * bare.likelihood, rtol=1e-6)
    density = -dist.LogNormal(0.0, 1.0).log_prob(np.exp(0.7))
    np.testing.assert_allclose(prior, 3 * density - 0.7, rtol=1e-6)


def test_rows_that_were_not_taken_are_refused():
    def model(y, batch_size=None):
        w = numpyro.sample("w", dist.Normal(0, 1))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            numpyro.sample("y", dist.Normal(w * jnp.ones(len(y)), 1), obs=y)

    with pytest.raises(ValueError, match="'y' has 40 rows in plate 'data', which shows 1"):
        Potential(model, (jnp.ones(40),), {"batch_size": 1})


def test_weights_given_by_substitute_can_be_frozen():
    x = X[:5]
    module = Wide()
    trained = module.init(random.key(3), x)["params"]

    def model(x):
        prior = {"Dense_1.kernel": dist.Normal(0, 1), "Dense_1.bias": dist.Normal(0, 1)}
        net = random_flax_module("net", module, prior, input_shape=(3,))
        numpyro.sample("y", dist.Normal(net(x), 1).to_event(2), obs=jnp.zeros((5, 1)))

    given = handlers.substitute(model, data={"net$params": jax.tree.map(lambda w: w, trained)})
    potential = Potential(given, (x,), frozen="net/Dense_0.*")
    np.testing.assert_array_equal(potential.frozen["net/Dense_0.kernel"], trained["Dense_0"]["kernel"])
    assert np.isfinite(potential.initial(KEY)[0]["net/Dense_1.kernel"]).all()


def test_deterministic_sites_beside_mutable_collections_are_named():
    def model(x, y):
        numpyro.deterministic("twice", 2.0)
        NETWORKS["linen with BatchNorm and dropout"](x, y)

    with pytest.warns(UserWarning, match="deterministic sites twice are not collected"):
        Potential(model, (X, LABELS))
