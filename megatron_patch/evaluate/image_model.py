"""A model that sees as lm-evaluation-harness asks it: a question about an image, and its greedy answer.

A question becomes the user's first turn with the image before it, by the chat template of training, as LLaVA asks; the
answer ends with the model's turn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from data_tools.vision.conversations import IMAGE_TEXT
from data_tools.vision.pictures import BadPicture, prepare, read_picture
from data_tools.vision.placeholders import ImageTokenizer
from megatron_patch.evaluate.data import EvaluationError, StoredImages
from megatron_patch.evaluate.language_model import CausalLM, Tokenizer
from megatron_patch.evaluate.ranks import is_first_rank
from megatron_patch.generate import answer, pictures_of
from megatron_patch.recipe import Vision


class ImageLM(CausalLM):
    """Answers questions about images, and everything that `CausalLM` does.

    The ranks of the default process group share the questions of each call and all get all answers.
    """

    MULTIMODAL = True  # the harness asks for it before it runs a task with images

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Tokenizer,
        *,
        vision: Vision,
        prompts: ImageTokenizer,
        images: StoredImages,
        **batching: Any,
    ) -> None:
        """`batching` as `CausalLM` has it."""
        super().__init__(model, tokenizer, **batching)
        self._model, self._vision, self._prompts, self._images = model, vision, prompts, images

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers; a request's arguments end with `visual`, the name of its image in `StoredImages`.

        A question that is longer than the model's context with its image is answered with nothing, and counted on
        standard error.

        Raises:
            EvaluationError: an image cannot be read.
        """
        if all(len(request.args) == 2 for request in requests):
            return super().generate_until(requests, disable_tqdm)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = [
            self._answer(*request.args)
            for request in tqdm(requests[rank::world], disable=disable_tqdm or not is_first_rank())
        ]
        parts: list[list[str | None]] = [mine]
        if world > 1:
            parts = [[] for _ in range(world)]
            dist.all_gather_object(parts, mine)
        answers = [parts[i % world][i // world] for i in range(len(requests))]
        if is_first_rank() and (long := answers.count(None)):
            print(
                f"{long} of {len(answers)} questions are longer than the model's {self.max_length:,} tokens with their "
                "image, and count as wrong",
                file=sys.stderr,
            )
        return [said or "" for said in answers]

    def _answer(self, question: str, settings: dict[str, Any], about: dict[str, str]) -> str | None:
        """None where the question does not fit."""
        name, chat = about["visual"], self._prompts.chat
        try:
            picture, _ = read_picture(self._images.read(name))
            prompt = self._prompts.prompt([{"role": "user", "content": f"{IMAGE_TEXT}\n{question}"}], images=1)
        except BadPicture as error:
            raise EvaluationError(f"{name}: its image cannot be shown to the model: {error}") from None
        except ValueError as error:
            raise EvaluationError(f"{name}: {error}") from None
        if len(prompt) >= self.max_length:
            return None
        pixels = prepare(picture, self._vision.image_size, self._vision.fit)[None]
        said = answer(
            self._model,
            prompt,
            end_of_turn=chat.end_of_turn_id,
            limit=settings["max_gen_toks"],
            sequence_length=self.max_length,
            vocab_size=chat.vocab_size,
            pictures=pictures_of(prompt, pixels, self._vision.placeholder_id),
        )
        return str(chat.tokenizer.decode(said.ids, skip_special_tokens=True)).strip()
