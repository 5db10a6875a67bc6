# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Stationary covariance functions, and their spectral densities.

.. math::

    k(x, x') = s \, \kappa(r), \qquad r^2 = \sum_d \Bigl(\frac{x_d - x'_d}{\ell_d}\Bigr)^2.

They have what is needed here and libraries of kernels leave out: their spectral density, and points of it, for random
Fourier features.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

_NU = (0.5, 1.5, 2.5)
_FEW = 16  # inputs


def _squared_distances(x: Array, z: Array, lengthscale: Array) -> Array:
    x, z = x / lengthscale, z / lengthscale
    if x.shape[-1] <= _FEW:
        # differences first: no rounding where inputs coincide
        zero = jnp.zeros((len(x), len(z)), x.dtype)
        return sum(((x[:, None, d] - z[:, d]) ** 2 for d in range(x.shape[-1])), zero)
    # about their centre, or rounding would take what is left of a difference of large numbers
    centre = jnp.mean(z, 0)
    x, z = x - centre, z - centre
    products = jnp.matmul(x, z.T, precision="highest")
    return jnp.maximum(jnp.sum(x**2, -1)[:, None] + jnp.sum(z**2, -1) - 2 * products, 0.0)


@partial(jax.tree_util.register_dataclass, data_fields=("variance", "lengthscale"), meta_fields=())
@dataclass(frozen=True)
class RBF:
    r"""The squared exponential, :math:`\kappa(r) = e^{-r^2/2}`.

    :param variance: s.
    :param lengthscale: :math:`\ell`, one number, or one for each input (D,).

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_bdl import gp
        >>> gp.RBF(variance=2.0, lengthscale=0.5)(jnp.zeros((1, 3)), jnp.zeros((2, 3))).tolist()
        [[2.0, 2.0]]
    """

    variance: float | Array = 1.0
    lengthscale: float | Array = 1.0

    def __call__(self, x: Array, z: Array) -> Array:
        """Covariances of (n, D) and (m, D): (n, m)."""
        return self.variance * jnp.exp(-_squared_distances(x, z, jnp.asarray(self.lengthscale)) / 2)

    def frequencies(self, uniform: np.ndarray) -> Array:
        """Points of the spectral density from points of the unit cube, (count, 1 + D): (count, D)."""
        return jnp.asarray(stats.norm.ppf(uniform[:, 1:])) / self.lengthscale

    def log_spectral_density(self, frequencies: Array) -> Array:
        """Up to a constant, of frequencies (count, D): (count,)."""
        return -jnp.sum((frequencies * self.lengthscale) ** 2, -1) / 2


@partial(jax.tree_util.register_dataclass, data_fields=("variance", "lengthscale"), meta_fields=("nu",))
@dataclass(frozen=True)
class Matern:
    r"""The Matérn family, with :math:`\rho = \sqrt{2 \nu}\, r`,

    .. math::

        \kappa_{1/2} = e^{-\rho}, \quad \kappa_{3/2} = (1 + \rho) e^{-\rho}, \quad
        \kappa_{5/2} = (1 + \rho + \rho^2 / 3) e^{-\rho}.

    Its spectral density is a multivariate t with :math:`2 \nu` degrees of freedom.

    :param variance: s.
    :param lengthscale: :math:`\ell`, one number, or one for each input (D,).
    :param nu: :math:`\nu`: 0.5, 1.5 or 2.5.
    :raises ValueError: for another ``nu``.
    """

    variance: float | Array = 1.0
    lengthscale: float | Array = 1.0
    nu: float = 1.5

    def __post_init__(self):
        if self.nu not in _NU:
            raise ValueError(f"Matern: nu must be one of {', '.join(map(str, _NU))}, got {self.nu!r}.")

    def __call__(self, x: Array, z: Array) -> Array:
        """Covariances of (n, D) and (m, D): (n, m)."""
        square = 2 * self.nu * _squared_distances(x, z, jnp.asarray(self.lengthscale))
        # the root has no derivative at 0
        rho = jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square)))
        polynomial = {0.5: 1.0, 1.5: 1 + rho, 2.5: 1 + rho + square / 3}[self.nu]
        return self.variance * polynomial * jnp.exp(-rho)

    def frequencies(self, uniform: np.ndarray) -> Array:
        """Points of the spectral density from points of the unit cube, (count, 1 + D): (count, D)."""
        mixing = stats.chi2.ppf(uniform[:, :1], 2 * self.nu) / (2 * self.nu)
        return jnp.asarray(stats.norm.ppf(uniform[:, 1:]) / np.sqrt(mixing)) / self.lengthscale

    def log_spectral_density(self, frequencies: Array) -> Array:
        """Up to a constant, of frequencies (count, D): (count,)."""
        square = jnp.sum((frequencies * self.lengthscale) ** 2, -1)
        return -(self.nu + frequencies.shape[-1] / 2) * jnp.log1p(square / (2 * self.nu))


Kernel = RBF | Matern
