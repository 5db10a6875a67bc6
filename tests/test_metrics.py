# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import jax
import numpy as np
import pytest
from scipy import special, stats
from sklearn import metrics as sklearn_metrics

from numpyro_bdl import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 5, 40, 4)) * 3
PROBABILITIES = special.softmax(LOGITS, -1).mean((0, 1))
LABELS = RNG.integers(0, 4, 40)
OTHER = special.softmax(RNG.normal(size=(40, 4)), -1)

# two rows in [0.5, 0.6), one right; two in [0.9, 1), both right; one of confidence 1, wrong
BY_HAND = np.array([[0.55, 0.45], [0.41, 0.59], [0.93, 0.07], [0.03, 0.97], [1.0, 0.0]])
BY_HAND_LABELS = np.array([0, 0, 0, 1, 1])


def test_mean_probabilities_are_those_of_the_mixture():
    np.testing.assert_allclose(metrics.mean_probabilities(LOGITS), PROBABILITIES, rtol=1e-12)
    # not the softmax of the mean logits
    assert np.abs(special.softmax(LOGITS.mean((0, 1)), -1) - PROBABILITIES).max() > 0.1


def test_mean_probabilities_do_not_overflow_and_take_single_precision():
    logits = np.array([1e4, 0, -1e4], np.float32).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(metrics.mean_probabilities(logits), [[1, 0, 0]])
    assert metrics.mean_probabilities(LOGITS.astype(np.float32)).dtype == np.float64


def test_accuracy_is_that_of_scikit_learn():
    expected = sklearn_metrics.accuracy_score(LABELS, PROBABILITIES.argmax(-1))
    assert metrics.accuracy(PROBABILITIES, LABELS) == pytest.approx(expected)


def test_negative_log_likelihood_is_that_of_scikit_learn():
    expected = sklearn_metrics.log_loss(LABELS, PROBABILITIES, labels=range(4))
    assert metrics.negative_log_likelihood(PROBABILITIES, LABELS) == pytest.approx(expected)


def test_negative_log_likelihood_of_an_impossible_label_is_finite_and_large():
    value = metrics.negative_log_likelihood(np.array([[1.0, 0.0]]), np.array([1]))
    assert 700 < value < np.inf


def test_predictive_entropy_is_that_of_scipy():
    np.testing.assert_allclose(metrics.predictive_entropy(PROBABILITIES), stats.entropy(PROBABILITIES, axis=-1))


def test_entropy_of_a_certain_prediction_is_zero_and_of_an_even_one_largest():
    entropy = metrics.predictive_entropy(np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))
    np.testing.assert_allclose(entropy, [0, np.log(3)])


def test_calibration_bins_by_hand():
    confidence, accuracy, share = metrics.calibration_bins(BY_HAND, BY_HAND_LABELS, bins=10)
    filled = [5, 9]
    np.testing.assert_allclose(confidence[filled], [0.57, (0.93 + 0.97 + 1.0) / 3])
    np.testing.assert_allclose(accuracy[filled], [1 / 2, 2 / 3])
    np.testing.assert_allclose(share[filled], [0.4, 0.6])
    empty = np.setdiff1d(np.arange(10), filled)
    np.testing.assert_array_equal(share[empty], 0)
    assert np.isnan(confidence[empty]).all()
    assert np.isnan(accuracy[empty]).all()


def test_expected_calibration_error_by_hand():
    expected = 0.4 * abs(1 / 2 - 0.57) + 0.6 * abs(2 / 3 - 2.9 / 3)
    assert metrics.expected_calibration_error(BY_HAND, BY_HAND_LABELS, bins=10) == pytest.approx(expected)


def test_expected_calibration_error_of_one_bin_is_accuracy_less_confidence():
    expected = abs(metrics.accuracy(PROBABILITIES, LABELS) - PROBABILITIES.max(-1).mean())
    assert metrics.expected_calibration_error(PROBABILITIES, LABELS, bins=1) == pytest.approx(expected)


def test_confidence_of_exactly_one_falls_into_the_last_bin():
    certain = np.eye(3)
    share = metrics.calibration_bins(certain, np.arange(3), bins=7)[2]
    np.testing.assert_array_equal(share, [0, 0, 0, 0, 0, 0, 1])
    assert metrics.expected_calibration_error(certain, np.arange(3)) == 0
    assert metrics.expected_calibration_error(certain, (np.arange(3) + 1) % 3) == 1


def test_calibrated_predictions_have_a_small_error():
    rows, bins = 200_000, 10
    rng = np.random.default_rng(1)
    p = rng.uniform(0.5, 1, rows)
    labels = rng.uniform(size=rows) > p
    error = metrics.expected_calibration_error(np.stack([p, 1 - p], -1), labels.astype(int), bins)
    confidence, _, share = metrics.calibration_bins(np.stack([p, 1 - p], -1), labels.astype(int), bins)
    c, s = confidence[share > 0], share[share > 0]
    # each bin adds share * |Gaussian|; within a bin the confidences vary, which lowers the variance of their labels
    sd = np.sqrt(s * (c * (1 - c)) / rows)
    assert error < np.sum(sd * np.sqrt(2 / np.pi)) + 4 * np.sqrt(np.sum(sd**2) * (1 - 2 / np.pi))


def test_agreement_counts_equal_classes():
    assert metrics.agreement(PROBABILITIES, PROBABILITIES) == 1
    expected = np.mean(PROBABILITIES.argmax(-1) == OTHER.argmax(-1))
    assert metrics.agreement(PROBABILITIES, OTHER) == metrics.agreement(OTHER, PROBABILITIES) == expected
    assert metrics.agreement(np.array([[0.6, 0.4]]), np.array([[0.4, 0.6]])) == 0


def test_total_variation_is_half_the_absolute_difference():
    assert metrics.total_variation(PROBABILITIES, PROBABILITIES) == 0
    assert metrics.total_variation(np.array([[0.6, 0.4], [1.0, 0.0]]), np.array([[0.5, 0.5], [0.0, 1.0]])) == (
        pytest.approx((0.1 + 1) / 2)
    )
    # the largest difference of the probability of any event
    differences = PROBABILITIES - OTHER
    expected = np.maximum(differences, 0).sum(-1).mean()
    assert metrics.total_variation(PROBABILITIES, OTHER) == pytest.approx(expected)
    assert metrics.total_variation(OTHER, PROBABILITIES) == pytest.approx(expected)


@pytest.mark.parametrize(
    "metric",
    [metrics.accuracy, metrics.negative_log_likelihood, metrics.expected_calibration_error],
)
def test_metrics_take_jax_arrays_and_return_numbers(metric):
    value = metric(jax.numpy.asarray(PROBABILITIES), jax.numpy.asarray(LABELS))
    assert isinstance(value, float)
    assert value == pytest.approx(metric(PROBABILITIES, LABELS), rel=1e-5)
