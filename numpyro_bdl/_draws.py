# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Draws as NumPy arrays, whatever holds them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpyro.infer import MCMC
from xarray import DataArray, DataTree

from numpyro_bdl._runs import positions
from numpyro_bdl.predictive import PROBES, PosteriorPredictive

_FROM_RUN = {
    "posterior": positions,
    "functions": lambda mcmc: PosteriorPredictive(mcmc).functions_at_rows(PROBES)[0],
    "log_likelihood": lambda mcmc: PosteriorPredictive(mcmc).log_likelihood(),
}


def read_draws(owner: str, data: Any, group: str, least: int = 4) -> dict[str, np.ndarray]:
    """Draws by name, each (chain, draw, ...).

    :param owner: Name of the caller, for texts.
    :param data: A DataTree; a run, for its posterior, functions or log likelihood; arrays (chain, draw, ...) by name;
        or one array.
    :param group: Group of a tree, or what to take from a run; the name of an array that has none.
    :param least: Draws that a chain needs.
    :raises ValueError: for a tree without the group, a run without draws, or shapes that don't fit.
    """
    if isinstance(data, MCMC):
        if group not in _FROM_RUN:
            raise ValueError(
                f"{owner}: of a run there is {', '.join(map(repr, _FROM_RUN))}, got group={group!r}; for other groups"
                " hand in the tree of numpyro_bdl.to_datatree."
            )
        if data.last_state is None:
            raise ValueError(f"{owner}: the MCMC object holds no draws yet; run it first.")
        named = _FROM_RUN[group](data)
    elif isinstance(data, DataTree):
        if group not in data.children:
            raise ValueError(
                f"{owner}: the tree has no group {group!r}; its groups: {', '.join(data.children) or 'none'}."
                " numpyro_bdl.to_datatree makes them."
            )
        named = data[group].data_vars
    else:
        named = data if isinstance(data, Mapping) else {group: data}
    draws = {str(name): _array(value) for name, value in named.items()}
    shapes = {name: value.shape for name, value in draws.items()}
    sizes = {shape[:2] for shape in shapes.values()}
    if len(sizes) != 1 or any(len(shape) < 2 for shape in shapes.values()):
        raise ValueError(
            f"{owner}: expected arrays (chain, draw, ...) with as many chains and draws each, got"
            f" {', '.join(f'{name} {shape}' for name, shape in shapes.items()) or 'none'}; MCMC.get_samples gives them"
            " with group_by_chain=True."
        )
    ((chains, count),) = sizes
    if not chains or count < least:
        raise ValueError(f"{owner}: expected at least {least} draws of each chain, got {chains} chains of {count}.")
    return draws


def flatten(draws: dict[str, np.ndarray]) -> np.ndarray:
    """All values of each draw in a row, (chain, draw, value)."""
    return np.concatenate([value.reshape(*value.shape[:2], -1) for value in draws.values()], -1).astype(float)


def _array(value: Any) -> np.ndarray:
    if isinstance(value, DataArray) and {"chain", "draw"} <= set(value.dims):
        value = value.transpose("chain", "draw", ...)
    return np.asarray(value)
