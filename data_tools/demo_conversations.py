"""The chat demo's conversations, from what every Python carries: `python -m data_tools.demo_conversations --help`.

A user asks what a function of the standard library does and shows how it is written; the assistant answers with the
first line of its docstring. Others ask what one of Python's documentation topics is about: its first sentence.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_tools.command_line import guarded
from data_tools.demo_corpus import library_files, topics
from data_tools.files.durable import write_beside
from data_tools.files.errors import DataError

MIN_ANSWER, MAX_ANSWER, MAX_QUESTION = 15, 120, 240


def functions(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Question and answer of each documented function; no answer twice."""
    seen: set[str] = set()
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few library files are syntax samples
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = (ast.get_docstring(node) or "").strip().split("\n\n")[0]
            answer = " ".join(text.split())
            question = f"What does this function of {path.stem} do?\ndef {node.name}({ast.unparse(node.args)})"
            if len(question) <= MAX_QUESTION and answer not in seen and _is_answer(answer):
                seen.add(answer)
                yield question, answer


def subjects() -> Iterator[tuple[str, str]]:
    """Question and answer of each documentation topic whose first paragraph begins with a short sentence."""
    for text in topics():
        title, _, rest = text.partition("\n")
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", rest) if p.strip(" *=-~\n")]
        answer = re.split(r"(?<=[.:]) ", paragraphs[0])[0] if paragraphs else ""
        if _is_answer(answer):
            yield f'What is the topic "{title.strip()}" of Python\'s documentation about?', answer


def _is_answer(text: str) -> bool:
    return MIN_ANSWER <= len(text) <= MAX_ANSWER and text.isascii() and text[0].isalpha()


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m data_tools.demo_conversations --output demo/conversations/library.jsonl",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    output = parser.parse_args().output

    def write() -> int:
        pairs = [*functions(library_files(Path(sysconfig.get_path("stdlib")))), *subjects()]
        if not pairs:
            raise DataError("this Python carries no such text", file=output, remedy="use one with its standard library")
        output.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(output) as stream:
            for question, answer in pairs:
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                stream.write(json.dumps({"messages": messages}).encode() + b"\n")
        print(f"{output}: {len(pairs):,} questions with their answers")
        return 0

    return guarded(write)


if __name__ == "__main__":
    raise SystemExit(main())
