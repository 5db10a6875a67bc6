# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration. The build needs no network."""

import shutil
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
exclude_patterns = ["_build"]
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
for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
    shutil.copy2(notebook, HERE / "_notebooks")
