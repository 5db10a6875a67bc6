# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import exact
import numpy as np
import pytest
from exact import covariance_z_scores
from kernels.laws import BATCH, TARGET, VARIATIONS, assert_law
from targets import Location, last_states

import numpyro_bdl as bdl


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("momentum", [0.1, 0.9])
def test_stationary_law_is_the_finite_step_formula(momentum, variation):
    assert_law(
        lambda model, **kw: bdl.SGHMC(model, step_size=0.1, momentum=momentum, **kw),
        lambda **kw: exact.sghmc(TARGET.curvature, 0.1, momentum, **kw),
        variation,
        fields=("z", "momentum"),
    )


@pytest.mark.parametrize(
    ("b", "a", "inflation"),
    [(0.1, 0.01, 1.0045662), (0.1, 0.3, 1.1578947), (0.9, 0.01, 1.0026385), (0.9, 0.3, 1.0857143)],
)
def test_closed_form_in_one_dimension(b, a, inflation):
    h, tau = 2.0, 0.5
    variance = exact.sghmc(h, a, b, P=tau)[0, 0]
    np.testing.assert_allclose(variance * h, inflation, rtol=1e-7)
    np.testing.assert_allclose(variance * h, 1 / (1 - a * tau * h / (2 * (1 + b))), rtol=1e-10)


def test_four_dimensions_with_unequal_preconditioner():
    target = Location.make([2.0, 3.0, 4.0, 6.0], seed=1)
    diagonal = np.array([0.1, 0.3, 0.6, 0.95])
    kernel = bdl.SGHMC(
        target.model, step_size=0.1, momentum=0.8, preconditioner=bdl.preconditioners.fixed({"w": diagonal})
    )
    state = last_states(kernel, target.y, steps=300)
    covariance = exact.sghmc(target.curvature, 0.1, 0.8, P=diagonal)[:4, :4]
    mean_z, covariance_z = covariance_z_scores(np.asarray(state.z["w"], float), target.mean, covariance)
    assert max(np.abs(mean_z).max(), np.abs(covariance_z).max()) < 4


def test_no_momentum_is_sgld():
    one = last_states(bdl.SGLD(TARGET.model, step_size=0.1), TARGET.y, steps=20, chains=5)
    other = last_states(bdl.SGHMC(TARGET.model, step_size=0.1, momentum=0.0), TARGET.y, steps=20, chains=5)
    np.testing.assert_allclose(one.z["w"], other.z["w"], rtol=1e-5)


def test_noise_correction_takes_the_minibatch_noise_out():
    a, b = 0.1, 0.5
    kernel = bdl.SGHMC(TARGET.model, step_size=a, momentum=b, noise_correction=True)
    state = last_states(kernel, TARGET.y, steps=160, batch_size=BATCH)
    # the step after warm-up uses the estimate; estimates are unbiased, if noisy in each chain
    variance = np.asarray(state.gradient_noise["w"], float)
    expected = np.diag(TARGET.gradient_noise(BATCH))
    assert np.all(np.abs(variance.mean(0) - expected) < 4 * variance.std(0) / np.sqrt(len(variance)))
    assert not np.any(np.asarray(state.excess_noise))
    # only the diagonal of the minibatch noise is corrected, so its correlation stays
    rest = TARGET.gradient_noise(BATCH) - np.diag(expected)
    covariance = exact.sghmc(TARGET.curvature, a, b, V=rest)[:2, :2]
    _, covariance_z = covariance_z_scores(np.asarray(state.z["w"], float), TARGET.mean, covariance)
    assert np.abs(covariance_z).max() < 4
    uncorrected = exact.sghmc(TARGET.curvature, a, b, V=TARGET.gradient_noise(BATCH))[:2, :2]
    _, covariance_z = covariance_z_scores(np.asarray(state.z["w"], float), TARGET.mean, uncorrected)
    assert np.abs(covariance_z).max() > 4


def test_excess_noise_is_told():
    kernel = bdl.SGHMC(TARGET.model, step_size=0.1, momentum=0.9, temperature=1e-3, noise_correction=True)
    state = last_states(kernel, TARGET.y, steps=100, chains=10, batch_size=1)
    np.testing.assert_array_equal(state.excess_noise, 1.0)
