# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""The linear system of a Gaussian process, with an unknown for each row,

.. math::

    (\Sigma^{-1/2} K \Sigma^{-1/2} + I) \, a = b,

whitened by the variances :math:`\Sigma` of the noise. It is the dual of a linear model whose features are those of the
kernel; rows of K are formed when they are needed, and never kept.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from jax.scipy.sparse.linalg import cg

from numpyro_bdl.gp.kernels import Kernel
from numpyro_bdl.linear.solvers import ConjugateGradient
from numpyro_bdl.linear.solvers.steps import POWER_BATCHES, Eigenvalues, largest_eigenvalue

BLOCK = 1024
"""rows of K that a full product forms at a time"""
_MOST_ROWS = 2048  # of the kernel matrix whose largest eigenvalue is found

Unknowns = dict[str, Array]
_NAME = "f"


class KernelDual(NamedTuple):
    """A dual system with a kernel in place of weights, several right-hand sides at once."""

    kernel: Kernel
    x: Array
    """inputs, (row, D)"""
    noise: Array
    """standard deviations, (row,)"""
    b: Array
    """right-hand sides, (row, vector)"""
    f: Array
    """draws of the prior at the data in units of the noise, (row, vector); of a vector that is no sample zero"""
    batch: Array
    """(B,), of which only the length counts"""

    @property
    def size(self) -> int:
        return len(self.x)

    @property
    def batch_size(self) -> int:
        return len(self.batch)

    def zeros(self) -> tuple[Unknowns, dict]:
        return {_NAME: jnp.zeros_like(self.b)}, {}

    def at(self, key: Array, step: Array) -> Array:
        """Rows, drawn with replacement."""
        return random.randint(random.fold_in(key, step), (self.batch_size,), 0, self.size)

    def rows(self, rows: Array) -> Array:
        """Rows of the whitened kernel matrix."""
        return self.kernel(self.x[rows], self.x) / self.noise[rows, None] / self.noise

    def residual(self, batch: Array, a: Unknowns, image: dict) -> Unknowns:
        return {_NAME: jnp.matmul(self.rows(batch), a[_NAME], precision="highest") + a[_NAME][batch] - self.b[batch]}

    def add(self, batch: Array, unknowns: Unknowns, change: Unknowns, factor: Array) -> Unknowns:
        return {_NAME: unknowns[_NAME].at[batch].add(factor * change[_NAME])}

    def image(self, batch: Array, change: Unknowns) -> dict:
        return {}

    def solution(self, a: Unknowns, image: dict) -> Array:
        return a[_NAME]

    def is_solved(self, solution: Array, tolerance: float) -> bool:
        """Whether the error of mean and samples is below a tolerance, in posterior standard deviations."""
        return bool(error(self, solution) < tolerance)

    def bound(self) -> Array:
        # the matrix is at least the identity
        return jnp.linalg.norm(self.b)

    def eigenvalues(self, key: Array) -> Eigenvalues:
        return _eigenvalues(self, key)


def product(dual: KernelDual, a: Array) -> Array:
    """The whitened kernel matrix times (row, vector), in blocks of rows."""
    size = dual.size
    block = min(BLOCK, size)
    starts = jnp.arange(-(-size // block)) * block
    # the last block goes back to the end of the one before it, and does some rows again
    rows = jnp.minimum(starts, size - block)[:, None] + jnp.arange(block)
    found = lax.map(lambda rows: jnp.matmul(dual.rows(rows), a, precision="highest"), rows)
    return jnp.zeros_like(a).at[rows.ravel()].set(found.reshape(-1, a.shape[-1]))


@jax.jit
def error(dual: KernelDual, a: Array) -> Array:
    r"""A bound on the error of the samples at the data, the largest of them, as a root mean square, by that of the
    posterior standard deviation of the function; up to rounding.

    With r the residual and :math:`\tilde K = \Sigma^{-1/2} K \Sigma^{-1/2}` the error is
    :math:`\|\tilde K (\tilde K + I)^{-1} r\| \le \min(\|r\|, \frac12 \sqrt{r^\top \tilde K r})`, for a sample the sum
    of the mean's and its own. The variances add up to the effective dimension, the mean of
    :math:`\|f + \tilde K a\|^2` over samples, whose root may itself be off by as much; where that leaves nothing, by
    one.
    """
    moved = product(dual, a)
    missing = moved + a - dual.b
    of_matrix = jnp.maximum(jnp.sum(missing * product(dual, missing), 0), 0.0)  # rounding may take it below
    off = jnp.sqrt(jnp.minimum(jnp.sum(missing**2, 0), of_matrix / 4))
    is_sample = jnp.any(dual.f != 0, 0)
    mean_over_samples = lambda v: jnp.sum(jnp.where(is_sample, v, 0.0)) / jnp.maximum(jnp.sum(is_sample), 1)
    root = jnp.sqrt(mean_over_samples(jnp.sum((dual.f + moved) ** 2, 0)))
    least = jnp.maximum(root - jnp.sqrt(mean_over_samples(off**2)), jnp.minimum(root, 1.0))
    total = jnp.max(jnp.where(is_sample, 0.0, off)) + jnp.max(jnp.where(is_sample, off, 0.0))
    return total / jnp.maximum(least, jnp.finfo(a.dtype).tiny)


@jax.jit
def _eigenvalues(dual: KernelDual, key: Array) -> Eigenvalues:
    """Of kernel matrices of some of the rows, scaled to all of them."""
    size = dual.size
    count = min(size, _MOST_ROWS)
    rows = random.permutation(key, size)[:count]

    def largest(rows):
        matrix = dual.kernel(dual.x[rows], dual.x[rows]) / dual.noise[rows, None] / dual.noise[rows]
        return size / len(rows) * largest_eigenvalue(lambda v: matrix @ v, jnp.ones(len(rows), matrix.dtype))

    batches = jax.vmap(lambda n: dual.at(key, n))(jnp.arange(POWER_BATCHES))
    return Eigenvalues(largest(rows), jnp.max(lax.map(largest, batches)))


@partial(jax.jit, static_argnums=0)
def conjugate_gradients(solver: ConjugateGradient, dual: KernelDual) -> Array:
    """The solution by full products."""

    def one(b):
        matrix = lambda a: product(dual, a[:, None])[:, 0] + a
        return cg(matrix, b, tol=solver.tolerance, maxiter=solver.max_iterations)[0]

    return jax.vmap(one, 1, 1)(dual.b)
