# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What :meth:`AutoLinearizedLaplace.fit` returns, and the tangent model as something that predicts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random
from jax.flatten_util import ravel_pytree

from numpyro_bdl.guides.tangent import TangentModel
from numpyro_bdl.linear.likelihoods import Family
from numpyro_bdl.linear.model import Weights
from numpyro_bdl.linear.solvers.cg import ConjugateGradient
from numpyro_bdl.linear.system import Problem, System
from numpyro_bdl.potential import Potential


@dataclass(frozen=True)
class LaplacePosterior:
    """The posterior of the tangent of a model. Latent sites are constrained, by name."""

    params: dict[str, Any]
    """the parameters of SVI, with ``<prefix>_samples`` (sample, latent) added: what :class:`numpyro.infer.Predictive`
    and ``guide.sample_posterior`` take"""
    loc: dict[str, Array]
    """the trained values"""
    linear_mode: dict[str, Array] | None
    """the mode of the linear model under the final prior, and the trained values of sites that are not linearized;
    None where neither EM nor a setting needs it"""
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
    """latent sites and parameters that stay at their trained values"""
    noise_scale: Array | None
    """the learned value of ``noise_site``"""
    effective_dimension: float
    """estimated number of weights that the data determine"""
    residual: float
    """largest residual of the linear systems of the samples, relative to their right-hand sides"""
    clipped: int
    """weights whose unit of the g-prior was raised, since the outputs hardly depend on them"""
    history: dict[str, np.ndarray]
    """per E-step: precision, effective dimension and norm of the mode (if there is one) in prior standard deviations,
    each (step, group), noise scale, and residual"""
    system: System = field(repr=False)
    """the linear system of the samples"""
    arguments: tuple[tuple, dict] = field(repr=False)
    """the data: arguments of the model"""

    @property
    def potential(self) -> "TangentPotential":
        """The tangent model, in place of the model's own potential."""
        return TangentPotential(self.system.model)

    @property
    def markov(self) -> bool:
        """False: its samples are independent."""
        return False

    def draws(self) -> tuple[dict[str, Array], dict]:
        """Samples and mutable collections as of one chain, (1, sample, ...)."""
        count = len(next(iter(self.samples.values())))
        mutable = jax.tree.map(lambda w: jnp.broadcast_to(w, (1, count, *jnp.shape(w))), self.system.model.mutable)
        return {k: w[None] for k, w in self.samples.items()}, mutable

    def covariance(self, *args, tolerance: float = 1e-4, **kwargs) -> dict[str, np.ndarray]:
        r"""The posterior covariance of the function at few inputs, without the error of samples,

        .. math::

            C = J_* H^{-1} J_*^\top,

        by one linear system for each output at these inputs, with passes over all of the data.

        :param args: Positional arguments of the model: the inputs.
        :param tolerance: Relative residual at which a system is solved.
        :param kwargs: Keyword arguments of the model.
        :return: By observed site, an array of the shape of its function twice, (row, output, row, output).
        """
        model = self.system.model

        def function(weights):
            sites = model.potential.run(model.others | weights, {}, random.key(0), model.mutable, args, kwargs)
            return {name: model.predictor(name, sites[name]) for name, _ in model.moving}

        @jax.jit
        def features():
            eta, push = jax.linearize(function, model.weights)
            pull = jax.linear_transpose(push, model.weights)
            flat, unravel = ravel_pytree(eta)
            return eta, jax.vmap(lambda e: self.system.whiten(pull(unravel(e))[0]))(
                jnp.eye(flat.size, dtype=flat.dtype)
            )

        eta, right = features()
        solver = ConjugateGradient(tolerance)
        problem = Problem(right, jax.tree.map(jnp.zeros_like, right), noisy=False)
        solution = solver.solve(self.system, problem, problem.data, random.key(0))
        sites = [(right[k].reshape(len(w), -1), w.reshape(len(w), -1)) for k, w in solution.items()]
        joint = jnp.sum(jnp.stack([before @ after.T for before, after in sites]), 0)
        ends = np.cumsum([0, *(eta[name].size for name in sorted(eta))])
        blocks = {name: slice(*ends[n : n + 2]) for n, name in enumerate(sorted(eta))}
        return {name: np.asarray(joint[b, b]).reshape(2 * eta[name].shape) for name, b in blocks.items()}

    def tree_groups(self) -> dict:
        """No groups of its own in a tree."""
        return {}

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

    draws_share_work = True  # the point where it touches

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
        names = [name for name, _ in tangent.moving]
        frames: dict[str, dict] = {}
        others = {k: values[k] for k in potential.latent if k not in tangent.weights}

        def run(weights: Weights):
            sites = potential.run(others | weights, rows, key, mutable, args, kwargs)
            frames.update(sites)
            outputs = {name: tangent.predictor(name, sites[name]) for name in names}
            derived = {k: site["value"] for k, site in sites.items() if site["type"] == "deterministic"}
            # classes and counts have no tangent, and are those of the trained weights
            outputs |= {k: v for k, v in derived.items() if jnp.issubdtype(jnp.result_type(v), jnp.floating)}
            kept = {k: (s["fn"], s["value"]) for k, s in sites.items() if s["type"] == "sample"}
            return outputs, (kept, {k: v for k, v in derived.items() if k not in outputs})

        change = {k: values[k] - w for k, w in tangent.weights.items()}
        outputs, slopes, (kept, fixed) = jax.jvp(run, (tangent.weights,), (change,), has_aux=True)
        outputs = jax.tree.map(jnp.add, outputs, slopes)
        sites = dict(frames)
        for name, (law, value) in kept.items():
            if name in names:
                law = _at(law, tangent.family(name, law), outputs[name])
            sites[name] = frames[name] | {"fn": law, "value": value}
        for name, value in (outputs | fixed).items():
            if name not in names:
                sites[name] = frames[name] | {"value": value}
        return sites


def _at(law: dist.Distribution, family: Family, eta: Array) -> dist.Distribution:
    """A distribution, in its wrappers, at another natural parameter, which has been expanded already."""
    if isinstance(law, dist.MaskedDistribution):
        return _at(law.base_dist, family, eta).mask(jnp.asarray(law._mask))
    if isinstance(law, dist.Independent):
        return _at(law.base_dist, family, eta).to_event(law.reinterpreted_batch_ndims)
    if isinstance(law, dist.ExpandedDistribution):
        return _at(law.base_dist, family, eta)
    return family.rebuild(law, eta)
