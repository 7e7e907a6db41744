"""A checkpoint as an ONNX folder: what ONNX Runtime, transformers.js and ONNX Runtime GenAI run.

    config.json, generation_config.json, tokenizer files, genai_config.json
    onnx/model.onnx and onnx/model.onnx_data       int8: model_quantized, int4: model_q4, as transformers.js names them

Each weight is stored once however many layers use it: of MobiLlama's FFN three initializers. Written one after the
other; nothing is in memory but the one at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from data_tools.files.durable import PARTIAL_SUFFIX, fsync_file, fsync_folder, new_folder, take_place
from megatron_patch.convert.export import (
    PROVENANCE_NAME,
    ControlIds,
    hf_config,
    provenance,
    write_json,
    write_tokenizer,
)
from megatron_patch.convert.names import HfTensor, hf_tensors, name_stored_once, stored_once
from megatron_patch.convert.once import check_rows, wholes
from megatron_patch.convert.onnx_graph import BLOCK, MICROSOFT, OPSET, build_graph
from megatron_patch.convert.source import ConvertError, WeightsSource
from megatron_patch.recipe import Model

FILES = {None: "model.onnx", "int8": "model_quantized.onnx", "int4": "model_q4.onnx"}
"""Name of the graph by quantization; its weights' has `_data` behind it."""

_BITS = {None: None, "int8": 8, "int4": 4}
_BROWSER_TYPES = {None: "fp32", "int8": "q8", "int4": "q4"}
_ALIGNMENT = 4096  # so that a weight can be mapped
_IR_VERSION = 10
_AT_ONCE = 1 << 22  # weights that are quantized together: each takes 30 bytes meanwhile


def write_onnx(source: WeightsSource, folder: Path, tokenizer: Path, quantize_as: str | None = None) -> None:
    """Writes `folder`, whole or not at all. Weights are fp32, or matrices and embedding `int8` or `int4` in blocks.

    Raises:
        ConvertError: `folder` exists, a weight is not finite, a row is no whole number of blocks, or the disk is full.
        DataError: the tokenizer cannot be read, or another process writes `folder`.
    """
    model = source.recipe.model
    tensors = stored_once(model)
    if quantize_as is not None:
        check_rows(tensors, BLOCK, "blocks", quantize_as)
    partial = folder.with_name(folder.name + PARTIAL_SUFFIX)
    try:
        with new_folder(folder, partial):
            ids = write_tokenizer(tokenizer, partial, model)
            (partial / "onnx").mkdir()
            _write_model(source, partial / "onnx" / FILES[quantize_as], tensors, _BITS[quantize_as])
            _write_configs(source, partial, ids, quantize_as)
            for file in partial.rglob("*"):
                fsync_file(file)
            fsync_folder(partial)
            take_place(partial, folder)
    except OSError as error:
        raise ConvertError(f"{folder}: cannot be written ({error}); free space, or name another") from None
    fsync_folder(folder.parent)


def _write_model(source: WeightsSource, file: Path, tensors: dict[str, HfTensor], bits: int | None) -> None:
    model = source.recipe.model
    weights = {tensor.name: name_stored_once(tensor) for tensor in hf_tensors(model, "expanded")}
    builder, inputs, outputs = build_graph(model, weights, bits)
    data = file.with_name(file.name + "_data")
    with data.open("wb") as stream:
        initializers = [
            _external(stream, data.name, name, content)
            for first, tensor, whole in wholes(source, tensors)
            for name, content in _stored(first, tensor, whole, bits, model)
        ]
    graph = helper.make_graph(
        builder.nodes, source.recipe.name, inputs, outputs, [*initializers, *builder.constants.values()]
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    described = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="megatron_patch")
    helper.set_model_props(described, {key: str(value) for key, value in provenance(source, "onnx").items()})
    file.write_bytes(described.SerializeToString())


def _stored(
    name: str, tensor: HfTensor, whole: torch.Tensor, bits: int | None, model: Model
) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an initializer: itself, or its blocks and their scales; a matrix not quantized is transposed."""
    values = tensor.cut(whole, model).float().numpy()
    is_table = tensor.name == "model.embed_tokens.weight"
    if values.ndim == 1 or bits is None:
        yield name, values if values.ndim == 1 or is_table else values.T
        return
    blocks, scales = quantized(values, bits)
    if is_table:
        yield f"{name}.rows", blocks.reshape(len(blocks), -1)
    else:
        yield name, blocks
    yield f"{name}.scales", scales


def quantized(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric blocks as MatMulNBits reads them: fp32 [rows, columns] to uint8 [rows, blocks, bytes] and fp32 scales.

    The value of largest magnitude of a block of 32 becomes the lowest code, as in llama.cpp's Q4_0; 2^(bits-1) is zero;
    of two 4-bit codes in a byte the first is the low one. A value v is scale * (code - zero).
    """
    step = max(1, _AT_ONCE // values.shape[1])
    parts = [_quantized_rows(values[i : i + step], bits) for i in range(0, len(values), step)]
    codes, scales = (np.concatenate(part) for part in zip(*parts, strict=True))
    return codes, scales


def _quantized_rows(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = values.shape
    blocks = values.reshape(rows, columns // BLOCK, BLOCK)
    zero = 1 << (bits - 1)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scales = (largest / -zero).astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, 0, 1 / scales).astype(np.float32)
    codes = np.clip(np.rint(blocks * inverse) + zero, 0, 2 * zero - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes, scales[..., 0]


def _external(stream: BinaryIO, location: str, name: str, content: np.ndarray) -> onnx.TensorProto:
    """Appends the array to the data file; what the graph says of it."""
    stream.write(bytes(-stream.tell() % _ALIGNMENT))
    stream.flush()  # numpy writes past the stream's buffer
    offset = stream.tell()
    np.ascontiguousarray(content).tofile(stream)
    tensor = TensorProto(name=name, dims=content.shape, data_location=TensorProto.EXTERNAL)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(content.dtype)
    for key, value in (("location", location), ("offset", offset), ("length", content.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _write_configs(source: WeightsSource, folder: Path, ids: ControlIds, quantize_as: str | None) -> None:
    model, file = source.recipe.model, FILES[quantize_as]
    config = hf_config(model, "expanded", torch.float32, ids)
    browser = {"dtype": _BROWSER_TYPES[quantize_as], "use_external_data_format": {file: 1}}
    write_json(folder / "config.json", {**config, "transformers.js_config": browser})
    generation = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.unk, "do_sample": False}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "genai_config.json", _genai_config(model, ids, f"onnx/{file}"))
    write_json(folder / PROVENANCE_NAME, provenance(source, "onnx"))
    (folder / "recipe.yaml").write_text(source.recipe.to_yaml(), encoding="utf-8")


def _genai_config(model: Model, ids: ControlIds, file: str) -> dict[str, Any]:
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    past = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    present = {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    decoder = {
        "filename": file,
        "head_size": model.head_dim,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "inputs": {**inputs, **past},
        "outputs": {"logits": "logits", **present},
    }
    control = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.unk}
    return {
        "model": {
            "type": "llama",
            "context_length": model.sequence_length,
            "vocab_size": model.vocab_size,
            **{role: i for role, i in control.items() if i is not None},
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": model.sequence_length, "past_present_share_buffer": False},
    }
