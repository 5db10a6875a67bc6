# Copyright Contributors to the numpyro_bdl project.
# SPDX-License-Identifier: Apache-2.0

"""What a model says at each draw and row, block by block: some draws times some rows.

One block is in memory, and while it is read the device works on the next. The program is compiled once for all blocks,
since the last of them are filled up.
"""

from collections.abc import Callable, Iterable, Iterator
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from tqdm.auto import tqdm

from numpyro_bdl._arguments import Arguments
from numpyro_bdl._checks import named_arguments
from numpyro_bdl.potential import Potential, fixed_shape, row_axis

AUTO_CHUNK = 1024


class Evaluation:
    """What ``extract(name, site, key)`` takes from each of the sites, an array or a dict of arrays, at each draw.

    :param potential: The model.
    :param draws: Latent sites and mutable collections, NumPy arrays (draw, ...).
    :param key: Key of what is random in the model or in ``extract``; each draw and chunk of rows has its own.
    :param run_arguments: Arguments of the run, for the text of an error.
    :param rows: Rows of the data plate to take; None for all.
    :param programs: Compiled programs of evaluations before, to which those of this one are added.
    :param draw_chunk: Draws in a block, at most.
    :param data_chunk: Rows in a block, at most; None for all, or ``"auto"``.
    :raises ValueError: for a model that can't be cut into this many rows, or arguments at which it fails or a site gets
        other axes than in the run.
    """

    def __init__(
        self,
        potential: Potential,
        draws: Any,
        extract: Callable,
        names: tuple[str, ...],
        key: Array,
        args: tuple,
        kwargs: dict,
        *,
        run_arguments: tuple[tuple, dict],
        rows: np.ndarray | None,
        programs: dict,
        draw_chunk: int,
        data_chunk: int | None | str,
    ):
        arguments = Arguments(args, kwargs)
        call, self._arrays = _Call(potential, extract, names, arguments), arguments.arrays(args, kwargs)
        first = jax.tree.map(lambda w: w[0], draws)
        try:
            outputs, frames, plates = call.describe(*first, key, {}, self._arrays)
        except Exception as error:
            differ = _differences(potential.model, (args, kwargs), run_arguments)
            if not differ:
                raise
            raise ValueError(
                f"The model can't be evaluated at these arguments: {differ}. Only the number of rows, the first axis,"
                " may be another one."
            ) from error
        of_run = potential.fixed_shapes
        other = [name for name in names if name in of_run and fixed_shape(frames[name]) != of_run[name]]
        if other:
            differ = _differences(potential.model, (args, kwargs), run_arguments) or "look at their shapes"
            raise ValueError(
                f"At these arguments site '{other[0]}' has other axes than in the run: {differ}. Only the number of"
                " rows, the first axis, may be another one."
            )
        self._plate = plate = potential.data_plate(plates)
        self._axes = {name: row_axis(frames[name], plate) for name in names}

        size = plates[plate] if plate else 1
        self._some = rows is not None and len(rows) < size
        self._rows = np.arange(size) if rows is None else rows
        limit = data_chunk if isinstance(data_chunk, int) else size if data_chunk is None else AUTO_CHUNK
        self._row_chunk = chunk = _even(len(self._rows), limit)
        self._cut = plate is not None and chunk < size
        if self._cut and not call.can_be_cut(
            *first, key, {plate: jnp.arange(chunk)}, self._arrays, outputs, self._axes
        ):
            if isinstance(data_chunk, int) and data_chunk < size:
                raise ValueError(
                    f"The model can't be cut into {limit} of the {size} rows of its plate '{plate}': inside the plate,"
                    " take the rows of every array by numpyro.subsample(array, event_dim=...); or give data_chunk=None."
                )
            self._cut, self._row_chunk = False, len(self._rows)
        self._draws = draws
        self.num_draws = len(jax.tree.leaves(draws)[0])
        self._draw_chunk = _even(self.num_draws, draw_chunk)
        self._keys = random.split(key, self.num_draws)
        self._program = programs.setdefault((call.identity, self._cut), jax.jit(call.over_draws))

        self.outputs = {
            name: jax.tree.map(lambda out, axis=self._axes[name]: self._all_rows(out, axis), out)
            for name, out in outputs.items()
        }
        """By site, shape and dtype of what one draw says, rows first."""

    def _all_rows(self, out: jax.ShapeDtypeStruct, axis: int | None) -> jax.ShapeDtypeStruct:
        if axis is None:
            return out
        others = (n for k, n in enumerate(out.shape) if k != axis)
        return jax.ShapeDtypeStruct((len(self._rows), *others), out.dtype)

    def row_axis(self, name: str) -> int | None:
        """The axis along which the model itself has the rows of a site; None if it lies outside of their plate."""
        return self._axes[name]

    def blocks(self, *, draws_first: bool = True, progress_bar: bool = True) -> Iterator[tuple[str, tuple, Any]]:
        """Each block of each site: its name, its slices of draws and rows, and the values, (draw, row, ...).

        A site outside of the data plate has a slice of draws alone.

        :param draws_first: All rows for a chunk of draws, then the next chunk, so that each draw is brought to the
            device once; or else all draws for a chunk of rows.
        """
        draws, rows = range(0, self.num_draws, self._draw_chunk), range(0, len(self._rows), self._row_chunk)
        starts = [(d, r) for d in draws for r in rows] if draws_first else [(d, r) for r in rows for d in draws]
        # the bar appears only if the work is long
        begun = self._begun(tqdm(starts, desc="predict", delay=2, disable=not progress_bar))
        block = next(begun)
        for following in begun:  # the device works on this one while the one before is read
            yield from self._read(*block)
            block = following
        yield from self._read(*block)

    def _begun(self, starts: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, dict]]:
        """Blocks on the device, as they are begun."""
        at = None
        for d, r in starts:
            if d != at:
                at, some = d, self._filled(d, self._draw_chunk, self.num_draws)
                values, mutable, keys = jax.tree.map(lambda w, some=some: w[some], (*self._draws, self._keys))
                values, mutable = jax.device_put((values, mutable))
            taken = {self._plate: self._rows[self._filled(r, self._row_chunk, len(self._rows))]} if self._cut else {}
            yield d, r, self._program(values, mutable, keys, r, taken, self._arrays)

    @staticmethod
    def _filled(start: int, count: int, size: int) -> slice | np.ndarray:
        """So many from a start on, the last one again and again past the end."""
        if start + count <= size:
            return slice(start, start + count)  # a view, no copy
        return np.minimum(np.arange(start, start + count), size - 1)

    def _read(self, d: int, r: int, block: dict) -> Iterator[tuple[str, tuple, Any]]:
        draws = slice(d, min(d + self._draw_chunk, self.num_draws))
        rows = slice(r, min(r + self._row_chunk, len(self._rows)))
        picked = self._rows if self._some and not self._cut else slice(rows.stop - rows.start)
        for name, axis in self._axes.items():
            parts = jax.tree.map(lambda part: np.asarray(part)[: draws.stop - draws.start], block[name])
            if axis is not None:
                parts = jax.tree.map(lambda part, axis=axis: np.moveaxis(part, axis + 1, 1)[:, picked], parts)
                yield name, (draws, rows), parts
            elif r == 0:  # it is the same for each chunk of rows
                yield name, (draws,), parts


