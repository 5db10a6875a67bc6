# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Normalization layers: which parameters are theirs, and which layers they take the scale of.

A layer whose output is normalized can be multiplied by any k without a change of the function, while its Jacobian is
divided by k. The size of its weights is arbitrary, and one prior precision for it and others would make the
uncertainty of predictions as arbitrary.

**References:** Antorán et al., *Adapting the linearised Laplace model evidence for modern deep learning*, ICML 2022.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from numpyro_bdl.potential import Potential

_TWICE = 2.0


def affine_sites(potential: Potential) -> tuple[str, ...]:
    """Scales and biases of normalization layers: of layers of a network that have a scale and no kernel."""
    layers = _layers(potential, tuple(potential.network))
    found = []
    for (_, path), sites in layers.items():
        leaves = {potential.network[name][1][-1] for name in sites}
        named = any("norm" in str(entry).lower() for entry in path[-1:])
        if leaves <= {"scale", "bias"} and ("scale" in leaves or named):
            found += sites
    return tuple(found)


def scale_free_layers(
    potential: Potential, names: tuple[str, ...], function: Callable[[dict, dict], Array], weights: dict, mutable: dict
) -> dict[str, tuple[str, ...]]:
    """Layers whose weights can be doubled, with the statistics of one normalization layer, and the function stays.

    :param names: Sites to look among.
    :param function: Outputs of ``(weights, mutable)`` at a few rows.
    :return: The sites of each, by name of the layer.
    """
    layers = _layers(potential, names)
    statistics = _statistics(mutable)

    @jax.jit
    def moved(factors: dict[str, Array], of_statistics: list[Array]) -> Array:
        scaled = {name: w * factors.get(name, 1.0) for name, w in weights.items()}
        return function(scaled, _scale_statistics(mutable, statistics, of_statistics))

    ones = {name: jnp.ones(()) for layer in layers.values() for name in layer}
    still = [jnp.ones(()) for _ in statistics]
    before = moved(ones, still)

    def change(layer, factor, norm=None):
        factors = ones | {name: jnp.asarray(factor) for name in layer}
        of_statistics = [jnp.asarray(factor) if n == norm else s for n, s in enumerate(still)]
        return float(jnp.max(jnp.abs(moved(factors, of_statistics) - before)))

    found = {}
    for (network, path), sites in layers.items():
        least = 1e-2 * change(sites, -_TWICE)  # what the function does when the layer does change
        if any(change(sites, _TWICE, norm) < least for norm in (None, *range(len(statistics)))):
            found["/".join([network.removesuffix("$params"), ".".join(map(str, path))])] = sites
    return found


def _layers(potential: Potential, names: tuple[str, ...]) -> dict[tuple[str, tuple], tuple[str, ...]]:
    layers: dict[tuple[str, tuple], tuple[str, ...]] = {}
    for name in names:
        if name in potential.network:
            network, path = potential.network[name]
            layers[network, path[:-1]] = (*layers.get((network, path[:-1]), ()), name)
    return layers


def _statistics(mutable: dict) -> list[tuple]:
    """Where running means and variances lie in mutable collections."""
    paths = {tuple(entry.key for entry in path) for path, _ in jax.tree_util.tree_flatten_with_path(mutable)[0]}
    return sorted((path[:-1] for path in paths if path[-1] == "mean" and (*path[:-1], "var") in paths), key=str)


def _scale_statistics(mutable: Any, statistics: list[tuple], factors: list[Array]) -> Any:
    by_path = dict(zip(statistics, factors, strict=True))

    def scale(path, value):
        *parent, leaf = (entry.key for entry in path)
        factor = by_path.get(tuple(parent))
        if factor is None or leaf not in ("mean", "var"):
            return value
        return value * (factor if leaf == "mean" else factor**2)

    return jax.tree_util.tree_map_with_path(scale, mutable)
