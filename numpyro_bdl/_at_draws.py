# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The draws of a run as positions of its kernel, in unconstrained space, and the gradient that the kernel has there."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.distributions.transforms import biject_to
from numpyro.infer import MCMC

from numpyro_bdl._runs import bad_chains, mutable_of, positions, potential_of
from numpyro_bdl.kernels.base import StochasticGradientKernel
from numpyro_bdl.kernels.symmetry_restricted import SymmetryRestricted
from numpyro_bdl.minibatch import STREAMS
from numpyro_bdl.potential import Position, Potential


class Draws(NamedTuple):
    """Some draws of a run, each field with the axes (chain, draw)."""

    z: Position
    """positions in unconstrained space"""
    mutable: dict
    index: np.ndarray
    """which draws of each chain"""


def check_run(owner: str, mcmc: Any) -> Potential:
    """The potential of a run that has draws, none of them of a chain that met a gradient that was not finite.

    :raises TypeError: for anything but an MCMC object of a kernel that has a model.
    :raises ValueError: for a run without draws, or with bad chains.
    """
    if not isinstance(mcmc, MCMC):
        raise TypeError(f"{owner} needs a run, a numpyro.infer.MCMC object, got {type(mcmc).__name__}.")
    if mcmc.last_state is None:
        raise ValueError(f"{owner}: the MCMC object holds no draws yet; run it first.")
    if getattr(inner_kernel(mcmc.sampler), "model", None) is None:
        raise TypeError(f"{owner} needs a kernel with a model, and this {type(mcmc.sampler).__name__} has none.")
    bad = bad_chains(mcmc)
    if bad:
        raise ValueError(
            f"{owner}: the chains {list(bad)} met a gradient that was not finite, and their draws are NaN. Run with a"
            " smaller step."
        )
    return potential_of(mcmc)


def inner_kernel(kernel: Any) -> Any:
    """The kernel that moves the chains, inside of what wraps it."""
    return inner_kernel(kernel.kernel) if isinstance(kernel, SymmetryRestricted) else kernel


def own_kernel(owner: str, mcmc: MCMC) -> StochasticGradientKernel:
    """The kernel of this package in a run.

    :raises TypeError: for another kernel.
    """
    kernel = inner_kernel(mcmc.sampler)
    if not isinstance(kernel, StochasticGradientKernel):
        raise TypeError(
            f"{owner} is about the step of a stochastic-gradient kernel of numpyro_bdl, and {type(kernel).__name__} is"
            " none."
        )
    return kernel


def momentum_of(kernel: Any) -> float:
    """b of a kernel with momentum, 0 of one without."""
    return float(getattr(kernel, "_momentum", 1 - getattr(kernel, "_friction", 1.0)))


def by_chain(mcmc: MCMC, field: Any) -> Any:
    """A field of the last state of an own kernel, with an axis of chains in front, also if there is one chain."""
    batched = np.ndim(mcmc.last_state.i) == 1
    return jax.tree.map(lambda x: x if batched else jnp.asarray(x)[None], field)


def diagonal_of(mcmc: MCMC) -> Position:
    """The preconditioner P of each chain, (chain, ...) by site, or numbers."""
    kernel, state = inner_kernel(mcmc.sampler), mcmc.last_state
    z, inner = by_chain(mcmc, state.z), by_chain(mcmc, state.preconditioner)
    return kernel._preconditioner.diagonal(inner, z)


def field_of_draws(mcmc: MCMC, name: str, index: np.ndarray) -> np.ndarray:
    """A number of each draw, (chain, draw): collected, or that of the last state."""
    collected = mcmc.get_extra_fields(group_by_chain=True).get(name)
    if collected is not None:
        return np.asarray(collected)[:, index]
    last = np.asarray(by_chain(mcmc, getattr(mcmc.last_state, name)))
    return np.broadcast_to(last[:, None], (len(last), len(index)))


def temperature_of_draws(mcmc: MCMC, index: np.ndarray) -> np.ndarray:
    """The temperature at which the noise of each draw was injected, (chain, draw); 1 for a kernel that has none."""
    kernel = inner_kernel(mcmc.sampler)
    shape = (mcmc.num_chains, len(index))
    if not isinstance(kernel, StochasticGradientKernel):
        return np.ones(shape)
    if hasattr(kernel, "_kl"):
        return np.full(shape, kernel._kl if kernel._noisy else 0.0)
    return field_of_draws(mcmc, "temperature", index)


