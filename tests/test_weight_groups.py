# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_bdl.weight_groups import KINDS, partition

DENSE, CONV = (4, 3), (2, 5, 4, 3)
CASES = [
    ("unstructured", (7,), (7,)),
    ("unstructured", DENSE, DENSE),
    ("neuron_in", DENSE, (4,)),
    ("neuron_out", DENSE, (3,)),
    ("channel", CONV, (4,)),
    ("filter", CONV, (3,)),
    ("kernel", CONV, (4, 3)),
    (lambda name, shape: np.arange(12).reshape(shape) % 5, DENSE, (5,)),
]


def groups_of(kind, shape):
    return partition("test", {"w": kind}, {"w": shape})["w"]


def numbers(groups):
    """The number of each weight's group, by what spread says."""
    count = np.arange(groups.size.size, dtype=float).reshape(groups.shape)
    return np.broadcast_to(groups.spread(jnp.asarray(count)), groups.site_shape)


@pytest.mark.parametrize(("kind", "site", "shape"), CASES)
def test_groups_partition_the_weights(kind, site, shape):
    groups = groups_of(kind, site)
    assert groups.shape == shape
    assert groups.size.shape == shape
    assert groups.size.sum() == np.prod(site)
    np.testing.assert_array_equal(np.bincount(numbers(groups).ravel().astype(int)), groups.size.ravel())
    x = np.random.default_rng(0).normal(size=(2, 3, *site))
    expected = [x[..., numbers(groups) == n].sum(-1) for n in range(groups.size.size)]
    total = groups.total(jnp.asarray(x))
    assert total.shape == (2, 3, *shape)
    np.testing.assert_allclose(total.reshape(2, 3, -1), np.stack(expected, -1), rtol=1e-4, atol=1e-5)
    values = jnp.arange(2.0 * groups.size.size).reshape(2, *shape)
    for one, other in zip(np.asarray(groups.spread(values)), values, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(one, site), np.broadcast_to(groups.spread(other), site))
    assert len(groups.names()) == len(set(groups.names())) == groups.size.size


def test_which_weights_belong_together():
    w = np.arange(12).reshape(DENSE)
    np.testing.assert_array_equal(groups_of("neuron_in", DENSE).total(jnp.asarray(w)), w.sum(1))
    np.testing.assert_array_equal(groups_of("neuron_out", DENSE).total(jnp.asarray(w)), w.sum(0))
    k = np.arange(np.prod(CONV)).reshape(CONV)
    np.testing.assert_array_equal(groups_of("filter", CONV).total(jnp.asarray(k)), k.sum((0, 1, 2)))
    np.testing.assert_array_equal(groups_of("channel", CONV).total(jnp.asarray(k)), k.sum((0, 1, 3)))
    np.testing.assert_array_equal(groups_of("kernel", CONV).total(jnp.asarray(k)), k.sum((0, 1)))


def test_names():
    assert groups_of("kernel", (2, 2, 1, 2)).names() == ["0,0", "0,1"]
    assert groups_of("neuron_out", DENSE).names() == ["0", "1", "2"]


def test_patterns_pick_sites_in_the_order_of_the_model():
    shapes = {"net/Dense_0.kernel": (2, 3), "net/Dense_0.bias": (3,), "net/Dense_1.kernel": (3, 2)}
    chosen = partition("test", {"net/Dense_1.*": "neuron_in", "net/Dense_0.kernel": "unstructured"}, shapes)
    assert list(chosen) == ["net/Dense_0.kernel", "net/Dense_1.kernel"]
    assert [g.kind for g in chosen.values()] == ["unstructured", "neuron_in"]


@pytest.mark.parametrize(
    ("kind", "shape", "text"),
    [
        ("neuron_in", (3,), r"are for arrays \(in, out\), but 'w' has shape \(3,\)"),
        ("neuron_out", CONV, r"are for arrays \(in, out\)"),
        ("filter", DENSE, r"\(space..., in, out\), but .* Use \"neuron_in\""),
        ("kernel", DENSE, r"\(space..., in, out\)"),
        ("column", DENSE, "got 'column'"),
        (3, DENSE, "must be one of .* got 3"),
        (lambda name, shape: np.zeros(shape), DENSE, r"array of integers of the shape of 'w', \(4, 3\); got float64"),
        (lambda name, shape: np.zeros(3, int), DENSE, r"got int64 of shape \(3,\)"),
        (
            lambda name, shape: 2 * np.arange(12).reshape(shape),
            DENSE,
            "gaps; got numbers from 0 to 22, 12 of them",
        ),
    ],
)
def test_kinds_that_do_not_fit(kind, shape, text):
    with pytest.raises(ValueError, match=text):
        groups_of(kind, shape)


def test_a_name_with_brackets_is_a_name():
    assert list(partition("test", {"w[0]": "unstructured"}, {"w[0]": (2,), "w0": (2,)})) == ["w[0]"]


def test_keys_are_strings():
    with pytest.raises(TypeError, match="from patterns of site names to kinds; got the key 3"):
        partition("test", {3: "unstructured"}, {"w": (2,)})


def test_every_kind_is_tested():
    assert set(KINDS) == {kind for kind, *_ in CASES if isinstance(kind, str)}
