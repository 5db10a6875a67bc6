# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""WGFEnsemble beside exact answers, NUTS, NumPyro's SVGD, anchored ensembles and a hand-written loop.

    python benchmarks/ensembles.py                                  # all parts but speed
    python benchmarks/ensembles.py --parts speed                    # the machine has to be quiet
    python benchmarks/ensembles.py --parts uci --data yacht --splits 3
    python benchmarks/ensembles.py --parts gap --quick              # a smoke run: numbers that mean nothing

DE is ``kl=0``, MAP-DE ``langevin=False``, DLE ``kl=1``, DRLE ``kl=1, mmd=1``, on weights or on functions; an anchored
ensemble (Pearce et al.) is a MAP-DE whose particles each have a prior of their own, about a draw from the prior. Parts,
each with a table in benchmarks/results, ensembles_*.csv, one row for each split or seed:

``force``: the repulsion over the drift of the prior in 1 to 10 000 dimensions, particles being draws from the prior.
``regression``: conjugate linear regression; moments against exact ones over step sizes, with all rows and minibatches.
``constrained``: a LogNormal site without data, and a regression with a HalfNormal scale beside NUTS and SVGD.
``gap``: 1-D regression with a gap in its inputs (y = x sin x, 2 x 10 tanh units); the spread of functions in the gap
over that on the data, beside NUTS. Rates are the largest at which nothing diverges.
``uci``: yacht, energy, concrete, wine_red; one hidden layer of 50 ReLU units, five particles, the scale of the noise
learned. It needs the environment variable NUMPYRO_BDL_DATA, a folder that holds ``uci/yacht.npz`` and so on, each with
x, y and ``test_index`` (split, row). Inputs and outcomes are scaled by the training rows; results are in the units of
the data. All methods begin with the same networks and take STEPS gradient steps on minibatches of 100, with the same
cosine decay; SVGD and a second DE have Adam, the others a preconditioned step of the same kind. Each has the same
number of trials of its rate, judged by the NLL on a held-out fifth of the training rows of split 0; where a particle of
any split diverges at the rate that is chosen, all splits take the next smaller one.
``control``: many more modes than particles, where DE, DLE and DRLE coincide.
``speed``: marginal milliseconds of a step (the slope between two run lengths of compiled programs; a ratio is the
median of the ratios within rounds).
"""

import argparse
import csv
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("CI", None)  # NumPyro switches its progress bar off under CI, and recompiles every run without it

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import tqdm
from jax import lax, random
from numpyro.contrib.einstein import SVGD, RBFKernel
from numpyro.contrib.module import random_flax_module
from numpyro.infer import MCMC, NUTS, init_to_sample
from numpyro.optim import Adam
from scipy.special import logsumexp
from scipy.stats import norm
from scipy.stats import t as student

import numpyro_bdl as bdl
from numpyro_bdl import metrics, mmd, preconditioners
from numpyro_bdl.kernels.base import CHAINS
from numpyro_bdl.noise import normal
from numpyro_bdl.repulsion import repulsion_and_attraction

RESULTS = Path(__file__).parent / "results"
EXPECTED_WARNINGS = ("the repulsion is", "the prior of")  # inert by design in force and uci, flat in control

# ---- tables ---------------------------------------------------------------------------------------------------------


def write(name: str, rows: list[dict], keys: tuple[str, ...] = ()) -> list[dict]:
    """Write rows to a table, in place of those of the same keys, beside the others if there are keys; returns all."""
    path, of = RESULTS / f"ensembles_{name}.csv", lambda row: tuple(str(row[k]) for k in keys)
    if keys and path.exists():
        new = {of(row) for row in rows}
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if of(row) not in new] + rows
    with path.open("w", newline="") as file:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def interval(values) -> tuple[float, float]:
    """Mean, and half the length of its 95 % t-interval."""
    values = np.asarray(values, float)
    n = len(values)
    return values.mean(), student.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan


def compare(rows: list[dict], metrics: tuple[str, ...], against: str, case: str, unit: str) -> None:
    """Means of every method, then differences paired by unit, starred where the t-interval leaves out 0."""
    cells = {(str(r[case]), r["method"], int(r[unit])): [float(r[m]) for m in metrics] for r in rows}
    for name in dict.fromkeys(n for n, _, _ in cells):
        units = sorted({u for n, _, u in cells if n == name})
        methods = [against, *dict.fromkeys(m for n, m, _ in cells if n == name and m != against)]
        table = {m: np.array([cells[name, m, u] for u in units]) for m in methods}
        print(f"\n{name}: means over {len(units)} {unit}s; differences to {against} with 95 % t-intervals")
        print(f"{'':16}" + "".join(f"{m:>12}{'difference':>22}" for m in metrics))
        apart = {m: [] for m in metrics}
        for method, values in table.items():
            line = f"{method:16}"
            for n, metric in enumerate(metrics):
                mean, half = interval(values[:, n] - table[against][:, n])
                found = method != against and abs(mean) > half
                if found:
                    apart[metric].append(method)
                gap = "" if method == against else f"{mean:+.3f} ± {half:.3f} {'*' if found else ' '}"
                line += f"{values[:, n].mean():>12.3f}{gap:>22}"
            print(line)
        for metric, found in apart.items():
            print(f"  {metric}: {'apart from ' + against + ': ' + ', '.join(found) if found else 'nothing separates'}")


# ---- networks, and particles in lanes -------------------------------------------------------------------------------


class MLP(nn.Module):
    widths: tuple[int, ...]
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]


def make_network(network: MLP, *, batch: int | None = None, noise: float | None = None) -> Callable:
    """A model with N(0, 1) priors on the weights, or about an anchor; noise None is learned."""

    def model(x, y=None, anchor=None):
        prior = dist.Normal(0, 1) if anchor is None else {k: dist.Normal(v, 1) for k, v in anchor.items()}
        net = random_flax_module("net", network, prior, input_shape=(1, x.shape[1]))
        sigma = noise or numpyro.sample("sigma", dist.LogNormal(math.log(0.3), 1))
        with numpyro.plate("data", len(x), subsample_size=None if y is None else batch):
            mean = net(numpyro.subsample(x, event_dim=1))
            numpyro.sample("y", dist.Normal(mean, sigma), obs=None if y is None else numpyro.subsample(y, event_dim=0))

    return model


def weights_of(z: dict) -> dict[str, dict]:
    layers: dict[str, dict] = {}
    for name, value in z.items():
        if name.startswith("net/"):
            layer, kind = name.removeprefix("net/").split(".")
            layers.setdefault(layer, {})[kind] = value
    return layers


def functions(network: MLP, z: dict, x) -> np.ndarray:
    """Of positions (lane, particle, ...) at inputs (lane, row, column): (lane, particle, row)."""
    one = lambda z, x: network.apply({"params": weights_of(z)}, x)
    return np.asarray(jax.jit(jax.vmap(jax.vmap(one, (0, None))))(z, x), float)


class Rated(NamedTuple):
    """preconditioners.rms times a rate that is part of the state, so that lanes can differ in it."""

    adapts = True
    rms: Any = preconditioners.rms()

    def init(self, z):
        return jnp.ones(()), self.rms.init(z)

    def update(self, state, gradient, key):
        return state[0], self.rms.update(state[1], gradient, key)

    def diagonal(self, state, z):
        return jax.tree.map(lambda p: state[0] * p, self.rms.diagonal(state[1], z))


DRAWS = 4  # a run is so many draws; the preconditioner adapts in the first


def decay(steps: int) -> Callable:
    """Of the rate, to a fiftieth."""
    return lambda i: 0.02 + 0.98 * (1 + jnp.cos(jnp.pi * jnp.minimum(i / steps, 1))) / 2


def rated_adam(steps: int) -> optax.GradientTransformation:
    """Adam whose rate is part of its state."""
    adam = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda i: -decay(steps)(i)))

    def update(gradient, state, z=None):
        updates, inner = adam.update(gradient, state[1], z)
        return jax.tree.map(lambda u: state[0] * u, updates), (state[0], inner)

    return optax.GradientTransformation(lambda z: (jnp.ones(()), adam.init(z)), update)


def first_states(kernel, keys, data: tuple, rates, sites: dict | None = None):
    """States of a batch of ensembles, keys (lane, particle), each with its rate."""
    example = jax.tree.map(lambda a: a[0], data)
    start = {name: jnp.full(keys.shape[1:], v, jnp.float32) for name, v in (sites or {}).items()}
    lanes = [kernel.init(lane, 1, start, example, {}) for lane in keys]
    states = jax.tree.map(lambda *s: jnp.stack(s), *lanes)
    rate = jnp.broadcast_to(jnp.asarray(rates, jnp.float32)[:, None], keys.shape)
    field = "optimizer" if states.optimizer else "preconditioner"
    return states._replace(**{field: (rate, getattr(states, field)[1])})


def run_mcmc(kernel, chains: int, warmup: int, draws: int, seed: int, *args, **kwargs) -> dict:
    """Draws (chain, draw, ...) by site."""
    lengths = {"num_warmup": warmup, "num_samples": draws, "num_chains": chains}
    mcmc = MCMC(kernel, **lengths, chain_method="vectorized", progress_bar=False)
    mcmc.run(random.key(seed), *args, **kwargs)
    return mcmc.get_samples(group_by_chain=True)


METHODS: dict[str, dict[str, Any]] = {
    "DE": {"kl": 0},
    "MAP-DE": {"langevin": False},
    "DLE": {},
    "DRLE-weights": {"mmd": 1, "repulsion": "weights"},
    "DRLE-function": {"mmd": 1, "repulsion": "function"},
    "anchored": {"langevin": False},
    "DE, Adam": {"kl": 0},
}
Trainer = Callable[[jax.Array, tuple, Any], dict]
"""From keys (lane, particle), data and rates by lane to the end points; one program, compiled when it is first used."""


def make_trainer(method: str, network: MLP, model, rows: int, steps: int, anchor_inputs=None, sites=None) -> Trainer:
    """Of one of METHODS or SVGD; a rate is a step on the mean loss."""
    options = METHODS.get(method, METHODS["DE"])
    if options.get("repulsion") == "function":
        options = options | {"anchor_inputs": (anchor_inputs,)}
    plain = {"step_size": lambda i: decay(steps)(i) / rows, "preconditioner": Rated()}
    moves = {"optimizer": rated_adam(steps)} if method == "DE, Adam" else plain
    kernel = bdl.WGFEnsemble(model, steps_per_draw=steps // DRAWS, **moves, **options)
    advance = jax.jit(jax.vmap(lambda state, *data: kernel.sample(state, data, {})))

    def by_kernel(keys, data, rates):
        states = first_states(kernel, keys, data, rates, sites)
        for _ in range(DRAWS):
            states = advance(states, *data)
        return states.z

    def anchored(keys, data, rates):
        """Each particle has a prior of its own, and is an ensemble of one."""
        lanes, particles = keys.shape
        shapes = jax.eval_shape(lambda x: network.init(random.key(0), x)["params"], data[0][0])
        draws = normal(random.key(7), jax.tree.map(lambda s: jnp.zeros((lanes * particles, *s.shape)), shapes))
        anchors = {f"{layer}.{kind}": w for layer, kinds in draws.items() for kind, w in kinds.items()}
        rates, *data = (jnp.repeat(jnp.asarray(a), particles, 0) for a in (rates, *data))
        z = by_kernel(keys.reshape(-1, 1), (*data, anchors), rates)
        return jax.tree.map(lambda w: w.reshape(lanes, particles, *w.shape[2:]), z)

    def one_svgd(start, rate, *data):
        particles = len(jax.tree.leaves(start)[0])
        svgd = SVGD(model, Adam(lambda i: rate * decay(steps)(i)), RBFKernel(), num_stein_particles=particles)
        state = svgd.init(random.key(0), *data)
        state = state._replace(optim_state=svgd.optim.init({f"{k}_auto_loc": w for k, w in start.items()}))
        state = lax.fori_loop(0, steps, lambda i, s: svgd.update(s, *data)[0], state)
        return {k.removesuffix("_auto_loc"): w for k, w in svgd.optim.get_params(state.optim_state).items()}

    stein = jax.jit(jax.vmap(one_svgd))

    def by_svgd(keys, data, rates):
        return stein(first_states(kernel, keys, data, rates, sites).z, jnp.asarray(rates, jnp.float32), *data)

    return {"anchored": anchored, "SVGD": by_svgd}.get(method, by_kernel)


def settle(train: Trainer, keys, data: tuple, rates) -> tuple[dict, float]:
    """End points at the first of some rates, from the largest on, at which no particle of any lane diverges: no
    coordinate, log noise scales among them, is beyond 20, where that of a prior is N(0, 1) or narrower."""
    for rate in sorted(rates, reverse=True):
        z = train(keys, data, [rate] * len(keys))
        if all(bool(jnp.all(jnp.abs(w) < 20)) for w in z.values()):
            break
    return z, rate


# ---- force ----------------------------------------------------------------------------------------------------------


def force(quick: bool) -> None:
    rows = []
    for size in (1, 10, 100) if quick else (1, 10, 100, 1000, 10_000):

        def model(size=size):
            numpyro.sample("w", dist.Normal(0, 1).expand([size]).to_event(1))

        for name, scale in (("1", 1.0), ("default", None)):
            radial = mmd.RBF(math.sqrt(size), scale)
            kernel = bdl.WGFEnsemble(model, step_size=1e-3, mmd=1, kernel=radial, init_strategy=init_to_sample())
            for seed in range(5):
                state = kernel.init(random.split(random.key(seed), 20), 0, None, (), {})
                ratio = float(jnp.median(state.repulsion_ratio))
                row = {"dimension": size, "kernel_scale": name, "seed": seed, "ratio": f"{ratio:.3e}"}
                rows.append(row | {"ratio_times_dimension": round(ratio * size, 4)})
    write("force", rows)
    print("|repulsion| / |prior drift|, 20 particles, kl = mmd, bandwidth sqrt(J); with scale 1 ratio * J goes to 1/e")
    for size, name in dict.fromkeys((row["dimension"], row["kernel_scale"]) for row in rows):
        ratio = statistics.mean(float(r["ratio"]) for r in rows if (r["dimension"], r["kernel_scale"]) == (size, name))
        goal = f", times J {ratio * size:.3f}, {'in' if 0.33 <= ratio * size <= 0.40 else 'NOT in'} [.33, .40]"
        print(f"  J = {size:<6} scale {name:8} ratio {ratio:.3e}{goal if name == '1' else ''}")


# ---- conjugate regression -------------------------------------------------------------------------------------------


def stationary_covariance(x, y, sigma, mean, precision, size: float, batch: int | None) -> np.ndarray:
    """Of the Euler step with minibatches drawn with replacement, exactly: the fixed point of its second moments."""
    n, j = x.shape
    contract, errors = np.eye(j) - size * precision, y - x @ mean
    s = np.linalg.inv(precision)
    for _ in range(int(20 / (size * np.linalg.eigvalsh(precision)[0])) + 100):
        new = contract @ s @ contract + 2 * size * np.eye(j)
        if batch:
            squares = np.einsum("nj,jk,nk->n", x, s, x) + errors**2
            bend = x.T @ x / n
            whole = bend @ s @ bend + np.outer(x.T @ errors, x.T @ errors) / n**2
            new += (size * n / sigma**2) ** 2 / batch * ((x.T * squares) @ x / n - whole)
        s = new
    return s


def regression(quick: bool) -> None:
    rng, n, j, sigma, particles = np.random.default_rng(0), 200, 10, 1.0, 20
    x = rng.normal(size=(n, j)).astype("f4")
    y = (x @ rng.normal(size=j) + sigma * rng.normal(size=n)).astype("f4")
    precision = x.T @ x / sigma**2 + np.eye(j)
    exact, top = np.linalg.solve(precision, x.T @ y / sigma**2), np.linalg.eigvalsh(precision)[-1]

    def model(x, y, batch=None):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([j]).to_event(1))
        with numpyro.plate("data", n, subsample_size=batch):
            mean = numpyro.subsample(x, event_dim=1) @ w
            numpyro.sample("y", dist.Normal(mean, sigma), obs=numpyro.subsample(y, event_dim=0))

    rows = []
    print("DLE at kl=1: mean in s.e. over particles (worst of 10), variance over exact, and what the step size implies")
    for batch in (None, 20):
        for product in (0.0125, 0.025, 0.05, 0.1, 0.2):
            size = product / top
            # rows of each particle's own, so that the particles are independent
            kernel = bdl.WGFEnsemble(model, step_size=size, steps_per_draw=20, share_batch=False)
            draws = 50 if quick else int(2000 * 0.05 / product) + 500
            w = np.asarray(run_mcmc(kernel, particles, draws // 5, draws, 1, x, y, batch=batch)["w"], float)
            means = w.mean(1)
            z = (means.mean(0) - exact) / (means.std(0, ddof=1) / math.sqrt(particles))
            covariance = np.cov((w - exact).reshape(-1, j).T)
            per_particle = [np.trace(precision @ np.cov(one.T)) / j for one in w]
            implied = stationary_covariance(x, y, sigma, exact, precision, size, batch)
            row = {
                "batch": batch or n,
                "step_times_top_curvature": product,
                "worst_mean_z": round(float(np.abs(z).max()), 2),
                "variance_ratio": round(float(np.trace(precision @ covariance)) / j, 4),
                "variance_ratio_se": round(float(np.std(per_particle, ddof=1)) / math.sqrt(particles), 4),
                "variance_ratio_implied": round(float(np.trace(precision @ implied)) / j, 4),
            }
            rows.append(row)
            print(" ", row, flush=True)
    write("regression", rows)
    fine = [r for r in rows if r["batch"] == n and r["step_times_top_curvature"] < 0.05]
    print(
        "Full batch below .05: mean within 3.3 s.e. (10 of them), variance within 5 %:",
        *("yes" if r["worst_mean_z"] < 3.3 and abs(r["variance_ratio"] - 1) < 0.05 else "NO" for r in fine),
    )


# ---- constrained sites ----------------------------------------------------------------------------------------------


def svgd_particles(model, args: tuple, steps: int, particles: int, seed: int) -> dict:
    svgd = SVGD(model, Adam(0.02), RBFKernel(), num_stein_particles=particles)
    result = svgd.run(random.key(seed), steps, *args, progress_bar=False)
    return {k.removesuffix("_auto_loc"): w for k, w in result.params.items()}


def constrained(quick: bool) -> None:
    rng, particles, seeds = np.random.default_rng(0), 50, 1 if quick else 3
    x = rng.normal(size=(15, 3)).astype("f4")
    y = (x @ np.array([1, -1, 0.5]) + 0.5 * rng.normal(size=15)).astype("f4")

    def free():
        numpyro.sample("s", dist.LogNormal(0, 1))

    def scaled(x, y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1))
        s = numpyro.sample("s", dist.HalfNormal(1))
        numpyro.sample("y", dist.Normal(x @ w, s), obs=y)

    draws = 20 if quick else 400  # of 50 steps
    rows = []
    for case, model, args, size in (("LogNormal, no data", free, (), 0.02), ("regression", scaled, (x, y), 5e-4)):
        for seed in range(seeds):
            dle, drle = (
                bdl.WGFEnsemble(model, step_size=size, steps_per_draw=50, repulsion="weights", mmd=weight)
                for weight in (0, 1)
            )
            run = lambda kernel, *lengths: run_mcmc(kernel, *lengths, seed, *args)  # noqa: B023
            found = {"NUTS": run(NUTS(model), 4, 500, 100 if quick else 5000)} if args else {}
            found |= {"DLE": run(dle, particles, draws, draws), "DRLE-weights": run(drle, particles, draws, draws)}
            found["SVGD"] = svgd_particles(model, args, 300 if quick else 3000, particles, seed)
            for method, sites in found.items():
                log_s = np.log(np.asarray(sites["s"], float))
                row = {"case": case, "method": method, "seed": seed}
                row |= {"mean_log_s": round(log_s.mean(), 4), "sd_log_s": round(log_s.std(), 4)}
                if "w" in sites:
                    w = np.asarray(sites["w"], float)
                    row |= {"mean_w": round(w[..., 0].mean(), 4), "sd_w": round(w[..., 0].std(), 4)}
                rows.append(row)
    write("constrained", rows)
    print("Means over seeds; exact for the first case: mean 0, sd 1. DRLE has another target than the posterior.")
    for case, method in dict.fromkeys((row["case"], row["method"]) for row in rows):
        of = [row for row in rows if (row["case"], row["method"]) == (case, method)]
        columns = [c for c in ("mean_log_s", "sd_log_s", "mean_w", "sd_w") if c in of[0]]
        print(f"  {case:20}{method:14}" + "  ".join(f"{c} {np.mean([r[c] for r in of]):+.3f}" for c in columns))


# ---- gap ------------------------------------------------------------------------------------------------------------

GAP = (2.5, 4.5)


def gap(quick: bool) -> None:
    seeds, particles, steps = (2, 5, 400) if quick else (3, 20, 8000)
    network, noise = MLP((10, 10), nn.tanh), 0.25
    data = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        x = np.where(rng.random(90) < 1 / 2.5, rng.uniform(1.5, 2.5, 90), rng.uniform(4.5, 6, 90))
        data.append((x[:, None] - 3.5, x * np.sin(x) + noise * rng.normal(size=90)))
    data = tuple(jnp.asarray(np.stack(a), jnp.float32) for a in zip(*data, strict=True))
    model = make_network(network, noise=noise)
    keys = jnp.stack([random.split(random.key(seed), particles) for seed in range(seeds)])
    anchor = jnp.linspace(-4, 4, 40)[:, None]  # x from -.5 to 7.5
    inside = jnp.broadcast_to(jnp.linspace(*GAP, 41)[None, :, None] - 3.5, (seeds, 41, 1))
    found = {}
    for method in list(METHODS)[:-1]:
        begin = time.perf_counter()
        train = make_trainer(method, network, model, 90, steps, anchor)
        found[method], rate = settle(train, keys, data, (5e-4, 1e-3, 2e-3, 4e-3))
        print(f"  gap, {method}: rate {rate:g}, {time.perf_counter() - begin:.0f} s", flush=True)
    nuts = []
    for seed in range(seeds):
        short = 20 if quick else 200
        one = run_mcmc(NUTS(model, max_tree_depth=8), 4, short, short, seed, data[0][seed], data[1][seed])
        nuts.append(jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), one))
        print(f"  gap, NUTS, seed {seed}", flush=True)
    found["NUTS"] = {k: jnp.stack([one[k] for one in nuts]) for k in found["DE"]}
    rows = []
    for method, z in found.items():
        between, on = (functions(network, z, x) for x in (inside, data[0]))
        for seed in range(seeds):
            spread = {"gap": between[seed].std(0).mean(), "data": on[seed].std(0).mean()}
            error = np.sqrt(np.mean((on[seed].mean(0) - np.asarray(data[1][seed])) ** 2))
            row = {"case": "gap", "method": method, "seed": seed}
            row |= {f"sd_{k}": round(float(v), 4) for k, v in spread.items()}
            rows.append(
                row | {"ratio": round(float(spread["gap"] / spread["data"]), 3), "rmse_data": round(float(error), 4)}
            )
    write("gap", rows)
    for against in ("DE", "NUTS"):
        compare(rows, ("sd_gap", "sd_data", "ratio", "rmse_data"), against, "case", "seed")


# ---- UCI ------------------------------------------------------------------------------------------------------------

UCI = ("yacht", "energy", "concrete", "wine_red")
PARTICLES, STEPS, TRIALS = 5, 1000, 10
RATES = np.geomspace(0.02, 0.8, TRIALS)
RATES_OF_ADAM = np.geomspace(1e-3, 0.1, TRIALS)
UCI_METHODS = (*METHODS, "SVGD")
METRICS = ("nll", "rmse", "crps", "sd")


class Split(NamedTuple):
    """Scaled rows, with a leading axis of splits, and what scaled the outcomes."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    scale: np.ndarray


