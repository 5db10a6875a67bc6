# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import math
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC

import numpyro_bdl as bdl
from numpyro_bdl import preconditioners
from numpyro_bdl.noise import normal

Z = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}


def gradients(count, seed=0):
    """Gradients of very different sizes."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** np.arange(-3, 3).reshape(2, 3)
    return [
        {"a": jnp.asarray(scale * rng.normal(size=(2, 3)), "float32"), "b": jnp.float32(rng.normal())}
        for _ in range(count)
    ]


def adapted(preconditioner, updates):
    state = preconditioner.init(Z)
    for gradient in updates:
        state = preconditioner.update(state, gradient, random.key(0))
    return preconditioner.diagonal(state, Z)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(float)


# ---- rms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "damping"), [(0.99, 0.1), (0.5, 1.0)])
@pytest.mark.parametrize("count", [1, 2, 25])
def test_rms_is_its_formula(count, decay, damping):
    updates = gradients(count)
    weights = decay ** np.arange(count)[::-1]
    squares = np.stack([flat(g) ** 2 for g in updates])
    s = np.sqrt(weights @ squares / weights.sum())
    expected = (1 + damping) * s.mean() / (s + damping * s.mean())
    np.testing.assert_allclose(flat(adapted(preconditioners.rms(decay, damping), updates)), expected, rtol=2e-5)


def test_rms_is_one_before_the_first_gradient():
    np.testing.assert_array_equal(flat(adapted(preconditioners.rms(), [])), 1.0)


def test_rms_is_one_while_every_gradient_is_zero():
    zeros = [jax.tree.map(jnp.zeros_like, Z)] * 3
    np.testing.assert_array_equal(flat(adapted(preconditioners.rms(), zeros)), 1.0)


def test_rms_is_one_for_equal_gradients():
    same = [jax.tree.map(lambda w: jnp.full_like(w, 3.0), Z)] * 4
    np.testing.assert_allclose(flat(adapted(preconditioners.rms(), same)), 1.0, rtol=1e-6)


@pytest.mark.parametrize("damping", [0.01, 0.1, 2.0])
def test_rms_is_positive_and_bounded(damping):
    diagonal = flat(adapted(preconditioners.rms(damping=damping), gradients(10)))
    assert diagonal.min() > 0
    assert diagonal.max() <= (1 + damping) / damping * (1 + 1e-6)
    blind = [{"a": jnp.zeros((2, 3)).at[0, 0].set(1.0), "b": jnp.zeros(())}]
    # a coordinate without gradient reaches the bound
    assert flat(adapted(preconditioners.rms(damping=damping), blind)).max() == pytest.approx((1 + damping) / damping)


def test_rms_is_the_same_for_scaled_gradients():
    updates = gradients(10)
    scaled = [jax.tree.map(lambda g: 1000 * g, gradient) for gradient in updates]
    once, scaled = (flat(adapted(preconditioners.rms(), g)) for g in (updates, scaled))
    np.testing.assert_allclose(once, scaled, rtol=1e-5)


def test_rms_equalizes_the_gradient_as_damping_vanishes():
    updates = gradients(20)
    s = np.sqrt(np.mean([flat(g) ** 2 for g in updates], axis=0))
    diagonal = flat(adapted(preconditioners.rms(decay=0.9999, damping=1e-7), updates))
    # the weights of the mean differ by 20 * (1 - decay) at most
    np.testing.assert_allclose(diagonal * s, s.mean(), rtol=3e-3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"decay": 0.0}, r"preconditioners.rms: decay must be a number in .*, got 0.0"),
        ({"decay": 1.0}, r"decay must be a number in .*, got 1.0"),
        ({"decay": math.nan}, r"decay must be a number in .*, got nan"),
        ({"damping": 0.0}, "preconditioners.rms: damping must be a number in .*, got 0.0"),
        ({"damping": -1.0}, "damping must be a number in .*, got -1.0"),
        ({"damping": math.inf}, "damping must be a number in .*, got inf"),
    ],
)
def test_rms_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        preconditioners.rms(**arguments)


# ---- fixed and identity -------------------------------------------------------------------------------------------


def test_fixed_is_broadcast_to_the_position():
    fixed = preconditioners.fixed({"a": np.array([1.0, 2.0, 3.0]), "b": 4})
    diagonal = fixed.diagonal(fixed.init(Z), Z)
    np.testing.assert_array_equal(diagonal["a"], [[1, 2, 3], [1, 2, 3]])
    assert diagonal["b"] == 4
    assert {leaf.dtype for leaf in jax.tree.leaves(diagonal)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("leaf", [0.0, -1.0, math.nan, math.inf, np.array([1.0, 0.0, 1.0])])
def test_fixed_refuses_entries_that_are_not_positive(leaf):
    with pytest.raises(ValueError, match=r"every entry must be positive and finite; \['a'\] is not"):
        preconditioners.fixed({"a": leaf, "b": 1.0})


@pytest.mark.parametrize("diagonal", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "c": 1.0}, 2.0])
def test_fixed_refuses_other_sites(diagonal):
    with pytest.raises(ValueError, match="preconditioners.fixed: expected a tree like the position, .*'a'.*'b'.*got"):
        preconditioners.fixed(diagonal).init(Z)


@pytest.mark.parametrize("shape", [(4,), (2, 1, 3), (3, 2), (1, 2, 3)])
def test_fixed_refuses_other_shapes(shape):
    text = "['a'] must have the shape of the site in unconstrained space, (2, 3), or one that broadcasts"
    with pytest.raises(ValueError, match=re.escape(text) + f".* got {re.escape(str(shape))}"):
        preconditioners.fixed({"a": np.ones(shape), "b": 1.0}).init(Z)


def test_identity_is_one_and_has_no_state():
    identity = preconditioners.identity()
    assert identity.init(Z) == ()
    assert not identity.adapts
    assert identity.diagonal((), Z) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    "preconditioner", [preconditioners.identity(), preconditioners.fixed({"a": 2.0}), preconditioners.rms(0.9)]
)
def test_preconditioners_are_pickled(preconditioner):
    assert pickle.loads(pickle.dumps(preconditioner)) == preconditioner


# ---- in a kernel --------------------------------------------------------------------------------------------------


def model():
    numpyro.sample("x", dist.Normal(0, jnp.array([0.1, 1.0, 10.0])).to_event(1))


def sgld(num_warmup, num_samples, preconditioner, num_chains=1, **kwargs):
    kernel = bdl.SGLD(model, step_size=1e-3, preconditioner=preconditioner)
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        progress_bar=False,
        **kwargs,
    )
    mcmc.run(random.key(0), extra_fields=("preconditioner",))
    return mcmc


def test_rms_adapts_in_warmup_and_is_frozen_for_sampling():
    mcmc = sgld(20, 10, preconditioners.rms())
    state = mcmc.get_extra_fields()["preconditioner"]
    for leaf in jax.tree.leaves(state):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
    diagonal = state.diagonal["x"][0]
    assert np.all(np.diff(diagonal) > 0), "the narrower the site, the larger its gradient, the smaller its step"


def test_the_state_at_the_end_of_warmup_is_that_at_the_end_of_the_run():
    mcmc = sgld(20, 10, preconditioners.rms())
    warm = MCMC(mcmc.sampler, num_warmup=20, num_samples=10, progress_bar=False)
    warm.warmup(random.key(0))
    for at_warmup, at_end in zip(
        jax.tree.leaves(warm.last_state.preconditioner), jax.tree.leaves(mcmc.last_state.preconditioner), strict=True
    ):
        np.testing.assert_array_equal(at_warmup, at_end)


def test_without_warmup_rms_stays_one():
    with pytest.warns(UserWarning, match="num_warmup=0"):
        state = sgld(0, 5, preconditioners.rms()).last_state.preconditioner
    np.testing.assert_array_equal(state.diagonal["x"], 1.0)


def test_each_vectorized_chain_adapts_by_itself():
    state = sgld(20, 2, preconditioners.rms(), num_chains=3, chain_method="vectorized").last_state.preconditioner
    assert state.diagonal["x"].shape == (3, 3)
    assert len({tuple(chain) for chain in state.diagonal["x"].tolist()}) == 3


def test_a_step_is_taken_in_the_metric():
    diagonal = np.array([0.5, 1.0, 4.0])
    state = sgld(0, 1, preconditioners.fixed({"x": diagonal})).last_state
    kernel = bdl.SGLD(model, step_size=1e-3, preconditioner=preconditioners.fixed({"x": diagonal}), temperature=1e-30)
    start = jnp.array([1.0, 2.0, 3.0])
    moved = kernel.sample(kernel.init(random.key(0), 0, {"x": start}, (), {}), (), {}).z["x"]
    expected = start - 1e-3 * diagonal * start / np.array([0.1, 1.0, 10.0]) ** 2
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    np.testing.assert_array_equal(state.preconditioner["x"], diagonal)


# ---- mirror -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "steps", "expected"), [(10_240, 33_000, 0.63775), (50_000, 156_400, 0.63430)])
def test_mirror_drifts_to_one_at_the_rate_of_the_paper_whatever_the_data(rows, steps, expected):
    """eta = .1: P = 1 - exp(-eta t / N) / 2, here in a hundredth of the steps at a hundred times the rate."""
    preconditioner = preconditioners.mirror(rate=100 * 0.1 / rows, spread=1e-9)
    z = jnp.zeros(3)

    @jax.jit
    def run(state):
        body = lambda i, s: preconditioner.update(s, jnp.array([1e-3, 1.0, 1e3]), random.fold_in(random.key(0), i))
        return jax.lax.fori_loop(0, steps // 100, body, state)

    diagonal = preconditioner.diagonal(run(preconditioner.init(z)), z)
    np.testing.assert_allclose(diagonal, 1 - np.exp(-0.1 * steps / rows) / 2, atol=2e-4)
    np.testing.assert_allclose(diagonal, expected, atol=3e-4)


def test_mirror_finds_the_inverse_root_of_the_curvature():
    """Where the position is spread by s P xi, the gradient is h s P xi."""
    spread, curvature = 0.1, jnp.array([400.0, 2_500.0, 10_000.0, 1.0])
    preconditioner = preconditioners.mirror(rate=2e-3, spread=spread)

    @jax.jit
    def run(state):
        def body(i, s):
            gradient = curvature * spread * preconditioner.diagonal(s, None) * s.noise
            return preconditioner.update(s, gradient, random.fold_in(random.key(0), i))

        return jax.lax.fori_loop(0, 20_000, body, state)

    diagonal = preconditioner.diagonal(run(preconditioner.init(jnp.zeros(4))), None)
    np.testing.assert_allclose(diagonal, [0.5, 0.2, 0.1, 1.0], rtol=0.15)


def test_mirror_uses_the_noise_of_the_step_before():
    preconditioner = preconditioners.mirror(rate=0.1, spread=1.0)
    z = {"a": jnp.zeros(2)}
    state = preconditioner.update(preconditioner.init(z), {"a": jnp.ones(2)}, random.key(5))
    np.testing.assert_array_equal(state.noise["a"], normal(random.key(5), z)["a"])
    np.testing.assert_allclose(state.dual["a"], 0.1 * 2)  # no noise yet: only 1 / P
    after = preconditioner.update(state, {"a": jnp.array([3.0, -2.0])}, random.key(6))
    expected = 0.2 - 0.1 * (np.asarray(state.noise["a"]) * [3.0, -2.0] - 1 / (1 / (1 + np.exp(-0.2))))
    np.testing.assert_allclose(after.dual["a"], expected, rtol=1e-5)


@pytest.mark.parametrize("arguments", [{"rate": 0.0}, {"spread": -1.0}])
def test_mirror_refuses(arguments):
    with pytest.raises(ValueError, match="preconditioners.mirror: (rate|spread) must be a number"):
        preconditioners.mirror(**arguments)
