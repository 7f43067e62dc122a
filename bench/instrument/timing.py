"""Clocks: device events on a GPU, the processor's clock elsewhere; variants in turns, CUDA graphs, peak memory."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU of today
COPY_BYTES = 2 << 30  # of the copy that a device's bandwidth is measured by
Call = Callable[[int], object]


def synchronize(device: str) -> None:
    """Wait until ``device`` has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def in_turns(
    variants: Mapping[str, Call], turns: int, device: str, *, cold: bool = True, warm_up: int = 3, events: bool = True
) -> dict[str, list[float]]:
    """Seconds of each variant, one entry a turn; who goes first changes from turn to turn.

    Args:
        variants: calls by name; each gets the number of its run, to take other inputs each time.
        turns: how often each is timed.
        device: ``cuda`` or ``cpu``.
        cold: overwrite the L2 cache before each call that is timed by events.
        warm_up: runs of each before the clock.
        events: time by the GPU's events, nothing waits in between; else, and on a CPU, by ``wall``.
    """
    events = events and device == "cuda"
    times: dict[str, list] = {name: [] for name in variants}
    for call in variants.values():
        for n in range(warm_up):
            call(n)
    synchronize(device)
    for n in range(turns):
        for name in list(variants)[:: 1 if n % 2 == 0 else -1]:
            if not events:
                times[name].append(wall(functools.partial(variants[name], n), device))
                continue
            if cold:
                _flush_buffer().zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            variants[name](n)
            end.record()
            times[name].append((begin, end))
    synchronize(device)
    if not events:
        return times
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in times.items()}


def wall(call: Callable[[], object], device: str) -> float:
    """Seconds by the clock on the wall until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def capture(call: Callable[[], object], device: str, warm_up: int = 3) -> Callable[[], object]:
    """``call`` as a CUDA graph; returns what replays it. Elsewhere the call itself.

    The call runs ``warm_up`` times before it is captured, and never waits for the device while it is.
    """
    if device != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that ``call`` took at its peak beyond what was allocated before it; None where nobody counts them."""
    if device != "cuda":
        call()
        return None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def l2_bytes(device: str) -> int:
    """Size of the GPU's L2 cache; 0 elsewhere."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy within the device's memory, read and written bytes both counted."""
    count = COPY_BYTES if device == "cuda" else (4 << 20)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda n: target.copy_(source)}, 10, device)["copy"]
    return 2 * count / sorted(times)[len(times) // 2]
