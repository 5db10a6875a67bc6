# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""From a trained model to the linear system of its tangent, and the prior that EM starts from."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, random

from numpyro_bdl._arguments import Arguments
from numpyro_bdl.guides import checks
from numpyro_bdl.guides.linear_system import System, make_system, noise_gradients
from numpyro_bdl.guides.normalization import affine_sites, scale_free_layers
from numpyro_bdl.guides.prior import Prior, clip, diagonal
from numpyro_bdl.guides.reports import warn_if_far, warn_of_scale
from numpyro_bdl.guides.tangent import TangentModel, moving_parameters
from numpyro_bdl.potential import Potential
from numpyro_bdl.probes import normal_priors, output_sites

PRIORS = ("model", "isotropic", "per_site", "per_group", "g")
_FEW = 16  # rows by which one layer can be told from another


def prepare(
    guide: Any, key: Array, potential: Potential, values: dict[str, Array], mutable: dict, args: tuple, kwargs: dict,
    batch_size: int | None,
) -> tuple[System, Prior, tuple[str, ...], int]:  # fmt: skip
    """The linear system at trained values.

    :param guide: An :class:`~numpyro_bdl.AutoLinearizedLaplace`, for its settings.
    :param values: Latent sites, constrained.
    :return: The system, its prior, the sites and parameters that stay, and how many weights of a g-prior were raised.
    """
    plate = potential.data_plate({k: p.size for k, p in potential.plates.items()})
    size = potential.plates[plate].size if plate else 1
    batch_size = checks.check_batch_size(potential, plate, size, batch_size)

    # the g-prior looks at one row at a time
    smallest = 1 if guide.prior == "g" else batch_size
    if plate and smallest < size:
        checks.check_cut(potential, plate, smallest, args, kwargs)
    rows = {plate: jnp.arange(batch_size)} if plate else {}
    checks.check_deterministic(potential, values, rows, mutable, args, kwargs)
    sites, noise = checks.split_latent(potential, values, rows, mutable, args, kwargs)
    frozen = tuple(k for k in potential.network if guide.freeze(k)) if guide.freeze else affine_sites(potential)
    names = _linearized(guide.weights, potential, tuple(k for k in sites if k not in frozen))
    priors = normal_priors(potential)
    checks.check_priors(names, priors)

    arguments = Arguments(args, kwargs)
    weights, others = ({k: w for k, w in values.items() if (k in names) == chosen} for chosen in (True, False))
    model = TangentModel(
        weights=weights,
        others=others,
        mutable=mutable,
        arrays=arguments.arrays(args, kwargs),
        key=random.fold_in(key, 0),
        curved_at=None,
        potential=potential,
        arguments=arguments,
        plate=plate,
        size=size,
        moving=moving_parameters(potential, values, names, rows, mutable, args, kwargs),
        sample_chunk=guide.sample_chunk,
    )
    own = {k: tuple(jnp.asarray(x, weights[k].dtype) for x in priors[k]) for k in names}
    offset = {k: loc - weights[k] for k, (loc, _) in own.items()}
    system = make_system(model, {k: scale for k, (_, scale) in own.items()}, offset, batch_size)
    probe = noise_gradients(system, 4)
    checks.check_finite_curvature(probe)
    warn_if_far(system, probe)
    if guide.noise_site is not None:
        checks.check_noise_site(noise, guide.noise_site, system)

    def outputs(weights, mutable):
        few = {plate: jnp.arange(min(size, _FEW))} if plate and batch_size < size else rows
        found = potential.run(others | weights, few, random.key(0), mutable, args, kwargs)
        return jnp.concatenate([model.predictor(k, found[k]).ravel() for k, _ in model.moving])

    free = scale_free_layers(potential, names, outputs, weights, mutable)
    prior, clipped = _first_prior(guide, system, own, free)
    still = [k for k in (*potential.network, *noise) if k not in names and k != guide.noise_site]
    return system._replace(scale=prior.scale), prior, (*still, *potential.frozen), clipped


def _linearized(chosen: Any, potential: Potential, sites: tuple[str, ...]) -> tuple[str, ...]:
    if chosen == "all":
        names = sites
    elif callable(chosen):
        names = tuple(k for k in sites if chosen(k))
    else:
        output = output_sites(potential)
        names = tuple(k for k in sites if k in output)
    if not names:
        raise ValueError(f"params={chosen!r} selects no weight; there are: {', '.join(sites)}.")
    return names


def _first_prior(guide: Any, system: System, own: dict, free: dict[str, tuple[str, ...]]) -> tuple[Prior, int]:
    """The prior that EM starts from: as precise as the model's own, on average over a group; for layers without a scale
    as precise as their trained weights are large.

    :param own: Location and scale of the model's own prior, by site.
    :param free: Layers without a scale.
    """
    names = tuple(system.model.weights)
    unit = {k: jnp.ones_like(w) for k, w in system.model.weights.items()}
    if guide.prior == "model":
        if free:
            warn_of_scale(free, 'prior="isotropic", "per_site" or "g"')
        precise = {k: jnp.broadcast_to(scale**-2.0, unit[k].shape) for k, (_, scale) in own.items()}
        return Prior(precise, {"model": names}, {"model": jnp.ones(())}), 0
    if guide.prior == "g":
        unit, clipped = clip(diagonal(system, guide.em_samples))
        return Prior(unit, {"g": names}, {"g": jnp.ones(())}), clipped
    groups: dict[str, tuple[str, ...]] = {k: (k,) for k in names}
    if guide.prior == "isotropic":
        alone = {k for layer in free.values() for k in layer}
        rest = tuple(k for k in names if k not in alone)
        groups = ({"weights": rest} if rest else {}) | free
    elif guide.prior == "per_group":
        groups = _assign(guide.groups, names)
        shared = {k: layer for k, layer in free.items() if not any(set(g) <= set(layer) for g in groups.values())}
        if shared:
            warn_of_scale(shared, "groups of their own")
    alpha = {}
    for group, sites in groups.items():
        layer = next((layer for layer in free.values() if set(sites) <= set(layer)), None)
        if layer is None:
            alpha[group] = jnp.mean(
                jnp.concatenate([jnp.broadcast_to(own[k][1], unit[k].shape).ravel() for k in sites]) ** -2.0
            )
        else:  # or the steps of EM would depend on a scale that means nothing
            alpha[group] = 1 / jnp.mean(jnp.concatenate([system.model.weights[k].ravel() for k in layer]) ** 2)
    return Prior(unit, groups, alpha), 0


def _assign(groups: Mapping[str, Callable[[str], bool]], names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    found = {group: tuple(k for k in names if of_group(k)) for group, of_group in groups.items()}
    for name in names:
        owners = [group for group, members in found.items() if name in members]
        if len(owners) != 1:
            raise ValueError(
                f"groups must put every weight into one group, but '{name}' is in {' and '.join(owners) or 'none'}."
            )
    empty = [group for group, members in found.items() if not members]
    if empty:
        raise ValueError(f"groups without a weight: {', '.join(empty)}; the weights are: {', '.join(names)}.")
    return found
