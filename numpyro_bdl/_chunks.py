# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Vectorization that does not take the whole batch at a time."""

from collections.abc import Callable

import jax
from jax import lax
from jax.custom_batching import custom_vmap


def in_chunks(function: Callable, size: int) -> Callable:
    """A function that, when it is vectorized, works on so many of the batch at a time."""
    chunked = custom_vmap(function)

    @chunked.def_vmap
    def _rule(axis_size, batched, *args):
        leaves, treedef = jax.tree.flatten(args)
        along = jax.tree.leaves(batched)

        def one(some):
            some = iter(some)
            return function(*treedef.unflatten([next(some) if b else x for x, b in zip(leaves, along, strict=True)]))

        out = lax.map(one, [x for x, b in zip(leaves, along, strict=True) if b], batch_size=size)
        return out, jax.tree.map(lambda _: True, out)

    return chunked
