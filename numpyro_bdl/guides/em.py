# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Precision and noise by expectation maximization, its expectations from samples.

The evidence of the linear model is largest where, for each group g and a normal likelihood of scale s,

.. math::

    \alpha_g = \frac{\gamma_g}{\|\bar w_g - m_0\|_D^2}, \qquad
    s^2 = \frac{\|y - h(\bar w)\|^2}{N - \gamma},

with :math:`\bar w` the mode of the linear model, never the trained weights, whose norm may say nothing, and
:math:`\gamma_g` the effective dimension, the trace of the block of :math:`H^{-1} \tilde J^\top \Lambda \tilde J`. It is
estimated in function space,

.. math::

    \hat\gamma_g = \frac1K \sum_k x_{k,g}^\top (\tilde J^\top \Lambda \tilde J x_k)_g,

whose variance is at most :math:`2 \gamma / K`; that of :math:`P - \alpha \|\zeta\|^2` grows with the number P of
weights. Where an estimate is not positive, the slower update of EM proper is taken, which always is,
:math:`\alpha_g = P_g / (\|\bar w_g - m_0\|_D^2 + \mathrm{tr}_D\, \Sigma_g)`. The samples of all iterations share their
noise.

**References:** MacKay, *Bayesian interpolation*, Neural Computation 4, 1992; Antorán et al., *Sampling-based inference
for large linear models, with application to linearised Laplace*, ICLR 2023.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random

from numpyro_bdl.guides.prior import Prior
from numpyro_bdl.linear.model import Linearization, Weights
from numpyro_bdl.linear.system import (
    Problem,
    System,
    dots,
    noise_gradients,
    prior_draws,
    quality,
    sum_over_batches,
)
from numpyro_bdl.natural_parameter import without_wrappers


class Expectation(NamedTuple):
    """What an E-step leaves, in whitened weights."""

    mode: Any
    """mode of the linear model, counted from the prior mean; None if it was not asked for"""
    samples: Weights
    """zero-mean samples, (sample, ...)"""
    dimension: dict[str, Array]
    """effective dimension of each site"""
    residual: Array
    """largest residual of the samples, relative to their right-hand sides"""
    error: Array
    """a bound on the error of their function, in posterior standard deviations"""


def expectation(
    system: System, solver, keys: tuple[Array, Array], mode: Weights | None, samples: Weights | None, count: int,
    curvature_at: str, report,
) -> tuple[Expectation, System]:  # fmt: skip
    """The mode and the samples of the linear model under a prior.

    :param solver: Solves for both.
    :param keys: PRNG keys of the prior noise and of the minibatches; the same in every iteration.
    :param mode: Where to begin the mode; None for none.
    :param samples: Where to begin the samples; None for the prior draws.
    :return: The expectation, and the system that the samples solve.
    """
    noise_key, batch_key = keys
    if mode is not None:
        mode = solver.mode(system, mode, batch_key, lambda done: report(done / 2))
        if curvature_at == "linear":
            system = system._replace(model=system.model.curved(system.displacement(mode)))
    draws = prior_draws(noise_key, system.model.weights, count)
    problem = Problem(draws, noise_gradients(system, count), noisy=True)
    start = draws if samples is None else samples
    samples = solver.solve(system, problem, start, batch_key, lambda done: report(0.5 + done / 2))
    found = quality(system, problem, samples)
    dimension = {name: jnp.mean(d) for name, d in dots(samples, found.curved).items()}
    return Expectation(mode, samples, dimension, found.residual, found.error), system


def new_precisions(prior: Prior, found: Expectation) -> dict[str, Array]:
    """The precision of each group after an M-step."""
    norms = {name: jnp.sum(w**2) for name, w in found.mode.items()}
    spread = {name: jnp.mean(d) for name, d in dots(found.samples, found.samples).items()}
    alpha = {}
    for group, names in prior.groups.items():
        size = sum(found.mode[name].size for name in names)
        dimension, norm, trace = (sum(part[name] for name in names) for part in (found.dimension, norms, spread))
        ratio = jnp.where(dimension > 0, jnp.minimum(dimension, size) / norm, size / (norm + trace))
        # a step of three orders of magnitude is a group that the data say nothing of
        alpha[group] = prior.alpha[group] * jnp.clip(ratio, 1e-3, 1e3)
    return alpha


def whitened_again(x: Weights, before: Weights, after: Weights) -> Weights:
    """The same weights, whitened by other standard deviations."""
    return jax.tree.map(lambda x, old, new: x * old / new, x, before, after)


# ---- noise scale ----------------------------------------------------------------------------------------------------


def new_noise_scale(system: System, found: Expectation, site: str) -> Array:
    r"""The noise scale after an M-step, for each of its entries: :math:`s^2 \sum r^2/s^2` over N less the dimension
    of the outputs that have it, or where that is most of N by EM proper, :math:`s^2 (\sum r^2/s^2 + \gamma) / N`."""
    squares, dimension, count = _noise_statistics(system, found.mode, found.samples, site)
    interpolating = dimension > count / 2
    ratio = jnp.where(interpolating, (squares + dimension) / count, squares / (count - dimension))
    return system.model.others[site] * jnp.sqrt(ratio)


@partial(jax.jit, static_argnums=3)
def _noise_statistics(system: System, mode: Weights, samples: Weights, site: str) -> tuple[Array, Array, Array]:
    """Sums over the outputs that an entry of the noise scale belongs to: squared standardized residuals, the
    effective dimension, and how many there are."""

    def of_batch(batch: Linearization):
        logs, pull = jax.vjp(log_scales(batch, site), jnp.log(system.model.others[site]))
        outputs = batch.outputs(system.displacement(mode))

        def pulled(values):
            return pull({k: batch.sites[k].weight * batch.sites[k].share * values(k) for k in logs})[0]

        def residual(name):
            return ((batch.sites[name].value - outputs[name]) * jnp.exp(-logs[name])) ** 2

        def of_sample(x):
            change = batch.jvp(system.whiten(x))
            return pulled(lambda name: (change[name] * jnp.exp(-logs[name])) ** 2)

        dimension = jnp.mean(system.model.map(of_sample, samples), 0)
        return pulled(residual), dimension, pulled(lambda name: jnp.ones_like(logs[name]))

    return sum_over_batches(system, of_batch)


def log_scales(batch: Linearization, site: str) -> Callable[[Array], dict[str, Array]]:
    """Logarithms of the scales of all normal sites, as a function of that of the noise scale."""
    model = batch.model
    args, kwargs = model.arguments.join(model.arrays)
    rows = {model.plate: batch.batch.rows} if model.plate else {}

    def logs(log_noise):
        values = model.others | model.weights | {site: jnp.exp(log_noise)}
        sites = model.potential.run(values, rows, random.key(0), model.mutable, args, kwargs)
        laws = {name: without_wrappers(sites[name]["fn"]) for name in batch.sites}
        return {
            name: jnp.broadcast_to(jnp.log(law.scale), batch.eta[name].shape)
            for name, law in laws.items()
            if isinstance(law, dist.Normal)
        }

    return logs
