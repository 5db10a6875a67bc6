# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussian noise for a pytree: the one place that draws the noise of the kernels.

On a CPU most of a Langevin step goes into its noise. JAX runs the rounds of Threefry as a loop there, each round a
pass over memory, once per leaf; here the rounds are written out, so that XLA fuses them into one pass, for all leaves
together. The bits are those of :func:`jax.random.bits`, and so the numbers are those of :func:`jax.random.normal` for
the whole tree laid end to end.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jaxtyping import PyTree

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_bits(key: Array, size: int) -> Array:
    """Random bits by Threefry-2x32 with 20 rounds, unrolled.

    :param key: A single typed Threefry key, or a legacy ``(2,)`` ``uint32`` key.
    :param size: How many words, below :math:`2^{32}`.
    :return: ``uint32`` array ``(size,)``, the same as ``jax.random.bits(key, (size,), "uint32")`` with
        ``jax_threefry_partitionable`` on.

    **References:** Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.
    """
    k0, k1 = random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    counter = lax.iota(jnp.uint32, size)
    x0, x1 = jnp.broadcast_to(schedule[0], counter.shape), counter + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + schedule[(block + 1) % 3]
        x1 = x1 + schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return x0 ^ x1


def _is_threefry(key: Array) -> bool:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return str(random.key_impl(key)) == "threefry2x32"
    return key.shape == (2,)


def _flat_normal(key: Array, size: int, dtype) -> Array:
    if not _is_threefry(key) or dtype != jnp.float32:
        return random.normal(key, (size,), dtype)
    # without the barrier XLA would compute the bits anew for every leaf, in loops that it can't vectorize
    bits = lax.optimization_barrier(threefry_bits(key, size))
    # 23 random mantissa bits make a uniform number in [1, 2), then in (-1, 1)
    unit = lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(low, unit * (1 - low) + low)
    return np.float32(np.sqrt(2)) * lax.erf_inv(uniform)


def normal(key: Array, tree: PyTree) -> PyTree:
    """Independent standard normal numbers, shaped like a tree.

    :param key: A typed or legacy PRNG key.
    :param tree: A pytree of floating-point arrays (or ``jax.ShapeDtypeStruct``).
    :return: A tree of the same structure, shapes and dtypes: ``jax.random.normal(key, (d,))`` cut into leaves.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_bdl.noise import normal
        >>> xi = normal(random.key(0), {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)})
        >>> xi["w"].shape, xi["b"].shape
        ((2, 3), (3,))
    """
    leaves, treedef = jax.tree.flatten(tree)
    ends = np.cumsum([0] + [leaf.size for leaf in leaves]).tolist()
    flat = _flat_normal(key, ends[-1], jnp.result_type(*leaves))
    # slices, which XLA fuses with the transform and the update; jnp.split it does not
    parts = [flat[start:end] for start, end in itertools.pairwise(ends)]
    return treedef.unflatten(
        [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    )
