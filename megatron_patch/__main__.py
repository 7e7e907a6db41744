"""`python -m megatron_patch VERB ...`."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

from data_tools.files.empty_words import empty_word
from data_tools.files.errors import DataError
from megatron_patch import arguments
from megatron_patch.launch import LaunchError, complain
from megatron_patch.train import signals

# Megatron-Core says in every process, several times, that apex and Transformer Engine are missing. Neither is needed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# torch 2.13 has new names for collectives that Megatron-Core and torch 2.11 know by the old ones.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


class Verb(NamedTuple):
    """A verb's module, imported only when it is called for: some need torch and Megatron (seconds)."""

    module: str  # has main
    help: str
    example: str  # a whole command
    arguments: Callable[[argparse.ArgumentParser], None] | None = None  # add_arguments of the module, where it is None


VERBS = {
    "plan": Verb(
        "megatron_patch.plan.command",
        "what a recipe needs on a cluster: memory, time, bytes, storage",
        "python -m megatron_patch plan recipes/mobillama_05b.yaml --nodes 20 --gpus a100-80g-2-ports",
    ),
    "check": Verb(
        "megatron_patch.preflight.command",
        "find sick nodes (under srun or torchrun, one process a rank)",
        "torchrun --standalone --nproc-per-node 8 -m megatron_patch check recipes/mobillama_05b.yaml",
        arguments.check,
    ),
    "status": Verb("megatron_patch.run.status", "how runs stand", "python -m megatron_patch status runs/mobillama_05b"),
    "summary": Verb(
        "megatron_patch.report.summary",
        "what a finished run reached: table, loss curve, a sample of its text",
        "python -m megatron_patch summary demo/run --prompt 'The function returns'",
        arguments.summary,
    ),
    "chat": Verb(
        "megatron_patch.report.chat",
        "talk with a model tuned on conversations",
        "python -m megatron_patch chat demo/chat_run",
        arguments.chat,
    ),
    "export": Verb(
        "megatron_patch.convert.export_command",
        "a checkpoint for transformers, llama.cpp (GGUF) or ONNX Runtime",
        "python -m megatron_patch export runs/mobillama_05b/checkpoints/ckpt_359 mobillama-05b --form expanded",
        arguments.export,
    ),
    "import": Verb(
        "megatron_patch.convert.import_command",
        "a Hugging Face folder or a GGUF file as a checkpoint",
        "python -m megatron_patch import MobiLlama-05B imported/mobillama_05b --recipe recipes/mobillama_05b.yaml",
        arguments.import_,
    ),
    "device": Verb(
        "megatron_patch.devices.command",
        "run exported forms in their runtimes: same tokens? what quality, speed and memory?",
        "python -m megatron_patch device runs/mobillama_05b/checkpoints/ckpt_359 q4_0.gguf onnx-int4 --threads 1 2",
    ),
    "eval": Verb(
        "megatron_patch.evaluate.command",
        "score models on the paper's nine benchmarks; print its tables",
        "python -m megatron_patch eval runs/mobillama_05b/checkpoints/ckpt_359 --data benchmarks_data",
    ),
    "report": Verb(
        "megatron_patch.report.command",
        "a run as one HTML file; models side by side with the paper's",
        "python -m megatron_patch report runs/mobillama_05b --evaluations evaluations",
    ),
    "loss_compare": Verb(
        "megatron_patch.report.loss_compare",
        "the losses of two runs, compared step by step.",
        "python -m megatron_patch loss_compare runs/before runs/after --assert-equal",
    ),
    "train": Verb(
        "megatron_patch.train.loop",
        "train a recipe (under torchrun or srun, one process a rank)",
        "torchrun --standalone --nproc-per-node 4 -m megatron_patch train recipes/demo.yaml run.folder=runs/trial",
        arguments.train,
    ),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_patch", description="MobiLlama pre-training")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.help, add_help=False)
    known, rest = parser.parse_known_args(argv)
    name, verb = known.verb, VERBS[known.verb]
    if nothing := empty_word(rest):
        print(f"{name}: {nothing}", file=sys.stderr)
        return 2
    if name == "train":
        signals.hold()  # before the seconds that the imports take
    sub = argparse.ArgumentParser(
        prog=f"python -m megatron_patch {name}",
        description=verb.help,
        epilog=f"example:\n  {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if verb.arguments is None:
        importlib.import_module(verb.module).add_arguments(sub)
    else:
        verb.arguments(sub)
    parsed = sub.parse_intermixed_args(rest)  # ends here for --help and what is refused, before seconds of imports
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sample of text may hold what the terminal cannot show
    try:
        return int(importlib.import_module(verb.module).main(parsed))
    except LaunchError as error:
        complain(f"refused: {error}")
        return 2
    except DataError as error:  # a file that is written last, on a full disk
        complain(f"{name}: {error}")
        return 1
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        complain(f"{name}: {error.filename}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
