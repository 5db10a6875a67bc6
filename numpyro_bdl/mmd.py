# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""The maximum mean discrepancy between an ensemble and the prior.

For a symmetric kernel k, an ensemble Q and the prior P,

.. math::

    \mathrm{MMD}^2(Q, P) = E_{QQ} k - 2 E_{QP} k + E_{PP} k, \qquad
    \tfrac12 \frac{\delta \, \mathrm{MMD}^2}{\delta Q}(t) = \frac1N \sum_j k(t, t_j) - \mu_P(t), \qquad
    \mu_P(t) = E_{t' \sim P} \, k(t, t').

The first term drives particles apart, the second draws them to the prior. Particles are compared by features: their
weights, or the function of the model at some inputs. Both terms are of one kernel with one bandwidth, or their
difference would be the gradient of no discrepancy; bandwidth and prior embedding are fixed before the run, or there
would be no stationary law.

In d dimensions the discrepancy of a kernel bounded by 1 stays below 4 while a divergence such as KL grows as d, so
that its force is next to nothing beside that of a prior. The radial kernels here are therefore d times their profile,
d being the number of features, unless ``scale`` says otherwise.

Source: Gretton et al., *A kernel two-sample test*, JMLR 2012; Wild et al., *A rigorous link between deep ensembles and
(variational) Bayesian methods*, NeurIPS 2023.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from scipy.stats import chi2

from numpyro_bdl._checks import check_number

ROLLING = "rolling"


@dataclass(frozen=True)
class _Radial(ABC):
    """A multiple of a profile of :math:`u = |a - b|^2 / h^2`."""

    bandwidth: Any = None
    scale: float | None = None

    def __post_init__(self):
        owner = type(self).__name__
        if self.bandwidth is not None and self.bandwidth != ROLLING:
            check_number(owner, "bandwidth", self.bandwidth)
        if self.scale is not None:
            check_number(owner, "scale", self.scale)

    @abstractmethod
    def profile(self, u: Array) -> Array:
        """The kernel of u, without its factor."""

    def factor(self, size: int) -> float:
        """What the profile is multiplied by, for so many features."""
        return float(size) if self.scale is None else self.scale

    def mean(self, a: Array, others: Array, squared: Array) -> Array:
        """The mean of k(a, b) over b among others ``(M, d)``, at a squared bandwidth."""
        return self.factor(len(a)) * self.profile(squared_distances(a, others) / squared).mean()


class RBF(_Radial):
    r"""The Gaussian kernel :math:`k(a, b) = s \exp(-|a - b|^2 / (2 h^2))`.

    Its mean under a Gaussian prior :math:`N(m, \mathrm{diag}\, v)` has a closed form, which is used, in log space:

    .. math::

        \mu_P(t) = s \prod_i \sqrt{\frac{h^2}{h^2 + v_i}} \;
            \exp\Bigl(-\tfrac12 \sum_i \frac{(t_i - m_i)^2}{h^2 + v_i}\Bigr)

    :param bandwidth: h. None takes :math:`h^2 = \tfrac12 \, \mathrm{median} \, |t - t'|^2` over pairs of draws from the
        prior. ``"rolling"`` takes that median over the particles, anew at each step: it leaves no law invariant, and
        is warned of.
    :param scale: s. None is the number of features.
    :raises ValueError: if one is not positive.
    """

    def profile(self, u):
        return jnp.exp(-u / 2)

    def gaussian_mean(self, a: Array, prior: "Gaussian", squared: Array) -> Array:
        """The mean of k(a, b) under a Gaussian law of b, at a squared bandwidth."""
        variance = prior.scale**2
        log = jnp.log1p(variance / squared) + (a - prior.mean) ** 2 / (squared + variance)
        return self.factor(len(a)) * jnp.exp(-jnp.sum(log) / 2)


class IMQ(_Radial):
    r"""The inverse multiquadric kernel :math:`k(a, b) = s \, (1 + |a - b|^2 / h^2)^{-1/2}`, with a heavier tail.

    :param bandwidth: h, as of :class:`RBF`.
    :param scale: s, as of :class:`RBF`.
    :raises ValueError: if one is not positive.
    """

    def profile(self, u):
        return lax.rsqrt(1 + u)


class Energy(_Radial):
    r"""The energy kernel :math:`k(a, b) = -s \, |a - b| / h`, whose discrepancy is the energy distance.

    Its force does not fall with the distance. Particles closer than :math:`10^{-3} h` don't drive each other apart.

    :param bandwidth: h, as of :class:`RBF`; here a unit of length and no more.
    :param scale: s, as of :class:`RBF`.
    :raises ValueError: if one is not positive.
    """

    def profile(self, u):
        # no slope at 0, nor where the distance is lost in rounding
        apart = u > 1e-6
        return -jnp.where(apart, jnp.sqrt(jnp.where(apart, u, 1)), 0)


@dataclass(frozen=True)
class Linear:
    r"""The linear kernel :math:`k(a, b) = s \, a \cdot b`, which compares means alone: for exact tests.

    :param scale: s; 1 if None.
    :raises ValueError: if it is not positive.
    """

    scale: float | None = None

    def __post_init__(self):
        if self.scale is not None:
            check_number("Linear", "scale", self.scale)

    def __call__(self, a: Array, b: Array) -> Array:
        return (1.0 if self.scale is None else self.scale) * a @ b

    def gaussian_mean(self, a: Array, prior: "Gaussian", squared: Array) -> Array:
        """The mean of k(a, b) under a law of b."""
        return self(a, prior.mean)


KERNELS = RBF, IMQ, Energy, Linear
Kernel = RBF | IMQ | Energy | Linear | Callable[[Array, Array], Array]


