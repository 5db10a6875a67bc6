# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Linearized Laplace: the posterior of a trained network's tangent, by samples.

.. math::

    h(w, x) = f(w^*, x) + J(x) (w - w^*), \qquad w \mid y \sim N\bigl(w^*, (J^\top \Lambda J + A)^{-1}\bigr).

Samples of that normal law are solutions of linear systems (:mod:`~numpyro_bdl.linear.system`), found by products
with J alone; EM fits A and the noise to the evidence (:mod:`~numpyro_bdl.guides.em`).
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, random
from jax.core import Tracer
from numpyro import handlers
from numpyro.contrib.module import ParamShape
from numpyro.distributions.transforms import biject_to
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.util import transform_fn
from numpyro.primitives import _PYRO_STACK
from tqdm.auto import tqdm

from numpyro_bdl._checks import check_choice, check_integer, check_number
from numpyro_bdl.guides.em import Expectation, expectation, new_noise_scale, new_precisions, whitened_again
from numpyro_bdl.guides.one_of import NO_DENSITY, OneOf
from numpyro_bdl.guides.posterior import LaplacePosterior
from numpyro_bdl.guides.preparation import PRIORS, prepare
from numpyro_bdl.guides.prior import Prior
from numpyro_bdl.guides.reports import Progress, count_outputs, record, statement, warn_of_em, warn_of_solution
from numpyro_bdl.linear.observations import as_key
from numpyro_bdl.linear.solvers import SGD, solver_of
from numpyro_bdl.linear.system import System
from numpyro_bdl.potential import Potential


