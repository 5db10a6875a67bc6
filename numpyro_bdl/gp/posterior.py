# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The posterior of a Gaussian process, as functions that can be evaluated anywhere."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from tqdm.auto import tqdm

from numpyro_bdl._checks import check_choice, check_integer
from numpyro_bdl.gp.features import PriorDraws, draw_prior
from numpyro_bdl.gp.kernels import Kernel
from numpyro_bdl.gp.system import BLOCK, KernelDual, conjugate_gradients, error
from numpyro_bdl.linear.observations import as_key, check_noise, check_observed, warn_if_unsolved
from numpyro_bdl.linear.solvers import ConjugateGradient, DualDescent

_SOLVERS = {"dual": DualDescent(steps=5000), "cg": ConjugateGradient()}
_MANY = 10_000  # rows


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("kernel", "x", "weights", "prior", "noise", "error"),
    meta_fields=(),
)
@dataclass(frozen=True)
class GPPosterior:
    r"""Mean and samples of the posterior of a function,

    .. math::

        \bar f(\cdot) = k(\cdot, X) \, v_0, \qquad
        f_k(\cdot) = \bar f(\cdot) + f^0_k(\cdot) + k(\cdot, X) \, v_k,

    with :math:`f^0_k` a draw from the prior. A pytree; its arrays are the rows of the data and a number for each of
    them and each sample.
    """

    kernel: Kernel
    x: Array
    """inputs of the data, (row, D)"""
    weights: Array
    """v, (row, 1 + sample), that of the mean first"""
    prior: PriorDraws
    noise: Array
    """standard deviations of the noise, (row,)"""
    error: Array
    """a bound on the error of the samples at the data, as a root mean square, in posterior standard deviations"""

    def mean(self, x: Array) -> Array:
        """The mean of the function at inputs (n, D): (n,)."""
        return _evaluate(self, _inputs("mean", x, self.x))[0]

    def samples(self, x: Array) -> Array:
        """Samples of the function at inputs (n, D): (sample, n)."""
        return _samples(_evaluate(self, _inputs("samples", x, self.x)))

    def variance(self, x: Array) -> Array:
        r"""The variance of the function at inputs (n, D), by the samples: (n,). Its relative error is
        :math:`\sqrt{2/K}`."""
        values = _evaluate(self, _inputs("variance", x, self.x))
        return jnp.mean(values[1:] ** 2, 0)


def gp_posterior_samples(
    rng_key: Array,
    kernel: Kernel,
    x: Array,
    y: Array,
    noise: float | Array,
    *,
    num_samples: int = 64,
    num_features: int = 2000,
    solver: Any = None,
    batch_size: int | None = None,
    progress_bar: bool = True,
) -> GPPosterior:
    r"""Samples of functions from the posterior of a Gaussian process with mean zero, without a matrix of rows by rows.

    .. math::

        f \sim GP(0, k), \quad y = f(X) + \epsilon, \quad \epsilon \sim N(0, \Sigma), \qquad
        f_k(\cdot) = f^0_k(\cdot) + k(\cdot, X) (K + \Sigma)^{-1} (y - f^0_k(X) - \epsilon_k).

    :math:`f^0_k` is a draw from the prior by random Fourier features, :math:`\epsilon_k` one of the noise. The mean and
    all samples are solved together: rows of K, formed for the rows of a step, serve all of them.

    :param rng_key: PRNG key.
    :param kernel: An :class:`RBF` or :class:`Matern`; or a pytree that is called as they are and has their
        ``variance``, ``frequencies`` and ``log_spectral_density``.
    :param x: Inputs, (row, D).
    :param y: Observations, (row,), about zero: subtract their mean.
    :param noise: Standard deviation of the noise, a number or (row,).
    :param num_samples: Samples of the function, K. The relative error of a variance is :math:`\sqrt{2/K}`.
    :param num_features: Random features of the prior draws, :mod:`~numpyro_bdl.gp.features`.
    :param solver: ``"cg"``, conjugate gradients on full products, whose error falls fast after some hundred of them;
        ``"dual"``, stochastic dual descent, which has a rough solution after some, until its error is a fifth of a
        posterior standard deviation at most, or 5000 steps; None for ``"cg"`` up to 10 000 rows and ``"dual"`` for
        more; or a :class:`~numpyro_bdl.linear.DualDescent` or :class:`~numpyro_bdl.linear.ConjugateGradient` with
        settings.
    :param batch_size: Rows of a step of dual descent; None for 512, or all if there are fewer.
    :param progress_bar: Show one, of dual descent.
    :return: The posterior; its functions can be jitted, this can't.
    :raises ValueError: for noise, a variance or a lengthscale that is not positive; numbers that are not finite; shapes
        that do not fit; a batch larger than the data; or a step size that diverges.
    :warns UserWarning: for systems that are not solved.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from jax import random
        >>> from numpyro_bdl import gp
        >>> x = jnp.linspace(0, 1, 40)[:, None]
        >>> y = jnp.sin(6 * x[:, 0]) + 0.1 * random.normal(random.key(0), (40,))
        >>> kernel = gp.Matern(lengthscale=0.3, nu=2.5)
        >>> posterior = gp.gp_posterior_samples(random.key(1), kernel, x, y, 0.1, progress_bar=False)
        >>> posterior.samples(jnp.array([[0.5], [2.0]])).shape
        (64, 2)
        >>> bool(posterior.variance(jnp.array([[2.0]]))[0] > 20 * posterior.variance(jnp.array([[0.5]]))[0])
        True

    Source: Lin et al., *Stochastic gradient descent for Gaussian processes done right*, ICLR 2024, Algorithm 1; Wilson
    et al., *Efficiently sampling functions from Gaussian process posteriors*, ICML 2020, Equation 13.
    """
    owner = "gp_posterior_samples"
    for name, value in (("num_samples", num_samples), ("num_features", num_features)):
        check_integer(owner, name, value)
    y = check_observed(owner, y)
    if solver is None:
        solver = "cg" if len(y) <= _MANY else "dual"
    if isinstance(solver, str):
        check_choice(owner, "solver", solver, tuple(_SOLVERS))
        solver = _SOLVERS[solver]
    if not isinstance(solver, (DualDescent, ConjugateGradient)):
        raise TypeError(
            f'{owner}: solver must be "dual", "cg", or a DualDescent or ConjugateGradient of numpyro_bdl.linear, got'
            f" {solver!r}."
        )
    x = check_inputs(owner, x, y)
    noise = check_noise(owner, noise, y)
    check_kernel(owner, kernel, x.shape[1])
    batch_size = min(512, len(y)) if batch_size is None else batch_size
    check_integer(owner, "batch_size", batch_size)
    if batch_size > len(y):
        raise ValueError(f"{owner}: batch_size={batch_size} is more than the {len(y)} rows of the data.")
    keys = random.split(as_key(owner, rng_key), 3)
    prior = draw_prior(keys[0], kernel, x.shape[1], num_samples, num_features)
    prior = jax.tree.map(lambda v: v.astype(y.dtype), prior)
    f = jnp.concatenate([jnp.zeros((len(y), 1), y.dtype), _at_data(prior, x) / noise[:, None]], 1)
    eps = random.normal(keys[1], (len(y), num_samples), y.dtype)
    b = jnp.concatenate([(y / noise)[:, None], -f[:, 1:] - eps], 1)
    dual = KernelDual(kernel, x, noise, b, f, jnp.zeros(batch_size, bool))
    if isinstance(solver, ConjugateGradient):
        a = conjugate_gradients(solver, dual)
    else:
        with tqdm(total=100, disable=not progress_bar, desc="dual descent") as bar:
            a = solver.descend(dual, keys[2], lambda done: bar.update(round(100 * done) - bar.n))
    off = error(dual, a)
    warn_if_unsolved(float(off))
    return GPPosterior(kernel, x, a / noise[:, None], prior, noise, off)


