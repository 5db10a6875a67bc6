# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The canonical form of draws that exist already, whatever holds them."""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC
from xarray import DataTree

from numpyro_bdl._checks import check_choice
from numpyro_bdl._runs import positions, potential_of
from numpyro_bdl.symmetry.action import DOMAINS, canonicalize
from numpyro_bdl.symmetry.groups import UnitGroups, leaves, put_members, take_members

_CHUNK = 2**22


def fold_draws(run: Any, groups: UnitGroups | None = None, domain: str = "bias") -> Any:
    """Draws on the symmetry-free reference set of the network: each is replaced by the representative of its copies.

    The law of what is returned is that of :class:`~numpyro_bdl.SymmetryRestricted` in the mode ``"record"``, if the
    prior is the same for equivalent networks. That is checked where the model is at hand, of a run; of other draws the
    caller must know it. Functions of the network stay as they are in any case. By a site that is only bounded above,
    whose transform decreases, the kernel orders units the other way round.

    Sites that belong to no group are passed on, deterministic ones too: one that is computed from the weights of a
    layer keeps the units of the draw. For what goes with a draw besides, such as an anchor or a mask:
    ``apply(canonical_element(draws, groups), anchor)``.

    :param run: One of

        - an MCMC object: returns its samples, (chain, draw, ...) by site, with the mutable collections (BatchNorm) that
          were collected, folded alike, under the names of their own sites;
        - a DataTree with the group ``posterior``, as of :func:`~numpyro_bdl.to_datatree`: returns a new tree with the
          group ``posterior_folded`` beside it, whose attributes name the domain. It holds no mutable collections: for a
          network with these give the MCMC object;
        - a dict of sites or a parameter tree, with any leading batch axes: returns such a one. For a network with
          mutable collections these must be in it.

    :param groups: From :func:`~numpyro_bdl.symmetry.find_model_groups`. None finds those of the model of a run.
    :param domain: Which representative: see :func:`~numpyro_bdl.symmetry.canonicalize`.
    :return: As above, in NumPy arrays of the same precision. Draws that are not finite are passed through, and counted
        in a warning.
    :raises ValueError: for draws without a model and without groups, missing parameters or other shapes, a tree without
        posterior; for a prior that a group does not leave as it is.
    :raises TypeError: if ``run`` is none of these.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_bdl.symmetry import UnitGroups, Units, fold_draws
        >>> draws = {"w1": random.normal(random.key(0), (4, 50, 1, 3)), "b": random.normal(random.key(1), (4, 50, 3)),
        ...          "w2": random.normal(random.key(2), (4, 50, 3, 1)), "noise": jnp.ones((4, 50))}
        >>> one = {name: value[0, 0] for name, value in draws.items()}
        >>> groups = UnitGroups.of(one, {
        ...     "hidden": Units(writes={"b": 0, "w1": 1}, reads={"w2": 0}, flips=("b", "w1", "w2"))})
        >>> folded = fold_draws(draws, groups)
        >>> folded["b"].shape, bool((folded["b"] > 0).all()), bool((jnp.diff(folded["b"]) > 0).all())
        ((4, 50, 3), True, True)
    """
    check_choice("fold_draws", "domain", domain, DOMAINS)
    if groups is not None and not isinstance(groups, UnitGroups):
        raise TypeError(f"fold_draws: groups must be UnitGroups, got {type(groups).__name__}.")
    if isinstance(run, MCMC):
        return _fold_run(run, groups, domain)
    if groups is None:
        raise ValueError(
            f"fold_draws: a {type(run).__name__} holds no model in which to find groups of units; give them as"
            " groups=symmetry.find_model_groups(model, ...)."
        )
    if isinstance(run, DataTree):
        return _fold_tree(run, groups, domain)
    if not isinstance(run, Mapping):
        raise TypeError(f"fold_draws needs an MCMC object, a DataTree or a dict, got {type(run).__name__}.")
    return _fold(run, groups, domain)


