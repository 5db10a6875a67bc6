# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Prediction from the draws of a run: functions, log likelihoods and new data, in chunks.

Memory holds one chunk of draws times one chunk of rows; the program is compiled once for all chunks, and again only
for arguments of other shapes.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.infer import MCMC

from numpyro_bdl._checks import check_finite_data, check_integer, named_arguments
from numpyro_bdl._evaluation import Evaluation
from numpyro_bdl._runs import DrawSource, source_of
from numpyro_bdl.potential import natural_parameter
from numpyro_bdl.summary import ClassSummary, NumberSummary, accumulate, law, law_and_new_data, log_density

PROBES = 64


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
    :param chains: Numbers of the chains to take; None for all.
    :param draw_chunk: Draws per chunk, at most.
    :param data_chunk: Rows per chunk, at most; None for all; ``"auto"`` for 1024, or all if the model can't be cut. A
        model is cut along the plate of its observed sites, if it takes its rows by ``numpyro.subsample`` or the indices
        of the plate.
    :param progress_bar: Show a bar when the work takes more than two seconds.
    :raises ValueError: for a run without draws, sites without draws, members that were not collected, or chains that
        there are not.
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
        chains: Sequence[int] | None = None,
        draw_chunk: int = 16,
        data_chunk: int | None | str = "auto",
        progress_bar: bool = True,
    ):
        check_integer("PosteriorPredictive", "draw_chunk", draw_chunk)
        if data_chunk not in (None, "auto"):
            check_integer("PosteriorPredictive", "data_chunk", data_chunk)
        source = source_of("PosteriorPredictive", posterior, members, chains)
        self.potential, self._run_arguments = source.potential, source.arguments
        values, mutable = source.draws()
        missing = [site for site in self.potential.latent if site not in values]
        if missing:
            raise ValueError(
                f"The run left these sites out of its draws, without which nothing can be predicted: {missing}."
            )
        draws = jax.tree.map(np.asarray, ({site: values[site] for site in self.potential.latent}, mutable))
        count = len(jax.tree.leaves(draws)[0])
        self._chains = tuple(range(count)) if chains is None else _chosen(chains, count)
        if chains is not None:
            draws = jax.tree.map(lambda w: w[list(self._chains)], draws)
        self.batch_shape: tuple[int, int] = jax.tree.leaves(draws)[0].shape[:2]
        """Chains and draws."""
        self._draws = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), draws)
        self._draw_chunk, self._progress_bar = int(draw_chunk), progress_bar
        self._data_chunk = data_chunk if data_chunk in (None, "auto") else int(data_chunk)
        self._programs: dict = {}

    def __getstate__(self):
        return self.__dict__ | {"_programs": {}}  # compiled

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

    def summary(
        self,
        *args,
        sites: tuple[str, ...] | None = None,
        quantiles: Sequence[float] = (),
        rng_key: Array | None = None,
        **kwargs,
    ) -> dict[str, NumberSummary | ClassSummary]:
        r"""What the mixture of all draws predicts, accumulated so that the draws' predictions are never held at once.

        The memory is twice that of the result, a few blocks of ``draw_chunk`` times ``data_chunk``, and the draws
        themselves, whatever their number. Quantiles, which are exact for the values drawn, need all draws of a chunk of
        rows: 12 bytes for each draw and number, which are 123 MB for 10⁴ draws and 1024 rows. They also bring
        the draws to the device once for each chunk of rows and not once; a larger ``data_chunk`` makes that rarer.

        :param sites: Names of observed sites; None for all.
        :param quantiles: Levels from 0 to 1. A quantile :math:`y_q` is that of one new value for each draw, so that it
            has a standard error of :math:`\sqrt{q (1 - q) / S} / \bar p(y_q)` for S independent draws.
        :param rng_key: PRNG key of the new values, which are those of :meth:`sample`; needed for quantiles alone.
        :return: By site, a :class:`~numpyro_bdl.summary.ClassSummary` for a Categorical or Bernoulli, else a
            :class:`~numpyro_bdl.summary.NumberSummary`: arrays (row, ...) in double precision.
        :raises ValueError: for draws or predictions that are NaN, quantiles of classes, unknown sites, or a law whose
            mean NumPyro doesn't know.

        **Example**

        .. doctest::

            >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from jax import random
            >>> from numpyro.infer import MCMC
            >>> import numpyro_bdl as bdl
            >>> def model(y=None, rows=3):
            ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
            ...     with numpyro.plate("data", rows):
            ...         numpyro.sample("y", dist.Normal(mu, 2.0), obs=y)
            >>> mcmc = MCMC(bdl.SGLD(model, step_size=0.1), num_warmup=10, num_samples=50, progress_bar=False)
            >>> mcmc.run(random.key(0), jnp.zeros(3))
            >>> summary = bdl.PosteriorPredictive(mcmc).summary(quantiles=(0.05, 0.95), rng_key=random.key(1))["y"]
            >>> summary.mean_of_variances.tolist(), summary.quantiles.shape
            ([4.0, 4.0, 4.0], (3, 2))
        """
        unknown = [name for name in sites or () if name not in self.potential.observed]
        if unknown:
            raise ValueError(f"summary: sites must be observed ones, {list(self.potential.observed)}, got {unknown}.")
        levels = np.asarray(quantiles, np.float64)
        if levels.ndim != 1 or not ((levels >= 0) & (levels <= 1)).all():
            raise ValueError(f"summary: quantiles must be levels from 0 to 1, got {quantiles!r}.")
        if len(levels) and rng_key is None:
            raise ValueError("summary: quantiles are of new values; give an rng_key to draw them with.")
        self._check_draws()
        key = random.key(0) if rng_key is None else rng_key
        evaluation = self._evaluation(law_and_new_data if len(levels) else law, key, sites, args, kwargs)
        of_classes = [name for name, parts in evaluation.outputs.items() if "logits" in parts]
        if len(levels) and of_classes:
            raise ValueError(
                f"summary: the sites {of_classes} are of classes, without quantiles; name others by sites."
            )
        return accumulate(evaluation, levels, self._place, self._progress_bar)

    def _place(self, draw: int) -> str:
        chain, draw = divmod(draw, self.batch_shape[1])
        return f"chain {self._chains[chain]}, draw {draw}"

    def _check_draws(self) -> None:
        """Refuse draws that are not finite, of which a mixture would be NaN for every row."""
        leaves = [w for w in jax.tree.leaves(self._draws) if jnp.issubdtype(w.dtype, jnp.inexact)]
        draws = range(len(jax.tree.leaves(self._draws)[0]))
        bad = [n for n in draws if not all(np.isfinite(w[n]).all() for w in leaves)]
        if bad:
            chains = sorted({self._chains[n // self.batch_shape[1]] for n in bad})
            raise ValueError(
                f"summary: {len(bad)} of {len(draws)} draws are NaN or infinite, the first at {self._place(bad[0])}."
                f" Leave chains {chains} out by PosteriorPredictive(mcmc, chains=...), or take a smaller step."
            )

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


def _chosen(chains: Sequence[int], count: int) -> tuple[int, ...]:
    chosen = np.asarray(chains)
    whole = chosen.ndim == 1 and chosen.dtype.kind in "iu" and len(chosen) and len(set(chosen.tolist())) == len(chosen)
    if not whole or chosen.min() < 0 or chosen.max() >= count:
        raise ValueError(
            f"PosteriorPredictive: chains must be some of 0 to {count - 1}, got {chains!r}; hand in different integers,"
            " as in [0]."
        )
    return tuple(chosen.tolist())


# ---- what is taken from a site ------------------------------------------------------------------------------------


def _function(name: str, site: dict, key: Array) -> Array:
    return natural_parameter(name, site)


def _log_prob(name: str, site: dict, key: Array) -> Array:
    if not site["is_observed"]:
        raise ValueError(f"log_likelihood needs an observation at site '{name}', as in log_likelihood(x_test, y_test).")
    return log_density(name, site)


def _sample(name: str, site: dict, key: Array) -> Array:
    return site["fn"].sample(key)
