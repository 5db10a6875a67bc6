# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""How close each kernel comes to NUTS on a network small enough for NUTS to converge in function space.

A 2-4-2 tanh network with N(0, 1) priors on 100 rows of two moons. Reference: NUTS, 32 chains of 500 draws. Each
kernel: 32 chains, 100 draws, 50 gradient steps to a draw, on the full data and again with minibatches of 20. Predictive
probabilities on a grid of 400 points: agreement (same most probable class) and total variation, beside those of a
second, independent NUTS run, the floor that Monte Carlo error sets. Run: ``python benchmarks/fidelity.py``.
"""

import argparse
import csv
import time
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from arviz_stats.base import array_stats
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import MCMC, NUTS
from sklearn.datasets import make_moons

import numpyro_bdl as bdl
from numpyro_bdl import metrics

CHAINS, DRAWS, STEPS = 32, 100, 50

KERNELS = {
    "SGLD": lambda **kw: bdl.SGLD(model, step_size=1e-3, **kw),
    "SGLD, cyclical": lambda **kw: bdl.SGLD(
        model, step_size=bdl.cyclical(2e-2, steps_per_cycle=500, draws_per_cycle=10, exploration=0.5), **kw
    ),
    "SGHMC": lambda **kw: bdl.SGHMC(model, step_size=1e-3, momentum=0.9, **kw),
    "FlatBasinSGLD, exact": lambda **kw: bdl.FlatBasinSGLD(model, step_size=1e-3, anchor_steps=50, **kw),
    "FlatBasinSGLD, euler": lambda **kw: bdl.FlatBasinSGLD(
        model, step_size=1e-3, anchor_steps=50, coupling="euler", **kw
    ),
    "FlatBasinSGLD, gibbs": lambda **kw: bdl.FlatBasinSGLD(
        model, step_size=1e-3, anchor_steps=50, coupling="gibbs", inner_steps=10, **kw
    ),
    "FlatBasinSGLD, anchor": lambda **kw: bdl.FlatBasinSGLD(
        model, step_size=1e-3, anchor_steps=50, collect_anchor=True, **kw
    ),
    "PerturbedSGLD": lambda **kw: bdl.PerturbedSGLD(model, step_size=1e-3, sigma=0.05, **kw),
    "AveragedSGLD, average": lambda **kw: bdl.AveragedSGLD(model, step_size=1e-3, anchor_steps=50, **kw),
}


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(2)(x)


def model(x, y=None, batch_size=None):
    net = random_flax_module("net", MLP(), dist.Normal(0, 1), input_shape=(2,))
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        rows = numpyro.subsample(x, event_dim=1)
        labels = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=net(rows)), obs=labels)


def predict(mcmc, grid, members="position"):
    """Predictive probabilities on the grid, and the worst R-hat and least ESS of the probability of a class."""
    logits = bdl.PosteriorPredictive(mcmc, members=members, draw_chunk=200, progress_bar=False).functions(grid)["y"]
    first = np.asarray(jax.nn.sigmoid(logits[..., 1] - logits[..., 0]))
    points = range(0, first.shape[-1], 20)
    rhat = max(float(array_stats.rhat(first[..., n])) for n in points)
    ess = min(float(array_stats.ess(first[..., n])) for n in points)
    return metrics.mean_probabilities(logits), rhat, ess


def run(kernel, x, y, *, warmup, draws, key, **kwargs):
    start = time.perf_counter()
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=CHAINS, chain_method="vectorized")
    mcmc.run(random.key(key), x, y, **kwargs)
    jax.block_until_ready(mcmc.last_state)
    return mcmc, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fidelity.csv")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    x, y = make_moons(100, noise=0.2, random_state=0)
    x = x.astype(np.float32)
    grid = np.stack(np.meshgrid(np.linspace(-2, 3, 20), np.linspace(-1.5, 2, 20)), -1).reshape(-1, 2).astype("f4")

    rows = []

    def record(name, minibatch, seed, mcmc, seconds, reference, members="position"):
        probabilities, rhat, ess = predict(mcmc, grid, members)
        rows.append(
            {
                "kernel": name,
                "minibatch": minibatch,
                "seed": seed,
                "agreement": round(metrics.agreement(probabilities, reference), 4),
                "total_variation": round(metrics.total_variation(probabilities, reference), 5),
                "worst_rhat": round(rhat, 3),
                "least_ess": round(ess),
                "seconds": round(seconds, 1),
            }
        )
        print(rows[-1])

    mcmc, _ = run(NUTS(model), x, y, warmup=500, draws=500, key=1000)
    reference, rhat, ess = predict(mcmc, grid)
    print(f"NUTS reference: worst R-hat {rhat:.3f}, least ESS {ess:.0f}")
    for seed in range(args.seeds):
        mcmc, seconds = run(NUTS(model), x, y, warmup=500, draws=500, key=seed)
        record("NUTS", "full", seed, mcmc, seconds, reference)
        for name, make in KERNELS.items():
            for batch_size in (None, 20):
                kernel = make(**({} if "cyclical" in name else {"steps_per_draw": STEPS}))
                mcmc, seconds = run(kernel, x, y, warmup=DRAWS, draws=DRAWS, key=seed, batch_size=batch_size)
                members = "anchor" if name.split(", ")[-1] in ("anchor", "average") else "position"
                record(name, batch_size or "full", seed, mcmc, seconds, reference, members)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
