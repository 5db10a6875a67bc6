# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""AutoLinearizedLaplace beside dense answers of the same tangent model, and beside other libraries.

    python benchmarks/laplace.py                                    # all parts but peers
    python benchmarks/laplace.py --parts exact em --cache somewhere # keep trained networks and dense answers for later
    python benchmarks/laplace.py --parts peers --python peers-venv/bin/python
    python benchmarks/laplace.py --parts shift --quick --out somewhere  # a smoke run: numbers that mean nothing

Most parts have scikit-learn's digits, 8 x 8, 300 rows to train, and a convolutional network of 104 930 weights (32
channels of 3 x 3 with stride 2, 200 units, 10 classes) with N(0, 1/5) priors, trained by 600 steps of Adam on
minibatches of 128. The dense answer makes its 3000 x 104 930 Jacobian, the Gram matrix and the eigenvalues of that.
Seconds are of programs that are compiled, unless they are named otherwise; those of the processor, over all cores, say
more where the machine is not quiet. Parts, each with a table in benchmarks/results, laplace_*.csv:

``exact``: effective dimension and 500 predictive variances (50 test rows, 10 classes) of each solver against dense
ones.
``em``: the precision that EM finds against the maximum of the dense evidence, and the naive rule, which has the norm of
the trained weights in place of the mode's; for the trained network and for one that was stopped after 60 steps.
``normalization``: a smaller network, whose layers before LayerNorm or BatchNorm are multiplied by 0.1, 1 and 10, which
leaves the function as it is; how much predictive variances change.
``variance``: the variance of minibatch gradients of the two objectives of SGD against the formula that it documents.
``shift``: rotated images; log likelihood, and joint log likelihood of batches of ten rows that have two different
images. MNIST where the environment variable NUMPYRO_BDL_DATA names a folder with mnist.npz, else the digits.
``memory``: bytes that a compiled descent takes, and seconds of a step, by numbers of weights and samples.
``peers``: laplax and laplace-torch at the network of ``exact``. It needs an interpreter that has them: pip install
laplax laplace-torch torch==2.13.0 scikit-learn. Each method runs in a process of its own, whose peak memory is counted
from when its data are loaded.
"""

import argparse
import contextlib
import csv
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from laplace_peers import memory as memory_of_process
from laplace_peers import start_peak
from numpyro.contrib.module import random_flax_module
from numpyro.infer import SVI, Trace_ELBO
from scipy import linalg, ndimage, optimize
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.datasets import load_digits

import numpyro_bdl as bdl
from numpyro_bdl.linear import SGD, ConjugateGradient, DualDescent
from numpyro_bdl.linear.model import Batch
from numpyro_bdl.linear.solvers import sgd as sgd_module
from numpyro_bdl.linear.system import Problem, dots, noise_gradients, prior_draws, products

RESULTS = Path(__file__).parent / "results"
CACHE: Path | None = None
PRECISION = 5.0
CLASSES = 10

# ---- tables and clocks ----------------------------------------------------------------------------------------------


def write(name: str, rows: list[dict], keys: tuple[str, ...] = ()) -> None:
    """Write rows to a table, in place of those of the same keys, beside the others if there are keys."""
    path, of = RESULTS / f"laplace_{name}.csv", lambda row: tuple(str(row[k]) for k in keys)
    if keys and path.exists():
        new = {of(row) for row in rows}
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if of(row) not in new] + rows
    with path.open("w", newline="") as file:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(row: dict) -> dict:
    print("  " + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def significant(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


_COMPILING = {"total": 0.0}


def _listen(event: str, seconds: float, **_):
    if event.startswith("/jax/core/compile/"):
        _COMPILING["total"] += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


class Clock:
    """Seconds of a block: on the clock, of those for tracing and compiling, and of the processor."""

    def __enter__(self):
        self._start = time.perf_counter(), _COMPILING["total"], time.process_time()
        return self

    def __exit__(self, *_):
        now = time.perf_counter(), _COMPILING["total"], time.process_time()
        self.wall, self.compiling, self.processor = (b - a for a, b in zip(self._start, now, strict=True))
        self.load = os.getloadavg()[0]

    @property
    def seconds(self) -> float:
        return max(self.wall - self.compiling, 0.0)


class Enough(Exception):
    """Raised by a report, to end a descent once it is compiled."""


def timed(function, warm_up=None):
    """The value of a function that is compiled, by calling it or by a shorter call, and a clock."""
    with contextlib.suppress(Enough):
        jax.block_until_ready((warm_up or function)())
    with Clock() as clock:
        value = jax.block_until_ready(function())
    return value, clock


def stop(done: float) -> None:
    raise Enough


# ---- the network ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, a hidden layer, and a linear one; each of the first two normalized, if at all, with an epsilon so
    small that the function does not depend on the scale of their weights."""

    norm: str | None = None
    channels: int = 32
    units: int = 200

    @nn.compact
    def __call__(self, x, train: bool = False):
        def normalized(x):
            if self.norm == "LayerNorm":
                return nn.LayerNorm(epsilon=1e-10)(x)
            return nn.BatchNorm(use_running_average=not train, epsilon=1e-10)(x) if self.norm == "BatchNorm" else x

        x = nn.relu(normalized(nn.Conv(self.channels, (3, 3), strides=2)(x)))
        x = x.reshape(*x.shape[:-3], -1)
        x = nn.relu(normalized(nn.Dense(self.units)(x)))
        return nn.Dense(CLASSES)(x)


