# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""How flat is the data term around a draw? Curvature without a Hessian matrix, and slices.

All of it is of the energy of the likelihood alone, over all rows, in unconstrained space,

.. math::

    \ell(z) = - \sum_i \log p(y_i \mid \theta(z))

For numbers on the scale of a mean loss, divide by the number of rows.

- :func:`data_term` and :func:`position_of` take :math:`\ell` and positions from a run;
- :func:`hessian_vector_product`, :func:`top_eigenvalues` (Lanczos) and :func:`hessian_trace` (Hutchinson) are for any
  function of a tree of arrays; :func:`sharpness` applies them to the draws of a run and to the mean of its draws;
- :func:`filter_normalized` draws a direction in which to look, :func:`loss_slice` evaluates a slice along one or two.

**Raw flatness is not scale invariant.** Multiply the weights that enter a layer of ReLU units by :math:`\alpha`, biases
too, and divide those that leave it by :math:`\alpha`. The function is the same, and so is :math:`\ell`. But the block
of the Hessian for the weights that enter is divided by :math:`\alpha^2`, that of the others multiplied by it: the
largest eigenvalue can be made as large as one likes, and so can the trace. Such numbers compare positions only in the
same coordinates and on the same scale of the weights, as draws of one run under one prior. A slice along a direction
that is filter-normalized does not change under this rescaling, since the direction is rescaled with the weights. Nor
are eigenvalues invariant under another parametrization of a constrained site.

Source: Dinh et al., *Sharp minima can generalize for deep nets*, ICML 2017, for the argument; Li et al., *Visualizing
the loss landscape of neural nets*, NeurIPS 2018, for filter normalization. Lanczos and Hutchinson are those of matfree.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, random
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from numpyro.infer import MCMC

from numpyro_bdl._at_draws import check_run, unconstrained_draws
from numpyro_bdl._checks import check_choice, check_integer
from numpyro_bdl._curvature import Eigenvalues as Eigenvalues
from numpyro_bdl._curvature import Trace as Trace
from numpyro_bdl._curvature import hessian_trace as hessian_trace
from numpyro_bdl._curvature import hessian_vector_product as hessian_vector_product
from numpyro_bdl._curvature import hutchinson, number_of_steps, ritz_values, trace_of, tridiagonal
from numpyro_bdl._curvature import top_eigenvalues as top_eigenvalues
from numpyro_bdl._data_term import data_term as data_term
from numpyro_bdl._data_term import likelihood_energy
from numpyro_bdl._data_term import position_of as position_of
from numpyro_bdl._loss_slice import LossSlice as LossSlice
from numpyro_bdl._loss_slice import filter_normalized as filter_normalized
from numpyro_bdl._loss_slice import loss_slice as loss_slice

MEMBERS = ("position", "anchor")


class Curvature(NamedTuple):
    """The data term at some positions."""

    energy: Float[np.ndarray, " position"]
    eigenvalues: Float[np.ndarray, "position count"]
    """the largest of the Hessian"""
    eigenvalues_error: Float[np.ndarray, "position count"]
    trace: Float[np.ndarray, " position"]
    """trace of the Hessian"""
    trace_error: Float[np.ndarray, " position"]
    """its standard error"""


class Sharpness(NamedTuple):
    """The data term at draws of a run, and at the mean of the draws of each chain."""

    draws: Curvature
    means: Curvature
    """one for each chain"""
    chain: np.ndarray
    """the chain of each of the draws"""
    draw: np.ndarray
    """the index of each of the draws in its chain"""


