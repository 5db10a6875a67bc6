# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What prediction costs, against hand-written loops and NumPyro's Predictive.

The logits of an MLP 784-256-256-10 (269 322 weights) at 10 000 rows of noise, for draws of an SGLD chain.

Time: the marginal cost of a draw is the slope between two numbers of draws, of programs that are compiled already; each
round measures all variants in turn, and a ratio is the median of the ratios within rounds. The rest, the first call
with its compilation less the slope, is in a column of its own.

Memory: each variant in a process of its own predicts for 1000 draws. Its peak is that of the resident set from the call
on, which includes the draws (1.08 GB) and the logits (0.4 GB; ``summary`` has none), and what was resident before it is
beside it. Linux alone has this number.

Run: ``python benchmarks/predictive.py [--rounds 5] [--draws 1000]``.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import traverse_util
from jax import lax, random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import MCMC, Predictive

import numpyro_bdl as bdl

ROWS, SHORT, LONG, CHUNK = 10_000, 16, 64, 16


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (256, 256):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def model(x, y=None, batch_size=None):
    net = random_flax_module("net", MLP(), dist.Normal(0, 1), input_shape=(784,))
    with numpyro.plate("data", x.shape[0], subsample_size=batch_size):
        logits = net(numpyro.subsample(x, event_dim=1))
        labels = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.deterministic("logits", logits)
        numpyro.sample("y", dist.Categorical(logits=logits), obs=labels)


def sampled(draws):
    """A chain of so many draws, of which only the number counts here."""
    x, y = random.normal(random.key(1), (64, 784)), jnp.zeros(64, int)
    mcmc = MCMC(bdl.SGLD(model, step_size=1e-4), num_warmup=0, num_samples=draws, progress_bar=False)
    mcmc.run(random.key(0), x, y, batch_size=2)
    return mcmc


def weights(mcmc):
    """The draws as Flax has them, (draw, ...), without a copy."""
    sites = {k: np.asarray(v)[0] for k, v in mcmc.get_samples(group_by_chain=True).items()}
    return traverse_util.unflatten_dict({tuple(k.removeprefix("net/").split(".")): v for k, v in sites.items()})


def apply(parameters, x):
    return MLP().apply({"params": parameters}, x)


@jax.jit
def mapped(parameters, x):
    return lax.map(partial(apply, x=x), parameters)


vectorized = jax.jit(jax.vmap(apply, (0, None)))


def chunks(parameters, x):
    """Chunks of draws, all rows of each."""
    count = len(jax.tree.leaves(parameters)[0])
    parts = [jax.tree.map(lambda w, d=d: w[d : d + CHUNK], parameters) for d in range(0, count, CHUNK)]
    return np.concatenate([np.asarray(vectorized(part, x)) for part in parts])


def variants(mcmc, x):
    """Each variant as a function without arguments; the compiled programs of ours are kept by the object."""
    parameters = weights(mcmc)
    ours = bdl.PosteriorPredictive(mcmc, progress_bar=False)
    posterior = {k: np.asarray(v)[0] for k, v in mcmc.get_samples(group_by_chain=True).items()}
    numpyros = Predictive(model, posterior, return_sites=["logits"])
    compiled = jax.jit(lambda x: numpyros(random.key(0), x)["logits"])
    return {
        "PosteriorPredictive.functions": lambda: ours.functions(x)["y"][0],
        "PosteriorPredictive.summary": lambda: ours.summary(x)["y"],
        "by hand: lax.map over draws": lambda: np.asarray(mapped(parameters, x)),
        f"by hand: vmap over {CHUNK} draws": lambda: chunks(parameters, x),
        "numpyro.infer.Predictive": lambda: np.asarray(numpyros(random.key(0), x)["logits"]),
        "numpyro.infer.Predictive, jitted": lambda: np.asarray(compiled(x)),
    }


def inputs():
    return jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 784)), jnp.float32)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def times(rounds):
    """A row for each variant; all have been checked to give the same logits."""
    x = inputs()
    short, long = (variants(sampled(draws), x) for draws in (SHORT, LONG))
    first = {name: seconds(call) for name, call in short.items()}
    expected = short["by hand: lax.map over draws"]()
    for name, call in short.items():
        if name != "PosteriorPredictive.summary":
            np.testing.assert_allclose(call(), expected, rtol=1e-3, atol=1e-3)
        long[name]()
    slopes = {name: [] for name in short}
    for _ in range(rounds):
        for name in short:
            slopes[name].append(1e3 * (seconds(long[name]) - seconds(short[name])) / (LONG - SHORT))
    ours = slopes["PosteriorPredictive.functions"]
    for name, values in slopes.items():
        yield {
            "variant": name,
            "ms_per_draw": round(statistics.median(values), 2),
            "ms_quartiles": " ".join(f"{q:.1f}" for q in np.quantile(values, (0.25, 0.75))),
            "functions_ratio": round(statistics.median(a / b for a, b in zip(ours, values, strict=True)), 3),
            "first_call_besides_s": round(first[name] - SHORT * statistics.median(values) / 1e3, 2),
        }


def resident(name):
    """``VmRSS`` or ``VmHWM`` of this process, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) / 1e6


def peak(variant, draws):
    """One variant at all draws, in this process."""
    call = variants(sampled(draws), inputs())[variant]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    took = seconds(call)
    print(f"{before:.2f},{resident('VmHWM'):.2f},{took:.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--peak", metavar="VARIANT", help="measure the memory of one variant, in this process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "predictive.csv")
    args = parser.parse_args()
    if args.peak:
        peak(args.peak, args.draws)
        return
    rows = list(times(args.rounds))
    device = f"{jax.devices()[0].device_kind} x{os.cpu_count()} ({platform.machine()})"
    for row in rows:
        command = [sys.executable, __file__, "--draws", str(args.draws), "--peak", row["variant"]]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, most, took = map(float, done.stdout.split(","))
        row |= {"draws": args.draws, "gb_before": before, "gb_peak": most, "seconds_with_compilation": took}
        row |= {"device": device, "jax": jax.__version__, "numpyro": numpyro.__version__}
        print(row, flush=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
