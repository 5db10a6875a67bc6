# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""The mode of the linear model by Newton's method, its steps by a solver of linear systems.

.. math::

    x \leftarrow x - t \, H(x)^{-1} g(x),

with :math:`H(x)` the system whose curvature is taken at the outputs of x. A normal likelihood takes one step.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from numpyro_bdl.linear.model import Weights
from numpyro_bdl.linear.system import System, dot, energy_and_gradient, without_data

_STEPS = 50
_HALVINGS = 30


def newton(system: System, solve: Callable, start: Weights, report: Callable) -> Weights:
    """The mode of the linear model.

    :param solve: ``(system, problem, start) -> solutions``.
    :param start: Where to begin, one vector.
    :param report: Called after each step with the share that is done, as far as it can be told.
    """
    x = start
    energy, gradient = energy_and_gradient(system, x)
    epsilon = float(jnp.finfo(energy.dtype).eps)
    for n in range(_STEPS):
        here = system._replace(model=system.model.curved(system.displacement(x)))
        problem = without_data(jax.tree.map(jnp.negative, gradient))
        step = jax.tree.map(lambda s: s[0], solve(here, problem, jax.tree.map(jnp.zeros_like, problem.prior)))
        decrement = -float(dot(step, gradient))  # twice what a quadratic would fall by
        scale = 1 + abs(float(energy))
        # below the rounding of the energy a full step is the best that there is
        searching = decrement > 100 * epsilon * scale
        t = 1.0
        for _ in range(_HALVINGS):
            x_new = jax.tree.map(lambda a, s, t=t: a + t * s, x, step)
            energy_new, gradient_new = energy_and_gradient(system, x_new)
            # not finite: a rate that overflows, say
            if not searching or (math.isfinite(energy_new) and energy_new <= energy - 1e-4 * t * decrement):
                break
            t /= 2
        else:
            break
        x, energy, gradient = x_new, energy_new, gradient_new
        report((n + 1) / _STEPS)
        if not searching:
            break
    report(1.0)
    return x
