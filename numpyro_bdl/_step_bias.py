# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What a finite step does to the law of the functions: the same chain at half the step."""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Float
from numpyro.infer import MCMC

from numpyro_bdl._at_draws import check_run, own_kernel
from numpyro_bdl._draws import read_draws
from numpyro_bdl.kernels.symmetry_restricted import SymmetryRestricted
from numpyro_bdl.schedules import Cyclical, Every, Schedule


class StepBias(NamedTuple):
    """Means and variances of function values at a step, less those at half of it; each field by site."""

    mean: dict[str, Float[np.ndarray, "..."]]
    """difference of the means"""
    mean_error: dict[str, Float[np.ndarray, "..."]]
    """its Monte Carlo standard error"""
    variance: dict[str, Float[np.ndarray, "..."]]
    """difference of the variances"""
    variance_error: dict[str, Float[np.ndarray, "..."]]
    """its Monte Carlo standard error"""
    sd: dict[str, Float[np.ndarray, "..."]]
    """standard deviation at half the step, the scale on which a bias matters"""

    @property
    def mean_z(self) -> dict[str, Float[np.ndarray, "..."]]:
        """Differences of the means in standard errors; NaN for a value that never changes."""
        return _ratio(self.mean, self.mean_error)

    @property
    def variance_z(self) -> dict[str, Float[np.ndarray, "..."]]:
        """Differences of the variances in standard errors; NaN for a value that never changes."""
        return _ratio(self.variance, self.variance_error)

    @property
    def mean_rms_z(self) -> float:
        """Root mean square of :attr:`mean_z`: about 1 if there is no bias to be seen."""
        return _root_mean_square(self.mean_z)

    @property
    def variance_rms_z(self) -> float:
        """Root mean square of :attr:`variance_z`: about 1 if there is no bias to be seen."""
        return _root_mean_square(self.variance_z)


def half_step(mcmc: MCMC, rng_key: Array) -> MCMC:
    """The same chains at half the step and twice the steps per draw, so over the same time.

    They begin where the run ended, and so in the same mode, with as many draws of warm-up. Temperature, preconditioner,
    momentum and minibatches are those of the run; a schedule goes through its course at half the speed and half the
    size. :func:`step_bias` compares the two.

    :param mcmc: A run of a stochastic-gradient kernel of this package, or of :class:`~numpyro_bdl.SymmetryRestricted`
        around one.
    :param rng_key: PRNG key, not that of the run.
    :return: A run with as many chains and draws, at twice the cost.
    :raises TypeError: for a kernel whose step has no bias, as NUTS.
    :raises ValueError: for a run without draws or with bad chains, and an ensemble that an optimizer moves.
    """
    check_run("half_step", mcmc)
    own_kernel("half_step", mcmc)
    half = MCMC(
        _at_half_step(mcmc.sampler),
        num_warmup=mcmc.num_warmup,
        num_samples=mcmc.num_samples,
        num_chains=mcmc.num_chains,
        thinning=mcmc.thinning,
        chain_method=mcmc.chain_method,
        progress_bar=mcmc.progress_bar,
        jit_model_args=mcmc._jit_model_args,
    )
    half.run(rng_key, *mcmc._args, init_params=mcmc.last_state.z, **mcmc._kwargs)
    return half