def load(name: str, splits: int) -> tuple[Split, Split]:
    """The splits, and split 0 with a fifth of its training rows in place of its test rows, to choose by.

    In their stead are other training rows once more: with as many rows the choice and the splits share a program.
    """
    folder = os.environ.get("NUMPYRO_BDL_DATA")
    path = Path(folder or "", "uci", f"{name}.npz")
    if not folder or not path.exists():
        raise SystemExit(
            f"{path.name} is not there: set the environment variable NUMPYRO_BDL_DATA to a folder that holds it in"
            f" uci/, with x, y and test_index (split, row). It is {folder!r} now. The other parts don't need it."
        )
    with np.load(path) as file:
        x, y, test = file["x"], file["y"], file["test_index"][:splits]

    def scaled(train, test):
        centre, width, shift, scale = x[train].mean(0), x[train].std(0), y[train].mean(), y[train].std()
        width = np.where(width > 0, width, 1)
        inputs, outcomes = (((x[rows] - centre) / width, (y[rows] - shift) / scale) for rows in (train, test)), scale
        (x_train, y_train), (x_test, y_test) = inputs
        return Split(*(np.float32(a) for a in (x_train, y_train, x_test, y_test)), outcomes)

    train = [np.setdiff1d(np.arange(len(x)), rows) for rows in test]
    rng, fifth = np.random.default_rng(0), len(train[0]) // 5
    held_out, kept = np.split(rng.permutation(train[0]), [fifth])
    fold = scaled(np.concatenate([kept, rng.choice(kept, fifth, replace=False)]), held_out)
    splits = [scaled(*rows) for rows in zip(train, test, strict=True)]
    return tuple(Split(*map(np.stack, zip(*some, strict=True))) for some in (splits, [fold] * TRIALS))


