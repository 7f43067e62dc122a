"""A conversation that survives a restart: every turn is saved, and the next start goes on where the last one ended.

    python examples/session_restart.py "The code of Corpus is 42."
    python examples/session_restart.py "What is the code of Corpus?"

Only the newest turn stays in the context here; what was said before it is answered from the memory.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_fast import MemorySession, patch_model
from deltamem_fast.recall.weights import find_weights

shipped = find_weights()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("say", nargs="+", help="what to say, one turn each")
parser.add_argument("--model", default=str(shipped.backbone), help="a directory or hub id")
parser.add_argument("--adapter", default=str(shipped.adapters["msw"]), help="a directory or hub id, trained for MODEL")
parser.add_argument("--device", default="cpu")
parser.add_argument("--session", default="conversation", help="the directory that holds the conversation")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device).eval()
patch_model(model, options.adapter)

if Path(options.session).is_dir():
    session = MemorySession.load(options.session, model, tokenizer)
    print(f"(goes on after {session.turns} turn(s), {len(session.messages)} messages)")
else:
    session = MemorySession(model, tokenizer, context_turns=1, generation={"max_new_tokens": 64})

for text in options.say:
    print("you:  ", text)
    print("model: ", end="")
    for piece in session.send(text):
        print(piece, end="", flush=True)
    print()
    # Whole or not at all: killed in the middle, the last saved turn is still there. cache=False: some kilobytes.
    session.save(options.session, cache=False)
