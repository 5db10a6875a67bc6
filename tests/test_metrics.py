# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Each metric against scikit-learn, SciPy, an integral, a sum over all pairs, or by hand."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, special, stats
from sklearn import metrics as sklearn_metrics

from numpyro_bdl import detection, metrics, uncertainty

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 5, 40, 4)) * 3
PROBABILITIES = special.softmax(LOGITS, -1).mean((0, 1))
LABELS = RNG.integers(0, 4, 40)
OTHER = special.softmax(RNG.normal(size=(40, 4)), -1)
DRAWS = RNG.normal(size=(2, 7, 12)) * np.linspace(0.1, 3, 12)
Y = RNG.normal(size=12)

few = settings(max_examples=50, deadline=None)
# with ties, and probabilities of exactly 0 and 1
coarse = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
finite = st.floats(-1e3, 1e3, width=32) | st.sampled_from([0.0, 1.0, -1.0])


@st.composite
def classified(draw):
    """Probabilities and labels, of one row or one class too."""
    rows, classes = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    weights = draw(arrays(float, (rows, classes), elements=coarse))
    weights[weights.sum(-1) == 0, 0] = 1
    labels = draw(arrays(int, rows, elements=st.integers(0, classes - 1)))
    return weights / weights.sum(-1, keepdims=True), labels


@st.composite
def scored(draw):
    """Scores with ties, and which rows are positive: both kinds occur."""
    rows = draw(st.integers(2, 30))
    positive = draw(arrays(bool, rows))
    positive[:2] = True, False
    return draw(arrays(float, rows, elements=coarse | finite)), positive


@st.composite
def observed(draw, least=1):
    """Draws (chain, draw, row) and y (row,)."""
    chains, size, rows = draw(st.integers(1, 2)), draw(st.integers(least, 5)), draw(st.integers(1, 3))
    return draw(arrays(float, (chains, size, rows), elements=finite)), draw(arrays(float, rows, elements=finite))


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
    np.testing.assert_allclose(uncertainty.predictive_entropy(PROBABILITIES), stats.entropy(PROBABILITIES, axis=-1))


def test_entropy_of_a_certain_prediction_is_zero_and_of_an_even_one_largest():
    entropy = uncertainty.predictive_entropy(np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))
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


# ---- of any kind and of classes -------------------------------------------------------------------------------------


def test_lppd_is_the_log_of_the_mean_density():
    density = RNG.uniform(0.1, 2, (3, 5, 8))
    expected = np.log(density.mean((0, 1)))
    np.testing.assert_allclose(metrics.log_predictive_density(np.log(density)), expected)
    assert metrics.lppd(np.log(density)) == pytest.approx(expected.mean())


def test_lppd_keeps_rows_whose_density_underflows_and_takes_densities_of_zero():
    values = np.full((1, 2, 3), -1.0)
    values[:, :, 1] -= 1e5
    values[0, 0, 2] = -np.inf
    np.testing.assert_allclose(metrics.log_predictive_density(values), [-1, -1 - 1e5, -1 - np.log(2)])
    values[0, 1, 2] = -np.inf
    assert metrics.lppd(values) == -np.inf


def test_lppd_of_one_draw_is_the_mean_log_likelihood():
    assert metrics.lppd([[[-1.0, -3.0]]]) == pytest.approx(-2)


@few
@given(arrays(np.float64, (2, 3, 4, 3), elements=finite))
def test_negative_log_likelihood_is_less_lppd(logits):
    logits, labels = logits / 10, np.array([0, 1, 2, 0])
    true = np.take_along_axis(special.log_softmax(logits, -1), labels[None, None, :, None], -1)[..., 0]
    value = metrics.negative_log_likelihood(metrics.mean_probabilities(logits), labels)
    assert value == pytest.approx(-metrics.lppd(true), rel=1e-9, abs=1e-9)


