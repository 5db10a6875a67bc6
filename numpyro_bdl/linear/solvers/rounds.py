# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""How long a stochastic descent goes on: rounds, each as long as all before it, until its residual is small.

What it costs to ask for the residual, a pass over all rows, is at most a share of what the rounds cost; the descent
takes at most twice the steps that it needs.
"""

import itertools
from collections.abc import Iterator

_FIRST = 100
_REPORTS = 10


def rounds(size: int, batch_size: int, steps: int) -> Iterator[tuple[int, int]]:
    """Rounds of so many steps in all: the first step of each, and the one behind its last. The first round is at least
    a pass over all rows."""
    begin, end = 0, min(max(_FIRST, -(-size // batch_size)), steps)
    while begin < steps:
        yield begin, end
        begin, end = end, min(2 * end, steps)


def stretches(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The parts of a round after each of which it reports."""
    return itertools.pairwise(first + (last - first) * n // _REPORTS for n in range(_REPORTS + 1))
