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

from numpyro_bdl import metrics, plots, uncertainty
from numpyro_bdl.symmetry import functional_modes

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 200)
PROBABILITIES = RNG.dirichlet([0.5, 0.5, 0.5], 200)


@pytest.fixture
def tree():
    draws = RNG.normal(size=(4, 50, 6, 3)) + np.linspace(0, 2, 4)[:, None, None, None] * RNG.random((6, 3))
    return az.from_dict({"functions": {"y": draws}})


def drawn(ax):
    """The lines with data of a method, references left out."""
    return [line for line in ax.get_lines() if line.get_label() not in ("_calibrated", "_reference", "_range")]


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
    entropy = uncertainty.predictive_entropy(PROBABILITIES)
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
    with pytest.raises(ValueError, match="function_rhat: R-hat of SGLD is not a finite number"):
        plots.function_rhat({"SGLD": np.array([1.0, np.nan])})


# ---- sparsity ------------------------------------------------------------------------------------------------

MASKS = {
    "net/Dense_0.kernel": np.array([[[True] * 3 + [False] * 7] * 2, [[True] * 1 + [False] * 9] * 2]),
    "net/Dense_1.kernel": np.array([[True, False], [False, True]]),
}


def test_layer_sparsity_draws_the_mean_and_the_range_of_the_chains():
    ax = plots.layer_sparsity(MASKS)
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], [0.8, 0.5])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(MASKS)
    assert list(ax.get_yticks()) == [1, 0]
    np.testing.assert_allclose([bar.get_y() + bar.get_height() / 2 for bar in ax.patches], [1, 0])
    assert [text.get_text() for text in ax.texts] == ["2 to 6 of 20 kept", "1 of 2 kept"]
    (span,) = [line for line in ax.get_lines() if line.get_label() == "_range"]
    np.testing.assert_allclose(span.get_xydata(), [[0.7, 1], [0.9, 1]])
    (together,) = [line for line in ax.get_lines() if line.get_label() == "_reference"]
    np.testing.assert_allclose(together.get_xdata(), 1 - 5 / 22)


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_layer_sparsity_has_a_row_for_each_layer(layers):
    masks = {f"net/Conv_{n}.kernel": RNG.random((2, 3, 3, 16, 16)) < 0.1 for n in range(layers)}
    _, ax = plt.subplots(layout="constrained")
    assert plots.layer_sparsity(masks, ax=ax) is ax
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in (*ax.texts, *ax.get_yticklabels())]
    assert len(boxes) == 2 * layers
    inside = ax.figure.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    for side in (boxes[:layers], boxes[layers:]):  # from the top
        assert all(upper.y0 >= lower.y1 for upper, lower in zip(side[:-1], side[1:], strict=True))


def test_layer_sparsity_names_what_is_wrong():
    with pytest.raises(ValueError, match="layer_sparsity: there is no mask"):
        plots.layer_sparsity({})
    with pytest.raises(ValueError, match=r"mask of 'w' must be an array \(chain, ...\) of booleans, .* got float64 of"):
        plots.layer_sparsity({"w": np.ones((1, 3))})
    with pytest.raises(ValueError, match=r"got bool of shape \(3,\)"):
        plots.layer_sparsity({"w": np.ones(3, bool)})


# ---- inclusion -----------------------------------------------------------------------------------------------


def inclusion(groups, included, chains=2, draws=40):
    """Those up to ``included`` rise to 1, the others fall to 0."""
    rise = np.linspace(0, 1, draws)[:, None]
    p = np.where(np.arange(groups) < included, 0.5 + rise / 2, 0.5 - rise / 2)
    return np.clip(p + 0.02 * RNG.normal(size=(chains, draws, groups)), 0, 1)


