# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""SGHMC under a spike-and-slab prior on groups of weights, with pruning.

.. math::

    p_g &\leftarrow P(\gamma_g = 1 \mid w_g, \theta), \qquad d_g = \frac{p_g}{s_1} + \frac{1 - p_g}{s_0} \\
    v &\leftarrow b v - a \bigl(\nabla \hat U(w) + d \, w\bigr) + \sqrt{2 (1 - b) a T / P} \, \xi \\
    w &\leftarrow m (w + P v)

with U without the prior of the groups, and the mask m, all ones without pruning. The formulas of p, d and
:math:`\theta` are in :mod:`numpyro_bdl.inclusion`; the step of v and w is
:func:`~numpyro_bdl.kernels.sghmc.sghmc_step`; the mask is that of :mod:`numpyro_bdl.pruning`.

Source: Ke and Fan, *On the optimization and pruning for Bayesian deep learning*, 2022 (arXiv 2210.12957), for the
combination; Rockova and George, *EMVS*, JASA 2014, for E- and M-step. The dynamics are not those of the paper's code.
"""

import math
import warnings
from collections import namedtuple
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, lax, random

from numpyro_bdl import pruning
from numpyro_bdl._checks import check_choice, check_integer, check_number
from numpyro_bdl.inclusion import InclusionRate, SpikeSlab, inclusion_groups
from numpyro_bdl.kernels.base import SGState, StochasticGradientKernel, like
from numpyro_bdl.kernels.sghmc import sghmc_step
from numpyro_bdl.noise import normal
from numpyro_bdl.potential import Potential
from numpyro_bdl.probes import normal_scales, output_sites, scales_from, sites_without_scale
from numpyro_bdl.schedules import largest_step
from numpyro_bdl.weight_groups import Kind, WeightGroups, partition

SpikeSlabState = namedtuple(
    "SpikeSlabState",
    [*SGState._fields, "momentum", "inclusion", "rate", "mask", "mean_inclusion", "mean_square", "sparsity"],
)
"""The fields of :data:`~numpyro_bdl.kernels.base.SGState` and

 - **momentum** - v, like the position.
 - **inclusion** - p by site and group: the E-step that the next gradient uses (0 or 1 if it is hard or Gibbs).
 - **rate** - :math:`\\theta` by site; frozen after warm-up.
 - **mask** - 0 where a weight is pruned, else 1, like the position; () without pruning. Frozen after warm-up.
 - **mean_inclusion**, **mean_square** - running means by which groups are pruned, by site; () without pruning.
 - **sparsity** - share of the weights in groups that is pruned.
