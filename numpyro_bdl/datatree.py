# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""From a run to an ArviZ DataTree."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, random
from numpyro.infer import MCMC
from xarray import DataTree

from numpyro_bdl.guides.posterior import LaplacePosterior
from numpyro_bdl.predictive import PosteriorPredictive, anchors, bad_chains, positions
from numpyro_bdl.repulsion import warn_if_inert

PROBES = 64


def to_datatree(
    mcmc: MCMC | LaplacePosterior,
    *,
    probe: tuple | None = None,
    sites: tuple[str, ...] | None = None,
    log_likelihood: bool = False,
    posterior_predictive: bool = False,
    weights: bool = True,
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
    - ``sample_stats``: step size, temperature, minibatch energy and other collected scalars;
    - ``anchor``: the anchor, constrained, if the kernel collected one;
    - ``inclusion``, ``inclusion_rate`` and ``mask``, of :class:`~numpyro_bdl.SpikeSlabSGHMC`: inclusion probabilities
      (chain, draw, group), the rate (chain) and what was kept (chain, group) by site;
    - ``observed_data``: all rows, never a minibatch;
    - ``log_likelihood``, ``posterior_predictive``: on request, at the rows of the run.

    The particles of an ensemble are its chains; if the run kept only their last positions (``num_samples=1``), they are
    the draws of one chain.

    :param mcmc: A run of any kernel of this package; or of NUTS or HMC on a model without frozen parameters; or the
        posterior of :class:`~numpyro_bdl.AutoLinearizedLaplace`, whose samples are the draws of one chain, and whose
        function is that of the tangent model.
    :param probe: Arguments of the model at which to evaluate its function; None for 64 rows of the run, evenly spaced.
    :param sites: Sites of the function, observed or deterministic; None for every observed site.
    :param log_likelihood: Add the log likelihood of each row, for :func:`arviz.loo`.
    :param posterior_predictive: Add a replicate of the data for each draw.
    :param weights: Keep the parameters of networks in ``posterior``, ``anchor`` and ``inclusion``.
    :param rng_key: PRNG key of the posterior predictive; None for ``jax.random.key(0)``.
    :param draw_chunk: Draws per chunk of evaluation.
    :param data_chunk: Rows per chunk of evaluation, as of :class:`~numpyro_bdl.PosteriorPredictive`.
    :param model_kwargs: Keyword arguments of the model that are to differ from those of the run, as ``train=False``.
    :return: A DataTree. Its attributes tell the kernel, its temperature if it is fixed, whether chains shared their
        minibatches, the weights ``kl`` and ``mmd`` of an ensemble, and which chains turned bad at which step.
    :raises ValueError: for a run without draws, or what :class:`~numpyro_bdl.PosteriorPredictive` refuses.

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
    predictive = PosteriorPredictive(mcmc, draw_chunk=draw_chunk, data_chunk=data_chunk)
    potential = predictive.potential
    hidden = () if weights else potential.network
    of_guide = isinstance(mcmc, LaplacePosterior)
    draws = mcmc.draws()[0] if of_guide else positions(mcmc)
    stats = {} if of_guide else mcmc.get_extra_fields(group_by_chain=True)
    if "repulsion_ratio" in stats:
        warn_if_inert(stats["repulsion_ratio"])

    groups: dict[str, tuple] = {}
    groups["posterior"] = ({k: v for k, v in draws.items() if k not in hidden}, {}, {})
    if isinstance(mcmc, MCMC) and "z_anchor" in stats:
        groups["anchor"] = ({k: v for k, v in anchors(mcmc, potential).items() if k not in hidden}, {}, {})
    groups["sample_stats"] = ({k: v for k, v in stats.items() if not isinstance(v, (dict, tuple))}, {}, {})
    groups["functions"] = _functions(predictive, probe, sites, model_kwargs)
    if log_likelihood:
        groups["log_likelihood"] = (predictive.log_likelihood(**model_kwargs), *_row_dims(predictive))
    if posterior_predictive:
        replicates = predictive.sample(random.key(0) if rng_key is None else rng_key, **model_kwargs)
        groups["posterior_predictive"] = (replicates, *_row_dims(predictive))

    kernel = None if of_guide else mcmc.sampler
    if hasattr(kernel, "_tree_groups"):
        own = kernel._tree_groups(mcmc)
        if "inclusion" in own:
            data, *rest = own["inclusion"]
            own["inclusion"] = ({k: v for k, v in data.items() if k not in hidden}, *rest)
        groups |= own

    if getattr(kernel, "is_ensemble_kernel", False) and predictive.batch_shape[1] == 1:
        # without a history the particles are the draws
        groups = {
            name: ({k: np.swapaxes(v, 0, 1) for k, v in data.items()}, *rest) for name, (data, *rest) in groups.items()
        }

    datasets = {name: _dataset(*group) for name, group in groups.items() if group[0]}
    observed = predictive.observed_data()
    if observed:
        datasets["observed_data"] = _dataset(observed, *_row_dims(predictive), sample_dims=[])
    tree = DataTree.from_dict(datasets)
    import numpyro

    tree.attrs.update({"inference_library": "numpyro", "inference_library_version": numpyro.__version__})
    tree.attrs.update(mcmc.attributes() if of_guide else _attributes(mcmc))
    return tree


def _functions(
    predictive: PosteriorPredictive, probe: tuple | None, sites, model_kwargs: dict
) -> tuple[dict, dict, dict]:
    if probe is not None:
        values, points = predictive.functions(*probe, sites=sites, **model_kwargs), None
    else:
        values, points = predictive.functions_at_rows(PROBES, sites=sites, **model_kwargs)
    dims = {}
    for name, value in values.items():
        in_plate = any(predictive.potential.observed.get(name, (True,)))
        rows = value.ndim > 2 and in_plate and (points is None or value.shape[2] == len(points))
        outputs = value.ndim - 2 - rows
        dims[name] = ["point"] * rows + (["output"] if outputs == 1 else [f"output_{n}" for n in range(outputs)])
    sizes: dict[str, set[int]] = {}
    for name, names in dims.items():
        for dim, size in zip(names, values[name].shape[2:], strict=True):
            sizes.setdefault(dim, set()).add(size)
    # sites of different sizes have dimensions of their own, or they would be filled up with NaN
    dims = {name: [dim if len(sizes[dim]) == 1 else f"{dim}_{name}" for dim in names] for name, names in dims.items()}
    return values, dims, {} if points is None else {"point": points}


def _row_dims(predictive: PosteriorPredictive) -> tuple[dict, dict]:
    """Name the dimensions of a site after its plates."""
    observed = predictive.potential.observed.items()
    return {name: [plate or f"{name}_dim_{n}" for n, plate in enumerate(plates)] for name, plates in observed}, {}


def _dataset(data: dict, dims: dict, coords: dict, sample_dims: list[str] | None = None):
    from arviz_base import dict_to_dataset

    data = {name.replace("/", "."): np.asarray(value) for name, value in data.items()}
    dims = {name.replace("/", "."): [dim.replace("/", ".") for dim in names] for name, names in dims.items()}
    used = {dim for name in data for dim in dims.get(name, ())}
    coords = {name.replace("/", "."): values for name, values in coords.items()}
    coords = {name: values for name, values in coords.items() if name in used}
    return dict_to_dataset(data, dims=dims, coords=coords, sample_dims=sample_dims)


def _name(kernel: Any) -> str:
    inner = getattr(kernel, "kernel", None)
    return type(kernel).__name__ + (f"({_name(inner)})" if inner is not None else "")


def _attributes(mcmc: MCMC) -> dict[str, Any]:
    kernel = mcmc.sampler
    attributes: dict[str, Any] = {"kernel": _name(kernel)}
    ensemble = getattr(kernel, "is_ensemble_kernel", False)
    temperature = None if ensemble else getattr(kernel, "_temperature", None)
    if temperature is not None and not callable(temperature):
        attributes["temperature"] = float(jnp.asarray(temperature))
    elif callable(temperature):
        of_draws = np.unique(mcmc.get_extra_fields().get("temperature", ()))
        if len(of_draws) == 1:  # a schedule that has come to its end
            attributes["temperature"] = float(of_draws[0])
    if hasattr(kernel, "_share_batch"):
        attributes["chains_share_minibatches"] = int(kernel._share_batch)
    if hasattr(kernel, "_tree_attributes"):
        attributes |= kernel._tree_attributes()
    bad = bad_chains(mcmc)
    if bad:
        attributes["bad_chains"] = list(bad)
        attributes["first_bad_steps"] = list(bad.values())
    return attributes
