# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen as nn
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro.contrib.module import random_flax_module
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation
from problems import (
    FEATURES,
    LABELS,
    TARGETS,
    P,
    X,
    classifier,
    dense,
    flat,
    regression,
    regression_loc,
    softmax_curvature,
    system_of,
    trained,
)
from test_linear_system import several_sites, unit_vectors

import numpyro_bdl as bdl
from numpyro_bdl.linear import ConjugateGradient
from numpyro_bdl.linear.system import products

FAR = "ignore:The weights are far from an optimum"
CG = ConjugateGradient(tolerance=1e-11)
pytestmark = [pytest.mark.filterwarnings(FAR), pytest.mark.filterwarnings("ignore:EM stopped after 2 steps")]


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def classified():
    """A trained classifier, its guide and its posterior."""
    with jax.enable_x64(True):
        guide = bdl.AutoLinearizedLaplace(classifier, prior="model", solver=CG, num_samples=200)
        params = trained(guide, random.key(0), X, LABELS)
        return guide, params, guide.fit(random.key(1), params, X, LABELS, progress_bar=False)


def covariance(system):
    """The posterior covariance of all weights, from the products."""
    precision = flat(products(system, unit_vectors(system.model.weights))) + np.eye(len(flat_scale(system)))
    scale = flat_scale(system)
    return scale[:, None] * np.linalg.inv(precision) * scale


def flat_scale(system):
    return np.asarray(
        ravel_pytree(jax.tree.map(lambda s, w: jnp.broadcast_to(s, w.shape), system.scale, system.model.weights))[0]
    )


# ---- the law --------------------------------------------------------------------------------------------------------


def glm(law):
    def model(x, y=None):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(3), 0.8).to_event(1))
        with numpyro.plate("data", len(x)):
            xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
            numpyro.sample("y", law(xb @ w), obs=yb)

    return model


@pytest.mark.parametrize(
    "law",
    [lambda f: dist.Bernoulli(logits=f), lambda f: dist.Poisson(jnp.exp(f)), lambda f: dist.Normal(f, 0.4)],
    ids=["Bernoulli", "Poisson", "Normal"],
)
def test_generalized_linear_models_against_the_hessian_of_numpyro(law):
    x = np.random.default_rng(1).normal(size=(40, 3))
    y = (np.random.default_rng(2).random(40) < 0.5).astype(int)
    model = glm(law)
    guide = bdl.AutoLinearizedLaplace(model, prior="model", solver=CG, num_samples=2, center="linear")
    posterior = guide.fit(random.key(0), {"auto_loc": jnp.zeros(3)}, x, y, batch_size=9, progress_bar=False)
    # the linear model is the model: its mode is the maximum a posteriori
    mode = posterior.linear_mode["w"]
    reference = AutoLaplaceApproximation(model)
    SVI(model, reference, optax.sgd(0.1), Trace_ELBO()).init(random.key(0), x, y)
    gradient = jax.grad(lambda w: reference._loss_fn({"auto_loc": w}))(mode)
    assert np.abs(gradient).max() < 1e-7
    expected = reference.get_posterior({"auto_loc": mode}).covariance_matrix
    np.testing.assert_allclose(covariance(system_of(model, {"w": mode}, x, y)), expected, rtol=1e-6, atol=1e-9)


def test_a_network_against_a_dense_gauss_newton_matrix(classified):
    guide, params, posterior = classified
    values = posterior.loc
    jacobian, logits = dense(classifier, values, X, LABELS)
    ggn = jacobian.T @ softmax_curvature(logits) @ jacobian + np.eye(jacobian.shape[1]) / 0.49
    reference = AutoLaplaceApproximation(classifier, hessian_fn=lambda f, w: jnp.asarray(ggn))
    SVI(classifier, reference, optax.sgd(0.1), Trace_ELBO()).init(random.key(0), X, LABELS)
    ours = covariance(posterior.system)
    np.testing.assert_allclose(ours, reference.get_posterior(params).covariance_matrix, rtol=1e-6, atol=1e-8)
    curved = AutoLaplaceApproximation(classifier)
    SVI(classifier, curved, optax.sgd(0.1), Trace_ELBO()).init(random.key(0), X, LABELS)
    assert np.abs(curved.get_posterior(params).covariance_matrix - ours).max() > 0.05 * np.abs(ours).max()

    draws = flat({k: posterior.samples[k] - values[k] for k in values})
    error = draws.T @ draws / len(draws) - ours
    spread = np.sqrt((ours**2 + np.outer(np.diag(ours), np.diag(ours))) / len(draws))
    assert np.all(np.abs(error) < 5 * spread)
    share = np.trace(np.eye(len(ours)) - ours / 0.49)
    assert abs(posterior.effective_dimension - share) < 4 * np.sqrt(2 * share / len(draws))


