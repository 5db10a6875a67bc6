# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""How well a score tells rows apart: in from out of distribution, right from wrong predictions, small from large loss.

A row is flagged if its score, the larger the more suspicious, is at least a threshold. **Positive** are the rows that
are to be found: those out of distribution, those classified wrongly. Papers differ here. AUROC is the same either way;
AUPR and FPR95 are not: for those with the other rows as positive, hand in ``-scores`` and ``~positive``.

Any score will do: an entropy or mutual information of :mod:`numpyro_bdl.uncertainty`, or one less the confidence.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int
from scipy.stats import rankdata

from numpyro_bdl._predictions import classified, numbers


class Detection(NamedTuple):
    """How well a score finds the positive rows."""

    auroc: float
    """as of :func:`auroc`; 0.5 by chance"""
    aupr: float
    """as of :func:`aupr`; the share by chance"""
    fpr95: float
    """as of :func:`fpr95`; about 0.95 by chance"""
    share: float
    """share of positive rows"""


class RiskCoverage(NamedTuple):
    """What is risked on the rows that are kept."""

    coverage: Float[np.ndarray, " row"]
    """share of rows kept, 1/n to 1"""
    risk: Float[np.ndarray, " row"]
    """mean loss of these rows"""
    area: float
    """mean of the risk over the coverages (AURC), less is better"""


def auroc(scores: Float[ArrayLike, " row"], positive: Bool[ArrayLike, " row"]) -> float:
    r"""Area under the receiver operating characteristic,

    .. math::

        P(s_+ > s_-) + \tfrac12 P(s_+ = s_-)

    for a positive and a negative row drawn at random.

    :param scores: (row,); infinite ones are the largest and the smallest.
    :param positive: (row,), the rows to be found.
    :return: 1 for a score that separates the rows, 0.5 for chance; NaN if no row or every row is positive.
    :raises ValueError: for shapes that don't fit, scores that are NaN, or other than booleans.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import detection
        >>> detection.auroc([0.1, 0.4, 0.4, 0.8], [False, False, True, True])
        0.875
    """
    scores, positive = _check("auroc", scores, positive)
    found, rest = int(positive.sum()), int((~positive).sum())
    if not found or not rest:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - found * (found + 1) / 2) / (found * rest))


def aupr(scores: Float[ArrayLike, " row"], positive: Bool[ArrayLike, " row"]) -> float:
    r"""Area under the precision-recall curve, as the average precision :math:`\sum_k (R_k - R_{k-1}) P_k`.

    :math:`P_k` and :math:`R_k` are precision and recall at the k-th largest of the different scores, without
    interpolation. By chance it is the share of positive rows, which has to be stated beside it.

    :param scores: (row,); infinite ones are the largest and the smallest.
    :param positive: (row,), the rows to be found.
    :return: 1 for a score that separates the rows; NaN if no row is positive.
    :raises ValueError: as of :func:`auroc`.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import detection
        >>> round(detection.aupr([0.1, 0.4, 0.6, 0.8], [False, True, False, True]), 4)
        0.8333
    """
    true, flagged, found = _flagged(*_check("aupr", scores, positive))
    if not found:
        return float("nan")
    return float(np.sum(np.diff(true, prepend=0) / found * true / flagged))


def fpr95(scores: Float[ArrayLike, " row"], positive: Bool[ArrayLike, " row"]) -> float:
    r"""False positive rate at a true positive rate of 95 %.

    The share of negative rows that are flagged at the largest threshold at which at least 95 % of the positive rows
    are; less is better. Thresholds are the scores themselves, without interpolation.

    :param scores: (row,); infinite ones are the largest and the smallest.
    :param positive: (row,), the rows to be found.
    :return: The share; NaN if no row or every row is positive.
    :raises ValueError: as of :func:`auroc`.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import detection
        >>> detection.fpr95([0.1, 0.4, 0.6, 0.8], [False, True, False, True])
        0.5
    """
    scores, positive = _check("fpr95", scores, positive)
    true, flagged, found = _flagged(scores, positive)
    if not found or found == len(scores):
        return float("nan")
    first = np.argmax(true / found >= 0.95)
    return float((flagged[first] - true[first]) / (len(scores) - found))


def out_of_distribution(inside: Float[ArrayLike, " row"], outside: Float[ArrayLike, " row2"]) -> Detection:
    """How well a score finds the rows out of distribution, which are the positive ones.

    :param inside: Scores of rows in distribution, larger where less certain, such as their predictive entropies.
    :param outside: Scores of rows out of distribution.
    :return: AUROC, AUPR, FPR95, and the share of rows out of distribution.
    :raises ValueError: for other shapes, no rows on a side, or scores that are NaN.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import detection
        >>> detection.out_of_distribution(inside=[0.1, 0.2, 0.3], outside=[0.9])
        Detection(auroc=1.0, aupr=1.0, fpr95=0.0, share=0.25)
    """
    owner = "out_of_distribution"
    sides = [_scores(owner, name, value) for name, value in (("inside", inside), ("outside", outside))]
    return _detection(np.concatenate(sides), np.repeat([False, True], [len(side) for side in sides]))


