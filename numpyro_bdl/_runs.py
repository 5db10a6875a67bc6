# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Where draws come from: what prediction and trees ask of a source, and an MCMC run as one."""

import warnings
from collections.abc import Collection
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer import MCMC

from numpyro_bdl._checks import check_choice
from numpyro_bdl._dims import Group, site_dims
from numpyro_bdl.potential import Potential

MEMBERS = ("position", "anchor", "both")
_ARVIZ_NAMES = {
    "potential_energy": "lp",
    "num_steps": "n_steps",
    "accept_prob": "acceptance_rate",
    "adapt_state.step_size": "step_size",
}


@runtime_checkable
class DrawSource(Protocol):
    """Draws of the latent sites of a model, with the model and its data."""

    @property
    def potential(self) -> Potential:
        """The model at its data."""
        ...

    @property
    def arguments(self) -> tuple[tuple, dict]:
        """The arguments of the model."""
        ...

    @property
    def markov(self) -> bool:
        """Whether the draws of a chain follow each other, as those of an ensemble or of a guide do not."""
        ...

    def draws(self) -> tuple[dict[str, Any], dict]:
        """Constrained sites and mutable collections, (chain, draw, ...)."""
        ...

    def tree_groups(self) -> dict[str, Group]:
        """Groups of a DataTree besides those of every source."""
        ...

    def attributes(self) -> dict[str, Any]:
        """Attributes of a DataTree."""
        ...


def source_of(
    owner: str, posterior: Any, members: str = "position", chains: Collection[int] | None = None
) -> DrawSource:
    """The draws of what a user hands in.

    :param chains: The chains that matter, for what is warned of; None for all.
    :raises TypeError: for anything that is neither a run nor a source.
    :raises ValueError: for a run without draws, and other members of a source than its draws.
    """
    check_choice(owner, "members", members, MEMBERS)
    if isinstance(posterior, MCMC):
        return Run(posterior, members, chains)
    if not isinstance(posterior, DrawSource):
        raise TypeError(
            f"{owner} needs an MCMC run, a posterior of AutoLinearizedLaplace, or numpyro_bdl.Samples, got an object of"
            f" {type(posterior).__name__}. Samples(model, draws, model_args) takes a dict of draws, Samples.from_svi"
            " and Samples.from_stein what SVI and SteinVI trained."
        )
    if members != "position":
        raise ValueError(f"{owner}: {type(posterior).__name__} has no anchors; leave members={members!r} out.")
    return posterior


class Run:
    """The draws of an MCMC run: those of the position, of the anchor, or of both one after the other."""

    def __init__(self, mcmc: MCMC, members: str = "position", chains: Collection[int] | None = None):
        self.potential = potential_of(mcmc)
        self.arguments = mcmc._args, mcmc._kwargs
        self._mcmc, self._members = mcmc, members
        warn_of_bad_chains(mcmc, chains)
        if members != "position" and self.potential.has_mutable:
            warnings.warn(
                "The mutable collections (BatchNorm) kept with the draws are those of the position; the anchors are"
                " given them too.",
                stacklevel=4,
            )

    @property
    def markov(self) -> bool:
        """Not of an ensemble, whose particles are its draws."""
        return not getattr(self._mcmc.sampler, "is_ensemble_kernel", False)

    def draws(self) -> tuple[dict[str, Array], dict]:
        """Constrained sites and mutable collections, (chain, draw, ...)."""
        mutable = mutable_of(self._mcmc, self.potential)
        if self._members == "position":
            return positions(self._mcmc), mutable
        anchor = anchors(self._mcmc, self.potential)
        if self._members == "anchor":
            return anchor, mutable
        position = {name: value for name, value in positions(self._mcmc).items() if name in anchor}
        return jax.tree.map(
            lambda one, other: jnp.concatenate([one, other], axis=1),
            (position, mutable),
            ({name: anchor[name] for name in position}, mutable),
        )

    def tree_groups(self) -> dict[str, Group]:
        """What was collected besides: scalars of the sampler, the anchor, and what its kernel adds."""
        stats = self._mcmc.get_extra_fields(group_by_chain=True)
        scalars = {
            _ARVIZ_NAMES.get(name, name): -value if name == "potential_energy" else value
            for name, value in stats.items()
            if not isinstance(value, (dict, tuple))
        }
        groups: dict[str, Group] = {"sample_stats": Group(scalars)}
        if "z_anchor" in stats:
            anchor = anchors(self._mcmc, self.potential)
            groups["anchor"] = Group(anchor, site_dims(self.potential, anchor))
        if hasattr(self._mcmc.sampler, "_tree_groups"):
            own = self._mcmc.sampler._tree_groups(self._mcmc)
            groups |= {name: Group(*group) for name, group in own.items()}
        return groups

    def attributes(self) -> dict[str, Any]:
        """The kernel, its temperature if it is fixed, shared minibatches, and chains that turned bad."""
        kernel = self._mcmc.sampler
        attributes: dict[str, Any] = {"kernel": _name(kernel)}
        temperature = getattr(kernel, "_temperature", None) if self.markov else None
        if temperature is not None and not callable(temperature):
            attributes["temperature"] = float(jnp.asarray(temperature))
        elif callable(temperature):
            of_draws = np.unique(self._mcmc.get_extra_fields().get("temperature", ()))
            if len(of_draws) == 1:  # a schedule that has come to its end
                attributes["temperature"] = float(of_draws[0])
        if hasattr(kernel, "_share_batch"):
            attributes["chains_share_minibatches"] = int(kernel._share_batch)
        if hasattr(kernel, "_tree_attributes"):
            attributes |= kernel._tree_attributes()
        bad = bad_chains(self._mcmc)
        if bad:
            attributes["bad_chains"] = list(bad)
            attributes["first_bad_steps"] = list(bad.values())
        return attributes


