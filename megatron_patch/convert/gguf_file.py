"""A checkpoint as a GGUF file: what llama.cpp, Ollama and LM Studio run.

llama.cpp knows no architecture whose layers share an FFN and refuses a file in which tensors overlap, so every layer of
its `llama` gets a copy of the FFN that it uses. Written tensor by tensor: nothing is in memory but the tensor at hand
and the copies' bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import quantize

from megatron_patch.convert.export import ControlIds, provenance, write_tokenizer
from megatron_patch.convert.ggml_vocab import ggml_vocab
from megatron_patch.convert.names import HfTensor, hf_tensors
from megatron_patch.convert.new_file import new_file
from megatron_patch.convert.source import ConvertError, WeightsSource
from megatron_patch.recipe import Model

RECIPE_KEY = "mobillama.recipe"
PROVENANCE_KEY = "mobillama.provenance"
"""What `import` reads back; llama.cpp passes over keys it does not know."""

_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
}
_FALLBACK = GGMLQuantizationType.F16


def write_gguf(source: WeightsSource, file: Path, tokenizer: Path, quantize_as: str | None = None) -> list[str]:
    """Writes `file`, whole or not at all.

    Matrices and embeddings are stored as `quantize_as` (`q8_0`), by default in the source's own precision; norms in
    fp32, as llama.cpp wants them.

    Returns:
        Names of tensors that are stored in fp16, their rows being no multiple of a block.

    Raises:
        ConvertError: `file` exists, a weight is not finite, or the tokenizer is not one that llama.cpp knows.
        DataError: the tokenizer cannot be read, or another process writes `file`.
    """
    model = source.recipe.model
    kind = GGMLQuantizationType[(quantize_as or ("bf16" if source.recipe.precision == "bf16" else "f32")).upper()]
    tensors = hf_tensors(model, "expanded")
    kinds = {tensor.name: _kind_of(tensor, kind) for tensor in tensors}
    with new_file(file) as folder:
        ids = write_tokenizer(tokenizer, folder, model)
        writer = gguf.GGUFWriter(folder / file.name, "llama")
        _describe(writer, source, kind)
        _describe_tokenizer(writer, folder, model, ids, str(tokenizer))
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.num_layers)
        for tensor in tensors:
            name = names.get_name(tensor.name, (".weight",))
            assert name is not None, tensor.name
            size = _nbytes(tensor.shape, kinds[tensor.name])
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, kinds[tensor.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for content in _contents(source, tensors, kinds):
            writer.write_tensor_data(content)
        writer.close()
    return [name for name, stored in kinds.items() if stored is _FALLBACK and kind is not _FALLBACK]


def _kind_of(tensor: HfTensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return _FALLBACK if tensor.shape[-1] % block else kind


def _nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size


def _contents(
    source: WeightsSource, tensors: list[HfTensor], kinds: dict[str, GGMLQuantizationType]
) -> Iterator[np.ndarray]:
    """Each tensor as it lies in the file; what several layers use is read and quantized once."""
    model = source.recipe.model
    uses = Counter((tensor.whole, tensor.part) for tensor in tensors)
    again: dict[tuple[str, int | None], np.ndarray] = {}
    name, whole = "", torch.empty(0)  # q, k and v are cut from one tensor
    for tensor in tensors:
        place = (tensor.whole, tensor.part)
        uses[place] -= 1
        content = again.pop(place, None)
        if content is None:
            if tensor.whole != name:
                del whole
                name, whole = tensor.whole, source.tensor(tensor.whole)
            content = _stored(tensor, whole, kinds[tensor.name], model)
        if uses[place]:
            again[place] = content
        yield content


def _stored(tensor: HfTensor, whole: torch.Tensor, kind: GGMLQuantizationType, model: Model) -> np.ndarray:
    values = tensor.cut(whole, model).float()
    if not values.isfinite().all():
        raise ConvertError(f"{tensor.whole}: holds values that are not finite; export a checkpoint before it diverged")
    if tensor.name.endswith(("q_proj.weight", "k_proj.weight")):
        values = _interleaved(values, model.num_attention_heads)
    if kind is GGMLQuantizationType.BF16:  # torch rounds to nearest even, as training did
        return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if kind is not GGMLQuantizationType.F32 and values.abs().max() > torch.finfo(torch.float16).max:
        # The scales of blocks are fp16 too.
        raise ConvertError(f"{tensor.name}: holds values beyond fp16's 65,504; export it without --quantize")
    return quantize(np.ascontiguousarray(values.numpy()), kind)


def _interleaved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k for llama.cpp, which rotates neighbours of a head where Hugging Face rotates its halves."""
    return values.view(heads, 2, -1, values.shape[-1]).transpose(1, 2).reshape(values.shape)


def _describe(writer: gguf.GGUFWriter, source: WeightsSource, kind: GGMLQuantizationType) -> None:
    model = source.recipe.model
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.recipe.name)
    writer.add_license("apache-2.0")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(model.sequence_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.ffn_hidden_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_attention_heads)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(model.vocab_size)
    writer.add_string(RECIPE_KEY, source.recipe.to_yaml())
    writer.add_string(PROVENANCE_KEY, json.dumps(provenance(source, "gguf")))


def _describe_tokenizer(writer: gguf.GGUFWriter, folder: Path, model: Model, ids: ControlIds, named: str) -> None:
    """`folder` holds what `write_tokenizer` wrote; BOS and EOS are added to no text, as in training."""
    vocab = ggml_vocab((folder / "tokenizer.json").read_text(encoding="utf-8"), model.vocab_size, named)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocab.pieces)
    writer.add_token_scores(vocab.scores)
    writer.add_token_types(vocab.types)
    writer.add_eos_token_id(ids.eos)
    if ids.bos is not None:
        writer.add_bos_token_id(ids.bos)
    if ids.unk is not None:
        writer.add_unk_token_id(ids.unk)
        writer.add_pad_token_id(ids.unk)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocab.space_prefix)
    if template := chat_template(folder):
        writer.add_chat_template(template)


def chat_template(folder: Path) -> str | None:
    """The chat template of an exported tokenizer; None of a base model's."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
    return found if isinstance(found, str) else None
