# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Laws of flat-basin SGLD. The facts numbered T1 to T10 are those that any implementation should show."""

import exact
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from exact import covariance_z_scores
from jax import random
from kernels.laws import TARGET, VARIATIONS, assert_law
from numpyro.infer import MCMC
from scipy import stats
from targets import Location, last_states

import numpyro_bdl as bdl
from numpyro_bdl.kernels.flat_basin import exact_step

H, ETA, A, T = 2.0, 0.3, 0.05, 0.7
BOTH = ("z", "z_anchor")

LAWS = {
    "exact": ({"coupling": "exact"}, exact.flat_exact, {}, 160),
    "euler": ({"coupling": "euler"}, exact.flat_euler, {}, 160),
    "momentum": ({"coupling": "euler", "momentum": 0.8}, exact.flat_momentum, {"b": 0.8}, 160),
    "gibbs": ({"coupling": "gibbs"}, exact.flat_gibbs, {"m": 5}, 160),
    "gibbs-20": ({"coupling": "gibbs", "inner_steps": 20}, exact.flat_gibbs, {"m": 20}, 400),
}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize(("arguments", "law", "law_arguments", "steps"), LAWS.values(), ids=LAWS)
def test_stationary_law_is_the_finite_step_formula(arguments, law, law_arguments, steps, variation):
    """T2, T3, T4, T9: the joint covariance of position and anchor."""
    assert_law(
        lambda model, **kw: bdl.FlatBasinSGLD(model, step_size=0.1, eta=ETA, **arguments, **kw),
        lambda **kw: law(TARGET.curvature, 0.1, ETA, **law_arguments, **kw),
        variation,
        fields=BOTH,
        steps=steps,
    )


def test_closed_forms_in_one_dimension():
    """T1 to T4 and T9 as numbers, and the limit of small steps."""
    np.testing.assert_allclose(exact.flat_euler(H, A, ETA, T), [[0.3704, 0.3481], [0.3481, 0.5793]], atol=5e-5)
    noisy = exact.flat_euler(H, A, ETA, T, V=5.0)
    np.testing.assert_allclose([noisy[0, 0], noisy[0, 1], noisy[1, 1]], [0.4114, 0.3717, 0.6044], atol=5e-5)
    np.testing.assert_allclose(exact.flat_exact(H, A, ETA, T)[0, 0], 0.36763, atol=5e-6)
    np.testing.assert_allclose(exact.flat_euler(H, A, ETA, T)[0, 0], 0.37037, atol=5e-6)
    for m, variance in {1: 0.3991, 5: 0.3883, 20: 0.3832}.items():
        np.testing.assert_allclose(exact.flat_gibbs(H, A, ETA, m, T)[0, 0], variance, atol=5e-5)
    one_step = T / H * (1 + A / (2 * ETA)) / (1 - A * H / 2)
    np.testing.assert_allclose(exact.flat_gibbs(H, A, ETA, 1, T)[0, 0], one_step, rtol=1e-10)
    limit = T * np.array([[1 / H, 1 / H], [1 / H, 1 / H + ETA]])
    for law in (exact.flat_exact, exact.flat_euler, lambda *x: exact.flat_momentum(H, 1e-6, ETA, 0.9, T)[:2, :2]):
        np.testing.assert_allclose(law(H, 1e-6, ETA, T), limit, rtol=1e-5)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("coupling", "variance"), [("exact", 0.36763), ("euler", 0.37037)])
def test_position_variance_of_the_two_joint_couplings(coupling, variance):
    """The two differ by 0.75 %, so it takes a million copies to tell them apart."""

    def model():
        numpyro.sample("w", dist.Normal(0, H**-0.5).expand([1_000_000]).to_event(1))

    kernel = bdl.FlatBasinSGLD(model, step_size=A, eta=ETA, temperature=T, coupling=coupling, steps_per_draw=150)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=1, progress_bar=False)
    mcmc.run(random.key(0))
    w = np.asarray(mcmc.last_state.z["w"], float)
    assert abs(w.var() - variance) < 4 * variance * np.sqrt(2 / len(w))


def test_mean_contracts_as_the_matrix_power():
    """T5: E z_k - mu = (I - a Q)^k (z_0 - mu), at every k."""
    target = Location.make([H], rows=1)
    kernel = bdl.FlatBasinSGLD(target.model, step_size=A, eta=ETA, coupling="euler", collect_anchor=True)
    chains = 10_000
    mcmc = MCMC(kernel, num_warmup=0, num_samples=30, num_chains=chains, chain_method="vectorized", progress_bar=False)
    mcmc.run(random.key(0), target.y, init_params={"w": jnp.full((chains, 1), 4.0)})
    z = np.stack(
        [mcmc.get_samples(True)["w"][..., 0], mcmc.get_extra_fields(True)["z_anchor"]["w"][..., 0]], axis=-1
    ).astype(float)
    F = np.eye(2) - A * np.array([[H + 1 / ETA, -1 / ETA], [-1 / ETA, 1 / ETA]])
    deviation = 4.0 - np.repeat(target.mean, 2)
    for k in range(30):
        deviation = F @ deviation
        assert np.all(np.abs(z[:, k].mean(0) - target.mean - deviation) < 4 * z[:, k].std(0) / np.sqrt(chains))


