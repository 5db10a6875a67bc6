# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The temperature at which a chain really is, by its positions and by its momenta."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro.infer import MCMC

from numpyro_bdl._at_draws import (
    active_counts,
    check_run,
    diagonal_of,
    field_of_draws,
    gradient_of,
    inner_kernel,
    momentum_of,
    own_kernel,
    temperature_of_draws,
    unconstrained_draws,
)
from numpyro_bdl._checks import check_choice, check_integer
from numpyro_bdl.kernels.symmetry_restricted import SymmetryRestricted

CENTERS = ("mean", "origin")
_LEAST = 8  # draws, in two halves of four


class Estimate(NamedTuple):
    """A number and its Monte Carlo standard error."""

    value: float
    error: float


class EffectiveTemperature(NamedTuple):
    """An estimate of the temperature of a run."""

    value: float
    """mean over all coordinates"""
    error: float
    """its Monte Carlo standard error"""
    nominal: float
    """what the kernel was set to, the mean over the draws"""
    sites: dict[str, Estimate]
    """the same for the coordinates of each site"""

    @property
    def z_score(self) -> float:
        """Deviation from the nominal temperature in standard errors."""
        return (self.value - self.nominal) / self.error


def configurational_temperature(
    mcmc: MCMC,
    rng_key: Array | None = None,
    *,
    center: str = "mean",
    num_draws: int | None = 200,
    minibatch: str = "full",
) -> EffectiveTemperature:
    r"""The temperature by the virial of the positions.

    .. math::

        T_{\text{conf}} = \frac1d \bigl\langle (z - c)^\top \nabla U(z) \bigr\rangle

    For draws from :math:`\exp(-U / T)` in unconstrained space this is T, for any constant c and for the coordinates of
    each site alone: integrate by parts. For chains of :class:`~numpyro_bdl.SGLD` that are stationary at a finite step
    a, with minibatch noise of variance V, no preconditioner and d coordinates, it is exactly

    .. math::

        T_{\text{conf}} = T + \frac{a}{2 d} \bigl( \langle |\nabla U|^2 \rangle + \langle \operatorname{tr} V \rangle
        \bigr)

    since :math:`\langle |z|^2 \rangle` does not change in a step. So it is above T by what the step size and the
    minibatches add, below T where chains have not yet spread, and near 0 for an optimizer. Stiff directions weigh as
    much as flat ones. A large step moves the temperature of the stiffest site first; ``sites`` tells which.

    U is the energy that the kernel targets: with the spike and slab of :class:`~numpyro_bdl.SpikeSlabSGHMC`, with the
    smoothing of :class:`~numpyro_bdl.PerturbedSGLD`, and for :class:`~numpyro_bdl.WGFEnsemble`, whose T is ``kl``,
    with its weight of the prior. For coordinates that pruning set to 0 nothing is counted.

    :param mcmc: A run of any kernel of this package, or of NUTS or HMC.
    :param rng_key: PRNG key of minibatches, dropout and perturbations; None for ``jax.random.key(0)``.
    :param center: c. ``"mean"`` is the mean of the other half of the chain, which takes most of the noise away where
        the posterior is far from 0, and is biased by only as much as the halves are correlated. ``"origin"`` is 0:
        without bias however slow the chain, but noisy. :class:`~numpyro_bdl.SymmetryRestricted` needs the origin: on
        the reference set, which has a boundary, the mean gradient is not 0.
    :param num_draws: Draws of each chain at which to take the gradient, evenly spaced; None for all.
    :param minibatch: ``"full"`` for the gradient of all rows, or ``"independent"`` for a fresh minibatch at each draw,
        which is unbiased too, and cheap.
    :return: The temperature, with a standard error by :func:`arviz.mcse`.
    :raises TypeError: for anything but a run of a kernel with a model.
    :raises ValueError: for arguments out of range, fewer than 8 draws, draws that are not finite, minibatches of a
        model without a subsampled plate, and an ensemble with repulsion, in which no particle has an energy of its own.

    **Example**

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> from numpyro_bdl import diagnostics
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(3, 1).expand([10]).to_event(1))
        >>> kernel = bdl.SGLD(model, step_size=0.5, steps_per_draw=10)
        >>> mcmc = MCMC(kernel, num_warmup=20, num_samples=1000, progress_bar=False)
        >>> mcmc.run(random.key(0))
        >>> found = diagnostics.configurational_temperature(mcmc, num_draws=None)
        >>> bool(abs(found.value - 1 / (1 - 0.5 / 2)) < 4 * found.error)           # 4 / 3: the step is long
        True

    **References:** Leimkuhler and Matthews, *Molecular dynamics*, Springer 2015, on configurational temperatures.
    """
    owner = "configurational_temperature"
    potential = check_run(owner, mcmc)
    check_choice(owner, "center", center, CENTERS)
    check_choice(owner, "minibatch", minibatch, ("full", "independent"))
    if num_draws is not None:
        check_integer(owner, "num_draws", num_draws, least=_LEAST)
    kernel = inner_kernel(mcmc.sampler)
    if center == "mean" and isinstance(mcmc.sampler, SymmetryRestricted):
        raise ValueError(
            f'{owner}: the draws are folded onto a reference set; give center="origin", about which the virial is that'
            " of the posterior."
        )
    if getattr(kernel, "_mmd", 0):
        raise ValueError(
            f"{owner}: with repulsion (mmd={kernel._mmd:g}) the particles follow a law of all of them together, and"
            " none has an energy of its own. Run with mmd=0."
        )
    if minibatch != "full" and (not potential.subsampled or not hasattr(kernel, "_rows")):
        raise ValueError(
            f'{owner}: minibatch={minibatch!r} needs a subsampled plate and a kernel of numpyro_bdl; give "full".'
        )
    draws = unconstrained_draws(owner, mcmc, potential, num_draws)
    _check_count(owner, len(draws.index))

    gradient = gradient_of(mcmc, potential, None if minibatch == "full" else minibatch)
    half = len(draws.index) // 2

    @jax.jit
    def virials(z, mutable, chains, keys):
        def of_chain(args):
            z, mutable, chain, keys = args
            first, second = (jax.tree.map(lambda w, n=n: w[n].mean(0), z) for n in (slice(half), slice(half, None)))

            def of_draw(args):
                w, mutable, key, early = args
                found = gradient(chain, w, mutable, key)
                away = w
                if center == "mean":
                    away = jax.tree.map(lambda w, one, other: w - jnp.where(early, other, one), w, first, second)
                return jax.tree.map(lambda x, g: jnp.sum(x * g), away, found)

            return lax.map(of_draw, (z, mutable, keys, jnp.arange(len(keys)) < half))

        return lax.map(of_chain, (z, mutable, chains, keys))

    chains, count = next(iter(draws.z.values())).shape[:2]
    keys = random.split(random.key(0) if rng_key is None else rng_key, (chains, count))
    found = virials(draws.z, draws.mutable, jnp.arange(chains), keys)
    return _estimate(found, active_counts(mcmc, draws.z), temperature_of_draws(mcmc, draws.index))


