# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Each thing that a user may get wrong has its own text."""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import random
from numpyro.contrib.module import random_flax_module, random_nnx_module
from numpyro.infer import MCMC

import numpyro_bdl as bdl
from numpyro_bdl.potential import Potential

X = random.normal(random.key(100), (10, 2))
Y = X[:, 0]

KERNELS = {
    "SGLD": bdl.SGLD,
    "SGHMC": bdl.SGHMC,
    "FlatBasinSGLD, exact": partial(bdl.FlatBasinSGLD, eta=10.0, collect_anchor=True),
    "FlatBasinSGLD, euler": partial(bdl.FlatBasinSGLD, eta=10.0, coupling="euler", momentum=0.5),
    "FlatBasinSGLD, gibbs": partial(bdl.FlatBasinSGLD, eta=10.0, coupling="gibbs"),
    "PerturbedSGLD": partial(bdl.PerturbedSGLD, sigma=0.1),
    "AveragedSGLD": partial(bdl.AveragedSGLD, anchor_steps=2),
}
every_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)


def regression(x, y=None, *, batch_size=None):
    w = numpyro.sample("w", dist.Normal().expand([2]).to_event(1))
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(xb @ w, 1), obs=yb)


def sgld(model, *args, num_chains=1, chain_method="vectorized", init_params=None, jit_model_args=False, **kwargs):
    options = {k: kwargs.pop(k) for k in ("frozen", "minibatch", "preconditioner") if k in kwargs}
    mcmc = MCMC(
        bdl.SGLD(model, step_size=1e-3, **options),
        num_warmup=0,
        num_samples=2,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=False,
        jit_model_args=jit_model_args,
    )
    mcmc.run(random.key(0), *args, init_params=init_params, **kwargs)
    return mcmc


# ---- arguments of the kernels -------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"step_size": 0.0}, "step_size must be a positive finite number, got 0.0"),
        ({"steps_per_draw": 0}, "steps_per_draw must be an integer of at least 1, got 0"),
        ({"step_size": bdl.cyclical(0.1, steps_per_cycle=5), "steps_per_draw": 2}, "beside a cyclical schedule"),
        ({"temperature": 0.0}, r"temperature must be a number in \(0, inf\), got 0.0"),
        ({"temperature": -1}, r"temperature must be a number in \(0, inf\), got -1"),
        ({"temperature": math.nan}, r"temperature must be a number in \(0, inf\), got nan"),
        ({"temperature": "cold"}, r"temperature must be a number in \(0, inf\), got 'cold'"),
        ({"minibatch": "shuffle"}, "minibatch must be one of 'independent', 'epoch', 'full', got 'shuffle'"),
        ({"batch_seed": -1}, "batch_seed must be an integer of at least 0, got -1"),
        ({"batch_seed": 0.5}, "batch_seed must be an integer of at least 0, got 0.5"),
    ],
)
def test_arguments_that_all_kernels_share(make, arguments, text):
    with pytest.raises(ValueError, match=text):
        make(regression, **({"step_size": 0.1} | arguments))


@every_kernel
def test_a_model_must_be_callable(make):
    with pytest.raises(TypeError, match="model must be a callable of NumPyro primitives, got ndarray"):
        make(np.zeros(3), step_size=0.1)


@every_kernel
def test_a_step_size_must_be_a_number_or_a_schedule(make):
    with pytest.raises(TypeError, match="step_size must be a number, an optax schedule or .*cyclical.*, got str"):
        make(regression, step_size="1e-3")


