# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The pictures of the page, each a PNG."""

import io
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from xarray import DataTree

from numpyro_bdl import plots, symmetry
from numpyro_bdl._report.findings import Convergence
from numpyro_bdl._report.run import Run, thinned
from numpyro_bdl._report.scores import Classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 130
_THIN: Any = {"trace": {"alpha": 0.7, "width": 0.9}}
_WIDE, _SQUARE = (7.2, 4.0), (5.2, 5.0)
_MOST_WEIGHTS = 1000  # for R-hat by layer
_MOST_GROUPS = 200  # of a site, for paths of inclusion
_MOST_STATISTICS = 4


class Picture(NamedTuple):
    """A picture with its words."""

    caption: str
    alt: str
    png: bytes


def convergence(run: Run, found: Convergence) -> list[Picture]:
    """R-hat of the function, and the traces and ranks of its worst values."""
    if found.values is None:
        return []
    pictures, rhat = [], found.values["r_hat"].to_numpy()
    worst = f"the largest is {np.max(rhat):.4g}"
    if run.chains > 1:
        pictures += _drawn(
            run,
            "R-hat of the function: the share of its values whose R-hat is at most so much. Dashed lines stand at 1.01"
            " and 1.1; the curve should be at the top before the first.",
            f"Share of {len(rhat)} function values up to each R-hat; {worst}.",
            lambda ax: plots.function_rhat(rhat, ax),
        )
        pictures += _by_arviz(
            run,
            "Traces of the function values with the largest R-hat, a colour for each chain. Chains that have converged"
            " lie over each other and have no trend.",
            f"Traces of the function values with the largest R-hat; {worst}.",
            lambda **kwargs: plots.function_trace(run.few, visuals=_THIN, **kwargs),
        )
        pictures += _by_arviz(
            run,
            "Ranks of the same: a line that leaves the middle is a chain that is elsewhere than the others.",
            "Ranks of the draws of each chain among those of all, for the function values with the largest R-hat.",
            lambda **kwargs: plots.function_rank(run.few, **kwargs),
        )
    weights = run.parameters()
    if run.chains > 1 and any(value.ndim > 2 for value in weights.values()):
        sites = len(weights)
        few = DataTree.from_dict(
            {"posterior": thinned(weights, _MOST_WEIGHTS), "functions": run.few["functions"].to_dataset()}
        )
        pictures += _drawn(
            run,
            "R-hat by layer, and below it that of the function. Units of a network can be exchanged, so that large ones"
            " of weights show copies of one network, and nothing else. The last rows are those that count."
            f" Of more than {_MOST_WEIGHTS:,} weights a part is drawn, evenly spaced.",
            f"R-hat of the weights of {sites} sites, and of the function.",
            lambda ax: plots.layer_rhat(few, ax),
            (_WIDE[0], 1.6 + 0.35 * (sites + 1)),
        )
    return pictures


def modes(run: Run) -> list[Picture]:
    """Which chains share a function."""
    if run.chains < 2 or not run.values("functions"):
        return []
    found = run.ask("Modes in function space", symmetry.functional_modes, run.tree)
    if found is None:
        return []
    sizes = " and ".join(map(str, found.sizes))
    said = f"{found.num_modes} functional mode{'s' * (found.num_modes > 1)}, of {sizes} chains"
    return _drawn(
        run,
        f"Modes in function space: {said}. Chains are ordered by mode; a pair within {found.separation:g} standard"
        " deviations shares one.",
        f"Distances of each pair of chains as functions: {said}.",
        lambda ax: plots.functional_modes(found, ax=ax),
        _SQUARE,
    )


def calibration(run: Run, classes: dict[str, Classes]) -> list[Picture]:
    """Accuracy and confidence, of each site with labels."""
    pictures = []
    for name, (probabilities, labels) in classes.items():
        rows = f"{len(labels)} rows that the model was fitted to"
        pictures += _drawn(
            run,
            f"Calibration of {name} at {rows}: on the diagonal it is as often right as it says. The area of a marker is"
            " the share of the rows.",
            f"Accuracy against confidence of {name}, at {rows}.",
            lambda ax, p=probabilities, y=labels: plots.reliability(p, y, ax),
            _SQUARE,
        )
    return pictures


