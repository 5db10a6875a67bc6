# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""How many copies and chains a network has, what a few chains find, and what folding them costs.

Networks are tanh: f1 has one hidden layer of 3 units, f2 three of 16. All weights are N(0, 1), the noise scale is
HalfNormal(1), the outcome is normal (Wiese et al., ECML PKDD 2023). Parts, each with a table in benchmarks/results:

``tables``: equivalent copies of networks, and chains that find every functional mode, by the paper's bound and exactly.
``toys``: izmailov and sinusoidal on the paper's split, 16 and 8 NUTS chains on f1, with R-hat of weights as they are,
folded, and of functions; and, in symmetry_curve.csv, what a number of chains of the izmailov runs would have found.
``uci``: airfoil, concrete, energy and yacht on f1, 8 chains, one chain with as many draws, and deep ensembles (Adam,
settings chosen on validation rows of split 0): of 8 members, and of as many as take the gradients of the 8 chains.
``deep``: yacht and energy on f2, 8 short chains from MAP members.
``fold``: draws per second of the fold, beside a copy of the same arrays.

Split 0 is the paper's, split s another of the same size, drawn by seed s. UCI data are scaled by the training rows, and
densities are those of the scaled outcome. Predictives are mixtures, of all draws or members; LPPD is the mean over all
test rows of the logarithm of their density. A gradient is one pass over all training rows for one chain.
The data need the environment variable NUMPYRO_BDL_DATA, a folder that holds ``uci/izmailov.npz`` and so on, each with
x, y and ``symmetry_test_index``. Run: ``python benchmarks/symmetry.py --parts toys``; without ``--parts``, all of it.
"""

import argparse
import csv
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from arviz_stats.base import array_stats
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import MCMC, NUTS
from scipy.special import logsumexp
from scipy.stats import norm
from scipy.stats import t as student

import numpyro_bdl as bdl
from numpyro_bdl import diagnostics, metrics, symmetry
from numpyro_bdl.potential import Potential

RESULTS = Path(__file__).parent / "results"
F1, F2 = (3,), (16, 16, 16)
UCI = ("airfoil", "concrete", "energy", "yacht")


# ---- data -----------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load(name: str, split: int = 0) -> Data:
    """Rows of a data set; the toys are scaled already, with all of their rows, as in the paper."""
    folder = os.environ.get("NUMPYRO_BDL_DATA")
    path = Path(folder or "", "uci", f"{'symmetry_concrete' if name == 'concrete' else name}.npz")
    if not folder or not path.exists():
        raise SystemExit(
            f"{path.name} is not there: set the environment variable NUMPYRO_BDL_DATA to a folder that holds it in"
            f" uci/, with x, y and symmetry_test_index. It is {folder!r} now. Or run with --parts tables fold alone."
        )
    with np.load(path) as file:
        x, y, test = file["x"], file["y"], file["symmetry_test_index"]
    if split:
        test = np.random.default_rng(split).permutation(len(x))[: len(test)]
    held_out = np.zeros(len(x), bool)
    held_out[test] = True
    data = Data(x[~held_out], y[~held_out], x[held_out], y[held_out])
    if name in UCI:
        data = scaled(data)
    return Data(*(a.astype(np.float32) for a in data))


def scaled(data: Data) -> Data:
    shift, scale = data.x.mean(0), data.x.std(0)
    shift_y, scale_y = data.y.mean(), data.y.std()
    inputs, outcomes = (
        ((x - shift) / scale for x in (data.x, data.x_test)),
        ((y - shift_y) / scale_y for y in data[1::2]),
    )
    (x, x_test), (y, y_test) = inputs, outcomes
    return Data(x, y, x_test, y_test)


def validation_split(data: Data) -> Data:
    """A fifth of the training rows in place of the test rows."""
    order = np.random.default_rng(0).permutation(len(data.x))
    held_out, kept = np.split(order, [len(order) // 5])
    return Data(data.x[kept], data.y[kept], data.x[held_out], data.y[held_out])


# ---- model and predictions ------------------------------------------------------------------------------------------


class MLP(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]


def make_model(widths: tuple[int, ...]) -> Callable:
    def model(x, y=None):
        net = random_flax_module("net", MLP(widths), dist.Normal(0, 1), input_shape=(1, x.shape[1]))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(net(x), sigma), obs=y)

    return model


class Draws(NamedTuple):
    """Draws of chains; of an ensemble, each member is a chain of one draw."""

    weights: dict[str, np.ndarray]
    """by name, (chain, draw, ...)"""
    sigma: np.ndarray
    """(chain, draw)"""

    @staticmethod
    def of(sites: dict[str, Any]) -> "Draws":
        sites = {name: np.asarray(value) for name, value in sites.items()}
        return Draws({k: v for k, v in sites.items() if k != "sigma"}, sites["sigma"])

    def functions(self, widths: tuple[int, ...], x: np.ndarray) -> np.ndarray:
        """(chain, draw, point)"""

        def function(weights):
            layers: dict[str, dict] = {}
            for name, value in weights.items():
                layer, kind = name.removeprefix("net/").split(".")
                layers.setdefault(layer, {})[kind] = value
            return MLP(widths).apply({"params": layers}, x)

        return np.asarray(jax.jit(jax.vmap(jax.vmap(function)))(self.weights))

    def log_density(self, widths: tuple[int, ...], data: Data) -> np.ndarray:
        """Of each test row, (chain, draw, row)."""
        functions = self.functions(widths, data.x_test).astype(float)
        return norm.logpdf(data.y_test.astype(float), functions, self.sigma[..., None].astype(float))


def lppd(log_density: np.ndarray) -> tuple[float, float]:
    """LPPD of the mixture of all draws, and its standard error over test rows."""
    rows = metrics.log_predictive_density(log_density.reshape(1, -1, log_density.shape[-1]))
    return float(rows.mean()), float(rows.std(ddof=1) / math.sqrt(len(rows)))


# ---- chains and ensembles -------------------------------------------------------------------------------------------


class Run(NamedTuple):
    raw: Draws
    folded: Draws
    groups: symmetry.UnitGroups
    gradients: int
    divergences: int
    seconds: float
    """with compilation"""


def sample(widths, data: Data, key: int, *, chains: int, warmup: int, draws: int, depth: int, start=None) -> Run:
    """Chains of NUTS, folded as they are recorded."""
    kernel = bdl.SymmetryRestricted(NUTS(make_model(widths), max_tree_depth=depth))
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=chains, chain_method="vectorized")
    fields: Any = {"extra_fields": ("num_steps", "diverging", "unfolded.z")}
    begin = time.perf_counter()
    mcmc.warmup(random.key(key), data.x, data.y, init_params=start, collect_warmup=True, **fields)
    gradients = int(mcmc.get_extra_fields()["num_steps"].sum())
    mcmc.run(mcmc.post_warmup_state.rng_key, data.x, data.y, **fields)
    jax.block_until_ready(mcmc.last_state.z)
    seconds = time.perf_counter() - begin
    extra, folded = mcmc.get_extra_fields(group_by_chain=True), mcmc.get_samples(group_by_chain=True)
    raw = extra["unfolded.z"] | {"sigma": folded["sigma"]}  # weights are real, so that z is what they are
    gradients += int(extra["num_steps"].sum())
    divergences = int(extra["diverging"].sum())
    return Run(Draws.of(raw), Draws.of(folded), kernel.unit_groups, gradients, divergences, seconds)


def train(widths, data: Data, key: int, *, members: int, steps: int, rate=0.01, prior=1.0) -> dict:
    """Members trained by Adam from starts of their own, in unconstrained space: (member, ...) by site.

    The loss is the energy of the posterior with so much of the prior: 1 leads to a MAP, 0 to a maximum of the
    likelihood. Each member can have its own learning rate and share of the prior.
    """
    potential = Potential(make_model(widths), (data.x, data.y))

    def one(key, rate, prior):
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
        z = potential.initial(key)[0]

        def loss(z):
            energies, _ = potential.energies(z, {}, random.key(0), {}, potential.args, potential.kwargs)
            return (prior * energies.prior + energies.likelihood) / len(data.x)

        def step(carry, _):
            z, state = carry
            updates, state = optimizer.update(jax.grad(loss)(z), state)
            return (optax.apply_updates(z, updates), state), None

        return jax.lax.scan(step, (z, optimizer.init(z)), None, steps)[0][0]

    rate, prior = (jnp.broadcast_to(jnp.asarray(v, jnp.float32), (members,)) for v in (rate, prior))
    return jax.jit(jax.vmap(one))(random.split(random.key(key), members), rate, prior)


def as_draws(members: dict) -> Draws:
    sites = {name: value[:, None] for name, value in members.items()}
    return Draws.of(sites | {"sigma": jnp.exp(sites["sigma"])})


# ---- tables ---------------------------------------------------------------------------------------------------------

HIDDEN = ((2,), (3,), (8,), (10,), (50,), (64,), (128,), (10,) * 3, (16,) * 2, (16,) * 3, (32,) * 3)
PAPER_CLUSTERS = np.array([730, 536, 8]) / 1274  # of the chains that the paper ran on izmailov


def tables() -> None:
    rows = []
    for widths in HIDDEN:
        params = jax.eval_shape(MLP(widths).init, random.key(0), jnp.ones((1, 1)))["params"]
        layers = [f"Dense_{n}" for n in range(len(widths) + 1)]
        units = {}
        for layer, following in zip(layers, layers[1:], strict=False):
            bias, kernel, out = (layer, "bias"), (layer, "kernel"), (following, "kernel")
            units[layer] = symmetry.Units({bias: 0, kernel: 1}, {out: 0}, (bias, kernel, out))
        groups = symmetry.UnitGroups.of(params, units)
        count = symmetry.cardinality(groups)
        log10 = round(symmetry.log_cardinality(groups) / math.log(10), 4)
        rows.append(
            {"hidden": "-".join(map(str, widths)), "copies": f"{count:.7g}" if count > 1e12 else count, "log10": log10}
        )
    write("symmetry_copies.csv", rows)
    rows, laws = [], {"half-normal": symmetry.half_normal_probabilities, "uniform": lambda n: np.full(n, 1 / n)}
    cases = [(name, law(n)) for name, law in laws.items() for n in range(1, 11)]
    for name, p in [*cases, ("the paper's clusters", PAPER_CLUSTERS)]:
        plan = partial(symmetry.plan_chains, len(p), p)
        rows.append(
            {
                "law": name,
                "modes": len(p),
                "expected": round(symmetry.expected_chains(p), 4),
                **{f"markov_{c:g}": plan(c, "markov") for c in (0.9, 0.95, 0.99)},
                "union_0.99": plan(0.99, "union"),
                "exact_0.99": plan(0.99, "exact"),
            }
        )
    write("symmetry_chains.csv", rows)


# ---- toys -----------------------------------------------------------------------------------------------------------


def median_and_max(rhat) -> tuple[float, float]:
    values = np.concatenate([np.ravel(value) for value in rhat]) if isinstance(rhat, list) else np.ravel(rhat)
    return round(float(np.median(values)), 3), round(float(np.max(values)), 3)


def weight_rhat(draws: Draws) -> tuple[float, float]:
    return median_and_max([array_stats.rhat(w, chain_axis=0, draw_axis=1) for w in draws.weights.values()])


def diagnose(widths, run: Run, data: Data) -> dict[str, Any]:
    """R-hat of weights, folded or not, and of functions at the test rows; chainwise, and between chains."""
    summary = diagnostics.function_summary(run.folded.functions(widths, data.x_test))
    row = {}
    for name, found in {
        "rhat_raw": weight_rhat(run.raw),
        "rhat_folded": weight_rhat(run.folded),
        "chainwise_rhat_raw": median_and_max(list(diagnostics.chainwise_rhat(run.raw.weights).values())),
        "chainwise_rhat_folded": median_and_max(list(diagnostics.chainwise_rhat(run.folded.weights).values())),
        "rhat_functions": (round(summary.rhat_median, 3), round(summary.rhat_max, 3)),
    }.items():
        row |= {f"{name}_median": found[0], f"{name}_max": found[1]}
    return row | {
        "share_of_functions_mixed": round(summary.share_mixed, 3),
        "chainwise_rhat_functions_max": round(summary.chainwise_rhat_max, 3),
        "rhat_sigma": round(float(array_stats.rhat(run.folded.sigma, chain_axis=0, draw_axis=1)), 3),
    }


def spell(values, digits: int = 3) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)


def toys(seeds: int, plot: Path | None) -> None:
    rows, pool = [], []
    for name, chains in (("izmailov", 16), ("sinusoidal", 8)):
        data = load(name)
        x = np.concatenate([data.x, data.x_test])
        grid = np.linspace(x.min(), x.max(), 64, dtype=np.float32)[:, None]
        for seed in range(seeds):
            run = sample(F1, data, seed, chains=chains, warmup=400, draws=200, depth=8)
            functions, density = run.folded.functions(F1, grid), run.folded.log_density(F1, data)
            modes = symmetry.functional_modes(functions)
            single = np.array([lppd(chain)[0] for chain in density])
            pooled, error = lppd(density)
            by_mode = [single[modes.labels == mode].mean() for mode in range(modes.num_modes)]
            row = {
                "data": name,
                "seed": seed,
                "chains": chains,
                "lppd": round(pooled, 4),
                "lppd_se_rows": round(error, 4),
                "lppd_last_draws": round(lppd(density[:, -1:])[0], 4),
                "lppd_single_mean": round(single.mean(), 4),
                "lppd_single_worst": round(single.min(), 4),
                "lppd_single_best": round(single.max(), 4),
                "mode_sizes": " ".join(map(str, modes.sizes)),
                "lppd_single_by_mode": spell(by_mode),
                **diagnose(F1, run, data),
                "divergences": run.divergences,
                "gradients": run.gradients,
                "seconds": round(run.seconds, 1),
            }
            rows.append(row)
            print(row, flush=True)
            if name == "izmailov":
                pool.append((functions, density))
    write("symmetry_toys.csv", rows)
    functions, density = (np.concatenate(parts) for parts in zip(*pool, strict=True))
    curve(symmetry.functional_modes(functions), density, plot)


def curve(modes: symmetry.FunctionalModes, density: np.ndarray, plot: Path | None) -> None:
    """What n chains drawn from the pool with replacement find, beside the law of the coupon collector."""
    rng, rounds, rows = np.random.default_rng(0), 500, []
    paper = symmetry.half_normal_probabilities(modes.num_modes)
    print(f"izmailov, all chains: modes of {modes.sizes.tolist()} of {len(density)} chains")
    pooled = logsumexp(density, 1) - math.log(density.shape[1])  # (chain, row)
    counts = [*range(1, 13), *range(14, 33, 2), *range(36, 65, 4)]
    for n in counts:
        chosen = rng.integers(len(density), size=(rounds, n))
        found = np.mean([len(set(modes.labels[c])) == modes.num_modes for c in chosen])
        row = {"chains": n, "all_modes_bootstrap": round(float(found), 4)}
        row["all_modes_exact"] = round(symmetry.discovery_probability(n, modes.probabilities), 4)
        row["all_modes_half_normal"] = round(symmetry.discovery_probability(n, paper), 4)
        for what, values in (("last_draws", density[:, -1]), ("all_draws", pooled)):
            scores = [(logsumexp(values[c], 0) - math.log(n)).mean() for c in chosen]
            row |= {f"lppd_{what}": round(np.mean(scores), 4), f"lppd_{what}_sd": round(np.std(scores), 4)}
        rows.append(row)
    write("symmetry_curve.csv", rows)
    if plot:
        draw_curve(rows, plot)


def draw_curve(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    column = lambda name: np.array([row[name] for row in rows])
    n = column("chains")
    for what, label in (("last_draws", "one draw a chain"), ("all_draws", "200 draws a chain")):
        mean, spread = column(f"lppd_{what}"), column(f"lppd_{what}_sd")
        (line,) = left.plot(n, mean, label=label)
        left.fill_between(n, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
    left.set(xlabel="chains", ylabel="LPPD", title="Izmailov data: mean and standard deviation over bootstraps")
    right.plot(n, column("all_modes_exact"), label="exact law at the shares found")
    right.plot(n, column("all_modes_bootstrap"), "o", markersize=3, label="bootstrap")
    right.plot(n, column("all_modes_half_normal"), "--", label="exact law at half-normal shares")
    right.set(xlabel="chains", ylabel="probability that every mode is found", title="Modes found")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)


# ---- UCI ------------------------------------------------------------------------------------------------------------

CHAINS, WARMUP, DRAWS, DEPTH = 8, 300, 100, 7
STEPS = (1000, 3000)
RATES, PRIORS = (0.003, 0.01, 0.03), (0.0, 1.0)


def tune(name: str) -> tuple[int, float, float]:
    """Steps, learning rate and share of the prior of the 8 members with the best LPPD on validation rows."""
    data, scores = validation_split(load(name)), {}
    trials = list(itertools.product(RATES, PRIORS))
    rate, prior = (np.repeat(v, CHAINS) for v in zip(*trials, strict=True))
    for steps in STEPS:
        members = train(F1, data, 100, members=len(rate), steps=steps, rate=rate, prior=prior)
        density = as_draws(members).log_density(F1, data)
        for trial, found in zip(trials, np.split(density, len(trials)), strict=True):
            scores[steps, *trial] = lppd(found)[0]
    for (steps, rate, prior), value in scores.items():
        print(f"{name}, validation: {steps} steps, rate {rate}, prior {prior:g}: LPPD {value:.4f}", flush=True)
    return max(scores, key=lambda trial: scores[trial])


def score(widths, draws: Draws, data: Data) -> dict[str, Any]:
    value, error = lppd(draws.log_density(widths, data))
    mean = draws.functions(widths, data.x_test).mean((0, 1))
    return {
        "chains": draws.sigma.shape[0],
        "draws": draws.sigma.shape[1],
        "lppd": round(value, 4),
        "lppd_se_rows": round(error, 4),
        "rmse": round(metrics.rmse(mean, data.y_test), 4),
    }


def uci(names: list[str], splits: list[int]) -> None:
    for name in names:
        steps, rate, prior = tune(name)
        setting = f"{steps} steps, rate {rate}, prior {prior:g}"
        for split in splits:
            data, rows = load(name, split), []
            several = sample(F1, data, split, chains=CHAINS, warmup=WARMUP, draws=DRAWS, depth=DEPTH)
            one = sample(F1, data, 100 + split, chains=1, warmup=WARMUP, draws=CHAINS * DRAWS, depth=DEPTH)
            runs = {f"{CHAINS} chains": several, "1 chain": one}
            for method, run in runs.items():
                found = score(F1, run.folded, data)
                cost = {"gradients": run.gradients, "seconds": round(run.seconds, 1)}
                rows.append({"data": name, "split": split, "method": method, **found, **cost})
            alone = [lppd(chain)[0] for chain in several.folded.log_density(F1, data)]
            rhat = diagnostics.function_summary(several.folded.functions(F1, data.x_test))
            rows[0]["detail"] = (
                f"chains alone {spell(sorted(alone), 2)}; R-hat of functions {rhat.rhat_median:.2f} median,"
                f" {rhat.share_mixed:.0%} below 1.1"
            )
            for members in (CHAINS, max(several.gradients // steps, CHAINS)):
                begin = time.perf_counter()
                trained = train(F1, data, 200 + split, members=members, steps=steps, rate=rate, prior=prior)
                found, seconds = score(F1, as_draws(trained), data), time.perf_counter() - begin
                method = "ensemble" if members == CHAINS else "ensemble, equal gradients"
                cost = {"gradients": members * steps, "seconds": round(seconds, 1), "detail": setting}
                rows.append({"data": name, "split": split, "method": method, **found, **cost})
            for row in rows:
                print(row, flush=True)
            table = replace("symmetry_uci.csv", rows)
    differences(table)


def differences(table: list[dict]) -> None:
    """LPPD of the chains minus that of the others, paired by split, with 95 % t-intervals."""
    values = {(row["data"], row["method"], int(row["split"])): float(row["lppd"]) for row in table}
    methods = list(dict.fromkeys(row["method"] for row in table))
    for name in dict.fromkeys(row["data"] for row in table):
        for other in methods[1:]:
            splits = [split for data, method, split in values if (data, method) == (name, other)]
            gap = np.array([values[name, methods[0], split] - values[name, other, split] for split in splits])
            half = student.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else np.nan
            print(f"{name:10}{methods[0]} minus {other:28}{gap.mean():+.3f} ± {half:.3f}   {spell(gap)}")


# ---- depth ----------------------------------------------------------------------------------------------------------

DEEP = ("yacht", "energy")


def deep(seeds: int) -> None:
    rows = []
    for name in DEEP:
        data = load(name)
        for seed in range(seeds):
            begin = time.perf_counter()
            members = train(F2, data, 300 + seed, members=CHAINS, steps=3000)
            ensemble = score(F2, as_draws(members), data)
            seconds = time.perf_counter() - begin
            row = {"data": name, "seed": seed, "lppd_members": ensemble["lppd"], "seconds_members": round(seconds, 1)}
            run = sample(F2, data, seed, chains=CHAINS, warmup=100, draws=100, depth=6, start=members)
            density = run.folded.log_density(F2, data)
            fold = jax.jit(partial(symmetry.canonicalize, groups=run.groups))
            weights = jax.tree.map(jnp.asarray, run.raw.weights)
            begin = time.perf_counter()
            jax.block_until_ready(fold(weights))
            first = time.perf_counter() - begin
            within = diagnostics.chainwise_rhat(run.folded.weights)
            row |= {
                "lppd": score(F2, run.folded, data)["lppd"],
                "lppd_single": spell(sorted(lppd(chain)[0] for chain in density), 2),
                **diagnose(F2, run, data),
                "chainwise_rhat_by_layer": "; ".join(
                    f"{layer.removeprefix('net/')} {np.median(value):.2f}" for layer, value in within.items()
                ),
                "fold_seconds_with_compilation": round(first, 2),
                "fold_seconds": round(statistics.median(seconds_of(lambda: fold(weights), 9)[0]), 5),  # noqa: B023
                "divergences": run.divergences,
                "gradients": run.gradients,
                "seconds": round(run.seconds, 1),
            }
            rows.append(row)
            print(row, flush=True)
    write("symmetry_deep.csv", rows)


# ---- throughput of the fold -----------------------------------------------------------------------------------------

FOLDS = {"f1": (1, F1), "f2": (6, F2), "mlp 64-64-64": (16, (64, 64, 64)), "mlp 256-256": (64, (256, 256))}
FOLDED_BYTES = 8e6


def seconds_of(call: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the clock, and of the processor in all threads, of each round."""
    clock, processor = [], []
    for _ in range(rounds):
        begin = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        clock.append(time.perf_counter() - begin[0])
        processor.append(time.process_time() - begin[1])
    return clock, processor


