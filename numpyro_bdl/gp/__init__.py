# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussian processes: posterior samples of functions, on data too many for a matrix of rows by rows."""

from numpyro_bdl.gp.evidence import Hyperparameters as Hyperparameters
from numpyro_bdl.gp.evidence import fit_hyperparameters as fit_hyperparameters
from numpyro_bdl.gp.evidence import log_evidence as log_evidence
from numpyro_bdl.gp.kernels import RBF as RBF
from numpyro_bdl.gp.kernels import Matern as Matern
from numpyro_bdl.gp.posterior import GPPosterior as GPPosterior
from numpyro_bdl.gp.posterior import gp_posterior_samples as gp_posterior_samples
