# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Metrics of predictions of numbers, public in :mod:`numpyro_bdl.metrics`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float
from scipy.special import erf

from numpyro_bdl._predictions import numbers, observed, pooled, same_shape, spread_to


def rmse(prediction: Float[ArrayLike, "row ..."], y: Float[ArrayLike, "row ..."]) -> float:
    r"""Root mean squared error, :math:`\sqrt{\frac1N \sum_i (m_i - y_i)^2}`.

    :param prediction: (row, ...), as the mean over chains and draws of
        :meth:`~numpyro_bdl.PosteriorPredictive.functions`.
    :param y: Observations, of the same shape.
    :raises ValueError: for different shapes, NaN, or infinite numbers.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import metrics
        >>> metrics.rmse([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 6.0])
        1.0
    """
    prediction, y = numbers("rmse", "prediction", prediction), numbers("rmse", "y", y)
    same_shape("rmse", prediction=prediction, y=y)
    return float(np.sqrt(np.mean((prediction - y) ** 2)))


def crps(draws: Float[ArrayLike, "chain draw row ..."], y: Float[ArrayLike, "row ..."], *, fair: bool = False) -> float:
    r"""Continuous ranked probability score of draws of new data, the mean over rows of

    .. math::

        \frac1S \sum_s |x_s - y| - \frac1{2 S^2} \sum_{s, t} |x_s - x_t| = \int (F(z) - 1[y \le z])^2 \, dz,

    F being the distribution function of the S draws. It has the unit of y, is the absolute error for one draw, and
    less is better.

    :param draws: (chain, draw, row, ...), as of :meth:`~numpyro_bdl.PosteriorPredictive.sample`: new data, with its
        noise, and not the function alone.
    :param y: Observations, (row, ...).
    :param fair: Divide by S (S - 1) in place of S²: unbiased, if draws are independent, for the score of the law that
        they come from, so that runs with different numbers of draws can be compared.
    :raises ValueError: for shapes that don't fit, NaN or infinite numbers, or a fair score of a single draw.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import metrics
        >>> draws = np.array([[[0.0], [2.0]]])                                      # one chain, two draws, one row
        >>> metrics.crps(draws, [3.0])
        1.5

    Source: Gneiting & Raftery, *Strictly proper scoring rules, prediction, and estimation*, JASA 102, 2007, equation
    (21); Ferro, *Fair scores for ensemble forecasts*, QJRMS 140, 2014.
    """
    values = pooled("crps", "draws", draws)
    y = observed("crps", y, values.shape[1:], "the draws")
    size = len(values)
    if fair and size < 2:
        raise ValueError("crps: a fair score needs at least 2 draws, got 1; fair=False takes one.")
    values = np.sort(values - y, 0)
    # in order, each pair |x_s - x_t| is a difference, and x_(s) is in it 2 s - S - 1 times with its sign
    times = np.arange(1 - size, size, 2) / (size * (size - 1 if fair else size))
    return float(np.mean(np.abs(values).mean(0) - np.tensordot(times, values, 1)))