def sharpness(
    mcmc: MCMC,
    rng_key: Array,
    *,
    num_draws: int = 4,
    num_eigenvalues: int = 1,
    lanczos_steps: int | None = None,
    probes: int = 100,
    probe_chunk: int = 10,
    row_chunk: int | None = None,
    members: str = "position",
    **model_kwargs: Any,
) -> Sharpness:
    """Energy, largest eigenvalues and trace of the data term, at draws and at the mean of the draws of each chain.

    The mean of a chain lies in the middle of its basin and has a lower energy than a draw. Compare numbers of one model
    in one parametrization only, see the head of this module; a slice along filter-normalized directions goes further.

    :param mcmc: A run of any kernel of this package, or of NUTS or HMC.
    :param rng_key: PRNG key of first vectors and signs. All positions share them, so that differences between positions
        are less noisy than the standard errors say.
    :param num_draws: Draws, evenly spaced over all chains.
    :param num_eigenvalues: How many of the largest eigenvalues.
    :param lanczos_steps: As ``steps`` of :func:`top_eigenvalues`.
    :param probes: As of :func:`hessian_trace`.
    :param probe_chunk: As of :func:`hessian_trace`.
    :param row_chunk: As of :func:`data_term`.
    :param members: ``"position"``, or ``"anchor"`` of a kernel that collected it.
    :param model_kwargs: Keyword arguments of the model that are to differ from those of the run.
    :return: The numbers, on the scale of the sum over all rows. Mutable collections (BatchNorm) are those of each draw,
        and for the means those of the last draw of the chain.
    :raises TypeError: for anything but a run of a kernel with a model.
    :raises ValueError: for a run without draws or with bad chains, and arguments out of range.

    **Example**

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import MCMC
        >>> import numpyro_bdl as bdl
        >>> from numpyro_bdl import flatness
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 2), obs=y)
        >>> mcmc = MCMC(bdl.SGLD(model, step_size=1e-2), num_warmup=10, num_samples=20, progress_bar=False)
        >>> mcmc.run(random.key(0), jnp.arange(8.0))
        >>> found = flatness.sharpness(mcmc, random.key(1), num_draws=2, probes=2)
        >>> found.draws.trace.round(3), found.means.eigenvalues.round(3)               # 8 rows / 2^2
        (array([2., 2.]), array([[2.]]))
    """
    potential = check_run("sharpness", mcmc)
    check_integer("sharpness", "num_draws", num_draws)
    check_integer("hessian_trace", "probes", probes, least=2)
    check_integer("hessian_trace", "probe_chunk", probe_chunk)
    check_choice("sharpness", "members", members, MEMBERS)
    every = unconstrained_draws("sharpness", mcmc, potential)
    z, mutable = every.z, every.mutable
    if members == "anchor":
        collected = mcmc.get_extra_fields(group_by_chain=True).get("z_anchor")
        if collected is None:
            raise ValueError(
                "sharpness: the run collected no anchor; make the kernel with collect_anchor=True, or run with"
                ' extra_fields=("z_anchor",).'
            )
        z = collected
    size = sum(w[0, 0].size for w in z.values())
    steps = number_of_steps(size, num_eigenvalues, lanczos_steps)
    energy = likelihood_energy(potential, row_chunk, model_kwargs)
    key_lanczos, key_trace = random.split(rng_key)

    @jax.jit
    def describe(z, mutable):
        flat, unravel = ravel_pytree(z)
        at = lambda w: energy(mutable, unravel(w))
        return (
            at(flat),
            tridiagonal(at, flat, key_lanczos, steps),
            hutchinson(at, flat, key_trace, probes, probe_chunk),
        )

    def curvature(pairs):
        found = [describe(*pair) for pair in pairs]
        eigen, traces = [ritz_values(f[1], num_eigenvalues) for f in found], [trace_of(f[2]) for f in found]
        return Curvature(
            np.array([float(f[0]) for f in found]),
            np.array([e.value for e in eigen], float),
            np.array([e.error for e in eigen], float),
            np.array([t.value for t in traces]),
            np.array([t.error for t in traces]),
        )

    chains, draws = next(iter(z.values())).shape[:2]
    places = np.unique(np.linspace(0, chains * draws - 1, num_draws).round().astype(int))
    chain, draw = np.divmod(places, draws)
    at_draws = [jax.tree.map(lambda x, c=c, d=d: x[c, d], (z, mutable)) for c, d in zip(chain, draw, strict=True)]
    at_means = [
        (jax.tree.map(lambda x, c=c: x[c].mean(0), z), jax.tree.map(lambda x, c=c: x[c, -1], mutable))
        for c in range(chains)
    ]
    return Sharpness(curvature(at_draws), curvature(at_means), chain, draw)
