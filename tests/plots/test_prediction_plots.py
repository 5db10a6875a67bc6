# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Bands are quantiles of the draws; curves of risk are those of a loop over the rows."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from numpyro_bdl import detection, plots

RNG = np.random.default_rng(1)
X = RNG.permutation(np.linspace(-1, 2, 12))
FUNCTIONS = X**2 + RNG.gamma(1, 1, (3, 40, 1)) * X + 0.1 * RNG.normal(size=(3, 40, 12))  # skew: the mean is no median
PREDICTIVE = FUNCTIONS + RNG.normal(size=FUNCTIONS.shape)
DATA = (np.array([0.3, -0.5]), np.array([1.0, 2.0]))


def edges(band):
    """The lower and the upper edge of a band, each (point, 2) from left to right."""
    vertices = band.get_paths()[0].vertices
    count = (len(vertices) - 3) // 2
    lower, upper = vertices[1 : count + 1], vertices[count + 2 : -1][::-1]
    return (lower, upper) if lower[0, 1] < upper[0, 1] else (upper, lower)


# ---- band ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("center", "function"), [("mean", np.mean), ("median", np.median)])
def test_predictive_band_draws_the_quantiles_of_all_draws_in_the_order_of_the_inputs(center, function):
    _, given = plt.subplots()
    ax = plots.predictive_band(X, FUNCTIONS, PREDICTIVE, DATA, ax=given, label="NUTS", level=0.6, center=center)
    assert ax is given
    order = np.argsort(X)
    total, epistemic, rows = ax.collections
    for band, draws in ((total, PREDICTIVE), (epistemic, FUNCTIONS)):
        for edge, probability in zip(edges(band), (0.2, 0.8), strict=True):
            by_hand = [np.quantile(draws[:, :, n], probability) for n in order]
            np.testing.assert_allclose(edge, np.stack([X[order], by_hand], 1))
    assert total.get_alpha() < epistemic.get_alpha()
    (line,) = ax.get_lines()
    by_hand = [function(FUNCTIONS[:, :, n]) for n in order]
    np.testing.assert_allclose(line.get_xydata(), np.stack([X[order], by_hand], 1))
    np.testing.assert_array_equal(rows.get_offsets(), np.stack(DATA, 1))
    names = ["60 % of new data", "60 % of the functions", "NUTS", "data"]
    assert ax.get_legend_handles_labels()[1] == names


def test_predictive_band_adds_to_the_axes_in_another_colour_and_names_bands_once():
    ax = plots.predictive_band(X[:, None], FUNCTIONS, label="NUTS")  # inputs as a column
    plots.predictive_band(X, FUNCTIONS + 1, PREDICTIVE, ax=ax, label="SGLD")
    assert [line.get_color() for line in ax.get_lines()] == list(plots.COLORS[:2])
    colors = [to_hex(band.get_facecolor()[0]).upper() for band in ax.collections]
    assert colors == [plots.COLORS[0], plots.COLORS[1], plots.COLORS[1]]
    assert ax.get_legend_handles_labels()[1] == ["90 % of the functions", "NUTS", "90 % of new data", "SGLD"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"x": X[:5]}, r"expected functions \(chain, draw, point\) .*, got shape \(3, 40, 12\) and 5 inputs"),
        ({"functions": FUNCTIONS[..., None]}, r"got shape \(3, 40, 12, 1\) and 12 inputs; of several outputs hand in"),
        ({"functions": FUNCTIONS[0]}, r"functions \(chain, draw, row, ...\), got shape \(40, 12\)"),
        ({"x": X[:1], "functions": FUNCTIONS[..., :1]}, "at two or more inputs .* and 1 inputs"),
        ({"predictive": PREDICTIVE[..., 1:]}, r"expected predictive .* got shape \(3, 40, 11\)"),
        ({"functions": np.where(X > 1, np.nan, FUNCTIONS)}, "functions has .* NaN or infinite entries"),
        ({"x": np.where(X > 1, np.inf, X)}, "x has 4 NaN or infinite entries"),
        ({"data": (DATA[0], DATA[1][:1])}, r"arrays of one shape, got the data's x \(2,\), y \(1,\)"),
        ({"data": (DATA[0], np.nan * DATA[1])}, r"data\[1\] has 2 NaN"),
        ({"level": 1.0}, r"level must be a number in \(0, 1\)"),
        ({"center": "mode"}, "center must be one of 'mean', 'median', got 'mode'"),
    ],
)
def test_predictive_band_names_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=f"predictive_band: .*{text}|predictive_band: {text}"):
        plots.predictive_band(**{"x": X, "functions": FUNCTIONS} | arguments)


