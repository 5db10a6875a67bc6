# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Labels of array axes, and their unification.

An axis is a product of factors, as the rows of a kernel after ``Flatten`` are height x width x channel. A factor is a
label, or a number: the size of a factor along which the array is constant. Equal labels are permuted together. Two axes
that meet in an operation are unified; a label may turn out to be a product of others.
"""

from collections.abc import Iterable, Sequence
from math import prod


class Label:
    """A set of units: what is permuted together."""

    def __init__(self, size: int, fixed: str | None = None):
        self.size = size
        self.fixed = fixed
        """why the units can't be permuted; None if they can"""
        self._bound: Axis | None = None

    def bind(self, factors: "Axis") -> None:
        """Say that the label is this product."""
        self._bound = factors

    def roots(self) -> "Axis":
        """The factors that the label was found to be."""
        return (self,) if self._bound is None else resolve(self._bound)


Factor = Label | int
Axis = tuple[Factor, ...]


def size(factor: Factor) -> int:
    """How many entries a factor has."""
    return factor if isinstance(factor, int) else factor.size


def length(axis: Iterable[Factor]) -> int:
    """How many entries an axis has."""
    return prod(map(size, axis))


def resolve(axis: Iterable[Factor]) -> Axis:
    """The factors of an axis, as far as they are known by now."""
    return tuple(root for factor in axis for root in ((factor,) if isinstance(factor, int) else factor.roots()))


def fix(axis: Iterable[Factor], why: str) -> None:
    """Say that none of these units can be permuted; the first reason stays."""
    for factor in resolve(axis):
        if isinstance(factor, Label) and factor.fixed is None:
            factor.fixed = why


def split(factor: Factor, first: int) -> Axis:
    """A factor as a product of two, the first of the given size."""
    rest = size(factor) // first
    if isinstance(factor, int):
        return first, rest
    parts = Label(first, factor.fixed), Label(rest, factor.fixed)
    factor.bind(parts)
    return parts


def fixed(n: int, why: str) -> Axis:
    """An axis of units that can't be permuted."""
    return (Label(n, why),) if n > 1 else ()


def cut(axis: Axis, sizes: Sequence[int], why: str) -> list[Axis]:
    """Cut a product of factors into consecutive products of the given sizes."""
    factors = [factor for factor in resolve(axis) if size(factor) > 1]
    lone = tuple(factor for factor in resolve(axis) if size(factor) == 1)
    parts: list[Axis] = []
    for target in sizes:
        part: list[Factor] = []
        while factors and (left := target // length(part)) > 1:
            if size(factors[0]) > left and size(factors[0]) % left == 0:
                factors[:1] = split(factors[0], left)
            part.append(factors.pop(0))
        parts.append(tuple(part))
    if [length(part) for part in parts] != list(sizes):
        fix(axis, why)
        return [fixed(n, why) for n in sizes]
    if parts and not parts[-1] and len(lone) == 1:  # a layer of one unit
        parts[-1] = lone
    else:
        fix(lone, why)
    return [resolve(part) for part in parts]


def unify(one: Axis, other: Axis, why: str = "two axes do not factor alike") -> Axis:
    """Make two axes of one size the same; returns what they are then."""
    left, right, joined = list(resolve(one)), list(resolve(other)), []
    if not left or not right:
        return tuple(left or right)
    while left and right:
        a, b = left[0], right[0]
        if size(a) > size(b) and size(a) % size(b) == 0:
            left[:1] = split(a, size(b))
        elif size(b) > size(a) and size(b) % size(a) == 0:
            right[:1] = split(b, size(a))
        elif size(a) == size(b):
            left.pop(0), right.pop(0)
            joined.append(_join(a, b))
        else:
            fix((*one, *other), why)
            return fixed(length(resolve(one)), why)
        # a split changes every axis that the label is in
        left, right = list(resolve(left)), list(resolve(right))
    return resolve(joined)


def _join(a: Factor, b: Factor) -> Factor:
    if isinstance(a, int):
        return b
    if isinstance(b, Label) and a is not b:
        b.fixed = b.fixed or a.fixed
        a.bind((b,))
    return a if isinstance(b, int) else b
