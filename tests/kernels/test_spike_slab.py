# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import math
import pickle
import warnings
from functools import partial

import arviz as az
import exact
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from exact import covariance_z_scores
from jax import random
from kernels.laws import TARGET
from models import LABELS, NETWORKS, X
from numpyro.infer import MCMC, NUTS, init_to_feasible, init_to_value
from targets import last_states

import numpyro_bdl as bdl
from numpyro_bdl import pruning

W = {"w": "unstructured"}


def run(kernel, *args, num_warmup=50, num_samples=10, num_chains=1, key=0, chain_method="vectorized", **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=False,
    )
    mcmc.run(random.key(key), *args, **kwargs)
    return mcmc


def regression(x, y=None, scale=1.0):
    w = numpyro.sample("w", dist.Normal(0, scale).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, 1), obs=y)


def correlated_rows(columns, coefficients, rows=50, seed=1):
    rng = np.random.default_rng(seed)
    covariance = 0.5 ** np.abs(np.subtract.outer(range(columns), range(columns)))
    x = rng.normal(size=(rows, columns)) @ np.linalg.cholesky(covariance).T
    return x, x @ coefficients + rng.normal(size=rows)


# ---- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "precision"),
    [
        # all included: the slab replaces the model's prior, of precision 1/2
        ({"slab_variance": 0.5, "inclusion": 1 - 1e-7, "spike_variance": 0.1}, 2.0),
        # none included
        ({"e_step": "hard", "inclusion": 1e-30, "spike_variance": 0.5}, 2.0),
        ({"e_step": "hard", "inclusion": 1e-30, "spike_variance": 0.5, "e_step_every": 7}, 2.0),
    ],
    ids=["slab", "spike", "spike, seldom"],
)
def test_each_component_has_the_law_of_its_gaussian(arguments, precision):
    kernel = bdl.SpikeSlabSGHMC(TARGET.model, step_size=0.05, momentum=0.8, groups=W, **arguments)
    state = last_states(kernel, TARGET.y, steps=200)
    target = TARGET._replace(prior_precision=precision)
    # L is that of the target with the other prior
    covariance = exact.sghmc(target.curvature, 0.05, 0.8)[:2, :2]
    mean_z, covariance_z = covariance_z_scores(np.asarray(state.z["w"], float), target.mean, covariance)
    assert max(np.abs(mean_z).max(), np.abs(covariance_z).max()) < 4


def enumerated(groups):
    x, y = correlated_rows(6, np.array([1, 0.35, 0, 0, 0.25, 0]))
    return x, y, *exact.spike_slab_regression(x, y, 1.0, 0.01, 0.3, groups)


def errors(share=0.1, groups=W, numbers=tuple(range(6)), preconditioner=None, draws=3500, chains=64, **kwargs):
    """Largest errors of inclusion probabilities and means; the stiffest direction is at ``share`` of its bound."""
    x, y, inclusion, means = enumerated(np.array(numbers))
    momentum = 0.9
    stiffest = np.linalg.eigvalsh(x.T @ x).max() + 1 / 0.01
    kernel = bdl.SpikeSlabSGHMC(
        regression,
        step_size=share * 2 * (1 + momentum) / stiffest,
        momentum=momentum,
        groups=groups,
        inclusion=0.3,
        spike_variance=0.01,
        steps_per_draw=10,
        preconditioner=preconditioner,
        **kwargs,
    )
    mcmc = run(
        kernel, *(jnp.asarray(a, jnp.float32) for a in (x, y)), num_warmup=500, num_samples=draws, num_chains=chains
    )
    found = np.mean(bdl.inclusion_probabilities(mcmc)["w"], (0, 1), dtype=float)
    return np.abs(found - inclusion).max(), np.abs(np.mean(mcmc.get_samples()["w"], 0, dtype=float) - means).max()


def test_the_enumeration_is_that_of_the_problem():
    inclusion, means = enumerated(np.arange(6))[2:]
    np.testing.assert_allclose(inclusion, [0.9999, 0.3828, 0.0787, 0.0884, 0.1861, 0.0982], atol=1e-4)
    np.testing.assert_allclose(means, [1.0246, 0.2214, -0.0149, 0.0341, 0.1086, 0.0434], atol=1e-4)


@pytest.mark.usefixtures("optimized")
def test_soft_e_step_finds_the_inclusion_probabilities_of_the_enumeration():
    inclusion_error, mean_error = errors(chains=256)
    assert inclusion_error < 0.012
    assert mean_error < 0.006
    # what is left is the step's, and Monte Carlo error (of 0.001)
    assert errors(share=0.025, chains=256)[0] < 0.005