def test_mean_probabilities_take_log_probabilities_of_zero():
    logits = np.array([0, -np.inf, -np.inf], np.float32).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(metrics.mean_probabilities(logits), [[1, 0, 0]])
    assert uncertainty.expected_entropy(logits) == 0


@few
@given(classified())
def test_scores_of_classes_are_those_of_scikit_learn(case):
    probabilities, labels = case
    assert metrics.accuracy(*case) == pytest.approx(sklearn_metrics.accuracy_score(labels, probabilities.argmax(-1)))
    one_hot = labels[:, None] == np.arange(probabilities.shape[1])
    by_class = [
        sklearn_metrics.mean_squared_error(truth, p) for truth, p in zip(one_hot.T, probabilities.T, strict=True)
    ]
    assert metrics.brier_score(*case) == pytest.approx(sum(by_class))
    assert 0 <= metrics.brier_score(*case) <= 2
    if probabilities.shape[1] == 2:
        of_one = sklearn_metrics.brier_score_loss(labels, probabilities[:, 1], pos_label=1)
        assert metrics.brier_score(*case) == pytest.approx(2 * of_one)
    np.testing.assert_allclose(
        uncertainty.predictive_entropy(probabilities), stats.entropy(probabilities, axis=-1), atol=1e-12
    )


# ---- calibration ----------------------------------------------------------------------------------------------------


def calibration_error_by_loop(probabilities, labels, bins, binning):
    """Sum over bins one by one; without ties."""
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels
    if binning == "equal_mass":
        order = np.argsort(confidence)
        position = np.empty(len(order), int)
        position[order] = np.arange(len(order))
        which = np.floor(position / len(order) * bins)
    else:
        which = np.minimum(np.floor(confidence * bins), bins - 1)
    total = 0
    for b in range(bins):
        rows = which == b
        if rows.any():
            total += rows.mean() * abs(correct[rows].mean() - confidence[rows].mean())
    return total


@pytest.mark.parametrize("binning", metrics.BINNINGS)
@pytest.mark.parametrize("bins", [1, 3, 8, 40, 64])
def test_expected_calibration_error_is_that_of_a_loop(bins, binning):
    expected = calibration_error_by_loop(PROBABILITIES, LABELS, bins, binning)
    value = metrics.expected_calibration_error(PROBABILITIES, LABELS, bins, binning=binning)
    assert value == pytest.approx(expected)


def test_bins_of_equal_mass_hold_as_many_rows():
    share = metrics.calibration_bins(PROBABILITIES, LABELS, 7, binning="equal_mass")[2]
    assert set((share * 40).round().astype(int)) == {5, 6}
    share = metrics.calibration_bins(PROBABILITIES[:3], LABELS[:3], 5, binning="equal_mass")[2]
    assert sorted(share) == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])


@few
@given(classified(), st.integers(1, 20) | st.just("sweep"), st.sampled_from(metrics.BINNINGS), st.randoms())
def test_calibration_error_does_not_depend_on_the_order_of_the_rows(case, bins, binning, random):
    probabilities, labels = case
    order = random.sample(range(len(labels)), len(labels))
    value = metrics.expected_calibration_error(probabilities, labels, bins, binning=binning)
    again = metrics.expected_calibration_error(probabilities[order], labels[order], bins, binning=binning)
    assert value == pytest.approx(again, abs=1e-12)
    assert 0 <= value <= 1 + 1e-12
    # merging bins cannot raise the error
    single = metrics.expected_calibration_error(probabilities, labels, 1, binning=binning)
    assert value >= single - 1e-12


@pytest.mark.parametrize("binning", metrics.BINNINGS)
def test_calibration_error_of_one_confidence_is_exact(binning):
    probabilities, labels = np.full((10, 2), [0.8, 0.2]), np.repeat([0, 1], [7, 3])
    for bins in (1, 4, 15, "sweep"):
        assert metrics.expected_calibration_error(probabilities, labels, bins, binning=binning) == pytest.approx(0.1)