def misclassification(
    probabilities: Float[ArrayLike, "row class"],
    labels: Int[ArrayLike, " row"],
    scores: Float[ArrayLike, " row"] | None = None,
) -> Detection:
    """How well a score finds the rows that are classified wrongly, which are the positive ones.

    :param probabilities: (row, class), of the mixture over draws.
    :param labels: (row,) integers from 0.
    :param scores: (row,), larger where less certain; None for one less the confidence (the largest probability).
    :return: AUROC, AUPR, FPR95, and the share of wrong rows; NaN where no row or every row is wrong.
    :raises ValueError: for shapes that don't fit, rows that don't sum to 1, labels outside the classes, or NaN.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import detection
        >>> detection.misclassification([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [0, 1, 1]).auroc
        1.0

    Source: Hendrycks & Gimpel, *A baseline for detecting misclassified and out-of-distribution examples in neural
    networks*, ICLR 2017.
    """
    probabilities, labels = classified("misclassification", probabilities, labels)
    wrong = np.argmax(probabilities, -1) != labels
    if scores is None:
        scores = -np.max(probabilities, -1)
    return _detection(*_check("misclassification", scores, wrong))


def risk_coverage(losses: Float[ArrayLike, " row"], scores: Float[ArrayLike, " row"]) -> RiskCoverage:
    r"""Risk of selective prediction: the mean loss of the k rows with the lowest scores, for each k,

    .. math::

        R_k = \frac1k \sum_{i \le k} \ell_{(i)}, \qquad s_{(1)} \le s_{(2)} \le \dots, \qquad
        \text{AURC} = \frac1n \sum_{k=1}^n R_k.

    Rows with the same score are kept in random order: the risk is the mean over all of these. With a score that says
    nothing the risk is the mean loss at every coverage. With the losses themselves as scores it is as low as it can be.

    :param losses: (row,): 1 where the prediction is wrong and else 0, a squared error, or a negative log likelihood.
    :param scores: (row,), larger where less certain: one less the confidence, an entropy, or the standard deviation of
        the predictive; infinite ones are the largest and the smallest.
    :return: Coverage, risk, and the area under the curve.
    :raises ValueError: for shapes that don't fit, losses that are not finite, or scores that are NaN.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import detection
        >>> curve = detection.risk_coverage(losses=[0, 1, 0, 1], scores=[0.1, 0.2, 0.2, 0.4])
        >>> curve.risk.round(3).tolist(), round(curve.area, 3)
        ([0.0, 0.25, 0.333, 0.5], 0.271)

    Source: Geifman, Uziel and El-Yaniv, *Bias-reduced uncertainty estimation for deep neural classifiers*, ICLR 2019.
    """
    scores, losses = _scores("risk_coverage", "scores", scores), numbers("risk_coverage", "losses", losses)
    if losses.shape != scores.shape:
        raise ValueError(
            f"risk_coverage: expected one entry for each row, got losses {losses.shape} and scores {scores.shape}."
        )
    _, tied, rows = np.unique(scores, return_inverse=True, return_counts=True)
    expected = (np.bincount(tied, losses) / rows)[np.sort(tied)]  # of each row in its turn
    kept = np.arange(1, len(losses) + 1)
    risk = np.cumsum(expected) / kept
    return RiskCoverage(kept / len(losses), risk, float(risk.mean()))


def _detection(scores: np.ndarray, positive: np.ndarray) -> Detection:
    numbers = (metric(scores, positive) for metric in (auroc, aupr, fpr95))
    return Detection(*numbers, float(positive.mean()))


def _flagged(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """True and all flagged rows at each threshold, from the largest score to the smallest, and the positive rows."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(scores[order][1:] != scores[order][:-1]), len(scores) - 1)  # of equal scores
    true = np.cumsum(positive[order])
    return true[last], last + 1, int(true[-1])


def _scores(owner: str, name: str, value: ArrayLike) -> np.ndarray:
    if np.ndim(value) != 1:
        raise ValueError(f"{owner}: expected {name} (row,), got shape {np.shape(value)}; np.ravel makes one axis.")
    return numbers(owner, name, value, infinite=True)


def _check(owner: str, scores: ArrayLike, positive: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, positive = _scores(owner, "scores", scores), np.asarray(positive)
    if positive.shape != scores.shape:
        raise ValueError(
            f"{owner}: expected one entry for each row, got scores {scores.shape} and"
            f" {'labels' if owner == 'misclassification' else 'positive'} {positive.shape}."
        )
    if positive.dtype != bool and not (positive.dtype.kind in "iu" and np.isin(positive, (0, 1)).all()):
        raise ValueError(
            f"{owner}: positive must be booleans, or 0 and 1, got dtype {positive.dtype}; write the condition that"
            " makes a row positive, as in labels == 8."
        )
    return scores, positive.astype(bool)
