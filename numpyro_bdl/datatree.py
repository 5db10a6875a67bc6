# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""From a run to an ArviZ DataTree."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpyro
from jax import Array, random
from numpyro.infer import MCMC
from xarray import Dataset, DataTree

from numpyro_bdl._dims import Group, function_dims, site_dims
from numpyro_bdl._function_spread import THRESHOLD, relative_spread, warn_of_still_chains
from numpyro_bdl._runs import DrawSource, source_of
from numpyro_bdl.predictive import PROBES, PosteriorPredictive
from numpyro_bdl.repulsion import warn_if_inert

_WITH_WEIGHTS = {"posterior", "anchor", "inclusion"}


def to_datatree(
    posterior: MCMC | DrawSource,
    *,
    probe: tuple | None = None,
    sites: tuple[str, ...] | None = None,
    log_likelihood: bool = False,
    posterior_predictive: bool = False,
    weights: bool = True,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    rng_key: Array | None = None,
    draw_chunk: int = 16,
    data_chunk: int | None | str = "auto",
    **model_kwargs,
) -> DataTree:
    """The draws of a run, and what they say, as ArviZ wants it.

    The groups are

    - ``posterior``: the position, (chain, draw, ...) by site, constrained. A "/" in the name of a site becomes ".",
      since a tree has no such names;
    - ``functions``: the function of the model (logits, location, log rate) at the probe inputs, (chain, draw, point,
      output). R-hat and ESS of weights mean nothing under the symmetries of a network; of these they do;
    - ``sample_stats``: step size, temperature, minibatch energy and other collected scalars, under ArviZ's names;
    - ``anchor``: the anchor, constrained, if the kernel collected one;
    - ``inclusion``, ``inclusion_rate`` and ``mask``, of :class:`~numpyro_bdl.SpikeSlabSGHMC`: inclusion probabilities
      (chain, draw, group), the rate (chain) and what was kept (chain, group) by site;
    - ``observed_data``: all rows, never a minibatch;
    - ``log_likelihood``, ``posterior_predictive``: on request, at the rows of the run.

    The units of a layer are the dimensions ``<layer>_in`` and ``<layer>_out``, which its kernel and its bias share, as
    ``net.Dense_0_out``; rows and latent sites in plates have the plates' names, and ``infer={"event_dims": [...]}``
    names the other axes of a site. If a site has the name of a dimension, the latter gets ``_axis`` behind it.

    The particles of an ensemble are its chains; if the run kept only their last positions (``num_samples=1``), they are
    the draws of one chain. Floats keep the precision of the run: float32, unless JAX computes in x64.

    :param posterior: A run of any kernel of this package; or of NUTS or HMC on a model without frozen parameters; or
        :class:`~numpyro_bdl.Samples`, which has draws from elsewhere, of SVI and SteinVI too; or the posterior of
        :class:`~numpyro_bdl.AutoLinearizedLaplace`, whose samples are the draws of one chain, and whose function is
        that of the tangent model.
    :param probe: Arguments of the model at which to evaluate its function; None for 64 rows of the run, evenly spaced,
        whose numbers are the coordinate ``point``.
    :param sites: Sites of the function, observed or deterministic; None for every observed site.
    :param log_likelihood: Add the log likelihood of each row, for :func:`arviz.loo`.
    :param posterior_predictive: Add a replicate of the data for each draw.
    :param weights: Keep the parameters of networks in ``posterior``, ``anchor`` and ``inclusion``. If without them no
        site is left, ``posterior`` holds the functions: ArviZ looks there for the relative efficiency of
        :func:`arviz.loo`, which is that of the functions then.
    :param dims: Names of the axes of sites after chain and draw, by site, in place of those above. The axes of
        ``functions`` keep their names.
    :param coords: Labels by dimension, as in ``{"output": ["setosa", ...], "net.Dense_0_in": ["length", ...]}``.
    :param rng_key: PRNG key of the posterior predictive; None for ``jax.random.key(0)``.
    :param draw_chunk: Draws per chunk of evaluation.
    :param data_chunk: Rows per chunk of evaluation, as of :class:`~numpyro_bdl.PosteriorPredictive`.
    :param model_kwargs: Keyword arguments of the model that are to differ from those of the run, as ``train=False``.
    :return: A DataTree that can be written to NetCDF and Zarr. Its attributes tell the kernel, its temperature if it is
        fixed, whether chains shared their minibatches, the weights ``kl`` and ``mmd`` of an ensemble, and which chains
        turned bad at which step; or the guide.
    :raises ValueError: for a run without draws, dims and coords that don't fit, a site named ``chain`` or ``draw``, or
        what :class:`~numpyro_bdl.PosteriorPredictive` refuses.
    :warns UserWarning: for chains whose functions hardly differ from draw to draw, as of
        :func:`~numpyro_bdl.diagnostics.function_spread`, and chains with a gradient that was not finite.

    **Example**

    .. doctest::

        >>> import arviz as az, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> kernel = bdl.SGLD(model, step_size=1e-2, steps_per_draw=10)
        >>> mcmc = MCMC(kernel, num_warmup=50, num_samples=200, progress_bar=False)
        >>> mcmc.run(random.key(0), random.normal(random.key(1), (30,)))
        >>> tree = bdl.to_datatree(mcmc, log_likelihood=True)
        >>> sorted(tree.children)
        ['functions', 'log_likelihood', 'observed_data', 'posterior', 'sample_stats']
        >>> tree["functions"]["y"].dims
        ('chain', 'draw', 'point')
        >>> len(az.summary(tree, var_names=["mu"]))
        1
    """
    source = source_of("to_datatree", posterior)
    predictive = PosteriorPredictive(source, draw_chunk=draw_chunk, data_chunk=data_chunk)
    potential, (draws, _) = source.potential, source.draws()
    observed = predictive.observed_data()
    full = {name: list(potential.dims[name]) for name in observed}

    groups: dict[str, Group] = {"posterior": Group(draws, site_dims(potential, draws))}
    groups |= source.tree_groups()
    groups["functions"] = _functions(predictive, probe, sites, model_kwargs)
    if log_likelihood:
        rows = {name: list(plates) for name, plates in potential.observed.items()}
        groups["log_likelihood"] = Group(predictive.log_likelihood(**model_kwargs), rows)
    if posterior_predictive:
        replicates = predictive.sample(random.key(0) if rng_key is None else rng_key, **model_kwargs)
        groups["posterior_predictive"] = Group(replicates, full)
    if not weights:
        for name in _WITH_WEIGHTS & groups.keys():
            kept = {k: v for k, v in groups[name].values.items() if k not in potential.network}
            groups[name] = groups[name]._replace(values=kept)

    functions, stats = groups["functions"].values, groups.get("sample_stats", Group({})).values
    if "repulsion_ratio" in stats:
        warn_if_inert(stats["repulsion_ratio"])
    if source.markov and functions and predictive.batch_shape[1] > 1:
        relative = relative_spread(functions)
        warn_of_still_chains(relative, relative < THRESHOLD, THRESHOLD)
    if not source.markov and predictive.batch_shape[1] == 1:
        # without a history the particles are the draws
        for name, group in groups.items():
            groups[name] = group._replace(values={k: np.swapaxes(v, 0, 1) for k, v in group.values.items()})

    groups["observed_data"] = Group(observed, full, sample_dims=[])
    datasets = _datasets(groups, dims or {}, coords or {})
    if "posterior" not in datasets and "functions" in datasets:
        datasets = {"posterior": datasets["functions"]} | datasets
    tree = DataTree.from_dict(datasets)
    tree.attrs.update({"inference_library": "numpyro", "inference_library_version": numpyro.__version__})
    tree.attrs.update({_tree_name(name): value for name, value in source.attributes().items()})
    return tree


