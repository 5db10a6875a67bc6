# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What a model must be to be linearized, each with its own text."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random

from numpyro_bdl.guides.em import log_scales
from numpyro_bdl.linear.likelihoods import is_natural, parameters_of
from numpyro_bdl.linear.model import Batch
from numpyro_bdl.linear.system import System
from numpyro_bdl.natural_parameter import without_wrappers
from numpyro_bdl.noise import normal
from numpyro_bdl.potential import Potential
from numpyro_bdl.probes import can_be_cut

_OWNER = "AutoLinearizedLaplace"
_KEYS = 4  # a few units may be dropped alike by two keys


def check_batch_size(potential: Potential, plate: str | None, size: int, batch_size: int | None) -> int:
    """The rows of a batch.

    :raises ValueError: for a batch size without a plate, or beyond it.
    """
    if batch_size is None:
        return size
    if plate is None:
        raise ValueError(
            f"{_OWNER}: batch_size={batch_size} is given, but the observed sites share no plate whose rows could be"
            ' batched; write them inside of numpyro.plate("data", len(x)), and take the rows of every array in it by'
            " numpyro.subsample."
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or not 1 <= batch_size <= size:
        raise ValueError(
            f"{_OWNER}: batch_size must be an integer from 1 to {size}, the rows of plate '{plate}', got"
            f" {batch_size!r}."
        )
    return int(batch_size)


def check_cut(potential: Potential, plate: str, batch_size: int, args: tuple, kwargs: dict) -> None:
    """Refuse a model that shows all of its rows whatever the plate is given.

    :raises ValueError: with what to write.
    """
    if not can_be_cut(potential, plate, batch_size, args, kwargs):
        raise ValueError(
            f"{_OWNER}: the model can't be cut into batches of {batch_size} rows of its plate '{plate}'; inside the"
            " plate, take the rows of every array by numpyro.subsample(array, event_dim=...), or give no batch_size."
        )


def check_no_factor(sites: Mapping[str, Any]) -> None:
    """Refuse terms of the energy that are neither a prior nor a likelihood of data.

    :param sites: A trace.
    :raises ValueError: naming the factor.
    """
    for name, site in sites.items():
        if site["type"] == "sample" and isinstance(without_wrappers(site["fn"]), dist.Unit):
            raise ValueError(
                f"{_OWNER}: numpyro.factor '{name}' is no likelihood of data, and has no curvature that is known to be"
                " positive; write it as a prior, or as an observed site."
            )


def check_deterministic(
    potential: Potential, values: dict, rows: dict, mutable: dict, args: tuple, kwargs: dict
) -> None:
    """Refuse a network in training mode: one that draws numbers, or changes its statistics.

    :raises ValueError: naming what to do.
    """

    @jax.jit
    def run(key):
        sites = potential.run(values, rows, key, mutable, args, kwargs)
        check_no_factor(sites)
        likelihood = {k: sites[k]["fn"].log_prob(sites[k]["value"]) for k in potential.observed}
        kept = {k: s["value"] for k, s in sites.items() if s["type"] == "mutable"}
        return likelihood, potential.collections(kept) if potential.has_mutable else {}

    one, after = run(random.key(0))
    others = [run(random.key(n))[0] for n in range(1, _KEYS)]
    advice = "evaluate it in inference mode, as by fit(..., train=False) if the model takes such an argument"
    for name in one:
        if not all(np.array_equal(one[name], other[name], equal_nan=True) for other in others):
            raise ValueError(
                f"{_OWNER}: the model draws random numbers at site '{name}' (dropout), so that it has no tangent;"
                f" {advice}."
            )
    before, after = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (mutable, after))
    for (path, old), (_, new) in zip(before, after, strict=True):
        # a counter of random streams may go on
        if jnp.issubdtype(jnp.result_type(old), jnp.floating) and not np.allclose(old, new, rtol=1e-6):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"{_OWNER}: the network changes its statistics {where} when it is run (BatchNorm in training mode), so"
                f" that its rows are not independent; {advice}."
            )


