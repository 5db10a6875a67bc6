# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""The curvature of a likelihood in its natural parameter, and a factor of it.

With :math:`\eta` the natural parameter of an observation, its curvature is the Fisher information

.. math::

    \Lambda = E_{y \sim p(y \mid \eta)} \bigl[ -\nabla^2_\eta \log p(y \mid \eta) \bigr] = L L^\top,

which for exponential families in their natural parameter, and for a normal law in its location, is the negative
Hessian, whatever y is. Each family gives :math:`\Lambda u`, :math:`L \epsilon` and :math:`L^\top u` in O(outputs); no
matrix of outputs by outputs is decomposed, and none needs a jitter where :math:`\Lambda` is singular, as for softmax.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.linalg import solve_triangular
from numpyro.distributions.transforms import Transform, biject_to

from numpyro_bdl.natural_parameter import natural_parameter, without_wrappers

FISHER_DRAWS = 64


class Curvature(NamedTuple):
    """The curvature of all observations of a site, as products."""

    product: Callable[[Array], Array]
    """the curvature times an array of the shape of eta"""
    factor: Callable[[Array], Array]
    """the factor times noise"""
    transposed: Callable[[Array], Array]
    """the transposed factor times an array of the shape of eta"""
    noise_shape: tuple[int, ...]
    """shape of the noise that the factor takes"""


class Family(NamedTuple):
    """What the linear model needs of the distribution of observations, ``law``, without its wrappers.

    ``eta`` has an axis for each batch dimension of the observations, and one more if their parameter is a vector.
    """

    predictor: Callable[[str, dict], Array]
    """eta at a site of a trace"""
    rebuild: Callable[[dist.Distribution, Array], dist.Distribution]
    """the same family at another eta"""
    curvature: Callable[[dist.Distribution, Array, Callable[[], Array]], Curvature]
    """at ``(law, eta, keys)``, where ``keys()`` makes a key for each observation"""


# ---- families with one natural parameter --------------------------------------------------------------------------


def _number(weight: Callable, rebuild: Callable) -> Family:
    """One number per observation, of curvature ``weight(law, eta)``."""

    def curvature(law, eta, keys):
        value = weight(law, eta)
        root = jnp.sqrt(value)
        return Curvature(lambda u: value * u, lambda eps: root * eps, lambda u: root * u, eta.shape)

    return Family(natural_parameter, rebuild, curvature)


def _softmax(count: Callable, rebuild: Callable) -> Family:
    r"""Logits of n draws of a class: :math:`\Lambda = n (\mathrm{diag}\, p - p p^\top)`, of factor
    :math:`\sqrt n (\mathrm{diag} \sqrt p - p \sqrt p^\top)`."""

    def curvature(law, eta, keys):
        p, n = jax.nn.softmax(eta), jnp.asarray(count(law), eta.dtype)[..., None]
        root = jnp.sqrt(n * p)

        def centred(u):
            return u - jnp.sum(p * u, -1, keepdims=True)

        return Curvature(
            product=lambda u: n * p * centred(u),
            factor=lambda eps: root * eps - p * jnp.sum(root * eps, -1, keepdims=True),
            transposed=lambda u: root * centred(u),
            noise_shape=eta.shape,
        )

    return Family(natural_parameter, rebuild, curvature)


def _multivariate_curvature(law, eta, keys):
    r""":math:`\Lambda = C^{-1}`, of factor :math:`R^{-\top}`, where :math:`C = R R^\top`."""
    tril = jnp.broadcast_to(_scale_tril(law), (*eta.shape, eta.shape[-1]))

    def solve(u, trans):
        return solve_triangular(tril, u[..., None], lower=True, trans=trans)[..., 0]

    return Curvature(lambda u: solve(solve(u, 0), 1), lambda eps: solve(eps, 1), lambda u: solve(u, 0), eta.shape)


def _scale_tril(law):
    return law.scale_tril if hasattr(law, "scale_tril") else jnp.linalg.cholesky(law.covariance_matrix)


_BERNOULLI = _number(lambda law, eta: _variance(eta), lambda law, eta: dist.BernoulliLogits(eta))
_BINOMIAL = _number(
    lambda law, eta: law.total_count * _variance(eta), lambda law, eta: dist.BinomialLogits(eta, law.total_count)
)
_CATEGORICAL = _softmax(lambda law: 1.0, lambda law, eta: dist.CategoricalLogits(eta))
_MULTINOMIAL = _softmax(
    lambda law: law.total_count,
    lambda law, eta: dist.MultinomialLogits(eta, law.total_count, total_count_max=law.total_count_max),
)
_MULTIVARIATE = Family(
    natural_parameter,
    lambda law, eta: dist.MultivariateNormal(eta, scale_tril=_scale_tril(law)),
    _multivariate_curvature,
)


def _variance(logit):
    return jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)


_NATURAL: dict[type, Family] = {
    dist.Normal: _number(lambda law, eta: 1 / law.scale**2, lambda law, eta: dist.Normal(eta, law.scale)),
    dist.LogNormal: _number(lambda law, eta: 1 / law.scale**2, lambda law, eta: dist.LogNormal(eta, law.scale)),
    dist.StudentT: _number(
        lambda law, eta: (law.df + 1) / ((law.df + 3) * law.scale**2),
        lambda law, eta: dist.StudentT(law.df, eta, law.scale),
    ),
    dist.Laplace: _number(lambda law, eta: 1 / law.scale**2, lambda law, eta: dist.Laplace(eta, law.scale)),
    dist.Cauchy: _number(lambda law, eta: 1 / (2 * law.scale**2), lambda law, eta: dist.Cauchy(eta, law.scale)),
    dist.Logistic: _number(lambda law, eta: 1 / (3 * law.scale**2), lambda law, eta: dist.Logistic(eta, law.scale)),
    dist.Poisson: _number(lambda law, eta: jnp.exp(eta), lambda law, eta: dist.Poisson(jnp.exp(eta))),
    dist.BernoulliLogits: _BERNOULLI,
    dist.BernoulliProbs: _BERNOULLI,
    dist.BinomialLogits: _BINOMIAL,
    dist.BinomialProbs: _BINOMIAL,
    dist.CategoricalLogits: _CATEGORICAL,
    dist.CategoricalProbs: _CATEGORICAL,
    dist.MultinomialLogits: _MULTINOMIAL,
    dist.MultinomialProbs: _MULTINOMIAL,
    dist.MultivariateNormal: _MULTIVARIATE,
    dist.LowRankMultivariateNormal: _MULTIVARIATE,
}
_OF_PARAMETER = {"loc", "logits", "probs", "rate"}
"""Parameters of these families that eta stands for."""


