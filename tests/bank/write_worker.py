"""Writes batches of sealed rows until it is killed: PATH SEED DURABLE CHECKPOINT_BYTES DELETES.

Prints that it is ready, then each write and delete before it begins, and what has become of it once that is known.
"""

import json
import os
import random
import sys

from bank_support import open_store, sealed

from deltamem_fast.storage import bank_sqlite, bank_store

IDS = [f"user-{n}" for n in range(24)]


def say(**fields):
    print(json.dumps(fields), flush=True)


def main(path, seed, durable, checkpoint_bytes, deletes):
    assert "torch" not in sys.modules
    draw = random.Random(seed)
    print("ready", flush=True)  # what comes before takes as long as the machine is busy
    # Few bytes of log: then it is copied into the file at nearly every write, and the kill often falls into that.
    bank_sqlite.WAL_BYTES = int(checkpoint_bytes)
    store = open_store(path, durable=durable == "durable")
    for turn in range(1_000_000):
        ids = draw.sample(IDS, draw.choice((1, 3, 8)))
        if deletes == "deletes" and draw.random() < 0.1:
            say(begun="delete", ids=ids, token=None)
            store.delete(ids)
            say(done=0)
            continue
        versions, _ = store.read(ids)
        token = f"{seed}-{os.getpid()}-{turn}"
        say(begun="write", ids=ids, token=token)
        try:
            say(done=store.write(ids, versions, [sealed({"id": id, "token": token, "ids": ids}) for id in ids]))
        except bank_store.BankConflict:
            say(refused=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
