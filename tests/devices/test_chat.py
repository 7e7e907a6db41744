"""A chat model's file in its runtime: the template's ids are those of `transformers`, and an answer ends by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_tools.build_chat import build_parser, run
from data_tools.packing_options import DEFAULT_TEMPLATE
from data_tools.sources.text_encoder import read_tokenizer_json
from megatron_patch.convert.gguf_file import write_gguf
from megatron_patch.convert.onnx_folder import write_onnx
from megatron_patch.devices.runtimes import LlamaCpp, OnnxRuntime
from tests.convert.samples import MemoryWeights
from tests.devices.models import VOCAB_SIZE, device_weights, train_tokenizer
from tests.devices.node import install, run_in_node

MESSAGES = [
    {"role": "system", "content": " Be brief."},
    {"role": "user", "content": "What is a list?\n"},
    {"role": "assistant", "content": "A sequence of é, 漢字 and 🙂."},
    {"role": "user", "content": "And  a dict?"},
]
CHATML = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|fin|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|fin|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
SAID = [500, 600, 700]  # each answer


@pytest.fixture(scope="module", params=["ours", "ChatML"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer in a data set of conversations: our template, or one whose end of turn no runtime knows."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer, template = train_tokenizer(folder), DEFAULT_TEMPLATE
    if request.param == "ChatML":
        content = json.loads(read_tokenizer_json(tokenizer))
        for name in ("<|turn|>", "<|fin|>"):
            token = {"id": len(content["model"]["vocab"]) + len(content["added_tokens"]) - 3, "content": name}
            content["added_tokens"].append({**content["added_tokens"][0], **token})
        tokenizer, template = folder / "tokenizer.json", folder / "chatml.jinja"
        tokenizer.write_text(json.dumps(content))
        template.write_text(CHATML)
    (folder / "in.jsonl").write_text(json.dumps({"instruction": "Which colour?", "output": "Blue."}) + "\n")
    arguments = ["build", "--input", str(folder / "in.jsonl"), "--output", str(folder / "data"), "--workers", "1"]
    more = ["--tokenizer", str(tokenizer), "--template", str(template), "--row-length", "129"]
    run(build_parser().parse_args([*arguments, *more]))
    return folder / "data" / tokenizer.name


def weights_that_answer(after: int, end_of_turn: int) -> MemoryWeights:
    """Whatever came before: after the id `after` they say SAID and the end of turn."""
    weights = device_weights()
    ids = [after, *SAID, end_of_turn]
    embedding = torch.zeros(VOCAB_SIZE, 64)
    embedding[ids, torch.arange(len(ids))] = 1e3  # beside which what the layers add is nothing
    output = torch.zeros(VOCAB_SIZE, 64)
    output[ids[1:], torch.arange(len(ids) - 1)] = 4.0
    changed = {"embedding.word_embeddings.weight": embedding, "output_layer.weight": output}
    changed["final_layernorm.weight"] = torch.ones(64)
    return replace(weights, changed=changed)


def stock(folder: Path):
    """The exported tokenizer as anyone loads it, and the ids that an answer to MESSAGES follows."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
    return tokenizer, list(tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"])


def exported(chat: Path, folder: Path):
    """Weights that answer MESSAGES, the tokenizer as it is exported, and the prompt."""
    write_onnx(device_weights(), folder / "tokenizer", chat)
    tokenizer, prompt = stock(folder / "tokenizer")
    weights = weights_that_answer(prompt[-1], tokenizer.eos_token_id)
    return weights, tokenizer, prompt


def test_llama_cpp_renders_the_template_and_ends_the_turn(chat: Path, tmp_path: Path) -> None:
    weights, tokenizer, prompt = exported(chat, tmp_path)
    write_gguf(weights, tmp_path / "m.gguf", chat)
    model = LlamaCpp(tmp_path / "m.gguf", threads=1, context=256)
    rendered = model._post("/apply-template", {"messages": MESSAGES})["prompt"]
    assert model.tokenize(rendered) == prompt
    answer = model._post("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "max_tokens": 20})
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == len(prompt) and answer["usage"]["completion_tokens"] == len(SAID) + 1
    assert choice["message"]["content"].strip() == tokenizer.decode(SAID).strip()


def test_onnx_runtime_is_told_the_end_of_turn(chat: Path, tmp_path: Path) -> None:
    weights, tokenizer, prompt = exported(chat, tmp_path)
    write_onnx(weights, tmp_path / "out", chat)
    model = OnnxRuntime(tmp_path / "out" / "onnx" / "model.onnx", threads=1)
    assert stock(tmp_path / "out")[1] == prompt
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert model.eos == genai["eos_token_id"] == tokenizer.eos_token_id
    following = [*prompt, *SAID, model.eos]
    likely = model.log_probs(following)[-len(SAID) - 1 :]
    assert min(likely) > -1e-3  # each id of the answer, and that it ends


@pytest.mark.soak
def test_transformers_js_renders_the_template_and_ends_the_turn(chat: Path, tmp_path: Path) -> None:
    weights, _, prompt = exported(chat, tmp_path)
    write_onnx(weights, tmp_path / "out", chat)
    install(tmp_path)
    [answered] = run_in_node("transformers_js_chat.mjs", tmp_path, MESSAGES)
    assert answered["prompt"] == prompt and answered["answer"][:-1] == SAID