def judge(network: MLP, z: dict, data: Split) -> list[dict[str, float]]:
    """Of each split, in the units of the data; the predictive is the mixture of the particles with their noise."""
    means, sigmas = functions(network, z, jnp.asarray(data.x_test)), np.exp(np.asarray(z["sigma"], float))
    found = []
    for mean, sigma, y, scale in zip(means, sigmas[..., None], data.y_test, data.scale, strict=True):
        log_density = logsumexp(norm.logpdf(y, mean, sigma), 0) - math.log(len(mean))
        values = {
            "nll": np.log(scale) - log_density.mean(),
            "rmse": scale * np.sqrt(np.mean((mean.mean(0) - y) ** 2)),
            "crps": scale * metrics.crps_gaussian_mixture(mean[None], sigma[None], y),
            "sd": scale * mean.std(0).mean(),
            "noise": scale * sigma.mean(),
        }
        found.append({k: float(v) for k, v in values.items()})
    return found


def uci(names: list[str], methods: list[str], splits: int, quick: bool) -> None:
    network = MLP((50,))
    model, steps = make_network(network, batch=100), 40 if quick else STEPS
    for name in names:
        data, fold = load(name, splits)
        rows, columns = data.x.shape[1:]
        anchor = 2 * random.normal(random.key(5), (32, columns))  # wider than the data, whose scale is 1
        for method in methods:
            begin, grid = time.perf_counter(), RATES_OF_ADAM if method in ("DE, Adam", "SVGD") else RATES
            train = make_trainer(method, network, model, rows, steps, anchor, {"sigma": 0.0})

            alike = jnp.broadcast_to(random.split(random.key(1), PARTICLES), (TRIALS, PARTICLES))
            trial = judge(network, train(alike, tuple(map(jnp.asarray, fold[:2])), grid), fold)
            nll = [row["nll"] if math.isfinite(row["nll"]) else math.inf for row in trial]
            keys, best = random.split(random.key(0), (splits, PARTICLES)), int(np.argmin(nll))
            z, rate = settle(train, keys, tuple(map(jnp.asarray, data[:2])), grid[: best + 1])
            found = judge(network, z, data)
            label = {"data": name, "method": method}
            trials = [label | {"rate": f"{r:.2e}", "nll": round(v, 4)} for r, v in zip(grid, nll, strict=True)]
            write("uci_trials", trials, ("data", "method", "rate"))
            label |= {"rate": f"{rate:.2e}"}
            rounded = [label | {"split": n} | {k: round(v, 5) for k, v in row.items()} for n, row in enumerate(found)]
            table = write("uci", rounded, ("data", "method", "split"))
            edge = " AT THE EDGE" if best in (0, len(grid) - 1) else ""
            print(
                f"  {name}, {method}: rate {rate:.2e}{edge}, NLL of trials {' '.join(f'{v:.2f}' for v in nll)};"
                f" test NLL {np.mean([r['nll'] for r in found]):.3f}, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
        table = [row for row in table if row["data"] == name]
        compare(table, METRICS, "DE", "data", "split")
        compare([row for row in table if "LE" in row["method"]], METRICS, "DLE", "data", "split")
    print("\nThe training rows of splits overlap, so that the intervals are too short; each metric has 28 of them.")


# ---- negative control -----------------------------------------------------------------------------------------------


def control(quick: bool) -> None:
    def model():
        t = numpyro.sample("t", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.factor("loss", jnp.abs(jnp.sin(t)))

    weights = {
        "DE": {"kl": 0},
        "DLE": {"kl": 0.001},
        "DRLE": {"kl": 0.001, "mmd": 0.6, "kernel": mmd.RBF(0.1, 1.0), "repulsion": "weights"},
    }
    rows, particles, programs = [], 20, {}
    for method, options in weights.items():
        kernel = bdl.WGFEnsemble(model, step_size=0.01, steps_per_draw=1000, **options)
        programs[method] = kernel, jax.jit(lambda state, kernel=kernel: kernel.sample(state, (), {}).z["t"])
    for seed in range(2 if quick else 20):
        start = random.uniform(random.key(seed), (particles,), minval=-1000 * jnp.pi, maxval=1000 * jnp.pi)
        states = {
            m: k.init(random.split(random.key(seed), particles), 0, {"t": start}, (), {})
            for m, (k, _) in programs.items()
        }
        ends = {method: np.asarray(run(states[method]), float) for method, (_, run) in programs.items()}
        modes = {method: np.floor(t / np.pi) for method, t in ends.items()}
        for method, t in ends.items():
            alone = int(sum(np.sum(modes[method] == m) == 1 for m in modes[method]))
            row = {"seed": seed, "method": method, "particles_alone": alone}
            row |= {"same_mode_as_de": int(np.sum(modes[method] == modes["DE"]))}
            row |= {"mean_loss": round(-np.abs(np.sin(t)).mean(), 4)}
            row |= {"rms_distance_to_mode": round(float(np.sqrt(np.mean((t - np.pi * (modes[method] + 0.5)) ** 2))), 4)}
            rows.append(row)
    write("control", rows)
    print("20 particles, 2000 modes: means over seeds")
    for method in weights:
        of = [row for row in rows if row["method"] == method]
        print(f"  {method:6}" + "  ".join(f"{c} {np.mean([r[c] for r in of]):.3f}" for c in list(of[0])[2:]))


# ---- speed ----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    model: Callable
    args: tuple
    energy: Callable
    """of a position and data"""
    batch: int | None
    anchor: jax.Array
    lengths: tuple[int, int]


def speed_cases() -> dict[str, Case]:
    rng, n = np.random.default_rng(0), 5000

    def linear(x, y=None):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, 1), obs=y)

    def linear_energy(z, x, y):
        return jnp.sum((y - x @ z["w"]) ** 2) / 2 + jnp.sum(z["w"] ** 2) / 2

    network, batch = MLP((50,)), 100

    def network_energy(z, x, y):
        prior = sum(jnp.sum(w**2) for w in z.values()) / 2
        return n / batch * jnp.sum((y - network.apply({"params": weights_of(z)}, x)) ** 2) / 2 + prior

    cases = {}
    for name, model, energy, d, size, lengths in (
        ("linear, all 5000 rows", linear, linear_energy, 200, None, (20, 120)),
        ("network, minibatch", make_network(network, batch=batch, noise=1.0), network_energy, 10, batch, (100, 600)),
    ):
        x, y, anchor = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n, d), n, (32, d)))
        cases[name] = Case(model, (x, y), energy, size, anchor, lengths)
    return cases


