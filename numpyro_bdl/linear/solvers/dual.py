# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Stochastic descent on the dual: one unknown for each observed output.

The solution of :math:`H x = p + \tilde J^\top L e` is, with :math:`F = L^\top \tilde J`,

.. math::

    x = p + F^\top a, \qquad (F F^\top + I) \, a = e - F p,

a system whose smallest eigenvalue is at least 1, however singular :math:`\Lambda` is, so that it needs no jitter. A
step takes the rows S of a minibatch and moves their unknowns,

.. math::

    g_S = \frac NB \bigl[ (F F^\top + I)(a + \rho v) - (e - F p) \bigr]_S, \quad
    v \leftarrow \rho v - \beta g, \quad a \leftarrow a + v.

Where there are weights, :math:`F^\top a` and :math:`F^\top v` are kept beside a and v, so that a step costs what one of
the primal does; where there is a kernel in place of them, :math:`F F^\top` is formed for the rows of a step.

**References:** Lin et al., *Stochastic gradient descent for Gaussian processes done right*, ICLR 2024.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_bdl._checks import check_integer, check_number
from numpyro_bdl.linear.model import Batch, Linearization, Weights
from numpyro_bdl.linear.solvers.newton import newton
from numpyro_bdl.linear.solvers.rounds import is_solved, rounds, stretches
from numpyro_bdl.linear.solvers.steps import Eigenvalues, eigenvalues, stable_step, with_stable_step
from numpyro_bdl.linear.system import Problem, System, norm

Unknowns = dict[str, Array]
"""By observed site, (row, vector, ...)."""


class Dual(Protocol):
    """A system of equations with an unknown for each observed output; a pytree."""

    @property
    def size(self) -> int:
        """Rows."""
        ...

    @property
    def batch_size(self) -> int: ...

    def zeros(self) -> tuple[Unknowns, Weights]:
        """Unknowns, and their image, that are zero."""
        ...

    def at(self, key: Array, step: Array) -> Any:
        """The minibatch of a step."""
        ...

    def residual(self, batch: Any, a: Unknowns, image: Weights) -> Unknowns:
        r""":math:`[(F F^\top + I) a - (e - F p)]_S`, given :math:`F^\top a`."""
        ...

    def add(self, batch: Any, unknowns: Unknowns, change: Unknowns, factor: Array) -> Unknowns:
        """Add a multiple of a change of the rows of a minibatch; a row that is in it twice moves twice."""
        ...

    def image(self, batch: Any, change: Unknowns) -> Weights:
        r""":math:`F^\top` of a change of the rows of a minibatch."""
        ...

    def solution(self, a: Unknowns, image: Weights) -> Any:
        """What is looked for."""
        ...

    def is_solved(self, solution: Any, tolerance: float) -> bool:
        """Whether the error of samples is below a tolerance, in posterior standard deviations of the function."""
        ...

    def bound(self) -> Array:
        """A norm that the solution does not exceed."""
        ...

    def eigenvalues(self, key: Array) -> Eigenvalues: ...


class State(NamedTuple):
    """Where the descent stands."""

    velocity: Unknowns
    a: Unknowns
    image_velocity: Weights
    """:math:`F^T v`"""
    image: Weights
    """:math:`F^T a`"""
    average: Any
    """geometric average of the solution"""


