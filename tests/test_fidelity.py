# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""On a network that NUTS can sample, the kernels predict what NUTS predicts, within Monte Carlo error."""

import jax
import numpy as np
import pytest
from models import LABELS, NETWORKS, RNG, X
from numpyro.infer import MCMC, NUTS

import numpyro_bdl as bdl

PROBE = RNG.normal(size=(20, 3)).astype(np.float32)
MODEL = NETWORKS["linen"]


def probability(kernel, num_warmup, num_samples, num_chains):
    """Mean over draws of the probability of class 1 at the probe points, and its standard error between chains."""
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), X, LABELS)
    logits = bdl.PosteriorPredictive(mcmc, draw_chunk=500).functions(PROBE)["y"].astype(float)
    chains = (1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))).mean(1)
    return chains.mean(0), chains.std(0, ddof=1) / np.sqrt(num_chains)


@pytest.fixture(scope="module")
def reference():
    return probability(NUTS(MODEL), 300, 300, 16)


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: bdl.SGLD(MODEL, step_size=2e-3, **kw),
        lambda **kw: bdl.SGHMC(MODEL, step_size=2e-3, momentum=0.8, **kw),
        lambda **kw: bdl.FlatBasinSGLD(MODEL, step_size=2e-3, anchor_steps=20, **kw),
    ],
    ids=["SGLD", "SGHMC", "FlatBasinSGLD"],
)
def test_predictions_are_those_of_nuts(make, reference):
    mean, standard_error = probability(make(steps_per_draw=50), 40, 40, 64)
    reference_mean, reference_error = reference
    z = (mean - reference_mean) / np.hypot(standard_error, reference_error)
    assert np.abs(z).max() < 4
    # the comparison is not empty: the predictive is neither certain nor even, and errors are small
    assert standard_error.max() < 0.02
    assert np.ptp(mean) > 0.5
