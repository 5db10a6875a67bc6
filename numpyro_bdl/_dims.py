# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Names of the axes of sites: layers and their units, plates, points and outputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from numpyro_bdl.potential import Potential

Dims = dict[str, list[str | None]]
"""Names of the axes after chain and draw, by site; None for one that ArviZ is to name."""


class Group(NamedTuple):
    """A group of a tree."""

    values: dict[str, Any]
    dims: Dims = {}
    """names of the axes behind those that all values share"""
    coords: dict[str, Any] = {}
    """labels by dimension"""
    sample_dims: list[str] | None = None
    """the axes that all values share; None for chain and draw"""


def site_dims(potential: Potential, draws: Mapping[str, Any]) -> Dims:
    """Names of the axes of latent and deterministic sites, (chain, draw, ...).

    Those of the parameters of a network are ``<layer>_in`` and ``<layer>_out``, with a kernel's axes in front of these,
    as those of a convolution, unnamed. Other sites have the names of their plates and of ``infer["event_dims"]``.
    """
    shapes = {name: np.shape(value)[2:] for name, value in draws.items()}
    plates = {
        name: [dim if _fits(potential, dim, size) else None for dim, size in zip(known, shapes[name], strict=False)]
        for name, known in potential.dims.items()
        if name in shapes
    }
    return plates | _layer_dims(potential, {name: shapes[name] for name in potential.network if name in shapes})


def _fits(potential: Potential, dim: str | None, size: int) -> bool:
    """A deterministic site may be of another size than its plate."""
    return dim not in potential.plates or potential.plates[dim].size == size


def _layer_dims(potential: Potential, shapes: dict[str, tuple[int, ...]]) -> Dims:
    layers: dict[str, list[str]] = {}
    for name in shapes:
        path = potential.network[name][1]
        if path:
            layers.setdefault(name[: -len(str(path[-1])) - 1], []).append(name)
    dims: Dims = {}
    for layer, names in layers.items():
        inside = [shapes[name] for name in names]
        dims |= {name: _axes(layer, shapes[name], inside) for name in names}
    return _one_size(dims, shapes, lambda dim, name: None)


def _axes(layer: str, shape: tuple[int, ...], inside: list[tuple[int, ...]]) -> list[str | None]:
    """Names of the axes of a parameter, given the shapes of all that its layer has."""
    ends = [other for other in inside if 0 < len(other) < len(shape) and shape[-len(other) :] == other]
    is_end = any(len(shape) < len(other) and other[len(other) - len(shape) :] == shape for other in inside)
    # the units of a layer are those of its bias, which may be on several axes (heads of attention)
    outputs = len(shape) if is_end else max(map(len, ends), default=min(1, len(shape)))
    before = len(shape) - outputs
    units = [f"{layer}_out"] if outputs == 1 else [f"{layer}_out_{n}" for n in range(outputs)]
    return [None] * (before - 1) + [f"{layer}_in"] * min(1, before) + units


def function_dims(values: Mapping[str, np.ndarray], has_rows: Mapping[str, bool]) -> Dims:
    """Names of the axes of functions, (chain, draw, point, output), by site.

    :param has_rows: Whether the first axis after chain and draw is that of points.
    """
    dims: Dims = {}
    for name, value in values.items():
        outputs = value.ndim - 2 - has_rows[name]
        dims[name] = ["point"] * has_rows[name] + (
            ["output"] if outputs == 1 else [f"output_{n}" for n in range(outputs)]
        )
    # sites of different sizes have dimensions of their own, or they would be filled up with NaN
    shapes = {name: value.shape[2:] for name, value in values.items()}
    return _one_size(dims, shapes, lambda dim, name: f"{dim}_{name}")


def _one_size(dims: Dims, shapes: Mapping[str, tuple[int, ...]], otherwise) -> Dims:
    """The names, with others for those that would stand for axes of several sizes."""
    sizes: dict[str | None, set[int]] = {}
    for name, names in dims.items():
        for dim, size in zip(names, shapes[name], strict=True):
            sizes.setdefault(dim, set()).add(size)
    return {
        name: [dim if dim is None or len(sizes[dim]) == 1 else otherwise(dim, name) for dim in names]
        for name, names in dims.items()
    }
