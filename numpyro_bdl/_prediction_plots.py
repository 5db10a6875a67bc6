# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of predictions: are they right where they are sure, and which rows do they hand back?"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike, Float, Int

from numpyro_bdl import detection, metrics
from numpyro_bdl._plot_style import COLORS, REFERENCE, has_line, new_axes, next_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMALL = 0.05  # coverage below which a risk may leave the axes


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
    ax = new_axes(ax)
    if not has_line(ax, "_calibrated"):
        ax.plot([0, 1], [0, 1], label="_calibrated", **REFERENCE)
        ax.set(title="Reliability", xlabel="confidence", ylabel="accuracy")
        ax.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    style, marker = next_style(ax)
    x, y, size = confidence[filled], accuracy[filled], 10 + 150 * share[filled]
    ax.plot(x, y, alpha=0.4, **style)
    ax.scatter(x, y, size, style["color"], marker=marker, label=label, alpha=0.8, linewidth=0)
    return ax


def risk_coverage(
    losses: Float[ArrayLike, " row"],
    scores: Float[ArrayLike, " row"],
    ax: "Axes | None" = None,
    label: str | None = None,
) -> "Axes":
    """Risk of selective prediction: the mean loss of the rows that are kept, against their share.

    Rows are kept in the order of a score of uncertainty, the surest first, as in
    :func:`detection.risk_coverage <numpyro_bdl.detection.risk_coverage>`. The thin lines are the bounds of what a score
    can do: dotted, the mean loss, to which a random order leads; dashed, the order of the losses themselves. The name
    for the legend has the area under the curve (AURC) behind it. The axis ends where all that is seen at a coverage of
    at least 5 % has room, since the mean of few rows is noise. A further call on the same ``ax`` adds a curve in the
    next colour.

    :param losses: (row,): of a classifier, ``probabilities.argmax(-1) != labels``; in regression, squared errors.
    :param scores: (row,), larger where less certain: of a classifier, ``1 - probabilities.max(-1)`` or an entropy of
        :mod:`numpyro_bdl.uncertainty`; in regression, the standard deviation of the predictive.
    :param ax: Axes to draw into; None for new ones.
    :param label: Name for the legend.
    :return: The axes.
    :raises ValueError: for shapes that don't fit, losses that are not finite, or scores that are NaN.

    **Example**

    .. doctest::

        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> ax = plots.risk_coverage(losses=[0, 0, 1, 0], scores=[0.1, 0.2, 0.4, 0.3], label="SGLD")
        >>> ax.get_legend_handles_labels()[1]
        ['SGLD (AURC 0.0625)']
    """
    curve, best = detection.risk_coverage(losses, scores), detection.risk_coverage(losses, losses)
    ax = new_axes(ax)
    style, _ = next_style(ax)
    name = f"{label} (AURC {curve.area:.3g})" if label else f"AURC {curve.area:.3g}"
    ax.plot(curve.coverage, curve.risk, label=name, **style)
    thin: dict[str, Any] = {"color": style["color"], "linewidth": 0.9, "alpha": 0.6, "zorder": 1}
    ax.plot(best.coverage, best.risk, label="_oracle", linestyle="--", **thin)
    ax.plot([0, 1], [curve.risk[-1]] * 2, label="_random", linestyle=":", **thin)
    shown = [np.asarray(line.get_ydata())[np.asarray(line.get_xdata()) >= _SMALL] for line in ax.get_lines()]
    low, high = min(0.0, *map(np.min, shown)), max(map(np.max, shown))
    ax.set(title="Selective prediction", xlabel="coverage: share of rows kept", ylabel="risk: mean loss of these rows")
    ax.set(xlim=(0, 1), ylim=(low, high + 0.05 * (high - low) or 1.0))
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
    ax = new_axes(ax)
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
