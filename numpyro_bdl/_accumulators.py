# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""Numbers over draws that come in blocks, (draw, ...), of which none is kept, but for quantiles.

All are in double precision, and none is a difference of large numbers: that of a sum of squares and a squared mean
loses all digits where the mean is a million times the standard deviation.
"""

import numpy as np
from scipy.special import entr, logsumexp, softmax


class Mean:
    """Mean, also where a number is infinite."""

    def __init__(self):
        self._count, self._sum = 0, np.zeros(())

    def add(self, values: np.ndarray) -> None:
        """Take in a block."""
        self._count += len(values)
        self._sum = self._sum + values.sum(0, dtype=np.float64)

    @property
    def value(self) -> np.ndarray:
        """Of the draws so far."""
        return self._sum / self._count


class Moments:
    r"""Mean and variance. A block of n draws is merged with the m before it by

    .. math::

        \mu \leftarrow \mu + \frac{n}{m + n} \delta, \qquad
        Q \leftarrow Q + Q_\text{block} + \frac{m n}{m + n} \delta^2, \qquad \delta = \mu_\text{block} - \mu,

    Q being the sum of squared deviations from the mean.

    Source: Chan, Golub & LeVeque, *Algorithms for computing the sample variance*, American Statistician 37, 1983.
    """

    def __init__(self):
        self.count, self.mean, self._squares = 0, np.zeros(()), np.zeros(())

    def add(self, values: np.ndarray) -> None:
        """Take in a block."""
        values = values.astype(np.float64)
        before, count = self.count, len(values)
        self.count += count
        mean = values.mean(0)
        change = mean - self.mean
        self.mean = self.mean + change * (count / self.count)
        self._squares = self._squares + ((values - mean) ** 2).sum(0) + change**2 * (before * count / self.count)

    @property
    def variance(self) -> np.ndarray:
        """Of the draws, divided by their number."""
        return self._squares / self.count


class LogMeanExp:
    r"""Log of the mean of exponentials, :math:`\log \frac1S \sum_s e^{x_s}`, where all of them may underflow."""

    def __init__(self):
        self._count, self._log_sum = 0, np.float64(-np.inf)

    def add(self, values: np.ndarray) -> None:
        """Take in a block; minus infinity is the log of 0."""
        self._count += len(values)
        self._log_sum = np.logaddexp(self._log_sum, logsumexp(values.astype(np.float64), 0))

    @property
    def value(self) -> np.ndarray:
        """Of the draws so far."""
        return self._log_sum - np.log(self._count)


class Classes:
    r"""Class probabilities of the mixture, :math:`\bar p = \frac1S \sum_s p_s`, and entropies."""

    def __init__(self):
        self._probabilities, self._entropy = Mean(), Mean()

    def add(self, logits: np.ndarray) -> None:
        """Take in a block of logits, (draw, ..., class)."""
        probabilities = softmax(logits.astype(np.float64), -1)
        self._probabilities.add(probabilities)
        self._entropy.add(entropy(probabilities))

    @property
    def mean_probabilities(self) -> np.ndarray:
        """Of the mixture, (..., class)."""
        return self._probabilities.value

    @property
    def expected_entropy(self) -> np.ndarray:
        r""":math:`\frac1S \sum_s H[p_s]`, (...)."""
        return self._entropy.value

    @property
    def mutual_information(self) -> np.ndarray:
        r""":math:`H[\bar p] - \frac1S \sum_s H[p_s]`, (...)."""
        # rounding can make the difference negative
        return np.maximum(entropy(self.mean_probabilities) - self.expected_entropy, 0)


class Values:
    """All values, for what needs them at once."""

    def __init__(self):
        self._blocks: list[np.ndarray] = []

    def add(self, values: np.ndarray) -> None:
        """Keep a block."""
        self._blocks.append(values)

    def quantiles(self, levels: np.ndarray) -> np.ndarray:
        """By linear interpolation, (..., level)."""
        values = np.concatenate(self._blocks, dtype=np.float64)
        return np.moveaxis(np.quantile(values, levels, 0, overwrite_input=True), 0, -1)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, in nats."""
    return np.maximum(entr(probabilities).sum(-1), 0)  # rounded, a probability can be above 1


def blockwise(accumulator, draws: np.ndarray):
    """An accumulator that has taken in all draws, one at a time, since the whole in double precision may be large."""
    for draw in draws:
        accumulator.add(draw[None])
    return accumulator
