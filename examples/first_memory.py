"""A first memory: tell two facts, drop their context, ask, revise one, ask again, save.

    python examples/first_memory.py
    python examples/first_memory.py --model Qwen/Qwen3-4B-Instruct-2507 \\
        --adapter declare-lab/delta-mem_qwen3_4b-instruct

Without --model it takes the small backbone and the adapter in the package, which know one small world: people with
codes, objects in places.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_fast import MemoryState, ingest, patch_model, retrieve, revise
from deltamem_fast.recall.weights import find_weights

shipped = find_weights()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(shipped.backbone), help="a directory or hub id")
parser.add_argument("--adapter", default=str(shipped.adapters["msw"]), help="a directory or hub id, trained for MODEL")
parser.add_argument("--device", default="cpu")
parser.add_argument("--output", default="memory.safetensors")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device)
patch_model(model, options.adapter)

memory = MemoryState.zeros(model)
for fact in ("The code of Corpus is 42.", "The glass clock is in the hall."):
    ingest(model, tokenizer, memory, fact)  # each in a context of its own, which is then gone
questions = ("What is the code of Corpus?", "Where is the glass clock?")
for question in questions:
    print(question, retrieve(model, tokenizer, memory, question, max_new_tokens=16))

revise(model, tokenizer, memory, "Now the code of Corpus is 43.")
for question in questions:
    print("Revised:", question, retrieve(model, tokenizer, memory, question, max_new_tokens=16))

memory.save(options.output)
same = MemoryState.load(options.output, model)  # in another process, on a model patched with the same adapter
print("Saved to", options.output, "and read back:", all((same[layer] == memory[layer]).all() for layer in memory))
