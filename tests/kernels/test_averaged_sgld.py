# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import exact
import numpy as np
import pytest
from kernels.laws import TARGET, VARIATIONS, assert_law
from targets import last_states

import numpyro_bdl as bdl


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_stationary_law_is_the_finite_step_formula(variation):
    assert_law(
        lambda model, **kw: bdl.AveragedSGLD(model, step_size=0.1, anchor_steps=20, **kw),
        lambda **kw: exact.averaged(TARGET.curvature, 0.1, 20, **kw),
        variation,
        fields=("z", "z_anchor"),
    )


def test_the_position_is_that_of_sgld():
    plain = last_states(bdl.SGLD(TARGET.model, step_size=0.1), TARGET.y, steps=20, chains=3)
    averaged = last_states(bdl.AveragedSGLD(TARGET.model, step_size=0.1, anchor_steps=9), TARGET.y, steps=20, chains=3)
    np.testing.assert_array_equal(plain.z["w"], averaged.z["w"])


def test_anchor_steps_must_be_at_least_one():
    with pytest.raises(ValueError, match="anchor_steps must be a number"):
        bdl.AveragedSGLD(TARGET.model, step_size=0.1, anchor_steps=0.5)
