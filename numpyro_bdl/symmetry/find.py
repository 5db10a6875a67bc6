# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Find the groups of interchangeable units of any function of parameters, and check each of them."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array, random

from numpyro_bdl.potential import Potential
from numpyro_bdl.symmetry.action import Element, apply, identity, telling_elements
from numpyro_bdl.symmetry.groups import Member, Path, UnitGroup, UnitGroups, has_members, leaves, put_members
from numpyro_bdl.symmetry.labels import Label, resolve, size
from numpyro_bdl.symmetry.signs import Signs, solutions
from numpyro_bdl.symmetry.trace import INPUT, OUTPUT, SPACE, Trace, Value

TOLERANCE = 1e-4
_ROWS = 8


def find_groups(function: Callable | linen.Module | nnx.Module, params: Any, *inputs, **kwargs) -> UnitGroups:
    """The groups of units that can be exchanged, and their signs flipped, without changing a function.

    They are read off the function's jaxpr, whatever it is made of (see :mod:`numpyro_bdl.symmetry.trace`), not off the
    names of layers. Each group is then checked by a few elements at random parameters and inputs (the given inputs, if
    the function is finite only there). What can't be followed is left out, and said in ``left_out``.

    :param function: A function ``f(params, *inputs)``; or a linen module, called with ``apply``; or an nnx module.
    :param params: Its parameters: any tree, such as the variables of a linen module (or their ``"params"`` alone), or a
        dict of sites. None initializes a linen module, and takes the state of an nnx module.
    :param inputs: Inputs, of which shapes and dtypes count.
    :param kwargs: Keyword arguments of the call, fixed.
    :return: The groups; ``print`` them for a table.
    :raises TypeError: if ``function`` is neither callable nor a module, or is not given parameters.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from numpyro_bdl.symmetry import find_groups
        >>> network = nn.Sequential([nn.Dense(16), jnp.tanh, nn.Dense(8), nn.relu, nn.Dense(1)])
        >>> groups = find_groups(network, None, jnp.ones((1, 4)))
        >>> [(g.name, g.size, g.pointwise, len(g.flips)) for g in groups]
        [('layers_0', 16, 'odd', 1), ('layers_2', 8, 'homogeneous', 0)]
    """
    if isinstance(function, linen.Module):
        function, params = _linen(function, params, inputs, kwargs)
    elif isinstance(function, nnx.Module):
        function, params = _nnx(function, params, kwargs)
    elif not callable(function):
        raise TypeError(f"find_groups needs a function or a Flax module, got {type(function).__name__}.")
    elif kwargs:
        call = function
        function = lambda p, *x: call(p, *x, **kwargs)
    if params is None:
        raise TypeError("find_groups: params=None is for Flax modules; give the parameters of the function.")
    rng = np.random.default_rng(0)
    given = [_concrete(x) for x in inputs]
    drawn = [rng.normal(size=x.shape).astype(x.dtype) if _is_float_array(x) else x for x in given]
    stateless = lambda p, *x: (function(p, *x), {})
    return _check(_traced(stateless, params, inputs), stateless, params, drawn, given)


def find_model_groups(model: Callable, *args, **kwargs) -> UnitGroups:
    """The groups of a NumPyro model: of its log likelihood as a function of latent sites and mutable collections.

    Of the log likelihood rather than the location, so that a network behind the scale of the outcome is seen as well,
    and of the sites in unconstrained space, where a parameter that must be positive has no sign to flip. A site that is
    bounded otherwise has signs only if the transform to its support is odd, as that to (-1, 1) is: the groups act on
    draws as they do in unconstrained space.

    :param model: A NumPyro model.
    :param args: Its arguments, as for a run.
    :param kwargs: Its keyword arguments.
    :return: The groups; their parameters are named by site.
    :raises ValueError: for what :class:`~numpyro_bdl.potential.Potential` refuses.
    """
    return groups_of(Potential(model, args, kwargs))


def groups_of(potential: Potential) -> UnitGroups:
    """The groups of the model of a potential."""
    function, params, inputs = _log_likelihood(potential)
    groups = _traced(function, params, inputs)
    if unsigned := _wrongly_flipped(groups, potential):
        groups = _traced(function, params, inputs, unsigned)
    return _check(groups, function, params, inputs)


