"""Two processes of a distributed ``deltamem train``: train_worker.py MODE COMMAND [COMMAND ...], each a JSON list.

What both import is imported once, by the process that they are forked from.
"""

import json
import os
import signal
import sys
import traceback


def pretend_a_gpu() -> None:
    """accelerate refuses FSDP on a CPU, by the name of what it runs on alone; torch has no objection."""
    from accelerate import state

    original = state.PartialState.__init__

    def patched(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        if state.PartialState._shared_state.get("distributed_type") == state.DistributedType.MULTI_CPU:
            state.PartialState._shared_state["distributed_type"] = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = patched


def run(rank: int, commands: list[list[str]]) -> int:
    """The commands one after another, as that rank; the first exit status that is not 0."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return next(filter(None, map(main, commands)), 0)


def in_child(rank: int, commands: list[list[str]]) -> int:
    """The id of a process that runs them."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            status = run(rank, commands)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return process


if __name__ == "__main__":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401  imported before the fork

    from deltamem_fast.cli.main import main
    from deltamem_fast.training.run import train  # noqa: F401

    torch.set_num_threads(1)
    if sys.argv[1] == "fsdp":
        pretend_a_gpu()
    running = {in_child(rank, list(map(json.loads, sys.argv[2:]))) for rank in range(2)}
    while running:
        process, status = os.wait()
        running.remove(process)
        if status:  # the other one would wait for it in vain
            for other in running:
                os.kill(other, signal.SIGKILL)
            raise SystemExit(1)