def test_the_last_layer_is_regression_on_its_features(classified):
    _, params, _ = classified
    guide = bdl.AutoLinearizedLaplace(classifier, prior="model", solver=CG, num_samples=3, params="last_layer")
    posterior = guide.fit(random.key(1), params, X, LABELS, progress_bar=False)
    assert set(posterior.system.model.weights) == {"net/Dense_1.kernel", "net/Dense_1.bias"}
    assert set(posterior.frozen) == {"net/Dense_0.kernel", "net/Dense_0.bias"}
    hidden = np.tanh(X @ posterior.loc["net/Dense_0.kernel"] + posterior.loc["net/Dense_0.bias"])
    features = np.concatenate([np.ones((len(X), 1)), hidden], 1)  # bias, kernel: the order of the sites
    logits = features @ np.concatenate([posterior.loc["net/Dense_1.bias"][None], posterior.loc["net/Dense_1.kernel"]])
    jacobian = np.einsum("nf,oc->nofc", features, np.eye(3)).reshape(60, 15)
    expected = np.linalg.inv(jacobian.T @ softmax_curvature(logits) @ jacobian + np.eye(15) / 0.49)
    np.testing.assert_allclose(covariance(posterior.system), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(posterior.samples["net/Dense_0.kernel"][1], posterior.loc["net/Dense_0.kernel"])
    named = bdl.AutoLinearizedLaplace(
        classifier, prior="model", solver=CG, num_samples=3, params=lambda k: "Dense_1" in k
    )
    other = named.fit(random.key(1), params, X, LABELS, progress_bar=False)
    np.testing.assert_allclose(other.params["auto_samples"], posterior.params["auto_samples"], atol=1e-10)


def test_batches_make_no_difference(classified):
    guide, params, posterior = classified
    for batch_size in (7, 20):
        again = guide.fit(random.key(1), params, X, LABELS, batch_size=batch_size, progress_bar=False)
        np.testing.assert_allclose(again.params["auto_samples"], posterior.params["auto_samples"], atol=1e-8)


def test_samples_in_chunks_are_the_same(classified):
    _, params, posterior = classified
    guide = bdl.AutoLinearizedLaplace(classifier, prior="model", solver=CG, num_samples=200, sample_chunk=32)
    chunked = guide.fit(random.key(1), params, X, LABELS, batch_size=7, progress_bar=False)
    np.testing.assert_allclose(chunked.params["auto_samples"], posterior.params["auto_samples"], atol=1e-8)


def test_where_curvature_is_taken_and_where_samples_are_centred(classified):
    _, params, posterior = classified
    settings = {"prior": "model", "solver": CG, "num_samples": 200}
    linear = bdl.AutoLinearizedLaplace(classifier, curvature_at="linear", center="linear", **settings)
    found = linear.fit(random.key(1), params, X, LABELS, progress_bar=False)
    assert posterior.linear_mode is None  # nothing needs it
    centred = bdl.AutoLinearizedLaplace(classifier, center="linear", **settings)
    for k, mode in centred.fit(random.key(1), params, X, LABELS, progress_bar=False).linear_mode.items():
        np.testing.assert_allclose(found.linear_mode[k], mode, atol=1e-8)
    jacobian, logits = dense(classifier, posterior.loc, X, LABELS)
    change = ravel_pytree(jax.tree.map(jnp.subtract, found.linear_mode, dict(found.loc)))[0]
    there = logits + (jacobian @ change).reshape(logits.shape)
    expected = np.linalg.inv(jacobian.T @ softmax_curvature(there) @ jacobian + np.eye(len(change)) / 0.49)
    np.testing.assert_allclose(covariance(found.system), expected, rtol=1e-6, atol=1e-8)
    centre = {k: w.mean(0) - found.linear_mode[k] for k, w in found.samples.items()}
    for k, error in centre.items():
        assert np.all(np.abs(error) < 4.5 * np.std(found.samples[k], 0) / np.sqrt(200))


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_tangent(classified):
    _, _, posterior = classified
    predictive = bdl.PosteriorPredictive(posterior, draw_chunk=64, data_chunk=8)
    jacobian, logits = dense(classifier, posterior.loc, X, LABELS)
    change = flat({k: posterior.samples[k] - posterior.loc[k] for k in posterior.loc})
    expected = logits + (change @ jacobian.T).reshape(200, 20, 3)
    np.testing.assert_allclose(predictive.functions(X)["y"][0], expected, atol=1e-9)
    np.testing.assert_allclose(
        predictive.log_likelihood()["y"][0], jax.nn.log_softmax(expected)[:, jnp.arange(20), LABELS], atol=1e-9
    )
    assert predictive.sample(random.key(0), X)["y"].shape == (1, 200, 20)
    found = predictive.summary(X, LABELS)["y"]
    np.testing.assert_allclose(found.mean_probabilities, jax.nn.softmax(expected).mean(0), atol=1e-9)


def test_draws_of_a_tangent_share_the_point_where_it_touches(classified, monkeypatch):
    def one_after_the_other(*args, **kwargs):
        raise AssertionError("the network itself would be evaluated for each draw")

    _, _, posterior = classified
    monkeypatch.setattr(jax.lax, "map", one_after_the_other)
    assert bdl.PosteriorPredictive(posterior).functions(X)["y"].shape == (1, 200, 20, 3)


def test_covariance_of_few_points_in_closed_form(classified):
    _, _, posterior = classified
    some = X[:4] + 0.5
    jacobian, _ = dense(classifier, posterior.loc, some)
    found = posterior.covariance(some, tolerance=1e-10)["y"]
    assert found.shape == (4, 3, 4, 3)
    expected = jacobian @ covariance(posterior.system) @ jacobian.T
    np.testing.assert_allclose(found.reshape(12, 12), expected, rtol=1e-6, atol=1e-9)


def test_masks_and_scales_stay_with_predictions():
    """As of any run: a masked row has no log likelihood, and ``handlers.scale`` does not enter it."""
    targets, counts = 0.3 * X[:, 1], random.poisson(random.key(1), 1.0, (20,))
    guide = bdl.AutoLinearizedLaplace(several_sites, prior="model", solver=CG, num_samples=3)
    posterior = guide.fit(random.key(0), {"auto_loc": jnp.full(1, 0.1)}, X, targets, counts, progress_bar=False)
    found = bdl.PosteriorPredictive(posterior).log_likelihood()
    slope = np.asarray(posterior.samples["slope"])[:, None]
    expected = dist.Normal(slope * X[:, 1], 0.5).log_prob(targets)
    np.testing.assert_allclose(found["target"][0], np.where(X[:, 1] > 0, expected, 0), rtol=1e-6)
    np.testing.assert_allclose(found["count"][0], dist.Poisson(jnp.exp(slope * X[:, 0])).log_prob(counts), rtol=1e-5)
    assert found["outside"].shape == (1, 3)


def test_a_tree_for_arviz(classified):
    import arviz as az

    _, _, posterior = classified
    tree = bdl.to_datatree(posterior, log_likelihood=True, posterior_predictive=True)
    assert {"functions", "log_likelihood", "posterior_predictive", "observed_data"} <= set(tree.children)
    assert tree["functions"]["y"].dims == ("chain", "draw", "point", "output")
    assert tree["functions"]["y"].shape == (1, 200, 20, 3)
    np.testing.assert_array_equal(tree["observed_data"]["y"], LABELS)
    assert tree.attrs["guide"] == "AutoLinearizedLaplace"
    assert tree.attrs["effective_dimension"] == posterior.effective_dimension
    assert np.isfinite(az.loo(tree).elpd)


def test_predictive_of_numpyro_draws_from_the_samples(classified):
    guide, params, posterior = classified
    draws = Predictive(classifier, guide=guide, params=posterior.params, num_samples=50)
    logits = draws(random.key(0), X)["y"]
    assert logits.shape == (50, 20)
    latent = guide.sample_posterior(random.key(1), posterior.params, sample_shape=(500,))
    kernel, among = latent["net/Dense_0.kernel"], posterior.samples["net/Dense_0.kernel"]
    found = np.array([np.flatnonzero(np.isclose(among, k, atol=1e-7).all((1, 2)))[0] for k in kernel])
    assert len(np.unique(found)) > 150  # of 200, with replacement: 1 - exp(-2.5) = 92 %
    trained_alone = guide.sample_posterior(random.key(1), params, sample_shape=(3,))["net/Dense_0.kernel"]
    np.testing.assert_allclose(trained_alone, np.stack(3 * [posterior.loc["net/Dense_0.kernel"]]))


def test_the_guide_is_a_point_until_it_is_given_samples(classified):
    guide, params, posterior = classified
    for refused in (guide.get_posterior, guide.get_transform):
        with pytest.raises(NotImplementedError, match="known by samples alone"):
            refused(posterior.params)
    with pytest.raises(NotImplementedError, match="known by samples alone"):
        Trace_ELBO().loss(random.key(0), posterior.params, classifier, guide, X, LABELS)
    assert np.isfinite(Trace_ELBO().loss(random.key(0), params, classifier, guide, X, LABELS))
    np.testing.assert_allclose(guide.median(posterior.params)["net/Dense_1.bias"], posterior.loc["net/Dense_1.bias"])
    low, high = guide.quantiles(posterior.params, [0.1, 0.9])["net/Dense_1.bias"]
    np.testing.assert_allclose(low, np.quantile(posterior.samples["net/Dense_1.bias"], 0.1, axis=0), rtol=1e-6)
    assert np.all(low < high)
    with pytest.raises(ValueError, match="hold 'auto_samples'"):
        guide.quantiles(params, [0.5])


def test_pickling_and_a_guide_made_anew(classified):
    guide, _, posterior = classified
    params = pickle.loads(pickle.dumps(posterior.params))
    again = pickle.loads(pickle.dumps(bdl.AutoLinearizedLaplace(classifier, prior="model", solver=CG, num_samples=200)))
    fitted = again.fit(
        random.key(1), {k: v for k, v in params.items() if k != "auto_samples"}, X, LABELS, progress_bar=False
    )
    np.testing.assert_array_equal(fitted.params["auto_samples"], posterior.params["auto_samples"])


def test_a_posterior_predicts_after_pickling(classified):
    _, _, posterior = classified
    again = pickle.loads(pickle.dumps(posterior))
    expected = bdl.PosteriorPredictive(posterior).functions(X[:3])["y"]
    np.testing.assert_array_equal(bdl.PosteriorPredictive(again).functions(X[:3])["y"], expected)


def test_initialization_under_jit_leaks_no_tracer():
    guide = bdl.AutoLinearizedLaplace(classifier, prior="model", solver="cg", num_samples=2)
    svi = SVI(classifier, guide, optax.adam(0.01), Trace_ELBO())
    state = jax.jit(svi.init)(random.key(0), X, LABELS)
    params = svi.get_params(state)
    guide.sample_posterior(random.key(1), params, sample_shape=(2,))
    # the start is the network's own: biases of zero
    np.testing.assert_array_equal(guide.median(params)["net/Dense_0.bias"], 0)


def test_the_guide_of_another_key_is_another_sample(classified):
    guide, params, posterior = classified
    other = guide.fit(random.key(2), params, X, LABELS, progress_bar=False)
    assert np.abs(other.params["auto_samples"] - posterior.params["auto_samples"]).min() > 0


# ---- normalization ------------------------------------------------------------------------------------------------


class Normalized(nn.Module):
    norm: str = "layer"

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(6)(x)
        h = nn.LayerNorm(epsilon=1e-12)(h) if self.norm == "layer" else nn.BatchNorm(not train, epsilon=1e-12)(h)
        return nn.Dense(3)(nn.tanh(h))


def normalized(x, y=None, *, train=False):
    net = random_flax_module("net", Normalized(), dist.Normal(0, 1), input_shape=(2,))
    with numpyro.plate("data", len(x)):
        xb = numpyro.subsample(x, event_dim=1)
        yb = None if y is None else numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=net(xb)), obs=yb)


