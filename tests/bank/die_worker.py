"""Opens a store, writes a batch, deletes, and kills itself at the n-th SQL statement: PATH N. Prints each step done."""

import os
import signal
import sys

from bank_support import open_store, sealed

from deltamem_fast.storage import bank_file

path, last = sys.argv[1], int(sys.argv[2])
seen = 0
connect = bank_file.connect


def count(statement):
    global seen
    seen += 1
    if seen == last:
        os.kill(os.getpid(), signal.SIGKILL)


def traced(*arguments):
    connection = connect(*arguments)
    connection.set_trace_callback(count)
    return connection


bank_file.connect = traced
store = open_store(path)
print("opened", flush=True)
ids = ["a", "b", "c"]
store.write(ids, [0, 0, 0], [sealed({"id": id}) for id in ids])
print("written", flush=True)
store.delete(["b"])
print("deleted", flush=True)
