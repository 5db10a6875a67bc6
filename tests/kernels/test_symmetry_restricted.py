# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import HMC, MCMC, NUTS
from numpyro.infer.util import log_density
from scipy import stats

import numpyro_bdl as bdl
from numpyro_bdl import preconditioners
from numpyro_bdl.predictive import PosteriorPredictive
from numpyro_bdl.symmetry import UnitGroups, Units, apply, canonicalize, find_model_groups, random_element

SWAP = UnitGroups.of({"w": jnp.ones(2)}, {"pair": Units(writes={"w": 0}, reads={})})
SIGNED = UnitGroups.of({"w": jnp.ones(3)}, {"three": Units(writes={"w": 0}, reads={}, flips=("w",))})


def normal(size, scale=1.0):
    def model():
        numpyro.sample("w", dist.Normal(0, scale).expand([size]).to_event(1))

    return model


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(3)(x))
        return nn.Dense(1)(x)[:, 0]


def regression(x, y, prior=None):
    net = random_flax_module("net", Network(), dist.Normal(0, 1) if prior is None else prior, input_shape=(1, 1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(net(x), 0.3), obs=y)


X = np.linspace(-1, 1, 15, dtype=np.float32)[:, None]
Y = np.sin(3 * X[:, 0])


def run(kernel, *args, num_warmup=5, num_samples=8, num_chains=2, key=0, extra_fields=(), **kwargs):
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=num_chains, progress_bar=False,
                chain_method="vectorized")  # fmt: skip
    mcmc.run(random.key(key), *args, extra_fields=extra_fields, **kwargs)
    return mcmc


# ---- the law --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["record", "state"])
def test_law_of_folded_chains(mode):
    """Three standard normals, folded: the order statistics of three half-normals."""
    kernel = bdl.SymmetryRestricted(NUTS(normal(3)), SIGNED, mode=mode)
    draws = run(kernel, num_warmup=300, num_samples=4000, num_chains=1).get_samples()["w"][::4]
    for n in range(3):
        law = lambda x, n=n: stats.beta(n + 1, 3 - n).cdf(stats.halfnorm.cdf(x))
        assert stats.kstest(np.asarray(draws[:, n]), law).pvalue > 1e-3


def swapped_variance(monkeypatch, kernel, force=False):
    if force:
        monkeypatch.setattr(bdl.SymmetryRestricted, "_check_preconditioner", lambda self, state: None)
    restricted = bdl.SymmetryRestricted(kernel, SWAP, mode="state")
    draws = run(restricted, num_warmup=200, num_samples=4000, num_chains=16).get_samples()["w"]
    return float((draws**2).mean())


def test_state_mode_is_exact_with_momentum_and_a_common_preconditioner(monkeypatch):
    variance = swapped_variance(monkeypatch, bdl.SGHMC(normal(2), step_size=0.01, momentum=0.9, steps_per_draw=5))
    assert abs(variance - 1) < 0.02


def test_state_mode_with_unequal_preconditioners_is_refused_and_would_be_wrong(monkeypatch):
    """Two coordinates that swap, momentum 0.9, preconditioner (0.1, 0.9): velocities land on the wrong mass."""
    make = lambda: bdl.SGHMC(
        normal(2), step_size=0.01, momentum=0.9, preconditioner=preconditioners.fixed({"w": jnp.array([0.1, 0.9])})
    )
    with pytest.raises(ValueError, match="its preconditioner differs between units that can be exchanged, at .*'w'"):
        swapped_variance(monkeypatch, make())
    assert swapped_variance(monkeypatch, make(), force=True) > 1.5


# ---- folding --------------------------------------------------------------------------------------------------------


def test_record_is_the_fold_of_the_plain_chain():
    """The chain itself is untouched, and its predictions are."""
    plain = run(NUTS(regression, max_tree_depth=4), X, Y)
    kernel = bdl.SymmetryRestricted(NUTS(regression, max_tree_depth=4))
    folded = run(kernel, X, Y)
    groups = find_model_groups(regression, X, Y)
    expected = canonicalize(plain.get_samples(), groups)
    for name, value in folded.get_samples().items():
        np.testing.assert_array_equal(value, expected[name])
    one, other = (PosteriorPredictive(m, progress_bar=False).functions()["y"] for m in (plain, folded))
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert bdl.to_datatree(folded).attrs["kernel"] == "SymmetryRestricted(NUTS)"


