# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Diagnostics of stochastic-gradient samplers, against processes whose bias, noise and temperature are known."""

from functools import partial

import exact
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.infer import HMC, MCMC, NUTS
from targets import Location

import numpyro_bdl as bdl
from numpyro_bdl import diagnostics
from numpyro_bdl.symmetry import UnitGroups, Units

TARGET = Location.make([2.0, 6.0])
BATCH = 4
P = np.array([0.4, 0.9])
EXCHANGE = UnitGroups.of({"w": jnp.ones(3)}, {"three": Units(writes={"w": 0}, reads={})})
metric = bdl.preconditioners.fixed({"w": P})


def run(kernel, *args, warmup=30, draws=30, chains=100, seed=0, extra_fields=(), **kwargs):
    method = "vectorized" if chains > 1 else "sequential"
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method=method, progress_bar=False
    )
    mcmc.run(random.key(seed), *args, extra_fields=extra_fields, **kwargs)
    return mcmc


def normal_model(scale=1.0, size=2, loc=0.0):
    numpyro.sample("w", dist.Normal(loc, scale).expand([size]).to_event(1))


def exchangeable():
    w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
    numpyro.factor("y", -jnp.sum(w**4) / 10)


@pytest.fixture(scope="module")
def sgld():
    return run(bdl.SGLD(TARGET.model, step_size=0.05, steps_per_draw=5), TARGET.y, batch_size=BATCH)


def autoregression(rng, decay, sd, chains, draws, size):
    """A stationary AR(1) process of this standard deviation."""
    path = [sd * rng.normal(size=(chains, size))]
    for _ in range(draws - 1):
        path.append(decay * path[-1] + sd * np.sqrt(1 - decay**2) * rng.normal(size=(chains, size)))
    return np.stack(path, 1)


# ---- spread of functions ---------------------------------------------------------------------------------------------


def test_function_spread_is_its_equation():
    rng = np.random.default_rng(0)
    functions = np.sin(np.arange(12.0)).reshape(6, 2) * [1, 5] + 0.3 * rng.normal(size=(3, 40, 6, 2))
    found = diagnostics.function_spread(functions)
    for chain in range(3):
        variances = [functions[chain, :, n, k].var(ddof=1) for n in range(6) for k in range(2)]
        means = [functions[chain, :, n, k].mean() for n in range(6) for k in range(2)]
        assert found.relative[chain] == pytest.approx(np.sqrt(np.mean(variances) / np.var(means)))
    assert not found.still.any()
    shifted = diagnostics.function_spread(1000 + 7 * functions)
    np.testing.assert_allclose(shifted.relative, found.relative)
    fixed = np.concatenate([functions, np.zeros((3, 40, 6, 1))], -1)  # the last logit of a softmax
    np.testing.assert_allclose(diagnostics.function_spread(fixed).relative, found.relative)
    two = diagnostics.function_spread({"a": functions, "b": 1e-3 * functions + np.arange(6)[:, None]})
    np.testing.assert_allclose(two.relative, found.relative)


def test_a_function_that_is_the_same_everywhere_is_compared_with_its_size():
    location = 5 + np.random.default_rng(0).normal(size=(1, 2000, 1))
    found = diagnostics.function_spread(np.repeat(location, 8, 2))
    assert abs(found.relative[0] - 0.2) < 4 * 0.2 / np.sqrt(2 * 2000) + 4 * 0.2 * 0.2 / np.sqrt(2000)


