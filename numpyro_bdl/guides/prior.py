# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""The prior of the linear model, :math:`w \sim N(m_0, A^{-1})` with A diagonal, in groups that share a precision.

In group g, :math:`A = \alpha_g D` with D fixed: the identity, or for the g-prior the diagonal of
:math:`M = J^\top \Lambda J`, which gives every feature of the linear model the same size.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from numpyro_bdl.linear.model import Batch, Weights
from numpyro_bdl.linear.system import System

_LEAST = 1e-6  # of the mean of a site, for entries of the diagonal of M that are next to nothing
_PROBES = 4096  # probes of the diagonal in all, where there are fewer rows


class Prior(NamedTuple):
    """The precisions of all weights."""

    unit: Weights
    """D, by site"""
    groups: dict[str, tuple[str, ...]]
    """sites of each group"""
    alpha: dict[str, Array]
    """the precision of each group"""

    @property
    def scale(self) -> Weights:
        r"""Standard deviations, :math:`A^{-1/2}`, by site."""
        return {
            name: 1 / jnp.sqrt(self.alpha[group] * self.unit[name])
            for group, names in self.groups.items()
            for name in names
        }


@partial(jax.jit, static_argnums=1)
def diagonal(system: System, samples: int) -> Weights:
    r"""The diagonal of :math:`M = J^\top \Lambda J`, row by row.

    For row i with the outputs of all its sites it is the sum of :math:`(J_i^\top L_i e)^2` over unit vectors e; where
    rows are many, the mean over a few random e, of the row's own key.

    :param samples: Vectors of weights that may be held at once.
    """
    model = system.model
    probes = -(-_PROBES // model.size)

    def of_row(row):
        # observations outside of the plate are met in every row: a share of each square
        batch = model.at(Batch(row[None], jnp.ones(1), model.size**-0.5 * jnp.ones(())))
        noise = jax.eval_shape(lambda: batch.noise(1))
        outputs = sum(e.size for e in noise.values())
        if outputs <= probes:
            _, unravel = ravel_pytree({name: jnp.zeros(e.shape[1:], e.dtype) for name, e in noise.items()})
            eps, share = jax.vmap(unravel)(jnp.eye(outputs, dtype=jnp.result_type(*noise.values()))), 1.0
        else:
            eps, share = batch.noise(probes), 1 / probes

        def add(total, e):
            gradient = batch.vjp(batch.factor(e))
            return jax.tree.map(lambda t, g: t + share * g**2, total, gradient), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, model.weights), eps)[0]

    count = min(samples, model.size)
    padded = -(-model.size // count) * count
    rows = jnp.arange(padded)

    def block(total, rows):
        found = jax.vmap(of_row)(jnp.minimum(rows, model.size - 1))
        keep = rows < model.size
        return jax.tree.map(lambda t, d: t + jnp.tensordot(keep.astype(d.dtype), d, 1), total, found), None

    return lax.scan(block, jax.tree.map(jnp.zeros_like, model.weights), rows.reshape(-1, count))[0]


def clip(found: Weights) -> tuple[Weights, int]:
    """The diagonal of M without entries that are next to nothing, and how many there were."""
    least = {name: _LEAST * jnp.mean(d) for name, d in found.items()}
    anything = _LEAST * jnp.mean(jnp.stack([jnp.mean(d) for d in found.values()]))
    least = {name: jnp.where(x > 0, x, anything) for name, x in least.items()}
    count = sum(int(jnp.sum(found[name] < least[name])) for name in found)
    return {name: jnp.maximum(found[name], least[name]) for name in found}, count
