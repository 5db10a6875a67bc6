# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Put draws as close to a reference as their symmetries allow; see :mod:`numpyro_bdl.symmetry.matching`."""

import math
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_bdl._checks import check_integer
from numpyro_bdl.symmetry.action import Element, apply
from numpyro_bdl.symmetry.groups import Path, UnitGroups, take_members
from numpyro_bdl.symmetry.matching import Search


def align(params: Any, groups: UnitGroups, reference: Any = "mean", **settings) -> Any:
    """Relabel the units of draws so that they lie as close to a reference as can be found: the functions stay as they
    are.

    For averaging weights, for pictures of them and for comparing chains unit by unit. It is a relabelling and not a
    canonical form: where a draw is put depends on the reference, on the other draws if that is their mean, and, beyond
    one hidden layer, on where the draw is (a maximum over several groups is local). Of a draw alone
    :func:`~numpyro_bdl.symmetry.canonicalize` is a function, and only it can stand for a restriction of the posterior.
    Aligned draws look alike because they were made to: an R-hat of aligned weights is no evidence of convergence.

    :param params: A tree of parameters, or a dict of sites, with any leading batch axes.
    :param groups: From :func:`~numpyro_bdl.symmetry.find_groups`.
    :param reference: As of :func:`aligning_element`, as are the settings.
    :param settings: ``scores``, ``max_sweeps`` and ``progress_bar`` of :func:`aligning_element`.
    :return: The tree. A draw that is not finite is returned as it is.
    :raises ValueError: as :func:`aligning_element` does.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_bdl.symmetry import UnitGroups, Units, align
        >>> params = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[5.0], [6.0]])}
        >>> groups = UnitGroups.of(params, {
        ...     "hidden": Units(writes={"w1": 1}, reads={"w2": 0}, flips=("w1", "w2"))})
        >>> reference = {"w1": jnp.array([[-2.1, 0.9]]), "w2": jnp.array([[-6.1], [5.1]])}
        >>> aligned = align(params, groups, reference)
        >>> aligned["w1"].tolist(), aligned["w2"].tolist()
        ([[-2.0, 1.0]], [[-6.0], [5.0]])
    """
    return apply(aligning_element(params, groups, reference, **settings), params)


def aligning_element(
    params: Any,
    groups: UnitGroups,
    reference: Any = "mean",
    *,
    scores: Any = None,
    max_sweeps: int = 100,
    progress_bar: bool = True,
) -> Element:
    """The element that aligns each draw, for moving what goes with it (gradients, masks) by
    :func:`~numpyro_bdl.symmetry.apply`.

    It begins at the draw as it is, from where the inner product with the reference only grows, and once more layer by
    layer from the input on, and keeps the better end. With one group that is the global maximum. A parameter with two
    axes in one group (a recurrent kernel, a dense layer within a residual stream) is moved with the others but left out
    of the inner product, in which it would be quadratic.

    :param params: A tree of parameters, or a dict of sites, with any leading batch axes. It runs on the host.
    :param groups: From :func:`~numpyro_bdl.symmetry.find_groups`.
    :param reference: A tree like ``params`` without batch axes. Or ``"best"``, the draw of the highest score. Or
        ``"mean"``, the mean of the aligned draws: they are aligned to the best draw (without scores to the first), then
        to their mean, until none moves; the sum of squared distances to the mean never rises.
    :param scores: Log posterior of each draw, or minus its energy, with the batch axes alone.
    :param max_sweeps: Sweeps over the groups for a reference, and means, at most.
    :param progress_bar: Show a bar when a pass over the draws takes more than two seconds.
    :return: The element, with the batch axes of ``params``; the identity for a draw that is not finite.
    :raises ValueError: for missing parameters, other shapes, a reference with batch axes or that is not finite, scores
        that are missing or of another shape.
    """
    check_integer("align", "max_sweeps", max_sweeps)
    members, batch = _complete("params", params, groups)
    count = math.prod(batch)
    draws = {path: np.asarray(x).reshape(count, *np.shape(x)[len(batch) :]) for path, x in members.items()}
    finite = np.ones(count, bool)
    for x in draws.values():
        finite &= np.isfinite(x).reshape(count, -1).all(1)
    if not finite.all():
        warnings.warn(
            f"align: {count - finite.sum()} of {count} draws are not finite and stay as they are.", stacklevel=3
        )
    search = Search(groups, draws, np.flatnonzero(finite), max_sweeps, progress_bar)
    if isinstance(reference, str) and reference in ("best", "mean"):
        best = _best(reference, scores, batch, finite)
        search.towards({path: x[best] for path, x in draws.items()})
        if reference == "mean":
            search.towards_mean()
    elif isinstance(reference, str):
        raise ValueError(f"align: reference must be a tree of parameters, 'best' or 'mean', got {reference!r}.")
    else:
        search.towards(_fixed_reference(reference, groups))
    shaped = lambda x: jnp.asarray(x.reshape(*batch, *x.shape[1:]))
    orders, signs = ({name: shaped(x) for name, x in some.items()} for some in (search.orders, search.signs))
    return Element(orders, signs, groups)


# ---- what comes in --------------------------------------------------------------------------------------------------


def _complete(what: str, tree: Any, groups: UnitGroups) -> tuple[dict[Path, Any], tuple[int, ...]]:
    members, batch = take_members(tree, groups)
    if missing := [path for path, _ in groups.shapes if path not in members]:
        raise ValueError(f"align needs every parameter of the groups; {'/'.join(missing[0])!r} is missing in {what}.")
    return members, batch


def _fixed_reference(reference: Any, groups: UnitGroups) -> dict[Path, np.ndarray]:
    members, batch = _complete("reference", reference, groups)
    if batch:
        raise ValueError(
            f"align: the reference must have no batch axes, got {batch}; take one draw of it, or reference='mean'."
        )
    for path, x in members.items():
        if not np.isfinite(x).all():
            raise ValueError(f"align: the reference is not finite at {'/'.join(path)!r}.")
    return {path: np.asarray(x) for path, x in members.items()}


def _best(reference: str, scores: Any, batch: tuple[int, ...], finite: np.ndarray) -> int:
    """The number of the finite draw with the highest score, the first one if there are no scores."""
    if not finite.any():
        raise ValueError("align: no draw is finite, so none can be the reference.")
    if scores is None:
        if reference == "best":
            raise ValueError(
                "align: reference='best' needs scores, the log posterior of each draw or minus its energy."
            )
        return int(np.argmax(finite))
    if np.shape(scores) != batch:
        raise ValueError(f"align: scores must have the batch axes of params, {batch}, got {np.shape(scores)}.")
    usable = np.flatnonzero(finite & ~np.isnan(np.ravel(scores)))
    if not len(usable):
        raise ValueError("align: no finite draw has a score that is a number.")
    return int(usable[np.argmax(np.ravel(scores)[usable])])