@pytest.fixture(scope="module")
def layer_norm():
    """Logits of samples under three priors, of a trained network and of the same with its first layer times ten."""
    with jax.enable_x64(True):
        settings = {"solver": CG, "num_samples": 8, "em_samples": 8, "em_tolerance": 1e-6}
        params = trained(bdl.AutoLinearizedLaplace(normalized), random.key(0), X, LABELS)
        priors = {
            "isotropic": {"prior": "isotropic", "em_steps": 2},
            "per_site": {"prior": "per_site", "em_steps": 2},
            "g": {"prior": "g", "em_steps": 2},
            "shared": {"prior": "per_group", "groups": {"all": lambda k: True}, "em_steps": 2},
        }
        variances, posteriors = {}, {}
        for name, prior in priors.items():
            for factor in (1, 10):
                guide = bdl.AutoLinearizedLaplace(normalized, **settings, **prior)
                scaled = params | {"auto_loc": _scaled(guide, params, factor)}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    posterior = guide.fit(random.key(1), scaled, X, LABELS, progress_bar=False)
                functions = bdl.PosteriorPredictive(posterior).functions(X + 0.1)["y"][0]
                variances[name, factor], posteriors[name, factor] = functions.var(0), posterior
        return variances, posteriors


def _scaled(guide, params, factor):
    """The trained vector with the layer before the normalization times a factor."""
    with numpyro.handlers.seed(rng_seed=0):
        guide._setup_prototype(X, LABELS)
    z = guide._unpack_latent(params["auto_loc"])
    return guide._flat({k: w * factor if "Dense_0" in k else w for k, w in z.items()})


