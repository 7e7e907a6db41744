"""The decoder as an ONNX graph with a KV cache, in plain operators, batch and lengths free.

Weights are named, not held: `onnx_folder.py` writes them beside the graph. A weight that several layers use is one
initializer with several uses. Inputs and outputs have the names that transformers.js and ONNX Runtime GenAI ask for:

    input_ids, position_ids [batch, sequence], attention_mask [batch, past + sequence]
    past_key_values.I.key, .value [batch, heads, past, head_dim]
    present.I.key, .value [batch, heads, past + sequence, head_dim]
    logits [batch, sequence, vocab]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from megatron_patch.recipe import Model

OPSET = 18
MICROSOFT = "com.microsoft"
"""ONNX Runtime's own operators, for quantized weights."""

BLOCK = 32
"""Weights that share a scale."""

_LOWEST = float(np.finfo(np.float32).min)


@dataclass
class GraphBuilder:
    """Nodes in order, each with one output that has its name.

    Attributes:
        weights: name in Hugging Face's model (every layer has an FFN's) -> initializer.
        bits: of a quantized matrix; None: fp32. A quantized initializer W is W and W.scales.
    """

    weights: Mapping[str, str]
    bits: int | None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def node(self, operator: str, inputs: list[str], name: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name, domain=domain, **attributes))
        return name

    def constant(self, name: str, value: Any, dtype: type = np.int64) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def matmul(self, x: str, hf_name: str, rows: int, columns: int, name: str) -> str:
        """x @ W.T for W [rows, columns] of Hugging Face's model; what is not quantized lies transposed."""
        weight = self.weights[hf_name]
        if self.bits is None:
            return self.node("MatMul", [x, weight], name)
        shape = {"N": rows, "K": columns, "bits": self.bits, "block_size": BLOCK}
        return self.node("MatMulNBits", [x, weight, f"{weight}.scales"], name, MICROSOFT, accuracy_level=4, **shape)

    def embedding(self, ids: str, hf_name: str, name: str) -> str:
        weight = self.weights[hf_name]
        if self.bits is None:
            return self.node("Gather", [weight, ids], name)
        how = {"bits": self.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        return self.node("GatherBlockQuantized", [f"{weight}.rows", ids, f"{weight}.scales"], name, MICROSOFT, **how)


def build_graph(
    model: Model, weights: Mapping[str, str], bits: int | None
) -> tuple[GraphBuilder, list[Any], list[Any]]:
    """The graph's nodes, and its inputs and outputs as ONNX describes them."""
    b = GraphBuilder(weights, bits)
    cos, sin = _angles(b, model)
    keep = _mask(b)
    x = b.embedding("input_ids", "model.embed_tokens.weight", "embedded")
    for i in range(model.num_layers):
        y = _norm(b, x, f"model.layers.{i}.input_layernorm.weight", model)
        x = b.node("Add", [x, _attention(b, y, i, model, cos, sin, keep)], f"layers.{i}.attended")
        y = _norm(b, x, f"model.layers.{i}.post_attention_layernorm.weight", model)
        x = b.node("Add", [x, _ffn(b, y, i, model)], f"layers.{i}.out")
    x = _norm(b, x, "model.norm.weight", model)
    b.matmul(x, "lm_head.weight", model.vocab_size, model.hidden_size, "logits")
    return b, *_interface(model)


def _angles(b: GraphBuilder, model: Model) -> tuple[str, str]:
    """Cosine and sine of every position's angles: [batch, 1, sequence, head_dim], halves equal."""
    inverse = model.rope_base ** -(np.arange(0, model.head_dim, 2, dtype=np.float64) / model.head_dim)
    position = b.node("Cast", ["position_ids"], "position", to=TensorProto.FLOAT)
    position = b.node("Unsqueeze", [position, b.constant("axes.1.3", [1, 3])], "position.column")
    frequency = b.constant("rotary.frequency", np.concatenate([inverse, inverse]), np.float32)
    angle = b.node("Mul", [position, frequency], "rotary.angle")
    return b.node("Cos", [angle], "rotary.cos"), b.node("Sin", [angle], "rotary.sin")


def _mask(b: GraphBuilder) -> str:
    """Which keys a query sees: itself, those before it, none that is padding: bool [batch, 1, sequence, total]."""
    total = b.node("Shape", ["attention_mask"], "total.shape", start=1, end=2)
    new = b.node("Shape", ["input_ids"], "new.shape", start=1, end=2)
    axis, zero, one = b.constant("axis.0", [0]), b.constant("zero", 0), b.constant("one", 1)
    end = b.node("Squeeze", [total, axis], "total")
    begin = b.node("Squeeze", [b.node("Sub", [total, new], "past.shape"), axis], "past")
    keys = b.node("Range", [zero, end, one], "keys")
    queries = b.node(
        "Unsqueeze", [b.node("Range", [begin, end, one], "queries.flat"), b.constant("axes.1", [1])], "queries"
    )
    causal = b.node("LessOrEqual", [keys, queries], "causal")
    real = b.node("Cast", ["attention_mask"], "real.flat", to=TensorProto.BOOL)
    real = b.node("Unsqueeze", [real, b.constant("axes.1.2", [1, 2])], "real")
    return b.node("And", [causal, real], "keep")


def _norm(b: GraphBuilder, x: str, hf_name: str, model: Model) -> str:
    name = hf_name.removesuffix(".weight")
    square = b.node("Pow", [x, b.constant("two", 2, np.float32)], f"{name}.square")
    mean = b.node("ReduceMean", [square, b.constant("axis.last", [-1])], f"{name}.mean")
    root = b.node(
        "Sqrt",
        [b.node("Add", [mean, b.constant("epsilon", model.norm_epsilon, np.float32)], f"{name}.sum")],
        f"{name}.root",
    )
    return b.node("Mul", [b.node("Div", [x, root], f"{name}.unit"), b.weights[hf_name]], name)


def _attention(b: GraphBuilder, x: str, i: int, model: Model, cos: str, sin: str, keep: str) -> str:
    h, at, layer = model.hidden_size, f"layers.{i}.attention", f"model.layers.{i}.self_attn"
    apart = b.constant("heads.apart", [0, 0, model.num_attention_heads, model.head_dim])

    def heads(part: str) -> str:
        flat = b.matmul(x, f"{layer}.{part}_proj.weight", h, h, f"{at}.{part}.flat")
        return b.node(
            "Transpose", [b.node("Reshape", [flat, apart], f"{at}.{part}.apart")], f"{at}.{part}", perm=[0, 2, 1, 3]
        )

    def rotated(states: str) -> str:
        half, end = model.head_dim // 2, model.head_dim
        axis = b.constant("axis.last", [-1])
        first = b.node(
            "Slice", [states, b.constant("slice.0", [0]), b.constant("slice.half", [half]), axis], f"{states}.first"
        )
        second = b.node("Slice", [states, "slice.half", b.constant("slice.end", [end]), axis], f"{states}.second")
        turned = b.node("Concat", [b.node("Neg", [second], f"{states}.minus"), first], f"{states}.turned", axis=-1)
        straight = b.node("Mul", [states, cos], f"{states}.cos")
        return b.node("Add", [straight, b.node("Mul", [turned, sin], f"{states}.sin")], f"{states}.rotated")

    query, key, value = rotated(heads("q")), rotated(heads("k")), heads("v")
    keys = b.node("Concat", [f"past_key_values.{i}.key", key], f"present.{i}.key", axis=2)
    values = b.node("Concat", [f"past_key_values.{i}.value", value], f"present.{i}.value", axis=2)
    scaled = b.node("Mul", [query, b.constant("scale", model.head_dim**-0.5, np.float32)], f"{at}.scaled")
    scores = b.node("MatMul", [scaled, b.node("Transpose", [keys], f"{at}.keys", perm=[0, 1, 3, 2])], f"{at}.scores")
    seen = b.node("Where", [keep, scores, b.constant("lowest", _LOWEST, np.float32)], f"{at}.seen")
    mixed = b.node("MatMul", [b.node("Softmax", [seen], f"{at}.shares", axis=-1), values], f"{at}.mixed")
    joined = b.node("Transpose", [mixed], f"{at}.joined", perm=[0, 2, 1, 3])
    joined = b.node("Reshape", [joined, b.constant("heads.joined", [0, 0, h])], f"{at}.flat")
    return b.matmul(joined, f"{layer}.o_proj.weight", h, h, at)


def _ffn(b: GraphBuilder, x: str, i: int, model: Model) -> str:
    h, f, at, layer = model.hidden_size, model.ffn_hidden_size, f"layers.{i}.ffn", f"model.layers.{i}.mlp"
    gate = b.matmul(x, f"{layer}.gate_proj.weight", f, h, f"{at}.gate")
    silu = b.node("Mul", [gate, b.node("Sigmoid", [gate], f"{at}.sigmoid")], f"{at}.silu")
    inner = b.node("Mul", [silu, b.matmul(x, f"{layer}.up_proj.weight", f, h, f"{at}.up")], f"{at}.inner")
    return b.matmul(inner, f"{layer}.down_proj.weight", h, f, at)


def _interface(model: Model) -> tuple[list[Any], list[Any]]:
    def told(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    cache = [f"{i}.{part}" for i in range(model.num_layers) for part in ("key", "value")]
    heads, size = model.num_attention_heads, model.head_dim
    past, total = (("batch_size", heads, f"{length}_sequence_length", size) for length in ("past", "total"))
    inputs = [
        told("input_ids", TensorProto.INT64, "batch_size", "sequence_length"),
        told("attention_mask", TensorProto.INT64, "batch_size", "total_sequence_length"),
        told("position_ids", TensorProto.INT64, "batch_size", "sequence_length"),
        *(told(f"past_key_values.{c}", TensorProto.FLOAT, *past) for c in cache),
    ]
    outputs = [
        told("logits", TensorProto.FLOAT, "batch_size", "sequence_length", model.vocab_size),
        *(told(f"present.{c}", TensorProto.FLOAT, *total) for c in cache),
    ]
    return inputs, outputs