@pytest.mark.parametrize(
    ("make", "arguments", "text"),
    [
        (bdl.SGHMC, {"momentum": 1.0}, r"SGHMC: momentum must be a number in \[0, 1\), got 1.0"),
        (bdl.SGHMC, {"momentum": -0.1}, r"SGHMC: momentum must be a number in \[0, 1\), got -0.1"),
        (
            bdl.SGHMC,
            {"noise_correction": True, "minibatch": "epoch"},
            "noise_correction=True needs minibatch=\"independent\", whose noise is white; got minibatch='epoch'",
        ),
        (bdl.PerturbedSGLD, {"sigma": 0}, r"PerturbedSGLD: sigma must be a number in \(0, inf\), got 0"),
        (
            bdl.AveragedSGLD,
            {"anchor_steps": 0.5},
            r"AveragedSGLD: anchor_steps must be a number in \[1, inf\), got 0.5",
        ),
    ],
)
def test_arguments_of_a_kernel(make, arguments, text):
    with pytest.raises(ValueError, match=text):
        make(regression, step_size=0.1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "give one of eta and anchor_steps, got eta=None and anchor_steps=None"),
        ({"eta": 1.0, "anchor_steps": 10}, "give one of eta and anchor_steps, got eta=1.0 and anchor_steps=10"),
        ({"eta": 0.0}, r"eta must be a number in \(0, inf\), got 0.0"),
        ({"eta": math.inf}, r"eta must be a number in \(0, inf\), got inf"),
        ({"anchor_steps": -5}, r"anchor_steps must be a number in \(0, inf\), got -5"),
        (
            {"anchor_steps": 10, "step_size": optax.constant_schedule(0.1)},
            "anchor_steps counts steps at the largest step size, which a schedule does not tell; give eta",
        ),
        ({"eta": 1.0, "coupling": "joint"}, "coupling must be one of 'exact', 'euler', 'gibbs', got 'joint'"),
        ({"eta": 1.0, "momentum": 0.9}, "momentum=0.9 goes with coupling=\"euler\" alone, got 'exact'"),
        ({"eta": 1.0, "coupling": "euler", "momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"eta": 1.0, "inner_steps": 5}, "inner_steps=5 goes with coupling=\"gibbs\" alone, got 'exact'"),
        ({"eta": 1.0, "coupling": "gibbs", "inner_steps": 1}, "inner_steps=1 is too few.*the anchor has no memory"),
        ({"eta": 1.0, "coupling": "gibbs", "inner_steps": 4}, "inner_steps=4 is too few.* Take at least 5"),
        (
            {"eta": 1.0, "coupling": "gibbs", "inner_steps": 7.5},
            "inner_steps must be an integer of at least 1, got 7.5",
        ),
    ],
)
def test_arguments_of_flat_basin(arguments, text):
    with pytest.raises(ValueError, match=text):
        bdl.FlatBasinSGLD(regression, **({"step_size": 0.1} | arguments))


@pytest.mark.parametrize(
    "step_size", [0.1, bdl.cyclical(0.1, steps_per_cycle=10), optax.linear_schedule(0.01, 0.1, 50)]
)
def test_flat_basin_refuses_a_step_beyond_the_bound_of_its_coupling(step_size):
    text = r"the largest step, 0.1, must stay below 0.05 \(eta = 0.05\).*lmax = .*or coupling=\"exact\""
    with pytest.raises(ValueError, match=text):
        bdl.FlatBasinSGLD(regression, step_size=step_size, eta=0.05, coupling="euler")
    bdl.FlatBasinSGLD(regression, step_size=step_size, eta=0.05, coupling="exact")


# ---- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((X.at[3, 1].set(jnp.nan), Y), {}, r"argument 'x' has 1 NaN or infinite entries, the first at index \(3, 1\)"),
        ((X, Y.at[2:4].set(jnp.nan)), {}, r"argument 'y' has 2 NaN or infinite entries, the first at index \(2,\)"),
        ((np.asarray(X) * [1, np.inf],), {"y": Y}, r"argument 'x' has 10 NaN or infinite entries"),
        ((X,), {"y": Y.at[9].set(-jnp.inf)}, r"argument 'y' has 1 NaN or infinite entries, the first at index \(9,\)"),
    ],
)
def test_nan_and_infinite_data_are_found_before_sampling(args, kwargs, text, compilations):
    with pytest.raises(ValueError, match=text):
        sgld(regression, *args, batch_size=5, **kwargs)
    assert not [name for name in compilations if "init_chain" in name or "fori" in name]