@pytest.mark.parametrize("mode", ["record", "state"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: NUTS(regression, max_tree_depth=4),
        lambda: bdl.SGHMC(regression, step_size=1e-3),
        lambda: bdl.FlatBasinSGLD(regression, step_size=1e-3, eta=0.1, collect_anchor=True),
    ],
    ids=["NUTS", "SGHMC", "FlatBasinSGLD"],
)
def test_a_run_resumes_bit_for_bit(make, mode):
    whole = run(bdl.SymmetryRestricted(make(), mode=mode), X, Y, num_samples=12).get_samples()
    mcmc = run(bdl.SymmetryRestricted(make(), mode=mode), X, Y, num_samples=4)
    first = mcmc.get_samples(group_by_chain=True)
    mcmc = pickle.loads(pickle.dumps(mcmc))
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.num_samples = 8
    mcmc.run(mcmc.last_state.rng_key, X, Y)
    second = mcmc.get_samples(group_by_chain=True)
    for name, value in whole.items():
        joined = np.concatenate([first[name], second[name]], 1)
        np.testing.assert_array_equal(np.asarray(value).reshape(joined.shape), joined)


def test_the_anchor_moves_with_the_position():
    """The difference between anchor and position is that of one copy, not of two."""
    kernel = bdl.FlatBasinSGLD(regression, step_size=1e-4, eta=1e-4, collect_anchor=True)
    plain = run(kernel, X, Y)
    folded = run(bdl.SymmetryRestricted(kernel), X, Y)
    distance = lambda m: {
        name: jnp.sort(jnp.abs(m.get_samples()[name] - m.get_extra_fields()["z_anchor"][name]).ravel())
        for name in m.get_samples()
    }
    for name, value in distance(plain).items():
        np.testing.assert_allclose(distance(folded)[name], value, atol=1e-6)
    before, after = (
        PosteriorPredictive(m, members="anchor", progress_bar=False).functions()["y"] for m in (plain, folded)
    )
    np.testing.assert_allclose(before, after, atol=1e-5)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(4)(x))
        return nn.Dense(1)(jnp.tanh(x))[:, 0]


def normed(x, y):
    net = random_flax_module("net", Normed(), dist.Normal(0, 1), input_shape=(4, 1), mutable=["batch_stats"])
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(net(x), 0.3), obs=y)


def test_running_averages_of_batch_norm_move_with_the_position():
    kernel = bdl.SGLD(normed, step_size=1e-3)
    plain, folded = run(kernel, X, Y), run(bdl.SymmetryRestricted(kernel), X, Y)
    (stats_before, stats_after) = (
        next(iter(m.get_extra_fields()["mutable"].values()))["batch_stats"]["BatchNorm_0"] for m in (plain, folded)
    )
    assert not np.array_equal(stats_before["mean"], stats_after["mean"])

    def network(draw, means):
        x = X @ draw["net/Dense_0.kernel"] + draw["net/Dense_0.bias"]
        x = (x - means["mean"]) / jnp.sqrt(means["var"] + 1e-5)
        x = jnp.tanh(x * draw["net/BatchNorm_0.scale"] + draw["net/BatchNorm_0.bias"])
        return x @ draw["net/Dense_1.kernel"] + draw["net/Dense_1.bias"]

    before, after = (jax.vmap(network)(m.get_samples(), s) for m, s in ((plain, stats_before), (folded, stats_after)))
    np.testing.assert_allclose(before, after, atol=1e-5)


