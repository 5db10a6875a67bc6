# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What the law tests of all kernels share: variations of a Gaussian target, and the comparison."""

import numpy as np
from exact import covariance_z_scores
from targets import Location, last_states

from numpyro_bdl import preconditioners

TARGET = Location.make([2.0, 6.0])
BATCH = 2
DIAGONAL = np.array([0.5, 1.5])

VARIATIONS = {
    "plain": {},
    "minibatch": {"V": TARGET.gradient_noise(BATCH)},
    "preconditioner": {"P": DIAGONAL},
    "temperature": {"T": 0.7},
    "all": {"V": TARGET.gradient_noise(BATCH), "P": DIAGONAL, "T": 0.7},
}


def assert_law(make_kernel, covariance, variation, fields=("z",), steps=160):
    """Compare the moments of the given state fields, over many chains, with the closed form, within 4 standard errors.

    :param make_kernel: From a model and keyword arguments to a kernel.
    :param covariance: Exact covariance of these fields, given T, P and V as keywords.
    :param variation: Some of T, P and V.
    """
    arguments = {}
    if "T" in variation:
        arguments["temperature"] = variation["T"]
    if "P" in variation:
        arguments["preconditioner"] = preconditioners.fixed({"w": variation["P"]})
    batch = BATCH if "V" in variation else None
    state = last_states(make_kernel(TARGET.model, **arguments), TARGET.y, steps=steps, batch_size=batch)
    draws = np.concatenate([np.asarray(getattr(state, field)["w"], float) for field in fields], axis=1)
    mean = np.concatenate([np.zeros(2) if field.startswith("momentum") else TARGET.mean for field in fields])
    mean_z, covariance_z = covariance_z_scores(draws, mean, covariance(**variation)[: len(mean), : len(mean)])
    assert np.abs(mean_z).max() < 4
    assert np.abs(covariance_z).max() < 4
