# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of predictions, of convergence, of chains, of what was selected and pruned, and of the energy around draws.

- Predictions: :func:`reliability`, :func:`risk_coverage`, :func:`entropy_histogram`, :func:`predictive_band`;
- convergence: :func:`function_rhat`, :func:`layer_rhat`, :func:`function_trace`, :func:`function_rank`;
- chains: :func:`functional_modes`, :func:`weights_raw_and_folded`;
- selection and pruning: :func:`inclusion_path`, :func:`sparsity_path`, :func:`layer_sparsity`;
- the energy: :func:`loss_slice`, :func:`loss_plane`.

Each draws into an ``ax``, or a new one, and returns it; what else a figure needs, as a legend, is for matplotlib to do.
Trace and rank plots are ArviZ's, and return its PlotCollection. The colours are those of Okabe and Ito, which people
with colour blindness can tell apart. Matplotlib (the extra ``plots``) is loaded when something is drawn.
"""

from numpyro_bdl._band_plot import predictive_band as predictive_band
from numpyro_bdl._chain_plots import functional_modes as functional_modes
from numpyro_bdl._chain_plots import weights_raw_and_folded as weights_raw_and_folded
from numpyro_bdl._convergence_plots import function_rank as function_rank
from numpyro_bdl._convergence_plots import function_rhat as function_rhat
from numpyro_bdl._convergence_plots import function_trace as function_trace
from numpyro_bdl._convergence_plots import layer_rhat as layer_rhat
from numpyro_bdl._landscape_plots import loss_plane as loss_plane
from numpyro_bdl._landscape_plots import loss_slice as loss_slice
from numpyro_bdl._plot_style import COLORS as COLORS
from numpyro_bdl._prediction_plots import entropy_histogram as entropy_histogram
from numpyro_bdl._prediction_plots import reliability as reliability
from numpyro_bdl._prediction_plots import risk_coverage as risk_coverage
from numpyro_bdl._sparsity_plots import inclusion_path as inclusion_path
from numpyro_bdl._sparsity_plots import layer_sparsity as layer_sparsity
from numpyro_bdl._sparsity_plots import sparsity_path as sparsity_path