SIZE = 1e-8


def speed_runners(case: Case, particles: int) -> dict[str, Callable[[int], Any]]:
    def make(method: str, **more):
        anchored = {"anchor_inputs": (case.anchor,)} if method == "DRLE-function" else {}
        return bdl.WGFEnsemble(case.model, step_size=SIZE, **METHODS[method], **anchored, **more)

    keys = random.split(random.key(0), particles)
    start = make("DE").init(keys, 0, None, case.args, {}).z

    def loop(step):
        """A hand-written loop whose number of steps is no constant, so that it is compiled once."""

        @jax.jit
        def run(z, key, steps, args):
            return lax.fori_loop(0, steps, lambda i, z: step(z, random.fold_in(key, i), args), z)

        return lambda steps: jax.block_until_ready(run(start, random.key(1), steps, case.args))

    def gradients(noisy: bool):
        def step(z, key, args):
            key_rows, key_noise = random.split(key)
            rows = slice(None) if case.batch is None else random.randint(key_rows, (case.batch,), 0, len(args[0]))
            x, y = (a[rows] for a in args)
            move = jax.tree.map(lambda g: -SIZE * g, jax.vmap(jax.grad(case.energy), (0, None, None))(z, x, y))
            if noisy:
                noise = jax.vmap(normal)(random.split(key_noise, particles), z)
                move = jax.tree.map(lambda m, xi: m + jnp.sqrt(2 * SIZE) * xi, move, noise)
            return jax.tree.map(jnp.add, z, move)

        return loop(step)

    def pairs(method):
        kernel = make(method)
        kernel.init(keys, 0, None, case.args, {})
        forces = jax.vmap(lambda z: repulsion_and_attraction(z, {}, kernel._repulsion, CHAINS), axis_name=CHAINS)
        return loop(lambda z, key, args: jax.tree.map(lambda w, r, p: w - SIZE * (r - p), z, *forces(z)))

    def through_mcmc(method):
        runs = {}

        def run(steps):
            if steps not in runs:
                lengths = {"num_warmup": 0, "num_samples": 1, "num_chains": particles}
                runs[steps] = MCMC(make(method, steps_per_draw=steps), **lengths, chain_method="vectorized")
            runs[steps].run(random.key(1), *case.args)
            jax.block_until_ready(runs[steps].last_state.z)

        return run

    def svgd():
        stein = SVGD(case.model, Adam(SIZE), RBFKernel(), num_stein_particles=particles)
        first = stein.init(random.key(1), *case.args)
        run = jax.jit(lambda s, steps, args: lax.fori_loop(0, steps, lambda i, s: stein.update(s, *args)[0], s))
        return lambda steps: jax.block_until_ready(run(first, steps, case.args))

    return {
        "gradients by hand": gradients(False),
        "gradients and noise by hand": gradients(True),
        **{method: through_mcmc(method) for method in ("DE", "DLE", "DRLE-weights", "DRLE-function")},
        "pairs alone, weights": pairs("DRLE-weights"),
        "pairs alone, function": pairs("DRLE-function"),
        "SVGD": svgd(),
    }


