# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The pictures show the numbers of the metrics and of ArviZ."""

import subprocess
import sys

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from numpyro_bdl import metrics, plots

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 200)
PROBABILITIES = RNG.dirichlet([0.5, 0.5, 0.5], 200)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def tree():
    draws = RNG.normal(size=(4, 50, 6, 3)) + np.linspace(0, 2, 4)[:, None, None, None] * RNG.random((6, 3))
    return az.from_dict({"functions": {"y": draws}})


def drawn(ax):
    """The lines with data of a method, references left out."""
    return [line for line in ax.get_lines() if line.get_label() not in ("_calibrated", "_reference")]


def test_importing_the_package_or_the_module_does_not_load_matplotlib():
    code = "import sys, numpyro_bdl; from numpyro_bdl import plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- reliability ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [4, 10, 50])
def test_reliability_draws_the_filled_bins(bins):
    ax = plots.reliability(PROBABILITIES, LABELS, label="SGLD", bins=bins)
    confidence, accuracy, share = metrics.calibration_bins(PROBABILITIES, LABELS, bins)
    filled = share > 0
    assert 0 < filled.sum() < bins
    (line,) = drawn(ax)
    np.testing.assert_array_equal(line.get_xydata(), np.stack([confidence, accuracy], 1)[filled])
    (markers,) = ax.collections
    np.testing.assert_array_equal(markers.get_offsets(), line.get_xydata())
    np.testing.assert_allclose((markers.get_sizes() - 10) / 150, share[filled])
    assert "confidence" in ax.get_xlabel()
    assert ax.get_ylabel() == "accuracy"


def test_reliability_adds_to_the_axes_in_another_colour_with_one_diagonal():
    _, ax = plt.subplots()
    for name in ("MAP", "SGLD"):
        assert plots.reliability(PROBABILITIES, LABELS, ax=ax, label=name) is ax
    assert [line.get_color() for line in drawn(ax)] == list(plots.COLORS[:2])
    assert sum(line.get_label() == "_calibrated" for line in ax.get_lines()) == 1
    assert ax.get_legend_handles_labels()[1] == ["MAP", "SGLD"]


def test_reliability_names_the_shapes():
    with pytest.raises(ValueError, match=r"expected probabilities \(row, class\).*got shapes \(2, 200, 3\) and"):
        plots.reliability(np.stack([PROBABILITIES] * 2), LABELS)
    with pytest.raises(ValueError, match=r"got shapes \(200, 3\) and \(5,\)"):
        plots.reliability(PROBABILITIES, LABELS[:5])


def test_reliability_refuses_nan():
    with pytest.raises(ValueError, match="reliability: a probability is not a finite number"):
        plots.reliability(np.full((200, 3), np.nan), LABELS)


# ---- entropy -------------------------------------------------------------------------------------------------


def test_entropy_histogram_draws_the_shares_of_the_rows():
    entropy = metrics.predictive_entropy(PROBABILITIES)
    inside, outside = {"MAP": entropy[:120], "SGLD": entropy[:80]}, {"MAP": entropy[120:], "SGLD": entropy[150:]}
    ax = plots.entropy_histogram(inside, outside, bins=8)
    edges = np.linspace(0, entropy.max(), 9)
    outlines = [patch.get_data() for patch in ax.patches if not patch.get_fill()]
    assert len(outlines) == 4
    for n, name in enumerate(inside):
        shares = [np.histogram(side[name], edges)[0] / len(side[name]) for side in (inside, outside)]
        for share, outline in zip(shares, outlines[2 * n : 2 * n + 2], strict=True):
            np.testing.assert_allclose(outline.edges, edges)
            np.testing.assert_allclose((outline.values - outline.baseline) * np.max(shares) / 0.9, share, atol=1e-12)
            assert outline.baseline == 1 - n
    assert "nats" in ax.get_xlabel()
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["SGLD", "MAP"]
    assert ax.get_legend_handles_labels()[1] == ["in distribution", "out of distribution"]


def test_entropy_histogram_draws_into_the_axes_given():
    _, ax = plt.subplots()
    assert plots.entropy_histogram({"a": [0.1]}, {"a": [0.2]}, ax=ax) is ax


def test_entropy_histogram_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"the same names, got \['a'\] and \['b'\]"):
        plots.entropy_histogram({"a": [0.1]}, {"b": [0.1]})
    with pytest.raises(ValueError, match="entropy_histogram: an entropy is not a finite number"):
        plots.entropy_histogram({"a": [0.1]}, {"a": [np.nan]})
    with pytest.raises(ValueError, match="entropy_histogram: 'a' has no rows"):
        plots.entropy_histogram({"a": [0.1]}, {"a": []})


# ---- R-hat ---------------------------------------------------------------------------------------------------


def test_function_rhat_draws_the_distribution_of_the_rhat_of_arviz(tree):
    ax = plots.function_rhat({"SGLD": tree})
    (line,) = drawn(ax)
    rhat = np.sort(np.ravel(az.rhat(tree, group="functions")["y"]))
    np.testing.assert_array_equal(line.get_xdata(), rhat)
    np.testing.assert_allclose(line.get_ydata(), np.arange(1, 19) / 18)
    assert ax.get_xlim()[0] == pytest.approx(1.001)
    assert ax.get_xlim()[1] > rhat.max()
    levels = [line.get_xdata()[0] for line in ax.get_lines() if line.get_label() == "_reference"]
    assert levels == [1.01, 1.1]


def test_function_rhat_takes_one_tree_or_values(tree):
    rhat = np.ravel(az.rhat(tree, group="functions")["y"])
    _, ax = plt.subplots()
    assert plots.function_rhat(tree, ax=ax) is ax
    plots.function_rhat(rhat, ax=ax)
    first, second = drawn(ax)
    np.testing.assert_array_equal(first.get_xdata(), second.get_xdata())
    assert sum(line.get_label() == "_reference" for line in ax.get_lines()) == 2


def test_function_rhat_keeps_the_colours_of_methods_without_draws(tree):
    ax = plots.function_rhat({"MAP": None, "SGLD": tree})
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["SGLD"]
    assert to_hex(handles[0].get_color()).upper() == plots.COLORS[1]


def test_function_rhat_shows_the_whole_range(tree):
    ax = plots.function_rhat({"good": np.array([0.998, 1.0, 1.02]), "bad": np.array([3.0, 40.0])})
    ax.figure.canvas.draw()
    assert ax.get_xlim()[1] > 40
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1.001", "1.01", "1.1", "2", "11"]


def test_function_rhat_names_what_is_wrong(tree):
    with pytest.raises(ValueError, match=r"no group 'functions'; make it by numpyro_bdl.to_datatree. Its groups: post"):
        plots.function_rhat(az.from_dict({"posterior": {"a": np.zeros((4, 10))}}))
    with pytest.raises(ValueError, match="function_rhat: R-hat of SGLD is not a number; it needs at least 4 draws"):
        plots.function_rhat({"SGLD": np.array([1.0, np.nan])})


def test_a_page_of_all_three_can_be_saved(tree, tmp_path):
    figure, axes = plt.subplots(1, 3, layout="constrained")
    plots.reliability(PROBABILITIES, LABELS, ax=axes[0], label="SGLD")
    plots.entropy_histogram({"SGLD": [0.1, 0.2]}, {"SGLD": [0.5, 0.7]}, ax=axes[1])
    plots.function_rhat({"SGLD": tree}, ax=axes[2])
    for ax in axes:
        assert ax.get_title()
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        ax.legend()
    figure.savefig(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 0
