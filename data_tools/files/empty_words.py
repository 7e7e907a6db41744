"""Words of a command line that are empty: `--output "$OUT"` with OUT not set would mean the current folder."""

from __future__ import annotations

from collections.abc import Sequence


def empty_word(words: Sequence[str]) -> str:
    """What is wrong with the first word that stands for nothing, with what to do; empty where there is none."""
    for number, word in enumerate(words, start=1):
        option, equals, value = word.partition("=")
        before = words[number - 2] if number > 1 else ""
        if word.startswith("--") and equals and not value.strip():
            where = option
        elif not word.strip():
            where = before if before.startswith("--") and "=" not in before else f"argument {number}"
        else:
            continue
        return f"{where} is empty (a variable that is not set?); give it a value, or leave it out"
    return ""
