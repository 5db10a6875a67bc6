# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The law of the number of chains against closed forms and simulation; clusters of chains against what was planted."""

import itertools
import math

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.infer import MCMC, NUTS

import numpyro_bdl as bdl
from numpyro_bdl.symmetry import (
    discovery_probability,
    expected_chains,
    functional_modes,
    half_normal_probabilities,
    plan_chains,
)

# modes: E(G), Markov at .90, .95, .99, exact at .99, by the assumption of the paper; then E(G), Markov and exact at .99
# for equal probabilities
TABLE = {
    1: (1, 10, 20, 100, 1, 1, 100, 1),
    2: (7.9729, 80, 160, 798, 34, 3, 300, 8),
    3: (12.7309, 128, 255, 1274, 54, 5.5, 550, 15),
    4: (18.0415, 181, 361, 1805, 73, 8.3333, 834, 21),
    5: (23.8486, 239, 477, 2385, 92, 11.4167, 1142, 28),
    6: (30.0893, 301, 602, 3009, 112, 14.7, 1470, 36),
    7: (36.708, 368, 735, 3671, 131, 18.15, 1815, 43),
    8: (43.6611, 437, 874, 4367, 151, 21.7429, 2175, 51),
    9: (50.9142, 510, 1019, 5092, 171, 25.4607, 2547, 58),
    10: (58.44, 585, 1169, 5844, 192, 29.2897, 2929, 66),
}
IZMAILOV = np.array([730, 536, 8]) / 1274  # clusters of the paper's run


def subsets(p):
    return ((len(j), sum(j)) for k in range(len(p) + 1) for j in itertools.combinations(p, k))


def by_inclusion_and_exclusion(n, p):
    return math.fsum((-1) ** k * max(1 - total, 0) ** n for k, total in subsets(p))


# ---- the coupon collector -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", TABLE)
def test_table(modes):
    expected, *markov, exact, equal, equal_markov, equal_exact = TABLE[modes]
    p = half_normal_probabilities(modes)
    assert expected_chains(p) == pytest.approx(expected, abs=5.1e-5)
    assert [plan_chains(modes, p, confidence, "markov") for confidence in (0.9, 0.95, 0.99)] == markov
    assert plan_chains(modes, p) == exact
    assert expected_chains(np.full(modes, 1 / modes)) == pytest.approx(equal, abs=5.1e-5)
    assert plan_chains(modes, method="markov") == equal_markov
    assert plan_chains(modes) == equal_exact


@pytest.mark.parametrize("modes", [1, 2, 7, 100, 3000, 100_000])
def test_equal_modes_take_the_harmonic_number_of_rounds(modes):
    harmonic = math.fsum(1 / k for k in range(1, modes + 1))
    assert expected_chains(np.full(modes, 1 / modes)) == pytest.approx(modes * harmonic, rel=1e-11)


@pytest.mark.parametrize("p", [[1.0], [0.3, 0.7], [0.2] * 5, IZMAILOV, half_normal_probabilities(9), [1e-6, 1 - 1e-6]])
def test_expected_chains_by_inclusion_and_exclusion(p):
    modes = len(p)
    expected = math.fsum((-1) ** (modes - 1 - k) / (1 - total) for k, total in subsets(p) if k < modes)
    assert expected_chains(p) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [[1.0], [0.5, 0.5], [0.1] * 10, IZMAILOV, half_normal_probabilities(8)])
@pytest.mark.parametrize("n", [1, 2, 8, 12, 54, 700])
def test_discovery_probability_by_inclusion_and_exclusion(p, n):
    exact = by_inclusion_and_exclusion(n, list(p)) if n >= len(p) else 0
    assert discovery_probability(n, p) == pytest.approx(exact, abs=2e-12)


def test_discovery_probability_of_many_modes_and_many_chains():
    rare = 1e-9
    n = 2 * 10**9
    assert discovery_probability(n, [rare, 1 - rare]) == pytest.approx(-math.expm1(n * math.log1p(-rare)), rel=1e-9)
    # equal modes by surjections, in integers
    modes, n = 300, 3000
    surjections = sum((-1) ** k * math.comb(modes, k) * (modes - k) ** n for k in range(modes + 1))
    assert discovery_probability(n, np.full(modes, 1 / modes)) == pytest.approx(surjections / modes**n, abs=2e-12)


def test_plan_is_the_smallest_number_for_many_unequal_modes():
    p = np.random.default_rng(0).dirichlet(np.full(40, 5.0))
    n = plan_chains(40, p, 0.9)
    assert discovery_probability(n, p) >= 0.9 > discovery_probability(n - 1, p)
    assert n < plan_chains(40, p, 0.9, "union") < plan_chains(40, p, 0.9, "markov")


