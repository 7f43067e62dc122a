"""Stands in for Triton's driver: its JIT compiles for a GPU as always and launches into the emulator."""

from __future__ import annotations

import re
import struct
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch

from .errors import EmuError
from .generator import Compiled
from .global_memory import Buffer
from .launch import Launch


class Record:
    """One launch that was emulated.

    Attributes:
        program, name, grid, shared: the kernel, its number of programs, bytes of shared memory of each.
        counts, problems, strategy: what it cost, what was found (in a launch that is not strict), how warps took turns.
        arguments, constants: by name, as the launcher gave them.
    """

    def __init__(self, launch: Launch, arguments: dict, constants: dict):
        self.program, self.name, self.grid, self.shared = (
            launch.program,
            launch.program.name,
            launch.grid,
            launch.shared,
        )
        self.counts, self.problems, self.strategy = launch.counts, launch.problems, launch.strategy
        self.arguments, self.constants = arguments, constants


class Emulator:
    """Stands where Triton expects a device.

    Args:
        seed: of the schedules; counts up with every launch, and can be set between two.
        races: whether to log accesses and search them for races (about twice the time).
        strict: whether a problem raises EmuError; else it is in the launch's record.
        strategy: how warps take turns: one of ``launch.STRATEGIES``; None draws one for each launch.
        fusion: None: as the launchers ask; False (True): compile all kernels without (with) FP fusion.

    Attributes:
        records: of the launches so far; to be cleared by whoever reads it.
        names: how often each kernel was launched.
        benign: races without effect, and how often.
        arch: what kernels are compiled for, once it is installed.
        edit: a function of a PTX text → the text to run instead, or None. It is asked when a kernel is first launched.
    """

    def __init__(self, seed=0, races=True, strict=True, strategy=None, fusion=None):
        self.seed, self.races, self.strict, self.strategy, self.fusion = seed, races, strict, strategy, fusion
        self.programs: dict[bytes, Compiled] = {}
        self.records: list[Record] = []
        self.names, self.benign = Counter(), Counter()
        self.arch = None
        self.edit = None

    def install(self, arch: int = 90) -> Emulator:
        """Become Triton's only device, of compute capability ``arch`` (without its point).

        Triton stops at PTX: what it caches as a binary is text, so its cache must be one that no GPU shares.
        """
        import triton
        from triton.backends.nvidia.compiler import CUDABackend

        self.arch = arch
        CUDABackend.make_cubin = lambda backend, text, *_: text.encode()
        triton.runtime.driver.set_active(_driver(self, arch))
        if self.fusion is not None:
            _fix_fusion(self.fusion)
        return self

    def program(self, binary: bytes) -> Compiled:
        """The kernel of a text, parsed once."""
        if binary not in self.programs:
            text = binary.decode()
            self.programs[binary] = Compiled(self.edit(text) if self.edit else text)
        return self.programs[binary]

    def launch(self, source, function, grid: int, values: tuple) -> None:
        """Run a kernel. Registers a record, or raises EmuError for a problem in a strict emulator."""
        arguments, constants = _arguments(source, values)
        _check_specialization(source, values)
        self.seed += 1
        launch = self._prepare(source, function, grid, arguments)
        before = [b.bytes.copy() for b in launch.buffers] if self.races else None
        launch.run()
        if launch.suspects and not launch.hard and self._without_effect(launch, before, source, function, arguments):
            for (what, where), n in launch.problems.items():
                self.benign[what, where.split(": ")[0], *re.findall(r"\(([\w.]+:\d+:\d+)\)", where)] += n
            launch.problems.clear()
        self.records.append(Record(launch, arguments, constants))
        self.names[launch.program.name] += 1
        if launch.problems and self.strict:
            raise EmuError("\n".join(f"{n} × {what}: {where}" for (what, where), n in launch.problems.items()))

    def _prepare(self, source, function, grid, arguments) -> Launch:
        _, binary, shared = function
        compiled = self.program(binary)
        kinds, params, buffers = {name: kind for name, kind, _, _ in leaves(source)}, [], {}
        for name, value in arguments.items():
            params.append(_parameter(kinds[name], value))
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes():
                storage = value.untyped_storage()
                base = storage.data_ptr()
                if base in buffers:
                    buffers[base].name += "+" + name
                else:
                    buffers[base] = Buffer(base, storage.nbytes(), name)
        params += [0] * (len(compiled.program.params) - len(params))  # scratch memory that no kernel here has
        return Launch(compiled, grid, params, list(buffers.values()), shared, self.seed, races=self.races,
                      strategy=self.strategy)  # fmt: skip

    def _without_effect(self, launch: Launch, before, source, function, arguments) -> bool:
        """Whether the launch leaves the same memory with rubbish instead of every value whose load races."""
        after = [b.bytes.copy() for b in launch.buffers]
        for buffer, data in zip(launch.buffers, before):
            buffer.bytes[:] = data
        again = self._prepare(source, function, launch.grid, arguments)
        again.races = False
        for line, agent, lane in launch.suspects:
            again.corrupt.setdefault(line, {}).setdefault(agent, set()).add(lane)
        again.run()
        same = all(np.array_equal(buffer.bytes, data) for buffer, data in zip(again.buffers, after))
        for buffer, data in zip(again.buffers, after):
            buffer.bytes[:] = data
        return same


