"""Text arrives in whole characters, and nothing of a stop string gets out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seawall.inference.generate.text import TextStream
from seawall.inference.models.tokenizer import token_bytes


def streamed(chunks, stop=()):
    stream = TextStream(stop)
    pieces = []
    for chunk in chunks:
        pieces.append(stream.push(chunk))
        if stream.stopped:
            return pieces
    return [*pieces, stream.flush()]


@given(st.text(), st.data())
def test_however_the_bytes_are_cut_the_text_is_the_same_and_never_broken(text, data):
    raw = text.encode("utf-8", errors="surrogatepass") if text.isprintable() else text.encode("utf-8", "replace")
    whole = raw.decode("utf-8", errors="replace")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    chunks = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    pieces = streamed(chunks)
    assert "".join(pieces) == whole
    if "\ufffd" not in whole:
        assert all("\ufffd" not in piece for piece in pieces)


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string_that_completes(text, stop):
    pieces = streamed([letter.encode() for letter in text], stop)
    complete = [
        (end, text[:end].rfind(one)) for one in stop for end in range(len(text) + 1) if text[:end].endswith(one)
    ]
    if not complete:
        assert "".join(pieces) == text
        return
    first = min(end for end, _ in complete)
    start = min(first - len(one) for one in stop if text[:first].endswith(one))
    assert "".join(pieces) == text[:start]


def test_an_unfinished_character_at_the_end_becomes_a_replacement():
    assert streamed([b"a", b"\xf0\x9f"]) == ["a", "", "\ufffd"]


@pytest.mark.parametrize(("name", "raw"), [("Ġa", b" a"), ("Ċ", b"\n"), ("Ã¼", "ü".encode()), ("日", "日".encode())])
def test_byte_level_names_stand_for_their_bytes(name, raw):
    assert token_bytes(name) == raw