def test_facts_about_the_paper():
    p = half_normal_probabilities(3)
    np.testing.assert_allclose(p, [0.5665, 0.3505, 0.0830], atol=5.1e-5)
    found = [discovery_probability(n, p) for n in (8, 10, 12)]
    np.testing.assert_allclose(found, [0.478, 0.569, 0.642], atol=5.1e-4)
    assert expected_chains(IZMAILOV) == pytest.approx(159.3, abs=0.051)
    assert plan_chains(3, IZMAILOV) == 732
    assert discovery_probability(1274, IZMAILOV) == pytest.approx(0.9997, abs=5.1e-5)


@pytest.mark.parametrize("p", [half_normal_probabilities(3), np.array([0.1, 0.2, 0.3, 0.4])])
def test_simulated_collectors(p):
    rng, runs = np.random.default_rng(0), 20_000
    chains = rng.choice(len(p), (runs, 400), p=p)
    first = np.stack([np.argmax(chains == mode, 1) for mode in range(len(p))])
    assert all((chains == mode).any(1).all() for mode in range(len(p)))
    needed = first.max(0) + 1
    assert abs(needed.mean() - expected_chains(p)) < 4 * needed.std() / np.sqrt(runs)
    for n in (5, 10, 30):
        found = discovery_probability(n, p)
        assert abs((needed <= n).mean() - found) < 4 * np.sqrt(found * (1 - found) / runs)


def test_union_is_its_formula_and_an_upper_bound():
    assert plan_chains(3, [0.2, 0.3, 0.5], 0.95, "union") == math.ceil(math.log(0.05 / 3) / math.log(0.8))
    assert plan_chains(1, method="union") == 1
    for p in (half_normal_probabilities(6), np.full(50, 0.02), IZMAILOV):
        assert plan_chains(len(p), p) <= plan_chains(len(p), p, method="union")


def test_a_probability_met_exactly_is_enough():
    assert plan_chains(2, confidence=0.75) == 3
    assert plan_chains(2, confidence=0.75 + 1e-9) == 4


def test_bad_plans():
    with pytest.raises(ValueError, match="num_modes must be an integer of at least 1, got 0"):
        plan_chains(0)
    with pytest.raises(ValueError, match=r"got 2 probabilities for num_modes=3"):
        plan_chains(3, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"positive numbers \(mode,\) with sum 1, got shape \(2,\) with sum 1.5"):
        plan_chains(2, [0.5, 1.0])
    with pytest.raises(ValueError, match="least 0; leave out modes of probability 0"):
        expected_chains([1.0, 0.0])
    with pytest.raises(ValueError, match="positive numbers"):
        discovery_probability(5, [np.nan, 0.5])
    with pytest.raises(ValueError, match=r"confidence must be a number in \(0, 1\), got 1"):
        plan_chains(3, confidence=1)
    with pytest.raises(ValueError, match="method must be one of 'exact', 'markov', 'union', got 'bound'"):
        plan_chains(3, method="bound")
    with pytest.raises(ValueError, match="method='union' takes any"):
        plan_chains(3, confidence=1 - 1e-10)
    assert plan_chains(3, confidence=1 - 1e-10, method="union") > plan_chains(3, method="union")
    with pytest.raises(ValueError, match="num_chains must be an integer of at least 1"):
        discovery_probability(0, [1.0])


# ---- the modes of a run ---------------------------------------------------------------------------------------------

X = np.linspace(0, 1, 32)


def smooth_draws(rng, chains, draws, memory):
    """Chains of smooth functions in one mode, an autoregression of the given memory: (chain, draw, point)."""
    kernel = np.exp(-((X[:, None] - X) ** 2) / (2 * 0.2**2)) + 1e-6 * np.eye(len(X))
    noise = rng.normal(size=(draws, chains, len(X))) @ np.linalg.cholesky(kernel).T
    path = [noise[0]]
    for shock in noise[1:]:
        path.append(memory * path[-1] + np.sqrt(1 - memory**2) * shock)
    return np.stack(path, 1)


@pytest.mark.parametrize(("chains", "draws", "memory"), [(4, 50, 0.0), (8, 100, 0.5), (16, 200, 0.8), (32, 200, 0.6)])
def test_one_mode_is_not_split(chains, draws, memory):
    rng = np.random.default_rng(0)
    for _ in range(10):
        modes = functional_modes(smooth_draws(rng, chains, draws, memory))
        assert modes.num_modes == 1
        assert modes.distances.max() < 2