# ---- any other family -----------------------------------------------------------------------------------------------


def _estimated(names: tuple[str, ...]) -> Family:
    r"""Any family, in those parameters that depend on the weights, each unconstrained. Its curvature is estimated,

    .. math::

        \Lambda = \frac1S \sum_s g_s g_s^\top, \qquad g_s = \nabla_\eta \log p(y_s \mid \eta), \quad y_s \sim p,

    by the same draws wherever it is used, so that it is one matrix, with the factor :math:`[g_1, ..., g_S] / \sqrt S`.
    """

    def predictor(name, site):
        law, shape = without_wrappers(site["fn"]), site["fn"].shape()
        shape = shape[: len(shape) - law.event_dim]
        free = {parameter: _transform(law, parameter).inv(getattr(law, parameter)) for parameter in names}
        parts = [
            jnp.broadcast_to(value, (*shape, *_event(law, parameter))).reshape(*shape, -1)
            for parameter, value in free.items()
        ]
        return jnp.concatenate(parts, -1)

    def rebuild(law, eta):
        values = {k: getattr(law, k) for k in _constructor(law)}
        start = 0
        for parameter in names:
            event = _event(law, parameter)
            part = eta[..., start : start + math.prod(event)]
            values[parameter] = _transform(law, parameter)(part.reshape(*eta.shape[:-1], *event))
            start += math.prod(event)
        return type(law)(**values)

    def curvature(law, eta, keys):
        scores = _scores(law, rebuild, eta, keys()) / math.sqrt(FISHER_DRAWS)

        def factor(eps):
            return jnp.einsum("...si,...s->...i", scores, eps)

        def transposed(u):
            return jnp.einsum("...si,...i->...s", scores, u)

        return Curvature(lambda u: factor(transposed(u)), factor, transposed, scores.shape[:-1])

    return Family(predictor, rebuild, curvature)


def _scores(law, rebuild: Callable, eta: Array, keys: Array) -> Array:
    """Scores (..., draw, parameter) of draws from the law, those of each observation by its own key."""
    shape, size = eta.shape[:-1], eta.shape[-1]
    others = {
        k: jnp.broadcast_to(getattr(law, k), (*shape, *_event(law, k))).reshape(-1, *_event(law, k))
        for k in _constructor(law)
    }

    def of_observation(key, eta, others):
        law_here = type(law)(**others)
        y = jax.lax.stop_gradient(rebuild(law_here, eta).sample(key, (FISHER_DRAWS,)))
        return jax.vmap(jax.grad(lambda e, y: rebuild(law_here, e).log_prob(y)), (None, 0))(eta, y)

    scores = jax.vmap(of_observation)(keys.reshape(-1), eta.reshape(-1, size), others)
    return scores.reshape(*shape, FISHER_DRAWS, size)


def _constructor(law: dist.Distribution) -> list[str]:
    names = inspect.signature(type(law).__init__).parameters
    return [k for k in names if k in law.arg_constraints and getattr(law, k, None) is not None]


def _event(law: dist.Distribution, parameter: str) -> tuple[int, ...]:
    axes = law.arg_constraints[parameter].event_dim
    return jnp.shape(getattr(law, parameter))[-axes:] if axes else ()


def _transform(law: dist.Distribution, parameter: str) -> Transform:
    return biject_to(law.arg_constraints[parameter])


# ---- which family a site has --------------------------------------------------------------------------------------


def parameters_of(law: dist.Distribution) -> dict[str, Array]:
    """The parameters that the constructor of a distribution takes, its wrappers aside."""
    law = without_wrappers(law)
    return {k: getattr(law, k) for k in _constructor(law)}


def is_natural(law: dist.Distribution) -> bool:
    """Whether a distribution is of a family with one natural parameter."""
    return type(without_wrappers(law)) in _NATURAL


def family_of(name: str, law: dist.Distribution, moving: tuple[str, ...]) -> Family:
    """The family of a site.

    :param name: Name of the site, for texts.
    :param law: Its distribution.
    :param moving: Those of :func:`parameters_of` that depend on the weights.
    :raises ValueError: for distributions that are not made of parameters.
    """
    law = without_wrappers(law)
    if type(law) in _NATURAL and set(moving) <= _OF_PARAMETER:
        return _NATURAL[type(law)]
    if _NATURAL.get(type(law)) is _MULTIVARIATE:
        raise ValueError(
            f"The covariance of observed site '{name}', a {type(law).__name__}, depends on the weights, which is not"
            " linearized; write it with a Normal for each output, or a covariance of its own."
        )
    if not moving:
        raise ValueError(
            f"Observed site '{name}', a {type(law).__name__}, has no parameter that depends on the weights, so nothing"
            " of it can be linearized. If it is a mixture or a truncated distribution, write it with one of"
            " numpyro.distributions whose parameters the network gives directly."
        )
    return _estimated(moving)
