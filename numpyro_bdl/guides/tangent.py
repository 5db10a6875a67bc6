# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""The tangent of a model at trained weights: a model that is linear in its weights.

.. math::

    h(w, x) = f(w^*, x) + J(x) (w - w^*), \qquad J(x) = \partial f(w^*, x) / \partial w,

with f the natural parameter of each observed site. Everything is made of products with J and its transpose, of one
linearization for each batch of rows, however many vectors there are; no Jacobian is ever formed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, lax, random

from numpyro_bdl._arguments import Arguments
from numpyro_bdl.guides.likelihoods import Curvature, Family, family_of, parameters_of
from numpyro_bdl.natural_parameter import without_wrappers
from numpyro_bdl.noise import normal
from numpyro_bdl.potential import Potential, row_axis

Weights = dict[str, Array]
"""Weights by site; with one more axis in front, several vectors of them."""


class Batch(NamedTuple):
    """Rows of the data plate, and how much each counts."""

    rows: Array
    """integer indices (B,)"""
    weight: Array
    """(B,): 1 for a row of a full pass, 0 for one that fills up its last batch, N / B for one of a minibatch"""
    rest: Array
    """the same for observations outside of the data plate, which every batch meets"""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("weights", "others", "mutable", "arrays", "key", "curved_at"),
    meta_fields=("potential", "arguments", "plate", "size", "moving", "sample_chunk"),
)
@dataclass(frozen=True)
class TangentModel:
    """A model linearized in some of its latent sites; a pytree, so that programs take its arrays as arguments."""

    weights: Weights
    """the sites that it is linear in, where it is linearized"""
    others: dict[str, Array]
    """every other latent site, constrained"""
    mutable: dict
    """mutable collections"""
    arrays: list[Array]
    """arrays among the arguments of the model"""
    key: Array
    """PRNG key of the noise; row i has the noise of its key folded with i, whatever batch it is met in"""
    curved_at: Weights | None
    """displacement of the weights at which the likelihood's curvature is taken; None for where it is linearized"""
    potential: Potential
    arguments: Arguments
    plate: str | None
    """the plate whose rows are batched"""
    size: int
    """its rows"""
    moving: tuple[tuple[str, tuple[str, ...]], ...]
    """observed sites, each with the parameters of its distribution that depend on the weights"""
    sample_chunk: int | None = None
    """vectors that are worked on at a time; None for all"""

    def predictor(self, name: str, site: dict) -> Array:
        """What is linear in the weights: the natural parameter of a site of a trace."""
        return self.family(name, site["fn"]).predictor(name, site)

    def family(self, name: str, law: dist.Distribution) -> Family:
        """The family of an observed site."""
        return family_of(name, law, dict(self.moving)[name])

    def at(self, batch: Batch) -> "Linearization":
        """The linear model at some rows, traced."""
        args, kwargs = self.arguments.join(self.arrays)
        rows = {self.plate: batch.rows} if self.plate else {}
        axes: dict[str, int | None] = {}

        def function(weights):
            # one key: what a model draws by itself was refused before
            sites = self.potential.run(self.others | weights, rows, random.key(0), self.mutable, args, kwargs)
            axes.update({name: row_axis(sites[name], self.plate) for name, _ in self.moving})
            eta = {name: self.predictor(name, sites[name]) for name, _ in self.moving}
            kept = {name: (sites[name]["fn"], sites[name]["value"], sites[name]["scale"]) for name in eta}
            return eta, kept

        eta, push, kept = jax.linearize(function, self.weights, has_aux=True)
        pull = jax.linear_transpose(push, self.weights)
        of_plate = self.size / len(batch.rows)
        sites = {}
        for name, (law, value, scale) in kept.items():
            shape = law.shape()
            shape = shape[: len(shape) - without_wrappers(law).event_dim]
            weight = jnp.broadcast_to(_factor(law, scale, shape), shape)
            share, axis = batch.rest, axes[name]
            if axis is not None:
                weight = weight / of_plate
                share = _over(batch.weight, len(shape) - axis - 1)
            family = self.family(name, law)
            sites[name] = Observations(family, without_wrappers(law), value, weight, share, axis)
        # products keep the precision of the weights and of the network, which may be less than that of the noise
        jvp = lambda v: push(jax.tree.map(_cast, v, self.weights))
        vjp = lambda u: pull(jax.tree.map(_cast, u, eta))[0]
        return Linearization(self, batch, eta, jvp, vjp, sites)

    def curved(self, displacement: Weights) -> "TangentModel":
        """The same model with the curvature of the likelihood taken at displaced weights."""
        return replace(self, curved_at=displacement)

    def map(self, function: Callable, *vectors: Any) -> Any:
        """A function of each of several vectors, as many at a time as ``sample_chunk`` says."""
        if self.sample_chunk is None:
            return jax.vmap(function)(*vectors)
        return lax.map(lambda x: function(*x), vectors, batch_size=self.sample_chunk)


class Observations(NamedTuple):
    """The observations of a site in a batch."""

    family: Family
    law: dist.Distribution
    """their distribution where the model is linearized, without its wrappers"""
    value: Any
    """the observed values; None where the model is only to predict"""
    weight: Array
    """how often each is observed: ``handlers.scale`` and mask, a part of the likelihood"""
    share: Array
    """what the batch multiplies each by, in sums over rows: broadcasts against weight"""
    row_axis: int | None
    """the axis of the rows of the data plate"""


