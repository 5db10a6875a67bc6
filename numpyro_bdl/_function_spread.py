# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Do the draws of a chain differ as functions, or has the sampler become an optimizer?"""

import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from numpyro_bdl._checks import check_number
from numpyro_bdl._draws import read_draws

THRESHOLD = 1e-3
_SAME = 1e-6  # a function is constant over its inputs, as far as float32 can tell


class FunctionSpread(NamedTuple):
    """How far the functions of each chain are spread."""

    relative: Float[np.ndarray, " chain"]
    """standard deviation over the draws of a chain, relative to that of the function over its inputs"""
    threshold: float
    still: Bool[np.ndarray, " chain"]
    """which chains are below the threshold"""


def function_spread(data: Any, *, threshold: float = THRESHOLD) -> FunctionSpread:
    r"""The spread of the functions of each chain, with a warning if it is nearly zero.

    .. math::

        r_c = \Bigl( \frac{\operatorname{mean}_x \operatorname{var}_s f_{cs}(x)}
                          {\operatorname{var}_x \operatorname{mean}_s f_{cs}(x)} \Bigr)^{1/2}

    over draws s and function values x (points and outputs); of several sites, the largest. Values that are the same in
    all draws of all chains are left out, and a function that is the same at all inputs is compared with its size.

    A chain that stands still hands over one function again and again: an optimizer, whatever its kernel is called. Its
    R-hat says nothing of that, since it compares chains in units of their spread. The usual causes are a step size that
    was divided by the number of rows once more, a temperature far below 1, and a step so small that the chain has not
    moved yet. In regression with d parameters, N rows and a signal-to-noise ratio of q the posterior itself has
    :math:`r \approx \sqrt{d / N} / q`, above the default threshold unless :math:`N > 10^6 d / q^2`; where data are that
    many, set the threshold by this formula.

    :param data: Function values (chain, draw, point, output), or such arrays by site; a DataTree with a group
        ``functions``; or a run, for its functions at 64 of its rows.
    :param threshold: Relative spread below which a chain counts as standing still.
    :return: The spreads, and the chains below the threshold, of which a warning tells too.
    :raises ValueError: for shapes that don't fit, or values that are not finite.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import diagnostics
        >>> mean = np.sin(np.arange(20.0))
        >>> functions = mean + 0.1 * np.random.default_rng(0).normal(size=(2, 50, 20))         # (chain, draw, point)
        >>> diagnostics.function_spread(functions).relative.round(1).tolist()
        [0.1, 0.1]
    """
    check_number("function_spread", "threshold", threshold)
    draws = read_draws("function_spread", data, "functions", least=2)
    for name, value in draws.items():
        bad = np.flatnonzero(~np.isfinite(value).all(tuple(range(1, value.ndim))))
        if len(bad):
            raise ValueError(
                f"function_spread: the chains {bad.tolist()} have values at '{name}' that are not finite; leave them"
                " out, as in tree.isel(chain=[...]), and take a smaller step."
            )
    relative = relative_spread(draws)
    still = relative < threshold
    warn_of_still_chains(relative, still, threshold)
    return FunctionSpread(relative, threshold, still)


def relative_spread(draws: dict[str, np.ndarray]) -> Float[np.ndarray, " chain"]:
    """The spread of each chain relative to its function, the largest of the sites; NaN for what is not finite."""
    finite = np.all([np.isfinite(v).all(tuple(range(1, v.ndim))) for v in draws.values()], axis=0)
    relative = np.full(len(finite), np.nan)
    if finite.any():
        relative[finite] = np.max([_spread_of(value[finite]) for value in draws.values()], axis=0)
    return relative


def _spread_of(value: np.ndarray) -> np.ndarray:
    """The spread of each chain at one site."""
    flat = value.reshape(*value.shape[:2], -1).astype(float)
    moves = np.ptp(flat, (0, 1)) > 0  # not a logit fixed at 0
    if not moves.any():
        return np.zeros(len(flat))
    flat = flat[..., moves]
    spread = np.sqrt(flat.var(1, ddof=1).mean(-1))
    mean = flat.mean(1)
    size, over_inputs = np.sqrt((mean**2).mean(-1)), mean.std(-1)
    scale = np.where(over_inputs > _SAME * size, over_inputs, size)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread == 0, 0, spread / scale)


def warn_of_still_chains(relative: np.ndarray, still: np.ndarray, threshold: float) -> None:
    """Warn of chains whose functions hardly differ from draw to draw."""
    if not still.any():
        return
    found = ", ".join(f"{chain} ({relative[chain]:.1e})" for chain in np.flatnonzero(still))
    warnings.warn(
        f"The functions of {still.sum()} of {len(still)} chains hardly differ from draw to draw, by less than"
        f" {threshold:g} of the function's own spread over its inputs: {found}. A sampler that stands still is an"
        " optimizer: look for a step size divided by the number of rows, or a low temperature.",
        stacklevel=3,
    )
