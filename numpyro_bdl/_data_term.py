# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The energy of the data at positions of a run."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro.infer import MCMC

from numpyro_bdl._at_draws import check_run, unconstrained_draws
from numpyro_bdl._checks import check_finite_data, check_integer, named_arguments
from numpyro_bdl.potential import Position, Potential
from numpyro_bdl.probes import can_be_cut


def data_term(
    mcmc: MCMC, *, row_chunk: int | None = None, mutable: dict | None = None, **model_kwargs: Any
) -> Callable[[Position], Array]:
    """The energy of the likelihood over all rows of a run, as a function of a position in unconstrained space.

    The function can be differentiated, compiled and vectorized. It has no randomness: dropout, if it is not switched
    off by ``train=False`` or the like, is that of one key.

    :param mcmc: A run of any kernel of this package, or of NUTS or HMC.
    :param row_chunk: Rows that are evaluated at a time, if memory is short; also for derivatives, which then evaluate
        each chunk once more. The model must take its rows by ``numpyro.subsample``. None for all rows at once.
    :param mutable: Mutable collections (BatchNorm); None for those of the last draw of the first chain.
    :param model_kwargs: Keyword arguments of the model that are to differ from those of the run.
    :return: A function from a position, :func:`position_of` gives one, to a scalar.
    :raises TypeError: for anything but a run of a kernel with a model.
    :raises ValueError: for a run without draws or with bad chains, and a model that can't be cut into chunks.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> from numpyro_bdl import flatness
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0, 1))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(0, scale), obs=numpyro.subsample(y, event_dim=0))
        >>> mcmc = MCMC(bdl.SGLD(model, step_size=1e-2), num_warmup=10, num_samples=20, progress_bar=False)
        >>> mcmc.run(random.key(0), jnp.ones(50))
        >>> energy, z = flatness.data_term(mcmc, row_chunk=20), flatness.position_of(mcmc, draw=-1)
        >>> exact = -50 * dist.Normal(0, mcmc.get_samples()["scale"][-1]).log_prob(1.0)
        >>> bool(abs(energy(z) - exact) < 1e-3)
        True
    """
    potential = check_run("data_term", mcmc)
    if mutable is None:
        every = unconstrained_draws("data_term", mcmc, potential).mutable
        mutable = jax.tree.map(lambda x: x[0, -1], every)
    return partial(likelihood_energy(potential, row_chunk, model_kwargs), mutable)


def position_of(mcmc: MCMC, chain: int = 0, draw: int | None = None) -> Position:
    """A draw of a run in unconstrained space, or the mean of the draws of a chain.

    There is no mean over chains: they sit in different copies of the network, between which the mean is none.

    :param mcmc: A run of any kernel of this package, or of NUTS or HMC.
    :param chain: Index of the chain.
    :param draw: Index of the draw; None for the mean of all.
    :return: Arrays by site.
    :raises TypeError: for anything but a run of a kernel with a model.
    :raises ValueError: for a run without draws or with bad chains, and an index that it does not have.
    """
    potential = check_run("position_of", mcmc)
    z = unconstrained_draws("position_of", mcmc, potential).z
    chains, draws = next(iter(z.values())).shape[:2]
    for name, index, count in (("chain", chain, chains), ("draw", 0 if draw is None else draw, draws)):
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not -count <= index < count:
            raise ValueError(f"position_of: {name} must be an index below {count}, got {index!r}.")
    return {name: w[chain].mean(0) if draw is None else w[chain, draw] for name, w in z.items()}


def likelihood_energy(potential: Potential, row_chunk: int | None, model_kwargs: Mapping[str, Any]) -> Callable:
    """The energy of the likelihood as a function of mutable collections and position."""
    args, kwargs = potential.args, potential.kwargs | dict(model_kwargs)
    check_finite_data(named_arguments(potential.model, args, kwargs))

    def of_rows(mutable, z, rows):
        return potential.energies(z, rows, random.key(0), mutable, args, kwargs)[0].likelihood

    if row_chunk is None:
        return lambda mutable, z: of_rows(mutable, z, {})
    check_integer("data_term", "row_chunk", row_chunk)
    plate = potential.data_plate({name: plate.size for name, plate in potential.plates.items()})
    size = potential.plates[plate].size if plate else 0
    if plate is None or not can_be_cut(potential, plate, min(row_chunk, size), args, kwargs):
        raise ValueError(
            f"data_term: the model can't be cut into chunks of {row_chunk} rows: inside the plate of the observed sites"
            " take the rows of every array by numpyro.subsample(array, event_dim=...); or give row_chunk=None."
        )
    whole = size // row_chunk

    def energy(mutable, z):
        # a chunk is scaled up to all rows by its plate, and back to its share here
        share = jax.checkpoint(lambda z, rows: len(rows) / size * of_rows(mutable, z, {plate: rows}))
        total = jnp.zeros(())
        if whole:
            chunks = jnp.arange(whole * row_chunk).reshape(whole, row_chunk)
            total = lax.map(partial(share, z), chunks).sum()
        if size % row_chunk:
            total += share(z, jnp.arange(whole * row_chunk, size))
        return total

    return energy
