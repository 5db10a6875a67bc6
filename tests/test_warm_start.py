# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Ensembles of MAP estimates: against closed forms, and as the places where chains start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from models import LABELS, NETWORKS, X
from numpyro.infer import MCMC, NUTS

import numpyro_bdl as bdl
from numpyro_bdl import train_map
from numpyro_bdl.minibatch import STREAMS
from numpyro_bdl.potential import Potential

RNG = np.random.default_rng(1)
ROWS, FEATURES, NOISE, PRIOR = 40, 3, 0.5, 2.0
A = RNG.normal(size=(ROWS, FEATURES)).astype(np.float32)
Y = (A @ [1.0, -2.0, 0.5] + NOISE * RNG.normal(size=ROWS)).astype(np.float32)
PRECISION = A.T @ A / NOISE**2 + np.eye(FEATURES) / PRIOR**2
MODE = np.linalg.solve(PRECISION, A.T @ Y / NOISE**2)


def linear(a, y, batch_size=None):
    w = numpyro.sample("w", dist.Normal(0, PRIOR).expand([FEATURES]).to_event(1))
    with numpyro.plate("data", len(y), subsample_size=batch_size):
        rows = numpyro.subsample(a, event_dim=1)
        numpyro.sample("y", dist.Normal(rows @ w, NOISE), obs=numpyro.subsample(y, event_dim=0))