def test_regression_on_the_anchor_is_the_local_entropy_gradient():
    """T6: (u - E[w | u]) / eta = (S + eta I)^-1 (u - mu), as the step goes to zero."""
    covariance = exact.flat_exact(TARGET.curvature, 1e-7, ETA)
    S, eye = np.linalg.inv(TARGET.curvature), np.eye(2)
    slope = covariance[:2, 2:] @ np.linalg.inv(covariance[2:, 2:])
    np.testing.assert_allclose((eye - slope) / ETA, np.linalg.inv(S + ETA * eye), rtol=1e-5)


@pytest.mark.usefixtures("optimized")
def test_the_anchor_does_not_feel_the_prior():
    """T7: with weight decay on the anchor too, as in the code of the paper, the position is no longer the posterior."""
    prior, likelihood, a = 3.0, 2.0, 0.02

    def model():
        w = numpyro.sample("w", dist.Normal(0, prior**-0.5))
        numpyro.sample("y", dist.Normal(w, likelihood**-0.5), obs=0.0)

    kernel = bdl.FlatBasinSGLD(model, step_size=a, eta=ETA)
    w = np.asarray(last_states(kernel, steps=600).z["w"], float)
    right = exact.flat_exact(prior + likelihood, a, ETA)[0, 0]
    wrong = 1 / (prior + likelihood + 1 / (1 / prior + ETA))
    standard_error = right * np.sqrt(2 / len(w))
    assert abs(w.var() - right) < 4 * standard_error
    assert abs(w.var() - wrong) > 15 * standard_error


MEANS, VARIANCES = np.array([[-2.0, -1.0], [2.0, 1.0]]), np.array([0.5, 1.0])


def mixture():
    components = dist.Normal(jnp.asarray(MEANS), jnp.sqrt(jnp.asarray(VARIANCES))[:, None]).to_event(1)
    numpyro.sample("w", dist.MixtureSameFamily(dist.Categorical(probs=jnp.array([0.5, 0.5])), components))


def responsibility(w):
    """Mean posterior probability of the flat component."""
    log_p = np.stack(
        [stats.multivariate_normal.logpdf(w, m, v * np.eye(2)) for m, v in zip(MEANS, VARIANCES, strict=True)]
    )
    return 1 / (1 + np.exp(log_p[0] - log_p[1]))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("eta", [0.05, 0.5])
def test_mixture_of_two_basins(eta):
    """T8: the anchor follows the mixture smoothed by N(0, eta I), and the position the mixture itself; started from the
    mixture, both stay there."""
    chains, rng = 4000, np.random.default_rng(0)
    which = rng.integers(0, 2, chains)
    start = MEANS[which] + np.sqrt(VARIANCES[which])[:, None] * rng.normal(size=(chains, 2))
    kernel = bdl.FlatBasinSGLD(mixture, step_size=0.01, eta=eta)
    state = last_states(kernel, steps=500, chains=chains, init_params={"w": jnp.asarray(start, jnp.float32)})
    for field, extra in (("z", 0.0), ("z_anchor", eta)):
        w = np.asarray(getattr(state, field)["w"], float)
        for axis in (0, 1):

            def cdf(x, axis=axis, extra=extra):
                sd = np.sqrt(VARIANCES + extra)
                return sum(0.5 * stats.norm.cdf(x, m, s) for m, s in zip(MEANS[:, axis], sd, strict=True))

            assert stats.kstest(w[:, axis], cdf).pvalue > 6e-5  # 4 standard errors
    score = responsibility(np.asarray(state.z["w"], float))
    assert abs(score.mean() - 0.5) < 4 * score.std() / np.sqrt(chains)


@pytest.mark.usefixtures("optimized")
def test_basin_mass_from_the_sharp_basin():
    """B2: at equilibrium the position gives each basin its mass, flat or not: no bias towards flat ones."""
    chains = 4000
    start = MEANS[0] + np.sqrt(VARIANCES[0]) * np.random.default_rng(0).normal(size=(chains, 2))
    kernel = bdl.FlatBasinSGLD(mixture, step_size=0.02, eta=0.5, steps_per_draw=250)
    state = last_states(kernel, steps=40, chains=chains, init_params={"w": jnp.asarray(start, jnp.float32)})
    score = responsibility(np.asarray(state.z["w"], float))
    assert abs(score.mean() - 0.5) < 4 * score.std() / np.sqrt(chains)


@pytest.mark.usefixtures("optimized")
def test_twenty_dimensions_of_condition_one_hundred():
    """B1 at d = 20."""
    target = Location.make(np.geomspace(1, 100, 20))
    kernel = bdl.FlatBasinSGLD(target.model, step_size=0.01, eta=0.3)
    state = last_states(kernel, target.y, steps=1000)
    covariance = exact.flat_exact(target.curvature, 0.01, 0.3)
    draws = np.concatenate([state.z["w"], state.z_anchor["w"]], axis=1).astype(float)
    mean_z, covariance_z = covariance_z_scores(draws, np.tile(target.mean, 2), covariance)
    assert np.abs(mean_z).max() < 4
    assert np.abs(covariance_z).max() < 4.8  # the largest of 820 entries