def test_nan_in_a_nested_argument_is_found():
    def model(data):
        regression(data["inputs"], data["targets"][0])

    with pytest.raises(ValueError, match=r"argument 'data\['targets'\]\[0\]' has 1 NaN"):
        sgld(model, {"inputs": X, "targets": [Y.at[0].set(jnp.nan)]})


def test_integers_and_missing_observations_are_no_bad_data():
    Potential(regression, (X, jnp.arange(10)), {"batch_size": 5})
    Potential(regression, (X, None))


def test_nan_in_the_data_of_a_resumed_run_is_found():
    mcmc = sgld(regression, X, Y)
    mcmc.post_warmup_state = mcmc.last_state
    with pytest.raises(ValueError, match="argument 'y' has 1 NaN or infinite entries"):
        mcmc.run(random.key(0), X, Y.at[0].set(jnp.nan))


def test_a_resumed_run_sees_all_rows_of_other_data():
    def model(y, batch_size=None):
        mu = numpyro.sample("mu", dist.Normal(0, 100))
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            numpyro.sample("y", dist.Normal(mu, 1), obs=numpyro.subsample(y, event_dim=0))

    mcmc = MCMC(bdl.SGLD(model, step_size=0.01), num_warmup=0, num_samples=200, progress_bar=False)
    mcmc.run(random.key(0), jnp.zeros(10), batch_size=5)
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(random.key(1), jnp.concatenate([jnp.zeros(10), jnp.full(30, 100.0)]), batch_size=20)
    # rows of the first run alone would leave the mean at 0
    assert np.mean(mcmc.get_samples()["mu"][100:]) == pytest.approx(75, abs=10)


def test_a_resumed_run_with_traced_data_refuses_other_shapes():
    mcmc = sgld(regression, X, Y, jit_model_args=True)
    mcmc.post_warmup_state = mcmc.last_state
    with pytest.raises(ValueError, match=r"arguments of the shapes it was begun with, .*\(10, 2\).*got .*\(5, 2\)"):
        mcmc.run(random.key(0), X[:5], Y[:5])


# ---- plates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subsample_size", [11, 0, -1, 2.5])
def test_a_subsample_must_fit_its_plate(subsample_size):
    text = f"Plate 'data' has 10 rows, but subsample_size={subsample_size}; it must be an integer from 1 to 10, or None"
    with pytest.raises(ValueError, match=text):
        sgld(regression, X, Y, batch_size=subsample_size)


@pytest.mark.parametrize("name", ["batch_size", "subsample_size"])
def test_a_batch_size_that_no_plate_uses(name):
    def model(x, y, batch_size=None, subsample_size=None):
        regression(x, y)

    with pytest.raises(
        ValueError, match=rf"{name}=5 is given, but no plate .* subsampled; its plates: 'data' \(10 rows\)"
    ):
        sgld(model, X, Y, **{name: 5})


def test_a_batch_size_without_any_plate():
    def model(y, batch_size=None):
        numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal()), 1), obs=y)

    with pytest.raises(ValueError, match="no plate of the model is subsampled; its plates: none at all"):
        sgld(model, Y, batch_size=5)


def test_epochs_without_a_subsampled_plate():
    with pytest.raises(ValueError, match='SGLD: minibatch="epoch" is given, but no plate of the model is subsampled'):
        sgld(regression, X, Y, minibatch="epoch")


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        ((10, None), (8, None), "the one 10 of 10, the other 8 of 8 rows"),
        ((10, 5), (10, 2), "the one 5 of 10, the other 2 of 10 rows"),
        ((10, 5), (10, 5), "the one 5 of 10, the other 5 of 10 rows"),
    ],
)
def test_two_plates_with_one_name(one, other, text):
    def model():
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", one[0], one[1]) as rows:
            numpyro.sample("y", dist.Normal(mu, 1), obs=jnp.zeros(len(rows)))
        with numpyro.plate("data", other[0], other[1]) as rows:
            numpyro.sample("u", dist.Normal(mu, 1), obs=jnp.zeros(len(rows)))

    with pytest.raises(ValueError, match=f"Two plates are named 'data', {text}.*give each its own"):
        sgld(model)


