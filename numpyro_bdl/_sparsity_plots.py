# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of what was selected and pruned."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike, Bool, Float

from numpyro_bdl._checks import check_integer
from numpyro_bdl._plot_style import COLORS, LINES, REFERENCE, new_axes, next_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NAMES = 20  # of groups in a legend


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
    path, x = _running_mean(p, average), _draw_numbers("inclusion_path", draws, num_warmup)
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
    _draw_axis(ax, x)
    ax.set(title="Inclusion", ylabel="inclusion probability", ylim=(-0.02, 1.02))
    return ax


def sparsity_path(
    inclusion: Mapping[str, Float[ArrayLike, "chain draw ..."]], ax: "Axes | None" = None, num_warmup: int = 0
) -> "Axes":
    r"""Share of the groups that are excluded, expected under their probabilities, along the draws.

    .. math::

        1 - \frac1G \sum_{g=1}^G p_g

    for each site, by chain in thin lines and their mean in a thick one. Of masks it is the share that is pruned. A
    further call on the same ``ax`` adds sites in the next colours.

    :param inclusion: By site, inclusion probabilities (chain, draw, ...), as of
        :func:`~numpyro_bdl.inclusion_probabilities` or the field ``inclusion``, or masks with 1 for what is kept. Of
        the field ``sparsity`` of a run that prunes, (chain, draw), hand in ``1 - sparsity``.
    :param ax: Axes to draw into; None for new ones.
    :param num_warmup: How many of the draws, the first ones, are of warm-up. They are counted to 0, where a dashed line
        stands.
    :return: The axes.
    :raises ValueError: if the shapes do not match, a number is not in its range, or a probability is not in [0, 1].

    **Example**

    .. doctest::

        >>> import matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> p = np.array([[[0.5, 0.5, 0.5], [0.9, 0.4, 0.2], [1.0, 0.2, 0.0]]])            # (chain, draw, group)
        >>> plots.sparsity_path({"w": p}).get_lines()[0].get_ydata().round(2).tolist()
        [0.5, 0.5, 0.6]
    """
    if not inclusion:
        raise ValueError("sparsity_path: there is no site to draw.")
    excluded = {}
    for name, value in inclusion.items():
        p = _probabilities("sparsity_path", np.asarray(value, float), f"'{name}' (chain, draw, ...)")
        excluded[name] = 1 - p.reshape(*p.shape[:2], -1).mean(-1)
    lengths = {share.shape[1] for share in excluded.values()}
    if len(lengths) > 1:
        raise ValueError(f"sparsity_path: expected as many draws of each site, got {sorted(lengths)}.")
    x, ax = _draw_numbers("sparsity_path", *lengths, num_warmup), new_axes(ax)
    for name, share in excluded.items():
        style, _ = next_style(ax)
        if len(share) > 1:
            for chain in share:
                ax.plot(x, chain, label="_chain", linewidth=0.7, alpha=0.5, color=style["color"])
        ax.plot(x, share.mean(0), label=name, linewidth=1.8, **style)
    _draw_axis(ax, x)
    ax.set(title="Sparsity path", ylabel="share of groups excluded", ylim=(-0.02, 1.02))
    return ax


def _probabilities(owner: str, p: Float[np.ndarray, "..."], expected: str) -> Float[np.ndarray, "..."]:
    """Numbers in [0, 1] with at least two axes."""
    if p.ndim < 2 or not p.size:
        raise ValueError(f"{owner}: expected probabilities {expected}, got shape {p.shape}.")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"{owner}: a probability is not in [0, 1]; is a chain NaN?")
    return p


def _draw_numbers(owner: str, draws: int, num_warmup: int) -> np.ndarray:
    """Numbers of draws, that of the last of warm-up being 0."""
    check_integer(owner, "num_warmup", num_warmup, least=0)
    if num_warmup > draws:
        raise ValueError(f"{owner}: num_warmup={num_warmup} is more than the {draws} draws.")
    return np.arange(draws) + 1 - num_warmup


def _draw_axis(ax: "Axes", x: np.ndarray) -> None:
    if x[0] < 1:
        ax.axvline(0, label="_reference", linestyle="--", **REFERENCE)
    ax.set(xlabel="draw", xlim=(x[0], max(x[-1], x[0] + 1)))


def _by_group(
    inclusion: Float[ArrayLike, "... draw group"], names: Sequence[str] | None
) -> tuple[Float[np.ndarray, "chain draw group"], list[str]]:
    """Inclusion probabilities with one axis of groups, and the names of these."""
    p = _probabilities("inclusion_path", np.asarray(inclusion, float), "(draw, group) or (chain, draw, ...)")
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
