# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Prediction from the draws of a run: functions, log likelihoods and new data, in chunks.

Memory holds one chunk of draws times one chunk of rows; the program is compiled once for all chunks, and again only
for arguments of other shapes.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.infer import MCMC

from numpyro_bdl._checks import check_choice, check_finite_data, check_integer, named_arguments
from numpyro_bdl._evaluation import Evaluation
from numpyro_bdl.guides.posterior import LaplacePosterior
from numpyro_bdl.potential import Potential, natural_parameter

MEMBERS = ("position", "anchor", "both")


class PosteriorPredictive:
    r"""What a model predicts under the draws of a run.

    Frozen parameters and the mutable collections of each draw are put in. Array arguments of the model are traced;
    integers, strings and None are fixed. Without positional arguments a method takes those of the run, all of their
    rows, with the keywords given put over those of the run (``train=False``, say).

    :param mcmc: A run of any kernel of this package; or of NUTS or HMC on a model without frozen parameters; or the
        posterior of :class:`~numpyro_bdl.AutoLinearizedLaplace`, of which it predicts by the tangent model.
    :param members: ``"position"``, or, of a kernel that collected it, ``"anchor"``, or ``"both"`` (the draws of the
        position, then those of the anchor). Only the position follows the posterior: the anchors are for prediction.
    :param draw_chunk: Draws per chunk.
    :param data_chunk: Rows per chunk; None for all; ``"auto"`` for 1024, or all if the model can't be cut. A model is
        cut along the plate of its observed sites, if it takes its rows by ``numpyro.subsample`` or the indices of the
        plate.
    :param progress_bar: Show a bar when the work takes more than two seconds.
    :raises ValueError: for a run without draws, or members that were not collected.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> def model(x, y=None):
        ...     slope = numpyro.sample("slope", dist.Normal(0, 1))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("y", dist.Normal(slope * numpyro.subsample(x, event_dim=0), 1), obs=y)
        >>> x = jnp.linspace(-1, 1, 50)
        >>> mcmc = MCMC(bdl.SGLD(model, step_size=1e-2), num_warmup=100, num_samples=300, progress_bar=False)
        >>> mcmc.run(random.key(0), x, 0.5 * x)
        >>> predictive = bdl.PosteriorPredictive(mcmc)
        >>> predictive.functions(x[:7])["y"].shape                          # (chain, draw, row)
        (1, 300, 7)
        >>> predictive.log_likelihood(x[:7], 0.5 * x[:7])["y"].shape
        (1, 300, 7)
    """

    def __init__(
        self,
        mcmc: MCMC | LaplacePosterior,
        *,
        members: str = "position",
        draw_chunk: int = 16,
        data_chunk: int | None | str = "auto",
        progress_bar: bool = True,
    ):
        check_choice("PosteriorPredictive", "members", members, MEMBERS)
        check_integer("PosteriorPredictive", "draw_chunk", draw_chunk)
        if data_chunk not in (None, "auto"):
            check_integer("PosteriorPredictive", "data_chunk", data_chunk)
        if isinstance(mcmc, LaplacePosterior):
            check_choice("PosteriorPredictive", "members of a guide", members, ("position",))
            self.potential, self._run_arguments = mcmc.potential, mcmc.arguments
            values, mutable = mcmc.draws()
        else:
            self.potential, self._run_arguments = potential_of(mcmc), (mcmc._args, mcmc._kwargs)
            values, mutable = _draws(mcmc, self.potential, members)
        leaves = jax.tree.leaves(values)
        self.batch_shape: tuple[int, int] = leaves[0].shape[:2]
        """Chains and draws."""
        self._draws = jax.tree.map(lambda w: np.asarray(w).reshape(-1, *w.shape[2:]), (values, mutable))
        self._draw_chunk, self._data_chunk, self._progress_bar = draw_chunk, data_chunk, progress_bar
        self._programs: dict = {}

    def functions(self, *args, sites: tuple[str, ...] | None = None, **kwargs) -> dict[str, np.ndarray]:
        """The function of the model at its observed sites: logits, locations or log rates.

        :param sites: Names of observed or deterministic sites; None for every observed site.
        :return: By site, an array (chain, draw, row, output).
        """
        return self._map(_function, random.key(0), sites, args, kwargs)

    def log_likelihood(self, *args, **kwargs) -> dict[str, np.ndarray]:
        """The log likelihood of each row at the observed sites, without plate or ``scale`` factors.

        :return: By site, an array (chain, draw, row).
        :raises ValueError: if a site that the run observed has no observation in these arguments.
        """
        return self._map(_log_prob, random.key(0), None, args, kwargs)

    def sample(self, rng_key: Array, *args, **kwargs) -> dict[str, np.ndarray]:
        """New data at the observed sites, one for each draw, whether or not they are observed in these arguments.

        :param rng_key: PRNG key.
        :return: By site, an array (chain, draw, row, ...).
        """
        return self._map(_sample, rng_key, None, args, kwargs)

    def functions_at_rows(
        self, count: int, sites: tuple[str, ...] | None = None, **kwargs
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """The function of the model at evenly spaced rows of the run, taken through its data plate.

        :param count: How many rows, at most.
        :param sites: As of :meth:`functions`.
        :return: By site, an array (chain, draw, row, output), and the rows; None in place of them, and every row in
            the arrays, if the observed sites share no plate.
        """
        plate = self.potential.data_plate({k: p.size for k, p in self.potential.plates.items()})
        if plate is None:
            return self.functions(sites=sites, **kwargs), None
        size = self.potential.plates[plate].size
        rows = np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(int))
        return self._map(_function, random.key(0), sites, (), kwargs, rows=rows), rows

    def observed_data(self) -> dict[str, np.ndarray]:
        """The observations of the run, all of their rows, by site."""
        args, kwargs = self._run_arguments

        def run(values, mutable):
            sites = self.potential.run(values, {}, random.key(0), mutable, args, kwargs)
            values = {name: jnp.asarray(sites[name]["value"]) for name in self.potential.observed}
            shapes = {name: jnp.broadcast_shapes(v.shape, sites[name]["fn"].shape()) for name, v in values.items()}
            return {name: jnp.broadcast_to(v, shapes[name]) for name, v in values.items()}

        # in the compiled program nothing is left but the observations, which depend on no draw
        first = jax.tree.map(lambda w: w[0], self._draws)
        return {name: np.asarray(value) for name, value in jax.jit(run)(*first).items()}

    # ---- the engine ---------------------------------------------------------------------------------------------

    def _map(self, extract: Callable, key: Array, names, args: tuple, kwargs: dict, rows: np.ndarray | None = None):
        """One output for each site, draw and row (of the given rows, or all)."""
        evaluation = self._evaluation(extract, key, names, args, kwargs, rows)
        results = {
            name: np.empty((evaluation.num_draws, *out.shape), out.dtype) for name, out in evaluation.outputs.items()
        }
        for name, where, block in evaluation.blocks(progress_bar=self._progress_bar):
            results[name][where] = block
        if extract is not _function:
            # of functions rows come before outputs, whatever the order of the plates
            inside = {name: axis + 1 for name in results if (axis := evaluation.row_axis(name)) is not None}
            results |= {name: np.moveaxis(results[name], 1, axis) for name, axis in inside.items()}
        return {name: result.reshape(*self.batch_shape, *result.shape[1:]) for name, result in results.items()}

    def _evaluation(
        self, extract: Callable, key: Array, names, args: tuple, kwargs: dict, rows: np.ndarray | None = None
    ) -> Evaluation:
        args, kwargs = self._complete(args, kwargs)
        check_finite_data(named_arguments(self.potential.model, args, kwargs))
        return Evaluation(
            self.potential,
            self._draws,
            extract,
            tuple(self.potential.observed) if names is None else tuple(names),
            key,
            args,
            kwargs,
            run_arguments=self._run_arguments,
            rows=rows,
            programs=self._programs,
            draw_chunk=self._draw_chunk,
            data_chunk=self._data_chunk,
        )

    def _complete(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the run, with the given keywords over them, unless a call of its own is given."""
        run_args, run_kwargs = self._run_arguments
        if args or any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(kwargs)):
            return args, kwargs
        return run_args, run_kwargs | kwargs


# ---- what is taken from a site ------------------------------------------------------------------------------------


def _function(name: str, site: dict, key: Array) -> Array:
    return natural_parameter(name, site)


def _log_prob(name: str, site: dict, key: Array) -> Array:
    if not site["is_observed"]:
        raise ValueError(f"log_likelihood needs an observation at site '{name}', as in log_likelihood(x_test, y_test).")
    return site["fn"].log_prob(site["value"])


def _sample(name: str, site: dict, key: Array) -> Array:
    return site["fn"].sample(key)


# ---- draws of a run -----------------------------------------------------------------------------------------------


def potential_of(mcmc: MCMC) -> Potential:
    """The potential that a run was made with."""
    if mcmc.last_state is None:
        raise ValueError("The MCMC object holds no draws yet; run it first.")
    kernel = mcmc.sampler
    if not hasattr(kernel, "_prepare"):
        return Potential(kernel.model, mcmc._args, mcmc._kwargs)
    kernel._prepare(mcmc._args, mcmc._kwargs)
    return kernel.potential


def _draws(mcmc: MCMC, potential: Potential, members: str) -> tuple[dict, dict]:
    """Constrained latent sites and mutable collections, (chain, draw, ...)."""
    warn_of_bad_chains(mcmc)
    collected = {"position": partial(positions, mcmc), "anchor": partial(anchors, mcmc, potential)}
    names = ("position", "anchor") if members == "both" else (members,)
    if members != "position" and potential.has_mutable:
        warnings.warn(
            "The mutable collections (BatchNorm) kept with the draws are those of the position; the anchors are"
            " given them too.",
            stacklevel=3,
        )
    draws = [collected[name]() for name in names]
    missing = [site for site in potential.latent if site not in draws[0]]
    if missing:
        raise ValueError(
            f"The run left these sites out of its draws, without which nothing can be predicted: {missing}."
        )
    values = _concatenate([{k: w[k] for k in potential.latent} for w in draws])
    return values, _concatenate([_mutable(mcmc, potential)] * len(names))


def positions(mcmc: MCMC) -> dict[str, Array]:
    """Constrained draws of the position, (chain, draw, ...) by site."""
    return mcmc.get_samples(group_by_chain=True)


def anchors(mcmc: MCMC, potential: Potential) -> dict[str, Array]:
    """Constrained draws of the anchor, (chain, draw, ...) by site.

    :raises ValueError: if the run did not collect it.
    """
    unconstrained = mcmc.get_extra_fields(group_by_chain=True).get("z_anchor")
    if unconstrained is None:
        raise ValueError(
            "The run collected no anchor; make the kernel with collect_anchor=True, or run with"
            ' extra_fields=("z_anchor",).'
        )
    constrain = partial(potential.constrain, args=mcmc._args, kwargs=mcmc._kwargs)
    return jax.vmap(jax.vmap(constrain))(unconstrained)


def _mutable(mcmc: MCMC, potential: Potential) -> dict:
    if not potential.has_mutable:
        return {}
    mutable = mcmc.get_extra_fields(group_by_chain=True).get("mutable")
    if mutable is None:
        raise ValueError(
            f"The network has mutable collections (BatchNorm), which {type(mcmc.sampler).__name__} does not keep with"
            " its draws; use a kernel of numpyro_bdl, or LayerNorm."
        )
    return mutable


def _concatenate(trees: list) -> Any:
    return jax.tree.map(lambda *w: jnp.concatenate(w, axis=1), *trees) if len(trees) > 1 else trees[0]


def bad_chains(mcmc: MCMC) -> dict[int, int]:
    """Chains that met a gradient that was not finite, each with the step."""
    first = np.atleast_1d(getattr(mcmc.last_state, "first_bad_step", -1))
    return {chain: int(step) for chain, step in enumerate(first) if step >= 0}


def warn_of_bad_chains(mcmc: MCMC) -> None:
    """Warn of chains whose later draws are NaN."""
    for chain, step in bad_chains(mcmc).items():
        warnings.warn(
            f"Chain {chain} met a gradient that was not finite at step {step}; its draws from there on are NaN. Most"
            " often the step size is too large: take a smaller one, or leave that chain out.",
            stacklevel=3,
        )
