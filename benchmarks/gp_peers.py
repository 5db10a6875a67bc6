# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The sparse variational Gaussian process of GPJax, which benchmarks/gp.py calls in a process of its own.

    peers-venv/bin/python benchmarks/gp_peers.py PROBLEM.npz ANSWER.npz

It does not import numpyro_bdl. The problem holds x, y, x_test, kernel and noise to begin at, and the seconds of the
processor to spend; the answer the mean and variance of the function at the test inputs, the noise, and what was spent.
Inducing inputs begin at random rows and are learned with the rest by Adam on minibatches, in float64.
"""

import sys
import time

import gpjax as gpx
import jax
import jax.numpy as jnp
import numpy as np
import optax

INDUCING = 256
BATCH = 512
RATE = 0.03


def main():
    jax.config.update("jax_enable_x64", True)
    path, answer = sys.argv[1:]
    with np.load(path) as file:
        problem = {k: jnp.asarray(v, float) for k, v in file.items()}
    data = gpx.Dataset(X=problem["x"], y=problem["y"][:, None])
    kernel = gpx.kernels.Matern32(lengthscale=problem["lengthscale"], variance=problem["variance"])
    model = gpx.gps.Prior(mean_function=gpx.mean_functions.Zero(), kernel=kernel) * gpx.likelihoods.Gaussian(
        obs_stddev=problem["noise"]
    )
    rows = np.random.default_rng(0).permutation(data.n)[:INDUCING]
    start = gpx.variational_families.WhitenedVariationalGaussian(model=model, inducing_inputs=data.X[rows])

    def fit(family, steps):
        begin = time.process_time()
        family, history = gpx.fit(
            model=family, objective=lambda q, d: -gpx.objectives.elbo(q, d), train_data=data, optim=optax.adam(RATE),
            num_iters=steps, batch_size=min(BATCH, data.n), verbose=False, key=jax.random.key(steps),
        )  # fmt: skip
        jax.block_until_ready(history)
        return family, time.process_time() - begin

    few, many = (fit(start, steps)[1] for steps in (10, 30))
    steps = max(int(float(problem["seconds"]) / (many - few) * 20), 100)
    family, spent = fit(start, steps)
    means, variances = [], []
    predict = jax.jit(lambda q, x: (lambda law: (law.mean, law.variance))(q.predict(x)))
    for i in range(0, len(problem["x_test"]), 500):
        mean, variance = predict(family, problem["x_test"][i : i + 500])
        means.append(mean)
        variances.append(variance)
    noise = float(gpx.parameters.val(family.model.likelihood.obs_stddev))
    np.savez(
        answer, mean=np.concatenate(means), variance=np.concatenate(variances), noise=noise, cpu_s=spent, steps=steps
    )


if __name__ == "__main__":
    main()
