# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The step size of a stochastic descent."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_bdl.linear.system import System, norm
from numpyro_bdl.noise import normal

_POWER_ITERATIONS = 10
POWER_BATCHES = 8
_LEAST = 1e-12  # of a step size


class Eigenvalues(NamedTuple):
    r"""The largest eigenvalue of :math:`\frac NB \tilde J_S^\top \Lambda_S \tilde J_S`, which bounds the step of a
    descent."""

    mean: Array
    """of its mean over a few minibatches S"""
    batch: Array
    """of that minibatch which has the largest"""


def largest_eigenvalue(product: Callable[[Any], Any], start: Any) -> Array:
    """The largest eigenvalue of a positive matrix by power iteration, given its product with a vector, a pytree."""

    def iterate(_, carry):
        x, size = carry
        y = product(jax.tree.map(lambda v: v / jnp.where(size > 0, size, 1.0), x))  # it may be zero
        return y, norm(y)

    return lax.fori_loop(0, _POWER_ITERATIONS, iterate, (start, norm(start)))[1]


@jax.jit
def eigenvalues(system: System, key: Array) -> Eigenvalues:
    """Estimates by power iteration on a few minibatches."""
    count = 1 if system.batch_size == system.model.size else POWER_BATCHES
    steps = jnp.arange(count)

    def product(n, x):
        return system.product(system.model.at(system.minibatch(key, n)), x)

    def mean_product(x):
        return jax.tree.map(lambda y: jnp.mean(y, 0), lax.map(lambda n: product(n, x), steps))

    start = normal(key, system.model.weights)
    mean = largest_eigenvalue(mean_product, start)
    if count == 1:
        return Eigenvalues(mean, mean)
    return Eigenvalues(mean, jnp.max(lax.map(lambda n: largest_eigenvalue(partial(product, n), start), steps)))


def stable_step(found: Eigenvalues, momentum: float, coordinates: float) -> Array:
    r"""A step at which a descent with momentum :math:`\rho` on minibatches is stable,

    .. math::

        \beta = \Bigl(1 + \lambda + \frac{\lambda_S + c - \lambda - 1}{2 (1 - \rho)}\Bigr)^{-1},

    by the mean :math:`1 + \lambda` and the scatter of its minibatches, which momentum adds up.

    :param coordinates: c, by how much a minibatch raises the identity: 1 for primal gradients, N / B for dual ones.
    """
    scatter = jnp.maximum(found.batch + coordinates - found.mean - 1, 0.0)
    return 1 / (1 + found.mean + scatter / (2 * (1 - momentum)))


def with_stable_step(name: str, descend: Callable, given: float | None, stable: Callable[[], Array]) -> Any:
    """A descent whose step is made smaller until it does not diverge.

    :param name: Of the solver.
    :param descend: ``step_size -> solution``, None where it diverges.
    :param given: The step that the user chose, None for a stable one.
    :param stable: What is thought to be a stable step.
    :raises ValueError: if the descent diverges with the step that the user chose.
    """
    step_size = stable() if given is None else jnp.asarray(given)
    while (solution := descend(step_size)) is None:
        if given is not None:
            raise ValueError(
                f"{name}: step_size={given:g} diverged. A step that the eigenvalues of a few minibatches allow is"
                f" {stable():.3g}; step_size=None takes that."
            )
        step_size = step_size / 4
        if not step_size > _LEAST:
            raise ValueError(f"{name} diverged with every step size; is the model finite at all of its data?")
        warnings.warn(f"{name} diverged, and begins again with the step size {step_size:.3g}.", stacklevel=6)
    return solution
