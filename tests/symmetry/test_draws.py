# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Draws that exist already, folded: representatives as of canonicalize, the same functions, all else as it was."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from jax import random
from models import LABELS, NETWORKS, X
from numpyro.contrib.module import random_flax_module
from numpyro.infer import HMC, MCMC, NUTS
from xarray import DataTree

import numpyro_bdl as bdl
from numpyro_bdl.symmetry import canonicalize, find_model_groups, fold_draws

KERNEL, BIAS, OUT = "net/Dense_0.kernel", "net/Dense_0.bias", "net/Dense_1.kernel"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(1)(x)[..., 0]


def model(x, y=None, loc=0.0):
    net = random_flax_module("net", Net(), dist.Normal(loc, 1.0), input_shape=(3,))
    noise = numpyro.sample("noise", dist.LogNormal(0, 0.3))
    numpyro.deterministic("precision", noise**-2)
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(net(numpyro.subsample(x, event_dim=1)), noise), obs=y)


def run(kernel, *args, chains=2, **kwargs):
    mcmc = MCMC(kernel, num_warmup=10, num_samples=15, num_chains=chains, chain_method="vectorized", progress_bar=False)
    mcmc.run(random.key(0), *args, **kwargs)
    return mcmc


Y = np.sin(2 * X[:, 0]).astype(np.float32)


@pytest.fixture(scope="module")
def nuts():
    return run(NUTS(model, max_tree_depth=4), X, Y)


@pytest.fixture(scope="module")
def groups():
    return find_model_groups(model, X, Y)


def assert_folded(folded, draws, groups):
    """Folded as by canonicalize, all draws at once, and in the domain."""
    expected = canonicalize(draws, groups)
    for name, value in folded.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert (folded[BIAS] > 0).all()
    assert (np.diff(folded[BIAS]) > 0).all()
    assert (np.asarray(folded[BIAS]) != np.asarray(draws[BIAS])).any()


def test_a_run_is_folded_by_the_groups_of_its_model(nuts, groups):
    draws = nuts.get_samples(group_by_chain=True)
    folded = fold_draws(nuts)
    assert folded.keys() == draws.keys() == {KERNEL, BIAS, OUT, "net/Dense_1.bias", "noise", "precision"}
    assert_folded(folded, draws, groups)
    for name in ("noise", "precision", "net/Dense_1.bias"):
        np.testing.assert_array_equal(folded[name], draws[name])
    hidden = lambda d: np.tanh(np.einsum("nf,cdfh->cdnh", X, d[KERNEL]) + d[BIAS][:, :, None])
    functions = lambda d: np.einsum("cdnh,cdho->cdn", hidden(d), d[OUT])
    np.testing.assert_allclose(functions(folded), functions(draws), rtol=1e-4, atol=1e-5)


def test_record_mode_keeps_the_same_draws(nuts):
    recorded = run(bdl.SymmetryRestricted(NUTS(model, max_tree_depth=4)), X, Y)
    folded = fold_draws(nuts)
    for again in (recorded.get_samples(group_by_chain=True), fold_draws(recorded)):
        for name, value in folded.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_dicts_and_trees_of_parameters(nuts, groups):
    draws = nuts.get_samples(group_by_chain=True)
    folded = fold_draws(nuts)
    flat = fold_draws(nuts.get_samples(), groups)
    single = fold_draws({name: value[1, 7] for name, value in draws.items()}, groups)
    for name, value in folded.items():
        np.testing.assert_array_equal(flat[name], value.reshape(-1, *value.shape[2:]))
        np.testing.assert_array_equal(single[name], value[1, 7])
    assert_folded(fold_draws(draws, groups, domain="bias"), draws, groups)
    incoming = fold_draws(draws, groups, domain="incoming")
    assert (incoming[KERNEL][:, :, 0] > 0).all()
    assert (np.diff(incoming[KERNEL][:, :, 0]) > 0).all()


def test_chunks(nuts, groups, monkeypatch, compilations):
    folded = fold_draws(nuts)
    monkeypatch.setattr("numpyro_bdl.symmetry.draws._CHUNK", 7 * (12 + 4 + 4))  # of 30 draws, so the last is filled up
    draws = nuts.get_samples(group_by_chain=True)
    compilations.clear()
    chunked = fold_draws(draws, groups)
    assert sum("_fold_chunk" in str(name) for name in compilations) == 1
    for name, value in folded.items():
        np.testing.assert_array_equal(chunked[name], value)


def test_a_tree_keeps_what_it_had(nuts, groups):
    tree = bdl.to_datatree(nuts)
    new = fold_draws(tree, groups)
    assert set(new.children) == {*tree.children, "posterior_folded"}
    assert "posterior_folded" not in tree.children
    assert new["posterior_folded"].attrs["symmetry_domain"] == "bias"
    folded = fold_draws(nuts)
    for name, value in folded.items():
        label = name.replace("/", ".")
        array = new["posterior_folded"][label]
        assert array.dims[:2] == ("chain", "draw")
        np.testing.assert_array_equal(array, value)
        np.testing.assert_array_equal(new["posterior"][label], tree["posterior"][label])
    assert len(az.summary(new, group="posterior_folded", var_names=["net.Dense_0.bias"])) == 4
    turned = DataTree.from_dict({"posterior": tree["posterior"].to_dataset().transpose("draw", "chain", ...)})
    np.testing.assert_array_equal(
        fold_draws(turned, groups)["posterior_folded"]["net.Dense_0.bias"].transpose("chain", "draw", ...), folded[BIAS]
    )


