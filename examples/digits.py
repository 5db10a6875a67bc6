# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Two Bayesian neural networks on scikit-learn's digits, each sampled by every kernel at the same number of gradients.

    make demo                              # two to three minutes on two cores
    python examples/digits.py --quick      # a smoke run: one network, few steps, numbers that mean nothing

The networks learn the digits 0 to 7; the 8s and 9s among the test images are kept apart, as inputs that no class fits.
In ``output/digits`` are then the draws of each run, an ArviZ DataTree in a netCDF file; the table as a CSV file; and a
page of pictures, ``digits.png``.
"""

import argparse
import csv
import time
from pathlib import Path
from typing import NamedTuple

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import linen as nn
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.handlers import seed, substitute, trace
from numpyro.infer import MCMC, SVI, Trace_ELBO, init_to_sample
from numpyro.infer.autoguide import AutoDelta
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import numpyro_bdl as bdl
from numpyro_bdl import detection, metrics, plots, uncertainty

parser = argparse.ArgumentParser(description="Compare the kernels on scikit-learn's digits.")
parser.add_argument("--quick", action="store_true", help="a smoke run: one network, few steps")
parser.add_argument("--output", type=Path, default=Path("output/digits"), help="folder for the results")
options = parser.parse_args()

# ---- the data: split first, then take 8 and 9 away ------------------------------------------------------------------

x, y = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(
    (x / 16).astype(np.float32), y.astype(np.int32), test_size=450, random_state=0
)
x_train, y_train = x_train[y_train < 8], y_train[y_train < 8]
is_out = y_test >= 8

# ---- the networks: plain Flax ---------------------------------------------------------------------------------------


class MLP(nn.Module):
    """64-64-8."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(8)(x)