def fold(rounds: int) -> None:
    """Medians over rounds in which every program takes its turn.

    On a busy machine the time of the processor is the fair one: a program that is longer than a time slice is
    interrupted, a copy is not.
    """
    rows = []
    for name, (inputs, widths) in FOLDS.items():
        x = jnp.ones((1, inputs))
        one = MLP(widths).init(random.key(0), x)["params"]
        groups = symmetry.find_groups(MLP(widths), one, x)
        size = sum(w.size for w in jax.tree.leaves(one))
        draws = int(min(max(FOLDED_BYTES / (4 * size), 25), 50_000))
        leaves, tree = jax.tree.flatten(one)
        keys = random.split(random.key(1), len(leaves))
        params = tree.unflatten([random.normal(k, (draws, *w.shape)) for k, w in zip(keys, leaves, strict=True)])
        programs = {"copy": jax.jit(partial(jax.tree.map, jnp.copy))}
        for domain in ("bias", "incoming"):
            programs[f"fold, {domain}"] = jax.jit(partial(symmetry.canonicalize, groups=groups, domain=domain))
        for program in programs.values():
            jax.block_until_ready(program(params))  # compiles
        times = {what: [] for what in programs}
        for _ in range(rounds):
            for what, program in programs.items():
                times[what].append([*seconds_of(partial(program, params), 1)])
        found = {what: np.median(values, (0, 2)) for what, values in times.items()}
        for what, (clock, processor) in found.items():
            row = {"network": name, "parameters": size, "draws": draws, "program": what}
            row |= {"draws_per_second": round(draws / clock), "ms": round(1e3 * float(clock), 3)}
            row |= {"times_the_copy": round(float(clock / found["copy"][0]), 2)}
            row |= {"processor_times_the_copy": round(float(processor / found["copy"][1]), 2)}
            rows.append(row | {"device": f"{jax.devices()[0].device_kind} x{os.cpu_count()}", "jax": jax.__version__})
            print(rows[-1], flush=True)
    write("symmetry_fold.csv", rows)


