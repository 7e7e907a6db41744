"""README.md of an exported folder, as the Hugging Face hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.dataset.format import MANIFEST_NAME, ChatRecord, DatasetManifest
from data_tools.files.errors import DataError
from megatron_patch.convert.names import Form, ffn_table
from megatron_patch.convert.source import WeightsSource
from megatron_patch.model.counts import parameters
from megatron_patch.recipe import Model, Recipe


def model_card(source: WeightsSource, form: Form, scores: Mapping[str, Any] | None, energy: str | None = None) -> str:
    """Markdown with the hub's front matter.

    `scores`: content of the checkpoint's `scores.json`; `energy`: what its training drew; where there is one.
    """
    recipe, model = source.recipe, source.recipe.model
    manifest = _trained_on(recipe, source.data_digest)
    chat = manifest.chat if manifest else None
    trained = "tuned" if chat else "pre-trained"
    purpose = _purpose(chat, recipe) if model.vision is None else _SEES
    kind = "MobiLlama" if model.shared_ffn else "A baseline of MobiLlama"
    return f"""---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: {"text-generation" if model.vision is None else "image-text-to-text"}
tags: [mobillama]
---
# {recipe.name}

{kind} ([arXiv 2402.16840](https://arxiv.org/abs/2402.16840)), {trained} on {source.tokens:,} tokens. {_sharing(model, form)}
{purpose}

```python
{_use(chat, form) if model.vision is None else _USE_IMAGE}

| | |
|---|---|
| parameters | {parameters(model).unique:,} |
| layers x hidden / FFN | {model.num_layers} x {model.hidden_size} / {model.ffn_hidden_size} |
| attention | {model.num_attention_heads} heads, as many KV heads |
| context | {model.sequence_length:,} tokens |
| recipe | {recipe.name}, in `recipe.yaml` with every setting |
| step | {source.step:,}: {source.samples:,} rows of {model.sequence_length:,} tokens |
| checkpoint digest | {source.digest} |
| data digest | {source.data_digest or "unknown"} |
| energy of training | {energy or "not measured"} |

## Training data

{_data(manifest)}

## Scores

{_scores(scores)}

## Licence

The weights are under Apache-2.0, as the code that trained them; change it here and above if you publish them under
another. The training data have licences of their own.
"""  # noqa: E501


def _sharing(model: Model, form: Form) -> str:
    if not model.shared_ffn:
        return "Each layer has an FFN of its own."
    if (table := ffn_table(model)) is not None:
        use = f"{model.ffn_count} FFNs were trained for {model.num_layers} layers, which use them in the order {table}"
        stored = "each is stored once" if form == "shared" else "each layer has a copy of its own here"
        return f"{use} (`ffn_of_layer`); {stored}."
    if form == "shared":
        return f"One FFN for all {model.num_layers} layers, stored once."
    return (
        f"One FFN was trained for all {model.num_layers} layers; it stands here in every layer, so that stock LLaMA "
        "code loads it."
    )


def _purpose(chat: ChatRecord | None, recipe: Recipe) -> str:
    if chat is None:
        return "A base model: it continues texts, and has been taught neither to follow instructions nor to refuse any."
    base = f" from the weights of `{recipe.run.initial_weights}`" if recipe.run.initial_weights else ""
    return (
        f"A chat model: tuned{base} on {chat.conversations:,} conversations, {recipe.data.epochs} times, by the "
        f"{chat.counted:,} tokens that the assistant says in them. Each answer ends with `{chat.end_of_turn}`."
    )


_SEES = "A model that sees: its answers are about the images of a question."

_USE_IMAGE = """from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

folder = "."  # of this file, or its name on the hub
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
question = f"{processor.image_token}\\nWhat is in the image?"
messages = [{"role": "user", "content": question}]
text = processor.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(images=load_image("image.jpg"), text=text, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))
```"""


def _use(chat: ChatRecord | None, form: Form) -> str:
    trust = ", trust_remote_code=True" if form == "shared" else ""
    opened = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # of this file, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder{trust})
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
    if chat is not None:
        return f"""{opened}messages = [{{"role": "user", "content": "What does this function do?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
```"""
    return f"""{opened}inputs = tokenizer("The function returns", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

Texts are given without `<s>`: training put `</s>` after each document and nothing before it."""


def _trained_on(recipe: Recipe, digest: str | None) -> DatasetManifest | None:
    """The data set's manifest, where it is within reach and still the one that was trained on."""
    try:
        manifest = DatasetManifest.read(recipe.data.folder / MANIFEST_NAME) if recipe.data.folder else None
    except DataError:
        return None
    return manifest if manifest is not None and manifest.digest == digest else None


def _data(manifest: DatasetManifest | None) -> str:
    if manifest is None:
        return "Not recorded here: the data set was not within reach when this folder was written."
    if manifest.chat is not None:
        return f"Conversations of {', '.join(f'`{file}`' for file in manifest.chat.files)}."
    rows = "\n".join(
        f"| {name} | {number / manifest.rows:.2%} |" for name, number in manifest.rows_per_source.items() if number
    )
    return f"| source | share of the rows |\n|---|---:|\n{rows}"


def _scores(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "Not evaluated."
    found = {**scores["scores"], "average": scores["average"]}
    rows = "\n".join(f"| {name} | {_score(score)} |" for name, score in found.items() if score)
    limit = scores["settings"]["limit"]
    trial = "" if limit is None else f"\n\nA trial on {limit} documents a task."
    return (
        f"Percent, with one standard error; the paper's tasks and shots, lm-evaluation-harness {scores['lm_eval']}. Of "
        f"crows_pairs 50 is unbiased.\n\n| benchmark | score |\n|---|---:|\n{rows}{trial}"
    )


def _score(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.2f}" + (f" ± {score['stderr']:.2f}" if score["stderr"] is not None else "")
