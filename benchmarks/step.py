# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What a gradient step costs through MCMC, against a hand-written loop and blackjax.

An MLP 784-256-256-10 on N = 60 000 rows of noise, minibatches of 128, one and four vectorized chains. The marginal
cost of a step is the slope between two run lengths of programs that are already compiled; each round measures all
variants in turn, and a ratio is the median of the ratios within rounds.
Run: ``python benchmarks/step.py [--rounds 9]``.
"""

import argparse
import csv
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.pop("CI", None)  # NumPyro switches its progress bar off under CI, and recompiles every run without it

import blackjax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import tqdm
from jax import lax, random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import MCMC

import numpyro_bdl as bdl
from numpyro_bdl.noise import normal

N, BATCH, STEP = 60_000, 128, 1e-8
SHORT, LONG = 20, 120


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (256, 256):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def model(x, y, batch_size=None):
    net = random_flax_module("net", MLP(), dist.Normal(0, 1), input_shape=(784,))
    with numpyro.plate("data", x.shape[0], subsample_size=batch_size):
        logits = net(numpyro.subsample(x, event_dim=1))
        numpyro.sample("y", dist.Categorical(logits=logits), obs=numpyro.subsample(y, event_dim=0))


def energy(params, batch):
    x, y = batch
    log_prob = jax.nn.log_softmax(MLP().apply({"params": params}, x))
    prior = sum(jnp.sum(w**2) for w in jax.tree.leaves(params)) / 2
    return prior - N / BATCH * jnp.sum(jnp.take_along_axis(log_prob, y[:, None], axis=1))


def langevin(draw_noise):
    def step(params, key, x, y):
        key_batch, key_noise = random.split(key)
        rows = random.randint(key_batch, (BATCH,), 0, N)
        gradient = jax.grad(energy)(params, (x[rows], y[rows]))
        noise = draw_noise(key_noise, params)
        return jax.tree.map(lambda w, g, xi: w - STEP * g + jnp.sqrt(2 * STEP) * xi, params, gradient, noise)

    return step


def jax_noise(key, tree):
    leaves, treedef = jax.tree.flatten(tree)
    keys = random.split(key, len(leaves))
    return treedef.unflatten([random.normal(k, w.shape) for k, w in zip(keys, leaves, strict=True)])


def no_noise(key, tree):
    return jax.tree.map(lambda w: 0.0, tree)


def blackjax_step():
    sgld = blackjax.sgld(lambda params, batch: jax.grad(lambda p: -energy(p, batch))(params))

    def step(params, key, x, y):
        key_batch, key_noise = random.split(key)
        rows = random.randint(key_batch, (BATCH,), 0, N)
        # blackjax steps by step_size, not half of it, with noise sqrt(2 step_size)
        return sgld.step(key_noise, params, (x[rows], y[rows]), STEP)

    return step


def scan_runner(step, chains, x, y):
    """A hand-written loop: one compiled scan per run length, data as arguments."""
    params = MLP().init(random.key(0), x[:1])["params"]
    params = jax.tree.map(lambda w: jnp.broadcast_to(w, (chains, *w.shape)), params) if chains > 1 else params

    def run(params, key, x, y, steps):
        def body(params, key):
            if chains > 1:
                moved = jax.vmap(step, in_axes=(0, 0, None, None))(params, random.split(key, chains), x, y)
            else:
                moved = step(params, key, x, y)
            return moved, None

        return lax.scan(body, params, random.split(key, steps))[0]

    run = jax.jit(run, static_argnames="steps")
    return lambda steps: jax.block_until_ready(run(params, random.key(1), x, y, steps))


def mcmc_runner(chains, x, y):
    """The kernel through MCMC: one draw of that many steps."""
    runs = {}

    def run(steps):
        if steps not in runs:
            kernel = bdl.SGLD(model, step_size=STEP, steps_per_draw=steps)
            runs[steps] = MCMC(kernel, num_warmup=0, num_samples=1, num_chains=chains, chain_method="vectorized")
        runs[steps].run(random.key(1), x, y, batch_size=BATCH)
        jax.block_until_ready(runs[steps].last_state.z)

    return run


def seconds(run, steps):
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def measure(chains, rounds, x, y):
    runners = {
        "MCMC(SGLD)": mcmc_runner(chains, x, y),
        "scan, our noise": scan_runner(langevin(normal), chains, x, y),
        "scan, jax.random.normal": scan_runner(langevin(jax_noise), chains, x, y),
        "scan, no noise": scan_runner(langevin(no_noise), chains, x, y),
        "blackjax.sgld in a scan": scan_runner(blackjax_step(), chains, x, y),
    }
    fixed = {}
    for name, run in runners.items():
        fixed[name] = [seconds(run, SHORT), seconds(run, SHORT)]
        run(LONG)
    slopes = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            slopes[name].append(1e3 * (seconds(run, LONG) - seconds(run, SHORT)) / (LONG - SHORT))
    ours = slopes["MCMC(SGLD)"]
    for name, values in slopes.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        first, second = fixed[name]
        yield {
            "chains": chains,
            "variant": name,
            "ms_per_step": round(statistics.median(values), 3),
            "ms_quartiles": " ".join(f"{q:.2f}" for q in np.quantile(values, (0.25, 0.75))),
            "mcmc_ratio": round(ratio, 3),
            f"first_run_of_{SHORT}_s": round(first, 2),
            f"second_run_of_{SHORT}_s": round(second, 2),
        }


def without_bar(x, y):
    """First and second run of MCMC with the progress bar off, which compiles anew every time."""
    kernel = bdl.SGLD(model, step_size=STEP, steps_per_draw=SHORT)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=1, progress_bar=False)

    def run(steps):
        mcmc.run(random.key(1), x, y, batch_size=BATCH)
        jax.block_until_ready(mcmc.last_state.z)

    first, second = seconds(run, SHORT), seconds(run, SHORT)
    return {
        "chains": 1,
        "variant": "MCMC(SGLD), progress_bar=False",
        f"first_run_of_{SHORT}_s": round(first, 2),
        f"second_run_of_{SHORT}_s": round(second, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.csv")
    args = parser.parse_args()
    # the bar itself is not what is measured
    tqdm.tqdm.monitor_interval = 0
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(N, 784)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, N))
    rows = [row for chains in (1, 4) for row in measure(chains, args.rounds, x, y)] + [without_bar(x, y)]
    device = jax.devices()[0].device_kind
    for row in rows:
        row |= {"device": f"{device} x{os.cpu_count()} ({platform.machine()})", "jax": jax.__version__}
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], restval="")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
