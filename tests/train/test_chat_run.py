"""A run over conversations, from data to the exported folder; killed in its second epoch it ends as if it never was."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from data_tools.build_chat import build_parser, run
from data_tools.dataset.format import DatasetManifest
from megatron_patch.__main__ import main
from megatron_patch.convert.export import export, tokenizer_of
from megatron_patch.convert.imported import ImportedModel
from megatron_patch.convert.source import ConvertError
from megatron_patch.data.segments import open_segments
from megatron_patch.generate import Answer, answer, load_model
from megatron_patch.recipe import load
from megatron_patch.report import chat
from megatron_patch.report.answers import held_out_questions
from tests.convert.samples import VOCAB_SIZE, train_tokenizer
from tests.ranks import run_ranks
from tests.train.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.job import Job
from tests.train.test_kill import last_step

ROW = 97
SETTINGS = [
    f"model.vocab_size={VOCAB_SIZE}",
    f"model.sequence_length={ROW - 1}",
    "data.reset_at_starts=true",
    "data.epochs=3",
    "data.held_out_interval=4",
    "data.held_out_rows=8",
    "batch.micro_batch_size=2",
    "checkpoint.interval_minutes=0",
    "checkpoint.interval_steps=1",
    "optimizer.learning_rate=1e-2",
    "run.steps=null",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with one answer always; 8 steps an epoch."""
    folder = tmp_path_factory.mktemp("chat")
    draw = random.Random(0)
    lines = []
    for _ in range(150):
        which = draw.randrange(2)
        asked = f"{draw.choice(['the', 'over', 'quick'])} {['fox', 'dog'][which]} {draw.randrange(1000)}?"
        lines.append({"instruction": asked, "output": "dog"})
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["build", "--input", str(folder / "in.jsonl"), "--output", str(folder / "data"), "--workers", "1"]
    more = ["--tokenizer", str(train_tokenizer(folder)), "--row-length", str(ROW), "--held-out-rows", "8"]
    run(build_parser().parse_args([*arguments, *more]))
    return folder / "data"


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    Job(2, [*SETTINGS, f"data.folder={data}", f"run.folder={folder}"], folder.with_name("log")).run()
    return folder


