# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Index streams for subsampled plates: which rows does a step see?

A stream is a pure function of a key and the step count, so that it needs no state, resumes anywhere, and is
the same under every chain method. Its work and memory at a step are O(batch), whatever the size of the data.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax, random

IndexStream = Callable[[Array, int | Array, int, int], Array]


def independent(key: Array, i: int | Array, size: int, batch: int) -> Array:
    """Rows drawn uniformly with replacement, independent from step to step.

    :param key: PRNG key of the stream.
    :param i: Step count.
    :param size: Rows of the plate, N.
    :param batch: Rows of a minibatch, B.
    :return: Integer indices ``(B,)``.
    """
    return random.randint(random.fold_in(key, i), (batch,), 0, size)


def epoch(key: Array, i: int | Array, size: int, batch: int) -> Array:
    """Rows in epochs: each epoch visits every row once, in a new random order.

    Step ``i`` takes places ``i B, ..., i B + B - 1`` of the endless row of shuffled epochs, so nothing is left
    over when B does not divide N. The order of an epoch is a keyed Feistel permutation of the smallest power of
    two above N, walked along its cycle until it falls below N; no permutation is ever stored.

    :param key: PRNG key of the stream.
    :param i: Step count.
    :param size: Rows of the plate, N.
    :param batch: Rows of a minibatch, B.
    :return: Integer indices ``(B,)``.
    :raises ValueError: if ``lcm(N, B) / gcd(N, B)`` does not fit in 31 bits.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_bdl.minibatch import epoch
        >>> steps = [epoch(random.key(0), i, 10, 4) for i in range(5)]       # two epochs
        >>> jnp.sort(jnp.concatenate(steps)).tolist() == sorted(2 * list(range(10)))
        True

    **References:** Luby and Rackoff, *How to construct pseudorandom permutations from pseudorandom functions*,
    1988; Black and Rogaway, *Ciphers with arbitrary finite domains*, 2002 (cycle walking).
    """
    divisor = math.gcd(size, batch)
    period, stride = size // divisor, batch // divisor
    if max(period * stride, size) >= 2**31:
        raise ValueError(
            f'minibatch="epoch" counts places up to {period * stride}, too many for 32 bits, with size={size} and'
            f" subsample_size={batch}; choose a subsample_size that shares a larger factor with the size."
        )
    i = jnp.asarray(i)
    lane = jnp.arange(batch)
    place = (i % period) * stride + lane // divisor
    number = (i // period) * stride + place // period
    offset = (place % period) * divisor + lane % divisor
    # a batch is never longer than an epoch, so it touches two epochs at most
    first = number[0]
    this, following = (random.bits(random.fold_in(key, first + e), (_rounds(size),), "uint32") for e in (0, 1))
    round_keys = jnp.where((number == first)[:, None], this, following)
    return _permute(offset.astype(jnp.uint32), round_keys, size).astype(jnp.int32)


def _rounds(size: int) -> int:
    """Rounds until no order is more likely than another: on a domain of a few bits eight leave some so by a tenth."""
    return 8 if size > 64 else 24


def _permute(x: Array, round_keys: Array, size: int) -> Array:
    """A permutation of 0..size-1 for each lane's keys, by an unbalanced Feistel network."""
    bits = max(2, (size - 1).bit_length())
    low = bits // 2
    widths = (low, bits - low)

    def encrypt(x):
        left, right = x >> widths[0], x & ((1 << widths[0]) - 1)
        for r in range(round_keys.shape[1]):
            # the halves trade places, and with them their widths
            width = widths[(r + 1) % 2]
            left, right = right, left ^ (_mix(right + round_keys[:, r]) & ((1 << width) - 1))
        return (left << widths[0]) | right

    def walk(x):
        return jnp.where(x < size, x, encrypt(x))

    return lax.while_loop(lambda x: jnp.any(x >= size), walk, encrypt(x))


def _mix(x: Array) -> Array:
    """The finaliser of MurmurHash3: every bit of the input reaches every bit of the output."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def full(key: Array, i: int | Array, size: int, batch: int) -> Array:
    """Every row at every step: the exact gradient.

    :return: Integer indices ``(N,)``, whatever the batch.
    """
    return jnp.arange(size)


STREAMS: dict[str, IndexStream] = {"independent": independent, "epoch": epoch, "full": full}


def plate_rows(stream: IndexStream, key: Array, i: int | Array, plates: Mapping[str, Any]) -> dict[str, Array]:
    """The rows that a step sees of each subsampled plate.

    :param stream: One of :data:`STREAMS`.
    :param key: PRNG key of the streams; each plate has a stream of its own.
    :param i: Step count.
    :param plates: The plates by name, as ``Potential.subsampled``.
    :return: Integer indices ``(B,)`` by name.
    """
    return {
        name: stream(random.fold_in(key, n), i, plate.size, plate.subsample_size)
        for n, (name, plate) in enumerate(plates.items())
    }
