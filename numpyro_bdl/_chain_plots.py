# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of where chains are: in which functional mode, and in which copy of the network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike, Float

from numpyro_bdl._plot_style import COLORS, LINES, MARKERS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from numpyro_bdl.symmetry.chains import FunctionalModes

_MOST_NAMES = 20  # of modes or chains in a legend
_STRIP = 0.8  # width of the chains of one weight


def functional_modes(
    modes: "FunctionalModes", x: Float[ArrayLike, " point"] | None = None, ax: "Axes | None" = None
) -> "Axes":
    """The functional modes of a run: the mean function of each chain over x, in the colour of its mode.

    Without x, for inputs of more dimensions, the distances of the chains are drawn instead, in the order of the modes,
    with lines between these. The colours end at three times the distance within which chains share a mode.

    :param modes: What :func:`symmetry.functional_modes <numpyro_bdl.symmetry.functional_modes>` returned.
    :param x: Probe inputs of the functions, (point,), in any order.
    :param ax: Axes to draw into; None for new ones.
    :return: The axes.
    :raises ValueError: if x does not fit the functions, or these have several sites or outputs.

    **Example**

    .. doctest::

        >>> import matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> from numpyro_bdl.symmetry import functional_modes
        >>> x = np.linspace(0, 1, 20)
        >>> means = np.array([-1, 1, 1])[:, None, None] * x
        >>> modes = functional_modes(means + 0.1 * np.random.default_rng(0).normal(size=(3, 100, 20)))
        >>> plots.functional_modes(modes, x).get_legend_handles_labels()[1]
        ['mode 0: 2 of 3 chains', 'mode 1: 1 of 3 chains']
    """
    if x is None:
        return _distance_matrix(modes, new_axes(ax))
    x, means = np.ravel(np.asarray(x)), list(modes.means.values())
    values = means[0].reshape(len(means[0]), -1)
    if len(means) > 1 or values.shape[1] != len(x):
        shapes = ", ".join(f"{name} {mean.shape[1:]}" for name, mean in modes.means.items())
        raise ValueError(
            f"functional_modes draws one function with one output over the {len(x)} inputs of x, got {shapes}; hand the"
            " values of one output at x to symmetry.functional_modes, or leave x out."
        )
    ax, order, chains = new_axes(ax), np.argsort(x), modes.sizes.sum()
    for mode, size in enumerate(modes.sizes):
        style: dict[str, Any] = {
            "color": COLORS[mode % len(COLORS)],
            "linestyle": LINES[mode // len(COLORS) % len(LINES)],
        }
        for n, chain in enumerate(np.flatnonzero(modes.labels == mode)):
            label = "_chain" if n or mode >= _MOST_NAMES else f"mode {mode}: {size} of {chains} chains"
            ax.plot(x[order], values[chain][order], label=label, linewidth=1.3, alpha=0.8, **style)
    ax.set(title="Functional modes", xlabel="input", ylabel="mean function of each chain")
    return ax


def weights_raw_and_folded(
    raw: Float[ArrayLike, "chain draw weight"],
    folded: Float[ArrayLike, "chain draw weight"],
    names: Sequence[str] | None = None,
    axes: "Sequence[Axes] | None" = None,
) -> "tuple[Axes, Axes]":
    """Draws of some weights before and after they were mapped to the reference set, side by side, in colours by chain.

    Two weights span a plane. One, or more than two, stand beside each other, the draws of each chain in a strip.

    :param raw: Draws of the chosen weights, (chain, draw, weight).
    :param folded: The same draws, folded.
    :param names: A name for each weight; None for its index.
    :param axes: Two axes to draw into; None for new ones.
    :return: The axes.
    :raises ValueError: if the shapes do not match.

    **Example**

    .. doctest::

        >>> import matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> raw = np.random.default_rng(0).normal(size=(4, 100, 2))
        >>> left, right = plots.weights_raw_and_folded(raw, np.abs(raw), names=["bias 1", "bias 2"])
        >>> left.get_xlabel(), right.get_title()
        ('bias 1', 'folded')
    """
    raw, folded = np.asarray(raw, float), np.asarray(folded, float)
    if raw.ndim != 3 or raw.shape != folded.shape or not raw.size:
        raise ValueError(
            "weights_raw_and_folded: expected the same draws twice, (chain, draw, weight), got shapes"
            f" {raw.shape} and {folded.shape}."
        )
    labels = [str(n) for n in range(raw.shape[2])] if names is None else list(names)
    if len(labels) != raw.shape[2]:
        raise ValueError(f"weights_raw_and_folded: got {len(labels)} names for {raw.shape[2]} weights.")
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2, sharex=True, sharey=True, layout="constrained", figsize=(9, 4.2))[1]
    left, right = axes
    for ax, draws, title in ((left, raw, "raw"), (right, folded, "folded")):
        for chain, values in enumerate(draws):
            x, y = _points(values, chain, len(draws))
            label = f"chain {chain}" if chain < _MOST_NAMES else "_chain"
            marker, color = MARKERS[chain // len(COLORS) % len(MARKERS)], COLORS[chain % len(COLORS)]
            ax.scatter(x, y, 9, color, marker=marker, label=label, alpha=0.4, linewidth=0)
        ax.set(title=title)
        if len(labels) == 2:
            ax.set(xlabel=labels[0], ylabel=labels[1])
        else:
            ax.set(xlabel="weight", ylabel="value", xticks=range(len(labels)), xticklabels=labels)
    return left, right


def _points(values: Float[np.ndarray, "draw weight"], chain: int, chains: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the draws of one chain stand."""
    if values.shape[1] == 2:
        return values[:, 0], values[:, 1]
    along = (np.arange(len(values)) + 0.5) / len(values)  # draws in their order
    strip = ((chain + along) / chains - 0.5) * _STRIP
    return (np.arange(values.shape[1]) + strip[:, None]).ravel(), values.ravel()


def _distance_matrix(modes: "FunctionalModes", ax: "Axes") -> "Axes":
    order = np.argsort(modes.labels, kind="stable")
    order = order[modes.labels[order] >= 0]
    distances = modes.distances[np.ix_(order, order)]
    image = ax.imshow(distances, cmap="cividis", vmin=0, vmax=3 * modes.separation)
    bar = ax.figure.colorbar(image, ax=ax, extend="max", label="distance in standard deviations within a chain")
    bar.ax.axhline(modes.separation, color="white")
    for edge in np.cumsum(modes.sizes)[:-1] - 0.5:
        ax.axhline(edge, color="white", label="_edge")
        ax.axvline(edge, color="white", label="_edge")
    ax.set(title="Functional modes", xlabel="chain", ylabel="chain")
    if len(order) <= _MOST_NAMES:
        ax.set(xticks=range(len(order)), xticklabels=order, yticks=range(len(order)), yticklabels=order)
    else:
        ax.set(xticks=[], yticks=[])
    return ax
