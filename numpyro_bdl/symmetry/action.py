# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""The action of a symmetry on parameters, and the canonical form of an orbit.

In a domain, signs are chosen so that a unit's key is positive, and units are sorted by their keys. Groups are taken in
an order in which the keys of each depend only on groups before it. All of it is copying and negating, so that equal
networks become bitwise equal ones.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from numpyro_bdl._checks import check_choice
from numpyro_bdl.symmetry.groups import Member, Path, UnitGroup, UnitGroups, put_members, take_members
from numpyro_bdl.symmetry.signs import echelon

DOMAINS = ("bias", "incoming", "outgoing")
COLUMNS = 4
"""How many weights of a kernel are looked at to break a tie."""
COUNTED = 100
"""Up to how many units are put in order by counting those before each."""


@partial(jax.tree_util.register_dataclass, data_fields=["permutations", "signs"], meta_fields=["groups"])
@dataclass(frozen=True)
class Element:
    """An element of the symmetry group of a network, or a batch of them."""

    permutations: dict[str, Any]
    """by group: (..., M); unit i of the result is unit permutations[i] of the argument"""
    signs: dict[str, Any]
    """by group: (..., k, M) of 1 and -1, one row for each kind of sign symmetry"""
    groups: UnitGroups


def apply(element: Element, params: Any, *, signs: bool = True) -> Any:
    """Act on parameters: another network, the same function.

    :param element: From :func:`random_element` or :func:`canonical_element`.
    :param params: A tree of parameters with the batch axes of the element, or one without, to make a batch of copies.
        Leaves that belong to no group are returned as they are, and parameters may be missing.
    :param signs: Apply the signs as well; False is for what scales with the size of a parameter (a variance, a mask).
    :return: The tree.
    :raises ValueError: for parameters of other shapes.

    **Example**

    .. doctest::

        >>> import jax, jax.numpy as jnp
        >>> from jax import random
        >>> from flax import linen as nn
        >>> from numpyro_bdl import symmetry
        >>> network = nn.Sequential([nn.Dense(3), jnp.tanh, nn.Dense(1)])
        >>> x = jnp.linspace(-1, 1, 5)[:, None]
        >>> params = network.init(random.key(0), x)
        >>> groups = symmetry.find_groups(network, params, x)
        >>> copy = symmetry.apply(symmetry.random_element(random.key(1), groups), params)
        >>> bool(jnp.allclose(network.apply(copy, x), network.apply(params, x), atol=1e-5))
        True
    """
    members, batch = take_members(params, element.groups)
    lead = next((jnp.shape(order)[:-1] for order in element.permutations.values()), ())
    if not batch and lead:
        params = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *jnp.shape(x))), params)
        members, batch = take_members(params, element.groups)
    if batch and lead and batch != lead:
        raise ValueError(f"The element has batch axes {lead}, the parameters have {batch}.")
    moved = _moved(members, element.permutations, element.signs, element.groups, signs, batch, lead)
    return put_members(params, moved)


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _moved(members, permutations, signs, groups: UnitGroups, signed: bool, batch: tuple, lead: tuple):
    """The members of a batch (or of one, if it is empty) moved by an element for each (or by one, if lead is empty)."""
    act = partial(_act_all, groups=groups, signed=signed)
    if not batch:
        return act(members, permutations, signs)
    own = (_flat(permutations, lead), _flat(signs, lead)) if lead else (permutations, signs)
    out = jax.vmap(act, (0, 0, 0) if lead else (0, None, None))(_flat(members, batch), *own)
    return jax.tree.map(lambda x: jnp.reshape(x, (*batch, *x.shape[1:])), out)


def _flat(tree: Any, batch: tuple[int, ...]) -> Any:
    """A tree with one batch axis in place of several."""
    return jax.tree.map(lambda x: jnp.reshape(x, (math.prod(batch), *jnp.shape(x)[len(batch) :])), tree)


def _act_all(members: dict[Path, Array], permutations, signs, groups: UnitGroups, signed: bool) -> dict[Path, Array]:
    members = dict(members)
    for group in groups:
        for n, member in enumerate(group.members):
            if member.path in members:
                flip = _signs_of(group, n, signs[group.name]) if signed else None
                members[member.path] = _act(members[member.path], member, permutations[group.name], flip)
    return members


def _signs_of(group: UnitGroup, n: int, signs: Array) -> Array | None:
    """The signs (M,) of the n-th member; None if it is not flipped."""
    kinds = [k for k, kind in enumerate(group.flips) if kind[n]]
    return jnp.prod(signs[jnp.array(kinds)], 0) if kinds else None