def test_large_eta_is_sgld_with_the_same_key():
    """T10."""
    arguments = {"step_size": 0.05, "temperature": 0.7}
    flat = last_states(bdl.FlatBasinSGLD(TARGET.model, eta=1e6, **arguments), TARGET.y, steps=50, chains=4)
    plain = last_states(bdl.SGLD(TARGET.model, **arguments), TARGET.y, steps=50, chains=4)
    np.testing.assert_allclose(flat.z["w"], plain.z["w"], atol=1e-4)


def test_tiny_eta_stays_finite_and_moves_as_one_particle():
    """T10: eta -> 0 ties position and anchor together, at half the speed."""
    z, g = {"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}
    noises = ({"w": jnp.array([0.3])}, {"w": jnp.array([-0.1])})
    z1, u1 = exact_step(z, z, g, noises, 0.1, 1.0, {"w": 1.0}, 1e-12)
    np.testing.assert_allclose(z1["w"], u1["w"], atol=1e-5)
    expected = 1.0 - 0.1 * 2.0 / 2 + np.sqrt(0.1) * 0.2 / np.sqrt(2)
    np.testing.assert_allclose(z1["w"], expected, rtol=1e-5)
    kernel = bdl.FlatBasinSGLD(TARGET.model, step_size=0.05, eta=1e-8)
    assert np.isfinite(last_states(kernel, TARGET.y, steps=100, chains=4).z["w"]).all()


@pytest.mark.parametrize(
    ("arguments", "bound"),
    [({"coupling": "euler"}, 0.3), ({"coupling": "euler", "momentum": 0.5}, 0.45), ({"coupling": "gibbs"}, 0.6)],
)
def test_steps_beyond_the_bound_of_the_coupling_are_refused(arguments, bound):
    bdl.FlatBasinSGLD(mixture, step_size=0.99 * bound, eta=0.3, **arguments)
    bdl.FlatBasinSGLD(mixture, step_size=10.0, eta=0.3, coupling="exact")
    for step_size in (
        bound,
        bdl.cyclical(bound, steps_per_cycle=10),
        optax.warmup_cosine_decay_schedule(0.0, bound * 1.01, 100, 1000),
    ):
        with pytest.raises(ValueError, match="the largest step.*must stay below"):
            bdl.FlatBasinSGLD(mixture, step_size=step_size, eta=0.3, **arguments)


def test_the_bound_is_where_the_coupling_diverges():
    """On a flat energy the joint update is stable up to a = eta and not beyond: without the check it would explode."""
    for a, stable in ((0.99 * ETA, True), (1.01 * ETA, False)):
        F = np.eye(2) - a / ETA * np.array([[1, -1], [-1, 1]])
        assert (np.abs(np.linalg.eigvals(F)).max() <= 1 + 1e-12) == stable


def test_anchor_steps_sets_eta_from_the_largest_step():
    assert bdl.FlatBasinSGLD(mixture, step_size=0.01, anchor_steps=50).eta == pytest.approx(0.5)
    schedule = bdl.cyclical(0.02, steps_per_cycle=10)
    assert bdl.FlatBasinSGLD(mixture, step_size=schedule, anchor_steps=50).eta == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "one of eta and anchor_steps"),
        ({"eta": 0.1, "anchor_steps": 5}, "one of eta and anchor_steps"),
        ({"eta": -1.0}, "eta must be a number"),
        ({"eta": float("inf")}, "eta must be a number"),
        ({"eta": 0.1, "coupling": "joint"}, "coupling must be one of 'exact', 'euler', 'gibbs'"),
        ({"eta": 0.1, "momentum": 0.9}, 'goes with coupling="euler" alone'),
        ({"eta": 0.1, "coupling": "euler", "momentum": 1.0}, "momentum must be a number"),
        ({"eta": 0.1, "inner_steps": 5}, 'goes with coupling="gibbs" alone'),
        ({"eta": 0.1, "coupling": "gibbs", "inner_steps": 1}, "the anchor has no memory"),
    ],
)
def test_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        bdl.FlatBasinSGLD(mixture, step_size=0.01, **arguments)


def test_anchor_steps_needs_a_known_largest_step():
    with pytest.raises(ValueError, match="a schedule does not tell"):
        bdl.FlatBasinSGLD(mixture, step_size=optax.constant_schedule(0.1), anchor_steps=10)


def test_position_and_anchor_start_together_and_the_anchor_is_collected_on_request():
    kernel = bdl.FlatBasinSGLD(mixture, step_size=0.01, eta=0.1, collect_anchor=True)
    state = kernel.init(random.key(0), 0, None, (), {})
    jax.tree.map(np.testing.assert_array_equal, state.z, state.z_anchor)
    assert "z_anchor" in kernel.default_fields
    assert "z_anchor" not in bdl.FlatBasinSGLD(mixture, step_size=0.01, eta=0.1).default_fields
