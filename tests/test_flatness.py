# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Curvature against dense Hessians in float64, slices against direct evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro.infer import MCMC

import numpyro_bdl as bdl
from numpyro_bdl import flatness

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(23, 2)), RNG.normal(size=23)
SHAPES = {"w1": (2, 3), "b1": (3,), "w2": (3, 1)}


def network(x, y, batch_size=None, activation=jnp.tanh):
    """A layer of three units, written out."""
    p = {name: numpyro.sample(name, dist.Normal(0, 1).expand(shape).to_event()) for name, shape in SHAPES.items()}
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        rows = numpyro.subsample(x, event_dim=1)
        mean = (activation(rows @ p["w1"] + p["b1"]) @ p["w2"])[:, 0]
        numpyro.sample("y", dist.Normal(mean, 0.5), obs=numpyro.subsample(y, event_dim=0))


def direct(z, activation=jnp.tanh):
    """The same energy of the data, from its formula."""
    mean = (activation(X @ z["w1"] + z["b1"]) @ z["w2"])[:, 0]
    return jnp.sum((Y - mean) ** 2) / (2 * 0.5**2) + len(Y) * np.log(0.5 * np.sqrt(2 * np.pi))


def run(kernel, *args, chains=2, draws=5, warmup=3, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized" if chains > 1 else "sequential",
        progress_bar=False,
    )
    mcmc.run(random.key(0), *args, **kwargs)
    return mcmc


@pytest.fixture(scope="module")
def mcmc():
    with jax.enable_x64():
        kernel = bdl.FlatBasinSGLD(network, step_size=1e-3, eta=0.1, collect_anchor=True)
        yield run(kernel, jnp.asarray(X), jnp.asarray(Y), batch_size=5)


@pytest.fixture
def x64():
    with jax.enable_x64():
        yield


@pytest.fixture
def quadratic(x64):
    """An energy with a Hessian that is known, not diagonal, and has eigenvalues of both signs."""
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    values = np.concatenate([[50, 20, 8], rng.uniform(-1, 1, 37)])
    hessian = jnp.asarray(rotation * values @ rotation.T)
    return (lambda z: ravel_pytree(z)[0] @ hessian @ ravel_pytree(z)[0] / 2), np.sort(values)[::-1], hessian


TREE = {"a": np.ones((4, 7)), "b": np.ones(12)}


# ---- the data term ---------------------------------------------------------------------------------------------------


def test_the_data_term_is_the_likelihood_of_all_rows_without_the_prior(mcmc, x64):
    energy, z = flatness.data_term(mcmc), flatness.position_of(mcmc, 1, 2)
    assert {name: w.shape for name, w in z.items()} == SHAPES
    np.testing.assert_allclose(energy(z), direct(z), rtol=1e-12)
    np.testing.assert_allclose(z["w1"], mcmc.get_samples(group_by_chain=True)["w1"][1, 2])


@pytest.mark.parametrize("row_chunk", [5, 100])
def test_chunks_of_rows_change_nothing(mcmc, x64, row_chunk):
    z, v = flatness.position_of(mcmc), flatness.position_of(mcmc, 1, 0)
    cut = flatness.data_term(mcmc, row_chunk=row_chunk)
    np.testing.assert_allclose(jax.jit(cut)(z), direct(z), rtol=1e-12)
    product = jax.jit(flatness.hessian_vector_product, static_argnums=0)
    found, wanted = product(cut, z, v), product(direct, z, v)
    for name in SHAPES:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9, atol=1e-9)


def test_sites_outside_of_the_plate_count_once(x64):
    def model(y):
        w = numpyro.sample("w", dist.LogNormal(0, 1))
        numpyro.sample("once", dist.Normal(w, 1), obs=3.0)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(w, 2), obs=numpyro.subsample(y, event_dim=0))

    mcmc = run(bdl.SGLD(model, step_size=1e-3), jnp.asarray(Y), chains=1, warmup=0, draws=1)
    z = flatness.position_of(mcmc, 0, 0)
    w = float(mcmc.get_samples()["w"][0])
    np.testing.assert_allclose(z["w"], np.log(w))  # unconstrained, and no Jacobian in the data term
    wanted = -dist.Normal(w, 1).log_prob(3.0) - dist.Normal(w, 2).log_prob(Y).sum()
    for row_chunk in (None, 4):
        np.testing.assert_allclose(jax.jit(flatness.data_term(mcmc, row_chunk=row_chunk))(z), wanted, rtol=1e-10)


def test_position_of_is_a_draw_or_the_mean_of_a_chain(mcmc, x64):
    draws = mcmc.get_samples(group_by_chain=True)
    for name in SHAPES:
        np.testing.assert_array_equal(flatness.position_of(mcmc, 1, -1)[name], draws[name][1, -1])
        np.testing.assert_allclose(flatness.position_of(mcmc, 1)[name], draws[name][1].mean(0))