def _act(x: Array, member: Member, order: Array, signs: Array | None) -> Array:
    units = x.reshape(*x.shape[: member.axis], *member.factors, *x.shape[member.axis + 1 :])
    place = member.axis + member.position
    if signs is not None:
        column = signs.reshape(-1, *[1] * (units.ndim - place - 1))
        # a zero is not flipped, as -0.0 has other bits
        units = jnp.where((column < 0) & (units != 0), -units, units)
    # the barrier: XLA would fuse one gather into the next, and compute the elements of the first many times over
    return lax.optimization_barrier(jnp.take(units, order, axis=place).reshape(x.shape))


def random_element(key: Array, groups: UnitGroups, shape: tuple[int, ...] = ()) -> Element:
    """A uniform draw from the symmetry group.

    :param key: PRNG key.
    :param groups: Groups of units.
    :param shape: Batch axes.
    :return: An element, or a batch of independent ones.
    """
    return Element(*_drawn(key, groups, shape), groups)


@partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: Array, groups: UnitGroups, shape: tuple[int, ...]) -> tuple[dict, dict]:
    permutations, signs = {}, {}
    for n, group in enumerate(groups):
        key_order, key_signs = random.split(random.fold_in(key, n))
        units = jnp.broadcast_to(jnp.arange(group.size), (*shape, group.size))
        permutations[group.name] = random.permutation(key_order, units, axis=-1, independent=True)
        signs[group.name] = random.rademacher(key_signs, (*shape, len(group.flips), group.size), jnp.int8)
    return permutations, signs


def identity(groups: UnitGroups) -> Element:
    """The element that changes nothing."""
    orders = {g.name: np.arange(g.size) for g in groups}
    return Element(orders, {g.name: np.ones((len(g.flips), g.size), np.int8) for g in groups}, groups)


def telling_elements(groups: UnitGroups, name: str | None = None) -> list[Element]:
    """A few elements, of all groups or of one, that show whether something is invariant: the first moves and flips all
    units, the second flips every other one."""
    rng, elements = np.random.default_rng(0), [identity(groups) for _ in range(3)]
    for g in groups:
        if name in (None, g.name):
            units, kinds = np.arange(g.size), (len(g.flips), g.size)
            orders = np.roll(units, 1), rng.permutation(units), rng.permutation(units)
            signs = -np.ones(kinds), np.broadcast_to((-1.0) ** units, kinds), rng.choice([-1, 1], kinds)
            for element, order, sign in zip(elements, orders, signs, strict=True):
                element.permutations[g.name], element.signs[g.name] = order, sign.astype(np.int8)
    return elements


# ---- domains --------------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """By what the units of a group are put in order."""

    group: UnitGroup
    members: tuple[int, ...]
    """numbers of the members that are looked at, the first ones first"""
    largest: bool = False
    """look at the largest absolute value of a unit, which no other group changes, nor a sign"""

    @property
    def flips(self) -> np.ndarray:
        """Which kinds of signs flip which of the members looked at, (k, members)."""
        return np.array(self.group.flips, bool).reshape(-1, len(self.group.members))[:, list(self.members)]


@lru_cache
def order_of(groups: UnitGroups, domain: str) -> tuple[tuple[Keys, ...], tuple[str, ...]]:
    """The groups in the order in which they are made canonical, and what is left as it is, with reasons."""
    shapes, left_out = dict(groups.shapes), []
    on_path: dict[Path, set[str]] = {}
    for group in groups:
        for member in group.members:
            on_path.setdefault(member.path, set()).add(group.name)

    def alone(group: UnitGroup, n: int) -> bool:
        return len(shapes[group.members[n].path]) == 1 and len(group.members[n].factors) == 1

    def ready(group: UnitGroup, n: int) -> bool:
        path = group.members[n].path
        once = sum(member.path == path for member in group.members) == 1
        return once and len(shapes[path]) > 1 and on_path[path] - {group.name} <= done

    def biases(group: UnitGroup) -> list[int]:
        own = [n for n in range(group.writers) if alone(group, n)]
        return sorted(own, key=lambda n: not group.members[n].path[-1].endswith("bias"))

    def kernels(group: UnitGroup) -> list[int]:
        candidates = range(group.writers) if domain != "outgoing" else range(group.writers, len(group.members))
        return [n for n in candidates if ready(group, n)][:1]

    done: set[str] = set()
    plan: list[Keys] = []
    rest = list(groups) if domain != "outgoing" else list(reversed(list(groups)))
    while rest:
        group = next((g for g in rest if kernels(g)), None) or next((g for g in rest if biases(g)), None)
        if group is None:  # units of several groups lie along the same axes
            plan += [Keys(g, (0,), largest=True) for g in rest]
            left_out += [f"{g.name}: signs of units that lie along those of another group" for g in rest if g.flips]
            break
        rest.remove(group)
        looked_at = (*biases(group), *kernels(group)) if domain == "bias" else (*kernels(group), *biases(group))
        keys = Keys(group, looked_at)
        seen = echelon([sum(1 << n for n, flipped in enumerate(kind) if flipped) for kind in keys.flips])
        left_out += [f"{group.name}: signs that the domain '{domain}' does not see"] * (len(seen) < len(group.flips))
        plan.append(keys)
        done.add(group.name)
    return tuple(plan), tuple(left_out)


