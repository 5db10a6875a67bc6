# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import exact
import numpy as np
import pytest
from exact import covariance_z_scores
from kernels.laws import TARGET, VARIATIONS, assert_law
from targets import Location, last_states

import numpyro_bdl as bdl


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_stationary_law_is_the_finite_step_formula(variation):
    assert_law(
        lambda model, **kw: bdl.SGLD(model, step_size=0.1, **kw),
        lambda **kw: exact.sgld(TARGET.curvature, 0.1, **kw),
        variation,
    )


def test_closed_form_in_one_dimension():
    h, a, T, V = 2.0, 0.05, 0.7, 5.0
    expected = (T / h + a * V / (2 * h)) / (1 - a * h / 2)
    np.testing.assert_allclose(exact.sgld(h, a, T, V=V).item(), expected, rtol=1e-12)


@pytest.mark.usefixtures("optimized")
def test_twenty_dimensions_of_condition_one_hundred():
    target = Location.make(np.geomspace(1, 100, 20))
    state = last_states(bdl.SGLD(target.model, step_size=0.01), target.y, steps=600)
    covariance = exact.sgld(target.curvature, 0.01)
    mean_z, covariance_z = covariance_z_scores(np.asarray(state.z["w"], float), target.mean, covariance)
    assert np.abs(mean_z).max() < 4
    assert np.abs(covariance_z).max() < 4.5  # the largest of 210 entries


@pytest.mark.usefixtures("optimized")
def test_a_temperature_schedule_ends_in_the_law_of_its_end():
    def cooling(i):
        return 4.0 * (i < 150) + 0.5 * (i >= 150)

    state = last_states(bdl.SGLD(TARGET.model, step_size=0.1, temperature=cooling), TARGET.y, steps=300)
    _, covariance_z = covariance_z_scores(
        np.asarray(state.z["w"], float), TARGET.mean, exact.sgld(TARGET.curvature, 0.1, T=0.5)
    )
    assert np.abs(covariance_z).max() < 4
    assert set(np.asarray(state.temperature)) == {0.5}


@pytest.mark.usefixtures("optimized")
def test_epoch_minibatches_are_closer_to_the_target_than_independent_ones():
    def variance(minibatch):
        kernel = bdl.SGLD(TARGET.model, step_size=0.1, temperature=0.1, minibatch=minibatch)
        return np.trace(np.cov(np.asarray(last_states(kernel, TARGET.y, steps=160, batch_size=1).z["w"]).T))

    full, epoch, independent = (variance(m) for m in ("full", "epoch", "independent"))
    standard_error = independent * np.sqrt(2 / 10_000)
    assert abs(full - np.trace(exact.sgld(TARGET.curvature, 0.1, T=0.1))) < 4 * standard_error
    assert epoch < independent - 4 * np.sqrt(2) * standard_error
