# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Numbers by which predictions are judged."""

import numpy as np


def mean_probabilities(logits: np.ndarray) -> np.ndarray:
    """Class probabilities of the mixture over draws.

    :param logits: (chain, draw, row, class), as of :meth:`~numpyro_bdl.PosteriorPredictive.functions`.
    :return: (row, class).
    """
    logits = np.asarray(logits, np.float64)
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    return (probabilities / probabilities.sum(-1, keepdims=True)).mean((0, 1))


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose most probable class is the true one.

    :param probabilities: (row, class).
    :param labels: (row,) integers.
    """
    probabilities, labels = _check(probabilities, labels)
    return float(np.mean(np.argmax(probabilities, -1) == labels))


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the negative log probability of the true class, in nats.

    :param probabilities: (row, class).
    :param labels: (row,) integers.
    """
    probabilities, labels = _check(probabilities, labels)
    true = np.take_along_axis(probabilities, labels[:, None], -1)
    return float(-np.mean(np.log(np.maximum(true, np.finfo(np.float64).tiny))))


def calibration_bins(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> tuple[np.ndarray, ...]:
    """Confidence and accuracy in bins of equal width of the confidence (the largest probability).

    :param probabilities: (row, class).
    :param labels: (row,) integers.
    :param bins: Number of bins of [0, 1].
    :return: Mean confidence, accuracy and share of the rows, each (bin,); NaN in an empty bin, share 0.
    """
    probabilities, labels = _check(probabilities, labels)
    confidence = np.max(probabilities, -1)
    correct = np.argmax(probabilities, -1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(which, confidence, bins) / count
        mean_accuracy = np.bincount(which, correct, bins) / count
    return mean_confidence, mean_accuracy, count / len(confidence)


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    r"""Expected calibration error, :math:`\sum_b s_b |\text{accuracy}_b - \text{confidence}_b|`, in equal-width bins.

    :param probabilities: (row, class).
    :param labels: (row,) integers.
    :param bins: Number of bins of [0, 1].

    **References:** Guo et al., *On calibration of modern neural networks*, ICML 2017, equation (3).
    """
    confidence, accurate, share = calibration_bins(probabilities, labels, bins)
    return float(np.nansum(share * np.abs(accurate - confidence)))


def predictive_entropy(probabilities: np.ndarray) -> np.ndarray:
    r"""Entropy of the predictive, :math:`-\sum_c \bar p_c \log \bar p_c`, in nats.

    :param probabilities: (row, class), of the mixture over draws.
    :return: (row,).
    """
    p = np.asarray(probabilities, np.float64)
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)


def agreement(probabilities: np.ndarray, reference: np.ndarray) -> float:
    """Share of rows on which two predictives have the same most probable class.

    :param probabilities: (row, class).
    :param reference: (row, class).
    """
    return float(np.mean(np.argmax(probabilities, -1) == np.argmax(reference, -1)))


def total_variation(probabilities: np.ndarray, reference: np.ndarray) -> float:
    r"""Mean total variation of two predictives, :math:`\frac12 \sum_c |p_c - q_c|`.

    :param probabilities: (row, class).
    :param reference: (row, class).
    """
    return float(np.mean(np.sum(np.abs(np.asarray(probabilities) - reference), -1)) / 2)


def _check(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            f"Expected probabilities (row, class) and labels (row,), got shapes {probabilities.shape} and"
            f" {labels.shape}; mean_probabilities averages draws."
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("A probability is not a finite number; is there a chain of NaN among the draws?")
    return probabilities, labels
