# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Summaries of what a run predicts, accumulated over draws, of which none is kept.

They are those of the mixture of all draws of all chains, :math:`\bar p(y) = \frac1S \sum_s p(y \mid \theta_s)`, and the
same numbers that :mod:`numpyro_bdl.metrics` and :mod:`numpyro_bdl.uncertainty` make of arrays of draws, by the same
code, in double precision. :meth:`numpyro_bdl.PosteriorPredictive.summary` makes them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jaxtyping import Float

from numpyro_bdl._accumulators import Classes, LogMeanExp, Mean, Moments, Values, entropy
from numpyro_bdl._checks import check_observation
from numpyro_bdl._evaluation import Evaluation
from numpyro_bdl.natural_parameter import NUMBERS, natural_parameter, without_wrappers


class NumberSummary(NamedTuple):
    """Of a site of numbers or counts. Each is (row, ...), as the site without the draws."""

    mean: Float[np.ndarray, "row ..."]
    r""":math:`\bar\mu = \frac1S \sum_s \mu_s`; NaN, as the others, where the law of a draw has none"""
    variance: Float[np.ndarray, "row ..."]
    """the sum of the next two: the total"""
    mean_of_variances: Float[np.ndarray, "row ..."]
    r""":math:`\frac1S \sum_s \sigma_s^2`: the aleatoric part"""
    variance_of_means: Float[np.ndarray, "row ..."]
    r""":math:`\frac1S \sum_s (\mu_s - \bar\mu)^2`: the epistemic part"""
    log_predictive_density: Float[np.ndarray, "row ..."] | None
    r""":math:`\log \frac1S \sum_s p(y_i \mid \theta_s)`, without the axes of an event; None if y is not observed"""
    quantiles: Float[np.ndarray, "row ... quantile"] | None
    """of one new value for each draw, by linear interpolation; None if none was asked for"""


class ClassSummary(NamedTuple):
    """Of a site of classes. Each is (row, ...), as the site without the draws."""

    mean_probabilities: Float[np.ndarray, "row ... class"]
    r""":math:`\bar p_c = \frac1S \sum_s p_{s c}`, of two classes for a Bernoulli site"""
    predictive_entropy: Float[np.ndarray, "row ..."]
    r""":math:`H[\bar p]`, in nats: the total"""
    expected_entropy: Float[np.ndarray, "row ..."]
    r""":math:`\frac1S \sum_s H[p_s]`: the aleatoric part"""
    mutual_information: Float[np.ndarray, "row ..."]
    """the first entropy less the second: the epistemic part"""
    log_predictive_density: Float[np.ndarray, "row ..."] | None
    r""":math:`\log \frac1S \sum_s p(y_i \mid \theta_s)`, without the axes of an event; None if y is not observed"""


# ---- what is taken from a site --------------------------------------------------------------------------------------


def law(name: str, site: dict, key: Array) -> dict[str, Array]:
    """What a summary needs of the law of a site, at one draw.

    :raises ValueError: for a law whose mean or variance NumPyro doesn't know.
    """
    fn = site["fn"]
    base = without_wrappers(fn)
    if isinstance(base, (dist.CategoricalLogits, dist.CategoricalProbs)):
        parts = {"logits": natural_parameter(name, site)}
    elif isinstance(base, (dist.BernoulliLogits, dist.BernoulliProbs)):
        logit = natural_parameter(name, site)
        parts = {"logits": jnp.stack([jnp.zeros_like(logit), logit], -1)}
    else:
        try:
            parts = {"mean": fn.mean, "variance": fn.variance}
        except NotImplementedError:
            raise ValueError(
                f"summary: NumPyro knows no mean and variance of the observed site '{name}', a {type(base).__name__};"
                " name the other sites, as in sites=('y',), or take log_likelihood and sample for this one."
            ) from None
        if isinstance(base, NUMBERS):  # a mean is NaN of a Cauchy too
            parts["undefined"] = jnp.isnan(natural_parameter(name, site)) | jnp.isnan(getattr(base, "scale", 0.0))
        parts = {k: jnp.broadcast_to(value, fn.shape()) for k, value in parts.items()}
    return parts | ({"log_density": log_density(name, site)} if site["is_observed"] else {})


