# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Diagonal preconditioners: the metric in which a kernel takes its steps.

A preconditioner is a positive diagonal :math:`P`, one number for each coordinate of the position. It adapts
during warm-up and is frozen for sampling: a :math:`P` that went on adapting would need the drift
:math:`\Gamma_i(w) = \sum_j \partial P_{ij} / \partial w_j`, and without it sample another law.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from numpyro_bdl._checks import check_number
from numpyro_bdl.noise import normal


class Preconditioner(Protocol):
    """Three pure functions, as an optax transformation has two."""

    adapts: ClassVar[bool]
    """Whether :meth:`update` is called, once in each step of warm-up."""

    def init(self, z: PyTree) -> Any:
        """Position to state."""

    def update(self, state: Any, gradient: PyTree, key: Array) -> Any:
        """State, gradient and key of the step's noise, ``normal(key, z)``, to the next state."""

    def diagonal(self, state: Any, z: PyTree) -> PyTree:
        """State and position to P: a tree like the position, of positive arrays or of the number 1."""


@dataclass(frozen=True)
class _Identity:
    adapts: ClassVar[bool] = False

    def init(self, z):
        return ()

    def update(self, state, gradient, key):
        return state

    def diagonal(self, state, z):
        return jax.tree.map(lambda _: 1.0, z)


def identity() -> Preconditioner:
    """No preconditioning, P = 1."""
    return _Identity()


@dataclass(frozen=True)
class _Fixed:
    values: PyTree
    adapts: ClassVar[bool] = False

    def init(self, z):
        if jax.tree.structure(self.values) != jax.tree.structure(z):
            raise ValueError(
                f"preconditioners.fixed: expected a tree like the position, {jax.tree.structure(z)},"
                f" got {jax.tree.structure(self.values)}."
            )
        return jax.tree_util.tree_map_with_path(self._broadcast, z, self.values)

    @staticmethod
    def _broadcast(path, w, p):
        axes = zip(reversed(np.shape(p)), reversed(w.shape), strict=False)
        if np.ndim(p) > w.ndim or any(n not in (1, m) for n, m in axes):
            raise ValueError(
                f"preconditioners.fixed: {jax.tree_util.keystr(path)} must have the shape of the site in unconstrained"
                f" space, {w.shape}, or one that broadcasts to it; got {np.shape(p)}."
            )
        return jnp.broadcast_to(jnp.asarray(p, w.dtype), w.shape)

    def update(self, state, gradient, key):
        return state

    def diagonal(self, state, z):
        return state


