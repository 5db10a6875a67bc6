# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Solvers of the linear system of a linear model, one file each."""

from typing import Any

from numpyro_bdl._checks import check_choice
from numpyro_bdl.linear.solvers.cg import ConjugateGradient as ConjugateGradient
from numpyro_bdl.linear.solvers.dual import DualDescent as DualDescent
from numpyro_bdl.linear.solvers.sgd import SGD as SGD

SOLVERS = {"sgd": SGD, "cg": ConjugateGradient, "dual": DualDescent}


def solver_of(owner: str, solver: Any) -> Any:
    """A solver, from its name or as it is.

    :raises ValueError: for a name that is none of a solver.
    :raises TypeError: for what is no solver.
    """
    if isinstance(solver, str):
        check_choice(owner, "solver", solver, tuple(SOLVERS))
        return SOLVERS[solver]()
    if not isinstance(solver, tuple(SOLVERS.values())):
        raise TypeError(
            f'{owner}: solver must be "sgd", "cg", "dual", or an SGD, ConjugateGradient or DualDescent of'
            f" numpyro_bdl.linear, got {solver!r}."
        )
    return solver
