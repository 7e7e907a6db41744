"""The four benchmarks of Table 8: what is asked, and what counts as right, worked out by hand."""

from __future__ import annotations

import pytest

from megatron_patch.evaluate.scores import Score, TaskResult, scores
from megatron_patch.evaluate.tasks import image_scoring as scoring


@pytest.mark.parametrize(
    ("given", "true", "value"),
    [("Left.", "left", 1), (" LEFT ", "left", 1), ("the left", "left", 0), ("t-shirt", "tshirt", 1), ("", "left", 0)],
)
def test_gqa_is_equal_but_for_case_and_punctuation(given: str, true: str, value: float) -> None:
    assert scoring.gqa_results({"answer": true}, [given]) == {"exact_match": value}


def test_scienceqa_asks_for_a_letter() -> None:
    doc = {"question": "Which is a mammal?", "choices": ["a trout", "a bat", "a wren"], "hint": "Look.", "answer": 1}
    assert scoring.scienceqa_text(doc) == (
        "Context: Look.\nWhich is a mammal?\nA. a trout\nB. a bat\nC. a wren\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert scoring.scienceqa_text({**doc, "hint": ""}).startswith("Which is a mammal?\nA. ")
    for given, value in (("B", 1), ("b", 1), ("B. a bat", 1), ("b. a bat", 0), ("a bat", 0), ("A", 0), ("", 0)):
        assert scoring.scienceqa_results(doc, [given]) == {"exact_match": value}, given


@pytest.mark.parametrize(
    ("given", "compared"),
    [
        ("The Red Bus!", "red bus"), ("two", "2"), ("none", "0"), ("dont", "don't"), ("hed've", "he'd've"),
        ("1,000", "1000"), ("3.5", "3.5"), ("U.S.", "us"), ("wi-fi", "wi fi"), ("wi -fi", "wi fi"),
        ("John's", "john 's"), ("a\nb", "b"), ("10:30", "10:30"), ("-", ""), ("", ""),
    ],
)  # fmt: skip
def test_vqa_compares_answers_after_its_own_cleaning(given: str, compared: str) -> None:
    assert scoring.vqa_answer(given) == compared


def test_textvqa_counts_the_annotators_who_agree() -> None:
    """Three others of ten are enough: with k of ten who say it, k see k - 1 others and 10 - k see k."""
    for agreeing, value in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        doc = {"answers": ["Stop."] * agreeing + ["go"] * (10 - agreeing)}
        assert scoring.textvqa_results(doc, ["the stop"])["vqa_accuracy"] == pytest.approx(value), agreeing
    asked = {"question": "what does IT say?", "ocr_tokens": ["STOP", "no"]}
    assert scoring.textvqa_text(asked) == "What does it say?\nAnswer the question using a single word or phrase."
    assert scoring.textvqa_ocr_text(asked).splitlines()[1] == "Reference OCR token: STOP, no"


def test_mme_gives_points_for_answers_and_for_whole_images() -> None:
    judged = []
    for category, image, right in (
        ("color", "1", (True, True)), ("color", "2", (True, False)), ("OCR", "1", (False, False)),
        ("code_reasoning", "1", (True, True)),
    ):  # fmt: skip
        for question, is_right in zip(("Yes", "No"), right, strict=True):
            doc = {"category": category, "question_id": image, "answer": question}
            given = question if is_right else {"Yes": "No.", "No": "yes, it is"}[question]
            judged += list(scoring.mme_results(doc, [given]).items())
    perception = [one for name, one in judged if name == "mme_perception"]
    assert len(perception) == 6
    assert scoring.mme_points(perception) == pytest.approx(75 + 50)  # 3 of 4 answers, 1 of 2 images; nothing for OCR
    assert scoring.mme_points([one for name, one in judged if name == "mme_cognition"]) == 200
    asked = {"question": "Is it red? Please answer yes or no."}
    assert scoring.mme_text(asked) == "Is it red?\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("given", "right"),
    [("Yes", True), ("yes.", True), ("y", True), (" Yes, it is", True), ("no", False), ("It is", False), ("", False)],
)
def test_mme_reads_yes_from_the_first_letters(given: str, right: bool) -> None:
    doc = {"category": "color", "question_id": "1", "answer": "Yes"}
    assert scoring.mme_results(doc, [given])["mme_perception"].right == right


def test_points_stay_points_and_shares_become_percent() -> None:
    found = scores(
        {
            "mme_image": TaskResult({"mme_perception": 1191.9}, {}, 9),
            "gqa_image": TaskResult({"exact_match": 0.585}, {"exact_match": 0.01}, 9),
        }
    )
    assert found["mme"] == Score(1191.9, None)
    assert (found["gqa"].value, found["gqa"].stderr) == (pytest.approx(58.5), pytest.approx(1.0))
