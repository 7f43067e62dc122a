"""A CUDA device that is not there: tensors that say they lie on ``cuda`` and whose numbers a CPU computes.

``device()`` replaces what this project uses of ``torch.cuda``. It is strict where a GPU is:

- an operation on tensors of two devices raises, as does a CUDA tensor asked for its NumPy array;
- a CUDA graph is a tape of operators and kernel launches, replayed on the same memory. While one is captured, whatever
  waits for the device or copies between it and the host raises;
- memory is counted by storage, and more than the device has raises ``torch.OutOfMemoryError``.

Kernels run in Triton's interpreter, so Python must have been started with ``TRITON_INTERPRET=1``. Not modelled: streams
(everything happens at once), and the memory that a graph shares with other graphs.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock
from weakref import finalize

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
# Operators that wait for the device: the host must know their result, or its size.
WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.is_nonzero, aten._unique2}
TWO_DEVICES = {aten.copy_, aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_, aten.set_}
DEVICES = {
    "H100": ("NVIDIA H100 80GB HBM3", 79 << 30, 50 << 20, 132),
    "H200": ("NVIDIA H200", 139 << 30, 50 << 20, 132),
}


class Memory:
    """Bytes of live storages, and the most there has been."""

    def __init__(self, total: int):
        self.total, self.now, self.peak = total, 0, 0
        self.live: Counter = Counter()

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor`` until no tensor of it lives."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not address:
            return
        if not self.live[address]:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.live[address] += 1
        finalize(tensor, self._release, address, size)
        if self.now > self.total:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")

    def _release(self, address: int, size: int) -> None:
        self.live[address] -= 1
        if not self.live[address]:
            del self.live[address]
            self.now -= size


class Device:
    """What there is one of: memory, the tape of the graph that is captured, and counts of what was called."""

    def __init__(self, name: str):
        self.name, total, self.l2, self.processors = DEVICES[name]
        self.memory = Memory(total)
        self.tape: list | None = None
        self.before: dict[int, tuple] = {}  # of a capture: storages that it may write, and what was in them
        self.calls: Counter = Counter()
        self.idle = False  # kernels are counted, not run: for what is timed and looked at by nobody

    def waits(self, what: str) -> None:
        """``what`` makes the host wait for the device."""
        self.calls["waits"] += 1
        if self.tape is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")


here: Device | None = None


class CudaTensor(torch.Tensor):
    """Says that it lies on the GPU; ``plain`` is the CPU tensor on the same memory."""

    @staticmethod
    def __new__(cls, plain: torch.Tensor):
        self = torch.Tensor._make_subclass(cls, plain, plain.requires_grad)
        self.plain = plain
        here.memory.hold(plain)
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        method = METHODS.get(function)
        if method and isinstance(args[0], CudaTensor):
            return method(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.plain.clone()

    @staticmethod
    def backward(ctx, grad):
        return CudaTensor(grad.clone())


def _to_cpu(self, *args, **kwargs):
    here.waits("a copy to the host")
    return _Download.apply(self)


def _to(self, *args, **kwargs):
    if args and isinstance(args[0], torch.Tensor):
        like = args[0]
        args = (like.device, like.dtype, *args[1:])
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    if device is not None and device.type == "cpu":
        self = _to_cpu(self)
    changes = {k: v for k, v in (("copy", kwargs.get("copy")), ("memory_format", layout)) if v}
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.to(self, dtype or self.dtype, **changes)


class _Uploads(TorchFunctionMode):
    """Copies to ``cuda``, which C++ would ask a driver for the current device of."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0] if isinstance(args[0], CudaTensor) else args[0].to(CUDA)
        if function is torch.Tensor.to:
            numbered = tuple(_numbered(value) for value in args)
            return function(*numbered, **{key: _numbered(value) for key, value in kwargs.items()})
        return function(*args, **kwargs)


def _numbered(value):
    return CUDA if isinstance(value, str | torch.device) and torch.device(value).type == "cuda" else value