# ---- the command ----------------------------------------------------------------------------------------------------


def write(name: str, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def replace(name: str, rows: list[dict]) -> list[dict]:
    """Write rows in place of the file's rows of the same data and split; returns all."""
    of = lambda row: (row["data"], int(row["split"]))
    old, new, path = [], {of(row) for row in rows}, RESULTS / name
    if path.exists():
        with path.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if of(row) not in new]
    rows = sorted(old + rows, key=of)
    write(name, rows)
    return rows


PARTS = ("tables", "toys", "uci", "deep", "fold")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", nargs="+", choices=UCI, default=list(UCI), help="which data sets of uci")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of toys")
    parser.add_argument("--splits", nargs="+", type=int, default=[0, 1, 2], help="splits of uci")
    parser.add_argument("--deep-seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21, help="rounds of fold")
    parser.add_argument("--plot", type=Path, help="where to save a picture of the curve of toys")
    args = parser.parse_args()
    calls = {
        "tables": tables,
        "toys": lambda: toys(args.seeds, args.plot),
        "uci": lambda: uci(args.data, args.splits),
        "deep": lambda: deep(args.deep_seeds),
        "fold": lambda: fold(args.rounds),
    }
    for part in args.parts:
        begin = time.perf_counter()
        calls[part]()
        print(f"{part}: {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
