# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What every kernel must do. A kernel is enrolled by one line of KERNELS."""

import functools
import pickle
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from exact import covariance_z_scores
from jax import random
from models import LABELS, NETWORKS, X
from numpyro.infer import MCMC
from scipy import stats
from targets import Location, last_states

import numpyro_bdl as bdl

OTHER_METHODS = ("sequential", "parallel", jax.vmap)


class Enrolled(NamedTuple):
    """A kernel, and what it declares."""

    make: Callable
    """from a model and keyword arguments to a kernel"""
    differs: str = "class"
    """from those enrolled: by its class, by what its update takes from the ``"state"``, or by the ``"update"`` alone"""
    samples: bool = True
    """whether its draws follow the posterior as the step goes to zero"""
    chain_methods: tuple = OTHER_METHODS
    """besides vectorized chains"""
    ensemble: bool = False
    """whether its chains are particles: vectorized, and at least two"""

    @property
    def fewest_chains(self):
        return 2 if self.ensemble else 1


def spike_slab(model, **kwargs):
    """A spike of next to no weight, unless it is told otherwise, so that the target is the model's own posterior."""
    sites = model.__code__.co_consts if hasattr(model, "__code__") else ()
    groups = {"w": "unstructured"} if "w" in sites else None
    options = {"momentum": 0.5, "inclusion": 1 - 1e-6, "spike_variance": 0.5} | kwargs
    return bdl.SpikeSlabSGHMC(model, groups=groups, **options)


def symmetry_restricted(model, **kwargs):
    """Around SGHMC; among the networks it folds, among the targets without units it changes nothing."""
    return bdl.SymmetryRestricted(bdl.SGHMC(model, momentum=0.5, **kwargs))


def ensemble(model, temperature=1.0, **kwargs):
    """Particles with minibatches of their own."""
    return bdl.WGFEnsemble(model, kl=temperature, **({"share_batch": False} | kwargs))


# a temperature other than 1, which some tests set; targets without a network
pytestmark = [
    pytest.mark.filterwarnings("ignore:SpikeSlabSGHMC. at temperature"),
    pytest.mark.filterwarnings("ignore:SymmetryRestricted. no group of units"),
]

KERNELS = {
    "SGLD": Enrolled(bdl.SGLD),
    "SGHMC": Enrolled(partial(bdl.SGHMC, momentum=0.5)),
    "FlatBasinSGLD, exact": Enrolled(partial(bdl.FlatBasinSGLD, eta=0.1, collect_anchor=True)),
    "PerturbedSGLD": Enrolled(partial(bdl.PerturbedSGLD, sigma=0.01), samples=False),
    "SpikeSlabSGHMC": Enrolled(spike_slab),
    "AveragedSGLD": Enrolled(partial(bdl.AveragedSGLD, anchor_steps=10)),
    "SymmetryRestricted": Enrolled(symmetry_restricted),
    "WGFEnsemble": Enrolled(ensemble, chain_methods=(), ensemble=True),
    "WGFEnsemble, repulsive": Enrolled(
        partial(ensemble, mmd=1.0), "state", samples=False, chain_methods=(), ensemble=True
    ),
    "SGHMC, corrected": Enrolled(partial(bdl.SGHMC, momentum=0.5, noise_correction=True), "state"),
    "FlatBasinSGLD, momentum": Enrolled(partial(bdl.FlatBasinSGLD, eta=0.1, coupling="euler", momentum=0.5), "state"),
    "FlatBasinSGLD, gibbs": Enrolled(partial(bdl.FlatBasinSGLD, eta=0.1, coupling="gibbs"), "state"),
    "SpikeSlabSGHMC, pruned": Enrolled(
        partial(spike_slab, inclusion=0.5, spike_variance=0.02, target_sparsity=0.5), "state", samples=False
    ),
    "FlatBasinSGLD, euler": Enrolled(partial(bdl.FlatBasinSGLD, eta=0.1, coupling="euler"), "update"),
}


def each(applies):
    """Run a test with the kernels that it applies to; by its scope, all tests of one in a row, that they share runs."""
    chosen = {name: kernel for name, kernel in KERNELS.items() if applies(kernel)}
    return pytest.mark.parametrize("kernel", chosen.values(), ids=chosen, scope="module")


every_class = each(lambda kernel: kernel.differs == "class")
every_class_of_chains = each(lambda kernel: kernel.differs == "class" and not kernel.ensemble)
every_state = each(lambda kernel: kernel.differs != "update")
every_sampler = each(lambda kernel: kernel.samples)

