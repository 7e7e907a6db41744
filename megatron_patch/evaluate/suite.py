"""The paper's benchmarks, nine of text and four of images: which tasks of lm-evaluation-harness, shots, metric, mean.

What the authors ran is a fork of the harness's version 0.3 inside Analysis360 (commit e556449), deleted since. Where
today's harness scores a benchmark differently, `tasks` and `metric` follow the fork and fill the paper's tables, and
`stock` says what the harness itself would report. Shots are drawn by today's harness with its own seed: the fork's
draw depended on the order in which it shuffled the documents.

The harness has none of the four of Table 8; lmms-eval, which has them, pins versions that this repository cannot share
(another wandb, torchvision, linters). Their prompts and rules of scoring are tasks of ours, `tasks/image_scoring.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

MMLU_SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip
CROWS_PAIRS_BIASES = (
    "age", "autre", "disability", "gender", "nationality", "physical_appearance", "race_color", "religion",
    "sexual_orientation", "socioeconomic",
)  # fmt: skip


@dataclass(frozen=True)
class HubData:
    """A data set of the Hugging Face hub: its path, configuration, and the splits that a task reads."""

    path: str
    config: str | None
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task by its name in the harness (ours stand in `tasks/`) and the data it reads.

    Attributes:
        images: where the images of its questions lie, by the questions' `imageId`, if not beside the questions.
    """

    name: str
    data: HubData
    images: HubData | None = None

    @property
    def all_data(self) -> tuple[HubData, ...]:
        return (self.data, *((self.images,) if self.images else ()))


@dataclass(frozen=True)
class Stock:
    """What the stock harness reports: one task's metric, or the mean of the tasks weighted by their documents."""

    tasks: tuple[Task, ...]
    metric: str


@dataclass(frozen=True)
class Benchmark:
    """A column of the paper's Tables 4, 5 and 9, or of Table 8.

    Attributes:
        name: as on the command line.
        column: as in the paper.
        tasks: the score is the unweighted mean over them.
        metric: the harness's name of the metric.
        shots: worked examples in front of each question.
        stock: the harness's own score, where it differs.
        difference: in which way it differs.
        unit: of the score: 100 for percent of what the metric gives, 1 for its own points.
    """

    name: str
    column: str
    tasks: tuple[Task, ...]
    metric: str
    shots: int
    stock: Stock | None = None
    difference: str = ""
    unit: float = 100

    @cached_property
    def all_tasks(self) -> tuple[Task, ...]:
        """Every task that must run: the paper's and the harness's own."""
        return tuple(dict.fromkeys(self.tasks + (self.stock.tasks if self.stock else ())))


def _one(name: str, path: str, config: str | None, *splits: str) -> tuple[Task]:
    return (Task(name, HubData(path, config, splits)),)


_RACE = HubData("EleutherAI/race", "high", ("test",))
_SIQA = HubData("lighteval/siqa", None, ("train", "validation"))
_MMLU = tuple(Task(f"mmlu_{s}", HubData("cais/mmlu", s, ("dev", "test"))) for s in MMLU_SUBJECTS)
_CROWS = HubData("jannalu/crows_pairs_multilingual", "english", ("test",))
_CROWS_PAIRS = tuple(Task(f"crows_pairs_english_{bias}", _CROWS) for bias in CROWS_PAIRS_BIASES)

BENCHMARKS = (
    Benchmark("hellaswag", "HellaSwag", _one("hellaswag", "Rowan/hellaswag", None, "train", "validation"),
              "acc_norm", 10),
    Benchmark("truthfulqa", "Truthfulqa",
              _one("truthfulqa_mc2", "truthfulqa/truthful_qa", "multiple_choice", "validation"), "acc", 0),
    Benchmark("mmlu", "MMLU", _MMLU, "acc", 5, Stock(_MMLU, "acc"),
              "plain mean of the 57 subjects; the harness weights them by their questions"),
    Benchmark("arc_challenge", "Arc_C",
              _one("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", "train", "validation", "test"),
              "acc_norm", 25),
    Benchmark("crows_pairs", "CrowsPairs", _CROWS_PAIRS, "pct_stereotype", 0, Stock(_CROWS_PAIRS, "pct_stereotype"),
              "plain mean of the ten kinds of bias; the harness's parent task weights them by their sentence pairs"),
    Benchmark("piqa", "piqa", _one("piqa", "baber/piqa", None, "train", "validation"), "acc_norm", 0),
    Benchmark("race", "race", (Task("race_analysis360", _RACE),), "acc", 0, Stock((Task("race", _RACE),), "acc"),
              "of an earlier fill-in question the prompt keeps the blank and drops the stem, as version 0.3 did"),
    Benchmark("siqa", "siqa", (Task("siqa_analysis360", _SIQA),), "acc_norm", 0,
              Stock((Task("social_iqa", _SIQA),), "acc"),
              "Analysis360's own prompt, scored by likelihood per character; social_iqa has another and plain acc"),
    Benchmark("winogrande", "winogrande",
              _one("winogrande", "allenai/winogrande", "winogrande_xl", "train", "validation"), "acc", 5),
)  # fmt: skip
"""The nine of text, in the order of the paper's columns."""

STOCK_FOLDERS = (
    "hellaswag", "truthfulqa", "mmlu/default", "arc", "crows_pairs", "piqa", "race", "siqa", "winogrande",
)  # fmt: skip
"""Folders of the harness's task files that hold these tasks."""

_GQA = HubData("lmms-lab/GQA", "testdev_balanced_instructions", ("testdev",))
_GQA_IMAGES = HubData("lmms-lab/GQA", "testdev_balanced_images", ("testdev",))
_TEXTVQA = HubData("lmms-lab/textvqa", None, ("validation",))

IMAGE_BENCHMARKS = (
    Benchmark("gqa", "GQA", (Task("gqa_image", _GQA, _GQA_IMAGES),), "exact_match", 0),
    Benchmark("scienceqa", "SQA", _one("scienceqa_image", "lmms-lab/ScienceQA", "ScienceQA-IMG", "test"),
              "exact_match", 0),
    Benchmark("textvqa", "TextVQA", (Task("textvqa_image_ocr", _TEXTVQA),), "vqa_accuracy", 0,
              Stock((Task("textvqa_image", _TEXTVQA),), "vqa_accuracy"),
              "as LLaVA (issue 976) the question comes with the data set's OCR tokens; lmms-eval leaves them out"),
    Benchmark("mme", "MME", _one("mme_image", "lmms-lab/MME", None, "test"), "mme_perception", 0, unit=1),
)  # fmt: skip
"""Table 8's, of a model that sees."""

BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS + IMAGE_BENCHMARKS}
CROWS_PAIRS = "crows_pairs"
"""Its score grows with bias, so averages are given with and without it."""