def _inputs(owner: str, x: Any, data: Array) -> Array:
    x = jnp.asarray(x, data.dtype)
    if x.ndim != 2 or x.shape[1] != data.shape[1]:
        raise ValueError(f"{owner}: x must have the shape (n, {data.shape[1]}) as the data, got {x.shape}.")
    return x


@jax.jit
def _at_data(prior: PriorDraws, x: Array) -> Array:
    return _in_blocks(prior, x)


@jax.jit
def _evaluate(posterior: GPPosterior, x: Array) -> Array:
    """The mean, and what the samples add to it, (1 + sample, n)."""

    def values(x):
        moved = jnp.matmul(posterior.kernel(x, posterior.x), posterior.weights, precision="highest")
        return moved.at[:, 1:].add(posterior.prior(x))

    return _in_blocks(values, x).T


def _in_blocks(function: Callable[[Array], Array], x: Array) -> Array:
    """A function of inputs (n, D) to (n, vector), of some of them at a time."""
    size = min(BLOCK, max(len(x), 1))
    padded = jnp.pad(x, ((0, -len(x) % size), (0, 0)), mode="edge")
    found = lax.map(function, padded.reshape(-1, size, x.shape[1]))
    return found.reshape(-1, found.shape[-1])[: len(x)]


def _samples(values: Array) -> Array:
    return values[0] + values[1:]


def check_inputs(owner: str, x: Any, y: Array) -> Array:
    """Inputs (row, D), finite, of the type of y."""
    x = check_shapes(owner, x, y)
    if not bool(jnp.all(jnp.isfinite(x))):
        raise ValueError(f"{owner}: x has numbers that are not finite.")
    return x


def check_shapes(owner: str, x: Any, y: Array) -> Array:
    """Inputs (row, D), of the type of y."""
    x = jnp.asarray(x, y.dtype)
    if y.ndim != 1 or x.ndim != 2 or len(x) != len(y) or not x.size:
        raise ValueError(
            f"{owner}: x must be (row, D) and y (row,), got the shapes {x.shape} and {y.shape};"
            " x[:, None] makes one input of a vector."
        )
    return x


def check_kernel(owner: str, kernel: Kernel, inputs: int) -> None:
    """Refuse a variance or lengthscale that is not positive, or a lengthscale that is not of the inputs."""
    needed = ("variance", "frequencies", "log_spectral_density")
    if isinstance(kernel, type) or not callable(kernel) or not all(hasattr(kernel, name) for name in needed):
        raise TypeError(f"{owner}: kernel must be an RBF or Matern, or have what they have, got {kernel!r}.")
    for name in ("variance", "lengthscale"):
        value = getattr(kernel, name, 1.0)
        if isinstance(value, (list, tuple)):
            raise TypeError(f"{owner}: {name} of the kernel must be a number or an array, got {value!r}.")
        value = jnp.asarray(value)
        if not bool(jnp.all(jnp.isfinite(value) & (value > 0))):
            raise ValueError(f"{owner}: {name} of the kernel must be positive and finite, got {value}.")
        if value.shape not in ((), (1,), (inputs,)) or (name == "variance" and value.shape):
            raise ValueError(
                f"{owner}: {name} of the kernel has the shape {value.shape}; a variance is one number, a lengthscale"
                f" one or {inputs}, one for each input."
            )
