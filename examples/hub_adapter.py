"""An adapter as others will load it: by directory or hub id, in either file format, with a card.

    python examples/hub_adapter.py --output my-adapter
    python examples/hub_adapter.py --output my-adapter --push owner/name    # uploads it; needs a token

By default the shipped adapter is loaded; --adapter takes a directory or a hub id, such as
declare-lab/delta-mem_qwen3_4b-instruct with --model Qwen/Qwen3-4B-Instruct-2507.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from deltamem_fast import export_adapter, patch_model, push_to_hub, save_adapter, unpatch_model
from deltamem_fast.recall.weights import find_weights

shipped = find_weights()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(shipped.backbone), help="a directory or hub id")
parser.add_argument("--adapter", default=str(shipped.adapters["msw"]), help="a directory or hub id, trained for MODEL")
parser.add_argument("--output", default="my-adapter", help="a directory; gets the adapter in both formats")
parser.add_argument("--push", metavar="OWNER/NAME", help="upload it there, too")
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
patch_model(model, options.adapter)
ours = save_adapter(model, Path(options.output) / "safetensors")  # our format
theirs = export_adapter(model, Path(options.output) / "released", format="released")  # for the released code
print("wrote", ours, "and", theirs)
if options.push:
    print("uploaded:", push_to_hub(model, options.push, private=True))

tokens = torch.tensor([[1, 2, 3, 4]])
with torch.no_grad():
    before = model(tokens).logits
    for directory in (ours, theirs):
        unpatch_model(model)  # the bare backbone again, bit for bit
        patch_model(model, directory)
        print(directory.name, "gives the same logits:", torch.equal(model(tokens).logits, before))