def selection(run: Run) -> list[Picture]:
    """What was pruned, and inclusion along the draws."""
    pictures = []
    if "mask" in run.tree.children:
        masks = {str(k): v.transpose("chain", ...).to_numpy() for k, v in run.tree["mask"].data_vars.items()}
        pictures += _drawn(
            run,
            "Weights, or groups of them, that were pruned, by site. The dashed line is the share of all of them.",
            f"Share of the weights that was pruned, of {len(masks)} sites.",
            lambda ax: plots.layer_sparsity(masks, ax),
            (_WIDE[0], 2.2 + 0.35 * len(masks)),
        )
    inclusion = run.values("inclusion")
    if inclusion:
        numbers = {name: value.to_numpy() for name, value in inclusion.items()}
        pictures += _drawn(
            run,
            "Share of the groups that is excluded, along the draws: it should have no trend.",
            f"Share of the groups that is excluded along the draws, of {len(numbers)} sites.",
            lambda ax: _with_legend(plots.sparsity_path(numbers, ax)),
        )
    for name, value in inclusion.items():
        if value.ndim == 3 and value.shape[2] <= _MOST_GROUPS:
            labels = [str(label) for label in value[value.dims[2]].to_numpy()]
            pictures += _drawn(
                run,
                f"Inclusion probability of each group of {name}, along the draws.",
                f"Inclusion probabilities of {len(labels)} groups of {name} along the draws.",
                lambda ax, p=numbers[name], names=labels: _with_legend(plots.inclusion_path(p, ax, names)),
            )
    return pictures


def statistics(run: Run) -> list[Picture]:
    """Traces of the statistics of the sampler that vary."""
    varying = [
        name
        for name, value in run.values("sample_stats").items()
        if value.ndim == 2 and value.dtype.kind in "iuf" and np.isfinite(value).all() and np.ptp(value.to_numpy()) > 0
    ]
    shown = varying[:_MOST_STATISTICS]
    if not shown or run.sizes["draw"] < 2:
        return []
    import arviz as az

    return _by_arviz(
        run,
        f"Traces of statistics of the sampler: {', '.join(shown)}.",
        f"Traces of {', '.join(shown)} along the draws, by chain.",
        lambda **kwargs: az.plot_trace(run.tree, group="sample_stats", var_names=shown, visuals=_THIN, **kwargs),
        len(shown),
    )


def _drawn(
    run: Run, caption: str, alt: str, draw: "Callable[[Axes], Any]", size: tuple[float, float] = _WIDE
) -> list[Picture]:
    """The picture that is drawn into axes; none if it is refused."""
    from matplotlib.figure import Figure

    with _plain_style():
        figure = Figure(figsize=size, layout="constrained")
        if run.ask(_title(caption), draw, figure.subplots()) is None:
            return []
        return [Picture(caption, alt, _png(figure))]


def _by_arviz(run: Run, caption: str, alt: str, draw: Callable, panels: int = 4) -> list[Picture]:
    """The picture that ArviZ draws into a figure of pyplot's, which is closed."""
    import matplotlib.pyplot as plt

    columns = min(panels, 2)
    size = {"figsize": (4 * columns, 2.6 * -(-panels // columns)), "figsize_units": "inches"}
    open_before = set(plt.get_fignums())
    with _plain_style(), plt.ioff():
        try:
            found = run.ask(_title(caption), draw, backend="matplotlib", col_wrap=columns, figure_kwargs=size)
            if found is None:
                return []
            figure = found.viz["figure"].item()
            figure.set_layout_engine("constrained")
            return [Picture(caption, alt, _png(figure))]
        finally:
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)


@contextmanager
def _plain_style() -> Generator[None]:
    """Matplotlib's own style, whatever the user has set, with our colours for ArviZ."""
    from cycler import cycler
    from matplotlib import style

    with style.context(["default", {"axes.prop_cycle": cycler(color=plots.COLORS)}]):
        yield


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()


def _title(caption: str) -> str:
    return caption.split(":")[0].split(",")[0]


def _with_legend(ax: "Axes") -> "Axes":
    ax.legend(fontsize="small")
    return ax