def test_the_sweep_stops_where_accuracy_falls():
    # by confidence: wrong, wrong, right, right, wrong, right; 2 bins 1/3, 2/3; 3 bins 0, 1, 1/2
    confidence = np.array([0.55, 0.6, 0.65, 0.7, 0.75, 0.8])
    labels = np.array([1, 1, 0, 0, 1, 0])
    probabilities = np.stack([confidence, 1 - confidence], -1)
    found = metrics.calibration_bins(probabilities, labels, "sweep", binning="equal_mass")
    np.testing.assert_allclose(found[1], [1 / 3, 2 / 3])
    # never falls: as many bins as rows
    assert len(metrics.calibration_bins(probabilities, np.zeros(6, int), "sweep", binning="equal_mass")[0]) == 6
    assert len(metrics.calibration_bins(probabilities[:1], labels[:1], "sweep")[0]) == 1


# ---- of numbers -----------------------------------------------------------------------------------------------------


@few
@given(observed())
def test_scores_of_draws_are_those_of_scikit_learn_and_of_all_pairs(case):
    draws, y = case
    mean = draws.mean((0, 1))
    assert metrics.rmse(mean, y) == pytest.approx(sklearn_metrics.root_mean_squared_error(y, mean))
    x = draws.reshape(-1, len(y))
    apart = np.abs(x[:, None] - x)
    expected = np.abs(x - y).mean() - apart.mean() / 2
    assert metrics.crps(draws, y) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert metrics.crps(draws, y) >= -1e-9
    if len(x) > 1:
        expected = np.abs(x - y).mean() - apart.sum((0, 1)).mean() / (2 * len(x) * (len(x) - 1))
        assert metrics.crps(draws, y, fair=True) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    # a Gaussian of scale 0 is a draw
    assert metrics.crps_gaussian_mixture(draws, 0, y) == pytest.approx(expected_crps(x, y), rel=1e-9, abs=1e-9)


def expected_crps(x, y):
    """The energy distance of SciPy between the draws and the observation: its square is twice the score."""
    return np.mean([stats.energy_distance(x[:, i], y[i : i + 1]) ** 2 / 2 for i in range(len(y))])


def test_crps_of_one_draw_is_the_absolute_error():
    assert metrics.crps(DRAWS[:1, :1], Y) == pytest.approx(sklearn_metrics.mean_absolute_error(Y, DRAWS[0, 0]))


def test_crps_of_a_gaussian_mixture_is_the_integral():
    mean, scale = RNG.normal(size=(2, 3, 2)), RNG.uniform(0.3, 2, (2, 3))
    y = np.array([-0.7, 1.9])

    def squared(z, row):
        return (stats.norm.cdf(z, mean[..., row], scale).mean() - (z >= y[row])) ** 2

    expected = [integrate.quad(squared, -15, 15, (row,), points=[y[row]], epsabs=1e-9)[0] for row in range(2)]
    assert metrics.crps_gaussian_mixture(mean, scale[..., None], y) == pytest.approx(np.mean(expected), abs=1e-7)


def test_crps_of_one_gaussian_has_the_known_form():
    z = (Y - 0.3) / 1.7
    expected = 1.7 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    mean = np.full((1, 1, 12), 0.3)
    assert metrics.crps_gaussian_mixture(mean, 1.7, Y) == pytest.approx(expected.mean())
    # twice the same draw is the same mixture; the scores of tiny and huge scales are finite
    assert metrics.crps_gaussian_mixture(np.repeat(mean, 2, 1), 1.7, Y) == pytest.approx(expected.mean())
    for scale in (1e-300, 1e100):
        assert np.isfinite(metrics.crps_gaussian_mixture(mean, scale, Y))


