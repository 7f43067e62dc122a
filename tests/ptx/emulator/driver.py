"""Stands in for Triton's driver: its JIT compiles for a GPU as always and launches into the emulator."""

from __future__ import annotations

import re
import struct
from collections import Counter

import numpy as np
import torch

from .generator import Compiled
from .launch import Launch
from .machine import Buffer
from .parser import EmuError


class Record:
    """One launch that was emulated."""

    def __init__(self, launch, counts):
        self.program, self.name, self.grid = launch.program, launch.program.name, launch.grid
        self.counts, self.problems, self.strategy = counts, launch.problems, launch.strategy
        self.arguments, self.constants = launch.kept, launch.constants


class Emulator:
    """Stands where Triton expects a device.

    Args:
        seed: of the schedules; counts up with every launch, and can be set between two.
        races: whether to log accesses and search them for races (about twice the time).
        strict: whether a problem raises EmuError; else it is in the launch's record.
        strategy: how warps take turns: fine, coarse, starve, blocks or warps; None draws one for each launch.
        fusion: None = as the launchers ask, False (True) = compile all kernels without (with) FP fusion.
    """

    def __init__(self, seed=0, races=True, strict=True, strategy=None, fusion=None):
        self.seed, self.races, self.strict, self.strategy, self.fusion = seed, races, strict, strategy, fusion
        self.texts, self.programs, self.records = {}, {}, []
        self.names = Counter()
        self.benign = Counter()

    # Triton asks for these
    def install(self, arch=90):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import compiler as compiler_module

        emulator = self

        class Utils:
            def load_binary(self, name, binary, shared, device):
                return ("module", binary), (name, bytes(binary), shared), 0, 0, 1024

            def unload_module(self, module):
                pass

            def get_device_properties(self, device):
                return {"max_shared_mem": 232448 if arch >= 90 else 166912, "multiprocessor_count": 132,
                        "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1, "warpSize": 32,
                        "max_num_regs": 65536}  # fmt: skip

        class Launcher:
            def __init__(self, src, metadata):
                self.src, self.metadata = src, metadata

            def __call__(self, gx, gy, gz, stream, function, packed, metadata, enter, leave, *args):
                assert gy == gz == 1
                emulator.launch(self.src, self.metadata, function, gx, args)

        class Driver:
            utils, launcher_cls = Utils(), Launcher

            def get_current_device(self):
                return 0

            def get_current_stream(self, device=0):
                return 0

            def set_current_device(self, device):
                pass

            def get_current_target(self):
                return GPUTarget("cuda", arch, 32)

            def get_active_torch_device(self):
                return torch.device("cpu")

        original = compiler_module.CompiledKernel.__init__

        def remember(this, *args, **kwargs):
            original(this, *args, **kwargs)
            emulator.texts[bytes(this.kernel)] = this.asm["ptx"]

        compiler_module.CompiledKernel.__init__ = remember
        triton.runtime.driver.set_active(Driver())
        if self.fusion is not None:
            self._fix_fusion(self.fusion)
        return self

    @staticmethod
    def _fix_fusion(fusion):
        """Compile every kernel with ``enable_fp_fusion=fusion``, whatever its launcher says."""
        from triton.runtime.jit import JITFunction

        run = JITFunction.run

        def fixed(this, *args, **kwargs):
            return run(this, *args, **{**kwargs, "enable_fp_fusion": fusion})

        JITFunction.run = fixed

    def program(self, binary):
        if binary not in self.programs:
            self.programs[binary] = Compiled(self.texts[binary])
        return self.programs[binary]

    def prepare(self, src, metadata, function, grid, args):
        name, binary, shared = function
        compiled = self.program(binary)
        params, buffers, kept = [], {}, {}
        signature = src.signature
        constants = {}
        for (pname, kind), value in zip(signature.items(), args, strict=True):
            if kind == "constexpr":
                constants[pname] = value
                continue
            kept[pname] = value
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage.nbytes():
                    base = storage.data_ptr()
                    if base not in buffers:
                        buffers[base] = Buffer(base, storage.nbytes(), pname)
                    else:
                        buffers[base].name += "+" + pname
                params.append(value.data_ptr())
            elif kind == "fp32":
                params.append(struct.unpack("<I", struct.pack("<f", value))[0])
            else:
                params.append(int(value) & ((1 << int(kind[1:])) - 1))
        params += [0] * (len(compiled.program.params) - len(params))
        self.check_specialization(src, args)
        self.seed += 1
        launch = Launch(compiled, grid, params, list(buffers.values()), shared, self.seed, self.races,
                        strategy=self.strategy)  # fmt: skip
        launch.kept, launch.constants = kept, constants
        return launch

    def check_specialization(self, src, args):
        """What the compiled kernel was told (constants, divisibility) must hold of these arguments."""
        names = list(src.signature)
        for key, attributes in (getattr(src, "attrs", {}) or {}).items():
            value = args[key[0]]
            for attribute in attributes:
                if attribute[0] == "tt.divisibility":
                    n = value.data_ptr() if isinstance(value, torch.Tensor) else value
                    if n % attribute[1]:
                        raise EmuError(f"{src.name}: {names[key[0]]} = {n} was said to be divisible by {attribute[1]}")
        for key, constant in src.constants.items():
            value = args[key[0]] if len(key) == 1 else None
            if len(key) == 1 and not (value is constant or value == constant):
                raise EmuError(f"{src.name}: {names[key[0]]} was said to be {constant}, is {value}")
        for (name, kind), value in zip(src.signature.items(), args):
            if kind == "i32" and not -(2**31) <= value < 2**31:
                raise EmuError(f"{src.name}: {name} = {value} does not fit {kind}")

    def launch(self, src, metadata, function, grid, args):
        launch = self.prepare(src, metadata, function, grid, args)
        before = [b.u8.copy() for b in launch.buffers] if self.races else None
        counts = launch.run()
        if launch.suspects and not launch.hard:
            # Again, with rubbish instead of every value whose load races: where nothing changes, nobody uses them.
            after = [b.u8.copy() for b in launch.buffers]
            for b, data in zip(launch.buffers, before):
                b.u8[:] = data
            seed = self.seed
            self.seed = launch.seed - 1
            again = self.prepare(src, metadata, function, grid, args)
            self.seed = seed
            for line, agent, lane in launch.suspects:
                again.corrupt.setdefault(line, {}).setdefault(agent, set()).add(lane)
            again.races = False
            again.run()
            same = all(np.array_equal(b.u8, data) for b, data in zip(again.buffers, after))
            for b, data in zip(again.buffers, after):
                b.u8[:] = data
            if same:
                for (what, where), n in launch.problems.items():
                    self.benign[(what, where.split(": ")[0], *re.findall(r"\(([\w.]+:\d+:\d+)\)", where))] += n
                launch.problems.clear()
        self.finish(launch, counts)

    def finish(self, launch, counts):
        record = Record(launch, counts)
        self.records.append(record)
        self.names[record.name] += 1
        if launch.problems and self.strict:
            raise EmuError("\n".join(f"{n} x {what}: {where}" for (what, where), n in launch.problems.items()))
