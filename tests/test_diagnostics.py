# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Diagnostics against their equations, against what was planted, and on a network that is sampled."""

import subprocess
import sys
import warnings

import arviz as az
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import MCMC, NUTS
from scipy import stats

import numpyro_bdl as bdl
from numpyro_bdl import diagnostics
from numpyro_bdl.symmetry import functional_modes

CHAINS, DRAWS, UNITS = 4, 120, 3


@pytest.fixture
def weights():
    """Chains of a layer that drift a little: kernel (chain, draw, 2, unit) and bias (chain, draw, unit)."""
    rng = np.random.default_rng(0)
    drift = np.linspace(0, 1, DRAWS)[:, None]
    kernel = rng.normal(size=(CHAINS, DRAWS, 2, UNITS)) + drift[..., None] * rng.normal(size=(CHAINS, 1, 2, UNITS))
    return {
        "kernel": kernel,
        "bias": rng.normal(size=(CHAINS, DRAWS, UNITS)) + drift * rng.normal(size=(CHAINS, 1, UNITS)),
    }


def rank_rhat(segments):
    """R-hat of (segment, draw), by the equation."""

    def rhat(values):
        ranks = stats.rankdata(values).reshape(values.shape)
        z = stats.norm.ppf((ranks - 3 / 8) / (values.size + 1 / 4))
        n, within, between = z.shape[1], z.var(1, ddof=1).mean(), z.mean(1).var(ddof=1)
        return np.sqrt(((n - 1) / n * within + between) / within)

    return max(rhat(segments), rhat(np.abs(segments - np.median(segments))))


def test_importing_the_module_does_not_load_arviz():
    code = "import sys; from numpyro_bdl import diagnostics; assert not {'arviz', 'arviz_stats'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- within chains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [4, 6, 10])
def test_chainwise_rhat_is_its_equation(weights, segments):
    rhat = diagnostics.chainwise_rhat(weights, segments=segments)
    assert {name: value.shape for name, value in rhat.items()} == {"kernel": (4, 2, 3), "bias": (4, 3)}
    for chain in range(CHAINS):
        for unit in range(UNITS):
            expected = rank_rhat(weights["bias"][chain, :, unit].reshape(segments, -1))
            assert rhat["bias"][chain, unit] == pytest.approx(expected, rel=1e-12)
            expected = rank_rhat(weights["kernel"][chain, :, 1, unit].reshape(segments, -1))
            assert rhat["kernel"][chain, 1, unit] == pytest.approx(expected, rel=1e-12)


def test_chainwise_rhat_drops_what_is_left_over_at_the_start(weights):
    rhat = diagnostics.chainwise_rhat(weights["bias"][:, 3:])["posterior"]
    for chain in range(CHAINS):
        assert rhat[chain, 0] == pytest.approx(rank_rhat(weights["bias"][chain, 4:, 0].reshape(4, 29)), rel=1e-12)


def test_chainwise_rhat_does_not_depend_on_the_copy_of_the_network(weights):
    """An element of the group for each chain: R-hat changes, chainwise R-hat moves with the units."""
    rng = np.random.default_rng(1)
    orders = np.stack([rng.permutation(UNITS) for _ in range(CHAINS)])
    signs = rng.choice([-1, 1], (CHAINS, 1, UNITS))
    order = orders[:, None]
    permuted = {
        "kernel": np.take_along_axis(weights["kernel"], order[:, None], -1),
        "bias": np.take_along_axis(weights["bias"], order, -1),
    }
    flipped = {"kernel": permuted["kernel"] * signs[:, None], "bias": permuted["bias"] * signs}
    raw, moved, turned = (diagnostics.chainwise_rhat(w) for w in (weights, permuted, flipped))
    for name in weights:
        axes = (slice(None),) + (None,) * (raw[name].ndim - 2)
        np.testing.assert_array_equal(moved[name], np.take_along_axis(raw[name], orders[axes], -1))
        np.testing.assert_allclose(turned[name], moved[name], rtol=1e-12)
    offset = 5 * np.arange(UNITS)
    far = az.rhat(weights["bias"] + offset) - az.rhat(np.take_along_axis(weights["bias"] + offset, order, -1))
    assert np.abs(far).max() > 0.5


def test_chainwise_rhat_finds_the_chain_that_drifts():
    draws = np.random.default_rng(2).normal(size=(3, 400)) + 100 * np.arange(3)[:, None]
    draws[1] += np.linspace(0, 4, 400)
    rhat = diagnostics.chainwise_rhat({"w": draws})["w"]
    assert rhat[1] > 1.3
    assert max(rhat[0], rhat[2]) < 1.03


