"""`python -m tests.evaluate.stock HF_FOLDER RESULTS.json`: stock lm-evaluation-harness on a Hugging Face folder.

The harness's own model, tasks and data sets (from the hub that HF_ENDPOINT names); only the two tasks that the harness
lacks are ours. Writes its results by task and group, and the digest of each task's prompts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megatron_patch.evaluate.run import prompts_digest
from megatron_patch.evaluate.suite import CROWS_PAIRS_BIASES

TASKS_BY_SHOTS = {
    0: ["truthfulqa_mc2", "crows_pairs_english", *(f"crows_pairs_english_{bias}" for bias in CROWS_PAIRS_BIASES),
        "piqa", "race", "social_iqa", "race_analysis360", "siqa_analysis360"],
    5: ["mmlu", "winogrande"],
    10: ["hellaswag"],
    25: ["arc_challenge"],
}  # fmt: skip


def main(folder: str, output: str) -> None:
    model = HFLM(folder, device="cpu", batch_size=4, prefix_token_id=2, add_bos_token=False)
    manager = TaskManager(include_path="megatron_patch/evaluate/tasks")
    results, prompts = {}, {}
    for shots, tasks in TASKS_BY_SHOTS.items():
        report = simple_evaluate(model, tasks=tasks, num_fewshot=shots, task_manager=manager)
        results |= report["results"]
        prompts |= {task: prompts_digest(samples) for task, samples in report["samples"].items()}
    Path(output).write_text(json.dumps({"results": results, "prompts": prompts}, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
