# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Two host devices for parallel chains, and fixtures.

JAX's persistent compilation cache is left off: writing to it and reading from it each crashed a worker (jax 0.12, CPU).
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest


@pytest.fixture
def compilations():
    """A list that grows with every program that XLA compiles or loads."""
    from jax import monitoring

    seen = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(kwargs.get("fun_name", "?"))

    monitoring.register_event_duration_secs_listener(listen)
    yield seen
    monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def progress_bar(monkeypatch):
    """NumPyro switches its bar off under CI and pytest-xdist; with it, it also recompiles every run."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
