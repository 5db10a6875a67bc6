# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Slices and planes show the energies where these were taken."""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from numpyro_bdl import plots
from numpyro_bdl.flatness import LossSlice, loss_slice

T = np.linspace(-1, 1, 5)


def along(curvature, height=0.0):
    return LossSlice(T, height + curvature * T**2)


def lines(ax, *labels):
    return [line for line in ax.get_lines() if line.get_label() in labels]


def plane_of(radius=1.0, points=41):
    """A bowl around (0.5, 0), four times as steep along the second direction."""
    energy = lambda z: (z["w"][0] - 0.5) ** 2 + 4 * z["w"][1] ** 2
    directions = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
    return loss_slice(energy, {"w": jnp.zeros(2)}, directions, radius=radius, points=points)


# ---- slices --------------------------------------------------------------------------------------------------


def test_loss_slice_draws_the_energy_along_each_direction_in_the_colour_of_its_name():
    _, given = plt.subplots()
    slices = {"SGLD": [along(1), along(3, 1)], "FlatBasinSGLD": along(0.5)}
    ax = plots.loss_slice(slices, ax=given)
    assert ax is given
    found = lines(ax, "SGLD", "_direction", "FlatBasinSGLD")
    expected = [T**2, 1 + 3 * T**2, 0.5 * T**2]
    for line, energy, color in zip(found, expected, (0, 0, 1), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([T, energy], 1))
        assert line.get_color() == plots.COLORS[color]
    centers = [line.get_xydata().tolist() for line in lines(ax, "_center")]
    assert centers == [[[0, 0]], [[0, 1]], [[0, 0]]]
    assert [line.get_xdata()[0] for line in lines(ax, "_reference")] == [0]
    assert ax.get_legend_handles_labels()[1] == ["SGLD", "FlatBasinSGLD"]
    plots.loss_slice({"NUTS": along(2)}, ax=ax)
    assert lines(ax, "NUTS")[0].get_color() == plots.COLORS[2]
    assert len(lines(ax, "_reference")) == 1


def test_loss_slice_takes_one_or_several_without_a_name():
    assert len(plots.loss_slice(along(1)).get_lines()) == 3  # the line, its center, the reference
    ax = plots.loss_slice([along(1), along(2)])
    plots.loss_slice(along(3), ax=ax)
    np.testing.assert_array_equal(ax.get_lines()[-2].get_ydata(), 3 * T**2)
    assert ax.get_lines()[-2].get_color() == plots.COLORS[1]
    assert not ax.get_legend_handles_labels()[1]


def test_loss_slice_has_a_gap_where_the_energy_is_not_finite():
    energy = np.array([np.inf, 1, np.nan, 1, 2])
    line, center, _ = plots.loss_slice(LossSlice(T, energy)).get_lines()
    np.testing.assert_array_equal(line.get_ydata(), [np.nan, 1, np.nan, 1, 2])
    assert np.isnan(center.get_ydata()).all()


def test_loss_slice_without_a_point_at_the_center_marks_none():
    even = np.linspace(-1, 1, 4)
    (center,) = lines(plots.loss_slice(LossSlice(even, even**2)), "_center")
    assert not len(center.get_xdata())


@pytest.mark.parametrize("nothing", [{}, [], {"SGLD": []}])
def test_loss_slice_of_nothing_is_refused(nothing):
    with pytest.raises(ValueError, match="loss_slice: there is no slice to draw"):
        plots.loss_slice(nothing)


def test_loss_slice_names_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"slice of 'a' must be .* along one direction, got energies of shape \(41, 41"
    ):
        plots.loss_slice({"a": plane_of()})
    with pytest.raises(
        ValueError, match="a slice must be one of flatness.loss_slice .*, got ndarray; plots.loss_plane"
    ):
        plots.loss_slice([T**2])
    with pytest.raises(ValueError, match="a slice of 'a' has no finite energy; take a smaller radius"):
        plots.loss_slice({"a": LossSlice(T, np.full(5, np.nan))})


# ---- planes --------------------------------------------------------------------------------------------------


def test_loss_plane_has_its_contours_where_the_energy_has_their_level():
    _, given = plt.subplots()
    ax = plots.loss_plane(plane_of(), ax=given)
    assert ax is given
    (contours,) = (c for c in ax.collections if hasattr(c, "levels"))
    low, high = 0, 1.5**2 + 4
    np.testing.assert_allclose(contours.levels, low + (high - low) * np.linspace(0, 1, 12) ** 2, atol=1e-3)
    for level, upper, path in zip(contours.levels, contours.levels[1:], contours.get_paths(), strict=False):
        x, y = path.vertices.T
        inside = (np.abs(x) < 0.99) & (np.abs(y) < 0.99)  # the rest is the frame
        energy = ((x - 0.5) ** 2 + 4 * y**2)[inside]
        assert (np.minimum(abs(energy - level), abs(energy - upper)) < 0.02).all()
        assert inside.any()
        if upper > 0.4:
            break
    ((cross,),) = [lines(ax, "_center")]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (0, 0)


def test_loss_plane_marks_points_by_name():
    ax = plots.loss_plane(plane_of(), {"SGLD": (0.5, 0), "NUTS": [(0, 1), (1, 0), (0.2, 0.1)]})
    handles, names = ax.get_legend_handles_labels()
    assert names == ["SGLD", "NUTS"]
    np.testing.assert_array_equal(handles[0].get_offsets(), [(0.5, 0)])
    np.testing.assert_array_equal(handles[1].get_offsets(), [(0, 1), (1, 0), (0.2, 0.1)])
    assert [to_hex(handle.get_facecolor()[0]).upper() for handle in handles] == list(plots.COLORS[:2])


def test_loss_plane_of_a_constant_or_partly_infinite_energy_can_be_drawn(tmp_path):
    flat = LossSlice(T, np.full((5, 5), 3.0))
    holes = LossSlice(T, np.where(np.add.outer(T, T) > 0.5, np.inf, np.add.outer(T**2, T**2)))
    for plane in (flat, holes):
        plots.loss_plane(plane).figure.savefig(tmp_path / "plane.png")
    (contours,) = (c for c in plt.gcf().axes[0].collections if hasattr(c, "levels"))
    assert contours.levels[-1] == pytest.approx(2)


def test_loss_plane_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"must be .* along two, got energies of shape \(5,\); plots.loss_slice draws"):
        plots.loss_plane(along(1))
    with pytest.raises(
        ValueError, match=r"points of 'a' as finite numbers \(2,\) or \(point, 2\), got \[1.0, 2.0, 3.0\]"
    ):
        plots.loss_plane(plane_of(), {"a": (1, 2, 3)})
    with pytest.raises(ValueError, match=r"points of 'a' as finite numbers .*, got \[nan, 0.0\]"):
        plots.loss_plane(plane_of(), {"a": (np.nan, 0)})
    with pytest.raises(ValueError, match="the slice has no finite energy"):
        plots.loss_plane(LossSlice(T, np.full((5, 5), np.inf)))


def test_loss_plane_of_energies_that_differ_by_rounding_is_drawn():
    plane = plane_of(points=5)
    energy = np.full((5, 5), 1e9)
    energy[0, 0] = np.nextafter(1e9, np.inf)
    assert plots.loss_plane(plane._replace(energy=energy)).get_title() == "Loss plane"
