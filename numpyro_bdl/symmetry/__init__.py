# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Symmetries of networks: units that can be exchanged, canonical forms, how many copies there are, and how many chains
find every functional mode."""

from numpyro_bdl.symmetry.action import Element as Element
from numpyro_bdl.symmetry.action import apply as apply
from numpyro_bdl.symmetry.action import canonical_element as canonical_element
from numpyro_bdl.symmetry.action import canonicalize as canonicalize
from numpyro_bdl.symmetry.action import random_element as random_element
from numpyro_bdl.symmetry.align import align as align
from numpyro_bdl.symmetry.align import aligning_element as aligning_element
from numpyro_bdl.symmetry.chains import FunctionalModes as FunctionalModes
from numpyro_bdl.symmetry.chains import discovery_probability as discovery_probability
from numpyro_bdl.symmetry.chains import expected_chains as expected_chains
from numpyro_bdl.symmetry.chains import functional_modes as functional_modes
from numpyro_bdl.symmetry.chains import half_normal_probabilities as half_normal_probabilities
from numpyro_bdl.symmetry.chains import plan_chains as plan_chains
from numpyro_bdl.symmetry.draws import fold_draws as fold_draws
from numpyro_bdl.symmetry.find import find_groups as find_groups
from numpyro_bdl.symmetry.find import find_model_groups as find_model_groups
from numpyro_bdl.symmetry.groups import UnitGroup as UnitGroup
from numpyro_bdl.symmetry.groups import UnitGroups as UnitGroups
from numpyro_bdl.symmetry.groups import Units as Units
from numpyro_bdl.symmetry.groups import cardinality as cardinality
from numpyro_bdl.symmetry.groups import log_cardinality as log_cardinality
