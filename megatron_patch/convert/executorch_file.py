"""A checkpoint as an ExecuTorch program (.pte), lowered to XNNPACK: what phones run.

Each weight is stored once however many layers use it. XNNPACK repacks weights when it opens a program, once for every
use, unless its cache of packed weights is on: then one FFN is one in memory too (docs/devices.md).

The whole model is in memory, in fp32: `torch.export` traces it.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackDynamicallyQuantizedPartitioner,
    XnnpackPartitioner,
)
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from megatron_patch.convert.executorch_graph import Decoder, Int8Embedding
from megatron_patch.convert.export import ControlIds, provenance, write_tokenizer
from megatron_patch.convert.names import stored_once
from megatron_patch.convert.new_file import new_file
from megatron_patch.convert.once import check_rows, wholes
from megatron_patch.convert.source import ConvertError, WeightsSource
from megatron_patch.recipe import Model

GROUP = 32
"""Weights that share a scale."""


def write_executorch(
    source: WeightsSource, file: Path, tokenizer: Path, quantize_as: str | None = None, context: int | None = None
) -> None:
    """Writes `file`, whole or not at all. Weights are fp32, or `8da4w`: matrices of 4 bits, activations of 8.

    `context`: ids that its KV cache holds, 1 to the length of a row; None: that length.

    Raises:
        ConvertError: `file` exists, a weight is not finite, a row is no whole number of groups, the cache is longer
            than a row, or the disk is full.
        DataError: the tokenizer cannot be read, or another process writes `file`.
    """
    model = source.recipe.model
    context = context or model.sequence_length
    if not 2 <= context <= model.sequence_length:
        raise ConvertError(f"--context {context}: the model was trained on rows of {model.sequence_length}; 2 to that")
    tensors = stored_once(model)
    if quantize_as is not None:
        check_rows(tensors, GROUP, "groups", quantize_as)
    with new_file(file) as folder:
        ids = write_tokenizer(tokenizer, folder, model)
        weights = {name: tensor.cut(whole, model).float() for name, tensor, whole in wholes(source, tensors)}
        decoder = Decoder(model, weights, context).eval()
        del weights
        program = _lowered(decoder, quantize_as, _told(source, ids, context))
        with (folder / file.name).open("wb") as stream:
            program.write_to_file(stream)


def _lowered(decoder: Decoder, quantize_as: str | None, told: dict[str, Any]) -> Any:
    """The program; its libraries' warnings of their own insides are not for whoever exports."""
    partitioners = [XnnpackPartitioner()]
    if quantize_as is not None:
        assert isinstance(decoder.embedding, torch.nn.Embedding)
        decoder.embedding = Int8Embedding(decoder.embedding.weight)
        four_bits = getattr(torch, "int4")  # noqa: B009  (torch's stubs lack it)
        config = Int8DynamicActivationIntxWeightConfig(weight_dtype=four_bits, weight_granularity=PerGroup(GROUP))
        quantize_(decoder, config)
        partitioners.insert(0, XnnpackDynamicallyQuantizedPartitioner())
    length = torch.export.Dim("length", min=1, max=decoder.context)
    example = (torch.zeros(1, 2, dtype=torch.long), torch.arange(2))
    disabled = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(decoder, example, dynamic_shapes=({1: length}, {0: length}))
            edge = to_edge_transform_and_lower(
                exported,
                partitioner=partitioners,
                constant_methods=told,
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            return edge.to_executorch()
    finally:
        logging.disable(disabled)


def _told(source: WeightsSource, ids: ControlIds, context: int) -> dict[str, Any]:
    """What the program says of itself: what ExecuTorch's runner asks, and where the weights come from."""
    model: Model = source.recipe.model
    return {
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_vocab_size": model.vocab_size,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_eos_ids": [ids.eos],
        **({} if ids.bos is None else {"get_bos_id": ids.bos}),
        "provenance": json.dumps(provenance(source, "executorch")),
    }
