# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Values of an energy along directions."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, PyTree

from numpyro_bdl._checks import check_choice, check_integer, check_number
from numpyro_bdl._curvature import Energy
from numpyro_bdl.noise import normal
from numpyro_bdl.potential import Position


def filter_normalized(rng_key: Array, z: Position, *, vectors: str = "still") -> Position:
    r"""A random direction on the scale of the weights, filter by filter.

    .. math::

        d_{jk} \leftarrow \frac{d_{jk}}{\|d_{jk}\|} \, \|z_{jk}\|, \qquad d \sim N(0, I)

    for the filter k of site j: all weights that enter one output, which is the last axis of a kernel in Flax. A weight
    that is 0 stays 0 with its filter. Two directions in many dimensions are nearly orthogonal by themselves.

    :param rng_key: PRNG key.
    :param z: Position, arrays by site.
    :param vectors: What happens to arrays with a single axis or none, as biases: ``"still"`` keeps them as they are, as
        in the paper; ``"whole"`` takes each as one filter.
    :return: A direction, like the position.
    :raises ValueError: if nothing would move.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_bdl.flatness import filter_normalized
        >>> direction = filter_normalized(random.key(0), {"kernel": jnp.array([[3.0, 0], [4, 0]]), "bias": jnp.ones(2)})
        >>> jnp.linalg.norm(direction["kernel"], axis=0).round(3).tolist(), direction["bias"].tolist()
        ([5.0, 0.0], [0.0, 0.0])

    **References:** Li et al., *Visualizing the loss landscape of neural nets*, NeurIPS 2018.
    """
    check_choice("filter_normalized", "vectors", vectors, ("still", "whole"))
    if vectors == "still" and all(jnp.ndim(w) < 2 for w in z.values()):
        raise ValueError(
            f'filter_normalized: no site has two axes, so that nothing would move; give vectors="whole". The sites:'
            f" {', '.join(f'{name} {jnp.shape(w)}' for name, w in z.items())}."
        )

    def normalize(d, w):
        if w.ndim < 2 and vectors == "still":
            return jnp.zeros_like(w)
        axes = tuple(range(w.ndim - 1)) if w.ndim > 1 else None
        length = lambda x: jnp.sqrt(jnp.sum(x**2, axes, keepdims=True))
        return d / length(d) * length(w)

    return jax.tree.map(normalize, normal(rng_key, z), z)


class LossSlice(NamedTuple):
    """Values of an energy along one direction or over the plane of two."""

    coordinates: Float[np.ndarray, " point"]
    """multiples of the direction, or of each of the two"""
    energy: Float[np.ndarray, " point"] | Float[np.ndarray, "point point"]
    """at these multiples; of two directions the first goes with the first axis"""


def loss_slice(
    energy: Energy, center: PyTree, directions: Sequence[PyTree], *, radius: float = 1.0, points: int = 21
) -> LossSlice:
    """An energy along a direction, or over the plane of two.

    :param energy: A function from a tree of arrays to a scalar, as :func:`data_term` gives.
    :param center: Where the directions meet: a tree of arrays, as :func:`position_of` gives.
    :param directions: One or two trees like the center: random, by :func:`filter_normalized`, or towards other draws.
    :param radius: How far to go to both sides, in units of the directions.
    :param points: Points on each axis; an odd number has the center among them.
    :return: The values of the energy, not finite where it is not.
    :raises ValueError: for more than two directions, or one that is not like the center.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_bdl.flatness import loss_slice
        >>> found = loss_slice(lambda z: (z["w"] ** 2).sum(), {"w": jnp.zeros(2)}, [{"w": jnp.ones(2)}], points=3)
        >>> found.coordinates.tolist(), found.energy.tolist()
        ([-1.0, 0.0, 1.0], [2.0, 0.0, 2.0])
    """
    check_number("loss_slice", "radius", radius)
    check_integer("loss_slice", "points", points, least=2)
    if isinstance(directions, Mapping) or len(directions) not in (1, 2):
        raise ValueError("loss_slice: directions must be a list of one or two trees like the center.")
    wanted = jax.tree.map(jnp.shape, center)
    for n, direction in enumerate(directions):
        if jax.tree.map(jnp.shape, direction) != wanted:
            raise ValueError(
                f"loss_slice: direction {n} must be like the center, {wanted}; got"
                f" {jax.tree.map(jnp.shape, direction)}."
            )
    coordinates = np.linspace(-radius, radius, points)
    grid = np.stack(np.meshgrid(*[coordinates] * len(directions), indexing="ij"), -1).reshape(-1, len(directions))

    def at(multiples):
        moved = lambda w, *ds: w + sum(m * d for m, d in zip(multiples, ds, strict=True))
        return energy(jax.tree.map(moved, center, *directions))

    dtype = jnp.result_type(*jax.tree.leaves(center))
    values = np.asarray(jax.jit(partial(lax.map, at))(jnp.asarray(grid, dtype)))
    return LossSlice(coordinates, values.reshape([points] * len(directions)))
