"""Text cleaning for the training corpus: pure functions from raw package files to paragraphs."""

from __future__ import annotations

import re
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser

_PUNCTUATION = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\u00b6": "",
        "\u00ad": "",
    }
)
_SPACE = re.compile(r"\s+")
_ITALIC = re.compile(r"_([^_]*)_")
_VERSE = re.compile(r"^\s*([1-3]?[A-Z][A-Za-z]*?)(\d+):(\d+)\s+(\S.*)$")
_PROSE = re.compile(r"[A-Za-z ,.;:'\"!?()\-]")
_CODE = re.compile(r"[_{}<>=\\|@#$^~`*\[\]]|::|\(\)|\w\.\w\w|\w/\w")

_SKIPPED_TAGS = frozenset(("pre", "script", "style", "table", "nav", "footer", "sup"))
_CHARSXP_UTF8 = (b"\x00\x04\x00\x09", b"\x00\x04\x80\x09", b"\x00\x00\x80\x09")


def plain(text: str) -> str:
    """One line of printable ASCII: typographic marks replaced, accents dropped, spaces joined."""
    text = unicodedata.normalize("NFKD", text.translate(_PUNCTUATION))
    text = "".join(c for c in text if " " <= c <= "~" or c.isspace())
    return _SPACE.sub(" ", text).strip()


def is_prose(paragraph: str, min_chars: int = 120) -> bool:
    """True for a paragraph of sentences: long enough, ends like a sentence, nearly free of code."""
    if len(paragraph) < min_chars or paragraph[-1] not in ".!?:\")'":
        return False
    if len(_CODE.findall(paragraph)) * 150 > len(paragraph):
        return False
    return len(_PROSE.findall(paragraph)) >= 0.97 * len(paragraph)


def paragraphs_of_lines(lines: Iterable[str]) -> Iterator[str]:
    """Join lines to paragraphs at blank lines; `_italic_` marks are dropped."""
    held: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            held.append(line)
        elif held:
            paragraph = _ITALIC.sub(r"\1", plain(" ".join(held)))
            held = []
            if paragraph:
                yield paragraph


def paragraphs_of_verses(lines: Iterable[str], verses: int = 5) -> Iterator[str]:
    """Bible lines such as `Gen1:1 In the ...` to paragraphs of a few verses, without the numbers.

    A paragraph never crosses a chapter. A line that is no verse raises ValueError.
    """
    held: list[str] = []
    chapter = ""
    for line in lines:
        if not line.strip():
            continue
        match = _VERSE.match(line)
        if match is None:
            raise ValueError(
                f"not a verse line: {line[:60]!r}; want e.g. 'Gen1:1 In the beginning'"
            )
        here = match[1] + match[2]
        if held and (here != chapter or len(held) == verses):
            yield plain(" ".join(held))
            held = []
        chapter = here
        held.append(match[4].replace("[", "").replace("]", ""))
    if held:
        yield plain(" ".join(held))


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._held: list[str] | None = None
        self._skipped = 0

    def _flush(self) -> None:
        if self._held is not None:
            self.found.append(plain("".join(self._held)))
        self._held = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in _SKIPPED_TAGS:
            self._skipped += 1
        if tag == "p":
            self._flush()
            self._held = []
        elif tag in ("pre", "div", "ul", "ol", "dl", "table", "h1", "h2", "h3", "h4"):
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED_TAGS and self._skipped:
            self._skipped -= 1
        if tag in ("p", "div", "li", "body"):
            self._flush()

    def handle_data(self, data: str) -> None:
        if self._held is not None and not self._skipped:
            self._held.append(data)


def paragraphs_of_html(html: str) -> Iterator[str]:
    """The prose of the `<p>` elements of a page; code blocks, tables and names are left out."""
    parser = _Paragraphs()
    parser.feed(html)
    parser.close()
    parser._flush()
    return (p for p in parser.found if is_prose(p))


def strings_of_rdb(data: bytes) -> Iterator[list[str]]:
    """Character vectors of an R lazy-load database: one list of strings per zlib chunk.

    A chunk is a big-endian length, then zlib data of an XDR serialisation whose strings are
    `type word, big-endian length, bytes`.
    """
    at = 0
    while at < len(data):
        inflate = zlib.decompressobj()
        chunk = inflate.decompress(data[at + 4 :])
        if len(chunk) != struct.unpack_from(">I", data, at)[0]:
            raise ValueError(
                f"chunk at byte {at} inflates to {len(chunk)} bytes, not its length word"
            )
        at = len(data) - len(inflate.unused_data)
        yield list(_xdr_strings(chunk))


def _xdr_strings(chunk: bytes) -> Iterator[str]:
    at = min(i for i in (chunk.find(word) for word in _CHARSXP_UTF8) if i >= 0)
    while chunk[at : at + 4] in _CHARSXP_UTF8:
        (length,) = struct.unpack_from(">i", chunk, at + 4)
        yield chunk[at + 8 : at + 8 + max(length, 0)].decode("utf-8")
        at += 8 + max(length, 0)
