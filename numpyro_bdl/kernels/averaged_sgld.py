# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

r"""SGLD with a running mean of its position, the ablation of :class:`FlatBasinSGLD`.

.. math::

    w &\leftarrow w - a P \nabla \hat U(w) + \sqrt{2 a T P} \, \xi \\
    u &\leftarrow u + (w - u) / \tau

The anchor of flat-basin SGLD is such a mean, with noise, that pulls back on the position.
"""

from collections import namedtuple

import jax

from numpyro_bdl._checks import check_number
from numpyro_bdl.kernels.base import SGState, StochasticGradientKernel
from numpyro_bdl.kernels.sgld import sgld_step
from numpyro_bdl.noise import normal

AveragedState = namedtuple("AveragedState", [*SGState._fields, "z_anchor"])
"""The fields of :data:`~numpyro_bdl.kernels.base.SGState` and

 - **z_anchor** - running mean u of the position, like it.
"""


class AveragedSGLD(StochasticGradientKernel):
    r"""SGLD beside an exponential moving average of its position.

    .. math::

        u \leftarrow u + (w - u) / \tau

    with w that of :class:`SGLD` with the same key. The average is collected as ``z_anchor``, where the anchor of
    :class:`FlatBasinSGLD` is found, so that the helpers treat both alike. It is no draw from the posterior: its
    variance is too small.

    :param anchor_steps: Time constant :math:`\tau \ge 1` of the average, in steps.

    The other arguments are those of :class:`~numpyro_bdl.kernels.base.StochasticGradientKernel`.

    :raises ValueError: if ``anchor_steps`` is below 1.
    """

    State = AveragedState
    parameter_fields = ("z_anchor",)

    def __init__(self, model, *, anchor_steps: float, **kwargs):
        super().__init__(model, **kwargs)
        check_number("AveragedSGLD", "anchor_steps", anchor_steps, low=1, closed=True)
        self._anchor_steps = anchor_steps

    @property
    def default_fields(self):
        """The state fields that MCMC collects."""
        return (*super().default_fields, "z_anchor")

    def _init_fields(self, rng_key, z, warmup_steps):
        return {"z_anchor": z}

    def _update(self, state, gradient, step):
        noise = normal(step.key, state.z)
        z = sgld_step(state.z, gradient, noise, step.size, step.temperature, step.diagonal)
        anchor = jax.tree.map(lambda u, w: u + (w - u) / self._anchor_steps, state.z_anchor, z)
        return {"z": z, "z_anchor": anchor}
