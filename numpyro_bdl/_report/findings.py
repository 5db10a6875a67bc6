# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What to worry about in a run: the warnings of the diagnostics, and what the tree itself tells."""

from typing import NamedTuple

import numpy as np
from pandas import DataFrame

from numpyro_bdl import diagnostics
from numpyro_bdl._report.run import Finding, Gap, Run
from numpyro_bdl.repulsion import warn_if_inert

_CHAINS = 4  # as Vehtari et al. (2021) ask for, as the ESS
_ESS_OF_A_CHAIN = 100
_LEAST_BFMI = 0.3  # of arviz.diagnose


class Convergence(NamedTuple):
    """R-hat and ESS of the function values, None where the tree has no answer."""

    values: DataFrame | None = None
    """ArviZ's diagnostics, a row for each function value that varies"""
    summary: diagnostics.FunctionSummary | None = None


def look(run: Run) -> Convergence:
    """Put what is worth a warning into the findings of a run, and return what was computed on the way."""
    _chains(run)
    convergence = _functions(run)
    if run.chains >= 3 and run.values("log_likelihood"):
        run.ask("Chains that predict worse", diagnostics.unmixed_chains, run.tree)
    _sampler(run)
    _law(run)
    return convergence


def _chains(run: Run) -> None:
    turned, when = (np.atleast_1d(run.attrs.get(name, [])).tolist() for name in ("bad_chains", "first_bad_steps"))
    steps = dict(zip(turned, when, strict=True))
    bad = [chain for chain in range(run.sizes["chain"]) if chain not in run.kept]
    if bad:
        named = ", ".join(f"{n} (since step {steps[n]})" if n in steps else str(n) for n in bad)
        text = f"{len(bad)} of {run.sizes['chain']} chains have draws that are NaN or infinite: {named}."
        if run.chains:
            text += f" They are left out of this page, which counts the others, {_names(run.kept)}, from 0."
        else:
            text += " No chain is left to look at."
        run.findings.append(Finding("Chains that broke", f"{text} Most often the step size is too large."))
    if run.mixes and 0 < run.chains < _CHAINS:
        run.findings.append(
            Finding(
                "Few chains",
                f"R-hat finds chains that disagree, and there {'is' if run.chains == 1 else 'are'} {run.chains}. Run at"
                f" least {_CHAINS} from independent starts.",
            )
        )


def _functions(run: Run) -> Convergence:
    functions = run.values("functions")
    if not functions:
        return Convergence()
    if run.mixes or run.sizes["chain"] == 1:  # a history of particles without noise ends at a point, as it should
        run.ask("Draws that hardly differ", diagnostics.function_spread, run.tree)
    if not run.mixes:
        run.gaps.append(
            Gap("R-hat and ESS", f"The draws of {run.maker} are not those of Markov chains, which could fail to mix.")
        )
        return Convergence()
    values = run.ask("R-hat and ESS", _diagnosed, run)
    summary = None
    if run.chains > 1:
        said = len(run.findings)
        summary = run.ask("Summary of the function", diagnostics.function_summary, run.few)
        del run.findings[said:]  # as function_spread
    if values is not None:
        _judge(run, values)
    return Convergence(values, summary)


def _diagnosed(run: Run) -> DataFrame:
    """ArviZ's diagnostics of the function values that vary."""
    import arviz as az

    if run.sizes["draw"] < 4:
        raise ValueError(f"They need at least 4 draws of each chain, got {run.sizes['draw']}.")
    varies = np.concatenate(
        [(np.ptp(v.to_numpy(), (0, 1)) > 0).ravel() for v in run.few["functions"].data_vars.values()]
    )
    if not varies.any():
        raise ValueError("Every function value is the same in all draws.")
    return az.summary(run.few, group="functions", kind="diagnostics", round_to="none")[varies]


def _judge(run: Run, values: DataFrame) -> None:
    asked, large = diagnostics.RHAT_LEVELS
    above = {level: float((values["r_hat"] > level).mean()) for level in (asked, large)}
    if above[asked]:
        worst = f"the largest is {values['r_hat'].max():.4g}, of {values['r_hat'].idxmax()}"
        text = f"R-hat of the function is above {asked:g} at {above[asked]:.0%} of its values; {worst}."
        if above[large]:
            text += (
                f" At {above[large]:.0%} it is above {large:g}: chains still move, or are in different modes."
                " diagnostics.chainwise_rhat tells which."
            )
        else:
            text += " Longer chains may be enough."
        run.findings.append(Finding("Chains that disagree", text))
    needed = _ESS_OF_A_CHAIN * run.chains
    ess = values[["ess_bulk", "ess_tail"]].min(axis=1)
    if (ess < needed).any():
        run.findings.append(
            Finding(
                "Few effective draws",
                f"At {(ess < needed).mean():.0%} of the function values the draws are worth fewer than {needed}"
                f" independent ones ({_ESS_OF_A_CHAIN} a chain), at the worst {ess.min():.3g}: means and, above all,"
                " quantiles are uncertain. Run longer, or with more steps for each draw.",
            )
        )


def _sampler(run: Run) -> None:
    import arviz as az

    stats = run.values("sample_stats")
    divergent = int(stats["diverging"].sum()) if "diverging" in stats else 0
    if divergent:
        total = run.chains * run.sizes["draw"]
        run.findings.append(
            Finding(
                "Divergent transitions",
                f"{divergent} of {total} transitions diverged ({divergent / total:.1%}): the trajectories can't follow"
                " the energy there, and the draws miss such places. Raise target_accept_prob, or reparametrize.",
            )
        )
    infinite = {name: int((~np.isfinite(v)).sum()) for name, v in stats.items() if v.dtype.kind == "f"}
    infinite = {name: count for name, count in infinite.items() if count}
    if infinite:
        found = ", ".join(f"{name} ({count} of {stats[name].size})" for name, count in infinite.items())
        run.findings.append(
            Finding(
                "Statistics that are not finite", f"Sample statistics have values that are NaN or infinite: {found}."
            )
        )
    if "energy" in stats and "energy" not in infinite and run.sizes["draw"] > 1:
        low = np.flatnonzero(az.bfmi(run.tree)["energy"].to_numpy() < _LEAST_BFMI)
        if len(low):
            text = f"The Bayesian fraction of missing information is below {_LEAST_BFMI} in the chains {_names(low)}:"
            run.findings.append(Finding("Energy", f"{text} momenta change the energy too little. Reparametrize."))
    if "repulsion_ratio" in stats:
        run.ask("Repulsion", warn_if_inert, stats["repulsion_ratio"].to_numpy())


def _law(run: Run) -> None:
    """What the kernel was told to do that changes the reading of its draws."""
    temperature = run.attrs.get("temperature", 1)
    if temperature != 1:
        run.findings.append(
            Finding(
                "Not the posterior",
                f"The temperature is {temperature:g}: the draws have the law of the posterior to the power of"
                f" 1 / {temperature:g}.",
            )
        )
    if run.attrs.get("chains_share_minibatches") and "langevin" not in run.attrs:  # particles always do
        run.findings.append(
            Finding(
                "Shared minibatches", "All chains saw the same minibatches, so that they agree more than they should."
            )
        )


def _names(chains: np.ndarray) -> str:
    return ", ".join(map(str, chains))
