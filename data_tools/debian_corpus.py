"""About 100 MB of English text from Debian's documentation packages: `python -m data_tools.debian_corpus --help`.

A corpus that any Debian 12 machine can build without a model hub: apt brings the packages (nothing is installed), their
manuals are stripped to text, and the demo's text joins them. A document of whose long lines more than half stood in
documents before it is left out. Every fiftieth document, by the digest of its text, goes to OUTPUT/held_out, the others
to OUTPUT/train, so that no document is on both sides.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data_tools import demo_corpus
from data_tools.command_line import guarded
from data_tools.files.durable import write_beside, write_whole
from data_tools.files.errors import DataError
from data_tools.sources.sentencepiece_model import SentencepieceModel

HELD_OUT_SHARE = 50  # a document in so many
LONG_LINE = 40
TOKENIZER_CHARACTERS = 12_000_000
VOCAB_SIZE = 2048
_DOCUMENTATION = r"\./usr/share/doc/"


class Manual(NamedTuple):
    """A package, which of its files are documents, and how the bytes of one become texts."""

    package: str
    files: str
    read: Callable[[bytes], Iterable[str]]


class _Text(HTMLParser):
    """The text of a page, a line for each block, without what every page repeats."""

    LEFT_OUT = frozenset({"script", "style", "head", "nav", "footer", "header"})
    BLOCKS = frozenset({"p", "div", "br", "li", "tr", "dt", "dd", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "table"})

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        repeated = any(name == "class" and value in ("navheader", "navfooter") for name, value in attrs)
        if self._inside:
            if tag == self._inside[-1]:
                self._inside.append(tag)  # to its own end
        elif tag in self.LEFT_OUT or repeated:
            self._inside.append(tag)
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()
        if tag in self.BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.pieces.append(data)


def page_text(content: bytes) -> list[str]:
    """The text of an HTML page, its blocks apart by a line."""
    page = _Text()
    page.feed(content.decode(errors="replace"))
    lines = (line.rstrip() for line in "".join(page.pieces).splitlines())
    return [re.sub(r"\n{3,}", "\n\n", "\n".join(lines))]


def dictionary_entries(content: bytes) -> list[str]:
    """The entries of a dict server's file: each begins at a line that is not indented, after an empty one."""
    return re.split(r"\n\n(?=\S)", gzip.decompress(content).decode(errors="replace"))


def _plain(content: bytes) -> list[str]:
    return [content.decode(errors="replace")]


def _packed(content: bytes) -> list[str]:
    return _plain(gzip.decompress(content))


MANUALS = {
    "linux": Manual(
        "linux-doc-6.1", rf"{_DOCUMENTATION}linux-doc-6.1/Documentation/(?!translations/).*\.(rst|txt)\.gz", _packed
    ),
    "python": Manual("python3.11-doc", rf"{_DOCUMENTATION}python3.11/html/_sources/.*\.rst\.txt", _plain),
    "postgresql": Manual("postgresql-doc-15", rf"{_DOCUMENTATION}postgresql-doc-15/html/.*\.html", page_text),
    "perl": Manual("perl-doc", r"\./usr/share/perl/.*\.pod", _plain),
    "libreoffice": Manual("libreoffice-help-en-us", r"\./usr/share/libreoffice/help/en-US/text/.*\.html", page_text),
    "anarchism": Manual("anarchism", rf"{_DOCUMENTATION}anarchism/html/.*\.html", page_text),
    "gcide": Manual("dict-gcide", r"\./usr/share/dictd/gcide\.dict\.dz", dictionary_entries),
}
LIBRARY = "library"  # the demo's text