# small enough a step that its bias, of order a h / 2, hides below a standard error
SMALL, DRAWS = 0.004, 10


def run(kernel, *args, num_warmup=2, num_samples=6, num_chains=2, chain_method="vectorized", key=0, **kwargs):
    """A short MCMC run."""
    options = {name: kwargs.pop(name) for name in ("progress_bar", "thinning") if name in kwargs}
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=chain_method,
        **{"progress_bar": False, **options},
    )
    mcmc.run(random.key(key) if isinstance(key, int) else key, *args, **kwargs)
    return mcmc


def network_kernel(kernel, network="linen", **kwargs):
    return kernel.make(NETWORKS[network], step_size=1e-4, steps_per_draw=3, **kwargs)


def network_run(kernel, network="linen", **kwargs):
    return run(network_kernel(kernel, network), X, LABELS, batch_size=20, **kwargs)


# what several tests look at, and none changes
shared_run = functools.cache(network_run)


def assert_equal_trees(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = random.key_data(a), random.key_data(b)
        np.testing.assert_array_equal(a, b)


# ---- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("optimized")
@every_sampler
def test_linear_regression_against_the_conjugate_posterior(kernel):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(12, 2)).astype(np.float32)
    y = (x @ np.array([1.0, -0.5]) + 0.5 * rng.normal(size=12)).astype(np.float32)

    def model(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    covariance = np.linalg.inv(np.eye(2) + x.T.astype(float) @ x)
    mean = covariance @ x.T @ y
    state = last_states(kernel.make(model, step_size=SMALL, steps_per_draw=50), x, y, steps=DRAWS, chains=4000)
    mean_z, covariance_z = covariance_z_scores(np.asarray(state.z["w"], float), mean, covariance)
    assert max(np.abs(mean_z).max(), np.abs(covariance_z).max()) < 4


@pytest.mark.usefixtures("optimized")
@every_sampler
def test_gaussian_moments_with_minibatches(kernel):
    target = Location.make([2.0, 5.0])
    made = kernel.make(target.model, step_size=SMALL, steps_per_draw=100)
    state = last_states(made, target.y, steps=DRAWS, chains=4000, batch_size=4)
    covariance = np.linalg.inv(target.curvature)
    mean_z, covariance_z = covariance_z_scores(np.asarray(state.z["w"], float), target.mean, covariance)
    assert max(np.abs(mean_z).max(), np.abs(covariance_z).max()) < 4


@pytest.mark.usefixtures("optimized")
@every_sampler
def test_constrained_sites_against_their_exact_law(kernel):
    def model():
        numpyro.sample("half", dist.HalfNormal(2.0))
        numpyro.sample("log", dist.LogNormal(0.5, 0.7))
        numpyro.sample("interval", dist.Uniform(-1.0, 3.0))
        numpyro.sample("w", dist.Normal(0.0, 1.0))

    made = kernel.make(model, step_size=0.02, steps_per_draw=50)
    mcmc = run(made, num_warmup=20, num_samples=1, num_chains=3000)
    for name, law in {
        "half": stats.halfnorm(scale=2),
        "log": stats.lognorm(0.7, scale=np.exp(0.5)),
        "interval": stats.uniform(-1, 4),
        "w": stats.norm(),
    }.items():
        draws = np.asarray(mcmc.get_samples()[name], float)
        assert stats.kstest(draws, law.cdf).pvalue > 6e-5, name  # 4 standard errors


# ---- NumPyro's contract -------------------------------------------------------------------------------------------


@every_state
def test_all_chain_methods_draw_the_same(kernel):
    reference = shared_run(kernel, "linen", num_chains=2).get_samples(group_by_chain=True)  # of vectorized chains
    assert not np.array_equal(*reference["net/Dense_0.kernel"][:, 0])
    for method in kernel.chain_methods:
        mcmc = network_run(kernel, chain_method=method)
        for name, value in mcmc.get_samples(group_by_chain=True).items():
            np.testing.assert_allclose(value, reference[name], atol=1e-4, err_msg=f"{method} {name}")


@every_class
def test_legacy_keys_draw_the_same_as_typed_keys(kernel):
    legacy = network_run(kernel, key=random.PRNGKey(0)).get_samples()
    assert_equal_trees(shared_run(kernel, "linen", num_chains=2).get_samples(), legacy)


@every_class
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_move_and_keep_their_mutable_collections(kernel, network):
    mcmc = shared_run(kernel, network, num_chains=2)
    for value in mcmc.get_samples(group_by_chain=True).values():
        assert np.isfinite(value).all()
        assert not np.array_equal(value[:, 0], value[:, -1])
        assert not np.array_equal(value[0], value[1])
    mutable = mcmc.get_extra_fields(group_by_chain=True)["mutable"]
    assert bool(jax.tree.leaves(mutable)) == ("BatchNorm" in network)
    for path, value in jax.tree_util.tree_leaves_with_path(mutable):
        assert value.shape[:2] == (2, 6)
        assert not np.array_equal(value[:, 0], value[:, -1]), path


@every_state
def test_resume_equals_an_uninterrupted_run(kernel):
    assert_resumes(kernel, "linen", kernel.fewest_chains)


@every_class
def test_resume_with_mutable_collections_and_dropout(kernel):
    assert_resumes(kernel, "linen with BatchNorm and dropout", 2)


def assert_resumes(kernel, network, num_chains):
    whole = network_run(kernel, network, num_chains=num_chains, num_samples=12)
    parts = shared_run(kernel, network, num_chains=num_chains)
    first = parts.get_samples(group_by_chain=True)
    state = pickle.loads(pickle.dumps(parts.last_state))
    # as in a new process: a new kernel and a new MCMC
    made = network_kernel(kernel, network)
    rest = MCMC(made, num_warmup=2, num_samples=6, num_chains=num_chains, chain_method="vectorized", progress_bar=False)
    rest.post_warmup_state = state
    rest.run(state.rng_key, X, LABELS, batch_size=20)
    # an ensemble draws nothing from the key that MCMC replaces
    ends = (mcmc.last_state._replace(**({"rng_key": ()} if kernel.ensemble else {})) for mcmc in (rest, whole))
    assert_equal_trees(*ends)
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b], 1), first, rest.get_samples(group_by_chain=True))
    assert_equal_trees(joined, jax.tree.map(np.asarray, whole.get_samples(group_by_chain=True)))


