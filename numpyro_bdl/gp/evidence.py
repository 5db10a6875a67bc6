# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Kernel, its scales and the noise, by the marginal likelihood of subsets of the data,

.. math::

    \log p(y_S) = -\tfrac12 y_S^\top (K_{SS} + \sigma^2 I)^{-1} y_S - \tfrac12 \log \det (K_{SS} + \sigma^2 I)
        - \tfrac{|S|}{2} \log 2 \pi .
"""

import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from jax import Array, lax, random
from tqdm.auto import tqdm

from numpyro_bdl._checks import check_integer, check_number
from numpyro_bdl.gp.kernels import Kernel
from numpyro_bdl.gp.posterior import check_inputs, check_kernel, check_shapes
from numpyro_bdl.linear.observations import as_key, check_noise, check_observed


class Hyperparameters(NamedTuple):
    """What was found."""

    kernel: Kernel
    noise: float
    """standard deviation; with what rounding adds to the variance, see :func:`log_evidence`"""
    log_evidence: np.ndarray
    """mean log marginal likelihood of a row, before each step"""


def log_evidence(kernel: Kernel, noise: float | Array, x: Array, y: Array) -> Array:
    """The log marginal likelihood of all rows, by a Cholesky decomposition.

    To the variance of the noise it adds what rounding takes, the number of rows times the variance times the machine's
    epsilon. Differentiable, so that it can be a factor of a NumPyro model.

    :param x: Inputs, (row, D).
    :param y: Observations, (row,).
    :raises ValueError: for shapes that do not fit.
    """
    y = jnp.asarray(y, jnp.result_type(y, float))
    x = check_shapes("log_evidence", x, y)
    covariance = kernel(x, x) + (noise**2 + _rounding(kernel, x)) * jnp.eye(len(x), dtype=x.dtype)
    return dist.MultivariateNormal(jnp.zeros(len(x), x.dtype), scale_tril=jnp.linalg.cholesky(covariance)).log_prob(y)


def _rounding(kernel: Kernel, x: Array) -> Array:
    return jnp.asarray(len(x) * jnp.finfo(x.dtype).eps * kernel.variance)


def fit_hyperparameters(
    rng_key: Array,
    kernel: Kernel,
    x: Array,
    y: Array,
    noise: float = 0.1,
    *,
    subset: int = 1000,
    num_subsets: int = 1,
    num_steps: int = 100,
    learning_rate: float = 0.1,
    progress_bar: bool = True,
) -> Hyperparameters:
    """Maximize the exact marginal likelihood of random subsets by Adam, in logarithms of what is positive.

    :param rng_key: PRNG key of the subsets.
    :param kernel: Where to begin; a lengthscale for each input is learned as such.
    :param x: Inputs, (row, D).
    :param y: Observations, (row,), about zero.
    :param noise: Where to begin, a standard deviation.
    :param subset: Rows of a subset; all if there are fewer. A step costs the cube of that.
    :param num_subsets: Subsets, without rows in common, whose marginal likelihoods are averaged.
    :param num_steps: Steps of Adam.
    :param learning_rate: Of Adam, in logarithms.
    :param progress_bar: Show one.
    :return: Kernel, noise, and the marginal likelihood along the way.
    :raises ValueError: as :func:`gp_posterior_samples`, and for more subsets than there are rows.
    :warns UserWarning: where the marginal likelihood stops to be finite, which ends the descent.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_bdl import gp
        >>> x = jnp.linspace(0, 1, 60)[:, None]
        >>> y = jnp.sin(6 * x[:, 0]) + 0.1 * random.normal(random.key(0), (60,))
        >>> found = gp.fit_hyperparameters(random.key(1), gp.RBF(lengthscale=jnp.ones(1)), x, y, progress_bar=False)
        >>> bool(0.07 < found.noise < 0.13)
        True
    """
    owner = "fit_hyperparameters"
    for name, value in (("subset", subset), ("num_subsets", num_subsets), ("num_steps", num_steps)):
        check_integer(owner, name, value)
    check_number(owner, "learning_rate", learning_rate)
    check_number(owner, "noise", noise)
    y = check_observed(owner, y)
    x = check_inputs(owner, x, y)
    check_noise(owner, noise, y)
    check_kernel(owner, kernel, x.shape[1])
    subset = min(subset, len(y))
    if subset * num_subsets > len(y):
        raise ValueError(f"{owner}: {num_subsets} subsets of {subset} rows need more than the {len(y)} rows.")
    rows = random.permutation(as_key(owner, rng_key), len(y))[: subset * num_subsets].reshape(num_subsets, subset)
    start = jax.tree.map(lambda v: jnp.log(jnp.asarray(v, y.dtype)), (kernel, noise))
    optimizer = optax.adam(learning_rate)
    state, found = (start, optimizer.init(start)), []
    with tqdm(total=num_steps, disable=not progress_bar, desc="marginal likelihood") as bar:
        for _ in range(num_steps):
            after, value = _step(optimizer, state, x[rows], y[rows])
            if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((after[0], value))):
                warnings.warn(
                    f"fit_hyperparameters: the marginal likelihood is not finite after {len(found)} steps, and the last"
                    " values before that are returned; compute in x64, or begin at another kernel or noise.",
                    stacklevel=2,
                )
                break
            state = after
            found.append(float(value))
            bar.set_postfix_str(f"{found[-1]:.4g} a row", refresh=False)
            bar.update()
    kernel, scale = jax.tree.map(jnp.exp, state[0])
    total = jnp.sqrt(scale**2 + _rounding(kernel, x[rows[0]]))
    return Hyperparameters(kernel, float(total), np.array(found))


@partial(jax.jit, static_argnums=0)
def _step(optimizer: optax.GradientTransformation, state: tuple, x: Array, y: Array) -> tuple[tuple, Array]:
    logs, optimizer_state = state

    def loss(logs):
        kernel, noise = jax.tree.map(jnp.exp, logs)
        return -jnp.mean(lax.map(lambda s: log_evidence(kernel, noise, *s), (x, y))) / x.shape[1]

    value, gradient = jax.value_and_grad(loss)(logs)
    update, optimizer_state = optimizer.update(gradient, optimizer_state)
    return (optax.apply_updates(logs, update), optimizer_state), -value