def test_fair_crps_of_draws_goes_to_the_closed_form():
    rng, rows, size = np.random.default_rng(2), 2000, 5
    mean = np.full((1, 1, rows), 0.5)
    y = rng.normal(size=rows)
    draws = rng.normal(0.5, 1.3, (1, size, rows))
    fair = np.array([metrics.crps(draws[..., i : i + 1], y[i : i + 1], fair=True) for i in range(rows)])
    exact = np.array([metrics.crps_gaussian_mixture(mean[..., :1], 1.3, y[i : i + 1]) for i in range(rows)])
    assert abs((fair - exact).mean()) < 4 * (fair - exact).std() / np.sqrt(rows)
    biased = metrics.crps(draws, y)
    # the bias is half the mean distance of two draws, divided by their number
    assert abs(biased - exact.mean() - 1.3 / np.sqrt(np.pi) / size) < 4 * (fair - exact).std() / np.sqrt(rows)


@few
@given(observed(), st.floats(0.01, 0.99))
def test_interval_coverage_is_that_of_the_quantiles(case, level):
    draws, y = case
    x = draws.reshape(-1, len(y))
    low, high = np.percentile(x, [50 - 50 * level, 50 + 50 * level], axis=0)
    found = metrics.interval_coverage(draws, y, [level])
    assert found.width[0] == pytest.approx((high - low).mean(), rel=1e-9, abs=1e-9)
    slack = 1e-9 * (1 + np.abs(y))
    assert np.mean((low + slack <= y) & (y <= high - slack)) <= found.coverage[0]
    assert found.coverage[0] <= np.mean((low - slack <= y) & (y <= high + slack))


def test_coverage_of_draws_from_the_law_of_y_is_the_level_less_the_bias():
    rng, rows, size = np.random.default_rng(3), 20_000, 19
    found = metrics.interval_coverage(rng.uniform(size=(1, size, rows)), rng.uniform(size=rows))
    np.testing.assert_array_equal(found.level, (0.5, 0.8, 0.9, 0.95))
    expected = found.level - 2 * found.level / (size + 1)  # exact for a uniform law
    assert (np.abs(found.coverage - expected) < 4 * np.sqrt(expected * (1 - expected) / rows)).all()
    # the width is the coverage, then
    np.testing.assert_allclose(found.width, expected, atol=4 / np.sqrt(rows * size))


def test_intervals_of_one_draw_are_points_and_hold_only_themselves():
    found = metrics.interval_coverage([[[1.0, 2.0]]], [1.0, 3.0], 0.9)
    assert (found.coverage[0], found.width[0]) == (0.5, 0)


def test_metrics_of_several_outputs_are_means_over_all():
    draws, y = DRAWS.reshape(2, 7, 4, 3), Y.reshape(4, 3)
    assert metrics.crps(draws, y) == pytest.approx(metrics.crps(DRAWS, Y))
    assert metrics.crps_gaussian_mixture(draws, 0.3, y) == pytest.approx(metrics.crps_gaussian_mixture(DRAWS, 0.3, Y))
    np.testing.assert_allclose(metrics.interval_coverage(draws, y), metrics.interval_coverage(DRAWS, Y))
    assert metrics.wasserstein_distance(draws, draws[:1]) == pytest.approx(
        metrics.wasserstein_distance(DRAWS, DRAWS[:1])
    )


@few
@given(observed(), finite)
def test_wasserstein_distance_is_that_of_sorted_draws(case, shift):
    draws, _ = case
    assert metrics.wasserstein_distance(draws, draws) == 0
    assert metrics.wasserstein_distance(draws, draws + shift) == pytest.approx(abs(shift), rel=1e-6, abs=1e-6)
    x, other = draws.reshape(-1, draws.shape[2]), (draws[::-1] ** 2 / 100).reshape(-1, draws.shape[2])
    expected = np.abs(np.sort(x, 0) - np.sort(other, 0)).mean()
    assert metrics.wasserstein_distance(draws, draws[::-1] ** 2 / 100) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_wasserstein_distance_takes_runs_of_different_lengths():
    assert metrics.wasserstein_distance([[[0.0], [1.0]]], [[[0.5]]]) == pytest.approx(0.5)


