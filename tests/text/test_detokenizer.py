"""Pieces add up to the text of all tokens, byte for byte, however tokens arrive; stop strings end it exactly."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.server.text.detokenizer import Detokenizer
from octavo.server.text.tokenizer import Tokenizer


def chunked(data: st.DataObject, ids: Sequence[int]) -> list[Sequence[int]]:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(ids)))) | {0, len(ids)})
    return [ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def run(tokenizer: Tokenizer, chunks: Sequence[Sequence[int]], **options: Any) -> tuple[str, Detokenizer]:
    detokenizer = Detokenizer(tokenizer, **options)
    return "".join(map(detokenizer.push, chunks)) + detokenizer.finish(), detokenizer


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, int] | None:
    """Range of the stop string that ends first, the longest of those, by plain search."""
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    return min(found)[::-1] if found else None


def test_random_tokens(tokenizer: Tokenizer) -> None:
    # Half of the ids are low: single bytes and special tokens, where characters fall apart.
    ids_of = st.lists(st.integers(0, 300) | st.integers(0, tokenizer.vocab_size + 10), max_size=40)

    @settings(max_examples=300, deadline=None)
    @given(ids_of, st.booleans(), st.data())
    def check(ids: list[int], skip: bool, data: st.DataObject) -> None:
        text, detokenizer = run(tokenizer, chunked(data, ids), skip_special_tokens=skip)
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)
        assert detokenizer.num_tokens == len(ids) and detokenizer.stop_hit is None

    check()


def test_unicode_text(tokenizer: Tokenizer) -> None:
    @settings(deadline=None)
    @given(st.text(max_size=60), st.data())
    def check(text: str, data: st.DataObject) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert run(tokenizer, chunked(data, ids))[0] == tokenizer.decode(ids)

    check()


def test_random_tokens_of_sentencepiece(sentencepiece_folder: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_folder)
    # Few different ids, so that spaces, good and bad runs of bytes and special tokens meet.
    euro = [3 + byte for byte in "\u20ac".encode()]
    some = [0, 1, 2, 3 + 0x41, *euro, 259, 260, 268, 270, 9999]
    ids_of = st.lists(st.sampled_from(some) | st.just(euro), max_size=20)

    @settings(max_examples=500, deadline=None)
    @given(ids_of, st.booleans(), st.data())
    def check(drawn: list[int | list[int]], skip: bool, data: st.DataObject) -> None:
        ids = [i for item in drawn for i in (item if isinstance(item, list) else [item])]
        text, _ = run(tokenizer, chunked(data, ids), skip_special_tokens=skip)
        assert text == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


def test_stop_strings(tokenizer: Tokenizer) -> None:
    words = st.text("ab\u20ac ", min_size=1, max_size=4)

    @settings(max_examples=500, deadline=None)
    @given(st.text("ab\u20ac ", max_size=30), st.lists(words, max_size=4, unique=True), st.booleans(), st.data())
    def check(text: str, stop: list[str], include: bool, data: st.DataObject) -> None:
        ids = tokenizer.encode(text)
        joined, detokenizer = run(tokenizer, chunked(data, ids), stop=tuple(stop), include_stop_str_in_output=include)
        found = first_stop(text, stop)
        if found is None:
            assert (joined, detokenizer.stop_hit, detokenizer.num_tokens) == (text, None, len(ids))
            return
        start, end = found
        assert joined == text[: end if include else start]
        assert detokenizer.stop_hit == text[start:end]
        # Billed up to the first token after which the stop string is there.
        assert end <= len(tokenizer.decode(ids[: detokenizer.num_tokens]))
        assert "\ufffd" in (before := tokenizer.decode(ids[: detokenizer.num_tokens - 1])) or len(before) < end

    check()


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("xaaab", ("aab",), "xa"),  # the beginning of the pattern repeats
        ("xabababc", ("ababc",), "xab"),
        ("xabcd", ("cd", "abcd", "bcd"), "x"),  # all end at once: the longest
        ("xabcd", ("abcd", "bc"), "xa"),  # the one that ends first, although it begins later
    ],
)
def test_which_stop_string_counts(text: str, stop: tuple[str, ...], expected: str, tokenizer: Tokenizer) -> None:
    ids = [token_id for char in text for token_id in tokenizer.encode(char)]
    assert run(tokenizer, [ids], stop=stop)[0] == run(tokenizer, [tokenizer.encode(text)], stop=stop)[0] == expected


def test_only_a_possible_beginning_of_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("END.",))
    sent = [
        detokenizer.push(tokenizer.encode(text)) for text in ("all of it", " EN", "D", "LESS", " E", "ND", ".x", "y")
    ]
    assert sent == ["all of it", " ", "", "ENDLESS", " ", "", "", ""]
    assert detokenizer.stop_hit == "END." and detokenizer.finish() == ""


def test_what_is_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, stop=("END.",))
    assert detokenizer.push(tokenizer.encode("the END")) == "the "
    assert detokenizer.finish() == "END"
    detokenizer = Detokenizer(tokenizer)
    euro = tokenizer.encode("\u6771")
    assert detokenizer.push(euro[:1]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_tokens_after_the_stop_string_do_not_count(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four five")
    _, detokenizer = run(tokenizer, [ids], stop=(" three",))
    assert detokenizer.num_tokens == 3
    assert detokenizer.push(ids) == "" and detokenizer.num_tokens == 3


@pytest.mark.parametrize(
    ("min_tokens", "expected", "num_tokens"),
    [(0, "a b", 3), (3, "a b", 3), (4, "a b c d", 5), (5, "a b c d", 5), (6, "a b c d c e", 6)],
)
def test_stop_strings_do_not_count_before_min_tokens(
    min_tokens: int, expected: str, num_tokens: int, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("a b c d c e")
    assert len(ids) == 6
    text, detokenizer = run(tokenizer, [ids], stop=(" c",), min_tokens=min_tokens)
    assert (text, detokenizer.num_tokens) == (expected, num_tokens)


def test_a_stop_string_may_begin_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a b c d")
    text, _ = run(tokenizer, [[i] for i in ids], stop=("b c",), min_tokens=3)
    assert text == "a "


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_time_per_token_does_not_grow(kind: str, tokenizer: Tokenizer, sentencepiece_folder: Path) -> None:
    """Unfinished characters and possible stop strings without end: a quadratic rule would take minutes here."""
    if kind == "sentencepiece":
        tokenizer = Tokenizer(sentencepiece_folder)
        ids = [3 + 0x80] * 50_000 + [260] * 50_000
    else:
        ids = tokenizer.encode("\u6771")[:1] * 50_000 + tokenizer.encode("a") * 50_000
    started = time.monotonic()
    text, _ = run(tokenizer, [[i] for i in ids], stop=("a" * 255 + "b", "\ufffd" * 255 + "b"))
    assert len(text) == 100_000
    assert time.monotonic() - started < 30
