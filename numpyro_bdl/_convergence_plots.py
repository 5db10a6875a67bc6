# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of convergence: R-hat of functions and of weights, and the worst function values."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import ArrayLike
from xarray import DataArray, Dataset, DataTree

from numpyro_bdl._checks import check_integer
from numpyro_bdl._plot_style import COLORS, REFERENCE, has_line, new_axes, next_style
from numpyro_bdl.diagnostics import RHAT_LEVELS

if TYPE_CHECKING:
    from arviz_plots import PlotCollection
    from matplotlib.axes import Axes

_LOWEST_EXCESS = 1e-3
_RHAT_TICKS = (1.001, 1.01, 1.1, 2, 11, 101)


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
    :raises ValueError: for a tree without the group, a single chain, fewer than 4 draws a chain, or an R-hat that is
        not a finite number.
    :warns UserWarning: for function values that are the same in all draws, which have no R-hat and are left out.

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
    if not named:
        raise ValueError("function_rhat: expected at least one tree, got none.")
    ax = new_axes(ax)
    for name, tree in named.items():
        if isinstance(tree, DataTree):
            tree = _varying(name, _finite_rhat("function_rhat", tree, "functions"))
        values = np.sort([] if tree is None else np.ravel(tree))
        if not np.isfinite(values).all():
            raise ValueError(
                f"function_rhat: R-hat of {name or 'the run'} is not a finite number; there is none of draws"
                " that are not finite, of values that never change, and of chains that each stand still."
            )
        style, _ = next_style(ax)
        shares = np.arange(1, len(values) + 1) / max(len(values), 1)
        ax.plot(values, shares, drawstyle="steps-post", label=name if len(values) else None, **style)
    _rhat_axis(ax, max(np.max(np.asarray(line.get_xdata(), float), initial=1.0) for line in ax.get_lines()))
    ax.set(title="Function-space R-hat", ylabel="share of function values", ylim=(0, 1.02))
    return ax


def _varying(name: str | None, rhat: dict[str, DataArray]) -> np.ndarray:
    """All values in a row, without those that are the same in all draws."""
    values = np.concatenate([np.ravel(found) for found in rhat.values()])
    same = np.isnan(values)
    if same.all():
        raise ValueError(f"function_rhat: every function value of {name or 'the run'} is the same in all draws.")
    if same.any():
        warnings.warn(
            f"function_rhat: {same.sum()} of {same.size} function values of {name or 'the run'} are the same in all"
            " draws, and left out.",
            stacklevel=3,
        )
    return values[~same]


