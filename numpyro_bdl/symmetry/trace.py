# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Which axes of a function's parameters can be permuted together, read off its jaxpr.

Each axis of each parameter begins with a label of its own. An operation that adds two arrays, say, is equivariant under
permutations only if the labels of their axes are the same, so they are unified; a contraction sums over a label, which
then is gone. Axes of inputs and outputs, and whatever an operation without a rule touches, are fixed. The labels that
are left free can be permuted without changing the function.

What the operations say about signs is noted in passing, and solved in :mod:`numpyro_bdl.symmetry.signs`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from numpyro_bdl.symmetry.labels import Axis, Label, cut, fix, fixed, length, resolve, unify

INPUT, OUTPUT, SPACE = "it is an axis of the input", "it is an axis of the output", "it is an axis of space or time"


class Value:
    """An array of the computation, abstractly."""

    def __init__(self, axes: Sequence[Axis], data: bool, sources: Sequence[frozenset] | None = None, const: Any = None):
        self.axes = tuple(axes)
        self.data = data
        """whether it depends on the input"""
        self.sources = tuple(sources or [frozenset()] * len(self.axes))
        """of an array that depends on parameters alone: by axis, the (parameter, axis) that lie along it"""
        self.const = const
        """the number that fills it, if it is known"""


class Part(NamedTuple):
    """Some axes of an array, of which signs are said to be those of others; of them the factors whose stride lies in
    [low, high)."""

    value: Value
    axes: tuple[int, ...]
    low: int = 1
    high: int = 2**62


def whole(value: Value) -> Part:
    """All axes of an array."""
    return Part(value, tuple(range(len(value.axes))))


class Notes:
    """What was said about signs, in the order of the computation."""

    def __init__(self):
        self.entries: list[tuple] = []

    def equal(self, one: Part, other: Part) -> None:
        """The signs of the parts are equal."""
        self.entries.append(("equal", one, other))

    def product(self, out: Part, *parts: Part) -> None:
        """The signs of the first part are the products of those of the others."""
        self.entries.append(("product", out, *parts))

    def none(self, *parts: Part) -> None:
        """The parts have no signs."""
        self.entries.append(("none", *parts))

    def pointwise(self, primitive, params: dict, inputs: list[Value], dtypes: list, out: Value) -> None:
        """An array is a pointwise function of others."""
        self.entries.append(("pointwise", primitive, params, inputs, dtypes, out))


POINTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
    integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not one_minus_square or
    polygamma pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n sign sin sinh sqrt
    square stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)


