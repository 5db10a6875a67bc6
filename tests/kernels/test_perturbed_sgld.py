# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import exact
import pytest
from kernels.laws import TARGET, VARIATIONS, assert_law

import numpyro_bdl as bdl

SIGMA = 0.3


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_stationary_law_is_the_finite_step_formula(variation):
    """The perturbation is gradient noise of covariance sigma^2 A^2."""

    def covariance(V=0.0, **kw):
        return exact.sgld(TARGET.curvature, 0.1, V=V + SIGMA**2 * TARGET.curvature @ TARGET.curvature, **kw)

    assert_law(lambda model, **kw: bdl.PerturbedSGLD(model, step_size=0.1, sigma=SIGMA, **kw), covariance, variation)


def test_sigma_must_be_positive():
    with pytest.raises(ValueError, match="sigma must be a number"):
        bdl.PerturbedSGLD(TARGET.model, step_size=0.1, sigma=0.0)
