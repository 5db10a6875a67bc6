# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The R-hat of weights and functions is ArviZ's, and ArviZ draws the function values for which it is worst."""

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from numpyro_bdl import plots

RNG = np.random.default_rng(2)
COPIES = np.array([-1.0, 1.0, 1.0, -1.0])[:, None, None]  # in which copy of the network a chain is
POINTS = [7, 3, 9, 11]


def make(functions, **posterior):
    dims = {"y": ["point", "output"]}
    return az.from_dict({"posterior": posterior, "functions": {"y": functions}}, dims=dims, coords={"point": POINTS})


@pytest.fixture
def tree():
    functions = RNG.normal(size=(4, 60, 4, 2))
    functions[..., 0, 1] = 2.5  # a logit that is fixed
    functions[:, :, 2, 1] += 5 * np.arange(4)[:, None]  # the worst: R-hat about 5
    functions[0, :, 3, 0] += 2  # the next
    kernel = RNG.normal(size=(4, 60, 9)) + 4 * COPIES
    kernel[..., :5] = 0  # pruned
    return make(functions, kernel=kernel, sigma=RNG.normal(size=(4, 60)))


# ---- by layer ------------------------------------------------------------------------------------------------


def test_layer_rhat_draws_a_box_of_the_rhat_of_each_site_beside_that_of_the_function(tree):
    _, given = plt.subplots()
    ax = plots.layer_rhat(tree, ax=given)
    assert ax is given
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["kernel", "sigma", "function y"]
    assert [text.get_text() for text in ax.texts] == ["4 of 9 values", "1 value", "7 of 8 values"]
    assert [text.get_position()[1] for text in ax.texts] == list(ax.get_yticks()) == [2, 1, 0]
    expected = [
        [az.rhat(tree["posterior"]["kernel"].values[..., n]) for n in range(5, 9)],
        [az.rhat(tree["posterior"]["sigma"].values)],
        [az.rhat(tree["functions"]["y"].values[:, :, p, o]) for p in range(4) for o in range(2) if (p, o) != (0, 1)],
    ]
    assert min(expected[0]) > 1.5
    for place, values, box, color in zip((2, 1, 0), expected, ax.patches, (0, 0, 1), strict=True):
        x, y = box.get_path().vertices.T
        np.testing.assert_allclose([x.min(), x.max()], np.quantile(values, [0.25, 0.75]))
        assert y.min() < place < y.max()
        assert to_hex(box.get_facecolor()).upper() == plots.COLORS[color]
        at = [
            line
            for line in ax.get_lines()
            if line.get_label() != "_reference" and abs(line.get_ydata().mean() - place) < 0.5
        ]
        drawn = np.concatenate([line.get_xdata() for line in at])
        np.testing.assert_allclose([drawn.min(), drawn.max()], [min(values), max(values)])  # whiskers
        assert any(np.allclose(line.get_xdata(), np.median(values)) for line in at)
    assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_label() == "_reference"] == [1.01, 1.1]
    assert ax.get_xlim()[0] == pytest.approx(1.001)
    assert ax.get_xlim()[1] > max(map(max, expected))
    assert ax.get_xscale() == "function"


def test_layer_rhat_of_a_site_that_never_varies_has_a_row_without_a_box(tree):
    tree["posterior"]["sigma"] = 0 * tree["posterior"]["sigma"] + 1
    ax = plots.layer_rhat(tree)
    assert [text.get_text() for text in ax.texts] == ["4 of 9 values", "0 of 1 value", "7 of 8 values"]


def test_layer_rhat_names_what_is_wrong(tree):
    with pytest.raises(ValueError, match=r"layer_rhat: the tree has no group 'posterior'; .* Its groups: functions"):
        plots.layer_rhat(az.from_dict({"functions": {"y": np.zeros((4, 10))}}))
    with pytest.raises(ValueError, match=r"layer_rhat: the tree has no group 'functions'; .* Its groups: posterior"):
        plots.layer_rhat(az.from_dict({"posterior": {"w": np.zeros((4, 10))}}))
    with pytest.raises(ValueError, match="layer_rhat: R-hat needs at least 4 draws a chain, got 3"):
        plots.layer_rhat(tree.isel(draw=slice(3)))
    still = np.broadcast_to(np.arange(4.0)[:, None, None], (4, 60, 2))
    with pytest.raises(ValueError, match="layer_rhat: R-hat of 'w' is infinite somewhere"):
        plots.layer_rhat(make(RNG.normal(size=(4, 60, 4, 1)), w=still))


# ---- traces and ranks ----------------------------------------------------------------------------------------


