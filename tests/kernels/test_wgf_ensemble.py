# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import pickle
from contextlib import nullcontext
from functools import partial

import exact
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from exact import covariance_z_scores
from jax import lax, random
from models import LABELS, NETWORKS, X
from numpyro.infer import MCMC, init_to_sample
from targets import Location

import numpyro_bdl as bdl
from numpyro_bdl import mmd
from numpyro_bdl.minibatch import full
from numpyro_bdl.potential import Potential

GRID = np.linspace(-5, 4.5, 951)


def double_well(t):
    """Minima at -2 and 1, a barrier at 0."""
    return 1.5 * (t**4 / 4 + t**3 / 3 - t**2) - 3 / 8


def wells():
    t = numpyro.sample("t", dist.Normal(0, 1))
    numpyro.factor("data", -double_well(t))


def quadratic(a=1.3, b=2.0, mean=-1.0, scale=1.5):
    def model():
        t = numpyro.sample("t", dist.Normal(mean, scale))
        numpyro.factor("data", -a / 2 * (t - b) ** 2)

    return model


def run(kernel, *args, particles=4, num_warmup=0, num_samples=5, key=0, init_params=None, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=particles,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(random.key(key), *args, init_params=init_params, **kwargs)
    return mcmc


def network_run(network="linen", particles=4, num_samples=4, key=0, **kwargs):
    options = {"steps_per_draw": 3} | ({} if "optimizer" in kwargs else {"step_size": 1e-4}) | kwargs
    kernel = bdl.WGFEnsemble(NETWORKS[network], **options)
    return run(kernel, X, LABELS, particles=particles, num_samples=num_samples, key=key, batch_size=20)


def replicates(kernel, particles, count, draws, *args, seed=0, start=None):
    """Positions (draw, replicate, particle, ...) of independent ensembles of a model with one site.

    :param start: First positions (replicate, particle), instead of the kernel's own.
    """
    keys = random.split(random.key(seed), (count, particles))
    (site,) = Potential(kernel.model, args).latent
    first = {} if start is None else {site: jnp.asarray(start, jnp.float32)}
    states = jax.vmap(lambda k, z: kernel.init(k, 0, z, args, {}))(keys, first)
    sample = jax.vmap(partial(kernel.sample, model_args=args, model_kwargs={}))
    chain = jax.jit(lambda states: lax.scan(lambda s, _: (sample(s),) * 2, states, None, draws)[1].z)
    return np.asarray(chain(states)[site], float)


def evenly(density, shape):
    """Points on the grid in the places of the quantiles of a density, shuffled."""
    quantiles = (np.arange(np.prod(shape)) + 0.5) / np.prod(shape)
    points = np.interp(quantiles, np.cumsum(density) / density.sum(), GRID)
    return np.random.default_rng(0).permutation(points).reshape(shape)


def largest_gap(draws, distribution, grid=GRID):
    """Kolmogorov's distance of draws from a distribution function on a grid."""
    return np.abs(np.searchsorted(np.sort(draws.ravel()), grid, side="right") / draws.size - distribution).max()


# ---- deep ensembles -----------------------------------------------------------------------------------------------


def test_deep_ensemble_descends_a_quadratic_as_it_should():
    a, b, step = 1.3, 2.0, 0.1
    mcmc = run(bdl.WGFEnsemble(quadratic(a, b), step_size=step, kl=0), init_params={"t": jnp.array([-3.0, 0, 1, 5])})
    path = mcmc.get_samples(group_by_chain=True)["t"]
    expected = b + (1 - step * a) ** np.arange(1, 6) * (np.array([-3.0, 0, 1, 5])[:, None] - b)
    np.testing.assert_allclose(path, expected, rtol=1e-5)


def test_deep_ensemble_goes_to_the_minimum_of_the_basin_it_began_in():
    start = jnp.linspace(-3, 3, 50)
    mcmc = run(bdl.WGFEnsemble(wells, step_size=0.05, kl=0, steps_per_draw=400), particles=50, init_params={"t": start})
    np.testing.assert_allclose(mcmc.last_state.z["t"], np.where(start < 0, -2, 1), atol=1e-4)


def test_map_ensemble_has_the_prior_as_weight_decay():
    a, b, mean, scale, kl = 1.3, 2.0, -1.0, 1.5, 0.5
    mcmc = run(bdl.WGFEnsemble(quadratic(), step_size=0.1, kl=kl, langevin=False, steps_per_draw=100))
    mode = (a * b + kl * mean / scale**2) / (a + kl / scale**2)
    np.testing.assert_allclose(mcmc.last_state.z["t"], mode, rtol=1e-5)


def test_an_optimizer_takes_the_steps_of_its_own():
    optimizer = optax.adam(0.1)
    mcmc = run(bdl.WGFEnsemble(quadratic(1.3, 2.0), optimizer=optimizer, kl=0), init_params={"t": jnp.arange(4.0)})
    path = mcmc.get_samples(group_by_chain=True)["t"]
    for n in range(4):
        t, state = jnp.float32(n), optimizer.init(jnp.float32(n))
        for i in range(5):
            updates, state = optimizer.update(1.3 * (t - 2.0), state, t)
            t = optax.apply_updates(t, updates)
            np.testing.assert_allclose(path[n, i], t, rtol=1e-5)
    assert set(mcmc.get_extra_fields()) == {"mutable", "minibatch_energy"}


def test_without_repulsion_it_is_sgld_bit_for_bit_and_without_noise_gradient_descent():
    def draws(make):
        return run(make, X, LABELS, batch_size=20).get_samples()["net/Dense_0.kernel"]

    options = {"step_size": 1e-3, "share_batch": True, "steps_per_draw": 2}
    langevin = draws(bdl.WGFEnsemble(NETWORKS["linen"], **options))
    np.testing.assert_array_equal(langevin, draws(bdl.SGLD(NETWORKS["linen"], **options)))
    descent = draws(bdl.WGFEnsemble(NETWORKS["linen"], kl=0, **options))
    np.testing.assert_array_equal(descent, draws(bdl.WGFEnsemble(NETWORKS["linen"], kl=0, langevin=False, **options)))
    one = draws(bdl.WGFEnsemble(NETWORKS["linen"], optimizer=optax.sgd(1e-3), kl=0, steps_per_draw=2))
    np.testing.assert_allclose(descent, one, rtol=1e-5)


# ---- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [1.0, 0.4])
def test_langevin_ensemble_has_the_law_of_the_finite_step(kl):
    """The likelihood at temperature kl under the untempered prior, and the bias of Euler's step."""
    a, b, mean, scale, step = 1.3, 2.0, -1.0, 1.5, 0.3
    curvature = a + kl / scale**2
    kernel = bdl.WGFEnsemble(quadratic(), step_size=step, kl=kl, steps_per_draw=40)
    t = np.asarray(run(kernel, particles=20_000, num_samples=1).last_state.z["t"], float)[:, None]
    centre = (a * b + kl * mean / scale**2) / curvature
    z = covariance_z_scores(t, np.array([centre]), np.array([[2 * kl / (curvature * (2 - step * curvature))]]))
    assert max(np.abs(x).max() for x in z) < 4


def test_langevin_ensemble_with_minibatches_of_each_particle_has_the_law_of_sgld():
    target, batch = Location.make([2.0, 6.0]), 2
    kernel = bdl.WGFEnsemble(target.model, step_size=0.1, share_batch=False, steps_per_draw=160)
    state = run(kernel, target.y, particles=10_000, num_samples=1, batch_size=batch).last_state
    covariance = exact.sgld(target.curvature, 0.1, V=target.gradient_noise(batch))
    z = covariance_z_scores(np.asarray(state.z["w"], float), target.mean, covariance)
    assert max(np.abs(x).max() for x in z) < 4


def test_linear_kernel_at_a_finite_number_of_particles_and_a_finite_step():
    """Signs, 1 / N, step and noise: each moves one of the three moments."""
    kl, weight, particles, step = 0.5, 0.8, 10, 0.1
    kernel = bdl.WGFEnsemble(quadratic(), step_size=step, kl=kl, mmd=weight, kernel=mmd.Linear(), steps_per_draw=80)
    t = replicates(kernel, particles, 6000, 1)[0]
    centre, of_mean, within = exact.linear_ensemble(1.3, 2.0, kl, weight, -1.0, 1.5, particles, step)
    np.testing.assert_allclose([centre, of_mean, within], [0.67943, 0.02436, 0.31997], rtol=1e-4)
    assert abs(t.mean() - centre) < 4 * np.sqrt(of_mean / 6000)
    assert abs(t.mean(1).var() / of_mean - 1) < 4 * np.sqrt(2 / 6000)
    assert abs(t.var(1).mean() / within - 1) < 4 * np.sqrt(2 / (6000 * (particles - 1)))


def well_kernel(weight, **kwargs):
    options = {"step_size": 0.01, "steps_per_draw": 100} | kwargs
    return bdl.WGFEnsemble(wells, mmd=weight, kernel=mmd.RBF(1.0), **options)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    ("weight", "particles", "moments"),
    [(0.0, 2, (-1.2404, 0.8212)), (1.0, 25, (-1.0086, 1.0426)), (10.0, 25, (-0.3795, 1.1328))],
)
def test_double_well_keeps_the_fixed_point_on_a_grid(weight, particles, moments):
    density = exact.wasserstein_fixed_point(GRID, double_well(GRID), 1.0, weight, 1.0)
    width = GRID[1] - GRID[0]
    mean = density @ GRID * width
    np.testing.assert_allclose([mean, density @ (GRID - mean) ** 2 * width], moments, atol=1e-3)
    start = evenly(density, (6000 // particles, particles))
    t = replicates(well_kernel(weight, step_size=0.005), particles, len(start), 12, start=start)
    assert largest_gap(t, np.cumsum(density) * width) < 0.01


@pytest.mark.usefixtures("optimized")
def test_two_particles_keep_their_joint_law():
    p, moments = exact.two_particles(GRID, double_well(GRID), 1.0, 10.0, 1.0)
    mean, variance, correlation = moments
    np.testing.assert_allclose(moments, [-0.3871, 1.0346, -0.6828], atol=2e-3)
    pairs = np.random.default_rng(0).choice(p.size, size=4000, p=p.ravel())
    start = GRID[np.stack(np.unravel_index(pairs, p.shape), 1)]
    t = replicates(well_kernel(10.0, step_size=0.005, steps_per_draw=200), 2, len(start), 10, start=start)
    end = t[-1]
    assert abs(np.corrcoef(end.T)[0, 1] - correlation) < 4 * (1 - correlation**2) / np.sqrt(len(end))
    assert abs(end.mean() - mean) < 4 * np.sqrt(variance * (1 + correlation) / 2 / len(end))
    assert largest_gap(t, np.cumsum(p.sum(1))) < 0.01


@pytest.mark.usefixtures("optimized")
def test_bias_of_few_particles_falls_with_their_number():
    density = exact.wasserstein_fixed_point(GRID, double_well(GRID), 1.0, 1.0, 1.0)
    limit = density @ GRID * (GRID[1] - GRID[0])
    of_two = exact.two_particles(GRID, double_well(GRID), 1.0, 1.0, 1.0)[1][0]
    np.testing.assert_allclose(of_two, -1.0576, atol=4 * 0.0045)

    def bias(particles):
        start = evenly(density, (4000 // particles, particles))
        means = replicates(well_kernel(1.0), particles, len(start), 30, start=start)[15:].mean((0, 2))
        return means.mean() - limit, means.std() / np.sqrt(len(means))

    (two, error), (ten, error_of_ten) = bias(2), bias(10)
    of_the_step = 0.006  # it moves the mean by as much
    assert abs(two - (of_two - limit)) < 4 * error + of_the_step
    assert abs(ten - two / 5) < 4 * np.hypot(error_of_ten, error / 5) + of_the_step
    assert abs(two) > abs(ten) + 2 * np.hypot(error, error_of_ten)


@pytest.mark.usefixtures("optimized")
def test_conjugate_regression():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 3)).astype("f4")
    y = (x @ np.array([1.0, -0.5, 0.2]) + 0.5 * rng.normal(size=30)).astype("f4")

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    covariance = np.linalg.inv(np.eye(3) + x.T.astype(float) @ x / 0.25)
    kernel = bdl.WGFEnsemble(model, step_size=1e-4, steps_per_draw=2000)
    w = np.asarray(run(kernel, x, y, particles=4000, num_samples=1).last_state.z["w"], float)
    z = covariance_z_scores(w, covariance @ x.T @ y / 0.25, covariance)
    assert max(np.abs(v).max() for v in z) < 4


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_constrained_sites_are_unbiased(weight):
    """log s of a LogNormal is normal, with the log-Jacobian in the prior; that too is the limit of a repulsion from
    a Gaussian prior, whose discrepancy is then zero."""

    def model():
        numpyro.sample("s", dist.LogNormal(0.3, 0.8))

    kernel = bdl.WGFEnsemble(model, step_size=0.01, mmd=weight, steps_per_draw=700)
    z = replicates(kernel, 40, 100, 1)[0]
    replicate_means = z.mean(1)
    assert abs(replicate_means.mean() - 0.3) < 4 * replicate_means.std() / 10
    variances = z.var(1)
    low = 0.64 * 39 / 40 / (1 - 0.01 / 0.64 / 2)
    if not weight:
        assert abs(variances.mean() - low) < 4 * variances.std() / 10
    else:  # the particles repel each other: their spread is as wide, or wider
        assert variances.mean() > low - 4 * variances.std() / 10


# ---- forces -------------------------------------------------------------------------------------------------------


def target_energy(model, args, particles, kl, weight, witness):
    """U_N = sum_n [l - mmd mu_P - kl log p] + mmd / (2 N) sum_nm k of all particles."""
    potential = Potential(model, args)

    def energy(z):
        each = jax.vmap(lambda z: potential.energies(z, {}, random.key(0), {}, args, {})[0])(z)
        mean, embedding = witness(z)
        return each.likelihood.sum() + kl * each.prior.sum() + weight * (particles * mean / 2 - embedding.sum())

    return energy


@pytest.mark.parametrize("repulsion", ["weights", "per site", "function"])
def test_drift_is_minus_the_gradient_of_the_joint_energy(repulsion):
    """Of the energy of all particles together, differentiated by both arguments of the kernel; and it falls."""
    x, y = jnp.asarray(X[:20]), jnp.asarray(X[:20, 0])

    def model(x, y=None):
        v = numpyro.sample("v", dist.Normal(0, 1).expand([3, 2]).to_event(2))
        w = numpyro.sample("w", dist.Normal(0, 2).expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(jnp.tanh(x @ v) @ w, 1.0), obs=y)

    particles, kl, weight, step = 5, 0.7, 1.3, 1e-3
    anchors = jnp.asarray(X[30:34])
    where = {"repulsion": repulsion, "anchor_inputs": (anchors,)} if repulsion == "function" else {}
    where = where or {"repulsion": "weights", "per_site": repulsion == "per site"}
    kernel = bdl.WGFEnsemble(model, step_size=step, kl=kl, mmd=weight, langevin=False, **where)
    mcmc = run(kernel, x, y, particles=particles, num_samples=3)

    def blocks(z):
        if repulsion == "function":
            return {"f": (jnp.tanh(anchors @ z["v"]) @ z["w"]).ravel()}
        flat = {name: value.ravel() for name, value in z.items()}
        return flat if repulsion == "per site" else {"all": jnp.concatenate(list(flat.values()))}

    rules = dict(
        zip(
            blocks({k: v[0] for k, v in mcmc.last_state.z.items()}),
            kernel._repulsion.discrepancies.values(),
            strict=True,
        )
    )

    def witness(z):
        features = jax.vmap(blocks)(z)
        mean = embedding = 0.0
        for name, rule in rules.items():
            f = features[name]
            squared = jnp.sum((f[:, None] - f) ** 2, -1) / rule.kernel.bandwidth**2
            mean += f.shape[1] * jnp.exp(-squared / 2).mean()
            embedding += jax.vmap(lambda t, r=rule, f=f: r(t, f)[1])(f)
        return mean, embedding

    energy = target_energy(model, (x, y), particles, kl, weight, witness)
    path = mcmc.get_samples(group_by_chain=True)
    positions = [{name: value[:, n] for name, value in path.items()} for n in range(3)]
    gradient = jax.grad(energy)(positions[0])
    for name in gradient:
        np.testing.assert_allclose(
            (positions[0][name] - positions[1][name]) / step, gradient[name], rtol=2e-3, atol=2e-3, err_msg=name
        )
    assert energy(positions[0]) > energy(positions[1]) > energy(positions[2])


def test_bandwidth_of_the_function_is_from_draws_of_the_prior():
    def model(x):
        w = numpyro.sample("w", dist.Normal(0, 3.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(w * x, 1.0), obs=jnp.zeros(len(x)))

    kernel = bdl.WGFEnsemble(model, step_size=0.01, mmd=1.0, repulsion="function", prior_draws=2000)
    x = jnp.array([1.0, 2.0])
    run(kernel, x, num_samples=1)
    (rule,) = kernel._repulsion.discrepancies.values()
    expected = np.sqrt(0.4549 * 9 * 5)  # half of (w - w')^2 is 9 times a chi-square
    assert rule.kernel.bandwidth == pytest.approx(expected, rel=0.1)
    assert rule.prior.points.shape == (2000, 2)


def test_anchors_default_to_rows_through_the_plate():
    mcmc = network_run(mmd=1.0)
    features = mcmc.sampler._repulsion.features
    z = jax.tree.map(lambda w: w[0], mcmc.last_state.z)
    assert features(z, {})["function"].shape == (60 * 2,)
    outputs = bdl.PosteriorPredictive(mcmc).functions()["y"][0, -1]
    np.testing.assert_allclose(features(z, {})["function"].reshape(60, 2), outputs, rtol=1e-5, atol=1e-6)


def test_particles_are_exchangeable():
    order = np.array([2, 0, 3, 1])
    kernel = bdl.WGFEnsemble(NETWORKS["linen"], step_size=1e-3, mmd=1.0, steps_per_draw=2)
    state = kernel.init(random.split(random.key(0), 4), 0, None, (X, LABELS), {"batch_size": 20})
    permuted = state._replace(**{f: jax.tree.map(lambda x: x[order], getattr(state, f)) for f in ("z", "particle_key")})
    one, other = (kernel.sample(s, (X, LABELS), {"batch_size": 20}).z for s in (state, permuted))
    for name in one:
        np.testing.assert_allclose(one[name][order], other[name], rtol=1e-5, atol=1e-6)


def test_minibatch_gradients_average_to_that_of_the_full_data():
    """With the weights, over all minibatches of one row."""
    potential = Potential(NETWORKS["linen"], (X, LABELS), {"batch_size": 1})
    z, _ = potential.initial(random.key(0))
    call = random.key(0), {}, (X, LABELS), {"batch_size": 1}
    gradient = jax.jit(lambda rows: potential.gradient(z, {"data": rows}, *call, prior_weight=0.3)[1])
    whole = gradient(full(random.key(0), 0, 60, 1))
    each = jax.vmap(gradient)(jnp.arange(60)[:, None])
    for name in whole:
        np.testing.assert_allclose(each[name].mean(0), whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dimension", [10, 1000])
def test_repulsion_beside_the_prior_falls_as_one_over_the_dimension_unless_it_is_scaled(dimension):
    def model():
        numpyro.sample("w", dist.Normal(0, 1).expand([dimension]).to_event(1))

    def ratio(kernel):
        made = bdl.WGFEnsemble(model, step_size=1e-3, mmd=1.0, kernel=kernel, init_strategy=init_to_sample)
        state = made.init(random.split(random.key(0), 200), 0, None, (), {})
        return float(np.sqrt(np.mean(np.asarray(state.repulsion_ratio) ** 2)))

    with pytest.warns(UserWarning, match="next to nothing") if dimension == 1000 else nullcontext():
        plain = ratio(mmd.RBF(float(np.sqrt(dimension)), 1.0))
    assert 0.25 < plain * dimension < 0.42  # exp(-1) in the limit
    assert 0.25 < ratio(None) < 0.42


# ---- NumPyro's contract -------------------------------------------------------------------------------------------


def test_resume_with_an_optimizer_is_bit_for_bit():
    options = {"kl": 0.0, "optimizer": optax.adam(1e-2)}
    whole = network_run(num_samples=6, **options).get_samples(group_by_chain=True)
    mcmc = network_run(num_samples=3, **options)
    first = mcmc.get_samples(group_by_chain=True)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(random.key(9), X, LABELS, batch_size=20)  # whatever the key
    second = mcmc.get_samples(group_by_chain=True)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([first[name], second[name]], 1))


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_move_with_repulsion(network):
    mcmc = network_run(network, num_samples=3, mmd=1.0)
    for value in jax.tree.leaves(mcmc.get_samples(group_by_chain=True)):
        assert np.isfinite(value).all()
        assert not np.array_equal(value[:, 0], value[:, -1])


def test_chunks_and_devices_change_nothing():
    whole = network_run(mmd=1.0).get_samples()
    for options in ({"particle_chunk": 3}, {"devices": jax.devices()[:2]}):
        mcmc = network_run(mmd=1.0, **options)
        for name, value in mcmc.get_samples().items():
            np.testing.assert_allclose(value, whole[name], atol=1e-5, err_msg=str(options))
    assert mcmc.last_state.z["net/Dense_0.kernel"].sharding.num_devices == 2
    assert not mcmc.last_state.z["net/Dense_0.kernel"].sharding.is_fully_replicated


def test_particles_without_repulsion_do_not_communicate():
    def collectives(**options):
        kernel = bdl.WGFEnsemble(NETWORKS["linen"], step_size=1e-4, devices=jax.devices()[:2], **options)
        state = kernel.init(random.split(random.key(0), 4), 0, None, (X, LABELS), {"batch_size": 20})
        program = jax.jit(lambda s: kernel.sample(s, (X, LABELS), {"batch_size": 20})).lower(state).compile().as_text()
        return [word for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all") if word in program]

    assert collectives() == collectives(kl=0.0) == []
    assert collectives(mmd=1.0)


def test_keys_pickle_and_a_second_run():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    kernel = bdl.WGFEnsemble(_normal, step_size=0.1, mmd=1.0)
    typed = run(kernel, jnp.ones(3)).get_samples()["mu"]
    again = pickle.loads(pickle.dumps(kernel))
    np.testing.assert_array_equal(typed, run(again, jnp.ones(3)).get_samples()["mu"])
    legacy = MCMC(kernel, num_warmup=0, num_samples=5, num_chains=4, chain_method="vectorized", progress_bar=False)
    legacy.run(random.PRNGKey(0), jnp.ones(3))
    np.testing.assert_array_equal(typed, legacy.get_samples()["mu"])
    assert not np.array_equal(typed, run(kernel, 3 + jnp.ones(3)).get_samples()["mu"])


def test_resume_on_other_data_repels_by_these():
    kernel = bdl.WGFEnsemble(_normal_rows, step_size=0.01, mmd=1.0, repulsion="function")
    mcmc = run(kernel, jnp.ones(4))
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(random.key(1), jnp.ones(6))
    (rule,) = kernel._repulsion.discrepancies.values()
    assert rule.prior.points.shape == (200, 6)
    assert np.isfinite(mcmc.get_samples()["mu"]).all()


def _normal(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1), obs=y)


def test_progress_bar_shows_loss_and_repulsion(progress_bar, capsys):
    mcmc = MCMC(bdl.WGFEnsemble(_normal, step_size=0.1, mmd=1.0), num_warmup=0, num_samples=20, num_chains=3,
                chain_method="vectorized")  # fmt: skip
    mcmc.run(random.key(0), jnp.ones(3))
    shown = capsys.readouterr().err
    assert "loss" in shown
    assert "repulsion" in shown


def test_a_particle_that_breaks_is_marked_and_said():
    start = {"t": jnp.array([0.0, 1e30, 1.0, -1.0])}
    mcmc = run(bdl.WGFEnsemble(wells, step_size=0.01), init_params=start)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["t"])
    assert np.isnan(draws[1]).all()
    assert np.isfinite(draws[[0, 2, 3]]).all()
    broken = run(bdl.WGFEnsemble(wells, step_size=0.01, mmd=1.0), init_params=start)
    assert np.isnan(broken.get_extra_fields(group_by_chain=True)["repulsion_ratio"][:, 1:]).all()
    assert "1 PARTICLES NOT FINITE" in mcmc.sampler.get_diagnostics_str(mcmc.last_state)


def test_datatree_with_and_without_a_history():
    history = bdl.to_datatree(network_run(mmd=1.0, num_samples=5))
    assert dict(history["posterior"].sizes)["chain"] == 4
    assert history["sample_stats"]["repulsion_ratio"].shape == (4, 5)
    assert history.attrs["kl"] == 1
    assert history.attrs["mmd"] == 1
    assert "temperature" not in history.attrs
    ends = bdl.to_datatree(network_run(num_samples=1), log_likelihood=True, posterior_predictive=True)
    for group in ("posterior", "sample_stats", "functions", "log_likelihood", "posterior_predictive"):
        assert (ends[group].sizes["chain"], ends[group].sizes["draw"]) == (1, 4), group


def test_prediction_is_a_mixture_over_particles_with_the_noise():
    kernel = bdl.WGFEnsemble(_normal_rows, step_size=0.01, steps_per_draw=300)
    mcmc = run(kernel, jnp.ones(4), particles=500, num_samples=1)
    draws = bdl.PosteriorPredictive(mcmc).sample(random.key(1), jnp.ones(4))["y"]
    assert draws.shape == (500, 1, 4)
    # 1 / (1 + 4) of the location, 1 of the noise
    assert abs(draws.var() - 1.2) < 4 * 1.2 * np.sqrt(2 / 500)


def _normal_rows(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1), obs=y)


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, ValueError, "one of step_size and optimizer"),
        ({"step_size": 0.1, "optimizer": optax.sgd(0.1)}, ValueError, "one of step_size and optimizer"),
        ({"optimizer": optax.adam(0.1)}, ValueError, "samples another law"),
        ({"optimizer": "adam", "kl": 0}, TypeError, "optax transformation"),
        ({"step_size": 0.1, "kl": -1}, ValueError, "kl must be a number in"),
        ({"step_size": 0.1, "mmd": -1}, ValueError, "mmd must be a number in"),
        ({"step_size": 0.1, "temperature": 0.5}, TypeError, "no temperature"),
        ({"step_size": 0.1, "repulsion": "outputs"}, ValueError, "repulsion must be one of"),
        ({"step_size": 0.1, "kernel": 3}, TypeError, "numpyro_bdl.mmd"),
        ({"step_size": 0.1, "kernel": mmd.RBF}, TypeError, "numpyro_bdl.mmd"),
        ({"step_size": 0.1, "anchor_inputs": (np.full((2, 3), np.nan),)}, ValueError, "NaN or infinite"),
        ({"step_size": 0.1, "devices": 2}, TypeError, "list of devices"),
        ({"step_size": 0.1, "devices": []}, TypeError, "list of devices"),
        ({"step_size": 0.1, "anchor_inputs": X}, TypeError, "tuple of arguments"),
        ({"step_size": 0.1, "anchor_inputs": (X,), "repulsion": "weights"}, ValueError, "no use"),
        ({"step_size": 0.1, "per_site": True}, ValueError, "per_site goes with"),
        ({"step_size": 0.1, "particle_chunk": 0}, ValueError, "particle_chunk"),
        ({"step_size": 0.1, "prior_draws": 1}, ValueError, "prior_draws"),
        (
            {"optimizer": optax.sgd(0.1), "kl": 0, "preconditioner": bdl.preconditioners.rms()},
            ValueError,
            "one of precon",
        ),
    ],
)
def test_bad_arguments(options, error, text):
    with pytest.raises(error, match=text):
        bdl.WGFEnsemble(wells, **options)


