# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Prediction from the draws of a run: functions, log likelihoods and new data, in chunks.

Memory holds one chunk of draws times one chunk of rows; the program is compiled once for all chunks, and again only
for arguments of other shapes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.infer import MCMC
from tqdm.auto import tqdm

from numpyro_bdl._arguments import Arguments
from numpyro_bdl._checks import check_finite_data, check_integer, named_arguments
from numpyro_bdl._runs import DrawSource, source_of
from numpyro_bdl.potential import Potential, natural_parameter

PROBES = 64
_AUTO_CHUNK = 1024


class PosteriorPredictive:
    r"""What a model predicts under the draws of a run.

    Frozen parameters and the mutable collections of each draw are put in. Array arguments of the model are traced;
    integers, strings and None are fixed. Without positional arguments a method takes those of the run, all of their
    rows, with the keywords given put over those of the run (``train=False``, say).

    :param posterior: A run of any kernel of this package; or of NUTS or HMC on a model without frozen parameters; or
        :class:`~numpyro_bdl.Samples`, which has draws from elsewhere, of SVI and SteinVI too; or the posterior of
        :class:`~numpyro_bdl.AutoLinearizedLaplace`, of which it predicts by the tangent model.
    :param members: ``"position"``, or, of a kernel that collected it, ``"anchor"``, or ``"both"`` (the draws of the
        position, then those of the anchor). Only the position follows the posterior: the anchors are for prediction.
    :param draw_chunk: Draws per chunk.
    :param data_chunk: Rows per chunk; None for all; ``"auto"`` for 1024, or all if the model can't be cut. A model is
        cut along the plate of its observed sites, if it takes its rows by ``numpyro.subsample`` or the indices of the
        plate.
    :param progress_bar: Show a bar when the work takes more than two seconds.
    :raises ValueError: for a run without draws, sites without draws, or members that were not collected.
    :raises TypeError: for anything else, such as a dict.

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
        posterior: MCMC | DrawSource,
        *,
        members: str = "position",
        draw_chunk: int = 16,
        data_chunk: int | None | str = "auto",
        progress_bar: bool = True,
    ):
        check_integer("PosteriorPredictive", "draw_chunk", draw_chunk)
        if data_chunk not in (None, "auto"):
            check_integer("PosteriorPredictive", "data_chunk", data_chunk)
        source = source_of("PosteriorPredictive", posterior, members)
        self.potential, self._run_arguments = source.potential, source.arguments
        values, mutable = source.draws()
        missing = [site for site in self.potential.latent if site not in values]
        if missing:
            raise ValueError(
                f"The run left these sites out of its draws, without which nothing can be predicted: {missing}."
            )
        values = {site: values[site] for site in self.potential.latent}
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
        args, kwargs = self._complete(args, kwargs)
        check_finite_data(named_arguments(self.potential.model, args, kwargs))
        names = tuple(self.potential.observed) if names is None else tuple(names)
        arguments = Arguments(args, kwargs)
        call, arrays = _Call(self.potential, extract, names, arguments), arguments.arrays(args, kwargs)
        first = jax.tree.map(lambda w: w[0], self._draws)
        outputs, frames, plates = call.describe(*first, key, {}, arrays)
        plate = self.potential.data_plate(plates)
        axes = {name: _row_axis(frames[name], plate) for name in names}

        size = plates[plate] if plate else 1
        limit = self._data_chunk if isinstance(self._data_chunk, int) else size
        limit = _AUTO_CHUNK if self._data_chunk == "auto" else limit
        some = rows is not None and len(rows) < size
        rows = np.arange(size) if rows is None else rows
        chunk = min(len(rows), limit)
        cut = plate is not None and chunk < size
        if cut and not call.can_be_cut(*first, key, {plate: jnp.arange(chunk)}, arrays, outputs, axes):
            if isinstance(self._data_chunk, int) and self._data_chunk < size:
                raise ValueError(
                    f"The model can't be cut into {chunk} of the {size} rows of its plate '{plate}': inside the plate,"
                    " take the rows of every array by numpyro.subsample(array, event_dim=...); or give data_chunk=None."
                )
            cut, chunk = False, len(rows)
        program = self._programs.setdefault(
            (call.identity, cut), jax.jit(jax.vmap(call, in_axes=(0, 0, 0, None, None)))
        )

        draws = len(jax.tree.leaves(self._draws)[0])
        results = {
            name: np.empty((draws, *(len(rows) if n == axes[name] else m for n, m in enumerate(out.shape))), out.dtype)
            for name, out in outputs.items()
        }
        keys = random.split(key, draws)
        starts = [(d, r) for d in range(0, draws, self._draw_chunk) for r in range(0, len(rows), chunk)]
        # the bar appears only if the work is long
        for d, r in tqdm(starts, desc="predict", delay=2, disable=not self._progress_bar):
            # the last chunk is filled up, so that one program serves all
            take = np.minimum(np.arange(d, d + min(self._draw_chunk, draws)), draws - 1)
            taken = rows[np.minimum(np.arange(r, r + chunk), len(rows) - 1)]
            values, mutable = jax.tree.map(lambda w, take=take: w[take], self._draws)
            chunk_keys = jax.vmap(random.fold_in, (0, None))(keys[take], r)
            block = program(values, mutable, chunk_keys, {plate: jnp.asarray(taken)} if cut else {}, arrays)
            for name, axis in axes.items():
                values = np.asarray(block[name])
                if some and not cut and axis is not None:
                    values = np.take(values, rows, axis + 1)
                _store(results[name], values, axis, d, r)
        if extract is _function:
            # rows before outputs, whatever the order of the plates
            inside = {name: axis + 1 for name, axis in axes.items() if axis is not None}
            results |= {name: np.moveaxis(results[name], axis, 1) for name, axis in inside.items()}
        return {name: result.reshape(*self.batch_shape, *result.shape[1:]) for name, result in results.items()}

    def _complete(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the run, with the given keywords over them, unless a call of its own is given."""
        run_args, run_kwargs = self._run_arguments
        if args or any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(kwargs)):
            return args, kwargs
        return run_args, run_kwargs | kwargs


