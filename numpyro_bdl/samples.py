# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Draws from elsewhere, with their model and its data: of a dict, a DataTree, SVI or SteinVI."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.contrib.einstein import SteinVI
from numpyro.infer import SVI, Predictive
from numpyro.infer.autoguide import AutoGuide
from xarray import DataTree

from numpyro_bdl._checks import check_integer
from numpyro_bdl._draws import read_draws
from numpyro_bdl.potential import Potential


class Samples:
    r"""Draws of the latent sites of a model, for :class:`~numpyro_bdl.PosteriorPredictive` and
    :func:`~numpyro_bdl.to_datatree` in place of a run.

    :param model: The NumPyro model.
    :param draws: Constrained arrays (chain, draw, ...) by site, as of ``mcmc.get_samples(group_by_chain=True)``;
        ``value[None]`` adds an axis of chains. Or a DataTree with the group ``posterior``, one that was read from a
        file, say; a "." in its names may stand for the "/" in those of sites. Deterministic sites inside a subsampled
        plate are left out, since they belong to one minibatch; what is no site of the model is kept for trees.
    :param model_args: Positional arguments of the model: all of the data.
    :param model_kwargs: Keyword arguments of the model.
    :param params: Parameters without a prior, and mutable collections (BatchNorm), as SVI trained them:
        ``result.params | result.state.mutable_state``. They are the same for all draws.
    :param frozen: Patterns of parameters without a prior that keep their first value, as of a kernel.
    :param markov: Whether the draws of a chain follow each other.
    :param attributes: What a tree is to tell of their origin; chains with draws that are not finite are added.
    :raises ValueError: for sites that are missing or have other shapes, chains or draws than the rest, missing mutable
        collections, or what :class:`~numpyro_bdl.potential.Potential` refuses.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> import numpyro_bdl as bdl
        >>> def model(x, y=None):
        ...     slope = numpyro.sample("slope", dist.Normal(0, 1))
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("y", dist.Normal(slope * x, 1), obs=y)
        >>> x = jnp.linspace(-1, 1, 50)
        >>> draws = {"slope": random.normal(random.key(0), (2, 100))}                            # (chain, draw)
        >>> samples = bdl.Samples(model, draws, (x, 0.5 * x))
        >>> bdl.PosteriorPredictive(samples).functions(x[:7])["y"].shape
        (2, 100, 7)
        >>> sorted(bdl.to_datatree(samples).children)
        ['functions', 'observed_data', 'posterior']
    """

    def __init__(
        self,
        model: Callable,
        draws: Mapping[str, Any] | DataTree,
        model_args: tuple = (),
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        frozen: str | tuple[str, ...] = (),
        markov: bool = True,
        attributes: Mapping[str, Any] | None = None,
    ):
        self.arguments = tuple(model_args), dict(model_kwargs or {})
        self.potential = Potential(model, *self.arguments, frozen=frozen, params=params)
        self.markov = markov
        self._attributes = dict(attributes or {})
        self._mutable = self.potential.collections(params or {})
        found = read_draws("Samples", draws, "posterior", least=1)
        names = {name.replace("/", "."): name for name in self.potential.dims}
        found = {names.get(name.replace("/", "."), name): value for name, value in found.items()}
        shapes = self._shapes()
        self._check_shapes(found, shapes)
        self._draws = {name: value for name, value in found.items() if name in shapes or name not in names.values()}
        self._attributes |= self._bad_chains()

    @classmethod
    def from_svi(
        cls,
        rng_key: Array,
        svi: SVI,
        params: Mapping[str, Any],
        model_args: tuple = (),
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        num_samples: int = 100,
    ) -> "Samples":
        r"""Independent draws of the guide of an SVI, as of one chain.

        :param rng_key: PRNG key.
        :param svi: The SVI object, with an AutoGuide or a guide of your own.
        :param params: What it trained: ``result.params``, or ``svi.get_params(state)``; with mutable collections
            ``result.params | result.state.mutable_state``.
        :param model_args: Positional arguments of model and guide: all of the data.
        :param model_kwargs: Keyword arguments of model and guide.
        :param num_samples: How many.
        :return: The samples. A guide that is a point, as AutoDelta, has the same in each of them.
        :raises ValueError: if the guide has no value for a latent site of the model.

        **Example**

        .. doctest::

            >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from jax import random
            >>> from numpyro.infer import SVI, Trace_ELBO
            >>> from numpyro.infer.autoguide import AutoNormal
            >>> import numpyro_bdl as bdl
            >>> def model(y):
            ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
            ...     with numpyro.plate("data", len(y)):
            ...         numpyro.sample("y", dist.Normal(mu, 1), obs=y)
            >>> y = jnp.ones(30)
            >>> svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.05), Trace_ELBO())
            >>> result = svi.run(random.key(0), 500, y, progress_bar=False)
            >>> samples = bdl.Samples.from_svi(random.key(1), svi, result.params, (y,), num_samples=200)
            >>> bdl.to_datatree(samples, log_likelihood=True)["log_likelihood"]["y"].shape
            (1, 200, 30)
        """
        check_integer("Samples.from_svi", "num_samples", num_samples)
        _check_kind("from_svi", svi, SVI, "from_stein")
        _check_params("from_svi", params, svi.guide)
        kwargs = svi.static_kwargs | dict(model_kwargs or {})
        draws = _of_guide(rng_key, svi.guide, params, num_samples, model_args, kwargs)
        return cls(
            svi.model,
            {name: value[None] for name, value in draws.items()},
            model_args,
            kwargs,
            params=params,
            markov=False,
            attributes={"inference": type(svi).__name__, "guide": _name(svi.guide)},
        )

    @classmethod
    def from_stein(
        cls,
        rng_key: Array,
        stein: SteinVI,
        params: Mapping[str, Any],
        model_args: tuple = (),
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        draws_per_particle: int = 1,
    ) -> "Samples":
        r"""Draws of the equal mixture that a SteinVI (or SVGD, ASVGD) trained,

        .. math::

            q(\theta) = \frac1P \sum_p q(\theta \mid \phi_p),

        as many of each of the P particles, as of one chain, those of the first particle in front.

        :param rng_key: PRNG key.
        :param stein: The SteinVI object, after its run.
        :param params: What it trained: ``result.params``.
        :param model_args: Positional arguments of model and guide: all of the data.
        :param model_kwargs: Keyword arguments of model and guide.
        :param draws_per_particle: How many of each particle. The guide of SVGD is a point, of which one is enough.
        :return: The samples.
        :raises ValueError: if the SteinVI object has not run, or its guide has no value for a latent site of the model.
        """
        check_integer("Samples.from_stein", "draws_per_particle", draws_per_particle)
        _check_kind("from_stein", stein, SteinVI, "from_svi")
        if stein.guide_sites is None:
            raise ValueError("Samples.from_stein: the SteinVI object has no particles yet; run it first.")
        _check_params("from_stein", params, stein.guide)
        kwargs = stein.static_kwargs | dict(model_kwargs or {})
        moving = {
            name: value
            for name, value in params.items()
            if name in stein.guide_sites and not stein.non_mixture_params_fn(name)
        }
        shared = {name: value for name, value in params.items() if name not in moving}
        of_particle = jax.vmap(
            lambda key, own: _of_guide(key, stein.guide, shared | own, draws_per_particle, model_args, kwargs)
        )
        draws = of_particle(random.split(rng_key, stein.num_stein_particles), moving)
        return cls(
            stein.model,
            {name: jnp.reshape(value, (1, -1, *value.shape[2:])) for name, value in draws.items()},
            model_args,
            kwargs,
            params=shared,
            markov=False,
            attributes={
                "inference": type(stein).__name__,
                "guide": _name(stein.guide),
                "particles": stein.num_stein_particles,
            },
        )

    def draws(self) -> tuple[dict[str, np.ndarray], dict]:
        """Constrained sites and mutable collections, (chain, draw, ...)."""
        batch = next(iter(self._draws.values())).shape[:2]
        return self._draws, jax.tree.map(lambda w: jnp.broadcast_to(w, (*batch, *jnp.shape(w))), self._mutable)

    def tree_groups(self) -> dict:
        """No groups of a tree besides those of every source."""
        return {}

    def attributes(self) -> dict[str, Any]:
        """What a tree tells of their origin."""
        return self._attributes

    def _bad_chains(self) -> dict[str, list[int]]:
        """Chains with latent values that are not finite, each with the first such draw, of which a warning tells."""
        latent = [self._draws[name] for name in self.potential.latent]
        finite = np.all([np.isfinite(value).all(tuple(range(2, value.ndim))) for value in latent], 0)
        if finite.all():
            return {}
        chains = np.flatnonzero(~finite.all(1))
        draws = np.argmin(finite[chains], 1)
        warnings.warn(
            f"Samples: the chains {chains.tolist()} have draws that are NaN or infinite, the first at the draws"
            f" {draws.tolist()}; leave these chains out.",
            stacklevel=3,
        )
        return {"bad_chains": chains.tolist(), "first_bad_draws": draws.tolist()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of latent and deterministic sites."""
        position, _ = jax.eval_shape(self.potential.initial, random.key(0))
        sites = jax.eval_shape(lambda z: self.potential.constrain(z, *self.arguments), position)
        return {name: site.shape for name, site in sites.items()}

    def _check_shapes(self, draws: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> None:
        for name in self.potential.latent:
            if name not in draws:
                raise ValueError(
                    f"Samples: there are no draws of '{name}', a latent site of the model; there are of:"
                    f" {', '.join(draws)}."
                )
            expected, found = shapes[name], draws[name].shape
            if found[2:] != expected:
                axes = ", ".join(["chain", "draw", *map(str, expected)])
                raise ValueError(
                    f"Samples: the draws of '{name}' must have shape ({axes}), got {found}; value[None] adds an axis of"
                    " chains."
                )


def _check_kind(method: str, given: Any, kind: type, other: str) -> None:
    if not isinstance(given, kind):
        known = isinstance(given, (SVI, SteinVI))
        name = f"the class {given.__name__}" if isinstance(given, type) else f"an object of {type(given).__name__}"
        raise TypeError(
            f"Samples.{method} needs an object of {kind.__name__}, got {name}"
            + (f", which Samples.{other} takes." if known else ".")
        )


def _check_params(method: str, params: Any, guide: Any) -> None:
    if isinstance(guide, AutoGuide) and isinstance(params, Mapping) and not params:
        raise ValueError(f"Samples.{method}: params is empty; hand in what was trained, as result.params.")
    if not isinstance(params, Mapping):
        raise TypeError(
            f"Samples.{method}: params must be a mapping of what was trained, as result.params, got an object of"
            f" {type(params).__name__}."
        )


def _of_guide(key: Array, guide: Callable, params: Mapping, count: int, args: tuple, kwargs: dict) -> dict[str, Array]:
    """What a guide draws, (draw, ...) by site."""
    if isinstance(guide, AutoGuide):  # a Laplace approximation is a point but for this method
        return guide.sample_posterior(key, params, *args, sample_shape=(count,), **kwargs)
    return Predictive(guide, params=dict(params), num_samples=count)(key, *args, **kwargs)


def _name(guide: Any) -> str:
    return getattr(guide, "__name__", type(guide).__name__)
