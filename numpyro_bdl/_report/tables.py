# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The tables of the page."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numpyro_bdl._report.findings import Convergence
from numpyro_bdl._report.run import Gap, Run
from numpyro_bdl._report.scores import Score
from numpyro_bdl.diagnostics import RHAT_LEVELS

_MOST_SITES = 30
_QUANTILES = {"least": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1}
_ABSENT = {
    "posterior": ("Parameters of the model", "to_datatree of a run has it."),
    "functions": (
        "Convergence of the function, its modes",
        "to_datatree of a model with observed sites has the group functions.",
    ),
    "sample_stats": ("Statistics of the sampler", "to_datatree of a run of MCMC has the group sample_stats."),
    "observed_data": ("Data", "to_datatree of a model with observed sites has the group observed_data."),
    "log_likelihood": (
        "Predictive density, PSIS-LOO, chains that predict worse",
        "The tree has no group log_likelihood: to_datatree(..., log_likelihood=True).",
    ),
    "posterior_predictive": (
        "Errors and coverage of new data",
        "The tree has no group posterior_predictive: to_datatree(..., posterior_predictive=True).",
    ),
}


class Table(NamedTuple):
    """A table, the first column of which names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


def contents(run: Run) -> Table:
    """The groups of the tree."""
    rows = []
    for name, group in run.whole.children.items():
        sizes = ", ".join(f"{dim} {size}" for dim, size in group.sizes.items())
        rows.append((name, len(group.data_vars), sum(v.size for v in group.data_vars.values()), sizes))
    return Table("Groups of the tree", ("group", "variables", "numbers", "sizes"), rows)


def absent(run: Run) -> list[Gap]:
    """What other groups would add."""
    return [Gap(*text) for name, text in _ABSENT.items() if name not in run.whole.children]


def convergence(run: Run, found: Convergence) -> list[Table]:
    """R-hat and ESS of the function."""
    tables = []
    if found.values is not None:
        labels = {"r_hat": "R-hat", "ess_bulk": "ESS, bulk", "ess_tail": "ESS, tail"}
        rows = [(label, *found.values[column].quantile(list(_QUANTILES.values()))) for column, label in labels.items()]
        if not np.isfinite(rows[0][1:]).any():
            rows = rows[1:]  # of a single chain
        number = sum(value[0, 0].size for value in run.values("functions").values())
        caption = f"R-hat and effective sample size over {len(found.values):,} of {number:,} function values"
        tables.append(Table(caption, ("", *_QUANTILES), rows))
    if found.summary is not None:
        s = found.summary
        rows = [
            (f"share of values with R-hat below {RHAT_LEVELS[1]:g}", s.share_mixed),
            ("largest R-hat within a chain: is each one stationary?", s.chainwise_rhat_max),
            ("smallest sum of the ESS of each chain alone", s.chainwise_ess_min),
            ("smallest spread of a chain, relative to its function's", s.spread_min),
        ]
        tables.append(Table("Between chains and within them", ("", "value"), rows))
    return tables


def scored(found: dict[str, list[Score]]) -> list[Table]:
    """A table of scores for each site."""
    header = ("score", "value", "standard error", "rows")
    return [
        Table(
            f"Predictions of {name}",
            header,
            [(s.name, s.value, "" if s.error is None else s.error, s.rows) for s in lines],
        )
        for name, lines in found.items()
    ]


def statistics(run: Run) -> Table | None:
    """Means and ranges of the statistics of the sampler."""
    rows = []
    for name, value in run.values("sample_stats").items():
        numbers = value.to_numpy().astype(float)
        numbers = numbers[np.isfinite(numbers)]
        if numbers.size:
            rows.append((name, numbers.mean(), numbers.std(), numbers.min(), numbers.max()))
    header = ("statistic", "mean", "sd", "least", "most")
    return Table("Statistics of the sampler, over all draws", header, rows) if rows else None


def parameters(run: Run) -> Table | None:
    """ArviZ's summary of the sites that are a single number."""
    scalars = [name for name, value in run.parameters().items() if value.ndim == 2]
    left_out = [name for name in run.parameters() if name not in scalars[:_MOST_SITES]]
    if left_out:
        run.gaps.append(
            Gap(
                "Summary of other sites",
                f"{len(left_out)} of {len(run.parameters())} sites of the group posterior have several numbers, or come"
                f" after {_MOST_SITES} others; az.summary(tree, var_names=[...]) has them. That of weights means"
                " little, since units can be exchanged.",
            )
        )
    if not scalars or run.sizes["draw"] < 4:
        return None
    summary = run.ask("Summary of parameters", _summary, run, scalars[:_MOST_SITES])
    if summary is None:
        return None
    rows = [(name, *row) for name, row in zip(summary.index, summary.to_numpy().tolist(), strict=True)]
    return Table("Parameters that are a single number", ("site", *map(str, summary.columns)), rows)


def attributes(run: Run) -> Table:
    """What the tree says of its origin."""
    rows = [(name, str(np.asarray(value).tolist())) for name, value in sorted(run.attrs.items())]
    return Table("Attributes of the tree", ("attribute", "value"), rows)


def _summary(run: Run, names: list[str]):
    import arviz as az

    return az.summary(run.tree, var_names=names)