@pytest.mark.usefixtures("optimized")
def test_with_an_unequal_preconditioner():
    diagonal = {"w": np.array([0.3, 1.0, 0.6, 0.9, 0.4, 0.8])}
    assert errors(preconditioner=bdl.preconditioners.fixed(diagonal))[0] < 0.013


@pytest.mark.usefixtures("optimized")
def test_pairs_of_variables():
    numbers = (0, 0, 1, 1, 2, 2)
    groups = {"w": lambda site, shape: np.array(numbers)}
    np.testing.assert_allclose(enumerated(np.array(numbers))[2], [1.0, 0.0212, 0.0425], atol=1e-4)
    assert errors(groups=groups, numbers=numbers)[0] < 0.009


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("variant", "error"),
    [
        ({"e_step": "hard"}, 0.030),
        ({"e_step": "gibbs", "e_step_every": 1}, 0.0726),
        ({"e_step_every": 50}, 0.1993),
    ],
    ids=["hard", "gibbs at every step", "soft at every 50th step"],
)
def test_variants_that_target_another_law_are_off(variant, error):
    assert 0.7 * error < errors(draws=2000, **variant)[0] < 1.3 * error


@pytest.mark.usefixtures("optimized")
def test_gibbs_at_its_default_interval():
    assert errors(e_step="gibbs", chains=256)[0] < 0.013


def test_nuts_on_the_mixture_agrees():
    slab, spike, theta = 1.0, 0.04, 0.3
    x, y = correlated_rows(12, np.r_[1, 0.4, 0, 0.3, np.zeros(8)], seed=2)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def mixture(x, y):
        components = dist.Normal(0, jnp.sqrt(jnp.array([spike, slab])))
        prior = dist.MixtureSameFamily(dist.Categorical(jnp.array([1 - theta, theta])), components)
        w = numpyro.sample("w", prior.expand([x.shape[1]]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ w, 1), obs=y)

    stiffest = float(jnp.linalg.eigvalsh(x.T @ x).max()) + 1 / spike
    kernel = bdl.SpikeSlabSGHMC(
        regression, step_size=0.02 * 3.8 / stiffest, groups=W, inclusion=theta, spike_variance=spike, steps_per_draw=20
    )
    ours = run(kernel, x, y, num_warmup=300, num_samples=1000, num_chains=16)
    nuts = run(NUTS(mixture), x, y, num_warmup=500, num_samples=2000, num_chains=4)

    def moments(mcmc):
        w = np.asarray(mcmc.get_samples(group_by_chain=True)["w"], float)
        odds = np.log(theta / (1 - theta)) + (np.log(spike / slab) + w**2 * (1 / spike - 1 / slab)) / 2
        values = np.concatenate([w, 1 / (1 + np.exp(-odds))], -1)
        mcse = az.mcse(az.from_dict({"posterior": {"v": values}}))["v"].values
        return values.mean((0, 1)), mcse

    (mean, error), (other, other_error) = moments(ours), moments(nuts)
    assert np.abs((mean - other) / np.hypot(error, other_error)).max() < 4
    np.testing.assert_allclose(bdl.inclusion_probabilities(ours)["w"].mean((0, 1)), mean[12:], rtol=1e-4)


def test_at_temperature_zero_it_is_gradient_descent_with_momentum():
    arguments = {"step_size": 1e-3, "momentum": 0.9, "temperature": lambda i: 0.0}
    x, y = (jnp.asarray(a, jnp.float32) for a in correlated_rows(6, np.ones(6)))
    start = {"w": jnp.full(6, 2.0)}
    kernel = bdl.SpikeSlabSGHMC(regression, groups=W, e_step="hard", inclusion=1 - 1e-6, **arguments)
    ours = run(kernel, x, y, init_params=start)
    plain = run(bdl.SGHMC(regression, **arguments), x, y, init_params=start)
    np.testing.assert_array_equal(ours.get_samples()["w"], plain.get_samples()["w"])
    velocity, w = np.zeros(6), np.full(6, 2.0)
    for _ in range(60):
        velocity = 0.9 * velocity - 1e-3 * (np.asarray(x, float).T @ (x @ w - y) + w)
        w = w + velocity
    np.testing.assert_allclose(ours.get_samples()["w"][-1], w, rtol=1e-4)


