# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""How many chains find every functional mode, and which chains share one."""

from numpyro_bdl.symmetry.chains import FunctionalModes as FunctionalModes
from numpyro_bdl.symmetry.chains import discovery_probability as discovery_probability
from numpyro_bdl.symmetry.chains import expected_chains as expected_chains
from numpyro_bdl.symmetry.chains import functional_modes as functional_modes
from numpyro_bdl.symmetry.chains import half_normal_probabilities as half_normal_probabilities
from numpyro_bdl.symmetry.chains import plan_chains as plan_chains