@pytest.mark.parametrize(
    ("prior", "invariant"), [("isotropic", True), ("per_site", True), ("g", True), ("shared", False)]
)
def test_predictions_do_not_depend_on_the_scale_before_a_normalization(layer_norm, prior, invariant):
    variances, _ = layer_norm
    ratio = variances[prior, 10] / variances[prior, 1]
    assert np.all(np.abs(ratio - 1) < 1e-3) == invariant


def test_normalized_layers_have_their_own_precision_and_affine_parameters_stay(layer_norm):
    _, posteriors = layer_norm
    one, ten = (posteriors["isotropic", factor] for factor in (1, 10))
    assert one.groups["net/Dense_0"] == ("net/Dense_0.bias", "net/Dense_0.kernel")
    assert set(one.groups) == {"weights", "net/Dense_0"}
    assert set(one.frozen) == {"net/LayerNorm_0.scale", "net/LayerNorm_0.bias"}
    ratio = one.prior_precision["net/Dense_0"] / ten.prior_precision["net/Dense_0"]
    assert ratio == pytest.approx(100, rel=1e-3)


def test_a_shared_precision_is_warned_of():
    guide = bdl.AutoLinearizedLaplace(normalized, prior="model", solver="cg", num_samples=2)
    params = trained(guide, random.key(0), X, LABELS, steps=50)
    with pytest.warns(UserWarning, match="does not depend on the scale of the weights of net/Dense_0"):
        guide.fit(random.key(1), params, X, LABELS, progress_bar=False)