def gamma(y):
    """Counts with a rate that is positive: in unconstrained space the mode is that of (rate, Jacobian included)."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 3.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def quiet(*args, **kwargs):
    return train_map(*args, progress_bar=False, **kwargs)


# ---- the optimum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minibatch", ["independent", "full"])
def test_the_optimum_of_a_linear_model_is_the_closed_form(minibatch):
    rate = 1 / np.linalg.eigvalsh(PRECISION).max()
    settings = {"num_steps": 200, "optimizer": optax.sgd(rate), "minibatch": minibatch}
    init, losses = quiet(linear, random.key(0), 3, A, Y, **settings)
    np.testing.assert_allclose(init["w"], np.tile(MODE, (3, 1)), rtol=1e-4)
    residual = Y - A @ MODE
    constants = ROWS * np.log(NOISE) + FEATURES * np.log(PRIOR) + (ROWS + FEATURES) / 2 * np.log(2 * np.pi)
    energy = (residual**2).sum() / (2 * NOISE**2) + (MODE**2).sum() / (2 * PRIOR**2) + constants
    assert losses.shape == (3, 200)
    np.testing.assert_allclose(losses[:, -1], energy, rtol=1e-5)


def test_the_mode_is_that_of_unconstrained_space():
    y = jnp.array([3.0, 1.0, 4.0])
    init, _ = quiet(gamma, random.key(0), 2, y, num_steps=2000, optimizer=optax.adam(0.05))
    # of log rate: the density of the rate times the rate
    np.testing.assert_allclose(np.exp(init["rate"]), (2 + y.sum()) / (3 + len(y)), rtol=1e-4)


def test_a_minibatch_step_is_unbiased_for_the_full_one():
    members, rate = 4000, 1e-3
    start = numpyro.infer.init_to_value(values={"w": jnp.array([0.3, 0.1, -0.2])})
    settings = {"num_steps": 1, "optimizer": optax.sgd(rate), "init_strategy": start}
    init, losses = quiet(linear, random.key(0), members, A, Y, batch_size=5, **settings)
    full, energy = quiet(linear, random.key(0), 1, A, Y, minibatch="full", batch_size=5, **settings)
    for found, exact in ((np.asarray(init["w"]), np.asarray(full["w"][0])), (losses, energy[0])):
        assert (found.std(0) > 0).all()
        assert (np.abs(found.mean(0) - exact) < 4 * found.std(0) / np.sqrt(members)).all()


def test_epochs_show_every_row_once():
    """With a step of size 0 the energies of an epoch add up: N / B times as many batches as it has, less the prior."""
    settings = {"num_steps": 8, "optimizer": optax.sgd(0.0), "minibatch": "epoch"}
    init, losses = quiet(linear, random.key(0), 3, A, Y, batch_size=5, **settings)
    _, full = quiet(linear, random.key(0), 3, A, Y, **settings | {"minibatch": "full", "num_steps": 1})
    np.testing.assert_allclose(losses.mean(1), full[:, 0], rtol=1e-5)
    assert (losses.std(1) > 1).all()
    # each member has a stream of its own
    start = Potential(linear, (A, Y), {"batch_size": 5})
    assert len({tuple(row) for row in np.asarray(init["w"]).round(6)}) == 3
    assert "epoch" in STREAMS
    assert start.subsampled


def test_members_start_apart_and_the_key_says_where():
    settings = {"num_steps": 3, "optimizer": optax.sgd(0.0)}
    one, _ = quiet(NETWORKS["linen"], random.key(0), 3, X, LABELS, **settings)
    again, _ = quiet(NETWORKS["linen"], random.key(0), 3, X, LABELS, **settings)
    other, _ = quiet(NETWORKS["linen"], random.key(1), 3, X, LABELS, **settings)
    kernel = "net/Dense_0.kernel"
    np.testing.assert_array_equal(one[kernel], again[kernel])
    everywhere = np.concatenate([one[kernel], other[kernel]]).reshape(6, -1)
    assert np.abs(everywhere[:, None] - everywhere).max(-1)[np.triu_indices(6, 1)].min() > 0.1
    np.testing.assert_array_equal(one["net/Dense_0.bias"], 0)  # as the network is initialized


def test_a_run_in_blocks_is_one_run():
    """Adam's moments and the step count go on from block to block: the same steps by hand."""
    optimizer, steps = optax.adam(optax.linear_schedule(0.1, 0.0, 250)), 250
    init, losses = quiet(linear, random.key(0), 1, A, Y, num_steps=steps, optimizer=optimizer)
    z, _ = quiet(linear, random.key(0), 1, A, Y, num_steps=1, optimizer=optax.sgd(0.0))
    w = z["w"][0]
    energy = lambda w: jnp.sum((Y - A @ w) ** 2) / (2 * NOISE**2) + jnp.sum(w**2) / (2 * PRIOR**2)
    state = optimizer.init(w)
    values = []
    step = jax.jit(lambda w, state: (energy(w), *optimizer.update(jax.grad(energy)(w), state, w)))
    for _ in range(steps):
        value, change, state = step(w, state)
        values.append(float(value))
        w = w + change
    np.testing.assert_allclose(init["w"][0], w, rtol=1e-4)
    np.testing.assert_allclose(losses[0] - losses[0, -1], np.array(values) - values[-1], atol=1e-2)


# ---- chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain_method", ["sequential", "vectorized", "parallel"])
@pytest.mark.parametrize(
    "kernel",
    [
        functools.partial(NUTS, step_size=1e-6, adapt_step_size=False, max_tree_depth=1),
        functools.partial(bdl.SGLD, step_size=1e-12),
    ],
    ids=["NUTS", "SGLD"],
)
def test_chains_start_where_told(kernel, chain_method):
    init, _ = quiet(linear, random.key(0), 2, A, Y, num_steps=20)
    mcmc = MCMC(
        kernel(linear), num_warmup=0, num_samples=1, num_chains=2, chain_method=chain_method, progress_bar=False
    )
    mcmc.run(random.key(1), A, Y, init_params=init)
    draws = mcmc.get_samples(group_by_chain=True)["w"][:, 0]
    assert np.abs(draws[0] - draws[1]).max() > 0.05
    np.testing.assert_allclose(draws, init["w"], atol=1e-4)


