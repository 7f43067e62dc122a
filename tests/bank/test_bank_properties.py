"""Any sequence of operations leaves a store as a dict would be."""

import tempfile
from contextlib import closing

from bank_support import check_file, open_store
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_fast.storage.bank_store import BankConflict

SIZE = 40
names = st.sampled_from(["a", "b", "ab", "é", "😀", "%", "a'b"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=3
)
batches = st.lists(names, max_size=4, unique=True)
operations = st.one_of(
    st.tuples(st.just("write"), batches, st.sampled_from(["current", "old", "none", "any"]), st.integers(0, 255)),
    st.tuples(st.just("delete"), batches),
    st.tuples(st.just("reopen")),
    st.tuples(st.just("list"), st.text(max_size=1), st.booleans(), st.none() | st.integers(0, 3), st.integers(0, 3)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(operations, max_size=14))
def test_like_a_dict(steps):
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/users.bank"
        store = open_store(path, SIZE)
        model: dict[str, tuple[int, bytes]] = {}
        ever: dict[str, int] = {}  # the last version that each id had before the present one
        highest = 0
        for kind, *step in steps:
            if kind == "reopen":
                store.close()
                store = open_store(path, SIZE)
            elif kind == "delete":
                there = [id for id in step[0] if id in model]
                ever |= {id: model[id][0] for id in there}
                assert store.delete(step[0]) == len(there)
                for id in there:
                    del model[id]
            elif kind == "list":
                prefix, descending, limit, offset = step
                wanted = sorted((id for id in model if id.startswith(prefix)), reverse=descending)
                wanted = wanted[offset : None if limit is None else offset + limit]
                entries = store.entries(
                    prefix=prefix.encode(errors="ignore").decode(), descending=descending, limit=limit, offset=offset
                )
                assert [entry.id for entry in entries] == wanted
                assert all(entry.version == model[entry.id][0] for entry in entries)
            else:
                ids, mode, byte = step
                rows = [bytes([byte, n]) * (SIZE // 2) for n in range(len(ids))]
                current = [model[id][0] if id in model else 0 for id in ids]
                expected = {
                    "current": current, "old": [ever.get(id, 0) for id in ids], "none": [0] * len(ids), "any": None,
                }[mode]  # fmt: skip
                moved = {id: (e, c) for id, e, c in zip(ids, expected or current, current) if e != c}
                try:
                    version = store.write(ids, expected, rows)
                except BankConflict as conflict:
                    assert moved and conflict.moved == moved
                    continue
                assert not moved and version > highest
                highest = version
                ever |= {id: model[id][0] for id in ids if id in model}
                model |= {id: (version, row) for id, row in zip(ids, rows)}
            with closing(open_store(path, SIZE)) as other:
                found = [entry.id for entry in other.entries()]
                assert found == sorted(model) and other.count() == len(model)
                assert dict(zip(found, zip(*other.read(found)))) == model
        store.close()
        check_file(path)