def batch_normalized(x, y=None, *, train=True):
    net = random_flax_module("net", Normalized("batch"), dist.Normal(0, 1), X, mutable=["batch_stats"])
    with numpyro.plate("data", len(x)):
        xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Categorical(logits=net(xb, train=train)), obs=yb)


def test_batch_normalization_is_taken_in_inference_mode():
    guide = bdl.AutoLinearizedLaplace(batch_normalized, solver="cg", num_samples=4, em_steps=2)
    params = trained(guide, random.key(0), X, LABELS, steps=200, train=True)
    assert "net$state" in params
    posterior = guide.fit(random.key(1), params, X, LABELS, batch_size=8, progress_bar=False, train=False)
    # with the statistics of the normalization, doubling the layer leaves the function
    assert set(posterior.groups) == {"weights", "net/Dense_0"}
    assert set(posterior.frozen) == {"net/BatchNorm_0.scale", "net/BatchNorm_0.bias"}
    functions = bdl.PosteriorPredictive(posterior).functions(X, LABELS, train=False)["y"]
    assert functions.shape == (1, 4, 20, 3)
    with pytest.raises(ValueError, match="changes its statistics .*BatchNorm in training mode"):
        guide.fit(random.key(1), params, X, LABELS, progress_bar=False, train=True)
    without = {k: v for k, v in params.items() if k != "net$state"}
    with pytest.raises(ValueError, match=r"result\.params \| result\.state\.mutable_state"):
        guide.fit(random.key(1), without, X, LABELS, progress_bar=False, train=False)


