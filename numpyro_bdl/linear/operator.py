# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""A linear model given by the products of its operator: :math:`y = \Phi w + \epsilon` with normal noise."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random
from jax.flatten_util import ravel_pytree

from numpyro_bdl.linear.likelihoods import Family, family_of
from numpyro_bdl.linear.model import LinearModel, Observed, Weights
from numpyro_bdl.noise import normal

SITE = "y"


@partial(jax.tree_util.register_dataclass, data_fields=("features",), meta_fields=())
@dataclass(frozen=True)
class Features:
    """An operator that is an array, (row, weight)."""

    features: Array
    transpose = None

    def product(self, weights: Weights, rows: Array) -> Array:
        (w,) = weights.values()
        return self.features[rows] @ w


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("function", "transposed", "structure"))
@dataclass(frozen=True)
class Products:
    """An operator that is given by functions of pytrees of weights."""

    function: Callable[[Any, Array], Array]
    r"""``(w, rows)``, to :math:`\Phi_S w`"""
    transposed: Callable[[Array, Array], Any] | None
    r"""``(u, rows)``, to :math:`\Phi_S^\top u`; None for what JAX makes of the product"""
    structure: jax.tree_util.PyTreeDef

    def product(self, weights: Weights, rows: Array) -> Array:
        return self.function(as_tree(weights, self.structure), rows)

    @property
    def transpose(self) -> Callable[[Array, Array], Weights] | None:
        transposed = self.transposed
        return None if transposed is None else lambda u, rows: as_weights(transposed(u, rows))


def as_weights(tree: Any) -> Weights:
    """The leaves of a pytree by their numbers."""
    return {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(tree))}


def as_tree(weights: Weights, structure: jax.tree_util.PyTreeDef) -> Any:
    """A pytree of leaves by their numbers."""
    return jax.tree.unflatten(structure, [weights[str(n)] for n in range(structure.num_leaves)])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("weights", "key", "curved_at", "operator", "y", "noise"),
    meta_fields=("size", "sample_chunk"),
)
@dataclass(frozen=True, kw_only=True)
class OperatorModel(LinearModel):
    """Rows of an operator, and what was observed of them."""

    operator: Features | Products
    y: Array
    """(row, ...)"""
    noise: Array
    """standard deviations, of the shape of y"""

    def observe(self, weights: Weights, rows: Array):
        law = dist.Normal(self.operator.product(weights, rows), self.noise[rows])
        observed = Observed(law, self.y[rows], self.size / len(rows))
        return {SITE: law.loc}, {SITE: observed}, {SITE: 0}

    def family(self, name: str, law: dist.Distribution) -> Family:
        return family_of(name, law, ("loc",))

    def linearize(self, rows: Array):
        """With the transpose that was given, if one was."""
        eta, push, pull, *rest = super().linearize(rows)
        transpose = self.operator.transpose
        return eta, push, pull if transpose is None else lambda u: transpose(u[SITE], rows), *rest


def check_operator(model: OperatorModel, key: Array) -> None:
    r"""Compare :math:`\Phi (2 a + b)` with :math:`2 \Phi a + \Phi b`, and :math:`\langle u, \Phi a \rangle` with
    :math:`\langle \Phi^\top u, a \rangle`, at random vectors.

    :raises ValueError: if the product is not linear, gives other shapes than those of y, or numbers that are not
        finite; or if the transpose does not match it.
    """
    rows = jnp.arange(min(model.size, 64))
    a, b = (normal(k, model.weights) for k in random.split(key))
    try:
        shape = jax.eval_shape(model.operator.product, a, rows).shape
    except Exception as error:
        raise ValueError(
            f"operator: its product with weights of the given shapes, for {len(rows)} rows, raised"
            f" {type(error).__name__}: {error}"
        ) from error
    if shape != (len(rows), *model.y.shape[1:]):
        raise ValueError(
            f"operator: its product for {len(rows)} rows has the shape {shape}, but y has"
            f" {(len(rows), *model.y.shape[1:])} there."
        )
    product = model.operator.product
    of_a, of_b = product(a, rows), product(b, rows)
    both = product(jax.tree.map(lambda a, b: 2 * a + b, a, b), rows)
    if not bool(jnp.all(jnp.isfinite(both))):
        raise ValueError("operator: its product with finite weights has numbers that are not finite.")
    tolerance = 1e3 * float(jnp.finfo(both.dtype).eps)
    size = float(jnp.linalg.norm(of_a) + jnp.linalg.norm(of_b))
    if float(jnp.linalg.norm(both - 2 * of_a - of_b)) > tolerance * size:
        raise ValueError(
            "operator: it is not linear: its product with 2 a + b is not twice that with a, and that with b. Is there"
            " a constant in it? Subtract that from y."
        )
    transpose = model.operator.transpose
    if transpose is None:
        return
    u = random.normal(random.fold_in(key, 2), of_a.shape, of_a.dtype)
    back = transpose(u, rows)
    shapes, expected = ([jnp.shape(leaf) for leaf in tree.values()] for tree in (back, model.weights))
    if shapes != expected:
        raise ValueError(f"transpose: it gives the shapes {shapes}, but the weights have {expected}.")
    left = float(jnp.vdot(u, of_a))
    right = float(jnp.vdot(ravel_pytree(back)[0], ravel_pytree(a)[0]))
    scale = float(jnp.linalg.norm(u) * jnp.linalg.norm(of_a))
    if not abs(left - right) <= tolerance * scale:
        raise ValueError(
            "transpose: it does not match the product: for a random u and a, <u, Phi a> is"
            f" {left:.6g}, but <Phi' u, a> is {right:.6g}."
        )
