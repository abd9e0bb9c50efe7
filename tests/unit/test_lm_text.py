"""Cleaning of corpus text."""

import struct
import zlib

import pytest

from ep_runtime.lm import corpus, text


def test_plain_is_one_line_of_ascii() -> None:
    assert (
        text.plain("\u201cCaf\u00e9\u201d \u2014 it\u2019s\n  5\u00a0pm\u2026")
        == '"Cafe" -- it\'s 5 pm...'
    )
    assert text.plain("\u4f60\u597d") == ""


def test_verse_numbers_are_stripped_and_chapters_kept_apart() -> None:
    lines = [
        "Gen1:1 In the beginning God created the heaven and the earth.",
        "Gen1:2 And the earth was [without] form.",
        "",
        "Gen2:1 Thus the heavens.",
        "1Sam1:1 Now there was a certain man.",
    ]
    assert list(text.paragraphs_of_verses(lines)) == [
        "In the beginning God created the heaven and the earth. And the earth was without form.",
        "Thus the heavens.",
        "Now there was a certain man.",
    ]


def test_verses_make_paragraphs_of_a_few() -> None:
    lines = [f"Gen1:{i} v{i}." for i in range(1, 8)]
    assert list(text.paragraphs_of_verses(lines, verses=3)) == ["v1. v2. v3.", "v4. v5. v6.", "v7."]


def test_line_that_is_no_verse_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a verse line: 'Usage: bible"):
        list(text.paragraphs_of_verses(["Usage: bible [-f]"]))


def test_paragraphs_end_at_blank_lines_and_lose_italic_marks() -> None:
    lines = ["It was _very_", "late.", "", "  ", "Indeed."]
    assert list(text.paragraphs_of_lines(lines)) == ["It was very late.", "Indeed."]


SENTENCE = (
    "The quick brown fox, who had slept badly, jumps over the lazy dog; and the dog, who had slept "
    "well enough for both of them, does not so much as raise an eyebrow."
)


def test_html_keeps_prose_and_drops_code() -> None:
    page = (
        f"<html><h1>Title</h1><p>{SENTENCE}</p><pre>x = 1</pre><p>Short.</p>"
        f"<p>{SENTENCE.replace('fox', 'fox_t x[i] = {a_b}; c_d()')}</p>"
        f"<div><p>{SENTENCE.replace('quick', '<em>slow</em>')}<pre>int main();</pre></div></html>"
    )
    assert list(text.paragraphs_of_html(page)) == [SENTENCE, SENTENCE.replace("quick", "slow")]


@pytest.mark.parametrize(
    ("paragraph", "wanted"),
    [
        (SENTENCE, True),
        (SENTENCE[:60] + ".", False),
        (SENTENCE[:-1], False),
        (SENTENCE.replace("the", "0x7f"), False),
        (SENTENCE.replace(" ", "_"), False),
    ],
)
def test_is_prose(paragraph: str, wanted: bool) -> None:
    assert text.is_prose(paragraph) is wanted


def _rdb_chunk(strings: list[str]) -> bytes:
    body = b"X\n" + bytes(12) + b"\x00\x00\x00\x10" + struct.pack(">i", len(strings))
    for string in strings:
        data = string.encode()
        body += b"\x00\x04\x00\x09" + struct.pack(">i", len(data)) + data
    return struct.pack(">I", len(body)) + zlib.compress(body)


def test_strings_of_an_r_database() -> None:
    novels = [["EMMA", "", "Emma Woodhouse, handsome"], ["PERSUASION"]]
    data = b"".join(_rdb_chunk(novel) for novel in novels)
    assert list(text.strings_of_rdb(data)) == novels


def test_damaged_r_database_is_an_error() -> None:
    chunk = _rdb_chunk(["EMMA"])
    with pytest.raises(ValueError, match="not its length word"):
        list(text.strings_of_rdb(struct.pack(">I", 3) + chunk[4:]))


def test_split_cuts_the_end_of_a_work_at_a_paragraph() -> None:
    paragraphs = [f"{i:09d}" for i in range(100)]
    train, val = corpus.split(paragraphs, 0.05)
    assert (train + val).splitlines() == paragraphs
    assert val.splitlines() == paragraphs[95:]


def test_every_source_names_a_licence_that_lets_weights_ship() -> None:
    for source in corpus.SOURCES:
        assert source.packages
        assert not any(word in source.licence for word in ("GPL", "SA", "NC", "GFDL"))
