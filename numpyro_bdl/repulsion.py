# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""How the particles of an ensemble repel each other: by their weights, or by the function of the model."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax, random
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from numpyro_bdl.mmd import Discrepancy, Draws, Gaussian, Kernel, Prior, has_closed_form
from numpyro_bdl.potential import Position, Potential
from numpyro_bdl.probes import flat_sites, function_of, normal_priors

INERT = 0.01
"""The share of the prior's drift below which a repulsion is warned of."""

Features = Callable[[Position, dict], dict[str, Array]]
"""From a position and mutable collections to vectors ``(d,)``, by block."""


class Repulsion(NamedTuple):
    """How particles are compared."""

    features: Features
    discrepancies: dict[str, Discrepancy]
    """by block; their sum counts"""


def repulsion_and_attraction(
    z: Position, mutable: dict, repulsion: Repulsion, particles: str
) -> tuple[Position, Position]:
    r""":math:`\frac1N \sum_j \nabla_1 k(\theta_n, \theta_j)` and :math:`\nabla \mu_P(\theta_n)`, inside of a vmap over
    the particles.

    :param z: Position of a particle.
    :param mutable: Its mutable collections.
    :param repulsion: How particles are compared.
    :param particles: Axis name of the vmap.
    :return: Trees like the position; the first is subtracted in a step, which drives particles apart.
    """
    features, pull = jax.vjp(lambda z: repulsion.features(z, mutable), z)
    ensemble = lax.all_gather(features, particles)

    def terms(features):
        pairs = [d(features[name], ensemble[name]) for name, d in repulsion.discrepancies.items()]
        return sum(mean for mean, _ in pairs), sum(embedding for _, embedding in pairs)

    (one, other), push = jax.vjp(terms, features)
    unit, zero = jnp.ones_like(one), jnp.zeros_like(one)
    return pull(*push((unit, zero.astype(other.dtype))))[0], pull(*push((zero, unit.astype(other.dtype))))[0]


def make_repulsion(
    potential: Potential, kernel: Kernel, where: str | None, anchor_inputs: tuple | None, per_site: bool, draws: int
) -> Repulsion:
    """The features by which particles are compared, and the discrepancies, with bandwidths and prior embeddings.

    The parameters are those of :class:`~numpyro_bdl.WGFEnsemble`. What is drawn from the prior is always the same.
    """
    where = where or ("function" if potential.network or anchor_inputs is not None else "weights")
    with jax.ensure_compile_time_eval():
        if where == "function":
            try:
                function = function_of(potential, anchor_inputs)
            except ValueError as error:
                raise ValueError(
                    f'No repulsion by the function of the model: {error} Or give repulsion="weights".'
                ) from error
            features = lambda z, mutable: {"function": function(z, mutable)}
            priors = _drawn(potential, features, draws)
        else:
            features = _weights(potential, per_site)
            priors = (has_closed_form(kernel) and _gaussian(potential, features)) or _drawn(potential, features, draws)
        return Repulsion(features, {block: Discrepancy(kernel, prior) for block, prior in priors.items()})


def _weights(potential: Potential, per_site: bool) -> Features:
    blocks = {name: (name,) for name in potential.latent} if per_site else {"weights": potential.latent}
    return lambda z, mutable: {block: ravel_pytree([z[name] for name in names])[0] for block, names in blocks.items()}


def _gaussian(potential: Potential, features: Features) -> dict[str, Prior]:
    """The moments of the weights, if all of them are normal and independent; {} if not."""
    priors = normal_priors(potential, (dist.Normal, dist.LogNormal))
    if any(isinstance(prior, str) for prior in priors.values()):
        return {}
    shapes, _ = jax.eval_shape(potential.initial, random.key(0))
    mean, scale = (
        features({name: jnp.asarray(priors[name][k], z.dtype) for name, z in shapes.items()}, {}) for k in (0, 1)
    )
    return {block: Gaussian(mean[block], scale[block]) for block in mean}


def _drawn(potential: Potential, features: Features, count: int) -> dict[str, Prior]:
    """Features of draws from the prior; None if a part of it is flat."""
    if flat_sites(potential):
        return dict.fromkeys(jax.eval_shape(features, *jax.eval_shape(potential.initial, random.key(0))))
    _, mutable = potential.initial(random.key(0))
    draw = lambda key: features(potential.prior_draw(key), mutable)
    points = jax.jit(lambda keys: lax.map(draw, keys, batch_size=20))(random.split(random.key(0), count))
    return {block: Draws(x) for block, x in points.items()}


def warn_if_inert(ratio: Array) -> None:
    """Warn of a repulsion that does next to nothing."""
    if isinstance(ratio, Tracer):
        return
    ratio = np.asarray(ratio)[np.isfinite(ratio)]  # it is infinite under a flat prior
    median = float(np.median(ratio)) if ratio.size else np.inf
    if median < INERT:
        warnings.warn(
            f"WGFEnsemble: the repulsion is {median:.1e} of the drift of the prior, next to nothing. In many dimensions"
            " a kernel on weights acts only at their scale: take a larger mmd, the kernel's own bandwidth and scale, or"
            ' repulsion="function"; particles in one place have to start apart.',
            stacklevel=3,
        )
