# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""SGLD with the gradient at a perturbed point (fSGLD), a baseline for :class:`FlatBasinSGLD`.

.. math::

    w \leftarrow w - a P \nabla \hat U(w + \sigma \epsilon) + \sqrt{2 a T P} \, \xi, \qquad
    \epsilon, \xi \sim N(0, I)

Source: *Flatness-aware SGLD*, arXiv 2510.02174. The drift is on average that of the smoothed energy
:math:`\mathbb{E}_\epsilon U(w + \sigma \epsilon)`, which is therefore what the draws follow, not U.
"""

import jax
from jax import random

from numpyro_bdl._checks import check_number
from numpyro_bdl.kernels.base import SGState, StochasticGradientKernel
from numpyro_bdl.kernels.sgld import sgld_step
from numpyro_bdl.noise import normal


class PerturbedSGLD(StochasticGradientKernel):
    r"""SGLD with its gradient taken at a randomly perturbed point (fSGLD).

    .. math::

        w \leftarrow w - a P \nabla \hat U(w + \sigma \epsilon) + \sqrt{2 a T P} \, \xi

    As :math:`a \to 0` the draws follow :math:`\exp(-\mathbb{E}_\epsilon U(w + \sigma \epsilon) / T)`. For a quadratic
    energy of curvature h that is the target itself; at a fixed step the perturbation adds gradient noise of variance
    :math:`\sigma^2 h^2`. A baseline: it costs no memory and one gradient per step.

    :param sigma: Standard deviation of the perturbation.

    The other arguments are those of :class:`~numpyro_bdl.kernels.base.StochasticGradientKernel`.

    :raises ValueError: if ``sigma`` is not positive.

    **References:** *Flatness-aware SGLD* (fSGLD), arXiv 2510.02174.
    """

    State = SGState

    def __init__(self, model, *, sigma: float, **kwargs):
        super().__init__(model, **kwargs)
        check_number("PerturbedSGLD", "sigma", sigma)
        self._sigma = sigma

    def _gradient_point(self, state, key):
        epsilon = normal(random.fold_in(key, len(state.z)), state.z)
        return jax.tree.map(lambda w, e: w + self._sigma * e, state.z, epsilon)

    def _update(self, state, gradient, step):
        noise = normal(step.key, state.z)
        return {"z": sgld_step(state.z, gradient, noise, step.size, step.temperature, step.diagonal)}