def kinetic_temperature(mcmc: MCMC) -> EffectiveTemperature:
    r"""The temperature by the momenta, of a kernel that has them.

    .. math::

        T_{\text{kin}} = \frac{1 + b}{2 a d} \bigl\langle v^\top P v \bigr\rangle

    for a step :math:`v' = b v - a \nabla \hat U + \dots, \; w' = w + P v'`. It takes no gradient.

    In a stationary chain this equals :func:`configurational_temperature` at any step size, for any energy and any
    minibatch noise: :math:`\langle w v \rangle` and :math:`\langle w^2 \rangle` do not change in a step, which leaves
    :math:`a \langle w \, \partial U \rangle = \frac{1 + b}{2} P \langle v^2 \rangle` for each coordinate. Where the two
    differ the chain is not stationary yet. (The momentum of :class:`~numpyro_bdl.FlatBasinSGLD` is driven by the anchor
    too; there they are equal only as the step goes to zero.) Where both differ from T, it is by the step or by
    minibatches; without minibatches they are :math:`T / (1 - a P h / (2 (1 + b)))` along curvature h.

    Under a schedule the momentum lags behind the step size, and the number is an approximation.

    :param mcmc: A run with momentum, ``mcmc.run(..., extra_fields=("momentum",))``.
    :return: The temperature, with a standard error by :func:`arviz.mcse`.
    :raises TypeError: for a kernel that is not of this package.
    :raises ValueError: for a kernel without momentum, a run that did not collect it, fewer than 8 draws, and folded
        draws of a kernel with a preconditioner, which is not folded with them.

    **Example**

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> from numpyro_bdl import diagnostics
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(0, 1).expand([10]).to_event(1))
        >>> kernel = bdl.SGHMC(model, step_size=0.01, steps_per_draw=5)
        >>> mcmc = MCMC(kernel, num_warmup=100, num_samples=1000, progress_bar=False)
        >>> mcmc.run(random.key(0), extra_fields=("momentum",))
        >>> found = diagnostics.kinetic_temperature(mcmc)
        >>> abs(found.z_score) < 4, found.error < 0.1
        (True, True)

    **References:** Wenzel et al., *How good is the Bayes posterior in deep neural networks really?*, ICML 2020, on
    kinetic and configurational temperatures of stochastic-gradient samplers.
    """
    owner = "kinetic_temperature"
    check_run(owner, mcmc)
    kernel: Any = own_kernel(owner, mcmc)
    if "momentum" not in kernel.parameter_fields:
        raise ValueError(f"{owner}: this {type(kernel).__name__} has no momentum; take configurational_temperature.")
    momentum = mcmc.get_extra_fields(group_by_chain=True).get("momentum")
    if momentum is None:
        raise ValueError(
            f'{owner}: the run did not collect its momentum; run it with mcmc.run(..., extra_fields=("momentum",)).'
        )
    draws = next(iter(momentum.values())).shape[1]
    _check_count(owner, draws)
    diagonal = diagonal_of(mcmc)
    if isinstance(mcmc.sampler, SymmetryRestricted) and any(np.ndim(p) and np.ptp(p) for p in diagonal.values()):
        raise ValueError(
            f"{owner}: the draws are folded and the preconditioner is not, so that they don't fit together; run the"
            " kernel without SymmetryRestricted."
        )
    index = np.arange(draws)
    scale = (1 + momentum_of(kernel)) / (2 * field_of_draws(mcmc, "step_size", index))
    kinetic = {}
    for name, v in momentum.items():
        p = np.asarray(diagonal[name], float)
        p = p[:, None] if p.ndim else p
        kinetic[name] = scale * (p * np.asarray(v, float) ** 2).reshape(*v.shape[:2], -1).sum(-1)
    bad = np.flatnonzero(~np.isfinite(list(kinetic.values())).all((0, 2)))
    if len(bad):
        raise ValueError(f"{owner}: the chains {bad.tolist()} have momenta that are not finite.")
    return _estimate(kinetic, active_counts(mcmc, momentum), temperature_of_draws(mcmc, index))


def _check_count(owner: str, draws: int) -> None:
    if draws < _LEAST:
        raise ValueError(f"{owner}: expected at least {_LEAST} draws of each chain, got {draws}.")


def _estimate(sums: dict, counts: dict[str, np.ndarray], nominal: np.ndarray) -> EffectiveTemperature:
    """From sums over the coordinates of each site, (chain, draw), and the number of coordinates, (chain)."""
    from arviz_stats.base import array_stats

    def mean(total, count):
        series = np.asarray(total, float) / np.maximum(count, 1)[:, None]
        return Estimate(float(series.mean()), float(array_stats.mcse(series, chain_axis=0, draw_axis=1)))

    sites = {name: mean(total, counts[name]) for name, total in sums.items()}
    whole = mean(sum(np.asarray(x, float) for x in sums.values()), sum(counts.values()))
    return EffectiveTemperature(*whole, float(np.mean(nominal)), sites)
