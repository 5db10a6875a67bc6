# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""The parts of the page of :func:`numpyro_bdl.report`."""
