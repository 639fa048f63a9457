"""Which texts share a run. Pure: lengths in, groups of indices out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


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