def test_learned_rate_is_the_mode_and_then_stays():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(200, 40)), jnp.float32)
    y = x[:, :10] @ jnp.full(10, 3.0) + random.normal(random.key(1), (200,))
    kernel = bdl.SpikeSlabSGHMC(
        partial(regression, scale=3.0), step_size=2e-4, groups=W, inclusion=dist.Beta(1.0, 40.0), spike_variance=0.01
    )
    mcmc = run(kernel, x, y, num_warmup=4000, num_samples=50, extra_fields=("rate",))
    rates = np.asarray(mcmc.get_extra_fields()["rate"]["w"])
    assert np.ptp(rates) == 0
    included = bdl.inclusion_probabilities(mcmc)["w"].mean((0, 1))
    assert included[:10].min() > 0.99
    # the fixed point: the mode given the inclusions at that rate
    np.testing.assert_allclose(rates[0], included.sum() / (1 + 40 + 40 - 2), rtol=0.1)


def test_a_widened_spike_ends_at_its_variance():
    kernel = bdl.SpikeSlabSGHMC(TARGET.model, step_size=0.01, groups=W, spike_widening=20.0)
    mcmc = run(kernel, TARGET.y, num_warmup=40, num_samples=2, extra_fields=("inclusion",))
    np.testing.assert_allclose(
        bdl.inclusion_probabilities(mcmc)["w"][0], mcmc.get_extra_fields()["inclusion"]["w"], rtol=1e-5
    )
    # 100 narrower than the slab, 20 wider than that at the start, half the way (in logs) after 15 % of the warm-up
    factors = [float(kernel._widening(jnp.int32(i), jnp.int32(40))) for i in (0, 6, 12, 30)]
    np.testing.assert_allclose(factors, [20, math.sqrt(20), 1, 1], rtol=1e-5)


# ---- pruning ------------------------------------------------------------------------------------------------------

SIX = [jnp.asarray(a, jnp.float32) for a in correlated_rows(6, np.r_[1, 0.5, 0, 0, 0, 0.3])]


@pytest.mark.usefixtures("optimized")
def test_after_pruning_the_draws_follow_the_posterior_of_the_model_that_is_left():
    kernel = bdl.SpikeSlabSGHMC(
        regression, step_size=2e-3, momentum=0.5, groups=W, spike_variance=0.05, target_sparsity=0.5
    )
    state = last_states(kernel, *SIX, steps=600, chains=6000)
    masks, counts = np.unique(np.asarray(state.mask["w"]), axis=0, return_counts=True)
    assert (masks.sum(1) == 3).all()
    mask = masks[counts.argmax()] > 0
    draws = np.asarray(state.z["w"], float)[(np.asarray(state.mask["w"]) == mask).all(1)]
    assert len(draws) > 1000
    assert not draws[:, ~mask].any()
    x = np.asarray(SIX[0], float)[:, mask]
    curvature = x.T @ x + np.eye(3)
    mean = np.linalg.solve(curvature, x.T @ np.asarray(SIX[1], float))
    covariance = exact.sghmc(curvature, 2e-3, 0.5)[:3, :3]
    mean_z, covariance_z = covariance_z_scores(draws[:, mask], mean, covariance)
    assert max(np.abs(mean_z).max(), np.abs(covariance_z).max()) < 4


def pruned_run(network="linen", num_warmup=40, num_chains=2, sparsity=0.6, e_step="soft", **kwargs):
    options = {k: kwargs.pop(k) for k in ("chain_method", "num_samples", "key") if k in kwargs}
    kernel = bdl.SpikeSlabSGHMC(
        NETWORKS[network],
        step_size=1e-3,
        target_sparsity=sparsity,
        steps_per_draw=3,
        e_step=e_step,
        **{"spike_variance": 0.02, "momentum": 0.5, **kwargs},
    )
    return run(kernel, X, LABELS, batch_size=20, num_warmup=num_warmup, num_chains=num_chains, **options)


