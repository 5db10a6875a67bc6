# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""From a NumPyro model to energies and gradients: the only file that touches effect handlers.

The energy of a model at a position :math:`z` in unconstrained space is

.. math::

    U(z) = \underbrace{-\log p(\theta(z)) - \log |\partial \theta / \partial z|}_{\text{prior}}
           \; \underbrace{- \sum_i \log p(y_i \mid \theta(z))}_{\text{likelihood}}

with each term under its plate and ``handlers.scale`` factors. Rows of subsampled plates are chosen from outside,
by substituting indices on the plate's site; the plate itself scales by N / B, so that the gradient of a minibatch
is unbiased for that of the full data, and a plate given all its rows yields the full-data energy by the same path.
"""

import fnmatch
import glob
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array, random
from jax.core import Tracer
from numpyro.contrib.module import ParamShape
from numpyro.distributions.transforms import Transform, biject_to
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import init_to_sample, init_to_uniform
from numpyro.infer.util import _unconstrain_reparam, compute_log_probs, transform_fn
from numpyro.primitives import Messenger

from numpyro_bdl._checks import (
    check_batch_size_is_used,
    check_finite_data,
    check_latent,
    check_observation,
    check_rows,
    check_subsample_size,
    named_arguments,
)
from numpyro_bdl.natural_parameter import natural_parameter as natural_parameter

Position = dict[str, Array]
"""Latent sites by name, in unconstrained space."""


class Energies(NamedTuple):
    """The two parts of the energy of a model; their sum is the energy."""

    prior: Array
    """latent sites and the log-Jacobians of their transforms"""
    likelihood: Array
    """observed sites and factors"""


class Plate(NamedTuple):
    """A plate of the model."""

    size: int
    subsample_size: int


class Potential:
    r"""The energies of a NumPyro model, with what else its kernels and guides need to know of it.

    The model is run once, abstractly (no flops), to find its sites; the arguments are checked there.

    :param model: A model of NumPyro primitives, over linen or nnx networks or none.
    :param model_args: Positional arguments of the model.
    :param model_kwargs: Keyword arguments of the model.
    :param frozen: Patterns (as of :mod:`fnmatch`) of parameters that have no prior and keep their first value.
    :param params: Parameters without a prior as trained elsewhere, by ``param`` site, as of
        :meth:`numpyro.infer.svi.SVI.get_params`; those need not be frozen.
    :param init_strategy: A NumPyro initialization strategy. None draws the parameters of a network from its own
        initializers (of an nnx module, which was initialized outside: from a normal law with mean and standard
        deviation of each of its arrays), and any other site as :func:`numpyro.infer.init_to_uniform` does.
    :raises ValueError: for NaN data, a subsample larger than its plate, two plates with one name, a parameter
        without a prior, a latent site inside a subsampled plate, no latent site, a batch size that no plate uses.
    :raises TypeError: for discrete latent sites.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_bdl.potential import Potential
        >>> def model(y, batch_size=None):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     with numpyro.plate("data", len(y), subsample_size=batch_size):
        ...         numpyro.sample("y", dist.Normal(mu, 1), obs=numpyro.subsample(y, event_dim=0))
        >>> args, kwargs = (jnp.arange(4.0),), {"batch_size": 2}
        >>> potential = Potential(model, args, kwargs)
        >>> potential.subsampled
        {'data': Plate(size=4, subsample_size=2)}
        >>> energies, _ = potential.energies(
        ...     {"mu": jnp.array(0.5)}, {"data": jnp.array([1, 3])}, random.key(0), {}, args, kwargs)
        >>> [round(float(e), 3) for e in energies]
        [1.044, 10.176]
    """

    draws_share_work = False
    """Whether to evaluate several draws at once takes less work than one after the other."""

    def __init__(
        self,
        model: Callable,
        model_args: tuple = (),
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        frozen: str | tuple[str, ...] = (),
        params: Mapping[str, Any] | None = None,
        init_strategy: Callable | None = None,
    ):
        self.model = model
        self.args, self.kwargs = tuple(model_args), dict(model_kwargs or {})
        self.init_strategy = init_strategy
        arguments = named_arguments(model, self.args, self.kwargs)
        check_finite_data(arguments)

        jax.eval_shape(self._discover, random.key(0))
        check_batch_size_is_used(arguments, self.plates, self.subsampled)
        if not isinstance(frozen, (str, tuple, list)):
            raise TypeError(f"frozen must be a pattern or a tuple of patterns, got {frozen!r}.")
        self._freeze((frozen,) if isinstance(frozen, str) else tuple(frozen), params or {})
        if not self.latent:
            raise ValueError("The model has no latent site, so nothing to sample: give its parameters a prior.")
        self._initial = jax.jit(self._draw_initial)

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "_initial"}  # a compiled program

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._initial = jax.jit(self._draw_initial)

    # ---- structure ------------------------------------------------------------------------------------------

    def _run_initial(self, key: Array, strategy: Callable | None = None) -> tuple[dict, "_Record"]:
        strategy = strategy or self.init_strategy or init_to_uniform()

        def first_values(site):
            if site["type"] == "plate":
                size, subsample_size = site["args"]
                check_subsample_size(site["name"], size, subsample_size)
                return None if subsample_size in (None, size) else jnp.arange(subsample_size)
            return strategy(site)

        record = _Record()
        with record:
            sites = trace(substitute(seed(self.model, key), substitute_fn=first_values)).get_trace(
                *self.args, **self.kwargs
            )
        return sites, record

    def _discover(self, key: Array) -> None:
        sites, record = self._run_initial(key)
        self.plates: dict[str, Plate] = record.plates
        self.subsampled = {k: p for k, p in record.plates.items() if p.size != p.subsample_size}
        samples = {k: site for k, site in sites.items() if site["type"] == "sample"}
        latent = {k: site for k, site in samples.items() if not site["is_observed"]}
        for name, site in latent.items():
            check_latent(name, site, self.subsampled)
        for name, site in samples.items():
            if site["is_observed"] and not site["infer"].get("is_auxiliary", False):
                check_rows(name, site)
                check_observation(name, site)
        if not latent:
            raise ValueError("The model has no latent site: there is nothing to sample.")
        self.latent: tuple[str, ...] = tuple(latent)
        self.observed: dict[str, tuple[str | None, ...]] = {
            k: _plates_by_axis(site)
            for k, site in samples.items()
            if site["is_observed"] and not site["infer"].get("is_auxiliary", False)
        }
        """Observed sites, each with the plates of its batch dimensions from the left, None for one without a plate."""
        self.dims: dict[str, tuple[str | None, ...]] = {
            k: (*_plates_by_axis(site), *site.get("infer", {}).get("event_dims", ()))
            for k, site in sites.items()
            if site["type"] in ("sample", "deterministic")
        }
        """The plates of each site's batch dimensions, as of :attr:`observed`, and its ``infer["event_dims"]``."""
        self.fixed_shapes: dict[str, tuple[int, ...]] = {
            k: fixed_shape(site) for k, site in sites.items() if site["type"] in ("sample", "deterministic")
        }
        """What of each site's shape is the same for any number of rows, as of :func:`fixed_shape`."""
        self._log_det = tuple(f"_{name}_log_det" for name in latent)

        supports = {k: site["fn"].support for k, site in latent.items()}
        self.bounded = tuple(k for k, s in supports.items() if not _is_real(s))
        """Latent sites whose support is not all real numbers."""
        static = {k: s for k, s in supports.items() if not _has_tracers(s)}
        self._transforms: dict[str, Transform] = {k: biject_to(s) for k, s in static.items()}
        self._deterministic = tuple(
            k
            for k, site in sites.items()
            if site["type"] == "deterministic"
            and not any(frame.name in self.subsampled for frame in site["cond_indep_stack"])
        )
        if self._deterministic and record.mutable:
            warnings.warn(
                f"The deterministic sites {', '.join(self._deterministic)} are not collected, since the model has"
                " mutable collections; evaluate them by PosteriorPredictive.functions(sites=...).",
                stacklevel=6,
            )
        self._replay = len(static) < len(supports) or bool(self._deterministic and not record.mutable)

        self._params, self._without_prior = {}, {}
        self.network: dict[str, tuple[str, tuple]] = {}
        """Latent sites that are parameters of a network, each with its ``param`` site and the path in it."""
        for name, site in sites.items():
            if site["type"] != "param":
                continue
            leaves, treedef = jax.tree_util.tree_flatten_with_path(site["value"], is_leaf=_is_shape)
            paths = [tuple(entry.key for entry in path) for path, _ in leaves]
            self._params[name] = (treedef, [leaf if _is_shape(leaf) else None for _, leaf in leaves])
            for path, (_, leaf) in zip(paths, leaves, strict=True):
                if not _is_shape(leaf):
                    self._without_prior[_parameter_name(name, path)] = (name, path)
                elif site_name := _network_site(name, path, self.latent):
                    self.network[site_name] = (name, path)

        self._mutable_template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), record.mutable
        )

    def _freeze(self, patterns: tuple[str, ...], params: Mapping[str, Any]) -> None:
        names = list(self._without_prior)
        trained = [n for n in names if self._without_prior[n][0] in params]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"frozen={pattern!r} matches no parameter without a prior. "
                    + (f"Those are: {', '.join(names)}." if names else "Every parameter has a prior.")
                )
        patterns = (*patterns, *map(glob.escape, trained))
        unknown = [n for n in names if not any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        if unknown:
            raise ValueError(
                f"These parameters have no prior and would stay at a random start: {', '.join(unknown)}. Give them"
                " a prior (the keys of a dict of priors are names as 'Dense_0.kernel', here"
                f" {', '.join(repr('.'.join(map(str, self._without_prior[n][1])) or n) for n in unknown)}), or keep"
                f" them as they are with frozen=({', '.join(map(repr, unknown))},)."
            )
        values: dict[str, Any] = {}
        if len(trained) < len(names):
            # the same for every chain, or the chains would not share a target
            with jax.ensure_compile_time_eval():
                values = jax.jit(lambda key: self._run_initial(key)[1].params)(random.key(0))
        values |= {site: params[site] for site, _ in self._without_prior.values() if site in params}
        self.frozen = {n: _at(values[site], path) for n, (site, path) in self._without_prior.items()}
        """Parameters without a prior, by name."""
        for name, (treedef, leaves) in self._params.items():
            given = treedef.flatten_up_to(values[name]) if name in values else leaves
            filled = [leaf if leaf is not None else value for leaf, value in zip(leaves, given, strict=True)]
            self._params[name] = (treedef, filled)

    def data_plate(self, sizes: Mapping[str, int]) -> str | None:
        """The plate that the observed sites share, those outside of all plates aside; of several the subsampled, else
        the largest.

        :param sizes: The plates to choose from, with their sizes.
        """
        of_sites = [set(names) - {None} for names in self.observed.values()]
        shared = set(sizes).intersection(*filter(None, of_sites)) if any(of_sites) else set()
        ranked = sorted(shared, key=lambda name: (name in self.subsampled, sizes[name]))
        return ranked[-1] if ranked else None

    @property
    def has_mutable(self) -> bool:
        """Whether a network of the model has mutable collections."""
        return bool(self._mutable_template)

    def collections(self, given: Mapping[str, Any]) -> dict:
        """Mutable collections as trained elsewhere, such as ``svi_result.state.mutable_state``, as runs take them.

        :param given: Values by name, among others.
        :raises ValueError: if one is missing.
        """
        missing = [name for name in self._mutable_template if name not in given]
        if missing:
            raise ValueError(
                f"The model has mutable collections (BatchNorm) of which there are no values: {', '.join(missing)}. SVI"
                " keeps them in its state; hand in the parameters joined with them, as in"
                " result.params | result.state.mutable_state."
            )
        return self._without_keys({name: given[name] for name in self._mutable_template})

    # ---- starting points ------------------------------------------------------------------------------------

    def _draw_initial(self, key: Array) -> tuple[Position, dict]:
        key, key_network = random.split(key)
        sites, record = self._run_initial(key)
        z = {}
        for n, name in enumerate(self.latent):
            transform = biject_to(sites[name]["fn"].support)
            value = sites[name]["value"]
            if self.init_strategy is None and name in self.network and _is_real(sites[name]["fn"].support):
                own = _at(record.params[self.network[name][0]], self.network[name][1])
                if isinstance(own, Tracer):
                    value = own
                elif not _is_shape(own):  # as after handlers.substitute, in whose tree NumPyro writes shapes
                    value = _alike(random.fold_in(key_network, n), own)
            z[name] = transform.inv(value)
        return z, self._without_keys(record.mutable)

    def initial(self, key: Array) -> tuple[Position, dict]:
        """A starting position and the first mutable collections.

        :param key: PRNG key; draws with different keys are independent.
        :return: Position in unconstrained space, and the mutable collections ({} if there are none).
        """
        return self._initial(key)

    def prior_draw(self, key: Array) -> Position:
        """A draw from the prior, in unconstrained space; of a site with a flat prior, what
        :func:`numpyro.infer.init_to_uniform` gives."""
        sites, _ = self._run_initial(key, init_to_sample())
        return {name: biject_to(sites[name]["fn"].support).inv(sites[name]["value"]) for name in self.latent}

    def _without_keys(self, mutable: dict) -> dict:
        return jax.tree.map(lambda x: None if _is_key(x) else x, mutable)

    def _with_keys(self, mutable: dict, key: Array) -> dict:
        """Mutable collections as the model expects them: the keys of nnx streams are new at every step."""

        def fill(template, value):
            return random.split(key, template.shape) if _is_key(template) else value

        return jax.tree.map(fill, self._mutable_template, mutable)

    # ---- energies -------------------------------------------------------------------------------------------

    def _bind(self, rows: dict[str, Array], key: Array, mutable: dict) -> Callable:
        """The model with rows, frozen parameters and mutable collections in place."""
        key, key_mutable = random.split(key)
        params = {k: treedef.unflatten(leaves) for k, (treedef, leaves) in self._params.items()}
        data = params | self._with_keys(mutable, key_mutable)

        def fill(site):
            if site["type"] == "plate":
                return rows.get(site["name"], jnp.arange(site["args"][0]))
            return data.get(site["name"])

        return seed(substitute(self.model, substitute_fn=fill), key)

    def energies(
        self, z: Position, rows: dict[str, Array], key: Array, mutable: dict, args: tuple, kwargs: dict
    ) -> tuple[Energies, dict]:
        """The energy at a position, in its two parts.

        :param z: Position in unconstrained space.
        :param rows: Indices of each subsampled plate; a plate that is not named here takes all of its rows.
        :param key: PRNG key of the model's own randomness (dropout).
        :param mutable: Mutable collections (BatchNorm) that the step starts from.
        :param args: Positional arguments of the model.
        :param kwargs: Keyword arguments of the model.
        :return: The energies, scalars, and the mutable collections after the run.
        """
        model = substitute(self._bind(rows, key, mutable), substitute_fn=lambda site: _unconstrain_reparam(z, site))
        with _any_subsample_size():
            log_joint, sites = compute_log_probs(model, args, kwargs, {})
        prior = likelihood = jnp.zeros(())
        for name, log_prob in log_joint.items():
            # inside a scope NumPyro puts the name of the scope before these once more
            if name.endswith(self._log_det):
                # a change of variables happens once, however the density is scaled; NumPyro scales it too
                prior -= jnp.sum(sites[name]["fn"].log_prob(sites[name]["value"]))
            elif name in self.latent:
                prior -= log_prob
            else:
                likelihood -= log_prob
        new = {k: site["value"] for k, site in sites.items() if site["type"] == "mutable"}
        return Energies(prior, likelihood), self._without_keys(new)

    def gradient(
        self,
        z: Position,
        rows: dict[str, Array],
        key: Array,
        mutable: dict,
        args: tuple,
        kwargs: dict,
        prior_weight: float = 1.0,
    ) -> tuple[Array, Position, dict]:
        """The energy, its gradient in unconstrained space, and the mutable collections after the run.

        The parameters are those of :meth:`energies`.

        :param prior_weight: What the prior part is multiplied by; with 0 it is not evaluated.
        """

        def energy(z):
            energies, new = self.energies(z, rows, key, mutable, args, kwargs)
            if not prior_weight:
                return energies.likelihood, new
            prior = energies.prior if prior_weight == 1 else prior_weight * energies.prior
            return prior + energies.likelihood, new

        (value, new), gradient = jax.value_and_grad(energy, has_aux=True)(z)
        return value, gradient, new

    # ---- draws ----------------------------------------------------------------------------------------------

    def constrain(self, z: Position, args: tuple, kwargs: dict) -> dict[str, Array]:
        """Latent sites in their supports, and the deterministic sites outside of subsampled plates.

        A deterministic site inside a subsampled plate belongs to one minibatch and is left out.
        """
        if not self._replay:
            return transform_fn(self._transforms, z)
        rows = {name: jnp.arange(plate.subsample_size) for name, plate in self.subsampled.items()}
        mutable = jax.tree.map(lambda x: None if _is_key(x) else jnp.zeros(x.shape, x.dtype), self._mutable_template)
        model = substitute(
            self._bind(rows, random.key(0), mutable), substitute_fn=lambda site: _unconstrain_reparam(z, site)
        )
        sites = trace(model).get_trace(*args, **kwargs)
        wanted = self.latent if self._mutable_template else self.latent + self._deterministic
        return {name: sites[name]["value"] for name in wanted}

    def run(
        self, values: dict[str, Array], rows: dict[str, Array], key: Array, mutable: dict, args: tuple, kwargs: dict
    ) -> dict[str, dict]:
        """The trace of the model at given values, frozen parameters and mutable collections put in.

        :param values: Latent sites in their supports.
        :return: NumPyro's trace, by site. The other parameters are those of :meth:`energies`; the arguments may
            be of another size than those of the constructor.
        """
        model = substitute(self._bind(rows, key, mutable), data={k: values[k] for k in self.latent})
        with _any_subsample_size():
            return trace(model).get_trace(*args, **kwargs)


# ---- what a run of the model leaves behind ------------------------------------------------------------------


class _Record(Messenger):
    """Plates, first parameters and first mutable collections, before the model changes the latter two in place."""

    def __enter__(self):
        self.plates: dict[str, Plate] = {}
        self.params: dict[str, Any] = {}
        self.mutable: dict[str, Any] = {}
        return super().__enter__()

    def postprocess_message(self, msg):
        name, value = msg.get("name"), msg["value"]
        if msg["type"] == "plate":
            plate = Plate(int(msg["args"][0]), len(value))
            before = self.plates.setdefault(name, plate)
            if before is not plate and (before != plate or plate.size != plate.subsample_size):
                raise ValueError(
                    f"Two plates are named '{name}', the one {before.subsample_size} of {before.size}, the other"
                    f" {plate.subsample_size} of {plate.size} rows. Rows are chosen by the plate's name: give each"
                    " its own, or make one plate object and enter it twice."
                )
        elif msg["type"] == "param" and value is not None:
            self.params[name] = jax.tree.map(lambda x: x, value)
        elif msg["type"] == "mutable" and value is not None:
            self.mutable[name] = jax.tree.map(lambda x: x, value)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, ParamShape)


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)


