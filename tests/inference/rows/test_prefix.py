"""Beginnings are found by their tokens and their tenant, and the least recently used go first."""

from hypothesis import given
from hypothesis import strategies as st

from seawall.inference.generate.rows.memory import Piece
from seawall.inference.generate.rows.prefix import PrefixCache, block_names

SIZE = 4
tokens = st.lists(st.integers(0, 5), max_size=20)


class Stored:
    """Stands for a segment; holds nothing."""

    def __init__(self, tokens):
        self.tokens = tokens


def cache(blocks=100):
    return PrefixCache(block_tokens=SIZE, token_bytes=10, most_bytes=blocks * SIZE * 10)


def store(kept, prompt, known=0):
    """Keep all blocks of a prompt beyond the first `known`."""
    names = block_names(prompt, SIZE, b"")
    segment = Stored((len(names) - known) * SIZE)
    kept.add(names[known:], segment)
    return segment


def found(kept, prompt, salt=b""):
    return kept.find(block_names(prompt, SIZE, salt))


@given(tokens, tokens, st.sampled_from([b"", b"a"]), st.sampled_from([b"", b"a"]))
def test_names_agree_as_far_as_tokens_and_salt_do(one, other, salt, salt_of_other):
    mine, theirs = block_names(one, SIZE, salt), block_names(other, SIZE, salt_of_other)
    assert len(mine) == len(one) // SIZE
    for index, (name, its) in enumerate(zip(mine, theirs, strict=False), 1):
        same = one[: index * SIZE] == other[: index * SIZE] and salt == salt_of_other
        assert (name == its) == same


@given(st.lists(tokens, max_size=6), tokens)
def test_the_longest_known_beginning_is_found(prompts, asked):
    kept = cache()
    for prompt in prompts:
        known = sum(piece.tokens for piece in found(kept, prompt)) // SIZE
        if len(prompt) // SIZE > known:
            store(kept, prompt, known)
    longest = 0
    for prompt in prompts:
        common = 0
        while common < min(len(prompt), len(asked)) and prompt[common] == asked[common]:
            common += 1
        longest = max(longest, common // SIZE * SIZE)
    assert sum(piece.tokens for piece in found(kept, asked)) == longest


def test_a_beginning_is_made_of_pieces_of_the_segments_that_hold_it():
    kept = cache()
    first = store(kept, [1] * 8)
    second = store(kept, [*[1] * 8, *[2] * 8], known=2)
    assert found(kept, [*[1] * 8, *[2] * 4, 3, 3, 3, 3]) == (Piece(first, 0, 8), Piece(second, 0, 4))
    assert found(kept, [1] * 5) == (Piece(first, 0, 4),)


def test_the_least_recently_used_goes_first_and_a_beginning_after_what_builds_on_it():
    kept = cache(blocks=3)
    first = store(kept, [1] * 4)
    store(kept, [*[1] * 4, *[2] * 4], known=1)
    other = store(kept, [3] * 4)
    found(kept, [*[1] * 4, *[2] * 4])
    assert next(iter(kept.segments)) is other
    store(kept, [4] * 4)
    assert not found(kept, [3] * 4)
    store(kept, [5] * 4)
    assert found(kept, [*[1] * 4, *[2] * 4]) == (Piece(first, 0, 4),)
    assert (kept.bytes, kept.statistics().evicted) == (3 * SIZE * 10, 2)


def test_what_is_larger_than_the_cache_is_not_taken():
    kept = cache(blocks=2)
    assert kept.takes(8)
    assert not kept.takes(9)
    assert not kept.takes(0)


def test_the_number_of_segments_is_bounded_too():
    kept = cache(blocks=10_000)
    for number in range(1100):
        store(kept, [number] * 4)
    assert kept.statistics().segments == 1024


def test_nothing_is_held_after_clearing():
    kept = cache()
    store(kept, [1] * 8)
    kept.clear()
    assert (kept.bytes, list(kept.segments), found(kept, [1] * 8)) == (0, [], ())
