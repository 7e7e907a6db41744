"""Runs over conversations about images, from data to answers: both stages, killed and resumed, on fewer ranks."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from data_tools.build_vision import build_parser, run
from data_tools.chat.template import ChatTokenizer
from data_tools.dataset.format import CHAT_TEMPLATE_NAME
from megatron_patch import launch
from megatron_patch.__main__ import main
from megatron_patch.data.images import Images
from megatron_patch.data.segments import open_segments
from megatron_patch.generate import load_model, pictures_of, stream
from megatron_patch.model.parameters import whole_tensors
from megatron_patch.report import chat
from megatron_patch.report.answers import held_out_questions
from megatron_patch.train.checkpoint import write_weights
from megatron_patch.vision.images import Pictures
from tests.convert.samples import VOCAB_SIZE, MemoryWeights, train_tokenizer
from tests.data_tools.vision.pictures import encoded, photograph
from tests.ranks import run_ranks
from tests.toy import SEEING, toy_recipe
from tests.train.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.job import Job
from tests.train.test_kill import last_step

ROW, STEPS = 97, 8
MODEL = [f"model.vocab_size={VOCAB_SIZE}", f"model.sequence_length={ROW - 1}"]
SETTINGS = [
    *MODEL,
    *SEEING,
    "data.reset_at_starts=true",
    "data.epochs=4",
    "data.held_out_interval=4",
    "data.held_out_rows=4",
    "checkpoint.interval_minutes=0",
    "checkpoint.interval_steps=1",
    "optimizer.learning_rate=1e-2",
    f"optimizer.decay_steps={STEPS}",
    f"run.steps={STEPS}",
]
ALIGN = ["optimizer.frozen=[encoder,decoder]", "run.steps=3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about dark and bright images and some about none; a decoder's checkpoint; a CLIP."""
    folder = tmp_path_factory.mktemp("seeing")
    draw = random.Random(0)
    (folder / "images").mkdir()
    entries = []
    for number in range(120):
        which = draw.randrange(2)
        image = photograph(12, 12, number).point(lambda shade, add=which: shade // 2 + 120 * add)
        (folder / f"images/{number}.png").write_bytes(encoded(image, "png"))
        asked = f"{draw.choice(['the', 'over', 'quick'])} {number}?"
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": ["fox", "dog"][which]}]
        entries.append({"image": f"{number}.png", "conversations": turns})
        if number % 6 == 0:
            entries.append({"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": "lazy"}]})
    (folder / "in.json").write_text(json.dumps(entries))
    arguments = ["build", "--input", str(folder / "in.json"), "--images", str(folder / "images"), "--workers", "1"]
    more = ["--output", str(folder / "data"), "--tokenizer", str(train_tokenizer(folder)), "--image-tokens", "4"]
    run(build_parser().parse_args([*arguments, *more, "--row-length", str(ROW), "--held-out-rows", "4"]))
    write_weights(MemoryWeights(toy_recipe(*MODEL)), folder / "decoder")
    vision = toy_recipe(*SETTINGS).model.vision
    assert vision is not None
    CLIPVisionModel(
        CLIPVisionConfig(
            image_size=8, patch_size=4, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
            num_attention_heads=2,
        )
    ).save_pretrained(folder / "clip")  # fmt: skip
    return folder


def settings(folder: Path, name: str, *more: str) -> list[str]:
    return [*SETTINGS, f"data.folder={folder / 'data'}", f"run.folder={folder / name}", *more]


@pytest.fixture(scope="module")
def aligned(folder: Path) -> Path:
    """Stage 1, from a decoder and a CLIP, over two stages of a pipeline; its checkpoint."""
    start = [f"run.initial_weights={folder / 'decoder'}", f"run.initial_encoder={folder / 'clip'}"]
    Job(4, settings(folder, "align", *ALIGN, *start, "parallel.pipeline=2"), folder / "align.log").run()
    return folder / "align/checkpoints/step_00000003"