class ConvNet(nn.Module):
    """8x8x1, then 4x4x8, 2x2x16 and 8, by convolutions of 3x3 pixels with stride 2."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 8, 8, 1)
        for features in (8, 16):
            x = nn.relu(nn.Dense(features)(neighbourhoods(x)))
        return nn.Dense(8)(x.reshape(len(x), -1))


def neighbourhoods(x):
    """The 3x3 pixels around every other pixel: a dense layer of them is a convolution. Chains that run side by side
    make of nn.Conv a grouped convolution, which on a CPU is twenty times slower."""
    n = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, i : i + n : 2, j : j + n : 2] for i in range(3) for j in range(3)], -1)


# ---- the model: plain NumPyro ---------------------------------------------------------------------------------------


def prior(name, shape):
    """Weights of variance 16 / fan-in and biases of variance 1. The logits of a draw from it have a standard deviation
    of 6 (MLP) and 12 (conv net). With 2 / fan-in, as networks are initialized, it is 1.5: no draw is sure of a digit.
    """
    return dist.Normal(0, 4 / np.sqrt(np.prod(shape[:-1])) if name.endswith("kernel") else 1.0)


def make_model(network):
    def model(x, y=None, *, batch_size=None):
        net = random_flax_module("net", network, prior, input_shape=(1, 64))
        with numpyro.plate("data", len(x), subsample_size=batch_size):
            x = numpyro.subsample(x, event_dim=1)
            y = None if y is None else numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", dist.Categorical(logits=net(x)), obs=y)

    return model


# ---- the methods ----------------------------------------------------------------------------------------------------

BATCH, CHAINS = 64, 4
STEPS, WARMUP, DRAWS = (5, 10, 20) if options.quick else (40, 50, 200)
GRADIENTS = STEPS * (WARMUP + DRAWS)


class Fit(NamedTuple):
    logits: np.ndarray  # (chain, draw, row, class) of all test images
    gradients: int  # minibatch gradients in each chain
    seconds: float  # compilation included
    tree: object = None  # the draws


def sampler(kernel, **settings):
    """A method: a kernel of numpyro_bdl, run in four chains."""

    def fit(model):
        lengths = {"num_warmup": WARMUP, "num_samples": DRAWS, "num_chains": CHAINS}
        mcmc = MCMC(kernel(model, **settings), **lengths, chain_method="vectorized")
        start = time.perf_counter()
        mcmc.run(random.key(0), x_train, y_train, batch_size=BATCH)
        jax.block_until_ready(mcmc.last_state)
        seconds = time.perf_counter() - start
        members = "both" if "z_anchor" in mcmc.get_extra_fields() else "position"
        predictive = bdl.PosteriorPredictive(mcmc, members=members)
        return Fit(predictive.functions(x_test)["y"], int(mcmc.last_state.i[0]), seconds, bdl.to_datatree(mcmc))

    return fit


def maximum_a_posteriori(optimizer):
    """A method: the mode of the posterior, by SVI."""

    def fit(model):
        guide = AutoDelta(model, init_loc_fn=init_to_sample)
        svi = SVI(model, guide, optimizer, Trace_ELBO())
        start = time.perf_counter()
        # NumPyro's progress bar for SVI would take longer than the fit
        run = svi.run(random.key(0), GRADIENTS, x_train, y_train, batch_size=BATCH, progress_bar=False)
        jax.block_until_ready(run.params)
        seconds = time.perf_counter() - start
        at_mode = substitute(seed(model, 0), guide.median(run.params))
        logits = trace(at_mode).get_trace(x_test)["y"]["fn"].logits
        return Fit(logits[None, None], GRADIENTS, seconds)

    return fit


# Each line is a method. The settings are the best of a few in negative log likelihood on a fifth of the training
# images, and in R-hat where that did not tell them apart; so is the 16 in the prior, of 2, 4, 9 and 16. Tried were
#   Adam            learning rate 3e-4, 1e-3, 3e-3
#   SGLD            step 1e-4, 3e-4, 5e-4, 1e-3
#   cyclical SGLD   peak 3e-4, 5e-4, 1e-3, 2e-3, 3e-3; steps in a cycle 200, 1000, 2500
#   SGHMC           step 3e-5, 5e-5, 1e-4, 3e-4
#   FlatBasinSGLD   step 3e-4, 5e-4; anchor_steps 2, 5, 10, 100
# Cycles explore at temperature 1 here, not 0: from a mode, the few small steps that end so short a cycle do not spread
# over the posterior. (At 0 the logits of the MLP varied a sixth as much. The likelihood of the conv net was better.)
METHODS = {
    "MAP": maximum_a_posteriori(optax.adam(1e-3)),
    "SGLD": sampler(bdl.SGLD, step_size=5e-4, steps_per_draw=STEPS),
    "cyclical SGLD": sampler(
        bdl.SGLD,
        step_size=bdl.cyclical(5e-4, steps_per_cycle=5 * STEPS, draws_per_cycle=5, exploration_temperature=1.0),
    ),
    "SGHMC": sampler(bdl.SGHMC, step_size=1e-4, momentum=0.9, steps_per_draw=STEPS),
    "FlatBasinSGLD": sampler(
        bdl.FlatBasinSGLD, step_size=5e-4, anchor_steps=5, collect_anchor=True, steps_per_draw=STEPS
    ),
}
NETWORKS = {"MLP": MLP()} if options.quick else {"MLP": MLP(), "conv net": ConvNet()}

# ---- fit, judge, keep -----------------------------------------------------------------------------------------------


def judge(fit):
    """The numbers of the table, and the predictive."""
    probabilities = metrics.mean_probabilities(fit.logits)
    known, labels = probabilities[~is_out], y_test[~is_out]
    row = {
        "accuracy": metrics.accuracy(known, labels),
        "NLL": metrics.negative_log_likelihood(known, labels),
        "ECE": metrics.expected_calibration_error(known, labels),
        "AUROC 8-9": detection.auroc(uncertainty.predictive_entropy(probabilities), is_out),
        "worst R-hat": float(az.rhat(fit.tree, group="functions")["y"].max()) if fit.tree else "",
        "gradients": fit.gradients,
        "seconds": fit.seconds,
    }
    return row, probabilities


options.output.mkdir(parents=True, exist_ok=True)
table = []
figure, axes = plt.subplots(
    len(NETWORKS), 3, figsize=(15, 4.8 * len(NETWORKS)), squeeze=False, layout="constrained", width_ratios=(4, 5, 4)
)
for (network_name, network), (left, middle, right) in zip(NETWORKS.items(), axes, strict=True):
    entropies, trees = {}, {}
    for name, method in METHODS.items():
        print(f"\n{network_name}, {name}", flush=True)
        fit = method(make_model(network))
        row, probabilities = judge(fit)
        table.append({"network": network_name, "method": name, **row})
        plots.reliability(probabilities[~is_out], y_test[~is_out], ax=left, label=name, bins=5)
        entropies[name], trees[name] = uncertainty.predictive_entropy(probabilities), fit.tree
        if fit.tree:
            fit.tree.to_netcdf(options.output / f"{network_name}-{name}.nc".lower().replace(" ", "-"))
    inside, outside = ({name: entropy[rows] for name, entropy in entropies.items()} for rows in (~is_out, is_out))
    plots.entropy_histogram(inside, outside, middle)
    plots.function_rhat(trees, right)
    for ax in (left, middle, right):
        ax.set_title(f"{network_name}: {ax.get_title()}")
    left.legend(loc="lower right")
    middle.legend(loc="upper right", ncols=2)
    right.legend(loc="upper left")
figure.savefig(options.output / "digits.png", dpi=100)

with open(options.output / "digits.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, table[0])
    writer.writeheader()
    writer.writerows(table)

print()
for row in [dict(zip(table[0], table[0], strict=True)), *table]:
    cells = [f"{v:.{1 if k == 'seconds' else 3}f}" if isinstance(v, float) else str(v) for k, v in row.items()]
    print("".join(f"{cell:<15}" if n < 2 else f"{cell:>12}" for n, cell in enumerate(cells)))
print(f"\nDraws, table and pictures (digits.png) are in {options.output}")
