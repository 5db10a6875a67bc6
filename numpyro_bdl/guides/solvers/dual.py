# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Stochastic descent on the dual: one unknown for each observed output.

The solution of :math:`H x = p + \tilde J^\top L e` is, with :math:`F = L^\top \tilde J`,

.. math::

    x = p + F^\top a, \qquad (F F^\top + I) \, a = e - F p,

a system whose smallest eigenvalue is at least 1, however singular :math:`\Lambda` is, so that it needs no jitter. A
step takes the rows S of a minibatch, with replacement from epoch to epoch, and moves their unknowns,

.. math::

    g_S = \frac NB \bigl[ (F F^\top + I)(a + \rho v) - (e - F p) \bigr]_S, \quad
    v \leftarrow \rho v - \beta g, \quad a \leftarrow a + v.

:math:`F^\top a` and :math:`F^\top v` are kept beside a and v, so that a step costs what one of the primal does.

**References:** Lin et al., *Stochastic gradient descent for Gaussian processes done right*, ICLR 2024.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_bdl._checks import check_integer, check_number
from numpyro_bdl.guides.linear_system import Problem, System, stable_step
from numpyro_bdl.guides.solvers.newton import newton
from numpyro_bdl.guides.solvers.rounds import is_solved, rounds, stretches
from numpyro_bdl.guides.tangent import Batch, Linearization, Weights


class Dual(NamedTuple):
    """Where the descent stands. Unknowns are (row, vector, ...) by observed site."""

    velocity: dict[str, Array]
    a: dict[str, Array]
    primal_velocity: Weights
    """:math:`F^T v`"""
    primal: Weights
    """:math:`F^T a`"""
    average: Weights
    """geometric average of :math:`F^T a`"""


@dataclass(frozen=True)
class DualDescent:
    r"""Stochastic dual descent: for few rows or many weights. It holds an unknown per observed output and sample.

    It goes on in rounds, each as long as all before it, until the samples are good enough.

    :param steps: Most steps for a solution.
    :param tolerance: Error of samples at which to stop, a bound on that of their function at the data in posterior
        standard deviations: :class:`~numpyro_bdl.guides.linear_system.Quality`.
    :param step_size: :math:`\beta`; None for one that the eigenvalues of a few minibatches allow,
        :func:`~numpyro_bdl.guides.linear_system.stable_step`.
    :param momentum: :math:`\rho`.
    :param averaging: Weight of a new iterate in the geometric average; None for 100 by the steps of a
        round, since the noise of this descent vanishes at its solution.
    """

    steps: int = 1000
    tolerance: float = 0.2
    step_size: float | None = None
    momentum: float = 0.9
    averaging: float | None = None

    def __post_init__(self):
        check_integer("DualDescent", "steps", self.steps)
        check_number("DualDescent", "tolerance", self.tolerance)
        check_number("DualDescent", "momentum", self.momentum, high=1.0, closed=True)
        for name in ("step_size", "averaging"):
            if getattr(self, name) is not None:
                check_number("DualDescent", name, getattr(self, name))

    @property
    def vectors(self) -> int:
        """Vectors of weights for each solution that are held at once, the unknowns aside."""
        return 5

    def solve(self, system: System, problem: Problem, start: Weights, key: Array, report=lambda done: None) -> Weights:
        """Solutions of the linear system, several vectors; they begin at p whatever ``start`` is."""
        step_size = self.step_size
        if step_size is None:
            step_size = stable_step(system, key, self.momentum, system.model.size / system.batch_size)
        state = _start(system, problem)
        x = problem.prior
        for round_ in rounds(system, self.steps):
            state = state._replace(average=state.primal)
            for part in stretches(*round_):
                state = _advance(self, system, problem, state, key, step_size, round_, part)
                report(part[1] / self.steps)
            x = jax.tree.map(jnp.add, problem.prior, state.average)
            if round_[1] < self.steps and is_solved(system, problem, x, self.tolerance):
                break
        report(1.0)
        return x

    def mode(self, system: System, start: Weights, key: Array, report=lambda done: None) -> Weights:
        """The mode of the linear model, one vector."""
        return newton(system, lambda *problem: self.solve(*problem, key), start, report)


