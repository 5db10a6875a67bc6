# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of what a user hands in, made before any long work."""

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_number(
    owner: str, name: str, value: Any, *, low: float = 0.0, high: float = math.inf, closed: bool = False
) -> None:
    """Refuse a value that is not a finite number in (low, high), or in [low, high) if closed.

    :raises ValueError: with the owner, the name, what came and what was expected.
    """
    bracket = "[" if closed else "("
    number = not isinstance(value, (bool, str)) and np.ndim(value) == 0 and np.isreal(value)
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
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def named_arguments(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a model call under the names of its signature, as far as it tells them."""
    try:
        return dict(inspect.signature(model).bind_partial(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {f"argument {n}": value for n, value in enumerate(args)} | kwargs


def check_finite_data(arguments: dict[str, Any]) -> None:
    """Refuse model arguments that hold NaN or infinite numbers.

    :param arguments: Model arguments by name; tracers are passed over.
    :raises ValueError: naming the argument, how many entries are bad and the first of them.
    """
    for name, value in arguments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            if isinstance(leaf, Tracer) or not isinstance(leaf, (np.ndarray, jax.Array)):
                continue
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                continue
            # by NumPy, since inside pmap even a constant would become a tracer
            bad = np.argwhere(~np.isfinite(np.asarray(leaf)))
            if not len(bad):
                continue
            raise ValueError(
                f"The model's argument '{name}{jax.tree_util.keystr(path)}' has {len(bad)} NaN or infinite"
                f" entries, the first at index {tuple(map(int, bad[0]))}. They would make every gradient NaN:"
                " remove these rows, or impute them (masked entries too must hold some finite number)."
            )
