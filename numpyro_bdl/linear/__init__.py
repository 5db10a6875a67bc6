# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Linear models: their posteriors by samples that solve linear systems."""

from numpyro_bdl.linear.samples import LinearPosterior as LinearPosterior
from numpyro_bdl.linear.samples import linear_posterior_samples as linear_posterior_samples
from numpyro_bdl.linear.solvers import SGD as SGD
from numpyro_bdl.linear.solvers import ConjugateGradient as ConjugateGradient
from numpyro_bdl.linear.solvers import DualDescent as DualDescent
