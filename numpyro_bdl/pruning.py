# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Pruning: when and which groups of weights go for good, and what to do with the network that is left."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import PyTree

from numpyro_bdl._checks import check_integer, check_number
from numpyro_bdl._runs import potential_of, warn_of_bad_chains
from numpyro_bdl.weight_groups import WeightGroups

_PRUNINGS = 100  # how often groups are pruned between start and end
_MEMORY = 0.05  # of the running means, as a part of the warm-up

# ---- when -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    start: float
    end: float
    min_keep: int

    def steps(self, warmup_steps: Array | int) -> tuple[Array, Array]:
        """The step at which pruning starts, and the step after its last."""
        first, last = (jnp.round(part * warmup_steps).astype(jnp.int32) for part in (self.start, self.end))
        return first, jnp.maximum(last, first + 1)


@dataclass(frozen=True)
class Cubic(_Window):
    """The schedule made by :func:`cubic`."""

    def sparsity(self, i: Array, warmup_steps: Array | int, target: float) -> Array:
        """The share of weights to be gone after step ``i``."""
        first, last = self.steps(warmup_steps)
        u = jnp.clip((i + 1 - first) / (last - first), 0, 1)
        return target * (1 - (1 - u) ** 3)


@dataclass(frozen=True)
class Threshold(_Window):
    """The rule made by :func:`threshold`."""

    mean_square: float


def _check_window(owner: str, start: float, end: float, min_keep: int) -> None:
    check_number(owner, "start", start, high=1, closed=True)
    check_number(owner, "end", end, low=start, high=1)
    check_integer(owner, "min_keep", min_keep)


def cubic(start: float = 0.1, end: float = 0.7, min_keep: int = 1) -> Cubic:
    r"""Prune to a target sparsity S, fast at first and slowly towards the end.

    .. math::

        S_t = S \bigl(1 - (1 - u)^3\bigr), \qquad u = \frac{t - t_0}{t_1 - t_0}

    The groups that go are those whose inclusion probability, averaged over the last steps, is least; among equal
    ones (to half a percent), those with the least mean square, in units of the slab variance.

    :param start: :math:`t_0`, as a part of the warm-up.
    :param end: :math:`t_1`, as a part of the warm-up; after it the chain adjusts to its mask.
    :param min_keep: Groups that every site keeps.
    :raises ValueError: if an argument is out of range.

    **References:** Zhu and Gupta, *To prune, or not to prune*, 2017, equation (1).
    """
    _check_window("pruning.cubic", start, end, min_keep)
    return Cubic(start, end, min_keep)


def threshold(mean_square: float, start: float = 0.1, end: float = 0.7, min_keep: int = 1) -> Threshold:
    """Prune every group whose mean square, averaged over the last steps, is below a threshold.

    The criterion of Ke and Fan. The threshold has to lie above what noise makes of a weight of the spike, about the
    spike variance, or nothing is pruned. For a layer without a scale of its own (BatchNorm follows) the threshold is
    relative to the mean square of the layer, in units of its slab variance.

    :param mean_square: The threshold, in squared units of the weights.
    :param start: When pruning starts, as a part of the warm-up.
    :param end: When it ends.
    :param min_keep: Groups that every site keeps.
    :raises ValueError: if an argument is out of range.
    """
    check_number("pruning.threshold", "mean_square", mean_square)
    _check_window("pruning.threshold", start, end, min_keep)
    return Threshold(start, end, min_keep, mean_square)