# ---- detection ------------------------------------------------------------------------------------------------------


@few
@given(scored())
def test_detection_is_that_of_scikit_learn(case):
    scores, positive = case
    assert detection.auroc(scores, positive) == pytest.approx(sklearn_metrics.roc_auc_score(positive, scores))
    expected = sklearn_metrics.average_precision_score(positive, scores)
    assert detection.aupr(scores, positive) == pytest.approx(expected)
    false, true, _ = sklearn_metrics.roc_curve(positive, scores, drop_intermediate=False)
    assert detection.fpr95(scores, positive) == pytest.approx(false[true >= 0.95].min())
    found = detection.out_of_distribution(scores[~positive], scores[positive])
    assert found == pytest.approx(
        (*(metric(scores, positive) for metric in (detection.auroc, detection.aupr, detection.fpr95)), positive.mean())
    )


def test_a_true_positive_rate_of_exactly_95_percent_is_enough():
    outside = np.append(np.full(19, 2.0), 0.0)
    assert detection.out_of_distribution([1.0, 1.0], outside).fpr95 == 0
    assert detection.out_of_distribution([1.0, 1.0], outside[1:]).fpr95 == 1


def test_a_constant_score_is_chance():
    found = detection.out_of_distribution(np.zeros(30), np.zeros(10))
    assert found == pytest.approx((0.5, 0.25, 1, 0.25))


def test_rows_of_one_kind_have_no_area():
    for positive in (True, False):
        assert np.isnan(detection.auroc([0.0, 1.0], [positive] * 2))
        assert np.isnan(detection.fpr95([0.0, 1.0], [positive] * 2))
    assert detection.aupr([0.0, 1.0], [True, True]) == 1
    assert np.isnan(detection.aupr([0.0], [0]))


def test_infinite_scores_are_the_largest_and_smallest():
    assert detection.out_of_distribution([-np.inf, 0.0], [1.0, np.inf])[:3] == (1, 1, 0)


def test_misclassification_finds_the_wrong_rows():
    wrong = PROBABILITIES.argmax(-1) != LABELS
    found = detection.misclassification(PROBABILITIES, LABELS)
    assert found.auroc == pytest.approx(sklearn_metrics.roc_auc_score(wrong, 1 - PROBABILITIES.max(-1)))
    assert found.share == pytest.approx(1 - metrics.accuracy(PROBABILITIES, LABELS))
    entropy = uncertainty.predictive_entropy(PROBABILITIES)
    by_entropy = detection.misclassification(PROBABILITIES, LABELS, entropy)
    assert by_entropy == detection.out_of_distribution(entropy[~wrong], entropy[wrong])
    all_right = detection.misclassification(PROBABILITIES, PROBABILITIES.argmax(-1))
    assert np.isnan(all_right[:3]).all()
    assert all_right.share == 0


@few
@given(st.integers(1, 6).flatmap(lambda n: st.tuples(*[arrays(float, n, elements=coarse | finite)] * 2)))
def test_risk_coverage_is_the_mean_over_all_orders_of_rows_with_the_same_score(rows):
    losses, scores = rows
    orders = [list(o) for o in itertools.permutations(range(len(losses))) if (np.diff(scores[list(o)]) >= 0).all()]
    risks = np.mean([np.cumsum(losses[order]) / np.arange(1, len(losses) + 1) for order in orders], 0)
    found = detection.risk_coverage(losses, scores)
    np.testing.assert_allclose(found.risk, risks, atol=1e-9)
    np.testing.assert_allclose(found.coverage, np.arange(1, len(losses) + 1) / len(losses))
    assert found.area == pytest.approx(risks.mean(), abs=1e-9)
    assert detection.risk_coverage(losses, losses).area <= found.area + 1e-9