def _functions(predictive: PosteriorPredictive, probe: tuple | None, sites, model_kwargs: dict) -> Group:
    if probe is not None:
        values, points = predictive.functions(*probe, sites=sites, **model_kwargs), None
    else:
        values, points = predictive.functions_at_rows(PROBES, sites=sites, **model_kwargs)
    has_rows = {
        name: value.ndim > 2
        and any(predictive.potential.observed.get(name, (True,)))
        and (points is None or value.shape[2] == len(points))
        for name, value in values.items()
    }
    return Group(values, function_dims(values, has_rows), {} if points is None else {"point": points})


def _datasets(groups: dict[str, Group], dims: Mapping, coords: Mapping) -> dict[str, Dataset]:
    """The groups that hold anything, with the user's names of dimensions and labels over ours."""
    for name, names in dims.items():
        if isinstance(names, str) or not all(isinstance(dim, str) for dim in names):
            raise ValueError(
                f"to_datatree: dims['{name}'] must be a list of names, one for each axis after chain and draw, got"
                f" {names!r}."
            )
        if {"chain", "draw"} & set(names):
            raise ValueError(
                f"to_datatree: dims['{name}'] must name the axes after chain and draw, which are there already, got"
                f" {list(names)}."
            )
    dims = {_tree_name(name): list(names) for name, names in dims.items()}
    coords = {_tree_name(name): np.asarray(labels) for name, labels in coords.items()}
    datasets = {
        name: _dataset(group, {} if name == "functions" else dims, batch_only=name == "log_likelihood")
        for name, group in groups.items()
        if group.values
    }
    sites = {str(name) for dataset in datasets.values() for name in dataset.data_vars}
    unknown = [name for name in dims if name not in sites]
    if unknown:
        raise ValueError(
            f"to_datatree: dims names '{unknown[0]}', which is not in the tree; it has: {', '.join(sorted(sites))}."
        )
    sizes: dict[str, int] = {}
    for group, dataset in datasets.items():
        for dim, size in dataset.sizes.items():
            if sizes.setdefault(str(dim), size) != size and dim in coords:
                raise ValueError(
                    f"to_datatree: coords['{dim}'] can't label a dimension that is of {sizes[str(dim)]} places in one"
                    f" group and of {size} in '{group}'; name one of them otherwise by dims."
                )
    for dim, labels in coords.items():
        if dim not in sizes:
            raise ValueError(
                f"to_datatree: coords names '{dim}', which is no dimension of the tree; those are:"
                f" {', '.join(sorted(sizes))}."
            )
        if labels.shape != (sizes[dim],):
            raise ValueError(
                f"to_datatree: coords['{dim}'] must be {sizes[dim]} labels, one for each place along that dimension,"
                f" got shape {labels.shape}."
            )
    return {
        name: dataset.assign_coords({dim: labels for dim, labels in coords.items() if dim in dataset.dims})
        for name, dataset in datasets.items()
    }


