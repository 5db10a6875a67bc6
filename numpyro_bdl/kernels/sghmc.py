# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Stochastic gradient Hamiltonian Monte Carlo with persistent momentum.

.. math::

    v &\leftarrow b v - a \nabla \hat U(w) + \sqrt{2 (1 - b) a T / P - a^2 \hat V} \, \xi \\
    w &\leftarrow w + P v

Source: Chen, Fox and Guestrin, *Stochastic gradient Hamiltonian Monte Carlo*, ICML 2014, equation (15), with
:math:`b = 1 - \alpha` and :math:`a = \eta`, and a constant diagonal metric P.
"""

from collections import namedtuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_bdl._checks import check_number
from numpyro_bdl.kernels.base import SGState, StochasticGradientKernel, like
from numpyro_bdl.noise import normal

SGHMCState = namedtuple("SGHMCState", [*SGState._fields, "momentum", "gradient_noise", "excess_noise"])
"""The fields of :data:`~numpyro_bdl.kernels.base.SGState` and

 - **momentum** - v, like the position.
 - **gradient_noise** - variance of the minibatch gradient, like the position, if it is corrected for; else ().
 - **excess_noise** - share of coordinates whose minibatch noise exceeds the noise to be injected, so that the
   correction falls short there.
"""


def sghmc_step(z, momentum, gradient, noise, size, temperature, diagonal, friction, gradient_noise=None):
    r"""One step of SGHMC: :math:`v' = b v - a g + \sqrt{2 (1 - b) a T / P - a^2 V} \xi`, :math:`w' = w + P v'`.

    :param z: Position w, a tree of arrays.
    :param momentum: Momentum v, like the position, in units of a step.
    :param gradient: Gradient g of the full-data energy (or an unbiased estimate), like the position.
    :param noise: Standard normal :math:`\xi`, like the position.
    :param size: Step size a, a scalar.
    :param temperature: Temperature T, a scalar.
    :param diagonal: Preconditioner P, like the position, of arrays or numbers.
    :param friction: 1 - b, in (0, 1].
    :param gradient_noise: Variance V of the gradient, like the position; None for 0.
    :return: The next position and momentum.
    """

    def next_momentum(v, g, xi, p, variance):
        injected = 2 * friction * size * temperature / p
        return (1 - friction) * v - size * g + jnp.sqrt(jnp.maximum(injected - size**2 * variance, 0)) * xi

    if gradient_noise is None:
        gradient_noise = jax.tree.map(lambda _: 0.0, z)
    momentum = jax.tree.map(next_momentum, momentum, gradient, noise, diagonal, gradient_noise)
    return jax.tree.map(lambda w, p, v: w + p * v, z, diagonal, momentum), momentum


class SGHMC(StochasticGradientKernel):
    r"""Stochastic gradient Hamiltonian Monte Carlo: SGD with momentum, and the noise that makes it a sampler.

    .. math::

        v \leftarrow b v - a \nabla \hat U(w) + \sqrt{2 (1 - b) a T / P} \, \xi, \qquad w \leftarrow w + P v

    The momentum is never refreshed. Along a direction of curvature h the variance of the draws is that of the target
    times :math:`1 / (1 - a p h / (2 (1 + b)))`, and the chain is stable for :math:`a p h < 2 (1 + b)`. At
    ``momentum=0`` this is :class:`SGLD`. In the time of SGLD a step is worth :math:`a / (1 - b)`.

    :param momentum: b in [0, 1).
    :param noise_correction: Estimate the variance :math:`\hat V` of the minibatch gradient during warm-up, from pairs
        of minibatches (so a step of warm-up takes two gradients), and inject :math:`a^2 \hat V` less noise. Where
        that is more than all the noise, nothing is injected, and the state field ``excess_noise`` says for which share
        of the coordinates. Needs ``minibatch="independent"``.

    The other arguments are those of :class:`~numpyro_bdl.kernels.base.StochasticGradientKernel`.

    :raises ValueError: if ``momentum`` lies outside [0, 1), or the correction is asked for other minibatches.

    **Example**

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(1, 2))
        >>> kernel = bdl.SGHMC(model, step_size=0.05, momentum=0.9, steps_per_draw=20)
        >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=2000, progress_bar=False)
        >>> mcmc.run(random.key(0))
        >>> bool(abs(mcmc.get_samples()["x"].std() - 2) < 0.3)
        True

    **References:** Chen, Fox and Guestrin, *Stochastic gradient Hamiltonian Monte Carlo*, ICML 2014.
    """

    State = SGHMCState

    def __init__(self, model, *, momentum: float = 0.9, noise_correction: bool = False, **kwargs):
        super().__init__(model, **kwargs)
        check_number("SGHMC", "momentum", momentum, high=1, closed=True)
        if noise_correction and self._minibatch != "independent":
            raise ValueError(
                'SGHMC: noise_correction=True needs minibatch="independent", whose noise is white;'
                f" got minibatch={self._minibatch!r}."
            )
        self._friction = 1 - momentum
        self._noise_correction = bool(noise_correction)
        self.magnitude_fields = ("gradient_noise",) if noise_correction else ()
        self.parameter_fields = ("momentum", *self.magnitude_fields)

    @property
    def default_fields(self):
        """The state fields that MCMC collects."""
        return super().default_fields + (("excess_noise",) if self._noise_correction else ())

    def _init_fields(self, rng_key, z, warmup_steps):
        zeros = jax.tree.map(jnp.zeros_like, z)
        noise = zeros if self._noise_correction else ()
        return {"momentum": zeros, "gradient_noise": noise, "excess_noise": jnp.zeros((), self._dtype)}

    def _update(self, state, gradient, step):
        variance = self._variance(state, gradient, step) if self._noise_correction else None
        z, momentum = sghmc_step(
            state.z,
            state.momentum,
            gradient,
            normal(step.key, state.z),
            step.size,
            step.temperature,
            step.diagonal,
            self._friction,
            variance,
        )
        fields = {"z": z, "momentum": momentum}
        if self._noise_correction:
            fields |= {"gradient_noise": variance, "excess_noise": self._excess(variance, step)}
        return fields

    def _variance(self, state, gradient, step):
        """Half the mean squared difference of two minibatch gradients, averaged over warm-up and then kept."""

        def average():
            weight = jnp.maximum(1 / (step.i + 1), 0.01).astype(self._dtype)
            variance = jax.tree.map(
                lambda v, g, other: v + weight * ((g - other) ** 2 / 2 - v),
                state.gradient_noise,
                gradient,
                step.another_gradient(state.z),
            )
            return like(variance, state.gradient_noise)

        return lax.cond(step.i < step.warmup_steps, average, lambda: state.gradient_noise)

    def _excess(self, variance, step):
        injected = 2 * self._friction * step.size * step.temperature
        exceeds = jax.tree.map(lambda v, p: step.size**2 * v > injected / p, variance, step.diagonal)
        leaves = jax.tree.leaves(exceeds)
        return (sum(jnp.sum(e) for e in leaves) / sum(e.size for e in leaves)).astype(self._dtype)
