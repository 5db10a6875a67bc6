# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Two host devices for parallel chains, a cache of compiled programs that the workers share, and fixtures."""

import gc
import os
import platform
from importlib.metadata import version
from pathlib import Path

# Most of the time goes into compiling programs that run once, and half of that into LLVM's optimizations. Without them
# some programs fuse a product with a sum and others don't: without AVX2, which brings that, all round the same. XLA's
# library of elementwise operations, YNNPACK, uses such instructions even so, and is slow where the last axis is short.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_cpu_max_isa=AVX" if platform.machine() in ("x86_64", "AMD64") else "",
        # experimental: another XLA may not know it, and aborts on what it does not know
        "--xla_cpu_experimental_ynn_fusion_type=" if version("jaxlib").startswith("0.12.") else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=2",
    ]
)
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

MEMORY_MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Forget compiled programs in time: each holds memory maps; past the 65530 that Linux grants, XLA crashes. The
    next tests compile all anew, even what is small; a single test adds up to 3000."""
    yield
    if MEMORY_MAPS.exists() and MEMORY_MAPS.read_text().count("\n") > 45_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def optimized():
    """Compile with LLVM's optimizations: for a test that runs its programs for longer than it compiles them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


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
