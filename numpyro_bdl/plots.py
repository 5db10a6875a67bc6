# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of predictions, of their convergence, and of what was selected and pruned.

Each function draws into an ``ax``, or a new one, and returns it; what else a figure needs is for matplotlib to do. The
colours are those of Okabe and Ito, which people with colour blindness can tell apart. Matplotlib (the extra ``plots``)
is loaded when something is drawn.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int
from xarray import DataTree

from numpyro_bdl import metrics
from numpyro_bdl._chain_plots import functional_modes as functional_modes
from numpyro_bdl._chain_plots import weights_raw_and_folded as weights_raw_and_folded
from numpyro_bdl._checks import check_integer
from numpyro_bdl._plot_style import COLORS, LINES, MARKERS, REFERENCE, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOWEST_EXCESS = 1e-3
_RHAT_TICKS = (1.001, 1.01, 1.1, 2, 11, 101)
_MOST_NAMES = 20  # of groups in a legend


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
    if not _has(ax, "_calibrated"):
        ax.plot([0, 1], [0, 1], label="_calibrated", **REFERENCE)
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
    ax = new_axes(ax)
    if not _has(ax, "_reference"):
        for level in (1.01, 1.1):
            ax.axvline(level, label="_reference", linestyle="--", **REFERENCE)
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


def layer_sparsity(masks: Mapping[str, Bool[ArrayLike, "chain ..."]], ax: "Axes | None" = None) -> "Axes":
    """Share of the weights that was pruned, a bar for each site, with how many were kept beside it.

    A bar is the mean over chains, the black line on it their range. The dashed line stands at the share of all sites
    together.

    :param masks: By site, True where a weight was kept, (chain, ...), as of
        :func:`pruning.masks <numpyro_bdl.pruning.masks>`.
    :param ax: Axes to draw into; None for new ones.
    :return: The axes.
    :raises ValueError: if there is no site, a mask has no axes but that of the chains, or is not of booleans.

    **Example**

    .. doctest::

        >>> import matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> ax = plots.layer_sparsity({"w": np.array([[True, False, False, False]])})
        >>> [text.get_text() for text in ax.texts]
        ['1 of 4 kept']
    """
    kept = {name: np.asarray(mask) for name, mask in masks.items()}
    if not kept:
        raise ValueError("layer_sparsity: there is no mask to draw.")
    for name, mask in kept.items():
        if mask.dtype != bool or mask.ndim < 2 or not mask.size:
            raise ValueError(
                f"layer_sparsity: the mask of '{name}' must be an array (chain, ...) of booleans, as of"
                f" pruning.masks(mcmc); got {mask.dtype} of shape {mask.shape}."
            )
    ax = new_axes(ax)
    sizes = [mask[0].size for mask in kept.values()]
    counts = [mask.reshape(len(mask), -1).sum(1) for mask in kept.values()]
    shares = [1 - count / size for count, size in zip(counts, sizes, strict=True)]
    rows, height = np.arange(len(kept))[::-1], max(len(kept), 3) + 0.2  # a bar alone would else fill the axes
    ax.barh(rows, [share.mean() for share in shares], 0.7, color=COLORS[0], alpha=0.8, linewidth=0)
    for row, share, count, size in zip(rows, shares, counts, sizes, strict=True):
        least, most = count.min(), count.max()
        if least < most:
            ax.plot([share.min(), share.max()], [row, row], color="black", linewidth=1.5, marker="|", label="_range")
        number = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        beside: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 8}
        ax.text(1.02, float(row), f"{number} of {size:,} kept", **beside)
    if len(kept) > 1:
        together = 1 - sum(count.mean() for count in counts) / sum(sizes)
        ax.axvline(together, label="_reference", linestyle="--", **REFERENCE | {"zorder": 3})
    ax.set(
        title="Sparsity",
        xlabel="share of weights pruned",
        ylabel="site",
        yticks=rows,
        yticklabels=list(kept),
        xlim=(0, 1),
        ylim=((len(kept) - 1 - height) / 2, (len(kept) - 1 + height) / 2),
    )
    ax.tick_params(axis="y", length=0)
    return ax