def test_inclusion_path_colours_what_ends_above_a_half():
    p = inclusion(5, 2)
    ax = plots.inclusion_path(p, names=list("abcde"), average=1)
    handles, labels = ax.get_legend_handles_labels()
    assert set(labels[:2]) == {"a", "b"}
    assert labels[2:] == ["3 others"]
    assert [to_hex(handle.get_color()).upper() for handle in handles[:2]] == list(plots.COLORS[:2])
    lines = drawn(ax)
    assert len(lines) == 4  # two groups in two chains
    assert [line.get_color() for line in lines] == [color for color in plots.COLORS[:2] for _ in range(2)]
    first = "ab".index(labels[0])
    for chain in range(2):
        np.testing.assert_allclose(lines[chain].get_xydata(), np.stack([np.arange(40) + 1, p[chain, :, first]], 1))
    (others,) = ax.collections
    expected = [p[chain, :, group] for chain in range(2) for group in (2, 3, 4)]
    np.testing.assert_allclose([segment[:, 1] for segment in others.get_segments()], expected)


def test_inclusion_path_is_a_running_mean():
    p = inclusion(3, 3, chains=1)[0]
    ax = plots.inclusion_path(p, average=8)
    for line, label in zip(drawn(ax), ax.get_legend_handles_labels()[1], strict=True):
        column = p[:, int(label)]
        expected = [column[max(n - 7, 0) : n + 1].mean() for n in range(40)]
        np.testing.assert_allclose(line.get_ydata(), expected)
    assert not ax.collections
    by_default = plots.inclusion_path(p)  # a twentieth: 2 draws
    np.testing.assert_allclose(
        drawn(by_default)[0].get_ydata(), drawn(plots.inclusion_path(p, average=2))[0].get_ydata()
    )


def test_inclusion_path_takes_groups_of_any_shape():
    p = inclusion(6, 1).reshape(2, 40, 3, 2)
    assert plots.inclusion_path(p).get_legend_handles_labels()[1] == ["0,0", "5 others"]


def test_inclusion_path_of_a_thousand_groups_names_the_surest():
    p = inclusion(1000, 30)
    p[:, -2:, :30] = np.linspace(0.9, 1, 30)
    _, ax = plt.subplots()
    assert plots.inclusion_path(p, ax=ax) is ax
    labels = ax.get_legend_handles_labels()[1]
    assert labels[0] == "29"
    assert len(labels) == 21
    assert labels[-1] == "970 others"
    assert len(drawn(ax)) == 60
    looks = [(line.get_color(), line.get_linestyle(), line._dash_pattern) for line in drawn(ax)[::2]]
    assert len(set(map(str, looks))) == 30
    assert len(ax.collections[0].get_segments()) == 2 * 970


def test_inclusion_path_counts_warm_up_to_zero():
    ax = plots.inclusion_path(inclusion(4, 0), num_warmup=15)
    assert not drawn(ax)
    assert ax.get_legend_handles_labels()[1] == ["4 groups"]
    assert ax.get_xlim() == (-14, 25)
    assert [line.get_xdata()[0] for line in ax.get_lines()] == [0, 0]  # the one at 1/2 spans the axes
    assert ax.collections[0].get_segments()[0][14, 0] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"inclusion": np.ones(3)},
            r"expected probabilities \(draw, group\) or \(chain, draw, ...\), got shape \(3,\)",
        ),
        ({"inclusion": np.ones((2, 3)), "names": ["a"]}, "got 1 names for 3 groups"),
        ({"inclusion": np.full((2, 3), np.nan)}, r"a probability is not in \[0, 1\]; is a chain NaN"),
        ({"inclusion": np.full((2, 3), 1.5)}, r"a probability is not in \[0, 1\]"),
        ({"inclusion": np.ones((2, 3)), "average": 0}, "average must be an integer of at least 1"),
        ({"inclusion": np.ones((2, 3)), "num_warmup": -1}, "num_warmup must be an integer of at least 0"),
        ({"inclusion": np.ones((2, 3)), "num_warmup": 5}, "num_warmup=5 is more than the 2 draws"),
    ],
)
def test_inclusion_path_names_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=f"inclusion_path: {text}"):
        plots.inclusion_path(**arguments)


# ---- sparsity along the draws --------------------------------------------------------------------------------


