# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""The linear system whose solutions are posterior samples of a linear model, in whitened weights.

With :math:`\Lambda = L L^\top` the curvature of the likelihood, A the prior precision and :math:`J` whitened,
:math:`\tilde J = J A^{-1/2}`, the posterior of :math:`A^{1/2} w` has the precision
:math:`H = I + \tilde J^\top \Lambda \tilde J`. A zero-mean sample of it solves

.. math::

    H x = b, \qquad b = \epsilon_0 + \tilde J^\top L \epsilon, \qquad \epsilon_0, \epsilon \sim N(0, I),

since b has the covariance H. It minimizes either of

.. math::

    \tfrac12 \|L^\top \tilde J x - \epsilon\|^2 + \tfrac12 \|x - \epsilon_0\|^2
    \qquad\text{and}\qquad
    \tfrac12 \|L^\top \tilde J x\|^2 + \tfrac12 \|x - b\|^2,

whose minibatch gradients have different variances. Directions that the data say nothing of are solved by
:math:`x = \epsilon_0`, which is where every iteration starts; from zero it would have to find them one by one, and
would be overconfident until it had.

Whitening makes of every prior the same problem, preconditions it, and leaves x as it is, a good start, when EM changes
the prior.

**References:** Antorán et al., *Sampling-based inference for large linear models, with application to linearised
Laplace*, ICLR 2023; Lin et al., *Sampling from Gaussian process posteriors using stochastic gradient descent*,
NeurIPS 2023.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from numpyro_bdl.linear.model import Batch, Linearization, LinearModel, Weights
from numpyro_bdl.minibatch import epoch
from numpyro_bdl.noise import normal


class System(NamedTuple):
    """A linear model with a prior, cut into batches. Vectors are whitened weights, several with an axis in front."""

    model: Any
    """a :class:`~numpyro_bdl.linear.model.LinearModel`"""
    scale: Weights
    """prior standard deviations, :math:`A^{-1/2}`, by site"""
    offset: Weights
    """prior mean less the weights at which the model is linearized, by site"""
    rows: Array
    """rows of each batch of a full pass, (batches, B)"""
    weight: Array
    """1 for a row, 0 for one that fills up the last batch, (batches, B)"""

    @property
    def batch_size(self) -> int:
        return self.rows.shape[1]

    def minibatch(self, key: Array, step: Array) -> Batch:
        """The rows of a step, in shuffled epochs, weighted so that sums are unbiased for those of all rows."""
        size, batch = self.model.size, self.batch_size
        rows = jnp.arange(size) if batch == size else epoch(key, step, size, batch)
        return Batch(rows, jnp.full(batch, size / batch), jnp.ones(()))

    def whiten(self, gradient: Weights) -> Weights:
        """:math:`A^{-1/2}` times a gradient in weights, or times whitened weights, which makes weights of them."""
        return jax.tree.map(jnp.multiply, gradient, self.scale)

    def displacement(self, x: Weights) -> Weights:
        """Whitened weights, counted from the prior mean, as a displacement of the weights of the model."""
        return jax.tree.map(jnp.add, self.whiten(x), self.offset)

    def product(self, batch: Linearization, x: Weights) -> Weights:
        r""":math:`\tilde J^\top \Lambda \tilde J x` of a batch, for one x."""
        return self.whiten(batch.product(self.whiten(x)))

    def noise_gradient(self, batch: Linearization, count: int) -> Weights:
        r""":math:`\tilde J^\top L \epsilon` of a batch, for ``count`` samples."""
        return self.model.map(lambda eps: self.whiten(batch.vjp(batch.factor(eps))), batch.noise(count))


@partial(jax.tree_util.register_dataclass, data_fields=("prior", "data"), meta_fields=("noisy",))
@dataclass(frozen=True)
class Problem:
    r"""Right-hand sides: :math:`H x = p + \tilde J^\top L e`."""

    prior: Weights
    """p, several vectors"""
    data: Weights
    r""":math:`\tilde J^\top L e`"""
    noisy: bool
    """whether e is the noise of the rows; if not it is zero"""

    @property
    def total(self) -> Weights:
        """The right-hand side."""
        return jax.tree.map(jnp.add, self.prior, self.data)


def without_data(prior: Weights) -> Problem:
    """A system of one right-hand side, given whole."""
    several = jax.tree.map(lambda p: p[None], prior)
    return Problem(several, jax.tree.map(jnp.zeros_like, several), noisy=False)


