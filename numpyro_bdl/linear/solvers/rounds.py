# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""How long a stochastic descent goes on: rounds, each as long as all before it, until its error is small.

To ask for the error costs a pass over all rows or two, half at most of what the rounds before it cost; the descent
takes about twice the steps that it needs at most.
"""

import itertools
from collections.abc import Iterator

from numpyro_bdl.linear.model import Weights
from numpyro_bdl.linear.system import Problem, System, quality

_FIRST = 100
_PASSES = 4
_REPORTS = 10
_RESIDUAL = 0.01  # of a system that has no noise: a step of Newton's method, which others follow


def rounds(size: int, batch_size: int, steps: int) -> Iterator[tuple[int, int]]:
    """Rounds of so many steps in all: the first step of each, and the one behind its last. The first round is at least
    four passes over all rows; no round is short, since each begins with large steps."""
    begin, end = 0, max(_FIRST, _PASSES * -(-size // batch_size))
    while begin < steps:
        end = end if 2 * end <= steps else steps
        yield begin, end
        begin, end = end, 2 * end


def stretches(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The parts of a round after each of which it reports."""
    return itertools.pairwise(first + (last - first) * n // _REPORTS for n in range(_REPORTS + 1))


def is_solved(system: System, problem: Problem, x: Weights, tolerance: float) -> bool:
    """Whether the error of samples is below a tolerance, in posterior standard deviations of the function."""
    found = quality(system, problem, x)
    return bool(found.error < tolerance if problem.noisy else found.residual < _RESIDUAL)
