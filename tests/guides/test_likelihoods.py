# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_bdl.linear.likelihoods import FISHER_DRAWS, family_of, parameters_of
from numpyro_bdl.natural_parameter import without_wrappers

F = random.normal(random.key(0), (4,))
LOGITS = random.normal(random.key(1), (4, 3))
TRIL = jnp.array([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.2, 0.1, 0.5]])

# a law, an observation, and the parameter that moves; the Hessian of these does not depend on the observation
HESSIANS = {
    "Normal": (dist.Normal(F, jnp.array([0.5, 1.0, 2.0, 0.1])), F + 1, "loc"),
    "Normal, expanded events": (dist.Normal(LOGITS, 0.3).to_event(1), LOGITS, "loc"),
    "LogNormal": (dist.LogNormal(F, 0.4), jnp.exp(F + 0.2), "loc"),
    "MultivariateNormal": (dist.MultivariateNormal(LOGITS, scale_tril=TRIL), LOGITS + 1, "loc"),
    "LowRankMultivariateNormal": (
        dist.LowRankMultivariateNormal(LOGITS, TRIL[:, :2], jnp.array([0.5, 1.0, 0.2])), LOGITS, "loc"
    ),
    "Bernoulli by logits": (dist.Bernoulli(logits=F), jnp.array([0, 1, 1, 0]), "logits"),
    "Bernoulli by probabilities": (dist.Bernoulli(probs=jax.nn.sigmoid(F)), jnp.array([0, 1, 1, 0]), "probs"),
    "Binomial": (dist.Binomial(jnp.array([3, 5, 1, 2]), logits=F), jnp.array([1, 4, 1, 0]), "logits"),
    "Categorical": (dist.Categorical(logits=LOGITS), jnp.array([0, 2, 1, 1]), "logits"),
    "Categorical by probabilities": (dist.Categorical(probs=jax.nn.softmax(LOGITS)), jnp.array([0, 2, 1, 1]), "probs"),
    "Multinomial": (
        dist.Multinomial(jnp.array([3, 5, 1, 2]), logits=LOGITS, total_count_max=5),
        jnp.array([[1, 1, 1], [5, 0, 0], [0, 1, 0], [0, 1, 1]]),
        "logits",
    ),
    "Poisson": (dist.Poisson(jnp.exp(F)), jnp.array([0, 3, 1, 2]), "rate"),
}  # fmt: skip


def _parts(law, moving):
    site = {"type": "sample", "fn": law}
    family = family_of("y", law, (moving,) if isinstance(moving, str) else moving)
    eta = family.predictor("y", site)
    keys = lambda: random.split(random.key(3), eta.shape[: len(law.shape()) - without_wrappers(law).event_dim])
    return family, eta, family.curvature(without_wrappers(law), eta, keys)


def _matrix(function, shape):
    """The matrix of a linear map of arrays."""
    size = int(np.prod(shape))
    columns = jax.vmap(lambda e: function(e.reshape(shape)).ravel())(jnp.eye(size))
    return np.asarray(columns).T


@pytest.mark.parametrize("name", HESSIANS)
def test_curvature_is_minus_the_hessian_and_the_factor_its_root(name):
    law, y, moving = HESSIANS[name]
    family, eta, curvature = _parts(law, moving)
    base = without_wrappers(law)

    def log_prob(e):
        return jnp.sum(family.rebuild(base, e.reshape(eta.shape)).log_prob(y))

    np.testing.assert_allclose(log_prob(eta.ravel()), jnp.sum(law.log_prob(y)), rtol=1e-4)
    expected = -np.asarray(jax.hessian(log_prob)(eta.ravel()))
    product = _matrix(curvature.product, eta.shape)
    np.testing.assert_allclose(product, expected, rtol=2e-4, atol=2e-5)
    factor = _matrix(curvature.factor, curvature.noise_shape)
    np.testing.assert_allclose(factor @ factor.T, product, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(_matrix(curvature.transposed, eta.shape), factor.T, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("law", "exact"),
    [
        (dist.StudentT(4.0, F, 0.5), (4 + 1) / (4 + 3) / 0.25),
        (dist.Laplace(F, 0.5), 1 / 0.25),
        (dist.Cauchy(F, 0.5), 1 / (2 * 0.25)),
        (dist.Logistic(F, 0.5), 1 / (3 * 0.25)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_location_families_against_the_variance_of_their_score(law, exact):
    _, eta, curvature = _parts(law, "loc")
    np.testing.assert_allclose(curvature.product(jnp.ones_like(eta)), exact, rtol=1e-5)
    y = law.sample(random.key(0), (40_000,))
    scores = jax.vmap(
        lambda y: jax.grad(lambda f: jnp.sum(type(law)(**{**parameters_of(law), "loc": f}).log_prob(y)))(eta)
    )(y)
    spread = jnp.std(scores**2, 0) / 200
    assert np.all(np.abs(jnp.mean(scores**2, 0) - exact) <= 4 * spread + 1e-5)


@pytest.mark.parametrize(
    ("law", "moving", "exact"),
    [
        # the scale depends on the weights too: eta = (location, log scale), of information diag(1 / s^2, 2)
        (dist.Normal(F, jnp.exp(F / 2)), ("loc", "scale"), lambda n: np.diag([np.exp(-F[n]), 2.0])),
        # negative binomial with a free mean: 1 / var(y), times the mean squared for its logarithm
        (dist.NegativeBinomial2(jnp.exp(F), 3.0), ("mean",), lambda n: [[1 / (np.exp(-F[n]) + 1 / 3)]]),
    ],
    ids=["heteroscedastic normal", "negative binomial"],
)
def test_other_families_by_the_scores_of_draws(law, moving, exact):
    family, eta, curvature = _parts(law, moving)
    assert curvature.noise_shape == (4, FISHER_DRAWS)
    product = _matrix(curvature.product, eta.shape)
    factor = _matrix(curvature.factor, curvature.noise_shape)
    np.testing.assert_allclose(factor @ factor.T, product, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(_matrix(curvature.transposed, eta.shape), factor.T, rtol=1e-4, atol=1e-5)
    width = len(moving)
    for n in range(4):
        block = product[n * width : (n + 1) * width, n * width : (n + 1) * width]
        # four standard errors of a mean of squares whose fourth moment may be 16 times their square
        assert np.all(np.abs(np.diag(block) / np.diag(exact(n)) - 1) < 4 * np.sqrt(15 / FISHER_DRAWS))
    rebuilt = family.rebuild(law, eta)
    for name in moving:
        np.testing.assert_allclose(getattr(rebuilt, name), getattr(law, name), rtol=1e-4)


def test_a_mixture_is_refused_by_name():
    law = dist.MixtureSameFamily(dist.Categorical(probs=jnp.ones(2) / 2), dist.Normal(jnp.zeros(2), 1))
    with pytest.raises(ValueError, match="'y', a MixtureSameFamily, has no parameter that depends on the weights"):
        family_of("y", law, ())
