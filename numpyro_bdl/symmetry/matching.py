# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Signed weight matching: the symmetries that bring networks closest to a reference.

With r the reference and w a draw, the element g of the symmetry group is sought that maximizes

.. math::

    \langle r, g w \rangle = \text{const} - \tfrac{1}{2} \lVert r - g w \rVert^2

over the parameters of the groups. For one group, the others being held, it is a linear assignment: with
:math:`A^f_{ij}` the inner product of unit i of the reference and unit j of the draw, over the members that are flipped
by the same set f of kinds of signs,

.. math::

    \max_\pi \sum_i \max_{s \in \{-1, 1\}^k} \sum_f \Bigl(\prod_{l \in f} s_l\Bigr) A^f_{i, \pi(i)}

since signs are chosen for each pair alone; for one kind that flips every member, the inner maximum is
:math:`|A_{ij}|`. The groups are taken in turn until none gains.

Sources: Ainsworth, Hayase and Srinivasa, *Git Re-Basin*, ICLR 2023 (arXiv 2209.04836), for the descent over layers
without signs; Stephens, *Dealing with label switching in mixture models*, JRSS B 62, 2000, for the running mean.
"""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment
from tqdm.auto import tqdm

from numpyro_bdl.symmetry.groups import Member, Path, UnitGroup, UnitGroups

GAIN = 1e-12
"""The least gain, of the product of the norms, for which units are moved."""
_CHUNK = 2**23


class Search:
    """The elements of the draws, as found so far: permutations (draw, M) and signs (draw, k, M) for each group."""

    def __init__(self, groups: UnitGroups, draws: dict[Path, np.ndarray], rows: np.ndarray, max_sweeps: int, bar: bool):
        count = len(next(iter(draws.values()), ()))
        places = [(group.name, member.path) for group in groups for member in group.members]
        twice = {path for group, path in places if places.count((group, path)) > 1}
        self.groups, self.rows, self.max_sweeps, self.bar = groups, rows, max_sweeps, bar
        self.draws = {path: x for path, x in draws.items() if path not in twice}
        self.orders = {g.name: np.tile(np.arange(g.size), (count, 1)) for g in groups}
        self.signs = {g.name: np.ones((count, len(g.flips), g.size), np.int8) for g in groups}

    def towards(self, reference: Mapping[Path, np.ndarray], restart: bool = True) -> bool:
        """Align to a reference; whether any draw moved.

        :param reference: Parameters without batch axes.
        :param restart: Begin a second time, layer by layer from the input on, and keep the better end.
        """
        reference = {path: np.asarray(reference[path], float) for path in self.draws}
        moved = False
        for some in self._chunks():
            least = GAIN * _norm(reference, 0) * _norm(some.draws, 1)
            moved |= some.descend(reference, least, self.max_sweeps)
            if restart:
                again = _Aligned({path: x[some.rows] for path, x in self.draws.items()}, some.rows, self.groups)
                again.start(reference)
                again.descend(reference, least, self.max_sweeps)
                better = _inner(reference, again.draws) > _inner(reference, some.draws) + least
                some.replace(again, better)
                moved |= bool(better.any())
            for name in self.orders:
                self.orders[name][some.rows], self.signs[name][some.rows] = some.orders[name], some.signs[name]
        return moved

    def towards_mean(self) -> None:
        """Align to the mean of the aligned draws, until none moves."""
        for _ in range(self.max_sweeps):
            mean = {path: np.zeros(x.shape[1:]) for path, x in self.draws.items()}
            for some in self._chunks():
                mean = {path: mean[path] + x.sum(0) / len(self.rows) for path, x in some.draws.items()}
            if not self.towards(mean, restart=False):
                return

    def _chunks(self) -> Iterator["_Aligned"]:
        if not self.draws:
            return
        step = max(1, _CHUNK // sum(x[0].size for x in self.draws.values()))
        with tqdm(total=len(self.rows), desc="align", delay=2, disable=not self.bar) as bar:
            for start in range(0, len(self.rows), step):
                rows = self.rows[start : start + step]
                some = _Aligned({path: x[rows] for path, x in self.draws.items()}, rows, self.groups)
                for group in self.groups:
                    some.move(group, self.orders[group.name][rows], self.signs[group.name][rows])
                yield some
                bar.update(len(rows))


class _Aligned:
    """Some of the draws, in double precision, and the elements that were applied to them."""

    def __init__(self, draws: dict[Path, np.ndarray], rows: np.ndarray, groups: UnitGroups):
        self.draws = {path: np.array(x, float, order="C") for path, x in draws.items()}
        self.rows, self.groups, self.all = rows, groups, np.arange(len(rows))
        self.orders = {g.name: np.tile(np.arange(g.size), (len(rows), 1)) for g in groups}
        self.signs = {g.name: np.ones((len(rows), len(g.flips), g.size), np.int8) for g in groups}

    def move(self, group: UnitGroup, order: np.ndarray, signs: np.ndarray, at: np.ndarray | None = None) -> None:
        """Apply elements of a group to the draws with the numbers ``at``."""
        at = self.all if at is None else at
        for n, member in enumerate(group.members):
            if member.path in self.draws:
                units = _units(self.draws[member.path], member, 1)
                flip = np.take_along_axis(signs[:, [kind[n] for kind in group.flips]].prod(1), order, 1)
                flip = flip.reshape(*order.shape, *[1] * (units.ndim - 2))
                units[at] = units[at[:, None], order] * flip
        before = self.orders[group.name][at]
        # signs are those of the units before any move
        self.signs[group.name][at] *= np.take_along_axis(signs, np.argsort(before)[:, None], 2)
        self.orders[group.name][at] = np.take_along_axis(before, order, 1)

    def start(self, reference: dict[Path, np.ndarray]) -> None:
        """Match each group by those parameters alone whose other axes are matched already, or are in no group."""
        waiting: dict[Path, set[str]] = {}
        for group in self.groups:
            for member in group.members:
                waiting.setdefault(member.path, set()).add(group.name)
        for group in self.groups:
            ready = {path: x for path, x in self.draws.items() if waiting[path] <= {group.name}}
            self.move(group, *_assign(group, ready, reference, len(self.rows))[:2])
            for names in waiting.values():
                names.discard(group.name)

    def descend(self, reference: dict[Path, np.ndarray], least: np.ndarray, max_sweeps: int) -> bool:
        """Take the groups in turn until no draw gains; whether any did."""
        left, moved = self.all, False
        for _ in range(max_sweeps):
            gained = np.zeros(len(self.rows), bool)
            for group in self.groups:
                some = {path: x[left] for path, x in self.draws.items()}
                order, signs, gain = _assign(group, some, reference, len(left))
                better = gain > least[left]
                self.move(group, order[better], signs[better], left[better])
                gained[left[better]] = True
            left = np.flatnonzero(gained)
            if not len(left):
                break
            moved = True
        return moved

    def replace(self, other: "_Aligned", where: np.ndarray) -> None:
        """Take the elements of some draws from another search; the draws themselves are not needed any more."""
        for name in self.orders:
            self.orders[name][where], self.signs[name][where] = other.orders[name][where], other.signs[name][where]


def _assign(
    group: UnitGroup, draws: dict[Path, np.ndarray], reference: dict[Path, np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best permutations (draw, M) and signs (draw, k, M) of a group, and what they gain (draw)."""
    kinds = len(group.flips)
    products: dict[tuple[bool, ...], np.ndarray] = {}
    for n, member in enumerate(group.members):
        if member.path in draws:
            ours = _units(reference[member.path], member, 0).reshape(group.size, -1)
            theirs = _units(draws[member.path], member, 1).reshape(count, group.size, -1)
            flipped_by = tuple(kind[n] for kind in group.flips)
            products[flipped_by] = products.get(flipped_by, 0.0) + ours @ theirs.swapaxes(1, 2)
    value = np.full((count, group.size, group.size), -np.inf)
    choice = np.zeros(value.shape, int)
    choices = np.array(list(itertools.product((1, -1), repeat=kinds)), np.int8).reshape(2**kinds, kinds)
    for n, signs in enumerate(choices):
        total = sum((signs[list(f)].prod() * product for f, product in products.items()), np.zeros(value.shape))
        choice = np.where(total > value, n, choice)
        value = np.maximum(total, value)
        if n == 0:
            now = np.trace(total, axis1=1, axis2=2)
    order = np.stack([linear_sum_assignment(v, maximize=True)[1] for v in value])
    at_order = lambda x: np.take_along_axis(x, order[..., None], 2)[..., 0]
    signs = np.ones((count, kinds, group.size), np.int8)
    np.put_along_axis(signs, order[:, None], choices[at_order(choice)].swapaxes(1, 2), 2)
    return order, signs, at_order(value).sum(1) - now


def _units(x: np.ndarray, member: Member, lead: int) -> np.ndarray:
    """A view with the units in the first axis behind ``lead`` batch axes."""
    at = lead + member.axis
    return np.moveaxis(x.reshape(*x.shape[:at], *member.factors, *x.shape[at + 1 :]), at + member.position, lead)


def _norm(tree: dict[Path, np.ndarray], lead: int) -> np.ndarray:
    return np.sqrt(sum((x**2).reshape(*x.shape[:lead], -1).sum(-1) for x in tree.values()))


def _inner(reference: dict[Path, np.ndarray], draws: dict[Path, np.ndarray]) -> np.ndarray:
    return sum(((r * draws[path]).reshape(len(draws[path]), -1).sum(1) for path, r in reference.items()), np.zeros(()))