class NormedInput(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Network()(nn.BatchNorm(use_running_average=False)(x))


def test_statistics_of_no_group_stay_as_they_are():
    def model(x, y):
        net = random_flax_module("net", NormedInput(), dist.Normal(0, 1), input_shape=(4, 1), mutable=["batch_stats"])
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(net(x), 0.3), obs=y)

    kernel = bdl.SGLD(model, step_size=1e-3)
    plain, folded = (k.init(random.key(0), 1, None, (X, Y), {}) for k in (kernel, bdl.SymmetryRestricted(kernel)))
    for one, other in zip(*map(jax.tree.leaves, (plain.mutable, folded.mutable)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_pruned_network_is_folded_with_its_mask():
    kernel = bdl.SpikeSlabSGHMC(
        regression, step_size=1e-4, groups={"net/*.kernel": "unstructured"}, target_sparsity=0.3
    )
    mcmc = run(bdl.SymmetryRestricted(kernel), X, Y, num_warmup=40, extra_fields=("mask", "inclusion"))
    draws, fields = mcmc.get_samples(), mcmc.get_extra_fields()
    inclusion = bdl.inclusion_probabilities(mcmc)
    for name in ("net/Dense_0.kernel", "net/Dense_1.kernel"):
        np.testing.assert_array_equal(draws[name] != 0, fields["mask"][name] == 1)
        np.testing.assert_array_equal(inclusion[name].reshape(draws[name].shape), fields["mask"][name])
    with pytest.raises(ValueError, match="each draw has a mask of its own"):
        bdl.pruning.masks(mcmc)
    assert "mask" not in bdl.to_datatree(mcmc).children


def test_inclusion_follows_the_position():
    kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-4, groups={"net/Dense_0.kernel": "unstructured"})
    mcmc = run(bdl.SymmetryRestricted(kernel), X, Y, extra_fields=("inclusion",))
    expected = bdl.inclusion_probabilities(mcmc)["net/Dense_0.kernel"]
    collected = mcmc.get_extra_fields(group_by_chain=True)["inclusion"]["net/Dense_0.kernel"]
    np.testing.assert_allclose(collected, expected, rtol=1e-5)


def test_log_density_and_its_gradient_are_those_of_the_copy():
    """T6: the gradient at g z is g applied to the gradient at z."""
    groups = find_model_groups(regression, X, Y)
    z = {"net/Dense_0.kernel": (1, 3), "net/Dense_0.bias": (3,), "net/Dense_1.kernel": (3, 1), "net/Dense_1.bias": (1,)}
    z = {name: random.normal(random.key(n), shape) for n, (name, shape) in enumerate(z.items())}
    density = jax.value_and_grad(lambda p: log_density(regression, (X, Y), {}, p)[0])
    element = random_element(random.key(9), groups)
    value, gradient = density(z)
    value_of_copy, gradient_of_copy = density(apply(element, z))
    np.testing.assert_allclose(value, value_of_copy, rtol=1e-5)
    for name, expected in apply(element, gradient).items():
        np.testing.assert_allclose(gradient_of_copy[name], expected, rtol=1e-4, atol=1e-4)


def test_a_bad_chain_stays_bad():
    mcmc = run(bdl.SymmetryRestricted(bdl.SGLD(regression, step_size=1e6)), X, Y, num_warmup=30)
    assert np.isnan(mcmc.get_samples()["net/Dense_0.bias"]).any()
    assert mcmc.last_state.first_bad_step.shape == (2,)


# ---- what is refused ------------------------------------------------------------------------------------------------

SITES = ("Dense_0.kernel", "Dense_0.bias", "Dense_1.kernel", "Dense_1.bias")


@pytest.mark.parametrize(
    ("site", "prior", "refused"),
    [
        (None, dist.Normal(0, 1), False),
        ("Dense_0.bias", dist.StudentT(3.0, 0.0, 2.0), False),
        ("Dense_1.kernel", dist.Laplace(0, 1), False),
        ("Dense_1.bias", dist.Normal(2, 1), False),
        ("Dense_0.bias", dist.Normal(0.5, 1), True),
        ("Dense_0.bias", dist.Normal(0, jnp.array([1.0, 1.02, 1.0])), True),
        ("Dense_1.kernel", dist.Normal(0, jnp.array([[1.0], [2.0], [1.0]])), True),
        ("Dense_0.bias", dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3) + 0.5), True),
    ],
)
def test_a_prior_that_tells_units_apart_is_refused_by_name(site, prior, refused):
    priors = {name: dist.Normal(0, 1) for name in SITES} | ({site: prior} if site else {})
    kernel = bdl.SymmetryRestricted(HMC(lambda x, y: regression(x, y, priors)))
    init = lambda: kernel.init(random.key(0), 1, None, (X, Y), {})
    if refused:
        with pytest.raises(ValueError, match=f"of the group 'net/Dense_0' changes it at the site 'net/{site}'"):
            init()
    else:
        init()