def _is_real(support: Any) -> bool:
    while isinstance(support, dist.constraints.independent):
        support = support.base_constraint
    return support is dist.constraints.real


def _has_tracers(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _at(tree: Any, path: tuple) -> Any:
    for entry in path:
        tree = tree[entry]
    return tree


def _alike(key: Array, value: Array) -> Array:
    """A draw from the normal law with the moments of an array."""
    return jnp.mean(value) + jnp.std(value) * random.normal(key, value.shape, value.dtype)


def _parameter_name(param_site: str, path: tuple) -> str:
    return "/".join([param_site.removesuffix("$params"), ".".join(map(str, path))]) if path else param_site


def _plates_by_axis(site: dict) -> tuple[str | None, ...]:
    plates = {frame.dim: frame.name for frame in site["cond_indep_stack"]}
    # a deterministic site doesn't tell which of its axes are events
    depth = len(site["fn"].batch_shape) if site["type"] == "sample" else -min(plates, default=0)
    return tuple(plates.get(dim) for dim in range(-depth, 0))


def row_axis(site: dict, plate: str | None) -> int | None:
    """The axis of a site along which the rows of a plate lie; None if the site lies outside of it."""
    plates = _plates_by_axis(site)
    return plates.index(plate) if plate is not None and plate in plates else None


def fixed_shape(site: dict) -> tuple[int, ...]:
    """How many axes a site has, then the sizes of those in no plate; only how many, where rows may be in no plate."""
    if site["type"] == "deterministic":
        return (jnp.ndim(site["value"]),)
    shape, plates = site["fn"].shape(), _plates_by_axis(site)
    if not any(plates):
        return (len(shape),)
    return len(shape), *(size for size, plate in zip_longest(shape, plates) if plate is None)


def _network_site(param_site: str, path: tuple, latent: tuple[str, ...]) -> str | None:
    """The sample site of a network's parameter: the name of the network, a divider, the dotted path."""
    prefix, dotted = param_site.removesuffix("$params"), ".".join(map(str, path))
    pattern = re.compile(re.escape(prefix) + r"[^\w.]*" + re.escape(dotted))
    return next((name for name in latent if pattern.fullmatch(name)), None)


@contextmanager
def _any_subsample_size():
    """Silence NumPyro's remark that the rows substituted are not as many as ``subsample_size``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "subsample_size does not match")
        yield