def test_batch_norm_is_that_of_the_draw():
    from models import LABELS, NETWORKS
    from models import X as inputs

    model = NETWORKS["linen with BatchNorm and dropout"]
    mcmc = run(bdl.SGLD(model, step_size=1e-4), inputs, LABELS, batch_size=10, chains=1)
    mutable = jax.tree.map(lambda x: x[0, 2], mcmc.get_extra_fields(group_by_chain=True)["mutable"])
    z = flatness.position_of(mcmc, 0, 2)
    of_draw, of_last = (jax.jit(flatness.data_term(mcmc, mutable=m, train=False))(z) for m in (mutable, None))
    predictive = bdl.PosteriorPredictive(mcmc, progress_bar=False)
    wanted = -predictive.log_likelihood(train=False)["y"][0, 2].sum()
    np.testing.assert_allclose(of_draw, wanted, rtol=1e-4)
    assert abs(of_last - of_draw) > 1e-3
    found = flatness.sharpness(mcmc, random.key(0), num_draws=5, probes=2, lanczos_steps=2, train=False)
    np.testing.assert_allclose(found.draws.energy[2], wanted, rtol=1e-4)


# ---- curvature -------------------------------------------------------------------------------------------------------


def test_curvature_of_a_network_is_that_of_its_dense_hessian(mcmc, x64):
    energy, z = flatness.data_term(mcmc), flatness.position_of(mcmc, 0, 1)
    flat, unravel = ravel_pytree(z)
    dense = np.asarray(jax.jit(jax.hessian(lambda w: direct(unravel(w))))(flat))
    v = random.normal(random.key(0), flat.shape)
    product = ravel_pytree(jax.jit(flatness.hessian_vector_product, static_argnums=0)(energy, z, unravel(v)))[0]
    np.testing.assert_allclose(product, dense @ v, rtol=1e-9, atol=1e-9)
    found = flatness.top_eigenvalues(energy, z, random.key(1), count=3)
    np.testing.assert_allclose(found.value, np.linalg.eigvalsh(dense)[::-1][:3], rtol=1e-8)
    assert np.all(found.error < 1e-6)
    trace = flatness.hessian_trace(energy, z, random.key(2), probes=400)
    exact_error = np.sqrt(2 * (np.sum(dense**2) - np.sum(np.diag(dense) ** 2)) / 400)
    assert abs(trace.value - np.trace(dense)) < 4 * exact_error
    assert abs(trace.error / exact_error - 1) < 0.3


def test_lanczos_finds_the_top_before_it_has_all(quadratic, x64):
    energy, values, _ = quadratic
    found = flatness.top_eigenvalues(energy, TREE, random.key(0), count=3, steps=16)
    np.testing.assert_allclose(found.value, values[:3], rtol=1e-4)
    assert np.all(np.abs(found.value - values[:3]) <= found.error + 1e-10)
    early = flatness.top_eigenvalues(energy, TREE, random.key(0), count=2, steps=3)
    nearest = np.abs(early.value[:, None] - values).min(1)
    assert np.all(nearest <= early.error)
    assert early.error[1] > 0.1
    alone = flatness.top_eigenvalues(energy, TREE, random.key(0), count=40)
    np.testing.assert_allclose(alone.value, values, atol=1e-8)


def test_lanczos_stops_where_its_space_is_exhausted(x64):
    """A breakdown is a division 0 / 0 in the library."""
    for scales in ([2.0] * 5, [5.0, 5.0, 1.0, 1.0, -2.0, -2.0], [3.0, 1.0, 0.0, 0.0], [0.0] * 3, [4.0]):
        scales = np.array(scales)
        distinct = np.unique(scales)[::-1]
        found = flatness.top_eigenvalues(
            lambda z, s=scales: (s * z**2).sum() / 2, jnp.ones(len(scales)), random.key(0), count=len(scales)
        )
        np.testing.assert_allclose(found.value[: len(distinct)], distinct, atol=1e-10)
        assert np.all(found.error[: len(distinct)] < 1e-6)
        assert np.isnan(found.value[len(distinct) :]).all()


def test_hutchinson_in_chunks(quadratic, x64):
    energy, values, hessian = quadratic
    traces = [flatness.hessian_trace(energy, TREE, random.key(1), probes=50, probe_chunk=n) for n in (7, 99)]
    for trace in traces:
        np.testing.assert_allclose(trace, traces[0], rtol=1e-10)
    exact_error = np.sqrt(2 * (np.sum(hessian**2) - np.sum(np.diag(hessian) ** 2)) / 50)
    assert abs(traces[0].value - values.sum()) < 4 * exact_error
    diagonal = flatness.hessian_trace(lambda z: (jnp.arange(5.0) * z**2).sum(), jnp.ones(5), random.key(0), probes=3)
    np.testing.assert_allclose(diagonal, (20, 0), atol=1e-12)


