"""A GPU that is not there: tensors that say they are on one, and refuse what a GPU's would refuse.

Their numbers lie in host memory, and every operation is done there, gradients included. So a test
sees, on a machine without a GPU, where a tensor of the host meets one of the device, where numpy
reads one, and where another device's generator draws. It says nothing about kernels, streams, time
or memory, and cannot hold what torch makes in C++ beside Python: DDP's buckets in bf16, DTensors,
DeepSpeed.

Any test runs on it: `PYTHONPATH=tests pytest -p pretend_cuda tests/test_detect.py -k TEST`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

HOST = torch.device("cpu")
GPU = torch.device("cuda", 0)
aten = torch.ops.aten

# copies go from anywhere to anywhere
COPIES = {aten.copy_, aten.copy, aten._to_copy, aten._foreach_copy_, aten._foreach_copy}
# indices may stay on the host
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# a number of the host, a tensor without dimensions, may join these
WITH_A_NUMBER = {
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.pow, aten.remainder, aten.fmod),
    *(aten.add_, aten.sub_, aten.mul_, aten.div_, aten.maximum, aten.minimum, aten.where),
    *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge),
}


# tensors that were copied to the GPU from memory that is not page-locked: the host waits for it
waited_for: list[str] = []


class _Backward(threading.local):
    """The backward pass of this thread."""

    on_gpu = False


_backward = _Backward()
BACKWARDS = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)


class DevicesMix(RuntimeError):
    """What a GPU would have refused."""


class OnGPU(Tensor):
    """A tensor that says it is on the GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(values: Tensor) -> Tensor:
        """The same memory, said to be the GPU's."""
        return torch.Tensor._make_subclass(OnGPU, values, values.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return GPU.index

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __format__(self, how: str) -> str:
        return format(self.item(), how) if self.ndim == 0 else str(self)

    def __repr__(self, **_: Any) -> str:
        return f"OnGPU({self.cpu()!r})"

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return aten._to_copy(self, device=HOST)

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def pin_memory(self, *_: Any) -> Tensor:
        raise DevicesMix("only host memory is pinned")

    def record_stream(self, stream: Any) -> None:
        pass

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for each in args:
            if isinstance(each, Tensor):
                device, dtype = each.device, each.dtype
            elif isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, str | torch.device):
                device = torch.device(each)
        layout = kwargs.get("memory_format")
        if device is not None and torch.device(device).type != "cuda":
            return aten._to_copy(self, device=device, dtype=dtype, memory_format=layout)
        is_same = dtype in (None, self.dtype) and layout is None and not kwargs.get("copy")
        return self if is_same else aten._to_copy(self, dtype=dtype, memory_format=layout)


