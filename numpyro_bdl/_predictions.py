# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of predictions and of what they are held against; each returns NumPy arrays of one kind."""

from typing import Any

import numpy as np

_SUM_TOLERANCE = 1e-3


def numbers(owner: str, name: str, value: Any, *, infinite: bool = False) -> np.ndarray:
    """An array in double precision, at least one number, none of them NaN.

    :param owner: Name of the caller, for texts; ``name`` is that of the argument.
    :param infinite: Let infinite numbers pass.
    :raises ValueError: with the owner, the name, how many entries are bad and the first of them.
    """
    value = np.asarray(value)
    if value.dtype.kind not in "biuf" and not np.can_cast(value.dtype, np.float64):
        raise ValueError(f"{owner}: {name} must be an array of real numbers, got dtype {value.dtype}.")
    value = value.astype(np.float64)
    if not value.size:
        raise ValueError(f"{owner}: {name} is empty, of shape {value.shape}; expected at least one number.")
    bad = np.argwhere(np.isnan(value) if infinite else ~np.isfinite(value))
    if len(bad):
        raise ValueError(
            f"{owner}: {name} has {len(bad)} {'NaN' if infinite else 'NaN or infinite'} entries, the first at index"
            f" {tuple(map(int, bad[0]))}. If they are of a chain that diverged, leave it out or take a smaller step."
        )
    return value


def class_probabilities(owner: str, name: str, value: Any) -> np.ndarray:
    """Probabilities (row, class), each row of which sums to one.

    :raises ValueError: for other shapes, negative numbers and other sums.
    """
    shape = np.shape(value)
    if len(shape) != 2:
        raise ValueError(
            f"{owner}: expected {name} (row, class), got shape {shape}; mean_probabilities averages draws."
        )
    value = numbers(owner, name, value)
    advice = "are these logits? mean_probabilities makes probabilities of them."
    if value.min() < 0:
        row = int(np.argmax(value.min(-1) < 0))
        raise ValueError(f"{owner}: {name} must not be negative, got {value[row].min():.3g} in row {row}; {advice}")
    error = np.abs(value.sum(-1) - 1)
    if error.max() > _SUM_TOLERANCE:
        row = int(np.argmax(error > _SUM_TOLERANCE))
        raise ValueError(
            f"{owner}: each row of {name} must sum to 1, got {value[row].sum():.6g} in row {row} of {len(value)};"
            f" {advice}"
        )
    return value


def class_labels(owner: str, labels: Any, rows: int, classes: int) -> np.ndarray:
    """Labels (row,), integers from 0 to the number of classes less one.

    :raises ValueError: for other shapes, dtypes and numbers.
    """
    labels = np.asarray(labels)
    if labels.shape != (rows,):
        raise ValueError(
            f"{owner}: expected labels ({rows},), one for each row of the probabilities, got shape {labels.shape};"
            " np.argmax(labels, -1) makes labels of one-hot rows."
        )
    if labels.dtype.kind not in "biu":
        raise ValueError(f"{owner}: labels must be integers, got dtype {labels.dtype}; labels.astype(int) makes them.")
    labels = labels.astype(np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise ValueError(
            f"{owner}: labels must be from 0 to {classes - 1}, for {classes} classes, got {labels[bad[0]]} in row"
            f" {bad[0]} ({len(bad)} such rows); np.unique(labels, return_inverse=True) numbers classes from 0."
        )
    return labels


def classified(owner: str, probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (row, class) and the labels of these rows.

    :raises ValueError: as of :func:`class_probabilities` and :func:`class_labels`.
    """
    probabilities = class_probabilities(owner, "probabilities", probabilities)
    return probabilities, class_labels(owner, labels, *probabilities.shape)


def same_shape(owner: str, **arrays: np.ndarray) -> None:
    """Refuse arrays of different shapes.

    :raises ValueError: with the names and shapes.
    """
    if len({value.shape for value in arrays.values()}) > 1:
        found = ", ".join(f"{name} {value.shape}" for name, value in arrays.items())
        raise ValueError(
            f"{owner}: expected arrays of one shape, got {found}; reshape one, since (row,) and (row, 1) would be"
            " paired each with each."
        )


def pooled(owner: str, name: str, value: Any, *, infinite: bool = False) -> np.ndarray:
    """Arrays (chain, draw, row, ...) as (chain * draw, row, ...).

    :raises ValueError: for fewer than three axes, and as of :func:`numbers`.
    """
    shape = np.shape(value)
    if len(shape) < 3:
        raise ValueError(
            f"{owner}: expected {name} (chain, draw, row, ...), got shape {shape}; value[None] adds an axis of chains,"
            " value[None, None] those of chains and draws."
        )
    value = numbers(owner, name, value, infinite=infinite)
    return value.reshape(-1, *value.shape[2:])


def observed(owner: str, y: Any, shape: tuple[int, ...], of: str) -> np.ndarray:
    """Observations of the shape that predictions have.

    :raises ValueError: with both shapes.
    """
    y = numbers(owner, "y", y)
    if y.shape != shape:
        raise ValueError(
            f"{owner}: y has shape {y.shape}, but {of}, without chain and draw, {shape}; they must be the same"
            " (reshape one)."
        )
    return y


def draws_of_logits(owner: str, logits: Any) -> np.ndarray:
    """Logits (chain, draw, row, class) as (chain * draw, row, class), in the precision that they have.

    :raises ValueError: for other shapes, and rows without a softmax.
    """
    logits = np.asarray(logits)
    if logits.ndim != 4 or not logits.size:
        raise ValueError(
            f"{owner}: expected logits (chain, draw, row, class), got shape {logits.shape}; logits[None] adds an axis"
            " of chains, np.stack([0 * f, f], -1) one of classes for the one logit f of a Bernoulli site."
        )
    # the largest of a row is finite unless there is NaN, plus infinity, or minus infinity only
    bad = np.argwhere(~np.isfinite(logits.max(-1)))
    if len(bad):
        raise ValueError(
            f"{owner}: the logits of {len(bad)} rows are NaN, plus infinity, or all minus infinity, first at chain,"
            f" draw and row {tuple(map(int, bad[0]))}. If they are of a chain that diverged, leave it out."
        )
    return logits.reshape(-1, *logits.shape[2:])


def spread_to(owner: str, name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or variance, which isn't negative, broadcast to the shape of the means.

    :raises ValueError: if it doesn't broadcast, or is negative somewhere.
    """
    if value.min() < 0:
        raise ValueError(f"{owner}: {name} must not be negative, got {value.min():.3g}; is it a log or a raw output?")
    try:
        return np.broadcast_to(value, shape)
    except ValueError:
        raise ValueError(
            f"{owner}: {name} has shape {value.shape}, which doesn't broadcast to that of mean, {shape};"
            f" {name}[..., None] adds an axis of rows."
        ) from None
