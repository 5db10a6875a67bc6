# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What is cited for what."""

import inspect
import re

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.contrib.einstein import SVGD, RBFKernel, SteinVI
from numpyro.infer import HMC, MCMC, NUTS, SVI, BarkerMH, HMCGibbs, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import numpyro_bdl as bdl
from numpyro_bdl.citations import BIBLIOGRAPHY, BY_CLASS, cite

SOFTWARE = ["numpyro_bdl", "phan2019composable", "bingham2019pyro", "jax2018github", "martin2026arviz"]
KERNELS = [
    name
    for name, thing in vars(bdl).items()
    if inspect.isclass(thing) and "kernels" in thing.__module__ and name != "StochasticGradientKernel"
]


def model():
    numpyro.sample("x", dist.Normal(0, 1))


def keys(text):
    """The keys of BibTeX, checked to be well formed."""
    for entry in re.split(r"\n\n", text):
        if not entry.startswith("%"):
            assert re.fullmatch(r"@\w+\{\w+,\n(  \w+ = \{.*\},\n)+\}", entry, flags=re.DOTALL), entry
            assert entry.count("{") == entry.count("}")
    return re.findall(r"^@\w+\{(\w+),", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", KERNELS)
def test_every_public_kernel_has_an_entry(name):
    assert name in BY_CLASS
    assert set(BY_CLASS[name]) <= set(BIBLIOGRAPHY)


def test_entries_are_well_formed_and_used():
    assert keys("\n\n".join(BIBLIOGRAPHY.values())) == list(BIBLIOGRAPHY)
    used = {key for papers in BY_CLASS.values() for key in papers} | set(SOFTWARE)
    assert used == set(BIBLIOGRAPHY)
    for entry in BIBLIOGRAPHY.values():
        assert "author = " in entry
        assert "title = " in entry


def test_a_kernel_comes_with_its_papers_and_the_software():
    assert keys(cite(bdl.SGLD(model, step_size=0.1))) == ["welling2011bayesian", *SOFTWARE]
    assert keys(cite(NUTS(model))) == ["hoffman2014nuts", "neal2012mcmc", *SOFTWARE]
    assert keys(cite(HMC(model))) == ["neal2012mcmc", *SOFTWARE]


def test_schedule_preconditioner_and_inner_kernel_are_cited():
    kernel = bdl.SGHMC(
        model,
        step_size=bdl.cyclical(0.1, steps_per_cycle=10),
        preconditioner=bdl.preconditioners.rms(),
    )
    inner = ["chen2014stochastic", "zhang2020cyclical", "li2016preconditioned"]
    assert keys(cite(kernel)) == [*inner, *SOFTWARE]
    assert keys(cite(bdl.SymmetryRestricted(kernel))) == ["wiese2023towards", *inner, *SOFTWARE]
    mirrored = bdl.SpikeSlabSGHMC(model, step_size=0.1, preconditioner=bdl.preconditioners.mirror())
    assert keys(cite(mirrored)).count("ke2022optimization") == 1
    gibbs = HMCGibbs(NUTS(model), lambda rng_key, gibbs_sites, hmc_sites: {}, ["x"])
    assert "hoffman2014nuts" in keys(cite(gibbs))


def test_a_run_is_cited_by_its_kernel_and_a_fit_by_its_guide():
    mcmc = MCMC(bdl.SGLD(model, step_size=0.1), num_warmup=1, num_samples=2, progress_bar=False)
    assert cite(mcmc) == cite(mcmc.sampler)
    mcmc.run(random.key(0))
    assert cite(mcmc) == cite(mcmc.sampler)
    guide = AutoNormal(model)
    text = cite(SVI(model, guide, optax.adam(0.1), Trace_ELBO()))
    assert text == cite(guide)
    assert text.startswith("% AutoNormal has no entry here: cite its own paper.\n")
    assert keys(text) == SOFTWARE
    papers = ["antoran2023sampling", "antoran2022adapting"]
    assert keys(cite(bdl.AutoLinearizedLaplace(model))) == [*papers, *SOFTWARE]
    dual = bdl.AutoLinearizedLaplace(model, solver="dual")
    assert keys(cite(dual)) == [*papers, "lin2024stochastic", *SOFTWARE]


def test_what_is_not_known_is_said():
    class Mine(bdl.SGHMC):
        pass

    class Another(bdl.StochasticGradientKernel):
        def _update(self, state, gradient, step):
            return {}

    assert keys(cite(Mine(model, step_size=0.1)))[0] == "chen2014stochastic"
    assert cite(Another(model, step_size=0.1)).startswith("% Another has no entry here")
    assert "% BarkerMH has no entry here" in cite(bdl.SymmetryRestricted(BarkerMH(model)))


def test_stein_cites_its_particles_and_its_guide():
    def make(guide):
        return SteinVI(model, guide, numpyro.optim.Adam(0.1), RBFKernel(), num_stein_particles=2)

    text = cite(make(AutoNormal(model)))
    assert keys(text) == ["liu2016stein", *SOFTWARE]
    assert "% AutoNormal has no entry here" in text
    assert keys(cite(make(bdl.AutoLinearizedLaplace(model, solver="dual"))))[:2] == [
        "liu2016stein",
        "antoran2023sampling",
    ]
    assert keys(cite(SVGD(model, numpyro.optim.Adam(0.1), RBFKernel(), num_stein_particles=2)))[0] == "liu2016stein"


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (model, "got an object of function"),
        ("SGLD", "got an object of str"),
        (bdl.SGLD, "got the class SGLD; hand in an object of the class"),
        (None, "got an object of NoneType"),
        (SVI(model, model, optax.adam(0.1), Trace_ELBO()), "got an object of function"),
    ],
)
def test_anything_else_is_refused(thing, text):
    with pytest.raises(
        TypeError, match=f"cite needs a kernel, an AutoGuide, a posterior .* or an MCMC, SVI or SteinVI object, {text}"
    ):
        cite(thing)


def test_posteriors_of_linear_models():
    x, y = jnp.linspace(0, 1, 5)[:, None], jnp.ones(5)
    process = bdl.gp_posterior_samples(random.key(0), bdl.gp.RBF(), x, y, 1.0, num_samples=2, num_features=4)
    assert keys(cite(process)) == ["wilson2020efficiently", "lin2024stochastic", *SOFTWARE]
    linear = bdl.linear_posterior_samples(random.key(0), x, y, 1.0, num_samples=2)
    assert keys(cite(linear)) == ["antoran2023sampling", *SOFTWARE]