def test_function_spread_warns_of_an_optimizer_whose_rhat_is_fine():
    rng = np.random.default_rng(0)
    functions = np.sin(np.arange(20.0)) + 0.1 * rng.normal(size=(4, 100, 20))
    functions[[1, 3]] = np.sin(np.arange(20.0)) + 1e-5 * rng.normal(size=(2, 100, 20))
    with pytest.warns(UserWarning, match=r"2 of 4 chains hardly differ .* 1 \(1.*e-05\), 3 .*is an optimizer"):
        found = diagnostics.function_spread(functions)
    assert found.still.tolist() == [False, True, False, True]
    assert not diagnostics.function_spread(functions, threshold=1e-6).still.any()
    with pytest.warns(UserWarning, match="4 of 4 chains hardly differ"):
        summary = diagnostics.function_summary(np.sin(np.arange(20.0)) + 1e-5 * rng.normal(size=(4, 100, 20)))
    assert summary.rhat_max < 1.05
    assert summary.spread_min < 1e-4


def test_a_run_at_a_temperature_of_almost_zero_stands_still():
    kernel = bdl.SGLD(TARGET.model, step_size=0.05, temperature=1e-10, minibatch="full")
    cold = run(kernel, TARGET.y, warmup=200, draws=10, chains=3)
    with pytest.warns(UserWarning, match="3 of 3 chains"):
        diagnostics.function_spread(cold)


def test_function_spread_refuses_bad_input():
    functions = np.random.default_rng(0).normal(size=(3, 10, 4))
    functions[1, 5, 2] = np.nan
    with pytest.raises(ValueError, match=r"chains \[1\] have values at 'functions' that are not finite"):
        diagnostics.function_spread(functions)
    with pytest.raises(ValueError, match="threshold must be a number"):
        diagnostics.function_spread(functions, threshold=0)
    with pytest.raises(ValueError, match="at least 2 draws"):
        diagnostics.function_spread(functions[:, :1])
    tree = bdl.to_datatree(run(bdl.SGLD(normal_model, step_size=0.1), chains=2, draws=4))
    assert "functions" not in tree.children
    with pytest.raises(ValueError, match=r"no group 'functions'.*numpyro_bdl.to_datatree makes them"):
        diagnostics.function_spread(tree)


# ---- bias of the step ------------------------------------------------------------------------------------------------


def test_step_bias_of_langevin_chains_in_numpy():
    """SGLD on N(0, 1) is AR(1) with 1 - a and the variance 1 / (1 - a / 2); seen after 2 steps of a or 4 of a / 2."""
    rng, a, size, chains, draws = np.random.default_rng(0), 0.6, 60, 4, 1500
    variances = np.array([1 / (1 - a / 2), 1 / (1 - a / 4)])
    decays = np.array([(1 - a) ** 2, (1 - a / 2) ** 4])
    one, half = (
        autoregression(rng, r, np.sqrt(v), chains, draws, size) for r, v in zip(decays, variances, strict=True)
    )
    bias = diagnostics.step_bias({"x": one}, {"x": half})
    count = chains * draws
    exact_mean_error = np.sqrt(np.sum(variances * (1 + decays) / (1 - decays)) / count)
    exact_variance_error = np.sqrt(np.sum(2 * variances**2 * (1 + decays**2) / (1 - decays**2)) / count)
    for found, wanted in ((bias.mean_error["x"], exact_mean_error), (bias.variance_error["x"], exact_variance_error)):
        assert abs(np.median(found) / wanted - 1) < 4 * found.std() / wanted / np.sqrt(size) + 0.02
    within = 4 / np.sqrt(2 * size)  # of the root mean square of standard normals
    shifted = (bias.variance["x"] - (variances[0] - variances[1])) / exact_variance_error
    assert abs(np.sqrt(np.mean(shifted**2)) - 1) < within
    assert abs(np.mean(shifted)) < 4 / np.sqrt(size)
    assert abs(bias.mean_rms_z - 1) < within
    assert bias.variance_rms_z > 5
    np.testing.assert_allclose(bias.variance_z["x"], bias.variance["x"] / bias.variance_error["x"])
    np.testing.assert_allclose(bias.mean["x"], one.mean((0, 1)) - half.mean((0, 1)), atol=1e-12)
    np.testing.assert_allclose(bias.sd["x"], half.std((0, 1)))