def test_a_score_that_says_nothing_leaves_the_risk_as_it_is():
    found = detection.risk_coverage([0, 0, 1, 3], np.zeros(4))
    np.testing.assert_allclose(found.risk, np.ones(4))
    ends = detection.risk_coverage([1, 2, 4], [np.inf, -np.inf, 0])  # infinite scores have an order
    np.testing.assert_allclose(ends.risk, [2, 3, 7 / 3])


# ---- uncertainty ----------------------------------------------------------------------------------------------------


@few
@given(
    arrays(np.float64, st.tuples(st.integers(1, 2), st.integers(1, 4), st.just(2), st.integers(1, 3)), elements=finite)
)
def test_entropies_add_up_and_mutual_information_is_a_mean_divergence(logits):
    logits = logits / 10
    each = special.softmax(logits, -1)
    mean = each.mean((0, 1))
    total, expected = uncertainty.predictive_entropy(mean), uncertainty.expected_entropy(logits)
    information = uncertainty.mutual_information(logits)
    np.testing.assert_allclose(expected, stats.entropy(each, axis=-1).mean((0, 1)), atol=1e-12)
    np.testing.assert_allclose(total, expected + information, atol=1e-12)
    divergence = stats.entropy(each, np.broadcast_to(mean, each.shape), axis=-1).mean((0, 1))
    np.testing.assert_allclose(information, divergence, atol=1e-10)
    assert (information >= 0).all()
    assert (information <= np.log(logits.shape[0] * logits.shape[1]) + 1e-12).all()


def test_mutual_information_of_one_draw_is_zero():
    np.testing.assert_allclose(uncertainty.mutual_information(LOGITS[:1, :1]), 0, atol=1e-12)


def test_entropy_of_a_probability_rounded_above_one_is_not_negative():
    assert uncertainty.predictive_entropy(np.array([[1.0000001, 0.0]], np.float32)) == 0