def test_chainwise_ess_is_the_sum_over_chains(weights):
    ess = diagnostics.chainwise_ess(weights)
    assert ess["kernel"].shape == (2, UNITS)
    alone = sum(az.ess(weights["bias"][chain : chain + 1], chain_axis=0, draw_axis=1) for chain in range(CHAINS))
    np.testing.assert_allclose(ess["bias"], alone, rtol=1e-12)
    # chains in different copies: together they count as few draws
    apart = weights["bias"] + 50 * np.arange(CHAINS)[:, None, None]
    np.testing.assert_allclose(diagnostics.chainwise_ess(apart)["posterior"], ess["bias"], rtol=1e-12)
    assert az.ess(apart, chain_axis=0, draw_axis=1).max() < 2 * CHAINS < ess["bias"].min()


def test_chainwise_ess_of_an_autoregression():
    """Its ESS is S (1 - a) / (1 + a); the mean of many chains has a small Monte Carlo error."""
    rng, a, chains, draws = np.random.default_rng(3), 0.6, 60, 2000
    path = [rng.normal(size=chains)]
    for _ in range(draws - 1):
        path.append(a * path[-1] + np.sqrt(1 - a**2) * rng.normal(size=chains))
    each = np.array([diagnostics.chainwise_ess(chain[None])["posterior"] for chain in np.stack(path, 1)])
    total = diagnostics.chainwise_ess(np.stack(path, 1))["posterior"]
    assert total == pytest.approx(each.sum())
    assert abs(total - chains * draws * (1 - a) / (1 + a)) < 4 * each.std() * np.sqrt(chains)


def test_a_chain_that_does_not_move_counts_as_one_draw():
    draws = np.random.default_rng(4).normal(size=(3, 100, 2))
    others = diagnostics.chainwise_ess(draws[1:])["posterior"]
    draws[0] = 1.5
    np.testing.assert_allclose(diagnostics.chainwise_ess(draws)["posterior"], 1 + others)
    rhat = diagnostics.chainwise_rhat(draws)["posterior"]
    assert np.isnan(rhat[0]).all()
    assert np.isfinite(rhat[1:]).all()
    draws[0, 50:] = np.nan
    assert np.isnan(diagnostics.chainwise_ess(draws)["posterior"]).all()


# ---- between chains -------------------------------------------------------------------------------------------------


def test_variances_by_hand_and_of_planted_chains():
    rng = np.random.default_rng(5)
    chains, draws = 2000, 50
    draws_of = {
        "near": rng.normal(0, 2, (chains, draws, 3)),
        "far": rng.normal(0, 3, (chains, 1, 2)) + rng.normal(0, 1, (chains, draws, 2)),
    }
    found = diagnostics.variances(draws_of)
    for name, between, within, values in (("near", 0, 4, 3), ("far", 9, 1, 2)):
        expected = between + within / draws
        assert abs(found[name].between - expected) < 4 * expected * np.sqrt(2 / (chains * values))
        assert abs(found[name].within - within) < 4 * within * np.sqrt(2 / (chains * draws * values))
        assert found[name].share == pytest.approx(found[name].between / (found[name].between + found[name].within))


def test_function_summary_has_the_numbers_of_arviz():
    rng = np.random.default_rng(6)
    functions = rng.normal(size=(4, 200, 10, 2))
    functions[:, :, :3] += np.array([0, 0, 4, 4])[:, None, None, None]  # two modes, seen at 3 of 10 points
    rhat = az.rhat(functions, chain_axis=0, draw_axis=1)
    ess = az.ess(functions, chain_axis=0, draw_axis=1)
    summary = diagnostics.function_summary(functions)
    assert summary.values == 20
    assert (summary.rhat_median, summary.rhat_max) == pytest.approx((np.median(rhat), rhat.max()))
    assert summary.share_mixed == pytest.approx(0.7)
    assert summary.ess_min == pytest.approx(ess.min())
    assert summary.rhat_max > 1.5
    assert summary.chainwise_rhat_max < 1.1
    assert summary.chainwise_ess_min > 400
    assert diagnostics.function_summary(functions, threshold=10).share_mixed == 1
    by_name = diagnostics.function_summary({"a": functions[:, :, :4], "b": functions[:, :, 4:]})
    assert by_name == summary
    fixed = np.concatenate([functions, np.zeros((4, 200, 10, 1))], -1)  # the last logit of a softmax
    assert diagnostics.function_summary(fixed) == summary


