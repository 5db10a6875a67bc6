# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Deep ensembles as a Wasserstein gradient flow, with or without noise and repulsion.

Particles :math:`\theta_1, \dots, \theta_N` follow, by Euler's method, the gradient flow of
:math:`L(Q) = E_Q[\ell] + \frac{\lambda_1}{2} \mathrm{MMD}^2(Q, P) + \lambda_2 \mathrm{KL}(Q, P)`:

.. math::

    \theta_n \leftarrow \theta_n - a \Bigl[ \nabla \ell(\theta_n) - \lambda_2 \nabla \log p(\theta_n)
        + \lambda_1 \Bigl( \frac1N \sum_j \nabla_1 k(\theta_n, \theta_j) - \nabla \mu_P(\theta_n) \Bigr) \Bigr]
        + \sqrt{2 a \lambda_2} \, \xi_n

with :math:`\ell` minus the log likelihood of all data, P the prior and p its density in unconstrained space.

Source: Wild, Ghalebikesabi, Sejdinovic and Knoblauch, *A rigorous link between deep ensembles and (variational)
Bayesian methods*, NeurIPS 2023, equation (131).
"""

import warnings
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.util import is_prng_key

from numpyro_bdl._checks import check_choice, check_finite_data, check_integer, check_number
from numpyro_bdl._chunks import in_chunks
from numpyro_bdl.kernels.base import CHAINS, SGState, StochasticGradientKernel
from numpyro_bdl.kernels.sgld import sgld_step
from numpyro_bdl.mmd import KERNELS, RBF, ROLLING, Kernel
from numpyro_bdl.noise import normal
from numpyro_bdl.potential import Position, Potential
from numpyro_bdl.probes import flat_sites
from numpyro_bdl.repulsion import make_repulsion, repulsion_and_attraction, warn_if_inert

WGFState = namedtuple("WGFState", [*SGState._fields, "optimizer", "repulsion_ratio", "particle_key"])
"""The fields of :data:`SGState`, and

 - **optimizer** - state of the optax optimizer, () if there is none.
 - **repulsion_ratio** - length of the repulsion over that of the drift of the prior, at the last step.
 - **particle_key** - keys of the particles, from which all noise is drawn. **rng_key**, of which there is one for the
   ensemble, MCMC replaces when a run is resumed; nothing is drawn from it.
