# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of the energy around draws."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import ArrayLike, Float

from numpyro_bdl._loss_slice import LossSlice
from numpyro_bdl._plot_style import COLORS, MARKERS, REFERENCE, has_line, new_axes, next_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = 12


def loss_slice(
    slices: LossSlice | Sequence[LossSlice] | Mapping[str, LossSlice | Sequence[LossSlice]], ax: "Axes | None" = None
) -> "Axes":
    """The energy of the data along directions, against the distance from the center of each.

    A colour for each name, a line for each of its directions. A dashed line and dots stand at the centers. Where the
    energy is not finite a line has a gap. A further call on the same ``ax`` adds names in the next colours.

    **Lines compare kernels only along filter-normalized directions**, and of one model; see the head of
    :mod:`numpyro_bdl.flatness`.

    :param slices: What :func:`flatness.loss_slice <numpyro_bdl.flatness.loss_slice>` returned along one direction;
        several of them; or either by name, as of the kernels whose draws are the centers.
    :param ax: Axes to draw into; None for new ones.
    :return: The axes.
    :raises ValueError: if there is nothing to draw, a slice is of two directions, or its energy is nowhere finite.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, matplotlib
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import flatness, plots
        >>> center, direction = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
        >>> along = flatness.loss_slice(lambda z: (z["w"] ** 2).sum(), center, [direction], points=5)
        >>> plots.loss_slice({"SGLD": along}).get_lines()[0].get_ydata().tolist()
        [2.0, 0.5, 0.0, 0.5, 2.0]
    """
    named = {name: [of] if isinstance(of, LossSlice) else list(of) for name, of in _by_name(slices).items()}
    if not any(named.values()):
        raise ValueError("loss_slice: there is no slice to draw.")
    for name, directions in named.items():
        for direction in directions:
            _check(direction, 1, f"loss_slice: a slice{f' of {name!r}' if name else ''}", "loss_plane")
    ax = new_axes(ax)
    for name, directions in named.items():
        style, _ = next_style(ax)
        for n, (distance, energy) in enumerate(directions):
            finite = np.where(np.isfinite(energy), energy, np.nan)
            ax.plot(distance, finite, label="_direction" if n else name, **style)
            center = distance == 0
            ax.plot(distance[center], finite[center], "o", label="_center", color=style["color"], markersize=4)
    if not has_line(ax, "_reference"):
        ax.axvline(0, label="_reference", linestyle="--", **REFERENCE)
    ax.set(title="Loss slice", xlabel="distance, in multiples of the direction", ylabel="energy of the data (nats)")
    return ax


def loss_plane(
    plane: LossSlice,
    points: Mapping[str, Float[ArrayLike, "... 2"]] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""The energy of the data over the plane of two directions, in contours, with named points.

    The levels grow with the square of their number, so that the contours around a minimum are evenly spaced. A cross
    stands at the center. Where the energy is not finite the plane is empty.

    For a plane through a draw of each of three kernels, a, b and c, take a as the center and ``[b - a, c - a]`` as the
    directions; their points are then (0, 0), (1, 0) and (0, 1).

    :param plane: What :func:`flatness.loss_slice <numpyro_bdl.flatness.loss_slice>` returned along two directions.
    :param points: By name, multiples of the two directions, (2,), or several of them, (point, 2).
    :param ax: Axes to draw into; None for new ones.
    :return: The axes.
    :raises ValueError: for a slice along one direction, points of another shape or not finite, or an energy that is
        nowhere finite.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, matplotlib
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import flatness, plots
        >>> axes = [{"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}]
        >>> plane = flatness.loss_slice(lambda z: (z["w"] ** 2).sum(), {"w": jnp.zeros(2)}, axes, points=5)
        >>> plots.loss_plane(plane, {"SGLD": (0.5, 0.0)}).get_legend_handles_labels()[1]
        ['SGLD']
    """
    _check(plane, 2, "loss_plane: the slice", "loss_slice")
    placed = {name: np.asarray(at, float) for name, at in (points or {}).items()}
    for name, at in placed.items():
        if at.ndim not in (1, 2) or at.shape[-1] != 2 or not np.isfinite(at).all():
            raise ValueError(
                f"loss_plane: expected the points of '{name}' as finite numbers (2,) or (point, 2), got {at.tolist()}."
            )
    ax = new_axes(ax)
    energy = np.ma.masked_invalid(np.asarray(plane.energy, float).T)  # rows of a picture run along its second axis
    low, high = energy.min(), energy.max()
    height = max(high - low, 1e-6 * abs(high)) or 1.0  # levels must differ in floating point
    levels = low + height * np.linspace(0, 1, _LEVELS) ** 2
    filled = ax.contourf(plane.coordinates, plane.coordinates, energy, levels, cmap="cividis")
    ax.figure.colorbar(filled, ax=ax, label="energy of the data (nats)", format="%.3g")
    ax.plot(0, 0, "+", color="white", markersize=9, label="_center")
    for n, (name, at) in enumerate(placed.items()):
        marker, color = MARKERS[n % len(MARKERS)], COLORS[n % len(COLORS)]
        ax.scatter(*at.reshape(-1, 2).T, 36, color, marker=marker, label=name, edgecolors="white", zorder=3)
    ax.set(title="Loss plane", xlabel="multiples of the first direction", ylabel="multiples of the second direction")
    return ax


def _by_name(slices) -> Mapping[str | None, LossSlice | Sequence[LossSlice]]:
    return slices if isinstance(slices, Mapping) else {None: slices}


def _check(found: LossSlice, directions: int, what: str, other: str) -> None:
    if not isinstance(found, LossSlice) or np.ndim(found.energy) != directions:
        kind = f"energies of shape {found.energy.shape}" if isinstance(found, LossSlice) else type(found).__name__
        raise ValueError(
            f"{what} must be one of flatness.loss_slice along {'one direction' if directions == 1 else 'two'}, got"
            f" {kind}; plots.{other} draws the other kind."
        )
    if not np.isfinite(found.energy).any():
        raise ValueError(f"{what} has no finite energy; take a smaller radius, and look at the center.")
