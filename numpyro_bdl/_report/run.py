# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""A tree as the page reads it: the chains that are finite, and what was found on the way."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from xarray import DataArray, Dataset, DataTree

DRAWS = ("posterior", "functions", "log_likelihood", "sample_stats")
"""Groups of draws, of which a page needs one."""

_MOST_VALUES = 500


class Finding(NamedTuple):
    """A warning: what it is about, and what to do."""

    title: str
    text: str


class Gap(NamedTuple):
    """What the page leaves out, and why, or how to get it."""

    what: str
    why: str


class Run:
    """The finite chains of a tree, with what was found in it.

    Attribute ``tree`` has all of them, ``whole`` the tree as it came, and ``few`` the functions at so few points and
    outputs that R-hat and ESS of each take seconds.

    :param tree: A tree with at least one of the groups :data:`DRAWS`.
    :raises ValueError: for a tree without them, or values in them without chains and draws.
    """

    def __init__(self, tree: DataTree):
        groups = [name for name in DRAWS if name in tree.children]
        if not groups:
            raise ValueError(
                f"report: the tree has none of the groups {', '.join(DRAWS)}; make it by numpyro_bdl.to_datatree. Its"
                f" groups: {', '.join(tree.children) or 'none'}."
            )
        for group in groups:
            for name, value in tree[group].data_vars.items():
                if not {"chain", "draw"} <= set(value.dims):
                    raise ValueError(
                        f"report: '{name}' in the group '{group}' has dimensions {tuple(value.dims)}, without chain and"
                        " draw; hand in the tree as to_datatree makes it, not reduced."
                    )
        self.sizes = {dim: tree[groups[0]].sizes[dim] for dim in ("chain", "draw")}
        self.kept = np.flatnonzero(_finite(tree, self.sizes["chain"]))
        self.tree = tree.map_over_datasets(_indexed).isel(chain=self.kept)
        self.whole = tree
        self.attrs = dict(tree.attrs)
        self.findings: list[Finding] = []
        self.gaps: list[Gap] = []
        functions = self.values("functions")
        few = {"functions": thinned(functions, _MOST_VALUES)} if functions else {}
        if few and "sample_stats" in self.tree.children:  # traces mark divergent transitions
            few["sample_stats"] = self.tree["sample_stats"].to_dataset()
        self.few = DataTree.from_dict(few)

    @property
    def chains(self) -> int:
        """Number of chains that are finite."""
        return len(self.kept)

    @property
    def maker(self) -> str:
        """The kernel or the guide, as far as the tree tells."""
        return str(self.attrs.get("kernel", self.attrs.get("guide", "a sampler that the tree does not name")))

    @property
    def mixes(self) -> bool:
        """Whether the draws are of chains with one law, so that R-hat and ESS say something of them."""
        return "guide" not in self.attrs and self.attrs.get("langevin", 1) != 0 and not self._particles_are_draws

    @property
    def of_posterior(self) -> bool:
        """Whether the draws have, or approach, the law of the posterior, which PSIS-LOO reweights."""
        expected = {"temperature": 1, "langevin": 1, "kl": 1, "mmd": 0}
        stats = self.values("sample_stats").get("temperature")
        tempered = stats is not None and bool(np.any(np.asarray(stats) != 1))
        return (
            "guide" not in self.attrs and not tempered and all(self.attrs.get(k, v) == v for k, v in expected.items())
        )

    @property
    def _particles_are_draws(self) -> bool:
        return "langevin" in self.attrs and self.sizes["chain"] == 1

    def values(self, group: str) -> dict[str, DataArray]:
        """Values of a group by name, chain and draw in front; none if there is no chain or no such group."""
        if group not in self.tree.children or not self.chains:
            return {}
        return {str(k): v.transpose("chain", "draw", ...) for k, v in self.tree[group].data_vars.items()}

    def parameters(self) -> dict[str, DataArray]:
        """Values of the posterior, but for functions, which ``to_datatree(..., weights=False)`` puts there."""
        functions = self.values("functions")
        return {name: value for name, value in self.values("posterior").items() if name not in functions}

    def observed(self) -> dict[str, np.ndarray]:
        """Observed data by name."""
        if "observed_data" not in self.tree.children:
            return {}
        return {str(name): value.to_numpy() for name, value in self.tree["observed_data"].data_vars.items()}

    def ask(self, what: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a diagnostic or a picture: its warnings are findings; if it refuses, its reason is a gap.

        :param what: What it is about, the title of both.
        :return: What the function returns, None if it refuses.
        """
        result = None
        # chains that stand still or are far away have an R-hat or a variance that is no number, and are shown as such
        with warnings.catch_warnings(record=True) as caught, np.errstate(all="ignore"):
            warnings.simplefilter("always", UserWarning)
            try:
                result = function(*args, **kwargs)
            except ValueError as refusal:
                self.gaps.append(Gap(what, str(refusal)))
        for warning in caught:
            finding = Finding(what, str(warning.message))
            if not issubclass(warning.category, UserWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            elif finding not in self.findings:
                self.findings.append(finding)
        return result


def _indexed(dataset: Dataset) -> Dataset:
    """With numbers for labels where there are none, as ArviZ asks for."""
    return dataset.assign_coords({dim: dataset[dim] for dim in dataset.dims})


def thinned(values: dict[str, DataArray], most: int) -> Dataset:
    """Values of which each draw has at most so many: every second along the longest dimension, until they are few."""
    few = Dataset(values)
    while sum(value.size for value in few.isel(chain=0, draw=0).data_vars.values()) > most:
        longest = max(few.sizes, key=lambda dim: (dim not in ("chain", "draw")) * few.sizes[dim])
        if few.sizes[longest] == 1:
            break
        few = few.isel({longest: slice(None, None, 2)})
    return few


def _finite(tree: DataTree, chains: int) -> np.ndarray:
    """Which chains have no NaN in their draws; log likelihoods may be minus infinity."""
    finite = np.ones(chains, bool)
    for group in ("posterior", "functions", "log_likelihood"):
        for value in tree[group].data_vars.values() if group in tree.children else ():
            if value.dtype.kind == "f":
                numbers = value.transpose("chain", "draw", ...).to_numpy().reshape(chains, -1)
                finite &= (~np.isnan(numbers) if group == "log_likelihood" else np.isfinite(numbers)).all(1)
    return finite