def canonical_element(params: Any, groups: UnitGroups, domain: str = "bias") -> Element:
    """The element that takes parameters to their canonical form; see :func:`canonicalize`.

    It is the identity for a draw that is not finite.
    """
    check_choice("canonicalize", "domain", domain, DOMAINS)
    members, batch = take_members(params, groups)
    if missing := [path for path, _ in groups.shapes if path not in members]:
        raise ValueError(f"canonicalize needs every parameter of the groups; {'/'.join(missing[0])!r} is missing.")
    plan, left_out = order_of(groups, domain)
    if left_out:
        warnings.warn("These symmetries are not removed: " + "; ".join(left_out) + ".", stacklevel=3)
    return Element(*_found(members, groups, plan, batch), groups)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _found(members, groups: UnitGroups, plan: tuple[Keys, ...], batch: tuple) -> tuple[dict, dict]:
    find = partial(_canonical, groups=groups, plan=plan)
    if not batch:
        return find(members)
    return jax.tree.map(lambda x: jnp.reshape(x, (*batch, *x.shape[1:])), jax.vmap(find)(_flat(members, batch)))


def canonicalize(params: Any, groups: UnitGroups, domain: str = "bias") -> Any:
    """The representative of a network among its equivalent copies.

    - ``"bias"``: biases are positive and increasing; groups without a bias, and ties (biases that are all zero), go by
      incoming weights.
    - ``"incoming"``: by the first incoming weight, from the input on; a residual stream by that of its first writer.
    - ``"outgoing"``: by the first outgoing weight, from the output back.

    Where a unit has no sign symmetry, units are only sorted. Keys that are distinct and not zero lead every copy to
    bitwise the same network; ties beyond the first few weights keep their order. Doing it twice changes nothing.

    :param params: A tree of parameters, or a dict of sites, with any leading batch axes; under ``jit`` and ``vmap``
        too.
    :param groups: From :func:`find_groups`.
    :param domain: As above. It never mixes incoming with outgoing weights, which would not be idempotent.
    :return: The tree. A draw that is not finite is returned as it is.
    :raises ValueError: for missing parameters or other shapes.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_bdl.symmetry import UnitGroups, Units, canonicalize
        >>> params = {"w1": jnp.array([[1.0, 2.0]]), "b": jnp.array([-3.0, 1.0]), "w2": jnp.array([[5.0], [6.0]])}
        >>> groups = UnitGroups.of(params, {
        ...     "hidden": Units(writes={"b": 0, "w1": 1}, reads={"w2": 0}, flips=("b", "w1", "w2"))})
        >>> canonicalize(params, groups)["b"].tolist(), canonicalize(params, groups)["w2"].ravel().tolist()
        ([1.0, 3.0], [6.0, -5.0])
    """
    # the barrier, as in _act: else parts of the element are computed again for each parameter
    return apply(lax.optimization_barrier(canonical_element(params, groups, domain)), params)


