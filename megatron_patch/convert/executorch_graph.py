"""The decoder as `torch.export` takes it: a KV cache of fixed length in it, each weight once, one row at a time.

Its input and output are those that ExecuTorch's own runner of text models asks for:

    forward(input_ids int64 [1, sequence], cache_position int64 [sequence]) -> logits fp32 [1, sequence, vocab]

`cache_position` counts on from the ids before; 0 begins anew. What lies in the cache behind it is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

from megatron_patch.convert.names import hf_tensors, name_stored_once
from megatron_patch.recipe import Model


class Decoder(nn.Module):
    """The model of a recipe, in fp32.

    A layer has no weights of its own object: it looks them up by Hugging Face's name, under which the layers that share
    an FFN find the same one.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, model: Model, weights: Mapping[str, torch.Tensor], context: int) -> None:
        """`weights` as `stored_once` names them; `context`: ids that the cache holds."""
        super().__init__()
        self.model, self.context = model, context
        self.stored = {
            tensor.name: name_stored_once(tensor).replace(".", "_") for tensor in hf_tensors(model, "expanded")
        }
        self.linears = nn.ModuleDict()
        for name, weight in weights.items():
            name = name.replace(".", "_")
            if weight.ndim == 1:
                self.register_buffer(name, weight)
            elif name == self.stored["model.embed_tokens.weight"]:
                self.embedding: nn.Embedding | Int8Embedding = nn.Embedding.from_pretrained(weight)
            else:
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(weight, requires_grad=False)
                self.linears[name] = linear
        for i in range(model.num_layers):
            for part in ("keys", "values"):
                empty = torch.zeros(1, model.num_attention_heads, context, model.head_dim)
                self.register_buffer(f"{part}_{i}", empty)
        inverse = model.rope_base ** -(torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim)
        angles = torch.arange(context)[:, None] * torch.cat([inverse, inverse])
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", angles.sin().float())

    def forward(self, input_ids: torch.Tensor, cache_position: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[cache_position], self.sin[cache_position]
        # Added, as XNNPACK takes it; beside it every score is nothing.
        unseen = (torch.arange(self.context) > cache_position[:, None]).float() * -1e9
        x = self.embedding(input_ids)
        for i in range(self.model.num_layers):
            layer = f"model.layers.{i}"
            y = self._norm(x, f"{layer}.input_layernorm")
            x = x + self._attention(y, i, cache_position, cos, sin, unseen)
            y = self._norm(x, f"{layer}.post_attention_layernorm")
            silu = functional.silu(self._linear(y, f"{layer}.mlp.gate_proj"))
            x = x + self._linear(silu * self._linear(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
        return self._linear(self._norm(x, "model.norm"), "lm_head")

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        found: torch.Tensor = self.linears[self.stored[f"{name}.weight"]](x)
        return found

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        mean = x.square().mean(-1, keepdim=True)
        weight: torch.Tensor = getattr(self, self.stored[f"{name}.weight"])
        return x * torch.rsqrt(mean + self.model.norm_epsilon) * weight

    def _attention(
        self,
        x: torch.Tensor,
        i: int,
        position: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unseen: torch.Tensor,
    ) -> torch.Tensor:
        _, length, hidden = x.shape

        def heads(part: str) -> torch.Tensor:
            flat = self._linear(x, f"model.layers.{i}.self_attn.{part}_proj")
            return flat.view(1, length, self.model.num_attention_heads, self.model.head_dim).transpose(1, 2)

        def rotated(states: torch.Tensor) -> torch.Tensor:
            first, second = states.chunk(2, -1)
            return states * cos + torch.cat([-second, first], -1) * sin

        keys, values = getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")
        keys.index_copy_(2, position, rotated(heads("k")))
        values.index_copy_(2, position, heads("v"))
        scores = rotated(heads("q")) @ keys.transpose(2, 3) * self.model.head_dim**-0.5
        mixed = torch.softmax(scores + unseen, -1) @ values
        return self._linear(mixed.transpose(1, 2).reshape(1, length, hidden), f"model.layers.{i}.self_attn.o_proj")


class Int8Embedding(nn.Module):
    """Rows of int8 with a scale each: a quarter of the bytes of the one table that no matrix product reads."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        scales = weight.abs().amax(1, keepdim=True) / 127
        codes = torch.where(scales == 0, 0, weight / scales).round().to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        codes = functional.embedding(ids, self.codes)
        return codes.float() * functional.embedding(ids, self.scales)
