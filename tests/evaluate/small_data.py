"""Small data sets with the hub's columns for every task of the suite, written by a seeded generator."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from datasets import ClassLabel, Dataset, Features, List, Value

from megatron_patch.evaluate.data import all_hub_data, store
from megatron_patch.evaluate.suite import CROWS_PAIRS_BIASES, HubData

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "and",
    "asks",
    "who",
    "why",
    "what",
    "is",
    "a",
    "box",
    "of",
    "red",
    "hats",
    "in",
    "house",
]
QUESTIONS = 4  # documents of an evaluated split
_TEXT = Value("string")


def _say(rng: random.Random, low: int = 2, high: int = 5) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def _hellaswag(rng: random.Random) -> dict[str, Any]:
    return {
        "ind": rng.randrange(99), "activity_label": _say(rng, 1, 2), "ctx_a": f"{_say(rng)}.", "ctx_b": _say(rng, 1, 2),
        "ctx": "", "endings": [f"{_say(rng)} [title] {_say(rng, 1, 1)}  [substeps] x." for _ in range(4)],
        "source_id": "", "split": "", "split_type": "", "label": str(rng.randrange(4)),
    }  # fmt: skip


def _truthfulqa(rng: random.Random) -> dict[str, Any]:
    true, false = rng.randint(1, 3), rng.randint(1, 3)
    several = {"choices": [_say(rng) for _ in range(true + false)], "labels": [1] * true + [0] * false}
    return {
        "question": f"{_say(rng)}?", "mc1_targets": {"choices": [_say(rng), _say(rng)], "labels": [1, 0]},
        "mc2_targets": several,
    }  # fmt: skip


def _mmlu(rng: random.Random, subject: str) -> dict[str, Any]:
    return {
        "question": f" {_say(rng)}?\n", "subject": subject, "choices": [_say(rng, 1, 3) for _ in range(4)],
        "answer": rng.randrange(4),
    }  # fmt: skip


def _arc(rng: random.Random) -> dict[str, Any]:
    labels = rng.choice([["A", "B", "C", "D"], ["1", "2", "3", "4"], ["A", "B", "C"]])
    return {
        "id": "", "question": f"{_say(rng)}?", "choices": {"text": [_say(rng, 1, 3) for _ in labels], "label": labels},
        "answerKey": rng.choice(labels),
    }  # fmt: skip


def _piqa(rng: random.Random) -> dict[str, Any]:
    return {"goal": _say(rng), "sol1": _say(rng), "sol2": _say(rng), "label": rng.randrange(2)}


def _race(rng: random.Random) -> dict[str, Any]:
    def problem(question: str) -> dict[str, Any]:
        return {"question": question, "answer": rng.choice("ABCD"), "options": [_say(rng, 1, 3) for _ in range(4)]}

    asked = [f"{_say(rng)}?", f"{_say(rng)}  _  .", f"{_say(rng)} _ ."]
    problems = [problem(q) for q in rng.sample(asked, rng.randint(2, 3))]
    return {"article": f"{_say(rng)}. {_say(rng)}.", "problems": str(problems)}


def _siqa(rng: random.Random) -> dict[str, Any]:
    return {
        "context": f"{_say(rng)}.", "question": f"{_say(rng)}?", "answerA": _say(rng), "answerB": _say(rng),
        "answerC": _say(rng), "label": str(rng.randint(1, 3)),
    }  # fmt: skip


def _winogrande(rng: random.Random) -> dict[str, Any]:
    return {
        "sentence": f"{_say(rng)} _ {_say(rng)}.", "option1": "fox", "option2": "red dog",
        "answer": str(rng.randint(1, 2)),
    }  # fmt: skip


def _crows_pairs(rng: random.Random) -> list[dict[str, Any]]:
    """Kinds of bias in unequal numbers, so that the mean of means is not the mean."""
    return [
        {
            "id": i, "sent_more": _say(rng), "sent_less": _say(rng), "stereo_antistereo": "stereo",
            "bias_type": bias.replace("_", "-"),
        }
        for i, bias in enumerate(b for n, b in enumerate(CROWS_PAIRS_BIASES, 1) for _ in range(2 + n % 2))
    ]  # fmt: skip


def _letters(*names: str) -> ClassLabel:
    return ClassLabel(names=list(names))


_MMLU_FEATURES = Features(
    {"question": _TEXT, "subject": _TEXT, "choices": List(_TEXT), "answer": _letters("A", "B", "C", "D")}
)
_PIQA_FEATURES = Features({"goal": _TEXT, "sol1": _TEXT, "sol2": _TEXT, "label": _letters("0", "1")})
_DOCUMENT: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "Rowan/hellaswag": _hellaswag,
    "truthfulqa/truthful_qa": _truthfulqa,
    "allenai/ai2_arc": _arc,
    "baber/piqa": _piqa,
    "EleutherAI/race": _race,
    "lighteval/siqa": _siqa,
    "allenai/winogrande": _winogrande,
}
_FEATURES = {"cais/mmlu": _MMLU_FEATURES, "baber/piqa": _PIQA_FEATURES}


def rows(data: HubData, split: str) -> Dataset:
    rng = random.Random(f"{data.path}/{data.config}/{split}")
    if data.path == "jannalu/crows_pairs_multilingual":
        return Dataset.from_list(_crows_pairs(rng))
    document = _DOCUMENT.get(data.path) or partial(_mmlu, subject=data.config)
    # More worked examples than any task asks for, and of MMLU exactly the five it has; subjects of unequal size.
    count = {"train": 30, "dev": 5}.get(split, QUESTIONS)
    if data.path == "cais/mmlu" and split == "test":
        count = 2 + rng.randrange(2)
    return Dataset.from_list([document(rng) for _ in range(count)], features=_FEATURES.get(data.path))


def write_all(folder: Path) -> None:
    for data in all_hub_data():
        store(folder, data, {split: rows(data, split) for split in data.splits}, "0123abc")


def repositories() -> dict[str, dict[str, bytes]]:
    """The same as the hub has them: a repository each, a parquet file a split, configurations named in the card."""
    found: dict[str, dict[str, bytes]] = {}
    cards: dict[str, list[dict[str, Any]]] = {}
    for data in all_hub_data():
        files = found.setdefault(f"datasets/{data.path}", {})
        folder = data.config or "data"
        for split in data.splits:
            parquet = io.BytesIO()
            rows(data, split).to_parquet(parquet)
            files[f"{folder}/{split}-00000-of-00001.parquet"] = parquet.getvalue()
        places = [{"split": split, "path": f"{folder}/{split}-*"} for split in data.splits]
        cards.setdefault(f"datasets/{data.path}", []).append(
            {"config_name": data.config or "default", "data_files": places}
        )
    for name, configs in cards.items():
        found[name]["README.md"] = f"---\n{yaml.safe_dump({'configs': configs})}---\n".encode()
    return found