def _dataset(group: Group, given: dict[str, list], batch_only: bool) -> Dataset:
    from arviz_base import dict_to_dataset

    data: dict = {_tree_name(name): np.asarray(value) for name, value in group.values.items()}
    dims: dict = {_tree_name(name): [dim and _tree_name(dim) for dim in names] for name, names in group.dims.items()}
    dims |= {name: names for name, names in given.items() if name in data}
    used = {dim for name in data for dim in dims.get(name, ())}
    for what, names in (("site", data), ("plate", used)):
        for name in ("chain", "draw"):
            if name in names:
                raise ValueError(
                    f"to_datatree: a {what} is named '{name}', as an axis of the tree is; rename it in the model."
                )
    coords: dict = {_tree_name(dim): labels for dim, labels in group.coords.items() if _tree_name(dim) in used}
    # of a variable with the name of a dimension xarray makes labels
    other = {dim: f"{dim}_axis" for dim in used if dim in data}
    dims = {name: [other.get(dim, dim) for dim in names] for name, names in dims.items()}
    coords = {other.get(dim, dim): labels for dim, labels in coords.items()}
    return dict_to_dataset(data, dims=dims, coords=coords, sample_dims=group.sample_dims, skip_event_dims=batch_only)


def _tree_name(name: str) -> str:
    return name.replace("/", ".")
