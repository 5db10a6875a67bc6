# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Conjugate gradients on full passes: the reference, and the solver for little data."""

from dataclasses import dataclass
from functools import partial

import jax
from jax import Array
from jax.scipy.sparse.linalg import cg

from numpyro_bdl._checks import check_integer, check_number
from numpyro_bdl.linear.model import Weights
from numpyro_bdl.linear.solvers.newton import newton
from numpyro_bdl.linear.system import Problem, System, sum_over_batches


@dataclass(frozen=True)
class ConjugateGradient:
    """Conjugate gradients on all rows, preconditioned by the prior; Newton's method for the mode.

    :param tolerance: Residual at which to stop, relative to the right-hand side.
    :param max_iterations: Most iterations, each a pass over all rows.
    """

    tolerance: float = 1e-4
    max_iterations: int = 1000

    def __post_init__(self):
        check_number("ConjugateGradient", "tolerance", self.tolerance)
        check_integer("ConjugateGradient", "max_iterations", self.max_iterations)

    @property
    def vectors(self) -> int:
        """Vectors of weights for each solution that are held at once: x, residual, direction and right-hand side."""
        return 4

    def solve(self, system: System, problem: Problem, start: Weights, key: Array, report=lambda done: None) -> Weights:
        """Solutions of the linear system, several vectors."""
        solution = _solve(self, system, problem, start)
        report(1.0)
        return solution

    def mode(self, system: System, start: Weights, key: Array, report=lambda done: None) -> Weights:
        """The mode of the linear model, one vector."""
        return newton(system, lambda *problem: self.solve(*problem, key), start, report)


@partial(jax.jit, static_argnums=0)
def _solve(solver: ConjugateGradient, system: System, problem: Problem, start: Weights) -> Weights:
    def matrix(x):
        data = sum_over_batches(system, lambda batch: system.product(batch, x))
        return jax.tree.map(lambda d, p: d + p, data, x)

    def one(b, x0):
        return cg(matrix, b, x0, tol=solver.tolerance, maxiter=solver.max_iterations)[0]

    return system.model.map(one, problem.total, start)