@few
@given(observed(), st.floats(0, 10))
def test_variances_are_those_of_the_mixture(case, scale):
    mean, _ = case
    parts = uncertainty.variance_decomposition(mean, scale**2)
    # a Gaussian with this variance has the second moment mean**2 + scale**2
    expected = (mean**2 + scale**2).mean((0, 1)) - mean.mean((0, 1)) ** 2
    np.testing.assert_allclose(parts.total, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(parts.total, parts.aleatoric + parts.epistemic)
    if mean.shape[:2] == (1, 1):
        assert (parts.epistemic == 0).all()


def test_variances_broadcast_over_rows_and_are_those_of_samples():
    rng = np.random.default_rng(4)
    mean, sigma = rng.normal(size=(2, 5, 3)), rng.uniform(0.5, 1, (2, 5))
    parts = uncertainty.variance_decomposition(mean, sigma[..., None] ** 2)
    np.testing.assert_allclose(parts.aleatoric, (sigma**2).mean())
    samples = (mean[..., None] + sigma[..., None, None] * rng.normal(size=(2, 5, 3, 4000))).transpose(2, 0, 1, 3)
    samples = samples.reshape(3, -1)
    # four standard errors of a variance
    error = np.sqrt((stats.moment(samples, 4, axis=1) - samples.var(1) ** 2) / samples.shape[1])
    assert (np.abs(samples.var(1) - parts.total) < 4 * error).all()


# ---- bad input ------------------------------------------------------------------------------------------------------

NAN_ROW = np.where(np.arange(40)[:, None] == 3, np.nan, PROBABILITIES)
NAN_DRAWS = np.where(np.arange(12) == 3, np.nan, DRAWS)


@pytest.mark.parametrize(
    "metric",
    [
        metrics.accuracy,
        metrics.negative_log_likelihood,
        metrics.brier_score,
        metrics.calibration_bins,
        metrics.expected_calibration_error,
        detection.misclassification,
    ],
)
@pytest.mark.parametrize(
    ("probabilities", "labels", "text"),
    [
        (LOGITS, LABELS, r"got shape \(2, 5, 40, 4\); mean_probabilities averages draws"),
        (NAN_ROW, LABELS, r"has 4 NaN or infinite entries, the first at index \(3, 0\)"),
        (LOGITS[0, 0], LABELS, "must not be negative, got .* are these logits"),
        (PROBABILITIES * 0.9, LABELS, r"must sum to 1, got 0.9 in row 0 of 40; are these logits"),
        (PROBABILITIES, LABELS[:5], r"expected labels \(40,\).*got shape \(5,\)"),
        (PROBABILITIES, np.eye(4)[LABELS], r"got shape \(40, 4\); np.argmax"),
        (PROBABILITIES, LABELS.astype(float), "labels must be integers, got dtype float64"),
        (PROBABILITIES, LABELS + 1, "from 0 to 3, for 4 classes, got 4 in row"),
        (PROBABILITIES, LABELS - 1, "from 0 to 3, for 4 classes, got -1 in row"),
        (PROBABILITIES[:0], LABELS[:0], r"is empty, of shape \(0, 4\)"),
        (PROBABILITIES + 0j, LABELS, "real numbers, got dtype complex128"),
    ],
)
def test_bad_classifications_are_refused(metric, probabilities, labels, text):
    with pytest.raises(ValueError, match=text):
        metric(probabilities, labels)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: metrics.calibration_bins(PROBABILITIES, LABELS, 0), "bins must be an integer of at least 1, got 0"),
        (lambda: metrics.calibration_bins(PROBABILITIES, LABELS, "auto"), "bins must be an integer .* got 'auto'"),
        (lambda: metrics.calibration_bins(PROBABILITIES, LABELS, binning="mass"), "binning must be one of 'equal_w"),
        (lambda: metrics.mean_probabilities(LOGITS[0]), r"expected logits .* got shape \(5, 40, 4\); logits\[None\]"),
        (lambda: uncertainty.expected_entropy(LOGITS * np.inf), "logits of 400 rows are NaN, plus infinity"),
        (lambda: uncertainty.mutual_information(LOGITS * np.nan), r"mutual_information: .* row \(0, 0, 0\)"),
        (lambda: uncertainty.predictive_entropy(LOGITS), "predictive_entropy: expected probabilities"),
        (lambda: metrics.lppd(DRAWS[0]), r"expected log_likelihood \(chain, draw, row\), got shape \(7, 12\)"),
        (lambda: metrics.lppd(NAN_DRAWS), r"has 14 NaN entries, the first at index \(0, 0, 3\)"),
        (lambda: metrics.lppd(DRAWS + np.inf), "plus infinity; is a scale exactly 0"),
        (lambda: metrics.lppd(DRAWS[:, :0]), r"is empty, of shape \(2, 0, 12\)"),
        (lambda: metrics.rmse(Y, Y[:, None]), r"prediction \(12,\), y \(12, 1\); reshape one"),
        (lambda: metrics.rmse(Y, Y * np.nan), "y has 12 NaN or infinite"),
        (lambda: metrics.crps(DRAWS[0], Y), r"expected draws \(chain, draw, row, ...\), got shape \(7, 12\)"),
        (lambda: metrics.crps(DRAWS, Y[:, None]), r"y has shape \(12, 1\), but the draws, without .* \(12,\)"),
        (lambda: metrics.crps(NAN_DRAWS, Y), "draws has 14 NaN or infinite"),
        (lambda: metrics.crps(DRAWS[:1, :1], Y, fair=True), "at least 2 draws, got 1"),
        (lambda: metrics.crps_gaussian_mixture(DRAWS, -1, Y), "scale must not be negative, got -1"),
        (lambda: metrics.crps_gaussian_mixture(DRAWS, DRAWS[:, :3] ** 2, Y), r"scale has shape \(2, 3, 12\), which"),
        (lambda: metrics.crps_gaussian_mixture(DRAWS, np.ones((2, 7)), Y), r"scale\[..., None\] adds an axis"),
        (lambda: metrics.interval_coverage(DRAWS, Y, [0.5, 1.0]), r"between 0 and 1, got \[0.5, 1.0\]"),
        (lambda: metrics.interval_coverage(DRAWS, Y, [[0.5]]), "between 0 and 1"),
        (lambda: metrics.agreement(PROBABILITIES, PROBABILITIES[:3]), r"agreement: .* reference \(3, 4\)"),
        (lambda: metrics.total_variation(PROBABILITIES, LOGITS[0, 0]), "reference must not be negative"),
        (lambda: metrics.wasserstein_distance(DRAWS, DRAWS[..., :3]), r"of \(12,\), the reference is of \(3,\)"),
        (lambda: detection.auroc(Y, np.ones((2, 12), bool)), r"scores \(12,\) and positive \(2, 12\)"),
        (lambda: detection.auroc(Y, Y), "booleans, or 0 and 1, got dtype float64"),
        (lambda: detection.auroc(Y, np.arange(12)), "booleans, or 0 and 1, got dtype int64"),
        (lambda: detection.aupr(DRAWS, DRAWS > 0), r"expected scores \(row,\), got shape \(2, 7, 12\)"),
        (lambda: detection.fpr95(Y * np.nan, Y > 0), "scores has 12 NaN entries"),
        (lambda: detection.out_of_distribution(Y, Y[:0]), "outside is empty"),
        (lambda: detection.misclassification(PROBABILITIES, LABELS, Y), r"scores \(12,\) and labels \(40,\)"),
        (lambda: uncertainty.variance_decomposition(DRAWS, -1), "variance must not be negative"),
        (lambda: uncertainty.variance_decomposition(DRAWS[0], 1), r"expected mean \(chain, draw, row, ...\), got"),
    ],
)
def test_bad_input_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_joint_density_is_that_of_the_mixture_of_products():
    density = np.random.default_rng(0).uniform(0.1, 0.9, (2, 3, 4))
    expected = np.log(np.mean(np.prod(density.reshape(6, 4), 1)))
    assert metrics.joint_log_predictive_density(np.log(density)) == pytest.approx(expected, rel=1e-12)
    # draws that agree on every row know nothing of the rows together
    same = np.broadcast_to(density[:1, :1], (1, 5, 4))
    pointwise = metrics.log_predictive_density(np.log(same)).sum()
    assert metrics.joint_log_predictive_density(np.log(same)) == pytest.approx(pointwise, rel=1e-12)
    impossible = np.full((1, 2, 3), -np.inf)
    assert metrics.joint_log_predictive_density(impossible) == -np.inf


def test_probit_probabilities_against_the_integral():
    """Two classes: within .02 of the mean of a sigmoid over a normal law, its known error."""
    rng = np.random.default_rng(0)
    for mean, sd in ((0.0, 2.0), (1.0, 1.0), (-2.0, 3.0)):
        f = mean + sd * rng.standard_normal(100_000)
        logits = np.stack([0 * f, f], -1)[None, :, None]
        exact = metrics.mean_probabilities(logits)
        np.testing.assert_allclose(metrics.probit_probabilities(logits), exact, atol=0.02)
    certain = np.array([[[[1.0, 2.0, -1.0]]] * 2]).reshape(1, 2, 1, 3)
    np.testing.assert_allclose(metrics.probit_probabilities(certain), metrics.mean_probabilities(certain), rtol=1e-12)
    with pytest.raises(ValueError, match="probit_probabilities: logits has 1 NaN or infinite"):
        metrics.probit_probabilities(np.array([[[[0.0, -np.inf]]]]))


def test_a_joint_density_of_plus_infinity_is_refused():
    with pytest.raises(ValueError, match="log_likelihood is plus infinity somewhere"):
        metrics.joint_log_predictive_density([[[0.0, np.inf]]])