def layer_rhat(tree: DataTree, ax: "Axes | None" = None) -> "Axes":
    """R-hat of the weights of each site, and beside it that of the function.

    A box spans the middle half of the values of a site, its whiskers all of them, and the line in it is the median.
    Values that are the same in all draws, as those of weights that were pruned, have no R-hat and are left out; beside
    the box stands how many there are. The axis is that of :func:`function_rhat`.

    **The boxes of weights say nothing of convergence.** Hidden units can be exchanged, and chains in different copies
    of one network disagree on each weight and agree on the function. Read the picture from its last row: if R-hat is
    small there, large ones above it show copies. What the rows of weights can show is at which layer chains are apart,
    and sites without a symmetry, as a noise scale, mean what they say. :func:`diagnostics.chainwise_rhat
    <numpyro_bdl.diagnostics.chainwise_rhat>` is what holds for weights.

    :param tree: A tree with the groups ``posterior`` and ``functions``, of :func:`~numpyro_bdl.to_datatree`.
    :param ax: Axes to draw into; None for new ones.
    :return: The axes.
    :raises ValueError: for a tree without the groups, a single chain, fewer than 4 draws a chain, draws that are not
        finite, chains that each stand still, or a site none of whose values varies.

    **Example**

    .. doctest::

        >>> import arviz as az, matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> rng = np.random.default_rng(0)
        >>> tree = az.from_dict({"posterior": {"w": rng.normal(size=(4, 50, 9))},
        ...                      "functions": {"y": rng.normal(size=(4, 50, 6))}})
        >>> [text.get_text() for text in plots.layer_rhat(tree).get_yticklabels()]
        ['w', 'function y']
    """
    owner = "layer_rhat"
    rows = [(str(name), rhat, COLORS[0]) for name, rhat in _finite_rhat(owner, tree, "posterior").items()]
    rows += [(f"function {name}", rhat, COLORS[1]) for name, rhat in _finite_rhat(owner, tree, "functions").items()]
    moving = [np.ravel(rhat)[~np.isnan(np.ravel(rhat))] for _, rhat, _ in rows]
    for (name, _, _), values in zip(rows, moving, strict=True):
        if np.isinf(values).any():
            raise ValueError(
                f"layer_rhat: R-hat of '{name}' is infinite somewhere, where each chain stands still at a value of its"
                " own; draw a tree of a sampler that moves."
            )
    ax, places = new_axes(ax), np.arange(len(rows))[::-1]
    boxes = ax.boxplot(
        moving,
        positions=places,
        orientation="horizontal",
        whis=(0, 100),
        widths=0.55,
        showfliers=False,
        patch_artist=True,
        manage_ticks=False,
        medianprops={"color": "black"},
    )
    beside: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 8}
    for box, place, values, (_, rhat, color) in zip(boxes["boxes"], places, moving, rows, strict=True):
        box.set(facecolor=color, alpha=0.7)
        number = f"{len(values):,}" if len(values) == rhat.size else f"{len(values):,} of {rhat.size:,}"
        ax.text(1.02, float(place), f"{number} value{'s' * (rhat.size > 1)}", **beside)
    _rhat_axis(ax, max(np.max(values, initial=1.0) for values in moving))
    ax.set(title="R-hat by layer", ylabel="site", yticks=places, yticklabels=[name for name, _, _ in rows])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.tick_params(axis="y", length=0)
    return ax


def function_trace(tree: DataTree, worst: int = 4, **kwargs: Any) -> "PlotCollection":
    """Traces of the function values with the largest R-hat, by :func:`arviz.plot_trace`.

    A network has too many function values to look at each; the worst tell whether a chain is stuck, drifts, or jumps
    between modes. Values that are the same in all draws are left out. A single chain has no R-hat, and the first values
    are drawn.

    :param tree: A tree with a group ``functions``, of :func:`~numpyro_bdl.to_datatree`.
    :param worst: How many function values.
    :param kwargs: For :func:`arviz.plot_trace`, as ``backend="plotly"``.
    :return: ArviZ's PlotCollection. The values are named as in ``az.summary(tree, group="functions")``.
    :raises ValueError: for a tree without the group, fewer than 4 draws a chain, draws that are not finite, or none
        that vary.

    **Example**

    .. doctest::

        >>> import arviz as az, matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> draws = np.random.default_rng(0).normal(size=(4, 50, 6)) + np.eye(4, 6)[:, None]
        >>> draws[0, :, 5] += 10                                                # one chain is elsewhere
        >>> picture = plots.function_trace(az.from_dict({"functions": {"y": draws}}), worst=1)
        >>> list(picture.viz["plot"].data_vars)
        ['y[5]']
    """
    import arviz as az

    return az.plot_trace(_worst("function_trace", tree, worst, chains=1), group="functions", **kwargs)


def function_rank(tree: DataTree, worst: int = 4, **kwargs: Any) -> "PlotCollection":
    """Rank plots of the function values with the largest R-hat, by :func:`arviz.plot_rank`.

    If chains have one law, the ranks of the draws of each among those of all are uniform, and its line stays near 0.
    Points of a line that are too far from 0 to be chance are marked.

    :param tree: A tree with a group ``functions``, of :func:`~numpyro_bdl.to_datatree`.
    :param worst: How many function values.
    :param kwargs: For :func:`arviz.plot_rank`.
    :return: ArviZ's PlotCollection, as of :func:`function_trace`.
    :raises ValueError: as :func:`function_trace`, and for a single chain.
    """
    import arviz as az

    return az.plot_rank(_worst("function_rank", tree, worst), group="functions", **kwargs)


