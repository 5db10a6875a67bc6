# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Models to linearize, and the dense matrices that the package never forms, from their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import linen as nn
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro.contrib.module import random_flax_module
from numpyro.handlers import seed, substitute, trace

from numpyro_bdl import AutoLinearizedLaplace
from numpyro_bdl.guides.preparation import prepare
from numpyro_bdl.potential import Potential

# ---- linear regression, on which the closed forms of the specification were computed ------------------------------

N, P, SCALE, PRECISION = 60, 25, 0.3, 1.7
_RNG = np.random.default_rng(0)
FEATURES = _RNG.normal(size=(N, P)) / 5
TARGETS = FEATURES @ _RNG.normal(size=P) + SCALE * _RNG.normal(size=N)


def regression(x, y=None):
    w = numpyro.sample("w", dist.Normal(jnp.zeros(P), PRECISION**-0.5).to_event(1))
    with numpyro.plate("data", len(x)):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(xb @ w, SCALE), obs=yb)


def regression_posterior(alpha=PRECISION, scale=SCALE):
    """Mean and covariance."""
    covariance = np.linalg.inv(FEATURES.T @ FEATURES / scale**2 + alpha * np.eye(P))
    return covariance @ FEATURES.T @ TARGETS / scale**2, covariance


def log_evidence(alpha, scale):
    """log N(y; 0, Phi Phi' / alpha + s^2)."""
    covariance = FEATURES @ FEATURES.T / alpha + scale**2 * np.eye(N)
    return -0.5 * (
        N * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1] + TARGETS @ np.linalg.solve(covariance, TARGETS)
    )


def regression_loc():
    return {"auto_loc": jnp.asarray(regression_posterior()[0])}


# ---- a small classifier -------------------------------------------------------------------------------------------

X = np.asarray(random.normal(random.key(100), (20, 2)), float)
LABELS = random.randint(random.key(102), (20,), 0, 3)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(3)(hidden)


def classifier(x, y=None):
    net = random_flax_module("net", MLP(), dist.Normal(0, 0.7), input_shape=(2,))
    with numpyro.plate("data", len(x)):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=net(xb)), obs=yb)


# ---- any model ----------------------------------------------------------------------------------------------------


def trained(guide, key, *args, steps=300, rate=0.05, **kwargs):
    """What SVI trains, in float64."""
    import optax
    from numpyro.infer import SVI, Trace_ELBO

    svi = SVI(guide.model, guide, optax.adam(rate), Trace_ELBO())
    result = svi.run(key, steps, *args, progress_bar=False, **kwargs)
    loc = result.params["auto_loc"].astype(float)
    return result.params | {"auto_loc": loc} | (result.state.mutable_state or {})


def system_of(model, values, *args, batch_size=None, **settings):
    """The linear system of a model at given latent values, in float64."""
    guide = AutoLinearizedLaplace(model, **({"prior": "model"} | settings))
    potential = Potential(model, args)
    values = {k: jnp.asarray(w, float) for k, w in values.items()}
    return prepare(guide, random.key(0), potential, values, {}, args, {}, batch_size)[0]


def initial(model, *args):
    """Latent sites of a model as its network initializes them, moved off zero."""
    z, _ = Potential(model, args).initial(random.key(1))
    return {
        k: jnp.asarray(w, float) + 0.3 * random.normal(random.key(n), w.shape, float)
        for n, (k, w) in enumerate(z.items())
    }


def dense(model, values, *args, outputs=lambda law: law.logits, site="y"):
    """Jacobian (row * output, weight) of the outputs of a site, and their values (row, output)."""

    def function(values):
        sites = trace(substitute(seed(model, 0), data=values)).get_trace(*args)
        return outputs(sites[site]["fn"])

    flat, unravel = ravel_pytree(values)
    jacobian = jax.jacobian(lambda w: function(unravel(w)).ravel())(flat)
    return np.asarray(jacobian), np.asarray(function(values))


def softmax_curvature(logits):
    """Block-diagonal matrix (row * class, row * class)."""
    p = np.asarray(jax.nn.softmax(logits))
    blocks = [np.diag(q) - np.outer(q, q) for q in p]
    out = np.zeros((p.size, p.size))
    for n, block in enumerate(blocks):
        out[n * len(block) : (n + 1) * len(block), n * len(block) : (n + 1) * len(block)] = block
    return out


def flat(vectors):
    """Several vectors of weights as a matrix, their sites in the order of ``ravel_pytree``."""
    return np.concatenate([np.asarray(vectors[k]).reshape(len(vectors[k]), -1) for k in sorted(vectors)], 1)
