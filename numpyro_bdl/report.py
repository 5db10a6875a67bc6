# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""A page that tells of a run: what to worry about, numbers and pictures."""

from pathlib import Path

import numpy as np
from xarray import DataTree

from numpyro_bdl._report.run import Run


def report(tree: DataTree, path: str | Path, *, title: str | None = None) -> Path:
    """Write one HTML page about a run: warnings first, then numbers and pictures.

    The page is a single file that loads nothing, to be opened in a browser, mailed or kept with the run. It has

    - **warnings**: chains that broke, disagree (R-hat of the function above 1.01 and 1.1), stand still, predict far
      worse than the others or are few; few effective draws; divergent transitions; statistics that are not finite;
      influential rows (Pareto k); a temperature other than 1. They are those of :mod:`numpyro_bdl.diagnostics` and of
      ArviZ. If there are none, the page says so;
    - **convergence of the function**: R-hat and ESS, traces and ranks of its worst values, R-hat by layer, modes;
    - **predictions** of the rows of the run: log predictive density, PSIS-LOO, accuracy and calibration of classes,
      errors and coverage of numbers;
    - **selection**, if the kernel selects or prunes; the **sampler**, the **parameters** that are single numbers, and
      the attributes of the tree;
    - **what is not here**: what other groups would add, and how to make them.

    Chains that are not finite are named and left out. What holds only for draws of the posterior, as PSIS-LOO, is left
    out for others. R-hat is computed at no more than 500 function values, evenly spaced. Accuracy needs logits at rows
    of the run, which are recognized by the log likelihoods that they imply. The same tree gives the same bytes.

    :param tree: The tree of :func:`~numpyro_bdl.to_datatree`, the fuller the better: with ``log_likelihood=True`` and
        ``posterior_predictive=True``, and ``probe=(x,)`` if the network is cheap.
    :param path: File to write, as ``"run.html"``; one that exists is replaced.
    :param title: Title of the page; None for the name of the kernel or guide.
    :return: The path.
    :raises TypeError: for anything but a DataTree.
    :raises ValueError: for a tree without any of the groups ``posterior``, ``functions``, ``log_likelihood`` and
        ``sample_stats``, or with values in these that have no dimensions chain and draw.
    :raises FileNotFoundError: if the folder of the path does not exist.
    :raises IsADirectoryError: if the path is a folder.

    **Example**

    .. doctest::

        >>> import arviz as az, numpy as np, pathlib, tempfile
        >>> import numpyro_bdl as bdl
        >>> draws = np.random.default_rng(0).normal(size=(4, 500, 3))
        >>> tree = az.from_dict({"functions": {"y": draws}})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = bdl.report(tree, pathlib.Path(folder) / "run.html").read_text()
        >>> "No warnings" in page, page.count("<img ")
        (True, 4)
    """
    path = Path(path)
    if not isinstance(tree, DataTree):
        raise TypeError(
            f"report: tree must be a DataTree, got {type(tree).__name__}; numpyro_bdl.to_datatree makes one of a run."
        )
    if path.is_dir():
        raise IsADirectoryError(f"report: path is a folder, '{path}'; name a file, as '{path / 'run.html'}'.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"report: there is no folder '{path.parent}' to write '{path.name}' into; make it first."
        )
    path.write_text(_page(Run(tree), title), encoding="utf-8")
    return path


def _page(run: Run, title: str | None) -> str:
    from numpyro_bdl._report import figures, findings, page, scores, tables

    run.gaps += tables.absent(run)
    convergence = findings.look(run)
    classes = scores.classes_of(run)
    sections = [
        page.Section(
            "Does the function converge?",
            "R-hat should be below 1.01, and effective draws at least 100 for each chain, of what the network predicts:"
            " its weights can be exchanged without a change, and tell nothing of that.",
            tables.convergence(run, convergence),
            figures.convergence(run, convergence) + figures.modes(run),
        ),
        page.Section(
            "How well does it predict?",
            "At rows that the model was fitted to, which flatters it; PSIS-LOO estimates what new rows would show.",
            tables.scored(scores.scores(run, classes)),
            figures.calibration(run, classes),
        ),
        page.Section("What was selected?", "", (), figures.selection(run)),
        page.Section("The sampler", "", _present(tables.statistics(run)), figures.statistics(run)),
        page.Section("Parameters", "", _present(tables.parameters(run))),
        page.Section("The tree", "", [tables.contents(run), tables.attributes(run)]),
    ]
    return page.render(title or f"Report: {run.maker}", _lead(run), run.findings, sections, run.gaps)


def _lead(run: Run) -> list[str]:
    chains, draws = run.sizes["chain"], run.sizes["draw"]
    lines = [f"{run.maker}, {chains} chain{'s' * (chains > 1)} of {draws:,} draw{'s' * (draws > 1)}."]
    data = [f"{name} {' x '.join(map(str, y.shape)) or 'a number'}" for name, y in run.observed().items()]
    if data:
        lines.append(f"Data: {', '.join(data)}.")
    sites = run.parameters()
    if sites:
        size = sum(int(np.prod(value.shape[2:])) for value in sites.values())
        lines.append(f"Posterior: {size:,} numbers in {len(sites)} sites.")
    return lines


def _present(table) -> list:
    return [] if table is None else [table]
