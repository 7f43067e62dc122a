"""One process of a distributed ``deltamem train``: train_worker.py MODE COMMAND [COMMAND ...], each a JSON list."""

import json
import sys


def pretend_a_gpu() -> None:
    """accelerate refuses FSDP on a CPU, by the name of what it runs on alone; torch has no objection."""
    from accelerate import state

    original = state.PartialState.__init__

    def patched(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        if state.PartialState._shared_state.get("distributed_type") == state.DistributedType.MULTI_CPU:
            state.PartialState._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = patched


if __name__ == "__main__":
    import torch

    from deltamem_fast.cli.main import main

    torch.set_num_threads(1)
    if sys.argv[1] == "fsdp":
        pretend_a_gpu()
    for command in sys.argv[2:]:
        code = main(json.loads(command))
        if code:
            raise SystemExit(code)