class Trace:
    """An interpreter of jaxprs by labels."""

    def __init__(self):
        self.notes = Notes()
        self.met: dict[tuple[int, int], dict[str, int]] = {}
        """for each axis of a parameter, when it first wrote to units and when it first read them"""
        self._clock = 0

    # ---- running ----------------------------------------------------------------------------------------------

    def run(self, jaxpr, num_params: int, carried: Sequence[int] = ()) -> tuple[list[Value], list[Value]]:
        """Interpret a jaxpr of which the first inputs are parameters; returns the values of these and the outputs.

        :param carried: The parameters whose next values the last outputs are; these are not returned.
        """
        params, inputs = [], []
        for n, shape in enumerate(aval.shape for aval in jaxpr.in_avals):
            if n < num_params:
                axes = [(Label(k),) for k in shape]
                params.append(Value(axes, False, [frozenset({(n, axis)}) for axis in range(len(shape))]))
            else:
                inputs.append(Value([fixed(k, INPUT) for k in shape], True))
        found = self.jaxpr(jaxpr, [*params, *inputs])
        outputs, new = found[: len(found) - len(carried)], found[len(found) - len(carried) :]
        for n, value in zip(carried, new, strict=True):
            self._same(params[n], value)
        for out in outputs:
            self.fix(out, range(len(out.axes)), OUTPUT)
        return params, outputs

    def jaxpr(self, jaxpr, inputs: Sequence[Value]) -> list[Value]:
        """Interpret a jaxpr at given values."""
        # in some releases of JAX a closed jaxpr is a class of its own, in others every jaxpr is closed
        jaxpr, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
        env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            env[var] = constant(const)
        read = lambda atom: constant(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else env[atom]
        for eqn in jaxpr.eqns:
            args = [read(atom) for atom in eqn.invars]
            name, shapes = eqn.primitive.name, [getattr(var.aval, "shape", ()) for var in eqn.outvars]
            if name in POINTWISE:
                dtypes = [atom.aval.dtype for atom in eqn.invars]
                outputs = self.pointwise(eqn.primitive, eqn.params, args, dtypes, shapes)
            else:
                rule = getattr(self, f"_{name}", None)
                outputs = rule(eqn.params, args, shapes) if rule else self.unknown(name, args, shapes)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def fix(self, value: Value, axes, why: str) -> None:
        """Fix some axes of an array."""
        for axis in axes:
            fix(value.axes[axis], why)

    def unknown(self, name: str, args: list[Value], shapes: list) -> list[Value]:
        """An operation without a rule fixes all that it touches."""
        why = f"no rule is known for the operation '{name}'"
        for arg in args:
            self.fix(arg, range(len(arg.axes)), why)
        return [Value([fixed(n, why) for n in shape], True) for shape in shapes]

    def meet(self, value: Value, axes, role: str) -> None:
        """Note that the parameters behind these axes write to units, or read them."""
        for axis in axes:
            for source in value.sources[axis]:
                self._clock += 1
                self.met.setdefault(source, {}).setdefault(role, self._clock)

    def merge(self, values: Sequence[Value], axes: Sequence[Axis], where: Sequence[Sequence[int | None]]) -> Value:
        """An array of the given axes; ``where`` says for each value which of its axes lies along each of them."""
        data = any(v.data for v in values)
        sources = [
            frozenset().union(*(v.sources[m] for v, w in zip(values, where, strict=True) if (m := w[n]) is not None))
            for n in range(len(axes))
        ]
        if data:
            for value, ours in zip(values, where, strict=True):
                if not value.data:
                    self.meet(value, [axis for axis in ours if axis is not None], "writes")
        return Value(axes, data, None if data else sources)

    # ---- rules: pointwise -------------------------------------------------------------------------------------

    def pointwise(self, primitive, params: dict, args: list[Value], dtypes: list, shapes: list) -> list[Value]:
        arrays = [arg for arg in args if arg.axes]
        axes: list[Axis] = []
        for n, size in enumerate(shapes[0]):
            axis: Axis = () if size == 1 else (size,)
            for arg in arrays:
                if length(arg.axes[n]) < size:
                    self.fix(arg, [n], "a single unit is broadcast")
                else:
                    axis = unify(axis, arg.axes[n]) if resolve(axis) else arg.axes[n]
            axes.append(axis)
        out = self.merge(arrays, axes, [range(len(axes))] * len(arrays))
        out.data = any(arg.data for arg in args)
        if all(arg.const is not None for arg in args):
            consts = (np.asarray(arg.const, dtype) for arg, dtype in zip(args, dtypes, strict=True))
            out.const = np.asarray(primitive.bind(*consts, **params))
        self.notes.pointwise(primitive, params, args, dtypes, out)
        return [out]

    # ---- rules: movement --------------------------------------------------------------------------------------

    def _broadcast_in_dim(self, params, args, shapes):
        (value, *_), (shape,) = args, shapes
        places = {to: axis for axis, to in enumerate(params["broadcast_dimensions"])}
        axes, where = [], []
        for n, size in enumerate(shape):
            axis = places.get(n)
            kept = axis is not None and length(value.axes[axis]) == size
            if axis is not None and not kept:
                self.fix(value, [axis], "a single unit is broadcast")
            axes.append(value.axes[axis] if kept else (() if size == 1 else (size,)))
            where.append(axis if kept else None)
        out = self.merge([value], axes, [where])
        out.const = value.const
        for n, axis in enumerate(where):
            if axis is not None:
                self.notes.equal(Part(out, (n,)), Part(value, (axis,)))
        self.notes.none(*(Part(out, (n,)) for n, axis in enumerate(where) if axis is None))
        return [out]

    def _reshape(self, params, args, shapes):
        (value, *_), (shape,) = args, shapes
        flat = tuple(factor for axis in value.axes for factor in resolve(axis))
        axes = cut(flat, shape, "a reshape mixes it with another axis")
        labels = [{f for f in resolve(axis) if isinstance(f, Label)} for axis in value.axes]
        source = [
            frozenset().union(*(value.sources[n] for n, some in enumerate(labels) if some & set(axis))) for axis in axes
        ]
        out = Value(axes, value.data, source, value.const)
        self.notes.equal(whole(out), whole(value))
        return [out]

    _squeeze = _expand_dims = _reshape

    def _transpose(self, params, args, shapes):
        return [self._take(args[0], params["permutation"])]

    def _take(self, value: Value, kept: Sequence[int]) -> Value:
        """An array of some axes of another, in an order."""
        out = Value([value.axes[n] for n in kept], value.data, [value.sources[n] for n in kept], value.const)
        for n, axis in enumerate(kept):
            self.notes.equal(Part(out, (n,)), Part(value, (axis,)))
        return out

    def _partly(self, name: str, value: Value, shape, cut_axes: set[int], others: Sequence[Value] = ()) -> list[Value]:
        """An operation that takes some axes as they are, and of the others a part, or several."""
        why = SPACE if name.startswith("reduce_window") else f"'{name}' takes a part of it"
        axes = []
        for n, size in enumerate(shape):
            if n in cut_axes:
                for v in (value, *others):
                    self.fix(v, [n], why)
                axes.append(fixed(size, why))
                continue
            axis = value.axes[n]
            for other in others:
                axis = unify(axis, other.axes[n])
            axes.append(axis)
        out = self.merge([value, *others], axes, [range(len(axes))] * (1 + len(others)))
        for n in set(range(len(shape))) - cut_axes:
            for v in (value, *others):
                self.notes.equal(Part(out, (n,)), Part(v, (n,)))
        return [out]

    def _changed(self, value: Value, shape) -> set[int]:
        return {n for n, size in enumerate(shape) if size != length(value.axes[n])}

    def _slice(self, params, args, shapes):
        return self._partly("slice", args[0], shapes[0], self._changed(args[0], shapes[0]))

    def _dynamic_slice(self, params, args, shapes):
        return self._partly("dynamic_slice", args[0], shapes[0], self._changed(args[0], shapes[0]))

    def _split(self, params, args, shapes):
        return [self._partly("split", args[0], shape, {params["axis"]})[0] for shape in shapes]

    def _unstack(self, params, args, shapes):
        (value,), axis = args, params["axis"]
        self.fix(value, [axis], "'unstack' takes a part of it")
        kept = [n for n in range(len(value.axes)) if n != axis]
        return [self._take(value, kept) for _ in shapes]

    def _pad(self, params, args, shapes):
        padded = {n for n, config in enumerate(params["padding_config"]) if tuple(config) != (0, 0, 0)}
        out = self._partly("pad", args[0], shapes[0], padded)
        if args[1].const is None or args[1].const != 0:
            self.notes.none(*(Part(args[0], (n,)) for n in range(len(shapes[0]))))
        return out

    def _cumsum(self, params, args, shapes):
        return self._partly("cumsum", args[0], shapes[0], {params["axis"]})

    def _rev(self, params, args, shapes):
        return self._partly("rev", args[0], shapes[0], set(params["dimensions"]))

    def _concatenate(self, params, args, shapes):
        return self._partly("concatenate", args[0], shapes[0], {params["dimension"]}, args[1:])

    def _dynamic_update_slice(self, params, args, shapes):
        part = {n for n in range(len(shapes[0])) if length(args[0].axes[n]) != length(args[1].axes[n])}
        return self._partly("dynamic_update_slice", args[0], shapes[0], part, [args[1]])

    def _gather(self, params, args, shapes):
        numbers, (value, indices) = params["dimension_numbers"], args
        gone = {*numbers.collapsed_slice_dims, *getattr(numbers, "operand_batching_dims", ())}
        left = [n for n in range(len(value.axes)) if n not in gone]
        places = dict(zip(numbers.offset_dims, left, strict=True))
        whole_axes = {n for n in left if params["slice_sizes"][n] == length(value.axes[n])}
        why = "'gather' takes a part of it"
        self.fix(value, [n for n in range(len(value.axes)) if n not in whole_axes], why)
        self.fix(indices, range(len(indices.axes)), why)
        taken = [places[n] if places.get(n) in whole_axes else None for n in range(len(shapes[0]))]
        axes = [
            value.axes[axis] if axis is not None else fixed(k, why) for axis, k in zip(taken, shapes[0], strict=True)
        ]
        if not value.data:
            self.meet(value, whole_axes, "writes")
        out = Value(axes, value.data or indices.data)
        for n, axis in enumerate(taken):
            if axis is not None:
                self.notes.equal(Part(out, (n,)), Part(value, (axis,)))
        return [out]

    def _iota(self, params, args, shapes):
        return [Value([fixed(n, "it is numbered") for n in shapes[0]], False)]

    # ---- rules: reductions and products -----------------------------------------------------------------------

    def _reduce(self, value: Value, axes: Sequence[int], linear: bool) -> list[Value]:
        kept = [n for n in range(len(value.axes)) if n not in axes]
        self.notes.none(*(Part(value, (n,)) for n in (axes if linear else range(len(value.axes)))))
        if not value.data:
            self.meet(value, axes, "writes")
        return [self._take(value, kept)]

    def _reduce_sum(self, params, args, shapes):
        out = self._reduce(args[0], params["axes"], linear=True)
        out[0].const = None if args[0].const is None or args[0].const != 0 else args[0].const
        return out

    def _reduce_max(self, params, args, shapes):
        out = self._reduce(args[0], params["axes"], linear=False)
        out[0].const = None
        return out

    _reduce_min = _reduce_prod = _reduce_and = _reduce_or = _reduce_xor = _reduce_max

    def _argmax(self, params, args, shapes):
        self.fix(args[0], params["axes"], "the number of the largest is used")
        return self._reduce_max(params, args, shapes)

    _argmin = _argmax

    def _dot_general(self, params, args, shapes):
        (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
        left, right = args
        for a, b in zip(left_sum, right_sum, strict=True):
            unify(left.axes[a], right.axes[b])
            self.notes.product(Part(left, (a,)), Part(right, (b,)))
        shared = [unify(left.axes[a], right.axes[b]) for a, b in zip(left_batch, right_batch, strict=True)]
        left_own = [n for n in range(len(left.axes)) if n not in (*left_sum, *left_batch)]
        right_own = [n for n in range(len(right.axes)) if n not in (*right_sum, *right_batch)]
        self._meet_sum(left, left_sum, right, right_sum)
        nothing: list[int | None] = [None]
        out = self.merge(
            args,
            [*shared, *(left.axes[n] for n in left_own), *(right.axes[n] for n in right_own)],
            [[*left_batch, *left_own, *nothing * len(right_own)], [*right_batch, *nothing * len(left_own), *right_own]],
        )
        for n, (a, b) in enumerate(zip(left_batch, right_batch, strict=True)):
            self.notes.product(Part(out, (n,)), Part(left, (a,)), Part(right, (b,)))
        for n, axis in enumerate(left_own, start=len(shared)):
            self.notes.equal(Part(out, (n,)), Part(left, (axis,)))
        for n, axis in enumerate(right_own, start=len(shared) + len(left_own)):
            self.notes.equal(Part(out, (n,)), Part(right, (axis,)))
        return [out]

    def _meet_sum(self, left: Value, left_axes, right: Value, right_axes) -> None:
        """Parameters that a sum over units multiplies them with read them; of two, the second does."""
        if left.data != right.data:
            self.meet(*((right, right_axes) if left.data else (left, left_axes)), "reads")
        elif not left.data:
            self.meet(left, left_axes, "writes")
            self.meet(right, right_axes, "reads")

    def _conv_general_dilated(self, params, args, shapes):
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        if params["batch_group_count"] > 1:
            return self.unknown("conv_general_dilated with batch groups", args, shapes)
        (left, right), (shape,), why = args, shapes, SPACE
        (batch, feature, *spatial), (out_feature, in_feature, *taps) = numbers.lhs_spec, numbers.rhs_spec
        self.fix(left, spatial, why)
        self.fix(right, taps, why)
        inner, outer = length(right.axes[in_feature]), length(right.axes[out_feature]) // groups
        group, own = cut(left.axes[feature], (groups, inner), why)
        unify(own, right.axes[in_feature])
        out_group, out_own = cut(right.axes[out_feature], (groups, outer), why)
        group = unify(group, out_group) if groups > 1 else out_group
        axes: list[Axis] = [()] * len(shape)
        out_batch, out_features, *out_spatial = numbers.out_spec
        axes[out_batch], axes[out_features] = left.axes[batch], resolve((*group, *out_own))
        for n in out_spatial:
            axes[n] = fixed(shape[n], why)
        self._meet_sum(left, [feature], right, [in_feature])
        if left.data and not right.data:
            self.meet(right, [out_feature], "writes")
        both = left.data or right.data
        sources = [frozenset()] * len(shape)
        sources[out_features] = right.sources[out_feature]
        out = Value(axes, both, None if both else sources)
        self.notes.equal(Part(out, (out_batch,)), Part(left, (batch,)))
        self.notes.product(Part(left, (feature,), 1, inner), Part(right, (in_feature,)))
        self.notes.equal(Part(out, (out_features,), 1, outer), Part(right, (out_feature,), 1, outer))
        along = (Part(left, (feature,), inner),) if groups > 1 else ()
        self.notes.product(Part(out, (out_features,), outer), Part(right, (out_feature,), outer), *along)
        return [out]

    def _window(self, name: str, params, value: Value, shape, linear: bool) -> list[Value]:
        one = lambda key, n, idle: params.get(key) is None or params[key][n] == idle
        slid = {
            n
            for n in range(len(shape))
            if not (
                params["window_dimensions"][n] == 1
                and one("window_strides", n, 1)
                and one("padding", n, (0, 0))
                and one("base_dilation", n, 1)
                and one("window_dilation", n, 1)
            )
        }
        if not linear:
            self.notes.none(whole(value))
        return self._partly(name, value, shape, slid)

    def _reduce_window_sum(self, params, args, shapes):
        return self._window("reduce_window_sum", params, args[0], shapes[0], linear=True)

    def _reduce_window_max(self, params, args, shapes):
        return self._window("reduce_window_max", params, args[0], shapes[0], linear=False)

    _reduce_window_min = _reduce_window_max

    # ---- rules: calls and loops -------------------------------------------------------------------------------

    def _optimization_barrier(self, params, args, shapes):
        return args

    def _call(self, params, args, shapes):
        inner = next(params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in params)
        return self.jaxpr(inner, args)

    _jit = _pjit = _closed_call = _core_call = _custom_jvp_call = _custom_vjp_call = _custom_vjp_call_jaxpr = _call
    _checkpoint = _remat = _remat2 = _call

    def _same(self, one: Value, other: Value) -> None:
        """Two arrays are one and the same, before and after a step."""
        for a, b in zip(one.axes, other.axes, strict=True):
            unify(a, b)
        self.notes.equal(whole(one), whole(other))

    def _carried(self, first: Value) -> Value:
        """What a loop carries: with labels of its own, as a first value of zeros has none."""
        axes = [(Label(length(axis)),) if length(axis) > 1 else axis for axis in first.axes]
        return Value(axes, True)

    def _scan(self, params, args, shapes):
        if "ft_in" in params:
            consts, carries, _ = (len(list(part.vals)) for part in params["ft_in"].elts)
        else:
            consts, carries = params["num_consts"], params["num_carry"]
        outer, first, stacked = args[:consts], args[consts : consts + carries], args[consts + carries :]
        carry = [self._carried(value) for value in first]
        for value in stacked:
            self.fix(value, [0], SPACE)
        slices = [self._take(value, range(1, len(value.axes))) for value in stacked]
        outs = self.jaxpr(params["jaxpr"], [*outer, *carry, *slices])
        for one, start, end in zip(carry, first, outs[:carries], strict=True):
            self._same(one, start)
            self._same(one, end)
            if not end.data:
                self.meet(end, range(len(end.axes)), "writes")
        stacks = []
        for value, shape in zip(outs[carries:], shapes[carries:], strict=True):
            stack = Value([fixed(shape[0], SPACE), *value.axes], True)
            for n in range(len(value.axes)):
                self.notes.equal(Part(stack, (n + 1,)), Part(value, (n,)))
            stacks.append(stack)
        return [*carry, *stacks]

    def _while(self, params, args, shapes):
        tested, bound = params["cond_nconsts"], params["body_nconsts"]
        first = args[tested + bound :]
        carry = [self._carried(value) for value in first]
        self.jaxpr(params["cond_jaxpr"], [*args[:tested], *carry])
        outs = self.jaxpr(params["body_jaxpr"], [*args[tested : tested + bound], *carry])
        for one, start, end in zip(carry, first, outs, strict=True):
            self._same(one, start)
            self._same(one, end)
        return carry

    def _cond(self, params, args, shapes):
        runs = [self.jaxpr(branch, args[1:]) for branch in params["branches"]]
        outs = [Value([(Label(k),) if k > 1 else () for k in shape], True) for shape in shapes]
        for values in runs:
            for out, value in zip(outs, values, strict=True):
                self._same(out, value)
        return outs


def constant(value: Any, dtype=None) -> Value:
    """An array that is part of the function; it is fixed along the axes on which it varies."""
    if jax.dtypes.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.extended):
        return Value([fixed(n, "it is a random key") for n in np.shape(value)], False)
    array = np.asarray(value, dtype)
    axes: list[Axis] = []
    for n, size in enumerate(array.shape):
        same = size > 1 and bool(np.all(array == array.take([0], n)))
        axes.append((size,) if same else fixed(size, "a constant varies along it"))
    filled = array.size and bool(np.all(array == array.flat[0]))
    return Value(axes, False, const=array.flat[0] if filled else None)