def make_system(model: LinearModel, scale: Weights, offset: Weights, batch_size: int) -> System:
    """A system whose full passes go through so many rows at a time; the last batch is filled up with weight 0."""
    count = -(-model.size // batch_size)
    rows = jnp.arange(count * batch_size)
    weight = (rows < model.size).astype(jnp.result_type(float))
    rows = jnp.minimum(rows, model.size - 1)
    return System(model, scale, offset, rows.reshape(count, batch_size), weight.reshape(count, batch_size))


def sum_over_batches(system: System, function: Callable[[Linearization], Any]) -> Any:
    """The sum of a function of each batch over a full pass; one batch is in memory at a time."""
    count = len(system.rows)

    def value(rows, weight):
        # observations outside of the plate are met by every batch, and count once
        return function(system.model.at(Batch(rows, weight, jnp.ones(()) / count)))

    if count == 1:
        return value(system.rows[0], system.weight[0])
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value, system.rows[0], system.weight[0]))
    return lax.scan(
        lambda total, batch: (jax.tree.map(jnp.add, total, value(*batch)), None), zero, (system.rows, system.weight)
    )[0]


@jax.jit
def products(system: System, x: Weights) -> Weights:
    r""":math:`\tilde J^\top \Lambda \tilde J x` over all rows, for several x."""
    return sum_over_batches(system, lambda batch: system.model.map(partial(system.product, batch), x))


class Quality(NamedTuple):
    """How good several solutions are."""

    curved: Weights
    r""":math:`\tilde J^\top \Lambda \tilde J x` of each"""
    residual: Array
    r"""relative residual :math:`\|H x - b\| / \|b\|`, the largest"""
    error: Array
    r"""of samples: a bound on the error of their function at the data, as a root mean square, in posterior standard
    deviations, the largest.

    With :math:`r = H x - b` and :math:`F = L^\top \tilde J` the error is :math:`\|F H^{-1} r\| \le \|r\| / 2`, since
    no :math:`m / (1 + m)^2` is above 1/4; the variances add up to the effective dimension
    :math:`\gamma = E \|F x\|^2`."""


@jax.jit
def quality(system: System, problem: Problem, x: Weights) -> Quality:
    """How good solutions are, by a pass over all rows."""
    curved, b = products(system, x), problem.total
    missing = jax.tree.map(lambda x, m, b: x + m - b, x, curved, b)
    norm, of_b = (jnp.sqrt(_total(dots(v, v))) for v in (missing, b))
    size = sum(w[0].size for w in x.values())
    dimension = jnp.clip(jnp.mean(_total(dots(x, curved))), jnp.finfo(norm.dtype).tiny, size)
    return Quality(curved, jnp.max(norm / of_b), jnp.max(norm) / (2 * jnp.sqrt(dimension)))


@partial(jax.jit, static_argnums=1)
def noise_gradients(system: System, count: int) -> Weights:
    r""":math:`\tilde J^\top L \epsilon` over all rows, for ``count`` samples, by one pass."""
    return sum_over_batches(system, lambda batch: system.noise_gradient(batch, count))


@jax.jit
def energy_and_gradient(system: System, x: Weights) -> tuple[Array, Weights]:
    r"""Minus the log density of the linear model, constants aside, and its gradient, at one x:

    .. math::

        -\sum_i \log p(y_i \mid h(w, x_i)) + \tfrac12 \|x\|^2.
    """

    def of_batch(batch):
        outputs = batch.outputs(system.displacement(x))
        return -batch.log_likelihood(outputs), mode_gradient(system, batch, x)

    energy, gradient = sum_over_batches(system, of_batch)
    return energy + dot(x, x) / 2, jax.tree.map(jnp.add, gradient, x)


def mode_gradient(system: System, batch: Linearization, x: Weights) -> Weights:
    """Gradient of the loss of a batch in whitened weights."""
    score = batch.score(batch.outputs(system.displacement(x)))
    return jax.tree.map(jnp.negative, system.whiten(batch.vjp(score)))


def prior_draws(key: Array, like: Weights, count: int) -> Weights:
    """Standard normal numbers, (count, ...) by site."""
    return normal(key, {k: jax.ShapeDtypeStruct((count, *w.shape), w.dtype) for k, w in like.items()})


@jax.jit
def norm(x: Any) -> Array:
    """The norm of all leaves together."""
    return jnp.sqrt(sum(jnp.sum(w**2) for w in jax.tree.leaves(x)))


def dot(x: Weights, y: Weights) -> Array:
    """The inner product of two vectors of weights."""
    return jnp.sum(jnp.stack([jnp.vdot(x[k], y[k]) for k in x]))


def dots(x: Weights, y: Weights) -> dict[str, Array]:
    """By site, the inner products of several vectors, (vector,)."""
    return {k: jnp.sum((x[k] * y[k]).reshape(len(x[k]), -1), -1) for k in x}


def _total(parts: dict[str, Array]) -> Array:
    return jnp.sum(jnp.stack(list(parts.values())), 0)
