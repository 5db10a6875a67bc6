# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""A picture of a function of one input, with what is known of it and of new data."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import ArrayLike, Float

from numpyro_bdl._checks import check_choice, check_number
from numpyro_bdl._plot_style import new_axes, next_style
from numpyro_bdl._predictions import numbers, pooled, same_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CENTERS = {"mean": np.mean, "median": np.median}


def predictive_band(
    x: Float[ArrayLike, " point"],
    functions: Float[ArrayLike, "chain draw point"],
    predictive: Float[ArrayLike, "chain draw point"] | None = None,
    data: tuple[Float[ArrayLike, " row"], Float[ArrayLike, " row"]] | None = None,
    ax: "Axes | None" = None,
    label: str | None = None,
    level: float = 0.9,
    center: str = "mean",
) -> "Axes":
    r"""A function of one input with its credible band, the band of new data, and the data.

    A band runs between the quantiles :math:`(1 \mp \text{level}) / 2` of all draws, at each input by itself: a whole
    function lies in it less often. The dark one is that of the function, the epistemic uncertainty; the light one that
    of new data, with their noise, the total. Draws of new data give a ragged edge; more draws smooth it. A further call
    on the same ``ax`` adds a function in the next colour.

    :param x: Inputs, (point,), in any order.
    :param functions: Draws of the mean of y at these inputs, (chain, draw, point), as of
        :meth:`~numpyro_bdl.PosteriorPredictive.functions`.
    :param predictive: Draws of new data at these inputs, (chain, draw, point), as of
        :meth:`~numpyro_bdl.PosteriorPredictive.sample`; None for no such band.
    :param data: Inputs and outcomes of the data, (row,) each; None for no data.
    :param ax: Axes to draw into; None for new ones.
    :param label: Name of the line for the legend.
    :param level: Probability of the bands, in (0, 1).
    :param center: The line: ``"mean"`` or ``"median"`` of the functions.
    :return: The axes.
    :raises ValueError: for shapes that don't fit, fewer than two inputs, NaN, or an argument out of range.

    **Example**

    .. doctest::

        >>> import matplotlib, numpy as np
        >>> matplotlib.use("Agg")
        >>> from numpyro_bdl import plots
        >>> x, rng = np.linspace(-1, 1, 30), np.random.default_rng(0)
        >>> functions = rng.normal(size=(4, 100, 1)) * x
        >>> ax = plots.predictive_band(x, functions, functions + rng.normal(size=(4, 100, 30)), label="NUTS")
        >>> ax.get_legend_handles_labels()[1]
        ['90 % of new data', '90 % of the functions', 'NUTS']
    """
    owner = "predictive_band"
    check_number(owner, "level", level, high=1)
    check_choice(owner, "center", center, _CENTERS)
    x = np.ravel(numbers(owner, "x", x))
    order = np.argsort(x, kind="stable")
    function_draws = _at_inputs("functions", functions, x)[:, order]
    bands = [(function_draws, "the functions", 0.35)]
    if predictive is not None:
        bands.insert(0, (_at_inputs("predictive", predictive, x)[:, order], "new data", 0.15))
    rows = None if data is None else [np.ravel(numbers(owner, f"data[{n}]", side)) for n, side in enumerate(data)]
    if rows is not None:
        same_shape(owner, **{"the data's x": rows[0], "y": rows[1]})

    ax = new_axes(ax)
    style, _ = next_style(ax)
    taken = ax.get_legend_handles_labels()[1]
    for draws, of, alpha in bands:
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], 0)
        name = f"{100 * level:g} % of {of}"
        name = "_band" if name in taken else name  # once for all methods
        ax.fill_between(x[order], low, high, label=name, color=style["color"], alpha=alpha, linewidth=0)
    ax.plot(x[order], _CENTERS[center](function_draws, 0), label=label, **style)
    if rows is not None:
        ax.scatter(*rows, 9, "black", label="_data" if "data" in taken else "data", alpha=0.6, linewidth=0, zorder=3)
    ax.set(title="Predictive band", xlabel="input", ylabel="outcome")
    return ax


def _at_inputs(name: str, draws: ArrayLike, x: np.ndarray) -> Float[np.ndarray, "draw point"]:
    """The draws of all chains."""
    values = pooled("predictive_band", name, draws)
    if values.shape[1:] != x.shape or len(x) < 2:
        raise ValueError(
            f"predictive_band: expected {name} (chain, draw, point) at two or more inputs x (point,), got shape"
            f" {np.shape(draws)} and {len(x)} inputs; of several outputs hand in one, as in values[..., 0]."
        )
    return values
