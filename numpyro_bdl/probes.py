# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What a model tells of itself when it is evaluated: constant priors, its output layer, layers without a scale."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random
from jax.core import Tracer

from numpyro_bdl.natural_parameter import natural_parameter
from numpyro_bdl.noise import normal
from numpyro_bdl.potential import Position, Potential

_FEW = 256  # rows by which one layer can be told from another


def _evaluated(probe):
    """Numbers, not tracers, also inside of a program that is being traced (chains in parallel)."""

    @wraps(probe)
    def evaluated(*args):
        with jax.ensure_compile_time_eval():
            return probe(*args)

    return evaluated


@_evaluated
def normal_priors(
    potential: Potential, families: tuple[type, ...] = (dist.Normal,)
) -> dict[str, tuple[np.ndarray, np.ndarray] | str]:
    """Location and scale of the prior of every latent site that is normal, with constants.

    Whether location and scale are constants is seen by evaluating the model at two positions.

    :param families: Families with a location and a scale; ``LogNormal`` too is normal in unconstrained space.
    :return: By site, arrays shaped like it; for any other site, in words, what its prior is instead.
    """
    words: dict[str, str] = {}
    rows = _rows(potential)

    @jax.jit
    def read(z, mutable):
        values = potential.constrain(z, potential.args, potential.kwargs)
        found = {}
        for name, site in potential.run(values, rows, random.key(0), mutable, potential.args, potential.kwargs).items():
            if name not in potential.latent:
                continue
            base = _base(site["fn"])
            if type(base) in families:
                moments = (jnp.broadcast_to(x, z[name].shape) for x in (base.loc, base.scale))
                found[name] = *moments, 1.0 if site["scale"] is None else site["scale"]
            else:
                words[name] = f"of the family {type(base).__name__}"
        return found

    one, other = (jax.tree.map(np.asarray, read(*_anywhere(potential, n))) for n in range(2))
    result: dict[str, Any] = dict(words)
    for name, (loc, scale, factor) in one.items():
        if not all(np.array_equal(a, b) for a, b in zip(one[name], other[name], strict=True)):
            result[name] = "a Normal whose location or scale depends on other latent sites"
        elif np.any(factor != 1):
            result[name] = "a Normal scaled by handlers.scale"
        else:
            result[name] = loc, scale
    return {name: result[name] for name in potential.latent}


def flat_sites(potential: Potential) -> list[str]:
    """Latent sites with an improper prior."""
    return [name for name, prior in normal_priors(potential).items() if "ImproperUniform" in str(prior)]


def normal_scales(potential: Potential) -> dict[str, float | str]:
    """The scale of every latent site whose prior is a centred normal law with one constant scale.

    :return: The scale by site; for any other site, in words, what its prior is instead.
    """
    result: dict[str, float | str] = {}
    for name, prior in normal_priors(potential).items():
        if isinstance(prior, str):
            result[name] = prior
        elif np.any(prior[0] != 0):
            result[name] = "a Normal with a location other than 0"
        elif np.any(prior[1] != prior[1].flat[0]):
            result[name] = "a Normal whose scale differs between its entries"
        else:
            result[name] = float(prior[1].flat[0])
    return result


@_evaluated
def scales_from(args: tuple, kwargs: dict, potential: Potential, names: tuple[str, ...]) -> list[str]:
    """Those of the named sites, with normal priors, whose scale depends on arguments that are traced."""
    z, mutable = _anywhere(potential)
    values = potential.constrain(z, potential.args, potential.kwargs)
    sites = potential.run(values, _rows(potential), random.key(0), mutable, args, kwargs)
    return [name for name in names if isinstance(_base(sites[name]["fn"]).scale, Tracer)]


def _base(law: Any) -> Any:
    while isinstance(law, (dist.Independent, dist.ExpandedDistribution)):
        law = law.base_dist
    return law


