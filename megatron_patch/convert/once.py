"""What the forms that store each weight once (ONNX, ExecuTorch) share: what they can quantize, and how they read."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_patch.convert.names import HfTensor
from megatron_patch.convert.source import ConvertError, WeightsSource


def check_rows(tensors: dict[str, HfTensor], size: int, units: str, quantize_as: str) -> None:
    """Raises ConvertError where a matrix has rows of no whole number of `units` (blocks, groups) of `size` weights."""
    for tensor in tensors.values():
        if len(tensor.shape) == 2 and tensor.shape[1] % size:
            raise ConvertError(
                f"--quantize {quantize_as}: rows of {tensor.name} have {tensor.shape[1]} weights, no whole number "
                f"of {units} of {size}; leave --quantize out"
            )


def wholes(source: WeightsSource, tensors: dict[str, HfTensor]) -> Iterator[tuple[str, HfTensor, torch.Tensor]]:
    """Each weight with the whole tensor it is cut from, read once for the parts that follow each other.

    Raises ConvertError where a tensor is not finite.
    """
    name, whole = "", torch.empty(0)
    for first, tensor in tensors.items():
        if tensor.whole != name:
            del whole
            name, whole = tensor.whole, source.tensor(tensor.whole)
            if not whole.isfinite().all():
                raise ConvertError(f"{name}: holds values that are not finite; export a checkpoint before it diverged")
        yield first, tensor, whole
