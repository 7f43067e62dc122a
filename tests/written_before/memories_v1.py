"""Writes ``memories_v1``: formats memory 1, bank 1, bank export 1. It was run once, with commit da92e0d, and once with
00def18 for ``users-3.bank.gz``, bank 3:

PYTHONPATH=<its checkout>:<its checkout>/kernels:tests python tests/written_before/memories_v1.py <new folder>
"""

import gzip
import sys
from pathlib import Path

import memories_before

from deltamem_fast import MemoryBank

target = Path(sys.argv[1])
target.mkdir(parents=True)
patched = memories_before.model()
memory = memories_before.memory(patched)
memory.frozen = True
memory.save(target / "memory.safetensors")
memory.frozen = False
with MemoryBank(target / "users.bank", patched) as bank:
    bank.commit(memories_before.IDS, memory)
    bank.export_all(target / "export", batch_size=2)
(target / "users.bank-lock").unlink()
(target / "users.bank.gz").write_bytes(gzip.compress((target / "users.bank").read_bytes(), mtime=0))
(target / "users.bank").unlink()
