"""Import what ranks need once, in the parent they are forked from; one thread a process, as OpenMP survives no fork."""

import os
import warnings

import torch

if os.environ.get("TESTS_ON_GPU") != "1":  # the suite is a CPU's: several ranks would take one GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first asks for GPUs
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which DeepSpeed does
torch.set_num_threads(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron_patch.train.step  # noqa: F401