def speed(rounds: int, quick: bool) -> None:
    tqdm.tqdm.monitor_interval = 0
    rows = []
    for name, case in speed_cases().items():
        short, long = (2, 12) if quick else case.lengths
        for particles in (5,) if quick else (5, 10, 20, 40):
            runners = speed_runners(case, particles)
            slopes = {what: [] for what in runners}
            for n in range(rounds + 1):
                for what, run in runners.items():
                    begin = time.perf_counter()
                    run(short)
                    middle = time.perf_counter()
                    run(long)
                    if n:  # the first round compiles
                        slope = (time.perf_counter() - 2 * middle + begin) / (long - short)
                        slopes[what].append(1e3 * slope)
            by_hand = {k: slopes["gradients by hand" if k == "DE" else "gradients and noise by hand"] for k in slopes}
            load = os.getloadavg()[0]
            for what, values in slopes.items():
                ratio = statistics.median(a / b for a, b in zip(values, by_hand[what], strict=True))
                row = {"case": name, "particles": particles, "variant": what}
                row |= {"ms_per_step": round(statistics.median(values), 4)}
                row |= {"ms_quartiles": " ".join(f"{q:.3f}" for q in np.quantile(values, (0.25, 0.75)))}
                row |= {"ratio_to_hand": round(ratio, 3)}
                if what in ("DE", "DLE"):
                    row["goal"] = "met" if ratio <= 1.2 else "NOT met"
                if what.startswith("DRLE"):
                    alone = slopes[f"pairs alone, {what.removeprefix('DRLE-')}"]
                    left = statistics.median((a - p) / b for a, p, b in zip(values, alone, by_hand[what], strict=True))
                    row |= {"ratio_without_pairs": round(left, 3), "goal": "met" if left <= 1.5 else "NOT met"}
                device = f"{jax.devices()[0].device_kind} x{os.cpu_count()} ({platform.machine()})"
                rows.append(row | {"load": round(load, 1), "device": device, "jax": jax.__version__})
                print("  " + " ".join(f"{v}" for k, v in rows[-1].items() if k not in ("device", "jax")), flush=True)
            write("speed", rows)
    print("DE is compared with the gradients alone; load: number of running programs, this one included, over 1 minute")


