# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Models whose posterior is known, and how to draw many independent chains from them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer import MCMC

CHAINS = 10_000


class Location(NamedTuple):
    """Rows y ~ N(L w, sigma^2 I) and a Gaussian prior: a Gaussian target with the same gradient noise everywhere."""

    y: jnp.ndarray
    L: np.ndarray
    sigma: float
    prior_precision: float = 0.5

    @classmethod
    def make(cls, curvatures, rows=8, seed=0):
        """A target whose energy has these curvatures, not along the axes."""
        rng = np.random.default_rng(seed)
        dim = len(curvatures)
        rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        L = np.diag(np.sqrt(np.asarray(curvatures) - cls._field_defaults["prior_precision"])) @ rotation
        return cls(jnp.asarray(rng.normal(1.0, 1.0, size=(rows, dim)), jnp.float32), L, float(np.sqrt(rows)))

    @property
    def curvature(self):
        return self.prior_precision * np.eye(len(self.L)) + len(self.y) / self.sigma**2 * self.L.T @ self.L

    @property
    def mean(self):
        return np.linalg.solve(self.curvature, self.L.T @ np.asarray(self.y, float).sum(0) / self.sigma**2)

    def gradient_noise(self, batch):
        """Covariance of the gradient from rows drawn with replacement."""
        y = np.asarray(self.y, float)
        return len(y) ** 2 / batch * self.L.T @ np.atleast_2d(np.cov(y.T, bias=True)) @ self.L / self.sigma**4

    def model(self, y, batch_size=None):
        prior = dist.Normal(jnp.zeros(len(self.L)), self.prior_precision**-0.5).to_event(1)
        w = numpyro.sample("w", prior)
        with numpyro.plate("data", len(y), subsample_size=batch_size):
            rows = numpyro.subsample(y, event_dim=1)
            location = jnp.asarray(self.L, w.dtype) @ w
            numpyro.sample("y", dist.Normal(location, self.sigma).to_event(1), obs=rows)


def last_states(kernel, *args, steps, chains=CHAINS, seed=0, init_params=None, **kwargs):
    """The states of independent chains after a number of draws."""
    mcmc = MCMC(
        kernel, num_warmup=steps - 1, num_samples=1, num_chains=chains, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(random.key(seed), *args, init_params=init_params, **kwargs)
    return mcmc.last_state
