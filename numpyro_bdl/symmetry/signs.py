# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Which signs of a unit's parameters can be flipped together.

Where an array has an axis of units, a flip of unit i multiplies its entries by :math:`s_i^p`, and p, 0 or 1, is its
parity. A sum of arrays needs equal parities, a product adds them, a contraction needs their sum to be 0, and an odd
function passes its parity on. These are linear equations over GF(2); their solutions are the sign symmetries.

Whether a pointwise function is odd or even is seen by evaluating it, as a whole: ``x * sigmoid(x)`` is neither, though
its parts would pass, and ``x / (1 + abs(x))`` is odd.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from numpyro_bdl.symmetry.labels import Label, length, resolve, size
from numpyro_bdl.symmetry.trace import Notes, Part, Value, whole

NEAR = np.concatenate([np.logspace(-6, -2, 13), np.linspace(0.013, 1.97, 61), np.linspace(2.11, 7.3, 23)])
FAR = np.array([21, 55, 210, 1010, 1.1e4, 1.3e5, 1.7e6])
GRID = np.concatenate([scale * np.concatenate([NEAR, FAR]) for scale in (1, -1, 2, -2)]).astype(np.float32)
"""Where a scalar function is looked at."""


def classify(values: np.ndarray) -> str:
    """What a scalar function is: ``"constant"``, ``"linear"``, ``"odd"``, ``"even"``, ``"homogeneous"`` (positively,
    as ReLU) or ``"other"``. A function that is both odd and homogeneous is linear.

    :param values: Its values on the ``GRID``.
    """
    plus, minus, plus_twice, minus_twice = values = np.asarray(values).astype(np.float64).reshape(4, -1)
    finite = np.isfinite(values).all(0)
    if not finite[: len(NEAR)].all():
        return "other"
    size = np.abs(plus[: len(NEAR)][NEAR < 2]).max()
    close = lambda a, b: np.allclose(a[finite], b[finite], rtol=1e-4, atol=1e-6 * size)
    if close(plus, np.full_like(plus, plus[0])) and close(minus, np.full_like(plus, plus[0])):
        return "constant"
    odd, homogeneous = close(minus, -plus), close(plus_twice, 2 * plus) and close(minus_twice, 2 * minus)
    if odd:
        return "linear" if homogeneous else "odd"
    if close(minus, plus):
        return "even"
    return "homogeneous" if homogeneous else "other"


Key = tuple[int, Label]
"""Where a factor lies in a part: its stride, and its label."""


