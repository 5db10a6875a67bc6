# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The noise of minibatch gradients beside the noise that the kernel injects."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jaxtyping import Float
from numpyro.infer import MCMC

from numpyro_bdl._at_draws import (
    check_run,
    diagonal_of,
    field_of_draws,
    gradient_of,
    momentum_of,
    own_kernel,
    temperature_of_draws,
    unconstrained_draws,
)
from numpyro_bdl._checks import check_integer


class GradientNoise(NamedTuple):
    """Variance of the minibatch noise of a step in units of that of the injected noise."""

    ratio: dict[str, Float[np.ndarray, "..."]]
    """the ratio for each coordinate, by site: the mean over draws"""
    worst: float
    """the ratio in the worst direction: the largest eigenvalue of the sample covariance, on average too large"""
    worst_held_out: float
    """the same in the direction that is worst among half of the minibatches, measured on the other half: on average
    too small"""

    @property
    def sites(self) -> dict[str, float]:
        """The mean over the coordinates of each site."""
        return {name: float(ratio.mean()) for name, ratio in self.ratio.items()}

    @property
    def mean(self) -> float:
        """The mean over all coordinates."""
        return float(np.concatenate([np.ravel(ratio) for ratio in self.ratio.values()]).mean())


def gradient_noise(mcmc: MCMC, rng_key: Array, *, num_batches: int = 32, num_draws: int = 8) -> GradientNoise:
    r"""Minibatch noise against injected noise.

    A step of SGLD injects noise of variance :math:`2 a T P` and has minibatch noise of :math:`a^2 P V P`, with V the
    covariance of the minibatch gradient. What counts is the ratio

    .. math::

        \frac{a P V}{2 T}, \qquad \text{with momentum b} \quad \frac{a P V}{2 (1 - b) T}

    and, in the worst direction, the largest eigenvalue of :math:`a P^{1/2} V P^{1/2} / (2 (1 - b) T)`. Where it is r
    the chain is at a temperature of about :math:`(1 + r) T`: far below 1, minibatches do no harm; at 1 half of the
    noise is not of your making. The ratio falls with the step size and with the size of a minibatch, in proportion.

    V is the sample covariance of the gradients of fresh minibatches at some draws, with all that is random in them,
    dropout and perturbed positions too. The largest eigenvalue of a sample covariance of K minibatches is too large on
    average, by a factor of up to :math:`(1 + \sqrt{d / K})^2` for noise that is the same in all d directions; that on
    held-out minibatches is too small. The truth lies between their expectations.

    Minibatches ``"epoch"`` are drawn without replacement here as there. Their noise nearly cancels over an epoch, which
    a single step does not show. ``SGHMC(..., noise_correction=True)`` injects less by what minibatches bring; there the
    ratio is to the noise of the two together, and must be below 1.

    :param mcmc: A run of a kernel of this package, whose last steps and temperatures are used.
    :param rng_key: PRNG key of the minibatches.
    :param num_batches: Minibatches at each draw, at least 4.
    :param num_draws: Draws, evenly spaced over all chains.
    :return: Ratios by coordinate, site and direction; 0 for a model without subsampled plates.
    :raises TypeError: for another kernel, or anything but a run.
    :raises ValueError: for arguments out of range, draws that are not finite, and a run that injects no noise.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> from numpyro_bdl import diagnostics
        >>> def model(y, batch_size=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 10))
        ...     with numpyro.plate("data", len(y), subsample_size=batch_size):
        ...         numpyro.sample("y", dist.Normal(mu, 1), obs=numpyro.subsample(y, event_dim=0))
        >>> y = random.normal(random.key(0), (1000,))
        >>> mcmc = MCMC(bdl.SGLD(model, step_size=1e-4), num_warmup=100, num_samples=100, progress_bar=False)
        >>> mcmc.run(random.key(1), y, batch_size=100)
        >>> noise = diagnostics.gradient_noise(mcmc, random.key(2))
        >>> exact = 1e-4 * 1000**2 / 100 * float(jnp.var(y)) / 2                   # a N^2 var / (2 B T)
        >>> bool(abs(noise.sites["mu"] / exact - 1) < 4 * (2 / (8 * 31)) ** 0.5)
        True
    """
    owner = "gradient_noise"
    potential = check_run(owner, mcmc)
    kernel: Any = own_kernel(owner, mcmc)
    check_integer(owner, "num_batches", num_batches, least=4)
    check_integer(owner, "num_draws", num_draws)
    chains, draw = _spread_out(mcmc, num_draws)
    every = unconstrained_draws(owner, mcmc, potential)
    z, mutable = jax.tree.map(lambda x: x[chains, draw], (every.z, every.mutable))

    temperature = temperature_of_draws(mcmc, every.index)[chains, draw]
    if not np.all(temperature > 0):
        raise ValueError(f"{owner}: this {type(kernel).__name__} injects no noise (temperature 0) to compare with.")
    size = field_of_draws(mcmc, "step_size", every.index)[chains, draw]
    scale = size / (2 * (1 - momentum_of(kernel)) * temperature)
    metric = _flat_metric(diagonal_of(mcmc), z, chains)

    gradient = gradient_of(mcmc, potential, kernel._minibatch)

    @jax.jit
    def gradients(chain, z, mutable, keys):
        one = lambda key: jnp.concatenate([jnp.ravel(g) for g in gradient(chain, z, mutable, key).values()])
        return lax.map(one, keys)

    ratios, worst, held_out = [], [], []
    for n, keys in enumerate(random.split(rng_key, (num_draws, num_batches))[: len(draw)]):
        at = jax.tree.map(lambda x, n=n: x[n], (z, mutable))
        found = np.asarray(gradients(jnp.asarray(chains[n]), *at, keys), float)
        found *= np.sqrt(scale[n] * metric[n])
        ratios.append(found.var(0, ddof=1))
        worst.append(_largest(found)[0])
        one, other = found[::2], found[1::2]
        held_out += [np.var(b @ _largest(a)[1], ddof=1) for a, b in ((one, other), (other, one))]
    flat, ratio, start = np.mean(ratios, 0), {}, 0
    for name, w in z.items():
        ratio[name] = flat[start : start + w[0].size].reshape(w.shape[1:])
        start += w[0].size
    return GradientNoise(ratio, float(np.mean(worst)), float(np.mean(held_out)))


def _spread_out(mcmc: MCMC, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Chains and draws, evenly spaced over all chains laid end to end."""
    chains, draws = jax.tree.leaves(mcmc.get_samples(group_by_chain=True))[0].shape[:2]
    places = np.unique(np.linspace(0, chains * draws - 1, count).round().astype(int))
    return np.divmod(places, draws)


def _flat_metric(diagonal: dict, z: dict, chains: np.ndarray) -> np.ndarray:
    """P at each of the draws, (draw, coordinate)."""
    parts = []
    for name, w in z.items():
        p = np.asarray(diagonal[name], float)
        parts.append(np.broadcast_to(p[chains] if p.ndim else p, w.shape).reshape(len(chains), -1))
    return np.concatenate(parts, 1)


def _largest(sample: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest eigenvalue of a sample covariance and its direction, by the smaller of its two Gram matrices."""
    centered = sample - sample.mean(0)
    values, vectors = np.linalg.eigh(centered @ centered.T / (len(sample) - 1))
    direction = centered.T @ vectors[:, -1]
    length = np.linalg.norm(direction)
    return float(max(values[-1], 0)), direction / length if length else direction