def test_many_independent_values_do_not_split_a_mode():
    values = np.random.default_rng(0).normal(size=(6, 60, 5000))
    modes = functional_modes(values)
    assert modes.num_modes == 1
    # a line from the draws that it is judged by would: chains would be as far apart as this
    naive = np.sqrt(5000 * 2 / 60)
    assert naive > 10 > modes.distances.max()


@pytest.mark.parametrize("where", [slice(None), slice(12, 20), slice(0, 3)])
@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_two_modes_are_not_merged(where, memory):
    rng = np.random.default_rng(1)
    values = smooth_draws(rng, 8, 200, memory)
    lower = [1, 4, 6]
    values[lower, :, where] -= 5
    modes = functional_modes(values)
    assert modes.sizes.tolist() == [5, 3]
    np.testing.assert_array_equal(modes.labels, [0, 1, 0, 0, 1, 0, 1, 0])
    np.testing.assert_allclose(modes.probabilities, [5 / 8, 3 / 8])
    np.testing.assert_allclose(modes.means["functions"], values.mean(1))
    for name, draws in (("y", values), ("z", values[..., None])):
        np.testing.assert_array_equal(functional_modes({name: draws}).labels, modes.labels)


def test_distance_is_that_of_ashman_on_one_value():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, 100_000), rng.normal(6, 2, 100_000)
    modes = functional_modes(np.stack([a, b]))
    distance = abs(a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2)
    assert modes.distances[0, 1] == pytest.approx(distance, rel=1e-4)
    assert modes.distances[0, 1] == modes.distances[1, 0]


def test_distances_do_not_depend_on_the_units_of_the_values():
    rng = np.random.default_rng(3)
    values = smooth_draws(rng, 5, 100, 0.5)
    values[3] += 2 * X
    distances = functional_modes(values).distances
    np.testing.assert_allclose(functional_modes(values * (1 + 100 * X) - 7).distances, distances, atol=1e-10)


def test_modes_are_not_joined_by_chains_in_between():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(5, 500, 1)) + 1.5 * np.arange(5)[:, None, None]
    modes = functional_modes(values)
    assert modes.num_modes > 1
    for label in range(modes.num_modes):
        inside = modes.labels == label
        assert modes.distances[np.ix_(inside, inside)].max() <= 2
    wide = rng.normal(size=(3, 500, 1)) * 0.1
    wide[0] -= 3
    wide[1] += 3
    wide[2] += rng.choice([-3, 3], (500, 1))  # travels between the two
    labels = functional_modes(wide).labels
    assert labels[0] != labels[1]


def test_chains_that_do_not_move():
    values = np.random.default_rng(5).normal(size=(4, 100, 3))
    values[1] = 0.2
    assert functional_modes(values).num_modes == 1
    frozen = np.broadcast_to(np.array([1.0, 1.0, 2.0])[:, None, None], (3, 10, 2))
    modes = functional_modes(frozen)
    np.testing.assert_array_equal(modes.labels, [0, 0, 1])
    assert modes.distances[0, 2] == np.inf


def test_the_threshold_is_the_argument():
    values = np.random.default_rng(6).normal(size=(2, 2000, 1)) + np.array([0, 3])[:, None, None]
    assert functional_modes(values).num_modes == 2
    assert functional_modes(values, separation=3.5).num_modes == 1


def planted(sizes):
    centers = np.repeat(np.arange(len(sizes)), sizes)[:, None, None] * 20.0
    return functional_modes(np.random.default_rng(0).normal(size=(len(centers), 20, 2)) + centers)


def test_estimates_from_the_sizes():
    modes = planted([5, 2, 1, 1])
    assert modes.sizes.tolist() == [5, 2, 1, 1]
    p = np.array([5, 2, 1, 1]) / 9
    assert modes.effective_number == pytest.approx(np.prod(p**-p))
    assert modes.unseen == pytest.approx(2 / 9)
    assert modes.further_chains() == math.ceil(math.log(0.01) / math.log(7 / 9))
    assert modes.further_chains(0.5, unseen=0.5) == 1
    assert planted([3, 3]).further_chains() == 0
    assert planted([1, 1, 1]).further_chains() == 1
    assert planted([4]).effective_number == 1
    assert planted([1]).num_modes == 1
    n = modes.further_chains(0.95)
    assert 1 - (7 / 9) ** n >= 0.95 > 1 - (7 / 9) ** (n - 1)


