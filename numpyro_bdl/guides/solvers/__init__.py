# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Solvers of the linear system of a tangent model, one file each."""

from numpyro_bdl.guides.solvers.cg import ConjugateGradient as ConjugateGradient
from numpyro_bdl.guides.solvers.dual import DualDescent as DualDescent
from numpyro_bdl.guides.solvers.sgd import SGD as SGD