def test_batch_statistics_go_with_the_units():
    network = NETWORKS["linen with BatchNorm and dropout"]
    mcmc = run(bdl.SGLD(network, step_size=1e-3), X, LABELS, batch_size=20)
    mutable = mcmc.get_extra_fields(group_by_chain=True)["mutable"]
    groups = find_model_groups(network, X, LABELS, train=False)
    with pytest.warns(UserWarning, match="groups could not be checked.*differs from run to run"):
        folded = fold_draws(mcmc, groups)
    assert mutable.keys() <= folded.keys()
    potential = mcmc.sampler.potential
    latent = {name: mcmc.get_samples(group_by_chain=True)[name] for name in potential.latent}

    @jax.jit
    @jax.vmap
    @jax.vmap
    def logits(values, mutable):
        kwargs = {"batch_size": None, "train": False}
        return potential.run(values, {}, random.key(0), mutable, (X,), kwargs)["y"]["fn"].logits

    before = logits(latent, mutable)
    after = logits({name: folded[name] for name in latent}, {name: folded[name] for name in mutable})
    unmoved = logits({name: folded[name] for name in latent}, mutable)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    assert np.abs(unmoved - before).max() > 1e-2
    with pytest.raises(ValueError, match="'net\\$state/.*' is missing"):
        fold_draws(mcmc.get_samples(group_by_chain=True), groups)
    with pytest.raises(ValueError, match=r"no 'net\$state/.*fold the run itself: fold_draws\(mcmc"):
        fold_draws(bdl.to_datatree(mcmc), groups)
    with pytest.warns(UserWarning, match="no group of units was found.*Of a network with dropout"):
        fold_draws(mcmc)


def test_double_precision_is_kept(nuts, groups):
    """Without x64 too, as draws of another run may have it."""
    draws = {name: np.asarray(x, np.float64) + 1e-12 for name, x in nuts.get_samples(group_by_chain=True).items()}
    folded = fold_draws(draws, groups)
    assert {x.dtype for x in folded.values()} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(np.sort(np.abs(draws[BIAS])), folded[BIAS])


def test_draws_that_are_not_finite_are_counted_and_passed_through(nuts, groups, monkeypatch):
    monkeypatch.setattr("numpyro_bdl.symmetry.draws._CHUNK", 7 * (12 + 4 + 4))
    draws = {name: np.array(value) for name, value in nuts.get_samples(group_by_chain=True).items()}
    whole = fold_draws(draws, groups)
    draws[BIAS][0, 3, 1], draws[OUT][1, 10] = np.nan, np.inf
    with pytest.warns(UserWarning, match="2 of 30 draws are not finite"):
        folded = fold_draws(draws, groups)
    bad = np.zeros((2, 15), bool)
    bad[0, 3] = bad[1, 10] = True
    for name, value in folded.items():
        np.testing.assert_array_equal(value[bad], draws[name][bad])
        np.testing.assert_array_equal(value[~bad], whole[name][~bad])


def test_a_chain_that_turned_bad_is_no_obstacle():
    mcmc = run(bdl.SGLD(model, step_size=1e3), X, Y)
    with pytest.warns(UserWarning, match="fold_draws: 30 of 30 draws are not finite"):
        folded = fold_draws(mcmc)
    np.testing.assert_array_equal(folded[BIAS], mcmc.get_samples(group_by_chain=True)[BIAS])


def test_bad_input(nuts, groups):
    draws = nuts.get_samples()
    with pytest.raises(ValueError, match="holds no model"):
        fold_draws(draws)
    with pytest.raises(TypeError, match="a DataTree or a dict, got list"):
        fold_draws([draws], groups)
    with pytest.raises(TypeError, match="must be UnitGroups, got dict"):
        fold_draws(draws, {"hidden": 1})
    with pytest.raises(ValueError, match="domain must be one of"):
        fold_draws(draws, groups, domain="weights")
    with pytest.raises(ValueError, match=f"'{BIAS}' is missing"):
        fold_draws({name: value for name, value in draws.items() if name != BIAS}, groups)
    with pytest.raises(ValueError, match="no group 'posterior'; its groups: prior"):
        fold_draws(DataTree.from_dict({"prior": DataTree()}), groups)
    with pytest.raises(ValueError, match="holds no draws yet"):
        fold_draws(MCMC(NUTS(model), num_warmup=1, num_samples=1))


def test_a_prior_that_tells_units_apart_is_refused():
    mcmc = run(NUTS(model, max_tree_depth=2), X, Y, loc=0.5)
    with pytest.raises(ValueError, match="the prior is not the same for equivalent networks"):
        fold_draws(mcmc)


def test_a_run_without_a_model_is_refused_and_its_dict_folded(groups):
    kernel = HMC(potential_fn=lambda z: sum((x**2).sum() for x in z.values()) / 2, num_steps=3, trajectory_length=None)
    start = {KERNEL: jnp.ones((1, 3, 4)), BIAS: jnp.ones((1, 4)), OUT: jnp.ones((1, 4, 1))}
    mcmc = MCMC(kernel, num_warmup=5, num_samples=10, progress_bar=False)
    mcmc.run(random.key(0), init_params={name: value[0] for name, value in start.items()})
    with pytest.raises(ValueError, match="has no model"):
        fold_draws(mcmc, groups)
    draws = mcmc.get_samples(group_by_chain=True)
    assert_folded(fold_draws(draws, groups), draws, groups)