def test_sharpness_is_the_curvature_at_draws_and_means(mcmc, x64):
    found = flatness.sharpness(mcmc, random.key(0), num_draws=3, num_eigenvalues=2, probes=5, row_chunk=10)
    assert (found.chain.tolist(), found.draw.tolist()) == ([0, 0, 1], [0, 4, 4])
    energy = jax.jit(flatness.data_term(mcmc))
    unravel = ravel_pytree(flatness.position_of(mcmc))[1]
    hessian = jax.jit(jax.hessian(lambda w: direct(unravel(w))))
    positions = [flatness.position_of(mcmc, c, d) for c, d in zip(found.chain, found.draw, strict=True)]
    positions += [flatness.position_of(mcmc, chain) for chain in range(2)]
    for n, z in enumerate(positions):
        part, k = (found.draws, n) if n < 3 else (found.means, n - 3)
        dense = np.asarray(hessian(ravel_pytree(z)[0]))
        np.testing.assert_allclose(part.energy[k], energy(z), rtol=1e-10)
        np.testing.assert_allclose(part.eigenvalues[k], np.linalg.eigvalsh(dense)[::-1][:2], rtol=1e-8)
        assert abs(part.trace[k] - np.trace(dense)) < 4 * np.sqrt(
            2 * (np.sum(dense**2) - np.sum(np.diag(dense) ** 2)) / 5
        )
    anchors = flatness.sharpness(mcmc, random.key(0), num_draws=1, probes=2, members="anchor")
    first = jax.tree.map(lambda u: u[0, 0], mcmc.get_extra_fields(group_by_chain=True)["z_anchor"])
    np.testing.assert_allclose(anchors.draws.energy, [energy(first)], rtol=1e-10)


def test_raw_curvature_is_not_scale_invariant_and_normalized_slices_are(x64):
    """The argument of the module: ReLU layers rescaled, so that function and energy stay."""
    energy = lambda z: direct(z, jax.nn.relu)
    rng = np.random.default_rng(3)
    z = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    scaled = {"w1": 10 * z["w1"], "b1": 10 * z["b1"], "w2": z["w2"] / 10}
    np.testing.assert_allclose(energy(scaled), energy(z), rtol=1e-12)
    top, top_scaled = (flatness.top_eigenvalues(energy, w, random.key(0)).value[0] for w in (z, scaled))
    assert top_scaled > 50 * top
    slices = []
    for w in (z, scaled):
        direction = flatness.filter_normalized(random.key(4), w)
        slices.append(flatness.loss_slice(energy, w, [direction], points=9).energy)
    np.testing.assert_allclose(slices[1], slices[0], rtol=1e-10)


# ---- slices ----------------------------------------------------------------------------------------------------------


def test_filters_have_the_length_of_the_weights():
    z = {
        "kernel": random.normal(random.key(0), (3, 3, 2, 4)) * jnp.array([0.0, 1, 2, 3]),
        "dense": jnp.full((5, 2), 2.0),
        "bias": jnp.arange(1.0, 4.0),
        "scalar": jnp.array(-2.0),
    }
    still, whole = (flatness.filter_normalized(random.key(1), z, vectors=v) for v in ("still", "whole"))
    for name, axes in (("kernel", (0, 1, 2)), ("dense", 0)):
        np.testing.assert_array_equal(still[name], whole[name])
        lengths = [np.sqrt(np.sum(np.square(w[name]), axes)) for w in (still, z)]
        np.testing.assert_allclose(lengths[0], lengths[1], rtol=1e-5)
    assert not np.any(still["bias"])
    assert not np.any(still["scalar"])
    np.testing.assert_allclose(np.linalg.norm(whole["bias"]), np.sqrt(14), rtol=1e-5)
    np.testing.assert_allclose(np.abs(whole["scalar"]), 2, rtol=1e-5)
    other = flatness.filter_normalized(random.key(2), z)
    assert np.abs(other["dense"] - still["dense"]).max() > 0.1


