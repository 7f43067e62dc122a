"""Train an adapter of your own, and see what it does to the answers.

    python examples/train_your_own.py --steps 20
    python examples/train_your_own.py --model Qwen/Qwen3-4B-Instruct-2507 --data train.jsonl --steps 1000 --device cuda

A line of the data is {"messages": [...]}: the last message is the answer, the last user turn before it is read, and all
before that is written into the memory. Without --data a few lines are made up; they are enough to see it run, and
not to learn anything from (the shipped adapters took 2,500 steps).
"""

import argparse
import json
import random
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_fast import DeltaMemConfig
from deltamem_fast.recall.weights import find_weights
from deltamem_fast.training import TrainingOptions, read_log, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(find_weights().backbone), help="a directory or hub id")
parser.add_argument("--data", help="a JSONL file (default: lines that are made up)")
parser.add_argument("--output", default="my-adapter")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--device", default="cpu")
options = parser.parse_args()

if options.data is None:
    draw = random.Random(0)
    lines = []
    for _ in range(64):
        name, code = draw.choice(("Corpus", "Lumzel", "Tarven")), draw.randint(10, 59)
        said = (f"The code of {name} is {code}.", "OK.", f"What is the code of {name}?", str(code))
        lines.append({"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(said)]})
    options.data = Path(options.output).with_suffix(".jsonl")
    options.data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device)
recipe = TrainingOptions(output=options.output, steps=options.steps, lr=1e-3, cpu=options.device == "cpu")
result = train(model, tokenizer, [options.data], recipe, DeltaMemConfig.tsw(rank=8))

losses = [entry["answer_loss"] for entry in read_log(result.output / "log.jsonl") if "loss" in entry]
print(f"{result.steps} steps; loss of the answers: {losses[0]:.3f} -> {losses[-1]:.3f}")
print(f'patch_model(model, "{result.output}") loads it')
