"""Two processes train as one does: DDP and FSDP2 around a model that was patched before."""

import datetime
import functools
import multiprocessing
import os
import socket
import traceback
import types
from dataclasses import dataclass

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from support import loud_adapter, relative_error, tiny_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from deltamem_fast import DeltaMemConfig, MemoryState, patch_model, record_gates
from deltamem_fast.training.setup import prepare_for_training

pytestmark = pytest.mark.xdist_group("distributed")  # one worker starts the processes, once
WORLD = 2
STEPS = 3
CONFIGS = {"tsw": DeltaMemConfig(), "ssw": DeltaMemConfig.ssw(), "msw": DeltaMemConfig.msw(heads=2, rank=3)}


class Step(nn.Module):
    """What is wrapped: one forward is a write pass and a read pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, write_ids, segment_ids, read_ids):
        memory = MemoryState.zeros(self.model, len(write_ids))
        with record_gates() as gates:
            self.model.model(input_ids=write_ids, memory=memory, segment_ids=segment_ids, use_cache=False)
        memory.frozen = True
        logits = self.model(read_ids, memory=memory, use_cache=False).logits.float()
        answer = F.cross_entropy(logits[:, :-1].flatten(0, 1), read_ids[:, 1:].flatten())
        # A plain mean of β, unlike the squared penalty, is the mean of the processes' own.
        return answer + torch.stack(list(gates.mean_beta().values())).mean()


def batches(config):
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        write, read = (torch.randint(3, 128, (4, n), generator=generator) for n in (9, 6))
        segments = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 4) if config.segmented else None
        yield write, segments, read


def build(name, dtype, checkpointing, backend="numba"):
    model = tiny_model(attention="eager", dtype=dtype, num_hidden_layers=2)
    model = loud_adapter(patch_model(model, CONFIGS[name], backend=backend), scale=0.5)
    prepare_for_training(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    return model


def train(wrapped, model, name, rows=slice(None)):
    """Losses of the steps, and the adapter after them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-3)
    losses = []
    for batch in batches(CONFIGS[name]):
        loss = wrapped(*(None if part is None else part[rows] for part in batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), {n: full(p) for n, p in model.named_parameters() if p.requires_grad}


def full(parameter):
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def wrap(model, how, settings):
    step = Step(model)
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(step, **settings)
    if how == "accelerate":
        return accelerate_wraps(step, **settings)
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, **settings)
    return fully_shard(step, **settings)


def accelerate_wraps(step, **settings):
    """accelerate's own sharding; its Accelerator takes FSDP on GPUs only."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    step._no_split_modules = step.model._no_split_modules
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **settings)
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=torch.distributed.get_rank() == 0,
    )
    return fsdp2_prepare_model(accelerator, step)


@dataclass(frozen=True)
class Case:
    how: str
    config: str = "tsw"
    checkpointing: str = ""
    dtype: str = "float32"
    backend: str = "numba"
    settings: tuple = ()

    def __str__(self):
        parts = [self.how, self.config, self.checkpointing, self.dtype, self.backend, *dict(self.settings)]
        return "-".join(part for part in parts if part)

    def build(self, checkpointing=""):
        return build(self.config, getattr(torch, self.dtype), checkpointing, self.backend)


CASES = [
    *(Case(how, config, kind) for how in ("ddp", "fsdp") for config in CONFIGS for kind in ("", "non-reentrant")),
    Case("ddp", checkpointing="reentrant", settings=(("static_graph", True),)),
    *(Case("fsdp", config, "reentrant") for config in CONFIGS),
    *(Case("fsdp", config, "non-reentrant", backend="reference") for config in ("tsw", "ssw")),
    Case("fsdp", "ssw", "non-reentrant", settings=(("reshard_after_forward", False),)),
    Case("fsdp", dtype="bfloat16"),
    Case(
        "fsdp", checkpointing="reentrant", settings=(("mp_policy", MixedPrecisionPolicy(param_dtype=torch.bfloat16)),)
    ),
    Case("accelerate", settings=(("cpu_ram_efficient_loading", False),)),
    Case("accelerate", checkpointing="non-reentrant", settings=(("cpu_ram_efficient_loading", True),)),
]


def worker(rank, port, path, cases):
    """Run cases one after another, so that the processes start once."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    limit = datetime.timedelta(minutes=10)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=limit)
    try:
        for case in cases:
            model = case.build(case.checkpointing)
            try:
                wrapped = wrap(model, case.how, dict(case.settings))
                losses, weights = train(wrapped, model, case.config, slice(rank * 2, rank * 2 + 2))
                torch.distributed.all_reduce(losses)
                found = losses / WORLD, weights
            except Exception:  # both processes fail alike, or the other one waits in vain
                found = traceback.format_exc()
            if rank == 0:
                torch.save(found, path / f"{case}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """The directory of what the wanted cases found."""
    wanted = {item.callspec.params["case"] for item in request.session.items if item.path == request.path}
    path = tmp_path_factory.mktemp("distributed")
    for case in wanted:  # the loops are compiled once, before two processes need them at a time
        one_process(case.config, case.dtype)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["transformers.models.qwen3.modeling_qwen3", "deltamem_fast.training.setup"])
    cases = [case for case in CASES if case in wanted]
    torch.multiprocessing.start_processes(worker, (port, path, cases), nprocs=WORLD, start_method="forkserver")
    return path


@functools.cache
def one_process(config, dtype):
    """Losses and weights of one process, and the weights before."""
    model = build(config, getattr(torch, dtype), "")
    start = {n: full(p).clone() for n, p in model.named_parameters()}
    return *train(Step(model), model, config), start


def quick(case):
    """Each wrapper with each strategy and each kind of checkpointing once; make soak has their product."""
    plain = {"tsw": ("", "reentrant"), "ssw": ("non-reentrant",), "msw": ("",) if case.how == "ddp" else ("reentrant",)}
    return case.settings or case.dtype != "float32" or case.checkpointing in plain[case.config]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if quick(case) else pytest.mark.soak) for case in CASES], ids=str
)
def test_two_processes_are_one(case, results):
    found = torch.load(results / f"{case}.pt")
    assert not isinstance(found, str), found
    losses, weights = found
    expected_losses, expected, start = one_process(case.config, case.dtype)
    assert expected_losses[0] != expected_losses[-1]
    # Gradients are summed over half of the rows in bfloat16 there.
    exact = case.dtype == "float32" and "mp_policy" not in dict(case.settings)
    assert relative_error(losses, expected_losses) < (1e-5 if exact else 0.02)
    assert weights.keys() == expected.keys()
    for key in expected:
        moved = expected[key] - start[key]
        assert weights[key].dtype == torch.float32 and moved.norm() > 0
        assert relative_error(weights[key] - start[key], moved) < (1e-4 if exact else 0.2), key