def test_slices_are_direct_evaluations(mcmc, x64):
    energy, center = flatness.data_term(mcmc), flatness.position_of(mcmc)
    one, other = (flatness.filter_normalized(random.key(n), center) for n in range(2))
    line = flatness.loss_slice(energy, center, [one], radius=0.5, points=5)
    np.testing.assert_allclose(line.coordinates, [-0.5, -0.25, 0, 0.25, 0.5])
    plane = flatness.loss_slice(energy, center, [one, other], radius=2, points=3)
    at = lambda s, t: direct({name: center[name] + s * one[name] + t * other[name] for name in center})
    np.testing.assert_allclose(line.energy, [at(s, 0) for s in line.coordinates], rtol=1e-10)
    np.testing.assert_allclose(plane.energy, [[at(s, t) for t in (-2, 0, 2)] for s in (-2, 0, 2)], rtol=1e-10)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_cut_is_refused():
    def whole(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, 1), obs=y)

    def without_plate(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ w, 1).to_event(1), obs=y)

    for model in (whole, without_plate):
        mcmc = run(bdl.SGLD(model, step_size=1e-3), jnp.asarray(X), jnp.asarray(Y), chains=1)
        assert np.isfinite(flatness.data_term(mcmc)(flatness.position_of(mcmc)))
        with pytest.raises(ValueError, match="can't be cut into chunks of 4 rows.*numpyro.subsample"):
            flatness.data_term(mcmc, row_chunk=4)


def test_runs_that_are_none_are_refused(mcmc, x64):
    with pytest.raises(TypeError, match="data_term needs a run, .* got function"):
        flatness.data_term(network)
    fresh = MCMC(bdl.SGLD(network, step_size=1e-3), num_warmup=1, num_samples=1, progress_bar=False)
    for function in (flatness.data_term, flatness.position_of, lambda run: flatness.sharpness(run, random.key(0))):
        with pytest.raises(ValueError, match="holds no draws yet; run it first"):
            function(fresh)
    plain = run(bdl.SGLD(network, step_size=1e-3), jnp.asarray(X), jnp.asarray(Y))
    with pytest.raises(ValueError, match="collected no anchor; make the kernel with collect_anchor=True"):
        flatness.sharpness(plain, random.key(0), members="anchor")
    plain._states["z"]["b1"] = plain._states["z"]["b1"].at[1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"sharpness: the chains \[1\] have draws that are not finite"):
        flatness.sharpness(plain, random.key(0))


def test_arguments_out_of_range_are_refused(mcmc, x64):
    energy, z = direct, flatness.position_of(mcmc)
    with pytest.raises(ValueError, match="chain must be an index below 2, got 2"):
        flatness.position_of(mcmc, 2)
    with pytest.raises(ValueError, match="draw must be an index below 5, got 7"):
        flatness.position_of(mcmc, 0, 7)
    with pytest.raises(ValueError, match="row_chunk must be an integer of at least 1"):
        flatness.data_term(mcmc, row_chunk=0)
    with pytest.raises(ValueError, match="13 eigenvalues need as many Lanczos steps and coordinates; there are 12"):
        flatness.top_eigenvalues(energy, z, random.key(0), count=13)
    with pytest.raises(ValueError, match="5 eigenvalues need .* there are 4 steps in 12 coordinates"):
        flatness.top_eigenvalues(energy, z, random.key(0), count=5, steps=4)
    with pytest.raises(ValueError, match="the Hessian is not finite at this position"):
        flatness.top_eigenvalues(lambda z: jnp.sqrt(z).sum(), jnp.array([-1.0, 1.0]), random.key(0))
    with pytest.raises(ValueError, match="probes must be an integer of at least 2"):
        flatness.hessian_trace(energy, z, random.key(0), probes=1)
    with pytest.raises(ValueError, match="members must be one of 'position', 'anchor'"):
        flatness.sharpness(mcmc, random.key(0), members="both")
    with pytest.raises(ValueError, match="num_draws must be an integer"):
        flatness.sharpness(mcmc, random.key(0), num_draws=0)


def test_directions_that_do_not_fit_are_refused():
    center, energy = {"w": jnp.ones(3)}, lambda z: jnp.sum(z["w"])
    with pytest.raises(ValueError, match="a list of one or two trees like the center"):
        flatness.loss_slice(energy, center, center)
    with pytest.raises(ValueError, match="a list of one or two trees"):
        flatness.loss_slice(energy, center, [center] * 3)
    with pytest.raises(ValueError, match=r"direction 1 must be like the center, \{'w': \(3,\)\}; got \{'w': \(2,\)\}"):
        flatness.loss_slice(energy, center, [center, {"w": jnp.ones(2)}])
    with pytest.raises(ValueError, match="radius must be a number"):
        flatness.loss_slice(energy, center, [center], radius=0)
    with pytest.raises(ValueError, match="points must be an integer of at least 2"):
        flatness.loss_slice(energy, center, [center], points=1)
    with pytest.raises(ValueError, match=r"nothing would move; give vectors=\"whole\". The sites: w \(3,\)"):
        flatness.filter_normalized(random.key(0), center)
    with pytest.raises(ValueError, match="vectors must be one of 'still', 'whole'"):
        flatness.filter_normalized(random.key(0), center, vectors="all")
