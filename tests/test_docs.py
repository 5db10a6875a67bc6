# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Everything public is documented, and the README does what it says."""

import inspect
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import numpyro_bdl as bdl
from numpyro_bdl import plots

ROOT = Path(__file__).parent.parent
PAGES = {page: page.read_text() for page in (ROOT / "docs").rglob("*.md") if "_" not in page.parent.name}
NAMES = [name for name in vars(bdl) if not name.startswith("_")]
KERNELS = [name for name in NAMES if inspect.isclass(getattr(bdl, name)) and "kernels" in getattr(bdl, name).__module__]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_in_the_reference(name):
    thing = getattr(bdl, name)
    if inspect.ismodule(thing):
        wanted = [f"automodule:: {thing.__name__}\n"]
    else:
        wanted = [f"autoclass:: numpyro_bdl.{name}\n", f"autofunction:: numpyro_bdl.{name}\n"]
        wanted.append(f"automodule:: {thing.__module__}\n")
    if thing.__name__ in ("numpyro_bdl.kernels", "numpyro_bdl.datatree", "numpyro_bdl.predictive"):
        return  # packages and modules whose names are public one by one
    assert any(text in page for page in PAGES.values() for text in wanted), wanted


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_has_a_page_of_its_own(name):
    module = getattr(bdl, name).__module__.removeprefix("numpyro_bdl.kernels.")
    assert ROOT / "docs" / "kernels" / f"{module}.md" in PAGES
    assert f"\n{module}\n" in PAGES[ROOT / "docs" / "kernels" / "index.md"]


@pytest.mark.parametrize("name", NAMES)
def test_public_docstrings_tell_parameters(name):
    thing = getattr(bdl, name)
    assert inspect.getdoc(thing)
    if inspect.isfunction(thing):
        for parameter in inspect.signature(thing).parameters:
            assert f":param {parameter}:" in thing.__doc__, parameter


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_docstrings_tell_their_own_parameters(name):
    kernel = getattr(bdl, name)
    if "__init__" in vars(kernel):
        parameters = [p for p in inspect.signature(vars(kernel)["__init__"]).parameters if p not in ("self", "kwargs")]
        for parameter in parameters:
            documented = kernel.__doc__ + bdl.StochasticGradientKernel.__doc__
            assert f":param {parameter}:" in documented, parameter
    assert ".. math::" in kernel.__doc__ or name == "StochasticGradientKernel"


def test_every_picture_is_in_the_reference_and_drawn_on_the_page_of_pictures():
    cells = re.findall(r"```{code-cell} ipython3\n(.*?)```", PAGES[ROOT / "docs" / "plots.md"], flags=re.DOTALL)
    functions = [name for name, thing in vars(plots).items() if inspect.isfunction(thing)]
    assert len(functions) >= 15
    for name in functions:
        assert f"autofunction:: numpyro_bdl.plots.{name}\n" in PAGES[ROOT / "docs" / "api" / "plots.md"]
        assert any(f"plots.{name}(" in cell for cell in cells), name
    scope: dict = {}
    for cell in cells:
        exec(compile(cell, "docs/plots.md", "exec"), scope)
        assert bool(plt.get_fignums()) == ("plots." in cell)
        for figure in map(plt.figure, plt.get_fignums()):
            figure.canvas.draw()
            assert all(ax.has_data() for ax in figure.axes)
        plt.close("all")


def run_the_block_of(page):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    scope: dict = {}
    exec(compile(block, page, "exec"), scope)
    return scope


def test_the_readme_runs_as_printed(capsys):
    scope = run_the_block_of("README.md")
    printed = capsys.readouterr().out
    assert float(printed.splitlines()[0]) > 0.9
    assert "functions" in printed
    assert np.isfinite(scope["logits"]).all()


def test_the_page_of_the_diagnostics_says_what_it_prints(capsys):
    scope = run_the_block_of("docs/diagnostics.md")
    of_weights, of_functions = map(float, capsys.readouterr().out.split())
    assert of_weights > 1.5
    assert of_functions < 1.1
    assert scope["modes"].num_modes == 1
    assert scope["modes"].further_chains() == 0
