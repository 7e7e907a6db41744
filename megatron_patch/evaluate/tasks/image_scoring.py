"""Questions about images as LLaVA 1.5 asks them, and the rules by which each benchmark scores an answer.

LLaVA's scripts are followed since the paper's model is LLaVA's with another decoder; what each rule does was compared
with lmms-eval 0.7.3 (docs/log.md, 2026-12-01).
"""

from __future__ import annotations

import re
import string
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

BRIEFLY = "\nAnswer the question using a single word or phrase."
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
"""Categories of MME whose points make the paper's column; the other four are its cognition."""
_LETTERS = string.ascii_uppercase
_YES_OR_NO = " Please answer yes or no."
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll "
    "somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd "
    "there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll "
    "what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's "
    "won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


_APOSTROPHES = {
    whole[:place] + whole[place + 1 :]: whole
    for whole in _CONTRACTED.split()
    for place, letter in enumerate(whole)
    if letter == "'"
}
"""Each contraction by the ways in which it is written without one of its apostrophes."""


def gqa_text(doc: dict[str, Any]) -> str:
    return f"{doc['question']}{BRIEFLY}"


def gqa_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Equal but for case and punctuation."""
    given, true = (_plain(text) for text in (results[0], doc["answer"]))
    return {"exact_match": float(given == true)}


def _plain(text: str) -> str:
    return text.strip().lower().translate(str.maketrans("", "", string.punctuation))


def scienceqa_text(doc: dict[str, Any]) -> str:
    hint = f"Context: {doc['hint']}\n" if doc["hint"] else ""
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(_LETTERS, doc["choices"], strict=False))
    return f"{hint}{doc['question']}{choices}\nAnswer with the option's letter from the given choices directly."


def scienceqa_target(doc: dict[str, Any]) -> str:
    return _LETTERS[doc["answer"]]


def scienceqa_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The letter, in either case, or an upper-case one that a full stop follows."""
    given, true = results[0].strip(), scienceqa_target(doc)
    return {"exact_match": float(given.upper() == true or given[:2] == f"{true}.")}


def textvqa_text(doc: dict[str, Any]) -> str:
    return f"{doc['question'].capitalize()}{BRIEFLY}"


def textvqa_ocr_text(doc: dict[str, Any]) -> str:
    return f"{doc['question'].capitalize()}\nReference OCR token: {', '.join(doc['ocr_tokens'])}{BRIEFLY}"


def textvqa_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """VQA accuracy (arXiv 1505.00468): the mean over the ten annotators of min(1, agreeing others / 3)."""
    given = vqa_answer(results[0])
    agree = [vqa_answer(answer) == given for answer in doc["answers"]]
    accuracies = [min(1.0, (sum(agree) - own) / 3) for own in agree]
    return {"vqa_accuracy": sum(accuracies) / len(accuracies)}


def vqa_answer(text: str) -> str:
    """An answer as VQA's evaluation compares it: lower case, digits for number words, no article, no punctuation.

    A mark is dropped where it stands beside a blank somewhere, or where the answer has a comma between digits, and is a
    blank otherwise; a full stop stays before a digit.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    marked = text
    for mark in _MARKS:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        marked = marked.replace(mark, "" if beside_blank else " ")
    marked = re.sub(r"\.(?!\d)", "", marked)
    words = [_DIGITS.get(word, word) for word in marked.split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def mme_text(doc: dict[str, Any]) -> str:
    return f"{doc['question'].strip().replace(_YES_OR_NO, '')}{BRIEFLY}"


class Judged(NamedTuple):
    """An answer of MME."""

    category: str
    image: str
    right: bool


def mme_results(doc: dict[str, Any], results: list[str]) -> dict[str, Judged]:
    """Right where yes, or no, is in the first four letters of the answer, as the question has it."""
    given = results[0].strip().lower().replace(".", "")
    said = "yes" if given == "y" or "yes" in given[:4] else "no" if given == "n" or "no" in given[:4] else ""
    name = "mme_perception" if doc["category"] in PERCEPTION else "mme_cognition"
    true = doc["answer"].strip().lower().replace(".", "")
    return {name: Judged(doc["category"], doc["question_id"], said == true)}


def mme_points(judged: Iterable[Judged]) -> float:
    """Of each category the share of right answers and the share of images whose questions are all right, times 100.

    Summed over categories: at most 200 for each (arXiv 2306.13394).
    """
    categories: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for one in judged:
        categories[one.category][one.image].append(one.right)
    points = 0.0
    for images in categories.values():
        answers = [right for rights in images.values() for right in rights]
        points += 100 * sum(answers) / len(answers) + 100 * sum(map(all, images.values())) / len(images)
    return points
