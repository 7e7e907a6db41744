"""Questions about images from the hub to the table: our answers are stock LLaVA's, one rank's those of two."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from transformers import AutoProcessor, LlavaForConditionalGeneration

from data_tools.packing_options import DEFAULT_TEMPLATE
from megatron_patch.convert.export import export
from megatron_patch.evaluate.data import EvaluationError, StoredImages, loader, store
from megatron_patch.evaluate.suite import BY_NAME, IMAGE_BENCHMARKS
from megatron_patch.evaluate.tasks import image_scoring as scoring
from megatron_patch.results import read_scores
from megatron_patch.train.checkpoint.write import write_weights
from tests.convert.samples import MemoryWeights, small_recipe
from tests.data_tools.vision.pictures import encoded, photograph
from tests.evaluate.hub import Hub
from tests.evaluate.test_command import evaluate_command

SEEING = (
    "model.vision={image_size: 24, patch_size: 8, fit: pad, hidden_size: 24, ffn_hidden_size: 40, num_layers: 2,"
    " num_attention_heads: 2, norm_epsilon: 1e-5, activation: quick_gelu, pixel_shuffle: 1, placeholder_id: 1}"
)
NAMES = ",".join(b.name for b in IMAGE_BENCHMARKS)
TEXT, COUNT = Value("string"), 5
QUESTIONS = [f"the {word} fox?" for word in ("quick", "brown", "lazy", "over", "dog")]
IMAGES = [encoded(photograph(30 + 7 * n, 40, n), "png") for n in range(COUNT)]


@pytest.fixture(scope="module")
def weights() -> MemoryWeights:
    return MemoryWeights(small_recipe(SEEING))


@pytest.fixture(scope="module")
def stock(weights: MemoryWeights, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Greedy answers of stock LLaVA to a text about an image."""
    folder = tmp_path_factory.mktemp("stock")
    export(weights, folder / "hf", "expanded", tokenizer)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "hf")
    processor = AutoProcessor.from_pretrained(folder / "hf")

    def answered(question: str, image: bytes, most: int) -> str:
        turns = [{"role": "user", "content": f"{processor.image_token}\n{question}"}]
        text = processor.tokenizer.apply_chat_template(
            turns, chat_template=DEFAULT_TEMPLATE.read_text(), tokenize=False, add_generation_prompt=True
        )
        inputs = processor(images=Pillow.open(io.BytesIO(image)), text=text, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=most, do_sample=False, eos_token_id=2, pad_token_id=0)
        return str(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    yield answered


@pytest.fixture(scope="module")
def rows(stock: Any) -> dict[tuple[str, str | None], Dataset]:
    """The hub's columns. What stock LLaVA answers is the truth of the questions of even number, and of no other."""
    said = [stock(q + scoring.BRIEFLY, image, 16) for q, image in zip(QUESTIONS, IMAGES, strict=True)]
    assert len(set(said)) > 2 and all(said), said
    true = [text if n % 2 == 0 else "lazy" for n, text in enumerate(said)]
    images = [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(IMAGES)]
    ids = [f"n{n}" for n in range(COUNT)]

    def made(columns: dict[str, Any], **kinds: Any) -> Dataset:
        return Dataset.from_dict(columns, features=Features({name: kinds.get(name, TEXT) for name in columns}))

    short = [stock(q.capitalize() + scoring.BRIEFLY, image, 64) for q, image in zip(QUESTIONS, IMAGES, strict=True)]
    return {
        ("lmms-lab/GQA", "testdev_balanced_images"): made({"id": ids[::-1], "image": images[::-1]}, image=Image()),
        ("lmms-lab/GQA", "testdev_balanced_instructions"): made(
            {"id": ids, "imageId": ids, "question": QUESTIONS, "answer": true}
        ),
        ("lmms-lab/ScienceQA", "ScienceQA-IMG"): made(
            {"image": images, "question": QUESTIONS, "choices": [["a", "b"]] * COUNT, "answer": [1] * COUNT,
             "hint": [""] * COUNT},
            image=Image(), choices=List(TEXT), answer=Value("int8"),
        ),
        ("lmms-lab/textvqa", None): made(
            {"image": images, "question": QUESTIONS, "ocr_tokens": [["dog"]] * COUNT,
             "answers": [[one, one, *["quite another"] * 8] for one in short]},
            image=Image(), ocr_tokens=List(TEXT), answers=List(TEXT),
        ),
        ("lmms-lab/MME", None): made(
            {"question_id": ids, "image": images, "question": QUESTIONS, "answer": ["Yes"] * COUNT,
             "category": ["color"] * COUNT},
            image=Image(),
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(rows: dict[tuple[str, str | None], Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fetched from a hub on the loopback by the command."""
    place = tmp_path_factory.mktemp("fetched")
    repositories: dict[str, dict[str, bytes]] = {}
    for (name, config), dataset in rows.items():
        files = repositories.setdefault(f"datasets/{name}", {})
        splits = {data.splits for b in IMAGE_BENCHMARKS for task in b.all_tasks for data in task.all_data
                  if (data.path, data.config) == (name, config)}  # fmt: skip
        [(split,)] = splits
        parquet = io.BytesIO()
        dataset.to_parquet(parquet)
        files[f"{config or 'data'}/{split}-00000-of-00001.parquet"] = parquet.getvalue()
        card = yaml.safe_load(files["README.md"].decode().strip("-\n")) if "README.md" in files else {"configs": []}
        card["configs"].append(
            {"config_name": config or "default",
             "data_files": [{"split": split, "path": f"{config or 'data'}/{split}-*"}]}
        )  # fmt: skip
        files["README.md"] = f"---\n{yaml.safe_dump(card)}---\n".encode()
    with Hub(repositories) as hub:
        code, errors = hub.evaluate(place / "home", "--download", place / "data", "--benchmarks", NAMES)
        assert code == 0, errors
    return place / "data"


@pytest.fixture(scope="module")
def checkpoint(weights: MemoryWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "ckpt_000"
    write_weights(weights, folder)
    return folder


def test_answers_are_those_of_stock_llava(
    checkpoint: Path, data: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --benchmarks a model that sees is asked about images; two ranks give what one gives."""
    options = ("--data", data, "--tokenizer", tokenizer, "--chat-template", DEFAULT_TEMPLATE)
    for ranks in (1, 2):
        code, out, errors = evaluate_command(checkpoint, *options, "--output", tmp_path / str(ranks), ranks=ranks)
        assert code == 0, errors
    (scores,) = read_scores(tmp_path / "1")
    assert read_scores(tmp_path / "2") == [scores]
    values = {name: score["value"] for name, score in scores["scores"].items()}
    assert values["gqa"] == pytest.approx(60), "questions 0, 2 and 4 of five"
    assert scores["scores"]["textvqa"]["stock"] == pytest.approx(60), "two of ten annotators agree"
    assert set(values) == {b.name for b in IMAGE_BENCHMARKS} and scores["average"] is None
    assert "Table 8: models that see" in out
    assert "| MobiLlama-V | paper |  | 58.50 | 53.10 | 41.40 | 1191.90 |" in out
    [ours] = [line for line in out.splitlines() if "| ours |" in line]
    assert "| 60.00 ± " in ours and "| 0.00" in ours


def test_what_cannot_be_asked_is_refused(checkpoint: Path, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    options = ("--data", data, "--tokenizer", tokenizer, "--output", tmp_path / "out")
    code, _, errors = evaluate_command(checkpoint, *options)
    assert code == 2 and "no chat template" in errors and "--chat-template" in errors
    write_weights(MemoryWeights(small_recipe()), tmp_path / "blind/ckpt_000")
    code, _, errors = evaluate_command(tmp_path / "blind/ckpt_000", *options, "--benchmarks", "gqa,mme")
    assert code == 2 and "sees no images, so it cannot be asked gqa, mme" in errors


def test_an_image_that_is_missing_or_damaged_is_named(
    rows: dict[tuple[str, str | None], Dataset], checkpoint: Path, tokenizer: Path, tmp_path: Path
) -> None:
    [gqa], [mme] = BY_NAME["gqa"].tasks, BY_NAME["mme"].tasks
    assert gqa.images is not None
    for part in (gqa.data, gqa.images):
        table = rows[part.path, part.config]
        store(tmp_path / "few", part, {"testdev": table.select(range(3)) if part == gqa.images else table}, "0123abc")
    with pytest.raises(EvaluationError, match=r"no image n0 in .*testdev_balanced_images"):
        loader(tmp_path / "few", gqa)()
    changed = rows["lmms-lab/MME", None].cast_column("image", Image(decode=False)).to_list()
    changed[3]["image"]["bytes"] = changed[3]["image"]["bytes"][:200]
    features = rows["lmms-lab/MME", None].features
    store(tmp_path / "cut", mme.data, {"test": Dataset.from_list(changed, features=features)}, "0123abc")
    code, _, errors = evaluate_command(
        checkpoint, "--data", tmp_path / "cut", "--tokenizer", tokenizer, "--chat-template", DEFAULT_TEMPLATE,
        "--benchmarks", "mme", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and "lmms-lab/MME/default/test#3: its image cannot be shown to the model" in errors
    assert json.loads((tmp_path / "cut/manifest.json").read_text()).keys() == {"lmms-lab/MME/default/test"}
    with pytest.raises(EvaluationError, match="row 1 has no image"):
        changed[1]["image"] = None
        store(tmp_path / "none", mme.data, {"test": Dataset.from_list(changed, features=features)}, "0123abc")
        StoredImages(tmp_path / "none").read("lmms-lab/MME/default/test#1")
