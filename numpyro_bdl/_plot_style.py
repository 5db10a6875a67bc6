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
