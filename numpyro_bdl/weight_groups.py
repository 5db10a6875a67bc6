# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Groups of weights that are selected, or pruned, together.

A site is partitioned into groups by one of the kinds

==================  =================================================  ============================
kind                a group is                                         of arrays
==================  =================================================  ============================
``"unstructured"``  one weight                                         any
``"neuron_in"``     the weights that leave one input: ``w[i, :]``      (in, out)
``"neuron_out"``    the weights that enter one output: ``w[:, o]``     (in, out)
``"channel"``       what reads one input channel: ``w[..., i, :]``     (space..., in, out)
``"filter"``        what writes one output channel: ``w[..., :, o]``   (space..., in, out)
``"kernel"``        one spatial kernel: ``w[..., i, o]``               (space..., in, out)
==================  =================================================  ============================

or by a callable, from the name and the shape of the site to an array of integers of that shape: the number of each
weight's group, counted from 0.
"""

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# the axes that tell groups apart, and the number of dimensions that an array must have
_KINDS: dict[str, tuple[tuple[int, ...], Callable[[int], bool], str]] = {
    "neuron_in": ((-2,), lambda ndim: ndim == 2, "(in, out)"),
    "neuron_out": ((-1,), lambda ndim: ndim == 2, "(in, out)"),
    "channel": ((-2,), lambda ndim: ndim > 2, "(space..., in, out)"),
    "filter": ((-1,), lambda ndim: ndim > 2, "(space..., in, out)"),
    "kernel": ((-2, -1), lambda ndim: ndim > 2, "(space..., in, out)"),
}
KINDS = ("unstructured", *_KINDS)

Kind = str | Callable[[str, tuple[int, ...]], Any]


@dataclass(frozen=True, eq=False)
class WeightGroups:
    """The groups of one site."""

    kind: str
    site_shape: tuple[int, ...]
    kept_axes: tuple[int, ...] = ()
    """negative axes that tell groups apart, of a kind that has them"""
    numbers: np.ndarray | None = None
    """the group of each weight, of a callable"""

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of an array with one entry for each group."""
        if self.numbers is not None:
            return (int(self.numbers.max()) + 1,)
        return tuple(self.site_shape[axis] for axis in self.kept_axes)

    @cached_property
    def size(self) -> np.ndarray:
        """Weights in each group."""
        if self.numbers is not None:
            return np.bincount(self.numbers.ravel())
        return np.full(self.shape, math.prod(self.site_shape) // max(math.prod(self.shape), 1))

    def total(self, x: Array) -> Array:
        """Sum over each group: (..., site) to (..., group)."""
        x = x.astype(jnp.int32) if x.dtype == bool else x
        if self.numbers is not None:
            batch = x.shape[: x.ndim - len(self.site_shape)]
            flat = x.reshape(*batch, -1)
            return jnp.zeros((*batch, *self.shape), x.dtype).at[..., self.numbers.ravel()].add(flat)
        summed = tuple(a for a in range(-len(self.site_shape), 0) if a not in self.kept_axes)
        return jnp.sum(x, summed) if summed else x

    def spread(self, values: Array) -> Array:
        """The value of its group for each weight: (..., group) to an array that broadcasts to (..., site)."""
        if self.numbers is not None:
            return values[..., self.numbers]
        summed = tuple(a for a in range(-len(self.site_shape), 0) if a not in self.kept_axes)
        return jnp.expand_dims(values, summed) if summed else values

    def names(self) -> list[str]:
        """A name for each group: its indices."""
        return [",".join(map(str, index)) for index in np.ndindex(self.shape)]


def _groups(owner: str, site: str, kind: Kind, shape: tuple[int, ...]) -> WeightGroups:
    if callable(kind):
        with jax.ensure_compile_time_eval():
            numbers = np.asarray(kind(site, shape))
        if numbers.shape != shape or not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(
                f"{owner}: the callable in groups must return an array of integers of the shape of '{site}', {shape};"
                f" got {numbers.dtype} of shape {numbers.shape}."
            )
        found = np.unique(numbers)
        if not np.array_equal(found, np.arange(len(found))):
            raise ValueError(
                f"{owner}: the callable in groups must number the groups of '{site}' 0, 1, ... without gaps; got"
                f" numbers from {found[0]} to {found[-1]}, {len(found)} of them."
            )
        return WeightGroups("callable", shape, numbers=numbers.astype(np.int64))
    if kind == "unstructured":
        return WeightGroups(kind, shape, tuple(range(-len(shape), 0)))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(
            f"{owner}: the groups of '{site}' must be one of {', '.join(map(repr, KINDS))}, or a callable,"
            f" got {kind!r}."
        )
    axes, fits, wanted = _KINDS[kind]
    if not fits(len(shape)):
        raise ValueError(
            f"{owner}: groups of kind {kind!r} are for arrays {wanted}, but '{site}' has shape {shape}."
            + (' Use "neuron_in", "neuron_out" or "unstructured".' if len(shape) == 2 else "")
        )
    return WeightGroups(kind, shape, axes)


def partition(owner: str, groups: Mapping[str, Kind], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightGroups]:
    """The groups of every site that a pattern names.

    :param owner: Name of the kernel, for error texts.
    :param groups: From names of sites, or patterns of them (as of :mod:`fnmatch`), to kinds.
    :param shapes: Shapes of all latent sites, by name.
    :return: The groups by site, in the order of ``shapes``.
    :raises ValueError: for a pattern that matches no site, a site matched by two patterns, an unknown kind, or one
        that the shape of the site does not have.
    """
    kinds: dict[str, tuple[str, Kind]] = {}
    for pattern, kind in groups.items():
        if not isinstance(pattern, str):
            raise TypeError(f"{owner}: groups goes from patterns of site names to kinds; got the key {pattern!r}.")
        matched = [pattern] if pattern in shapes else [name for name in shapes if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f"{owner}: groups names {pattern!r}, which matches no latent site of the model; those are:"
                f" {', '.join(shapes)}."
            )
        for name in matched:
            if name in kinds:
                raise ValueError(
                    f"{owner}: groups overlap: '{name}' is matched by {kinds[name][0]!r} and by {pattern!r}. Each"
                    " weight belongs to one group."
                )
            kinds[name] = pattern, kind
    return {name: _groups(owner, name, kinds[name][1], shape) for name, shape in shapes.items() if name in kinds}
