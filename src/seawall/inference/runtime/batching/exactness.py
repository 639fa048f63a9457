"""What the rows of one run may do to each other, tried out before requests of several users share one.

Two questions, since their answers matter to different people. Do the *values* of its neighbours change a row's
output? Then one user's input alters another's answer, and can be made to: a matter of security. What
`quantize_dynamic` makes does that, with one scale for the whole tensor. And does their *number* change it? Many
kernels sum in another order for another number of rows, which moves the last bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from seawall.inference.errors import InvalidInputError, InvalidSettingError, ModelError, RuntimeExhaustedError

from ..inputs import Array, Port, dtype_of
from .joining import Feed, Layout, Shape

Kind = Literal["bitwise", "tolerance", "dependent"]

WHOLE_TENSOR = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
_SIZES = (2, 3, 8)
_MADE_UP = 4  # rows, where the user gives none
_OUTLIERS = (1e6, np.nan, -np.inf, -1e6)
_FINITE_OUTLIERS = (1e6, -1e6)  # for a model that must not answer with NaN: such a request would fail, not pass


@dataclass(frozen=True, slots=True)
class Exactness:
    """How far a row's output is its own when other rows share the run.

    Attributes:
        kind: "bitwise": the same bits as alone, whoever shares the run. "tolerance": other neighbours, the same bits;
            another number of them moves the last digits, by `number` at most. "dependent": neighbours change it.
        why: what was found, in a few words.
        number: largest difference from the output of the row alone, by the largest magnitude in that.
        padding: the same between a row that is padded and one that is not; 0 where none was.
        runs: how many runs tried it out; 0 where the operators alone tell.
    """

    kind: Kind
    why: str
    number: float = 0.0
    padding: float = 0.0
    runs: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: {self.why}"


class Probed(Protocol):
    """What is tried out."""

    @property
    def operators(self) -> frozenset[str]: ...  # noqa: D102
    def run_sync(self, inputs: Mapping[str, Array]) -> Feed: ...  # noqa: D102


def probe(
    backend: Probed,
    layout: Layout,
    *,
    samples: Sequence[Mapping[str, Any]] = (),
    most: int,
    tolerance: float,
) -> Exactness:
    """Run rows alone, among strangers and among outliers, and say what their outputs owe to the others.

    Args:
        backend: what is to be batched.
        layout: how rows share a run.
        samples: requests like those to come; rows are made up where there are none.
        most: rows that will share a run at most.
        tolerance: largest `number` and `padding` that is still "tolerance".

    Raises:
        InvalidSettingError: made-up rows do not run, so that real ones are needed.
    """
    whole = sorted(WHOLE_TENSOR & backend.operators)
    if whole:
        return Exactness("dependent", f"{whole[0]} scales by the largest value of all rows")
    rows = [_first_row(*layout.check(sample)) for sample in samples] or list(_made_up(layout))
    try:
        return _Trial(backend, layout, rows, tolerance).judge(sorted({n for n in (*_SIZES, most) if 2 <= n <= most}))
    except ModelError as error:
        if samples:
            raise
        raise InvalidSettingError(
            f"the rows that were made up to try the model out do not run on it ({error}): give samples, some of its own"
        ) from error


class _Trial:
    """One trial: it runs, compares, and remembers the worst."""

    def __init__(self, backend: Probed, layout: Layout, rows: Sequence[Feed], tolerance: float) -> None:
        self._backend = backend
        self._layout = layout
        self._rows = rows
        self._tolerance = tolerance
        self._random = np.random.default_rng(0)
        self._runs = 0
        self._number = self._padding = 0.0
        self._repeats = True

    def judge(self, sizes: Sequence[int]) -> Exactness:
        for index, row in enumerate(self._rows):
            feed, shape = self._layout.check(row)
            alone = self._run([feed], [shape])[0]
            self._compare_unpadded(feed, shape, alone)
            for size in sizes if index == 0 else sizes[index % max(1, len(sizes)) :][:1]:
                place = (size - 1, 0, size // 2)[index % 3]
                try:
                    found = self._among(feed, size, place, outliers=False)
                except RuntimeExhaustedError:
                    if size == sizes[0]:
                        raise
                    continue  # so many rows never share a run: it is repeated in halves
                changed = self._changed_by_outliers(feed, size, place, found)
                if changed:
                    why = f"its neighbours' values change a row's output by {_percent(changed)}"
                    return self._verdict("dependent", why)
                self._number = max(self._number, _difference(alone, found))
        if self._padding > self._tolerance:
            raise InvalidSettingError(
                f"padding changes a row's output by {_percent(self._padding)}: give the input that masks it as mask, "
                "or padding=None, which runs rows of equal lengths together"
            )
        if self._number > self._tolerance:
            return self._verdict("dependent", f"the number of rows changes a row's output by {_percent(self._number)}")
        if not self._number and self._repeats:
            return self._verdict("bitwise", "a row's output is the same, whoever shares its run")
        return self._verdict("tolerance", f"the number of rows in a run moves a row's output by {self._number:.1g}")

    def _changed_by_outliers(self, feed: Feed, size: int, place: int, found: Feed) -> float:
        """How much other neighbours change a row's output; 0 where they do not, or a repetition does as well."""
        other = self._among(feed, size, place, outliers=True)
        if _same(found, other):
            return 0.0
        self._repeats = self._repeats and _same(found, self._among(feed, size, place, outliers=False))
        difference = _difference(found, other)
        return difference if self._repeats or difference > self._tolerance else 0.0

    def _among(self, feed: Feed, size: int, place: int, *, outliers: bool) -> Feed:
        """The row's output when it runs in this place among others."""
        neighbours = [self._neighbour(feed, outlier=number if outliers else None) for number in range(size - 1)]
        feeds = [*neighbours[:place], feed, *neighbours[place:]]
        return self._run(feeds, [self._layout.check(one)[1] for one in feeds])[place]

    def _run(self, feeds: Sequence[Feed], shapes: Sequence[Shape]) -> list[Feed]:
        self._runs += 1
        return self._layout.split(self._backend.run_sync(self._layout.join(feeds, shapes[0].padded)), shapes)

    def _neighbour(self, feed: Feed, *, outlier: int | None) -> Feed:
        """Another row of the same shape: of values that the rows have, or of such as an attacker might send."""
        drawn: Feed = {}
        padding = self._layout.padding
        for name, array in feed.items():
            pool = np.concatenate([row[name].ravel() for row in self._rows])
            if padding is not None and name == padding.mask:
                drawn[name] = np.zeros_like(array) if outlier == 0 else array.copy()
            elif outlier is not None and array.dtype.kind == "f":
                values = _FINITE_OUTLIERS if getattr(self._backend, "finite", False) else _OUTLIERS
                drawn[name] = np.full_like(array, values[outlier % len(values)])
            elif outlier is not None:
                ends = sorted(pool.tolist())
                drawn[name] = np.full_like(array, ends[-1] if outlier % 2 else ends[0])
            else:
                drawn[name] = self._random.choice(pool, array.shape).astype(array.dtype)
        return drawn

    def _compare_unpadded(self, feed: Feed, shape: Shape, padded: Feed) -> None:
        if shape.length == shape.padded:
            return
        try:
            bare = self._backend.run_sync(feed)
        except InvalidInputError:  # a model of one length cannot be asked
            return
        self._runs += 1
        if any(bare[name].shape != padded[name].shape for name in bare):
            name = next(name for name in bare if bare[name].shape != padded[name].shape)
            raise InvalidSettingError(
                f"output {name!r} is {list(bare[name].shape)} without padding and {list(padded[name].shape)} with it: "
                "say in cut which of its axes varies"
            )
        self._padding = max(self._padding, _difference(bare, padded))

    def _verdict(self, kind: Kind, why: str) -> Exactness:
        return Exactness(kind, why, self._number, self._padding, self._runs)