@every_state
def test_pickling(kernel):
    mcmc = shared_run(kernel, "linen", num_chains=2)
    again = pickle.loads(pickle.dumps(kernel.make(NetworkModel(), step_size=1e-4, steps_per_draw=3)))
    assert_equal_trees(run(again, X, LABELS, batch_size=20).get_samples(), mcmc.get_samples())
    after = run(pickle.loads(pickle.dumps(again)), X, LABELS, batch_size=20)
    assert_equal_trees(after.get_samples(), mcmc.get_samples())


class NetworkModel:
    """The linen model as an object that can be pickled."""

    def __call__(self, x, y=None, *, batch_size=None):
        return NETWORKS["linen"](x, y, batch_size=batch_size)


@every_state
def test_x64(kernel):
    def model(y, batch_size=None):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(3, y.dtype), jnp.ones(3, y.dtype)).to_event(1))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            numpyro.sample("y", dist.Normal(w.sum(), 1), obs=numpyro.subsample(y, event_dim=0))

    made = partial(kernel.make, model, step_size=1e-2, temperature=0.5, steps_per_draw=3)
    with jax.enable_x64(True):
        for preconditioner, dtype in ((None, jnp.float64), (bdl.preconditioners.rms(), jnp.float32)):
            start = {"w": 0.1 * jnp.arange(6.0, dtype=dtype).reshape(2, 3)}
            mcmc = run(made(preconditioner=preconditioner), jnp.ones(8, dtype), batch_size=4, init_params=start)
            assert mcmc.last_state.z["w"].dtype == jnp.float64

        # Flax keeps float32 parameters, beside a site and data in float64
        def mixed(x, y, batch_size=None):
            numpyro.sample("s", dist.HalfNormal(1.0))
            NETWORKS["linen"](x, y, batch_size=batch_size)

        made_mixed = kernel.make(mixed, step_size=1e-4, preconditioner=bdl.preconditioners.rms())
        state = run(made_mixed, X.astype(np.float64), LABELS, batch_size=20).last_state
        assert state.z["s"].dtype == jnp.float64
        assert state.z["net/Dense_0.kernel"].dtype == jnp.float32
    assert run(made(), jnp.ones(8), batch_size=4).last_state.z["w"].dtype == jnp.float32


@every_class
def test_a_second_run_compiles_nothing(kernel, progress_bar, compilations, capsys):
    made = network_kernel(kernel)
    for num_chains in (kernel.fewest_chains, kernel.fewest_chains + 1):
        mcmc = MCMC(made, num_warmup=2, num_samples=4, num_chains=num_chains, chain_method="vectorized")
        assert mcmc.progress_bar
        mcmc.run(random.key(0), X, LABELS, batch_size=20)
        before = len(compilations)
        assert before
        mcmc.run(random.key(1), X, LABELS, batch_size=20)
        assert compilations[before:] == []
    assert "step size" in capsys.readouterr().err


