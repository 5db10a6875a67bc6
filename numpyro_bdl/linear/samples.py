# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Posterior samples of a linear model with normal noise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from numpyro_bdl._checks import check_integer
from numpyro_bdl.linear.observations import as_key, check_noise, check_observed, warn_if_unsolved
from numpyro_bdl.linear.operator import Features, OperatorModel, Products, as_tree, as_weights, check_operator
from numpyro_bdl.linear.solvers import solver_of
from numpyro_bdl.linear.system import (
    Problem,
    dots,
    energy_and_gradient,
    make_system,
    noise_gradients,
    norm,
    prior_draws,
    quality,
)


class LinearPosterior(NamedTuple):
    """The posterior of the weights of a linear model. Weights have the structure that the operator takes."""

    mean: Any
    samples: Any
    """(sample, ...)"""
    effective_dimension: float
    """estimated number of weights that the data determine"""
    error: float
    """a bound on the error of the samples at the data, as a root mean square, in posterior standard deviations"""


def linear_posterior_samples(
    rng_key: Array,
    operator: Array | Callable[[Any, Array], Array],
    y: Array,
    noise: float | Array,
    *,
    num_samples: int = 64,
    like: Any = None,
    transpose: Callable[[Array, Array], Any] | None = None,
    prior_scale: Any = 1.0,
    prior_mean: Any = 0.0,
    solver: Any = "cg",
    batch_size: int | None = None,
    sample_chunk: int | None = None,
) -> LinearPosterior:
    r"""Samples of the weights of a linear model, from products with its features.

    .. math::

        w \sim N(m_0, A^{-1}), \quad y = \Phi w + \epsilon, \quad \epsilon \sim N(0, \sigma^2), \qquad
        w \mid y \sim N\bigl(\bar w, (\Phi^\top \sigma^{-2} \Phi + A)^{-1}\bigr).

    Each sample solves a linear system whose right-hand side is random (:mod:`~numpyro_bdl.linear.system`): the solvers
    are those of :class:`~numpyro_bdl.AutoLinearizedLaplace`, and no matrix of weights by weights or rows by rows is
    formed.

    :param rng_key: PRNG key.
    :param operator: :math:`\Phi`: an array of features (row, weight), or a function ``(w, rows)`` that is linear in the
        weights w and gives the outputs (B, ...) of the rows with indices (B,); a feature map, a network's last layer, a
        projection of an image.
    :param y: Observations, (row, ...).
    :param noise: Standard deviation :math:`\sigma`, a number or an array that broadcasts to the shape of y.
    :param num_samples: Posterior samples. The relative error of a variance is :math:`\sqrt{2/K}`.
    :param like: For a function: arrays or shapes of the weights, a pytree.
    :param transpose: For a function: ``(u, rows)`` to :math:`\Phi_S^\top u`; None for what JAX makes of it.
    :param prior_scale: Standard deviations :math:`A^{-1/2}`, a number or a pytree of arrays that broadcast to the
        weights.
    :param prior_mean: :math:`m_0`, likewise.
    :param solver: ``"cg"``, ``"sgd"`` or ``"dual"``, or one of :mod:`numpyro_bdl.linear` with settings.
    :param batch_size: Rows of a product; None for all.
    :param sample_chunk: Samples that a product works on at a time; None for all.
    :return: Mean, samples, effective dimension and a bound on their error.
    :raises ValueError: for noise or scales that are not positive, numbers that are not finite, shapes that do not fit,
        a batch larger than the data, an operator that is not linear, a transpose that does not match it, or a step
        size that diverges.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> import numpyro_bdl as bdl
        >>> x = jnp.linspace(-1, 1, 50)
        >>> y = 2 * x**2 + 0.1 * random.normal(random.key(0), (50,))
        >>> features = jnp.stack([jnp.ones(50), x, x**2], -1)
        >>> posterior = bdl.linear_posterior_samples(random.key(1), features, y, 0.1, prior_scale=10.0)
        >>> posterior.samples.shape
        (64, 3)
        >>> bool(abs(posterior.mean[2] - 2) < 0.2)
        True

    Source: Antorán et al., *Sampling-based inference for large linear models, with application to linearised Laplace*,
    ICLR 2023, Equations 8 to 11.
    """
    owner = "linear_posterior_samples"
    check_integer(owner, "num_samples", num_samples)
    solver = solver_of(owner, solver)
    y = check_observed(owner, y)
    noise = check_noise(owner, noise, y)
    size = len(y)
    batch_size = size if batch_size is None else batch_size
    check_integer(owner, "batch_size", batch_size)
    if batch_size > size:
        raise ValueError(f"{owner}: batch_size={batch_size} is more than the {size} rows of y.")
    if sample_chunk is not None:
        check_integer(owner, "sample_chunk", sample_chunk)
    products, like = _operator(owner, operator, transpose, like, size)
    structure = jax.tree.structure(like)
    zero = as_weights(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like))
    scale, mean = (
        as_weights(_like(owner, name, value, like))
        for name, value in (("prior_scale", prior_scale), ("prior_mean", prior_mean))
    )
    if not all(bool(jnp.all((s > 0) & jnp.isfinite(s))) for s in scale.values()):
        raise ValueError(f"{owner}: prior_scale must be positive and finite.")
    if not all(bool(jnp.all(jnp.isfinite(m))) for m in mean.values()):
        raise ValueError(f"{owner}: prior_mean has numbers that are not finite.")
    keys = random.split(as_key(owner, rng_key), 4)
    model = OperatorModel(
        weights=zero,
        key=keys[0],
        curved_at=None,
        size=size,
        sample_chunk=sample_chunk,
        operator=products,
        y=y,
        noise=noise,
    )
    check_operator(model, keys[1])
    system = make_system(model, scale, mean, batch_size)
    draws = prior_draws(keys[2], zero, num_samples)
    problem = Problem(draws, noise_gradients(system, num_samples), noisy=True)
    if not bool(jnp.isfinite(norm(problem.total))):
        raise ValueError(f"{owner}: the transposed product of operator with all rows has numbers that are not finite.")
    samples = solver.solve(system, problem, draws, keys[3])
    found = quality(system, problem, samples)
    dimension = float(sum(jnp.mean(d) for d in dots(samples, found.curved).values()))
    mode = solver.mode(system, jax.tree.map(jnp.zeros_like, zero), keys[3])
    # by the same bound, its gradient being its residual
    of_mode = norm(energy_and_gradient(system, mode)[1]) / (2 * max(dimension, 1e-30) ** 0.5)
    error = float(found.error + of_mode)
    warn_if_unsolved(error)
    mode = system.displacement(mode)
    about = {k: mode[k] + z for k, z in system.whiten(samples).items()}
    return LinearPosterior(as_tree(mode, structure), as_tree(about, structure), dimension, error)