def _worst(owner: str, tree: DataTree, count: int, chains: int = 2) -> DataTree:
    """A tree with the function values of the largest R-hat, each a variable of its own."""
    from arviz_base.labels import BaseLabeller

    check_integer(owner, "worst", count)
    rhat = _finite_rhat(owner, tree, "functions", chains)
    every = [(float(value), name, place) for name, values in rhat.items() for place, value in np.ndenumerate(values)]
    varying = [entry for entry in every if not np.isnan(entry[0])]
    if not varying:
        raise ValueError(f"{owner}: every function value is the same in all draws.")
    chosen = {}
    for _, name, place in sorted(varying, key=lambda entry: -entry[0])[:count]:
        value = tree["functions"][name].isel(dict(zip(rhat[name].dims, place, strict=True)))
        at = {dim: rhat[name][dim][n].item() for dim, n in zip(rhat[name].dims, place, strict=True)}
        chosen[BaseLabeller().make_label_flat(name, at, at)] = value.drop_vars(rhat[name].dims, errors="ignore")
    rest = {"sample_stats": tree["sample_stats"].to_dataset()} if "sample_stats" in tree.children else {}
    return DataTree.from_dict({"functions": Dataset(chosen), **rest})  # NUTS: with its divergences


def _rhat(owner: str, tree: DataTree, group: str) -> dict[str, DataArray]:
    """R-hat by name, NaN for values that are the same in all draws or not finite."""
    import arviz as az

    if group not in tree.children:
        raise ValueError(
            f"{owner}: the tree has no group '{group}'; make it by numpyro_bdl.to_datatree. Its groups:"
            f" {', '.join(tree.children) or 'none'}."
        )
    with np.errstate(divide="ignore", invalid="ignore"):  # chains that don't move
        return dict(az.rhat(tree, group=group).data_vars)


def _finite_rhat(owner: str, tree: DataTree, group: str, chains: int = 2) -> dict[str, DataArray]:
    """R-hat by name, NaN for values that are the same in all draws, infinite where each chain has one of its own.

    :param chains: How many there must be; those of a single one are all 1.
    """
    rhat = _rhat(owner, tree, group)
    for name, found in rhat.items():
        draws = tree[group][name].transpose("chain", "draw", ...).to_numpy()
        if len(draws) < chains:
            raise ValueError(f"{owner}: R-hat compares chains and needs at least {chains}, got {len(draws)}.")
        if draws.shape[1] < 4:
            raise ValueError(f"{owner}: R-hat needs at least 4 draws a chain, got {draws.shape[1]}.")
        bad = np.flatnonzero(~np.isfinite(draws).reshape(len(draws), -1).all(1))
        if len(bad):
            raise ValueError(
                f"{owner}: the chains {bad.tolist()} have values of '{name}' that are not finite; leave them out, as in"
                " tree.isel(chain=[...]), and take a smaller step."
            )
        still = (np.ptp(draws, 1) == 0).all(0)  # of which rounding makes large numbers
        same = np.ptp(draws, (0, 1)) == 0
        rhat[name] = found.copy(data=np.select([same, still], [np.nan, np.inf], found if len(draws) > 1 else 1.0))
    return rhat


def _rhat_axis(ax: "Axes", highest: float) -> None:
    """An axis that is logarithmic in the excess over 1, with the usual demands."""
    if not has_line(ax, "_reference"):
        for level in RHAT_LEVELS:
            ax.axvline(level, label="_reference", linestyle="--", **REFERENCE)
    end = max(highest * 1.05, 2.0)
    ax.set_xscale("function", functions=(_log_excess, _from_log_excess))
    ax.set_xticks([tick for tick in _RHAT_TICKS if tick <= end])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set(xlabel="R-hat", xlim=(1 + _LOWEST_EXCESS, end))


def _log_excess(rhat):
    return np.log10(np.maximum(np.asarray(rhat) - 1, _LOWEST_EXCESS))


def _from_log_excess(logarithm):
    return 1 + 10 ** np.asarray(logarithm)
