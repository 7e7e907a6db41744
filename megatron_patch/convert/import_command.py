"""`python -m megatron_patch import`: a Hugging Face folder or a GGUF file as a checkpoint.

Nothing is written before every key and tensor is judged and a forward pass agrees with that of `transformers`.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_patch.convert.forward import compare
from megatron_patch.convert.imported import ImportedModel, recipe_of
from megatron_patch.convert.source import ConvertError
from megatron_patch.train.checkpoint.write import write_weights


def main(args: argparse.Namespace) -> int:
    """Exit code 2: refused, with the remedy."""
    try:
        if os.path.lexists(args.checkpoint):
            raise ConvertError(f"{args.checkpoint}: exists; choose another folder, or remove it")
        source = ImportedModel(args.folder, recipe_of(args.folder, args.recipe))
        print(compare(source), file=sys.stderr)
        write_weights(source, args.checkpoint)
    except ValueError as error:  # ConvertError, CheckpointError, RecipeError
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        print(f"refused: {args.folder}: a file needs gguf; pip install -e '.[devices]'", file=sys.stderr)
        return 2
    tied = "; tied: the head is a copy of the embedding, which training lets part" if source.is_tied else ""
    rounded = f"; its weights were rounded to {found}" if (found := source.weights.rounded) else ""
    print(f"{args.checkpoint}: written from {args.folder} ({source.form}{tied}{rounded})", file=sys.stderr)
    return 0
