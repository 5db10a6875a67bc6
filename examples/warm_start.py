# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Chains that start at an ensemble of trained networks, beside chains that start at random, on a noisy sine.

    python examples/warm_start.py              # a little over a minute of processor time
    python examples/warm_start.py --quick      # a smoke run: numbers that mean nothing

Both runs are four chains of NUTS with the same short warm-up. The table and a picture of the predictions are then in
``output/warm_start``.
"""

import argparse
import csv
import time
from pathlib import Path

import arviz as az
import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import linen as nn
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import MCMC, NUTS

import numpyro_bdl as bdl

parser = argparse.ArgumentParser(description="Start chains at trained networks, and at random.")
parser.add_argument("--quick", action="store_true", help="a smoke run: few steps")
parser.add_argument("--output", type=Path, default=Path("output/warm_start"), help="folder for the results")
options = parser.parse_args()

CHAINS, STEPS, WARMUP, DRAWS, DEPTH = (4, 20, 25, 10, 3) if options.quick else (4, 1000, 50, 100, 5)

# ---- data, network and model ----------------------------------------------------------------------------------------

rng = np.random.default_rng(0)
x_train, x_test = (rng.uniform(-3, 3, size=(n, 1)).astype(np.float32) for n in (120, 400))
y_train, y_test = ((np.sin(2 * x) + 0.2 * rng.normal(size=x.shape)).astype(np.float32)[:, 0] for x in (x_train, x_test))


class MLP(nn.Module):
    """1-16-16-1."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.tanh(nn.Dense(16)(x))
        return nn.Dense(1)(x)[..., 0]


def model(x, y=None):
    net = random_flax_module("net", MLP(), dist.Normal(0, 1), input_shape=(1, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("data", len(x)):
        rows = numpyro.subsample(x, event_dim=1)
        numpyro.sample("y", dist.Normal(net(rows), noise), obs=y)


# ---- both starts ----------------------------------------------------------------------------------------------------


def sample(init_params):
    kernel = NUTS(model, max_tree_depth=DEPTH)
    mcmc = MCMC(kernel, num_warmup=WARMUP, num_samples=DRAWS, num_chains=CHAINS, chain_method="vectorized")
    start = time.perf_counter()
    mcmc.run(random.key(1), x_train, y_train, init_params=init_params, extra_fields=("potential_energy",))
    jax.block_until_ready(mcmc.last_state)
    return mcmc, time.perf_counter() - start


start = time.perf_counter()
init, losses = bdl.train_map(
    model, random.key(0), CHAINS, x_train, y_train, num_steps=STEPS, optimizer=optax.adam(0.01)
)
seconds_of_training = time.perf_counter() - start

options.output.mkdir(parents=True, exist_ok=True)
grid = np.linspace(-4, 4, 200, dtype=np.float32)[:, None]
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
table = []
for ax, (name, where, before) in zip(
    axes, [("at random", None, 0.0), ("trained", init, seconds_of_training)], strict=True
):
    mcmc, seconds = sample(where)
    fields = mcmc.get_extra_fields(group_by_chain=True)
    predictive = bdl.PosteriorPredictive(mcmc)
    rhat = az.rhat(bdl.to_datatree(mcmc), group="functions")["y"]
    table.append(
        {
            "chains start": name,
            "first energy": float(fields["potential_energy"][:, 0].mean()),
            "LPPD": bdl.metrics.lppd(predictive.log_likelihood(x_test, y_test)["y"]),
            "median R-hat": float(rhat.median()),
            "worst R-hat": float(rhat.max()),
            "seconds": before + seconds,
        }
    )
    for chain in predictive.functions(grid)["y"].mean(1):
        ax.plot(grid[:, 0], chain)
    ax.plot(x_train[:, 0], y_train, ".", color="0.7", zorder=0)
    ax.set(title=f"chains start {name}: mean of each", xlabel="x", ylabel="y")
figure.savefig(options.output / "warm_start.png", dpi=100)

with open(options.output / "warm_start.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, table[0])
    writer.writeheader()
    writer.writerows(table)

print(f"\nMinibatch energy of the members: {losses[:, 0].mean():.1f} at first, {losses[:, -1].mean():.1f} trained")
for row in [dict(zip(table[0], table[0], strict=True)), *table]:
    print("".join(f"{v:>15.3f}" if isinstance(v, float) else f"{v:>15}" for v in row.values()))
print(f"\nThe table and the picture are in {options.output}")
