# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Convergence of networks: within each chain, between chains, and of functions.

Hidden units can be exchanged, and odd ones change sign, without a change of the function. Chains therefore sit in
different copies of one network, and the R-hat of a weight tells only that. What keeps its meaning is

- :func:`chainwise_rhat` and :func:`chainwise_ess`, which look at each chain alone: is it stationary, and how many
  draws is it worth, wherever it is?
- :func:`variances`: how far chains are apart, beside how far each travels, by layer;
- :func:`function_summary`: R-hat and ESS of the functions, on which the symmetries don't act;
- :func:`function_spread`: do the draws differ at all, or has the sampler become an optimizer?
- :func:`unmixed_chains`: chains whose predictions are far worse than those of the others.

What a stochastic-gradient sampler adds to the posterior, and no R-hat shows, is in

- :func:`half_step` and :func:`step_bias`: does the law of the functions change at half the step?
- :func:`gradient_noise`: minibatch noise beside the noise that the kernel injects;
- :func:`configurational_temperature` and :func:`kinetic_temperature`: the temperature at which the chain really is.

Data is a run; its DataTree; arrays (chain, draw, ...) by name; or one array. R-hat and ESS are those of ArviZ, which is
loaded when it is needed.

**References:** Vehtari et al., *Rank-normalization, folding, and localization: an improved R-hat*, Bayesian Analysis
16, 2021; Sommer et al., *Connecting the dots: is mode-connectedness the key to feasible sample-based inference in
Bayesian neural networks?*, ICML 2024, whose R-hat within chains :func:`chainwise_rhat` is.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from numpyro_bdl._checks import check_integer, check_number
from numpyro_bdl._draws import flatten, read_draws
from numpyro_bdl._effective_temperature import EffectiveTemperature as EffectiveTemperature
from numpyro_bdl._effective_temperature import Estimate as Estimate
from numpyro_bdl._effective_temperature import configurational_temperature as configurational_temperature
from numpyro_bdl._effective_temperature import kinetic_temperature as kinetic_temperature
from numpyro_bdl._function_spread import THRESHOLD, relative_spread, warn_of_still_chains
from numpyro_bdl._function_spread import FunctionSpread as FunctionSpread
from numpyro_bdl._function_spread import function_spread as function_spread
from numpyro_bdl._gradient_noise import GradientNoise as GradientNoise
from numpyro_bdl._gradient_noise import gradient_noise as gradient_noise
from numpyro_bdl._step_bias import StepBias as StepBias
from numpyro_bdl._step_bias import half_step as half_step
from numpyro_bdl._step_bias import step_bias as step_bias

RHAT_LEVELS = (1.01, 1.1)
"""R-hat that is usually asked for, and above which chains have not mixed."""


def chainwise_rhat(
    data: Any, *, segments: int = 4, group: str = "posterior"
) -> dict[str, Float[np.ndarray, "chain ..."]]:
    r"""R-hat of the segments of each chain: is the chain stationary, whichever copy of the network it is in?

    .. math::

        \hat R = \sqrt{\frac{\frac{n - 1}{n} W + B}{W}}

    for n draws in a segment, W the mean of the variances of the segments of one chain, and B the variance of their
    means, after rank normalization within the chain; the larger of that and of the same for distances to the median, as
    in :func:`arviz.rhat`. Exchanging units of a chain exchanges the numbers, and a change of sign leaves them as they
    are. About 1 says that a chain stays where it is, not that it has found every mode.

    :param data: A run, a DataTree, arrays (chain, draw, ...) by name, or one array.
    :param segments: Number of segments, even and at least 4. What is left over at the start of a chain is dropped.
    :param group: Group of a tree; of a run, ``"posterior"``, ``"functions"`` or ``"log_likelihood"``.
    :return: (chain, ...) by name; NaN for chains that are not finite and values that don't change.
    :raises ValueError: for shapes that don't fit, or fewer than 2 draws in a segment.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import diagnostics
        >>> draws = np.random.default_rng(0).normal(size=(4, 400)) + 10 * np.arange(4)[:, None]    # four copies
        >>> bool(diagnostics.chainwise_rhat({"w": draws})["w"].max() < 1.02)
        True
    """
    check_integer("chainwise_rhat", "segments", segments, least=4)
    if segments % 2:
        raise ValueError(f"chainwise_rhat: segments must be even, since ArviZ halves what it is given; got {segments}.")
    draws = read_draws("chainwise_rhat", data, group, least=2 * segments)
    return {name: _in_segments(value, segments) for name, value in draws.items()}