def test_step_bias_of_equal_laws_and_of_values_that_never_change():
    rng = np.random.default_rng(0)
    one, half = rng.normal(size=(2, 4, 500, 50))
    one[..., 7] = half[..., 7] = 3.0
    bias = diagnostics.step_bias(one, half)
    assert abs(bias.variance_rms_z - 1) < 4 / np.sqrt(2 * 49)
    assert np.isnan(bias.mean_z["functions"][7])
    assert bias.mean["functions"][7] == 0


@pytest.mark.parametrize("kernel", ["SGLD", "SGHMC"])
def test_half_step_finds_the_bias_of_a_kernel(kernel):
    """With minibatch noise, along both directions, against the covariances at both steps."""
    a, law, options = {
        "SGLD": (0.12, lambda a: exact.sgld(TARGET.curvature, a, V=V), {}),
        "SGHMC": (0.2, lambda a: exact.sghmc(TARGET.curvature, a, 0.5, V=V)[:2, :2], {"momentum": 0.5}),
    }[kernel]
    V = TARGET.gradient_noise(BATCH)
    made = getattr(bdl, kernel)(TARGET.model, step_size=a, steps_per_draw=15, **options)
    mcmc = run(made, TARGET.y, batch_size=BATCH, draws=60, warmup=5)
    half = diagnostics.half_step(mcmc, random.key(1))
    assert half.last_state.step_size[0] == np.float32(a / 2)
    assert int(half.last_state.i[0]) == 2 * int(mcmc.last_state.i[0])
    assert made._schedule.step_size == a
    bias = diagnostics.step_bias(mcmc, half, group="posterior")
    wanted = np.diag(law(a)) - np.diag(law(a / 2))
    assert np.all(np.abs(bias.variance["w"] - wanted) < 4 * bias.variance_error["w"])
    assert np.all(bias.variance_error["w"] < wanted / 3)
    assert np.all(np.abs(bias.mean_z["w"]) < 4)


def test_half_step_goes_through_schedules_at_half_speed():
    y, at = TARGET.y, np.arange(40)
    schedule = optax.exponential_decay(0.05, 10, 0.5)
    kernel = bdl.SGLD(TARGET.model, step_size=schedule, steps_per_draw=3, temperature=lambda i: 1 + 1 / (1 + i))
    mcmc = run(kernel, y, chains=2, draws=4, warmup=2)
    half = diagnostics.half_step(mcmc, random.key(1)).sampler
    np.testing.assert_allclose(jax.vmap(half._schedule)(2 * at), jax.vmap(schedule)(at) / 2)
    np.testing.assert_allclose(half._temperature(2 * at), kernel._temperature(at))
    assert half._schedule.steps_per_draw == 6

    cycles = bdl.cyclical(0.05, steps_per_cycle=20, draws_per_cycle=2)
    kernel = bdl.FlatBasinSGLD(TARGET.model, step_size=cycles, anchor_steps=30)
    mcmc = run(kernel, y, chains=2, draws=4, warmup=2)
    half = diagnostics.half_step(mcmc, random.key(1))
    assert half.sampler.eta == kernel.eta
    np.testing.assert_allclose(jax.vmap(half.sampler._schedule)(2 * at), jax.vmap(cycles)(at) / 2)
    assert int(half.last_state.i[0]) == 2 * int(mcmc.last_state.i[0])


def test_half_step_begins_where_the_run_ended_and_reaches_into_a_wrapped_kernel():
    kernel = bdl.SymmetryRestricted(bdl.SGLD(exchangeable, step_size=1e-10), EXCHANGE)
    mcmc = run(kernel, chains=2, draws=4, warmup=0)
    half = diagnostics.half_step(mcmc, random.key(1))
    assert half.sampler.kernel._schedule.step_size == 5e-11
    np.testing.assert_allclose(half.get_samples(group_by_chain=True)["w"][:, 0], mcmc.last_state.z["w"], atol=1e-3)
    single = run(bdl.SGLD(normal_model, step_size=1e-10), chains=1, draws=4, warmup=0)
    half = diagnostics.half_step(single, random.key(1))
    np.testing.assert_allclose(half.get_samples()["w"][0], single.last_state.z["w"], atol=1e-3)