def test_function_summary_of_chains_with_known_rhat_and_ess():
    """Chain means of variance t make R-hat^2 = 1 + t, as all draws together are Gaussian; AR(1) has a known ESS."""
    rng, chains, draws, size, spread, decay = np.random.default_rng(9), 60, 100, 10, 0.5, 0.5
    apart = np.sqrt(spread) * rng.normal(size=(chains, 1, size)) + rng.normal(size=(chains, draws, size))
    summary = diagnostics.function_summary(apart)
    of_one_value = spread * np.sqrt(2 / (chains - 1))
    assert abs(summary.rhat_median**2 - (1 + spread)) < 4 * of_one_value * np.sqrt(np.pi / 2 / size)

    path = [rng.normal(size=(4, size))]
    for _ in range(1000 - 1):
        path.append(decay * path[-1] + np.sqrt(1 - decay**2) * rng.normal(size=(4, size)))
    path = np.stack(path, 1)
    each = np.array([diagnostics.function_summary(path[..., [n]]).ess_min for n in range(size)])
    exact = 4 * 1000 * (1 - decay) / (1 + decay)
    assert abs(each.mean() - exact) < 4 * each.std(ddof=1) / np.sqrt(size)
    assert diagnostics.function_summary(path).ess_min == pytest.approx(each.min())


def test_function_summary_of_a_chain_that_does_not_move():
    functions = np.random.default_rng(7).normal(size=(4, 100, 5))
    functions[2] = functions[2, :1]
    with pytest.warns(UserWarning, match=r"1 of 4 chains hardly differ from draw to draw, .*: 2 \("):
        summary = diagnostics.function_summary(functions)
    assert summary.spread_min < 1e-12
    assert summary.chainwise_rhat_max == np.inf
    assert summary.chainwise_ess_min < 301


# ---- chains to leave out --------------------------------------------------------------------------------------------


def test_unmixed_chains_have_a_low_predictive_density():
    rng = np.random.default_rng(8)
    log_likelihood = rng.normal(-1, 0.3, size=(7, 40, 50))
    log_likelihood[4] -= 2
    expected = np.log(np.exp(log_likelihood).mean(1)).mean(-1)
    with pytest.warns(UserWarning, match=r"1 of 7 chains have a log predictive density below .*: 4 \(-2.9"):
        found = diagnostics.unmixed_chains(log_likelihood)
    np.testing.assert_allclose(found.lppd, expected)
    median = np.median(expected)
    assert found.threshold == pytest.approx(median - 5 * np.median(np.abs(expected - median)))
    np.testing.assert_array_equal(found.unmixed, np.arange(7) == 4)
    assert found.kept.tolist() == [0, 1, 2, 3, 5, 6]
    tree = az.from_dict({"log_likelihood": {"y": log_likelihood}, "posterior": {"w": log_likelihood[..., 0]}})
    with pytest.warns(UserWarning, match="1 of 7 chains"):
        np.testing.assert_array_equal(diagnostics.unmixed_chains(tree).unmixed, found.unmixed)
    assert tree.isel(chain=found.kept)["posterior"].sizes["chain"] == 6


def test_unmixed_chains_are_judged_by_the_deviations_asked_for():
    lppd = np.array([-1.0, -1.1, -1.2, -1.3, -1.75])
    log_likelihood = np.broadcast_to(lppd[:, None, None], (5, 4, 3))  # median -1.2, deviation .1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not diagnostics.unmixed_chains(log_likelihood, deviations=6).unmixed.any()
    for deviations in (5, 5.4):
        with pytest.warns(UserWarning, match="1 of 5 chains"):
            assert diagnostics.unmixed_chains(log_likelihood, deviations=deviations).kept.tolist() == [0, 1, 2, 3]


def test_unmixed_chains_do_not_underflow_and_flag_nan():
    log_likelihood = np.random.default_rng(9).normal(-5000, 1, size=(5, 30, 20))
    log_likelihood[1, 10:] = np.nan
    with pytest.warns(UserWarning, match=r"1 of 5 chains .*: 1 \(nan\)"):
        found = diagnostics.unmixed_chains(log_likelihood)
    assert found.kept.tolist() == [0, 2, 3, 4]
    assert np.isfinite(found.lppd[found.kept]).all()


# ---- a network ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="out")(jnp.tanh(nn.Dense(2, name="hidden")(x)))


@pytest.fixture(scope="module")
def sinusoid():
    """Eight chains of a network with one functional mode and 8 copies."""
    x = np.random.default_rng(10).uniform(-2, 2, (60, 1)).astype(np.float32)
    y = np.sin(1.5 * x[:, 0]) + 0.2 * np.random.default_rng(11).normal(size=60)

    def model(x, y=None):
        net = random_flax_module("net", Net(), dist.Normal(0, 1), input_shape=(1,))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(net(x)[:, 0], 0.2), obs=y)

    kernel = NUTS(model, max_tree_depth=6)
    mcmc = MCMC(kernel, num_warmup=200, num_samples=150, num_chains=8, chain_method="vectorized", progress_bar=False)
    mcmc.run(random.key(0), x, y)
    return mcmc