def test_function_trace_is_of_the_worst_values_under_the_names_of_arviz(tree):
    picture = plots.function_trace(tree, worst=2)
    assert isinstance(picture, az.PlotCollection)
    names = list(picture.viz["plot"].data_vars)
    assert names == ["y[9, 1]", "y[11, 0]"]  # points by their coordinates
    with np.errstate(invalid="ignore"):  # of the fixed logit
        assert set(names) <= set(az.summary(tree, group="functions").index)
    for name, (point, output) in zip(names, ((2, 1), (3, 0)), strict=True):
        assert picture.viz["title"][name].item().get_text() == name
        for chain in range(4):
            line = picture.viz["trace"][name].sel(chain=chain).item()
            np.testing.assert_array_equal(line.get_ydata(), tree["functions"]["y"].values[chain, :, point, output])


def test_function_rank_is_of_the_same_values(tree):
    picture = plots.function_rank(tree, worst=3)
    names = list(picture.viz["plot"].data_vars)
    assert names[:2] == ["y[9, 1]", "y[11, 0]"]
    # the first chain is 5 below the next, and has the lowest ranks: its line rises to 3/4
    first = picture.viz["ecdf_lines"]["y[9, 1]"].sel(chain=0).item()
    assert np.ptp(first.get_ydata()) > 0.7


def test_function_trace_has_no_more_than_there_are_and_takes_arguments_for_arviz(tree):
    picture = plots.function_trace(tree, worst=100, backend="none")
    assert len(picture.viz["plot"].data_vars) == 7  # without the logit that is fixed


def test_function_trace_ranks_chains_that_stand_still_apart_first():
    functions = RNG.normal(size=(4, 60, 4, 1))
    functions[:, :, 1, 0] = np.arange(4)[:, None]
    assert list(plots.function_trace(make(functions), worst=1).viz["plot"].data_vars) == ["y[3, 0]"]


def test_function_trace_shows_divergences():
    diverging = np.zeros((4, 60), bool)
    diverging[1, 5] = True
    groups = {"functions": {"y": RNG.normal(size=(4, 60, 2))}, "sample_stats": {"diverging": diverging}}
    picture = plots.function_trace(az.from_dict(groups))
    assert "divergence" in picture.viz.children


@pytest.mark.parametrize("function", [plots.function_trace, plots.function_rank])
def test_function_trace_and_rank_name_what_is_wrong(tree, function):
    name = function.__name__
    with pytest.raises(ValueError, match=f"{name}: the tree has no group 'functions'; make it by numpyro_bdl.to_data"):
        function(az.from_dict({"posterior": {"w": np.zeros((4, 10))}}))
    with pytest.raises(ValueError, match=f"{name}: worst must be an integer of at least 1, got 0"):
        function(tree, worst=0)
    with pytest.raises(ValueError, match=f"{name}: every function value is the same in all draws"):
        function(make(np.ones((4, 60, 4, 1))))
    bad = RNG.normal(size=(4, 60, 4, 1))
    bad[2, 30:] = np.nan
    with pytest.raises(ValueError, match=rf"{name}: the chains \[2\] have values of 'y' that are not finite; leave"):
        function(make(bad))
    with pytest.raises(ValueError, match=f"{name}: R-hat needs at least 4 draws a chain, got 1"):
        function(tree.isel(draw=slice(1)))


# ---- a single chain, and constant values -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["function_rhat", "layer_rhat", "function_rank"])
def test_a_single_chain_has_no_rhat(tree, name):
    with pytest.raises(ValueError, match=f"{name}: R-hat compares chains and needs at least 2, got 1"):
        getattr(plots, name)(tree.isel(chain=[0]))


def test_the_first_values_of_a_single_chain_are_traced(tree):
    picture = plots.function_trace(tree.isel(chain=[0]), worst=2)
    assert list(picture.viz["plot"].data_vars) == ["y[7, 0]", "y[3, 0]"]  # y[7, 1] is fixed


def test_constant_function_values_are_left_out_and_counted(tree):
    with pytest.warns(UserWarning, match="1 of 8 function values of SGLD are the same in all draws, and left out"):
        ax = plots.function_rhat({"SGLD": tree})
    assert len(ax.get_lines()[0].get_xdata()) == 7
    constant = tree.copy()
    constant["functions"]["y"] = 0 * tree["functions"]["y"]
    with pytest.raises(ValueError, match="every function value of SGLD is the same in all draws"):
        plots.function_rhat({"SGLD": constant})


def test_no_tree_at_all_is_refused():
    with pytest.raises(ValueError, match="expected at least one tree, got none"):
        plots.function_rhat({})