def potential_of(mcmc: MCMC) -> Potential:
    """The potential that a run was made with."""
    if mcmc.last_state is None:
        raise ValueError("The MCMC object holds no draws yet; run it first.")
    kernel = mcmc.sampler
    if not hasattr(kernel, "_prepare"):
        return Potential(kernel.model, mcmc._args, mcmc._kwargs)
    kernel._prepare(mcmc._args, mcmc._kwargs)
    return kernel.potential


def positions(mcmc: MCMC) -> dict[str, Array]:
    """Constrained draws of the position, (chain, draw, ...) by site."""
    return mcmc.get_samples(group_by_chain=True)


def anchors(mcmc: MCMC, potential: Potential) -> dict[str, Array]:
    """Constrained draws of the anchor, (chain, draw, ...) by site.

    :raises ValueError: if the run did not collect it.
    """
    unconstrained = mcmc.get_extra_fields(group_by_chain=True).get("z_anchor")
    if unconstrained is None:
        raise ValueError(
            "The run collected no anchor; make the kernel with collect_anchor=True, or run with"
            ' extra_fields=("z_anchor",).'
        )
    constrain = partial(potential.constrain, args=mcmc._args, kwargs=mcmc._kwargs)
    return jax.vmap(jax.vmap(constrain))(unconstrained)


def mutable_of(mcmc: MCMC, potential: Potential) -> dict:
    """The mutable collections of each draw, (chain, draw, ...).

    :raises ValueError: if the kernel did not keep them.
    """
    if not potential.has_mutable:
        return {}
    mutable = mcmc.get_extra_fields(group_by_chain=True).get("mutable")
    if mutable is None:
        raise ValueError(
            f"The network has mutable collections (BatchNorm), which {type(mcmc.sampler).__name__} does not keep with"
            " its draws; use a kernel of numpyro_bdl, or LayerNorm."
        )
    return mutable


def bad_chains(mcmc: MCMC) -> dict[int, int]:
    """Chains that met a gradient that was not finite, each with the step."""
    first = np.atleast_1d(getattr(mcmc.last_state, "first_bad_step", -1))
    return {chain: int(step) for chain, step in enumerate(first) if step >= 0}


def warn_of_bad_chains(mcmc: MCMC, among: Collection[int] | None = None) -> None:
    """Warn of chains, among some or all, whose later draws are NaN."""
    bad = {chain: step for chain, step in bad_chains(mcmc).items() if among is None or chain in among}
    for chain, step in bad.items():
        warnings.warn(
            f"Chain {chain} met a gradient that was not finite at step {step}; its draws from there on are NaN. Most"
            " often the step size is too large: take a smaller one, or leave that chain out.",
            stacklevel=3,
        )


def _name(kernel: Any) -> str:
    inner = getattr(kernel, "kernel", None)
    return type(kernel).__name__ + (f"({_name(inner)})" if inner is not None else "")
