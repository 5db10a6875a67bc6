# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Flat-basin SGLD (Entropy-MCMC): a position tied to an anchor.

The joint energy of position w and anchor u is

.. math::

    U(w) + \frac{1}{2 \eta} (w - u)^\top P^{-1} (w - u)

so that w alone follows :math:`\exp(-U / T)` whatever :math:`\eta`, and u alone that law smoothed by
:math:`N(0, \eta T P)`. The joint update (``coupling="euler"``) is

.. math::

    w &\leftarrow w - a \bigl(P \nabla \hat U(w) + (w - u) / \eta\bigr) + \sqrt{2 a T P} \, \xi_1 \\
    u &\leftarrow u - a (u - w) / \eta + \sqrt{2 a T P} \, \xi_2

Source: Li and Zhang, *Entropy-MCMC: sampling from flat basins with ease*, ICLR 2024. The prior acts on w alone; on u
too, as in the code of the paper, w would not follow the posterior. The split with the exact Ornstein-Uhlenbeck step
(``coupling="exact"``) is ours.
"""

import math
from collections import namedtuple

import jax
import jax.numpy as jnp
from jax import random

from numpyro_bdl._checks import check_choice, check_integer, check_number
from numpyro_bdl.kernels.base import SGState, StochasticGradientKernel
from numpyro_bdl.noise import normal
from numpyro_bdl.schedules import Cyclical, largest_step

FlatBasinState = namedtuple("FlatBasinState", [*SGState._fields, "z_anchor", "momentum", "momentum_anchor"])
"""The fields of :data:`~numpyro_bdl.kernels.base.SGState` and

 - **z_anchor** - anchor u, like the position.
 - **momentum** - momentum of the position, like it; () without momentum.
 - **momentum_anchor** - momentum of the anchor, likewise.
