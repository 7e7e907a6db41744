"""`python -m megatron_patch VERB ...`."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings

from megatron_patch.train import signals

# Megatron-Core says in every process, several times, that apex and Transformer Engine are missing. Neither is needed.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# torch 2.13 has new names for collectives that Megatron-Core and torch 2.11 know by the old ones.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

# Verb -> (module with add_arguments and main, help). A verb's module is imported only when it is called for: some
# need torch and Megatron (seconds), some must start at once.
VERBS = {
    "plan": ("megatron_patch.plan", "what a recipe needs on a cluster: memory, time, bytes, storage"),
    "check": ("megatron_patch.preflight", "find sick nodes (under srun or torchrun, one process a rank)"),
    "status": ("megatron_patch.status", "how runs stand"),
    "summary": ("megatron_patch.summary", "what a finished run reached: table, loss curve, a sample of its text"),
    "export": ("megatron_patch.convert.export", "a checkpoint as a Hugging Face folder"),
    "import": ("megatron_patch.convert.imported", "a Hugging Face folder as a checkpoint"),
    "eval": ("megatron_patch.evaluate.command", "score models on the paper's nine benchmarks; print its tables"),
    "report": ("megatron_patch.report.command", "a run as one HTML file; models side by side with the paper's"),
    "loss_compare": ("megatron_patch.loss_compare", "do two runs lose alike, step by step?"),
    "train": ("megatron_patch.train.loop", "train a recipe (under torchrun or srun, one process a rank)"),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_patch", description="MobiLlama pre-training")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, text) in VERBS.items():
        verbs.add_parser(verb, help=text, add_help=False)
    known, rest = parser.parse_known_args(argv)
    if known.verb == "train":
        signals.hold()  # before the seconds that the imports take
    module = importlib.import_module(VERBS[known.verb][0])
    sub = argparse.ArgumentParser(prog=f"python -m megatron_patch {known.verb}", description=VERBS[known.verb][1])
    module.add_arguments(sub)
    return module.main(sub.parse_intermixed_args(rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