def _fold(tree: Any, groups: UnitGroups, domain: str) -> Any:
    """A tree of draws with the members of the groups folded, in chunks that go through one compiled program."""
    members, batch = take_members(tree, groups)
    count = math.prod(batch)
    if not members or not count:
        return tree
    # what is in no group is None, which is no leaf
    nothing = dict.fromkeys(leaves(tree).keys() - members.keys())
    flat = {path: np.asarray(x).reshape(count, *np.shape(x)[len(batch) :]) for path, x in members.items()}
    chunk = min(count, max(1, _CHUNK // sum(x[0].size for x in flat.values())))
    folded = {path: np.empty_like(x) for path, x in flat.items()}
    double = any(x.dtype == np.float64 for x in flat.values())
    bad = 0
    for start in range(0, count, chunk):
        # the last chunk is filled up by draws that are done, so that one program serves all
        rows = slice(min(start, count - chunk), min(start, count - chunk) + chunk)
        some = put_members(tree, {path: x[rows] for path, x in flat.items()} | nothing)
        with jax.enable_x64(double or jax.config.jax_enable_x64):
            some, finite = _fold_chunk(some, groups, domain)
        for path, x in leaves(some).items():
            folded[path][rows] = x
        bad += int(np.sum(~np.asarray(finite)[start - rows.start :]))
    if bad:
        warnings.warn(f"fold_draws: {bad} of {count} draws are not finite and are returned as they are.", stacklevel=4)
    return put_members(tree, {path: x.reshape(*batch, *x.shape[1:]) for path, x in folded.items()})


@partial(jax.jit, static_argnames=("groups", "domain"))
def _fold_chunk(draws: Any, groups: UnitGroups, domain: str) -> tuple[Any, jax.Array]:
    finite = [jnp.isfinite(x).reshape(len(x), -1).all(1) for x in jax.tree.leaves(draws)]
    return canonicalize(draws, groups, domain), jnp.stack(finite).all(0)


def _fold_run(mcmc: MCMC, groups: UnitGroups | None, domain: str) -> dict[str, Any]:
    # kernels import this package
    from numpyro_bdl.kernels.symmetry_restricted import SymmetryRestricted

    if getattr(mcmc.sampler, "model", None) is None:
        raise ValueError(
            "fold_draws: a kernel with a potential_fn has no model in which to check the groups; give the dict of"
            " samples, mcmc.get_samples(group_by_chain=True), and groups=UnitGroups.of(...)."
        )
    potential = potential_of(mcmc)
    kernel, state = mcmc.sampler, mcmc.last_state
    if isinstance(kernel, SymmetryRestricted):
        kernel, state = kernel.kernel, state.state
    restricted = SymmetryRestricted(kernel, groups, domain=domain)
    restricted._meet(state, mcmc._args, mcmc._kwargs)
    mutable = mcmc.get_extra_fields(group_by_chain=True).get("mutable") if potential.has_mutable else None
    return _fold(positions(mcmc) | (mutable or {}), restricted.unit_groups, domain)


def _fold_tree(tree: DataTree, groups: UnitGroups, domain: str) -> DataTree:
    if "posterior" not in tree.children:
        raise ValueError(
            f"fold_draws: the tree has no group 'posterior'; its groups: {', '.join(tree.children) or 'none'}."
        )
    posterior = tree["posterior"].to_dataset()
    names = {path[0]: path[0].replace("/", ".") for path, _ in groups.shapes}
    missing = ["/".join(path) for path, _ in groups.shapes if names[path[0]] not in posterior]
    if missing:
        raise ValueError(
            f"fold_draws: the posterior of the tree has no '{missing[0]}', which belongs to a group. A tree does not"
            " keep the mutable collections of a network (BatchNorm); fold the run itself: fold_draws(mcmc, groups)."
        )
    arrays = {site: posterior[name].transpose("chain", "draw", ...) for site, name in names.items()}
    folded = _fold({site: array.values for site, array in arrays.items()}, groups, domain)
    posterior = posterior.assign({names[site]: array.copy(data=folded[site]) for site, array in arrays.items()})
    posterior.attrs |= {"symmetry_domain": domain, "symmetry_groups": [group.name for group in groups]}
    new = tree.copy()
    new["posterior_folded"] = DataTree(posterior)
    return new
