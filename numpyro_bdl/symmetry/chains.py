# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""How many chains find every functional mode, and which chains of a run share one.

Symmetric copies of a network are one function, so what independent chains can miss are functional modes. If a chain
ends in mode j with probability :math:`\pi_j` and stays there, the number of chains G until each of the :math:`\nu`
modes has one is the coupon collector's,

.. math::

    P(G \le n) = n! \, [t^n] \prod_j (e^{\pi_j t} - 1), \qquad
    E(G) = \int_0^\infty 1 - \prod_j (1 - e^{-\pi_j t}) \, dt .

**References:** Wiese et al., *Towards efficient MCMC sampling in Bayesian neural networks by exploiting symmetry*, ECML
PKDD 2023, whose bound is Markov's inequality for G.
"""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float, Int

from numpyro_bdl._checks import check_choice, check_integer, check_number
from numpyro_bdl._draws import flatten, read_draws

METHODS = ("exact", "markov", "union")
_ROUNDING = 1e-12
_FINEST = 1e-9  # error probability that the exact law still resolves


def plan_chains(
    num_modes: int,
    probabilities: Float[ArrayLike, " mode"] | None = None,
    confidence: float = 0.99,
    method: str = "exact",
) -> int:
    r"""How many independent chains find every functional mode, each chain staying in one.

    - ``"exact"``: the smallest n with :math:`P(G \le n) \ge` confidence, to rounding, for any number of modes.
    - ``"markov"``: :math:`\lceil E(G) / (1 - \text{confidence}) \rceil`, the bound of the paper, here to compare with.
    - ``"union"``: :math:`\lceil \ln(\delta / \nu) / \ln(1 - \min_j \pi_j) \rceil`, with :math:`\delta = 1 -`
      confidence. It needs the number of modes and the smallest probability alone. For equal probabilities it is hardly
      larger than the exact number.

    :param num_modes: Number of modes, :math:`\nu`.
    :param probabilities: Probability that a chain ends in each mode, (mode,); None for equal ones.
    :param confidence: Probability with which all modes are to be found, in (0, 1).
    :param method: ``"exact"``, ``"markov"`` or ``"union"``.
    :return: The number of chains.
    :raises ValueError: for arguments outside their ranges; for ``"exact"``, a confidence above 1 - 1e-9.

    **Example**

    .. doctest::

        >>> from numpyro_bdl.symmetry import half_normal_probabilities, plan_chains
        >>> plan_chains(3, half_normal_probabilities(3))
        54
        >>> plan_chains(3, half_normal_probabilities(3), method="markov")   # the 1274 chains of the paper
        1274
        >>> plan_chains(2, [0.95, 0.05])
        90
    """
    check_integer("plan_chains", "num_modes", num_modes)
    check_choice("plan_chains", "method", method, METHODS)
    check_number("plan_chains", "confidence", confidence, high=1)
    p = _probabilities("plan_chains", probabilities, num_modes)
    if method == "markov":
        return math.ceil(expected_chains(p) / (1 - confidence) * (1 - _ROUNDING))
    enough = _union(p, confidence)
    if method == "union":
        return enough
    if 1 - confidence < _FINEST:
        raise ValueError(
            f"plan_chains: the exact law is known to rounding, so confidence must be at most 1 - {_FINEST:g}, got"
            f" 1 - {1 - confidence:.2g}; method='union' takes any."
        )
    too_few = num_modes - 1
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if _found(middle, p) >= confidence - _ROUNDING:
            enough = middle
        else:
            too_few = middle
    return enough


def discovery_probability(num_chains: int, probabilities: Float[ArrayLike, " mode"]) -> float:
    r"""Probability that so many independent chains find every mode, :math:`P(G \le n)`.

    Inclusion and exclusion would take :math:`2^\nu` terms. The coefficient of the generating function is here Cauchy's
    integral over the circle :math:`t = n e^{i \theta}`, where

    .. math::

        P(G \le n) = \frac{\int w(\theta) \prod_j \big(1 - e^{-n \pi_j e^{i \theta}}\big) \, d\theta}
                          {\int w(\theta) \, d\theta}, \qquad w(\theta) = e^{n (e^{i \theta} - 1) - i n \theta},

    by the trapezoidal rule. With L nodes that adds the coefficients of n + L, n - L, n + 2 L, ... to the n-th; by the
    tails of a Poisson they are below rounding when L is :math:`12 \sqrt n + 100`. The integrand at :math:`\theta = 0`
    alone would be the law of a Poisson number of chains.

    :param num_chains: Number of chains, n.
    :param probabilities: Probability that a chain ends in each mode, (mode,).
    :raises ValueError: for arguments outside their ranges.

    **Example**

    .. doctest::

        >>> from numpyro_bdl.symmetry import discovery_probability
        >>> round(discovery_probability(3, [0.5, 0.5]), 12)
        0.75
    """
    check_integer("discovery_probability", "num_chains", num_chains)
    p = _probabilities("discovery_probability", probabilities)
    return 0.0 if num_chains < len(p) else min(max(_found(num_chains, p), 0.0), 1.0)


def expected_chains(probabilities: Float[ArrayLike, " mode"]) -> float:
    r"""Expected number of independent chains until every mode is found, :math:`E(G)`.

    The integral is taken over :math:`\log t`, where the integrand is analytic and vanishes at both ends, so that the
    trapezoidal rule is exact to rounding.

    :param probabilities: Probability that a chain ends in each mode, (mode,).
    :raises ValueError: if they are not positive, or don't sum to 1.

    **Example**

    .. doctest::

        >>> from numpyro_bdl.symmetry import expected_chains
        >>> round(expected_chains([0.5, 0.5]), 12)              # 2 (1 + 1/2)
        3.0
    """
    p, count = np.unique(_probabilities("expected_chains", probabilities), return_counts=True)
    step, last = 0.02, math.log((math.log(count.sum()) + 40) / p[0])
    t = np.exp(np.arange(-40.0, last + step, step))
    none_missing = np.log(-np.expm1(-p[:, None] * t))
    return float(step * np.sum(t * -np.expm1(count @ none_missing)))


def half_normal_probabilities(num_modes: int) -> Float[np.ndarray, " mode"]:
    """The probabilities that Wiese et al. assume: the density of HalfNormal(1) at as many points from 0 to 1.96.

    It is an assumption of convenience. Their own run has clusters of 730, 536 and 8 chains, far from the .57, .35 and
    .08 assumed: estimate them from a run, by :func:`functional_modes`.

    :param num_modes: Number of modes.
    :return: (mode,), with sum 1.
    """
    check_integer("half_normal_probabilities", "num_modes", num_modes)
    density = np.exp(-(np.linspace(0, 1.96, num_modes) ** 2) / 2)
    return density / density.sum()


# ---- the modes of a run ---------------------------------------------------------------------------------------------


class FunctionalModes(NamedTuple):
    """Which chains of a run share a functional mode, and what that says of the modes not found."""

    labels: Int[np.ndarray, " chain"]
    """mode of each chain, 0 being the one with most chains; -1 for a chain with values that are not finite"""
    sizes: Int[np.ndarray, " mode"]
    """number of chains in each mode"""
    distances: Float[np.ndarray, "chain chain"]
    """separation of each pair of chains, of :func:`functional_modes`; NaN where a label is -1"""
    separation: float
    """the largest distance within a mode"""
    means: dict[str, Float[np.ndarray, "chain ..."]]
    """mean function of each chain by site"""

    @property
    def num_modes(self) -> int:
        """Number of modes found."""
        return len(self.sizes)

    @property
    def probabilities(self) -> Float[np.ndarray, " mode"]:
        """Share of the chains in each mode."""
        return self.sizes / self.sizes.sum()

    @property
    def effective_number(self) -> float:
        """Exponential of the entropy of the shares: the number of equal modes that are as diverse."""
        p = self.probabilities
        return float(np.exp(-np.sum(p * np.log(p))))

    @property
    def unseen(self) -> float:
        """Good and Turing's estimate of the probability that a further chain ends in a mode not found: the share of
        chains that are alone in their mode."""
        return float(np.sum(self.sizes == 1) / self.sizes.sum())

    def unseen_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """An interval for the probability that a further chain ends in a mode not found.

        It is Garwood's for the mean of a Poisson number, here that of the modes with one chain, divided by the number
        of chains; that number varies at most as a Poisson one. What it covers is the mean over runs of as many chains.
        Eight chains without a singleton have the interval from 0 to .46: few chains can't tell that nothing is left.

        :param confidence: Coverage, in (0, 1).
        """
        from scipy.stats import chi2

        check_number("unseen_interval", "confidence", confidence, high=1)
        alone, chains = int(np.sum(self.sizes == 1)), int(self.sizes.sum())
        low = chi2.ppf((1 - confidence) / 2, 2 * alone) / 2 if alone else 0.0
        high = chi2.ppf((1 + confidence) / 2, 2 * alone + 2) / 2
        return float(min(low / chains, 1)), float(min(high / chains, 1))

    def further_chains(self, confidence: float = 0.99, unseen: float | None = None) -> int:
        r"""How many further chains find a new mode, :math:`\lceil \ln(1 - \text{confidence}) / \ln(1 - u) \rceil`.

        It is 0 once no chain is alone in its mode. The chains of a new run that finds all of these modes again are
        ``plan_chains(modes.num_modes, modes.probabilities)``.

        :param confidence: Probability with which at least one further chain is to end in a mode not found, in (0, 1).
        :param unseen: Probability u of these modes; None for :attr:`unseen`, and the upper end of
            :meth:`unseen_interval` to be careful.
        """
        check_number("further_chains", "confidence", confidence, high=1)
        unseen = self.unseen if unseen is None else unseen
        check_number("further_chains", "unseen", unseen, high=math.nextafter(1, 2), closed=True)
        if unseen == 0:
            return 0
        return 1 if unseen == 1 else math.ceil(math.log(1 - confidence) / math.log1p(-unseen) * (1 - _ROUNDING))


def functional_modes(data: Any, *, separation: float = 2.0) -> FunctionalModes:
    r"""Cluster the chains of a run by their functions.

    Two chains a and b are projected on the line between their mean functions, each function value divided by its
    standard deviation within a chain. On that line their distance is Ashman's

    .. math::

        D_{ab} = \frac{|m_a - m_b|}{\sqrt{(s_a^2 + s_b^2) / 2}}

    for means m and standard deviations s over the draws. A mixture of two normals of equal spread has two peaks if
    and only if D > 2, the default threshold. Between chains of one mode D is of the order of
    :math:`\sqrt{2 / \text{ESS}}`. A line taken from the draws that it is judged by would tell any two chains apart once
    there are many function values, so it is taken from one half of the draws and m from the other, both ways, and D is
    the mean of the two.

    Clusters are those of complete linkage, cut at the threshold: every pair within a mode is closer than it, so that
    two separate modes are never joined by chains in between. A mode in which chains hardly mix, with an ESS below about
    ten each, can come out as several; see :func:`~numpyro_bdl.diagnostics.chainwise_rhat`. A chain that travels between
    two modes is wide, and is put with the one that it is least separate from. Only what differs at the probe inputs can
    be seen.

    :param data: Function values (chain, draw, point, output), or such arrays by site; a DataTree with a group
        ``functions``; or a run, for its functions at 64 of its rows.
    :param separation: Threshold of D.
    :return: Labels, sizes and distances, with the estimates that follow from them. Chains with values that are not
        finite are left out, with a warning.
    :raises ValueError: for shapes that don't fit, fewer than 4 draws, or no chain that is finite.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl.symmetry import functional_modes, plan_chains
        >>> centers = np.array([-1, 1, 1, -1, 1, 1])[:, None, None] * np.linspace(0, 1, 20)
        >>> functions = centers + 0.1 * np.random.default_rng(0).normal(size=(6, 100, 20))   # (chain, draw, point)
        >>> modes = functional_modes(functions)
        >>> modes.labels.tolist(), modes.sizes.tolist(), modes.further_chains()
        ([1, 0, 0, 1, 0, 0], [4, 2], 0)
        >>> plan_chains(modes.num_modes, modes.probabilities)
        12
    """
    check_number("functional_modes", "separation", separation)
    draws = read_draws("functional_modes", data, "functions")
    values = flatten(draws)
    finite = np.isfinite(values).all((1, 2))
    if not finite.any():
        raise ValueError("functional_modes: every chain has function values that are not finite.")
    if not finite.all():
        warnings.warn(
            f"functional_modes leaves out the chains {np.flatnonzero(~finite).tolist()}, which have function values"
            " that are not finite.",
            stacklevel=2,
        )
    among = _separations(values[finite])
    distances = np.full((len(finite), len(finite)), np.nan)
    distances[np.ix_(finite, finite)] = among
    labels = np.full(len(finite), -1)
    labels[finite], sizes = _clusters(among, separation)
    means = {name: value.mean(1) for name, value in draws.items()}
    return FunctionalModes(labels, sizes, distances, float(separation), means)


def _separations(values: Float[np.ndarray, "chain draw value"]) -> Float[np.ndarray, "chain chain"]:
    """D of each pair of chains."""
    values = values / _scale(values)
    half = values.shape[1] // 2
    halves = values[:, :half], values[:, -half:]
    folds = [_one_way(values, halves[0], halves[1]), _one_way(values, halves[1], halves[0])]
    return np.maximum(np.mean(folds, 0), 0)


def _one_way(values: np.ndarray, first: np.ndarray, second: np.ndarray) -> Float[np.ndarray, "chain chain"]:
    """D with lines from the first half of the draws and means from the second; negative where these disagree."""
    centers = first.mean(1)
    mean, variance = np.empty((2, len(values), len(values)))
    for a in range(len(values)):
        lines = (centers[a] - centers).T  # from each chain to this one
        mean[a] = second[a].mean(0) @ lines
        variance[a] = (values[a] @ lines).var(0, ddof=1)
    gap = mean + mean.T  # the line from a to b is the other one reversed
    spread = np.sqrt((variance + variance.T) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gap == 0, 0, gap / spread)


def _scale(values: Float[np.ndarray, "chain draw value"]) -> Float[np.ndarray, " value"]:
    """Standard deviation of each value within a chain: of the middle chain, lest one chain set it."""
    variance = values.var(1, ddof=1)
    middle, mean = np.median(variance, 0), variance.mean(0)
    return np.sqrt(np.where(middle > 0, middle, np.where(mean > 0, mean, 1)))


def _clusters(distances: np.ndarray, separation: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels by complete linkage, those of larger clusters first, and their sizes."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(distances) == 1:
        return np.zeros(1, int), np.ones(1, int)
    far = np.minimum(distances, 2 * separation)  # linkage takes no infinite distance
    found = fcluster(linkage(squareform(far, checks=False), "complete"), separation, "distance")
    _, first, label, sizes = np.unique(found, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    return np.argsort(order)[label], sizes[order]


# ---- the coupon collector -------------------------------------------------------------------------------------------


def _found(num_chains: int, probabilities: Float[np.ndarray, " mode"]) -> float:
    p, count = np.unique(probabilities, return_counts=True)
    nodes = math.ceil(12 * math.sqrt(num_chains)) + 100
    angle = 2 * np.pi * np.arange(nodes) / nodes
    power, back = np.expm1(1j * angle), np.exp(-1j * num_chains * angle)
    mean = num_chains * p[:, None]
    # e^{mean (z - 1)} goes into the product, since 1 - e^{-mean z} alone would overflow
    product = np.prod((np.exp(mean * power) - np.exp(-mean)) ** count[:, None], 0)
    return float(np.sum(product * back).real / np.sum(np.exp(num_chains * power) * back).real)


def _union(probabilities: Float[np.ndarray, " mode"], confidence: float) -> int:
    modes, least = len(probabilities), probabilities.min()
    if modes == 1:
        return 1
    return max(math.ceil(math.log((1 - confidence) / modes) / math.log1p(-least) * (1 - _ROUNDING)), modes)


def _probabilities(owner: str, probabilities: Any, num_modes: int | None = None) -> Float[np.ndarray, " mode"]:
    if probabilities is None and num_modes is not None:
        return np.full(num_modes, 1 / num_modes)
    p = np.asarray(probabilities, float)
    if p.ndim != 1 or not len(p) or not (p > 0).all() or not abs(p.sum() - 1) < 1e-5:
        raise ValueError(
            f"{owner}: probabilities must be positive numbers (mode,) with sum 1, got shape {p.shape} with sum"
            f" {p.sum():g} and least {p.min(initial=np.inf):g}; leave out modes of probability 0, and divide counts by"
            " their sum."
        )
    if num_modes is not None and len(p) != num_modes:
        raise ValueError(f"{owner}: got {len(p)} probabilities for num_modes={num_modes}.")
    return p / p.sum()