def test_a_single_chain_takes_one_member_in_unconstrained_space():
    y = jnp.array([3.0, 1.0, 4.0])
    init, _ = quiet(gamma, random.key(0), 1, y, num_steps=500, optimizer=optax.adam(0.05))
    mcmc = MCMC(bdl.SGLD(gamma, step_size=1e-12), num_warmup=0, num_samples=1, progress_bar=False)
    mcmc.run(random.key(1), y, init_params={name: value[0] for name, value in init.items()})
    np.testing.assert_allclose(mcmc.get_samples()["rate"][0], np.exp(init["rate"][0]), rtol=1e-3)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_networks_are_trained(name):
    settings = {"num_steps": 300, "optimizer": optax.adam(0.03), "minibatch": "epoch"}
    init, losses = quiet(NETWORKS[name], random.key(0), 2, X, LABELS, batch_size=20, **settings)
    assert (losses[:, -20:].mean(1) < losses[:, :20].mean(1) - 3).all()
    mcmc = MCMC(
        NUTS(NETWORKS[name], max_tree_depth=3), num_warmup=5, num_samples=5, num_chains=2, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(random.key(1), X, LABELS, init_params=init)
    assert all(np.isfinite(value).all() for value in mcmc.get_samples().values())


@pytest.mark.parametrize("name", [name for name in NETWORKS if "BatchNorm" in name])
def test_mutable_collections_are_updated_in_training_and_said_not_to_be_handed_on(name):
    with pytest.warns(UserWarning, match="not handed on"):
        init, losses = quiet(
            NETWORKS[name], random.key(0), 2, X, LABELS, num_steps=200, optimizer=optax.adam(0.03), batch_size=20
        )
    assert (losses[:, -20:].mean(1) < losses[:, :20].mean(1) - 3).all()
    mcmc = MCMC(bdl.SGLD(NETWORKS[name], step_size=1e-12), num_warmup=0, num_samples=1, num_chains=2,
                chain_method="vectorized", progress_bar=False)  # fmt: skip
    mcmc.run(random.key(1), X, LABELS, batch_size=20, init_params=init)
    for site, value in mcmc.get_samples(group_by_chain=True).items():
        np.testing.assert_allclose(value[:, 0], init[site], atol=1e-4)


def test_double_precision():
    with jax.enable_x64():
        init, _ = quiet(linear, random.key(0), 2, A, Y, num_steps=500, optimizer=optax.adam(0.1))
        # a network's parameters stay float32, though the numbers of the energy are float64
        net, _ = quiet(NETWORKS["linen"], random.key(0), 2, X.astype(float), LABELS, num_steps=5)
    np.testing.assert_allclose(init["w"], np.tile(MODE, (2, 1)), rtol=1e-5)
    assert init["w"].dtype == np.float64
    assert net["net/Dense_0.kernel"].dtype == np.float32


# ---- what is not as it should be ------------------------------------------------------------------------------------


def test_members_that_diverge_are_named():
    with pytest.warns(UserWarning, match=r"members \[0, 1\] met an energy or parameters that are not finite"):
        quiet(linear, random.key(0), 2, A, Y, num_steps=200, optimizer=optax.sgd(1.0))


def test_bad_input():
    cases = [
        ({"num_members": 0}, "num_members must be an integer of at least 1"),
        ({"num_steps": 2.5}, "num_steps must be an integer of at least 1"),
        ({"minibatch": "all"}, "minibatch must be one of"),
        ({"batch_size": 41}, "has 40 rows, but subsample_size=41"),
        ({"frozen": "w"}, "matches no parameter"),
    ]
    for settings, text in cases:
        with pytest.raises(ValueError, match=text):
            quiet(linear, random.key(0), **{"num_members": 2, "num_steps": 2} | settings, a=A, y=Y)
    with pytest.raises(TypeError, match="optimizer must be one of optax"):
        quiet(linear, random.key(0), 2, A, Y, num_steps=2, optimizer=1e-3)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quiet(linear, random.key(0), 2, A * np.nan, Y, num_steps=2)
