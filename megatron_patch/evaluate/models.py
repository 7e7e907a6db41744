"""Opens what is to be evaluated: one of our checkpoints, a run's milestones, a Hugging Face folder or a hub name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import httpx2
import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from data_tools.dataset.format import CHAT_TEMPLATE_NAME, tokenizer_in
from data_tools.sources.text_encoder import EOS_TEXT, read_tokenizer_json
from data_tools.vision.placeholders import ImageTokenizer
from megatron_patch import launch
from megatron_patch.convert.export import BOS_TEXT, tokenizer_of
from megatron_patch.convert.hf_folder import HfFolder
from megatron_patch.convert.imported import ImportedModel, recipe_of
from megatron_patch.convert.source import WeightsSource
from megatron_patch.evaluate.data import EvaluationError, StoredImages
from megatron_patch.evaluate.image_model import ImageLM
from megatron_patch.evaluate.language_model import CausalLM
from megatron_patch.generate import load_model
from megatron_patch.parallel import device
from megatron_patch.recipe import Recipe, Vision
from megatron_patch.train.checkpoint.format import MARKER_NAME
from megatron_patch.train.checkpoint.reader import open_checkpoint

Precision = Literal["auto", "bf16", "fp32"]
_SLOWEST_RANK = timedelta(hours=1)
"""One rank may read the data sets or a model while the others wait."""
_DTYPES = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """How a model is run.

    Attributes:
        precision: auto: as the weights are stored.
        batch_size: rows a batch; None: as many as fit.
        empty_context: what stands before a text without context: EOS as in training, or BOS.
        tokenizer: file that stands in for the model's own.
        trust_remote_code: run modelling code of a Hugging Face folder.
        recipe: read a Hugging Face folder into our model under this recipe, as `import` would; the authors' published
            folders load in no other way (their configuration misstates the KV heads).
        chat_template: of a model that sees, in place of its data set's.
        images: where the images of questions are read; None where no benchmark has any.
    """

    precision: Precision = "auto"
    batch_size: int | None = None
    empty_context: Literal["eos", "bos"] = "eos"
    tokenizer: Path | None = None
    trust_remote_code: bool = False
    recipe: Path | None = None
    chat_template: Path | None = None
    images: StoredImages | None = None


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        name: for tables and result folders.
        digest: of its weights.
        step, tokens: where in training it stands; None for a Hugging Face model.
        open: loads it.
        sees: whether it can be asked about images.
    """

    name: str
    digest: str
    step: int | None
    tokens: int | None
    open: Callable[[Settings], CausalLM]
    sees: bool = False


def find(model: str) -> list[Candidate]:
    """What a command-line argument names, in order of training.

    Raises:
        EvaluationError: nothing to evaluate there, or a hub name that cannot be fetched.
        CheckpointError, ConvertError: damaged weights.
    """
    path = Path(model)
    if (path / MARKER_NAME).is_file():
        return [checkpoint(path)]
    if (path / "config.json").is_file():
        return [_hugging_face(path, path.resolve().name)]
    if path.is_dir():
        if found := checkpoints_in(path):
            return sorted(map(checkpoint, found), key=lambda candidate: candidate.step or 0)
        raise EvaluationError(f"{path}: no config.json and no finished checkpoint in it{_restart_checkpoint(path)}")
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", model):
        raise EvaluationError(f"{model}: no such folder, and not a hub name like MBZUAI/MobiLlama-05B[@revision]")
    name, _, revision = model.partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None))
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise EvaluationError(
            f"{model}: no such folder, and the hub cannot be reached or has no such model "
            f"({str(error).splitlines()[0]}); fetch it where there is a network and name its folder"
        ) from None
    return [_hugging_face(folder, model.replace("/", "--"))]


def checkpoints_in(folder: Path) -> list[Path]:
    """A run's milestones, or the finished checkpoints of any other folder, by number and name.

    Restart checkpoints are left out, since most of them are gone soon, and so is what was set aside.
    """
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = [p for p in inside.iterdir() if (p / MARKER_NAME).is_file() and not _PASSING.fullmatch(p.name)]
    return sorted(found, key=lambda p: (int("".join(re.findall(r"\d+$", p.name)) or 0), p.name))


_PASSING = re.compile(r"step_\d+|.*\.(broken|partial|earlier(_\d+)?)")


def _restart_checkpoint(run: Path) -> str:
    points = sorted((run / "checkpoints").glob("step_*"))
    return f"; the run has no milestone yet, but a restart checkpoint: {points[-1]}" if points else "; name a model"


def checkpoint(folder: Path) -> Candidate:
    """One of our checkpoints; its files are compared with their checksums when it is opened, not here.

    It is named after its recipe, and after its run's folder where that has another name.

    Raises CheckpointError where it is unfinished or damaged.
    """
    with open_checkpoint(folder, verify=False) as found:
        run = found.recipe.name
        digest, step, tokens = found.digest, found.step, found.tokens
        sees = found.recipe.model.vision is not None
    place = folder.resolve()
    if place.parent.name == "checkpoints" and place.parent.parent.name != run:
        run += f"-{place.parent.parent.name}"

    def load(settings: Settings) -> CausalLM:
        with open_checkpoint(folder) as found:
            return our_model(found, settings)

    return Candidate(f"{run}--{place.name}", digest, step, tokens, load, sees)