@every_class_of_chains
def test_cyclical_schedule_preconditioner_and_temperature_together(kernel):
    schedule = bdl.cyclical(1e-4, steps_per_cycle=8, draws_per_cycle=2, exploration=0.5)
    made = kernel.make(NETWORKS["linen"], step_size=schedule, temperature=0.1, preconditioner=bdl.preconditioners.rms())
    mcmc = run(made, X, LABELS, num_samples=4, batch_size=20)
    assert np.array_equal(mcmc.last_state.i, [24, 24])  # one cycle of warm-up, two of sampling
    assert np.isfinite(mcmc.get_samples()["net/Dense_0.kernel"]).all()
    np.testing.assert_array_equal(mcmc.get_extra_fields()["temperature"], np.float32(0.1))


@every_class_of_chains
def test_shared_minibatches_are_the_same_under_every_chain_method(kernel):
    def draws(method):
        mcmc = run(network_kernel(kernel, share_batch=True), X, LABELS, batch_size=20, chain_method=method)
        return mcmc.get_samples(group_by_chain=True)["net/Dense_0.bias"]

    shared = draws("vectorized")
    np.testing.assert_allclose(shared, draws("sequential"), atol=1e-5)
    own = shared_run(kernel, "linen", num_chains=2).get_samples(group_by_chain=True)["net/Dense_0.bias"]
    assert not np.allclose(shared, own, atol=1e-7)


def test_shared_minibatches_are_those_of_their_seed():
    def draws(**kwargs):
        made = network_kernel(KERNELS["SGLD"], share_batch=True, **kwargs)
        return run(made, X, LABELS, batch_size=20).get_samples()["net/Dense_0.bias"]

    assert not np.allclose(draws(), draws(batch_seed=1), atol=1e-7)


@every_state
def test_extra_fields_thinning_and_left_out_sites(kernel):
    mcmc = network_run(kernel, extra_fields=("i", "~z.net/Dense_1.kernel"), thinning=2)
    np.testing.assert_array_equal(mcmc.get_extra_fields(group_by_chain=True)["i"], [[12, 18, 24]] * 2)
    assert "net/Dense_1.kernel" not in mcmc.get_samples()


@every_state
def test_parameter_fields_are_shaped_like_the_position(kernel):
    mcmc = shared_run(kernel, "linen", num_chains=2)
    state = mcmc.last_state
    for field in mcmc.sampler.parameter_fields:
        assert jax.tree.map(jnp.shape, getattr(state, field)) == jax.tree.map(jnp.shape, state.z)


@every_state
def test_init_params_are_the_start(kernel):
    start = {"net/Dense_0.bias": jnp.full((2, 4), 7.0)}
    keys = random.split(random.key(0))
    state = network_kernel(kernel).init(keys, 2, start, (X, LABELS), {"batch_size": 20})
    np.testing.assert_array_equal(state.z["net/Dense_0.bias"], 7.0)


@every_class_of_chains
def test_a_block_of_numpyros_gibbs(kernel):
    """w | s by the kernel, s | w exactly: a normal mean and its precision."""
    from numpyro.infer.gibbs import CustomGibbs, Gibbs

    y = jnp.asarray(np.random.default_rng(0).normal(1.0, 2.0, size=20), jnp.float32)

    def model(y):
        precision = numpyro.sample("precision", dist.Gamma(3.0, 3.0))
        w = numpyro.sample("w", dist.Normal(0, 10))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(w, precision**-0.5), obs=y)

    def draw_precision(rng_key, gibbs_sites, hmc_sites):
        residual = jnp.sum((y - hmc_sites["w"]) ** 2)
        return {"precision": dist.Gamma(3.0 + len(y) / 2, 3.0 + residual / 2).sample(rng_key)}

    block = kernel.make(model, step_size=2e-2, steps_per_draw=30)
    gibbs = Gibbs([(block, ["w"]), (CustomGibbs(draw_precision), ["precision"])])
    mcmc = MCMC(gibbs, num_warmup=100, num_samples=1500, progress_bar=False)
    mcmc.run(random.key(0), y)
    w = np.asarray(mcmc.get_samples()["w"], float)
    standard_error = w.std() / np.sqrt(len(w) / 4)
    assert abs(w.mean() - float(y.mean())) < 4 * standard_error + 0.02