def test_half_step_refuses_what_has_no_step_to_halve():
    nuts = run(NUTS(normal_model), chains=1, draws=4, warmup=4)
    with pytest.raises(TypeError, match="about the step of a stochastic-gradient kernel of numpyro_bdl, and NUTS"):
        diagnostics.half_step(nuts, random.key(0))
    ensemble = run(bdl.WGFEnsemble(normal_model, optimizer=optax.sgd(1e-2), langevin=False), chains=2, draws=4)
    with pytest.raises(ValueError, match="is moved by an optimizer"):
        diagnostics.half_step(ensemble, random.key(0))
    with pytest.raises(TypeError, match="half_step needs a run, a numpyro.infer.MCMC object, got dict"):
        diagnostics.half_step({}, random.key(0))
    fresh = MCMC(bdl.SGLD(normal_model, step_size=0.1), num_warmup=1, num_samples=1, progress_bar=False)
    with pytest.raises(ValueError, match="half_step: the MCMC object holds no draws yet; run it first"):
        diagnostics.half_step(fresh, random.key(0))
    diverged = run(bdl.SGLD(normal_model, step_size=1e30), chains=2, draws=10)
    with pytest.raises(ValueError, match=r"half_step: the chains \[0, 1\] met a gradient that was not finite"):
        diagnostics.half_step(diverged, random.key(0))


def test_step_bias_refuses_bad_input():
    values = np.random.default_rng(0).normal(size=(2, 20, 5))
    with pytest.raises(ValueError, match="must have the same values, got .*give to_datatree the same probe"):
        diagnostics.step_bias(values, values[..., :4])
    bad = values.copy()
    bad[1, 3, 0] = np.inf
    with pytest.raises(ValueError, match=r"chains \[1\] of the run at half the step have values at 'functions'"):
        diagnostics.step_bias(values, bad)
    with pytest.raises(ValueError, match="at least 4 draws"):
        diagnostics.step_bias(values[:, :3], values[:, :3])


# ---- minibatch noise -------------------------------------------------------------------------------------------------


def standard_error(rows, batch, samples):
    """Relative standard error of a sample variance of means of so many rows, by the kurtosis of the rows."""
    centered = rows - rows.mean(0)
    excess = (centered**4).mean(0) / (centered**2).mean(0) ** 2 - 3
    return np.sqrt(2 / (samples - 1) + np.maximum(excess, 0) / batch / samples)


@pytest.mark.parametrize(
    ("make", "noise_scale"),
    [
        (partial(bdl.SGHMC, momentum=0.8, temperature=0.25), 20.0),
        (partial(bdl.FlatBasinSGLD, eta=1.0, coupling="euler", momentum=0.5), 2.0),
        (partial(bdl.WGFEnsemble, kl=2.0), 0.5),
    ],
    ids=["SGHMC", "flat basin", "ensemble"],
)
def test_gradient_noise_is_that_of_the_rows(make, noise_scale):
    """V is N^2 / B times the covariance of the gradients of the rows, which are the same everywhere."""
    kernel = make(TARGET.model, step_size=0.01, preconditioner=metric)
    mcmc = run(kernel, TARGET.y, batch_size=BATCH, chains=3, draws=10)
    noise = diagnostics.gradient_noise(mcmc, random.key(1), num_batches=80, num_draws=10)
    root = np.diag(np.sqrt(P))
    wanted = noise_scale * 0.01 / 2 * root @ TARGET.gradient_noise(BATCH) @ root
    error = standard_error(np.asarray(TARGET.y, float) @ TARGET.L, BATCH, 800)
    assert np.all(np.abs(noise.ratio["w"] / np.diag(wanted) - 1) < 4 * error)
    assert noise.sites["w"] == pytest.approx(noise.ratio["w"].mean())
    assert noise.mean == pytest.approx(noise.ratio["w"].mean())
    top = np.linalg.eigvalsh(wanted)[-1]
    # the bias upwards is of the order of d / K
    assert -4 * error.max() < noise.worst / top - 1 < 4 * error.max() + 2 / 80
    assert abs(noise.worst_held_out / top - 1) < 4 * np.sqrt(2) * error.max() + 2 / 80
    assert noise.worst_held_out < noise.worst


