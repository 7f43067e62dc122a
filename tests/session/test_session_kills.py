"""A conversation of 50 turns whose context is cut to the last 2, with saves, kills and restarts between."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file
from session_support import everything, recall_model, state_bits

from deltamem_fast import MemorySession
from deltamem_fast.recall.task import changed, draw_facts
from deltamem_fast.session.saving import FORMAT, FORMAT_VERSION, contents
from deltamem_fast.storage import snapshots

pytestmark = pytest.mark.xdist_group("session_kills")  # what its tests share is made once

WORKER = Path(__file__).parent / "snapshot_worker.py"
TURNS = 50


def story(seed: int) -> list[str]:
    """What is said in 50 turns: facts told, asked for long after they left the context, and revised."""
    chooser = random.Random(seed)
    said, known = [], []
    while len(said) < TURNS:
        choice = chooser.random()
        if not known or choice < 0.2:
            known.append(draw_facts(chooser, 1, held_out=True)[0])
            said.append(known[-1].statement(chooser))
        elif choice < 0.3:
            place = chooser.randrange(len(known))
            known[place] = changed(chooser, known[place])
            said.append(known[place].update(chooser))
        else:
            said.append(chooser.choice(known[-4:]).question(chooser))
    return said


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The conversation without a stop: what is said, the answers, all states, and each turn's snapshot in files."""
    model, tokenizer = recall_model("msw")
    said = story(11)
    session = MemorySession(model, tokenizer, context_turns=2, generation={"max_new_tokens": 12})
    prepared = tmp_path_factory.mktemp("prepared")
    answers, states = [], []
    for number in range(TURNS + 1):
        settings = session._settings() | {"remembers": session.remembers}
        content, tensors = contents(session.model, session._now, settings, with_cache=number % 2 == 0)
        (prepared / f"{number}.json").write_text(json.dumps(content))
        save_file(tensors, prepared / f"{number}.safetensors", {"format": FORMAT})
        states.append(state_bits(session.memory))
        if number < TURNS:
            answers.append(session.answer(said[number]))
    assert len(session.context) == 4 and session.turns == TURNS
    assert len(set(answers)) > 10  # a conversation, not one answer all along
    return said, answers, states, prepared


def test_restarted_after_each_turn_it_answers_the_same(uninterrupted, tmp_path):
    said, answers, states, _ = uninterrupted
    model, tokenizer = recall_model("msw")
    session = MemorySession(model, tokenizer, context_turns=2, generation={"max_new_tokens": 12})
    for number, text in enumerate(said):
        session.save(tmp_path, cache=number % 3 == 0)
        session = MemorySession.load(tmp_path, model, tokenizer)
        assert session.turns == number and len(session.context) <= 4
        assert session.answer(text) == answers[number], number
        assert state_bits(session.memory) == states[number + 1], number


def kill(worker: subprocess.Popen) -> list[str]:
    """SIGKILL; the whole lines that it had printed and nobody had read."""
    worker.send_signal(signal.SIGKILL)
    out = worker.stdout.read()  # not communicate, which knows nothing of what readline has taken in advance
    worker.stdout.close()
    assert worker.wait(timeout=60) == -signal.SIGKILL
    return out.splitlines() if out.endswith("\n") else out.splitlines()[:-1]


