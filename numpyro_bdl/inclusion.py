# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Spike and slab on groups of weights: E-step, M-step, and what a run says about inclusion.

A group g of m weights has the prior :math:`\theta N(0, s_1 I) + (1 - \theta) N(0, s_0 I)`, :math:`s_0 < s_1`. Then

.. math::

    \operatorname{logit} p_g &= \operatorname{logit} \theta + \frac m2 \log \frac{s_0}{s_1}
        + \frac{\|w_g\|^2}{2} \Bigl(\frac{1}{s_0} - \frac{1}{s_1}\Bigr) \\
    - \nabla \log p(w_g) &= \Bigl(\frac{p_g}{s_1} + \frac{1 - p_g}{s_0}\Bigr) w_g

the latter exactly, if p is that of the current weights.
"""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from numpyro_bdl import pruning
from numpyro_bdl._checks import check_number
from numpyro_bdl._runs import bad_chains, potential_of, warn_of_bad_chains
from numpyro_bdl.weight_groups import WeightGroups

RATE_BOUNDS = (1e-4, 1 - 1e-4)
"""Where a learned inclusion rate is kept."""

_CHUNK = 64  # draws of each chain whose probabilities are computed at once


class SpikeSlab(NamedTuple):
    """The prior of one site."""

    groups: WeightGroups
    slab: float
    """slab variance s1"""
    spike: float
    """spike variance s0"""
    model: float
    """variance of the model's own normal prior, which this one replaces"""

    def logit(self, square: Array, rate: Array, widening: float | Array = 1.0) -> Array:
        """Logit of the inclusion probability of each group.

        :param square: Squared norm by group, with any leading batch axes.
        :param rate: Prior probability of inclusion.
        :param widening: Factor of the spike variance.
        """
        spike = self.spike * widening
        size = jnp.asarray(self.groups.size, square.dtype)
        odds = jnp.log(rate) - jnp.log1p(-rate)
        return odds + (size * jnp.log(spike / self.slab) + square * (1 / spike - 1 / self.slab)) / 2

    def gradient(self, z: Array, inclusion: Array, widening: float | Array = 1.0) -> Array:
        """Gradient of the prior's energy, less that of the model's own prior.

        :param z: The weights of the site.
        :param inclusion: p by group.
        :param widening: Factor of the spike variance.
        """
        p = self.groups.spread(inclusion)
        return (p / self.slab + (1 - p) / (self.spike * widening) - 1 / self.model) * z


class InclusionRate(NamedTuple):
    r"""The prior probability of inclusion, :math:`\theta`: fixed, or learned under a Beta."""

    first: float
    beta: tuple[float, float] | None

    @classmethod
    def of(cls, owner: str, inclusion: float | dist.Distribution) -> "InclusionRate":
        """From a number or a Beta.

        :raises ValueError: for a number outside (0, 1), or a Beta without a mode.
        :raises TypeError: for another distribution.
        """
        if isinstance(inclusion, dist.Beta):
            alpha, beta = (np.asarray(x) for x in (inclusion.concentration1, inclusion.concentration0))
            if alpha.ndim or beta.ndim or min(alpha, beta) < 1:
                raise ValueError(
                    f"{owner}: inclusion must be a Beta with two numbers of at least 1, so that it has a mode; got"
                    f" Beta({alpha}, {beta})."
                )
            return cls(0.5, (float(alpha), float(beta)))
        if isinstance(inclusion, dist.Distribution):
            raise TypeError(f"{owner}: inclusion must be a number in (0, 1) or a Beta, got {type(inclusion).__name__}.")
        check_number(owner, "inclusion", inclusion, high=1)
        return cls(float(inclusion), None)

    def m_step(self, inclusion: Array) -> Array:
        r"""The mode of :math:`\theta` given p, :math:`(\sum_g p_g + \alpha - 1)/(\alpha + \beta + G - 2)`."""
        alpha, beta = self.beta or (1.0, 1.0)
        mode = (jnp.sum(inclusion) + alpha - 1) / (alpha + beta + inclusion.size - 2)
        return jnp.clip(mode, *RATE_BOUNDS)

    def floor(self, count: int) -> float:
        """The rate that is learned if none of so many groups is included; 0 if it is fixed."""
        return float(self.m_step(jnp.zeros(count))) if self.beta else 0.0


# ---- what a run says ------------------------------------------------------------------------------------------------


