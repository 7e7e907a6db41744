"""A causal model as lm-evaluation-harness asks it: log-likelihoods of continuations, and greedy text.

One class for our checkpoints and for `transformers` models; both come as a function from token ids to logits. Ids are
padded on the right, where a causal model does not see them, so no mask is needed. No BOS is put in front of a text, as
in training; an empty context (CrowS-Pairs) is one given id, EOS by default.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_patch.evaluate.ranks import is_first_rank

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [batch, sequence] to logits [batch, sequence, vocab], both on the model's device."""

FIRST_BATCH_TOKENS = {"cpu": 4096, "cuda": 131_072}
"""Tokens of the first batch tried; halved until a batch fits in memory."""


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class CausalLM(TemplateLM):
    """A model, its tokenizer, and how it is batched.

    The ranks of the default process group, if there is one, share the work of each call and all get all answers. The
    harness is not told of them: it would draw other shots for each number of ranks.

    Attributes:
        batch_tokens: tokens of a batch, padding included, that are known to fit; grows never, shrinks on demand.
    """

    def __init__(
        self,
        logits: Logits,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        eos_id: int,
        empty_context_id: int,
        device: torch.device,
        batch_size: int | None = None,
    ) -> None:
        """`batch_size` rows a batch; None: as many as fit. `max_length` input tokens; longer ones lose their start."""
        super().__init__()
        self._logits, self._tokenizer = logits, tokenizer
        self.max_length, self._eos_id, self._empty_context_id = max_length, eos_id, empty_context_id
        self._device, self._batch_size = device, batch_size
        self.batch_tokens = FIRST_BATCH_TOKENS[device.type]

    @property
    def eot_token_id(self) -> int:
        return self._eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._empty_context_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with no BOS whatever the harness asks."""
        return self._tokenizer.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts; each token is predicted once, from at most `max_length` tokens before it."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each up to its first stop text, EOS, or `max_gen_toks` tokens.

        Raises:
            ValueError: sampling is asked for.
        """
        return [
            self._generate(*request.args) for request in tqdm(requests, disable=disable_tqdm or not is_first_rank())
        ]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("temperature"):
            raise ValueError("generation is greedy here; set do_sample to false in the task")
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        limit = settings.get("max_gen_toks", 256)
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-max(1, self.max_length - limit) :]
        ids: list[int] = []
        text = ""
        for _ in range(limit):
            inputs = torch.tensor([(prompt + ids)[-self.max_length :]], device=self._device)
            with torch.inference_mode():
                following = int(self._logits(inputs)[0, -1].argmax())
            if following == self._eos_id:
                break
            ids.append(following)
            # The prompt is decoded too: a sentencepiece decoder drops the space in front of a text.
            text = self._tokenizer.decode(prompt + ids)[len(self._tokenizer.decode(prompt)) :]
            if found := [text.index(stop) for stop in stops if stop and stop in text]:
                return text[: min(found)]
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation.

        Requests that differ in the last token alone (a letter to choose) share one forward pass.
        """
        by_input: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            by_input.setdefault(tuple((context + continuation)[-self.max_length - 1 : -1]), []).append(i)
        inputs = sorted(by_input, key=lambda ids: (-len(ids), ids))
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(inputs[rank::world]), disable=disable_tqdm or not is_first_rank(), file=sys.stderr) as bar:
            for batch, logits in self._forward(inputs[rank::world]):
                for ids, row in zip(batch, logits, strict=True):
                    for i in by_input[ids]:
                        mine[i] = _score(row[: len(ids)], requests[i][2])
                bar.update(len(batch))
        if world > 1:
            parts: list[dict[int, tuple[float, bool]]] = [{} for _ in range(world)]
            dist.all_gather_object(parts, mine)
            mine = {i: score for part in parts for i, score in part.items()}
        return [mine[i] for i in range(len(requests))]

    def _forward(self, inputs: list[tuple[int, ...]]) -> Iterator[tuple[list[tuple[int, ...]], torch.Tensor]]:
        """Batches of `inputs`, longest first, with their logits; one that does not fit is tried at half the size."""
        start = 0
        while start < len(inputs):
            longest = len(inputs[start])
            rows = self._batch_size or max(1, self.batch_tokens // longest)
            batch = inputs[start : start + rows]
            tokens = torch.zeros(len(batch), longest, dtype=torch.long)
            for row, ids in zip(tokens, batch, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            try:
                with torch.inference_mode():
                    logits = self._logits(tokens.to(self._device))
            except torch.OutOfMemoryError:
                if rows == 1 or self._batch_size:
                    raise
                torch.cuda.empty_cache()
                self.batch_tokens = rows * longest // 2
                continue
            yield batch, logits
            start += len(batch)


def _score(logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Of the last tokens of an input; logits [sequence, vocab]. A continuation longer than the input keeps its end."""
    tail = continuation[-len(logits) :]
    log_probabilities = logits[-len(tail) :].float().log_softmax(-1)
    expected = torch.tensor(tail, device=logits.device)
    picked = log_probabilities.gather(1, expected[:, None]).sum()
    return float(picked), bool((log_probabilities.argmax(-1) == expected).all())
