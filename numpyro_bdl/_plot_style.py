# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What the pictures have in common. Matplotlib is loaded when something is drawn."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Blue, vermilion, green, purple, orange, sky blue, black."""
MARKERS = "osD^vPX"
LINES = ("-", (0, (6, 1)), (0, (3, 1)), (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (3, 1, 1, 1)), (0, (1, 3)))
REFERENCE: dict[str, Any] = {"color": "0.6", "linewidth": 1, "zorder": 0}


def new_axes(ax: "Axes | None") -> "Axes":
    """The axes given, or new ones."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def has_line(ax: "Axes", label: str) -> bool:
    """Whether a line with this label is there already."""
    return any(line.get_label() == label for line in ax.get_lines())


def next_style(ax: "Axes") -> tuple[dict[str, Any], str]:
    """Colour and line, and the marker, of the next method. Lines with a label such as ``"_reference"`` don't count."""
    labels = [str(line.get_label()) for line in ax.get_lines()]
    n = sum(not label.startswith("_") or label.startswith("_child") for label in labels)  # matplotlib's own: _child3
    return {"color": COLORS[n % len(COLORS)], "linestyle": LINES[n % len(LINES)]}, MARKERS[n % len(MARKERS)]