def failures_of(groups: UnitGroups, potential: Potential) -> dict[str, str] | None:
    """Those of given groups that change the log likelihood of a model, each with a text.

    None for a model with dropout, which can't be checked, as units that are exchanged keep their places among those
    dropped.
    """
    if unsigned := _wrongly_flipped(groups, potential):
        flipped = {g.name: sorted(unsigned & set(_flipped(g))) for g in groups}
        why = "of which the transform to its support is not odd"
        return {name: f"{name}: flips {', '.join(sites)}, {why}" for name, sites in flipped.items() if sites}
    function, params, inputs = _log_likelihood(potential)
    one, other = (jax.jit(f)(params, *inputs) for f in (function, _log_likelihood(potential, random.key(1))[0]))
    if _difference(jax.tree.leaves(one), jax.tree.leaves(other)) > TOLERANCE:
        return None
    return _failures(groups, function, params, inputs)


def _flipped(group: UnitGroup) -> list[str]:
    """The sites of which some sign symmetry flips units."""
    return [m.path[0] for n, m in enumerate(group.members) if any(kind[n] for kind in group.flips)]


def _wrongly_flipped(groups: UnitGroups, potential: Potential) -> set[str]:
    """The sites that groups flip although the transform to their support is not odd: a flip in unconstrained space is
    none of the value, and would take draws out of the support."""
    sites = set(potential.bounded) & {site for group in groups for site in _flipped(group)}
    if not sites:
        return sites
    rng, start = np.random.default_rng(0), jax.eval_shape(potential.initial, random.key(0))[0]
    z = {name: rng.normal(size=x.shape).astype(x.dtype) for name, x in start.items()}
    values = jax.jit(lambda z: potential.constrain(z, potential.args, potential.kwargs))
    odd = lambda site: _difference([-values(z)[site]], [values(z | {site: -z[site]})[site]]) <= TOLERANCE
    return {site for site in sites if not odd(site)}


def _log_likelihood(potential: Potential, key: Array | None = None) -> tuple[Callable, dict, tuple]:
    """A function of latent sites and mutable collections, first values of these, and its inputs: the data.

    It returns what must be the same for equivalent networks, and the new values of collections, which move with the
    units as the old ones do: an average over batches, or the statistics of the last one.
    """
    key = random.key(0) if key is None else key
    z, mutable = potential.initial(random.key(0))
    before = leaves(mutable)
    arguments, treedef = jax.tree.flatten((potential.args, potential.kwargs))
    # that two columns of the data happen to be equal is no symmetry of the model
    arrays = {n: jnp.asarray(x) for n, x in enumerate(arguments) if hasattr(x, "shape")}

    def log_likelihood(tree, arrays, rows):
        call = treedef.unflatten([arrays.get(n, x) for n, x in enumerate(arguments)])
        values = potential.constrain({name: tree[name] for name in z}, *call)
        sites = potential.run(values, rows, key, {name: tree[name] for name in mutable}, *call)
        likelihood = {name: sites[name]["fn"].log_prob(sites[name]["value"]) for name in potential.observed}
        new = {name: sites[name]["value"] for name in mutable}
        others = {path: x for path, x in leaves(new).items() if not _is_next(x, before.get(path))}
        same = likelihood, [x for path, x in others.items() if path in before]
        return same, put_members(new, dict.fromkeys(others))

    rows = {name: jnp.arange(min(_ROWS, plate.size)) for name, plate in potential.plates.items()}
    try:
        jax.eval_shape(log_likelihood, z | mutable, arrays, rows)
    except (ValueError, TypeError):  # a model that does not take its rows through the plate is given all of them
        rows = {}
    return (lambda tree, arrays: log_likelihood(tree, arrays, rows)), z | mutable, (arrays,)


def _is_next(new: Any, old: Any) -> bool:
    """Whether an array can be the new value of an old one with units, which a counter or a random key has not."""
    return old is not None and _is_parameter(old) and jnp.shape(new) == jnp.shape(old)


# ---- modules --------------------------------------------------------------------------------------------------------


def _linen(module: linen.Module, params: Any, inputs: tuple, kwargs: dict) -> tuple[Callable, Any]:
    if params is None:
        params = jax.jit(lambda *x: module.init(random.key(0), *x, **kwargs))(*map(_concrete, inputs))
    inner = not (isinstance(params, Mapping) and "params" in params)

    def function(p, *x):
        return module.apply({"params": p} if inner else p, *x, **kwargs)

    return function, params