def _tolist(self):
    here.waits("tolist")
    return self.plain.tolist()


def _numpy(self, *args, **kwargs):
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")


def _deepcopy(self, memo):
    if id(self) not in memo:
        copied = CudaTensor(self.plain.detach().clone(memory_format=torch.preserve_format))
        memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if hasattr(self, "_is_param") else copied
    return memo[id(self)]


METHODS = {
    torch.Tensor.cpu: _to_cpu, torch.Tensor.to: _to, torch.Tensor.cuda: lambda self, *a, **k: self,
    torch.Tensor.tolist: _tolist, torch.Tensor.numpy: _numpy, torch.Tensor.__array__: _numpy,
    torch.Tensor.__deepcopy__: _deepcopy, torch.Tensor.get_device: lambda self: 0,
}  # fmt: skip


def _plain(tree):
    return tree_map_only(CudaTensor, lambda t: t.plain, tree)


def _run(function, args, kwargs):
    """One operator: on the devices of its arguments, onto the tape of a capture."""
    packet = function.overloadpacket
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    on_cuda = [t for t in tensors if isinstance(t, CudaTensor)]
    wanted = kwargs.get("device")
    cuda = bool(on_cuda) or (wanted is not None and torch.device(wanted).type == "cuda")
    if not cuda:
        return function(*args, **kwargs)
    if function.namespace not in ("aten", "prims"):
        # An operator of this project's: its Python, on tensors that still say where they lie. Zeros that autograd has
        # put where a result got no gradient are of C++, which takes all tensors here for a CPU's.
        args, kwargs = tree_map_only(torch.Tensor, _moved_zeros, (args, kwargs))
        with _Mode(), _Uploads():
            return torch._library.custom_ops.OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
    mixed = on_cuda and any(t.ndim > 0 for t in tensors if not isinstance(t, CudaTensor))
    if mixed and packet not in TWO_DEVICES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {function}")
    if packet in WAITS or (packet is aten.index and any(t.dtype == torch.bool for t in tensors[1:])):
        here.waits(str(function))
    if (mixed or (tensors and not on_cuda)) and packet in {*TWO_DEVICES, aten._to_copy}:
        here.waits(f"a copy between devices: {function}")
    if packet is aten.copy_ and not isinstance(args[0], CudaTensor):
        here.waits("a copy to the host")
        return function(*_plain(args), **_plain(kwargs))
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    _keep(_plain((args, kwargs)))
    found = function(*_plain(args), **_plain(kwargs))
    if here.tape is not None:
        here.tape.append(_Recorded(function, _plain(args), _plain(kwargs), found))
    return tree_map_only(torch.Tensor, CudaTensor, found)


def _moved_zeros(tensor: torch.Tensor) -> torch.Tensor:
    is_zero = not isinstance(tensor, CudaTensor) and tensor.is_floating_point() and not tensor.any()
    return CudaTensor(tensor) if is_zero else tensor


