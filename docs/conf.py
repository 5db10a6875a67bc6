# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration. The build needs no network."""

import csv
import shutil
import statistics
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent

project = "numpyro_bdl"
author = "Contributors to the numpyro_bdl project"
copyright = author
release = version = installed_version("numpyro_bdl")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = f"numpyro_bdl {release}"

# Docstrings are reST with :param: fields; the pages are MyST.
autodoc_member_order = "bysource"
autodoc_typehints = "none"
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# Notebooks run when they change, and an error in one fails the build.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
# Progress bars and the like.
nb_output_stderr = "remove"

# Sphinx reads only what lies below this folder.
shutil.rmtree(HERE / "_notebooks", ignore_errors=True)
(HERE / "_notebooks").mkdir()
for notebook in sorted((HERE.parent / "notebooks").iterdir()):
    if notebook.suffix in {".ipynb", ".md"} and notebook.name != "README.md":
        shutil.copy2(notebook, HERE / "_notebooks")

# Tables come from the committed results of the benchmarks, so that the pages can't disagree with them.
GENERATED = HERE / "_generated"
GENERATED.mkdir(exist_ok=True)
RESULTS = HERE.parent / "benchmarks" / "results"


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _read(name):
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def _step_table():
    rows = _read("step.csv")
    first, second = (next(key for key in rows[0] if key.startswith(word)) for word in ("first_run", "second_run"))
    header = ["chains", "variant", "ms per step", "MCMC takes", "first run, s", "second run, s"]
    columns = ("chains", "variant", "ms_per_step", "mcmc_ratio", first, second)
    body = [[row[c] and (f"{row[c]} x" if c == "mcmc_ratio" else row[c]) for c in columns] for row in rows]
    return f"Device: {rows[0]['device']}, jax {rows[0]['jax']}.\n\n" + _table(header, body)


def _predictive_table():
    rows = _read("predictive.csv")
    header = [
        "variant",
        "ms per draw",
        "quartiles",
        "`functions` takes",
        "first call besides, s",
        "GB before",
        "GB peak",
    ]
    columns = (
        "variant",
        "ms_per_draw",
        "ms_quartiles",
        "functions_ratio",
        "first_call_besides_s",
        "gb_before",
        "gb_peak",
    )
    body = [[row[c] + " x" if c == "functions_ratio" else row[c] for c in columns] for row in rows]
    text = f"Device: {rows[0]['device']}, jax {rows[0]['jax']}, numpyro {rows[0]['numpyro']}; memory for"
    return f"{text} {rows[0]['draws']} draws.\n\n" + _table(header, body)


def _fidelity_table():
    groups = {}
    for row in _read("fidelity.csv"):
        groups.setdefault((row["kernel"], row["minibatch"]), []).append(row)
    columns = ("agreement", "total_variation", "worst_rhat", "least_ess", "seconds")
    body = [
        [*key, *(f"{statistics.mean(float(row[c]) for row in group):.4g}" for c in columns)]
        for key, group in groups.items()
    ]
    return _table(["kernel", "minibatch", "agreement", "total variation", "worst R-hat", "least ESS", "seconds"], body)


def _fold_table():
    rows = _read("symmetry_fold.csv")
    header = [
        "network",
        "parameters",
        "program",
        "draws per second",
        "times the copy",
        "processor time, times the copy",
    ]
    columns = ("network", "parameters", "program", "draws_per_second", "times_the_copy", "processor_times_the_copy")
    table = _table(header, [[row[c] for c in columns] for row in rows])
    return f"Device: {rows[0]['device']}, jax {rows[0]['jax']}.\n\n" + table


def _toys_table():
    columns = {
        "data": "data",
        "seed": "seed",
        "chains": "chains",
        "LPPD, all draws": "lppd",
        "last draws": "lppd_last_draws",
        "one chain: mean": "lppd_single_mean",
        "worst": "lppd_single_worst",
        "best": "lppd_single_best",
        "chains in each mode": "mode_sizes",
        "R-hat (median): raw weights": "rhat_raw_median",
        "folded": "rhat_folded_median",
        "functions": "rhat_functions_median",
    }
    return _table(list(columns), [[row[c] for c in columns.values()] for row in _read("symmetry_toys.csv")])


def _uci_table():
    groups = {}
    for row in _read("symmetry_uci.csv"):
        groups.setdefault((row["data"], row["method"]), []).append(row)
    means = ("lppd", "rmse", "gradients", "seconds")
    body = [
        [*key, ", ".join(row["lppd"] for row in rows)]
        + [f"{statistics.mean(float(row[c]) for row in rows):.4g}" for c in means]
        for key, rows in groups.items()
    ]
    return _table(["data", "method", "LPPD by split", "mean", "RMSE", "gradients", "seconds"], body)


(GENERATED / "step.md").write_text(_step_table())
(GENERATED / "predictive.md").write_text(_predictive_table())
(GENERATED / "symmetry_fold.md").write_text(_fold_table())
(GENERATED / "symmetry_toys.md").write_text(_toys_table())
(GENERATED / "symmetry_uci.md").write_text(_uci_table())
(GENERATED / "fidelity.md").write_text(_fidelity_table())
