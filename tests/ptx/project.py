"""The project's kernels on the emulator: imports, Triton's switches, and what the launchers believe about devices.

To be used in a process of its own, before anything imports Triton.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_prepared = False


def prepare() -> None:
    """Before Triton is imported: no interpreter, a cache of its own, the project's folders first on the path. Once.

    The cache is a folder for temporary files; DELTAMEM_EMULATED_CACHE names another one.

    Raises:
        RuntimeError: Triton was imported with TRITON_INTERPRET=1; nothing would be compiled.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("Triton was imported with TRITON_INTERPRET=1; the emulator runs what Triton compiles")
    os.environ.pop("TRITON_INTERPRET", None)
    # Not the user's: what lies there are texts, which a GPU could not load.
    cache = Path(tempfile.gettempdir()) / f"deltamem-emulated-ptx-{os.getuid()}"
    os.environ["TRITON_CACHE_DIR"] = os.environ.get("DELTAMEM_EMULATED_CACHE", str(cache))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folders = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "tests" / "ptx")]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]


def pin(interpreted: bool) -> None:
    """What Triton is told of TRITON_INTERPRET, whatever the environment says from now on."""
    import triton

    triton.knobs.runtime.__dict__["interpret"] = interpreted  # assigned, it would change the environment too


def modules() -> list:
    """All modules of the Triton kernels."""
    top = importlib.import_module("deltamem_kernels.triton")
    return [
        top,
        *(importlib.import_module(info.name) for info in pkgutil.walk_packages(top.__path__, f"{top.__name__}.")),
    ]


def admit() -> None:
    """Let the launchers take tensors on the CPU: their check of the device believes in the interpreter.

    The launchers check again what they would check on a GPU; only the device is taken on trust.
    """
    import triton

    pin(False)
    for module in modules():
        check = vars(module).get("check_device")
        if check is None or hasattr(check, "believing"):
            continue

        def believing(*given, check=check, **more):
            knobs = triton.knobs.runtime.__dict__
            knobs["interpret"] = True
            try:
                return check(*given, **more)
            finally:
                knobs["interpret"] = False

        believing.believing = True
        module.check_device = believing


def poison() -> None:
    """Launchers allocate NaN instead of rubbish: an element that no kernel writes is seen."""
    import torch
    from kernel_properties import poisoned

    for module in modules():
        if vars(module).get("empty") is torch.empty:
            module.empty = poisoned


def emulator(arch: int = 90, *, fusion: bool | None = None, ulps: int = 0, **how):
    """The emulator installed as Triton's device, the launchers ready to use it.

    Args:
        arch: compute capability without its point, 80 or 90.
        fusion: FP fusion of all kernels; None: as the launchers ask.
        ulps: how far the results of approximate instructions are off.
        how: of ``emulator.Emulator``.
    """
    prepare()
    import torch
    from emulator import Approx, Emulator

    torch.set_num_threads(1)
    Approx.ulps = ulps
    made = Emulator(fusion=fusion, **how).install(arch)
    admit()
    poison()
    return made