def _rows(potential: Potential) -> dict[str, Any]:
    return {name: jnp.arange(plate.subsample_size) for name, plate in potential.subsampled.items()}


def _few_rows(potential: Potential, z: Position, mutable: dict) -> dict[str, Array]:
    """The rows of :func:`_rows`, and a few, evenly spaced, of larger plates of data that the model can be cut to."""
    rows = _rows(potential)
    of_data = set().union(*potential.observed.values()) - set(rows)
    cut = {
        name: jnp.linspace(0, plate.size - 1, _FEW).astype(jnp.int32)
        for name, plate in potential.plates.items()
        if name in of_data and plate.size > _FEW
    }
    call = potential.args, potential.kwargs

    def log_prob(rows):
        sites = potential.run(potential.constrain(z, *call), rows, random.key(0), mutable, *call)
        # the energy too, in which sites that are not observed take part
        energies = potential.energies(z, rows, random.key(0), mutable, *call)
        return {name: sites[name]["fn"].log_prob(sites[name]["value"]) for name in potential.observed}, energies

    try:
        few, _ = jax.eval_shape(log_prob, rows | cut)
    except (ValueError, TypeError):
        return rows
    every, _ = jax.eval_shape(log_prob, rows)
    expected = {
        name: tuple(_FEW if plate in cut else n for n, plate in zip(x.shape, potential.observed[name], strict=True))
        for name, x in every.items()
    }
    return rows | cut if {name: x.shape for name, x in few.items()} == expected else rows


def _anywhere(potential: Potential, n: int = 0) -> tuple[Position, dict]:
    """A position of no meaning, without the program that draws the first weights of a network."""
    z, mutable = jax.eval_shape(potential.initial, random.key(n))
    return normal(random.key(n), z), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), mutable)


def _start(potential: Potential, n: int = 0) -> tuple[Position, dict]:
    """A first position, moved so that no parameter is at a special value, such as biases of zero."""
    z, mutable = potential.initial(random.key(n))
    keys = dict(zip(z, random.split(random.key(n + 1), len(z)), strict=True))
    return {name: w + 0.1 * random.normal(keys[name], w.shape, w.dtype) for name, w in z.items()}, mutable


@_evaluated
def output_sites(potential: Potential) -> frozenset[str]:
    """Parameters of networks in which the function of the model is affine: those of the output layer.

    :raises ValueError: if it can't be told: an observed site has no natural parameter that is known, or a network has
        no parameter in which it is affine, or one that the function does not depend on.
    """
    if not potential.observed:
        raise ValueError("The model has no observed site.")
    z, mutable = _start(potential)
    rows = _few_rows(potential, z, mutable)

    @jax.jit
    def function(z):
        values = potential.constrain(z, potential.args, potential.kwargs)
        sites = potential.run(values, rows, random.key(2), mutable, potential.args, potential.kwargs)
        return jnp.concatenate([natural_parameter(name, sites[name]).ravel() for name in potential.observed])

    found = set()
    f0 = function(z)
    for n, name in enumerate(potential.network):
        scale = 0.1 + jnp.std(z[name])
        direction = scale * random.normal(random.key(n), z[name].shape, z[name].dtype)
        f1, f2 = (function(z | {name: z[name] + step * direction}) for step in (1, 2))
        bend, size = jnp.max(jnp.abs(f2 - 2 * f1 + f0)), jnp.max(jnp.abs(f2 - f0))
        if size == 0 and z[name].ndim > 1:
            raise ValueError(f"The function of the model does not depend on '{name}'.")
        if bend <= 1e-3 * size:
            found.add(name)
    for network in {owner for owner, _ in potential.network.values()}:
        if not any(potential.network[name][0] == network for name in found):
            raise ValueError(f"The function of the model is affine in no parameter of '{network}'.")
    return frozenset(found)