def chainwise_ess(data: Any, *, group: str = "posterior") -> dict[str, Float[np.ndarray, "..."]]:
    r"""Sum over chains of the ESS of each chain alone.

    :func:`arviz.ess` of all chains together falls to about the number of chains when they are in different copies of
    the network. This one asks how many independent draws the chains hold, each in its own copy.

    :param data: A run, a DataTree, arrays (chain, draw, ...) by name, or one array.
    :param group: Group of a tree; of a run, ``"posterior"``, ``"functions"`` or ``"log_likelihood"``.
    :return: Bulk ESS, (...) by name, to which a chain that doesn't move adds 1; NaN if a chain is not finite.
    :raises ValueError: for shapes that don't fit, or fewer than 4 draws.
    """
    draws = read_draws("chainwise_ess", data, group)
    return {
        name: np.where(np.ptp(value, 1) == 0, 1, _arviz().ess(value, chain_axis=None, draw_axis=1)).sum(0)
        for name, value in draws.items()
    }


class Variances(NamedTuple):
    """Variance between and within chains, each the mean over the values of a variable."""

    between: float
    """variance over chains of the mean of each"""
    within: float
    """mean over chains of the variance over draws"""

    @property
    def share(self) -> float:
        """Share of the variance that is between chains."""
        return self.between / (self.between + self.within)


def variances(data: Any, *, group: str = "posterior") -> dict[str, Variances]:
    """Variance between and within chains, by variable: for a network, by kernel and bias of each layer.

    Weights far apart beside functions close together are copies of one function; both far apart are functional modes.

    :param data: A run, a DataTree, arrays (chain, draw, ...) by name, or one array.
    :param group: Group of a tree; of a run, ``"posterior"``, ``"functions"`` or ``"log_likelihood"``.
    :return: The variances by name.
    :raises ValueError: for shapes that don't fit, or a single chain.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import diagnostics
        >>> diagnostics.variances({"w": np.array([[0.0, 2.0], [4.0, 6.0]])})
        {'w': Variances(between=8.0, within=2.0)}
    """
    draws = read_draws("variances", data, group, least=2)
    _several_chains("variances", draws, 2)
    return {
        name: Variances(float(value.mean(1).var(0, ddof=1).mean()), float(value.var(1, ddof=1).mean()))
        for name, value in draws.items()
    }


class FunctionSummary(NamedTuple):
    """Convergence of the function values of a run."""

    values: int
    """number of function values that change"""
    rhat_median: float
    rhat_max: float
    share_mixed: float
    """share of the values whose R-hat is below the threshold"""
    chainwise_rhat_max: float
    """largest :func:`chainwise_rhat` over chains and values; infinite if a chain doesn't move"""
    ess_min: float
    """smallest bulk ESS of all chains together"""
    chainwise_ess_min: float
    """smallest sum of the ESS of each chain alone"""
    spread_min: float
    """smallest :func:`function_spread` of a chain, of all values together"""


def function_summary(data: Any, *, threshold: float = RHAT_LEVELS[1], segments: int = 4) -> FunctionSummary:
    """R-hat and ESS of the functions of a run, between chains and within each.

    If R-hat is large while :func:`chainwise_rhat` is about 1, the chains are stationary and in different functional
    modes; :func:`~numpyro_bdl.symmetry.functional_modes` tells which is where. If both are large, they still move.

    :param data: Function values (chain, draw, point, output), or such arrays by site; a DataTree with a group
        ``functions``; or a run, for its functions at 64 of its rows.
    :param threshold: R-hat below which a value counts as mixed, above 1.
    :param segments: As of :func:`chainwise_rhat`.
    :return: The numbers; values that are the same in every draw, as a logit fixed at 0, are left out. A warning tells
        of chains whose functions hardly differ from draw to draw, see :func:`function_spread`.
    :raises ValueError: for shapes that don't fit, a single chain, or values that are not finite.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import diagnostics
        >>> functions = np.random.default_rng(0).normal(size=(4, 500, 10, 1))           # (chain, draw, point, output)
        >>> diagnostics.function_summary(functions).share_mixed
        1.0
    """
    check_number("function_summary", "threshold", threshold, low=1)
    draws = read_draws("function_summary", data, "functions", least=2 * segments)
    _several_chains("function_summary", draws, 2)
    values = flatten(draws)
    bad = np.flatnonzero(~np.isfinite(values).all((1, 2)))
    if len(bad):
        raise ValueError(
            f"function_summary: the chains {bad.tolist()} have function values that are not finite; leave them out, as"
            " in tree.isel(chain=[...]), and take a smaller step."
        )
    values = values[..., np.ptp(values, (0, 1)) > 0]
    if not values.shape[2]:
        raise ValueError("function_summary: every function value is the same in all draws.")
    arviz = _arviz()
    with np.errstate(divide="ignore"):  # chains that don't move
        rhat = arviz.rhat(values, chain_axis=0, draw_axis=1)
    within = chainwise_rhat(values, segments=segments)["posterior"]
    relative = relative_spread({"functions": values})
    warn_of_still_chains(relative, relative < THRESHOLD, THRESHOLD)
    return FunctionSummary(
        values=len(rhat),
        rhat_median=float(np.median(rhat)),
        rhat_max=float(rhat.max()),
        share_mixed=float(np.mean(rhat < threshold)),
        chainwise_rhat_max=float(np.nan_to_num(within, nan=np.inf).max()),
        ess_min=float(arviz.ess(values, chain_axis=0, draw_axis=1).min()),
        chainwise_ess_min=float(chainwise_ess(values)["posterior"].min()),
        spread_min=float(relative.min()),
    )


