# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The page is read as a browser would: what it loads, what it shows, what it warns of."""

import io
import re
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree.ElementTree import TreeBuilder

import arviz as az
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.infer import MCMC
from scipy import stats
from scipy.special import log_expit, log_softmax
from xarray import Dataset, DataTree

import numpyro_bdl as bdl
from numpyro_bdl import metrics

CHAINS, DRAWS, ROWS = 4, 450, 12
VOID = {"meta", "img"}
NAME = "<b>&\"'"


class Reader(HTMLParser):
    """Elements of a page whose tags are balanced."""

    def __init__(self):
        super().__init__()
        self.builder, self.open = TreeBuilder(), []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.builder.start(tag, dict(attrs))
        self.open.append(tag)
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        if self.open:
            self.builder.data(data)


class Page:
    """What stands on a page."""

    def __init__(self, tree, tmp_path, **kwargs):
        path = tmp_path / "page.html"
        assert bdl.report(tree, path, **kwargs) == path
        self.html = path.read_text(encoding="utf-8")
        reader = Reader()
        reader.feed(self.html)
        reader.close()
        assert not reader.open
        self.root = reader.builder.close()
        (box,) = [s for s in self.root.iter("section") if s.get("class", "").startswith("box")]
        self.box = box.find("h2").text
        self.findings = {li.find("h3").text: li.find("p").text for li in box.iter("li")}
        self.tables = {table.find("caption").text: self._cells(table) for table in self.root.iter("table")}
        self.images = list(self.root.iter("img"))
        self.captions = [caption.text for caption in self.root.iter("figcaption")]
        self.gaps = dict(
            zip((e.text for e in self.root.iter("dt")), (e.text for e in self.root.iter("dd")), strict=True)
        )

    def _cells(self, table):
        header = [cell.text or "" for cell in table.find("thead").iter("th")]
        rows = [["".join(cell.itertext()) for cell in row] for row in table.find("tbody").iter("tr")]
        assert all(len(row) == len(header) for row in rows)
        return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}

    def table(self, caption):
        (found,) = [cells for text, cells in self.tables.items() if text.startswith(caption)]
        return found

    def number(self, caption, row, column="value"):
        return float(self.table(caption)[row][column].replace(",", ""))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(CHAINS, DRAWS, *shape))


def group(values, *dims, **coords):
    """A group of one variable or several of the same dimensions after chain and draw."""
    shared = ("chain", "draw")[: 2 if np.shape(next(iter(values.values())))[1:2] == (DRAWS,) else 1]
    return Dataset({name: ((*shared, *dims), value) for name, value in values.items()}, coords=coords)


def tree_of(attrs=None, **groups):
    """A tree of chains that have mixed, but for what is given."""
    tree = az.from_dict({"functions": {"y": np.sin(np.arange(6.0)) + 0.3 * normal(6)}} | groups)
    tree.attrs = {"kernel": "SGLD", "temperature": 1.0} | (attrs or {})
    return tree


def classified(classes=3):
    """Labels, logits and log likelihoods of all rows; for one class, of a Bernoulli site."""
    labels = np.random.default_rng(1).integers(0, max(classes, 2), ROWS)
    logits = 2 * np.eye(max(classes, 2))[labels] + normal(ROWS, max(classes, 2), seed=2)
    if classes == 1:
        logits = logits[..., 1] - logits[..., 0]
        return labels, logits, log_expit(np.where(labels == 1, logits, -logits))
    return labels, logits, np.take_along_axis(log_softmax(logits, -1), labels[None, None, :, None], -1)[..., 0]


def classes_tree(points=None, classes=3, shift=0.0, **groups):
    labels, logits, density = classified(classes)
    points = np.arange(ROWS) if points is None else points
    dims = ("point", "output")[: logits.ndim - 2]
    return DataTree.from_dict(
        {
            "functions": group({"y": logits[:, :, points] + shift}, *dims, point=points),
            "log_likelihood": group({"y": density}, "data"),
            "observed_data": Dataset({"y": ("data", labels)}),
        }
        | groups
    )