class _Call:
    """A model call as a pure function of one draw: arrays among its arguments are traced, the rest is fixed."""

    def __init__(self, potential: Potential, extract: Callable, names: tuple[str, ...], arguments: Arguments):
        self.potential, self.extract, self.names, self.arguments = potential, extract, names, arguments

    @property
    def identity(self) -> tuple:
        """What a compiled program depends on, besides shapes; the program keeps the fixed arguments alive."""
        return self.extract, self.names, self.arguments

    def _run(self, values, mutable, key, rows, arrays):
        args, kwargs = self.arguments.join(arrays)
        key_model, key_site = random.split(key)
        sites = self.potential.run(values, rows, key_model, mutable, args, kwargs)
        outputs = {
            name: self.extract(name, _get(sites, name), random.fold_in(key_site, n))
            for n, name in enumerate(self.names)
        }
        return outputs, sites

    def __call__(self, values, mutable, key, rows, arrays) -> dict[str, Array]:
        return self._run(values, mutable, key, rows, arrays)[0]

    def describe(self, values, mutable, key, rows, arrays) -> tuple[dict, dict[str, dict], dict[str, int]]:
        """Shapes of the outputs, the sites they come from, and the sizes of all plates; no flops."""
        found: dict[str, dict] = {}

        def run(*inputs):
            outputs, sites = self._run(*inputs)
            found.update(sites)
            return outputs

        shapes = jax.eval_shape(run, values, mutable, key, rows, arrays)
        plates = {name: site["args"][0] for name, site in found.items() if site["type"] == "plate"}
        return shapes, {name: found[name] for name in self.names}, plates

    def can_be_cut(self, values, mutable, key, rows, arrays, outputs: dict, axes: dict[str, int | None]) -> bool:
        """Whether the outputs shrink to the given rows of the plate, and nothing else changes."""
        (chunk,) = (len(index) for index in rows.values())
        try:
            cut = self.describe(values, mutable, key, rows, arrays)[0]
        except (ValueError, TypeError):
            return False
        return all(
            cut[name].shape == tuple(chunk if n == axes[name] else m for n, m in enumerate(out.shape))
            for name, out in outputs.items()
        )


# ---- what is taken from a site ------------------------------------------------------------------------------------


def _get(sites: dict, name: str) -> dict:
    if name not in sites:
        raise ValueError(f"The model has no site '{name}'; it has: {', '.join(sites)}.")
    return sites[name]


def _function(name: str, site: dict, key: Array) -> Array:
    return natural_parameter(name, site)


def _log_prob(name: str, site: dict, key: Array) -> Array:
    if not site["is_observed"]:
        raise ValueError(f"log_likelihood needs an observation at site '{name}', as in log_likelihood(x_test, y_test).")
    return site["fn"].log_prob(site["value"])


def _sample(name: str, site: dict, key: Array) -> Array:
    return site["fn"].sample(key)


def _row_axis(site: dict, plate: str | None) -> int | None:
    """The axis of a site's output along which the rows of the plate lie; None if the site lies outside of it."""
    dims = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    if plate not in dims:
        return None
    batch = -min(dims.values()) if site["type"] == "deterministic" else len(site["fn"].batch_shape)
    return batch + dims[plate]


def _store(result: np.ndarray, block: np.ndarray, axis: int | None, d: int, r: int) -> None:
    draws = min(len(block), len(result) - d)
    if axis is None:
        result[d : d + draws] = block[:draws]
        return
    target, block = np.moveaxis(result, axis + 1, 1), np.moveaxis(block, axis + 1, 1)
    rows = min(block.shape[1], target.shape[1] - r)
    target[d : d + draws, r : r + rows] = block[:draws, :rows]