def test_stage_1_trains_the_projector_alone(folder: Path, aligned: Path) -> None:
    said = (folder / "align.log").read_text()
    assert f"step 0 has the weights of {folder / 'decoder'}" in said
    assert f"the encoder of step 0 has the weights of {folder / 'clip'}" in said
    decoder, clip = MemoryWeights(toy_recipe(*MODEL)), load_file(folder / "clip/model.safetensors")
    with newest(folder / "align") as checkpoint:
        for name, whole in whole_tensors(checkpoint.recipe.model).items():
            weight = checkpoint.tensor(name)
            if whole.of == "decoder":
                assert torch.equal(weight, decoder.tensor(name)), name
            elif whole.of == "encoder":
                theirs = name.removeprefix("vision.encoder.")
                [stored] = [value for key, value in clip.items() if key in (theirs, f"vision_model.{theirs}")]
                assert torch.equal(weight, stored), name
            else:
                assert checkpoint.tensor(name, "exp_avg_sq").any(), name


@pytest.fixture(scope="module")
def undisturbed(folder: Path, aligned: Path) -> Path:
    """Stage 2 on three ranks."""
    Job(3, settings(folder, "whole", f"run.initial_weights={aligned}"), folder / "whole.log").run()
    return folder / "whole"


def test_killed_it_ends_as_if_it_never_was_and_two_ranks_see_the_same(
    folder: Path, aligned: Path, undisturbed: Path
) -> None:
    killed = settings(folder, "killed", f"run.initial_weights={aligned}")
    job = Job(3, killed, folder / "killed.log")
    job.wait_for(lambda: last_step(folder / "killed") >= STEPS // 2)
    job.signal(signal.SIGKILL)
    job.wait()
    assert newest(folder / "killed").step < STEPS, "it was killed too late"
    shutil.copytree(folder / "killed", folder / "fewer")
    Job(3, killed, folder / "killed.log").run()
    assert history(folder / "killed") == history(undisturbed)
    assert_bit_equal(newest(folder / "killed"), newest(undisturbed))
    Job(2, settings(folder, "fewer", f"run.initial_weights={aligned}"), folder / "fewer.log").run()
    ours, theirs = history(folder / "fewer"), history(undisturbed)
    assert ours.keys() == theirs.keys()
    for step, (samples, loss, _) in ours.items():
        assert samples == theirs[step][0] and loss == pytest.approx(theirs[step][1], rel=1e-4)


def spoken(words: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return main(words), out.getvalue()


def test_summary_asks_held_out_questions(folder: Path, undisturbed: Path) -> None:
    code, out = run_ranks(1, spoken, ["summary", str(undisturbed), "--tokens", "4"])[0]
    assert code == 0 and "held-out questions about an image" in out and "with the image of another question" in out
    assert "(true: fox)" in out or "(true: dog)" in out
    assert (undisturbed / "answers.png").read_bytes()[:4] == b"\x89PNG"


def typed(words: list[str], text: str) -> tuple[int, str, str]:
    """A verb with a text on its standard input: exit code, standard output and error."""
    sys.stdin = io.StringIO(text)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def asked_in_training(run_folder: Path) -> tuple[str, list[int], bytes, list[int]]:
    """The first held-out question about an image: words, its row's ids, its shard's pixels, greedy ids after it."""
    checkpoint = newest(run_folder)
    launch.setup_environment()
    model = load_model(checkpoint.recipe, checkpoint.tensor, timedelta(minutes=5))
    vision, data = checkpoint.recipe.model.vision, checkpoint.recipe.data.folder
    assert vision is not None and data is not None
    segments = open_segments(data, row_length=ROW, vocab_size=VOCAB_SIZE)
    assert segments.tokenizer_path is not None and segments.manifest.chat is not None
    [question, *_] = [q for q in held_out_questions(segments) if len(q.images) == 1]
    images = Images(data, segments.manifest, vision.image_size, vision.fit)
    pixels = images.read(question.images)
    images.close()
    ids = stream(
        model,
        question.prompt,
        end_of_turn=segments.manifest.chat.end_of_turn_id,
        limit=8,
        sequence_length=ROW - 1,
        vocab_size=segments.vocab_size,
        pictures=pictures_of(question.prompt, pixels, vision.placeholder_id),
    )
    tokenizer = ChatTokenizer(segments.tokenizer_path, data / CHAT_TEMPLATE_NAME, segments.vocab_size).tokenizer
    [asked] = re.findall(r"\w+ \d+\?", tokenizer.decode(question.prompt))
    return asked, question.prompt, pixels.tobytes(), list(ids)


def asked_in_chat(words: list[str], text: str) -> tuple[int, list[tuple[list[int], bytes, list[int]]], str]:
    """`chat`: its code, the ids and pixels that the model is asked each time with what it answers, and what it says."""
    asked = []

    def recorded(model: torch.nn.Module, prompt: list[int], pictures: Pictures, **more: Any) -> Iterator[int]:
        ids = list(stream(model, prompt, pictures=pictures, **more))
        asked.append((prompt, pictures.pixels.numpy().tobytes(), ids))
        return iter(ids)

    chat.stream = recorded  # type: ignore[assignment]
    code, _, err = typed(words, text)
    return code, asked, err


def test_chat_about_an_image_asks_what_training_asked(folder: Path, undisturbed: Path) -> None:
    """The image stands before the first question, not before the second; an empty line begins anew with it."""
    asked, prompt, pixels, expected = run_ranks(1, asked_in_training, undisturbed)[0]
    number = int(re.findall(r"\d+", asked)[0])
    words = ["chat", str(undisturbed), "--tokens", "8", "--image", str(folder / f"images/{number}.png")]
    text = f"{asked}\nand dog 3?\n\n{asked}\n\n<s>?\n"
    code, [first, second, again], err = run_ranks(1, asked_in_chat, words, text)[0]
    assert code == 0 and "a text with <s>, which stands for a part of an image" in err
    assert first == again == (prompt, pixels, expected)
    placeholders = prompt.count(1)
    assert placeholders == 4 and second[0].count(1) == placeholders and second[0][: len(prompt)] == prompt


def test_chat_refuses_what_it_cannot_show(folder: Path, undisturbed: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "images/0.png").read_bytes()[:60])
    for run_folder, image, reason in (
        (undisturbed, "cut.png", "cut.png: damaged or cut short"),
        (undisturbed, "absent.png", "absent.png"),
        (folder / "decoder", "images/0.png", "images/0.png: the model has no encoder"),
    ):
        words = ["chat", str(run_folder), "--data", str(folder / "data"), "--image", str(folder / image)]
        code, _, err = run_ranks(1, typed, words, "the fox?\n")[0]
        assert code == 2 and reason in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.vision=null"], "its rows point to images, and the model has no encoder"),
        (["model.vision.patch_size=2"], "4 placeholders of id 1 for an image, and model.vision makes 16 tokens"),
        (["model.vision.placeholder_id=7"], "in the place of id 7"),
        (["run.initial_weights={aligned}", "run.initial_encoder={folder}/clip"], "has an encoder already"),
        (["run.initial_encoder={folder}/images"], "config.json cannot be read"),
    ],
)
def test_what_cannot_be_trained_is_refused(folder: Path, aligned: Path, more: list[str], said: str) -> None:
    formatted = [word.format(aligned=aligned, folder=folder) if "{" in word else word for word in more]
    shutil.rmtree(folder / "refused", ignore_errors=True)
    (folder / "refused.log").unlink(missing_ok=True)
    assert Job(1, settings(folder, "refused", *formatted), folder / "refused.log").wait() == [2]
    assert said in (folder / "refused.log").read_text()
