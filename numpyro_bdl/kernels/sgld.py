# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Stochastic gradient Langevin dynamics.

.. math::

    w \leftarrow w - a P \nabla \hat U(w) + \sqrt{2 a T P} \, \xi, \qquad \xi \sim N(0, I)

Source: Welling and Teh, *Bayesian learning via stochastic gradient Langevin dynamics*, ICML 2011, equation (4),
with :math:`a = \epsilon / 2`.
"""

import jax
import jax.numpy as jnp

from numpyro_bdl.kernels.base import SGState, StochasticGradientKernel
from numpyro_bdl.noise import normal


def sgld_step(z, gradient, noise, size, temperature, diagonal):
    r"""One Langevin step, :math:`w - a P g + \sqrt{2 a T P} \xi`.

    :param z: Position w, a tree of arrays.
    :param gradient: Gradient g of the full-data energy (or an unbiased estimate), like the position.
    :param noise: Standard normal :math:`\xi`, like the position.
    :param size: Step size a, a scalar.
    :param temperature: Temperature T, a scalar.
    :param diagonal: Preconditioner P, like the position, of arrays or numbers.
    :return: The next position.
    """
    return jax.tree.map(
        lambda w, g, xi, p: w - size * p * g + jnp.sqrt(2 * size * temperature * p) * xi,
        z,
        gradient,
        noise,
        diagonal,
    )


class SGLD(StochasticGradientKernel):
    r"""Stochastic gradient Langevin dynamics: the baseline, and the simplest kernel to copy.

    .. math::

        w \leftarrow w - a P \nabla \hat U(w) + \sqrt{2 a T P} \, \xi

    As :math:`a \to 0` the draws follow :math:`\exp(-U / T)`. At a fixed step, along a direction of curvature h, their
    variance is that of the target times :math:`1 / (1 - a p h / 2)`, and minibatch noise of variance V adds
    :math:`a p V / (h (2 - a p h))`; the chain is stable for :math:`a p h < 2`.

    The arguments are those of :class:`~numpyro_bdl.kernels.base.StochasticGradientKernel`.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> def model(y, batch_size=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 10))
        ...     with numpyro.plate("data", len(y), subsample_size=batch_size):
        ...         numpyro.sample("y", dist.Normal(mu, 1), obs=numpyro.subsample(y, event_dim=0))
        >>> y = 3 + random.normal(random.key(0), (1000,))
        >>> mcmc = MCMC(bdl.SGLD(model, step_size=1e-4), num_warmup=200, num_samples=1000, progress_bar=False)
        >>> mcmc.run(random.key(1), y, batch_size=100)
        >>> bool(abs(mcmc.get_samples()["mu"].mean() - y.mean()) < 0.05)
        True

    **References:** Welling and Teh, *Bayesian learning via stochastic gradient Langevin dynamics*, ICML 2011.
    """

    State = SGState

    def _update(self, state, gradient, step):
        noise = normal(step.key, state.z)
        return {"z": sgld_step(state.z, gradient, noise, step.size, step.temperature, step.diagonal)}
