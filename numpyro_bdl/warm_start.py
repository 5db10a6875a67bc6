# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Warm starts: chains that begin at an ensemble of trained networks.

Each member goes from a start of its own down the full-data energy in unconstrained space,

.. math::

    z \leftarrow \arg\min_z U(z), \qquad U(z) = -\log p(\theta(z), y) - \log |\partial \theta / \partial z| ,

by an optimizer on unbiased minibatch gradients. The minimum is the mode of the density that the kernels sample.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax, random
from tqdm.auto import tqdm

from numpyro_bdl._checks import check_choice, check_integer
from numpyro_bdl.minibatch import STREAMS, plate_rows
from numpyro_bdl.potential import Position, Potential

_BLOCKS = 100


def train_map(
    model: Callable,
    rng_key: Array,
    num_members: int,
    *args,
    num_steps: int,
    optimizer: optax.GradientTransformation | None = None,
    minibatch: str = "independent",
    frozen: str | tuple[str, ...] = (),
    init_strategy: Callable | None = None,
    progress_bar: bool = True,
    **kwargs,
) -> tuple[Position, np.ndarray]:
    r"""Train an ensemble of MAP estimates, from which chains can start.

    A chain that starts at random spends its warm-up on finding a mode; one that starts at a trained network spends it
    on the step size and the mass matrix. Members differ in their start, their minibatches and their dropout. They are
    a deep ensemble, and need not be in as many functional modes as there are members.

    Where they stop is no draw from the posterior: warm-up is needed still, and the minimum of the energy lies off the
    typical set. In few dimensions, or where chains mix between modes, a start at random is as good.

    The energy is that of all data, N times a mean loss: an optimizer whose step scales with the gradient (plain SGD)
    needs its learning rate divided by N, Adam does not. The prior is in it, so no weight decay is called for.

    Mutable collections (BatchNorm) are updated in training as in a run. They are not handed on: a kernel begins with
    fresh ones, which its warm-up must fill again, and a warning says so.

    :param model: A NumPyro model; its subsampled plates, if any, make the minibatches.
    :param rng_key: PRNG key.
    :param num_members: Members of the ensemble, one for each chain.
    :param args: Positional arguments of the model.
    :param num_steps: Steps of the optimizer.
    :param optimizer: Of optax; None for ``optax.adam(1e-3)``.
    :param minibatch: ``"independent"``, ``"epoch"`` or ``"full"``: see :mod:`numpyro_bdl.minibatch`.
    :param frozen: Patterns of parameters without a prior that keep their first value.
    :param init_strategy: Where members start: see :class:`~numpyro_bdl.potential.Potential`.
    :param progress_bar: Show a bar when the work takes more than two seconds.
    :param kwargs: Keyword arguments of the model.
    :return: Positions in unconstrained space, (member, ...) by site, which are the ``init_params`` of
        :meth:`numpyro.infer.mcmc.MCMC.run` for as many chains, of NUTS and of the kernels of this package (for a single
        chain MCMC wants them without the first axis); and the minibatch energies, (member, step), before each step.
    :raises ValueError: for arguments out of range, and what :class:`~numpyro_bdl.potential.Potential` refuses.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from jax import random
        >>> from numpyro.infer import MCMC, NUTS
        >>> import numpyro_bdl as bdl
        >>> def model(y, batch_size=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     with numpyro.plate("data", len(y), subsample_size=batch_size):
        ...         numpyro.sample("y", dist.Normal(mu, 1), obs=numpyro.subsample(y, event_dim=0))
        >>> y = jnp.array([1.0, 2.0, 3.0])
        >>> init, losses = bdl.train_map(model, random.key(0), 2, y, num_steps=400, optimizer=optax.adam(0.05))
        >>> bool(jnp.allclose(init["mu"], 6 / 4)), losses.shape                           # the mode is 6 / 4
        (True, (2, 400))
        >>> mcmc = MCMC(NUTS(model), num_warmup=50, num_samples=50, num_chains=2, chain_method="vectorized",
        ...             progress_bar=False)
        >>> mcmc.run(random.key(1), y, init_params=init)

    **References:** Sommer et al., *Connecting the dots: is mode-connectedness the key to feasible sample-based
    inference in Bayesian neural networks?*, ICML 2024 (arXiv 2402.01484).
    """
    check_integer("train_map", "num_members", num_members)
    check_integer("train_map", "num_steps", num_steps)
    check_choice("train_map", "minibatch", minibatch, STREAMS)
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    if not hasattr(optimizer, "update"):
        raise TypeError(f"train_map: optimizer must be one of optax, as optax.adam(1e-3), got {optimizer!r}.")
    potential = Potential(model, args, kwargs, frozen=frozen, init_strategy=init_strategy)
    if potential.has_mutable:
        warnings.warn(
            "train_map: the mutable collections (BatchNorm) of the trained networks are not handed on; a kernel begins"
            " with fresh ones, and its warm-up has to fill them again.",
            stacklevel=2,
        )
    start, steps = _programs(potential, optimizer, STREAMS[minibatch], num_steps)
    members = start(random.split(rng_key, num_members))
    block = math.ceil(num_steps / _BLOCKS)
    for first in tqdm(range(0, num_steps, block), desc="train", delay=2, disable=not progress_bar):
        members = jax.block_until_ready(steps(members, first, min(first + block, num_steps)))
    _warn_of_bad_members(members)
    return members["z"], np.asarray(members["losses"])


def _programs(potential: Potential, optimizer: Any, stream: Callable, num_steps: int) -> tuple[Callable, Callable]:
    """From keys to members that start, and from members to the same some steps later, compiled."""
    args, kwargs = potential.args, potential.kwargs

    def start(key):
        key, key_z, key_rows = random.split(key, 3)
        z, mutable = potential.initial(key_z)
        losses = jnp.zeros(num_steps, jnp.result_type(*z.values()))
        state = {"z": z, "mutable": mutable, "optimizer": optimizer.init(z), "losses": losses}
        return state | {"key": key, "key_rows": key_rows}

    def step(i, member):
        rows = plate_rows(stream, member["key_rows"], i, potential.subsampled)
        key = random.fold_in(member["key"], i)
        energy, gradient, mutable = potential.gradient(member["z"], rows, key, member["mutable"], args, kwargs)
        updates, state = optimizer.update(gradient, member["optimizer"], member["z"])
        z = optax.apply_updates(member["z"], updates)
        losses = member["losses"].at[i].set(energy.astype(member["losses"].dtype))
        moved = member | {"z": z, "mutable": mutable, "optimizer": state, "losses": losses}
        # with x64 on, a float64 number would else promote float32 parameters
        return jax.tree.map(lambda new, old: new.astype(old.dtype), moved, member)

    def steps(member, first, last):
        return lax.fori_loop(first, last, step, member)

    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(steps, in_axes=(0, None, None)))


def _warn_of_bad_members(members: dict) -> None:
    finite = np.isfinite(members["losses"])
    for z in members["z"].values():
        finite &= np.isfinite(z).reshape(len(z), -1).all(1, keepdims=True)
    if bad := np.flatnonzero(~finite.all(1)).tolist():
        warnings.warn(
            f"train_map: the members {bad} met an energy or parameters that are not finite. Most often the learning"
            " rate is too large: take a smaller one, or leave these members out.",
            stacklevel=3,
        )