def test_killed_in_its_second_epoch_it_ends_as_if_it_never_was(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    steps = len(history(undisturbed))
    settings = [*SETTINGS, f"data.folder={data}", f"run.folder={tmp_path / 'run'}"]
    job = Job(2, settings, tmp_path / "log")
    job.wait_for(lambda: last_step(tmp_path / "run") >= steps // 2)
    job.signal(signal.SIGKILL)
    job.wait()
    stood = newest(tmp_path / "run").step
    assert steps // 3 < stood < 2 * steps // 3, "the kill fell outside of epoch 2"
    Job(2, settings, tmp_path / "log").run()
    assert history(tmp_path / "run") == history(undisturbed) and steps % 3 == 0
    assert_bit_equal(newest(tmp_path / "run"), newest(undisturbed))


def our_answers(run_folder: Path) -> list[Answer]:
    """Greedy answers, each token computed once; in one pass over prompt and answer every token is the likeliest too."""
    checkpoint = newest(run_folder)
    model = load_model(checkpoint.recipe, checkpoint.tensor, timedelta(minutes=10))
    segments = open_segments(checkpoint.recipe.data.folder, row_length=ROW, vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
    prompts = [prompt for prompt, *_ in held_out_questions(segments)][:6]
    limits = {"end_of_turn": 2, "limit": 12, "sequence_length": ROW - 1, "vocab_size": VOCAB_SIZE}
    said = [answer(model, prompt, **limits) for prompt in prompts]
    for prompt, one in zip(prompts, said, strict=True):
        whole = torch.tensor([[*prompt, *one.ids]])
        likeliest = model(whole)[0, len(prompt) - 1 :].argmax(-1).tolist()
        assert likeliest[: len(one.ids) + one.ended] == one.ids + [2] * one.ended
    assert any(one.ended for one in said)
    return said


@pytest.mark.parametrize("form", ["shared", "expanded"])
def test_the_exported_folder_answers_the_same_in_stock_transformers(undisturbed: Path, tmp_path: Path, form) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = newest(undisturbed)
    export(checkpoint, tmp_path / "hf", form, tokenizer_of(checkpoint.recipe))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=form == "shared", dtype="float32")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    ours = run_ranks(1, our_answers, undisturbed)[0]
    segments = open_segments(checkpoint.recipe.data.folder, row_length=ROW, vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]
    for (prompt, *_), said in zip(held_out_questions(segments)[:6], ours, strict=True):
        question = tokenizer.decode(prompt).split("### Human:\n")[1].split("\n###")[0]
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == prompt
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        assert out == said.ids + [2] * said.ended
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "A chat model: tuned" in card and "Each answer ends with `</s>`" in card and "`in.jsonl`" in card


def typed(words: list[str], text: str) -> tuple[int, str, str]:
    """A verb with a text on its standard input: exit code, standard output and error."""
    sys.stdin = io.StringIO(text)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def spelled(words: list[str], text: str) -> tuple[int, str, str]:
    """As `typed`, of a model whose every answer is the end of turn, spelled byte by byte."""
    spelling = [3 + byte for byte in b"</s>"]  # behind the three control tokens, as `byte_fallback` has them
    chat.stream = lambda *_, **__: iter(spelling)  # type: ignore[assignment]
    return typed(words, text)


def test_an_answer_that_spells_a_control_token_is_forgotten(undisturbed: Path) -> None:
    code, out, err = run_ranks(1, spelled, ["chat", str(undisturbed)], "the fox 1?\nover dog 2?\n")[0]
    assert code == 0 and out == "</s>\n</s>\n", "the second question is answered too"
    assert err.count("the conversation begins anew: </s> in a message of the assistant") == 2


def test_chat_answers_line_by_line(undisturbed: Path, tmp_path: Path) -> None:
    """Each question after those before it, an empty line begins anew; what is too long says so and the rest goes on."""
    asked = ["the fox 1?", "over dog 2?", "", "the fox 1?", "fox " * 60, "quick dog 3?", *["the fox 1?"] * 4]
    code, out, err = run_ranks(1, typed, ["chat", str(undisturbed)], "\n".join(asked) + "\n")[0]
    answers = out.splitlines()
    assert code == 0 and answers[0] == answers[2] == "dog" and len(answers) == 8
    assert f"and the model sees {ROW - 1}: ask a shorter question" in err
    assert "the first question is forgotten: the context is full" in err
    odd = "the fox 1?\nthe </s> fox?\ncaf\udce9 fox\nthe fox 1?\n"
    code, out, err = run_ranks(1, typed, ["chat", str(undisturbed), "--tokens", "9"], odd)[0]
    assert code == 0 and len(out.splitlines()) == 2, "two of the questions cannot be asked"
    assert "chat: </s> in a message of the user" in err and "surrogate pair, in a message of the user" in err
    code, _, err = run_ranks(1, typed, ["chat", str(undisturbed), "--system", "be </s>"], "the fox 1?\n")[0]
    assert code == 2 and "chat: </s> in a message of the system" in err
    likeliest = run_ranks(1, typed, ["chat", str(undisturbed), "--temperature", "1e-4"], "the fox 1?\n")[0]
    assert likeliest[1] == "dog\n"
    code, _, err = run_ranks(1, typed, ["chat", str(undisturbed), "--data", str(tmp_path)], "the fox 1?\n")[0]
    assert code == 2 and f"{tmp_path}/manifest.json" in err


def test_summary_says_what_tuning_changed_on_answers(data: Path, undisturbed: Path) -> None:
    code, out, err = run_ranks(1, typed, ["summary", str(undisturbed)], "")[0]
    assert code == 0, err
    losses = [
        record["held_out_loss"]
        for record in map(json.loads, (undisturbed / "log.jsonl").read_text().splitlines())
        if "held_out_loss" in record
    ]
    first, last = losses[0], losses[-1]
    assert f"held-out loss {first:.4f} -> {last:.4f} nats/token over 8 rows: better by {first - last:.4f}" in out
    ended, questions = map(int, re.findall(r"^answers +(\d+) of (\d+)", out, re.M)[0])
    chat = DatasetManifest.read(data / "manifest.json").chat
    assert chat is not None and 0.9 * questions <= ended <= questions == chat.held_out_conversations
    assert out.count("(true: dog)") == 4


def test_held_out_loss_falls_and_is_known_before_the_first_step(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    start = [f"run.initial_weights={newest(undisturbed).folder}", "data.epochs=1"]
    Job(1, [*SETTINGS, f"data.folder={data}", f"run.folder={tmp_path / 'run'}", *start], tmp_path / "log").run()
    before, after = (
        {
            r["step"]: r["held_out_loss"]
            for r in map(json.loads, (f / "log.jsonl").read_text().splitlines())
            if "held_out_loss" in r
        }
        for f in (undisturbed, tmp_path / "run")
    )
    assert after[0] == pytest.approx(before[max(before)], rel=1e-5), "step 0 has the weights that it starts from"
    assert 0 not in before and before[max(before)] < before[min(before)] - 0.5


@pytest.mark.parametrize("wrong", ["template", "none"])
def test_a_run_whose_data_set_is_not_what_it_was_is_not_exported(data: Path, tmp_path: Path, wrong: str) -> None:
    from megatron_patch.convert.chat_files import chat_beside

    for file in data.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    template = tmp_path / "chat_template.jinja"
    template.unlink() if wrong == "none" else template.write_text("{{ messages }}")
    with pytest.raises(ConvertError, match="not the template that made the data"):
        chat_beside(tmp_path / "tokenizer.model")


@pytest.mark.soak
@pytest.mark.parametrize("way", ["SFT", "DPO"])
def test_trl_tunes_the_shared_form_and_import_takes_it_back(undisturbed: Path, tmp_path: Path, way: str) -> None:
    """docs/preference_tuning.md, to the letter: one FFN in memory, one in the file; parted copies are refused."""
    from datasets import Dataset
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    checkpoint = newest(undisturbed)
    export(checkpoint, tmp_path / "hf", "shared", tokenizer_of(checkpoint.recipe))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype="float32")
    common = {
        "output_dir": str(tmp_path / "trl"), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    asked = [{"role": "user", "content": "the fox 1?"}]
    if way == "SFT":
        rows = [{"messages": [*asked, {"role": "assistant", "content": "lazy dog"}]}] * 4
        trainer = SFTTrainer(
            model,
            SFTConfig(assistant_only_loss=True, max_length=ROW - 1, **common),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    else:
        rows = [
            {
                "prompt": asked,
                "chosen": [{"role": "assistant", "content": "lazy dog"}],
                "rejected": [{"role": "assistant", "content": "brown fox jumps"}],
            }
        ] * 4
        kept = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype="float32")
        trainer = DPOTrainer(
            model,
            kept,
            args=DPOConfig(max_length=ROW - 1, **common),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    names = load_file(tmp_path / "tuned" / "model.safetensors")
    assert [n for n in names if "ffn" in n or "mlp" in n] == [
        f"model.ffn.{p}_proj.weight" for p in ("down", "gate", "up")
    ]
    recipe = load(tmp_path / "hf" / "recipe.yaml")
    tuned = ImportedModel(tmp_path / "tuned", recipe)
    before = checkpoint.tensor("ffn.linear_fc2.weight")
    assert tuned.form == "shared" and not torch.equal(tuned.tensor("ffn.linear_fc2.weight"), before.float())
    # The expanded form, tuned elsewhere: its copies part with the first step.
    export(checkpoint, tmp_path / "parted", "expanded", tokenizer_of(checkpoint.recipe))
    weights = load_file(tmp_path / "parted" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(weights, tmp_path / "parted" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConvertError, match=r"layers.1.mlp.up_proj.weight differs from layer 0's"):
        ImportedModel(tmp_path / "parted", recipe)