class UnmixedChains(NamedTuple):
    """Which chains predict far worse than the others."""

    lppd: Float[np.ndarray, " chain"]
    """log pointwise predictive density of each chain, the mean over rows"""
    threshold: float
    """what a chain has to reach"""
    unmixed: Bool[np.ndarray, " chain"]

    @property
    def kept(self) -> Int[np.ndarray, " kept"]:
        """Indices of the other chains."""
        return np.flatnonzero(~self.unmixed)


def unmixed_chains(data: Any, *, deviations: float = 5.0) -> UnmixedChains:
    r"""Chains whose log pointwise predictive density is far below that of the others.

    .. math::

        \text{lppd}_c = \frac1N \sum_i \log \frac1S \sum_s p(y_i \mid \theta_{cs}), \qquad
        \text{threshold} = \text{median} - 5 \, \text{MAD}

    with the median and the median absolute deviation over chains. Nothing is left out unless you do it, by
    ``tree.isel(chain=result.kept)``; then say so, since chains left out by their likelihood make the rest look better
    than the sampler is. A minor mode is not a failure: look at :func:`~numpyro_bdl.symmetry.functional_modes` first.

    :param data: A DataTree with a group ``log_likelihood``; a run; or log likelihoods (chain, draw, row), of held-out
        rows if you have them, by site or as one array.
    :param deviations: Number of median absolute deviations.
    :return: The densities, the threshold and the chains below it, of which a warning tells too. A density that is not
        finite is below it.
    :raises ValueError: for shapes that don't fit, or fewer than 3 chains.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import diagnostics
        >>> log_likelihood = np.random.default_rng(0).normal(-1, 0.1, size=(6, 50, 30))     # (chain, draw, row)
        >>> diagnostics.unmixed_chains(log_likelihood).kept.tolist()
        [0, 1, 2, 3, 4, 5]
    """
    from scipy.special import logsumexp
    from scipy.stats import median_abs_deviation

    check_number("unmixed_chains", "deviations", deviations)
    draws = read_draws("unmixed_chains", data, "log_likelihood", least=1)
    _several_chains("unmixed_chains", draws, 3)
    values = flatten(draws)
    lppd = (logsumexp(values, 1) - np.log(values.shape[1])).mean(1)
    finite = np.isfinite(lppd)
    if not finite.any():
        raise ValueError("unmixed_chains: no chain has a log likelihood that is finite.")
    threshold = float(np.median(lppd[finite]) - deviations * median_abs_deviation(lppd[finite]))
    unmixed = ~(finite & (lppd >= threshold))
    if unmixed.any():
        found = ", ".join(f"{chain} ({lppd[chain]:.3g})" for chain in np.flatnonzero(unmixed))
        warnings.warn(
            f"{unmixed.sum()} of {len(lppd)} chains have a log predictive density below {threshold:.3g}, the median"
            f" less {deviations:g} median absolute deviations: {found}. They are stuck, or in a minor mode.",
            stacklevel=2,
        )
    return UnmixedChains(lppd, threshold, unmixed)


def _in_segments(value: np.ndarray, segments: int) -> Float[np.ndarray, "chain ..."]:
    chains, draws = value.shape[:2]
    length = 2 * (draws // segments)  # ArviZ halves each
    value = value[:, draws - length * segments // 2 :]
    value = value.reshape(chains, segments // 2, length, *value.shape[2:])
    with np.errstate(divide="ignore", invalid="ignore"):  # chains that don't move
        return _arviz().rhat(value, chain_axis=1, draw_axis=2)


def _several_chains(owner: str, draws: dict[str, np.ndarray], least: int) -> None:
    chains = len(next(iter(draws.values())))
    if chains < least:
        raise ValueError(f"{owner} compares chains: expected at least {least}, got {chains}.")


def _arviz():
    """The functions of ArviZ on arrays."""
    from arviz_stats.base import array_stats

    return array_stats