def _nnx(module: nnx.Module, params: Any, kwargs: dict) -> tuple[Callable, Any]:
    graph, state = nnx.split(module)
    if params is None:
        params = nnx.to_pure_dict(state)

    def function(p, *x):
        new = nnx.split(module)[1]
        nnx.replace_by_pure_dict(new, p)
        return nnx.merge(graph, new)(*x, **kwargs)

    return function, params


def _concrete(x: Any) -> Any:
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


# ---- from labels to groups ------------------------------------------------------------------------------------------


def _is_parameter(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _traced(function: Callable, params: Any, inputs: tuple, unsigned: Collection[str] = ()) -> UnitGroups:
    """The groups of a function that returns outputs and new values of some of the parameters.

    :param unsigned: Sites that have no signs.
    """
    found = leaves(params)
    paths = [path for path, leaf in found.items() if _is_parameter(leaf)]
    others = {path: leaf for path, leaf in found.items() if not _is_parameter(leaf)}

    def call(arrays, others, inputs):
        outputs, new = function(put_members(params, dict(zip(paths, arrays, strict=True)) | others), *inputs)
        return outputs, {paths.index(path): x for path, x in leaves(new).items()}

    jaxpr, (_, carried) = jax.make_jaxpr(call, return_shape=True)([found[path] for path in paths], others, inputs)
    trace = Trace()
    values, outputs = trace.run(jaxpr, len(paths), sorted(carried))
    signs = Signs(trace.notes)
    signs.finish(outputs)

    places: dict[Label, list[tuple[tuple, Member, int]]] = {}
    reasons: dict[str, list[str]] = {}
    for n, (path, value) in enumerate(zip(paths, values, strict=True)):
        for axis in range(len(value.axes)):
            for member, label, bit in _members(path, value, axis, signs):
                met = trace.met.get((n, axis), {})
                if label.fixed is None:
                    when = (0, met["writes"]) if "writes" in met else (1, met.get("reads", math.inf))
                    places.setdefault(label, []).append((when, member, bit))
                elif label.fixed not in (INPUT, OUTPUT, SPACE) and label.size > 1:
                    reasons.setdefault(label.fixed, []).append(str(member))
    no_sign = lambda some: [bit for _, member, bit in some if member.path[0] in unsigned]
    groups = [group for label, some in places.items() if (group := _group(label, some, signs, no_sign(some)))]
    groups.sort(key=lambda item: item[0])
    named = _named([group for _, group in groups])
    used = {member.path for group in named for member in group.members}
    shapes = tuple((path, np.shape(found[path])) for path in paths if path in used)
    left_out = [f"{', '.join(members)}: {reason}" for reason, members in reasons.items()]
    if unsigned:
        left_out.append(f"signs of {', '.join(sorted(unsigned))}: the transform to its support is not odd")
    return UnitGroups(tuple(named), shapes, tuple(left_out))


def _members(path: Path, value: Value, axis: int, signs: Signs):
    """The factors of an axis: each as a member, with its label, and the variable of its sign."""
    factors = resolve(value.axes[axis])
    sizes = tuple(map(size, factors))
    for position, label in enumerate(factors):
        if isinstance(label, Label):
            stride = int(np.prod(sizes[position + 1 :], initial=1))
            yield Member(path, axis, sizes, position), label, signs.variable(value, axis, stride, label)


def _group(label: Label, places: list, signs: Signs, zeros: list[int]) -> tuple[tuple, UnitGroup] | None:
    places = sorted(places, key=lambda place: place[0])
    if places[0][0] == (1, math.inf) or not label.size:  # parameters that the function does not use, or no units
        return None
    members = tuple(member for _, member, _ in places)
    flips = tuple(solutions(signs.equations.get(label, []) + zeros, [bit for _, _, bit in places]))
    if label.size == 1 and not flips:
        return None
    writers = sum(when[0] == 0 for when, _, _ in places)
    pointwise = ", ".join(sorted(signs.kinds.get(label, ())))
    return places[0][0], UnitGroup("", label.size, members, writers, flips, pointwise)


def _named(groups: list[UnitGroup]) -> list[UnitGroup]:
    """Name each group by the layer that writes to it first."""
    names = []
    for group in groups:
        first = group.members[0]
        path = first.path[1:] if first.path[0] == "params" and len(first.path) > 1 else first.path
        layer = ".".join(path[:-1]) or path[0].rsplit(".", 1)[0]
        names.append((layer, f"{layer}[{first.axis}]" + (f"[{first.position}]" if len(first.factors) > 1 else "")))
    plain = [name for name, _ in names]
    result, taken = [], set()
    for group, (plain_name, long) in zip(groups, names, strict=True):
        name = plain_name if plain.count(plain_name) == 1 else long
        while name in taken:
            name += "'"
        taken.add(name)
        result.append(group._replace(name=name))
    return result


# ---- the check ------------------------------------------------------------------------------------------------------


def _check(groups: UnitGroups, function: Callable, params: Any, *inputs: Sequence) -> UnitGroups:
    """Leave out the groups of which an element changes the function."""
    failed = _failures(groups, function, params, *inputs)
    if not failed:
        return groups
    kept = groups.only(*(group.name for group in groups if group.name not in failed))
    return UnitGroups(kept.groups, kept.shapes, (*kept.left_out, *failed.values()))


def _failures(groups: UnitGroups, function: Callable, params: Any, *inputs: Sequence) -> dict[str, str]:
    """The groups of which an element changes the function, at parameters near the given ones; each with a text.

    A steep function makes much of rounding errors; what fails is looked at once more in double precision.

    :param inputs: Inputs, and others for a function that is not finite there.
    """
    failed = _changing(groups, function, params, *inputs)
    if not failed or jax.config.jax_enable_x64:
        return failed
    with jax.enable_x64(True):
        doubled = jax.tree.map(lambda x: np.asarray(x, np.float64) if _is_float_array(x) else x, (params, *inputs))
        try:
            return _changing(groups, function, *doubled)
        except (TypeError, ValueError):  # it has arrays of another precision within
            return failed


def _changing(groups: UnitGroups, function: Callable, params: Any, *inputs: Sequence) -> dict[str, str]:
    params, failed = _perturbed(np.random.default_rng(0), params), {}

    def call(element, params, inputs):
        outputs, new = function(apply(element, params), *inputs)
        return [x for x in jax.tree.leaves(outputs) if _is_number(x)], new

    with jax.default_matmul_precision("float32"):
        for some in inputs:
            at = jax.jit(partial(call, inputs=some))
            outputs, new = jax.device_get(at(identity(groups), params))
            if all(np.isfinite(x).all() for x in outputs):
                break

        def change(element: Element) -> float:
            moved = apply(element, new) if has_members(new, groups) else new
            return _difference(*map(jax.tree.leaves, ((outputs, moved), jax.device_get(at(element, params)))))

        if not max(map(change, telling_elements(groups)), default=0.0) <= TOLERANCE:
            for group in groups:
                difference = max(map(change, telling_elements(groups, group.name)))
                if not difference <= TOLERANCE:
                    how = f"changes the function by {difference:.1g} of its size"
                    how = how if np.isfinite(difference) else "can't be checked: the function is not finite"
                    failed[group.name] = f"{group.name}: {how}"
            failed = failed or {g.name: f"{g.name}: changes the function together with the others" for g in groups}
    return failed


def _difference(one: list, other: list) -> float:
    """The largest difference, as a part of the largest value."""
    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(one, other, strict=True) if a.size]
    parts = [np.max(np.abs(a - b)) / (1e-30 + np.max(np.abs(a))) for a, b in pairs]
    return float(np.max(parts, initial=0.0))


def _perturbed(rng: np.random.Generator, params: Any) -> Any:
    """Parameters changed so that none is zero. What is positive throughout, as a variance, stays so."""

    def changed(leaf):
        scale, shift = 1 + rng.uniform(-0.3, 0.3, leaf.shape), rng.uniform(-0.3, 0.3, leaf.shape)
        return (leaf * scale + shift * (not (leaf > 0).all())).astype(leaf.dtype)

    found = {path: np.asarray(leaf) for path, leaf in leaves(params).items() if _is_parameter(leaf)}
    return put_members(params, {path: changed(leaf) for path, leaf in found.items()})


def _is_number(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool


def _is_float_array(x: Any) -> bool:
    return hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating)
