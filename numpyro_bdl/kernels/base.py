# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The one abstract kernel: everything that a stochastic-gradient kernel is, but its update."""

import copy
import warnings
from abc import abstractmethod
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.core import Tracer
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_bdl import preconditioners
from numpyro_bdl._checks import check_choice, check_finite_data, check_integer, check_number, named_arguments
from numpyro_bdl.minibatch import STREAMS, independent, plate_rows
from numpyro_bdl.potential import Position, Potential
from numpyro_bdl.preconditioners import Preconditioner
from numpyro_bdl.schedules import Schedule, as_schedule

CHAINS = "chains"
"""Name of the axis of vectorized chains, for the collectives of an ensemble."""

SGState = namedtuple(
    "SGState",
    [
        "i",
        "z",
        "mutable",
        "preconditioner",
        "minibatch_energy",
        "step_size",
        "temperature",
        "first_bad_step",
        "warmup_steps",
        "batch_key",
        "rng_key",
    ],
)
"""State of a stochastic-gradient kernel; a kernel may add fields of its own behind these.

 - **i** - gradient steps taken, warm-up included.
 - **z** - position: latent sites in unconstrained space.
 - **mutable** - mutable collections of the networks (BatchNorm), {} if there are none.
 - **preconditioner** - state of the preconditioner.
 - **minibatch_energy** - energy at the last gradient, from its minibatch: a noisy number, of use as a trace.
 - **step_size** - size of the last step.
 - **temperature** - temperature of the last step.
 - **first_bad_step** - the first step whose energy or gradient was not finite, -1 if there was none.
 - **warmup_steps** - steps of the warm-up that the chain began with, after which what adapts is frozen.
 - **batch_key** - key of the index streams; a run does not change it.
 - **rng_key** - key of everything else.
"""


class Step(NamedTuple):
    """What a kernel's update is given besides its state and the gradient."""

    i: Array
    """step count"""
    size: Array
    """step size a"""
    temperature: Array
    """temperature T"""
    diagonal: Position
    """preconditioner P, like the position: arrays, or the number 1"""
    key: Array
    """PRNG key of the step's noise"""
    warmup_steps: Array
    """steps of the warm-up"""
    another_gradient: Callable[[Position], Position]
    """the gradient of one more minibatch, independent of the step's own"""