def check_schedule(
    owner: str, target: float | None, schedule: Cubic | Threshold | None, narrow: float
) -> Cubic | Threshold | None:
    """The schedule of a kernel from its arguments.

    :param narrow: The part of the warm-up after which the spike has its variance.
    :raises ValueError: for :func:`cubic` without a target, or :func:`threshold` with one, or a start before ``narrow``.
    :raises TypeError: for anything else.
    """
    if schedule is None:
        return None if target is None else cubic(start=max(0.1, narrow))
    if not isinstance(schedule, (Cubic, Threshold)):
        raise TypeError(
            f"{owner}: prune_schedule must be pruning.cubic(...) or pruning.threshold(...), got"
            f" {type(schedule).__name__}."
        )
    if schedule.start < narrow:
        raise ValueError(
            f"{owner}: pruning starts at {schedule.start:g} of the warm-up, but with spike_widening the spike is wide"
            f" until {narrow:g}, and what is useful can't be told before. Give the schedule a start of"
            f" {narrow:g} or more."
        )
    if isinstance(schedule, Cubic) and target is None:
        raise ValueError(f"{owner}: pruning.cubic() needs a target_sparsity.")
    if isinstance(schedule, Threshold) and target is not None:
        raise ValueError(
            f"{owner}: target_sparsity={target:g} is given beside pruning.threshold(...), which has no target; leave"
            " one out."
        )
    return schedule


# ---- which ----------------------------------------------------------------------------------------------------------


def largest_sparsity(groups: Mapping[str, WeightGroups], min_keep: int) -> float:
    """The share of weights that can always go: each site may have to keep its ``min_keep`` largest groups."""
    total = sum(int(g.size.sum()) for g in groups.values())
    kept = sum(int(np.sort(g.size, axis=None)[-min_keep:].sum()) for g in groups.values())
    return 1 - kept / total


def _rank(kept: Array, inclusion: Array, mean_square: Array) -> Array:
    """An integer that grows from the groups that are gone, 0, to the last to go.

    The upper 16 bits order by inclusion, to half a percent, the lower by mean square: one key sorts faster than two.
    """
    # the bits of a positive float32 grow with it, and its first is 0
    high, low = (lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) >> 15 for x in (inclusion, mean_square))
    return jnp.where(kept, jnp.maximum(high << 16 | low, 1), 0)


def _last(rank: Array, count: int) -> Array:
    """The groups of a site that would go last, as a mask."""
    best = lax.top_k(rank, min(count, rank.size))[1]
    return jnp.zeros(rank.shape, bool).at[best].set(True)


def keep_by_sparsity(
    groups: Mapping[str, WeightGroups],
    kept: dict[str, Array],
    inclusion: dict[str, Array],
    mean_square: dict[str, Array],
    sparsity: Array,
    min_keep: int,
) -> dict[str, Array]:
    """Which groups stay so that the share ``sparsity`` of all weights is gone, as near as whole groups allow, by site.

    :param groups: The groups of each site.
    :param kept: Which groups are there now; those gone stay gone.
    :param inclusion: Running mean of the inclusion probability of each group.
    :param mean_square: Running mean of the mean square of each group, in units of the slab variance.
    :param sparsity: Share of weights to be gone, in [0, 1).
    :param min_keep: Groups that every site keeps.
    """
    ranks = [_rank(*(x[name].ravel() for x in (kept, inclusion, mean_square))) for name in groups]
    protected = jnp.concatenate([_last(rank, min_keep) for rank in ranks])
    order = jnp.argsort(jnp.where(protected, jnp.uint32(2**32 - 1), jnp.concatenate(ranks)))
    size = jnp.concatenate([jnp.asarray(g.size.ravel()) for g in groups.values()])
    # a group goes if at least half of it does
    goes = jnp.cumsum(size[order]) - size[order] / 2 <= sparsity * int(sum(g.size.sum() for g in groups.values()))
    stays = jnp.zeros(size.shape, bool).at[order].set(~goes) | protected
    bounds = np.cumsum([0] + [g.size.size for g in groups.values()])
    return {
        name: stays[a:b].reshape(g.shape) & kept[name]
        for (name, g), a, b in zip(groups.items(), bounds[:-1], bounds[1:], strict=True)
    }