def networked():
    """A tree with every group, and names that are not HTML."""
    units = [f"{NAME}{n}" for n in range(5)]
    weights = normal(5, 3, seed=3) + 3 * np.arange(CHAINS)[:, None, None, None]
    posterior = group({NAME: normal(seed=4)}).merge(group({"net.kernel": weights}, "in", "out"))
    inclusion = stats.beta.rvs(1, 3, size=(CHAINS, DRAWS, 5), random_state=0)
    tree = classes_tree(
        posterior=posterior,
        posterior_predictive=group({"y": np.zeros((CHAINS, DRAWS, ROWS), int)}, "data"),
        sample_stats=group({"energy" + NAME: normal(seed=5), "step_size": np.full((CHAINS, DRAWS), 0.1)}),
        inclusion=group({NAME + "w": inclusion}, "group", group=units),
        mask=group({"net.mask": np.arange(CHAINS * 5).reshape(CHAINS, 5) % 3 == 0}, "group", group=units),
    )
    tree.attrs = {"kernel": f"SpikeSlabSGHMC {NAME}", "temperature": 1.0, NAME: NAME}
    return tree


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return Page(networked(), tmp_path_factory.mktemp("full"), title=f"A run {NAME}")


# ---- the page -------------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_from_elsewhere(full):
    tags = {element.tag for element in full.root.iter()}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for element in full.root.iter():
        for name in ("src", "href", "srcset", "data", "poster", "action", "style", "background"):
            assert element.get(name, "data:").startswith("data:image/png;base64,") or name not in element.attrib
        assert not any(name.startswith("on") for name in element.attrib)
    (style,) = full.root.iter("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    assert "http" not in re.sub(r'base64,[^"]*', "", full.html)


def test_every_picture_is_in_the_page_and_can_be_decoded(full):
    beginnings = ["R-hat of the function", "Traces of the function values", "Ranks of the same", "R-hat by layer"]
    beginnings += ["Modes in function space", "Calibration of y", "Weights, or groups of them, that were pruned"]
    beginnings += [
        "Share of the groups that is excluded",
        "Inclusion probability of each group",
        "Traces of statistics",
    ]
    assert len(full.captions) == len(full.images) == len(beginnings)
    for caption, beginning in zip(full.captions, beginnings, strict=True):
        assert caption.startswith(beginning)
    for image in full.images:
        pixels = plt.imread(io.BytesIO(b64decode(image.get("src").partition(",")[2], validate=True)), format="png")
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.05  # not an empty sheet
        assert len(image.get("alt")) > 20


def test_the_page_can_be_read_aloud_and_on_a_phone(full):
    assert full.html.startswith("<!DOCTYPE html>\n")
    assert full.root.get("lang") == "en"
    metas = {key: value for meta in full.root.iter("meta") for key, value in [(meta.get("name"), meta.get("content"))]}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert "prefers-color-scheme: dark" in next(full.root.iter("style")).text
    assert [element.text for element in full.root.iter("h1")] == [f"A run {NAME}"]
    levels = [int(element.tag[1]) for element in full.root.iter() if re.fullmatch("h[1-6]", element.tag)]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    for table in full.root.iter("table"):
        assert {cell.get("scope") for cell in table.find("thead").iter("th")} == {"col"}
        assert all(row[0].tag == "th" and row[0].get("scope") == "row" for row in table.find("tbody"))


def test_names_are_text_and_not_elements(full):
    assert "<b>" not in full.html
    assert next(full.root.iter("title")).text == f"A run {NAME}"
    assert NAME in full.table("Parameters")
    assert "energy" + NAME in full.table("Statistics of the sampler")
    assert full.table("Attributes")[NAME] == {"value": NAME}
    assert any(f"Inclusion probability of each group of {NAME}w" in caption for caption in full.captions)
    assert full.root.find("body/main/p").text == f"SpikeSlabSGHMC {NAME}, 4 chains of 450 draws."


def test_the_same_tree_gives_the_same_bytes(full, tmp_path):
    assert Page(networked(), tmp_path, title=f"A run {NAME}").html == full.html


def test_figures_and_settings_of_the_user_stay_as_they_are(full, tmp_path):
    mine, current = plt.figure(), plt.figure()
    try:
        with matplotlib.rc_context({"axes.facecolor": "red", "savefig.facecolor": "green", "figure.dpi": 30}):
            plt.ion()
            settings, lines = dict(matplotlib.rcParams), plt.get_fignums()
            assert Page(networked(), tmp_path, title=f"A run {NAME}").html == full.html  # in a style of its own
            assert dict(matplotlib.rcParams) == settings
            assert plt.get_fignums() == lines
            assert plt.gcf() is current
            assert plt.isinteractive()
            assert not mine.axes
            assert not current.axes
    finally:
        plt.ioff()
        plt.close("all")