def test_a_latent_site_in_a_subsampled_plate():
    def model(y, batch_size=None):
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            z = numpyro.sample("z", dist.Normal())
            numpyro.sample("y", dist.Normal(z, 1), obs=numpyro.subsample(y, event_dim=0))

    with pytest.raises(ValueError, match="Latent site 'z' lies inside the subsampled plate 'data'.*Move it out"):
        sgld(model, Y, batch_size=5)
    assert Potential(model, (Y,)).latent == ("z",)


# ---- latent sites -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "name"),
    [
        (dist.Poisson(3.0), "Poisson"),
        (dist.Categorical(jnp.ones(3) / 3), "CategoricalProbs"),
        (dist.Bernoulli(0.5), "BernoulliProbs"),
        (dist.Bernoulli(logits=jnp.zeros(3)).to_event(1), "Independent"),
        (dist.DiscreteUniform(0, 5), "DiscreteUniform"),
    ],
)
def test_discrete_latent_sites(distribution, name):
    def model():
        numpyro.sample("k", distribution)

    with pytest.raises(TypeError, match=rf"Latent site 'k' is discrete \({name}\); .*Marginalize it"):
        sgld(model)


def test_a_latent_delta():
    def model():
        numpyro.sample("k", dist.Delta(1.0))

    with pytest.raises(ValueError, match="Latent site 'k' is a Delta; use numpyro.deterministic"):
        sgld(model)


def test_a_model_without_latent_sites():
    def model(y):
        numpyro.sample("y", dist.Normal(0, 1), obs=y)

    with pytest.raises(ValueError, match="The model has no latent site"):
        sgld(model, Y)


# ---- parameters without a prior -----------------------------------------------------------------------------------


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(3)(x)))[..., 0]


def network(x, y, make):
    net = make()
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(net(x), 1), obs=y)


def test_a_wrong_key_in_the_prior_of_a_linen_network():
    prior = {"Dense_0.kernel": dist.Normal(), "Dense_0.bias": dist.Normal(), "Dense_1.kernell": dist.Normal()}
    make = partial(random_flax_module, "net", Net(), prior, input_shape=(2,))
    text = (
        r"no prior and would stay at a random start: net/Dense_1.bias, net/Dense_1.kernel\. .*here 'Dense_1.bias',"
        r" 'Dense_1.kernel'\), or keep them as they are with frozen=\('net/Dense_1.bias', 'net/Dense_1.kernel',\)"
    )
    with pytest.raises(ValueError, match=text):
        sgld(network, X, Y, make)


def test_a_wrong_key_in_the_prior_of_an_nnx_network():
    module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))

    def make():
        net = random_nnx_module("net", module, {"kernel": dist.Normal(), "offset": dist.Normal()})
        return lambda x: net(x)[..., 0]

    with pytest.raises(
        ValueError, match=r"no prior and would stay at a random start: net/bias\. .*frozen=\('net/bias',\)"
    ):
        sgld(network, X, Y, make)


def test_a_plain_parameter():
    def model(y):
        scale = numpyro.param("scale", 1.0)
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mu, scale), obs=y)

    with pytest.raises(ValueError, match=r"no prior and would stay at a random start: scale\. .*frozen=\('scale',\)"):
        sgld(model, Y)
    assert Potential(model, (Y,), frozen="scale").frozen == {"scale": 1.0}


def test_a_frozen_pattern_that_matches_nothing():
    make = partial(random_flax_module, "net", Net(), {"Dense_0.kernel": dist.Normal()}, input_shape=(2,))
    text = r"frozen='\*gamma' matches no parameter without a prior. Those are: net/Dense_0.bias, net/Dense_1.bias"
    with pytest.raises(ValueError, match=text):
        sgld(network, X, Y, make, frozen=("net/*", "*gamma"))