def test_one_function_in_many_copies(sinusoid):
    """R-hat of the weights is large, that of the functions is not; the functions are one mode."""
    weights = sinusoid.get_samples(group_by_chain=True)
    rhat = np.concatenate([np.ravel(az.rhat(np.asarray(w))) for w in weights.values()])
    assert np.median(rhat) > 1.5
    summary = diagnostics.function_summary(sinusoid)
    assert summary.rhat_max < 1.1
    assert summary.share_mixed == 1
    tree = bdl.to_datatree(sinusoid, log_likelihood=True)
    assert functional_modes(tree).num_modes == 1
    assert diagnostics.function_summary(tree) == summary
    within = diagnostics.chainwise_rhat(sinusoid)
    assert {name.replace("/", "."): value.shape for name, value in within.items()} == {
        name: value.shape[:1] + value.shape[2:] for name, value in tree["posterior"].data_vars.items()
    }
    shares = diagnostics.variances(sinusoid)
    assert min(shares[name].share for name in shares if "kernel" in name) > 0.5
    assert diagnostics.variances(tree, group="functions")["y"].share < 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnostics.unmixed_chains(sinusoid)
    assert len(found.kept) == 8
    np.testing.assert_array_equal(found.lppd, diagnostics.unmixed_chains(tree).lppd)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input():
    draws = np.random.default_rng(12).normal(size=(4, 40, 3))
    with pytest.raises(ValueError, match="segments must be even, since ArviZ halves what it is given; got 5"):
        diagnostics.chainwise_rhat(draws, segments=5)
    with pytest.raises(ValueError, match="segments must be an integer of at least 4, got 2"):
        diagnostics.chainwise_rhat(draws, segments=2)
    with pytest.raises(ValueError, match="at least 24 draws of each chain, got 4 chains of 20"):
        diagnostics.chainwise_rhat(draws[:, :20], segments=12)
    with pytest.raises(ValueError, match="variances compares chains: expected at least 2, got 1"):
        diagnostics.variances(draws[:1])
    with pytest.raises(ValueError, match="function_summary compares chains"):
        diagnostics.function_summary(draws[:1])
    with pytest.raises(ValueError, match="unmixed_chains compares chains: expected at least 3, got 2"):
        diagnostics.unmixed_chains(draws[:2])
    with pytest.raises(ValueError, match="every function value is the same in all draws"):
        diagnostics.function_summary(np.ones((3, 20, 2)))
    with pytest.raises(ValueError, match=r"threshold must be a number in \(1, inf\), got 1"):
        diagnostics.function_summary(draws, threshold=1)
    with pytest.raises(ValueError, match=r"deviations must be a number in \(0, inf\), got -1"):
        diagnostics.unmixed_chains(draws, deviations=-1)
    bad = draws.copy()
    bad[[0, 2], 5] = np.inf
    with pytest.raises(ValueError, match=r"the chains \[0, 2\] have function values that are not finite"):
        diagnostics.function_summary(bad)
    with pytest.raises(ValueError, match="no chain has a log likelihood that is finite"):
        diagnostics.unmixed_chains(np.full((3, 5, 2), np.nan))
    tree = az.from_dict({"posterior": {"w": draws}})
    with pytest.raises(ValueError, match="the tree has no group 'functions'; its groups: posterior"):
        diagnostics.function_summary(tree)
    with pytest.raises(
        ValueError, match=r"expected arrays \(chain, draw, ...\).* got none; MCMC.get_samples gives them"
    ):
        diagnostics.chainwise_ess({})
    mcmc = MCMC(NUTS(lambda: None), num_warmup=1, num_samples=1)
    with pytest.raises(ValueError, match="chainwise_ess: the MCMC object holds no draws yet; run it first"):
        diagnostics.chainwise_ess(mcmc)
    with pytest.raises(ValueError, match="got group='anchor'; for other groups hand in the tree"):
        diagnostics.chainwise_rhat(mcmc, group="anchor")


def test_dimensions_of_a_tree_in_any_order():
    draws = np.random.default_rng(13).normal(size=(3, 60, 2))
    tree = az.from_dict({"posterior": {"w": draws}})
    turned = tree.map_over_datasets(
        lambda dataset: dataset.transpose("w_dim_0", "draw", "chain", missing_dims="ignore")
    )
    expected = diagnostics.chainwise_rhat(draws)["posterior"]
    np.testing.assert_array_equal(diagnostics.chainwise_rhat(turned)["w"], expected)
