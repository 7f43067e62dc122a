"""What lies in a session's directory is not trusted, is private, and is neither lost nor half-read."""

import contextlib
import copy
import errno
import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import stat
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from session_support import change_manifest, everything, old_session, says, state_bits, tiny_session, write_manifest
from tokenizers_for_tests import chatml_tokenizer, thinking_tokenizer

from deltamem_fast import MemorySession
from deltamem_fast.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConflictError,
    DeltaMemError,
    FileAccessError,
    FileFormatError,
    StateError,
    WaitedTooLongError,
    WrongPathKindError,
)
from deltamem_fast.session import saving
from deltamem_fast.session.forgetting import places_of
from deltamem_fast.storage import snapshots
from deltamem_fast.text.settings import GENERATION

TOLD, ASKED = "My dog is called Rex. He is old.", "Where did Ada go?"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A session of two turns, and a directory where it was saved; neither is changed by a test."""
    session = tiny_session(chatml_tokenizer(), context_turns=2)
    for text in (TOLD, ASKED):
        session.answer(text, max_new_tokens=3)
    return session, session.save(tmp_path_factory.mktemp("told") / "saved")


@pytest.fixture
def saved(told, tmp_path):
    """The session, and a copy of its directory."""
    session, directory = told
    return session, shutil.copytree(directory, tmp_path / "saved")


def load(session, directory, **arguments):
    return MemorySession.load(directory, session.model, session.tokenizer, **arguments)


# --- what a file may decide

CODE = (
    {"custom_generate": "somebody/code", "trust_remote_code": True},
    {"trust_remote_code": True},
    {"penalty_alpha": 0.6},
    {"dola_layers": "high"},
    {"assistant_model": "somebody/model"},
    {"generation_config": "somebody/model"},
    {"cache_implementation": "static"},
    {"compile_config": {}},
    {"watermarking_config": {}},
    {"tokenizer": "somebody/model"},
    {"streamer": 1},
    {"prefill_chunk_size": 1},
)
VALUES = (
    ("max_new_tokens", 0), ("max_new_tokens", 2**20 + 1),
    ("max_new_tokens", 10**400), ("max_new_tokens", True), ("max_new_tokens", "9"),
    ("temperature", -1.0), ("temperature", 10**400), ("top_p", 1.5), ("do_sample", "yes"), ("top_k", -1),
    ("stop_strings", [""]), ("stop_strings", [1]), ("eos_token_id", [10**6]), ("pad_token_id", "a"),
    ("bad_words_ids", [1]), ("bad_words_ids", []), ("sequence_bias", [[[1], "a"]]), ("suppress_tokens", [-1]),
    ("exponential_decay_length_penalty", [1]), ("repetition_penalty", 0),
)  # fmt: skip


@pytest.mark.parametrize("version", (1, 2))
def test_generation_settings_of_a_file_choose_tokens_alone(saved, version):
    session, directory = saved
    for generation in (*CODE, *({name: value} for name, value in VALUES)):

        def change(manifest, generation=generation):
            manifest["format_version"], manifest["settings"]["generation"] = version, generation

        change_manifest(directory, change)
        name = next(iter(generation))
        with pytest.raises(FileFormatError, match=rf"session\.json: settings\.generation: '?{name}'?: "):
            load(session, directory)
    # What the caller gives takes its place.
    assert load(session, directory, generation={"max_new_tokens": 2}).generation == {"max_new_tokens": 2}


def test_a_template_of_a_file_is_refused(saved):
    session, directory = saved
    for template in (
        {"chat_template": "{{ cycler.__init__ }}"}, {"tokenize": False}, {"return_dict": True}, {"padding": "longest"},
        {"tokenizer_kwargs": {}}, {"messages": []}, {"sanitize_control_tokens": True}, {"self": 1},
        {"tools": ["os.system"]}, {"documents": "a"}, {"a b": 1},
    ):  # fmt: skip
        change_manifest(directory, lambda manifest, template=template: manifest["settings"].update(template=template))
        with pytest.raises(FileFormatError, match=r"session\.json: settings\.template: "):
            load(session, directory)
    assert load(session, directory, template={"enable_thinking": False}).template == {"enable_thinking": False}
    kept = {"enable_thinking": False, "tools": [{"name": "clock"}], "date": "today", "level": 3}
    change_manifest(directory, lambda manifest: manifest["settings"].update(template=kept))
    assert load(session, directory).template == kept


def test_a_templates_arguments_may_have_any_name(saved):
    session, directory = saved
    names = ("granularity", "name", "tokenizer", "template", "template_kwargs", "text", "config", "header", "messages_")
    change_manifest(directory, lambda manifest: manifest["settings"].update(template=dict.fromkeys(names, "y")))
    again = load(session, directory)
    assert again.answer(ASKED, max_new_tokens=3) == load(session, directory, template={}).answer(
        ASKED, max_new_tokens=3
    )
    assert isinstance(again.retrieve(ASKED, max_new_tokens=3), str)


def test_what_may_be_loaded_may_be_saved_and_nothing_else(told, tmp_path):
    session = MemorySession(told[0].model, told[0].tokenizer)
    examples = {
        "stop_strings": ["a"], "bad_words_ids": [[1]], "sequence_bias": [[[1], 0.5]], "eos_token_id": [1, 2],
        "exponential_decay_length_penalty": [3, 1.5], "suppress_tokens": [5], "begin_suppress_tokens": [5],
    }  # fmt: skip
    session.generation = {name: examples.get(name, 1) for name in GENERATION}
    assert load(session, session.save(tmp_path)).generation == session.generation
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for generation in (*CODE, *({name: value} for name, value in VALUES)):
        session.generation = generation
        with pytest.raises(ArgumentError, match=rf"session: generation: '?{next(iter(generation))}'?: "):
            session.save(tmp_path)
    session.generation, session.template = {}, {"chat_template": "x"}
    with pytest.raises(ArgumentError, match="session: template: chat_template: "):
        session.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_arguments_are_named_before_anything_happens(told):
    session = told[0]
    for template in ({"tokenize": False}, {"messages": []}):
        with pytest.raises(ArgumentError, match=f"template: got {next(iter(template))}"):
            MemorySession(session.model, session.tokenizer, template=template)

    class Processor:
        chat_template = "x"

    with pytest.raises(ArgumentError, match="tokenizer: got Processor"):
        MemorySession(session.model, Processor())
    for name, value in VALUES:
        if name not in ("eos_token_id", "suppress_tokens"):
            with pytest.raises(ArgumentError, match=f"options: {name}: got"):
                session.answer(ASKED, **{name: value})
            with pytest.raises(ArgumentError, match=f"generation: {name}: got"):
                MemorySession(session.model, session.tokenizer, generation={name: value})
    for model in (None, "Qwen/Qwen3-4B"):
        with pytest.raises(ArgumentTypeError, match="model: got"):
            MemorySession(model, session.tokenizer)
    with pytest.raises(ArgumentError, match="text: got half of a surrogate pair"):
        session.answer("a \ud800")


# --- damage


def test_every_flipped_bit_is_seen(saved):
    session, directory = saved
    chooser = random.Random(5)
    for path in (directory / "session.json", next(directory.glob("*.safetensors"))):
        data = path.read_bytes()
        # The beginning, with the checksum in it, byte by byte; the rest here and there.
        places = [*range(0, 90, 3), *(chooser.randrange(len(data)) for _ in range(40)), len(data) - 1]
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1 << chooser.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(FileFormatError, match=path.name.split("-")[0]):
                load(session, directory)
        for cut in (0, 1, 80, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            with pytest.raises(FileFormatError):
                load(session, directory)
        path.write_bytes(data + b" ")
        with pytest.raises(FileFormatError):
            load(session, directory)
        path.write_bytes(data)
    assert everything(load(session, directory)) == everything(session)


OTHERS = (None, True, -1, 10**400, 1.5, "a", "\ud800", [], {}, [[]], [{}], {"a": 1}, [None] * 3)


def fields_of(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from fields_of(value[key], (*path, key))


def with_field(value, path, new):
    if not path:
        return new
    made = copy.copy(value)
    made[path[0]] = with_field(value[path[0]], path[1:], new)
    return made


def mutated(manifest, chooser):
    """A manifest with one field of another kind, gone, or beside a new one."""
    path = chooser.choice([path for path in fields_of(manifest) if path and path[0] != "sha256"])
    made = with_field(manifest, path, chooser.choice(OTHERS))
    if chooser.random() < 0.2:
        parent = made
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent, dict):
            parent = dict(parent)
            parent.pop(path[-1])
            made = with_field(manifest, path[:-1], parent)
    return path, made


@pytest.mark.parametrize("version", (1, 2))
def test_every_field_has_its_kind(saved, version):
    session, directory = saved
    change_manifest(directory, lambda manifest: manifest.update(format_version=version))
    path = directory / "session.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256", None)
    chooser, wrong = random.Random(version), 0
    for _ in range(int(os.environ.get("DELTAMEM_MUTATIONS", 150))):
        field, made = mutated(manifest, chooser)
        write_manifest(path, made)
        try:
            found = load(session, directory)
        except FileFormatError as error:
            wrong += 1
            assert str(directory) in str(error), field
        else:
            # What may be changed: texts, names, flags, numbers within their bounds.
            with contextlib.suppress(ArgumentError):  # a system message that no tokenizer takes
                found.answer(ASKED, max_new_tokens=1)
    assert wrong > 75


def test_numbers_without_end_and_nesting_without_end(saved):
    session, directory = saved
    path = directory / "session.json"
    text = path.read_text()
    for name, value in (
        ("generation", "NaN"), ("generation", "1e999"), ("generation", "Infinity"), ("context_turns", "9" * 5000),
        ("remembers", "[" * 100_000 + "]" * 100_000), ("template", '{"a": ' + "[" * 300 + "]" * 300 + "}"),
        ("format_version", "1e0"), ("generation", "0"), ("remembers", '1, "remembers": true'),
    ):  # fmt: skip
        lines = [f'"{name}": {value},' if f'"{name}"' in line else line for line in text.splitlines()]
        lines = [line for line in lines if '"sha256": "' not in line or line.startswith("      ")]
        path.write_text("\n".join(lines).replace('"format_version": 3', '"format_version": 1'))
        with pytest.raises(FileFormatError, match="session.json"):
            load(session, directory)


def test_tensors_that_are_none_of_the_session(saved):
    session, directory = saved
    path = next(directory.glob("*.safetensors"))
    good = load_file(path)

    def changed(name, change):
        return {**good, name: change(good[name].clone()).contiguous()}

    def put(tensors):
        save_file(tensors, path)
        entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": snapshots.digest(path)}
        change_manifest(directory, lambda manifest: manifest["files"].update(state=entry))

    def spoil(value):
        def change(tensor):
            tensor.view(-1)[0] = value
            return tensor

        return change

    for tensors, name in (
        (changed("memory.0", spoil(float("nan"))), "memory.0"),
        (changed("memory.1", spoil(float("inf"))), "memory.1"),
        (changed("memory.0", torch.Tensor.half), "memory.0"),
        (changed("memory.0", lambda tensor: tensor[:, :, :7]), "memory.0"),
        (changed("memory.0", lambda tensor: tensor[:2]), "memory.0"),
        (changed("skipped", spoil(-1)), "skipped"),
        (changed("skipped", torch.Tensor.long), "skipped"),
        (changed("cache.0.keys", lambda tensor: tensor[:, :, 1:]), "cache.0.keys"),
        (changed("cache.0.values", torch.Tensor.int), "cache.0.values"),
        ({name: tensor for name, tensor in good.items() if name != "cache.1.keys"}, "holds"),
        ({**good, "more": torch.zeros(1)}, "holds"),
    ):
        put(tensors)
        with pytest.raises(FileFormatError, match=rf"{path.name}: {name}"):
            load(session, directory)
    # Keys and values that cannot be used are computed again.
    for change in (lambda tensor: tensor[..., :8], spoil(float("nan"))):
        put(changed("cache.0.keys", change))
        assert load(session, directory)._now.cache is None


def test_sessions_of_the_version_before(tmp_path):
    tokenizer = chatml_tokenizer()
    for name in ("session_v1", "session_v1_small"):
        directory = tmp_path / name
        session = load(old_session(tokenizer, directory, name), directory)
        manifest = json.loads((directory / "session.json").read_text())
        assert manifest["format_version"] == 1
        assert session.messages == manifest["messages"] and session.turns == 2 and len(session.context) == 2
        assert (session.system, session.template) == ("Be kind.", {"enable_thinking": False})
        assert session.generation == {"max_new_tokens": 3, "do_sample": False} and session.limits.turns == 1
        stored = load_file(directory / manifest["files"]["state"]["name"])
        assert all(torch.equal(session.memory[layer], stored[f"memory.{layer}"][-1:]) for layer in session.memory)
        assert (session._now.cache is None) == (name != "session_v1")
        assert session.answer(ASKED) and session.turns == 3
        session.save(directory)  # in its place
        assert json.loads((directory / "session.json").read_text())["format_version"] == 3
        assert everything(load(session, directory)) == everything(session)


def test_a_session_of_another_backbone_is_adopted_when_that_is_asked_for(saved):
    session, directory = saved

    def other(manifest):
        manifest["identity"]["backbone_fingerprint"] = "0" * 64

    change_manifest(directory, other)
    with pytest.raises(FileFormatError, match=r"saved under backbone .*; adopt=True takes it all the same"):
        load(session, directory)
    found = load(session, directory, adopt=True)
    assert found._now.cache is None and everything(found)[:-1] == everything(session)[:-1]
    found.save(directory)
    assert load(session, directory).messages == session.messages
    other_shape = tiny_session(session.tokenizer, "msw")
    with pytest.raises(FileFormatError, match=r"memory\.0: got "):
        load(other_shape, directory, adopt=True)


# --- who writes


def test_a_snapshot_that_others_saved_is_not_replaced(told, tmp_path):
    model, tokenizer = told[0].model, told[0].tokenizer
    first = MemorySession(model, tokenizer)
    first.save(tmp_path)
    second = load(first, tmp_path)
    first.answer(TOLD, max_new_tokens=2)
    first.save(tmp_path)
    second.answer(ASKED, max_new_tokens=2)
    with pytest.raises(ConflictError, match=r"holds snapshot 2 \(\w+\), which others .* saved here is 1 \(\w+\)"):
        second.save(tmp_path)
    with pytest.raises(ConflictError, match="none was loaded from or saved to it here"):
        MemorySession(model, tokenizer).save(tmp_path)
    assert load(first, tmp_path).messages == first.messages
    second.save(tmp_path / "other")
    second.save(tmp_path, overwrite=True)
    assert load(first, tmp_path).messages == second.messages
    with pytest.raises(ConflictError):
        first.save(tmp_path)
    os.rename(tmp_path / "other", tmp_path / "moved")
    second.save(tmp_path / "moved")  # it is the snapshot that counts, not where it lies
    shutil.copytree(tmp_path / "moved", tmp_path / "backup")
    second.save(tmp_path / "moved")
    second.save(tmp_path)
    with pytest.raises(ConflictError):
        second.save(tmp_path / "backup")


def test_newer_formats_and_other_files_are_never_overwritten(saved):
    session, directory = saved
    path = directory / "session.json"
    good = path.read_bytes()
    for change in ({"format_version": 4}, {"format": "somebody's"}):
        path.write_text(json.dumps(json.loads(good) | change))
        before = path.read_bytes()
        for overwrite in (False, True):
            with pytest.raises(FileFormatError, match="it is not overwritten"):
                session.save(directory, overwrite=overwrite)
        assert path.read_bytes() == before
    path.write_bytes(good[:-9])
    with pytest.raises(FileFormatError, match=r"overwrite=True does"):
        session.save(directory)
    session.save(directory, overwrite=True)
    assert load(session, directory).turns == 2


def test_the_lock_is_no_way_out(saved, tmp_path):
    session, directory = saved
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (directory / ".lock").unlink()
    (directory / ".lock").symlink_to(victim)
    with pytest.raises(WrongPathKindError, match=r"\.lock: a symbolic link"):
        session.save(directory)
    (directory / ".lock").unlink()
    os.mkfifo(directory / ".lock")
    with pytest.raises(WrongPathKindError, match=r"\.lock: not a file"):
        session.save(directory)
    assert victim.read_text() == "mine"


def test_a_linked_manifest_is_no_way_out(saved, tmp_path):
    session, directory = saved
    manifest = directory / "session.json"
    manifest.unlink()
    for target in (tmp_path / "elsewhere" / "deep" / "file", tmp_path / "mine.json"):
        manifest.symlink_to(target)
        with pytest.raises(WrongPathKindError, match=r"session\.json: a symbolic link, allowed a file"):
            session.save(directory, overwrite=True)
        manifest.unlink()
        (tmp_path / "mine.json").write_text("mine")
    assert not (tmp_path / "elsewhere").exists() and (tmp_path / "mine.json").read_text() == "mine"


def commit_numbers(directory, write=lambda path: path.write_bytes(b"1")):
    return snapshots.commit(directory, "numbers", 1, {}, {"state": write})


def test_a_child_that_was_forked_does_not_keep_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "_PATIENCE", 0.05)
    kept = []  # as a child has it: another descriptor of the same open file

    def fork(path):
        (lock,) = (
            int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
            and os.path.realpath(f"/proc/self/fd/{fd}") == str(tmp_path / ".lock")
        )  # fmt: skip
        kept.append(os.dup(lock))
        path.write_bytes(b"1")

    commit_numbers(tmp_path, fork)
    commit_numbers(tmp_path)
    # One that lives on while its parent was killed.
    fcntl.flock(kept[0], fcntl.LOCK_EX)
    with pytest.raises(WaitedTooLongError, match=r"directory: .*\.lock: others wrote for 0\.05 s"):
        commit_numbers(tmp_path)
    os.close(kept[0])
    commit_numbers(tmp_path)


def test_without_locks_the_files_of_another_writer_stay(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    old, new = (tmp_path / f"state-{digit * 16}.safetensors" for digit in "01")
    for path in (old, new):
        path.write_bytes(b"another's")
    os.utime(old, (0, 0))
    commit_numbers(tmp_path)
    assert new.exists() and not old.exists()


def test_a_data_file_that_grew_is_not_read(saved):
    session, directory = saved
    (data,) = directory.glob("state-*")
    os.truncate(data, 2**40)  # sparse
    with pytest.raises(FileFormatError, match=r"state-.*: damaged: not what was written"):
        load(session, directory)


def test_a_home_directory_is_expanded(told, tmp_path, monkeypatch):
    session = MemorySession(told[0].model, told[0].tokenizer)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert session.save("~/ada") == tmp_path / "home" / "ada"
    assert load(session, "~/ada").turns == 0 and not (tmp_path / "~").exists()


def test_a_reader_beside_a_writer_gets_the_old_or_the_new_one(tmp_path):
    """Every read is a hit between two renames: the writer replaces the snapshot whenever the manifest was read."""
    read_bytes, count = snapshots.read_bytes, 0

    def commit(number):
        write = {"state": lambda path: path.write_bytes(b"%d" % number)}
        snapshots.commit(tmp_path, "numbers", 1, {"number": number}, write)

    def read(path, *arguments, **options):
        nonlocal count
        data = read_bytes(path, *arguments, **options)
        if path.name == snapshots.MANIFEST and threading.current_thread() is reader and count < 10:
            count += 1
            thread = threading.Thread(target=commit, args=(count,))
            thread.start()
            thread.join()
        return data

    commit(0)
    reader = threading.current_thread()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "read_bytes", read)
        found = snapshots.read(tmp_path, "numbers", 1, lambda manifest, files: (manifest["number"], files["state"]))
        assert found == (10, b"10")
        # One that is replaced for ever is given up, with the reason.
        count = 0
        patch.setattr(snapshots, "_TRIES", 5)
        with pytest.raises(StateError, match="was replaced 5 times while it was read"):
            snapshots.read(tmp_path, "numbers", 1, lambda manifest, files: None)


# --- private, whole, swept


def modes(directory):
    return {path.name.split("-")[0]: stat.S_IMODE(path.lstat().st_mode) for path in directory.iterdir()}


def test_sessions_are_private_and_keep_a_mode_that_was_chosen(told, tmp_path):
    session = MemorySession(told[0].model, told[0].tokenizer)
    before = os.umask(0o022)
    try:
        directory = session.save(tmp_path / "new" / "ada")
        assert modes(directory) == {".lock": 0o600, "session.json": 0o600, "state": 0o600}
        assert [stat.S_IMODE(path.stat().st_mode) for path in (directory, directory.parent)] == [0o700] * 2
        (directory / "session.json").chmod(0o640)
        session.save(directory)
        assert modes(directory) == {".lock": 0o600, "session.json": 0o640, "state": 0o640}
        (directory / "session.json").chmod(0o660)  # who may write it may lock it
        session.save(directory)
        assert modes(directory) == {".lock": 0o660, "session.json": 0o660, "state": 0o660}
    finally:
        os.umask(before)


def test_what_killed_writers_left_is_swept(saved):
    session, directory = saved
    left = (
        ".state-0123456789abcdef.safetensors.ab_3def8.tmp state-0123456789abcdef.safetensors .session.json.abcdefg_.tmp"
    )
    for name in left.split():
        (directory / name).write_text("left")
        (directory / name).chmod(0o600)
    folder = directory / ".session.json.0123456789abcdef.tmp"
    folder.mkdir()
    (folder / ".tmpAbCdEf").write_text("left by safetensors")
    old = directory / ".tmpAbCdEf"
    old.write_text("left by safetensors, in an earlier version")
    os.utime(old, (0, 0))
    (directory / ".tmpZzZzZz").write_text("of a writer that lives")
    load(session, directory).save(directory)
    names = sorted(path.name.split("-")[0] for path in directory.iterdir())
    assert names == [".lock", ".tmpZzZzZz", "session.json", "state"]


def test_a_full_disk_leaves_the_earlier_snapshot_and_nothing_else(saved):
    session, directory = saved
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    other = load(session, directory)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # 600 bytes: not even the manifest; 5,000: the tensors do not fit.
    for cache, room in ((False, 600), (True, 5000)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        try:
            with pytest.raises(FileAccessError, match=r"saved.*: File too large"):
                other.save(directory, cache=cache)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    other.save(directory)
    assert everything(load(session, directory)) == everything(session)


def test_an_interrupt_after_the_rename_is_no_conflict(saved, monkeypatch):
    session, directory = saved
    other = load(session, directory)
    other.drop_context()
    write = snapshots.write_atomically

    def interrupted(path, *arguments, **options):
        write(path, *arguments, **options)
        if path.name == snapshots.MANIFEST:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(snapshots, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        other.save(directory)
    monkeypatch.undo()
    assert load(session, directory).context == []
    other.save(directory)


def test_paths_that_are_none(told, tmp_path):
    session = told[0]
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "session.json").mkdir()
    for path, error in (
        (None, ArgumentTypeError), (3, ArgumentTypeError), ("a\0b", ArgumentError), ("\ud800", ArgumentError),
        (tmp_path / "file", FileAccessError), (tmp_path / "file" / "x", FileAccessError), ("x" * 5000, FileAccessError),
        (tmp_path / "full", FileAccessError),
    ):  # fmt: skip
        with pytest.raises(error, match="directory"):
            load(session, path)
        with pytest.raises(DeltaMemError, match="directory"):
            session.save(path)


def test_what_cannot_be_read_back_is_not_written(told, tmp_path):
    session = MemorySession(told[0].model, told[0].tokenizer)
    deep = []
    for _ in range(5000):
        deep = [deep]
    for extra, error in (
        (float("nan"), ArgumentError), (10**5000, ArgumentError), (deep, ArgumentError), (object(), ArgumentTypeError),
        ({1: 2, "1": 3}, ArgumentError), ({(1, 2): 3}, ArgumentTypeError),
    ):  # fmt: skip
        session.restore(session.snapshot())
        now = session._now
        session._now = type(now)(now.memory, ({"role": "tool", "content": "x", "extra": extra},))
        with pytest.raises(error, match="session: "):
            session.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    session._now = type(now)(now.memory, ({"role": "tool", "content": "half \ud83d", "extra": {"\udc00": 1}},))
    again = load(session, session.save(tmp_path / "saved"))
    assert again.messages == session.messages
    session.system = "\ud800"  # which no tokenizer takes
    with pytest.raises(ArgumentError, match="session: settings.system: got "):
        session.save(tmp_path / "saved")
    session.system = None
    session.memory[0].view(-1)[0] = float("nan")
    with pytest.raises(StateError, match="memory of layer 0 holds NaN or Inf"):
        session.save(tmp_path / "saved")


# --- copies of a session


def test_snapshots_belong_to_their_session(told):
    session = told[0]
    other = MemorySession(session.model, session.tokenizer)
    with pytest.raises(ArgumentError, match="snapshot: of another session"):
        other.restore(session.snapshot())
    before = everything(session)
    kept = pickle.loads(pickle.dumps(session.snapshot()))
    session.answer(TOLD, max_new_tokens=2)
    session.restore(kept)
    assert everything(session) == before
    for change in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ArgumentTypeError, match="a session cannot be pickled or copied"):
            change(session)


def test_one_session_is_not_saved_in_two_threads_at_once(told, tmp_path, monkeypatch):
    session = MemorySession(told[0].model, told[0].tokenizer)
    started, go_on, commit = threading.Event(), threading.Event(), saving.snapshots.commit

    def slow(*arguments, **options):
        started.set()
        assert go_on.wait(30)
        return commit(*arguments, **options)

    monkeypatch.setattr(saving.snapshots, "commit", slow)
    thread = threading.Thread(target=session.save, args=(tmp_path,))
    thread.start()
    assert started.wait(30)
    with pytest.raises(StateError, match="a turn is under way"):
        session.save(tmp_path)
    go_on.set()
    thread.join()
    assert load(session, tmp_path).turns == 0


# --- what is forgotten


def test_what_is_forgotten_leaves_the_messages_and_the_file(tmp_path):
    session = tiny_session(thinking_tokenizer(), system="Rex is a dog.")
    secret = "my code is 42"
    session.answer("Listen: My  code is\n42. Good?", **says(session.tokenizer, "Yes."))
    session.answer(ASKED, **says(session.tokenizer, f"<think>\n{secret}\n</think>\n\nHome."))
    session.answer(TOLD, **says(session.tokenizer, "Old, yes."))
    before, memory = session.messages, state_bits(session.memory)
    told = session.forget(secret)
    assert (told.messages, told.turns) == (0, 0) and session.messages == before and len(session.context) == 6
    assert told.remains == ("messages[0].content", "messages[3].reasoning_content")
    assert state_bits(session.memory) != memory
    told = session.forget(secret, messages=True)
    assert (told.messages, told.turns, told.remains) == (2, 2, ())
    assert [message["content"] for message in session.messages] == [
        "Listen: . Good?", "Yes.", ASKED, "Home.", TOLD, "Old, yes.",
    ]  # fmt: skip
    assert session.messages[3]["reasoning_content"] == "" and session.context == session.messages[4:]
    session.save(tmp_path)
    assert "42" not in str(json.loads((tmp_path / "session.json").read_text())["messages"])
    again = load(session, tmp_path)
    assert session.answer(ASKED, max_new_tokens=3) == again.answer(ASKED, max_new_tokens=3)
    assert everything(session) == everything(again)
    # In the middle of a sentence that has no spaces.
    session.answer("密码是四十二吗？", **says(session.tokenizer, "Yes."))
    assert session.forget("四十二").remains == ("messages[8].content",)
    assert session.forget("四十二", messages=True).turns == 1 and session.messages[8]["content"] == "密码是 吗？"
    # In the middle of the context: the others stay. In the system message: it is said.
    parts = [{"type": "text", "text": "Rex is a dog."}]
    told = session.forget([{"role": "user", "content": parts}], messages=True)
    assert told.remains == ("system",) and told.messages == 0
    assert session.forget("He is old.", messages=True).turns == 1 and len(session.context) == 2


def test_a_frozen_memory_forgets_nothing_and_one_that_was_frozen_does():
    session = tiny_session(chatml_tokenizer())
    session.answer(TOLD, max_new_tokens=2)
    session.memory.frozen = True
    session.answer(ASKED, max_new_tokens=2)
    before = everything(session)
    with pytest.raises(ArgumentError, match="memory: it is frozen"):
        session.forget(TOLD, messages=True)
    assert everything(session) == before
    session.memory.frozen = False
    session.forget(TOLD)
    assert [turn.before.frozen for turn in session._now.turns] == [False, True]


def test_what_is_forgotten_is_whole_words():
    session = tiny_session(chatml_tokenizer())
    session.answer("Canada and her cat, the brother. He said: he!", **says(session.tokenizer, "Hé, _he_ (HE)."))
    assert session.forget("he", messages=True).remains == ()
    assert [message["content"] for message in session.messages] == [
        "Canada and her cat, the brother. said: !", "Hé, _he_ ( ).",
    ]  # fmt: skip
    # Scripts without spaces, or with particles: also within what looks like one word.
    for said, gone in (
        ("서울에서 왔어요", "서울"),
        ("ผมชื่ออาดา", "อาดา"),
        ("私はアダです", "アダ"),
        ("我叫Ada吗", "Ada"),
    ):
        session = tiny_session(chatml_tokenizer())
        session.answer(said, **says(session.tokenizer, "Yes."))
        session.forget(gone, messages=True)
        assert gone not in session.messages[0]["content"]


def test_a_text_is_forgotten_however_it_is_written(tmp_path):
    session = tiny_session(chatml_tokenizer())
    composed, apart = "Jos\u00e9 Ruiz", "Jose\u0301 Ruiz"
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"name": composed})}}
    said = (f"I am {apart}.", "Or JOS\u00c9 RUIZ!", "J\u00ado\u200bs\u00e9 Ruiz", "\uff2a\uff4f\uff53\u00e9 Ruiz")
    messages = [{"role": "user", "content": text} for text in (*said, "Jose Ruiz")]
    messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    for wanted in (composed, apart):
        session._now = type(session._now)(session.memory, tuple(messages))
        told = session.forget(wanted, messages=True)
        # What is not cut out is named: hidden and wide letters, and escapes in a tool call's JSON.
        assert told.messages == 2 and [m["content"] for m in session.messages[:2]] == ["I am .", "Or !"]
        assert told.remains == (
            "messages[2].content", "messages[3].content", "messages[5].tool_calls[0].function.arguments",
        )  # fmt: skip
    assert session.messages[4]["content"] == "Jose Ruiz"


def test_where_a_text_remains():
    said = {"note": "Hello\nAda Lovelace lives in Paris", "path": "C:\\users"}
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps(said)}}
    messages = [{"role": "user", "content": r"in C:\users\u0041bc"}, {"role": "assistant", "tool_calls": [call]}]
    arguments = "messages[1].tool_calls[0].function.arguments"
    assert places_of({"messages": messages}, "Ada Lovelace lives") == (arguments,)
    assert places_of({"messages": messages}, r"C:\users") == ("messages[0].content", arguments)
    # What makes it a message is nobody's words; what a call hands over is.
    assert places_of({"messages": messages}, "user") == places_of({"messages": messages}, "content") == ()
    assert places_of({"messages": [{"role": "user", "content": [{"Ada": 1}]}]}, "ada") == (
        "messages[0].content[0].Ada",
    )


def test_what_lies_in_the_directory_stays(saved):
    session, directory = saved
    files = ("backup-0123456789abcdef.safetensors", ".session.json.draft.tmp", "state.safetensors", ".notes.tmp")
    folders = (".tmpAbCdEf", ".session.json.mine.tmp", "state-0123456789abcdef.safetensors", ".x.0123456789abcdef.tmp")
    for name in files:
        (directory / name).write_text("mine")
        os.utime(directory / name, (0, 0))
    for name in folders:
        (directory / name).mkdir()
        (directory / name / "mine").write_text("mine")
    load(session, directory).save(directory)
    assert all((directory / name).is_file() for name in files)
    assert all((directory / name / "mine").is_file() for name in folders)


def test_numbers_that_no_file_takes_are_refused_before(saved):
    session, directory = saved
    with pytest.raises(ArgumentError, match=r"context_tokens: got an integer of many digits, allowed an integer, 1 or"):
        session.limit_context(tokens=10**30)  # what tokenizers without a limit have as model_max_length
    change_manifest(directory, lambda manifest: manifest.update(generation=10**4299))
    with pytest.raises(FileFormatError, match="session.json: generation: got .*allowed an integer, 1 or more"):
        load(session, directory)
