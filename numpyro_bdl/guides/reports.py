# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What a fit says while it works, and what it warns of."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from tqdm.auto import tqdm

from numpyro_bdl.guides.em import Expectation
from numpyro_bdl.guides.prior import Prior
from numpyro_bdl.linear.model import Batch, Weights
from numpyro_bdl.linear.observations import warn_if_unsolved
from numpyro_bdl.linear.system import System, dot, energy_and_gradient

_MOVING = 0.2
_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"


class Progress:
    """A bar over E-steps, each of which reports the share that it has done."""

    def __init__(self, steps: int, shown: bool):
        self._bar, self._done = tqdm(total=100 * steps, disable=not shown, bar_format=_BAR), 0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def begin(self, step: int, steps: int) -> None:
        """Start a step; the last one samples."""
        self._bar.total, self._done = 100 * (steps + 1), 100 * step
        self._bar.set_description("sample" if step == steps else f"EM {step + 1}/{steps}")

    def report(self, share: float) -> None:
        """Show the share of the step that is done."""
        self._bar.update(self._done + round(100 * share) - self._bar.n)

    def say(self, line: dict[str, Any]) -> None:
        """Show a line of the history beside the bar."""
        self._bar.set_postfix_str(_postfix(line))


def statement(system: System, num_samples: int, vectors: int, frozen: tuple[str, ...], prior: Prior) -> str:
    """What is linearized, and the memory that it takes."""
    weights = system.model.weights
    size = sum(w.size for w in weights.values())
    width = jax.tree.leaves(weights)[0].dtype.itemsize
    state, kept = (width * size * num_samples * n / 2**20 for n in (vectors, 1))
    lines = [
        f"AutoLinearizedLaplace: {size:,} weights in {len(weights)} sites, {num_samples} samples:"
        f" {state:,.0f} MiB for the solver's vectors, about three times that while its programs run, {kept:,.0f} MiB"
        f" for the samples, besides the activations of {system.batch_size} rows for each sample that is worked on at a"
        " time.",
    ]
    if len(prior.groups) > 1:
        lines.append(f"A precision for each of: {', '.join(prior.groups)}.")
    if frozen:
        lines.append(f"Not linearized: {', '.join(frozen)}.")
    return "\n".join(lines)


def record(prior: Prior, found: Expectation, system: System, noise_site: str | None) -> dict[str, Any]:
    """A line of the history."""
    groups = prior.groups.items()
    line: dict[str, Any] = {
        "prior_precision": [float(prior.alpha[group]) for group, _ in groups],
        "effective_dimension": [float(sum(found.dimension[k] for k in names)) for _, names in groups],
        "residual": float(found.residual),
    }
    if found.mode is not None:
        line["mode_norm"] = [float(jnp.sqrt(sum(jnp.sum(found.mode[k] ** 2) for k in names))) for _, names in groups]
    if noise_site is not None:
        line["noise_scale"] = jax.device_get(system.model.others[noise_site])
    return line


def _postfix(line: dict[str, Any]) -> str:
    shown = ", ".join(f"{a:.3g}" for a in line["prior_precision"][:3])
    more = ", ..." if len(line["prior_precision"]) > 3 else ""
    dimension = sum(line["effective_dimension"])
    return f"residual {line['residual']:.1e}, precision {shown}{more}, effective dimension {dimension:.4g}"


def count_outputs(system: System) -> float:
    """Observed outputs of all rows."""
    batch: list[float] = []

    def count(rows, weight):
        found = system.model.at(Batch(rows, weight, jnp.ones(())))
        for name, eta in found.eta.items():
            share = 1 if found.sites[name].row_axis is None else system.model.size / system.batch_size
            batch.append(share * eta.size)
        return jnp.zeros(())

    jax.eval_shape(count, system.rows[0], system.weight[0])
    return sum(batch)


def warn_if_far(system: System, probe: Weights) -> None:
    """Warn where the gradient at the trained weights is larger than it would be at a draw from the posterior.

    :param probe: Noise gradients.
    """
    start = jax.tree.map(lambda d, s: -d / s, system.offset, system.scale)
    _, gradient = energy_and_gradient(system, start)
    count = len(jax.tree.leaves(probe)[0])
    size = sum(w.size for w in start.values())
    norm: Array = jnp.sqrt(dot(gradient, gradient))
    typical = jnp.sqrt(size + dot(probe, probe) / count)
    if norm > typical:
        warnings.warn(
            f"The weights are far from an optimum: their gradient, in units of the prior, has the norm {norm:.3g}, and"
            f" at a draw from the posterior it would be {typical:.3g}. The tangent at them may say little of the"
            " network; train for longer.",
            stacklevel=4,
        )


def warn_of_scale(free: dict[str, tuple[str, ...]], advice: str) -> None:
    """Warn of layers without a scale that share a precision with others."""
    warnings.warn(
        f"The function does not depend on the scale of the weights of {', '.join(free)}, since they are normalized"
        f" afterwards, so that the uncertainty that comes from them is arbitrary under this prior; give them {advice}.",
        stacklevel=5,
    )


def warn_of_em(change: float, steps: int) -> None:
    """Warn of EM that ends while it still moves."""
    if change > _MOVING:
        warnings.warn(
            f"EM stopped after {steps} steps while a precision or noise scale still changed by {change:.0%}; take more"
            " em_steps.",
            stacklevel=4,
        )


def warn_of_solution(found: Expectation, system: System) -> None:
    """Warn of systems that are not solved, and of models that interpolate."""
    warn_if_unsolved(float(found.error))
    outputs, dimension = count_outputs(system), float(sum(found.dimension.values()))
    if dimension > 0.99 * outputs:
        warnings.warn(
            f"The linear model interpolates its data: its effective dimension, {dimension:.4g}, is nearly the number of"
            f" outputs, {outputs:.0f}. Its noise can't be learned from them, and minibatch gradients are noisiest here"
            ' (objective="original" is better then).',
            stacklevel=3,
        )