def test_gradient_noise_of_a_linear_regression_at_its_draws():
    """There it depends on the position: rows x_i (x_i w - y_i)."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=40)

    def model(x, y, batch_size=None):
        w = numpyro.sample("w", dist.Normal().expand([3]).to_event(1))
        with numpyro.plate("data", len(x), subsample_size=batch_size):
            xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", dist.Normal(xb @ w, 0.5), obs=yb)

    mcmc = run(bdl.SGLD(model, step_size=1e-3), jnp.asarray(x), jnp.asarray(y), batch_size=10, chains=2, draws=1)
    noise = diagnostics.gradient_noise(mcmc, random.key(0), num_batches=200, num_draws=2)
    wanted, errors = [], []
    for w in np.asarray(mcmc.get_samples()["w"], float):
        rows = x * ((x @ w - y) / 0.5**2)[:, None]
        wanted.append(1e-3 / 2 * 40**2 / 10 * np.cov(rows.T, bias=True))
        errors.append(np.diag(wanted[-1]) * standard_error(rows, 10, 200))
    exact_ratio = np.mean([np.diag(v) for v in wanted], 0)
    assert np.all(np.abs(noise.ratio["w"] - exact_ratio) < 4 * np.sqrt(np.sum(np.square(errors), 0)) / 2)


def test_gradient_noise_without_replacement_and_without_noise():
    epoch = run(bdl.SGLD(TARGET.model, step_size=0.01, minibatch="epoch"), TARGET.y, batch_size=BATCH, chains=2)
    noise = diagnostics.gradient_noise(epoch, random.key(1), num_batches=200, num_draws=4)
    wanted = 0.01 / 2 * np.diag(TARGET.gradient_noise(BATCH)) * (8 - BATCH) / (8 - 1)
    error = standard_error(np.asarray(TARGET.y, float) @ TARGET.L, BATCH, 800)
    assert np.all(np.abs(noise.ratio["w"] / wanted - 1) < 4 * error)
    full = run(bdl.SGLD(TARGET.model, step_size=0.01, minibatch="full"), TARGET.y, batch_size=BATCH, chains=2)
    noise = diagnostics.gradient_noise(full, random.key(1))
    assert max(noise.worst, noise.mean, noise.worst_held_out) < 1e-12 * wanted.min()


def test_perturbed_positions_are_part_of_the_gradient_noise():
    """On a quadratic energy of curvature A they add sigma^2 A^2."""
    mcmc = run(bdl.PerturbedSGLD(TARGET.model, step_size=0.01, sigma=0.3, minibatch="full"), TARGET.y, chains=2)
    noise = diagnostics.gradient_noise(mcmc, random.key(1), num_batches=200, num_draws=4)
    wanted = 0.01 / 2 * 0.3**2 * np.diag(TARGET.curvature @ TARGET.curvature)
    assert np.all(np.abs(noise.ratio["w"] / wanted - 1) < 4 * np.sqrt(2 / 800))


def test_the_worst_direction_is_bracketed_where_batches_are_few():
    """White noise in many dimensions: the sample eigenvalue is far too large, the held-out one is not."""

    def model(y, batch_size=None):
        w = numpyro.sample("w", dist.Normal().expand([100]).to_event(1))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            numpyro.sample("y", dist.Normal(w, 1).to_event(1), obs=numpyro.subsample(y, event_dim=1))

    y = random.normal(random.key(0), (2000, 100))
    mcmc = run(bdl.SGLD(model, step_size=1e-5), y, batch_size=50, chains=1, draws=4)
    noise = diagnostics.gradient_noise(mcmc, random.key(1), num_batches=20, num_draws=4)
    top = 1e-5 / 2 * 2000**2 / 50 * np.linalg.eigvalsh(np.cov(y.T, bias=True))[-1]
    assert noise.worst_held_out < top < noise.worst
    assert noise.worst / top > 3


def test_gradient_noise_refuses_bad_input(sgld):
    with pytest.raises(ValueError, match="num_batches must be an integer of at least 4"):
        diagnostics.gradient_noise(sgld, random.key(0), num_batches=2)
    with pytest.raises(ValueError, match="num_draws must be an integer of at least 1"):
        diagnostics.gradient_noise(sgld, random.key(0), num_draws=0)
    hmc = run(HMC(normal_model), chains=1, draws=4, warmup=4)
    with pytest.raises(TypeError, match="gradient_noise is about the step of .* and HMC is none"):
        diagnostics.gradient_noise(hmc, random.key(0))
    ensemble = run(bdl.WGFEnsemble(normal_model, step_size=0.1, langevin=False), chains=2, draws=4)
    with pytest.raises(ValueError, match=r"this WGFEnsemble injects no noise \(temperature 0\)"):
        diagnostics.gradient_noise(ensemble, random.key(0))


# ---- effective temperature -------------------------------------------------------------------------------------------


def assert_temperature(found, wanted, precision=0.05):
    assert abs(found.value - wanted) < 4 * found.error
    assert found.error < precision * wanted


@pytest.mark.parametrize(("b", "batch"), [(0.2, BATCH), (0.9, None)])
def test_temperatures_of_sghmc_are_those_of_its_law_at_the_step(b, batch):
    a, T, A = 0.3, 0.7, TARGET.curvature
    V = None if batch is None else TARGET.gradient_noise(batch)
    C = exact.sghmc(A, a, b, T=T, P=P, V=V)
    configurational = np.trace(A @ C[:2, :2]) / 2
    kinetic = (1 + b) / (2 * a) * np.trace(np.diag(P) @ C[2:, 2:]) / 2
    # the two agree at any step, for each coordinate
    np.testing.assert_allclose(np.diag(A @ C[:2, :2]), (1 + b) / (2 * a) * P * np.diag(C[2:, 2:]))
    assert kinetic > 1.04 * T

    kernel = bdl.SGHMC(TARGET.model, step_size=a, momentum=b, temperature=T, preconditioner=metric, steps_per_draw=20)
    mcmc = run(kernel, TARGET.y, batch_size=batch, draws=60, extra_fields=("momentum",))
    by_momenta = diagnostics.kinetic_temperature(mcmc)
    assert_temperature(by_momenta, kinetic, precision=0.02)
    assert by_momenta.nominal == pytest.approx(T)
    assert by_momenta.z_score == pytest.approx((by_momenta.value - T) / by_momenta.error, rel=1e-5)
    by_positions = diagnostics.configurational_temperature(mcmc)
    assert_temperature(by_positions, configurational, precision=0.02)
    assert by_positions.sites["w"] == pytest.approx((by_positions.value, by_positions.error))


@pytest.mark.parametrize("minibatch", ["full", "independent"])
def test_configurational_temperature_of_sgld_by_its_steps(sgld, minibatch):
    """T + a (<|grad U|^2> + tr V) / (2 d), and that of the law at the step."""
    a, A, V = 0.05, TARGET.curvature, TARGET.gradient_noise(BATCH)
    C = exact.sgld(A, a, V=V)
    wanted = np.trace(A @ C) / 2
    assert wanted == pytest.approx(1 + a / 4 * (np.trace(A @ C @ A) + np.trace(V)))
    for center in ("mean", "origin"):
        found = diagnostics.configurational_temperature(sgld, random.key(3), center=center, minibatch=minibatch)
        assert_temperature(found, wanted)
        assert found.nominal == 1


def test_centering_takes_the_noise_away_where_the_posterior_is_far_from_zero():
    mcmc = run(bdl.SGLD(partial(normal_model, loc=50.0), step_size=0.2, steps_per_draw=15), warmup=10)
    about_mean, about_zero = (diagnostics.configurational_temperature(mcmc, center=c) for c in ("mean", "origin"))
    assert_temperature(about_mean, 1 / (1 - 0.2 / 2), precision=0.03)
    assert abs(about_zero.value - 1 / (1 - 0.2 / 2)) < 4 * about_zero.error
    assert about_zero.error > 20 * about_mean.error


def test_configurational_temperature_by_site_and_in_unconstrained_space():
    """Independent draws from the prior are put in place of those of a run."""

    def model():
        numpyro.sample("a", dist.Normal(0, 3).expand([4]).to_event(1))
        scale = numpyro.sample("b", dist.LogNormal(0, 0.5))
        numpyro.sample("c", dist.Uniform(-scale, scale))

    mcmc = run(HMC(model, trajectory_length=0.1), warmup=0, draws=200, chains=5)
    prior = numpyro.infer.Predictive(model, num_samples=1000)(random.key(1))
    mcmc._states["z"] = {name: value.reshape(5, 200, *value.shape[1:]) for name, value in prior.items()}
    found = diagnostics.configurational_temperature(mcmc)
    assert_temperature(found, 1.0, precision=0.05)
    assert set(found.sites) == {"a", "b", "c"}
    for value, error in found.sites.values():
        assert abs(value - 1) < 4 * error
        assert error < 0.1


def test_configurational_temperature_is_of_the_energy_that_the_kernel_targets():
    # the smoothed energy: gradient noise of variance sigma^2 A^2
    sigma, a, A = 0.5, 0.05, TARGET.curvature
    mcmc = run(bdl.PerturbedSGLD(TARGET.model, step_size=a, sigma=sigma, steps_per_draw=10), TARGET.y)
    wanted = np.trace(A @ exact.sgld(A, a, V=sigma**2 * A @ A)) / 2
    assert_temperature(diagnostics.configurational_temperature(mcmc), wanted)

    # kl weighs the prior, and is the temperature: likelihood precision 1 + kl / 4 on the energy
    def model():
        w = numpyro.sample("w", dist.Normal(0, 2).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(w, 1).to_event(1), obs=jnp.ones(2))

    mcmc = run(bdl.WGFEnsemble(model, step_size=0.1, kl=2.0, steps_per_draw=15))
    found = diagnostics.configurational_temperature(mcmc)
    assert_temperature(found, 2 / (1 - 0.1 * 1.5 / 2))
    assert found.nominal == 2

    # spike and slab with the indicators summed out; the step is short for the spike
    kernel = bdl.SpikeSlabSGHMC(
        normal_model, step_size=1e-3, groups={"w": "unstructured"}, spike_variance=0.2, momentum=0.9, steps_per_draw=100
    )
    mcmc = run(kernel, draws=60)
    assert_temperature(diagnostics.configurational_temperature(mcmc, center="origin"), 1, precision=0.05)


def test_pruned_weights_are_not_counted():
    kernel = bdl.SpikeSlabSGHMC(
        partial(normal_model, size=10),
        step_size=0.02,
        groups={"w": "unstructured"},
        spike_variance=0.5,
        momentum=0.5,
        steps_per_draw=50,
        target_sparsity=0.6,
    )
    mcmc = run(kernel, extra_fields=("momentum",))
    wanted = 1 / (1 - 0.02 / (2 * 1.5))
    assert_temperature(diagnostics.configurational_temperature(mcmc), wanted)
    assert_temperature(diagnostics.kinetic_temperature(mcmc), wanted)


def test_an_optimizer_is_cold():
    mcmc = run(bdl.SGLD(TARGET.model, step_size=0.1, temperature=1e-6, minibatch="full"), TARGET.y, warmup=200)
    assert diagnostics.configurational_temperature(mcmc).value < 1e-5


def test_folding_does_not_change_the_temperature():
    """About the origin the virial is the same for equivalent positions, and the inner chain is the same."""
    inner = bdl.SGHMC(exchangeable, step_size=0.1, steps_per_draw=3)
    restricted = bdl.SymmetryRestricted(inner, EXCHANGE)
    bare, folded = (run(k, chains=2, draws=10, extra_fields=("momentum",)) for k in (inner, restricted))
    assert np.all(np.diff(folded.get_samples()["w"]) > 0)
    found = [diagnostics.configurational_temperature(mcmc, center="origin").value for mcmc in (bare, folded)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    found = [diagnostics.kinetic_temperature(mcmc).value for mcmc in (bare, folded)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    with pytest.raises(ValueError, match='folded onto a reference set; give center="origin"'):
        diagnostics.configurational_temperature(folded)
    uneven = bdl.SGHMC(exchangeable, step_size=0.1, preconditioner=bdl.preconditioners.rms())
    mcmc = run(bdl.SymmetryRestricted(uneven, EXCHANGE), chains=2, draws=10, extra_fields=("momentum",))
    with pytest.raises(ValueError, match="draws are folded and the preconditioner is not"):
        diagnostics.kinetic_temperature(mcmc)


def test_temperatures_refuse_bad_input(sgld):
    with pytest.raises(ValueError, match="this SGLD has no momentum; take configurational_temperature"):
        diagnostics.kinetic_temperature(sgld)
    sghmc = run(bdl.SGHMC(normal_model, step_size=0.1), chains=2, draws=10)
    with pytest.raises(ValueError, match=r'did not collect its momentum.*extra_fields=\("momentum",\)'):
        diagnostics.kinetic_temperature(sghmc)
    with pytest.raises(ValueError, match="minibatch='independent' needs a subsampled plate"):
        diagnostics.configurational_temperature(sghmc, minibatch="independent")
    for name, value in (("center", "mode"), ("minibatch", "epoch")):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            diagnostics.configurational_temperature(sgld, **{name: value})
    with pytest.raises(ValueError, match="num_draws must be an integer of at least 8"):
        diagnostics.configurational_temperature(sgld, num_draws=4)
    short = run(bdl.SGHMC(normal_model, step_size=0.1), chains=2, draws=4, extra_fields=("momentum",))
    for temperature in (diagnostics.configurational_temperature, diagnostics.kinetic_temperature):
        with pytest.raises(ValueError, match="expected at least 8 draws of each chain, got 4"):
            temperature(short)
    repulsive = run(bdl.WGFEnsemble(normal_model, step_size=0.1, mmd=1.0), chains=2, draws=10)
    with pytest.raises(ValueError, match=r"with repulsion \(mmd=1\)"):
        diagnostics.configurational_temperature(repulsive)
    potential = run(HMC(potential_fn=lambda z: z["w"] @ z["w"] / 2), chains=1, init_params={"w": jnp.ones(2)})
    with pytest.raises(TypeError, match="needs a kernel with a model, and this HMC has none"):
        diagnostics.configurational_temperature(potential)


def test_draws_on_the_boundary_of_a_support_are_refused():
    def model():
        numpyro.sample("p", dist.Beta(1, 1))

    mcmc = run(bdl.SGLD(model, step_size=0.1), chains=2, draws=10)
    mcmc._states["z"]["p"] = mcmc._states["z"]["p"].at[1, 3].set(1.0)
    with pytest.raises(ValueError, match=r"chains \[1\] have draws that are not finite in unconstrained space"):
        diagnostics.configurational_temperature(mcmc)
