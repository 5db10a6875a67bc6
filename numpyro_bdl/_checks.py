# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of what a user hands in, made before any long work."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.core import Tracer


def check_number(
    owner: str, name: str, value: Any, *, low: float = 0.0, high: float = math.inf, closed: bool = False
) -> None:
    """Refuse a value that is not a finite number in (low, high), or in [low, high) if closed.

    :raises ValueError: with the owner, the name, what came and what was expected.
    """
    bracket = "[" if closed else "("
    number = not isinstance(value, (bool, str, type(None))) and np.ndim(value) == 0 and np.isreal(value)
    if not (number and math.isfinite(value) and (low <= value if closed else low < value) and value < high):
        raise ValueError(f"{owner}: {name} must be a number in {bracket}{low:g}, {high:g}), got {value!r}.")


def check_integer(owner: str, name: str, value: Any, least: int = 1) -> None:
    """Refuse a value that is not an integer of at least ``least``.

    :raises ValueError: with the owner, the name, what came and what was expected.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{owner}: {name} must be an integer of at least {least}, got {value!r}.")


def check_choice(owner: str, name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a value that is not one of the choices.

    :raises ValueError: with the owner, the name, what came and what was expected.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def named_arguments(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a model call under the names of its signature, as far as it tells them."""
    try:
        bound = inspect.signature(model).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    except (TypeError, ValueError):
        return {f"argument {n}": value for n, value in enumerate(args)} | kwargs


def check_finite_data(arguments: dict[str, Any], owner: str = "The model's argument ") -> None:
    """Refuse model arguments that hold NaN or infinite numbers.

    :param arguments: Model arguments by name; tracers are passed over.
    :param owner: What comes before the name in the text.
    :raises ValueError: naming the argument, how many entries are bad and the first of them.
    """
    for name, value in arguments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            if isinstance(leaf, float) and math.isnan(leaf):
                raise ValueError(f"{owner}'{name}{jax.tree_util.keystr(path)}' is NaN.")
            if isinstance(leaf, Tracer) or not isinstance(leaf, (np.ndarray, jax.Array)):
                continue
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                continue
            # by NumPy, since inside pmap even a constant would become a tracer
            bad = np.argwhere(~np.isfinite(np.asarray(leaf)))
            if not len(bad):
                continue
            raise ValueError(
                f"{owner}'{name}{jax.tree_util.keystr(path)}' has {len(bad)} NaN or infinite"
                f" entries, the first at index {tuple(map(int, bad[0]))}. They would make every gradient NaN:"
                " remove these rows, or impute them (masked entries too must hold some finite number)."
            )


def check_subsample_size(name: str, size: int, subsample_size: Any) -> None:
    """Refuse a plate that is to show more rows than it has.

    :raises ValueError: naming the plate, its size and what was asked for.
    """
    if subsample_size is None:
        return
    if not isinstance(subsample_size, (int, np.integer)) or not 1 <= subsample_size <= size:
        raise ValueError(
            f"Plate '{name}' has {size} rows, but subsample_size={subsample_size!r}; it must be an integer from 1 to"
            f" {size}, or None for all rows."
        )


def check_latent(name: str, site: dict, subsampled: Collection[str]) -> None:
    """Refuse a latent site that has no gradient, or would be different in each minibatch.

    :raises TypeError: for a discrete site.
    :raises ValueError: for a Delta, or a site inside one of the subsampled plates.
    """
    fn = site["fn"]
    if fn.support.is_discrete:
        raise TypeError(
            f"Latent site '{name}' is discrete ({type(fn).__name__}); gradients need continuous sites. Marginalize it"
            " in the model, for instance by a mixture distribution."
        )
    if isinstance(fn, dist.Delta):
        raise ValueError(f"Latent site '{name}' is a Delta; use numpyro.deterministic for a value that is given.")
    inside = [frame.name for frame in site["cond_indep_stack"] if frame.name in subsampled]
    if inside:
        raise ValueError(
            f"Latent site '{name}' lies inside the subsampled plate '{inside[0]}', so that each minibatch would have"
            " latent values of its own. Move it out of the plate, or marginalize it; if it is data, hand it to the"
            " model, so that the site is observed."
        )


def check_batch_size_is_used(arguments: dict, plates: Mapping[str, Any], subsampled: Collection[str]) -> None:
    """Refuse a batch size that no plate of the model takes up.

    :raises ValueError: naming the argument and the plates.
    """
    if subsampled:
        return
    for name in ("batch_size", "subsample_size"):
        value = arguments.get(name)
        if isinstance(value, int) and all(value < plate.size for plate in plates.values()):
            rows = ", ".join(f"'{k}' ({p.size} rows)" for k, p in plates.items()) or "none at all"
            raise ValueError(
                f"{name}={value} is given, but no plate of the model is subsampled; its plates: {rows}. Write"
                f" numpyro.plate(name, size, subsample_size={name}) around the observed sites, and take the rows of x"
                " and y in it by numpyro.subsample."
            )


def check_rows(name: str, site: dict) -> None:
    """Refuse an observed site that has more rows than its plate shows.

    :raises ValueError: naming the site and the plate.
    """
    for frame in site["cond_indep_stack"]:
        rows = site["fn"].batch_shape[frame.dim]
        if rows != frame.size:
            raise ValueError(
                f"Observed site '{name}' has {rows} rows in plate '{frame.name}', which shows {frame.size}: take the"
                " rows of every array in the plate by numpyro.subsample."
            )


def check_observation(name: str, site: dict) -> None:
    """Refuse an observation that would be paired with the elements of a site in a plate each with each.

    One number may stand for all of them. Without a plate NumPyro lets one law have many observations.

    :raises ValueError: naming the site and both shapes.
    """
    shape, expected = jnp.shape(site["value"]), site["fn"].shape()
    if site["cond_indep_stack"] and shape not in ((), expected):
        raise ValueError(
            f"The observation at site '{name}' has shape {shape}, but its law is of {expected}; reshape one, since each"
            " would be paired with each: a network's (row, 1) becomes (row,) by [..., 0]."
        )
