# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of predictions and of their convergence.

Each function draws into an ``ax``, or a new one, and returns it; what else a figure needs is for matplotlib to do. The
colours are those of Okabe and Ito, which people with colour blindness can tell apart. Matplotlib (the extra ``plots``)
is loaded when something is drawn.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike, Float, Int
from xarray import DataTree

from numpyro_bdl import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Blue, vermilion, green, purple, orange, sky blue, black."""
_MARKERS = "osD^vPX"
_LINES = ("-", (0, (6, 1)), (0, (3, 1)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)))
_REFERENCE: dict[str, Any] = {"color": "0.6", "linewidth": 1, "zorder": 0}

_LOWEST_EXCESS = 1e-3
_RHAT_TICKS = (1.001, 1.01, 1.1, 2, 11, 101)


def reliability(
    probabilities: Float[ArrayLike, "row class"],
    labels: Int[ArrayLike, " row"],
    ax: "Axes | None" = None,
    label: str | None = None,
    bins: int = 10,
) -> "Axes":
    """Accuracy against confidence, in bins of the confidence; on the diagonal a predictive is calibrated.

    Confidence is the largest probability. The area of a marker tells the share of the rows in its bin. A further call
    on the same ``ax`` adds a line in the next colour.

    :param probabilities: Class probabilities, (row, class).
    :param labels: True classes, (row,) integers.
    :param ax: Axes to draw into; None for new ones.
    :param label: Name for the legend.
    :param bins: Number of bins of equal width of [0, 1].
    :return: The axes.
    :raises ValueError: if the shapes do not match, or a probability is not a finite number.

    **Example**

    .. doctest::

        >>> import matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> labels = np.array([0, 1, 1, 0])
        >>> ax = plots.reliability(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]]), labels, label="MAP")
        >>> ax.get_xlabel()
        'confidence'
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            "reliability: expected probabilities (row, class) and labels (row,), got shapes"
            f" {probabilities.shape} and {labels.shape}; metrics.mean_probabilities averages draws."
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("reliability: a probability is not a finite number; is a chain among the draws NaN?")
    confidence, accuracy, share = metrics.calibration_bins(probabilities, labels, bins)
    filled = share > 0
    ax = _axes(ax)
    if not _has(ax, "_calibrated"):
        ax.plot([0, 1], [0, 1], label="_calibrated", **_REFERENCE)
        ax.set(title="Reliability", xlabel="confidence", ylabel="accuracy")
        ax.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    style, marker = _style(ax)
    x, y, size = confidence[filled], accuracy[filled], 10 + 150 * share[filled]
    ax.plot(x, y, alpha=0.4, **style)
    ax.scatter(x, y, size, style["color"], marker=marker, label=label, alpha=0.8, linewidth=0)
    return ax


def entropy_histogram(
    inside: Mapping[str, Float[ArrayLike, " row"]],
    outside: Mapping[str, Float[ArrayLike, " row"]],
    ax: "Axes | None" = None,
    bins: int = 25,
) -> "Axes":
    """Predictive entropy of rows in and out of distribution, a pair of histograms for each name.

    The less the two overlap, the better the entropy tells them apart. The heights are shares of the rows; the tallest
    bar of a name fills nine tenths of its strip.

    :param inside: Entropies of rows in distribution by name, each (row,), in nats.
    :param outside: Entropies of rows out of distribution by the same names, each (row,), in nats.
    :param ax: Axes to draw into; None for new ones.
    :param bins: Number of bins, from 0 to the largest entropy.
    :return: The axes.
    :raises ValueError: if the names differ, a name has no rows, or an entropy is not a finite number.

    **Example**

    .. doctest::

        >>> import matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> ax = plots.entropy_histogram({"SGLD": np.array([0.1, 0.2])}, {"SGLD": np.array([0.9, 1.1, 1.0])})
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['SGLD']
    """
    if set(inside) != set(outside):
        raise ValueError(
            f"entropy_histogram: both sets of rows need the same names, got {list(inside)} and {list(outside)}."
        )
    inside, outside = ({k: np.ravel(np.asarray(v)) for k, v in side.items()} for side in (inside, outside))
    for name in inside:
        if not (len(inside[name]) and len(outside[name])):
            raise ValueError(f"entropy_histogram: {name!r} has no rows in one of the two sets.")
    everything = np.concatenate([*inside.values(), *outside.values()])
    if not np.isfinite(everything).all():
        raise ValueError("entropy_histogram: an entropy is not a finite number; is a chain among the draws NaN?")
    ax = _axes(ax)
    edges = np.linspace(0, everything.max(), bins + 1)
    sides = (inside, "in distribution", COLORS[0]), (outside, "out of distribution", COLORS[1])
    names = list(inside)
    for n, name in enumerate(names):
        strip = len(names) - 1 - n
        shares = [np.histogram(values[name], edges)[0] / len(values[name]) for values, _, _ in sides]
        for share, (_, label, color) in zip(shares, sides, strict=True):
            heights = strip + 0.9 * share / np.max(shares)
            ax.stairs(heights, edges, baseline=strip, fill=True, color=color, alpha=0.45)
            ax.stairs(heights, edges, baseline=strip, color=color, label=None if n else label)
    ax.set(
        title="Predictive entropy",
        xlabel="predictive entropy (nats)",
        ylabel="share of rows",
        yticks=np.arange(len(names)) + 0.45,
        yticklabels=names[::-1],
        xlim=(0, edges[-1]),
        ylim=(0, len(names) + 0.4),  # room for a legend
    )
    ax.tick_params(axis="y", length=0)
    return ax


