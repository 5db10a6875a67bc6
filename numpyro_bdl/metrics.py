# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Numbers by which predictions are judged.

========================  ====================================================================================
predictions               metrics
========================  ====================================================================================
of any kind               :func:`lppd`, :func:`log_predictive_density`, from log likelihoods
of classes                :func:`accuracy`, :func:`negative_log_likelihood`, :func:`brier_score`,
                          :func:`expected_calibration_error`, from :func:`mean_probabilities`
of numbers                :func:`rmse`, from means; :func:`crps`, :func:`interval_coverage`, from new data;
                          :func:`crps_gaussian_mixture`
two for the same rows     :func:`agreement`, :func:`total_variation`, :func:`wasserstein_distance`
========================  ====================================================================================

Each is of the mixture of all draws of all chains, :math:`\bar p(y) = \frac1S \sum_s p(y \mid \theta_s)`, and a mean
over rows. Entropies are in :mod:`numpyro_bdl.uncertainty`, AUROC and its like in :mod:`numpyro_bdl.detection`.
"""

import numpy as np
from jaxtyping import ArrayLike, Float, Int
from scipy import stats
from scipy.special import logsumexp, softmax

from numpyro_bdl._accumulators import Classes, LogMeanExp, blockwise
from numpyro_bdl._checks import check_choice, check_integer
from numpyro_bdl._predictions import class_probabilities, classified, draws_of_logits, numbers, pooled, same_shape
from numpyro_bdl._regression_metrics import IntervalCoverage as IntervalCoverage
from numpyro_bdl._regression_metrics import crps as crps
from numpyro_bdl._regression_metrics import crps_gaussian_mixture as crps_gaussian_mixture
from numpyro_bdl._regression_metrics import interval_coverage as interval_coverage
from numpyro_bdl._regression_metrics import rmse as rmse

BINNINGS = ("equal_width", "equal_mass")
_MOST_BINS = 1000

# ---- of any kind ----------------------------------------------------------------------------------------------------


def log_predictive_density(log_likelihood: Float[ArrayLike, "chain draw row"]) -> Float[np.ndarray, " row"]:
    r"""Log density of each row under the mixture over draws, :math:`\log \frac1S \sum_s p(y_i \mid \theta_s)`.

    It is computed by logsumexp, so that no row is lost where every density is below the smallest floating-point number.

    :param log_likelihood: (chain, draw, row), as of :meth:`~numpyro_bdl.PosteriorPredictive.log_likelihood`; minus
        infinity is a density of 0.
    :return: (row,), in nats; minus infinity where every draw has a density of 0.
    :raises ValueError: for other shapes, NaN, or plus infinity.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import metrics
        >>> metrics.log_predictive_density([[[-1000.0, -1.0], [-1000.0, -1.0]]]).tolist()
        [-1000.0, -1.0]
    """
    if np.ndim(log_likelihood) != 3:
        raise ValueError(
            f"log_predictive_density: expected log_likelihood (chain, draw, row), got shape {np.shape(log_likelihood)};"
            " sum the log likelihood over the parts of a row."
        )
    values = pooled("log_predictive_density", "log_likelihood", log_likelihood, infinite=True)
    if np.isposinf(values).any():
        raise ValueError("log_predictive_density: a log likelihood is plus infinity; is a scale exactly 0?")
    density = LogMeanExp()
    density.add(values)
    return density.value


def lppd(log_likelihood: Float[ArrayLike, "chain draw row"]) -> float:
    r"""Log pointwise predictive density, :math:`\frac1N \sum_i \log \frac1S \sum_s p(y_i \mid \theta_s)`.

    The negative of it is the negative log likelihood (NLL) of the predictive. Gelman et al. have N times as much, the
    sum over rows. For its standard error over rows, take :func:`log_predictive_density`.

    :param log_likelihood: (chain, draw, row), of held-out rows.
    :return: In nats per row; minus infinity if every draw has a density of 0 at some row.
    :raises ValueError: as of :func:`log_predictive_density`.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import metrics
        >>> density = np.array([[[0.1], [0.3]]])                                    # one chain, two draws, one row
        >>> round(float(np.exp(metrics.lppd(np.log(density)))), 4)
        0.2

    Source: Gelman, Hwang & Vehtari, *Understanding predictive information criteria for Bayesian models*, Statistics and
    Computing 24, 2014, equation (5).
    """
    return float(log_predictive_density(log_likelihood).mean())


def joint_log_predictive_density(log_likelihood: Float[ArrayLike, "chain draw row"]) -> float:
    r"""Log density of all rows together under the mixture of the draws,

    .. math::

        \log \frac{1}{S} \sum_{s=1}^S \prod_i p(y_i \mid \theta_s).

    Unlike the sum of the densities of single rows, it tells whether errors of rows go together.

    :param log_likelihood: (chain, draw, row), as of :meth:`numpyro_bdl.PosteriorPredictive.log_likelihood`.
    :return: Natural logarithm.
    :raises ValueError: for other shapes, NaN and plus infinity.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import metrics
        >>> one_knows = np.log([[[0.9, 0.9], [0.1, 0.1]]])             # the draws agree on both rows, or on neither
        >>> round(float(np.exp(metrics.joint_log_predictive_density(one_knows))), 2)
        0.41
        >>> round(float(np.exp(metrics.log_predictive_density(one_knows).sum())), 2)
        0.25
    """
    draws = pooled("joint_log_predictive_density", "log_likelihood", log_likelihood, infinite=True)
    if np.isposinf(draws).any():
        raise ValueError("joint_log_predictive_density: log_likelihood is plus infinity somewhere; is a scale 0?")
    return float(logsumexp(draws.reshape(len(draws), -1).sum(-1)) - np.log(len(draws)))


# ---- of classes -----------------------------------------------------------------------------------------------------


def mean_probabilities(logits: Float[ArrayLike, "chain draw row class"]) -> Float[np.ndarray, "row class"]:
    r"""Class probabilities of the mixture over draws, :math:`\bar p_c = \frac1S \sum_s \text{softmax}(f_s)_c`.

    :param logits: (chain, draw, row, class), as of :meth:`~numpyro_bdl.PosteriorPredictive.functions`. Log
        probabilities are logits, too. Of the one logit f of a Bernoulli site, ``np.stack([0 * f, f], -1)`` makes two.
    :return: (row, class).
    :raises ValueError: for other shapes, NaN, or infinite numbers other than minus infinity, a probability of 0.
    """
    return blockwise(Classes(), draws_of_logits("mean_probabilities", logits)).mean_probabilities


def probit_probabilities(logits: Float[ArrayLike, "chain draw row class"]) -> Float[np.ndarray, "row class"]:
    r"""Class probabilities by the generalized probit approximation to logits with a normal law,

    .. math::

        \mathrm{softmax}\Bigl(\mu / \sqrt{1 + \tfrac{\pi}{8} \sigma^2}\Bigr),

    from the mean and the variance of each logit over the draws.

    :param logits: (chain, draw, row, class).
    :return: Probabilities (row, class).
    :raises ValueError: for other shapes, NaN and infinite numbers.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import metrics
        >>> logits = np.array([[[[0.0, 4.0]], [[0.0, 0.0]]]])                # one row, two draws that differ
        >>> metrics.probit_probabilities(logits).round(2)
        array([[0.22, 0.78]])

    **References:** Gibbs, *Bayesian Gaussian processes for regression and classification*, 1997.
    """
    draws = numbers("probit_probabilities", "logits", draws_of_logits("probit_probabilities", logits))
    mean, variance = draws.mean(0), draws.var(0)
    return softmax(mean / np.sqrt(1 + np.pi / 8 * variance), -1)


def accuracy(probabilities: Float[ArrayLike, "row class"], labels: Int[ArrayLike, " row"]) -> float:
    """Share of rows whose most probable class is the true one; of several most probable ones the first counts.

    :param probabilities: (row, class).
    :param labels: (row,) integers from 0.
    :raises ValueError: for shapes that don't fit, rows that don't sum to 1, labels outside the classes, or NaN.
    """
    probabilities, labels = classified("accuracy", probabilities, labels)
    return float(np.mean(np.argmax(probabilities, -1) == labels))


def negative_log_likelihood(probabilities: Float[ArrayLike, "row class"], labels: Int[ArrayLike, " row"]) -> float:
    r"""Mean of the negative log probability of the true class, :math:`-\frac1N \sum_i \log \bar p_{i y_i}`, in nats.

    A probability of 0 counts as the smallest normal number, 2e-308, with 708 nats; :func:`lppd`, from log likelihoods,
    has the exact number.

    :param probabilities: (row, class).
    :param labels: (row,) integers from 0.
    :raises ValueError: as of :func:`accuracy`.
    """
    probabilities, labels = classified("negative_log_likelihood", probabilities, labels)
    true = np.take_along_axis(probabilities, labels[:, None], -1)
    return float(-np.mean(np.log(np.maximum(true, np.finfo(np.float64).tiny))))


def brier_score(probabilities: Float[ArrayLike, "row class"], labels: Int[ArrayLike, " row"]) -> float:
    r"""Brier score, :math:`\frac1N \sum_i \sum_c (\bar p_{ic} - 1[y_i = c])^2`, from 0 to 2.

    The sum is over all classes, as in the source; for two classes it is twice the square of one of the errors.

    :param probabilities: (row, class).
    :param labels: (row,) integers from 0.
    :raises ValueError: as of :func:`accuracy`.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import metrics
        >>> metrics.brier_score([[0.5, 0.5], [1.0, 0.0]], [0, 1])
        1.25

    Source: Brier, *Verification of forecasts expressed in terms of probability*, Monthly Weather Review 78, 1950.
    """
    probabilities, labels = classified("brier_score", probabilities, labels)
    return float(np.mean(np.sum((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2, -1)))


def calibration_bins(
    probabilities: Float[ArrayLike, "row class"],
    labels: Int[ArrayLike, " row"],
    bins: int | str = 15,
    *,
    binning: str = "equal_width",
) -> tuple[np.ndarray, ...]:
    """Confidence and accuracy in bins of the confidence (the largest probability).

    :param probabilities: (row, class).
    :param labels: (row,) integers from 0.
    :param bins: Number of bins. ``"sweep"`` takes the largest number, up to 1000 and to that of the rows, up to which
        the accuracy rises from bin to bin; the length of what is returned tells it.
    :param binning: ``"equal_width"``, bins of [0, 1]; or ``"equal_mass"``, as many rows in each, give or take one. Rows
        of the same confidence then have their mean accuracy each, so that their order doesn't count.
    :return: Mean confidence, accuracy and share of the rows, each (bin,); NaN in an empty bin, share 0.
    :raises ValueError: as of :func:`accuracy`, and for bins and binnings that there are not.

    Source: Roelofs et al., *Mitigating bias in calibration error estimation*, AISTATS 2022, for the sweep.
    """
    check_choice("calibration_bins", "binning", binning, BINNINGS)
    probabilities, labels = classified("calibration_bins", probabilities, labels)
    confidence = np.max(probabilities, -1)
    order = np.argsort(confidence, kind="stable")
    correct = (np.argmax(probabilities, -1) == labels)[order].astype(np.float64)
    confidence = confidence[order]
    if binning == "equal_mass":
        _, tied, count = np.unique(confidence, return_inverse=True, return_counts=True)
        correct = (np.bincount(tied, correct) / count)[tied]
    if bins != "sweep":
        check_integer("calibration_bins", "bins", bins)
        return _binned(confidence, correct, int(bins), binning)
    found = _binned(confidence, correct, 1, binning)
    for count in range(2, min(len(confidence), _MOST_BINS) + 1):
        finer = _binned(confidence, correct, count, binning)
        if (np.diff(finer[1][finer[2] > 0]) < -1e-12).any():
            break
        found = finer
    return found


def expected_calibration_error(
    probabilities: Float[ArrayLike, "row class"],
    labels: Int[ArrayLike, " row"],
    bins: int | str = 15,
    *,
    binning: str = "equal_width",
) -> float:
    r"""Expected calibration error, :math:`\sum_b s_b |\text{accuracy}_b - \text{confidence}_b|`.

    State the bins beside the number. With few rows it is biased upwards, by :math:`O(\sqrt{\text{bins} / N})` for
    calibrated predictions, so that only numbers of as many rows and the same bins can be compared. The usual choice
    is 15 bins of equal width, most of which are nearly empty if the network is sure of itself; ``"equal_mass"`` has
    bins that adapt to the confidences, and ``bins="sweep"`` a number of them that adapts to the data.

    :param probabilities: (row, class).
    :param labels: (row,) integers from 0.
    :param bins: Number of bins, or ``"sweep"``, as of :func:`calibration_bins`.
    :param binning: ``"equal_width"`` or ``"equal_mass"``.
    :raises ValueError: as of :func:`calibration_bins`.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import metrics
        >>> probabilities, labels = [[0.75, 0.25], [0.75, 0.25]], [0, 1]
        >>> metrics.expected_calibration_error(probabilities, labels)
        0.25
        >>> metrics.expected_calibration_error(probabilities, labels, bins=2, binning="equal_mass")
        0.25

    Source: Guo et al., *On calibration of modern neural networks*, ICML 2017, equation (3); Nixon et al., *Measuring
    calibration in deep learning*, CVPR workshops 2019, for bins of equal mass.
    """
    confidence, accurate, share = calibration_bins(probabilities, labels, bins, binning=binning)
    return float(np.nansum(share * np.abs(accurate - confidence)))


def _binned(confidence: np.ndarray, correct: np.ndarray, bins: int, binning: str) -> tuple[np.ndarray, ...]:
    """Mean confidence, accuracy and share by bin, of rows in the order of their confidence."""
    if binning == "equal_mass":
        which = np.arange(len(confidence)) * bins // len(confidence)
    else:
        which = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, values, bins) / count for values in (confidence, correct)]
    return *means, count / len(confidence)


# ---- two for the same rows ------------------------------------------------------------------------------------------


def agreement(probabilities: Float[ArrayLike, "row class"], reference: Float[ArrayLike, "row class"]) -> float:
    """Share of rows on which two predictives have the same most probable class.

    :param probabilities: (row, class).
    :param reference: (row, class), as of a long run of NUTS.
    :raises ValueError: for different shapes, rows that don't sum to 1, or NaN.

    Source: Izmailov et al., *What are Bayesian neural network posteriors really like?*, ICML 2021.
    """
    probabilities, reference = _two("agreement", probabilities, reference)
    return float(np.mean(np.argmax(probabilities, -1) == np.argmax(reference, -1)))


def total_variation(probabilities: Float[ArrayLike, "row class"], reference: Float[ArrayLike, "row class"]) -> float:
    r"""Mean total variation of two predictives, :math:`\frac1N \sum_i \frac12 \sum_c |p_{ic} - q_{ic}|`.

    :param probabilities: (row, class).
    :param reference: (row, class), as of a long run of NUTS.
    :raises ValueError: as of :func:`agreement`.

    Source: as of :func:`agreement`.
    """
    probabilities, reference = _two("total_variation", probabilities, reference)
    return float(np.mean(np.sum(np.abs(probabilities - reference), -1)) / 2)


def wasserstein_distance(
    draws: Float[ArrayLike, "chain draw row ..."], reference: Float[ArrayLike, "chain2 draw2 row ..."]
) -> float:
    r"""Mean 1-Wasserstein distance of two predictives, :math:`\frac1N \sum_i \int |F_i(z) - G_i(z)| \, dz`.

    F and G are the distribution functions of the draws of a row, as of :func:`scipy.stats.wasserstein_distance`: each
    row and output is compared alone. Draws from one law are at a distance of order :math:`S^{-1/2}`.

    :param draws: (chain, draw, row, ...), of functions or of new data.
    :param reference: The same, of any numbers of chains and draws.
    :return: In the unit of the draws.
    :raises ValueError: for shapes that don't fit, NaN, or infinite numbers.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import metrics
        >>> draws = np.random.default_rng(0).normal(size=(2, 50, 3))
        >>> round(metrics.wasserstein_distance(draws, draws + 0.5), 6)
        0.5
    """
    first, second = (
        pooled("wasserstein_distance", "draws", draws),
        pooled("wasserstein_distance", "reference", reference),
    )
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"wasserstein_distance: the draws are of {first.shape[1:]}, the reference is of {second.shape[1:]} without"
            " chain and draw; they must be of the same rows."
        )
    pairs = zip(first.reshape(len(first), -1).T, second.reshape(len(second), -1).T, strict=True)
    return float(np.mean([stats.wasserstein_distance(a, b) for a, b in pairs]))


def _two(owner: str, probabilities: ArrayLike, reference: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first = class_probabilities(owner, "probabilities", probabilities)
    second = class_probabilities(owner, "reference", reference)
    same_shape(owner, probabilities=first, reference=second)
    return first, second
