"""Counts up in rows that others count up too: PATH TIMES THREADS ID... Prints how many writes were acknowledged."""

import sys
import threading

from bank_support import add_one, open_store


def main(path, times, threads, *ids):
    done, clashes = [], []
    with_store = open_store(path, row_bytes=64)

    def count():
        for _ in range(int(times)):
            _, conflicts = add_one(with_store, list(ids))
            done.append(1)
            clashes.append(conflicts)

    workers = [threading.Thread(target=count) for _ in range(int(threads))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with_store.close()
    print(len(done), sum(clashes))


main(*sys.argv[1:])