# ---- priors -------------------------------------------------------------------------------------------------------


def test_groups_of_precisions(classified):
    _, params, _ = classified
    settings = {"solver": "cg", "num_samples": 8, "em_steps": 2}
    groups = {"first": lambda k: "Dense_0" in k, "rest": lambda k: "Dense_0" not in k}
    guide = bdl.AutoLinearizedLaplace(classifier, prior="per_group", groups=groups, **settings)
    posterior = guide.fit(random.key(1), params, X, LABELS, progress_bar=False)
    assert posterior.groups["first"] == ("net/Dense_0.bias", "net/Dense_0.kernel")
    assert posterior.prior_precision["first"] != posterior.prior_precision["rest"]
    per_site = bdl.AutoLinearizedLaplace(classifier, prior="per_site", **settings)
    assert len(per_site.fit(random.key(1), params, X, LABELS, progress_bar=False).prior_precision) == 4


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ({"first": lambda k: "Dense_0" in k}, "'net/Dense_1.bias' is in none"),
        ({"all": lambda k: True, "first": lambda k: "Dense_0" in k}, "'net/Dense_0.bias' is in all and first"),
        ({"all": lambda k: True, "empty": lambda k: False}, "groups without a weight: empty"),
    ],
)
def test_groups_that_do_not_divide_the_weights(classified, groups, text):
    _, params, _ = classified
    guide = bdl.AutoLinearizedLaplace(classifier, prior="per_group", groups=groups)
    with pytest.raises(ValueError, match=text):
        guide.fit(random.key(1), params, X, LABELS, progress_bar=False)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"prior": "flat"}, "prior must be"),
        ({"solver": "lbfgs"}, "solver must be"),
        ({"num_samples": 1}, "EM needs at least 2 samples"),
        ({"prior": "per_group"}, "groups, a predicate"),
        ({"groups": {}}, "groups, a predicate"),
        ({"params": "first_layer"}, "params must be"),
        ({"curvature_at": "mode"}, "curvature_at must be"),
        ({"sample_chunk": 0}, "sample_chunk must be"),
    ],
)
def test_settings_that_make_no_sense(settings, text):
    with pytest.raises(ValueError, match=text):
        bdl.AutoLinearizedLaplace(classifier, **settings)


def test_a_solver_must_be_a_solver():
    with pytest.raises(TypeError, match="solver must be"):
        bdl.AutoLinearizedLaplace(classifier, solver=CG.solve)


def subsampled(x, y, batch_size=None):
    w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1).to_event(1))
    with numpyro.plate("data", len(x), subsample_size=batch_size):
        xb, yb = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
        f = numpyro.deterministic("f", xb @ w)
        numpyro.deterministic("positive", f > 0)
        numpyro.sample("y", dist.Normal(f, 1.0), obs=yb)


