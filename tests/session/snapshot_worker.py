"""Saves prepared snapshots, one after another, until it is killed; imports nothing but the storage.

python snapshot_worker.py PREPARED DIRECTORY FIRST

PREPARED holds N.json and N.safetensors for N = 0, 1, …; each is committed to DIRECTORY, from FIRST on, and N printed
once the commit has returned. After the last one it starts over with the last, so that there is always a write to kill.
"""

import itertools
import json
import sys
from pathlib import Path

from deltamem_fast.storage import snapshots

FORMAT, FORMAT_VERSION = "deltamem-session", 2


def main() -> None:
    prepared, directory, first = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    last = len(list(prepared.glob("*.json"))) - 1
    print("ready", flush=True)
    for wanted in itertools.count(first):
        number = min(wanted, last)
        content = json.loads((prepared / f"{number}.json").read_text(encoding="utf-8"))
        data = (prepared / f"{number}.safetensors").read_bytes()
        snapshots.commit(
            directory, FORMAT, FORMAT_VERSION, content, {"state": lambda path, data=data: path.write_bytes(data)}
        )
        print(number, flush=True)


if __name__ == "__main__":
    assert not {"torch", "transformers", "numpy"} & set(sys.modules)
    main()