def test_masks_only_lose_weights_and_reach_the_target_before_the_kept_draws():
    kernel = bdl.SpikeSlabSGHMC(
        NETWORKS["linen"], step_size=1e-3, momentum=0.5, spike_variance=0.02, target_sparsity=0.75
    )
    mcmc = MCMC(kernel, num_warmup=100, num_samples=50, progress_bar=False)
    fields = ("mask", "sparsity", "momentum")
    mcmc.warmup(random.key(0), X, LABELS, batch_size=20, extra_fields=fields, collect_warmup=True)
    name = "net/Dense_0.kernel"
    extra = mcmc.get_extra_fields()
    mask, sparsity = np.asarray(extra["mask"][name]), np.asarray(extra["sparsity"])
    assert set(np.unique(mask)) == {0, 1}
    assert (np.diff(mask, axis=0) <= 0).all()
    for tree in (mcmc.get_samples(), extra["momentum"]):
        np.testing.assert_array_equal(np.asarray(tree[name])[mask == 0], 0)
    np.testing.assert_allclose(sparsity, 1 - mask.mean((1, 2)), rtol=1e-6)
    # nothing before 10 %, all by 70 %, and the cubic between, in twelfths
    expected = 0.75 * (1 - (1 - np.clip((np.arange(100) + 1 - 10) / 60, 0, 1)) ** 3)
    np.testing.assert_allclose(sparsity, np.floor(np.round(expected * 12, 3)) / 12, atol=1 / 12 + 1e-6)
    assert not sparsity[:9].any()
    assert sparsity[69] == sparsity[-1] == 0.75
    mcmc.run(mcmc.post_warmup_state.rng_key, X, LABELS, batch_size=20, extra_fields=fields)
    np.testing.assert_array_equal(np.unique(np.asarray(mcmc.get_extra_fields()["mask"][name]), axis=0), mask[-1:])
    assert np.asarray(mcmc.get_samples()[name])[:, mask[-1] == 1].std(0).min() > 0


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_are_pruned_to_the_target(network):
    mcmc = pruned_run(network, sparsity=0.5)
    np.testing.assert_allclose(mcmc.last_state.sparsity, 0.5)
    (name,) = mcmc.sampler.groups
    assert "kernel" in name
    np.testing.assert_array_equal(np.mean(mcmc.get_samples()[name] == 0), 0.5)
    assert mcmc.sampler.pruner.without_scale == ({name} if "BatchNorm" in network else set())


def test_pruning_is_the_same_under_every_chain_method():
    reference = pruned_run(chain_method="vectorized")
    for method in ("sequential", "parallel"):
        other = pruned_run(chain_method=method)
        for a, b in zip(*(jax.tree.leaves(m.last_state.mask) for m in (reference, other)), strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(
            other.get_samples()["net/Dense_0.kernel"], reference.get_samples()["net/Dense_0.kernel"], atol=1e-4
        )


@pytest.mark.parametrize("e_step", ["soft", "gibbs"])
def test_pruning_resumes_from_a_saved_state(e_step):
    whole = pruned_run(num_samples=8, e_step=e_step)
    part = pruned_run(num_samples=4, e_step=e_step)
    state = pickle.loads(pickle.dumps(part.last_state))
    kernel = part.sampler.wrap_model(lambda model: model)  # as it was before its run
    rest = MCMC(kernel, num_warmup=40, num_samples=4, num_chains=2, chain_method="vectorized", progress_bar=False)
    rest.post_warmup_state = state
    rest.run(state.rng_key, X, LABELS, batch_size=20)
    for name, value in rest.get_samples(group_by_chain=True).items():
        np.testing.assert_array_equal(value, whole.get_samples(group_by_chain=True)[name][:, 4:])


def test_a_threshold_that_prunes_nothing_is_told():
    kernel = bdl.SpikeSlabSGHMC(
        regression, step_size=1e-3, groups=W, spike_variance=1e-3, prune_schedule=pruning.threshold(0.006)
    )
    x = SIX[0]
    mcmc = run(kernel, x, 10 * x.sum(1))
    with pytest.warns(UserWarning, match="Nothing was pruned"):
        bdl.inclusion_probabilities(mcmc)


def test_a_threshold_prunes_what_lies_below_it():
    mcmc = pruned_run(
        sparsity=None, prune_schedule=pruning.threshold(0.1), groups={"net/Dense_0.kernel": "neuron_out"}, key=3
    )
    state = mcmc.last_state
    kept = np.asarray(state.mask["net/Dense_0.kernel"])[:, 0] > 0
    square = np.asarray(state.mean_square["net/Dense_0.kernel"])
    largest = square == square.max(1, keepdims=True)  # min_keep=1
    np.testing.assert_array_equal(kept, (square >= 0.1) | largest)
    assert 0 < kept.sum() < kept.size


def test_a_layer_in_front_of_batch_norm_is_judged_by_relative_size():
    """At any scale of the weights the groups are told apart, and stand on the same footing as other layers."""
    mcmc = pruned_run("linen with BatchNorm and dropout", num_warmup=10)
    pruner = mcmc.sampler.pruner
    (name,) = mcmc.sampler.groups
    square = jnp.asarray(np.random.default_rng(0).exponential(size=(3, 4)), jnp.float32)
    small, large = (pruner.comparable(name, factor * square) for factor in (1e-6, 1e3))
    np.testing.assert_allclose(small, large, rtol=1e-5)
    np.testing.assert_allclose(np.mean(small), 1.0, rtol=1e-5)  # the slab variance


def test_groups_by_a_callable_are_pruned_and_told():
    numbers = np.array([0, 0, 1, 1, 2, 2])
    kernel = bdl.SpikeSlabSGHMC(
        regression, step_size=1e-3, groups={"w": lambda site, shape: jnp.asarray(numbers)}, target_sparsity=1 / 3
    )
    mcmc = run(kernel, *SIX, num_chains=2, chain_method="parallel")
    kept = bdl.to_datatree(mcmc)["mask"]["w"].values
    assert kept.shape == (2, 3)
    assert (kept.sum(1) == 2).all()
    np.testing.assert_array_equal(pruning.masks(mcmc)["w"], kept[:, numbers])
    np.testing.assert_array_equal(bdl.inclusion_probabilities(mcmc)["w"][:, 0], kept)


def test_the_warm_up_of_a_chain_is_its_own():
    """A kernel that meanwhile began a longer run, and is told another warm-up, resumes with the mask as it is."""

    def resumed(num_warmup):
        kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-3, groups=W, target_sparsity=0.5)
        first = run(kernel, *SIX, num_warmup=50, num_samples=5)
        other = MCMC(kernel, num_warmup=num_warmup, num_samples=5, progress_bar=False)
        if num_warmup > 50:
            run(kernel, *SIX, num_warmup=num_warmup, num_samples=1)
        other.post_warmup_state = first.last_state
        other.run(first.last_state.rng_key, *SIX, extra_fields=("inclusion", "mask"))
        fields = other.get_extra_fields()
        np.testing.assert_array_equal(fields["inclusion"]["w"], 1)
        np.testing.assert_array_equal(fields["mask"]["w"], np.tile(first.last_state.mask["w"], (5, 1)))
        return np.asarray(other.get_samples()["w"])

    np.testing.assert_array_equal(resumed(50), resumed(500))


