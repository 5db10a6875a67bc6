# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The kernels, one file each."""

from numpyro_bdl.kernels.averaged_sgld import AveragedSGLD as AveragedSGLD
from numpyro_bdl.kernels.base import StochasticGradientKernel as StochasticGradientKernel
from numpyro_bdl.kernels.flat_basin import FlatBasinSGLD as FlatBasinSGLD
from numpyro_bdl.kernels.perturbed_sgld import PerturbedSGLD as PerturbedSGLD
from numpyro_bdl.kernels.sghmc import SGHMC as SGHMC
from numpyro_bdl.kernels.sgld import SGLD as SGLD
from numpyro_bdl.kernels.spike_slab import SpikeSlabSGHMC as SpikeSlabSGHMC
from numpyro_bdl.kernels.symmetry_restricted import SymmetryRestricted as SymmetryRestricted
from numpyro_bdl.kernels.wgf_ensemble import WGFEnsemble as WGFEnsemble