def make_model(network: Net, precision: float = PRECISION):
    mutable = ["batch_stats"] if network.norm == "BatchNorm" else None

    def model(x, y=None, batch=None, train=False):
        prior = dist.Normal(0, precision**-0.5)
        if mutable:
            net = random_flax_module("net", network, prior, input_shape=(1, *x.shape[1:]), mutable=mutable)
        else:
            net = random_flax_module("net", network, prior, input_shape=(1, *x.shape[1:]))
        with numpyro.plate("data", len(x), subsample_size=batch):
            images = numpyro.subsample(x, event_dim=3)
            logits = net(images, train=train) if mutable else net(images)
            labels = None if y is None else numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", dist.Categorical(logits=logits), obs=labels)

    return model


class Data(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


@cache
def digits() -> Data:
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x, y = np.float32(found.images[order] / 16)[..., None], np.int32(found.target[order])
    return Data(x[:300], y[:300], x[300:], y[300:])


def guide_of(network: Net, **settings) -> bdl.AutoLinearizedLaplace:
    return bdl.AutoLinearizedLaplace(make_model(network), **settings)


@cache
def trained(network: Net, steps: int, data=digits) -> dict[str, Any]:
    """Parameters of SVI, and mutable collections with them."""
    path = (
        None
        if CACHE is None
        else CACHE / f"{network.norm}_{network.channels}_{network.units}_{steps}_{data.__name__}.npz"
    )
    guide, rows = guide_of(network), data()
    svi = SVI(guide.model, guide, optax.adam(1e-3), Trace_ELBO())
    more = {"train": True} if network.norm == "BatchNorm" else {}
    if path and path.exists() and network.norm != "BatchNorm":
        with np.load(path) as file:
            return {"auto_loc": jnp.asarray(file["auto_loc"])}
    result = svi.run(random.key(0), steps, rows.x, rows.y, batch=min(128, len(rows.x)), progress_bar=False, **more)
    params = dict(result.params) | (result.state.mutable_state or {})
    if path and network.norm != "BatchNorm":
        np.savez(path, auto_loc=params["auto_loc"])
    return params


def fit(network: Net, params: dict, rows: Data, /, key: int = 1, batch_size: int | None = None, **settings):
    guide = guide_of(network, **settings)
    return guide.fit(random.key(key), params, rows.x, rows.y, batch_size=batch_size, progress_bar=False)


def nested(weights: dict) -> dict:
    """Sites of a network, as its parameters."""
    layers: dict[str, dict] = {}
    for name, value in weights.items():
        layer, leaf = name.removeprefix("net/").split(".")
        layers.setdefault(layer, {})[leaf] = value
    return layers


def slopes(network: Net, weights: dict, x, changes: dict) -> np.ndarray:
    """J z at inputs for several z: (sample, row, class)."""

    @jax.jit
    def run(weights, changes, x):
        function = lambda w: network.apply({"params": nested(w)}, x)
        return jax.vmap(lambda z: jax.jvp(function, (weights,), (z,))[1])(changes)

    return np.asarray(run(weights, changes, x), float)


# ---- dense answers --------------------------------------------------------------------------------------------------

TEST_ROWS = 50


class Dense(NamedTuple):
    """The tangent model by matrices: n rows and O classes make n O of their rows."""

    weights: np.ndarray
    gram: np.ndarray
    """J J'"""
    eigenvalues: np.ndarray
    """of L' J J' L"""
    projected: np.ndarray
    """J* J' L by the eigenvectors, of the test rows"""
    test: np.ndarray
    """diagonal of J* J*'"""
    outputs: np.ndarray
    """f - J w* at the trained weights w*, of the training rows"""
    seconds: np.ndarray
    """on the clock for the Jacobian, the Gram matrix, a Cholesky decomposition, the eigenvalues"""
    processor: np.ndarray

    def dimension(self, alpha: float) -> float:
        return float(np.sum(self.eigenvalues / (self.eigenvalues + alpha)))

    def variances(self, alpha: float) -> np.ndarray:
        return (self.test - np.sum(self.projected**2 / (self.eigenvalues + alpha), 1)) / alpha


@cache
def dense(steps: int) -> Dense:
    path = None if CACHE is None else CACHE / f"dense_{steps}.npz"
    if path and path.exists():
        with np.load(path) as file:
            return Dense(**file)
    network, rows = Net(), digits()
    weights = guide_median(network, steps)
    flat, unravel = jax.flatten_util.ravel_pytree(weights)

    def function(v, x):
        return network.apply({"params": nested(unravel(v))}, x[None])[0]

    jacobian = jax.jit(jax.vmap(jax.jacrev(function), (None, 0)))
    x = np.concatenate([rows.x, rows.x_test[:TEST_ROWS]])
    jax.block_until_ready(jacobian(flat, x[:25]))
    with Clock() as of_jacobian:
        j = np.concatenate([np.asarray(jacobian(flat, x[i : i + 25])) for i in range(0, len(x), 25)])
        j = j.reshape(-1, len(flat))
    count = len(rows.x) * CLASSES
    f = np.asarray(network.apply({"params": nested(weights)}, rows.x), float)
    p = softmax(f, -1)
    root = np.stack([np.diag(np.sqrt(q)) - np.outer(q, np.sqrt(q)) for q in p])
    with Clock() as of_gram:
        gram = np.zeros((len(j), count))
        for i in range(0, len(flat), 4096):  # float32 within a block, and float64 from block to block
            block = np.ascontiguousarray(j[:, i : i + 4096])
            gram += block @ block[:count].T

    def by_factor(m):
        """m L, for (rows, n O)"""
        return np.einsum("rni,nij->rnj", m.reshape(len(m), -1, CLASSES), root).reshape(len(m), -1)

    curved = by_factor(by_factor(gram[:count]).T)
    with Clock() as of_cholesky:
        linalg.cho_factor(curved + PRECISION * np.eye(count))
    with Clock() as of_eigenvalues:
        values, vectors = linalg.eigh((curved + curved.T) / 2)
    clocks = of_jacobian, of_gram, of_cholesky, of_eigenvalues
    found = Dense(
        np.asarray(flat),
        gram[:count],
        np.maximum(values, 0),
        by_factor(gram[count:]) @ vectors,
        np.sum(j[count:].astype(float) ** 2, 1),
        f.ravel() - j[:count] @ np.asarray(flat),
        np.array([c.wall for c in clocks]),
        np.array([c.processor for c in clocks]),
    )
    if path:
        np.savez(path, **found._asdict())
    return found


def guide_median(network: Net, steps: int) -> dict:
    """The trained weights by site."""
    guide, rows = guide_of(network), digits()
    with numpyro.handlers.seed(rng_seed=0):
        guide._setup_prototype(rows.x, rows.y)
    return guide.median(trained(network, steps))


def compared(estimate: np.ndarray, true: np.ndarray) -> dict:
    """Variances, estimated and true."""
    ratio = estimate.ravel() / true.ravel()
    return {
        "variance_ratio": round(float(estimate.mean() / true.mean()), 4),
        "variance_correlation": round(float(np.corrcoef(estimate.ravel(), true.ravel())[0, 1]), 4),
        "median_abs_log_ratio": round(float(np.median(np.abs(np.log(np.maximum(ratio, 1e-12))))), 4),
    }


# ---- exact ----------------------------------------------------------------------------------------------------------


def exact(quick: bool, chosen: tuple[str, ...] = ("",), most: int = 256) -> None:
    network, rows, truth = Net(), digits(), dense(600)
    gamma, variances = truth.dimension(PRECISION), truth.variances(PRECISION)
    wall, processor = truth.seconds[:3].sum(), truth.processor[:3].sum()
    parts = dict(zip(("jacobian_s", "gram_s", "cholesky_s", "eigenvalues_s"), truth.seconds.round(2), strict=True))
    table = [
        show(
            {
                "solver": "dense",
                "samples": "",
                "effective_dimension": round(gamma, 3),
                "seconds": round(wall, 2),
                "processor_s": round(processor, 2),
                "state_mb": round(4e-6 * 3000 * len(truth.weights), 1),
                **parts,
            }
        )
    ]
    with Clock() as clock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = fit(
            network, trained(network, 600), rows, prior="model", solver=ConjugateGradient(1e-2), num_samples=32
        )
    show({"fit": "cg 1e-2, K 32", "wall": round(clock.wall, 1), "of that compiling": round(clock.compiling, 1)})
    full = posterior.system
    batched = full._replace(rows=jnp.arange(300).reshape(3, 100), weight=jnp.ones((3, 100)))
    weights, size = full.model.weights, len(truth.weights)
    inputs = jnp.asarray(rows.x_test[:TEST_ROWS])
    cases = [
        ("cg, tolerance 1e-1", full, ConjugateGradient(1e-1), 32),
        ("cg, tolerance 1e-2", full, ConjugateGradient(1e-2), 32),
        ("cg, default", full, ConjugateGradient(), 32),
        ("sgd, 100 steps", batched, SGD(steps=100), 32),
        ("sgd, 200 steps", batched, SGD(steps=200), 32),
        ("sgd, default", batched, SGD(), 32),
        ("dual, 100 steps", batched, DualDescent(steps=100), 32),
        ("dual, 200 steps", batched, DualDescent(steps=200), 32),
        ("dual, default", batched, DualDescent(), 32),
        ("cg, tolerance 1e-2", full, ConjugateGradient(1e-2), 256),
    ]
    some = [case for case in cases if case[0].startswith(chosen) and case[3] <= most]
    for name, system, solver, count in cases[1:2] if quick else some:
        draws = prior_draws(random.key(3), weights, count)
        noise, of_noise = timed(partial(noise_gradients, full, count))
        problem = Problem(draws, noise, noisy=True)
        solve = partial(solver.solve, system, problem, draws, random.key(2))
        # the longest run is not made twice; its seconds are less those of compilation
        warm_up = (lambda: 0) if count > 32 else None if "cg" in name else partial(solve, stop)
        x, of_solution = timed(solve, warm_up)
        curved, of_product = timed(partial(products, full, x))
        missing = jax.tree.map(lambda x, m, b: x + m - b, x, curved, problem.total)
        norms = [sum(dots(v, v).values()) for v in (missing, problem.total)]
        residual = float(jnp.max(jnp.sqrt(norms[0] / norms[1])))
        estimate = float(sum(jnp.mean(d) for d in dots(x, curved).values()))
        bound = 4 * math.sqrt(2 / (count * gamma))
        clocks = of_noise, of_solution, of_product
        seconds, of_processor = sum(c.seconds for c in clocks), sum(c.processor for c in clocks)
        error = estimate / gamma - 1
        state = 4e-6 * size * count * solver.vectors
        row = {"solver": name, "samples": count, "residual": f"{residual:.1e}"}
        row |= {"effective_dimension": round(estimate, 2), "relative_error": round(error, 4), "bound": round(bound, 4)}
        functions = slopes(network, weights, inputs, full.whiten(x))
        row |= compared(np.mean(functions**2, 0), variances)
        row |= {"noise_s": round(of_noise.seconds, 2), "solution_s": round(of_solution.seconds, 2)}
        row |= {"seconds": round(seconds, 2), "processor_s": round(of_processor, 2)}
        row |= {"times_dense": round(seconds / wall, 3), "processor_times_dense": round(of_processor / processor, 3)}
        row |= {"state_mb": round(state, 1), "load": round(of_solution.load, 1)}
        row["goal"] = "met" if abs(error) < bound and state <= 63 and seconds <= wall / 4 else "NOT met"
        table.append(show(row))
        write("exact", table, ("solver", "samples"))
    floor = {k: round(0.674 * math.sqrt(2 / k), 3) for k in (32, 256)}
    print(f"  median |log ratio| of variances by Monte Carlo alone, by samples: {floor}")


# ---- em -------------------------------------------------------------------------------------------------------------


class Evidence:
    """The dense evidence of the linear model, and the maximum of it."""

    def __init__(self, truth: Dense, labels: np.ndarray):
        self.truth, self.one_hot = truth, np.eye(CLASSES)[labels]
        self.dual = np.zeros(truth.gram.shape[0])  # of the mode: w = J' u / alpha
        self.alpha = 1.0
        self.norm_of_weights = float(np.sum(truth.weights.astype(float) ** 2))

    def mode(self, alpha: float) -> tuple[float, float]:
        """Log likelihood and squared norm of the mode, by Newton's method on its dual."""
        gram, u = self.truth.gram, self.dual
        u = u * (alpha / self.alpha)  # the same mode
        identity = np.eye(len(u))

        def at(u):
            h = (self.truth.outputs + gram @ u / alpha).reshape(-1, CLASSES)
            likelihood = float(np.sum(self.one_hot * log_softmax(h, -1)))
            return h, likelihood, likelihood - u @ gram @ u / (2 * alpha)

        h, likelihood, value = at(u)
        for _ in range(40):
            p = softmax(h, -1)
            fault = (self.one_hot - p).ravel() - u
            curved = gram.reshape(-1, CLASSES, len(u))
            curved = p[..., None] * (curved - np.einsum("ni,nij->nj", p, curved)[:, None])  # Lam J J'
            step = linalg.solve(identity + curved.reshape(len(u), -1) / alpha, fault)
            t = 1.0
            while t > 1e-6 and at(u + t * step)[2] < value - 1e-9 * abs(value):
                t /= 2
            u = u + t * step
            before = value
            h, likelihood, value = at(u)
            if abs(value - before) < 1e-6 * abs(value):
                break
        self.dual, self.alpha = u, alpha
        return likelihood, float(u @ gram @ u / alpha**2)

    def at(self, alpha: float) -> tuple[float, float]:
        """The log evidence, and half the slope of it in log alpha."""
        likelihood, norm = self.mode(alpha)
        log_det = float(np.sum(np.log1p(self.truth.eigenvalues / alpha)))
        return likelihood - (alpha * norm + log_det) / 2, self.truth.dimension(alpha) - alpha * norm

    def maximum(self, grid: np.ndarray, slopes_at: list[float]) -> float:
        """Where the slope falls through zero, between points of a grid."""
        crossing = [n for n in range(len(grid) - 1) if slopes_at[n] > 0 >= slopes_at[n + 1]]
        if not crossing:
            return math.nan
        n = crossing[0]
        logs = np.log(grid[n : n + 2])
        return math.exp(optimize.brentq(lambda a: self.at(math.exp(a))[1], *logs, xtol=2e-2))

    def naive(self, norm: float) -> float:
        """The fixed point of alpha = gamma / norm."""
        f = lambda a: self.truth.dimension(math.exp(a)) - math.exp(a) * norm
        return math.exp(optimize.brentq(f, -25, 25))


def em(quick: bool) -> None:
    network, rows = Net(), digits()
    table, curves = [], []
    for steps in (600,) if quick else (600, 60):
        truth = dense(steps)
        evidence = Evidence(truth, rows.y)
        grid = np.geomspace(100, 0.1, 3 if quick else 7)[::-1]
        values = [evidence.at(a) for a in grid[::-1]][::-1]  # from the strongest prior, each from the last
        # in log alpha the evidence rises where gamma is more than alpha |w|^2
        best = evidence.maximum(grid, [v[1] for v in values])
        curves += [
            {"steps": steps, "precision": significant(a), "log_evidence": round(v[0], 3)}
            for a, v in zip(grid, values, strict=True)
        ]
        write("em_evidence", curves)
        top, gamma = evidence.at(best)[0], truth.dimension(best)
        naive = evidence.naive(evidence.norm_of_weights)
        base = {"steps": steps}
        label = {
            "rule": "dense maximum",
            "precision": significant(best),
            "effective_dimension": round(gamma, 2),
            "log_evidence": round(top, 2),
        }
        table.append(show(base | label))
        below = {"log10_ratio": round(math.log10(naive / best), 4), "log_evidence": round(evidence.at(naive)[0], 2)}
        label = {
            "rule": "naive fixed point, dense",
            "precision": significant(naive),
            "effective_dimension": round(truth.dimension(naive), 2),
        }
        table.append(show(base | label | below))
        solvers = {"cg": (ConjugateGradient(1e-2), None), "sgd, 200 steps": (SGD(steps=200), 100)}
        for name, (solver, batch) in list(solvers.items())[: 2 if steps == 600 and not quick else 1]:
            with Clock() as clock, warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                settings = {
                    "prior": "isotropic",
                    "em_steps": 10,
                    "em_tolerance": 0.02,
                    "num_samples": 16,
                    "solver": solver,
                }
                posterior = fit(network, trained(network, steps), rows, batch_size=batch, **settings)
            found = posterior.prior_precision["weights"]
            reached = truth.dimension(found)
            error = posterior.effective_dimension / reached - 1
            distance = math.log10(found / best)
            row = {"rule": f"EM, {name}", "precision": significant(found)}
            row |= {"effective_dimension": round(posterior.effective_dimension, 2)}
            row |= {"log10_ratio": round(distance, 4), "log_evidence": round(evidence.at(found)[0], 2)}
            row |= {"dimension_error": round(error, 4), "bound": round(2 * math.sqrt(2 / (16 * reached)), 4)}
            row |= {"residual": f"{posterior.residual:.1e}", "em_steps": len(posterior.history["residual"]) - 1}
            row |= {"path": " ".join(f"{a:.3g}" for a in posterior.history["prior_precision"][:, 0])}
            row |= {
                "seconds": round(clock.seconds, 1),
                "compiling_s": round(clock.compiling, 1),
                "load": round(clock.load, 1),
            }
            row |= {"goal": "met" if abs(distance) < 0.1 else "NOT met"}
            row |= {"warnings": " | ".join(str(w.message)[:60] for w in said if w.category is UserWarning)}
            table.append(show(base | row))
            write("em", table)
    write("em", table)


# ---- normalization --------------------------------------------------------------------------------------------------


def rescaled(network: Net, params: dict, factor: float, rows: Data) -> dict:
    """Parameters with the layers before normalizations multiplied, and the statistics of BatchNorm with them."""
    guide = guide_of(network)
    more = {"train": True} if network.norm == "BatchNorm" else {}
    with numpyro.handlers.seed(rng_seed=0):
        guide._setup_prototype(rows.x, rows.y, **more)
    weights = guide.median(params)
    moved = {k: w * (factor if k.startswith(("net/Conv_0.", "net/Dense_0.")) else 1) for k, w in weights.items()}

    def statistics(path, value):
        leaf = path[-1].key
        return value * {"mean": factor, "var": factor**2}.get(leaf, 1)

    mutable = {k: jax.tree_util.tree_map_with_path(statistics, v) for k, v in params.items() if k != "auto_loc"}
    return mutable | {"auto_loc": guide._flat(moved)}


def normalization(quick: bool, chosen: tuple[str, ...] = ("",)) -> None:
    rows, table = digits(), []
    small = rows._replace(x_test=rows.x_test[:TEST_ROWS])
    priors = {
        "shared, fixed": {"prior": "model"},
        "shared, EM": {"prior": "per_group", "groups": {"all": lambda name: True}},
        "of each layer, EM": {"prior": "isotropic"},
        "g, EM": {"prior": "g"},
    }
    for norm in ("LayerNorm", "BatchNorm"):
        network = Net(norm, 8, 50)
        params = trained(network, 100 if quick else 600)
        for name, settings in priors.items():
            if not name.startswith(chosen):
                continue
            found = {}
            for factor in (1.0, 10.0) if quick else (1.0, 0.1, 10.0):
                with Clock() as clock, warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    posterior = fit(
                        network,
                        rescaled(network, params, factor, rows),
                        rows,
                        solver=ConjugateGradient(1e-2),
                        num_samples=32,
                        em_samples=32,
                        **settings,
                    )
                predictive = bdl.PosteriorPredictive(posterior, progress_bar=False)
                logits = predictive.functions(small.x_test)["y"][0].astype(float)
                centre = predictive_mean(posterior, small.x_test)
                found[factor] = np.mean((logits - centre) ** 2, 0), centre
                change = np.log(found[factor][0] / found[1.0][0])
                row = {"norm": norm, "prior": name, "factor": factor, "parameters": network_size(posterior)}
                row |= {"largest_change_of_outputs": f"{np.abs(centre - found[1.0][1]).max():.1e}"}
                row |= {"variance_ratio": significant(math.exp(np.median(change)), 3)}
                row |= {"largest_abs_log_ratio": round(float(np.abs(change).max()), 4)}
                row |= {"effective_dimension": round(posterior.effective_dimension, 2)}
                row |= {
                    "residual": f"{posterior.residual:.1e}",
                    "warned_of_scale": any("scale of the weights" in str(w.message) for w in said),
                }
                row |= {"em_steps": len(posterior.history["residual"]) - 1, "clipped": posterior.clipped}
                row |= {
                    "precision": " ".join(
                        f"{k.removeprefix('net/')}:{v:.3g}" for k, v in posterior.prior_precision.items()
                    )
                }
                row |= {
                    "seconds": round(clock.seconds, 1),
                    "compiling_s": round(clock.compiling, 1),
                    "load": round(clock.load, 1),
                }
                table.append(show(row))
                write("normalization", table, ("norm", "prior", "factor"))


def network_size(posterior) -> int:
    return sum(w.size for w in posterior.system.model.weights.values())


def predictive_mean(posterior, x) -> np.ndarray:
    """Outputs of the trained network, by a posterior of one sample that is its center."""
    center = {k: w[None] for k, w in posterior.loc.items()}
    predictive = bdl.PosteriorPredictive(replace(posterior, samples=center), progress_bar=False)
    return predictive.functions(x)["y"][0, 0].astype(float)


# ---- variance -------------------------------------------------------------------------------------------------------


def variance(quick: bool) -> None:
    network = Net(None, 4, 10)
    rows = Data(digits().x[:60], digits().y[:60], digits().x_test, digits().y_test)
    params = trained(network, 300, sixty)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        system = fit(network, params, rows, prior="model", solver=ConjugateGradient(1e-2), num_samples=2).system
    weights = system.model.weights
    flat, unravel = jax.flatten_util.ravel_pytree(weights)
    f = lambda v: network.apply({"params": nested(unravel(v))}, rows.x)
    j = np.asarray(jax.jacrev(f)(flat), float)
    p = softmax(np.asarray(f(flat), float), -1)
    root = np.stack([np.diag(np.sqrt(q)) - np.outer(q, np.sqrt(q)) for q in p])
    features = np.einsum("nji,njp->nip", root, j)  # L' J of each row
    count, samples, table = len(rows.x), 64 if quick else 256, []

    @jax.jit
    def squares(system, x, draws):
        """Squared norms of all minibatches' gradients of one row, less their mean, for both objectives, by sample."""

        def of_row(row):
            batch = system.model.at(Batch(row[None], jnp.full(1, float(count)), jnp.ones(()) / count))
            g = system.model.map(partial(system.product, batch), x)
            e = system.noise_gradient(batch, samples)
            return jax.tree.map(jnp.subtract, g, e), g

        found = lax.map(of_row, jnp.arange(count))
        return [sum(jnp.sum(jnp.mean(jnp.var(w, 0), 0)) for w in part.values()) for part in found]

    for alpha in np.geomspace(1e-4, 1e3, 3 if quick else 8):
        scale = {k: jnp.full_like(s, alpha**-0.5) for k, s in system.scale.items()}
        scaled = system._replace(scale=scale)
        a = features / math.sqrt(alpha)
        flat_features = a.reshape(-1, a.shape[-1])
        m = flat_features.T @ flat_features
        h = m + np.eye(len(m))
        draws = prior_draws(random.key(1), weights, samples)
        b = jax.tree.map(jnp.add, draws, noise_gradients(scaled, samples))
        b = np.asarray(jax.vmap(lambda v: jax.flatten_util.ravel_pytree(v)[0])(b), float)
        x = jax.vmap(unravel)(jnp.asarray(linalg.solve(h, b.T, assume_a="pos").T, flat.dtype))
        original, transformed = map(float, squares(scaled, x, draws))
        inverse = linalg.inv(h)
        left = np.einsum("nip,njp->nij", a, a)  # of each row, F_i F_i'
        middle = np.einsum("nip,pq,njq->nij", a, inverse, a)
        of_transformed = count * np.einsum("nij,nij", left, middle) - np.trace(m @ inverse @ m)
        of_original = of_transformed + (count - 1) * np.trace(m) - 2 * of_transformed
        gamma = np.trace(m @ inverse)
        row = {"precision": significant(alpha), "effective_dimension": round(gamma, 2)}
        row |= {"leverage": round(gamma / (count * CLASSES), 4)}
        row |= {
            "measured_ratio": significant(original / transformed),
            "formula_ratio": significant(of_original / of_transformed),
        }
        row |= {"measured_transformed": significant(transformed), "formula_transformed": significant(of_transformed)}
        table.append(show(row))
    write("variance", table)


@cache
def sixty() -> Data:
    rows = digits()
    return Data(rows.x[:60], rows.y[:60], rows.x_test, rows.y_test)


# ---- shift ----------------------------------------------------------------------------------------------------------


@cache
def images() -> Data:
    """MNIST at 14 x 14, 500 rows to train and 500 to test, or the digits."""
    if not os.environ.get("NUMPYRO_BDL_DATA"):
        return digits()._replace(x_test=digits().x_test[:500], y_test=digits().y_test[:500])
    with np.load(Path(os.environ["NUMPYRO_BDL_DATA"]) / "mnist.npz") as file:
        small = lambda x: np.float32(x.reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255)[..., None]
        x, y, x_test, y_test = (file[k] for k in ("x_train", "y_train", "x_test", "y_test"))
        return Data(small(x[:500]), np.int32(y[:500]), small(x_test[:500]), np.int32(y_test[:500]))


def joint(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Joint log likelihood of a row, for batches of ten rows that are copies of two; (sample, row, class)."""
    rng = np.random.default_rng(0)
    of_label = log_probabilities[:, np.arange(len(labels)), labels]
    total = []
    for _ in range(1000):
        pair = rng.choice(len(labels), 2, replace=False)
        total.append(of_label[:, pair[rng.integers(0, 2, 10)]].sum(1))
    return float(np.mean(logsumexp(np.array(total), 1) - math.log(len(log_probabilities))) / 10)


def shift(quick: bool) -> None:
    rows, network = images(), Net(None, 8, 32)
    params = trained(network, 200 if quick else 1000, images)
    name = "MNIST, 14 x 14" if os.environ.get("NUMPYRO_BDL_DATA") else "digits"
    methods = {
        "MAP": None,
        "last layer, EM": {"prior": "isotropic", "params": "last_layer"},
        "isotropic, EM": {"prior": "isotropic"},
        "g, EM": {"prior": "g"},
    }
    angles = (0, 90) if quick else (0, 15, 30, 45, 60, 90, 120, 150, 180)
    turned = {a: np.float32(ndimage.rotate(rows.x_test, a, (1, 2), reshape=False, order=1)) for a in angles}
    table, posterior = [], None
    solver = DualDescent(steps=50 if quick else 5000)
    for method, settings in methods.items():
        with Clock() as clock, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if settings:
                posterior = fit(
                    network, params, rows, batch_size=100, solver=solver, num_samples=32, em_steps=4, **settings
                )
        about = {}
        if settings:
            about = {"precision": " ".join(f"{a:.3g}" for a in posterior.prior_precision.values())}
            about |= {
                "effective_dimension": round(posterior.effective_dimension, 1),
                "residual": f"{posterior.residual:.1e}",
            }
            show(
                {
                    "method": method,
                    **about,
                    "em_steps": len(posterior.history["residual"]) - 1,
                    "seconds": round(clock.seconds, 1),
                    "compiling": round(clock.compiling, 1),
                    "load": round(clock.load, 1),
                }
            )
            for w in said:
                print("    " + str(w.message)[:160])
        for angle, x in turned.items():
            if settings:
                logits = bdl.PosteriorPredictive(posterior, progress_bar=False).functions(x)["y"][0].astype(float)
            else:
                guide = guide_of(network)
                with numpyro.handlers.seed(rng_seed=0):
                    guide._setup_prototype(rows.x, rows.y)
                logits = np.asarray(network.apply({"params": nested(guide.median(params))}, x), float)[None]
            logs = log_softmax(logits, -1)
            mixture = logsumexp(logs, 0) - math.log(len(logs))
            row = {"data": name, "method": method, "angle": angle}
            row |= {"accuracy": round(float(np.mean(mixture.argmax(-1) == rows.y_test)), 4)}
            row |= {"log_likelihood": round(float(np.mean(mixture[np.arange(len(rows.y_test)), rows.y_test])), 4)}
            row |= {"joint_log_likelihood": round(joint(logs, rows.y_test), 4)}
            table.append(row | about)
            show(row)
        write("shift", table, ("data", "method", "angle"))


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(quick: bool) -> None:
    rows, table = digits(), []
    for channels, units in ((8, 20),) if quick else ((8, 50), (32, 200), (64, 1000)):
        network = Net(None, channels, units)
        guide = guide_of(network)
        with numpyro.handlers.seed(rng_seed=0):
            guide._setup_prototype(rows.x, rows.y)
        params = {"auto_loc": guide._init_latent}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            solver = ConjugateGradient(max_iterations=1)
            system = fit(network, params, rows, batch_size=100, prior="model", solver=solver, num_samples=2).system
        weights = system.model.weights
        size = sum(w.size for w in weights.values())
        for count in (8,) if quick else (8, 64):
            draws = prior_draws(random.key(0), weights, count)
            problem = Problem(draws, jax.tree.map(jnp.zeros_like, draws), noisy=True)
            solver = SGD()
            state = sgd_module._start(solver, draws)
            step = partial(
                sgd_module._advance.lower, solver, "transformed", system, problem, state, random.key(1), 1e-9
            )
            compiled = step((0, 1), (0, 1)).compile()
            found = compiled.memory_analysis()
            run = lambda n: jax.block_until_ready(compiled(system, problem, state, random.key(1), 1e-9, (0, n), (0, n)))  # noqa: B023
            slopes_of, long = [], 6 if size > 1e6 else 22
            for _ in range(3):
                begin = time.perf_counter()
                run(2)
                middle = time.perf_counter()
                run(long)
                slopes_of.append((time.perf_counter() - 2 * middle + begin) / (long - 2))
            vector = 4e-6 * size
            row = {"parameters": size, "samples": count, "state_mb": round(vector * count * solver.vectors, 1)}
            row |= {
                "compiled_mb": round(
                    (found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes) / 1e6, 1
                )
            }
            row |= {"of_that_temporary_mb": round(found.temp_size_in_bytes / 1e6, 1)}
            row |= {
                "vectors": round(
                    (found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes)
                    / 1e6
                    / vector
                    / count,
                    1,
                )
            }
            row |= {"weights_by_weights_mb": round(4e-6 * size**2, 1), "jacobian_mb": round(4e-6 * size * 3000, 1)}
            row |= {
                "seconds_of_a_step": significant(statistics.median(slopes_of), 3),
                "load": round(os.getloadavg()[0], 1),
            }
            table.append(show(row | {"what": "measured"}))
            write("memory", table)
    size = 25_557_032
    for count in (6, 64):
        vector = 4e-6 * size
        row = {"parameters": size, "samples": count, "state_mb": round(vector * count * SGD().vectors)}
        row |= {"weights_by_weights_mb": round(4e-6 * size**2), "jacobian_mb": round(4e-6 * size * 1.281167e9)}
        table.append(show(row | {"what": "ResNet-50, arithmetic"}))
    write("memory", table)


# ---- peers ----------------------------------------------------------------------------------------------------------

PEERS = (
    "torch diag all",
    "torch kron all",
    "torch full last_layer",
    "torch kron last_layer",
    "laplax lanczos 20",
    "laplax lanczos 100",
    "laplax diagonal",
)
OURS = {"numpyro_bdl cg": (ConjugateGradient(1e-2), None), "numpyro_bdl sgd": (SGD(steps=200), 100)}


def ours(method: str, problem: str, answer: str) -> None:
    """What laplace_peers.py does for the others."""
    rows, (solver, batch) = digits(), OURS[method]
    with np.load(problem) as file:
        params, x_test = {"auto_loc": jnp.asarray(file["auto_loc"])}, file["x_test"]
    start, begin, processor = start_peak(), time.perf_counter(), time.process_time()
    posterior = fit(Net(), params, rows, batch_size=batch, prior="model", solver=solver, num_samples=32)
    fitted = time.perf_counter()
    logits = bdl.PosteriorPredictive(posterior, progress_bar=False).functions(x_test)["y"][0].astype(float)
    end = time.perf_counter()
    with np.load(problem) as file:
        variances = np.mean((logits - file["outputs_test"]) ** 2, 0)
    np.savez(
        answer,
        variances=variances,
        fit_s=fitted - begin,
        predict_s=end - fitted,
        peak_mb=memory_of_process("VmHWM") - start,
        processor_s=time.process_time() - processor,
        compiling_s=_COMPILING["total"],
        load=os.getloadavg()[0],
    )


def peers(python: str | None, limit: float) -> None:
    if not python:
        raise SystemExit("peers needs --python, an interpreter that has laplax and laplace-torch.")
    truth, rows, network = dense(600), digits(), Net()
    variances = truth.variances(PRECISION)
    weights = {k: np.asarray(w) for k, w in guide_median(network, 600).items()}
    x_test = rows.x_test[:TEST_ROWS]
    here, table = Path(__file__).parent, []
    with tempfile.TemporaryDirectory() as folder:
        problem, answer = str(Path(folder) / "problem.npz"), str(Path(folder) / "answer.npz")
        outputs = np.asarray(network.apply({"params": nested(weights)}, x_test))
        np.savez(
            problem,
            x=rows.x,
            y=rows.y,
            x_test=x_test,
            precision=PRECISION,
            outputs_test=outputs,
            auto_loc=trained(network, 600)["auto_loc"],
            **weights,
        )
        for method in (*PEERS, *OURS):
            command = [python, "-P", str(here / "laplace_peers.py"), method, problem, answer]
            if method in OURS:  # last
                command = [sys.executable, __file__, "--ours", method, problem, answer]
            row = {"method": method}
            try:
                subprocess.run(command, check=True, timeout=limit, capture_output=True, text=True)
            except subprocess.TimeoutExpired:
                row["outcome"] = f"stopped after {limit:.0f} s"
            except subprocess.CalledProcessError as error:
                row["outcome"] = (error.stderr.strip().splitlines() or ["failed"])[-1][:200]
            else:
                with np.load(answer) as found:
                    found = dict(found)
                estimate = found["variances"].reshape(-1)
                row |= {"outcome": "done", **compared(estimate, variances)}
                row |= {k: round(float(v), 2) for k, v in found.items() if k != "variances"}
            table.append(show(row))
            write("peers", table)


# ---- the command ----------------------------------------------------------------------------------------------------

PARTS = ("exact", "em", "normalization", "variance", "shift", "memory", "peers")


def main():
    global RESULTS, CACHE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    parser.add_argument("--cache", type=Path, help="a folder for trained networks and dense answers")
    parser.add_argument("--quick", action="store_true", help="a smoke run, with tables in --out alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--cases", nargs="+", default=("",), help="beginnings of names: solvers of exact, priors of normalization"
    )
    parser.add_argument("--samples", type=int, default=256, help="most samples of exact")
    parser.add_argument("--python", help="for peers: an interpreter that has them")
    parser.add_argument("--limit", type=float, default=120, help="for peers: seconds for each")
    parser.add_argument("--ours", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        return ours(*args.ours)
    if args.quick and args.out == RESULTS:
        raise SystemExit("--quick means nothing for benchmarks/results: give another folder as --out.")
    RESULTS, CACHE = args.out, args.cache
    calls = {
        "exact": lambda: exact(args.quick, tuple(args.cases), args.samples),
        "normalization": lambda: normalization(args.quick, tuple(args.cases)),
        "peers": lambda: peers(args.python, args.limit),
    }
    for part in args.parts:
        begin = time.perf_counter()
        print(f"{part}:", flush=True)
        calls.get(part, lambda: globals()[part](args.quick))()  # noqa: B023
        print(f"{part}: {time.perf_counter() - begin:.1f} s, load {os.getloadavg()[0]:.1f}\n", flush=True)


if __name__ == "__main__":
    main()