def test_jit_with_minibatches_and_deterministic_sites():
    y = jnp.asarray(LABELS, float)
    guide = bdl.AutoLinearizedLaplace(subsampled, prior="model", solver="cg", num_samples=2)
    svi = SVI(subsampled, guide, optax.adam(0.01), Trace_ELBO())
    params = svi.get_params(jax.jit(lambda key: svi.init(key, X, y, batch_size=2))(random.key(0)))
    assert guide.sample_posterior(random.key(1), params)["w"].shape == (2,)
    posterior = guide.fit(random.PRNGKey(1), params, X, y, batch_size=7, progress_bar=False)
    # what is no number has no tangent, and is that of the trained weights
    found = bdl.PosteriorPredictive(posterior).functions(X, y, sites=("f", "positive"))
    assert found["f"].std(1).min() > 0
    np.testing.assert_array_equal(found["positive"][0, 1], X @ posterior.loc["w"] > 0)


def two_parameters(x, y):
    """A location and a scale that both depend on weights."""
    w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1).to_event(1))
    s = numpyro.param("s", 1.0)
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, s * jnp.exp(0.3 * x @ w)), obs=y)


def test_a_scale_that_depends_on_weights_legacy_keys_and_a_parameter_without_a_prior():
    y = jnp.asarray(LABELS, float)
    guide = bdl.AutoLinearizedLaplace(two_parameters, prior="model", solver=CG, num_samples=2)
    params = trained(guide, random.key(0), X, y, steps=100)
    posterior = guide.fit(random.PRNGKey(1), params, X, y, progress_bar=False)
    assert posterior.frozen == ("s",)
    scale = params["s"] * np.exp(0.3 * X @ posterior.loc["w"])
    # Fisher information of location and logarithm of the scale
    exact = X.T @ ((1 / scale**2 + 2 * 0.3**2)[:, None] * X)
    found = np.linalg.inv(covariance(posterior.system)) - np.eye(2)
    # 64 draws for each of 20 rows; fourth moments of a score up to 15 times their square
    np.testing.assert_allclose(np.diag(found), np.diag(exact), rtol=4 * np.sqrt(15 / 64 / 20 * 3))


def _linear(x, y, *, prior=None, hyper=None, scale=None, plate=True, dropout=False, factor=False, powers=False):
    """A linear model with something wrong."""
    width = 1.0 if hyper is None else numpyro.sample("width", hyper)
    w = numpyro.sample("w", dist.Normal(jnp.zeros(2), width).to_event(1) if prior is None else prior)
    sigma = 1.0 if scale is None else numpyro.sample("sigma", scale)
    if dropout:
        w = w * random.bernoulli(numpyro.prng_key(), 0.5, (2,))
    if factor:
        numpyro.factor("penalty", -jnp.sum(w**2))
    if powers:
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(x @ w, sigma**2), obs=y)
            numpyro.sample("y", dist.Normal(x @ w, sigma), obs=y)
        return
    if not plate:
        numpyro.sample("y", dist.Normal(x @ w, sigma).to_event(1), obs=y)
        return
    with numpyro.plate("data", len(x)):
        numpyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