"""

E_STEPS = ("soft", "hard", "gibbs")
_WIDE = 0.3  # part of the warm-up in which the spike narrows


class SpikeSlabSGHMC(StochasticGradientKernel):
    r"""Sample, select and prune: SGHMC under a spike-and-slab prior on groups of weights.

    .. math::

        v \leftarrow b v - a \bigl(\nabla \hat U(w) + d_p(w) \, w\bigr) + \sqrt{2 (1 - b) a T / P} \, \xi, \qquad
        w \leftarrow w + P v, \qquad d_p = \frac{p}{s_1} + \frac{1 - p}{s_0}

    with p the inclusion probability of the weight's group. With the soft E-step at every step, the default, this is
    :class:`SGHMC` on the posterior with the indicators summed out; the other choices target another law.

    Sites in ``groups`` must have a centred normal prior with a constant scale in the model. It is the slab, so that the
    kernel only adds the spike; other sites keep their prior.

    The collected ``minibatch_energy`` is that of the model, with its own prior.

    **Pruning** happens in warm-up. The draws that are kept share the mask of their chain and have the slab alone:
    they follow the posterior *given the mask*, which the running means of one chain chose. For probabilities of
    inclusion, sample without pruning.

    :param groups: From patterns of site names to the groups of those sites, ``"unstructured"``, ``"neuron_in"``,
        ``"neuron_out"``, ``"filter"``, ``"channel"``, ``"kernel"`` or a callable: see
        :mod:`numpyro_bdl.weight_groups`. None takes every kernel of the networks but those of the output layer,
        unstructured.
    :param slab_variance: :math:`s_1`. None is the variance of the model's own prior; a number replaces it.
    :param spike_variance: :math:`s_0 < s_1`. None is a hundredth of the slab variance, site by site. It stiffens the
        target: a step needs :math:`a P / s_0 < 2 (1 + b)`, better a tenth of it.
    :param inclusion: :math:`\theta` in (0, 1), or a :class:`numpyro.distributions.Beta` to learn it in warm-up, for
        each site, by the M-step :math:`(\sum_g p_g + \alpha - 1) / (\alpha + \beta + G - 2)`, averaged.
    :param e_step: ``"soft"``: p as above. ``"hard"``: 1 if p > 1/2, else 0, the switch of the paper; an
        optimization, no sampler. ``"gibbs"``: the indicators are drawn.
    :param e_step_every: Steps between E-steps. None is 1, and :math:`\lceil 2 / (1 - b) \rceil` for ``"gibbs"``, since
        momentum integrates the noise of indicators drawn at every step. A soft E-step that is not made at every step
        samples another law, in which groups stay what they were.
    :param momentum: b in [0, 1).
    :param spike_widening: The spike variance starts this factor wider and narrows geometrically over the first 30 % of
        the warm-up, which helps to find what to include among many variables. Pruning then starts after that.
    :param target_sparsity: Share of the weights in ``groups`` to prune, in [0, 1), as near as whole groups allow. None
        does not prune.
    :param prune_schedule: :func:`pruning.cubic() <numpyro_bdl.pruning.cubic>`, the default with a target, or
        :func:`pruning.threshold(...) <numpyro_bdl.pruning.threshold>`, without one.

    The other arguments are those of :class:`~numpyro_bdl.kernels.base.StochasticGradientKernel`.

    :raises ValueError: for arguments out of range; when a run starts, for groups that match nothing, overlap or do not
        fit their site, a site with another prior, a spike that is not smaller than the slab, a sparsity that would
        empty a site, and pruning without warm-up.
    :raises TypeError: with ``jit_model_args=True``, for a prior whose scale is an argument of the model.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> def model(x, y):
        ...     w = numpyro.sample("w", dist.Normal(0, 1).expand([5]).to_event(1))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(x @ w, 1), obs=y)
        >>> x = random.normal(random.key(0), (100, 5))
        >>> y = 2 * x[:, 0] + random.normal(random.key(1), (100,))
        >>> kernel = bdl.SpikeSlabSGHMC(model, step_size=1e-3, groups={"w": "unstructured"}, steps_per_draw=10)
        >>> mcmc = MCMC(kernel, num_warmup=200, num_samples=500, progress_bar=False)
        >>> mcmc.run(random.key(2), x, y)
        >>> (bdl.inclusion_probabilities(mcmc)["w"].mean((0, 1)) > 0.5).tolist()
        [True, False, False, False, False]

    **References:** Ke and Fan, *On the optimization and pruning for Bayesian deep learning*, 2022 (arXiv 2210.12957);
    Deng et al., *An adaptive empirical Bayesian method for sparse deep learning*, NeurIPS 2019.
    """

    State = SpikeSlabState

    def __init__(
        self,
        model,
        *,
        groups: Mapping[str, Kind] | None = None,
        slab_variance: float | None = None,
        spike_variance: float | None = None,
        inclusion: float | dist.Distribution = 0.5,
        e_step: str = "soft",
        e_step_every: int | None = None,
        momentum: float = 0.9,
        spike_widening: float = 1.0,
        target_sparsity: float | None = None,
        prune_schedule: pruning.Cubic | pruning.Threshold | None = None,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        owner = "SpikeSlabSGHMC"
        if groups is not None and (not isinstance(groups, Mapping) or not groups):
            raise TypeError(
                f"{owner}: groups must be a dict from patterns of site names to kinds, as {{'w': 'unstructured'}}, or"
                f" None; got {groups!r}."
            )
        for name, value in (("slab_variance", slab_variance), ("spike_variance", spike_variance)):
            if value is not None:
                check_number(owner, name, value)
        check_choice(owner, "e_step", e_step, E_STEPS)
        check_number(owner, "momentum", momentum, high=1, closed=True)
        check_number(owner, "spike_widening", spike_widening, low=1, closed=True)
        if e_step_every is not None:
            check_integer(owner, "e_step_every", e_step_every)
        if target_sparsity is not None:
            check_number(owner, "target_sparsity", target_sparsity, high=1, closed=True)
        self._user_groups = groups
        self._slab_variance, self._spike_variance = slab_variance, spike_variance
        self.inclusion_rate = InclusionRate.of(owner, inclusion)
        self.priors: dict[str, SpikeSlab] = {}
        self._e_step_kind = e_step
        self._every = e_step_every or (math.ceil(round(2 / (1 - momentum), 9)) if e_step == "gibbs" else 1)
        self._friction = 1 - momentum
        self._widening_start = float(spike_widening)
        self._target = target_sparsity
        narrow = _WIDE if spike_widening > 1 else 0.0
        self._prune_schedule = pruning.check_schedule(owner, target_sparsity, prune_schedule, narrow)
        self.magnitude_fields = ("mask",) if self._prune_schedule else ()
        self.parameter_fields = ("momentum", *self.magnitude_fields)
        if not callable(self._temperature) and self._temperature != 1:
            warnings.warn(
                f"{owner}: at temperature={self._temperature:g} draws and inclusion probabilities are those of a"
                " tempered posterior, prior included. Take temperature=1 for inference.",
                stacklevel=2,
            )

    @property
    def default_fields(self):
        """The state fields that MCMC collects."""
        return (*super().default_fields, *(("sparsity",) if self._prune_schedule else ()))

    @property
    def groups(self) -> dict[str, WeightGroups]:
        """The groups of each site, in the last run."""
        return {name: prior.groups for name, prior in self.priors.items()}

    @property
    def prunes(self) -> bool:
        """Whether a threshold or a target above 0 asks for pruning."""
        return self._prune_schedule is not None and self._target != 0

    # ---- before a run -----------------------------------------------------------------------------------------

    def _meet_model(self, potential: Potential):
        owner = "SpikeSlabSGHMC"
        kinds = self._default_groups(potential) if self._user_groups is None else self._user_groups
        groups = partition(owner, kinds, {name: z.shape for name, z in self._shapes.items()})
        scales = normal_scales(potential)
        self.priors = {}
        for name, group in groups.items():
            scale = scales[name]
            if isinstance(scale, str):
                raise ValueError(
                    f"{owner}: the prior of '{name}' is {scale}. The kernel replaces a prior Normal(0, constant) by"
                    " spike and slab: give the site such a prior, or leave it out of groups."
                )
            slab = scale**2 if self._slab_variance is None else self._slab_variance
            spike = slab / 100 if self._spike_variance is None else self._spike_variance
            if spike * self._widening_start >= slab:
                widened = f" times spike_widening={self._widening_start:g}" if self._widening_start > 1 else ""
                raise ValueError(
                    f"{owner}: the spike must be narrower than the slab; for '{name}' the spike variance is"
                    f" {spike:g}{widened}, the slab variance {slab:g}."
                )
            self.priors[name] = SpikeSlab(group, slab, spike, scale**2)
        self._warn_of_stiff_spike()
        if self._prune_schedule:
            self._meet_pruning(potential, self._prune_schedule)

    def _default_groups(self, potential: Potential) -> dict[str, Kind]:
        kernels = [
            name
            for name, (_, path) in potential.network.items()
            if len(self._shapes[name].shape) > 1 and path[-1] != "bias"
        ]
        if not kernels:
            raise ValueError(
                "SpikeSlabSGHMC: the model has no network, so groups has no default; name the sites to select from, as"
                f" groups={{'{next(iter(self._shapes))}': 'unstructured'}}. Its sites: {', '.join(self._shapes)}."
            )
        try:
            outputs = output_sites(potential)
        except ValueError as error:
            raise ValueError(
                f"SpikeSlabSGHMC: the output layer can't be told without help, give groups. {error}"
            ) from None
        hidden: dict[str, Kind] = {name: "unstructured" for name in kernels if name not in outputs}
        if not hidden:
            raise ValueError(
                "SpikeSlabSGHMC: every kernel of the network belongs to its output layer, which is left out by default;"
                f" name sites by groups. The kernels: {', '.join(kernels)}."
            )
        return hidden

    def stiffness(self, spike: float) -> float:
        """The largest step as a part of the largest that is stable under the spike, at preconditioner 1."""
        return largest_step(self._schedule) / spike / (2 * (2 - self._friction))

    def _largest_preconditioner(self, name: str) -> float:
        if self._preconditioner.adapts:
            return 1.0
        zeros = {k: np.zeros(z.shape, z.dtype) for k, z in self._shapes.items()}
        with jax.ensure_compile_time_eval():
            return float(np.max(self._preconditioner.diagonal(self._preconditioner.init(zeros), zeros)[name]))

    def _warn_of_stiff_spike(self) -> None:
        name, prior = min(self.priors.items(), key=lambda item: item[1].spike)
        share = self.stiffness(prior.spike) * self._largest_preconditioner(name)
        if share >= 0.5:
            variance = "no bound" if share >= 1 else f"a variance {1 / (1 - share):.3g} times too large"
            warnings.warn(
                f"SpikeSlabSGHMC: the largest step, {largest_step(self._schedule):g}, is long for the spike of"
                f" '{name}', of variance {prior.spike:g}: its weights have {variance}."
                " Take a smaller step, a wider spike or less momentum.",
                stacklevel=7,
            )

    def _meet_pruning(self, potential: Potential, schedule: pruning.Cubic | pruning.Threshold) -> None:
        possible = pruning.largest_sparsity(self.groups, schedule.min_keep)
        if self._target is not None and self._target > possible:
            raise ValueError(
                f"SpikeSlabSGHMC: target_sparsity={self._target:g} would empty a layer: with"
                f" min_keep={schedule.min_keep} groups in each of {', '.join(self.priors)}, at most"
                f" {possible:.4g} of the weights can go."
            )
        slabs = {name: prior.slab for name, prior in self.priors.items()}
        without_scale = sites_without_scale(potential, tuple(self.priors))
        self.pruner = pruning.Pruner(schedule, self._target or 0.0, self.groups, slabs, without_scale)
        if isinstance(schedule, pruning.Threshold):
            for name, prior in self.priors.items():
                temperature = 1.0 if callable(self._temperature) else self._temperature
                size = float(np.min(prior.groups.size))
                floor = temperature * prior.spike * (1 + 3 * math.sqrt(2 / size))
                if name not in without_scale and schedule.mean_square <= floor:
                    warnings.warn(
                        f"SpikeSlabSGHMC: the pruning threshold {schedule.mean_square:g} lies under the noise of the"
                        f" spike of '{name}', about {floor:.3g}, so few of its weights or none will be pruned. Raise"
                        " the threshold, or narrow the spike.",
                        stacklevel=7,
                    )

    def _meet_traced(self, args, kwargs):
        traced = scales_from(args, kwargs, self.potential, tuple(self.priors))
        if traced:
            raise TypeError(
                f"SpikeSlabSGHMC: jit_model_args=True makes the prior scale of '{traced[0]}', an argument of the model,"
                " an array inside the compiled program, where the slab is a constant. Bind it to the model first:"
                " functools.partial(model, scale=...)."
            )

    def _begin_run(self, num_warmup: int):
        idle = ["inclusion is learned"] * (self.inclusion_rate.beta is not None)
        idle += ["the spike is widened"] * (self._widening_start > 1)
        if idle and not num_warmup:
            warnings.warn(
                f"SpikeSlabSGHMC: {' and '.join(idle)} in warm-up, and num_warmup=0: neither happens.", stacklevel=3
            )
        if self._prune_schedule and not num_warmup:
            raise ValueError(
                "SpikeSlabSGHMC: pruning happens in warm-up, so that all kept draws share a mask; with num_warmup=0"
                " there is none. Give num_warmup (of a run that is resumed: what it had), or leave out target_sparsity"
                " and prune_schedule."
            )

    # ---- one step ---------------------------------------------------------------------------------------------

    def _init_fields(self, rng_key, z, warmup_steps):
        rate = {name: jnp.asarray(self.inclusion_rate.first, z[name].dtype) for name in self.priors}
        still = jax.tree.map(jnp.zeros_like, z)
        inclusion = self._e_step(
            z, rate, self._widening(jnp.int32(0), warmup_steps), rng_key, jnp.ones((), self._dtype)
        )
        fields = {"momentum": still, "inclusion": inclusion, "rate": rate}
        fields |= {"mask": (), "mean_inclusion": (), "mean_square": (), "sparsity": jnp.zeros((), self._dtype)}
        if self._prune_schedule:
            zeros = jax.tree.map(jnp.zeros_like, inclusion)
            fields |= {"mask": jax.tree.map(jnp.ones_like, z), "mean_inclusion": zeros, "mean_square": zeros}
        return fields

    def _prior_gradient(self, z, gradient):
        """With the indicators summed out, whatever the E-step is."""
        rate = jnp.asarray(self.inclusion_rate.first, self._dtype)
        p = {n: jax.nn.sigmoid(prior.logit(prior.groups.total(z[n] ** 2), rate)) for n, prior in self.priors.items()}
        return gradient | {n: gradient[n] + prior.gradient(z[n], p[n]) for n, prior in self.priors.items()}

    def _moved(self, state, move):
        groups = self.groups.items()
        spread = {n: jnp.broadcast_to(g.spread(state.inclusion[n]), state.z[n].shape) for n, g in groups}
        moved = move(spread)
        return {"inclusion": {n: (g.total(moved[n]) / g.size).astype(moved[n].dtype) for n, g in groups}}

    def _own_gradient(self, state, gradient, i, warmup_steps):
        widening = self._widening(i, warmup_steps)
        added = {
            name: gradient[name] + prior.gradient(state.z[name], state.inclusion[name], widening)
            for name, prior in self.priors.items()
        }
        return gradient | added

    def _update(self, state, gradient, step):
        z, momentum = sghmc_step(
            state.z,
            state.momentum,
            gradient,
            normal(step.key, state.z),
            step.size,
            step.temperature,
            step.diagonal,
            self._friction,
        )
        fields = {}
        if self._prune_schedule:
            fields = self._prune(state, z, step)
            z, momentum = (x | {n: x[n] * fields["mask"][n] for n in self.priors} for x in (z, momentum))
        z, momentum = like(z, state.z), like(momentum, state.momentum)
        inclusion, rate = self._e_and_m_step(state, z, step)
        return fields | {"z": z, "momentum": momentum, "inclusion": inclusion, "rate": rate}

    def _widening(self, i: Array, warmup_steps: Array) -> Array | float:
        """Factor of the spike variance at step ``i``."""
        if self._widening_start == 1:
            return 1.0
        narrowed = jnp.where(warmup_steps > 0, i / (_WIDE * jnp.maximum(warmup_steps, 1)), 1)
        return jnp.asarray(self._widening_start, self._dtype) ** (1 - jnp.minimum(narrowed, 1)).astype(self._dtype)

    def _e_step(self, z, rate, widening, key, temperature) -> dict[str, Array]:
        """The inclusion of every group at a position."""
        logits = {n: p.logit(p.groups.total(z[n] ** 2), rate[n], widening) for n, p in self.priors.items()}
        if self._e_step_kind == "soft":
            return jax.tree.map(jax.nn.sigmoid, logits)
        if self._e_step_kind == "hard":
            return jax.tree.map(lambda x: (x > 0).astype(x.dtype), logits)
        keys = dict(zip(logits, random.split(key, len(logits)), strict=True))
        # the indicators' law given the weights, at the temperature of the weights
        return {
            name: random.bernoulli(keys[name], jax.nn.sigmoid(x / temperature)).astype(x.dtype)
            for name, x in logits.items()
        }

    def _m_step(self, step, rate, inclusion) -> dict[str, Array]:
        """The learned rate, averaged over the steps of warm-up."""
        if self.inclusion_rate.beta is None:
            return rate
        weight = jnp.where(step.i < step.warmup_steps, (100 / (100 + step.i)) ** 0.75, 0)
        return {n: rate[n] + weight * (self.inclusion_rate.m_step(inclusion[n]) - rate[n]) for n in rate}

    def _e_and_m_step(self, state, z, step):
        def both():
            key = random.fold_in(step.key, len(z))
            temperature = jnp.maximum(step.temperature, 1e-6)
            inclusion = self._e_step(z, state.rate, self._widening(step.i + 1, step.warmup_steps), key, temperature)
            rate = self._m_step(step, state.rate, inclusion)
            return like((inclusion, rate), before)

        before = state.inclusion, state.rate
        if self._every > 1:
            due = (step.i + 1) % self._every == 0
            steps = lambda: lax.cond(due, both, lambda: before)
        else:
            steps = both
        if not self._prune_schedule:
            return steps()
        # past the pruning the slab alone is left
        pruned = step.i + 1 >= self._prune_schedule.steps(step.warmup_steps)[1]
        return lax.cond(pruned, lambda: (jax.tree.map(jnp.ones_like, state.inclusion), state.rate), steps)

    def _prune(self, state, z, step):
        """The running means of what groups are judged by, and the mask that they lead to."""
        means = state.mean_inclusion, state.mean_square
        running, due = self.pruner.when(step.i, step.warmup_steps)
        means = lax.cond(
            running,
            lambda: like(self.pruner.observe(means, self._criteria(z, state.rate), step.i, step.warmup_steps), means),
            lambda: means,
        )
        before = state.mask, state.sparsity
        mask, sparsity = lax.cond(
            due, lambda: like(self.pruner.prune(state.mask, *means, step.i, step.warmup_steps), before), lambda: before
        )
        return {"mask": mask, "sparsity": sparsity, "mean_inclusion": means[0], "mean_square": means[1]}

    def _criteria(self, z, rate) -> tuple[dict[str, Array], dict[str, Array]]:
        """Inclusion probability and mean square of every group."""
        squares = {n: self.pruner.comparable(n, p.groups.total(z[n] ** 2)) for n, p in self.priors.items()}
        inclusion = {n: jax.nn.sigmoid(p.logit(squares[n], rate[n])) for n, p in self.priors.items()}
        return inclusion, {n: self.pruner.mean_square(n, square) for n, square in squares.items()}

    # ---- after a run ------------------------------------------------------------------------------------------

    def _tree_groups(self, mcmc):
        return inclusion_groups(mcmc)
