"""Import what ranks need once, in the parent they are forked from; one thread a process, as OpenMP survives no fork."""

import warnings

import torch

torch.set_num_threads(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron_patch.train.step  # noqa: F401
