"""Forks while its store is open and a thread writes: PATH CHILDREN TIMES. Prints how often it counted, in all."""

import ctypes
import os
import sys
import threading
import traceback

from bank_support import add_one, open_store

path, children, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
store = open_store(path, row_bytes=64)
add_one(store, ["n"])
counted, stop = [1], threading.Event()


def count():
    while not stop.is_set():
        add_one(store, ["n"])
        counted[0] += 1


def in_child(work):
    """The process id of a child that does ``work`` and ends."""
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def more():
    for _ in range(times):
        add_one(store, ["n"])


def end(process):
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


thread = threading.Thread(target=count)
thread.start()
running = [in_child(more) for _ in range(children)]
stop.set()
thread.join()
store.close()  # while children write: their log must not be taken from them
other = open_store(path, row_bytes=64)
add_one(other, ["n"])
other.close()
for process in running:
    end(process)
assert other._file._closed and store._file._closed

# A fork that Python does not see: refused in the child, as SQLite's locks stayed behind.
store = open_store(path, row_bytes=64)
store.count()
process = ctypes.PyDLL(None).fork()
if process == 0:
    try:
        store.count()
    except RuntimeError as error:
        os._exit(0 if "forked from outside Python" in str(error) else 2)
    os._exit(3)
end(process)
store.close()
print(counted[0] + 1 + children * times)
