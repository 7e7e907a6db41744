"""A CUDA device where there is none: its tensors have shapes, dtypes and storages of true sizes, and no numbers.

torch's FakeTensorMode gives such tensors, whose operations refuse a mixture of devices and a read by the host. What it
lacks to run a whole training step stands here: streams, events and statistics of the device; an answer to autograd,
which asks a build without CUDA about its streams; pinned memory; and what writes into tensors that are there already,
so that nothing has to be computed: the launch of a Triton kernel, and a GEMM that adds in fp32. Collectives go to
torch's "fake" process group.

Patches stay: call `become_gpu` in a process forked for it (tests/ranks.py).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import deepspeed.accelerator
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random
from torch._subclasses import fake_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_patch.parallel import device

GPU, META = torch.device("cuda", 0), torch.device("meta")
ALLOCATION = 512  # the CUDA allocator's sizes are multiples of it


class HostWaits(AssertionError):
    """The host reads a number of the device's, or copies from memory that is not pinned."""


class Gpu:
    """What the pretended device has done."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0
        self.launches: list[str] = []
        self.may_wait = True
        self._sizes: dict[int, int] = {}

    @contextmanager
    def no_waits(self) -> Iterator[None]:
        self.may_wait = False
        try:
            yield
        finally:
            self.may_wait = True

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is gone; called again, its present size."""
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._count, key, 0)
        self._count(key, -(-storage.nbytes() // ALLOCATION) * ALLOCATION)

    def _count(self, key: int, size: int) -> None:
        self.allocated += size - self._sizes.pop(key, 0)
        if size:
            self._sizes[key] = size
        self.peak = max(self.peak, self.allocated)


class _Tensors(fake_tensor.FakeTensorMode):
    """Tensors without numbers. C++ is told "meta" where Python reads "cuda:0": autograd asks a meta device nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.addmm.dtype_out:
            return _gemm_in_place(*args, **kwargs)
        if kwargs.get("device") == META and not func.overloadpacket.__name__.endswith("_like"):  # DeepSpeed means meta
            kwargs["device"] = GPU
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Allocator(TorchDispatchMode):
    """Counts what operations allocate on the device; what they are made of inside torch is not seen from here."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        for tensor in tree_iter(answer):
            if isinstance(tensor, torch.Tensor) and tensor.device == GPU:
                self._gpu.hold(tensor.untyped_storage())
        return answer


def _watch_host(gpu: Gpu) -> None:
    """Every number that is read is 0; memory is pinned in name; a copy for which the host waits is refused."""
    fake, plain = fake_tensor.FakeTensor, torch.Tensor

    def reading(name: str) -> Any:
        def read(tensor: torch.Tensor) -> Any:
            if tensor.device == GPU and not gpu.may_wait:
                raise HostWaits(f"{name} of a tensor on the GPU")
            if name in ("numpy", "tolist"):
                zeros = np.zeros(tuple(tensor.shape))
                return zeros if name == "numpy" else zeros.tolist()
            return {"__bool__": bool, "__int__": int, "__index__": int}.get(name, float)()

        return read

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device.type == "cpu"
        tensor.pinned = True
        return tensor

    def check(source: torch.device, target: torch.device, host: torch.Tensor, goes_on: bool) -> None:
        crosses = (source.type == "cpu") != (target.type == "cpu")
        if crosses and not gpu.may_wait and not (goes_on and getattr(host, "pinned", False)):
            raise HostWaits("a copy between host and device that the host waits for")

    def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        check(source.device, target.device, target if source.device == GPU else source, non_blocking)
        return plain.copy_(target, source, non_blocking)

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        wished = kwargs.get("device", args[0] if args else None)
        if isinstance(wished, torch.device | str):
            check(tensor.device, torch.device(wished), tensor, kwargs.get("non_blocking", False))
        return plain.to(tensor, *args, **kwargs)

    def making(make: Any) -> Any:
        def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            if type(kwargs.get("device")) is int:  # as Megatron-Core gives it
                kwargs["device"] = GPU
            tensor = make(*args, **kwargs)
            return pin(tensor) if pin_memory else tensor

        return made

    torch.equal = lambda one, other: not reading("equal")(one)
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        setattr(fake, name, reading(name))
    fake.pin_memory, fake.copy_, fake.to = pin, copy, to
    fake.is_cuda = property(lambda tensor: tensor.device == GPU)  # C++ would answer for META
    torch.utils._device._device_constructors()  # keeps, from now on, the functions that `with device:` concerns
    for name in ("empty", "zeros", "ones", "arange", "tensor"):
        setattr(torch, name, making(getattr(torch, name)))


class _Queue:
    """A stream or an event: nothing is queued, so nothing has to be waited for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def elapsed_time(self, _: Any) -> float:
        return 1000.0


@contextmanager
def become_gpu(world_size: int = 1, rank: int = 0, memory: int = 80 * 2**30) -> Iterator[Gpu]:
    """Let this process believe that it has a GPU, and that it is a rank among others whose answers are never read."""
    gpu = Gpu()
    _pretend_cuda(gpu, memory)
    _watch_host(gpu)
    _answer_autograd()
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank % 8))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    tensors, from_numpy = _Tensors(), torch.from_numpy
    torch.from_numpy = lambda array: tensors.from_tensor(from_numpy(array))
    with tensors, _Allocator(gpu):
        yield gpu


def _pretend_cuda(gpu: Gpu, memory: int) -> None:
    device.HAS_GPU = True
    properties = SimpleNamespace(total_memory=memory, multi_processor_count=132, name="H100", major=9, minor=0)
    nothing = ("synchronize", "manual_seed", "empty_cache", "reset_peak_memory_stats")
    for name in (*nothing, "set_sync_debug_mode"):
        setattr(torch.cuda, name, lambda *_: None)

    # As a torch for the CPU answers: where one for CUDA saw a device, torch itself would turn to the driver.
    torch.cuda.is_available = lambda: False

    def set_device(wished: Any) -> None:
        assert torch.device("cuda", wished) == GPU, f"there is no GPU {wished}"

    torch.cuda.set_device = set_device
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.Event = torch.cuda.Stream = _Queue
    torch.cuda.stream = lambda _: nullcontext()
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_name = lambda *_: properties.name
    torch.cuda.memory_allocated = lambda *_: gpu.allocated
    torch.cuda.max_memory_allocated = lambda *_: gpu.peak
    torch.cuda.memory_reserved = torch.cuda.max_memory_reserved = lambda *_: gpu.peak
    random_state = torch.get_rng_state()
    torch.cuda.get_rng_state = lambda *_: random_state
    random._get_cuda_rng_state = lambda *_, **__: random_state
    random._set_cuda_rng_state = lambda *_, **__: None
    random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()  # compares states of the CPU's generator, real numbers
    schedules.torch = torch
    CUDA_Accelerator.is_available = lambda _: True
    deepspeed.accelerator.set_accelerator(CUDA_Accelerator())
    torch.nn.Module.to = _to
    torch.nn.functional.scaled_dot_product_attention = _flash_attention
    _skip_launches(gpu)
    resize = torch.UntypedStorage.resize_

    def counted(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        answer = resize(storage, size)
        gpu.hold(storage)
        return answer

    torch.UntypedStorage.resize_ = counted


def _to(module: torch.nn.Module, target: torch.device) -> torch.nn.Module:
    """Module.to, which would exchange what a tensor without numbers is for another and may not."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.device != target:
                    moved = tensor.detach().to(target)
                    held[name] = torch.nn.Parameter(moved) if held is part._parameters else moved
    return module


def _flash_attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
    """What torch takes on a GPU where no mask shuts it out; a CPU would form the whole matrix of scores."""
    assert attn_mask is None and options["is_causal"], "a mask instead of is_causal: flash attention cannot be taken"
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, 0.0, True, scale=options.get("scale"))[0]


def _gemm_in_place(
    total: torch.Tensor, one: torch.Tensor, other: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor
) -> torch.Tensor:
    """addmm with an `out_dtype` (kernels/weight_gradient.py), for which torch 2.11 has no fake answer."""
    assert total is out and total.shape == (one.shape[0], other.shape[1]) and one.shape[1] == other.shape[0]
    assert total.dtype == out_dtype == torch.float32 and one.dtype == other.dtype == torch.bfloat16
    assert total.device == one.device == other.device
    return out


def _answer_autograd() -> None:
    handlers, dispatch = fake_tensor._DISPATCH_META_HANDLERS, fake_tensor.FakeTensor.__torch_dispatch__.__func__
    asks_device = torch.ops.prim.device.default

    def told(answer: Any) -> Any:
        return META if answer == GPU else answer

    def of_tensor(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = dispatch(cls, func, types, args, kwargs or {})
        return told(answer) if func is asks_device else answer

    handlers[asks_device] = lambda args: told(fake_tensor._device_handler(args))
    fake_tensor.FakeTensor.__torch_dispatch__ = classmethod(of_tensor)


def _skip_launches(gpu: Gpu) -> None:
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, **_: Any) -> None:
        for tensor in args:
            assert not isinstance(tensor, torch.Tensor) or tensor.device == GPU, f"{kernel.__name__}: {tensor.device}"
        assert all(0 < n < 2**31 for n in grid)
        gpu.launches.append(kernel.__name__)

    for kind in (InterpretedFunction, JITFunction):
        kind.run = run
        kind.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: run(kernel, *args, grid=grid, **kwargs)