class AutoLinearizedLaplace(AutoContinuous):
    r"""A guide that is trained as a point, and then asked for the posterior of the network's tangent.

    Under :class:`~numpyro.infer.SVI` it is a Delta at the maximum a posteriori. :meth:`fit` then linearizes the model
    there and samples

    .. math::

        w \mid y \sim N\Bigl(w^*, \Bigl(\sum_i J_i^\top \Lambda_i J_i + A\Bigr)^{-1}\Bigr),

    with :math:`J_i` the Jacobian of the natural parameter of row i, :math:`\Lambda_i` the Fisher information of its
    likelihood and A the prior precision, which is learned by maximizing the evidence of the linear model, unless
    ``prior="model"``. Memory is a few vectors of weights per sample; neither a matrix of weights by weights nor a
    Jacobian is formed.

    :param model: A NumPyro model whose weights have Normal priors with constant location and scale.
    :param num_samples: Posterior samples, K. The relative error of a variance is :math:`\sqrt{2/K}`.
    :param prior: What A is. ``"model"``: the precision of the model's own priors. ``"isotropic"``: one precision.
        ``"per_site"``: one for each site. ``"per_group"``: one for each of ``groups``. ``"g"``: one, times the diagonal
        of :math:`J^\top \Lambda J`, which gives each feature the same size whatever the scale of its layer.
    :param groups: For ``prior="per_group"``: a predicate of the name of a site for each name of a group.
    :param noise_site: A latent site that is the scale of a Normal likelihood, or a factor of it, to be learned too.
        Such sites stay where they were trained otherwise.
    :param solver: ``"sgd"``, ``"cg"`` (the reference) or ``"dual"``, or a :class:`~numpyro_bdl.linear.SGD`,
        :class:`~numpyro_bdl.linear.ConjugateGradient` or :class:`~numpyro_bdl.linear.DualDescent` with settings.
    :param em_steps: Most EM iterations.
    :param em_samples: Samples of the iterations, at most ``num_samples``.
    :param em_tolerance: EM stops when no logarithm of a precision or noise scale changes by more.
    :param params: Which weights are linearized: ``"all"``, ``"last_layer"`` (those in which the function is affine), or
        a predicate of the name of a site. The others stay at their trained values.
    :param freeze: Parameters of networks that are never linearized, a predicate of the name of a site; None for scales
        and biases of normalization layers.
    :param curvature_at: Where :math:`\Lambda` is taken: ``"map"``, the outputs of the network, or ``"linear"``, those
        of the mode of the linear model.
    :param center: The mean of the samples: ``"map"``, the trained weights, whose prediction is the network's, or
        ``"linear"``, the mode of the linear model under the learned prior.
    :param sample_chunk: Samples that a product works on at a time; None for all. Fewer take less memory.
    :param prefix: Prefix of the names of the guide's sites.
    :param init_loc_fn: A NumPyro initialization strategy; None draws the parameters of networks from their own
        initializers.
    :raises ValueError: for settings that don't fit.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from flax import linen as nn
        >>> from jax import random
        >>> from numpyro.contrib.module import random_flax_module
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> import numpyro_bdl as bdl
        >>> class MLP(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(1)(nn.tanh(nn.Dense(10)(x)))[..., 0]
        >>> def model(x, y=None):
        ...     net = random_flax_module("net", MLP(), dist.Normal(0, 1), input_shape=(1,))
        ...     with numpyro.plate("data", len(x)):
        ...         xb = numpyro.subsample(x, event_dim=1)
        ...         yb = None if y is None else numpyro.subsample(y, event_dim=0)
        ...         numpyro.sample("y", dist.Normal(net(xb), 0.1), obs=yb)
        >>> x = jnp.linspace(-1, 1, 40)[:, None]
        >>> y = jnp.sin(3 * x[:, 0])
        >>> guide = bdl.AutoLinearizedLaplace(model, solver="cg", num_samples=100)
        >>> svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
        >>> result = svi.run(random.key(0), 2000, x, y, progress_bar=False)
        >>> posterior = guide.fit(random.key(1), result.params, x, y, progress_bar=False)
        >>> f = bdl.PosteriorPredictive(posterior).functions(jnp.array([[0.0], [3.0]]))["y"]
        >>> f.shape                                                        # (chain, sample, row)
        (1, 100, 2)
        >>> bool(f[..., 1].std() > 5 * f[..., 0].std())                    # less is known where there are no data
        True

    **References:** Khan et al., *Approximate inference turns deep networks into Gaussian processes*, NeurIPS 2019;
    Immer et al., *Improving predictions of Bayesian neural nets via local linearization*, AISTATS 2021; Antorán et al.,
    *Sampling-based inference for large linear models, with application to linearised Laplace*, ICLR 2023.
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_samples: int = 64,
        prior: str = "isotropic",
        groups: Mapping[str, Callable[[str], bool]] | None = None,
        noise_site: str | None = None,
        solver: Any = "sgd",
        em_steps: int = 5,
        em_samples: int = 16,
        em_tolerance: float = 0.01,
        params: str | Callable[[str], bool] = "all",
        freeze: Callable[[str], bool] | None = None,
        curvature_at: str = "map",
        center: str = "map",
        sample_chunk: int | None = None,
        prefix: str = "auto",
        init_loc_fn: Callable | None = None,
    ):
        owner = type(self).__name__
        check_choice(owner, "prior", prior, PRIORS)
        check_choice(owner, "curvature_at", curvature_at, ("map", "linear"))
        check_choice(owner, "center", center, ("map", "linear"))
        check_integer(owner, "num_samples", num_samples)
        check_integer(owner, "em_steps", em_steps)
        check_integer(owner, "em_samples", em_samples)
        check_number(owner, "em_tolerance", em_tolerance, closed=True)
        if sample_chunk is not None:
            check_integer(owner, "sample_chunk", sample_chunk)
        if not callable(params):
            check_choice(owner, "params", params, ("all", "last_layer"))
        solver = solver_of(owner, solver)
        if (prior == "per_group") != (groups is not None):
            raise ValueError(
                f'{owner}: groups, a predicate of site names by name of the group, belong to prior="per_group", got'
                f" prior={prior!r} and groups={groups!r}."
            )
        self._learns = prior != "model" or noise_site is not None
        if self._learns and min(num_samples, em_samples) < 2:
            raise ValueError(
                f"{owner}: EM needs at least 2 samples, got num_samples={num_samples} and em_samples={em_samples}; to"
                ' do without EM, give prior="model" and no noise_site.'
            )
        self.num_samples, self.em_samples = num_samples, min(em_samples, num_samples)
        self.prior, self.groups, self.noise_site, self.solver = prior, groups, noise_site, solver
        self.em_steps, self.em_tolerance = em_steps, em_tolerance
        self.weights, self.freeze = params, freeze
        self.curvature_at, self.center, self.sample_chunk = curvature_at, center, sample_chunk
        self._own_initializers = init_loc_fn is None
        self._last: tuple[Potential, list, Any] | None = None
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn or numpyro.infer.init_to_uniform)

    # ---- as a guide -----------------------------------------------------------------------------------------------

    def _setup_prototype(self, *args, **kwargs):
        super()._setup_prototype(*args, **kwargs)
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves([s["value"] for s in self._sites.values()])):
            # traced under jit, the model can't be run again with what it saw: no deterministic sites then
            latent = {k: biject_to(self._sites[k]["fn"].support) for k in self._init_locs}
            self._postprocess_fn = partial(transform_fn, latent)
        if self._own_initializers:
            key = numpyro.prng_key()
            assert key is not None  # NumPyro's own prototype has asked for one
            with handlers.block():
                # parameters without a prior are SVI's to train
                potential = Potential(self.model, args, kwargs, frozen="*" if self._has_free_parameters() else ())
                z = potential.initial(key)[0]
            self._init_locs = {k: z[k] for k in self._init_locs}
            self._init_latent = self._flat(self._init_locs)

    @property
    def _sites(self) -> dict[str, Any]:
        assert self.prototype_trace is not None  # set by _setup_prototype
        return dict(self.prototype_trace)

    def _flat(self, z: dict[str, Array]) -> Array:
        """Unconstrained latent sites as the vector of the guide."""
        return jnp.concatenate([jnp.ravel(z[k]) for k in self._init_locs])

    def _has_free_parameters(self) -> bool:
        params = {k: s["value"] for k, s in self._sites.items() if s["type"] == "param"}
        leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, ParamShape))
        return any(not isinstance(leaf, ParamShape) for leaf in leaves)

    def _samples(self) -> Array | None:
        """The samples, if a handler holds them. They are no site, or every trace would keep a copy of all of them."""
        name = f"{self.prefix}_samples"
        for handler in reversed(_PYRO_STACK):
            if isinstance(handler, handlers.substitute) and handler.data is not None and name in handler.data:
                return handler.data[name]
        return None

    def _get_posterior(self):
        loc = numpyro.param(f"{self.prefix}_loc", self._init_latent)
        samples = self._samples()
        return dist.Delta(loc, event_dim=1) if samples is None else OneOf(samples)

    def get_base_dist(self):
        """Refused: the samples have no density."""
        raise NotImplementedError(NO_DENSITY)

    def get_transform(self, params):
        """Refused: the samples have no density."""
        raise NotImplementedError(NO_DENSITY)

    def median(self, params: dict) -> dict[str, Array]:
        """The trained values.

        :param params: Of SVI, or of a :class:`~numpyro_bdl.guides.LaplacePosterior`.
        """
        return self._unpack_and_constrain(params[f"{self.prefix}_loc"], params)

    def quantiles(self, params: dict, quantiles: Any) -> dict[str, Array]:
        """Quantiles of the samples, for each entry of each latent site.

        :param params: ``posterior.params``.
        :param quantiles: Numbers in [0, 1].
        :raises ValueError: before :meth:`fit`.
        """
        name = f"{self.prefix}_samples"
        if name not in params:
            raise ValueError(f"quantiles needs samples: hand in the params of what fit returns, which hold '{name}'.")
        latent = jnp.quantile(params[name], jnp.asarray(quantiles), axis=0)
        return self._unpack_and_constrain(latent, params)

    # ---- the posterior --------------------------------------------------------------------------------------------

    def fit(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        *args,
        batch_size: int | None = None,
        progress_bar: bool = True,
        **kwargs,
    ) -> LaplacePosterior:
        """Samples of the posterior of the tangent at trained weights.

        :param rng_key: PRNG key.
        :param params: What SVI trained; with mutable collections (BatchNorm), ``result.params |
            result.state.mutable_state``.
        :param args: Positional arguments of the model: all of the data.
        :param batch_size: Rows that are linearized at a time; None for all. It is not handed to the model, whose plate
            is given its rows. Samples do not depend on it, except by the noise of stochastic solvers.
        :param progress_bar: Show a bar, and before it what is linearized and how much memory that takes.
        :param kwargs: Keyword arguments of the model, as ``train=False``.
        :return: The posterior.
        :raises ValueError: for weights whose prior is not a constant Normal, latent sites that are neither weights nor
            noise scales, networks in training mode, a model that can't be cut, curvature that is not finite.
        :warns UserWarning: for weights far from their optimum, linear systems that are not solved, a model that
            interpolates its data, groups that share a prior with layers that have no scale.
        """
        rng_key = as_key("AutoLinearizedLaplace.fit", rng_key)
        potential = self._potential_of(params, args, kwargs)
        mutable = potential.collections(params)
        if self.prototype_trace is None:
            with handlers.seed(rng_seed=0):
                self._setup_prototype(*args, **kwargs)
        name = f"{self.prefix}_loc"
        if name not in params:
            raise ValueError(
                f"params must hold '{name}', as SVI trained it with this guide; they hold: {list(params)}."
            )
        if jnp.shape(params[name]) != (self.latent_dim,):
            raise ValueError(
                f"'{name}' has shape {jnp.shape(params[name])}, but the latent sites of the model are {self.latent_dim}"
                " numbers: was it trained with this model?"
            )
        z: Any = self._unpack_latent(params[name])
        values = potential.constrain(z, args, kwargs)
        values = {k: jnp.asarray(values[k]) for k in potential.latent}

        system, prior, frozen, clipped = prepare(self, rng_key, potential, values, mutable, args, kwargs, batch_size)
        weights = system.model.weights
        if progress_bar:
            tqdm.write(statement(system, self.num_samples, self.solver.vectors, frozen, prior))
        found, prior, system, history = self._expectation_maximization(rng_key, system, prior, progress_bar)
        warn_of_solution(found, system)

        mode = None
        if found.mode is not None:
            mode = {k: weights[k] + d for k, d in system.displacement(found.mode).items()}
        mean = weights if mode is None or self.center == "map" else mode
        samples = {k: mean[k] + z for k, z in system.whiten(found.samples).items()}
        every = {k: jnp.broadcast_to(w, (self.num_samples, *w.shape)) for k, w in system.model.others.items()} | samples
        every = {k: every[k] for k in potential.latent}
        return LaplacePosterior(
            params=dict(params) | {f"{self.prefix}_samples": jax.vmap(self._pack)(every)},
            loc=values,
            linear_mode=None if mode is None else system.model.others | mode,
            samples=every,
            prior_precision={k: float(a) for k, a in prior.alpha.items()},
            prior_unit=prior.unit,
            groups=prior.groups,
            frozen=frozen,
            noise_scale=None if self.noise_site is None else system.model.others[self.noise_site],
            effective_dimension=float(sum(found.dimension.values())),
            residual=float(found.residual),
            clipped=clipped,
            history=history,
            system=system,
            arguments=(args, kwargs),
        )

    def _potential_of(self, params: Mapping[str, Any], args: tuple, kwargs: dict) -> Potential:
        """The potential of a model at its data; if they are those of the last call its own, with its programs."""
        leaves = jax.tree.leaves((args, kwargs))
        if self._last is not None:
            potential, before, structure = self._last
            same = structure == jax.tree.structure((args, kwargs))
            if same and all(a is b for a, b in zip(leaves, before, strict=True)) and not potential.frozen:
                return potential
        potential = Potential(self.model, args, kwargs, params=params)
        self._last = potential, leaves, jax.tree.structure((args, kwargs))
        return potential

    def __getstate__(self):
        return super().__getstate__() | {"_last": None}

    def _pack(self, values: dict[str, Array]) -> Array:
        """Constrained latent sites as the flat vector of the guide."""
        laws = {k: self._sites[k]["fn"] for k in values}
        return self._flat({k: biject_to(laws[k].support).inv(v) for k, v in values.items()})

    def _expectation_maximization(self, key, system: System, prior: Prior, progress_bar: bool):
        """EM, and then all samples under the prior that it found."""
        solver, samples, mode, records = self.solver, None, None, []
        if self._learns or "linear" in (self.center, self.curvature_at):
            mode = jax.tree.map(lambda d, s: -d / s, system.offset, system.scale)  # begins at the trained weights
        steps = self.em_steps if self._learns else 0
        with Progress(steps + 1, progress_bar) as bar:
            for step in itertools.count():
                last = step == steps
                # EM with the same noise at every step; that of the last step is for more samples
                keys = random.fold_in(key, 1 + last), random.fold_in(key, 3)
                count = self.num_samples if last else self.em_samples
                bar.begin(step, steps)
                found, solved = expectation(
                    system, solver, keys, mode, None if last else samples, count, self.curvature_at, bar.report
                )
                records.append(record(prior, found, system, self.noise_site))
                bar.say(records[-1])
                if last:
                    return found, prior, solved, {k: np.array([r[k] for r in records]) for k in records[0]}
                if isinstance(solver, SGD) and solver.objective == "auto":
                    interpolates = sum(found.dimension.values()) > count_outputs(system) / 2
                    solver = replace(solver, objective="original" if interpolates else "transformed")
                samples = found.samples
                system, prior, mode, change = self._maximization(solved, prior, found)
                if change < self.em_tolerance:
                    steps = step + 1
                elif step + 1 == steps:
                    warn_of_em(change, steps)

    def _maximization(self, system: System, prior: Prior, found: Expectation):
        change = 0.0
        model, before, mode = system.model, system.scale, found.mode
        if self.noise_site is not None:
            noise = new_noise_scale(system, found, self.noise_site)
            change = float(jnp.max(jnp.abs(jnp.log(noise / model.others[self.noise_site]))))
            model = replace(model, others=model.others | {self.noise_site: noise})
        if self.prior != "model":
            alpha = new_precisions(prior, found)
            change = max([change, *(abs(float(jnp.log(alpha[g] / prior.alpha[g]))) for g in alpha)])
            prior = prior._replace(alpha=alpha)
        system = system._replace(model=replace(model, curved_at=None), scale=prior.scale)
        return system, prior, whitened_again(mode, before, system.scale), change