def active_counts(mcmc: MCMC, draws: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Coordinates of each site that were not pruned, by chain.

    :param draws: Arrays (chain, draw, ...) by site.
    """
    mask = getattr(mcmc.last_state, "mask", ())
    masks = by_chain(mcmc, mask) if mask else {}
    return {
        name: np.asarray(masks[name]).reshape(len(value), -1).sum(1)
        if name in masks
        else np.full(len(value), value[0, 0].size)
        for name, value in draws.items()
    }


def unconstrained_draws(owner: str, mcmc: MCMC, potential: Potential, count: int | None = None) -> Draws:
    """Draws of a run in unconstrained space.

    :param owner: Name of the caller, for texts.
    :param count: How many of each chain, evenly spaced; None for all.
    :raises ValueError: for sites that the run left out, and draws that are not finite.
    """
    values = {name: value for name, value in positions(mcmc).items() if name in potential.latent}
    missing = [name for name in potential.latent if name not in values]
    if missing:
        raise ValueError(f"{owner}: the run left these sites out of its draws: {missing}.")
    draws = next(iter(values.values())).shape[1]
    index = np.unique(np.linspace(0, draws - 1, min(count or draws, draws)).round().astype(int))
    mutable = mutable_of(mcmc, potential)
    if len(index) < draws:
        values, mutable = jax.tree.map(lambda x: x[:, index], (values, mutable))
    if potential.bounded:
        rows = {name: jnp.arange(plate.subsample_size) for name, plate in potential.subsampled.items()}

        def unconstrain(values, mutable):
            # a support may depend on other sites; of the model only the supports are computed
            sites = potential.run(values, rows, random.key(0), mutable, potential.args, potential.kwargs)
            return {name: biject_to(sites[name]["fn"].support).inv(value) for name, value in values.items()}

        values = jax.jit(jax.vmap(jax.vmap(unconstrain)))(values, mutable)
    finite = np.array([np.isfinite(v).all(tuple(range(1, np.ndim(v)))) for v in values.values()]).all(0)
    if not finite.all():
        raise ValueError(
            f"{owner}: the chains {np.flatnonzero(~finite).tolist()} have draws that are not finite in unconstrained"
            " space: they are NaN, or lie on the boundary of a support."
        )
    return Draws({name: values[name] for name in potential.latent}, mutable, index)


class _At(NamedTuple):
    """What a kernel's gradient depends on of its state."""

    z: Position
    inclusion: dict


def gradient_of(mcmc: MCMC, potential: Potential, minibatch: str | None) -> Callable:
    """The gradient that the kernel of a run follows, of the energy whose law it targets, as a function of chain,
    position, mutable collections and key.

    :param minibatch: One of :data:`~numpyro_bdl.minibatch.STREAMS`, for fresh rows by each key; None for all rows.
    """
    kernel: Any = inner_kernel(mcmc.sampler)
    args, kwargs = potential.args, potential.kwargs
    if not isinstance(kernel, StochasticGradientKernel):
        return lambda chain, z, mutable, key: potential.gradient(z, {}, key, mutable, args, kwargs)[1]
    rates = by_chain(mcmc, getattr(mcmc.last_state, "rate", {}))
    pruned = bool(getattr(mcmc.last_state, "mask", ()))
    warmup_steps = jnp.ravel(by_chain(mcmc, mcmc.last_state.warmup_steps))[0]

    def gradient(chain: Array, z: Position, mutable: dict, key: Array) -> Position:
        key_rows, key_model, key_point = random.split(key, 3)
        rows = {} if minibatch is None else kernel._rows(STREAMS[minibatch], key_rows, jnp.int32(0))
        inclusion = {
            name: jnp.ones(prior.groups.shape, z[name].dtype)
            if pruned  # past the pruning the slab alone is left
            else jax.nn.sigmoid(prior.logit(prior.groups.total(z[name] ** 2), rates[name][chain]))
            for name, prior in getattr(kernel, "priors", {}).items()
        }
        state = _At(z, inclusion)
        point = kernel._gradient_point(state, key_point)
        found = kernel._gradient(point, rows, key_model, mutable, args, kwargs)[1]
        return kernel._own_gradient(state, found, warmup_steps, warmup_steps)

    return gradient