def killed_again_and_again(uninterrupted, directory, kills: int, seed: int) -> None:
    said, answers, states, prepared = uninterrupted
    model, tokenizer = recall_model("msw")
    chooser = random.Random(seed)
    committed, seen = -1, set()
    for _ in range(kills):
        first = committed + 1 if committed < TURNS else chooser.randrange(TURNS)
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), str(prepared), str(directory), str(first)],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert worker.stdout.readline() == "ready\n"
        # However slow the machine: after some commits, and at any moment of the next one.
        printed = [int(worker.stdout.readline()) for _ in range(chooser.randrange(4))]
        time.sleep(chooser.random() * chooser.choice((0.001, 0.005, 0.02)))
        printed += [int(line) for line in kill(worker)]
        acknowledged, attempted = (printed[-1], printed[-1] + 1) if printed else (committed, first)
        try:
            session = MemorySession.load(directory, model, tokenizer)
        except FileNotFoundError:
            assert acknowledged == -1
            continue
        # Nothing that was acknowledged is lost; the commit under way is there wholly or not at all.
        found = session.turns
        assert found in (acknowledged, min(attempted, TURNS))
        assert session.messages == json.loads((prepared / f"{found}.json").read_text())["messages"]
        assert state_bits(session.memory) == states[found]
        if found < TURNS:
            assert session.answer(said[found]) == answers[found]
            assert state_bits(session.memory) == states[found + 1]
        committed = found
        seen.add(found)
    assert len(seen) > min(kills, TURNS) // 4
    # One more save sweeps up what the killed have left.
    MemorySession.load(directory, model, tokenizer).save(directory)
    left = sorted(path.name for path in directory.iterdir())
    assert len(left) == 3 and left[:1] == [".lock"] and left[1] == "session.json"


def test_killed_at_random_moments(uninterrupted, tmp_path):
    killed_again_and_again(uninterrupted, tmp_path, kills=20, seed=1)


@pytest.mark.soak
def test_killed_at_random_moments_200_times(uninterrupted, tmp_path):
    killed_again_and_again(uninterrupted, tmp_path, kills=200, seed=2)


def test_two_writers_and_a_reader(uninterrupted, tmp_path):
    """Whoever reads gets a whole snapshot, whoever writes."""
    *_, prepared = uninterrupted
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(prepared), str(tmp_path), str(first)], stdout=subprocess.PIPE, text=True
        )
        for first in (0, 25)
    ]
    for worker in workers:
        worker.stdout.readline()
        worker.stdout.readline()
    generations, contents_seen = [], set()
    end = time.monotonic() + 3
    while time.monotonic() < end:
        manifest, data = snapshots.read(
            tmp_path, FORMAT, FORMAT_VERSION, lambda manifest, files: (manifest, files["state"])
        )
        number = len([m for m in manifest["messages"] if m["role"] == "assistant"])
        assert data == (prepared / f"{number}.safetensors").read_bytes()
        generations.append(manifest["generation"])
        contents_seen.add(number)
    for worker in workers:
        kill(worker)
    assert generations == sorted(generations) and len(set(generations)) > 20 and len(contents_seen) > 5


REAL = """
import sys
from deltamem_fast import MemorySession, patch_model
from deltamem_fast.recall.weights import find_weights, load_backbone
weights = find_weights()
model, tokenizer = load_backbone(weights.backbone)
patch_model(model, weights.adapters["msw"])
directory, said = sys.argv[1], sys.stdin.read().splitlines()
try:
    session = MemorySession.load(directory, model, tokenizer)
except FileNotFoundError:
    session = MemorySession(model, tokenizer, context_turns=2, generation={"max_new_tokens": 12})
print("ready", session.turns, flush=True)
for text in said[session.turns:]:
    answer = session.answer(text)
    session.save(directory)
    print(answer, flush=True)
"""


def test_a_real_conversation_killed_and_restarted(uninterrupted, tmp_path):
    """The whole process, model and all, is killed in the middle of the conversation, and started again."""
    said, answers, *_ = uninterrupted
    chooser, done = random.Random(3), 0
    for run in range(2):  # the other tests kill often, without a model
        worker = subprocess.Popen(
            [sys.executable, "-c", REAL, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        worker.stdin.write("\n".join(said))
        worker.stdin.close()
        turns = int(worker.stdout.readline().split()[1])
        assert done <= turns <= done + 1
        if run < 1:
            time.sleep(0.3 + chooser.random() * 0.5)
            worker.send_signal(signal.SIGKILL)
        printed = worker.stdout.read().splitlines()
        worker.wait(timeout=120)
        assert printed == answers[turns : turns + len(printed)]
        done = turns + len(printed)
    assert done == TURNS
    model, tokenizer = recall_model("msw")
    session = MemorySession.load(tmp_path, model, tokenizer)
    assert [m["content"] for m in session.messages if m["role"] == "assistant"] == answers
    assert everything(session)[1] == session.messages[-4:]
