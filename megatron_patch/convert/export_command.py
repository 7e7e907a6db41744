"""`python -m megatron_patch export`: a checkpoint in the form that a runtime reads.

    CHECKPOINT FOLDER --form expanded      a Hugging Face folder for stock `LlamaForCausalLM`, an FFN in every layer
    CHECKPOINT FOLDER --form shared        the same with one FFN, for `trust_remote_code=True`; both: --dtype fp16
    CHECKPOINT FILE.gguf --form gguf       llama.cpp, Ollama, LM Studio; --quantize q4_0 and others
    CHECKPOINT FOLDER --form onnx          ONNX Runtime, transformers.js; one FFN in the file; --quantize int8, int4
    CHECKPOINT FILE.pte --form executorch  phones; one FFN in the file; --quantize 8da4w, --context 512

Runs on one process without a GPU, whatever layout wrote the checkpoint; a few tensors are in memory at a time
(of ExecuTorch: the model).
"""

from __future__ import annotations

import argparse
import sys

from megatron_patch.arguments import QUANTIZATIONS
from megatron_patch.convert.export import export, tokenizer_of
from megatron_patch.convert.source import ConvertError
from megatron_patch.results import read_scores
from megatron_patch.run.pace import Pace
from megatron_patch.run.planned import measured_energy
from megatron_patch.train.checkpoint.reader import Checkpoint, open_checkpoint

_EXTRAS = {"gguf": "devices", "onnx": "devices", "executorch": "executorch", "torchao": "executorch"}
"""Packages that not every installation has, and which extra brings each."""


def main(args: argparse.Namespace) -> int:
    """Exit code 2: refused, with the remedy."""
    try:
        if (args.checkpoint / "checkpoints").is_dir():
            raise ConvertError(
                f"{args.checkpoint}: a run; name one of the checkpoints in {args.checkpoint}/checkpoints"
            )
        kinds = QUANTIZATIONS.get(args.form, ())
        if args.quantize and args.quantize not in kinds:
            raise ConvertError(
                f"--quantize {args.quantize}: --form {args.form} has "
                + (f"{', '.join(kinds)}" if kinds else f"none; choose --form {' or '.join(QUANTIZATIONS)}")
            )
        if args.dtype and kinds:
            raise ConvertError(
                f"--dtype {args.dtype}: of Hugging Face's forms; --form {args.form} has --quantize {', '.join(kinds)}"
            )
        if args.context and args.form != "executorch":
            raise ConvertError(f"--context {args.context}: of --form executorch alone, whose cache has a fixed length")
        with open_checkpoint(args.checkpoint) as checkpoint:
            _write(checkpoint, args)
    except ValueError as error:  # ConvertError, CheckpointError, DataError
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        if missing not in _EXTRAS:
            raise
        print(f"refused: --form {args.form} needs {missing}; pip install -e '.[{_EXTRAS[missing]}]'", file=sys.stderr)
        return 2
    print(f"{args.output}: written ({' '.join(filter(None, (args.form, args.quantize, args.dtype)))})", file=sys.stderr)
    return 0


def _write(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    tokenizer = args.tokenizer or tokenizer_of(checkpoint.recipe)
    if args.form == "gguf":
        from megatron_patch.convert.gguf_file import write_gguf

        kept = write_gguf(checkpoint, args.output, tokenizer, args.quantize)
        if kept:
            print(f"{len(kept)} tensors of no whole blocks stay in f16: {', '.join(kept)}", file=sys.stderr)
        return
    if args.form == "onnx":
        from megatron_patch.convert.onnx_folder import write_onnx

        write_onnx(checkpoint, args.output, tokenizer, args.quantize)
        return
    if args.form == "executorch":
        from megatron_patch.convert.executorch_file import write_executorch

        write_executorch(checkpoint, args.output, tokenizer, args.quantize, args.context)
        return
    scores = next((s for s in read_scores(args.evaluations) if s["digest"] == checkpoint.digest), None)
    run = checkpoint.folder.parent.parent
    energy = measured_energy(run, Pace.of(run / "log.jsonl", checkpoint.step))
    export(checkpoint, args.output, args.form, tokenizer, scores, args.dtype, energy)
