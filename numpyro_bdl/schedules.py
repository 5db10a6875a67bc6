# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Step-size schedules: any optax schedule, a number, or :func:`cyclical`.

A schedule is called with the number of gradient steps taken so far, warm-up included.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_bdl._checks import check_integer, check_number

Schedule = Callable[[int | Array], float | Array]


@dataclass(frozen=True)
class Cyclical:
    """The schedule made by :func:`cyclical`, which documents its fields."""

    peak: float
    steps_per_cycle: int
    draws_per_cycle: int
    exploration: float
    exploration_temperature: float

    def __call__(self, i):
        phase = jnp.asarray(i) % self.steps_per_cycle / self.steps_per_cycle
        return self.peak / 2 * (jnp.cos(jnp.pi * phase) + 1)

    @property
    def _draws_at(self) -> np.ndarray:
        """Steps into the cycle at which its draws are handed over; the last ends the cycle."""
        start = exploration_steps(self.exploration, self.steps_per_cycle)
        sampling = self.steps_per_cycle - start
        return start + np.arange(1, self.draws_per_cycle + 1) * sampling // self.draws_per_cycle

    def temperature(self, i, temperature):
        """The temperature of step ``i``: that of the exploration phase, else the one given."""
        start = exploration_steps(self.exploration, self.steps_per_cycle)
        exploring = jnp.asarray(i) % self.steps_per_cycle < start
        return jnp.where(exploring, self.exploration_temperature, temperature)

    def steps_to_draw(self, i):
        """Gradient steps from step ``i`` to the next draw."""
        phase = jnp.asarray(i) % self.steps_per_cycle
        draws_at = jnp.asarray(self._draws_at)
        return draws_at[jnp.searchsorted(draws_at, phase, side="right")] - phase

    def steps_until(self, draws: int) -> int:
        """Gradient steps from the start to the end of the given number of draws."""
        cycles, rest = divmod(draws, self.draws_per_cycle)
        return cycles * self.steps_per_cycle + (int(self._draws_at[rest - 1]) if rest else 0)


def exploration_steps(exploration: float, steps_per_cycle: int) -> int:
    """Steps of a cycle that explore; rounded first, since .55 of 100 is a little more than 55."""
    return math.ceil(round(exploration * steps_per_cycle, 9))


def cyclical(
    peak: float,
    *,
    steps_per_cycle: int,
    draws_per_cycle: int = 1,
    exploration: float = 0.75,
    exploration_temperature: float = 0.0,
) -> Cyclical:
    r"""Cosine cycles of large steps that find a mode and small steps that sample it.

    .. math::

        a_i = \frac{a_0}{2} \Bigl[\cos\Bigl(\pi \frac{i \bmod K}{K}\Bigr) + 1\Bigr]

    with :math:`a_0` = ``peak`` and :math:`K` = ``steps_per_cycle``. The first part of a cycle explores, at
    ``exploration_temperature``, and hands over nothing; the rest samples at the kernel's own temperature
    and hands over ``draws_per_cycle`` evenly spaced draws, the last at the end of the cycle. So the
    schedule says how many steps lead to the next draw, and a kernel refuses ``steps_per_draw`` beside it.
    One cycle of warm-up is ``num_warmup=draws_per_cycle``.

    :param peak: The largest step, on the full-data energy.
    :param steps_per_cycle: Gradient steps in a cycle.
    :param draws_per_cycle: Draws handed over in a cycle.
    :param exploration: The fraction of a cycle that explores, in [0, 1).
    :param exploration_temperature: Temperature of the exploration; 0 is plain gradient descent.
    :return: A schedule, to be given as ``step_size``.
    :raises ValueError: if an argument is out of range, or the sampling phase has fewer steps than draws.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import cyclical
        >>> schedule = cyclical(1e-3, steps_per_cycle=100, draws_per_cycle=5)
        >>> [int(schedule.steps_to_draw(i)) for i in (0, 80, 85, 95)]
        [80, 5, 5, 5]
        >>> schedule.steps_until(7)
        185

    **References:** Zhang et al., *Cyclical stochastic gradient MCMC for Bayesian deep learning*, ICLR 2020,
    equation (1).
    """
    check_number("cyclical", "peak", peak)
    check_number("cyclical", "exploration", exploration, high=1, closed=True)
    for name, value in (("steps_per_cycle", steps_per_cycle), ("draws_per_cycle", draws_per_cycle)):
        check_integer("cyclical", name, value)
    check_number("cyclical", "exploration_temperature", exploration_temperature, closed=True)
    sampling = steps_per_cycle - exploration_steps(exploration, steps_per_cycle)
    if sampling < draws_per_cycle:
        raise ValueError(
            f"cyclical: a cycle of {steps_per_cycle} steps with exploration={exploration} leaves"
            f" {sampling} sampling steps for {draws_per_cycle} draws; lengthen the cycle or take fewer draws."
        )
    return Cyclical(peak, steps_per_cycle, draws_per_cycle, exploration, exploration_temperature)


@dataclass(frozen=True)
class Every:
    """A step size, or a schedule of them, that hands over a draw every ``steps_per_draw`` steps."""

    step_size: float | Schedule
    steps_per_draw: int

    def __call__(self, i):
        return self.step_size(i) if callable(self.step_size) else self.step_size

    def temperature(self, i, temperature):
        """The temperature given, at every step."""
        return temperature

    def steps_to_draw(self, i):
        """Gradient steps to the next draw."""
        return self.steps_per_draw

    def steps_until(self, draws: int) -> int:
        """Gradient steps from the start to the end of the given number of draws."""
        return draws * self.steps_per_draw


def as_schedule(step_size: float | Schedule, steps_per_draw: int | None, owner: str = "schedule") -> Cyclical | Every:
    """The schedule of a kernel from its arguments.

    :param step_size: A positive number, an optax schedule, or :func:`cyclical`.
    :param steps_per_draw: Gradient steps in a draw; None means 1, or what :func:`cyclical` says.
    :param owner: The kernel's name, for error texts.
    :raises ValueError: if ``step_size`` is not positive, or ``steps_per_draw`` is given with a cycle.
    :raises TypeError: if ``step_size`` is neither a number nor callable.
    """
    if isinstance(step_size, Cyclical):
        if steps_per_draw is not None:
            raise ValueError(
                f"steps_per_draw={steps_per_draw} is given beside a cyclical schedule, which itself says how"
                " many steps lead to the next draw; leave it out, or change draws_per_cycle."
            )
        return step_size
    steps_per_draw = 1 if steps_per_draw is None else steps_per_draw
    check_integer(owner, "steps_per_draw", steps_per_draw)
    if callable(step_size):
        return Every(step_size, steps_per_draw)
    if isinstance(step_size, (bool, str)) or not isinstance(step_size, SupportsFloat) or np.ndim(step_size):
        raise TypeError(
            "step_size must be a number, an optax schedule or numpyro_bdl.cyclical(...),"
            f" got {type(step_size).__name__}."
        )
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a positive finite number, got {step_size!r}.")
    return Every(float(step_size), steps_per_draw)


def largest_step(schedule: Cyclical | Every) -> float:
    """The largest step of a schedule: known, or looked for among its first million steps."""
    if isinstance(schedule, Cyclical):
        return schedule.peak
    if not callable(schedule.step_size):
        return schedule.step_size
    grid = np.unique(np.geomspace(1, 1_000_001, 2_000).astype(int) - 1)
    return float(np.max(jax.vmap(schedule)(jnp.asarray(grid))))