def _hugging_face(folder: Path, name: str) -> Candidate:
    def load(settings: Settings) -> CausalLM:
        if settings.recipe is None:
            if settings.tokenizer:
                raise EvaluationError(f"{folder}: has its own tokenizer; leave --tokenizer out, or add --recipe")
            return hugging_face_model(folder, settings)
        own = replace(settings, tokenizer=settings.tokenizer or tokenizer_in(folder))
        return our_model(ImportedModel(folder, recipe_of(folder, settings.recipe)), own)

    return Candidate(name, HfFolder(folder).digest, None, None, load)


def join_ranks() -> None:
    """Joins the ranks that torchrun or srun started, on this rank's device; alone there is no group to join."""
    launch.setup_environment()
    device.use(int(os.environ["LOCAL_RANK"]))
    if int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        device.init_process_group(_SLOWEST_RANK)


def our_model(source: WeightsSource, settings: Settings) -> CausalLM:
    """The Megatron model of a checkpoint, whole on every rank; the ranks share the requests.

    Raises:
        ConvertError, DataError: no tokenizer, or no chat template where questions are about images.
    """
    recipe = source.recipe
    kind: Callable[..., CausalLM] = CausalLM
    if settings.images is not None and recipe.model.vision is not None:
        prompts = image_tokenizer(recipe, recipe.model.vision, settings)
        kind = partial(ImageLM, vision=recipe.model.vision, prompts=prompts, images=settings.images)
    tokenizer = OurTokenizer(settings.tokenizer or tokenizer_of(recipe))
    precision = recipe.precision if settings.precision == "auto" else settings.precision
    join_ranks()
    model = load_model(recipe.model_copy(update={"precision": precision}), source.tensor, _SLOWEST_RANK)
    return kind(
        model,
        tokenizer,
        max_length=recipe.model.sequence_length,
        eos_id=tokenizer.eos_id,
        empty_context_id=tokenizer.eos_id if settings.empty_context == "eos" else tokenizer.bos_id,
        device=device.current(),
        batch_size=settings.batch_size,
    )


def image_tokenizer(recipe: Recipe, vision: Vision, settings: Settings) -> ImageTokenizer:
    """What turns questions about images into ids as they were in training.

    Raises:
        EvaluationError: the data set that has the chat template is not there.
        DataError: tokenizer or template cannot be used.
    """
    folder = recipe.data.folder
    template = settings.chat_template or (None if folder is None else folder / CHAT_TEMPLATE_NAME)
    if template is None or not template.is_file():
        raise EvaluationError(
            f"{template or recipe.name}: no chat template, with which questions are asked as in training; name the one "
            "of the data set, chat_template.jinja, with --chat-template"
        )
    file = settings.tokenizer or tokenizer_of(recipe)
    return ImageTokenizer(file, template, None, vision.placeholder_id, vision.tokens)


def hugging_face_model(folder: Path, settings: Settings) -> CausalLM:
    """A `transformers` causal model, whole on every rank.

    Raises:
        EvaluationError: transformers cannot load it, or its tokenizer has no EOS or BOS where one is needed.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=_DTYPES[settings.precision], trust_remote_code=settings.trust_remote_code
        )
        tokenizer = HfTokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise EvaluationError(f"{folder}: transformers cannot load it ({error})") from error
    join_ranks()
    model.to(device.current())  # type: ignore[arg-type]
    model.eval()
    empty = tokenizer.raw.eos_token_id if settings.empty_context == "eos" else tokenizer.raw.bos_token_id
    if empty is None:
        raise EvaluationError(f"{folder}: its tokenizer has no {settings.empty_context.upper()}; use --empty-context")
    return CausalLM(
        lambda tokens: model(input_ids=tokens, use_cache=False).logits,
        tokenizer,
        max_length=config.max_position_embeddings,
        eos_id=tokenizer.raw.eos_token_id,
        empty_context_id=empty,
        device=device.current(),
        batch_size=settings.batch_size,
    )


class OurTokenizer:
    """The training data's tokenizer file; encodes without BOS and EOS."""

    def __init__(self, file: Path) -> None:
        """Raises EvaluationError where the file has no `</s>` or `<s>`."""
        self._file = file
        self._raw = RawTokenizer.from_str(read_tokenizer_json(file))
        self.eos_id, self.bos_id = self._control(EOS_TEXT), self._control(BOS_TEXT)

    def _control(self, text: str) -> int:
        token = self._raw.token_to_id(text)
        if token is None:
            raise EvaluationError(f"{self._file}: no token {text}; give LLaMA's tokenizer with --tokenizer")
        return int(token)

    def encode(self, text: str) -> list[int]:
        return list(self._raw.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._raw.decode(ids))


class HfTokenizer:
    """A `transformers` tokenizer; encodes without special tokens, whatever its configuration adds."""

    def __init__(self, raw: PreTrainedTokenizerBase) -> None:
        self.raw = raw

    def encode(self, text: str) -> list[int]:
        return list(self.raw.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.raw.decode(ids, skip_special_tokens=True))
