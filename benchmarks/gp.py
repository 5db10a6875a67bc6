# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""gp_posterior_samples beside exact answers, and beside a sparse variational process at equal time.

    NUMPYRO_BDL_DATA=... python benchmarks/gp.py --parts uci --python peers-venv/bin/python
    NUMPYRO_BDL_DATA=... python benchmarks/gp.py --parts exact rows
    python benchmarks/gp.py --parts size
    python benchmarks/gp.py --quick --out somewhere               # a smoke run: numbers that mean nothing

Inputs and outputs are standardized by the rows to train on; kernels are Matérn 3/2 with a lengthscale for each input,
fitted with the noise to the marginal likelihood of 1000 of the rows; 64 samples; minibatches of 512; float32. Seconds
are of the processor, over all cores, of programs that are compiled. Parts, each with a table in benchmarks/results,
gp_*.csv:

``uci``: test RMSE and negative log likelihood, in units of the standardized outputs, of dual descent, conjugate
gradients and the stochastic variational process of GPJax (which learns kernel and noise on, from the same start), each
given the same seconds: 3 for each 1000 rows. The error is the bound that the posterior tells of itself. Data:
uci/{pol,elevators,bike,protein}.npz in the folder that the environment variable NUMPYRO_BDL_DATA names. --python is an
interpreter that has GPJax (pip install gpjax); without it the peer is left out.
``exact``: the same kernel on 4000 of the rows, against a Cholesky decomposition in float64: RMSE of the mean from the
exact one, and its root mean variance to compare with; the ratio of mean variances of samples and exact ones; at the
test inputs. The solvers go on until they say that they are done, dual descent for 4000 steps at most.
``rows``: on those of elevators, what is left by rows of the kernel matrix that were formed.
``size``: seconds and growth of the peak memory by the number of rows, each in a process of its own, of 1000 steps of
dual descent, 20 iterations of conjugate gradients, and a Cholesky decomposition with the same 64 samples; eight inputs.
Memory is that of compilation too, some 100 MB.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from laplace_peers import memory, start_peak
from scipy import linalg

from numpyro_bdl import gp
from numpyro_bdl.linear import ConjugateGradient, DualDescent

RESULTS = Path(__file__).parent / "results"
DATA = ("pol", "elevators", "bike", "protein")
SECONDS = 3.0  # of the processor, for each 1000 rows
SAMPLES = 64
NEVER = 1e-30  # a tolerance
SIZES = (2000, 4000, 8000, 16_000, 40_000)


def write(name: str, rows: list[dict], keys: tuple[str, ...]) -> None:
    """Write rows to a table, in place of those of the same keys, beside the others."""
    path, of = RESULTS / f"gp_{name}.csv", lambda row: tuple(str(row[k]) for k in keys)
    if path.exists():
        new = {of(row) for row in rows}
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if of(row) not in new] + rows
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, list(dict.fromkeys(k for row in rows for k in row)), restval="", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


