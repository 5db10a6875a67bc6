# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Draws of functions from a Gaussian process, by random Fourier features,

.. math::

    f(x) = \sum_{m=1}^M \sqrt{s w_m} \bigl( a_m \cos \omega_m^\top x + b_m \sin \omega_m^\top x \bigr),
    \qquad a_m, b_m \sim N(0, 1), \quad \sum_m w_m = 1.

A posterior has little variance where it has data, and what it has is in frequencies that the data do not resolve:
frequencies drawn from the spectral density p of the kernel are rare there, and the samples of a posterior of little
noise would be far too certain. Therefore half of them are drawn from wider densities, with weights that correct for it,

.. math::

    q(\omega) = \tfrac12 p(\omega) + \tfrac14 4^{-D} p(\omega / 4) + \tfrac14 16^{-D} p(\omega / 16),
    \qquad w_m \propto p(\omega_m) / q(\omega_m) \le 2,

by points of a scrambled Sobol sequence. The variance of f is s everywhere. With eight inputs or more all are from p: so
many inputs leave no variance between their rows that p would miss, and the weights would only cost features.

**References:** Rahimi and Recht, *Random features for large-scale kernel machines*, NeurIPS 2007; Yang et al.,
*Quasi-Monte Carlo feature maps for shift-invariant kernels*, ICML 2014; Hesterberg, *Weighted average importance
sampling and defensive mixture distributions*, Technometrics 1995.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from scipy.stats import qmc

from numpyro_bdl.gp.kernels import Kernel

_SCALES = np.array([1.0, 4.0, 16.0])  # of the frequencies
_SHARES = np.array([0.5, 0.25, 0.25])
_MANY_INPUTS = 8


class FourierFeatures(NamedTuple):
    """Features of a kernel."""

    frequencies: Array
    """(M, D)"""
    variances: Array
    """s w, (M,)"""

    def __call__(self, x: Array) -> Array:
        """Features of inputs (n, D): (n, 2 M)."""
        angles = jnp.matmul(x, self.frequencies.T, precision="highest")
        scale = jnp.sqrt(self.variances)
        return jnp.concatenate([scale * jnp.cos(angles), scale * jnp.sin(angles)], -1)


class PriorDraws(NamedTuple):
    """Functions drawn from the prior."""

    features: FourierFeatures
    weights: Array
    """(2 M, sample)"""

    def __call__(self, x: Array) -> Array:
        """Values at inputs (n, D): (n, sample)."""
        return jnp.matmul(self.features(x), self.weights, precision="highest")


def draw_prior(key: Array, kernel: Kernel, inputs: int, num_samples: int, num_features: int) -> PriorDraws:
    """Independent functions that share their frequencies.

    :param inputs: D.
    :param num_features: 2 M, rounded up to an even number.
    """
    of_frequencies, of_weights = random.split(key)
    count = -(-num_features // 2)
    features = draw_features(of_frequencies, kernel, inputs, count)
    return PriorDraws(features, random.normal(of_weights, (2 * count, num_samples)))


def draw_features(key: Array, kernel: Kernel, inputs: int, count: int) -> FourierFeatures:
    """M frequencies and their weights."""
    seed = np.asarray(random.bits(key, (4,), "uint32"))
    power = (count - 1).bit_length()
    points = qmc.Sobol(inputs + 2, rng=np.random.default_rng(seed)).random_base2(power)[:count]
    tiny = np.finfo(np.float32).eps
    shares = _SHARES if inputs < _MANY_INPUTS else np.array([1.0, 0.0, 0.0])
    scale = _SCALES[np.searchsorted(np.cumsum(shares)[:-1], points[:, 0], side="right")]
    frequencies = kernel.frequencies(np.clip(points[:, 1:], tiny, 1 - tiny)) * scale[:, None]
    logs = jnp.stack([kernel.log_spectral_density(frequencies / c) - inputs * np.log(c) for c in _SCALES])
    of_mixture = jax.nn.logsumexp(logs, 0, b=shares[:, None])
    return FourierFeatures(frequencies, kernel.variance * jax.nn.softmax(logs[0] - of_mixture))