@pytest.mark.parametrize(("window", "num_warmup"), [((0.5, 0.51), 40), ((0.5, 0.6), 2), ((0.1, 0.7), 1)])
def test_a_short_window_prunes_too(window, num_warmup):
    kernel = bdl.SpikeSlabSGHMC(
        regression, step_size=1e-3, groups=W, target_sparsity=0.5, prune_schedule=pruning.cubic(*window)
    )
    np.testing.assert_allclose(run(kernel, *SIX, num_warmup=num_warmup).last_state.sparsity, 0.5)


def test_pruning_waits_for_the_spike_to_narrow():
    kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-3, groups=W, target_sparsity=0.5, spike_widening=10.0)
    mcmc = MCMC(kernel, num_warmup=100, num_samples=1, progress_bar=False)
    mcmc.warmup(random.key(0), *SIX, extra_fields=("sparsity",), collect_warmup=True)
    sparsity = np.asarray(mcmc.get_extra_fields()["sparsity"])
    assert not sparsity[:29].any()
    assert sparsity[-1] == 0.5


def test_the_probabilities_are_those_of_the_run_and_not_of_the_kernels_last():
    kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-3, groups=W)
    one = run(kernel, *SIX, scale=1.0)
    before = bdl.inclusion_probabilities(one)["w"]
    run(kernel, *SIX, scale=10.0)
    np.testing.assert_array_equal(bdl.inclusion_probabilities(one)["w"], before)


def test_a_scale_that_a_compiled_program_would_trace_is_refused():
    def run_traced(kernel, *args, **kwargs):
        mcmc = MCMC(kernel, num_warmup=2, num_samples=3, jit_model_args=True, progress_bar=False)
        mcmc.run(random.key(0), *args, **kwargs)
        return mcmc

    with pytest.raises(TypeError, match="makes the prior scale of 'w', an argument of the model, an array"):
        run_traced(bdl.SpikeSlabSGHMC(regression, step_size=1e-3, groups=W), *SIX, scale=2.0)
    bound = bdl.SpikeSlabSGHMC(partial(regression, scale=2.0), step_size=1e-3, groups=W)
    draws = run(bound, *SIX, num_warmup=2, num_samples=3).get_samples()["w"]
    np.testing.assert_allclose(run_traced(bound, *SIX).get_samples()["w"], draws, rtol=1e-5)
    # a network, in whose prior the traced data have no part
    network = bdl.SpikeSlabSGHMC(NETWORKS["linen with BatchNorm and dropout"], step_size=1e-4)
    assert run_traced(network, X, LABELS).last_state.i == 5


