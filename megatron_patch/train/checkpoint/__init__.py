"""Checkpoints: `format` says what stands in a folder, `reader` opens one, the other modules write and restore them."""

from megatron_patch.train.checkpoint.format import CheckpointError
from megatron_patch.train.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_patch.train.checkpoint.write import write_weights

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint", "write_weights"]
