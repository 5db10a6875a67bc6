# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""One method of another library at the network of benchmarks/laplace.py, which calls this in a process of its own.

    peers-venv/bin/python benchmarks/laplace_peers.py METHOD PROBLEM.npz ANSWER.npz

It imports neither numpyro_bdl nor NumPyro. The problem holds the weights by site, x, y, x_test and the prior precision;
the answer the variances (row, class) of the linearized outputs, seconds to fit and to predict, compilation included,
seconds of the processor with the import of the library, and the growth of the peak memory since the problem was loaded.
"""

import os
import sys
import time

import numpy as np


def memory(line: str) -> float:
    """VmRSS or VmHWM, what the process holds or has held at most, in MB."""
    with open("/proc/self/status") as file:
        return next(float(text.split()[1]) for text in file if text.startswith(line)) / 1e3


def start_peak() -> float:
    """Memory of now; the peak is counted anew. A process otherwise inherits that of its parent."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory("VmRSS")


def by_laplax(method: str, problem: dict) -> dict:
    import jax
    import jax.numpy as jnp
    from jax import lax
    from laplax.api import GGN, laplace
    from laplax.eval.pushforward import lin_pred_mean, lin_pred_var, lin_setup, set_lin_pushforward
    from loguru import logger

    logger.remove()
    params = {k: jnp.asarray(v) for k, v in problem.items() if k.startswith("net/")}

    def model_fn(input, params):
        x = lax.conv_general_dilated(
            input[None], params["net/Conv_0.kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x[0] + params["net/Conv_0.bias"]).reshape(-1)
        x = jax.nn.relu(x @ params["net/Dense_0.kernel"] + params["net/Dense_0.bias"])
        return x @ params["net/Dense_1.kernel"] + params["net/Dense_1.bias"]

    count = len(problem["x"])
    data = {"input": jnp.asarray(problem["x"]), "target": jnp.asarray(problem["y"])}
    inputs = jnp.asarray(problem["x_test"])
    jax.block_until_ready(jax.vmap(lambda x: model_fn(x, params))(inputs))
    start, begin = start_peak(), time.perf_counter()
    if method == "laplax diagonal":  # a product for each weight
        product = jax.jit(GGN(model_fn, params, data, loss_fn="cross_entropy"))
        jax.block_until_ready(product(params))
        begin = time.process_time()
        for _ in range(10):
            jax.block_until_ready(product(params))
        each, size = (time.process_time() - begin) / 10, sum(w.size for w in params.values())
        if each * size > 300:
            raise SystemExit(f"not run: {size} products of {1e3 * each:.0f} ms of the processor")
    kind, *rank = method.removeprefix("laplax ").split()
    more = {"rank": int(rank[0]), "key": jax.random.key(0)} if rank else {}
    # laplax 0.0.2 divides by count in one place and multiplies in another: equal numbers are the sum over rows
    posterior_fn, _ = laplace(
        model_fn, params, data, loss_fn="cross_entropy", curv_type=kind,
        num_curv_samples=count, num_total_samples=count, curv_mv_jit=True, **more,
    )  # fmt: skip
    fitted = time.perf_counter()
    predict = set_lin_pushforward(
        model_fn, params, posterior_fn, {"prior_prec": float(problem["precision"])},
        pushforward_fns=[lin_setup, lin_pred_mean, lin_pred_var],
    )  # fmt: skip
    variances = np.asarray(jax.jit(lambda x: lax.map(lambda row: predict(row)["pred_var"], x))(inputs))
    end = time.perf_counter()
    return {
        "variances": variances,
        "fit_s": fitted - begin,
        "predict_s": end - fitted,
        "peak_mb": memory("VmHWM") - start,
    }


def by_torch(method: str, problem: dict) -> dict:
    import torch
    from laplace import Laplace
    from torch import nn

    torch.manual_seed(0)

    class Last(nn.Module):
        """Channels last, as flax has them."""

        def forward(self, x):
            return x.permute(0, 2, 3, 1).flatten(1)

    net = nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(1, 32, 3, stride=2), nn.ReLU(), Last(),
        nn.Linear(512, 200), nn.ReLU(), nn.Linear(200, 10),
    )  # fmt: skip
    put = {
        1: ("net/Conv_0", (3, 2, 0, 1)),
        4: ("net/Dense_0", (1, 0)),
        6: ("net/Dense_1", (1, 0)),
    }
    with torch.no_grad():
        for n, (name, axes) in put.items():
            net[n].weight.copy_(torch.tensor(problem[f"{name}.kernel"].transpose(axes)))
            net[n].bias.copy_(torch.tensor(problem[f"{name}.bias"]))
    net.eval()
    x, x_test = (torch.tensor(problem[k].transpose(0, 3, 1, 2)).contiguous() for k in ("x", "x_test"))
    y = torch.tensor(problem["y"], dtype=torch.long)
    agrees = np.abs(net(x_test).detach().numpy() - problem["outputs_test"]).max()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=100)
    _, structure, subset = method.split()
    start, begin = start_peak(), time.perf_counter()
    la = Laplace(
        net, "classification", subset_of_weights=subset, hessian_structure=structure,
        prior_precision=float(problem["precision"]),
    )  # fmt: skip
    la.fit(loader)
    fitted = time.perf_counter()
    variances = []
    for i in range(0, len(x_test), 10):
        _, covariance = la._glm_predictive_distribution(x_test[i : i + 10])
        variances.append(covariance.detach().diagonal(dim1=1, dim2=2).numpy())
    end = time.perf_counter()
    found = {"variances": np.concatenate(variances), "fit_s": fitted - begin, "predict_s": end - fitted}
    return found | {"peak_mb": memory("VmHWM") - start, "largest_difference_of_outputs": agrees}


def main():
    method, problem, answer = sys.argv[1:]
    with np.load(problem) as file:
        problem = dict(file)
    begin = time.process_time()
    found = (by_laplax if method.startswith("laplax") else by_torch)(method, problem)
    np.savez(answer, processor_s=time.process_time() - begin, load=os.getloadavg()[0], **found)


if __name__ == "__main__":
    main()
