# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The function of a model: the natural parameter of the distribution at a site."""

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

_LOGITS = (
    dist.CategoricalLogits,
    dist.CategoricalProbs,
    dist.MultinomialLogits,
    dist.MultinomialProbs,
    dist.BernoulliLogits,
    dist.BernoulliProbs,
    dist.BinomialLogits,
    dist.BinomialProbs,
)
_LOCATION = (
    dist.Normal,
    dist.LogNormal,
    dist.StudentT,
    dist.Laplace,
    dist.Cauchy,
    dist.Logistic,
    dist.MultivariateNormal,
    dist.LowRankMultivariateNormal,
)


NUMBERS = (*_LOCATION, dist.Poisson)
"""Laws of numbers whose natural parameter is known."""


def without_wrappers(law: dist.Distribution) -> dist.Distribution:
    """The distribution inside of ``to_event``, ``expand`` and ``mask``."""
    while isinstance(law, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        law = law.base_dist
    return law


def natural_parameter(name: str, site: dict) -> Array:
    """The function of a model at a site: logits, location or log rate, or the value of a deterministic site.

    :param name: Name of the site.
    :param site: Its entry in a trace.
    :return: The natural parameter, its batch dimensions those of the site.
    :raises ValueError: if the distribution has none here; a deterministic site can then be named instead.
    """
    if site["type"] == "deterministic":
        return site["value"]
    base, shape = without_wrappers(site["fn"]), site["fn"].shape()
    if isinstance(base, _LOGITS):
        value = base.logits
    elif isinstance(base, _LOCATION):
        value = base.loc
    elif isinstance(base, dist.Poisson):
        value = jnp.log(base.rate)
    else:
        raise ValueError(
            f"The observed site '{name}' is a {type(base).__name__}, of which no natural parameter is known; name"
            " a numpyro.deterministic site that holds the function of the model instead, as in sites=('f',), or give"
            " sites=() to do without."
        )
    if isinstance(base, (dist.CategoricalLogits, dist.CategoricalProbs)):
        shape = (*shape, jnp.shape(value)[-1])
    return jnp.broadcast_to(value, shape)