def step_bias(data: Any, half: Any, *, group: str = "functions") -> StepBias:
    r"""Does the step bias the functions? Means and variances at a step less those at half of it.

    .. math::

        z = \frac{\hat\mu_a - \hat\mu_{a/2}}
                 {\sqrt{\mathrm{se}^2(\hat\mu_a) + \mathrm{se}^2(\hat\mu_{a/2})}}

    with the standard errors of :func:`arviz.mcse`, and likewise for variances, each the mean of
    :math:`(f - \bar f)^2`. The bias of a kernel of this package is of first order in the step a, of means as of
    variances, with or without minibatch noise. A difference of :math:`\delta` therefore tells of a bias of about
    :math:`2 \delta` in the run and :math:`\delta` in that at half the step, and :math:`2 \hat\mu_{a/2} - \hat\mu_a`
    has none of first order.

    One large z among many values proves nothing; the root mean square of all does. No difference means no bias that
    these draws could show: compare ``variance_error`` with the variance. A bias that both steps have, as that of a mode
    which neither found, is not seen.

    :param data: The run, its DataTree, arrays (chain, draw, ...) by name, or one array.
    :param half: The same of the run at half the step, from :func:`half_step`.
    :param group: Group of a tree; of a run, ``"posterior"``, ``"functions"`` or ``"log_likelihood"``.
    :return: Differences and their standard errors, by site.
    :raises ValueError: for sites or shapes that differ, values that are not finite, or fewer than 4 draws.

    **Example**

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> from numpyro_bdl import diagnostics
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(0, 1))
        >>> kernel = bdl.SGLD(model, step_size=0.8, steps_per_draw=5)       # variance 1 / (1 - 0.8 / 2)
        >>> mcmc = MCMC(kernel, num_warmup=20, num_samples=2000, progress_bar=False)
        >>> mcmc.run(random.key(0))
        >>> half = diagnostics.half_step(mcmc, random.key(1))               # variance 1 / (1 - 0.4 / 2)
        >>> bias = diagnostics.step_bias(mcmc, half, group="posterior")
        >>> bool(abs(bias.mean_z["x"]) < 4), bool(bias.variance_z["x"] > 4)
        (True, True)
    """
    pair = [read_draws("step_bias", each, group) for each in (data, half)]
    shapes = [{name: value.shape[2:] for name, value in draws.items()} for draws in pair]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"step_bias: the two runs must have the same values, got {shapes[0]} and {shapes[1]} behind chain and"
            " draw; give to_datatree the same probe."
        )
    for draws, which in zip(pair, ("run", "run at half the step"), strict=True):
        for name, value in draws.items():
            bad = np.flatnonzero(~np.isfinite(value).all(tuple(range(1, value.ndim))))
            if len(bad):
                raise ValueError(
                    f"step_bias: the chains {bad.tolist()} of the {which} have values at '{name}' that are not finite;"
                    " leave them out, as in tree.isel(chain=[...])."
                )
    result = StepBias({}, {}, {}, {}, {})
    for name in pair[0]:
        one, other = (_moments(draws[name]) for draws in pair)
        result.mean[name], result.mean_error[name] = one.mean - other.mean, np.hypot(one.mean_error, other.mean_error)
        result.variance[name] = one.variance - other.variance
        result.variance_error[name] = np.hypot(one.variance_error, other.variance_error)
        result.sd[name] = np.sqrt(other.variance)
    return result


class _Moments(NamedTuple):
    mean: np.ndarray
    mean_error: np.ndarray
    variance: np.ndarray
    variance_error: np.ndarray


def _moments(value: np.ndarray) -> _Moments:
    from arviz_stats.base import array_stats

    value = value.astype(float)
    mean = value.mean((0, 1))
    squares = (value - mean) ** 2
    still = np.ptp(value, (0, 1)) == 0
    with np.errstate(invalid="ignore", divide="ignore"):  # values that don't change
        errors = [np.where(still, 0, array_stats.mcse(x, chain_axis=0, draw_axis=1)) for x in (value, squares)]
    return _Moments(mean, errors[0], squares.mean((0, 1)), errors[1])


def _ratio(one: dict, other: dict) -> dict:
    with np.errstate(invalid="ignore", divide="ignore"):
        return {name: one[name] / other[name] for name in one}


def _root_mean_square(scores: dict) -> float:
    flat = np.concatenate([np.ravel(score) for score in scores.values()])
    return float(np.sqrt(np.nanmean(flat**2))) if not np.isnan(flat).all() else float("nan")


# ---- a kernel at half its step --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HalfSpeed:
    """A schedule of twice the steps."""

    schedule: Schedule
    factor: float

    def __call__(self, i):
        return self.factor * self.schedule(i // 2)


def _halved(schedule: Cyclical | Every) -> Cyclical | Every:
    if isinstance(schedule, Cyclical):
        rest = schedule.draws_per_cycle, schedule.exploration, schedule.exploration_temperature
        return Cyclical(schedule.peak / 2, 2 * schedule.steps_per_cycle, *rest)
    size: Any = schedule.step_size
    return Every(_HalfSpeed(size, 0.5) if callable(size) else size / 2, 2 * schedule.steps_per_draw)


def _at_half_step(kernel: Any) -> Any:
    half = copy.copy(kernel)
    if isinstance(kernel, SymmetryRestricted):
        half.kernel, half._met = _at_half_step(kernel.kernel), None
        return half
    if getattr(kernel, "_optimizer", None) is not None:
        raise ValueError(
            f"half_step: this {type(kernel).__name__} is moved by an optimizer, and samples no law that a step could"
            " bias; it needs a step_size."
        )
    half._schedule = _halved(kernel._schedule)
    if callable(kernel._temperature):
        half._temperature = _HalfSpeed(kernel._temperature, 1.0)
    half._forget()
    return half
