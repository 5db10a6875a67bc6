# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""The tangent of a model at trained weights: a model that is linear in its weights.

.. math::

    h(w, x) = f(w^*, x) + J(x) (w - w^*), \qquad J(x) = \partial f(w^*, x) / \partial w,

with f the natural parameter of each observed site, as a :class:`~numpyro_bdl.linear.model.LinearModel`.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random

from numpyro_bdl._arguments import Arguments
from numpyro_bdl.linear.likelihoods import Family, family_of, parameters_of
from numpyro_bdl.linear.model import LinearModel, Observed, Weights
from numpyro_bdl.noise import normal
from numpyro_bdl.potential import Potential, row_axis


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("weights", "others", "mutable", "arrays", "key", "curved_at"),
    meta_fields=("potential", "arguments", "plate", "size", "moving", "sample_chunk"),
)
@dataclass(frozen=True, kw_only=True)
class TangentModel(LinearModel):
    """A model linearized in some of its latent sites; a pytree, so that programs take its arrays as arguments."""

    others: dict[str, Array]
    """every other latent site, constrained"""
    mutable: dict
    """mutable collections"""
    arrays: list[Array]
    """arrays among the arguments of the model"""
    potential: Potential
    arguments: Arguments
    plate: str | None
    """the plate whose rows are batched"""
    moving: tuple[tuple[str, tuple[str, ...]], ...]
    """observed sites, each with the parameters of its distribution that depend on the weights"""

    def predictor(self, name: str, site: dict) -> Array:
        """What is linear in the weights: the natural parameter of a site of a trace."""
        return self.family(name, site["fn"]).predictor(name, site)

    def family(self, name: str, law: dist.Distribution) -> Family:
        """The family of an observed site."""
        return family_of(name, law, dict(self.moving)[name])

    def observe(self, weights: Weights, rows: Array):
        """Run the model."""
        args, kwargs = self.arguments.join(self.arrays)
        given = {self.plate: rows} if self.plate else {}
        # one key: what a model draws by itself was refused before
        sites = self.potential.run(self.others | weights, given, random.key(0), self.mutable, args, kwargs)
        eta = {name: self.predictor(name, sites[name]) for name, _ in self.moving}
        observed = {name: Observed(sites[name]["fn"], sites[name]["value"], sites[name]["scale"]) for name in eta}
        return eta, observed, {name: row_axis(sites[name], self.plate) for name in eta}


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