def inclusion_probabilities(mcmc) -> dict[str, np.ndarray]:
    r"""The probability that each group is included, given each draw of the weights.

    .. math::

        p_g(w) = P(\gamma_g = 1 \mid w_g, \theta)

    The mean over draws is the posterior probability of inclusion, with the indicators summed out (Rao-Blackwell), and
    has less variance than a share of draws.

    :param mcmc: A run of :class:`~numpyro_bdl.SpikeSlabSGHMC`.
    :return: (chain, draw, ...) by site, the last axes being those of the groups. Of a run that pruned: 1 for what the
        chain kept and 0 for what it pruned, since its draws are conditional on that. NaN for chains that met a gradient
        that was not finite. The formula is that of temperature 1.
    :raises ValueError: if the run is of another kernel, has no draws, or left out a site.
    """
    kernel, state = mcmc.sampler, mcmc.last_state
    if not hasattr(kernel, "priors"):
        raise ValueError(f"inclusion_probabilities needs a run of SpikeSlabSGHMC, got one of {type(kernel).__name__}.")
    potential_of(mcmc)  # whose priors the kernel then has
    warn_of_bad_chains(mcmc)
    warn_of_failures(mcmc)
    draws = mcmc.get_samples(group_by_chain=True)
    missing = [name for name in kernel.priors if name not in draws]
    if missing:
        raise ValueError(f"inclusion_probabilities: the run did not keep the draws of '{missing[0]}'.")
    if state.mask:
        # a weight that was kept is not 0; the mask of the last draw would be no mask for draws that were folded
        result = {}
        for name, prior in kernel.priors.items():
            result[name] = np.array(prior.groups.total(draws[name] != 0) > 0, np.float32)
            result[name][list(bad_chains(mcmc))] = np.nan
        return result
    return {name: _given_draws(prior, state.rate[name], draws[name]) for name, prior in kernel.priors.items()}


def _given_draws(prior: SpikeSlab, rate: Array, draws: Array) -> np.ndarray:
    """p at every draw, (chain, draw, group), from draws of the site, (chain, draw, ...), a chunk of them at a time."""
    rate = jnp.reshape(rate, (-1, *[1] * (1 + len(prior.groups.shape))))
    chunk_of = jax.jit(lambda z: jax.nn.sigmoid(prior.logit(prior.groups.total(z**2), rate)))
    result = np.empty((*draws.shape[:2], *prior.groups.shape), draws.dtype)
    for start in range(0, draws.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        result[:, chunk] = chunk_of(draws[:, chunk])
    return result


def kept_groups(mcmc) -> dict[str, np.ndarray]:
    """Which groups a run that pruned kept: (chain, ...) by site."""
    groups = mcmc.sampler.groups
    return {
        name: np.asarray(groups[name].total(jnp.asarray(mask))) > 0 for name, mask in pruning.final_masks(mcmc).items()
    }


def inclusion_groups(mcmc) -> dict[str, tuple[dict, dict, dict, list[str]]]:
    """The groups ``inclusion``, ``inclusion_rate`` and, if the run pruned, ``mask`` of a DataTree."""
    names = {name: groups.names() for name, groups in mcmc.sampler.groups.items()}
    dims = {name: [f"group_{name}"] for name in names}
    coords = {f"group_{name}": labels for name, labels in names.items()}

    def flat(values: dict, leading: int):
        return {name: np.reshape(v, (*v.shape[:leading], -1)) for name, v in values.items()}, dims, coords

    rates = {name: np.atleast_1d(rate) for name, rate in mcmc.last_state.rate.items()}
    tree = {
        "inclusion": (*flat(inclusion_probabilities(mcmc), 2), ["chain", "draw"]),
        "inclusion_rate": (rates, {}, {}, ["chain"]),
    }
    if mcmc.last_state.mask and not hasattr(mcmc.last_state, "unfolded"):  # else each draw has a mask of its own
        tree["mask"] = (*flat(kept_groups(mcmc), 1), ["chain"])
    return tree


def warn_of_failures(mcmc) -> None:
    """Warn of steps too long for the spike, a rate at its floor, and pruning of nothing or of nearly a whole site."""
    kernel, state = mcmc.sampler, mcmc.last_state
    if kernel._preconditioner.adapts:
        diagonal = kernel._preconditioner.diagonal(state.preconditioner, state.z)
        for name, prior in kernel.priors.items():
            share = kernel.stiffness(prior.spike) * float(np.max(diagonal[name]))
            if share >= 0.5:
                warnings.warn(
                    f"The preconditioner makes the steps long for the spike of '{name}': they are {share:.2g} of the"
                    " largest that is stable. Take a smaller step_size.",
                    stacklevel=3,
                )
    for name, rate in state.rate.items():
        floor = kernel.inclusion_rate.floor(kernel.groups[name].size.size)
        if np.any(np.asarray(rate) <= 1.5 * floor):
            warnings.warn(
                f"The inclusion rate of '{name}' has collapsed to its floor, {floor:.3g}, from which a group"
                " hardly returns. Give a fixed rate, a Beta with less weight on 0, a spike_widening, or more warm-up.",
                stacklevel=3,
            )
    if state.mask and kernel.prunes and not np.any(np.asarray(state.sparsity)):
        warnings.warn(
            "Nothing was pruned: no group met the criterion. Raise the threshold or the sparsity, or look for a"
            " chain that does not move.",
            stacklevel=3,
        )
    if state.mask:
        least = kernel.pruner.schedule.min_keep
        for name, kept in kept_groups(mcmc).items():
            counts = kept.reshape(len(kept), -1).sum(1)
            fewest = min((int(n) for chain, n in enumerate(counts) if chain not in bad_chains(mcmc)), default=least + 1)
            if fewest <= least < kept[0].size:
                warnings.warn(
                    f"'{name}' was pruned down to {fewest} of its {kept[0].size} groups, where only min_keep stopped"
                    " it. Take a lower sparsity, or a prior variance that fits the width of the layer.",
                    stacklevel=3,
                )
