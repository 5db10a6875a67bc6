# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The examples run from the command line and write what they say."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import xarray as xr

EXAMPLES = Path(__file__).parent.parent / "examples"


def smoke_run(example, output):
    """What a quick run prints."""
    environment = os.environ | {
        "MPLBACKEND": "Agg",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, "--quick", "--output", output],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def table_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A smoke run of the demo: its folder and what it printed."""
    pytest.importorskip("sklearn")
    pytest.importorskip("h5netcdf")
    output = tmp_path_factory.mktemp("digits")
    return output, smoke_run("digits.py", output)


def test_digits_judges_every_method_at_the_same_number_of_gradients(digits):
    output, printed = digits
    table = table_of(output / "digits.csv")
    assert [row["method"] for row in table] == ["MAP", "SGLD", "cyclical SGLD", "SGHMC", "FlatBasinSGLD"]
    assert {row["gradients"] for row in table} == {"150"}
    for row in table:
        assert 0 <= float(row["accuracy"]) <= 1
        assert 0 <= float(row["ECE"]) <= 1
        assert 0 <= float(row["AUROC 8-9"]) <= 1
        assert math.isfinite(float(row["NLL"]))
        assert float(row["seconds"]) > 0
        assert row["method"] == "MAP" or float(row["worst R-hat"]) > 0.9
        assert f"{float(row['NLL']):.3f}" in printed


def test_digits_keeps_the_draws_and_the_picture(digits):
    output, _ = digits
    assert (output / "digits.png").stat().st_size > 10_000
    names = ["mlp-cyclical-sgld", "mlp-flatbasinsgld", "mlp-sghmc", "mlp-sgld"]
    assert sorted(path.stem for path in output.glob("*.nc")) == names
    for name in names:
        with xr.open_datatree(output / f"{name}.nc", engine="h5netcdf") as tree:
            assert ("anchor" in tree.children) == (name == "mlp-flatbasinsgld")
            assert tree["functions"]["y"].sizes == {"chain": 4, "draw": 20, "point": 64, "output": 8}
            assert tree["posterior"]["net.Dense_0.kernel"].shape == (4, 20, 64, 64)


def test_warm_start_compares_both_starts(tmp_path):
    pytest.importorskip("matplotlib")
    printed = smoke_run("warm_start.py", tmp_path)
    at_random, trained = table_of(tmp_path / "warm_start.csv")
    assert [at_random["chains start"], trained["chains start"]] == ["at random", "trained"]
    for row in (at_random, trained):
        assert all(math.isfinite(float(value)) for name, value in row.items() if name != "chains start")
        assert f"{float(row['LPPD']):.3f}" in printed
    assert (tmp_path / "warm_start.png").stat().st_size > 10_000
