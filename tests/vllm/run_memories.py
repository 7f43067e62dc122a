"""Memories in an engine whose core and workers are processes of their own.

A job from stdin: where the checkpoint is, the engine's settings, batches of prompts, a file with memories. To stdout:
what was generated; the file then holds the memories as they are afterwards.
"""

import json
import os
import sys
from pathlib import Path

from tests.vllm.run_engine import MARK


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from vllm import SamplingParams

    from deltamem_fast import MemoryState
    from deltamem_fast.vllm.offline import generate, memory_model
    from tests.vllm.engines import engine

    directory, settings, batches, tokens, file = json.load(sys.stdin)
    found = []
    with engine(Path(directory), **settings) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        memory = MemoryState.load(file, memory_model(llm))
        for batch in batches:
            outputs = generate(llm, batch, params, memory=memory, use_tqdm=False)
            found.append([list(output.outputs[0].token_ids) for output in outputs])
        memory.save(file)
    print("\n" + MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
