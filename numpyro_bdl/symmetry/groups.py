# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Groups of interchangeable units of a network, and the action of their symmetries on its parameters.

A unit is a neuron, a channel, a feature of a residual stream, or an attention head. Its group holds every axis, of
every parameter, along which such units lie. An element of the group is a permutation :math:`\pi` of the M units and,
for each of k kinds of sign symmetry, signs :math:`s \in \{-1, 1\}^M`. It acts on an axis as

.. math::

    w'_i = \Bigl(\prod_{j} s_{j, \pi(i)}\Bigr) \, w_{\pi(i)}

with the product over the kinds that flip the axis.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

Path = tuple[str, ...]


class Member(NamedTuple):
    """An axis of a parameter along which the units of a group lie."""

    path: Path
    """where the parameter is in the tree"""
    axis: int
    factors: tuple[int, ...]
    """the axis as a product, the last factor running fastest: (7, 7, 32) for channels that were flattened"""
    position: int
    """which factor is that of the units"""

    def __str__(self) -> str:
        name, others = "/".join(self.path), [n for k, n in enumerate(self.factors) if k != self.position]
        return f"{name}[{self.axis}]" + (f" (x {math.prod(others)})" if others else "")


class UnitGroup(NamedTuple):
    """Units that can be exchanged."""

    name: str
    size: int
    members: tuple[Member, ...]
    """those that write to the units first, in the order of the computation, then those that read them"""
    writers: int
    """how many of them write"""
    flips: tuple[tuple[bool, ...], ...] = ()
    """for each kind of sign symmetry, which members it flips"""
    pointwise: str = ""
    """what the pointwise functions on the units are: odd, even, positively homogeneous, or other"""

    @property
    def log_cardinality(self) -> float:
        r"""Natural logarithm of :math:`M! \, 2^{kM}`."""
        return math.lgamma(self.size + 1) + len(self.flips) * self.size * math.log(2)