def law_and_new_data(name: str, site: dict, key: Array) -> dict[str, Array]:
    """That, and one new value."""
    return law(name, site, key) | {"new_data": site["fn"].sample(key)}


def log_density(name: str, site: dict) -> Array:
    """Log density of the observation at a site, one number for each element of its plates.

    :raises ValueError: for an observation that is paired with the elements of the site each with each.
    """
    check_observation(name, site)
    return site["fn"].log_prob(site["value"])


# ---- over draws -----------------------------------------------------------------------------------------------------

_ACCUMULATORS = {
    "logits": Classes,
    "mean": Moments,
    "variance": Mean,
    "log_density": LogMeanExp,
    "new_data": Values,
}


def accumulate(
    evaluation: Evaluation, quantiles: np.ndarray, place: Callable[[int], str], progress_bar: bool
) -> dict[str, NumberSummary | ClassSummary]:
    """A summary of each site.

    :param evaluation: Of :func:`law` or :func:`law_and_new_data`.
    :param quantiles: Levels; none for none.
    :param place: Names the chain and draw of a number of a draw, for the text of an error.
    """
    running: dict[tuple, dict] = {}
    finished: dict[str, list] = {name: [] for name in evaluation.outputs}
    # quantiles need all draws of a row, but nothing else does
    for name, (draws, *rows), block in evaluation.blocks(draws_first=not len(quantiles), progress_bar=progress_bar):
        start = rows[0].start if rows else 0
        _check(name, block, draws.start, start, place)
        parts = block.keys() & _ACCUMULATORS.keys()
        accumulators = running.setdefault((name, start), {part: _ACCUMULATORS[part]() for part in parts})
        for part, accumulator in accumulators.items():
            accumulator.add(block[part])
        if draws.stop == evaluation.num_draws:
            finished[name].append(_summary(running.pop((name, start)), quantiles))
    return {name: _joined(parts) for name, parts in finished.items()}


def _check(name: str, block: dict, draw: int, row: int, place: Callable[[int], str]) -> None:
    bad = {}
    if "logits" in block:
        # the largest of a row is finite unless there is NaN, plus infinity, or minus infinity only
        bad["logits"] = ~np.isfinite(block["logits"].max(-1))
    if "log_density" in block:
        bad["log likelihood"] = np.isnan(block["log_density"]) | np.isposinf(block["log_density"])
    if "undefined" in block:
        bad["location or scale"] = block["undefined"]
    if "new_data" in block:
        bad["new value"] = np.isnan(block["new_data"])
    for what, where in bad.items():
        if where.any():
            d, *r = np.argwhere(where)[0].tolist()
            at = f", row {row + r[0]}" if r else ""
            raise ValueError(
                f"summary: the {what} of site '{name}' at {place(draw + d)}{at} is NaN or infinite, though the draw is"
                " finite; is a scale 0, or does the network overflow?"
            )


def _summary(found: dict, quantiles: np.ndarray) -> NumberSummary | ClassSummary:
    density = found["log_density"].value if "log_density" in found else None
    if "logits" in found:
        classes = found["logits"]
        return ClassSummary(
            classes.mean_probabilities,
            entropy(classes.mean_probabilities),
            classes.expected_entropy,
            classes.mutual_information,
            density,
        )
    aleatoric, epistemic = found["variance"].value, found["mean"].variance
    levels = found["new_data"].quantiles(quantiles) if "new_data" in found else None
    return NumberSummary(found["mean"].mean, aleatoric + epistemic, aleatoric, epistemic, density, levels)


def _joined(parts: list) -> NumberSummary | ClassSummary:
    """The chunks of rows as one."""
    if len(parts) == 1:
        return parts[0]
    fields = zip(*parts, strict=True)
    return type(parts[0])(*(None if field[0] is None else np.concatenate(field) for field in fields))
