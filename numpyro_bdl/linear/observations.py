# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What is handed to a posterior with normal noise: checks, and what is said of its solution."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, random

UNSOLVED = 0.5


def as_key(owner: str, rng_key: Array) -> Array:
    """A typed PRNG key."""
    typed = hasattr(rng_key, "dtype") and jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    if jnp.ndim(rng_key) != (0 if typed else 1):
        raise TypeError(f"{owner}: rng_key must be one PRNG key, as of jax.random.key(0), got {rng_key!r}.")
    return rng_key if typed else random.wrap_key_data(rng_key)


def check_observed(owner: str, y: Any) -> Array:
    """Observations, finite and of a floating type."""
    y = jnp.asarray(y)
    y = y.astype(jnp.result_type(y, float)) if not jnp.issubdtype(y.dtype, jnp.floating) else y
    if y.ndim < 1 or not y.size:
        raise ValueError(f"{owner}: y must have rows, got the shape {y.shape}.")
    if not bool(jnp.all(jnp.isfinite(y))):
        raise ValueError(f"{owner}: y has numbers that are not finite.")
    return y


def check_noise(owner: str, noise: Any, y: Array) -> Array:
    """Standard deviations of the noise, of the shape of y."""
    noise = jnp.asarray(noise, y.dtype)
    if not bool(jnp.all(jnp.isfinite(noise) & (noise > 0))):
        raise ValueError(
            f"{owner}: noise must be positive and finite, a standard deviation; without noise the system is singular"
            " where rows are repeated."
        )
    try:
        return jnp.broadcast_to(noise, y.shape)
    except ValueError as error:
        raise ValueError(f"{owner}: noise of the shape {noise.shape} does not broadcast to {y.shape}.") from error


def warn_if_unsolved(error: float) -> None:
    """Warn of systems that are not solved.

    :param error: Of their functions, in posterior standard deviations.
    """
    if not error < UNSOLVED:
        warnings.warn(
            "The linear systems of the samples are not solved: at the data their function can be off by"
            f" {error:.2g} posterior standard deviations (expected below {UNSOLVED}). Give the solver more steps, or a"
            " smaller tolerance; with very little noise compute in x64.",
            stacklevel=3,
        )
