# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Bayesian deep learning for NumPyro: keep the model, swap the inference, analyse with ArviZ."""

from importlib.metadata import version as _version

from numpyro_bdl import detection as detection
from numpyro_bdl import diagnostics as diagnostics
from numpyro_bdl import flatness as flatness
from numpyro_bdl import gp as gp
from numpyro_bdl import guides as guides
from numpyro_bdl import linear as linear
from numpyro_bdl import metrics as metrics
from numpyro_bdl import mmd as mmd
from numpyro_bdl import preconditioners as preconditioners
from numpyro_bdl import pruning as pruning
from numpyro_bdl import symmetry as symmetry
from numpyro_bdl import uncertainty as uncertainty
from numpyro_bdl.citations import cite as cite
from numpyro_bdl.datatree import to_datatree as to_datatree
from numpyro_bdl.gp import gp_posterior_samples as gp_posterior_samples
from numpyro_bdl.guides import AutoLinearizedLaplace as AutoLinearizedLaplace
from numpyro_bdl.inclusion import inclusion_probabilities as inclusion_probabilities
from numpyro_bdl.kernels import SGHMC as SGHMC
from numpyro_bdl.kernels import SGLD as SGLD
from numpyro_bdl.kernels import AveragedSGLD as AveragedSGLD
from numpyro_bdl.kernels import FlatBasinSGLD as FlatBasinSGLD
from numpyro_bdl.kernels import PerturbedSGLD as PerturbedSGLD
from numpyro_bdl.kernels import SpikeSlabSGHMC as SpikeSlabSGHMC
from numpyro_bdl.kernels import StochasticGradientKernel as StochasticGradientKernel
from numpyro_bdl.kernels import SymmetryRestricted as SymmetryRestricted
from numpyro_bdl.kernels import WGFEnsemble as WGFEnsemble
from numpyro_bdl.linear import linear_posterior_samples as linear_posterior_samples
from numpyro_bdl.predictive import PosteriorPredictive as PosteriorPredictive
from numpyro_bdl.report import report as report
from numpyro_bdl.samples import Samples as Samples
from numpyro_bdl.schedules import cyclical as cyclical
from numpyro_bdl.warm_start import train_map as train_map

__version__ = _version("numpyro-bdl")