def test_bad_runs():
    kernel = bdl.WGFEnsemble(wells, step_size=0.1, mmd=1.0)
    for options in ({"num_chains": 1}, {"num_chains": 2, "chain_method": "sequential"}):
        mcmc = MCMC(kernel, num_warmup=0, num_samples=2, progress_bar=False, **options)
        with pytest.raises(ValueError, match='chain_method="vectorized" and num_chains'):
            mcmc.run(random.key(0))
    assert run(kernel, particles=3).get_samples()["t"].shape == (15,)  # an odd number is fine

    def discrete():
        numpyro.sample("n", dist.Poisson(3.0))

    with pytest.raises(TypeError, match="discrete"):
        run(bdl.WGFEnsemble(discrete, step_size=0.1))
    with pytest.raises(ValueError, match=r"can't be evaluated at inputs of shapes \(5, 7\)"):
        network_run(mmd=1.0, anchor_inputs=(jnp.ones((5, 7)),))
    with pytest.raises(ValueError, match="no observed site.*repulsion=.weights"):
        run(bdl.WGFEnsemble(wells, step_size=0.1, mmd=1.0, repulsion="function"))
    with pytest.raises(ValueError, match=r"must give a number .* shape \(1,\)"):
        run(bdl.WGFEnsemble(wells, step_size=0.1, mmd=1.0, kernel=lambda a, b: a * b))
    traced = MCMC(bdl.WGFEnsemble(_normal, step_size=0.1, mmd=1.0), num_warmup=0, num_samples=2, num_chains=2,
                  chain_method="vectorized", jit_model_args=True)  # fmt: skip
    with pytest.raises(ValueError, match="jit_model_args=False"):
        traced.run(random.key(0), jnp.ones(3))
    with pytest.raises(ValueError, match="3 particles can't be spread evenly over 2 devices"):
        network_run(particles=3, devices=jax.devices()[:2])


def test_warnings():
    def flat():
        t = numpyro.sample("t", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.factor("data", -((t - 1) ** 2))

    with pytest.warns(UserWarning, match="prior of t is flat"):
        run(bdl.WGFEnsemble(flat, step_size=0.1))
    with (
        pytest.warns(UserWarning, match="prior of t is flat"),
        pytest.raises(ValueError, match="give the kernel a bandwidth"),
    ):
        run(bdl.WGFEnsemble(flat, step_size=0.1, mmd=1.0))
    with pytest.warns(UserWarning, match="is flat"):
        mcmc = run(bdl.WGFEnsemble(flat, step_size=0.1, mmd=1.0, kernel=mmd.RBF(1.0)))
    assert np.isfinite(mcmc.get_samples()["t"]).all()
    with pytest.warns(UserWarning, match=r"repulsion is 0.0e\+00"):  # particles in one place
        run(bdl.WGFEnsemble(wells, step_size=0.1, mmd=1.0), init_params={"t": jnp.zeros(4)}, num_samples=1)
    with pytest.warns(UserWarning, match="rolling bandwidth"):
        bdl.WGFEnsemble(wells, step_size=0.1, mmd=1.0, kernel=mmd.RBF("rolling"))