def fixed(diagonal: PyTree) -> Preconditioner:
    """A diagonal that the user gives.

    :param diagonal: A tree like the position in unconstrained space ({site: array}), each leaf of the site's
        shape or broadcastable to it, positive and finite.
    :raises ValueError: if an entry is not positive and finite; at init, if sites or shapes are not those of the model.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(diagonal):
        if not np.all(np.isfinite(leaf) & (np.asarray(leaf) > 0)):
            raise ValueError(
                f"preconditioners.fixed: every entry must be positive and finite; {jax.tree_util.keystr(path)} is not."
            )
    return _Fixed(diagonal)


class RMSState(NamedTuple):
    """State of :func:`rms`."""

    second_moment: PyTree
    """running mean of the squared gradient, like the position"""
    diagonal: PyTree
    """P, like the position"""


@dataclass(frozen=True)
class _RMS:
    decay: float
    damping: float
    adapts: ClassVar[bool] = True

    def init(self, z):
        ones = jax.tree.map(jnp.ones_like, z)
        return RMSState(jax.tree.map(jnp.zeros_like, z), ones)

    def update(self, state, gradient, key):
        second_moment = jax.tree.map(
            lambda v, g: self.decay * v + (1 - self.decay) * g**2, state.second_moment, gradient
        )
        s = jax.tree.map(jnp.sqrt, second_moment)
        leaves = jax.tree.leaves(s)
        mean = sum(jnp.sum(leaf) for leaf in leaves) / sum(leaf.size for leaf in leaves)
        diagonal = jax.tree.map(
            lambda si: jnp.where(mean > 0, (1 + self.damping) * mean / (si + self.damping * mean), 1.0), s
        )
        return RMSState(second_moment, diagonal)

    def diagonal(self, state, z):
        return state.diagonal


def rms(decay: float = 0.99, damping: float = 0.1) -> Preconditioner:
    r"""The inverse root mean square of the gradient, seen in warm-up.

    .. math::

        P_i = (1 + \delta) \frac{\bar s}{s_i + \delta \bar s}, \qquad
        s_i = \sqrt{\mathbb{E}\, g_i^2}, \quad \bar s = \operatorname{mean}_i s_i

    The mean square is an exponential moving average over the steps of warm-up. Measured
    against the mean :math:`\bar s` over all coordinates, :math:`P` has no unit: it is 1 for a coordinate with an
    average gradient and at most :math:`(1 + \delta) / \delta`, so the step size keeps its meaning when the
    preconditioner is put in.

    :param decay: Decay of the moving average, in (0, 1).
    :param damping: :math:`\delta > 0`; large values tend to the identity.
    :raises ValueError: if an argument is out of range.

    **References:** Li et al., *Preconditioned stochastic gradient Langevin dynamics for deep neural networks*,
    AAAI 2016. There the average never stops and its drift :math:`\Gamma` is left out, which changes the law.
    """
    check_number("preconditioners.rms", "decay", decay, high=1)
    check_number("preconditioners.rms", "damping", damping)
    return _RMS(decay, damping)


class MirrorState(NamedTuple):
    """State of :func:`mirror`."""

    dual: PyTree
    """rho = logit P, like the position"""
    noise: PyTree
    """standard normal noise of the last step, like the position"""


@dataclass(frozen=True)
class _Mirror:
    rate: float
    spread: float
    adapts: ClassVar[bool] = True

    def init(self, z):
        zeros = jax.tree.map(jnp.zeros_like, z)
        return MirrorState(zeros, zeros)

    def update(self, state, gradient, key):
        dual = jax.tree.map(
            lambda rho, xi, g: rho - self.rate * (self.spread * xi * g - 1 / jax.nn.sigmoid(rho)),
            state.dual,
            state.noise,
            gradient,
        )
        return MirrorState(dual, normal(key, gradient))

    def diagonal(self, state, z):
        return jax.tree.map(jax.nn.sigmoid, state.dual)


def mirror(rate: float = 1e-3, spread: float = 1e-3) -> Preconditioner:
    r"""Mirror descent on P in (0, 1), as in the adaptive variational algorithm of Ke and Fan.

    .. math::

        \rho \leftarrow \rho - r \Bigl( s \, \xi \, g - \frac{1}{P} \Bigr), \qquad P = \operatorname{sigmoid}(\rho)

    with :math:`\xi` the noise of the step before and g the gradient of the full-data energy. It starts at P = 1/2.
    If the position is spread by :math:`s P \xi`, the mean of :math:`\xi g` is s P times the curvature h, and the
    fixed point is the inverse root of the curvature, :math:`P = 1 / (s \sqrt h)`, or 1 if that is larger. (A kernel
    spreads it by its own noise, so that in a run this holds in its trend alone.)

    With the rates of the paper's code that fixed point is never reached: the term 1 / P dominates, and
    :math:`P_t = 1 - e^{-r t} / 2` for every coordinate, whatever the data. In its symbols (step l on the mean loss, N
    rows, scale T) r is eta / N and s is :math:`T l^{3/4}`. Prefer :func:`rms`.

    :param rate: r, the step of the dual variable.
    :param spread: s, the standard deviation of the position for P = 1, in units of the weights.
    :raises ValueError: if an argument is not positive.

    **References:** Ke and Fan, *On the optimization and pruning for Bayesian deep learning*, 2022 (arXiv 2210.12957);
    the equation is that of its published code.
    """
    check_number("preconditioners.mirror", "rate", rate)
    check_number("preconditioners.mirror", "spread", spread)
    return _Mirror(rate, spread)
