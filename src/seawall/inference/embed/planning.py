"""Which texts share a run, and how far they are padded. Pure: lengths in, groups of indices out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

_BUCKETS = (
    8,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
)  # a text is padded by a third at most, from 16 tokens on


def buckets(longest: int) -> tuple[int, ...]:
    """The lengths that texts of up to `longest` tokens are padded to, so that those of several callers fit together."""
    return (*(size for size in _BUCKETS if size < longest), longest)


def bucket(length: int, longest: int) -> int:
    """The one of them that a text of `length` is padded to.

    ```python
    from seawall.inference.embed.planning import bucket, buckets

    print(buckets(40), bucket(9, 40), bucket(33, 40))
    #> (8, 16, 24, 32, 40) 16 40
    ```
    """
    sizes = buckets(longest)
    return sizes[bisect_left(sizes, length)]


def batches(lengths: Sequence[int], *, max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """Group texts of similar length; each index comes once, longest texts first.

    A group has at most `max_rows` texts, and at most `max_tokens` tokens once all are padded to its longest; a text
    longer than that is a group of its own. Neighbours in order of length leave the least padding.

    ```python
    from seawall.inference.embed.planning import batches

    print(list(batches([3, 9, 4, 8], max_rows=2, max_tokens=100)))
    #> [[1, 3], [2, 0]]
    ```
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    group: list[int] = []
    for index in order:
        if group and (len(group) == max_rows or (len(group) + 1) * lengths[group[0]] > max_tokens):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
