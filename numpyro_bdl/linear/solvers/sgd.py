# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Stochastic gradients on the quadratic of a sample, and on the loss of the linear model.

With S a minibatch of B of the N rows, the gradients of the two quadratics of
:mod:`~numpyro_bdl.linear.system` are

.. math::

    g_L(x) = \frac NB \tilde J_S^\top (\Lambda_S \tilde J_S x - L_S \epsilon_S) + x - \epsilon_0,
    \qquad
    g_{L'}(x) = \frac NB \tilde J_S^\top \Lambda_S \tilde J_S x + x - b.

Only :math:`L_S \epsilon_S` occurs in them, so that a singular :math:`\Lambda` needs no jitter. At the optimum the
variance of the first, less that of the second, is, for one row and
:math:`M = \sum_i M_i = \tilde J^\top \Lambda \tilde J`,

.. math::

    (N - 1) \, \mathrm{tr} M - 2 \Bigl( N \sum_i \mathrm{tr}(M_i^2 H^{-1}) - \mathrm{tr}(M^2 H^{-1}) \Bigr),

so that the second wins unless the model nearly interpolates its data.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from numpyro_bdl._checks import check_integer, check_number
from numpyro_bdl.linear.model import Weights
from numpyro_bdl.linear.solvers.rounds import is_solved, rounds, stretches
from numpyro_bdl.linear.solvers.steps import eigenvalues, stable_step, with_stable_step
from numpyro_bdl.linear.system import Problem, System, mode_gradient, norm

_FAR = 1e4  # of a mode from the prior mean, in prior standard deviations


class Descent(NamedTuple):
    """Where a descent stands; several vectors at once."""

    x: Weights
    average: Weights
    """geometric average of x"""
    optimizer: optax.OptState


@dataclass(frozen=True)
class SGD:
    r"""Nesterov's gradient descent on minibatches, with geometric averaging: the solver for much data.

    It goes on in rounds, each as long as all before it, until the samples are good enough; for a mode in one. In each
    the step falls linearly to zero over the second half.

    :param steps: Most gradient steps for a solution.
    :param tolerance: Error of samples at which to stop, a bound on that of their function at the data in posterior
        standard deviations: :class:`~numpyro_bdl.linear.system.Quality`.
    :param step_size: Step on the whitened quadratic; None for one that the eigenvalues of a few minibatches allow,
        :func:`~numpyro_bdl.linear.solvers.steps.stable_step`.
    :param momentum: Of Nesterov's method.
    :param averaging: Weight of a new iterate in the geometric average; None for 100 by the steps of a round.
    :param clip: Largest norm of a gradient, in units of the square root of the number of weights (the norm of a prior
        draw); None for none. Clipping biases, so that it is a guard and not a setting.
    :param objective: ``"transformed"`` for :math:`g_{L'}`, ``"original"`` for :math:`g_L`, or ``"auto"``: transformed,
        and original where the first samples say that the model has more than half as many effective parameters as
        observed outputs.
    """

    steps: int = 1000
    tolerance: float = 0.2
    step_size: float | None = None
    momentum: float = 0.9
    averaging: float | None = None
    clip: float | None = None
    objective: str = "auto"

    def __post_init__(self):
        check_integer("SGD", "steps", self.steps)
        check_number("SGD", "tolerance", self.tolerance)
        check_number("SGD", "momentum", self.momentum, high=1.0, closed=True)
        for name in ("step_size", "averaging", "clip"):
            if getattr(self, name) is not None:
                check_number("SGD", name, getattr(self, name))
        if self.objective not in ("auto", "transformed", "original"):
            raise ValueError(f'SGD: objective must be "auto", "transformed" or "original", got {self.objective!r}.')

    @property
    def vectors(self) -> int:
        """Vectors of weights for each solution that are held at once: x, velocity, average and right-hand side."""
        return 4

    def solve(self, system: System, problem: Problem, start: Weights, key: Array, report=lambda done: None) -> Weights:
        """Solutions of the linear system.

        :param start: Where to begin, several vectors.
        :param key: PRNG key of the minibatches.
        :param report: Called now and then with the share that is done.
        """
        original = problem.noisy and self.objective == "original"
        return self._descend("original" if original else "transformed", system, problem, start, key, report)

    def mode(self, system: System, start: Weights, key: Array, report=lambda done: None) -> Weights:
        """The mode of the linear model, one vector."""
        several = jax.tree.map(lambda w: w[None], start)
        solution = self._descend("mode", system, None, several, key, report)
        return jax.tree.map(lambda w: w[0], solution)

    def _descend(self, kind: str, system: System, problem: Problem | None, start: Weights, key, report) -> Weights:
        return with_stable_step(
            "SGD",
            lambda step_size: self._try(kind, system, problem, start, key, step_size, report),
            self.step_size,
            lambda: stable_step(eigenvalues(system, key), self.momentum, 1.0),
        )

    def _try(self, kind, system, problem, start, key, step_size, report) -> Weights | None:
        """The solution, or None when the descent leaves the ball that it lies in."""
        # H is at least the identity, so that no solution is longer than its right-hand side
        bound = 10 * norm(start if problem is None else problem.total) + _FAR * (problem is None)
        x = start
        every = rounds(system.model.size, system.batch_size, self.steps)
        for round_ in every if problem else [(0, self.steps)]:
            state = _start(self, x)
            for part in stretches(*round_):
                state = _advance(self, kind, system, problem, state, key, step_size, round_, part)
                if not norm(state.x) <= bound:
                    return None
                report(part[1] / self.steps)
            x = state.average
            if problem and round_[1] < self.steps and is_solved(system, problem, x, self.tolerance):
                break
        report(1.0)
        return x


@partial(jax.jit, static_argnums=0)
def _start(solver: SGD, x: Weights) -> Descent:
    return Descent(x, x, jax.vmap(_optimizer(solver, 1.0, x).init)(x))


@partial(jax.jit, static_argnums=(0, 1))
def _advance(solver: SGD, kind: str, system: System, problem, state: Descent, key, step_size, round_, part) -> Descent:
    first, last = round_
    averaging = jnp.minimum(1.0, 100 / (last - first)) if solver.averaging is None else solver.averaging
    count = len(jax.tree.leaves(state.x)[0])
    total = None if problem is None else problem.total

    def step(i, state: Descent) -> Descent:
        batch = system.model.at(system.minibatch(key, i))
        if kind == "mode":
            g = system.model.map(partial(mode_gradient, system, batch), state.x)
            g = jax.tree.map(lambda g, x: g + x, g, state.x)
        else:
            g = system.model.map(partial(system.product, batch), state.x)
            if kind == "original":
                noise = system.noise_gradient(batch, count)
                g = jax.tree.map(lambda g, x, e, p: g - e + x - p, g, state.x, noise, problem.prior)
            else:
                g = jax.tree.map(lambda g, x, b: g + x - b, g, state.x, total)
        fall = jnp.minimum(1.0, 2 - 2 * (i - first) / (last - first))
        optimizer = _optimizer(solver, step_size * fall, state.x)
        update, optimizer_state = jax.vmap(optimizer.update)(g, state.optimizer)
        x = jax.tree.map(jnp.add, state.x, update)
        average = jax.tree.map(lambda m, x: m + averaging * (x - m), state.average, x)
        return Descent(x, average, optimizer_state)

    return lax.fori_loop(*part, step, state)


def _optimizer(solver: SGD, step_size, x: Weights) -> optax.GradientTransformation:
    size = sum(w[0].size for w in jax.tree.leaves(x))
    clip = optax.identity() if solver.clip is None else optax.clip_by_global_norm(solver.clip * size**0.5)
    return optax.chain(clip, optax.trace(solver.momentum, nesterov=True), optax.scale(-jnp.asarray(step_size)))