def show(row: dict) -> dict:
    print("  " + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def significant(x: float, digits: int = 4) -> float:
    return float(f"{x:.{digits}g}")


def split_of(name: str, split: int) -> tuple:
    """Standardized inputs and outputs, to train on and to test."""
    folder = os.environ.get("NUMPYRO_BDL_DATA")
    if not folder:
        raise SystemExit(
            "Set the environment variable NUMPYRO_BDL_DATA to the folder that holds uci/pol.npz and so on."
        )
    with np.load(Path(folder, "uci", f"{name}.npz")) as file:
        x, y = file["x"].astype(float), file["y"].astype(float).ravel()
        test = np.zeros(len(y), bool)
        if "test_index" in file:
            test[file["test_index"][split]] = True
        else:
            test = np.unpackbits(file["test_mask"], axis=0, count=int(file["n_rows"])).astype(bool)[:, split]
    means, scales = x[~test].mean(0), x[~test].std(0)
    x = (x - means) / np.where(scales > 0, scales, 1.0)
    y = (y - y[~test].mean()) / y[~test].std()
    x, y = x.astype(np.float32), y.astype(np.float32)
    return x[~test], y[~test], x[test], y[test]


def kernel_of(x: np.ndarray, y: np.ndarray, quick: bool) -> gp.Hyperparameters:
    start = gp.Matern(lengthscale=jnp.full(x.shape[1], x.shape[1] ** 0.5), nu=1.5)
    settings = {"subset": 100, "num_steps": 3} if quick else {}
    return gp.fit_hyperparameters(random.key(0), start, x, y, 0.3, progress_bar=False, **settings)


def solve(solver, found: gp.Hyperparameters, x, y) -> tuple[gp.GPPosterior, float]:
    """The posterior, and seconds of the processor."""
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The linear systems of the samples are not solved")
        posterior = gp.gp_posterior_samples(
            random.key(1), found.kernel, x, y, found.noise, num_samples=SAMPLES, solver=solver, progress_bar=False,
            batch_size=min(512, len(y)),
        )  # fmt: skip
    jax.block_until_ready(posterior.weights)
    return posterior, time.process_time() - begin


def for_seconds(seconds: float, make, few: int, many: int, found, x, y) -> tuple[gp.GPPosterior, float, int]:
    """As many steps or iterations as take so many seconds."""
    solve(make(few), found, x, y)  # compiles what both have
    spent = [solve(make(few), found, x, y)[1], solve(make(many), found, x, y)[1]]
    each = max((spent[1] - spent[0]) / (many - few), 1e-6)
    steps = max(int((seconds - spent[0]) / each), few)
    posterior, spent = solve(make(steps), found, x, y)
    return posterior, spent, steps


SOLVERS = {
    "dual": (lambda n: DualDescent(steps=n, tolerance=NEVER), 50, 230),
    "cg": (lambda n: ConjugateGradient(tolerance=NEVER, max_iterations=n), 2, 5),
}


def scores(y, mean, variance) -> dict:
    off = np.asarray(y, float) - np.asarray(mean, float)
    variance = np.asarray(variance, float)
    nll = 0.5 * np.mean(np.log(2 * np.pi * variance) + off**2 / variance)
    return {"rmse": significant(np.sqrt(np.mean(off**2))), "nll": significant(nll)}


# ---- uci ------------------------------------------------------------------------------------------------------------


def uci(names: list[str], splits: int, python: str | None, quick: bool) -> None:
    for split in range(splits):
        for name in names:
            x, y, x_test, y_test = (v[:600] if quick else v for v in split_of(name, split))
            print(f"{name}, split {split}, {len(y)} rows")
            found = kernel_of(x, y, quick)
            seconds = 1.0 if quick else SECONDS * len(y) / 1000
            rows = []
            of_run = {"data": name, "split": split, "rows": len(y)}
            for method, setting in SOLVERS.items():
                posterior, spent, steps = for_seconds(seconds, *setting, found, x, y)
                variance = posterior.variance(x_test) + found.noise**2
                row = of_run | {"method": method} | scores(y_test, posterior.mean(x_test), variance)
                rows.append(
                    show(row | {"error": significant(float(posterior.error)), "steps": steps, "cpu_s": round(spent, 1)})
                )
            if python:
                rows.append(show(of_run | variational(python, found, x, y, x_test, y_test, seconds)))
            write("uci", rows, ("data", "split", "method"))


def variational(python: str, found: gp.Hyperparameters, x, y, x_test, y_test, seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        problem, answer = Path(folder, "problem.npz"), Path(folder, "answer.npz")
        kernel = {"lengthscale": found.kernel.lengthscale, "variance": found.kernel.variance, "noise": found.noise}
        np.savez(problem, x=x, y=y, x_test=x_test, seconds=seconds, **kernel)
        script = Path(__file__).with_name("gp_peers.py")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run([python, str(script), str(problem), str(answer)], check=True, env=environment)
        with np.load(answer) as file:
            result = dict(file)
    measured = scores(y_test, result["mean"], result["variance"] + result["noise"] ** 2)
    spent = {"steps": int(result["steps"]), "cpu_s": round(float(result["cpu_s"]), 1)}
    return {"method": "svgp"} | measured | {"error": ""} | spent


# ---- exact answers --------------------------------------------------------------------------------------------------


class Exact:
    """By a Cholesky decomposition, in float64."""

    def __init__(self, found: gp.Hyperparameters, x, y):
        with jax.enable_x64(True):
            self.kernel, self.x = jax.tree.map(partial(np.asarray, dtype=float), found.kernel), np.asarray(x, float)
            covariance = np.array(self.kernel(self.x, self.x))
        covariance[np.diag_indices(len(x))] += found.noise**2
        self.factor = linalg.cho_factor(covariance, lower=True, overwrite_a=True)
        self.weights = linalg.cho_solve(self.factor, np.asarray(y, float))

    def __call__(self, where) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the function."""
        with jax.enable_x64(True):
            across = np.asarray(self.kernel(np.asarray(where, float), self.x))
        half = linalg.solve_triangular(self.factor[0], across.T, lower=True)
        return across @ self.weights, float(self.kernel.variance) - np.sum(half**2, 0)


def few_rows(name: str, quick: bool, count: int = 4000) -> tuple:
    x, y, x_test, y_test = split_of(name, 0)
    keep = np.random.default_rng(0).permutation(len(y))[: 300 if quick else count]
    return x[keep], y[keep], x_test[:1000], y_test[:1000]


def exact(names: list[str], quick: bool) -> None:
    for name in names:
        x, y, x_test, y_test = few_rows(name, quick)
        print(f"{name}, {len(y)} rows")
        found, rows = kernel_of(x, y, quick), []
        begin = time.process_time()
        mean, variance = Exact(found, x, y)(x_test)
        spent = time.process_time() - begin
        first = {"data": name, "rows": len(y), "noise": significant(found.noise)}
        of_exact = {"method": "cholesky"} | scores(y_test, mean, variance + found.noise**2)
        rms = {"root_mean_variance": significant(np.sqrt(variance.mean()))}
        rows.append(
            show(
                first
                | of_exact
                | rms
                | {"mean_off": 0.0, "variance_ratio": 1.0, "error": 0.0, "cpu_s": round(spent, 1)}
            )
        )
        for method, solver in {"dual": DualDescent(steps=4000), "cg": ConjugateGradient()}.items():
            posterior, spent = solve(solver, found, x, y)
            ours, wide = (np.asarray(v, float) for v in (posterior.mean(x_test), posterior.variance(x_test)))
            measured = {"method": method} | scores(y_test, ours, wide + found.noise**2) | rms
            off = {"mean_off": significant(np.sqrt(np.mean((ours - mean) ** 2)))}
            ratio = {"variance_ratio": significant(wide.mean() / variance.mean())}
            told = {"error": significant(float(posterior.error)), "cpu_s": round(spent, 1)}
            rows.append(show(first | measured | off | ratio | told))
        write("exact", rows, ("data", "method"))


def rows_formed(quick: bool) -> None:
    name = "elevators"
    x, y, x_test, _ = few_rows(name, quick)
    found = kernel_of(x, y, quick)
    mean, variance = Exact(found, x, y)(x_test)
    print(f"{name}, {len(y)} rows, rows of the kernel matrix that were formed")
    for method, (make, *_) in SOLVERS.items():
        rows = []
        for passes in (10, 20) if quick else (10, 20, 40, 80, 160, 320):
            # a pass is an iteration
            steps = passes if method == "cg" else passes * len(y) // min(512, len(y))
            posterior, spent = solve(make(steps), found, x, y)
            off = np.sqrt(np.mean((np.asarray(posterior.mean(x_test), float) - mean) ** 2))
            row = {"data": name, "rows": len(y), "method": method, "kernel_rows": passes * len(y)}
            left = {"mean_off": significant(off), "root_mean_variance": significant(np.sqrt(variance.mean()))}
            rows.append(show(row | left | {"error": significant(float(posterior.error)), "cpu_s": round(spent, 1)}))
        write("rows", rows, ("data", "method", "kernel_rows"))


# ---- by size --------------------------------------------------------------------------------------------------------


def size(sizes: tuple[int, ...]) -> None:
    for count in sizes:
        for method in ("dual", "cg", "cholesky"):
            if method == "cholesky" and count > 20_000:
                continue  # 6.4 GB and a minute for each of its copies
            command = [sys.executable, __file__, "--one", method, "--count", str(count), "--out", str(RESULTS)]
            subprocess.run(command, check=True)


def one_size(method: str, count: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 8)).astype(np.float32)
    y = (np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=count)).astype(np.float32)
    found = gp.Hyperparameters(gp.Matern(1.0, 4.0, nu=1.5), 0.3, np.array([]))
    solver = {"dual": DualDescent(steps=1000, tolerance=NEVER), "cg": ConjugateGradient(NEVER, 20)}.get(method)
    run = partial(by_cholesky, found, x, y) if solver is None else lambda: float(solve(solver, found, x, y)[0].error)
    start = start_peak()
    if count <= 4000:
        run()  # compiles; of what takes longer that is little
    begin, clock = time.process_time(), time.perf_counter()
    error = run()
    spent = {"cpu_s": round(time.process_time() - begin, 1), "seconds": round(time.perf_counter() - clock, 1)}
    peak = {"peak_mb": round(memory("VmHWM") - start)}
    work = {"dual": "1000 steps", "cg": "20 iterations", "cholesky": "all of it"}[method]
    row = {"rows": count, "method": method, "work": work} | spent | peak | {"error": significant(error)}
    write("size", [show(row)], ("rows", "method"))


def by_cholesky(found: gp.Hyperparameters, x, y) -> float:
    """Mean and samples at the data, in float32."""
    covariance = np.array(found.kernel(x, x))
    prior = np.random.default_rng(1).normal(size=(len(x), SAMPLES)).astype(np.float32)
    covariance[np.diag_indices(len(x))] += found.noise**2
    factor = linalg.cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
    linalg.cho_solve((factor, True), np.c_[y, factor @ prior], check_finite=False)
    return 0.0


PARTS = ("uci", "exact", "rows", "size")


def main():
    global RESULTS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--python", help="an interpreter that has GPJax")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    RESULTS = args.out
    RESULTS.mkdir(parents=True, exist_ok=True)
    if args.one:
        one_size(args.one, args.count)
        return
    parts = {
        "uci": lambda: uci(args.data, 1 if args.quick else args.splits, args.python, args.quick),
        "exact": lambda: exact(args.data, args.quick),
        "rows": lambda: rows_formed(args.quick),
        "size": lambda: size((500, 1000) if args.quick else SIZES),
    }
    for part in args.parts:
        print(f"# {part}, load {os.getloadavg()[0]:.1f}")
        parts[part]()


if __name__ == "__main__":
    main()
