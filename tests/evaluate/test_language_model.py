"""Our evaluation path against transformers and the harness's own Hugging Face model, on the same weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from megatron_patch.convert.export import export
from megatron_patch.evaluate.language_model import CausalLM
from megatron_patch.evaluate.models import HfTokenizer, OurTokenizer, Settings, hugging_face_model, our_model
from tests.convert.samples import MemoryWeights, small_recipe
from tests.evaluate.small_data import WORDS
from tests.ranks import run_ranks

EOS = 2


@pytest.fixture(scope="module")
def weights() -> MemoryWeights:
    return MemoryWeights(small_recipe("model.sequence_length=128"))


@pytest.fixture(scope="module")
def folder(weights: MemoryWeights, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    export(weights, folder, "expanded", tokenizer)
    return folder


def loglikelihoods(model: CausalLM | HFLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return list(model.loglikelihood(requests))


def in_our_model(weights: MemoryWeights, settings: Settings, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """In a process of its own: a process group in the test process would break ranks forked from it later."""
    return list(run_ranks(1, _in_our_model, weights, settings, pairs)[0])


def _in_our_model(weights: MemoryWeights, settings: Settings, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return loglikelihoods(our_model(weights, settings), pairs)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """1,000 contexts and continuations of many lengths; some without context, some too long for the model."""
    rng = random.Random(11)

    def say(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    return [(say(0, 45) if i % 10 else "", f" {say(1, 12)}") for i in range(1000)]


@pytest.mark.parametrize("batch_size", [1, 16])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_1000_continuations_as_transformers(
    weights: MemoryWeights, folder: Path, tokenizer: Path, pairs: list[tuple[str, str]], batch_size: int,
    padding_side: str,
) -> None:  # fmt: skip
    """transformers pads on either side under its mask; ours needs none, padding on the right."""
    found = in_our_model(weights, Settings(tokenizer=tokenizer, batch_size=batch_size), pairs)
    model = AutoModelForCausalLM.from_pretrained(folder)
    encoder = hugging_face_model(folder, Settings())
    encoded = [([EOS], encoder.tok_encode(t)) if c == "" else encoder._encode_pair(c, t) for c, t in pairs]
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        inputs = [(c + t)[-129:-1] for c, t in batch]
        longest = max(map(len, inputs))
        ids, mask = torch.zeros(2, len(batch), longest, dtype=torch.long)
        for row, row_mask, sequence in zip(ids, mask, inputs, strict=True):
            place = slice(longest - len(sequence), None) if padding_side == "left" else slice(len(sequence))
            row[place], row_mask[place] = torch.tensor(sequence), 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
        for i, (_, continuation) in enumerate(batch):
            tail = logits[i][mask[i].bool()][-len(continuation) :]
            expected = tail.gather(1, torch.tensor(continuation)[:, None]).sum().item()
            value, is_greedy = found[start + i]
            assert value == pytest.approx(expected, abs=1e-4)
            assert is_greedy == (tail.argmax(-1).tolist() == continuation)
    assert any(len(c + t) > 129 for c, t in encoded)


Answers = tuple[list[tuple[float, bool]], list[float], list[str]]


def answers(model: CausalLM | HFLM, pairs: list[tuple[str, str]]) -> Answers:
    """Log-likelihoods, rolling log-likelihoods of long texts, and greedy texts up to a stop."""
    texts = [" ".join(c for c, _ in pairs[i : i + 7]) for i in range(1, 40, 9)]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    settings = {"until": ["e", "\n"], "max_gen_toks": 12}
    asked = [Instance("generate_until", {}, (c, settings), 0) for c, _ in pairs[1:9]]
    return loglikelihoods(model, pairs[:200]), model.loglikelihood_rolling(rolling), model.generate_until(asked)


def our_answers(weights: MemoryWeights, settings: Settings, pairs: list[tuple[str, str]]) -> Answers:
    return answers(our_model(weights, settings), pairs)


def test_harness_own_model_says_the_same(
    weights: MemoryWeights, folder: Path, tokenizer: Path, pairs: list[tuple[str, str]]
) -> None:
    (ours,) = run_ranks(1, our_answers, weights, Settings(tokenizer=tokenizer), pairs)
    stock = answers(HFLM(str(folder), device="cpu", batch_size=1, prefix_token_id=EOS, add_bos_token=False), pairs)
    for values, rolling, texts in (ours, answers(hugging_face_model(folder, Settings()), pairs)):
        assert [v for v, _ in values] == pytest.approx([v for v, _ in stock[0]], abs=1e-4)
        assert [greedy for _, greedy in values] == [greedy for _, greedy in stock[0]]
        assert rolling == pytest.approx(stock[1], abs=1e-3)
        assert texts == stock[2]


def test_empty_context_is_eos_and_can_be_bos(weights: MemoryWeights, folder: Path, tokenizer: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = OurTokenizer(tokenizer).encode("the quick")
    assert ids[0] not in (1, 2)
    for name, first in (("eos", 2), ("bos", 1)):
        with torch.inference_mode():
            logits = model(torch.tensor([[first, *ids]])).logits.log_softmax(-1)[0]
        expected = sum(logits[i, token].item() for i, token in enumerate(ids))
        settings = Settings(tokenizer=tokenizer, empty_context=name)  # type: ignore[arg-type]
        assert in_our_model(weights, settings, [("", "the quick")])[0][0] == pytest.approx(expected, abs=1e-4)


def test_a_batch_that_does_not_fit_is_halved(pairs: list[tuple[str, str]], folder: Path) -> None:
    """The device refuses more than 600 tokens at once; the answers are those of single rows."""
    network = AutoModelForCausalLM.from_pretrained(folder)
    seen = []

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        if tokens.numel() > 600:
            raise torch.OutOfMemoryError("out of memory")
        seen.append(len(tokens))
        return network(input_ids=tokens).logits

    tokenizer = hugging_face_model(folder, Settings())._tokenizer
    assert isinstance(tokenizer, HfTokenizer)

    def build(batch_size: int | None) -> CausalLM:
        return CausalLM(
            logits, tokenizer, max_length=128, eos_id=EOS, empty_context_id=EOS, device=torch.device("cpu"),
            batch_size=batch_size,
        )  # fmt: skip

    model = build(None)
    found = loglikelihoods(model, pairs[:60])
    assert max(seen) > 1
    assert model.batch_tokens <= 600
    for (value, _), (expected, _) in zip(found, loglikelihoods(build(1), pairs[:60]), strict=True):
        assert value == pytest.approx(expected, abs=1e-4)
    with pytest.raises(torch.OutOfMemoryError):
        loglikelihoods(build(60), pairs[:60])


def test_choices_of_one_token_share_a_forward_pass(folder: Path) -> None:
    model = hugging_face_model(folder, Settings())
    rows = []
    inner = model._logits

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        rows.append(len(tokens))
        return inner(tokens)

    model._logits = logits
    choices = model._loglikelihood_tokens([(None, [5, 6, 7], [letter]) for letter in (40, 41, 42, 43)])
    assert rows == [1]
    assert len({value for value, _ in choices}) == 4
