# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Eigenvalues and trace of a Hessian that is never written down."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, PyTree
from matfree import decomp, stochtrace
from scipy.linalg import eigh_tridiagonal

from numpyro_bdl._checks import check_integer

Energy = Callable[[Any], Array]


def hessian_vector_product(energy: Energy, z: PyTree, v: PyTree) -> PyTree:
    r"""The product of the Hessian of an energy with a vector, :math:`\nabla^2 \ell(z) \, v`, at the cost of about two
    gradients.

    :param energy: A function from a tree of arrays to a scalar.
    :param z: Where the Hessian is taken.
    :param v: A tree like ``z``.
    :return: A tree like ``z``.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_bdl.flatness import hessian_vector_product
        >>> hessian_vector_product(lambda z: z[0] ** 2 * z[1], jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])).tolist()
        [4.0, 2.0]
    """
    return jax.jvp(jax.grad(energy), (z,), (v,))[1]


class Eigenvalues(NamedTuple):
    """The largest eigenvalues of a Hessian."""

    value: Float[np.ndarray, " count"]
    """from the largest down; NaN if there are not so many distinct ones"""
    error: Float[np.ndarray, " count"]
    """residual norm: within it of the value there is an eigenvalue, up to rounding"""


def top_eigenvalues(
    energy: Energy, z: PyTree, rng_key: Array, *, count: int = 1, steps: int | None = None
) -> Eigenvalues:
    """The largest eigenvalues of the Hessian of an energy, by Lanczos with full reorthogonalization.

    A step is a Hessian-vector product; the steps are kept, as so many vectors of the length of the position. Values
    that are well apart from the rest converge first, and from below. Of an eigenvalue with several eigenvectors one
    vector finds one.

    :param energy: A function from a tree of arrays to a scalar.
    :param z: Where the Hessian is taken.
    :param rng_key: PRNG key of the first vector.
    :param count: How many eigenvalues.
    :param steps: Lanczos steps, at least ``count``; None for ``30 + 2 count``, or as many as there are coordinates.
    :return: Eigenvalues, each with a bound on its error.
    :raises ValueError: for more eigenvalues than coordinates or steps, or a Hessian that is not finite.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_bdl.flatness import top_eigenvalues
        >>> scales = jnp.array([1.0, 4.0, 9.0])
        >>> top_eigenvalues(lambda z: (scales * z**2).sum() / 2, jnp.ones(3), random.key(0), count=2).value.round(4)
        array([9., 4.], dtype=float32)

    **References:** Lanczos 1950; the implementation is that of matfree.
    """
    flat, unravel = ravel_pytree(z)
    steps = number_of_steps(flat.size, count, steps)
    program = jax.jit(lambda w, key: tridiagonal(lambda w: energy(unravel(w)), w, key, steps))
    return ritz_values(program(flat, rng_key), count)


def number_of_steps(size: int, count: int, steps: int | None) -> int:
    check_integer("top_eigenvalues", "count", count)
    if steps is not None:
        check_integer("top_eigenvalues", "steps", steps)
    steps = min(size, 30 + 2 * count if steps is None else steps)
    if count > steps:
        raise ValueError(
            f"top_eigenvalues: {count} eigenvalues need as many Lanczos steps and coordinates; there are {steps} steps"
            f" in {size} coordinates."
        )
    return steps


def tridiagonal(energy: Energy, z: Array, rng_key: Array, steps: int) -> tuple[Array, Array]:
    """The diagonal of Lanczos' matrix, and what is below it: the length of the vector left over at each step."""
    matvec = lambda v: hessian_vector_product(energy, z, v)
    # as matfree's tridiag_sym does, which averages the lengths with what rounding leaves above the diagonal
    found = decomp.hessenberg(steps, reortho="full")(matvec, random.normal(rng_key, z.shape, z.dtype))
    lengths = jnp.append(jnp.diag(found.J_small, -1), jnp.linalg.norm(found.residual))
    return jnp.diag(found.J_small), lengths


def ritz_values(found: tuple[Array, Array], count: int) -> Eigenvalues:
    """Eigenvalues of Lanczos' matrix, up to the step that left nothing over: what follows is rounding, divided by 0."""
    diagonal, lengths = (np.asarray(x) for x in found)
    if not np.isfinite(diagonal[0]):
        raise ValueError("top_eigenvalues: the Hessian is not finite at this position.")
    scale = np.maximum.accumulate(np.maximum(np.abs(diagonal), np.abs(lengths)))
    ends = np.flatnonzero(~(lengths > 100 * np.finfo(diagonal.dtype).eps * scale))
    used = int(ends[0]) + 1 if len(ends) else len(diagonal)
    values, vectors = eigh_tridiagonal(diagonal[:used], lengths[: used - 1])
    errors = np.abs(lengths[used - 1] * vectors[-1])
    value, error = (np.full(count, np.nan, diagonal.dtype) for _ in range(2))
    value[:used], error[:used] = values[::-1][:count], errors[::-1][:count]
    return Eigenvalues(value, error)


class Trace(NamedTuple):
    """The trace of a Hessian."""

    value: float
    error: float
    """standard error"""


def hessian_trace(energy: Energy, z: PyTree, rng_key: Array, *, probes: int = 100, probe_chunk: int = 10) -> Trace:
    r"""The trace of the Hessian of an energy, by Hutchinson's estimator with random signs.

    .. math::

        \widehat{\operatorname{tr}} = \frac1K \sum_k v_k^\top \nabla^2 \ell(z) \, v_k, \qquad v_{ki} = \pm 1

    It is unbiased, with a variance of twice the sum of the squares off the diagonal, over K.

    :param energy: A function from a tree of arrays to a scalar.
    :param z: Where the Hessian is taken.
    :param rng_key: PRNG key of the signs.
    :param probes: K, at least 2.
    :param probe_chunk: Probes that are evaluated at a time.
    :return: The trace and its standard error, from the spread of the probes.
    :raises ValueError: for arguments out of range.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_bdl.flatness import hessian_trace
        >>> hessian_trace(lambda z: (jnp.array([1.0, 2.0]) * z**2).sum(), jnp.ones(2), random.key(0))  # is diagonal
        Trace(value=6.0, error=0.0)

    **References:** Hutchinson 1990; the implementation is that of matfree.
    """
    check_integer("hessian_trace", "probes", probes, least=2)
    check_integer("hessian_trace", "probe_chunk", probe_chunk)
    flat, unravel = ravel_pytree(z)
    program = jax.jit(lambda w, key: hutchinson(lambda w: energy(unravel(w)), w, key, probes, probe_chunk))
    return trace_of(program(flat, rng_key))


def hutchinson(energy: Energy, z: Array, rng_key: Array, probes: int, chunk: int) -> Array:
    matvec = lambda v: hessian_vector_product(energy, z, v)
    one = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_trace(), stochtrace.sampler_signs(z, num=1))
    return lax.map(partial(one, matvec), random.split(rng_key, probes), batch_size=min(chunk, probes))


def trace_of(estimates: Array) -> Trace:
    values = np.asarray(estimates, float)
    return Trace(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