# ---- risk and coverage ---------------------------------------------------------------------------------------


def by_loop(losses, scores):
    order = sorted(range(len(losses)), key=lambda row: scores[row])
    return [np.mean([losses[row] for row in order[: k + 1]]) for k in range(len(losses))]


@pytest.mark.parametrize("rows", [1, 2, 60])
def test_risk_coverage_draws_the_risk_of_the_rows_kept_and_its_bounds(rows):
    losses, scores = RNG.random(rows) ** 2, RNG.normal(size=rows)
    _, given = plt.subplots()
    ax = plots.risk_coverage(losses, scores, ax=given, label="SGLD")
    assert ax is given
    curve, best, chance = ax.get_lines()
    coverage = np.arange(1, rows + 1) / rows
    np.testing.assert_allclose(curve.get_xydata(), np.stack([coverage, by_loop(losses, scores)], 1))
    np.testing.assert_allclose(best.get_xydata(), np.stack([coverage, by_loop(losses, losses)], 1))
    np.testing.assert_allclose(chance.get_xydata(), [[0, losses.mean()], [1, losses.mean()]])
    area = np.mean(by_loop(losses, scores))
    assert ax.get_legend_handles_labels()[1] == [f"SGLD (AURC {area:.3g})"]
    assert ax.get_ylim()[0] == 0


def test_risk_coverage_adds_to_the_axes_in_another_colour_and_shows_each_curve():
    ax = plots.risk_coverage(np.arange(40.0) / 40, np.arange(40.0))
    plots.risk_coverage(np.arange(40.0), -np.arange(40.0), ax=ax)  # the largest losses first
    first, second = (line for line in ax.get_lines() if line.get_label() not in ("_oracle", "_random"))
    assert [first.get_color(), second.get_color()] == list(plots.COLORS[:2])
    low, high = ax.get_ylim()
    assert low == 0
    assert second.get_ydata()[1:].max() < high < second.get_ydata().max() * 1.1
    assert ax.get_legend_handles_labels()[1] == ["AURC 0.244", "AURC 29.2"]


def test_risk_coverage_has_no_room_for_the_noise_of_few_rows():
    losses = np.r_[1000.0, np.ones(99)]
    ax = plots.risk_coverage(losses, np.arange(100))
    assert ax.get_ylim()[1] < 1.1 * losses[:5].mean()
    assert plots.risk_coverage(-losses, np.arange(100)).get_ylim()[0] == pytest.approx(-losses[:5].mean())


def test_risk_coverage_of_no_errors():
    ax = plots.risk_coverage(np.zeros(5), np.arange(5))
    assert ax.get_ylim() == (0, 1)


def test_risk_coverage_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"risk_coverage: expected one entry for each row, got losses \(3,\) and sc"):
        plots.risk_coverage(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="risk_coverage: losses has 1 NaN"):
        plots.risk_coverage([1, np.nan], [1, 2])
    with pytest.raises(ValueError, match="risk_coverage: scores has 1 NaN"):
        plots.risk_coverage([1, 2], [1, np.nan])
    with pytest.raises(ValueError, match=r"risk_coverage: expected scores \(row,\), got shape \(2, 2\)"):
        plots.risk_coverage(np.ones((2, 2)), np.ones((2, 2)))
    with pytest.raises(ValueError, match="risk_coverage: scores is empty"):
        detection.risk_coverage([], [])


def test_the_data_of_several_methods_is_named_once():
    ax = plots.predictive_band(X, FUNCTIONS, data=DATA, label="NUTS")
    plots.predictive_band(X, FUNCTIONS, data=DATA, ax=ax, label="SGLD")
    assert ax.get_legend_handles_labels()[1].count("data") == 1
