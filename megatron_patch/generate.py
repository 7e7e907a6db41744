"""Continue a text with a trained checkpoint, on one process."""

from __future__ import annotations

import torch
from sentencepiece import SentencePieceProcessor

from megatron_patch import device, topology
from megatron_patch.model.build import build
from megatron_patch.model.initialise import fill
from megatron_patch.train.checkpoint import Checkpoint


def load_model(checkpoint: Checkpoint) -> torch.nn.Module:
    """The checkpoint's model whole on this process, whatever layout wrote it. Needs RANK=0 and WORLD_SIZE=1."""
    recipe = checkpoint.recipe.model_copy(update={"parallel": checkpoint.recipe.parallel.model_copy(update=_WHOLE)})
    topology.initialize(recipe.parallel)
    [model] = build(recipe, device.current())
    fill([model], recipe.model, lambda whole: checkpoint.tensor(whole.name), 0, 1)
    return model.eval()


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    tokenizer: SentencePieceProcessor,
    prompt: str,
    *,
    num_tokens: int,
    sequence_length: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """`prompt` and up to `num_tokens` sampled tokens; stops at end of document.

    No BOS, as in training. Only the last `sequence_length` tokens are seen.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([ids[-sequence_length:]], device=device.current())
        logits = model(window, None, None)[0, -1].float().cpu()
        token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        if token == tokenizer.eos_id():
            break
        ids.append(token)
    return tokenizer.decode(ids)


_WHOLE = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence": False}