class Signs:
    """The equations of a computation, by label."""

    def __init__(self, notes: Notes):
        self._variables: dict[tuple[Value, int, Key], int] = {}
        self.equations: dict[Label, list[int]] = {}
        """for each label, sets of variables (as bits) whose sum is 0"""
        self.kinds: dict[Label, set[str]] = {}
        """for each label, what the functions applied to its units are"""
        self._chains: dict[Value, tuple[Value, np.ndarray]] = {}
        """arrays that are a pointwise function of another, with that and the function's values"""
        for kind, *entry in notes.entries:
            getattr(self, f"_{kind}")(*entry)

    # ---- parities as variables --------------------------------------------------------------------------------

    def variable(self, value: Value, axis: int, stride: int, label: Label) -> int:
        """The variable of a factor of an axis, a bit."""
        return self._variables.setdefault((value, axis, (stride, label)), 1 << len(self._variables))

    def variables(self, part: Part, lengths: Sequence[int] | None = None) -> dict[Key, int]:
        """The variable, a bit, of each free factor of a part; its axes of length 1 may be broadcast to lengths."""
        found: dict[Key, int] = {}
        stride = 1
        for axis in reversed(part.axes):
            own = 1
            for factor in reversed(resolve(part.value.axes[axis])):
                if isinstance(factor, Label) and factor.fixed is None and part.low <= stride < part.high:
                    found[stride // part.low, factor] = self.variable(part.value, axis, own, factor)
                own *= size(factor)
                stride *= size(factor)
            if lengths and own == 1:
                stride *= lengths[axis]
        return found

    def _sum_is_zero(self, forms: Iterable[dict[Key, int]]) -> None:
        forms = list(forms)
        for key in {key for form in forms for key in form}:
            total = 0
            for form in forms:
                total ^= form.get(key, 0)
            if total:
                self.equations.setdefault(key[1], []).append(total)

    # ---- what was noted ---------------------------------------------------------------------------------------

    def _settle(self, value: Value) -> None:
        """An array that is a pointwise function of another takes its parity, if the function is odd."""
        if value not in self._chains:
            return
        base, values = self._chains.pop(value)
        kind = classify(values)
        form, of_base = self.variables(whole(value)), self.variables(whole(base))
        if kind not in ("linear", "constant"):
            for _, label in of_base:
                self.kinds.setdefault(label, set()).add(kind)
        if kind in ("linear", "odd"):
            self._sum_is_zero([form, of_base])
        else:
            self._sum_is_zero([form])
        if kind in ("homogeneous", "other"):
            self._sum_is_zero([of_base])

    def _equal(self, one: Part, other: Part) -> None:
        self._product(one, other)

    def _product(self, *parts: Part) -> None:
        for part in parts:
            self._settle(part.value)
        zeros = [part for part in parts if part.value.const is not None and part.value.const == 0]
        if not zeros:
            self._sum_is_zero(self.variables(part) for part in parts)

    def _none(self, *parts: Part) -> None:
        for part in parts:
            self._settle(part.value)
            self._sum_is_zero([self.variables(part)])

    def _pointwise(self, primitive, params: dict, inputs: list[Value], dtypes: list, out: Value) -> None:
        arrays = [value for value in inputs if value.const is None]
        if not arrays:
            return
        chains = {value: self._chains.get(value, (value, GRID)) for value in arrays}
        bases, shape = {base for base, _ in chains.values()}, [length(axis) for axis in out.axes]
        if len(bases) == 1 and all([length(axis) for axis in value.axes] == shape for value in arrays):
            parts = [chains[v][1] if v.const is None else np.full(GRID.shape, v.const) for v in inputs]
            cast = (part.astype(dtype) for part, dtype in zip(parts, dtypes, strict=True))
            self._chains[out] = bases.pop(), np.asarray(primitive.bind(*cast, **params))
            return
        for value in arrays:
            self._settle(value)
        self._combine(primitive.name, inputs, out)

    def _combine(self, name: str, inputs: list[Value], out: Value) -> None:
        """A pointwise function of several arrays."""
        lengths = [length(axis) for axis in out.axes]
        forms = [self.variables(whole(value), lengths) for value in inputs]
        own = self.variables(whole(out))
        zero = lambda value: value.const is not None and value.const == 0
        if name in ("mul", "div"):
            self._sum_is_zero([own, *forms])
        elif name in ("add", "add_any", "sub", "select_n"):
            if name == "select_n":
                self._sum_is_zero([forms[0]])
                inputs, forms = inputs[1:], forms[1:]
            for value, form in zip(inputs, forms, strict=True):
                if not zero(value):
                    self._sum_is_zero([own, form])
        else:
            for form in (own, *forms):
                self._sum_is_zero([form])

    def finish(self, outputs: Iterable[Value]) -> None:
        """The outputs have no signs."""
        for value in outputs:
            self._none(whole(value))


def solutions(equations: list[int], wanted: list[int]) -> list[tuple[bool, ...]]:
    """Independent solutions of equations over GF(2), as values of the wanted variables alone.

    In reduced echelon form: the first wanted variable that is set in one solution is set in no other.
    """
    position = {bit: n for n, bit in enumerate(wanted)}
    # unwanted variables are eliminated first: they are the high bits
    unwanted = sorted({1 << n for eq in equations for n in _bits(eq)} - position.keys())
    order = {bit: 1 << (len(wanted) - 1 - n) for bit, n in position.items()}
    order |= {bit: 1 << (len(wanted) + n) for n, bit in enumerate(unwanted)}
    rows = []
    for equation in equations:
        row = sum(order[1 << n] for n in _bits(equation))
        for pivot in rows:
            row = min(row, row ^ pivot)
        if row:
            rows.append(row)
            rows.sort(reverse=True)
    count = len(wanted)
    constraints = [row for row in rows if row < 1 << count]
    pivots = [row.bit_length() - 1 for row in constraints]
    for n, row in enumerate(constraints):  # reduce, so that each pivot is in one row
        for m in range(n):
            if constraints[m] >> pivots[n] & 1:
                constraints[m] ^= row
    found = []
    for free in set(range(count)) - set(pivots):
        vector = 1 << free
        for row, pivot in zip(constraints, pivots, strict=True):
            if row >> free & 1:
                vector |= 1 << pivot
        found.append(vector)
    return [tuple(bool(v >> (count - 1 - n) & 1) for n in range(count)) for v in echelon(found)]


def _bits(number: int) -> list[int]:
    return [n for n in range(number.bit_length()) if number >> n & 1]


def echelon(vectors: list[int]) -> list[int]:
    """A basis over GF(2) of what vectors span, in reduced echelon form."""
    basis: list[int] = []
    for vector in vectors:
        for row in sorted(basis, reverse=True):
            vector = min(vector, vector ^ row)
        if vector:
            top = vector.bit_length() - 1
            basis = [row ^ vector if row >> top & 1 else row for row in basis] + [vector]
    return sorted(basis, reverse=True)