def keep_by_threshold(
    groups: Mapping[str, WeightGroups],
    kept: dict[str, Array],
    inclusion: dict[str, Array],
    mean_square: dict[str, Array],
    threshold: dict[str, float],
    min_keep: int,
) -> dict[str, Array]:
    """Which groups stay if those with a mean square below their site's threshold go. Parameters as above."""
    result = {}
    for name, g in groups.items():
        flat = [x[name].ravel() for x in (kept, inclusion, mean_square)]
        stays = (flat[2] >= threshold[name]) | _last(_rank(*flat), min_keep)
        result[name] = stays.reshape(g.shape) & kept[name]
    return result


class Pruner(NamedTuple):
    """A schedule at work on the groups of a model."""

    schedule: Cubic | Threshold
    target: float
    """sparsity to reach, of :func:`cubic`"""
    groups: dict[str, WeightGroups]
    slabs: dict[str, float]
    """slab variance by site"""
    without_scale: frozenset[str]
    """sites whose mean square is measured against that of the layer"""

    def comparable(self, name: str, square: Array) -> Array:
        """Squared norms by group, as if a layer without a scale had the slab variance."""
        if name not in self.without_scale:
            return square
        weights = jnp.sum(jnp.where(square > 0, self.groups[name].size, 0))  # those that are left
        mean = jnp.sum(square) / jnp.maximum(weights, 1)
        return square * self.slabs[name] / jnp.maximum(mean, jnp.finfo(square.dtype).tiny)

    def mean_square(self, name: str, square: Array) -> Array:
        """From squared norms by group to mean squares in units of the slab variance."""
        return square / jnp.asarray(self.groups[name].size, square.dtype) / self.slabs[name]

    def observe(self, means: PyTree, values: PyTree, i: Array, warmup_steps: Array | int) -> PyTree:
        """Running means with a memory of a twentieth of the warm-up."""
        weight = jnp.maximum(1 / (i + 1), 1 / jnp.maximum(_MEMORY * warmup_steps, 1))
        return jax.tree.map(lambda mean, new: mean + weight.astype(mean.dtype) * (new - mean), means, values)

    def when(self, i: Array, warmup_steps: Array | int) -> tuple[Array, Array]:
        """Whether the means still run at step ``i``, and whether groups are pruned."""
        first, last = self.schedule.steps(warmup_steps)
        every = jnp.maximum((last - first) // _PRUNINGS, 1)
        return i < last, (i >= first) & (i < last) & (((i - first) % every == 0) | (i == last - 1))

    def prune(
        self, mask: dict, inclusion: dict, mean_square: dict, i: Array, warmup_steps: Array | int
    ) -> tuple[dict, Array]:
        """The next mask, and the share of the weights in groups that it has pruned."""
        kept = {name: g.total(mask[name]) > 0 for name, g in self.groups.items()}
        now = self.groups, kept, inclusion, mean_square
        if isinstance(self.schedule, Cubic):
            sparsity = self.schedule.sparsity(i, warmup_steps, self.target)
            kept = keep_by_sparsity(*now, sparsity, self.schedule.min_keep)
        else:
            bounds = {name: self.schedule.mean_square / slab for name, slab in self.slabs.items()}
            kept = keep_by_threshold(*now, bounds, self.schedule.min_keep)
        pruned = {n: jnp.broadcast_to(g.spread(kept[n]), g.site_shape) for n, g in self.groups.items()}
        # the mask of a bad chain is NaN
        gone = [jnp.where(jnp.isnan(mask[name]), jnp.nan, ~m).ravel() for name, m in pruned.items()]
        return mask | pruned, jnp.mean(jnp.concatenate(gone))


# ---- what is left ---------------------------------------------------------------------------------------------------


def masks(mcmc: Any) -> dict[str, np.ndarray]:
    """The masks of a pruned run: True where a weight was kept.

    :param mcmc: A run of :class:`~numpyro_bdl.SpikeSlabSGHMC` that pruned.
    :return: (chain, ...) by site, for the sites with groups. All kept draws of a chain share its mask. A chain that met
        a gradient that was not finite has none: its entries are False.
    :raises ValueError: if the run did not prune, or has no draws.
    """
    potential_of(mcmc)  # whose groups the kernel then has
    warn_of_bad_chains(mcmc)
    if hasattr(mcmc.last_state, "unfolded"):
        raise ValueError(
            "The run is symmetry-restricted, so that each draw has a mask of its own: its weights that are not 0, or"
            ' the field "mask" of run(..., extra_fields=("mask",)).'
        )
    return final_masks(mcmc)


def final_masks(mcmc: Any) -> dict[str, np.ndarray]:
    """The masks of the last state."""
    mask = getattr(mcmc.last_state, "mask", None)
    if not mask:
        raise ValueError(
            "The run has no mask: it needs SpikeSlabSGHMC with a target_sparsity, or with"
            " prune_schedule=pruning.threshold(...)."
        )
    batched = np.ndim(mcmc.last_state.i) == 1
    sites = mcmc.sampler.groups
    return {name: np.asarray(mask[name] == 1)[() if batched else None] for name in sites}


def prune(params: Any, mask: Any) -> Any:
    """Parameters with exact zeros where the mask is False; what the mask does not name stays.

    :param params: A dict of sites, or of Flax parameters (nested).
    :param mask: The same, or a part of it, of boolean arrays that broadcast to the parameters.
    :raises ValueError: if the mask names a parameter that is not there.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import pruning
        >>> pruning.prune({"w": np.array([1.0, 2.0]), "b": np.array(3.0)}, {"w": np.array([True, False])})
        {'w': Array([1., 0.], dtype=float32), 'b': array(3.)}
    """
    if not isinstance(mask, Mapping):
        if isinstance(params, Mapping) or np.broadcast_shapes(np.shape(mask), np.shape(params)) != np.shape(params):
            raise ValueError(
                f"prune: a mask of shape {np.shape(mask)} does not fit"
                + (f" the parameters {list(params)}." if isinstance(params, Mapping) else f" {np.shape(params)}.")
                + " The masks of a run have a chain axis in front: take those of one chain."
            )
        return jnp.where(mask, params, 0)
    if not isinstance(params, Mapping):
        raise ValueError(f"prune: the mask names {', '.join(mask)}, where the parameters have an array.")
    unknown = [name for name in mask if name not in params]
    if unknown:
        raise ValueError(f"prune: the mask names {unknown[0]!r}, which is not among the parameters {list(params)}.")
    return {name: prune(value, mask[name]) if name in mask else value for name, value in params.items()}


def flax_parameters(mcmc: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the networks of a model, as Flax has them, from values by site.

    :param mcmc: A run on the model.
    :param values: Arrays by site: a draw, a mean, or masks; sites that are no parameters of a network are passed over.
    :return: Nested dicts by network, module and parameter: ``{"net": {"Dense_0": {"kernel": ...}}}``.
    """
    tree: dict[str, Any] = {}
    for name, (network, path) in potential_of(mcmc).network.items():
        if name not in values:
            continue
        branch = tree.setdefault(network.removesuffix("$params"), {})
        for entry in path[:-1]:
            branch = branch.setdefault(entry, {})
        branch[path[-1]] = values[name]
    return tree


def compress(
    params: Mapping[str, Any],
    mask: Mapping[str, Any],
    layers: tuple[str, ...],
    activation: Any = jax.nn.relu,
) -> dict[str, Any]:
    r"""Smaller Flax parameters for the same function: units that nothing reads, or that are constant, are removed.

    ``layers`` are Dense and Conv layers, each of which reads the activation of the one before. A unit of a hidden
    layer goes if all weights that leave it are pruned, or if all that enter it are: then its value is the constant
    :math:`c = \phi(b)`, and :math:`c \, w` is added to the bias of the next layer. Between two layers there may be
    pooling without padding and flattening, but no normalization. A constant other than 0 that enters a Conv layer keeps
    its unit, since padding makes it differ at the border. The network for these parameters is yours to make, with the
    widths that the shapes show.

    :param params: Parameters of a network, ``{"Dense_0": {"kernel": ..., "bias": ...}, ...}``.
    :param mask: Masks of the same form, or of a part of it.
    :param layers: Names of the layers in the order of the forward pass, the output layer last.
    :param activation: :math:`\phi`, of the units of every hidden layer.
    :return: The smaller parameters.
    :raises ValueError: for a layer that is not there, has no kernel, or has other parameters than kernel and bias; and
        for layers that do not fit one another.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_bdl import pruning
        >>> dense = lambda i, o: {"kernel": jnp.ones((i, o)), "bias": jnp.ones(o)}
        >>> mask = {"Dense_0": {"kernel": jnp.array([[True, False, True]] * 2)}}
        >>> small = pruning.compress({"Dense_0": dense(2, 3), "Dense_1": dense(3, 1)}, mask, ("Dense_0", "Dense_1"))
        >>> small["Dense_0"]["kernel"].shape, small["Dense_1"]["bias"]
        ((2, 2), Array([2.], dtype=float32))
    """
    result = prune(params, mask)
    _check_layers(result, layers)
    for name, following in zip(layers[:-1], layers[1:], strict=True):
        result |= _shrink(name, result[name], following, result[following], activation)
    return result


def _check_layers(params: Mapping[str, Any], layers: tuple[str, ...]) -> None:
    for name in layers:
        if name not in params:
            raise ValueError(f"compress: layer {name!r} is not among the parameters {list(params)}.")
    for name, layer in params.items():
        extra = set(layer) - {"kernel", "bias"}
        if extra or "kernel" not in layer:
            raise ValueError(
                f"compress: '{name}' holds {', '.join(layer)}; only layers with a kernel, and a bias or none, can be"
                " made smaller. With normalization between layers, use prune, which keeps the shapes."
            )
        if name not in layers:
            raise ValueError(f"compress: layers must name every layer in order; '{name}' is missing.")


def _shrink(name: str, layer: dict, following: str, reader: dict, activation) -> dict[str, dict]:
    """The layer without its superfluous units, and the layer that reads it."""
    kernel, read = np.asarray(layer["kernel"]), np.asarray(reader["kernel"])
    units, inputs = kernel.shape[-1], read.shape[-2]
    if inputs % units or (inputs != units and read.ndim != 2):
        raise ValueError(
            f"compress: '{following}' has {inputs} inputs, which do not fit the {units} units of '{name}'; is the order"
            " of the layers that of the forward pass?"
        )
    bias = np.asarray(layer["bias"]) if "bias" in layer else np.zeros(units, kernel.dtype)
    # after Flatten a unit is read at each place, with the unit as the fastest index
    by_unit = read.reshape(*read.shape[:-2], inputs // units, units, read.shape[-1])
    unread = ~by_unit.any(axis=tuple(a for a in range(by_unit.ndim) if a != by_unit.ndim - 2))
    constant = ~kernel.any(axis=tuple(range(kernel.ndim - 1)))
    value = np.where(constant, np.asarray(activation(jnp.asarray(bias))), 0)
    if read.ndim > 2 or "bias" not in reader:
        constant &= value == 0
    gone = unread | constant
    if gone.all():
        gone[0] = False  # a layer of no units is none
    small = {"kernel": jnp.asarray(kernel[..., ~gone])}
    if "bias" in layer:
        small["bias"] = jnp.asarray(bias[~gone])
    rest = by_unit[..., ~gone, :]
    smaller = reader | {"kernel": jnp.asarray(rest.reshape(*read.shape[:-2], -1, read.shape[-1]))}
    if "bias" in reader and read.ndim == 2:
        moved = np.einsum("puo,u->o", by_unit, np.where(gone, value, 0))
        smaller["bias"] = jnp.asarray(reader["bias"]) + jnp.asarray(moved, read.dtype)
    return {name: small, following: smaller}