def leaves(source, values: tuple | None = None) -> list[tuple]:
    """The arguments, those in tuples one by one: name (``rows.x_ptr`` in a named tuple), kind, value, place."""
    found = []

    def take(name, kind, value, place):
        if not isinstance(kind, tuple):
            return found.append((name, kind, value, place))
        names = getattr(kind, "_fields", range(len(kind)))
        for n, (field, of, part) in enumerate(
            zip(names, kind, [None] * len(kind) if values is None else value, strict=True)
        ):
            take(f"{name}.{field}", of, part, (*place, n))

    given = [None] * len(source.signature) if values is None else values
    for n, ((name, kind), value) in enumerate(zip(source.signature.items(), given, strict=True)):
        take(name, kind, value, (n,))
    return found


def _arguments(source, values) -> tuple[dict, dict]:
    """Arguments that the kernel gets as parameters, and those compiled into it, by name."""
    arguments, constants = {}, {}
    for name, kind, value, _ in leaves(source, values):
        (constants if kind == "constexpr" else arguments)[name] = value
    return arguments, constants


def _parameter(kind: str, value) -> int:
    """An argument as the bits of a parameter."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value) & ((1 << int(kind[1:])) - 1)


def _check_specialization(source, values) -> None:
    """What the compiler was told of the arguments must hold of these: divisibility, constants, types."""
    given = {place: (name, _plain(value)) for name, _, value, place in leaves(source, values)}
    for key, attributes in (getattr(source, "attrs", None) or {}).items():
        name, value = given[key]
        for attribute, by in attributes:
            n = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if attribute == "tt.divisibility" and n % by:
                raise EmuError(f"{source.name}: {name} = {n} was said to be divisible by {by}")
            if attribute == "tt.pointer_range" and value.untyped_storage().nbytes() > 2 ** (by - 1):
                raise EmuError(f"{source.name}: {name} was said to lie within {by} bits")
    for key, constant in source.constants.items():
        name, value = given[key]
        if not (value is _plain(constant) or value == _plain(constant)):
            raise EmuError(f"{source.name}: {name} was said to be {_plain(constant)}, is {value}")
    for name, kind, value, _ in leaves(source, values):
        if kind == "i32" and not -(2**31) <= value < 2**31:
            raise EmuError(f"{source.name}: {name} = {value} does not fit {kind}")


def _plain(value):
    """What is compiled in, out of the wrapper in which it may travel."""
    return value.value if type(value).__name__ == "constexpr" else value


def _fix_fusion(fusion: bool) -> None:
    """Compile every kernel with ``enable_fp_fusion=fusion``, whatever its launcher says."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def fixed(this, *args, **kwargs):
        return run(this, *args, **{**kwargs, "enable_fp_fusion": fusion})

    JITFunction.run = fixed


def _driver(emulator: Emulator, arch: int):
    """What Triton asks of a driver."""
    from triton.backends.compiler import GPUTarget

    properties = {
        "max_shared_mem": 232448 if arch >= 90 else 166912, "multiprocessor_count": 132, "sm_clock_rate": 1,
        "mem_clock_rate": 1, "mem_bus_width": 1, "warpSize": 32, "max_num_regs": 65536,
    }  # fmt: skip
    utils = SimpleNamespace(
        # module, function, registers, spills, threads that a program may have
        load_binary=lambda name, binary, shared, device: (name, (name, bytes(binary), shared), 0, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: properties,
    )

    class Launcher:
        def __init__(self, source, metadata):
            self.source = source

        def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *values):
            if y != 1 or z != 1:
                raise EmuError(f"a grid of {x} × {y} × {z} programs, allowed one dimension")
            emulator.launch(self.source, function, x, values)

    return SimpleNamespace(
        utils=utils, launcher_cls=Launcher, get_current_device=lambda: 0, get_current_stream=lambda device=0: 0,
        set_current_device=lambda device: None, get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_active_torch_device=lambda: torch.device("cpu"),
    )  # fmt: skip