class _Call:
    """A model call as a pure function of one draw: arrays among its arguments are traced, the rest is fixed."""

    def __init__(self, potential: Potential, extract: Callable, names: tuple[str, ...], arguments: Arguments):
        self.potential, self.extract, self.names, self.arguments = potential, extract, names, arguments

    @property
    def identity(self) -> tuple:
        """What a compiled program depends on, besides shapes; the program keeps the fixed arguments alive."""
        return self.extract, self.names, self.arguments

    def _run(self, values, mutable, key, rows, arrays):
        args, kwargs = self.arguments.join(arrays)
        key_model, key_site = random.split(key)
        sites = self.potential.run(values, rows, key_model, mutable, args, kwargs)
        outputs = {
            name: self.extract(name, _get(sites, name), random.fold_in(key_site, self._place(name)))
            for name in self.names
        }
        return outputs, sites

    def _place(self, name: str) -> int:
        """That among all observed sites, so that the key of a site doesn't depend on which others are asked for."""
        observed = list(self.potential.observed)
        return observed.index(name) if name in observed else len(observed) + self.names.index(name)

    def over_draws(self, values, mutable, keys, start, rows, arrays) -> dict[str, Any]:
        """The outputs at each draw, (draw, ...), for the rows from ``start`` on."""

        def one(values, mutable, key):
            return self._run(values, mutable, random.fold_in(key, start), rows, arrays)[0]

        if jax.default_backend() == "cpu" and not self.potential.draws_share_work:
            # the rows of one draw keep it busy, by matrix products that are faster there than batched ones
            return lax.map(lambda draw: one(*draw), (values, mutable, keys))
        return jax.vmap(one)(values, mutable, keys)

    def describe(self, values, mutable, key, rows, arrays) -> tuple[dict, dict[str, dict], dict[str, int]]:
        """Shapes of the outputs, the sites they come from, and the sizes of all plates; no flops."""
        found: dict[str, dict] = {}

        def run(*inputs):
            outputs, sites = self._run(*inputs)
            found.update(sites)
            return outputs

        shapes = jax.eval_shape(run, values, mutable, key, rows, arrays)
        plates = {name: site["args"][0] for name, site in found.items() if site["type"] == "plate"}
        return shapes, {name: found[name] for name in self.names}, plates

    def can_be_cut(self, values, mutable, key, rows, arrays, outputs: dict, axes: dict[str, int | None]) -> bool:
        """Whether the outputs shrink to the given rows of the plate, and nothing else changes."""
        (chunk,) = (len(index) for index in rows.values())
        try:
            cut = self.describe(values, mutable, key, rows, arrays)[0]
        except (ValueError, TypeError):
            return False

        def shrinks(out, part, axis) -> bool:
            return part.shape == tuple(chunk if n == axis else m for n, m in enumerate(out.shape))

        return all(
            shrinks(out, part, axes[name])
            for name in outputs
            for out, part in zip(jax.tree.leaves(outputs[name]), jax.tree.leaves(cut[name]), strict=True)
        )


def _even(count: int, most: int) -> int:
    """The size of as few chunks as there can be with so many at most, so that the last is nearly full too."""
    return ceil(count / ceil(count / most))


def _get(sites: dict, name: str) -> dict:
    if name not in sites:
        raise ValueError(f"The model has no site '{name}'; it has: {', '.join(sites)}.")
    return sites[name]


def _differences(model: Callable, given: tuple, of_run: tuple) -> str:
    """Which arguments differ from those of the run in more than their rows."""
    before = named_arguments(model, *of_run)
    return "; ".join(
        f"'{name}' has shape {np.shape(value)}, in the run {np.shape(before[name])}"
        for name, value in named_arguments(model, *given).items()
        if hasattr(value, "shape") and np.shape(value)[1:] != np.shape(before.get(name, value))[1:]
    )