def _operator(owner: str, operator: Any, transpose: Any, like: Any, size: int) -> tuple[Features | Products, Any]:
    """The operator, and shapes of its weights."""
    if callable(operator):
        if like is None:
            raise ValueError(f"{owner}: an operator that is a function needs like, arrays or shapes of its weights.")
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), like)
        return Products(operator, transpose, jax.tree.structure(like)), like
    if transpose is not None or like is not None:
        raise ValueError(f"{owner}: transpose and like are for an operator that is a function; this is an array.")
    features = jnp.asarray(operator)
    features = features.astype(jnp.result_type(features, float))
    if features.ndim != 2 or len(features) != size:
        raise ValueError(
            f"{owner}: operator must be an array (row, weight) with the {size} rows of y, or a function; got the shape"
            f" {features.shape}."
        )
    if not bool(jnp.all(jnp.isfinite(features))):
        raise ValueError(f"{owner}: operator has numbers that are not finite.")
    return Features(features), jax.ShapeDtypeStruct(features.shape[1:], features.dtype)


def _like(owner: str, name: str, value: Any, like: Any) -> Any:
    """A number, or a pytree of them, as arrays of the shapes of the weights."""
    if jax.tree.structure(value) != jax.tree.structure(like):
        value = jax.tree.map(lambda _: value, like)
    try:
        return jax.tree.map(lambda v, s: jnp.broadcast_to(jnp.asarray(v, s.dtype), s.shape), value, like)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{owner}: {name} does not broadcast to the weights: {error}") from error