def inclusion_path(
    inclusion: Float[ArrayLike, "... draw group"],
    ax: "Axes | None" = None,
    names: Sequence[str] | None = None,
    average: int | None = None,
    num_warmup: int = 0,
) -> "Axes":
    """Inclusion probability of each group along the draws.

    A line is the running mean of one group in one chain. Groups that end above 1/2, in the mean over chains, have a
    colour and a name for the legend (the 20 surest of them); the others are thin and grey.

    :param inclusion: Inclusion probabilities, (draw, group), or (chain, draw, ...), as of
        :func:`~numpyro_bdl.inclusion_probabilities`.
    :param ax: Axes to draw into; None for new ones.
    :param names: A name for each group; None for its index or indices.
    :param average: Draws of which the running mean is taken; None for a twentieth of them. 1 shows every draw.
    :param num_warmup: How many of the draws, the first ones, are of warm-up. They are counted to 0, where a dashed line
        stands.
    :return: The axes.
    :raises ValueError: if the shapes do not match, a number is not in its range, or a probability is not in [0, 1].

    **Example**

    .. doctest::

        >>> import matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> path = np.array([[0.5, 0.5, 0.5], [0.9, 0.4, 0.1], [1.0, 0.2, 0.0]])
        >>> ax = plots.inclusion_path(path, names=["age", "height", "weight"])
        >>> ax.get_legend_handles_labels()[1]
        ['age', '2 others']
    """
    from matplotlib.collections import LineCollection

    p, labels = _by_group(inclusion, names)
    draws = p.shape[1]
    average = max(draws // 20, 1) if average is None else average
    check_integer("inclusion_path", "average", average)
    check_integer("inclusion_path", "num_warmup", num_warmup, least=0)
    if num_warmup > draws:
        raise ValueError(f"inclusion_path: num_warmup={num_warmup} is more than the {draws} draws.")
    path, x = _running_mean(p, average), np.arange(draws) + 1 - num_warmup
    end = path[:, -1].mean(0)
    included = [n for n in np.argsort(-end, kind="stable") if end[n] > 0.5]
    ax = new_axes(ax)
    rest = np.delete(path, included, axis=2).transpose(0, 2, 1).reshape(-1, draws)
    for rank, n in enumerate(included):
        color, style = COLORS[rank % len(COLORS)], LINES[(rank + rank // len(COLORS)) % len(LINES)]
        for chain, line in enumerate(path[..., n]):
            label = labels[n] if chain == 0 and rank < _MOST_NAMES else "_chain"
            ax.plot(x, line, label=label, color=color, linestyle=style, linewidth=1.4)
    if len(rest):
        lines = list(np.stack([np.broadcast_to(x, rest.shape), rest], -1))
        label = f"{len(labels) - len(included):,} {'others' if included else 'groups'}"
        grey = "0.65" if len(rest) < 100 else "0.8"
        ax.add_collection(LineCollection(lines, label=label, color=grey, linewidth=0.6, zorder=1))
    ax.axhline(0.5, label="_reference", linestyle="--", **REFERENCE)
    if num_warmup:
        ax.axvline(0, label="_reference", linestyle="--", **REFERENCE)
    ax.set(
        title="Inclusion",
        xlabel="draw",
        ylabel="inclusion probability",
        xlim=(x[0], max(x[-1], x[0] + 1)),
        ylim=(-0.02, 1.02),
    )
    return ax


def _by_group(
    inclusion: Float[ArrayLike, "... draw group"], names: Sequence[str] | None
) -> tuple[Float[np.ndarray, "chain draw group"], list[str]]:
    """Inclusion probabilities with one axis of groups, and the names of these."""
    p = np.asarray(inclusion, float)
    if p.ndim < 2 or not p.size:
        raise ValueError(
            f"inclusion_path: expected probabilities (draw, group) or (chain, draw, ...), got shape {p.shape}."
        )
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("inclusion_path: a probability is not in [0, 1]; is a chain NaN?")
    p = p[None] if p.ndim == 2 else p
    labels = [",".join(map(str, index)) for index in np.ndindex(p.shape[2:])] if names is None else list(names)
    p = p.reshape(*p.shape[:2], -1)
    if len(labels) != p.shape[2]:
        raise ValueError(f"inclusion_path: got {len(labels)} names for {p.shape[2]} groups.")
    return p, labels


def _running_mean(p: Float[np.ndarray, "chain draw group"], average: int) -> Float[np.ndarray, "chain draw group"]:
    """Mean of each draw and those before it, up to so many."""
    total = np.cumsum(np.concatenate([np.zeros_like(p[:, :1]), p], 1), 1)
    last = np.arange(1, p.shape[1] + 1)
    first = np.maximum(last - average, 0)
    return (total[:, last] - total[:, first]) / (last - first)[:, None]


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


def _has(ax: "Axes", label: str) -> bool:
    return any(line.get_label() == label for line in ax.get_lines())


def _style(ax: "Axes") -> tuple[dict, str]:
    """Colour and line, and the marker, of the next method."""
    n = sum(line.get_label() not in ("_calibrated", "_reference") for line in ax.get_lines())
    style = {"color": COLORS[n % len(COLORS)], "linestyle": LINES[n % len(LINES)]}
    return style, MARKERS[n % len(MARKERS)]