def test_interval_of_the_unseen_mass():
    low, high = planted([4, 4]).unseen_interval()
    assert (low, high) == (0, pytest.approx(-math.log(0.025) / 8))
    low, high = planted([20, 1, 1, 1, 1]).unseen_interval(0.9)
    # Garwood: 4 or more, and 4 or fewer, have probability .05 at the ends
    poisson = lambda mean, count: math.exp(-mean) * mean**count / math.factorial(count)
    assert 1 - sum(poisson(24 * low, k) for k in range(4)) == pytest.approx(0.05)
    assert sum(poisson(24 * high, k) for k in range(5)) == pytest.approx(0.05)


@pytest.mark.parametrize("p", [half_normal_probabilities(3), IZMAILOV, np.full(40, 1 / 40), np.full(600, 1 / 600)])
@pytest.mark.parametrize("chains", [8, 32])
def test_interval_covers_the_mean_of_the_unseen_mass(p, chains):
    runs, level = 4000, 0.95
    counts = np.random.default_rng(0).multinomial(chains, p, runs)
    mean = np.sum(p * (1 - p) ** chains)
    alone, which = np.unique(np.sum(counts == 1, 1), return_inverse=True)
    template = planted([2])
    covered = []
    for singles in alone:
        sizes = np.array([chains - singles] * int(singles < chains) + [1] * int(singles))
        low, high = template._replace(sizes=sizes).unseen_interval(level)
        covered.append(low <= mean <= high)
    share = np.array(covered)[which].mean()
    assert share >= level - 4 * np.sqrt(level * (1 - level) / runs)


def test_a_chain_that_is_not_finite_is_left_out():
    values = smooth_draws(np.random.default_rng(7), 5, 100, 0.5)
    values[2, 60:] = np.nan
    values[4] += 9
    with pytest.warns(UserWarning, match=r"leaves out the chains \[2\]"):
        modes = functional_modes(values)
    np.testing.assert_array_equal(modes.labels, [0, 0, -1, 0, 1])
    assert modes.sizes.tolist() == [3, 1]
    assert np.isnan(modes.distances[2]).all()
    with pytest.raises(ValueError, match="every chain has function values that are not finite"):
        functional_modes(np.full((2, 10, 3), np.nan))


def test_bad_functions():
    with pytest.raises(ValueError, match=r"expected arrays \(chain, draw, ...\).* got functions \(5,\)"):
        functional_modes(np.zeros(5))
    with pytest.raises(ValueError, match=r"as many chains and draws each, got a \(2, 9, 1\), b \(2, 8, 1\)"):
        functional_modes({"a": np.zeros((2, 9, 1)), "b": np.zeros((2, 8, 1))})
    with pytest.raises(ValueError, match="at least 4 draws of each chain, got 3 chains of 1"):
        functional_modes(np.zeros((3, 1, 4)))
    with pytest.raises(ValueError, match=r"separation must be a number in \(0, inf\), got 0"):
        functional_modes(np.zeros((3, 9, 4)), separation=0)
    with pytest.raises(ValueError, match="holds no draws yet"):
        functional_modes(MCMC(NUTS(lambda: None), num_warmup=1, num_samples=1))
    with pytest.raises(ValueError, match=r"coverage|confidence must be a number in \(0, 1\)"):
        planted([2]).unseen_interval(1.5)
    with pytest.raises(ValueError, match=r"unseen must be a number in \[0, 1\)"):
        planted([2]).further_chains(unseen=1.5)


def test_a_run_and_its_tree_have_the_same_modes():
    """Observed is the square of a line: its slope has two signs, and each is a mode of the function."""

    def model(x, y=None):
        slope = numpyro.sample("slope", dist.Normal(0, 1))
        f = numpyro.deterministic("f", slope * x)
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(f**2, 0.1), obs=y)

    x = np.linspace(0.1, 1, 20)
    mcmc = MCMC(
        NUTS(model), num_warmup=200, num_samples=100, num_chains=6, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(random.key(0), x, x**2)
    signs = np.sign(mcmc.get_samples(group_by_chain=True)["slope"])
    assert (signs == signs[:, :1]).all()
    assert len(np.unique(signs)) == 2
    tree = bdl.to_datatree(mcmc, sites=("f",))
    modes = functional_modes(tree)
    assert modes.num_modes == 2
    for label in range(2):
        assert len(np.unique(signs[modes.labels == label])) == 1
    # the location of y is the square, in which the two are one; a run gives the functions of its observed sites
    assert functional_modes(mcmc).num_modes == functional_modes(bdl.to_datatree(mcmc)).num_modes == 1