def test_a_spike_that_tells_units_apart_is_refused():
    """The target of the kernel, not only the prior of the model: one unit's weights are grouped, the others' not."""
    labels = lambda name, shape: np.array([[0, 1, 1]])
    kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-4, groups={"net/Dense_0.kernel": labels})
    with pytest.raises(ValueError, match="changes it at the site 'net/Dense_0.kernel'"):
        bdl.SymmetryRestricted(kernel).init(random.key(0), 1, None, (X, Y), {})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bdl.SymmetryRestricted(regression), TypeError, "needs an MCMC kernel, got function"),
        (lambda: bdl.SymmetryRestricted(NUTS(regression), {"a": 1}), TypeError, "groups must come from symmetry.find"),
        (lambda: bdl.SymmetryRestricted(NUTS(regression), mode="each"), ValueError, "mode must be one of 'record', 's"),
        (
            lambda: bdl.SymmetryRestricted(
                bdl.SGLD(regression, step_size=1e-3, preconditioner=preconditioners.rms()), mode="state"
            ),
            ValueError,
            "its preconditioner adapts.*mode=\"record\", which is exact for any kernel",
        ),
        (
            lambda: bdl.SymmetryRestricted(
                bdl.SGHMC(regression, step_size=1e-3, noise_correction=True), mode="state"
            ),
            ValueError,
            "it keeps gradient_noise, which differ from unit to unit",
        ),
        (lambda: bdl.SymmetryRestricted(NUTS(regression)).unit_groups, RuntimeError, "has not met its model"),
        (
            lambda: bdl.SymmetryRestricted(NUTS(regression), SWAP).init(random.key(0), 1, None, (X, Y), {}),
            ValueError,
            "the groups name 'w', which is no site of the model; its sites are: net/",
        ),
        (
            lambda: bdl.SymmetryRestricted(NUTS(potential_fn=lambda z: jnp.sum(z["w"] ** 2))).init(
                random.key(0), 1, {"w": jnp.ones(2)}, (), {}
            ),
            ValueError,
            "a kernel with a potential_fn has no model in which to find groups",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("e_step", ["soft", "hard", "gibbs"])
def test_every_e_step_can_be_restricted(e_step):
    kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-4, groups={"net/*.kernel": "unstructured"}, e_step=e_step)
    bdl.SymmetryRestricted(kernel).init(random.key(0), 1, None, (X, Y), {})


def test_groups_by_hand_that_are_no_symmetry_are_refused():
    """The prior is symmetric, but the network is not: its two layers are not those of one group."""
    z = {"net/Dense_0.bias": jnp.ones(3), "net/Dense_0.kernel": jnp.ones((1, 3))}
    groups = UnitGroups.of(z, {"half": Units({"net/Dense_0.bias": 0, "net/Dense_0.kernel": 1}, {})})
    with pytest.raises(ValueError, match="no symmetry of the model: half: changes the function by"):
        bdl.SymmetryRestricted(NUTS(regression), groups).init(random.key(0), 1, None, (X, Y), {})


def test_groups_by_hand_that_flip_a_bounded_site_are_refused():
    """In unconstrained space -z is a copy of z, but its value is 2 - w."""

    def model():
        w = numpyro.sample("w", dist.Uniform(0, 2).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(jnp.sum((w - 1) ** 2), 1.0), obs=1.0)

    groups = UnitGroups.of({"w": jnp.ones(2)}, {"pair": Units({"w": 0}, {}, flips=("w",))})
    with pytest.raises(ValueError, match="pair: flips w, of which the transform to its support is not odd"):
        bdl.SymmetryRestricted(NUTS(model), groups).init(random.key(0), 1, None, (), {})


def test_groups_that_a_random_model_can_not_confirm_are_warned_of():
    def model(x, y):
        net = random_flax_module(
            "net", nn.Sequential([nn.Dropout(0.5, deterministic=False), Network()]), dist.Normal(0, 1),
            input_shape=(4, 1), apply_rng=["dropout"],
        )  # fmt: skip
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(net(x, rngs={"dropout": numpyro.prng_key()}), 0.3), obs=y)

    z = {"net/layers_1.Dense_0.bias": jnp.ones(3), "net/layers_1.Dense_0.kernel": jnp.ones((1, 3))}
    half = UnitGroups.of(z, {"half": Units(dict(zip(z, (0, 1), strict=True)), {})})
    with pytest.warns(UserWarning, match="groups could not be checked.*differs from run to run"):
        bdl.SymmetryRestricted(NUTS(model), half).init(random.key(0), 1, None, (X, Y), {})


def test_a_model_without_units_says_so():
    with pytest.warns(UserWarning, match="no group of units was found, and nothing is folded"):
        run(bdl.SymmetryRestricted(HMC(normal(2))), num_chains=1)


def test_a_potential_with_groups_by_hand():
    kernel = bdl.SymmetryRestricted(NUTS(potential_fn=lambda z: 0.5 * jnp.sum(z["w"] ** 2)), SWAP)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=20, progress_bar=False)
    mcmc.run(random.key(0), init_params={"w": jnp.ones(2)})
    assert (jnp.diff(mcmc.get_samples()["w"], axis=1) >= 0).all()
    kernel = bdl.SymmetryRestricted(NUTS(potential_fn=lambda z: jnp.sum(z["w"] ** 2 * jnp.array([1.0, 2.0]))), SWAP)
    with pytest.raises(ValueError, match="'pair' changes it at the site 'w'"):
        kernel.init(random.key(0), 1, {"w": jnp.ones(2)}, (), {})