# ---- what a run says ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part in the Zarr format 3")
def test_tree_of_a_run(tmp_path):
    groups = {"net/Dense_0.kernel": "neuron_in", "net/Dense_1.kernel": "unstructured"}
    mcmc = pruned_run(groups=groups, sparsity=0.4)
    tree = bdl.to_datatree(mcmc)
    inclusion, mask = tree["inclusion"], tree["mask"]
    assert inclusion["net.Dense_0.kernel"].dims == ("chain", "draw", "group_net.Dense_0.kernel")
    assert list(inclusion["group_net.Dense_1.kernel"].values[:3]) == ["0,0", "0,1", "1,0"]
    kept = np.asarray(mcmc.last_state.mask["net/Dense_0.kernel"])[:, :, 0]
    np.testing.assert_array_equal(mask["net.Dense_0.kernel"], kept)
    np.testing.assert_array_equal(inclusion["net.Dense_0.kernel"][:, 0], mask["net.Dense_0.kernel"])
    np.testing.assert_allclose(tree["inclusion_rate"]["net.Dense_1.kernel"], 0.5)
    np.testing.assert_allclose(tree["sample_stats"]["sparsity"][:, 0], mcmc.last_state.sparsity)
    without = bdl.to_datatree(mcmc, weights=False)
    assert "inclusion" not in without.children
    assert {"mask", "inclusion_rate"} <= set(without.children)
    tree.to_zarr(tmp_path / "run.zarr")
    tree.to_netcdf(tmp_path / "run.nc")
    for name in ("run.zarr", "run.nc"):
        with xarray.open_datatree(tmp_path / name) as read:
            xarray.testing.assert_equal(read.load(), tree)
            assert read["mask"]["net.Dense_0.kernel"].dtype == bool
    assert tree.attrs["temperature"] == 1


def test_tree_without_pruning_has_the_probabilities_of_each_draw():
    kernel = bdl.SpikeSlabSGHMC(TARGET.model, step_size=0.01, groups=W)
    mcmc = run(kernel, TARGET.y, num_chains=2, extra_fields=("inclusion",))
    tree = bdl.to_datatree(mcmc)
    np.testing.assert_allclose(
        tree["inclusion"]["w"], mcmc.get_extra_fields(group_by_chain=True)["inclusion"]["w"], rtol=1e-5
    )
    assert "mask" not in tree.children
    assert np.isfinite(az.ess(tree["inclusion"].to_dataset())["w"]).all()


# ---- warnings and errors ------------------------------------------------------------------------------------------


def test_temperature_is_told_once():
    with pytest.warns(UserWarning, match=r"at temperature=0.5 .* tempered posterior") as caught:
        kernel = bdl.SpikeSlabSGHMC(TARGET.model, step_size=0.01, groups=W, temperature=0.5)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mcmc = run(kernel, TARGET.y)
    assert bdl.to_datatree(mcmc).attrs["temperature"] == 0.5


def test_a_collapsed_rate_is_told():
    """Nothing to include, and a prior with nearly all its weight at 0."""
    x = random.normal(random.key(0), (50, 30))
    kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-3, groups=W, inclusion=dist.Beta(1.0, 1e6))
    mcmc = run(kernel, x, random.normal(random.key(1), (50,)), num_warmup=3000)
    with pytest.warns(UserWarning, match=r"inclusion rate of 'w' has collapsed to its floor, 0.0001"):
        bdl.inclusion_probabilities(mcmc)


def test_the_floor_of_a_rate_is_that_of_its_prior():
    """Beta(2, 1000) on 30 groups of which none is included: (2 - 1) / (2 + 1000 + 30 - 2)."""
    x = random.normal(random.key(0), (50, 30))
    kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-3, groups=W, inclusion=dist.Beta(2.0, 1000.0))
    mcmc = run(kernel, x, random.normal(random.key(1), (50,)), num_warmup=3000)
    with pytest.warns(UserWarning, match=r"inclusion rate of 'w' has collapsed to its floor, 0.000971"):
        bdl.inclusion_probabilities(mcmc)


def test_a_bad_chain_says_nothing_of_inclusion():
    x, y = SIX
    start = {"w": jnp.zeros((2, 6)).at[1].set(1e30)}  # whose square is infinite
    for sparsity in (None, 0.5):
        kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-4, groups=W, target_sparsity=sparsity)
        mcmc = run(kernel, x, y, num_chains=2, init_params=start)
        with pytest.warns(UserWarning, match="Chain 1 met a gradient that was not finite"):
            inclusion = bdl.inclusion_probabilities(mcmc)["w"]
        assert np.isfinite(inclusion[0]).all()
        assert np.isnan(inclusion[1]).all()
        reported = mcmc.get_extra_fields(group_by_chain=True).get("sparsity")
        assert reported is None or np.isnan(reported[1]).all()
    with pytest.warns(UserWarning, match="Chain 1 met"):
        assert not pruning.masks(mcmc)["w"][1].any()


