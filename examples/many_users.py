"""Many users, one model: each has a memory in a bank, and one batch reads and writes those of several.

    python examples/many_users.py
    python examples/many_users.py --model Qwen/Qwen3-4B-Instruct-2507 \\
        --adapter declare-lab/delta-mem_qwen3_4b-instruct

The bank is one SQLite file. It may be opened by several processes; a commit that another one has overtaken is refused.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from deltamem_fast import BankConflict, MemoryBank, patch_model
from deltamem_fast.recall.weights import find_weights

shipped = find_weights()
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(shipped.backbone), help="a directory or hub id")
parser.add_argument("--adapter", default=str(shipped.adapters["msw"]), help="a directory or hub id, trained for MODEL")
parser.add_argument("--device", default="cpu")
parser.add_argument("--bank", default="users.sqlite")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device).eval()
patch_model(model, options.adapter)


def answer(bank: MemoryBank, said: dict[str, str], frozen: bool = False) -> list[str]:
    """One turn of several users, each under a memory of their own."""
    chats = [[{"role": "user", "content": text}] for text in said.values()]
    shown = {"add_generation_prompt": True, "padding": True, "return_tensors": "pt", "return_dict": True}
    batch = tokenizer.apply_chat_template(chats, **shown).to(model.device)
    while True:
        memory = bank.gather(said)  # a row for each id; ids that the bank does not know start empty
        memory.frozen = frozen
        tokens = model.generate(**batch, memory=memory, max_new_tokens=16, do_sample=False)
        try:
            if not frozen:
                bank.commit(said, memory)  # all rows or none
            return tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        except BankConflict:
            continue  # another process has committed one of them meanwhile: read it, and answer again


with MemoryBank(options.bank, model) as bank:
    answer(bank, {"ada": "The code of Corpus is 42.", "ben": "The code of Corpus is 17."})
    asked = dict.fromkeys(("ada", "ben", "eve"), "What is the code of Corpus?")
    for user, text in zip(asked, answer(bank, asked, frozen=True)):
        print(f"{user}: {text.strip()}")
    print(len(bank), "memories:", ", ".join(f"{entry.id} ({entry.bytes:,} bytes)" for entry in bank.list()))