def split_latent(
    potential: Potential, values: dict, rows: dict, mutable: dict, args: tuple, kwargs: dict
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The latent sites that outputs depend on, parameters of networks included, and those that are noise scales.

    :raises ValueError: for a latent site that is neither.
    """
    others = {k: w for k, w in values.items() if k not in potential.network}

    def parts(moving):
        sites = potential.run(values | moving, rows, random.key(0), mutable, args, kwargs)
        laws = {name: sites[name]["fn"] for name in potential.observed}
        outputs = {name: outputs_of(law) for name, law in laws.items()}
        return outputs, {name: laws[name].log_prob(sites[name]["value"]) for name in laws}

    @jax.jit
    def moves(direction):
        (outputs, density) = jax.jvp(parts, (others,), (direction,))[1]
        return tuple(jnp.any(jnp.stack([jnp.any(t != 0) for t in jax.tree.leaves(p)])) for p in (outputs, density))

    weights, noise = list(potential.network), []
    for name in others:
        direction = {k: jnp.zeros_like(w) for k, w in others.items()}
        direction |= normal(random.key(0), {name: others[name]})
        of_outputs, of_density = map(bool, moves(direction))
        if of_outputs:
            weights.append(name)
        elif of_density:
            noise.append(name)
        else:
            raise ValueError(
                f"{_OWNER}: the latent site '{name}' is neither a weight, on which the outputs depend, nor a noise"
                ' scale of the likelihood. The scale of a prior is learned by fit itself (prior="isotropic",'
                ' "per_site", "per_group" or "g"): give the weights a Normal prior with a constant scale.'
            )
    return tuple(k for k in potential.latent if k in weights), tuple(noise)


def outputs_of(law: dist.Distribution) -> Array:
    """What a scale is not: the location or the natural parameter, or all parameters of other families."""
    found = parameters_of(law)
    kinds = {"loc", "logits", "probs", "rate"} if is_natural(law) else {"mean"}
    location = {k: v for k, v in found.items() if k in kinds}
    return jnp.concatenate([jnp.ravel(jnp.asarray(v, float)) for v in (location or found).values()] or [jnp.zeros(1)])


def check_priors(names: tuple[str, ...], priors: Mapping[str, Any]) -> None:
    """Refuse weights without a normal prior of constant location and scale.

    :raises ValueError: naming the site and its prior.
    """
    for name in names:
        if isinstance(priors[name], str):
            raise ValueError(
                f"{_OWNER}: the prior of '{name}' is {priors[name]}; the linear model needs Normal priors with constant"
                " location and scale. Give it one, or leave the site out by params=..."
            )


def check_noise_site(noise: tuple[str, ...], site: str, system: System) -> None:
    """Refuse a noise site to which the scale of the likelihood is not proportional.

    :param noise: Noise scales of the model.
    :raises ValueError: naming the site.
    """
    if site not in noise:
        raise ValueError(
            f"{_OWNER}: noise_site={site!r} is not a noise scale of the likelihood; those are:"
            f" {', '.join(noise) or 'none'}."
        )

    for name, moving in system.model.moving:
        if "scale" in moving:
            raise ValueError(
                f"{_OWNER}: noise_site={site!r} can't be learned, since the scale of '{name}' depends on the weights"
                " too."
            )

    def slopes(rows, weight):
        batch = system.model.at(Batch(rows, weight, jnp.ones(())))
        value = jnp.log(system.model.others[site])
        return jax.jvp(log_scales(batch, site), (value,), (jnp.ones_like(value),))[1]

    found = jax.jit(slopes)(system.rows[0], system.weight[0])
    every = np.concatenate([np.ravel(slope) for slope in found.values()] or [np.zeros(1)])
    if np.any(np.minimum(np.abs(every), np.abs(every - 1)) > 1e-3) or not np.any(every > 0.5):
        raise ValueError(
            f"{_OWNER}: noise_site={site!r} must be the scale of a Normal likelihood, or a factor of it; leave it out"
            " of noise_site to keep it where it was trained."
        )


def check_finite_curvature(gradients: dict[str, Array]) -> None:
    """Refuse a linear model that is not finite.

    :raises ValueError: naming a site.
    """
    for name, g in gradients.items():
        if not bool(jnp.all(jnp.isfinite(g))):
            raise ValueError(
                f"{_OWNER}: the curvature of the likelihood, or the Jacobian with respect to '{name}', is not finite at"
                " the trained weights. Check the losses of the training, and for functions without a derivative there"
                " (a square root or a norm at zero)."
            )
