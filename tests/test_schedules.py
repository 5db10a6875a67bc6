# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import random
from numpyro.infer import MCMC

import numpyro_bdl as bdl
from numpyro_bdl.schedules import as_schedule, largest_step

CYCLES = [
    {"steps_per_cycle": 1, "exploration": 0.0},
    {"steps_per_cycle": 10, "exploration": 0.0, "draws_per_cycle": 10},
    {"steps_per_cycle": 12, "exploration": 0.75, "draws_per_cycle": 3},
    {"steps_per_cycle": 17, "exploration": 0.5, "draws_per_cycle": 3},
    {"steps_per_cycle": 100, "exploration": 0.7, "draws_per_cycle": 7},
]


def model():
    numpyro.sample("x", dist.Normal(0, 1))


def run(num_warmup, num_samples, **kwargs):
    mcmc = MCMC(bdl.SGLD(model, **kwargs), num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(random.key(0), extra_fields=("i",))
    return mcmc


# ---- cyclical: values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycle", CYCLES)
def test_cyclical_is_a_cosine_in_each_cycle(cycle):
    schedule, k = bdl.cyclical(0.3, **cycle), cycle["steps_per_cycle"]
    expected = [0.15 * (math.cos(math.pi * (i % k) / k) + 1) for i in range(3 * k)]
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(3 * k)), expected, rtol=1e-5, atol=1e-8)


def test_cyclical_starts_each_cycle_at_its_peak_and_never_reaches_zero():
    schedule = bdl.cyclical(2e-4, steps_per_cycle=50)
    sizes = jax.vmap(schedule)(jnp.arange(150))
    assert sizes[::50] == pytest.approx(2e-4)
    assert sizes.min() > 0
    assert sizes.max() == pytest.approx(largest_step(schedule))


@pytest.mark.parametrize("cycle", CYCLES)
def test_exploration_has_its_own_temperature(cycle):
    schedule, k = bdl.cyclical(0.1, exploration_temperature=0.2, **cycle), cycle["steps_per_cycle"]
    temperature = [float(schedule.temperature(i, 0.7)) for i in range(2 * k)]
    exploring = [i % k < cycle["exploration"] * k for i in range(2 * k)]
    assert temperature == pytest.approx([0.2 if e else 0.7 for e in exploring])


def test_exploration_is_without_noise_unless_asked_for():
    schedule = bdl.cyclical(0.1, steps_per_cycle=8, exploration=0.5)
    assert [float(schedule.temperature(i, 1.0)) for i in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


# ---- cyclical: draws ----------------------------------------------------------------------------------------------


def ends_of_draws(schedule, draws):
    """Walk from draw to draw, as a kernel does."""
    steps = [0]
    for _ in range(draws):
        steps.append(steps[-1] + int(schedule.steps_to_draw(steps[-1])))
    return steps[1:]


@st.composite
def cycles(draw):
    steps = draw(st.integers(1, 200))
    exploration = draw(st.floats(0, 0.95))
    sampling = steps - math.ceil(exploration * steps)
    draws = draw(st.integers(1, max(sampling, 1)))
    return {"steps_per_cycle": steps, "exploration": exploration if sampling else 0.0, "draws_per_cycle": draws}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cycle=cycles(), data=st.data())
def test_steps_to_the_next_draw_agree_with_steps_until(cycle, data):
    schedule = bdl.cyclical(0.1, **cycle)
    ends = np.array([schedule.steps_until(n) for n in range(3 * cycle["draws_per_cycle"] + 1)])
    assert ends[0] == 0
    assert np.all(np.diff(ends) > 0)
    for i in data.draw(st.lists(st.integers(0, 3 * cycle["steps_per_cycle"] - 1), max_size=5)) + [0]:
        assert i + int(schedule.steps_to_draw(i)) == ends[ends > i][0]


@pytest.mark.parametrize("cycle", CYCLES)
def test_draws_are_of_the_sampling_phase_and_end_the_cycle(cycle):
    schedule, k, draws = bdl.cyclical(0.1, **cycle), cycle["steps_per_cycle"], cycle.get("draws_per_cycle", 1)
    ends = ends_of_draws(schedule, 2 * draws)
    # the draw that ends after step count e was made by step e - 1
    assert all((end - 1) % k >= cycle["exploration"] * k for end in ends)
    assert ends[draws - 1 :: draws] == [k, 2 * k]
    gaps = np.diff(ends[:draws])
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_run_hands_over_draws_of_the_sampling_phase_alone():
    schedule = bdl.cyclical(0.1, steps_per_cycle=10, exploration=0.6, draws_per_cycle=2)
    mcmc = run(2, 6, step_size=schedule, temperature=0.5)
    fields = mcmc.get_extra_fields()
    assert fields["i"].tolist() == [18, 20, 28, 30, 38, 40]
    assert fields["temperature"] == pytest.approx(0.5)
    assert fields["step_size"] == pytest.approx(np.asarray(jax.vmap(schedule)(fields["i"] - 1)))
    assert len(np.unique(mcmc.get_samples()["x"])) == 6


def test_exploration_of_a_run_is_gradient_descent():
    schedule = bdl.cyclical(0.1, steps_per_cycle=10, exploration=0.9)
    kernel = bdl.SGLD(model, step_size=schedule)
    state = kernel.init(random.key(0), 0, {"x": jnp.array(5.0)}, (), {})
    for i in range(9):
        state = kernel._step(state, jnp.int32(i), jnp.int32(0), (), {})
    descended = 5.0 * np.prod([1 - float(schedule(i)) for i in range(9)])
    assert float(state.z["x"]) == pytest.approx(descended, rel=1e-5)
    assert float(kernel._step(state, jnp.int32(9), jnp.int32(0), (), {}).z["x"]) != pytest.approx(descended, rel=1e-3)