class _Recorded:
    """An operator of a graph: run again on the same memory, its results where they were."""

    def __init__(self, function, args, kwargs, found):
        self.again = lambda: function(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        self.results = [
            t if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given else None
            for t in tree_leaves(found)
        ]

    def __call__(self):
        for there, new in zip(self.results, tree_leaves(self.again()), strict=True):
            if there is not None:
                there.copy_(new)


class _Mode(TorchDispatchMode):
    """Factories and copies to the device, which no tensor of it takes part in."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class Event:
    """A time of the host's clock."""

    def __init__(self, enable_timing: bool = False):
        self.timing, self.time = enable_timing, None

    def record(self, stream=None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other) -> float:
        if not (self.timing and other.timing) or self.time is None or other.time is None:
            raise RuntimeError("both events must be recorded, with timing, before the time between them is asked for")
        return max(1e-3, (other.time - self.time) * 1e3)


class Stream:
    """Everything happens at once."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other) -> None:
        """Nothing to wait for."""

    wait_event = wait_stream


class CUDAGraph:
    """What was done while ``graph`` was open."""

    def __init__(self):
        self.tape = None

    def replay(self) -> None:
        if self.tape is None:
            raise RuntimeError("replay of a graph that was not captured")
        here.calls["replays"] += 1
        for again in self.tape:
            again()


@contextmanager
def graph(which: CUDAGraph):
    """Capture: what is done runs once here, and is then undone; a GPU would not run it."""
    if here.tape is not None:
        raise RuntimeError("a graph is being captured already")
    here.tape, here.before = [], {}
    try:
        yield
        which.tape = here.tape
        here.calls["captures"] += 1
    finally:
        for storage, content in here.before.values():
            storage.copy_(content)
        here.tape, here.before = None, {}


def _keep(tree) -> None:
    """Remember, while a graph is captured, what lies in the storages of these plain tensors."""
    for tensor in tree_leaves(tree):
        if here.tape is not None and isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in here.before:
                here.before[storage.data_ptr()] = storage, storage.clone()


def _launches(stack: ExitStack) -> None:
    """Kernels get plain tensors, and go onto the tape."""
    from triton.runtime import interpreter

    original = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        given = tree_leaves((args, kwargs))
        if any(isinstance(t, torch.Tensor) and not isinstance(t, CudaTensor) for t in given):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        args, kwargs = _plain(args), _plain(dict(kwargs))
        here.calls["launches"] += 1
        _keep((args, kwargs))

        def run():
            if not here.idle:
                with _disable_current_modes():
                    original(self, *args, **kwargs)

        run()
        if here.tape is not None:
            here.tape.append(run)

    stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", call))


@contextmanager
def device(name: str = "H100"):
    """Pretend that there is one; gives its ``Device``.

    Args:
        name: of ``DEVICES``.
    """
    global here
    here = it = Device(name)
    nothing = lambda *args, **kwargs: None  # noqa: E731
    properties = SimpleNamespace(
        name=it.name, total_memory=it.memory.total, L2_cache_size=it.l2, multi_processor_count=it.processors,
        major=9, minor=0,
    )  # fmt: skip
    stream = Stream()

    @contextmanager
    def on(_):
        yield

    def from_host(make):
        # These make a tensor on the host and copy it, in C++, where no mode looks.
        def made(*args, device=None, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor if device is None else tensor.to(device)

        return made

    def reset():
        it.memory.peak = it.memory.now

    replaced = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "_lazy_init": nothing,
        "get_device_name": lambda *a: it.name, "get_device_properties": lambda *a: properties,
        "get_device_capability": lambda *a: (9, 0), "is_initialized": lambda: True,
        "mem_get_info": lambda *a: (it.memory.total - it.memory.now, it.memory.total),
        "memory_allocated": lambda *a: it.memory.now, "max_memory_allocated": lambda *a: it.memory.peak,
        "reset_peak_memory_stats": lambda *a: reset(), "empty_cache": nothing,
        "synchronize": lambda *a: it.waits("synchronize"), "Event": Event, "Stream": Stream,
        "current_stream": lambda *a: stream, "default_stream": lambda *a: stream,
        "stream": on, "CUDAGraph": CUDAGraph, "graph": graph,
        "is_current_stream_capturing": lambda: it.tape is not None, "device": on,
        "profiler": SimpleNamespace(start=nothing, stop=nothing),
    }  # fmt: skip
    with ExitStack() as stack:
        for key, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, key, value))
        for key in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, key, from_host(getattr(torch, key))))
        stack.enter_context(mock.patch.object(torch.compiler, "cudagraph_mark_step_begin", nothing))
        # ``module.cuda()`` makes new parameters: the class of one that there is cannot change.
        keep = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, keep)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        _launches(stack)
        stack.enter_context(_Mode())
        stack.enter_context(_Uploads())
        yield it