"""


def wgf_drift(gradient, repulsion, attraction, mmd):
    r"""The drift, :math:`\nabla \ell - \lambda_2 \nabla \log p + \lambda_1 (\frac1N \sum_j \nabla_1 k - \nabla \mu_P)`.

    :param gradient: :math:`\nabla \ell - \lambda_2 \nabla \log p` at a particle, a tree of arrays.
    :param repulsion: :math:`\frac1N \sum_j \nabla_1 k`, like the gradient.
    :param attraction: :math:`\nabla \mu_P`, like the gradient.
    :param mmd: :math:`\lambda_1`.
    """
    return jax.tree.map(lambda g, r, p: g + mmd * (r - p), gradient, repulsion, attraction)


def wgf_step(z, drift, noise, size, kl, diagonal):
    r"""One step, :math:`\theta - a P \, \text{drift} + \sqrt{2 a \lambda_2 P} \, \xi`.

    :param z: Particle, a tree of arrays.
    :param drift: From :func:`wgf_drift`, or the gradient alone.
    :param noise: Standard normal :math:`\xi`, like the particle; None for none.
    :param size: Step size a, a scalar.
    :param kl: :math:`\lambda_2`, a scalar.
    :param diagonal: Preconditioner P, like the particle, of arrays or numbers.
    :return: The next position.
    """
    if noise is None:
        return jax.tree.map(lambda w, g, p: w - size * p * g, z, drift, diagonal)
    return sgld_step(z, drift, noise, size, kl, diagonal)


class WGFEnsemble(StochasticGradientKernel):
    r"""Deep ensembles as a Wasserstein gradient flow: the chains are the particles of one ensemble.

    With N particles, the energy of the data :math:`\ell`, the prior P and a kernel k, a step is

    .. math::

        \theta_n \leftarrow \theta_n - a \Bigl[ \nabla \ell(\theta_n) - \lambda_2 \nabla \log p(\theta_n)
            + \lambda_1 \Bigl( \frac1N \sum_j \nabla_1 k(\theta_n, \theta_j) - \nabla \mu_P(\theta_n) \Bigr) \Bigr]
            + \sqrt{2 a \lambda_2} \, \xi_n

    with :math:`\lambda_1` = ``mmd`` and :math:`\lambda_2` = ``kl``. As :math:`a \to 0` the particles together follow

    .. math::

        \pi_N \propto \exp\Bigl(-\frac{1}{\lambda_2} \Bigl[ \sum_n \bigl(\ell - \lambda_1 \mu_P - \lambda_2 \log p\bigr)
            (\theta_n) + \frac{\lambda_1}{2 N} \sum_{nm} k(\theta_n, \theta_m) \Bigr]\Bigr)

    and, for many of them, each the measure that minimizes
    :math:`E_Q[\ell] + \frac{\lambda_1}{2} \mathrm{MMD}^2(Q, P) + \lambda_2 \mathrm{KL}(Q, P)`.

    ====================  =======================================  ================================================
    name                  arguments                                what the particles do
    ====================  =======================================  ================================================
    deep ensemble (DE)    ``kl=0``                                 descend the loss, each to the minimum it began near
    MAP-DE                ``langevin=False``                       the same with the prior as weight decay
    DLE                   (defaults)                               Langevin: the posterior, independently
    DRLE                  ``mmd=...``                              Langevin with repulsion: the law above
    DRE                   ``mmd=..., kl=0``                        repulsion without noise: no unique law
    ====================  =======================================  ================================================

    ``kl`` weighs KL to the prior: it tempers the likelihood and not the prior, unlike the ``temperature`` of other
    kernels. At ``kl=1, mmd=0`` the target is the posterior. A weight of 1e-4 on a mean squared error of n rows is
    ``kl`` = 1e-4 n / (2 noise variance) here, as the energy is that of all rows.

    It needs ``chain_method="vectorized"`` and two particles at least. A particle that turns NaN takes with it those
    that it repels.

    :param kl: :math:`\lambda_2 \ge 0`.
    :param mmd: :math:`\lambda_1 \ge 0`; 0 has no repulsion, no communication between particles, and no use for the
        arguments that concern it. A radial kernel is multiplied by the number of features that it compares
        (:mod:`numpyro_bdl.mmd`), so that about ``kl`` is a force comparable to the prior's.
    :param langevin: Add the noise. Without it a weight of ``kl`` remains as weight decay.
    :param optimizer: Any optax transformation of gradients, in place of ``step_size`` and ``preconditioner``; only
        without noise, which it would turn into noise of another law.
    :param step_size: See :class:`~numpyro_bdl.kernels.base.StochasticGradientKernel`.
    :param kernel: :class:`~numpyro_bdl.mmd.RBF` (None), :class:`~numpyro_bdl.mmd.IMQ`,
        :class:`~numpyro_bdl.mmd.Energy`, :class:`~numpyro_bdl.mmd.Linear`, or a callable from two vectors to a number.
    :param repulsion: ``"function"`` compares particles by the function of the model at ``anchor_inputs``,
        ``"weights"`` by their positions in unconstrained space; None is the first if the model has a network.
    :param anchor_inputs: A tuple of arguments of the model; those not given have their defaults. None takes 64 rows of
        the data (all, if the model does not take its rows through its plate), where the repulsion works against the
        likelihood: inputs off the data are a better choice.
    :param per_site: With ``repulsion="weights"``, a kernel with a bandwidth of its own for each latent site; their sum
        is the kernel.
    :param prior_draws: Fixed draws from the prior for bandwidth and :math:`\mu_P`, where these have no closed form.
    :param particle_chunk: How many particles take their gradients at a time, if memory is short; None for all.
    :param devices: Devices over which the particles are spread; their number divides that of the particles. A pickle
        of the kernel is without them.
    :param share_batch: Give all particles the same minibatches, as by default.

    The other arguments are those of :class:`~numpyro_bdl.kernels.base.StochasticGradientKernel`, but for
    ``temperature``, which it does not have.

    :raises ValueError: for weights that are negative, an optimizer beside the noise or a step size; when a run starts,
        for another chain method or a single particle, inputs that the model can't be called with, and a bandwidth
        that the prior does not give.

    **Example**

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> kernel = bdl.WGFEnsemble(model, step_size=1e-2, mmd=1.0, steps_per_draw=20)
        >>> mcmc = MCMC(kernel, num_warmup=50, num_samples=500, num_chains=10, chain_method="vectorized",
        ...             progress_bar=False)
        >>> mcmc.run(random.key(0), 1 + random.normal(random.key(1), (20,)))
        >>> mcmc.get_samples(group_by_chain=True)["mu"].shape                      # (particle, draw)
        (10, 500)

    **References:** Wild, Ghalebikesabi, Sejdinovic and Knoblauch, *A rigorous link between deep ensembles and
    (variational) Bayesian methods*, NeurIPS 2023.
    """

    State = WGFState

    def __init__(
        self,
        model,
        *,
        step_size=None,
        optimizer: optax.GradientTransformation | None = None,
        kl: float = 1.0,
        mmd: float = 0.0,
        langevin: bool = True,
        kernel: Kernel | None = None,
        repulsion: str | None = None,
        anchor_inputs: tuple | None = None,
        per_site: bool = False,
        prior_draws: int = 200,
        particle_chunk: int | None = None,
        devices: Sequence | None = None,
        share_batch: bool = True,
        **kwargs,
    ):
        owner = type(self).__name__
        if "temperature" in kwargs:
            raise TypeError(
                f"{owner} has no temperature: kl weighs KL to the prior, which tempers the likelihood alone."
            )
        if (step_size is None) == (optimizer is None):
            raise ValueError(f"{owner}: give one of step_size and optimizer.")
        super().__init__(model, step_size=1.0 if step_size is None else step_size, share_batch=share_batch, **kwargs)
        for name, value in (("kl", kl), ("mmd", mmd)):
            check_number(owner, name, value, closed=True)
        check_integer(owner, "prior_draws", prior_draws, least=2)
        if particle_chunk is not None:
            check_integer(owner, "particle_chunk", particle_chunk)
        self._kl, self._mmd = float(kl), float(mmd)
        self._noisy = bool(langevin) and self._kl > 0
        self._optimizer = optimizer
        if optimizer is not None:
            self._check_optimizer(optimizer)
        self._mmd_kernel = RBF() if kernel is None else kernel
        self._where, self._anchor_inputs, self._per_site = repulsion, anchor_inputs, bool(per_site)
        self._check_repulsion()
        self._prior_draws, self._particle_chunk = prior_draws, particle_chunk
        if devices is not None and not (isinstance(devices, Sequence) and devices):
            raise TypeError(f"{owner}: devices must be a list of devices, as jax.devices(), got {devices!r}.")
        self._devices = devices

    def _check_optimizer(self, optimizer) -> None:
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise TypeError(f"WGFEnsemble: optimizer must be an optax transformation, got {type(optimizer).__name__}.")
        if self._noisy:
            raise ValueError(
                "WGFEnsemble: noise that passes through an optimizer samples another law. Give step_size (and a"
                " preconditioner), or switch the noise off by langevin=False, or kl=0 for a plain deep ensemble."
            )
        if self._preconditioner.adapts or self._preconditioner.diagonal((), {"w": 1}) != {"w": 1}:
            raise ValueError("WGFEnsemble: give one of preconditioner and optimizer.")

    def _check_repulsion(self) -> None:
        if self._where is not None:
            check_choice("WGFEnsemble", "repulsion", self._where, ("function", "weights"))
        kernel = self._mmd_kernel
        if isinstance(kernel, type) or not (callable(kernel) or isinstance(kernel, KERNELS)):
            raise TypeError(
                "WGFEnsemble: kernel must be of numpyro_bdl.mmd, as mmd.RBF(), or a callable from two vectors to a"
                f" number, got {kernel!r}."
            )
        if self._anchor_inputs is not None:
            if not isinstance(self._anchor_inputs, tuple):
                raise TypeError("WGFEnsemble: anchor_inputs is a tuple of arguments of the model, as (x_anchor,).")
            check_finite_data({"anchor_inputs": self._anchor_inputs}, "WGFEnsemble: ")
            if self._where == "weights":
                raise ValueError('WGFEnsemble: anchor_inputs has no use with repulsion="weights".')
        if self._per_site and self._where != "weights":
            raise ValueError('WGFEnsemble: per_site goes with repulsion="weights".')
        if self._mmd and getattr(self._mmd_kernel, "bandwidth", None) == ROLLING:
            warnings.warn(
                "WGFEnsemble: with a rolling bandwidth the target changes from step to step, and the particles follow"
                " no stationary law.",
                stacklevel=4,
            )

    # ---- one step -----------------------------------------------------------------------------------------------

    def _gradient(self, z, rows, key, mutable, args, kwargs):
        def gradient(z, rows, key, mutable):
            return self.potential.gradient(z, rows, key, mutable, args, kwargs, prior_weight=self._kl)

        chunked = gradient if self._particle_chunk is None else in_chunks(gradient, self._particle_chunk)
        return chunked(z, rows, key, mutable)

    def _update(self, state, gradient, step):
        fields: dict[str, Any] = {}
        drift = gradient
        if self._mmd:
            repulsion, attraction = repulsion_and_attraction(state.z, state.mutable, self._repulsion, CHAINS)
            drift = wgf_drift(gradient, repulsion, attraction, self._mmd)
            fields["repulsion_ratio"] = self._ratio(state.z, state.mutable, repulsion)
        if self._optimizer is not None:
            updates, fields["optimizer"] = self._optimizer.update(drift, state.optimizer, state.z)
            return fields | {"z": optax.apply_updates(state.z, updates)}
        noise = normal(step.key, state.z) if self._noisy else None
        # a cyclical schedule explores without noise
        kl = self._kl * step.temperature
        return fields | {"z": wgf_step(state.z, drift, noise, step.size, kl, step.diagonal)}

    def _ratio(self, z: Position, mutable: dict, repulsion: Position) -> Array:
        """The repulsion beside the drift of the prior, at a weight of 1 if it has none."""
        potential = self.potential
        rows = {name: jnp.arange(plate.subsample_size) for name, plate in potential.subsampled.items()}
        # the network is not evaluated: of the energies only the prior is used
        prior = lambda z: potential.energies(z, rows, random.key(0), mutable, potential.args, potential.kwargs)[0].prior
        drift, force = optax.tree.norm(jax.grad(prior)(z)) * (self._kl or 1.0), self._mmd * optax.tree.norm(repulsion)
        return jnp.where(force == 0, 0, force / drift)

    def _init_fields(self, rng_key, z, warmup_steps):
        optimizer = () if self._optimizer is None else self._optimizer.init(z)
        return {"optimizer": optimizer, "repulsion_ratio": jnp.zeros((), self._dtype), "particle_key": rng_key}

    def _meet_traced(self, args, kwargs):
        if self._mmd:
            raise ValueError(
                "WGFEnsemble: a repulsion is made for the arguments with which a run begins, from which it has anchors,"
                " bandwidth and draws of the prior; with jit_model_args=True others could follow. Use"
                " jit_model_args=False."
            )

    # ---- NumPyro's contract -------------------------------------------------------------------------------------

    @property
    def is_ensemble_kernel(self):
        """Particles are drawn together: see NumPyro's MCMCKernel."""
        return True

    @property
    def default_fields(self):
        """The state fields that MCMC collects."""
        own = () if self._optimizer is not None else ("step_size",)
        return ("z", "mutable", "minibatch_energy", *own, *(("repulsion_ratio",) if self._mmd else ()))

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        """The first state of the ensemble, for a batch of keys; see NumPyro's MCMCKernel."""
        if is_prng_key(rng_key):
            raise ValueError(
                "WGFEnsemble: its particles are the chains of one vectorized run. Give MCMC"
                ' chain_method="vectorized" and num_chains, the number of particles, at least 2.'
            )
        state = super().init(rng_key, num_warmup, init_params, model_args, model_kwargs)
        if self._mmd:
            state = state._replace(repulsion_ratio=self._first_ratio(state.z, state.mutable))
            warn_if_inert(state.repulsion_ratio)
        return self._placed(state._replace(rng_key=rng_key[0], particle_key=state.rng_key))

    def sample(self, state, model_args, model_kwargs):
        """The state one draw later; see NumPyro's MCMCKernel."""
        # the key of MCMC steps aside, while the particles have their own
        after = super().sample(state._replace(rng_key=state.particle_key), model_args, model_kwargs)
        return after._replace(rng_key=state.rng_key, particle_key=after.rng_key)

    def get_diagnostics_str(self, state) -> str:
        """The text behind the progress bar, of all particles together."""
        text = "" if self._optimizer is not None else f"step size {float(state.step_size[0]):.1e}, "
        text += f"loss {float(state.minibatch_energy.mean()):.3g}"
        if self._mmd:
            text += f", repulsion {float(jnp.median(state.repulsion_ratio)):.1e} of the prior's drift"
        bad = np.asarray(state.first_bad_step)
        first = f", {np.sum(bad >= 0)} PARTICLES NOT FINITE, the first since step {min(bad[bad >= 0], default=0)}"
        return text + (first if np.any(bad >= 0) else "")

    def _placed(self, state):
        """The particles spread over the devices, what they share on each."""
        if self._devices is None:
            return state
        particles = len(state.i)
        if particles % len(self._devices):
            raise ValueError(
                f"WGFEnsemble: {particles} particles can't be spread evenly over {len(self._devices)} devices."
            )
        mesh = Mesh(np.asarray(self._devices), (CHAINS,))
        spread, whole = NamedSharding(mesh, PartitionSpec(CHAINS)), NamedSharding(mesh, PartitionSpec())
        # counts that all particles have in common are needed by all of them
        common = ("i", "warmup_steps", "rng_key")
        return type(state)(
            **{k: jax.device_put(v, whole if k in common else spread) for k, v in state._asdict().items()}
        )

    # ---- the model at hand --------------------------------------------------------------------------------------

    def _meet_model(self, potential: Potential):
        flat = flat_sites(potential) if self._noisy else []
        if flat:
            warnings.warn(
                f"WGFEnsemble: the prior of {', '.join(flat)} is flat. Where the likelihood does not hold them"
                " back the particles drift away, and there is no law that they follow: give a proper prior.",
                stacklevel=2,
            )
        if self._mmd:
            options = self._anchor_inputs, self._per_site, self._prior_draws
            self._repulsion = make_repulsion(potential, self._mmd_kernel, self._where, *options)
            ratio = lambda z, m: self._ratio(z, m, repulsion_and_attraction(z, m, self._repulsion, CHAINS)[0])
            self._first_ratio = jax.jit(jax.vmap(ratio, axis_name=CHAINS))

    def _tree_attributes(self):
        return {"kl": self._kl, "mmd": self._mmd, "langevin": int(self._noisy)}

    def __getstate__(self):
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in ("_repulsion", "_first_ratio")} | {"_devices": None}