# ---- warnings -------------------------------------------------------------------------------------------------------


def broken():
    functions = 0.3 * normal(6)
    functions[1, 200:] = np.nan
    functions[3, 7, 2] = np.inf
    return tree_of({"bad_chains": [1], "first_bad_steps": [2000]}, functions={"y": functions})


def shifted(by):
    return tree_of(functions={"y": 0.3 * normal(6) + by * np.array([0, 0, 0, 1])[:, None, None] * np.arange(6)})


def slow():
    steps = normal(6)
    for n in range(1, DRAWS):
        steps[:, n] += 0.9 * steps[:, n - 1]
    return tree_of(functions={"y": steps})


def stuck():
    functions = np.sin(np.arange(6.0)) + 0.3 * normal(6)
    functions[2] = np.sin(np.arange(6.0)) + 1e-5 * normal(6)[2]
    return tree_of(functions={"y": functions})


def heavy():
    """The importance ratios of row 3 have a tail with Pareto k = 1.2."""
    density = -1 + 0.1 * normal(ROWS)
    density[..., 3] = -np.random.default_rng(0).exponential(1.2, (CHAINS, DRAWS))
    density[1:] = density[:1]  # no chain is worse than another
    return tree_of(log_likelihood={"y": density}, observed_data={"y": np.zeros(ROWS)})


def worse():
    density = -1 + 0.1 * normal(ROWS)
    density[2] -= 3
    return tree_of(log_likelihood={"y": density}, observed_data={"y": np.zeros(ROWS)})


def stats_of(**values):
    return tree_of(sample_stats=values)


