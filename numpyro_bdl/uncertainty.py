# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""How uncertain predictions are, and how much of it comes from the spread of the draws.

========================  ==========================================  ==============================================
number                    formula                                     also called
========================  ==========================================  ==============================================
predictive entropy        :math:`H[\frac1S \sum_s p_s]`               total
expected entropy          :math:`\frac1S \sum_s H[p_s]`               aleatoric
mutual information        the first less the second                   epistemic, BALD
variance                  the sum of the next two                     total
mean of the variances     :math:`\frac1S \sum_s \sigma_s^2`           aleatoric
variance of the means     :math:`\text{Var}_s \, \mu_s`               epistemic
========================  ==========================================  ==============================================

H is :math:`H[p] = -\sum_c p_c \log p_c`, in nats; :math:`p_s`, or :math:`\mu_s` and :math:`\sigma_s^2`, is what draw s
predicts for a row. What is called aleatoric or epistemic here is so under the model and these draws: an ensemble that
agrees far from the data has no epistemic uncertainty there, and a model that is wrong puts its error into the noise.

Source: Depeweg et al., *Decomposition of uncertainty in Bayesian deep learning for efficient and risk-sensitive
learning*, ICML 2018.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float

from numpyro_bdl._accumulators import Classes, Moments, blockwise, entropy
from numpyro_bdl._predictions import class_probabilities, draws_of_logits, numbers, pooled, spread_to


def predictive_entropy(probabilities: Float[ArrayLike, "row class"]) -> Float[np.ndarray, " row"]:
    r"""Entropy of the predictive, :math:`H[\bar p] = -\sum_c \bar p_c \log \bar p_c`, in nats: the total.

    :param probabilities: (row, class), of the mixture: :func:`~numpyro_bdl.metrics.mean_probabilities`.
    :return: (row,), from 0 to the log of the number of classes.
    :raises ValueError: for other shapes, rows that don't sum to 1, or NaN.

    **Example**

    .. doctest::

        >>> from numpyro_bdl import uncertainty
        >>> uncertainty.predictive_entropy([[0.5, 0.5], [1.0, 0.0]]).round(3).tolist()
        [0.693, 0.0]
    """
    return entropy(class_probabilities("predictive_entropy", "probabilities", probabilities))


def expected_entropy(logits: Float[ArrayLike, "chain draw row class"]) -> Float[np.ndarray, " row"]:
    r"""Mean over draws of the entropy of each, :math:`\frac1S \sum_s H[p_s]`, in nats: the aleatoric part.

    :param logits: Logits or log probabilities, (chain, draw, row, class), as of
        :func:`~numpyro_bdl.metrics.mean_probabilities`.
    :return: (row,), at most the :func:`predictive_entropy`.
    :raises ValueError: for other shapes, NaN, or infinite numbers other than minus infinity, a probability of 0.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import uncertainty
        >>> sure_of_either = np.array([[[[50.0, 0.0]], [[0.0, 50.0]]]])            # one chain, two draws, one row
        >>> uncertainty.expected_entropy(sure_of_either).round(3).tolist()
        [0.0]
        >>> uncertainty.mutual_information(sure_of_either).round(3).tolist()
        [0.693]
    """
    return blockwise(Classes(), draws_of_logits("expected_entropy", logits)).expected_entropy


def mutual_information(logits: Float[ArrayLike, "chain draw row class"]) -> Float[np.ndarray, " row"]:
    r"""Mutual information of the class and the weights, the epistemic part of the entropy, in nats,

    .. math::

        I[y, \theta] = H\Bigl[\frac1S \sum_s p_s\Bigr] - \frac1S \sum_s H[p_s] =
            \frac1S \sum_s \text{KL}[p_s \,\|\, \bar p],

    by which BALD chooses what to label. It is 0 where all draws predict the same, and at most log S.

    :param logits: (chain, draw, row, class), as of :func:`expected_entropy`.
    :return: (row,), not negative.
    :raises ValueError: as of :func:`expected_entropy`.

    Source: Houlsby et al., *Bayesian active learning for classification and preference learning*, 2011.
    """
    return blockwise(Classes(), draws_of_logits("mutual_information", logits)).mutual_information


class VarianceDecomposition(NamedTuple):
    """Variance of the predictive and its parts, each (row, ...)."""

    total: Float[np.ndarray, "row ..."]
    """variance of the mixture over draws"""
    aleatoric: Float[np.ndarray, "row ..."]
    """mean over draws of the variance of each"""
    epistemic: Float[np.ndarray, "row ..."]
    """variance over draws of the mean of each"""


def variance_decomposition(
    mean: Float[ArrayLike, "chain draw row ..."], variance: Float[ArrayLike, "..."]
) -> VarianceDecomposition:
    r"""Variance of the predictive by the law of total variance,

    .. math::

        \text{Var}[y] = \frac1S \sum_s \sigma_s^2 + \frac1S \sum_s (\mu_s - \bar\mu)^2,
        \qquad \bar\mu = \frac1S \sum_s \mu_s.

    It is exact for the mixture of S draws, whence the division by S.

    :param mean: Mean of y under each draw, (chain, draw, row, ...).
    :param variance: Variance of y under each draw, of that shape or one that NumPy broadcasts to it; of a site sigma
        (chain, draw), for instance, ``sigma[..., None] ** 2``.
    :return: The total, the aleatoric and the epistemic variance.
    :raises ValueError: for shapes that don't fit, NaN, infinite numbers, or a negative variance.

    **Example**

    .. doctest::

        >>> import numpy as np
        >>> from numpyro_bdl import uncertainty
        >>> mean = np.array([[[1.0], [3.0]]])                                       # one chain, two draws, one row
        >>> uncertainty.variance_decomposition(mean, 0.25)
        VarianceDecomposition(total=array([1.25]), aleatoric=array([0.25]), epistemic=array([1.]))
    """
    owner = "variance_decomposition"
    means = pooled(owner, "mean", mean)
    variances = spread_to(owner, "variance", numbers(owner, "variance", variance), np.shape(mean))
    of_means = Moments()
    of_means.add(means)
    aleatoric, epistemic = variances.mean((0, 1)), of_means.variance
    return VarianceDecomposition(aleatoric + epistemic, aleatoric, epistemic)