def _dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation, in host memory; what comes of it is where it would be."""
    asked = kwargs.get("device")
    where = None if asked is None else torch.device(asked).type
    if where == "cpu" and _backward.on_gpu and torch._C._current_autograd_node() is not None:
        where = "cuda"  # a backward pass makes what it needs beside what it has
    if where == "cuda":
        kwargs = {**kwargs, "device": HOST}
        if func.overloadpacket is aten._to_copy and not hasattr(args[0], "is_pinned_here"):
            waited_for.append(f"{list(args[0].shape)} {args[0].dtype}")
    kwargs = {name: each for name, each in kwargs.items() if name != "pin_memory"}
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
    if there:
        _refuse_mixed(func, args, [each for each in tensors if not isinstance(each, OnGPU)])
    plain = {id(tensor): _plain(tensor) for tensor in there}
    given = {id(value): tensor for tensor in there for value in (plain[id(tensor)],)}

    def opened(value: Any) -> Any:
        return plain.get(id(value), value) if isinstance(value, Tensor) else value

    with _disable_current_modes():
        out = func(*tree_map(opened, args), **tree_map(opened, kwargs))
    stays = func.overloadpacket in COPIES and func.overloadpacket is not aten._to_copy
    is_there = where == "cuda" or (where is None and bool(there) and not stays)

    def closed(value: Any) -> Any:
        if not isinstance(value, Tensor) or id(value) in given:
            return given.get(id(value), value)  # what was written in place is what was given
        return OnGPU.of(value) if is_there and value.device == HOST else value

    return tree_map(closed, out)


def _plain(tensor: Tensor) -> Tensor:
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        return torch.Tensor._make_subclass(torch.Tensor, tensor)


def _refuse_mixed(func: Any, args: Any, others: list[Tensor]) -> None:
    """Refuse what is not on the GPU, where it meets what is."""
    packet = func.overloadpacket
    here = [each for each in others if each.device.type == "cpu"]
    if packet in COPIES:
        return
    if packet in INDEXED and isinstance(args[0], OnGPU):
        values = [each for each in args[2:3] if isinstance(each, Tensor) and each.ndim]
        here = [each for each in values if not isinstance(each, OnGPU)]
    if packet in WITH_A_NUMBER and not (func._schema.is_mutable and args[0] in here):
        here = [each for each in here if each.ndim]
    if here:
        told = ", ".join(f"{list(each.shape)} {each.dtype}" for each in here)
        raise DevicesMix(f"{func}: of the host: {told}; the others are on {GPU}")


class _Operations(TorchDispatchMode):
    """Operations without a tensor of the GPU: they may make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatched(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What is seen of a call alone: tensors made of lists, and which generator draws."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(map(_numbered, args))
        kwargs = {name: _numbered(each) for name, each in kwargs.items()}
        asked = kwargs.get("device")
        first = args[0] if args else None
        is_there = isinstance(first, OnGPU) if asked is None else asked == GPU
        generator = kwargs.get("generator")
        if generator is not None and is_there != (getattr(generator, "at", "cpu") == "cuda"):
            raise DevicesMix(f"{func.__name__}: the generator is of another device")
        if func in BACKWARDS:
            losses = tree_leaves(first if args else list(kwargs.values())[:1])
            _backward.on_gpu = any(isinstance(each, OnGPU) for each in losses)
        if is_there and func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            return self._listed(func, args, kwargs)
        return func(*args, **kwargs)

    def _listed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        kwargs = {name: each for name, each in kwargs.items() if name != "device"}
        if func is Tensor.new_tensor:
            return OnGPU.of(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
        given = args[0].cpu() if isinstance(args[0], OnGPU) else args[0]
        return OnGPU.of(func(given, *args[1:], **kwargs))


def _numbered(value: Any) -> Any:
    """A name of the device with its number: torch would ask its CUDA for one."""
    is_name = isinstance(value, str) and value in ("cuda", "cuda:0")
    return GPU if is_name or (isinstance(value, torch.device) and value.type == "cuda") else value


class _Generator(torch.Generator):
    """A generator that knows where it draws."""

    at: str

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.at = torch.device(device).type
        return made


class _Event:
    """A moment, with the methods of torch.cuda.Event."""

    def __init__(self, **_: Any) -> None:
        self._at: float | None = None

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        assert self._at is not None, "nothing was recorded"

    def elapsed_time(self, other: _Event) -> float:
        assert self._at is not None, "nothing was recorded"
        assert other._at is not None, "nothing was recorded"
        return 1e3 * (other._at - self._at)


class _Stream:
    """With the methods of torch.cuda.Stream; all that is launched is done at once."""

    device = GPU

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        assert isinstance(stream, _Stream)

    def wait_event(self, event: _Event) -> None:
        assert isinstance(event, _Event)

    def record_event(self, event: Any = None) -> _Event:
        made = _Event()
        made.record()
        return made


def _capture_checks() -> list[str]:
    """An optimizer's look at the stream, by its names: torch built for GPUs would ask its CUDA."""
    return [name for name in dir(torch.optim.Optimizer) if name.endswith("capture_health_check")]


def _pinned(values: Tensor, *_: Any) -> Tensor:
    values.is_pinned_here = True  # type: ignore[attr-defined]
    return values


def _grouped(lists: list[list[Any]], with_indices: bool = False) -> dict[Any, Any]:
    """The tensors of an optimizer as torch groups them, by the devices that they say."""
    found: dict[Any, Any] = {}
    for number in range(len(lists[0])):
        row = [each[number] if each else None for each in lists]
        key = (row[0].device, row[0].dtype)
        parts, numbers = found.setdefault(key, ([[] for _ in lists], []))
        for part, value in zip(parts, row, strict=True):
            part += [] if value is None else [value]
        numbers.append(number)
    return found


CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_lazy_init": lambda: None,  # of a torch that was built for GPUs
    "is_current_stream_capturing": lambda: False,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "get_device_name": lambda device=None: "NVIDIA H200",
    "get_device_capability": lambda device=None: (9, 0),
    "max_memory_allocated": lambda device=None: 2**30,
    "memory_allocated": lambda device=None: 2**30,
    "reset_peak_memory_stats": lambda device=None: None,
    "Event": _Event,
    "Stream": _Stream,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": lambda device=None: _Stream(),
}


@contextlib.contextmanager
def pretended() -> Iterator[torch.device]:
    """There is a GPU, `cuda:0`, inside."""
    import torch._dynamo  # before anything is changed: it looks at what torch has

    run, join = threading.Thread.run, torch_dist.init_process_group

    def ran(thread: threading.Thread) -> None:
        with _Operations(), _Calls():
            run(thread)

    def joined(backend: str | None = None, *args: Any, **named: Any) -> None:
        join("gloo" if backend and "nccl" in backend else backend, *args, **named)

    changed: list[tuple[Any, str, Any]] = [(torch.cuda, name, each) for name, each in CUDA.items()]
    changed += [
        (torch, "Generator", _Generator),
        (torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(_grouped)),
        (Tensor, "pin_memory", _pinned),
        *((torch.optim.Optimizer, name, lambda self: None) for name in _capture_checks()),
        (threading.Thread, "run", ran),
        (torch_dist, "init_process_group", joined),
    ]
    future = torch.__future__
    with contextlib.ExitStack() as stack:
        for where, name, value in changed:
            stack.enter_context(mock.patch.object(where, name, value))
        for module in list(sys.modules.values()):
            is_ours = getattr(module, "__name__", "").startswith("rcmae")
            if is_ours and hasattr(module, "pins_memory"):  # torch pins in a thread of C++
                stack.enter_context(mock.patch.object(module, "pins_memory", return_value=False))
        # a module's `to` makes new parameters: of the old ones the memory alone would move
        before = future.get_overwrite_module_params_on_conversion()
        stack.callback(future.set_overwrite_module_params_on_conversion, before)
        future.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(_Operations())
        stack.enter_context(_Calls())
        yield GPU


def pytest_collection_finish(session: Any) -> None:
    """As a plugin: there is one for all tests; nothing is compiled, and no attention timed."""
    from rcmae import config
    from rcmae.run import build

    config.compiles = lambda *_, **__: False  # type: ignore[assignment]
    build.choose_attention = lambda *_: None  # type: ignore[assignment]
    stack = contextlib.ExitStack()
    stack.enter_context(pretended())
    session.pretended = stack