def test_frozen_where_every_parameter_has_a_prior():
    with pytest.raises(ValueError, match="frozen='w' matches no .* Every parameter has a prior"):
        sgld(regression, X, Y, frozen="w")


# ---- starts and arguments of a run --------------------------------------------------------------------------------


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_init_params_of_an_unknown_site(chain_method):
    with pytest.raises(ValueError, match="init_params has a value for 'v', which is no latent site .* those are: w"):
        sgld(regression, X, Y, init_params={"v": jnp.zeros((2, 2))}, num_chains=2, chain_method=chain_method)


def test_init_params_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"init_params\['w'\] must have shape \(2,\) for a single chain .*got \(3,\)"):
        sgld(regression, X, Y, init_params={"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"init_params\['w'\] must have shape \(4, 2\) for 4 chains .*got \(4, 3\)"):
        sgld(regression, X, Y, init_params={"w": jnp.zeros((4, 3))}, num_chains=4)


def test_init_params_for_one_chain_given_to_several():
    # as many values as chains, but without a chain axis
    with pytest.raises(ValueError, match=r"init_params\['w'\] must have shape \(2, 2\) for 2 chains .*got \(2,\)"):
        sgld(regression, X, Y, init_params={"w": jnp.zeros(2)}, num_chains=2)


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_num_chains_and_init_params_that_disagree(chain_method):
    with pytest.raises(ValueError, match="`init_params` must have the same leading dimension as `num_chains`"):
        sgld(regression, X, Y, init_params={"w": jnp.zeros((3, 2))}, num_chains=2, chain_method=chain_method)


def test_init_params_of_several_chains_given_to_one():
    with pytest.raises(
        ValueError, match=r"init_params\['w'\] must have shape \(2,\) for a single chain .*got \(3, 2\)"
    ):
        sgld(regression, X, Y, init_params={"w": jnp.zeros((3, 2))})


def test_traced_integer_arguments():
    with pytest.raises(
        TypeError, match=r"jit_model_args=True makes .*batch_size=5 an array.*partial\(model, batch_size=5\)"
    ):
        sgld(regression, X, Y, batch_size=5, jit_model_args=True)
    bound = partial(regression, batch_size=5)
    assert sgld(bound, X, Y, jit_model_args=True).last_state.i == 2


def test_traced_boolean_arguments():
    def model(x, y, train=True):
        regression(x, y if train else None)

    with pytest.raises(TypeError, match=r"argument train=False an array .*functools.partial\(model, train=False\)"):
        sgld(model, X, Y, train=False, jit_model_args=True)


def test_a_fixed_preconditioner_for_other_sites():
    with pytest.raises(ValueError, match="preconditioners.fixed: expected a tree like the position, .*'w'.*got .*'v'"):
        sgld(regression, X, Y, preconditioner=bdl.preconditioners.fixed({"v": jnp.ones(2)}))


@pytest.mark.parametrize("preconditioner", ["rms", bdl.preconditioners.rms, 2.0])
def test_a_preconditioner_that_is_none(preconditioner):
    with pytest.raises(TypeError, match=r"SGLD: preconditioner must be .* preconditioners.rms\(\), got"):
        bdl.SGLD(regression, step_size=0.1, preconditioner=preconditioner)


def test_a_kernel_without_a_run_has_no_potential():
    with pytest.raises(RuntimeError, match="SGLD has not met its model's arguments yet; run MCMC first"):
        _ = bdl.SGLD(regression, step_size=0.1).potential


# ---- gradients that turn bad ----------------------------------------------------------------------------------------


def slope(batch_size=None):
    """Downhill to the right, until the gradient is NaN from 9.5 on."""
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.factor("downhill", jnp.where(x < 9.5, 1.0, jnp.nan) * x)


def downhill(make, start, num_samples=8, steps_per_draw=1, num_warmup=0, **kwargs):
    """Without noise a chain goes one to the right at each step."""
    kernel = make(slope, step_size=1.0, temperature=1e-20, steps_per_draw=steps_per_draw)
    chains = len(start) if np.ndim(start) else 1
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=chains,
        **{"chain_method": "vectorized", "progress_bar": False, **kwargs},
    )
    mcmc.run(random.key(0), init_params={"x": jnp.asarray(start, jnp.float32)})
    return mcmc


def draws(mcmc):
    return np.asarray(mcmc.get_samples(group_by_chain=True)["x"])


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_a_bad_gradient_marks_its_chain_from_its_step_on(chain_method):
    mcmc = downhill(bdl.SGLD, [0.0, 5.0], chain_method=chain_method)
    # chain 1 takes the gradient at 5, ..., 9 in steps 0 to 4, and at 10 in step 5
    assert mcmc.last_state.first_bad_step.tolist() == [-1, 5]
    np.testing.assert_allclose(draws(mcmc)[0], np.arange(1, 9))
    np.testing.assert_allclose(draws(mcmc)[1], [6, 7, 8, 9, 10, np.nan, np.nan, np.nan])


def test_the_step_is_counted_within_draws_and_over_warmup():
    mcmc = downhill(bdl.SGLD, [0.0, 2.0], num_samples=3, steps_per_draw=3, num_warmup=1)
    # draws end after steps 6, 9 and 12; chain 1 passes 9.5 with step 7
    assert mcmc.last_state.first_bad_step.tolist() == [10, 8]
    np.testing.assert_allclose(draws(mcmc), [[6, 9, np.nan], [8, np.nan, np.nan]])


def test_other_chains_are_untouched():
    bad, good = (downhill(bdl.SGLD, start) for start in ([0.0, 5.0], [0.0, 1.0]))
    np.testing.assert_array_equal(draws(bad)[0], draws(good)[0])
    assert good.last_state.first_bad_step.tolist() == [-1, -1]


def test_the_first_bad_step_is_kept():
    mcmc = downhill(bdl.SGLD, 7.0, num_samples=6)
    assert mcmc.last_state.first_bad_step == 3
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(mcmc.last_state.rng_key)
    assert mcmc.last_state.first_bad_step == 3
    assert np.isnan(draws(mcmc)).all()


@every_kernel
def test_every_kernel_marks_a_bad_chain(make):
    mcmc = downhill(make, [-1000.0, 5.0], num_samples=12)
    first = int(mcmc.last_state.first_bad_step[1])
    assert mcmc.last_state.first_bad_step[0] == -1
    assert 0 < first < 12
    x = draws(mcmc)
    assert np.isfinite(x[0]).all()
    assert np.isfinite(x[1, :first]).all()
    assert np.isnan(x[1, first:]).all()
    for name in mcmc.sampler.parameter_fields:
        field = np.asarray(getattr(mcmc.last_state, name)["x"])
        assert np.isfinite(field[0])
        assert np.isnan(field[1])


def test_a_bad_gradient_in_one_coordinate_spoils_the_whole_draw():
    def model():
        x = numpyro.sample("x", dist.Normal())
        numpyro.sample("bystander", dist.Normal())
        numpyro.factor("bad", jnp.where(x < 1e6, 0.0, jnp.nan) * x)

    mcmc = sgld(model, num_chains=2, init_params={"x": jnp.array([0.0, 1e7])})
    bystander = mcmc.get_samples(group_by_chain=True)["bystander"]
    assert np.isfinite(bystander[0]).all()
    assert np.isnan(bystander[1]).all()


def test_the_progress_bar_tells_of_a_bad_gradient(capsys, progress_bar):
    mcmc = downhill(bdl.SGLD, 5.0, progress_bar=True)
    assert "GRADIENT NOT FINITE since step 5" in mcmc.sampler.get_diagnostics_str(mcmc.last_state)
    assert "GRADIENT NOT FINITE since step 5" in capsys.readouterr().err
    good = downhill(bdl.SGLD, 0.0, progress_bar=True)
    assert "NOT FINITE" not in good.sampler.get_diagnostics_str(good.last_state)
    assert "step size 1.0e+00, energy" in capsys.readouterr().err


def test_helpers_tell_of_a_bad_gradient():
    mcmc = downhill(bdl.SGLD, [0.0, 5.0])
    text = "Chain 1 met a gradient that was not finite at step 5; its draws from there on are NaN.*step size"
    with pytest.warns(UserWarning, match=text):
        bdl.PosteriorPredictive(mcmc)
    with pytest.warns(UserWarning, match=text):
        tree = bdl.to_datatree(mcmc)
    assert tree.attrs["bad_chains"] == [1]
    assert tree.attrs["first_bad_steps"] == [5]
    np.testing.assert_array_equal(np.isnan(tree["posterior"]["x"]).sum("draw"), [0, 3])


def test_an_unstable_step_size_is_told():
    def model(x, y):
        w = numpyro.sample("w", dist.Normal().expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, 0.01), obs=y)

    mcmc = MCMC(bdl.SGLD(model, step_size=1.0), num_warmup=0, num_samples=20, progress_bar=False)
    mcmc.run(random.key(0), X, Y)
    assert 0 < mcmc.last_state.first_bad_step < 20
    with pytest.warns(UserWarning, match="Most often the step size is too large"):
        bdl.PosteriorPredictive(mcmc)