def test_sparsity_path_draws_what_is_expected_to_be_excluded():
    first, second = inclusion(5, 2, chains=3), RNG.random((3, 40, 2, 4))
    _, ax = plt.subplots()
    assert plots.sparsity_path({"first": first, "second": second}, ax=ax, num_warmup=10) is ax
    lines = [line for line in drawn(ax) if line.get_label() != "_chain"]
    chains = [line for line in drawn(ax) if line.get_label() == "_chain"]
    for n, p in enumerate((first, second)):
        by_hand = [[1 - sum(np.ravel(draw)) / draw.size for draw in chain] for chain in p]
        np.testing.assert_allclose(lines[n].get_ydata(), np.mean(by_hand, 0))
        np.testing.assert_allclose([line.get_ydata() for line in chains[3 * n : 3 * n + 3]], by_hand)
        assert {line.get_color() for line in (lines[n], *chains[3 * n : 3 * n + 3])} == {plots.COLORS[n]}
        np.testing.assert_array_equal(lines[n].get_xdata(), np.arange(-9, 31))
    assert ax.get_legend_handles_labels()[1] == ["first", "second"]
    assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_label() == "_reference"] == [0]
    assert ax.get_xlim() == (-9, 30)
    plots.sparsity_path({"third": first}, ax=ax)
    assert ax.get_lines()[-1].get_color() == plots.COLORS[2]


def test_sparsity_path_of_one_chain_of_a_share_that_is_kept():
    sparsity = np.array([[0.0, 0.5, 0.9]])  # the field of a run that prunes
    (line,) = plots.sparsity_path({"all": 1 - sparsity}).get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[1, 0], [2, 0.5], [3, 0.9]])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"inclusion": {}}, "there is no site to draw"),
        ({"inclusion": {"w": np.ones(3)}}, r"expected probabilities 'w' \(chain, draw, ...\), got shape \(3,\)"),
        ({"inclusion": {"w": np.full((2, 3), np.nan)}}, r"a probability is not in \[0, 1\]; is a chain NaN"),
        (
            {"inclusion": {"w": np.ones((2, 3)), "v": np.ones((2, 4))}},
            r"expected as many draws of each site, got \[3, 4\]",
        ),
        ({"inclusion": {"w": np.ones((2, 3))}, "num_warmup": 5}, "num_warmup=5 is more than the 3 draws"),
    ],
)
def test_sparsity_path_names_what_is_wrong(arguments, text):
    with pytest.raises(ValueError, match=f"sparsity_path: {text}"):
        plots.sparsity_path(**arguments)


# ---- all of them ---------------------------------------------------------------------------------------------


def test_a_page_of_all_of_them_can_be_saved(tree, tmp_path):
    figure, axes = plt.subplots(1, 5, figsize=(25, 5), layout="constrained")
    plots.reliability(PROBABILITIES, LABELS, ax=axes[0], label="SGLD")
    plots.entropy_histogram({"SGLD": [0.1, 0.2]}, {"SGLD": [0.5, 0.7]}, ax=axes[1])
    plots.function_rhat({"SGLD": tree}, ax=axes[2])
    plots.inclusion_path(inclusion(5, 2), ax=axes[3])
    plots.layer_sparsity(MASKS, ax=axes[4])
    for ax in axes:
        assert ax.get_title()
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    for ax in axes[:4]:
        ax.legend()
    figure.savefig(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 0


# ---- chains --------------------------------------------------------------------------------------------------


X = np.linspace(-1, 1, 15)


@pytest.fixture
def modes():
    """Five chains in two modes, 0 and 1, the third of them not finite."""
    functions = np.array([1, 1, 0, -1, 1])[:, None, None] * X + 0.1 * RNG.normal(size=(5, 60, 15))
    functions[2, 30:] = np.nan
    with pytest.warns(UserWarning, match="leaves out the chains"):
        return functional_modes(functions)


def test_functional_modes_draws_the_mean_of_each_chain_in_the_colour_of_its_mode(modes):
    _, ax = plt.subplots()
    shuffled = RNG.permutation(15)
    mixed = modes._replace(means={"y": modes.means["functions"][:, shuffled, None]})  # one output, points in any order
    assert plots.functional_modes(mixed, X[shuffled], ax=ax) is ax
    lines = ax.get_lines()
    assert [line.get_color() for line in lines] == [plots.COLORS[0]] * 3 + [plots.COLORS[1]]
    for chain, line in zip((0, 1, 4, 3), lines, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), X)
        np.testing.assert_array_equal(line.get_ydata(), modes.means["functions"][chain])
    assert ax.get_legend_handles_labels()[1] == ["mode 0: 3 of 4 chains", "mode 1: 1 of 4 chains"]


