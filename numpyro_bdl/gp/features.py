# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Draws of functions from a Gaussian process, by random Fourier features,

.. math::

    f(x) = \sqrt{\frac{s}{M}} \sum_{m=1}^M \bigl( a_m \cos \omega_m^\top x + b_m \sin \omega_m^\top x \bigr),
    \qquad a_m, b_m \sim N(0, 1),

with :math:`\omega_m` from the spectral density of the kernel. Its variance is s everywhere. Covariances have an error
of the order :math:`s / \sqrt M` for independent frequencies, which is much where a posterior has little variance left;
with those of a scrambled Sobol sequence it is smaller, the fewer the inputs the more.

**References:** Rahimi and Recht, *Random features for large-scale kernel machines*, NeurIPS 2007; Yang et al.,
*Quasi-Monte Carlo feature maps for shift-invariant kernels*, ICML 2014.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, random
from scipy.stats import qmc

from numpyro_bdl.gp.kernels import Kernel


class FourierFeatures(NamedTuple):
    """Features of a kernel."""

    frequencies: Array
    """(M, D)"""
    variance: Array

    def __call__(self, x: Array) -> Array:
        """Features of inputs (n, D): (n, 2 M)."""
        angles = x @ self.frequencies.T
        scale = jnp.sqrt(self.variance / len(self.frequencies))
        return scale * jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class PriorDraws(NamedTuple):
    """Functions drawn from the prior."""

    features: FourierFeatures
    weights: Array
    """(2 M, sample)"""

    def __call__(self, x: Array) -> Array:
        """Values at inputs (n, D): (n, sample)."""
        return self.features(x) @ self.weights


def draw_prior(key: Array, kernel: Kernel, inputs: int, num_samples: int, num_features: int) -> PriorDraws:
    """Independent functions that share their frequencies.

    :param inputs: D.
    :param num_features: 2 M, rounded up to an even number.
    """
    of_frequencies, of_weights = random.split(key)
    count = -(-num_features // 2)
    seed = np.asarray(random.bits(of_frequencies, (4,), "uint32"))
    power = (count - 1).bit_length()
    points = qmc.Sobol(inputs + 1, rng=np.random.default_rng(seed)).random_base2(power)[:count]
    tiny = np.finfo(np.float32).eps
    features = FourierFeatures(kernel.frequencies(np.clip(points, tiny, 1 - tiny)), jnp.asarray(kernel.variance))
    return PriorDraws(features, random.normal(of_weights, (2 * count, num_samples)))