# ---- what a review found --------------------------------------------------------------------------------------------


def test_an_infinite_energy_marks_the_chain():
    def model():
        t = numpyro.sample("t", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Uniform(0, t), obs=jnp.array(50.0))

    mcmc = MCMC(bdl.SGLD(model, step_size=1e-3), num_warmup=0, num_samples=3, progress_bar=False)
    mcmc.run(random.key(0))
    assert int(mcmc.last_state.first_bad_step) == 0
    assert np.isnan(mcmc.get_samples()["t"]).all()


def test_init_params_must_be_finite_and_a_dict():
    def model():
        numpyro.sample("t", dist.Normal(0.0, 1.0))

    mcmc = MCMC(bdl.SGLD(model, step_size=1e-3), num_warmup=0, num_samples=3, progress_bar=False)
    with pytest.raises(ValueError, match="init_params.*NaN or infinite"):
        mcmc.run(random.key(0), init_params={"t": jnp.array(jnp.nan)})
    with pytest.raises(TypeError, match="init_params must be a dict"):
        mcmc.run(random.key(0), init_params=[jnp.array(1.0)])


@pytest.mark.parametrize("arguments", [{"temperature": None}, {"minibatch": ["epoch"]}, {"frozen": True}])
def test_arguments_of_a_wrong_type_are_told(arguments):
    def model():
        numpyro.sample("t", dist.Normal(0.0, 1.0))

    def run():
        kernel = bdl.SGLD(model, step_size=1e-3, **arguments)
        MCMC(kernel, num_warmup=0, num_samples=3, progress_bar=False).run(random.key(0))

    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        run()


def test_a_batch_larger_than_the_data_is_all_of_them():
    def model(y, batch_size=None):
        t = numpyro.sample("t", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y), subsample_size=min(batch_size, len(y))):
            numpyro.sample("y", dist.Normal(t, 1), obs=numpyro.subsample(y, event_dim=0))

    mcmc = MCMC(bdl.SGLD(model, step_size=1e-3), num_warmup=0, num_samples=3, progress_bar=False)
    mcmc.run(random.key(0), jnp.ones(6), batch_size=128)
    assert np.isfinite(mcmc.get_samples()["t"]).all()


def test_rms_without_warmup_is_told():
    def model():
        numpyro.sample("t", dist.Normal(0.0, 1.0))

    kernel = bdl.SGLD(model, step_size=1e-3, preconditioner=bdl.preconditioners.rms())
    with pytest.warns(UserWarning, match="num_warmup=0"):
        MCMC(kernel, num_warmup=0, num_samples=3, progress_bar=False).run(random.key(0))