def test_functional_modes_draws_the_distances_in_the_order_of_the_modes(modes):
    ax = plots.functional_modes(modes)
    (image,) = ax.get_images()
    order = [0, 1, 4, 3]
    np.testing.assert_array_equal(image.get_array(), modes.distances[np.ix_(order, order)])
    assert image.get_clim() == (0, 3 * modes.separation)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "4", "3"]
    edges = [line for line in ax.get_lines() if line.get_label() == "_edge"]
    assert [edges[0].get_ydata()[0], edges[1].get_xdata()[0]] == [2.5, 2.5]
    assert len(edges) == 2


def test_functional_modes_names_what_it_can_not_draw(modes):
    with pytest.raises(ValueError, match=r"one output over the 4 inputs of x, got functions \(15,\)"):
        plots.functional_modes(modes, X[:4])
    two = modes._replace(means={"a": modes.means["functions"], "b": modes.means["functions"]})
    with pytest.raises(ValueError, match=r"got a \(15,\), b \(15,\)"):
        plots.functional_modes(two, X)


def test_weights_raw_and_folded_draws_a_plane_of_two_weights():
    raw = RNG.normal(size=(9, 30, 2))
    _, given = plt.subplots(1, 2)
    axes = plots.weights_raw_and_folded(raw, np.abs(raw), names=["a", "b"], axes=given)
    assert list(axes) == list(given)
    assert [ax.get_title() for ax in axes] == ["raw", "folded"]
    for ax, draws in zip(axes, (raw, np.abs(raw)), strict=True):
        assert len(ax.collections) == 9
        for chain, points in enumerate(ax.collections):
            np.testing.assert_array_equal(points.get_offsets(), draws[chain])
            assert to_hex(points.get_facecolor()[0]).upper() == plots.COLORS[chain % 7]
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")
    assert axes[0].get_legend_handles_labels()[1] == [f"chain {n}" for n in range(9)]


@pytest.mark.parametrize("count", [1, 4])
def test_weights_raw_and_folded_draws_strips_of_other_numbers_of_weights(count):
    raw = RNG.normal(size=(3, 20, count))
    left, _ = plots.weights_raw_and_folded(raw, -raw)
    assert [tick.get_text() for tick in left.get_xticklabels()] == [str(n) for n in range(count)]
    for chain, points in enumerate(left.collections):
        x, y = np.asarray(points.get_offsets()).T
        np.testing.assert_array_equal(y, raw[chain].ravel())
        x = x.reshape(20, count)
        np.testing.assert_array_equal(np.round(x), np.broadcast_to(np.arange(count), x.shape))
        # chains side by side, draws in their order
        assert -0.4 + 0.8 * chain / 3 < x[0, 0] < x[-1, 0] < -0.4 + 0.8 * (chain + 1) / 3


def test_weights_raw_and_folded_names_the_shapes():
    raw = RNG.normal(size=(3, 20, 2))
    with pytest.raises(ValueError, match=r"the same draws twice, .* got shapes \(3, 20, 2\) and \(3, 19, 2\)"):
        plots.weights_raw_and_folded(raw, raw[:, 1:])
    with pytest.raises(ValueError, match=r"got shapes \(3, 20\) and \(3, 20\)"):
        plots.weights_raw_and_folded(raw[..., 0], raw[..., 0])
    with pytest.raises(ValueError, match="got 1 names for 2 weights"):
        plots.weights_raw_and_folded(raw, raw, names=["a"])