class Gaussian(NamedTuple):
    """Features that are independent and normal under the prior."""

    mean: Array
    """``(d,)``"""
    scale: Array
    """``(d,)``, standard deviations"""


class Draws(NamedTuple):
    """Features of fixed draws from the prior."""

    points: Array
    """``(M, d)``"""


Prior = Gaussian | Draws | None
"""What is known of the features under the prior; None if it is flat."""


def has_closed_form(kernel: Kernel) -> bool:
    """Whether the mean of a kernel under a Gaussian prior has a closed form here."""
    return isinstance(kernel, (RBF, Linear))


class Discrepancy:
    r"""The two terms of the discrepancy, for one vector of features.

    :param kernel: One of :class:`RBF`, :class:`IMQ`, :class:`Energy`, :class:`Linear`, or a callable from two vectors
        ``(d,)`` to a number.
    :param prior: The features under the prior; :class:`Gaussian` for a kernel with a closed form alone. Under a flat
        prior (None) the mean of a kernel of differences is constant, and taken as 0.
    :raises ValueError: if a bandwidth, or the mean of :class:`Linear`, is to come from a prior that is flat, or a
        bandwidth from one that has no spread.
    :raises TypeError: for the moments of a prior under which the kernel has no closed form.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro_bdl.mmd import RBF, Discrepancy, Gaussian
        >>> discrepancy = Discrepancy(RBF(bandwidth=1.0), Gaussian(jnp.zeros(1), jnp.ones(1)))
        >>> particles = jnp.array([[0.0], [1.0]])
        >>> [round(float(x), 4) for x in discrepancy(particles[0], particles)]     # (1 + exp(-1/2)) / 2, 1 / sqrt(2)
        [0.8033, 0.7071]
    """

    def __init__(self, kernel: Kernel, prior: Prior):
        if isinstance(prior, Gaussian) and not has_closed_form(kernel):
            raise TypeError("The mean of this kernel under a Gaussian prior has no closed form here: give draws.")
        if isinstance(kernel, Linear) and prior is None:
            raise ValueError("The linear kernel compares means, and a flat prior has none; take another kernel.")
        if isinstance(kernel, _Radial) and kernel.bandwidth is None:
            kernel = replace(kernel, bandwidth=median_bandwidth(prior))
        self.kernel, self.prior = kernel, prior

    def __call__(self, features: Array, ensemble: Array) -> tuple[Array, Array]:
        r""":math:`\frac1N \sum_j k(t, t_j)` and :math:`\mu_P(t)`.

        :param features: Features t of one particle, ``(d,)``.
        :param ensemble: Features of all particles, ``(N, d)``.
        """
        kernel, prior = self.kernel, self.prior
        squared = jnp.ones(())
        if isinstance(kernel, _Radial):
            squared = _rolling(ensemble) if kernel.bandwidth == ROLLING else jnp.square(kernel.bandwidth)
            mean = lambda others: kernel.mean(features, others, squared)
        else:
            _check_number(kernel, features)
            mean = lambda others: jax.vmap(kernel, (None, 0))(features, others).mean()
        if isinstance(prior, Gaussian) and isinstance(kernel, (RBF, Linear)):
            return mean(ensemble), kernel.gaussian_mean(features, prior, squared)
        return mean(ensemble), mean(prior.points) if isinstance(prior, Draws) else jnp.zeros(())


def _check_number(kernel: Callable, features: Array) -> None:
    shape = jax.eval_shape(kernel, features, features).shape
    if shape:
        raise ValueError(f"A kernel must give a number for two vectors of features, got an array of shape {shape}.")


def _rolling(ensemble: Array) -> Array:
    """The squared bandwidth of the particles, above 0 if they are in one place."""
    return jnp.maximum(_half_median(ensemble), jnp.finfo(ensemble.dtype).tiny)


FEW = 32
"""Features that are subtracted one by one."""


def squared_distances(a: Array, others: Array) -> Array:
    """Squared distances of a vector ``(d,)`` from others ``(M, d)``.

    Of more than a few features it is one matrix product under vmap, in which distances below about a thousandth of the
    spread of the others are lost in rounding.
    """
    if len(a) <= FEW:
        return jnp.sum((a - others) ** 2, 1)
    # about the middle of the others, since rounding is relative to the squares
    centre = lax.stop_gradient(others.mean(0))
    a, others = a - centre, others - centre
    return jnp.maximum(a @ a + jnp.sum(others**2, 1) - 2 * others @ a, 0)


def median_bandwidth(prior: Prior) -> float:
    """h such that :math:`h^2` is half the median squared distance of two draws from the prior.

    Of a Gaussian prior it is the median of a sum of scaled chi-squares, taken as that of one with its two moments
    (Satterthwaite); exact if all scales are the same.
    """
    if prior is None:
        raise ValueError("The prior is flat, so that no bandwidth can be taken from it: give the kernel a bandwidth.")
    if isinstance(prior, Gaussian):
        variance = np.asarray(prior.scale, float) ** 2
        of_one = np.sum(variance**2) / np.sum(variance)
        squared = of_one * chi2.median(np.sum(variance) / of_one)
    else:
        squared = float(_half_median(prior.points))
    if not (np.isfinite(squared) and squared > 0):
        raise ValueError(f"Draws from the prior give the squared bandwidth {squared:g}: give the kernel a bandwidth.")
    return float(np.sqrt(squared))


def _half_median(points: Array) -> Array:
    one, other = np.triu_indices(len(points), 1)
    distances = jax.vmap(squared_distances, (0, None))(points, points)[one, other]
    return lax.stop_gradient(jnp.median(distances) / 2)