# ---- the command ----------------------------------------------------------------------------------------------------

PARTS = ("force", "regression", "constrained", "gap", "uci", "control", "speed")


def main():
    global RESULTS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    parser.add_argument("--data", nargs="+", choices=UCI, default=list(UCI), help="which data sets of uci")
    parser.add_argument("--methods", nargs="+", choices=UCI_METHODS, default=UCI_METHODS, help="which methods of uci")
    parser.add_argument("--splits", type=int, default=10, help="splits of uci")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of speed")
    parser.add_argument("--quick", action="store_true", help="a smoke run, with tables in --out alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.quick and args.out == RESULTS:
        raise SystemExit("--quick means nothing for benchmarks/results: give another folder as --out.")
    RESULTS = args.out
    for text in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", f"WGFEnsemble: {text}")
    calls = {
        "uci": lambda: uci(args.data, args.methods, args.splits, args.quick),
        "speed": lambda: speed(args.rounds, args.quick),
    }
    for part in args.parts:
        begin = time.perf_counter()
        print(f"{part}:", flush=True)
        calls.get(part, lambda: globals()[part](args.quick))()  # noqa: B023
        print(f"{part}: {time.perf_counter() - begin:.1f} s, load {os.getloadavg()[0]:.1f}\n", flush=True)


if __name__ == "__main__":
    main()