class Linearization:
    """The linear model at the rows of one batch. Arrays of outputs are dicts by observed site."""

    def __init__(self, model: TangentModel, batch: Batch, eta, jvp: Callable, vjp: Callable, sites: dict):
        self.model, self.batch, self.eta, self.sites = model, batch, eta, sites
        self.jvp: Callable[[Weights], dict[str, Array]] = jvp
        """J times a vector of weights"""
        self.vjp: Callable[[dict[str, Array]], Weights] = vjp
        """J' times an array of outputs"""
        curved = eta if model.curved_at is None else self.outputs(model.curved_at)
        self._curvature: dict[str, Curvature] = {
            name: site.family.curvature(site.law, curved[name], partial(self._observation_keys, n, site))
            for n, (name, site) in enumerate(sites.items())
        }

    def outputs(self, displacement: Weights) -> dict[str, Array]:
        """h at the weights displaced by so much."""
        return jax.tree.map(jnp.add, self.eta, self.jvp(displacement))

    def curvature(self, u: dict[str, Array]) -> dict[str, Array]:
        """The share of the curvature of the likelihood times an array of outputs."""
        return {k: self._times(k, self._curvature[k].product(u[k]), 1.0, 1) for k in u}

    def factor(self, eps: dict[str, Array]) -> dict[str, Array]:
        """The share of the factor of the curvature times noise."""
        return {k: self._times(k, self._curvature[k].factor(eps[k]), 0.5, 1) for k in eps}

    def transposed(self, u: dict[str, Array]) -> dict[str, Array]:
        """The transposed factor times an array of outputs: an array of noise, of which no share is taken."""
        return {k: self._times(k, self._curvature[k].transposed(u[k]), 0.5, 0) for k in u}

    def product(self, v: Weights) -> Weights:
        r""":math:`J^\top \Lambda J v`."""
        return self.vjp(self.curvature(self.jvp(v)))

    def log_likelihood(self, outputs: dict[str, Array]) -> Array:
        """The share of the log likelihood at given outputs."""
        total = jnp.zeros(())
        for name, site in self.sites.items():
            log_prob = site.family.rebuild(site.law, outputs[name]).log_prob(site.value)
            # a mask takes observations out that may be outside of the support
            total += jnp.sum(jnp.where(site.weight > 0, site.weight * site.share * log_prob, 0.0))
        return total

    def score(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """Its gradient in the outputs."""
        return jax.grad(self.log_likelihood)(outputs)

    def noise(self, count: int) -> dict[str, Array]:
        """Standard normal noise for the factor, (count, ...) by site, that of each row by its own key."""

        def of_site(n, name, site):
            shape, axis = self._curvature[name].noise_shape, site.row_axis
            like = jax.ShapeDtypeStruct((count, *_without(shape, axis)), self.eta[name].dtype)
            drawn = jax.vmap(lambda key: normal(key, [like])[0])(self._row_keys(n, site))
            return drawn[0] if axis is None else jnp.moveaxis(drawn, 0, axis + 1)

        return {name: of_site(n, name, site) for n, (name, site) in enumerate(self.sites.items())}

    def _row_keys(self, n: int, site: Observations) -> Array:
        rows = jnp.zeros(1, int) if site.row_axis is None else self.batch.rows
        return jax.vmap(partial(random.fold_in, random.fold_in(self.model.key, n)))(rows)

    def _observation_keys(self, n: int, site: Observations) -> Array:
        """A key for each observation, by its row."""
        shape, axis = site.weight.shape, site.row_axis
        within = _without(shape, axis)
        keys = jax.vmap(lambda key: random.split(random.fold_in(key, 1), within))(self._row_keys(n, site))
        return keys[0] if axis is None else jnp.moveaxis(keys, 0, axis)

    def _times(self, name: str, u: Array, power: float, shares: int) -> Array:
        site = self.sites[name]
        weight = site.weight**power * site.share**shares
        return u * _over(weight, u.ndim - weight.ndim)


def _cast(value: Array, like: Array) -> Array:
    return value.astype(like.dtype)


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]


def _factor(law: dist.Distribution, scale: Any, shape: tuple[int, ...]) -> Array:
    """``handlers.scale``, with that of plates, and masks, for each observation of a site."""
    within = len(shape) - len(law.batch_shape)  # axes that to_event made
    factor = _over(jnp.ones(()) if scale is None else scale, within)
    while isinstance(law, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
        if isinstance(law, dist.MaskedDistribution):
            factor = factor * _over(law._mask, within)
        if isinstance(law, dist.Independent):
            within -= law.reinterpreted_batch_ndims
        law = law.base_dist
    return factor


def _over(value: Any, axes: int) -> Array:
    """An array with so many axes more on the right, unless it is a number."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * axes) if value.ndim else value


# ---- how a model is linearized --------------------------------------------------------------------------------------


def moving_parameters(
    potential: Potential, values: dict, names: tuple[str, ...], rows: dict, mutable: dict, args: tuple, kwargs: dict
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Which parameters of each observed site depend on the weights.

    :param values: Every latent site, constrained.
    :param names: The sites that are weights.
    :raises ValueError: for a site without a family.
    """
    laws: dict[str, dist.Distribution] = {}

    def parameters(weights):
        sites = potential.run(values | weights, rows, random.key(0), mutable, args, kwargs)
        laws.update({name: sites[name]["fn"] for name in potential.observed})
        return {name: parameters_of(law) for name, law in laws.items()}

    weights = {name: values[name] for name in names}
    tangents = jax.jit(lambda w, t: jax.jvp(parameters, (w,), (t,))[1])(weights, normal(random.key(0), weights))
    moving = {
        name: tuple(k for k, t in found.items() if t.dtype != jax.dtypes.float0 and bool(jnp.any(t != 0)))
        for name, found in tangents.items()
    }
    for name in potential.observed:
        family_of(name, laws[name], moving[name])
    return tuple((name, moving[name]) for name in potential.observed)
