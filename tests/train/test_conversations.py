"""Rows of conversations: each is trained on as if it were alone, by the labels that count, in every layout."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_patch.model.parameters import local_parameters
from tests.model.test_logits import expanded
from tests.ranks import run_ranks
from tests.toy import gather, random_marks, random_rows, toy_recipe, toy_shard, toy_trainer, train_toy
from tests.train.test_layouts import STEPS, check, on_one_rank

PACKED = ["data.reset_at_starts=true", "model.num_ffns=1", "batch.micro_batch_size=2"]
LAYOUTS = {
    "one rank": (1, []),
    "one rank, full recompute": (1, ["recompute=full"]),
    "TP2": (2, ["parallel.tensor=2"]),
    "TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "PP2xVPP2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "DP2": (2, []),
    "DP3": (3, ["recompute=selective"]),
    "ZeRO-2 on DP2": (2, ["parallel.zero_stage=2"]),
    "TP2xPP2xDP2+SP": (8, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
}


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {whole.name: p.detach().clone() for whole, p in local_parameters(trainer.chunks, trainer.recipe.model)}


def packed_batch(overrides: list[str]) -> dict:
    """On a rank: loss and gradient, summed over all ranks, of one global batch of packed rows; and the weights."""
    trainer = toy_trainer(toy_recipe(*overrides))
    for whole, parameter in local_parameters(trainer.chunks, trainer.recipe.model):
        if whole.kind != "norm":
            parameter.data *= 5.0  # far enough from zero to tell layers apart
    before = weights_of(trainer)
    trainer.compute(toy_shard(trainer, 0))
    loss = trainer._loss.clone()
    dist.all_reduce(loss)
    names = {id(p): whole.name for whole, p in local_parameters(trainer.chunks, trainer.recipe.model)}
    parts = {}
    for group, buffer in zip(trainer.optimizer.groups, trainer.optimizer.buffers, strict=True):
        flat = buffer.shard.new_empty(trainer.topology.data_size * buffer.shard.numel())
        dist.all_gather_into_tensor(flat, buffer.shard.contiguous(), group=trainer.topology.data_group)
        sizes = [p.numel() for p in group.parameters]
        pieces = flat[: sum(sizes)].split(sizes)
        parts |= {names[id(p)]: piece.clone() for p, piece in zip(group.parameters, pieces, strict=True)}
    return {"loss": loss.item(), "parts": parts, "weights": before, "tensor_rank": trainer.topology.tensor_rank}


def in_llama(wholes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model, fc1 = toy_recipe(*PACKED).model, "ffn.linear_fc1.weight"
    matrix = wholes[fc1].reshape(-1, model.hidden_size)  # gate and up lie apart in `gather`'s
    return expanded({**wholes, fc1: matrix}, model.num_layers, model.num_attention_heads)


def one_by_one(weights: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Each conversation of the batch alone through float64 stock Llama, with the labels that do not count at -100.

    Its mean loss over all counted labels, and the gradients by its own names.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = toy_recipe(*PACKED)
    model = recipe.model
    config = LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
        rms_norm_eps=model.norm_epsilon, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).double()
    llama.load_state_dict(in_llama({name: tensor.double() for name, tensor in weights.items()}), strict=True)
    rows, marks = random_rows(recipe, 0).astype(np.int64), random_marks(recipe, 0)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, counted, starts in zip(rows, marks.counted, marks.starts, strict=True):
        firsts = np.flatnonzero(starts)
        for first, end in zip(firsts, [*firsts[1:], len(row)], strict=True):
            labels = np.where(counted[first:end], row[first:end], -100)
            labels[0] = -100
            if (labels != -100).any():
                answer = llama(
                    torch.from_numpy(row[first:end])[None],
                    labels=torch.from_numpy(labels)[None],
                    num_items_in_batch=1,  # the sum, not the mean
                )
                total = total + answer.loss
                count += int((labels != -100).sum())
    assert count == marks.counted[:, 1:].sum()
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in llama.named_parameters()}


@pytest.fixture(scope="module")
def alone():
    return one_by_one(gather([{**a, "parts": a["weights"]} for a in run_ranks(1, packed_batch, PACKED)], toy_recipe()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_row_is_the_sum_of_its_conversations_alone(layout, alone):
    ranks, overrides = LAYOUTS[layout]
    loss, theirs = alone
    answers = run_ranks(ranks, packed_batch, [*PACKED, *overrides])
    assert [answer["loss"] for answer in answers] == pytest.approx([loss] * ranks, rel=1e-6)
    ours = gather(answers, toy_recipe(*PACKED, *overrides))
    layers = range(toy_recipe(*PACKED).model.num_layers)
    for name in ("gate", "up", "down"):  # one FFN: the sum over the layers' copies
        total = sum(theirs[f"model.layers.{i}.mlp.{name}_proj.weight"] for i in layers)
        for i in layers:
            theirs = {**theirs, f"model.layers.{i}.mlp.{name}_proj.weight": total}
    for name, gradient in in_llama(ours).items():
        assert (gradient - theirs[name]).norm() < 1e-6 * theirs[name].norm(), name


@pytest.mark.parametrize("layout", ["PP2xVPP2", "DP3", "ZeRO-2 on DP2", "TP2xPP2xDP2+SP"])
def test_packed_rows_train_as_on_one_rank(layout):
    """Losses, norms and weights of steps whose ranks and micro-batches count different numbers of labels."""
    ranks, overrides = LAYOUTS[layout]
    overrides = [*PACKED, *overrides]
    check(run_ranks(ranks, train_toy, overrides, STEPS), overrides, on_one_rank(*PACKED), 1e-5)


def held_out(overrides: list[str]) -> float:
    trainer = toy_trainer(toy_recipe(*overrides))
    shards = [toy_shard(trainer, step) for step in range(3)]
    return trainer.held_out_loss(iter(shards), sum(shard.labels for shard in shards))


def held_out_by_steps(overrides: list[str]) -> list[tuple[float, int]]:
    trainer = toy_trainer(toy_recipe(*overrides))
    shards = [toy_shard(trainer, step) for step in range(3)]
    return [(trainer.held_out_loss([shard], shard.labels), shard.labels) for shard in shards]


def test_held_out_loss_is_over_counted_labels_not_over_batches():
    steps = run_ranks(1, held_out_by_steps, PACKED)[0]
    labels = [n for _, n in steps]
    assert len(set(labels)) == 3, "equal counts would show nothing"
    expected = sum(loss * n for loss, n in steps) / sum(labels)
    assert run_ranks(3, held_out, PACKED) == pytest.approx([expected] * 3, rel=1e-6)