@_evaluated
def sites_without_scale(potential: Potential, names: tuple[str, ...]) -> frozenset[str]:
    """Those of the named parameters whose layer can be doubled without a change of the likelihood (as by BatchNorm).

    The change is compared with that by turning the layer's weights over, at several positions.
    """
    rows = _few_rows(potential, *_start(potential))

    @jax.jit
    def energy(z, mutable):
        energies, _ = potential.energies(z, rows, random.key(2), mutable, potential.args, potential.kwargs)
        return energies.likelihood

    def without_scale(name, z, mutable, before):
        network, path = potential.network[name]
        layer = [k for k, (owner, other) in potential.network.items() if (owner, other[:-1]) == (network, path[:-1])]
        change = abs(energy(z | {k: 2 * z[k] for k in layer}, mutable) - before)
        turned = abs(energy(z | {k: -jnp.flip(z[k]) for k in layer}, mutable) - before)
        return change < 1e-2 * turned

    starts = [(*start, energy(*start)) for start in (_start(potential, n) for n in range(3))]
    candidates = [name for name in names if name in potential.network]
    return frozenset(name for name in candidates if all(without_scale(name, *start) for start in starts))


def function_of(potential: Potential, inputs: tuple | None = None, rows: int = 64) -> Callable:
    """The function of a model, as a vector, of a position in unconstrained space and mutable collections.

    :param inputs: Arguments of the model at which it is evaluated; None for evenly spaced rows of those of the
        potential, taken through the data plate, or all of them if the model can't be cut.
    :param rows: How many rows, at most.
    :return: A function of ``(z, mutable)``; its values ``(d,)`` hold all points and outputs.
    :raises ValueError: if the model can't be evaluated at the inputs, or has no natural parameter that is known.
    """
    if not potential.observed:
        raise ValueError("The model has no observed site.")
    sizes = {name: plate.size for name, plate in potential.plates.items()}
    plate = potential.data_plate(sizes)

    def at(rows, args, kwargs):
        def function(z, mutable):
            values = potential.constrain(z, potential.args, potential.kwargs)
            # one key: a network with dropout is the same function at every step
            sites = potential.run(values, rows, random.key(0), mutable, args, kwargs)
            parts = {name: natural_parameter(name, sites[name]) for name in potential.observed}
            return jnp.concatenate([part.ravel() for part in parts.values()])

        return function

    start = jax.eval_shape(potential.initial, random.key(0))
    if inputs is not None:
        function = at({}, tuple(inputs), {})
        try:
            jax.eval_shape(function, *start)
        except Exception as error:
            shapes = ", ".join(str(np.shape(x)) for x in jax.tree.leaves(inputs))
            raise ValueError(f"The model can't be evaluated at inputs of shapes {shapes}: {error}") from error
        return function
    every = at({}, potential.args, potential.kwargs)
    if plate is None:
        return every
    taken = jnp.linspace(0, sizes[plate] - 1, min(rows, sizes[plate])).astype(jnp.int32)
    cut = at({plate: taken}, potential.args, potential.kwargs)
    whole = jax.eval_shape(every, *start).size
    try:
        shrinks = jax.eval_shape(cut, *start).size * sizes[plate] == whole * len(taken)
    except (ValueError, TypeError):
        shrinks = False
    return cut if shrinks else every


def can_be_cut(potential: Potential, plate: str, rows: int, args: tuple, kwargs: dict) -> bool:
    """Whether all observed sites in a plate shrink to so many rows of it, abstractly (no flops)."""

    def values(key):
        z, mutable = potential.initial(key)
        draw = potential.constrain(z, args, kwargs)
        sites = potential.run(draw, {plate: jnp.arange(rows)}, key, mutable, args, kwargs)
        inside = [name for name, plates in potential.observed.items() if plate in plates]
        return {name: sites[name]["fn"].log_prob(sites[name]["value"]) for name in inside}

    try:
        shapes = jax.eval_shape(values, random.key(0))
    except (ValueError, TypeError):
        return False
    return all(x.shape[potential.observed[name].index(plate)] == rows for name, x in shapes.items())