def _first_row(feed: Feed, shape: Shape) -> Feed:
    return {name: array[:1] for name, array in feed.items()}


def _made_up(layout: Layout) -> Iterable[Feed]:
    """Rows that most models take: normal numbers, and small whole ones."""
    random = np.random.default_rng(1)
    longest = layout.padding.buckets[0] if layout.padding else 1
    for number in range(_MADE_UP):
        length = max(1, longest - number * (longest // _MADE_UP))
        yield {port.name: _values(port, layout, length, random) for port in layout.inputs}


def _values(port: Port, layout: Layout, length: int, random: np.random.Generator) -> Array:
    sizes = [size if type(size) is int else 1 for size in port.shape]
    padding = layout.padding
    if padding is not None and port.name in padding.names:
        sizes[padding.axis] = length
    kind = dtype_of(port)
    if kind is None:
        return np.full(sizes, "a", dtype=object)
    if padding is not None and port.name == padding.mask:
        return np.ones(sizes, kind)
    return (random.normal(size=sizes) if kind.kind == "f" else random.integers(0, 2, sizes)).astype(kind)


def _same(some: Feed, others: Feed) -> bool:
    """Whether all bits are equal."""
    return all(_bits(some[name]) == _bits(others[name]) for name in some)


def _bits(array: Array) -> object:
    return array.tolist() if array.dtype.hasobject else (array.shape, array.dtype, array.tobytes())


def _difference(some: Feed, others: Feed) -> float:
    """Largest difference of two answers, by the largest magnitude in the first; infinite where words or whole
    numbers differ, or one answer is finite and the other not.
    """  # noqa: D205
    return max((_distance(some[name], others[name]) for name in some), default=0.0)


def _distance(one: Array, other: Array) -> float:
    if _bits(one) == _bits(other):
        return 0.0
    if one.dtype.kind != "f" or one.shape != other.shape or not np.array_equal(np.isfinite(one), np.isfinite(other)):
        return float("inf")
    known = np.isfinite(one)
    gap = np.abs(one[known].astype(np.float64) - other[known]).max(initial=0.0)
    largest = np.abs(one[known]).astype(np.float64).max(initial=0.0)
    return float(gap / largest) if largest else float("inf" if gap else 0.0)


def _percent(share: float) -> str:
    return "more than rounding" if share == float("inf") else f"{100 * share:.2g} %"