@pytest.mark.parametrize(
    ("wrong", "settings", "call", "text"),
    [
        ({"prior": dist.Laplace(jnp.zeros(2), 1).to_event(1)}, {}, {}, "prior of 'w' is of the family Laplace"),
        ({"hyper": dist.HalfNormal()}, {}, {}, "'width' is neither a weight"),
        (
            {"scale": dist.HalfNormal()},
            {"noise_site": "w"},
            {},
            "noise_site='w' is not a noise scale .* those are: sigma",
        ),
        ({"factor": True}, {}, {}, "numpyro.factor 'penalty' is no likelihood"),
        (
            {"scale": dist.HalfNormal(), "powers": True},
            {"noise_site": "sigma"},
            {},
            "must be the scale of a Normal likelihood, or a factor of it",
        ),
        ({}, {"prior": "g"}, {}, "can't be cut into batches of 1 rows"),
        ({"dropout": True}, {}, {}, r"draws random numbers at site 'y' \(dropout\)"),
        ({"plate": False}, {}, {"batch_size": 2}, "share no plate whose rows could be batched"),
        ({}, {}, {"batch_size": 2}, "can't be cut into batches of 2 rows of its plate 'data'"),
        ({}, {}, {"batch_size": 21}, "batch_size must be an integer from 1 to 20"),
        ({}, {"params": lambda k: False}, {}, "selects no weight; there are: w"),
    ],
)
def test_models_that_have_no_tangent(wrong, settings, call, text):
    y = jnp.asarray(LABELS, float)
    guide = bdl.AutoLinearizedLaplace(lambda x, y: _linear(x, y, **wrong), solver="cg", **settings)
    with numpyro.handlers.seed(rng_seed=0):
        guide._setup_prototype(X, y)
    with pytest.raises(ValueError, match=text):
        guide.fit(random.key(0), {"auto_loc": guide._init_latent}, X, y, progress_bar=False, **call)


def test_parameters_of_another_guide():
    guide = bdl.AutoLinearizedLaplace(regression, solver="cg")
    with pytest.raises(ValueError, match=r"shape \(3,\), but the latent sites of the model are 25 numbers"):
        guide.fit(random.key(0), {"auto_loc": jnp.zeros(3)}, FEATURES, TARGETS, progress_bar=False)
    with pytest.raises(ValueError, match=r"params must hold 'auto_loc'.*\['loc'\]"):
        guide.fit(random.key(0), {"loc": jnp.zeros(P)}, FEATURES, TARGETS, progress_bar=False)


def test_curvature_that_is_not_finite():
    def model(x, y):
        w = numpyro.sample("w", dist.Normal(jnp.zeros(2), 1).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(jnp.sqrt(jnp.abs(x @ w)), 1), obs=y)

    guide = bdl.AutoLinearizedLaplace(model, prior="model", solver="cg")
    with pytest.raises(ValueError, match="with respect to 'w', is not finite"):
        guide.fit(random.key(0), {"auto_loc": jnp.zeros(2)}, X, jnp.asarray(LABELS, float), progress_bar=False)


def test_weights_far_from_their_optimum_are_warned_of():
    guide = bdl.AutoLinearizedLaplace(regression, prior="model", solver="cg", num_samples=2)
    with pytest.warns(UserWarning, match="far from an optimum: their gradient, in units of the prior, has the norm"):
        guide.fit(random.key(0), {"auto_loc": 30 * jnp.ones(P)}, FEATURES, TARGETS, progress_bar=False)


@pytest.mark.filterwarnings("ignore:The linear model interpolates")
def test_systems_that_are_not_solved_are_warned_of():
    solver = ConjugateGradient(max_iterations=1)
    guide = bdl.AutoLinearizedLaplace(regression, prior="model", solver=solver, num_samples=2)
    with pytest.warns(UserWarning, match="not solved: at the data their function can be off by"):
        guide.fit(random.key(0), regression_loc(), FEATURES, TARGETS, progress_bar=False)


def test_em_that_still_moves_is_warned_of():
    guide = bdl.AutoLinearizedLaplace(regression, solver="cg", num_samples=4, em_steps=1)
    with pytest.warns(UserWarning, match="EM stopped after 1 steps while a precision or noise scale still changed by"):
        guide.fit(random.key(0), regression_loc(), FEATURES, TARGETS, progress_bar=False)


@pytest.mark.filterwarnings("ignore:EM stopped")
def test_what_is_said_before_and_during_a_fit(progress_bar, capsys):
    guide = bdl.AutoLinearizedLaplace(regression, solver="cg", num_samples=4, em_steps=1)
    guide.fit(random.key(0), regression_loc(), FEATURES, TARGETS)
    said = capsys.readouterr()
    assert "25 weights in 1 sites, 4 samples: 0 MiB for the solver" in said.out + said.err
    assert "EM 1/1" in said.err
    assert "effective dimension" in said.err