def test_a_threshold_under_the_noise_is_told():
    with pytest.warns(UserWarning, match=r"threshold 0.01 lies under the noise of the spike of 'net/Dense_0.kernel'"):
        pruned_run(sparsity=None, prune_schedule=pruning.threshold(0.01))


@pytest.mark.parametrize(("step", "text"), [(0.03, "3.72 times too large"), (0.05, "no bound")])
def test_a_spike_too_stiff_for_the_step_is_told(step, text):
    kernel = bdl.SpikeSlabSGHMC(TARGET.model, step_size=step, groups=W, spike_variance=0.0108, momentum=0.9)
    with pytest.warns(UserWarning, match=rf"step, {step}, is long for the spike of 'w'.*{text}"):
        run(kernel, TARGET.y)


def test_an_emptied_layer_is_told():
    groups = {"net/Dense_0.kernel": "unstructured", "net/Dense_1.kernel": "unstructured"}
    mcmc = pruned_run(groups=groups, sparsity=0.9)
    with pytest.warns(UserWarning, match=r"'net/Dense_\d.kernel' was pruned down to 1 of its \d+ groups"):
        bdl.inclusion_probabilities(mcmc)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"groups": {}}, TypeError, "groups must be a dict"),
        ({"groups": "w"}, TypeError, "groups must be a dict"),
        ({"slab_variance": 0.0}, ValueError, "slab_variance must be a number in"),
        ({"spike_variance": -1.0}, ValueError, "spike_variance must be a number in"),
        ({"e_step": "firm"}, ValueError, "e_step must be one of 'soft', 'hard', 'gibbs'"),
        ({"e_step_every": 0}, ValueError, "e_step_every must be an integer of at least 1"),
        ({"momentum": 1.0}, ValueError, "momentum must be a number in"),
        ({"spike_widening": 0.5}, ValueError, "spike_widening must be a number in"),
        ({"inclusion": 1.0}, ValueError, "inclusion must be a number in"),
        ({"inclusion": dist.Beta(0.5, 1.0)}, ValueError, "a Beta with two numbers of at least 1"),
        ({"inclusion": dist.Beta(jnp.ones(2), 1.0)}, ValueError, "a Beta with two numbers"),
        ({"inclusion": dist.Uniform()}, TypeError, "a number in .* or a Beta, got Uniform"),
        ({"target_sparsity": 1.0}, ValueError, "target_sparsity must be a number in"),
        (
            {"spike_widening": 5.0, "target_sparsity": 0.5, "prune_schedule": pruning.cubic()},
            ValueError,
            "pruning starts at 0.1 of the warm-up, but with spike_widening the spike is wide until 0.3",
        ),
        ({"target_sparsity": -0.1}, ValueError, "target_sparsity must be a number in"),
        ({"prune_schedule": 0.9}, TypeError, "prune_schedule must be pruning.cubic"),
        ({"prune_schedule": pruning.cubic()}, ValueError, "needs a target_sparsity"),
        (
            {"prune_schedule": pruning.threshold(0.1), "target_sparsity": 0.5},
            ValueError,
            "given beside pruning.threshold",
        ),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        bdl.SpikeSlabSGHMC(TARGET.model, step_size=0.01, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"groups": {"v*": "unstructured"}}, r"groups names 'v\*', which matches no latent site .* w\."),
        ({"groups": {"w": "unstructured", "*": "unstructured"}}, r"groups overlap: 'w' is matched by 'w' and by '\*'"),
        ({"groups": {"w": "rows"}}, "must be one of 'unstructured', 'neuron_in'.*, or a callable, got 'rows'"),
        ({"groups": {"w": "neuron_in"}}, r"kind 'neuron_in' are for arrays \(in, out\), but 'w' has shape \(2,\)"),
        ({"groups": None}, r"the model has no network, .* groups=\{'w': 'unstructured'\}"),
        ({"spike_variance": 2.0}, "the spike variance is 2, the slab variance 2"),
        ({"spike_widening": 150.0}, "0.02 times spike_widening=150, the slab variance 2"),
        ({"target_sparsity": 0.9}, "target_sparsity=0.9 would empty a layer: .* at most 0.5 of the weights"),
    ],
)
def test_what_does_not_fit_the_model(arguments, text):
    kernel = bdl.SpikeSlabSGHMC(TARGET.model, step_size=0.001, **{"groups": W, **arguments})
    for _ in range(2):  # the second time too
        with pytest.raises(ValueError, match=text):
            run(kernel, TARGET.y)