@jax.jit
def _start(system: System, problem: Problem) -> Dual:
    count = len(jax.tree.leaves(problem.prior)[0])
    one = system.model.at(Batch(system.rows[0], system.weight[0], jnp.ones(())))
    noise = jax.eval_shape(lambda: one.noise(count))

    def zeros(name):
        shape, axis = noise[name].shape, one.sites[name].row_axis
        rest = shape[1:] if axis is None else shape[1 : axis + 1] + shape[axis + 2 :]
        return jnp.zeros((1 if axis is None else system.model.size, count, *rest), noise[name].dtype)

    a = {name: zeros(name) for name in noise}
    zero = jax.tree.map(jnp.zeros_like, problem.prior)
    return Dual(a, a, zero, zero, zero)


@partial(jax.jit, static_argnums=0)
def _advance(solver: DualDescent, system: System, problem: Problem, state: Dual, key, step_size, round_, part) -> Dual:
    averaging = jnp.minimum(1.0, 100 / (round_[1] - round_[0])) if solver.averaging is None else solver.averaging
    count = len(jax.tree.leaves(problem.prior)[0])

    def step(i, state: Dual) -> Dual:
        ahead = jax.tree.map(lambda a, v: a + solver.momentum * v, state.a, state.velocity)
        primal = jax.tree.map(
            lambda p, a, v: p + a + solver.momentum * v, problem.prior, state.primal, state.primal_velocity
        )
        rows = system.minibatch(key, i)
        # without N / B, which multiplies the gradient and not the matrix
        batch = system.model.at(rows._replace(weight=jnp.ones_like(rows.weight)))
        forward = system.model.map(lambda x: batch.transposed(batch.jvp(system.whiten(x))), primal)
        noise: Any = batch.noise(count) if problem.noisy else jax.tree.map(jnp.zeros_like, forward)
        residual = {name: _take(batch, name, ahead[name]) + forward[name] - noise[name] for name in ahead}
        gradient = {name: residual[name] * _row_factor(system, batch, name) for name in residual}
        pushed = system.model.map(lambda g: system.whiten(batch.vjp(batch.factor(g))), gradient)
        velocity = {
            name: _add(batch, name, solver.momentum * state.velocity[name], -step_size * gradient[name])
            for name in ahead
        }
        primal_velocity = jax.tree.map(lambda v, g: solver.momentum * v - step_size * g, state.primal_velocity, pushed)
        primal = jax.tree.map(jnp.add, state.primal, primal_velocity)
        return Dual(
            velocity,
            jax.tree.map(jnp.add, state.a, velocity),
            primal_velocity,
            primal,
            jax.tree.map(lambda m, x: m + averaging * (x - m), state.average, primal),
        )

    return lax.fori_loop(*part, step, state)


def _row_factor(system: System, batch: Linearization, name: str) -> float:
    return 1.0 if batch.sites[name].row_axis is None else system.model.size / system.batch_size


def _take(batch: Linearization, name: str, unknowns: Array) -> Array:
    """The unknowns of a batch, laid out as its noise."""
    axis = batch.sites[name].row_axis
    return unknowns[0] if axis is None else jnp.moveaxis(unknowns[batch.batch.rows], 0, axis + 1)


def _add(batch: Linearization, name: str, unknowns: Array, change: Array) -> Array:
    """Add to the unknowns of a batch; a row that is in it twice moves twice."""
    axis = batch.sites[name].row_axis
    if axis is None:
        return unknowns.at[0].add(change)
    return unknowns.at[batch.batch.rows].add(jnp.moveaxis(change, axis + 1, 0))
