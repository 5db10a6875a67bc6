# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""How well the draws predict the rows of the run, as far as the tree can tell without its model."""

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax
from xarray import DataArray

from numpyro_bdl import metrics
from numpyro_bdl._report.run import Gap, Run

_LEVELS = (0.5, 0.9)


class Score(NamedTuple):
    """A number of a site."""

    name: str
    value: float
    error: float | None
    """standard error over rows, if there is one"""
    rows: int


class Classes(NamedTuple):
    """Class probabilities of rows of the run, and their labels."""

    probabilities: np.ndarray
    labels: np.ndarray


def scores(run: Run, classes: dict[str, Classes]) -> dict[str, list[Score]]:
    """Scores by observed site."""
    found: dict[str, list[Score]] = {}
    replicates, densities = run.values("posterior_predictive"), run.values("log_likelihood")
    for name, y in run.observed().items():
        lines = run.ask(f"Density of {name}", _density, run, name) if name in densities else []
        if name in classes:
            lines = [*(lines or []), *_of_classes(classes[name])]
        elif y.dtype.kind == "f" and name in replicates:
            numbers = run.ask(f"Errors of {name}", _of_numbers, replicates[name].to_numpy(), y)
            lines = [*(lines or []), *(numbers or [])]
        elif y.dtype.kind in "biu":
            run.gaps.append(
                Gap(
                    f"Accuracy and calibration of {name}",
                    "They need functions that are logits at rows of the run: to_datatree(mcmc, log_likelihood=True)"
                    " shows that they are, since these give the log likelihoods back; with probe=(x,) too, they are at"
                    " all rows.",
                )
            )
        if lines:
            found[name] = lines
    return found


def classes_of(run: Run) -> dict[str, Classes]:
    """Sites whose functions are the logits of their labels.

    A tree does not tell the distribution of a site, nor whether its points are rows of the run. Log likelihoods do:
    they are the log probabilities of the labels under the functions, or the functions are something else.
    """
    densities, observed = run.values("log_likelihood"), run.observed()
    found = {}
    for name, function in run.values("functions").items():
        if name in densities and name in observed:
            classes = _classes(function, densities[name].to_numpy(), observed[name])
            if classes is not None:
                found[name] = classes
    return found


def _classes(function: DataArray, density: np.ndarray, y: np.ndarray) -> Classes | None:
    if function.ndim not in (3, 4) or density.ndim != 3 or y.shape != density.shape[2:] or (y != y.astype(int)).any():
        return None
    points, logits = function[function.dims[2]].to_numpy(), function.to_numpy().astype(float)
    if points.dtype.kind not in "iu" or points.min() < 0 or points.max() >= len(y):
        return None
    labels = y[points].astype(int)
    if logits.ndim == 3:  # of a Bernoulli site, the logit of 1
        logits = np.stack([np.zeros_like(logits), logits], -1)
    if labels.min() < 0 or labels.max() >= logits.shape[-1]:
        return None
    implied = np.take_along_axis(log_softmax(logits, -1), labels[None, None, :, None], -1)[..., 0]
    if not np.allclose(implied, density[:, :, points], rtol=1e-3, atol=1e-3):
        return None
    return Classes(metrics.mean_probabilities(logits), labels)


def _density(run: Run, name: str) -> list[Score]:
    values = run.values("log_likelihood")[name].to_numpy()
    values = values.reshape(*values.shape[:2], -1)
    by_row = metrics.log_predictive_density(values)
    lines = [
        Score("log predictive density of a row (LPPD), its mean", metrics.lppd(values), _error(by_row), len(by_row))
    ]
    if not run.of_posterior:
        run.gaps.append(
            Gap(f"PSIS-LOO of {name}", f"It reweights draws of the posterior; those of {run.maker} have another law.")
        )
    elif run.chains * run.sizes["draw"] > 1 and np.isfinite(values).all():
        loo = run.ask(f"Influential rows of {name}", _loo, run, name)
        if loo is not None:
            lines.append(
                Score("expected log density of a new row (PSIS-LOO), the sum", loo.elpd, loo.se, loo.n_data_points)
            )
            lines.append(Score("effective number of parameters (p_loo)", loo.p, None, loo.n_data_points))
            k = np.ravel(loo.pareto_k)
            lines.append(
                Score(f"rows with a Pareto k above {loo.good_k:.2g}", int((k > loo.good_k).sum()), None, len(k))
            )
    return lines


def _loo(run: Run, name: str):
    """By the relative efficiency of the functions; that of weights in different copies of a network is none."""
    import arviz as az

    efficiency, functions = None, run.values("functions")
    if functions and run.sizes["draw"] >= 4:
        ess = az.ess(run.tree, group="functions", method="mean")
        ess = np.concatenate([np.ravel(ess[other]) for other in functions])
        efficiency = float(np.nanmean(ess)) / (run.chains * run.sizes["draw"])
    return az.loo(run.tree, var_name=name, reff=efficiency, pointwise=True)


def _of_classes(classes: Classes) -> list[Score]:
    probabilities, labels = classes
    correct = probabilities.argmax(-1) == labels
    rows = len(labels)
    return [
        Score("accuracy", metrics.accuracy(probabilities, labels), _error(correct), rows),
        Score("Brier score", metrics.brier_score(probabilities, labels), None, rows),
        Score("calibration error, 15 bins", metrics.expected_calibration_error(probabilities, labels), None, rows),
    ]


def _of_numbers(replicates: np.ndarray, y: np.ndarray) -> list[Score]:
    covered = metrics.interval_coverage(replicates, y, _LEVELS)
    return [
        Score("root mean squared error of the mean replicate", metrics.rmse(replicates.mean((0, 1)), y), None, y.size),
        Score("continuous ranked probability score (CRPS)", metrics.crps(replicates, y), None, y.size),
        *(
            Score(f"share of the data in the central {level:.0%} interval", float(share), None, y.size)
            for level, share in zip(_LEVELS, np.ravel(covered.coverage), strict=True)
        ),
    ]


def _error(by_row: np.ndarray) -> float | None:
    """Standard error of a mean over rows."""
    return float(np.std(by_row, ddof=1) / np.sqrt(len(by_row))) if len(by_row) > 1 else None
