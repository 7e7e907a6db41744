"""The demo's raw text and tokenizer, from what every Python carries: `python -m data_tools.demo_corpus --help`.

Three of Amber's sources are played by real text: Python's documentation topics are `wikipedia`, docstrings are
`stackexchange`, and the standard library's files are `starcoderdata`. The tokenizer is a sentencepiece BPE model
trained on them in LLaMA's layout: <unk>, <s>, </s>, 256 bytes, then pieces in the order of their merges.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data import topics as pydoc_topics

import sentencepiece

from data_tools.files.durable import write_beside, write_whole
from data_tools.files.errors import DataError
from data_tools.sources.sentencepiece_model import SentencepieceModel

LEFT_OUT_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "lib2to3",
    "__pycache__",
}
MIN_DOCSTRING = 200
MIN_CODE, MAX_CODE = 200, 60_000
MAX_CODE_TOTAL = 3_000_000
VOCAB_SIZE = 4096


def library_files(library: Path) -> list[Path]:
    """The standard library's own modules, without tests and data tables, in the order of their paths."""
    chosen = [
        path
        for path in library.rglob("*.py")
        if not LEFT_OUT_FOLDERS.intersection(path.relative_to(library).parts)
        and not path.name.startswith(("_sysconfigdata", "test_"))
        and "encodings" not in path.relative_to(library).parts[:-1]
    ]
    return sorted(chosen, key=lambda path: path.relative_to(library).as_posix())


def topics() -> Iterator[str]:
    """Python's documentation topics, one document each."""
    for _, text in sorted(pydoc_topics.topics.items()):
        yield text.strip() + "\n"


def docstrings(files: Iterable[Path]) -> Iterator[str]:
    """Docstrings long enough to be prose, one document each, named by what they describe; no text twice."""
    seen: set[str] = set()
    for path in files:
        tree = _parse(path)
        if tree is None:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node)
            if text is None or len(text) < MIN_DOCSTRING or text in seen:
                continue
            seen.add(text)
            name = path.stem if isinstance(node, ast.Module) else f"{path.stem}.{node.name}"
            yield f"{name}\n\n{textwrap.dedent(text).strip()}\n"


def code(files: Iterable[Path]) -> Iterator[str]:
    """The files themselves, up to a total that keeps the demo short."""
    total = 0
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        if MIN_CODE <= len(text) <= MAX_CODE and total + len(text) <= MAX_CODE_TOTAL:
            total += len(text)
            yield text


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a few library files are syntax samples
        return None


def write_source(path: Path, documents: Iterable[str]) -> list[str]:
    """Writes documents as JSONL and returns them."""
    kept = list(documents)
    if not kept:
        raise DataError("this Python carries no such text", file=path, remedy="use a Python with its standard library")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(path) as stream:
        stream.writelines(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in kept)
    return kept


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A sentencepiece BPE model with byte fallback, in LLaMA's layout and with LLaMA's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in documents for line in text.splitlines() if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.9999,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def build(output: Path, vocab_size: int) -> dict[str, int]:
    """Writes the three sources and the tokenizer under `output`; returns characters by source."""
    files = library_files(Path(sysconfig.get_path("stdlib")))
    written = {
        "wikipedia": write_source(output / "wikipedia" / "topics.jsonl", topics()),
        "stackexchange": write_source(output / "stackexchange" / "docstrings.jsonl", docstrings(files)),
        "starcoderdata": write_source(output / "starcoderdata" / "library.jsonl", code(files)),
    }
    model = train_tokenizer((text for texts in written.values() for text in texts), vocab_size)
    write_whole(output / "tokenizer.model", model)
    content = SentencepieceModel(output / "tokenizer.model").hugging_face()
    write_whole(output / "tokenizer.json", content.encode())
    return {name: sum(map(len, texts)) for name, texts in written.items()}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m data_tools.demo_corpus --output demo/raw",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, metavar="N", help=f"({VOCAB_SIZE})")
    arguments = parser.parse_args()
    try:
        sizes = build(arguments.output, arguments.vocab_size)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: " + ", ".join(f"{name} {size:,} characters" for name, size in sizes.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