def _canonical(members: Mapping[Path, Array], groups: UnitGroups, plan: tuple[Keys, ...]) -> tuple[dict, dict]:
    orders = {g.name: jnp.arange(g.size) for g in groups}
    signs = {g.name: jnp.ones((len(g.flips), g.size), jnp.int8) for g in groups}
    finite = jnp.stack([jnp.isfinite(x).all() for x in members.values()]).all() if members else jnp.bool_(True)
    for keys in plan:
        group = keys.group
        if keys.largest:
            columns = [jnp.max(jnp.abs(_units_first(members, group, n)), 1, keepdims=True) for n in keys.members]
        else:
            columns = [_columns(members, group, n, groups, orders, signs) for n in keys.members]
        if group.flips and not keys.largest:
            signs[group.name] = _positive(jnp.stack([_first_nonzero(x) for x in columns], 1), keys.flips)
            of_members = [_signs_of(group, n, signs[group.name]) for n in keys.members]
            columns = [
                x if sign is None else jnp.where((sign < 0)[:, None], -x, x)
                for x, sign in zip(columns, of_members, strict=True)
            ]
        orders[group.name] = _increasing(jnp.concatenate(columns, -1))
    orders = {name: jnp.where(finite, order, jnp.arange(len(order))) for name, order in orders.items()}
    return orders, {name: jnp.where(finite, sign, 1).astype(jnp.int8) for name, sign in signs.items()}


def _positive(first: Array, flips: np.ndarray) -> Array:
    """The signs (k, M) that make as many entries of each unit positive as can be, earlier ones before later ones.

    By elimination over GF(2) among the entries of a unit that are not 0: of the kinds that are free and flip an entry,
    one is used for it, and put into the others, so that no later choice flips it back. Which ones are used does not
    depend on the signs that are met, so that doing it twice changes nothing.

    :param first: Entries (M, members).
    :param flips: Which kinds flip them, (k, members).
    """
    (units, members), kinds = first.shape, len(flips)
    # in bits, of each kind the entries it flips and of which kinds it is made up: words (k, words, M)
    rows = np.packbits(np.concatenate([flips, np.eye(kinds, dtype=bool)], 1), 1, bitorder="little")
    rows = jnp.broadcast_to(rows[:, :, None], (*rows.shape, units))
    # of each unit the entries that are negative by now, and the kinds chosen: words (words, M)
    state = jnp.packbits(jnp.pad(first < 0, ((0, 0), (0, kinds))), 1, bitorder="little").T
    has = lambda words, n: (words[..., n // 8, :] >> n % 8 & 1) == 1
    free = jnp.ones((kinds, units), bool)
    for n in range(members):
        able = free & has(rows, n) & (first[:, n] != 0)
        pivot = able & (jnp.cumsum(able, 0) == 1)
        row = jnp.sum(jnp.where(pivot[:, None], rows, 0), 0, dtype=rows.dtype)
        state ^= jnp.where(has(state, n), row, 0)
        rows ^= jnp.where((able & ~pivot)[:, None], row, 0)
        free &= ~pivot
    chosen = [has(state, members + k) for k in range(kinds)]
    return jnp.where(jnp.stack(chosen), -1, 1).astype(jnp.int8)


def _columns(members, group: UnitGroup, n: int, groups: UnitGroups, orders: dict, signs: dict) -> Array:
    """The first few entries (M, columns) of a key, with the groups that are canonical already put in place."""
    member = group.members[n]
    x = members[member.path]
    for other in groups:
        for m, place in enumerate(other.members):
            if other.name != group.name and place.path == member.path:
                x = _act(x, place, orders[other.name], _signs_of(other, m, signs[other.name]))
    return _units_first(members | {member.path: x}, group, n)[:, :COLUMNS]


def _units_first(members, group: UnitGroup, n: int) -> Array:
    """A parameter as (M, everything else)."""
    path, axis, factors, position = group.members[n]
    x = members[path]
    units = x.reshape(*x.shape[:axis], *factors, *x.shape[axis + 1 :])
    return jnp.moveaxis(units, axis + position, 0).reshape(group.size, -1)


def _increasing(keys: Array) -> Array:
    """The stable order (M,) of the rows of keys (M, k), the first column before the second.

    Up to a hundred rows are compared all with all, which is a few times faster than a sort by several keys.
    """
    if len(keys) > COUNTED:
        return jnp.lexsort(keys.T[::-1])
    unit = jnp.arange(len(keys))
    before, equal = jnp.zeros((len(keys),) * 2, bool), jnp.ones((len(keys),) * 2, bool)
    for column in keys.T:
        before |= equal & (column[:, None] < column)
        equal &= column[:, None] == column
    rank = jnp.sum(before | equal & (unit[:, None] < unit), 0)
    return jnp.sum(jnp.where(rank == unit[:, None], unit, 0), 1)


def _first_nonzero(x: Array) -> Array:
    """The first entry of each row that is not 0; 0 if there is none."""
    return reduce(lambda later, column: jnp.where(column != 0, column, later), x.T[::-1], jnp.zeros(len(x), x.dtype))
