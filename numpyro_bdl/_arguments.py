# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The arguments of a model in two parts: arrays, which a program traces, and the rest, on which it depends."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Arguments:
    """What is left of the arguments of a model without their arrays; equal if the same program serves both."""

    def __init__(self, args: tuple, kwargs: dict):
        leaves, self._treedef = jax.tree.flatten((args, kwargs))
        self._is_array = tuple(isinstance(leaf, (np.ndarray, jax.Array)) for leaf in leaves)
        self._fixed = tuple(leaf for leaf, array in zip(leaves, self._is_array, strict=True) if not array)

    def arrays(self, args: tuple, kwargs: dict) -> list[Array]:
        """The arrays among arguments of this structure."""
        leaves = jax.tree.leaves((args, kwargs))
        return [jnp.asarray(leaf) for leaf, array in zip(leaves, self._is_array, strict=True) if array]

    def join(self, arrays: list[Array]) -> tuple[tuple, dict]:
        """Positional and keyword arguments again."""
        traced, fixed = iter(arrays), iter(self._fixed)
        return self._treedef.unflatten([next(traced) if array else next(fixed) for array in self._is_array])

    @property
    def _identity(self) -> tuple:
        return self._treedef, self._is_array, tuple(map(_identity, self._fixed))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arguments) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


def _identity(leaf: Any) -> tuple:
    try:
        hash(leaf)
    except TypeError:
        return type(leaf), id(leaf)
    return type(leaf), leaf