@pytest.mark.parametrize(
    ("prior", "text"),
    [
        (lambda: dist.Laplace(0.0, 1.0), "of the family Laplace"),
        (lambda: dist.Normal(1.0, 1.0), "a Normal with a location other than 0"),
        (lambda: dist.Normal(0.0, numpyro.sample("s", dist.HalfNormal())), "depends on other latent sites"),
        (lambda: dist.Normal(0.0, jnp.array([1.0, 2.0])), "whose scale differs between its entries"),
        (lambda: dist.StudentT(3.0), "of the family StudentT"),
    ],
)
def test_other_priors_are_refused_by_name(prior, text):
    def model(y):
        w = numpyro.sample("w", prior().expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(w.sum(), 1), obs=y)

    with pytest.raises(ValueError, match=f"the prior of 'w' is .*{text}"):
        run(bdl.SpikeSlabSGHMC(model, step_size=0.01, groups=W), jnp.zeros(3))


@pytest.mark.parametrize("strategy", [init_to_feasible(), init_to_value(values={"s": 1.0, "w": jnp.zeros(2)})])
def test_a_latent_scale_is_seen_whatever_the_start(strategy):
    def model(y):
        w = numpyro.sample("w", dist.Normal(0.0, numpyro.sample("s", dist.HalfNormal())).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(w.sum(), 1), obs=y)

    with pytest.raises(ValueError, match="the prior of 'w' is .* depends on other latent sites"):
        run(bdl.SpikeSlabSGHMC(model, step_size=0.01, groups=W, init_strategy=strategy), jnp.zeros(3))


def test_what_adapts_says_so_without_warm_up():
    kernel = bdl.SpikeSlabSGHMC(regression, step_size=1e-3, groups=W, inclusion=dist.Beta(1, 6), spike_widening=2.0)
    with pytest.warns(UserWarning, match="inclusion is learned and the spike is widened in warm-up, and num_warmup=0"):
        run(kernel, *SIX, num_warmup=0)


def test_a_large_preconditioner_is_told():
    fixed = bdl.preconditioners.fixed({"w": np.array([1.0, 8.0])})
    kernel = bdl.SpikeSlabSGHMC(TARGET.model, step_size=0.005, groups=W, preconditioner=fixed)
    with pytest.warns(UserWarning, match="step, 0.005, is long for the spike"):
        run(kernel, TARGET.y)
    # adapted to curvatures that differ, with a step that is half of the largest that is stable at preconditioner 1
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6)) * np.r_[30.0, np.ones(5)], jnp.float32)
    kernel = bdl.SpikeSlabSGHMC(
        regression, step_size=1e-5, groups=W, spike_variance=1e-5, preconditioner=bdl.preconditioners.rms()
    )
    mcmc = run(kernel, x, x[:, 0])
    with pytest.warns(UserWarning, match="The preconditioner makes the steps long for the spike of 'w'"):
        bdl.inclusion_probabilities(mcmc)


def test_a_temperature_schedule_at_its_end_is_an_attribute():
    kernel = bdl.SpikeSlabSGHMC(
        TARGET.model, step_size=0.01, groups=W, temperature=lambda i: jnp.where(i < 50, 0.1, 0.5)
    )
    assert bdl.to_datatree(run(kernel, TARGET.y)).attrs["temperature"] == 0.5


def test_a_scaled_prior_is_refused():
    def model(y):
        with numpyro.handlers.scale(scale=0.5):
            w = numpyro.sample("w", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(w, 1), obs=y)

    with pytest.raises(ValueError, match=r"the prior of 'w' is a Normal scaled by handlers\.scale"):
        run(bdl.SpikeSlabSGHMC(model, step_size=0.01, groups=W), jnp.zeros(3))


def test_pruning_without_warm_up_is_refused_every_time():
    kernel = bdl.SpikeSlabSGHMC(TARGET.model, step_size=0.001, groups=W, target_sparsity=0.5)
    run(kernel, TARGET.y, num_warmup=10)
    with pytest.raises(ValueError, match="pruning happens in warm-up"):
        run(kernel, TARGET.y, num_warmup=0)


def test_only_its_own_runs_have_inclusion_probabilities():
    with pytest.raises(ValueError, match="needs a run of SpikeSlabSGHMC, got one of SGLD"):
        bdl.inclusion_probabilities(run(bdl.SGLD(TARGET.model, step_size=0.01), TARGET.y))
    kernel = bdl.SpikeSlabSGHMC(TARGET.model, step_size=0.01, groups=W)
    with pytest.raises(ValueError, match="holds no draws yet"):
        bdl.inclusion_probabilities(MCMC(kernel, num_warmup=1, num_samples=1))
    with pytest.raises(ValueError, match="The run has no mask"):
        pruning.masks(run(kernel, TARGET.y))