def crps_gaussian_mixture(
    mean: Float[ArrayLike, "chain draw row ..."], scale: Float[ArrayLike, "..."], y: Float[ArrayLike, "row ..."]
) -> float:
    r"""Continuous ranked probability score of a mixture of Gaussians, one for each draw, in closed form.

    .. math::

        \frac1S \sum_s A(y - \mu_s, \sigma_s^2) - \frac1{2 S^2} \sum_{s, t} A(\mu_s - \mu_t, \sigma_s^2 + \sigma_t^2),
        \qquad A(m, v) = 2 \sqrt v \, \varphi(m / \sqrt v) + m \, (2 \Phi(m / \sqrt v) - 1) = E |N(m, v)|.

    The time is of order S² for each row; for more than some hundred draws take :func:`crps` of new data.

    :param mean: Means, (chain, draw, row, ...).
    :param scale: Standard deviations, not negative, of that shape or one that NumPy broadcasts to it; of a site sigma
        (chain, draw), for instance, ``sigma[..., None]``.
    :param y: Observations, (row, ...).
    :return: The mean over rows.
    :raises ValueError: for shapes that don't fit, NaN, infinite numbers, or a negative scale.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import metrics
        >>> round(metrics.crps_gaussian_mixture([[[0.0]]], 1.0, [0.0]), 4)          # (sqrt(2) - 1) / sqrt(pi)
        0.2337

    Source: Grimit et al., *The continuous ranked probability score for circular variables and its application to
    mesoscale forecast ensemble verification*, QJRMS 132, 2006, equation (5).
    """
    owner = "crps_gaussian_mixture"
    shape = np.shape(mean)
    mean = pooled(owner, "mean", mean)
    y = observed(owner, y, mean.shape[1:], "the means")
    variance = spread_to(owner, "scale", numbers(owner, "scale", scale), shape).reshape(mean.shape) ** 2
    size = len(mean)
    # a draw with itself, then each pair once
    score = _mean_absolute(mean - y, variance).mean(0) - np.sqrt(variance / np.pi).sum(0) / size**2
    for s in range(size - 1):
        pairs = _mean_absolute(mean[s] - mean[s + 1 :], variance[s] + variance[s + 1 :])
        score -= pairs.sum(0) / size**2
    return float(score.mean())


def _mean_absolute(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """The mean of the absolute value of a Gaussian."""
    # a scale of 0 is a point, and z infinite
    with np.errstate(over="ignore"):
        z = np.divide(mean, np.sqrt(2 * variance), out=np.copysign(np.inf, mean), where=variance > 0)
        square = z**2
    return np.sqrt(2 * variance / np.pi) * np.exp(-square) + mean * erf(z)


class IntervalCoverage(NamedTuple):
    """How often central intervals hold the observation, each (level,)."""

    level: Float[np.ndarray, " level"]
    """nominal level of the interval"""
    coverage: Float[np.ndarray, " level"]
    """share of the observations inside"""
    width: Float[np.ndarray, " level"]
    """mean width, in the unit of y"""


def interval_coverage(
    draws: Float[ArrayLike, "chain draw row ..."],
    y: Float[ArrayLike, "row ..."],
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
) -> IntervalCoverage:
    r"""Coverage and mean width of the central intervals of draws of new data.

    .. math::

        \text{coverage}_\ell = \frac1N \sum_i 1\Bigl[q_i\Bigl(\tfrac{1 - \ell}2\Bigr) \le y_i \le
            q_i\Bigl(\tfrac{1 + \ell}2\Bigr)\Bigr],

    q being the quantiles of all draws, by linear interpolation. The interval of S independent draws from the law of y
    itself holds about :math:`\ell - 2 \ell / (S + 1)` of it. Coverage alone is no merit, since wide intervals have it;
    of two with the right coverage the narrower is better.

    :param draws: (chain, draw, row, ...), as of :meth:`~numpyro_bdl.PosteriorPredictive.sample`: new data, with its
        noise, and not the function alone.
    :param y: Observations, (row, ...).
    :param levels: Levels between 0 and 1.
    :return: Levels, coverage and mean width.
    :raises ValueError: for shapes that don't fit, NaN, infinite numbers, or levels that are not between 0 and 1.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import metrics
        >>> draws = np.random.default_rng(0).normal(size=(4, 500, 100))
        >>> y = np.random.default_rng(1).normal(size=100)
        >>> metrics.interval_coverage(draws, y, [0.5, 0.9]).coverage.round(2).tolist()
        [0.59, 0.92]
    """
    values = pooled("interval_coverage", "draws", draws)
    y = observed("interval_coverage", y, values.shape[1:], "the draws")
    level = np.atleast_1d(numbers("interval_coverage", "levels", levels))
    if level.ndim != 1 or not ((level > 0) & (level < 1)).all():
        raise ValueError(f"interval_coverage: levels must be numbers between 0 and 1, got {levels!r}.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], 0)
    rows = tuple(range(1, low.ndim))
    return IntervalCoverage(level, np.mean((low <= y) & (y <= high), rows), np.mean(high - low, rows))