@dataclass(frozen=True)
class DualDescent:
    r"""Stochastic dual descent: for few rows and many weights, or a kernel. It holds an unknown per observed output and
    sample.

    It goes on in rounds, each as long as all before it, until the samples are good enough.

    :param steps: Most steps for a solution.
    :param tolerance: Error of samples at which to stop, a bound on that of their function at the data in posterior
        standard deviations: :class:`~numpyro_bdl.linear.system.Quality`.
    :param step_size: :math:`\beta`; None for one that the eigenvalues of a few minibatches allow,
        :func:`~numpyro_bdl.linear.solvers.steps.stable_step`.
    :param momentum: :math:`\rho`.
    :param averaging: Weight of a new iterate in the geometric average; None for 100 by the steps of a round, since
        the noise of this descent vanishes at its solution.
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
        return self.descend(WeightDual(system, problem), key, report)

    def mode(self, system: System, start: Weights, key: Array, report=lambda done: None) -> Weights:
        """The mode of the linear model, one vector."""
        return newton(system, lambda *problem: self.solve(*problem, key), start, report)

    def descend(self, dual: Dual, key: Array, report=lambda done: None) -> Any:
        """The solution of a dual system.

        :raises ValueError: if ``step_size`` is given and diverges.
        """

        def stable():
            return stable_step(dual.eigenvalues(key), self.momentum, dual.size / dual.batch_size)

        return with_stable_step(
            "DualDescent", lambda step_size: self._try(dual, key, step_size, report), self.step_size, stable
        )

    def _try(self, dual: Dual, key: Array, step_size: Array, report) -> Any:
        """The solution, or None when the descent leaves the ball that it lies in."""
        bound, solution = 10 * dual.bound(), None
        a, image = dual.zeros()
        state = State(a, a, image, image, dual.solution(a, image))
        for round_ in rounds(dual.size, dual.batch_size, self.steps):
            state = state._replace(average=dual.solution(state.a, state.image))
            for part in stretches(*round_):
                state = _advance(self, dual, state, key, step_size, round_, part)
                if not norm(dual.solution(state.a, state.image)) <= bound:
                    return None
                report(part[1] / self.steps)
            solution = state.average
            if round_[1] < self.steps and dual.is_solved(solution, self.tolerance):
                break
        report(1.0)
        return solution


@partial(jax.jit, static_argnums=0)
def _advance(solver: DualDescent, dual: Dual, state: State, key, step_size, round_, part) -> State:
    averaging = jnp.minimum(1.0, 100 / (round_[1] - round_[0])) if solver.averaging is None else solver.averaging
    rho = solver.momentum

    def step(i, state: State) -> State:
        batch = dual.at(key, i)
        ahead, image = (
            jax.tree.map(lambda a, v: a + rho * v, *pair)
            for pair in ((state.a, state.velocity), (state.image, state.image_velocity))
        )
        residual = dual.residual(batch, ahead, image)
        factor = -step_size * dual.size / dual.batch_size
        velocity = dual.add(batch, jax.tree.map(lambda v: rho * v, state.velocity), residual, factor)
        image_velocity = jax.tree.map(
            lambda v, g: rho * v + factor * g, state.image_velocity, dual.image(batch, residual)
        )
        a, image = jax.tree.map(jnp.add, (state.a, state.image), (velocity, image_velocity))
        average = jax.tree.map(lambda m, x: m + averaging * (x - m), state.average, dual.solution(a, image))
        return State(velocity, a, image_velocity, image, average)

    return lax.fori_loop(*part, step, state)


# ---- with weights ---------------------------------------------------------------------------------------------------


class WeightDual(NamedTuple):
    """The dual of a linear system; its solution is that of the system."""

    system: System
    problem: Problem

    @property
    def size(self) -> int:
        return self.system.model.size

    @property
    def batch_size(self) -> int:
        return self.system.batch_size

    def zeros(self) -> tuple[Unknowns, Weights]:
        count = self._count
        one = self.system.model.at(Batch(self.system.rows[0], self.system.weight[0], jnp.ones(())))
        noise = jax.eval_shape(lambda: one.noise(count))

        def zeros(name):
            shape, axis = noise[name].shape, one.sites[name].row_axis
            rest = shape[1:] if axis is None else shape[1 : axis + 1] + shape[axis + 2 :]
            return jnp.zeros((1 if axis is None else self.size, count, *rest), noise[name].dtype)

        return {name: zeros(name) for name in noise}, jax.tree.map(jnp.zeros_like, self.problem.prior)

    def at(self, key: Array, step: Array) -> Linearization:
        rows = self.system.minibatch(key, step)
        # without N / B, which multiplies the gradient and not the matrix
        return self.system.model.at(rows._replace(weight=jnp.ones_like(rows.weight)))

    def residual(self, batch: Linearization, a: Unknowns, image: Weights) -> Unknowns:
        x = jax.tree.map(jnp.add, self.problem.prior, image)
        forward = self.system.model.map(lambda x: batch.transposed(batch.jvp(self.system.whiten(x))), x)
        noise: Any = batch.noise(self._count) if self.problem.noisy else jax.tree.map(jnp.zeros_like, forward)
        residual = {name: _take(batch, name, a[name]) + forward[name] - noise[name] for name in a}
        # what belongs to no row is met at every step
        often = {name: batch.sites[name].row_axis is None for name in a}
        return {k: r * (self.batch_size / self.size if often[k] else 1.0) for k, r in residual.items()}

    def add(self, batch: Linearization, unknowns: Unknowns, change: Unknowns, factor: Array) -> Unknowns:
        return {name: _add(batch, name, unknowns[name], factor * change[name]) for name in unknowns}

    def image(self, batch: Linearization, change: Unknowns) -> Weights:
        return self.system.model.map(lambda g: self.system.whiten(batch.vjp(batch.factor(g))), change)

    def solution(self, a: Unknowns, image: Weights) -> Weights:
        return jax.tree.map(jnp.add, self.problem.prior, image)

    def is_solved(self, solution: Weights, tolerance: float) -> bool:
        return is_solved(self.system, self.problem, solution, tolerance)

    def bound(self) -> Array:
        # H is at least the identity
        return norm(self.problem.total)

    def eigenvalues(self, key: Array) -> Eigenvalues:
        return eigenvalues(self.system, key)

    @property
    def _count(self) -> int:
        return len(jax.tree.leaves(self.problem.prior)[0])


def _take(batch: Linearization, name: str, unknowns: Array) -> Array:
    """The unknowns of a batch, laid out as its noise."""
    axis = batch.sites[name].row_axis
    return unknowns[0] if axis is None else jnp.moveaxis(unknowns[batch.batch.rows], 0, axis + 1)


def _add(batch: Linearization, name: str, unknowns: Array, change: Array) -> Array:
    axis = batch.sites[name].row_axis
    if axis is None:
        return unknowns.at[0].add(change)
    return unknowns.at[batch.batch.rows].add(jnp.moveaxis(change, axis + 1, 0))
