# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Guides for :class:`numpyro.infer.SVI`, and what comes after it."""

from numpyro_bdl.guides.linearized_laplace import AutoLinearizedLaplace as AutoLinearizedLaplace
from numpyro_bdl.guides.posterior import LaplacePosterior as LaplacePosterior