def function_rhat(
    trees: DataTree | ArrayLike | Mapping[str, DataTree | ArrayLike | None], ax: "Axes | None" = None
) -> "Axes":
    """Share of function values whose R-hat is at most so much, one line for each name.

    R-hat of weights means nothing under the symmetries of a network; here it is that of the group ``functions`` of
    :func:`~numpyro_bdl.to_datatree`, by :func:`arviz.rhat`. The axis is logarithmic in the excess over 1 and starts at
    1.001, where smaller values are drawn. Dashed lines stand at 1.01, the usual demand, and at 1.1.

    :param trees: Trees with a group ``functions``, or arrays of R-hat, by name; or one of them. None, for a method
        without draws, leaves out its line and keeps the colours of the others as they are in :func:`reliability`.
    :param ax: Axes to draw into; None for new ones.
    :return: The axes.
    :raises ValueError: for a tree without the group, or an R-hat that is not a number.

    **Example**

    .. doctest::

        >>> import matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> ax = plots.function_rhat({"SGLD": np.array([1.02, 1.2, 1.05])})
        >>> ax.get_xlabel()
        'R-hat'
    """
    named = trees if isinstance(trees, Mapping) and not isinstance(trees, DataTree) else {None: trees}
    ax = _axes(ax)
    if not _has(ax, "_reference"):
        for level in (1.01, 1.1):
            ax.axvline(level, label="_reference", linestyle="--", **_REFERENCE)
    for name, tree in named.items():
        values = np.sort([] if tree is None else _rhat(tree) if isinstance(tree, DataTree) else np.ravel(tree))
        if not np.isfinite(values).all():
            raise ValueError(
                f"function_rhat: R-hat of {name or 'the run'} is not a number; it needs at least 4 draws a chain, all"
                " of them finite and not all equal."
            )
        style, _ = _style(ax)
        shares = np.arange(1, len(values) + 1) / max(len(values), 1)
        ax.plot(values, shares, drawstyle="steps-post", label=name if len(values) else None, **style)
    highest = max(np.max(np.asarray(line.get_xdata(), float), initial=1.0) for line in ax.get_lines())
    end = max(highest * 1.05, 2.0)
    ax.set_xscale("function", functions=(_log_excess, _from_log_excess))
    ax.set_xticks([tick for tick in _RHAT_TICKS if tick <= end])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set(
        title="Function-space R-hat",
        xlabel="R-hat",
        ylabel="share of function values",
        xlim=(1 + _LOWEST_EXCESS, end),
        ylim=(0, 1.02),
    )
    return ax


def _rhat(tree: DataTree) -> Float[np.ndarray, " value"]:
    import arviz as az

    if "functions" not in tree.children:
        raise ValueError(
            "function_rhat: the tree has no group 'functions'; make it by numpyro_bdl.to_datatree. Its groups:"
            f" {', '.join(tree.children) or 'none'}."
        )
    rhat = az.rhat(tree, group="functions")
    return np.concatenate([np.ravel(values) for values in rhat.data_vars.values()])


def _log_excess(rhat):
    return np.log10(np.maximum(np.asarray(rhat) - 1, _LOWEST_EXCESS))


def _from_log_excess(logarithm):
    return 1 + 10 ** np.asarray(logarithm)


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def _has(ax: "Axes", label: str) -> bool:
    return any(line.get_label() == label for line in ax.get_lines())


def _style(ax: "Axes") -> tuple[dict, str]:
    """Colour and line, and the marker, of the next method."""
    n = sum(line.get_label() not in ("_calibrated", "_reference") for line in ax.get_lines())
    style = {"color": COLORS[n % len(COLORS)], "linestyle": _LINES[n % len(_LINES)]}
    return style, _MARKERS[n % len(_MARKERS)]