def download(folder: Path) -> None:
    """Brings the packages that are not yet in `folder`. Raises DataError where apt cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [m.package for m in MANUALS.values() if not any(folder.glob(f"{m.package}_*.deb"))]
    if not missing:
        return
    command = ["apt-get", "download", "--quiet", *missing]
    try:
        subprocess.run(command, cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(
            f"{' '.join(command)}: {error}",
            file=folder,
            remedy="run `apt-get update` as root on Debian 12, or copy the .deb files there",
        ) from None


def manual_texts(folder: Path, manual: Manual) -> Iterator[str]:
    """The documents of a package in `folder`, in the order of their paths. Raises DataError where it holds none."""
    path = max(folder.glob(f"{manual.package}_*.deb"), default=None)
    if path is None:
        raise DataError(f"no package {manual.package}", file=folder, remedy="run this with the network once")
    unpacking = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE)
    found: dict[str, bytes] = {}
    with unpacking, tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
        for member in archive:
            if member.isfile() and re.fullmatch(manual.files, member.name):
                stream = archive.extractfile(member)
                assert stream is not None  # of a file
                found[member.name] = stream.read()
    if unpacking.returncode or not found:
        raise DataError(f"no documents named {manual.files}", file=path, remedy="remove the file and run again")
    for name in sorted(found):
        yield from manual.read(found[name])


def library_texts() -> Iterator[str]:
    """The demo's three sources: Python's topics, docstrings and standard library."""
    files = demo_corpus.library_files(Path(sysconfig.get_path("stdlib")))
    return chain(demo_corpus.topics(), demo_corpus.docstrings(files), demo_corpus.code(files))


class Known:
    """Long lines of the documents so far."""

    def __init__(self) -> None:
        self._lines: set[bytes] = set()

    def repeats(self, text: str) -> bool:
        """Whether more than half of a text's long lines, or the whole of one without any, stood in texts before."""
        long = [line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE] or [text.strip()]
        digests = [hashlib.blake2b(line.encode(), digest_size=8).digest() for line in long]
        known = sum(digest in self._lines for digest in digests)
        self._lines.update(digests)
        return 2 * known > len(digests)


def is_held_out(text: str) -> bool:
    """One document in HELD_OUT_SHARE, the same ones whatever stands beside them."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT_SHARE == 0


def write_source(name: str, texts: Iterable[str], output: Path, known: Known) -> list[str]:
    """Writes one source to train/NAME and held_out/NAME, says what it holds, and returns its training documents."""
    sides: dict[str, list[str]] = {"train": [], "held_out": []}
    repeated = 0
    for text in texts:
        document = text.strip() + "\n"
        if document == "\n":
            continue
        if known.repeats(document):
            repeated += 1
            continue
        sides["held_out" if is_held_out(document) else "train"].append(document)
    for side, documents in sides.items():
        if not documents:
            raise DataError(f"no documents for {side}", file=output / side / name, remedy="use the whole package")
        path = output / side / name / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(path) as stream:
            stream.writelines(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in documents)
    print(
        f"{name}: {len(sides['train']):,} documents, {sum(map(len, sides['train'])):,} characters; "
        f"{len(sides['held_out']):,} held out, {repeated:,} repeated and left out"
    )
    return sides["train"]


def build(packages: Path, output: Path, vocab_size: int) -> None:
    """Writes train/, held_out/ and the tokenizer, which is trained on training documents spread over all sources."""
    known, every = Known(), list[str]()
    for name, manual in MANUALS.items():
        every += write_source(name, manual_texts(packages, manual), output, known)
    every += write_source(LIBRARY, library_texts(), output, known)
    characters = sum(map(len, every))
    stride = max(1, characters // TOKENIZER_CHARACTERS)
    model = demo_corpus.train_tokenizer(every[::stride], vocab_size)
    write_whole(output / "tokenizer.model", model)
    write_whole(output / "tokenizer.json", SentencepieceModel(output / "tokenizer.model").hugging_face().encode())
    print(f"{output}: {len(every):,} training documents, {characters:,} characters")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m data_tools.debian_corpus --packages demo/packages --output demo/ladder/raw",
    )
    parser.add_argument("--packages", type=Path, required=True, metavar="FOLDER", help="where apt puts the .deb files")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, metavar="N", help=f"({VOCAB_SIZE})")
    arguments = parser.parse_args()

    def write() -> int:
        download(arguments.packages)
        build(arguments.packages, arguments.output, arguments.vocab_size)
        return 0

    return guarded(write)


if __name__ == "__main__":
    sys.exit(main())