@dataclass(frozen=True)
class UnitGroups:
    """The groups of a network; ``print`` it for a table.

    Made by :func:`find_groups`, or by hand by :meth:`of`.
    """

    groups: tuple[UnitGroup, ...]
    shapes: tuple[tuple[Path, tuple[int, ...]], ...]
    """of the parameters that belong to a group"""
    left_out: tuple[str, ...] = ()
    """axes that are no group, with reasons"""

    def __iter__(self) -> Iterator[UnitGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> UnitGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"There is no group '{name}'; the groups are: {', '.join(g.name for g in self.groups)}.")

    def only(self, *names: str) -> "UnitGroups":
        """These groups alone."""
        kept = tuple(self[name] for name in names)
        paths = {member.path for group in kept for member in group.members}
        return UnitGroups(kept, tuple(item for item in self.shapes if item[0] in paths), self.left_out)

    def __str__(self) -> str:
        rows = [("group", "units", "signs", "pointwise", "axes")]
        for group in self.groups:
            signs, axes = "yes" if group.flips else "no", ", ".join(map(str, group.members))
            rows.append((group.name, str(group.size), signs, group.pointwise or "-", axes))
        widths = [max(len(row[n]) for row in rows) for n in range(4)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
        lines.append(f"equivalent copies: 10^{log_cardinality(self) / math.log(10):.1f}")
        lines += [f"left out: {line}" for line in self.left_out]
        return "\n".join(lines)

    @staticmethod
    def of(params: Any, groups: Mapping[str, "Units"]) -> "UnitGroups":
        """Groups written by hand, for what can't be traced.

        :param params: A parameter tree, or a dict of sites, without batch axes.
        :param groups: By name of the group: the axes of its units.
        :raises ValueError: for a parameter that is not there, an axis out of range, axes of different lengths, an axis
            that is named twice, or a flip of a parameter that the group does not have.
        :raises TypeError: for groups that are no ``Units``, axes that are no integers, or flips that are no tuple.

        **Example**

        .. doctest::

            >>> import jax.numpy as jnp
            >>> from numpyro_bdl.symmetry import UnitGroups, Units
            >>> params = {"w1": jnp.ones((2, 5)), "b": jnp.ones(5), "w2": jnp.ones((5, 1))}
            >>> groups = UnitGroups.of(params, {
            ...     "hidden": Units(writes={"b": 0, "w1": 1}, reads={"w2": 0}, flips=("b", "w1", "w2"))})
            >>> print(groups)
            group   units  signs  pointwise  axes
            hidden  5      yes    -          b[0], w1[1], w2[0]
            equivalent copies: 10^3.6
        """
        shapes, made = {path: np.shape(leaf) for path, leaf in leaves(params).items()}, []
        owners: dict[Member, str] = {}
        for name, units in groups.items():
            _check_units(name, units)
            members = [_member(name, path, axis, shapes) for part in units[:2] for path, axis in part.items()]
            sizes = {m.factors[m.position] for m in members}
            if len(sizes) != 1:
                found = ", ".join(f"{m} of length {m.factors[m.position]}" for m in members) or "no axis"
                raise ValueError(f"Group '{name}': its axes must have one length, got {found}.")
            for member in members:
                if member in owners:
                    both = f"{name!r} twice" if owners[member] == name else f"{owners[member]!r} and {name!r}"
                    raise ValueError(f"{member} is named by {both}: an axis can have the units of one group, once.")
                owners[member] = name
            flips = {_path(path) for path in units.flips}
            if unknown := flips - {m.path for m in members}:
                raise ValueError(f"Group '{name}': flips names {_listed(unknown)}, which it does not have.")
            kinds = (tuple(m.path in flips for m in members),) if flips else ()
            made.append(UnitGroup(name, sizes.pop(), tuple(members), len(units.writes), kinds))
        used = {member.path for group in made for member in group.members}
        return UnitGroups(tuple(made), tuple((path, shape) for path, shape in shapes.items() if path in used))


class Units(NamedTuple):
    """The axes of a group, written by hand."""

    writes: Mapping[str, int]
    """parameters that produce the units (bias, kernel), each with the axis of the units, keys to sort by first"""
    reads: Mapping[str, int]
    """parameters that consume them, each with the axis"""
    flips: Sequence[str] = ()
    """parameters that change their sign with that of a unit; () if a unit has no sign symmetry"""


def _path(name: str | Path) -> Path:
    return name if isinstance(name, tuple) else (name,)


def _check_units(name: str, units: Any) -> None:
    if not isinstance(units, Units):
        raise TypeError(f"Group '{name}' must be Units(writes={{...}}, reads={{...}}), got {type(units).__name__}.")
    if isinstance(units.flips, str):
        raise TypeError(f"Group '{name}': flips must be a tuple of parameters, got the text {units.flips!r}.")


def _member(group: str, path: str | Path, axis: int, shapes: dict[Path, tuple[int, ...]]) -> Member:
    path = _path(path)
    if not isinstance(axis, (int, np.integer)):
        raise TypeError(f"Group '{group}': the axis of {'/'.join(path)!r} must be an integer, got {axis!r}.")
    if path not in shapes:
        raise ValueError(
            f"Group '{group}' names the parameter {'/'.join(path)!r}, which is not there; there are:"
            f" {', '.join(map('/'.join, shapes))}."
        )
    if not -len(shapes[path]) <= axis < len(shapes[path]):
        raise ValueError(f"Group '{group}': {'/'.join(path)!r} has shape {shapes[path]} and no axis {axis}.")
    axis %= len(shapes[path])
    return Member(path, axis, (shapes[path][axis],), 0)


def cardinality(groups: UnitGroups) -> int:
    r"""How many elements the symmetry group has, :math:`\prod_l M_l! \, 2^{k_l M_l}`, exactly.

    As many copies of a network in general position compute the same function. Where groups share the axes of a unit, as
    attention heads and their features do, a few elements act alike, and there are fewer copies.

    :param groups: From :func:`find_groups`.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from numpyro_bdl.symmetry import cardinality, find_groups
        >>> network = nn.Sequential([nn.Dense(3), jnp.tanh, nn.Dense(1)])
        >>> cardinality(find_groups(network, None, jnp.ones((1, 1))))
        48
    """
    return math.prod(math.factorial(g.size) * 2 ** (len(g.flips) * g.size) for g in groups)


def log_cardinality(groups: UnitGroups) -> float:
    """The natural logarithm of :func:`cardinality`."""
    return sum(group.log_cardinality for group in groups)


# ---- trees ----------------------------------------------------------------------------------------------------------


def leaves(tree: Any) -> dict[Path, Any]:
    """The leaves of a tree by path."""
    return {_names(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _names(path: tuple) -> Path:
    return tuple(str(next(getattr(e, a) for a in ("key", "name", "idx") if hasattr(e, a))) for e in path)


def take_members(tree: Any, groups: UnitGroups) -> tuple[dict[Path, Any], tuple[int, ...]]:
    """The parameters of a tree that belong to a group, by path, and the batch axes that all of them have.

    :raises ValueError: for a parameter of another shape, batch axes that differ, or no parameter at all.
    """
    found, batches = leaves(tree), {}
    members = {path: found[path] for path, _ in groups.shapes if path in found}
    if groups.shapes and not members:
        raise ValueError(
            f"None of the parameters of the groups is there. They have {_listed(p for p, _ in groups.shapes)}, the"
            f" tree has {_listed(found)}."
        )
    for path, shape in groups.shapes:
        if path in members:
            given = np.shape(members[path])
            lead = len(given) - len(shape)
            if lead < 0 or given[lead:] != shape:
                raise ValueError(
                    f"The parameter {'/'.join(path)!r} must have shape {shape} behind any batch axes, got {given}."
                )
            batches[path] = given[:lead]
    if len(set(batches.values())) > 1:
        shown = ", ".join(f"{'/'.join(path)!r} {batch}" for path, batch in batches.items())
        raise ValueError(f"All parameters must have the same batch axes, got {shown}.")
    return members, next(iter(batches.values()), ())


def has_members(tree: Any, groups: UnitGroups) -> bool:
    """Whether any parameter of a tree belongs to a group."""
    return not {path for path, _ in groups.shapes}.isdisjoint(leaves(tree))


def put_members(tree: Any, members: Mapping[Path, Any]) -> Any:
    """A tree with some of its leaves replaced."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: members.get(_names(path), leaf), tree)


def _listed(paths) -> str:
    names = ["/".join(path) for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
