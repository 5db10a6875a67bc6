# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Given samples as a distribution that can be drawn from, and has no density."""

import numpyro.distributions as dist
from jax import Array, random

NO_DENSITY = (
    "The posterior of AutoLinearizedLaplace is known by samples alone: the matrix that its density needs is never"
    " formed. sample_posterior, quantiles and numpyro.infer.Predictive work with the params of what fit returns."
)


class OneOf(dist.Distribution):
    """One of the given samples, with replacement."""

    support = dist.constraints.real_vector
    pytree_data_fields = ("samples",)

    def __init__(self, samples: Array, *, validate_args: bool | None = None):
        self.samples = samples
        super().__init__((), samples.shape[1:], validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        return self.samples[random.randint(key, sample_shape, 0, len(self.samples))]

    def expand(self, batch_shape):
        return dist.ExpandedDistribution(self, batch_shape)

    def log_prob(self, value, intermediates=None):
        raise NotImplementedError(NO_DENSITY)