# ---- cyclical: refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"peak": 0.0}, "cyclical: peak must be a number in .*, got 0.0"),
        ({"peak": -1.0}, "peak must be a number in .*, got -1.0"),
        ({"peak": math.inf}, "peak must be a number in .*, got inf"),
        ({"peak": math.nan}, "peak must be a number in .*, got nan"),
        ({"steps_per_cycle": 0}, "steps_per_cycle must be an integer of at least 1, got 0"),
        ({"steps_per_cycle": 10.0}, r"steps_per_cycle must be an integer of at least 1, got 10\.0"),
        ({"draws_per_cycle": 0}, "draws_per_cycle must be an integer of at least 1, got 0"),
        ({"exploration": 1.0}, r"exploration must be a number in .*, got 1.0"),
        ({"exploration": -0.1}, r"exploration must be a number in .*, got -0.1"),
        ({"exploration": math.nan}, r"exploration must be a number in .*, got nan"),
        ({"exploration_temperature": -1.0}, "exploration_temperature must be a number in .*, got -1.0"),
        ({"exploration_temperature": math.inf}, "exploration_temperature must be a number in .*, got inf"),
        ({"exploration_temperature": math.nan}, "exploration_temperature must be a number in .*, got nan"),
        (
            {"exploration": 0.9, "draws_per_cycle": 2},
            "10 steps with exploration=0.9 leaves 1 sampling steps for 2 draws",
        ),
    ],
)
def test_cyclical_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        bdl.cyclical(**({"peak": 0.1, "steps_per_cycle": 10} | arguments))


# ---- numbers and schedules of the user ----------------------------------------------------------------------------


@pytest.mark.parametrize("step_size", [0.1, np.float32(0.1), np.array(0.1), jnp.array(0.1)])
def test_a_number_is_a_constant_schedule(step_size):
    schedule = as_schedule(step_size, None)
    assert schedule(0) == schedule(1000) == pytest.approx(0.1)
    assert largest_step(schedule) == pytest.approx(0.1)
    assert (schedule.steps_to_draw(3), schedule.steps_until(5)) == (1, 5)


def test_steps_per_draw_counts_steps():
    schedule = as_schedule(0.1, 7)
    assert (schedule.steps_to_draw(3), schedule.steps_until(5)) == (7, 35)
    assert run(2, 3, step_size=0.1, steps_per_draw=7).get_extra_fields()["i"].tolist() == [21, 28, 35]


def test_an_optax_schedule_is_called_with_the_step_count_of_warmup_and_sampling():
    schedule = optax.linear_schedule(0.5, 0.1, transition_steps=20)
    fields = run(2, 4, step_size=schedule, steps_per_draw=5).get_extra_fields()
    assert fields["step_size"] == pytest.approx([float(schedule(i - 1)) for i in (15, 20, 25, 30)])


def test_a_temperature_may_be_a_schedule():
    temperature = optax.linear_schedule(2.0, 1.0, transition_steps=10)
    fields = run(0, 12, step_size=0.1, temperature=temperature).get_extra_fields()
    assert fields["temperature"] == pytest.approx([float(temperature(i)) for i in range(12)])


def test_the_largest_step_of_a_schedule_is_found():
    warmup = optax.warmup_cosine_decay_schedule(1e-5, 0.02, warmup_steps=50, decay_steps=2000)
    assert largest_step(as_schedule(warmup, None)) == pytest.approx(0.02, rel=1e-3)
    late = optax.join_schedules([optax.constant_schedule(0.1), optax.constant_schedule(0.5)], [500_000])
    assert largest_step(as_schedule(late, None)) == pytest.approx(0.5)
    assert largest_step(bdl.cyclical(0.3, steps_per_cycle=10)) == 0.3


@pytest.mark.parametrize(
    ("step_size", "error", "text"),
    [
        (0.0, ValueError, "step_size must be a positive finite number, got 0.0"),
        (-0.1, ValueError, "step_size must be a positive finite number, got -0.1"),
        (math.inf, ValueError, "step_size must be a positive finite number, got inf"),
        (math.nan, ValueError, "step_size must be a positive finite number, got nan"),
        ("0.1", TypeError, r"step_size must be a number, an optax schedule or numpyro_bdl.cyclical\(...\), got str"),
        (True, TypeError, "got bool"),
        (None, TypeError, "got NoneType"),
        ([0.1], TypeError, "got list"),
        (np.array([0.1, 0.2]), TypeError, "got ndarray"),
    ],
)
def test_step_size_is_refused(step_size, error, text):
    with pytest.raises(error, match=text):
        as_schedule(step_size, None)


@pytest.mark.parametrize("steps", [0, -3, 2.0, "2"])
def test_steps_per_draw_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps_per_draw must be an integer of at least 1, got {steps!r}"):
        as_schedule(0.1, steps)


def test_steps_per_draw_beside_a_cycle_is_refused():
    with pytest.raises(ValueError, match="steps_per_draw=5 is given beside a cyclical schedule.*draws_per_cycle"):
        as_schedule(bdl.cyclical(0.1, steps_per_cycle=10), 5)


# ---- pickling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", [as_schedule(0.1, 3), bdl.cyclical(0.1, steps_per_cycle=20, draws_per_cycle=2)], ids=["number", "cycle"]
)
def test_schedules_are_pickled(schedule):
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert float(copy(7)) == float(schedule(7))
    assert ends_of_draws(copy, 4) == ends_of_draws(schedule, 4)