class StochasticGradientKernel(MCMCKernel):
    r"""Base of the kernels that follow a stochastic gradient of the energy of a NumPyro model.

    The base finds the energy, chooses the rows, takes the gradient, schedules step and temperature, adapts the
    preconditioner, carries mutable collections and keeps watch over bad gradients. A kernel says what its state holds
    besides, in :meth:`_init_fields`, and how a gradient moves it, in :meth:`_update`. It may also say where the
    gradient is taken (:meth:`_gradient_point`) and of what (:meth:`_gradient`), add terms to the energy
    (:meth:`_own_gradient`, and for the prior :meth:`_prior_gradient`), say what moves with the position
    (:meth:`_moved`), study the model (:meth:`_meet_model`), refuse a run (:meth:`_begin_run`) or arguments that are
    traced (:meth:`_meet_traced`) and add groups and attributes to a DataTree (:meth:`_tree_groups`,
    :meth:`_tree_attributes`).
    Kernels are final: none overrides what another defines. An ensemble alone goes around :meth:`init` and
    :meth:`sample`, since MCMC has one key for all of it.

    One draw is ``steps_per_draw`` gradient steps, compiled as one loop; ``num_warmup``, ``num_samples`` and
    ``thinning`` of :class:`~numpyro.infer.mcmc.MCMC` count draws. The target is :math:`\exp(-U(z) / T)`.

    :param model: A NumPyro model; its subsampled plates, if any, make the minibatches.
    :param step_size: A number, an optax schedule or :func:`~numpyro_bdl.cyclical`: the Euler step on the full-data
        energy. A learning rate on the mean loss corresponds to ``step_size = learning_rate / N``.
    :param temperature: :math:`T > 0`, or a schedule of the step count. 1 is the posterior.
    :param preconditioner: See :mod:`numpyro_bdl.preconditioners`; None is the identity.
    :param steps_per_draw: Gradient steps in a draw (1 if None); not to be given with :func:`~numpyro_bdl.cyclical`.
    :param minibatch: ``"independent"``, ``"epoch"`` or ``"full"``: see :mod:`numpyro_bdl.minibatch`.
    :param share_batch: Give all chains the same minibatches, from ``batch_seed`` and the step count. Vectorized chains
        then gather the rows once, but are no longer independent.
    :param batch_seed: Seed of the shared minibatches.
    :param frozen: Patterns of parameters without a prior that keep their first value.
    :param init_strategy: Where chains start: see :class:`~numpyro_bdl.potential.Potential`.
    :raises ValueError: for arguments out of range and, when a run starts, for what
        :class:`~numpyro_bdl.potential.Potential` refuses.
    """

    sample_field = "z"
    State: ClassVar[Any] = SGState
    parameter_fields: tuple[str, ...] = ()
    """State fields shaped like the position. Whoever transforms the position transforms these too."""
    magnitude_fields: tuple[str, ...] = ()
    """Those of them that have no sign, as a variance or a mask."""

    def __init__(
        self,
        model: Callable,
        *,
        step_size: float | Schedule,
        temperature: float | Schedule = 1.0,
        preconditioner: Preconditioner | None = None,
        steps_per_draw: int | None = None,
        minibatch: str = "independent",
        share_batch: bool = False,
        batch_seed: int = 0,
        frozen: str | tuple[str, ...] = (),
        init_strategy: Callable | None = None,
    ):
        owner = type(self).__name__
        if not callable(model):
            raise TypeError(f"{owner}: model must be a callable of NumPyro primitives, got {type(model).__name__}.")
        if not callable(temperature):
            check_number(owner, "temperature", temperature)
        if preconditioner is not None and not hasattr(preconditioner, "diagonal"):
            raise TypeError(
                f"{owner}: preconditioner must be of numpyro_bdl.preconditioners, as preconditioners.rms(), got"
                f" {preconditioner!r}."
            )
        check_choice(owner, "minibatch", minibatch, STREAMS)
        check_integer(owner, "batch_seed", batch_seed, least=0)
        self._model = model
        self._schedule = as_schedule(step_size, steps_per_draw, owner)
        self._temperature = temperature
        self._preconditioner = preconditioners.identity() if preconditioner is None else preconditioner
        self._minibatch = minibatch
        self._share_batch = bool(share_batch)
        self._batch_seed = batch_seed
        self._frozen = frozen
        self._init_strategy = init_strategy
        self._forget()

    # ---- what a kernel defines --------------------------------------------------------------------------------

    def _init_fields(self, rng_key: Array, z: Position, warmup_steps: Array) -> dict[str, Any]:
        """First values of the kernel's own state fields."""
        return {}

    def _gradient_point(self, state, key: Array) -> Position:
        """Where the gradient of the step is taken."""
        return state.z

    def _gradient(self, z: Position, rows: dict[str, Array], key: Array, mutable: dict, args: tuple, kwargs: dict):
        """The energy, its gradient and the mutable collections after: see :meth:`Potential.gradient`."""
        return self.potential.gradient(z, rows, key, mutable, args, kwargs)

    def _own_gradient(self, state, gradient: Position, i: Array, warmup_steps: Array) -> Position:
        """The gradient with that of the terms which the kernel adds to the energy."""
        return gradient

    def _prior_gradient(self, z: Position, gradient: Position) -> Position:
        """The gradient of the model's prior energy at a position, with that of what the kernel puts in its place."""
        return gradient

    def _moved(self, state, move: Callable[[Position], Position]) -> dict[str, Any]:
        """State fields that go with the position without having its shape, after a permutation of the position."""
        return {}

    def _meet_model(self, potential: Potential) -> None:
        """What the kernel has to learn of the model, or to refuse in it, before a run."""

    def _meet_traced(self, args: tuple, kwargs: dict) -> None:
        """What the kernel has to refuse in arguments that are traced (``jit_model_args=True``)."""

    def _begin_run(self, num_warmup: int) -> None:
        """What the kernel has to check before a run of so many draws of warm-up."""

    def _tree_attributes(self) -> dict[str, Any]:
        """Attributes of a DataTree besides those of all kernels."""
        return {}

    def _tree_groups(self, mcmc) -> dict[str, tuple[dict, dict, dict, list[str]]]:
        """Groups of a DataTree besides those of all kernels: values, dims, coords and sample dims by name."""
        return {}

    @abstractmethod
    def _update(self, state, gradient: Position, step: Step) -> dict[str, Any]:
        """The state fields that the step changes, ``z`` among them."""

    # ---- one step -----------------------------------------------------------------------------------------------

    def _rows(self, stream: Callable, key: Array, i: Array) -> dict[str, Array]:
        return plate_rows(stream, key, i, self.potential.subsampled)

    def _step(self, state, i: Array, warmup_steps: Array, args: tuple, kwargs: dict):
        rng_key, key_model, key_noise, key_another = random.split(state.rng_key, 4)
        batch_key = random.key(self._batch_seed) if self._share_batch else state.batch_key
        rows = self._rows(STREAMS[self._minibatch], batch_key, i)
        point = self._gradient_point(state, key_noise)
        energy, gradient, mutable = self._gradient(point, rows, key_model, state.mutable, args, kwargs)
        gradient = self._own_gradient(state, gradient, i, warmup_steps)

        adapted = state.preconditioner
        if self._preconditioner.adapts:
            adapted = lax.cond(
                i < warmup_steps,
                lambda s: like(self._preconditioner.update(s, gradient, key_noise), s),
                lambda s: s,
                adapted,
            )

        def another_gradient(z):
            key_rows, key_again = random.split(key_another)
            more_rows = self._rows(independent, key_rows, jnp.int32(0))
            return self._gradient(z, more_rows, key_again, state.mutable, args, kwargs)[1]

        size, temperature = self._step_size(i), self._temperature_at(i)
        diagonal = self._preconditioner.diagonal(adapted, state.z)
        step = Step(i, size, temperature, diagonal, key_noise, warmup_steps, another_gradient)
        bad = ~jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves((energy, gradient))]).all()
        moved = state._replace(
            i=i + 1,
            mutable=mutable,
            preconditioner=adapted,
            minibatch_energy=energy,
            step_size=size,
            temperature=temperature,
            first_bad_step=jnp.where((state.first_bad_step < 0) & bad, i, state.first_bad_step),
            rng_key=rng_key,
            **self._update(state, gradient, step),
        )
        return like(moved, state)

    def _step_size(self, i: Array) -> Array:
        return jnp.asarray(self._schedule(i), self._dtype)

    def _temperature_at(self, i: Array) -> Array:
        temperature = self._temperature(i) if callable(self._temperature) else self._temperature
        return jnp.asarray(self._schedule.temperature(i, temperature), self._dtype)

    def _mark(self, state):
        """A draw of a chain that met a bad gradient is NaN throughout, never a frozen copy."""
        bad = state.first_bad_step >= 0
        spoil = partial(jax.tree.map, lambda w: jnp.where(bad, jnp.nan, w))
        return state._replace(**{name: spoil(getattr(state, name)) for name in ("z", *self.parameter_fields)})

    # ---- NumPyro's contract ---------------------------------------------------------------------------------------

    @property
    def model(self) -> Callable:
        """The NumPyro model."""
        return self._model

    @property
    def default_fields(self) -> tuple[str, ...]:
        """The state fields that MCMC collects."""
        return ("z", "mutable", "minibatch_energy", "step_size", "temperature")

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        """The first state of a chain, or of a batch of chains for a batch of keys; see NumPyro's MCMCKernel."""
        model_kwargs = {} if model_kwargs is None else model_kwargs
        self._prepare(model_args, model_kwargs)
        self._begin_run(num_warmup)
        if self._preconditioner.adapts and not num_warmup:
            warnings.warn(
                "The preconditioner adapts in warm-up, and num_warmup=0: it stays the identity.", stacklevel=2
            )
        batched = not is_prng_key(rng_key)
        init_params = {} if init_params is None else init_params
        self._check_init_params(init_params, (rng_key.shape[0],) if batched else ())
        return self._starts[batched](rng_key, init_params, jnp.int32(self._schedule.steps_until(num_warmup)))

    def _init_chain(self, rng_key: Array, init_params: Position, warmup_steps: Array):
        rng_key, key_z, key_fields, batch_key = random.split(rng_key, 4)
        z, mutable = self.potential.initial(key_z)
        z = z | {name: jnp.asarray(value, z[name].dtype) for name, value in init_params.items()}
        zero = jnp.zeros((), jnp.int32)
        state = {
            "i": zero,
            "z": z,
            "mutable": mutable,
            "preconditioner": self._preconditioner.init(z),
            "minibatch_energy": jnp.full((), jnp.nan, self._dtype),
            "step_size": self._step_size(zero),
            "temperature": self._temperature_at(zero),
            "first_bad_step": zero - 1,
            "warmup_steps": warmup_steps,
            "batch_key": batch_key,
            "rng_key": rng_key,
        }
        # what is the same for all chains is made each chain's own, as it is after a step: under jax.vmap MCMC's
        # collection would else have no place for it
        own = 0 * random.bits(batch_key).astype(jnp.int32)
        return jax.tree.map(
            lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x + own.astype(x.dtype),
            self.State(**state, **self._init_fields(key_fields, z, warmup_steps)),
        )

    def sample(self, state, model_args, model_kwargs):
        """The state one draw later; see NumPyro's MCMCKernel."""
        model_kwargs = {} if model_kwargs is None else model_kwargs
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((model_args, model_kwargs))):
            self._check_traced_arguments(model_args, model_kwargs)
            self._meet_traced(model_args, model_kwargs)
        else:
            self._prepare(model_args, model_kwargs)  # a run resumed on other data calls no init
        batched = jnp.ndim(state.i) == 1
        # one step count for all chains, so that what depends on it alone is computed once
        i, warmup_steps = (x[0] if batched else x for x in (state.i, state.warmup_steps))
        step = partial(self._step, args=model_args, kwargs=model_kwargs)
        mark = self._mark
        if batched:
            step, mark = jax.vmap(step, in_axes=(0, None, None), axis_name=CHAINS), jax.vmap(mark)
        return mark(lax.fori_loop(0, self._schedule.steps_to_draw(i), lambda k, s: step(s, i + k, warmup_steps), state))

    def postprocess_fn(self, model_args, model_kwargs):
        """From a position to latent sites in their supports and deterministic sites; see NumPyro's MCMCKernel."""
        model_kwargs = {} if model_kwargs is None else model_kwargs
        return partial(self.potential.constrain, args=model_args, kwargs=model_kwargs)

    def get_diagnostics_str(self, state) -> str:
        """The text behind the progress bar."""
        text = f"step size {float(state.step_size):.1e}, energy {float(state.minibatch_energy):.3g}"
        bad = int(state.first_bad_step)
        return text if bad < 0 else f"{text}, GRADIENT NOT FINITE since step {bad}"

    def refresh(self, state, model_args, model_kwargs):
        """Nothing in the state depends on the arguments, so it is returned as it is (for NumPyro's Gibbs)."""
        return state

    def wrap_model(self, wrapper: Callable):
        """A copy of the kernel for the wrapped model (for NumPyro's Gibbs)."""
        kernel = copy.copy(self)
        kernel._model = wrapper(self._model)
        kernel._forget()
        return kernel

    # ---- the model at hand ----------------------------------------------------------------------------------------

    @property
    def potential(self) -> Potential:
        """The potential of the last run."""
        if self._potential is None:
            raise RuntimeError(f"{type(self).__name__} has not met its model's arguments yet; run MCMC first.")
        return self._potential

    def _forget(self) -> None:
        self._potential: Potential | None = None
        self._starts: tuple[Callable, ...] = ()
        # MCMC calls init anew as long as this is None
        self._sample_fn: Callable | None = None

    def _prepare(self, args: tuple, kwargs: dict) -> None:
        if self._potential is not None and same((self._potential.args, self._potential.kwargs), (args, kwargs)):
            return
        potential = Potential(self._model, args, kwargs, frozen=self._frozen, init_strategy=self._init_strategy)
        if self._minibatch == "epoch" and not potential.subsampled:
            raise ValueError(
                f'{type(self).__name__}: minibatch="epoch" is given, but no plate of the model is subsampled.'
                " Give the plate around the observed sites a subsample_size."
            )
        self._shapes = jax.eval_shape(potential.initial, random.key(0))[0]
        self._dtype = jnp.result_type(*self._shapes.values())
        self._meet_model(potential)
        self._potential = potential
        self._starts = jax.jit(self._init_chain), jax.jit(jax.vmap(self._init_chain, in_axes=(0, 0, None)))
        self._sample_fn = self.sample

    def _check_init_params(self, init_params: Position, batch: tuple[int, ...]) -> None:
        if not isinstance(init_params, dict):
            raise TypeError(f"init_params must be a dict from sites to arrays, got {type(init_params).__name__}.")
        for name, value in init_params.items():
            if name not in self._shapes:
                raise ValueError(
                    f"init_params has a value for '{name}', which is no latent site of the model;"
                    f" those are: {', '.join(self._shapes)}."
                )
            expected = batch + self._shapes[name].shape
            if jnp.shape(value) != expected:
                chains = f" for {batch[0]} chains" if batch else " for a single chain"
                raise ValueError(
                    f"init_params['{name}'] must have shape {expected}{chains} (in unconstrained space),"
                    f" got {jnp.shape(value)}."
                )
        check_finite_data({"init_params": init_params}, "")

    def _check_traced_arguments(self, args: tuple, kwargs: dict) -> None:
        now = named_arguments(self._model, args, kwargs)
        for name, value in named_arguments(self._model, self.potential.args, self.potential.kwargs).items():
            if isinstance(value, (bool, int)) and isinstance(now.get(name), Tracer):
                raise TypeError(
                    f"jit_model_args=True makes the model's argument {name}={value!r} an array inside the compiled"
                    " program, where it can't set a size or choose a branch. Bind it to the model first:"
                    f" functools.partial(model, {name}={value!r})."
                )
        before, after = (
            jax.tree.map(np.shape, call) for call in ((self.potential.args, self.potential.kwargs), (args, kwargs))
        )
        if before != after:
            raise ValueError(
                "With jit_model_args=True a run goes on with arguments of the shapes it was begun with,"
                f" {before}, got {after}. Use jit_model_args=False, or a new MCMC object."
            )

    def __getstate__(self):
        state = self.__dict__.copy()
        state |= {"_potential": None, "_sample_fn": None, "_starts": ()}
        return state


def like(new: Any, old: Any) -> Any:
    """A tree with the dtypes of another: with x64 on, a float64 number would else promote float32 parameters."""
    return jax.tree.map(lambda n, o: n if n.dtype == o.dtype else n.astype(o.dtype), new, old)


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold the same arrays, as objects, and otherwise equal values."""
    (leaves, treedef), (others, other_treedef) = jax.tree.flatten(one), jax.tree.flatten(other)
    return treedef == other_treedef and all(
        a is b or (not hasattr(a, "shape") and not hasattr(b, "shape") and type(a) is type(b) and a == b)
        for a, b in zip(leaves, others, strict=True)
    )