WARNINGS = {
    "nothing": (tree_of, {}),
    "broken": (
        broken,
        {
            "Chains that broke": r"2 of 4 chains .*: 1 \(since step 2000\), 3\. .* counts the others, 0, 2, from 0\.",
            "Few chains": "there are 2",
        },
    ),
    "disagree": (
        lambda: shifted(1.0),
        {
            "Chains that disagree": r"above 1\.01 at 83% .* largest is \d\.\d+, of y\[5\]. At 83% it is above 1\.1",
            "Few effective draws": r"At 83% of the function values .* fewer than 400 ",
        },
    ),
    "disagree a little": (
        lambda: shifted(0.025),
        {"Chains that disagree": r"above 1\.01 at \d+% .* Longer chains may be enough"},
    ),
    "slow": (slow, {"Chains that disagree": "above 1.01", "Few effective draws": r"At 100% .* fewer than 400 "}),
    "stuck": (
        stuck,
        {
            "Draws that hardly differ": r"functions of 1 of 4 chains hardly differ .*: 2 \(\d\.\de-05\)",
            "Chains that disagree": "",
            "Few effective draws": "",
        },
    ),
    "influential": (heavy, {"Influential rows of y": r"shape parameter of Pareto distribution is greater than 0\."}),
    "worse": (worse, {"Chains that predict worse": r"1 of 4 chains have a log predictive density .*: 2 \(-3\.9\d*\)"}),
    "divergences": (
        lambda: stats_of(diverging=np.arange(CHAINS * DRAWS).reshape(CHAINS, DRAWS) < 18),
        {"Divergent transitions": r"18 of 1800 transitions diverged \(1\.0%\)"},
    ),
    "statistics": (
        lambda: stats_of(lp=np.where(np.arange(DRAWS) < 3, np.nan, normal()), n_steps=np.ones((CHAINS, DRAWS), int)),
        {"Statistics that are not finite": r"infinite: lp \(12 of 1800\)\."},
    ),
    "energy": (
        lambda: stats_of(energy=np.cumsum(normal(), 1) * [[1], [1], [0], [0]] + normal(seed=1)),
        {"Energy": r"below 0\.3 in the chains 0, 1:"},
    ),
    "repulsion": (
        lambda: tree_of(
            {"kernel": "WGFEnsemble", "langevin": 1}, sample_stats={"repulsion_ratio": 1e-9 * normal() ** 2}
        ),
        {"Repulsion": "next to nothing"},
    ),
    "tempered": (lambda: tree_of({"temperature": 0.5}), {"Not the posterior": r"The temperature is 0\.5"}),
    "shared": (lambda: tree_of({"chains_share_minibatches": 1}), {"Shared minibatches": "All chains saw the same"}),
    "particles": (lambda: tree_of({"chains_share_minibatches": 1, "langevin": 1}), {}),
    "far away": (
        lambda: tree_of(functions={"y": np.float32(1e30) * normal(6).astype("float32")}),
        {},
    ),
    "few": (lambda: tree_of().isel(chain=[0]), {"Few chains": "there is 1"}),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_the_page_has_the_warnings_of_a_run_and_no_others(name, tmp_path):
    make, expected = WARNINGS[name]
    page = Page(make(), tmp_path)
    assert set(page.findings) == set(expected)
    for title, text in expected.items():
        assert re.search(text, page.findings[title]), page.findings[title]
    count = len(expected)
    assert page.box == ("No warnings" if not count else f"{count} warning{'s' * (count > 1)}")


def test_chains_that_broke_are_in_no_number(tmp_path):
    page = Page(broken(), tmp_path)
    rhat = az.rhat(broken().isel(chain=[0, 2]), group="functions")["y"]
    assert page.number("R-hat and", "R-hat", "most") == pytest.approx(float(rhat.max()), rel=1e-3)
    nothing_left = tree_of(functions={"y": np.nan * normal(6)})
    page = Page(nothing_left, tmp_path)
    assert "No chain is left" in page.findings["Chains that broke"]
    assert not page.images


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_convergence_is_that_of_arviz_and_of_the_diagnostics(tmp_path):
    tree = shifted(0.3)
    page = Page(tree, tmp_path)
    found = {
        "R-hat": az.rhat(tree, group="functions"),
        "ESS, bulk": az.ess(tree, group="functions"),
        "ESS, tail": az.ess(tree, group="functions", method="tail"),
    }
    for row, values in found.items():
        for column, quantile in {"least": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1}.items():
            expected = float(np.quantile(values["y"], quantile))
            assert page.number("R-hat and effective sample size over 6 of 6", row, column) == pytest.approx(
                expected, rel=1e-3
            )
    summary = bdl.diagnostics.function_summary(tree)
    rows = {
        "share of values with R-hat below 1.1": summary.share_mixed,
        "largest R-hat within a chain: is each one stationary?": summary.chainwise_rhat_max,
        "smallest sum of the ESS of each chain alone": summary.chainwise_ess_min,
        "smallest spread of a chain, relative to its function's": summary.spread_min,
    }
    for row, expected in rows.items():
        assert page.number("Between chains", row) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("classes", [1, 3])
def test_scores_of_classes_are_those_of_the_metrics(classes, tmp_path):
    points = np.array([0, 2, 3, 5, 7, 8, 11])
    labels, logits, density = classified(classes)
    logits = logits[:, :, points]
    page = Page(classes_tree(points, classes), tmp_path)
    if classes == 1:
        logits = np.stack([0 * logits, logits], -1)
    probabilities = metrics.mean_probabilities(logits)
    by_row = metrics.log_predictive_density(density)
    assert page.number("Predictions of y", "accuracy") == pytest.approx(
        metrics.accuracy(probabilities, labels[points]), 1e-3
    )
    assert page.number("Predictions of y", "accuracy", "rows") == len(points)
    brier = metrics.brier_score(probabilities, labels[points])
    assert page.number("Predictions of y", "Brier score") == pytest.approx(brier, 1e-3)
    error = metrics.expected_calibration_error(probabilities, labels[points])
    assert page.number("Predictions of y", "calibration error, 15 bins") == pytest.approx(error, 1e-3)
    lppd = "log predictive density of a row (LPPD), its mean"
    assert page.number("Predictions of y", lppd) == pytest.approx(metrics.lppd(density), 1e-3)
    assert page.number("Predictions of y", lppd, "standard error") == pytest.approx(stats.sem(by_row), 1e-3)
    assert any("7 rows that the model was fitted to" in caption for caption in page.captions)


def test_loo_takes_the_relative_efficiency_of_the_functions(tmp_path, monkeypatch):
    tree = heavy()
    tree["functions"] = slow()["functions"]
    handed, exact = [], az.loo
    monkeypatch.setattr(az, "loo", lambda *args, **kwargs: handed.append(kwargs["reff"]) or exact(*args, **kwargs))
    page = Page(tree, tmp_path)
    monkeypatch.undo()
    efficiency = float(az.ess(tree, group="functions", method="mean")["y"].mean()) / (CHAINS * DRAWS)
    assert efficiency < 0.2
    assert handed == [pytest.approx(efficiency)]  # which the numbers below hardly depend on
    with pytest.warns(UserWarning, match="Pareto"):
        loo = az.loo(tree, reff=efficiency, pointwise=True)
    elpd = "expected log density of a new row (PSIS-LOO), the sum"
    assert page.number("Predictions of y", elpd) == pytest.approx(loo.elpd, 1e-3)
    assert page.number("Predictions of y", elpd, "standard error") == pytest.approx(loo.se, 1e-3)
    assert page.number("Predictions of y", "effective number of parameters (p_loo)") == pytest.approx(loo.p, 1e-3)
    assert page.number("Predictions of y", f"rows with a Pareto k above {loo.good_k:.2g}") == 1


@pytest.mark.parametrize("change", [{"points": np.arange(ROWS) + 1}, {"shift": np.array([0.5, 0, 0])}])
def test_functions_that_are_not_logits_of_the_rows_give_no_accuracy(change, tmp_path):
    tree = classes_tree(shift=change.get("shift", 0.0))
    if "points" in change:
        tree["functions"] = tree["functions"].to_dataset().assign_coords(point=change["points"])
    page = Page(tree, tmp_path)
    assert "accuracy" not in page.table("Predictions of y")
    assert "probe=(x,)" in page.gaps["Accuracy and calibration of y"]
    assert not any(caption.startswith("Calibration") for caption in page.captions)


def test_scores_of_numbers_are_those_of_the_metrics(tmp_path):
    y, replicates = np.linspace(-1, 1, ROWS), np.linspace(-0.9, 1.1, ROWS) + 0.3 * normal(ROWS)
    page = Page(tree_of(posterior_predictive={"y": replicates}, observed_data={"y": y}), tmp_path)
    rmse = metrics.rmse(replicates.mean((0, 1)), y)
    assert page.number("Predictions of y", "root mean squared error of the mean replicate") == pytest.approx(rmse, 1e-3)
    crps = metrics.crps(replicates, y)
    assert page.number("Predictions of y", "continuous ranked probability score (CRPS)") == pytest.approx(crps, 1e-3)
    for level, share in zip((50, 90), metrics.interval_coverage(replicates, y, (0.5, 0.9)).coverage, strict=True):
        found = page.number("Predictions of y", f"share of the data in the central {level}% interval")
        assert found == pytest.approx(share, 1e-3)


def test_other_tables(full):
    tree = networked()
    energy = tree["sample_stats"]["energy" + NAME].to_numpy()
    for column, expected in {
        "mean": energy.mean(),
        "sd": energy.std(),
        "least": energy.min(),
        "most": energy.max(),
    }.items():
        found = full.number("Statistics of the sampler", "energy" + NAME, column)
        assert found == pytest.approx(expected, rel=1e-3)
    summary = az.summary(tree, var_names=[NAME], round_to="none")
    shown = full.table("Parameters")
    assert list(shown) == [NAME]  # and no weight
    assert set(shown[NAME]) == set(summary.columns)
    for column, expected in summary.loc[NAME].items():
        assert float(shown[NAME][column]) == pytest.approx(expected, rel=1e-3), column
    assert full.gaps["Summary of other sites"].startswith("1 of 2 sites of the group posterior")
    assert full.table("Groups of the tree")["functions"]["sizes"] == "chain 4, draw 450, point 12, output 3"
    assert "Posterior: 16 numbers in 2 sites." in [p.text for p in full.root.iter("p")]


def test_many_functions_and_weights_are_thinned_alike(tmp_path):
    tree = az.from_dict(
        {
            "functions": {"y": normal(64, 20)[:, :40]},
            "posterior": {"w": normal(70, 40)[:, :40], "b": normal(40)[:, :40]},
        },
        dims={"y": ["point", "output"], "w": ["in", "out"], "b": ["out"]},
    )
    page = Page(tree, tmp_path)
    # 64 x 20 values, of which every fourth point is kept
    rhat = az.rhat(tree.isel(point=slice(None, None, 4)), group="functions")["y"]
    assert page.number("R-hat and effective sample size over 320 of 1,280", "R-hat", "most") == pytest.approx(
        float(rhat.max()), rel=1e-3
    )
    assert sum(caption.startswith("R-hat by layer") for caption in page.captions) == 1


# ---- what there is not ----------------------------------------------------------------------------------------------

GROUPS = {
    "functions": {"y": normal(3)},
    "posterior": {"mu": normal()},
    "sample_stats": {"lp": normal()},
    "log_likelihood": {"y": -1 + 0.1 * normal(ROWS)},
    "observed_data": {"y": np.zeros(ROWS)},
    "posterior_predictive": {"y": normal(ROWS)},
}


@pytest.mark.parametrize("group", ["functions", "posterior", "sample_stats", "log_likelihood"])
def test_a_page_of_one_group_says_what_others_would_add(group, tmp_path):
    page = Page(az.from_dict({group: GROUPS[group]}), tmp_path)
    told = " ".join(page.gaps.values())
    for other in set(GROUPS) - {group}:
        if other != "posterior":
            assert re.search(rf"group {other}\b", told), other
    assert "log_likelihood=True" in told or group == "log_likelihood"
    assert f"group {group}:" not in told
    assert list(page.table("Groups of the tree")) == [group]
    assert bool(page.images) == (group in ("functions", "sample_stats"))


def test_a_page_with_all_groups_lacks_nothing(tmp_path):
    page = Page(az.from_dict(GROUPS), tmp_path)
    assert not page.gaps
    assert not page.findings


@pytest.mark.parametrize(
    "attrs", [{"guide": "AutoLinearizedLaplace"}, {"kernel": "WGFEnsemble", "langevin": 0, "kl": 1.0}]
)
def test_draws_that_are_no_chain_are_not_judged_as_chains(attrs, tmp_path):
    tree = classes_tree()
    tree["functions"]["y"][1] += 5  # for a particle, no failure
    tree.attrs = attrs
    page = Page(tree, tmp_path)
    assert not set(page.findings) - {"Chains that predict worse"}
    assert "are not those of Markov chains" in page.gaps["R-hat and ESS"]
    assert "have another law" in page.gaps["PSIS-LOO of y"]
    assert "log predictive density of a row (LPPD), its mean" in page.table("Predictions of y")


def test_tempered_draws_have_no_loo(tmp_path):
    for temperature in ({"temperature": 0.5}, {}):
        tree = classes_tree()
        tree.attrs = temperature
        if not temperature:
            tree["sample_stats"] = az.from_dict({"sample_stats": {"temperature": 1 + normal() ** 2}})["sample_stats"]
        assert "have another law" in Page(tree, tmp_path).gaps["PSIS-LOO of y"]


def test_few_draws_are_told_of(tmp_path):
    page = Page(tree_of().isel(draw=slice(3)), tmp_path)
    assert "at least 4 draws" in page.gaps["R-hat and ESS"]
    assert "R-hat and effective" not in str(page.tables)


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match="tree must be a DataTree, got dict; numpyro_bdl.to_datatree"):
        bdl.report({}, tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere' to write 'page.html' into"):
        bdl.report(tree_of(), tmp_path / "nowhere" / "page.html")
    with pytest.raises(IsADirectoryError, match="is a folder, '.*'; name a file, as '.*run.html'"):
        bdl.report(tree_of(), tmp_path)
    with pytest.raises(ValueError, match="has none of the groups posterior, functions, .* Its groups: observed_data"):
        bdl.report(az.from_dict({"observed_data": {"y": np.ones(3)}}), tmp_path / "page.html")
    reduced = DataTree.from_dict({"functions": tree_of()["functions"].to_dataset().mean("draw")})
    with pytest.raises(ValueError, match="'y' in the group 'functions' has dimensions .* without chain and draw"):
        bdl.report(reduced, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_becomes_a_page(tmp_path):
    x = random.normal(random.key(0), (40, 2))
    labels = (x[:, 0] > 0).astype(int)

    def model(x, y=None):
        net = random_flax_module("net", nn.Dense(2), dist.Normal(), input_shape=(2,))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Categorical(logits=net(x)), obs=y)

    kernel = bdl.SGLD(model, step_size=2e-2, steps_per_draw=4)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=60, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(random.key(1), x, labels)
    tree = bdl.to_datatree(mcmc, log_likelihood=True, posterior_predictive=True)
    page = Page(tree, tmp_path)
    assert next(page.root.iter("h1")).text == "Report: SGLD"
    assert page.number("Predictions of y", "accuracy", "rows") == 40
    logits = bdl.PosteriorPredictive(mcmc).functions(x)["y"]
    expected = metrics.accuracy(metrics.mean_probabilities(logits), labels)
    assert page.number("Predictions of y", "accuracy") == pytest.approx(expected, rel=1e-3)
    assert page.table("Attributes of the tree")["kernel"] == {"value": "SGLD"}
    assert "Few chains" in page.findings
    assert any(caption.startswith("R-hat by layer") for caption in page.captions)