"""


def euler_step(z, anchor, gradient, noises, size, temperature, diagonal, eta):
    """The joint Euler step of position and anchor, the update of the paper.

    :param z: Position w, a tree of arrays.
    :param anchor: Anchor u, like the position.
    :param gradient: Gradient of the full-data energy at w (or an unbiased estimate), like the position.
    :param noises: Two independent standard normals, like the position.
    :param size: Step size a, a scalar.
    :param temperature: Temperature T, a scalar.
    :param diagonal: Preconditioner P, like the position, of arrays or numbers.
    :param eta: Coupling variance.
    :return: The next position and anchor.
    """

    def move(w, u, g, xi_1, xi_2, p):
        scale = jnp.sqrt(2 * size * temperature * p)
        pull = size * (w - u) / eta
        return w - size * p * g - pull + scale * xi_1, u + pull + scale * xi_2

    return _unzip(jax.tree.map(move, z, anchor, gradient, *noises, diagonal), z)


def exact_step(z, anchor, gradient, noises, size, temperature, diagonal, eta):
    r"""A gradient step of the position, then the coupling solved exactly.

    The difference d = w - u is an Ornstein-Uhlenbeck process of variance :math:`\eta T P`, the mean s = (w + u) / 2 a
    Brownian motion:

    .. math::

        d' = e^{-2 a / \eta} d + \sqrt{\eta T P (1 - e^{-4 a / \eta})} \, \xi_d, \qquad
        s' = s + \sqrt{a T P} \, \xi_s

    with :math:`\xi_s, \xi_d = (\xi_1 \pm \xi_2) / \sqrt 2`. Stable for every :math:`\eta`; as
    :math:`\eta \to \infty` the position moves as in SGLD with noise :math:`\xi_1`.

    The parameters and what is returned are those of :func:`euler_step`.
    """
    decay = jnp.exp(-2 * size / eta)
    variance = -eta * jnp.expm1(-4 * size / eta) * temperature

    def move(w, u, g, xi_1, xi_2, p):
        w = w - size * p * g
        xi_s, xi_d = (xi_1 + xi_2) / math.sqrt(2), (xi_1 - xi_2) / math.sqrt(2)
        d = decay * (w - u) + jnp.sqrt(variance * p) * xi_d
        s = (w + u) / 2 + jnp.sqrt(size * temperature * p) * xi_s
        return s + d / 2, s - d / 2

    return _unzip(jax.tree.map(move, z, anchor, gradient, *noises, diagonal), z)


def gibbs_step(z, anchor, gradient, noises, size, temperature, diagonal, eta, refresh):
    r"""A Langevin step of the position given the anchor, which is first drawn anew from
    :math:`N(w, \eta T P)` if ``refresh`` is true.

    The other parameters and what is returned are those of :func:`euler_step`.
    """

    def move(w, u, g, xi_1, xi_2, p):
        u = jnp.where(refresh, w + jnp.sqrt(eta * temperature * p) * xi_2, u)
        return w - size * (p * g + (w - u) / eta) + jnp.sqrt(2 * size * temperature * p) * xi_1, u

    return _unzip(jax.tree.map(move, z, anchor, gradient, *noises, diagonal), z)


def momentum_step(z, anchor, momenta, gradient, noises, size, temperature, diagonal, eta, friction):
    r"""The joint update with momentum, :math:`v' = (1 - f) v - a \, \partial + \sqrt{2 f a T / P} \xi` and
    :math:`w' = w + P v'` for both variables, with :math:`\partial` the gradient of the joint energy.

    :param momenta: Momenta of position and anchor.
    :param friction: f = 1 - momentum.

    The other parameters are those of :func:`euler_step`.

    :return: The next position, anchor and their momenta.
    """

    def move(w, u, v, q, g, xi_1, xi_2, p):
        scale = jnp.sqrt(2 * friction * size * temperature / p)
        pull = size * (w - u) / eta / p
        v = (1 - friction) * v - size * g - pull + scale * xi_1
        q = (1 - friction) * q + pull + scale * xi_2
        return w + p * v, u + p * q, v, q

    return _unzip(jax.tree.map(move, z, anchor, *momenta, gradient, *noises, diagonal), z)


def _unzip(tuples, like):
    return jax.tree.transpose(jax.tree.structure(like), None, tuples)


_JOINT_STEPS = {"exact": exact_step, "euler": euler_step}


class FlatBasinSGLD(StochasticGradientKernel):
    r"""Flat-basin SGLD (Entropy-MCMC): SGLD beside an anchor that sees the posterior smoothed.

    .. math::

        \pi(w, u) \propto \exp\Bigl(-\frac{1}{T}\Bigl[U(w) + \frac{1}{2\eta} (w - u)^\top P^{-1} (w - u)\Bigr]\Bigr)

    Alone, the position w follows :math:`\exp(-U / T)` exactly, for every :math:`\eta`, and the anchor u follows it
    convolved with :math:`N(0, \eta T P)`: peaks of the anchor's density are lower where the basin is narrow. One
    gradient per step; memory for one more copy of the parameters. The sample field is always the position; moments
    and R-hat are to be had from it alone, the anchor is for prediction.

    Flatness depends on the coordinates: here they are those of unconstrained space, in the metric P.

    :param eta: Coupling variance :math:`\eta > 0` (a variance, not a precision). The anchor lies
        :math:`\sqrt{\eta T d}` from the position, d the number of parameters.
    :param anchor_steps: Instead of ``eta``: how many steps at the largest step size the anchor takes to follow,
        ``eta = largest step * anchor_steps``. Needs a number or :func:`~numpyro_bdl.cyclical` as step size.
    :param coupling: How the coupling is stepped.

        - ``"exact"`` (default): gradient step, then the exact Ornstein-Uhlenbeck step of the coupling. Stable for every
          ``eta``, and SGLD with the same key as ``eta`` grows.
        - ``"euler"``: the joint update of the paper. Along curvature h it needs
          :math:`a < 4 / (h + 2/\eta + \sqrt{h^2 + 4/\eta^2})`, so :math:`a < \eta` even where the energy is flat.
        - ``"gibbs"``: the anchor is drawn anew, exactly, every ``inner_steps`` steps. With one inner step the anchor
          would carry no memory, and the position be plain SGLD with its noise variance inflated by
          :math:`1 + a / (2 \eta)`; therefore at least 5.
    :param inner_steps: Steps between two draws of the anchor (``"gibbs"`` alone). A multiple of it is the natural
        ``steps_per_draw``.
    :param momentum: b in [0, 1), for both variables (``"euler"`` alone).
    :param collect_anchor: Collect the anchor too, as the field ``z_anchor``; then
        :func:`~numpyro_bdl.to_datatree` makes a group ``anchor`` of it and the predictive helpers can use it.

    The other arguments are those of :class:`~numpyro_bdl.kernels.base.StochasticGradientKernel`.

    :raises ValueError: for both or neither of ``eta`` and ``anchor_steps``, for an argument that the coupling has no
        use for, and for a step beyond the stability bound of the coupling.

    **Example**

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(1, 2))
        >>> kernel = bdl.FlatBasinSGLD(model, step_size=0.1, anchor_steps=20, steps_per_draw=20, collect_anchor=True)
        >>> kernel.eta
        2.0
        >>> mcmc = MCMC(kernel, num_warmup=50, num_samples=2000, progress_bar=False)
        >>> mcmc.run(random.key(0))
        >>> position, anchor = mcmc.get_samples()["x"], mcmc.get_extra_fields()["z_anchor"]["x"]
        >>> bool(abs(position.std() - 2) < 0.3), bool(abs(anchor.std() - 6 ** 0.5) < 0.3)
        (True, True)

    **References:** Li and Zhang, *Entropy-MCMC: sampling from flat basins with ease*, ICLR 2024.
    """

    State = FlatBasinState

    def __init__(
        self,
        model,
        *,
        eta: float | None = None,
        anchor_steps: float | None = None,
        coupling: str = "exact",
        inner_steps: int | None = None,
        momentum: float = 0.0,
        collect_anchor: bool = False,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        owner = "FlatBasinSGLD"
        check_choice(owner, "coupling", coupling, (*_JOINT_STEPS, "gibbs"))
        check_number(owner, "momentum", momentum, high=1, closed=True)
        if momentum and coupling != "euler":
            raise ValueError(f'{owner}: momentum={momentum} goes with coupling="euler" alone, got {coupling!r}.')
        if inner_steps is not None and coupling != "gibbs":
            raise ValueError(f'{owner}: inner_steps={inner_steps} goes with coupling="gibbs" alone, got {coupling!r}.')
        self._inner_steps = 5 if inner_steps is None else inner_steps
        check_integer(owner, "inner_steps", self._inner_steps)
        if self._inner_steps < 5:
            raise ValueError(
                f"{owner}: inner_steps={inner_steps} is too few. With one step between draws of the anchor the position"
                " is plain SGLD with its noise variance inflated by 1 + a / (2 eta): the anchor has no memory and can't"
                " guide. Take at least 5."
            )
        self.eta = self._coupling_variance(eta, anchor_steps)
        self._coupling = coupling
        self._momentum = momentum
        self._collect_anchor = bool(collect_anchor)
        self.parameter_fields = ("z_anchor", *(("momentum", "momentum_anchor") if momentum else ()))
        if coupling != "exact":
            self._check_stability()

    def _coupling_variance(self, eta, anchor_steps) -> float:
        if (eta is None) == (anchor_steps is None):
            raise ValueError(
                f"FlatBasinSGLD: give one of eta and anchor_steps, got eta={eta!r} and anchor_steps={anchor_steps!r}."
            )
        if eta is not None:
            check_number("FlatBasinSGLD", "eta", eta)
            return float(eta)
        check_number("FlatBasinSGLD", "anchor_steps", anchor_steps)
        if not isinstance(self._schedule, Cyclical) and callable(self._schedule.step_size):
            raise ValueError(
                "FlatBasinSGLD: anchor_steps counts steps at the largest step size, which a schedule does not tell;"
                " give eta, or a number or cyclical(...) as step_size."
            )
        return largest_step(self._schedule) * anchor_steps

    def _check_stability(self) -> None:
        largest = largest_step(self._schedule)
        bound = 2 * self.eta if self._coupling == "gibbs" else self.eta * (1 + self._momentum)
        if largest >= bound:
            raise ValueError(
                f"FlatBasinSGLD: with coupling={self._coupling!r} the largest step, {largest:g}, must stay below"
                f" {bound:g} (eta = {self.eta:g}), or the coupling can diverge"
                + (
                    ". Along curvature h the joint update needs a < 2 / lmax, lmax = (h + 2/eta + sqrt(h^2 + 4/eta^2))"
                    " / 2 (times 1 + momentum)"
                    if self._coupling == "euler"
                    else ""
                )
                + '. Take a smaller step, a larger eta, or coupling="exact", which is stable for every eta.'
            )

    @property
    def default_fields(self):
        """The state fields that MCMC collects."""
        return super().default_fields + (("z_anchor",) if self._collect_anchor else ())

    def _init_fields(self, rng_key, z, warmup_steps):
        still = jax.tree.map(jnp.zeros_like, z) if self._momentum else ()
        return {"z_anchor": z, "momentum": still, "momentum_anchor": still}

    def _update(self, state, gradient, step):
        # the first noise is that of SGLD with the same key
        noises = normal(step.key, state.z), normal(random.fold_in(step.key, len(state.z)), state.z)
        shared = gradient, noises, step.size, step.temperature, step.diagonal, self.eta
        if self._momentum:
            momenta = state.momentum, state.momentum_anchor
            moved = momentum_step(state.z, state.z_anchor, momenta, *shared, 1 - self._momentum)
            return dict(zip(("z", "z_anchor", "momentum", "momentum_anchor"), moved, strict=True))
        if self._coupling == "gibbs":
            z, z_anchor = gibbs_step(state.z, state.z_anchor, *shared, step.i % self._inner_steps == 0)
        else:
            z, z_anchor = _JOINT_STEPS[self._coupling](state.z, state.z_anchor, *shared)
        return {"z": z, "z_anchor": z_anchor}
