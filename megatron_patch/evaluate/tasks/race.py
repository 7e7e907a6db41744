"""Prompt and choices of RACE as version 0.3 of lm-evaluation-harness wrote them; one document an article."""

from __future__ import annotations

import ast
from typing import Any

_BLANK = "  _  ."
_LETTERS = "ABCD"


def doc_to_text(doc: dict[str, Any]) -> str:
    """The article, its questions but the last with their answers, and the last question."""
    *earlier, last = _problems(doc)
    text = f"Article: {doc['article']}\n\n"
    for problem in earlier:
        answer = problem["options"][_LETTERS.index(problem["answer"])]
        if problem["question"].endswith(_BLANK):
            text += f"{_BLANK[1:]}{answer}\n"
        else:
            text += f"Question: {problem['question']}\nAnswer: {answer}\n"
    return text + str(last["question"])


def doc_to_target(doc: dict[str, Any]) -> int:
    return _LETTERS.index(_problems(doc)[-1]["answer"])


def doc_to_choice(doc: dict[str, Any]) -> list[str]:
    return list(_problems(doc)[-1]["options"])


def _problems(doc: dict[str, Any]) -> list[dict[str, Any]]:
    return list(ast.literal_eval(doc["problems"]))
