# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What :meth:`AutoLinearizedLaplace.fit` returns, and the tangent model as something that predicts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from numpyro_bdl.guides.tangent import TangentModel, Weights
from numpyro_bdl.natural_parameter import without_wrappers
from numpyro_bdl.potential import Potential


@dataclass(frozen=True)
class LaplacePosterior:
    """The posterior of the tangent of a model. Latent sites are constrained, by name."""

    params: dict[str, Any]
    """the parameters of SVI, with ``<prefix>_samples`` (sample, latent) added: what :class:`numpyro.infer.Predictive`
    and ``guide.sample_posterior`` take"""
    loc: dict[str, Array]
    """the trained values"""
    linear_mode: dict[str, Array]
    """the mode of the linear model under the final prior; the trained values of sites that are not linearized"""
    samples: dict[str, Array]
    """posterior samples, (sample, ...)"""
    prior_precision: dict[str, float]
    """precision of each group of weights, in units of ``prior_unit``"""
    prior_unit: dict[str, Array]
    """precisions by site that those of the groups multiply: 1, for the g-prior the diagonal of J' Lam J, for
    ``prior="model"`` those of the model"""
    groups: dict[str, tuple[str, ...]]
    """the sites of each group"""
    frozen: tuple[str, ...]
    """parameters of networks that stay at their trained values"""
    noise_scale: Array | None
    """the learned value of ``noise_site``"""
    effective_dimension: float
    """estimated number of weights that the data determine"""
    residual: float
    """largest residual of the linear systems of the samples, relative to their right-hand sides"""
    clipped: int
    """weights whose unit of the g-prior was raised, since the outputs hardly depend on them"""
    history: dict[str, np.ndarray]
    """per E-step: precision, effective dimension and size of each group (step, group), noise scale, residual"""
    system: Any = field(repr=False)
    """the linear system of the samples"""
    arguments: tuple[tuple, dict] = field(repr=False)
    """the data: arguments of the model"""

    @property
    def potential(self) -> "TangentPotential":
        """The tangent model, in place of the model's own potential."""
        return TangentPotential(self.system.model)

    def draws(self) -> tuple[dict[str, Array], dict]:
        """Samples and mutable collections as of one chain, (1, sample, ...)."""
        count = len(next(iter(self.samples.values())))
        mutable = jax.tree.map(lambda w: jnp.broadcast_to(w, (1, count, *jnp.shape(w))), self.system.model.mutable)
        return {k: w[None] for k, w in self.samples.items()}, mutable

    def attributes(self) -> dict[str, Any]:
        """What a tree says of it."""
        precisions = {f"prior_precision {group}": a for group, a in self.prior_precision.items()}
        found = {
            "guide": "AutoLinearizedLaplace",
            "effective_dimension": self.effective_dimension,
            "residual": self.residual,
        }
        return found | precisions


class TangentPotential(Potential):
    """The potential of a model, with runs of its tangent in place of its own."""

    def __init__(self, model: TangentModel):
        self.tangent = model

    def __getattr__(self, name: str) -> Any:
        if name == "tangent":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.tangent.potential, name)

    def run(
        self, values: Mapping[str, Array], rows: dict, key: Array, mutable: dict, args: tuple, kwargs: dict
    ) -> dict[str, dict]:
        """A trace in which every parameter of an observed site, and every deterministic site, is on its tangent."""
        tangent, potential = self.tangent, self.tangent.potential
        families = dict(tangent.families)
        frames: dict[str, dict] = {}
        others = {k: values[k] for k in potential.latent if k not in tangent.weights}

        def run(weights: Weights):
            sites = potential.run(others | weights, rows, key, mutable, args, kwargs)
            frames.update(sites)
            outputs = {name: family.predictor(name, sites[name]) for name, family in families.items()}
            outputs |= {k: site["value"] for k, site in sites.items() if site["type"] == "deterministic"}
            kept = {k: (s["fn"], s["value"]) for k, s in sites.items() if s["type"] == "sample"}
            return outputs, kept

        change = {k: values[k] - w for k, w in tangent.weights.items()}
        outputs, slopes, kept = jax.jvp(run, (tangent.weights,), (change,), has_aux=True)
        outputs = jax.tree.map(jnp.add, outputs, slopes)
        sites = dict(frames)
        for name, (law, value) in kept.items():
            if name in families:
                law = _at(law, families[name], outputs[name])
            sites[name] = frames[name] | {"fn": law, "value": value}
        for name in outputs.keys() - families.keys():
            sites[name] = frames[name] | {"value": outputs[name]}
        return sites


def _at(law, family, eta: Array):
    """A distribution with its wrappers, at another natural parameter."""
    inner = without_wrappers(law)
    moved = family.rebuild(inner, eta)
    return moved.to_event(law.event_dim - inner.event_dim)
