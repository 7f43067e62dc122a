"""The commands that are no operators, and what every command says to wrong use."""

import pytest
import torch
from chat_support import ASKED, TOLD, ListScreen, fail, have, recall_chat, tiny_chat
from support import relative_error

from deltamem_fast.chat.commands import COMMANDS


@pytest.fixture(scope="module")
def chat():
    """One chat for what changes nothing that another test looks at."""
    return recall_chat()


def test_help_names_every_command_and_the_small_world(chat):
    text = have(chat, "/help")
    assert all(f"/{name}" in text for name in COMMANDS)
    assert "Codes are 10 to 59" in text and "/interactive" not in text
    assert "Codes" not in have(tiny_chat(ListScreen(), "Yes."), "/help")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/", "/: no such command; allowed /help, /save, "),
        ("/frobnicate", "/frobnicate: no such command; allowed /help"),
        ("/memry", "did you mean /memory?"),
        ("/Save x", "did you mean /save?"),
        ("/load", "/load: got nothing after it, allowed /load DIR"),
        ("/ask  ", "allowed /ask TEXT"),
        ("/forget", "allowed /forget TEXT"),
        ("/revise", "allowed /revise TEXT"),
        ("/ingest", "allowed /ingest FILE"),
        ("/ingest trust=2 README.md", "/ingest trust: got '2', allowed a number from 0 to 1"),
        ("/ingest trust=0.5", "/ingest: got 'trust=0.5' without a file, allowed /ingest trust=X FILE"),
        ("/audit smallest", "/audit: got 'smallest', allowed nothing or largest"),
        ("/undo 3", "/undo: got '3', allowed nothing after it"),
        ("/memory x", "/memory: got 'x', allowed nothing or all"),
        ("/context x", "/context: got 'x', allowed nothing, a number of turns"),
        ("/context 0", "N 1 or more"),
        ("/context tokens", "/context: got 'tokens'"),
        ("/context tokens 1 2", "/context: got 'tokens 1 2'"),
        ("/set warmth 3", "/set warmth: no such option, allowed temperature"),
        ("/set temperature", "/set temperature: got '', allowed a number"),
        ("/set temperature -1", "/set temperature: got '-1', allowed a number, 0 (greedy) or more"),
        ("/set temperature nan", "got 'nan'"),
        ("/set top_p 0", "above 0, up to 1"),
        ("/set max_new_tokens 0", "an integer, 1 or more"),
        ("/set seed 1.5", "an integer, 0 or more"),
    ],
)
def test_wrong_use_is_told_in_one_line_and_the_chat_goes_on(chat, line, message):
    changes = chat.changes
    error = fail(chat, line)
    assert message in error and "\n" not in error
    assert not chat.ended and chat.changes == changes


def test_a_file_is_read_as_far_as_it_is_trusted_and_the_audit_tells(tmp_path):
    chat, page = recall_chat(), tmp_path / "a page\u202e.txt"
    page.write_text("The code of Baljin is 21. The old lamp is in the attic.")
    assert have(chat, "/audit").startswith("nothing has moved the memory")
    have(chat, "The code of Balton is 33.")
    before = chat.session.memory.clone()
    assert "it was moved by 0." in have(chat, f"/ingest trust=0.25 {page}")
    after = chat.session.memory.clone()
    have(chat, "/undo")
    assert all(torch.equal(before[i], chat.session.memory[i]) for i in before)
    have(chat, f"/ingest {page}")
    for i in before:
        wanted = torch.lerp(before[i], chat.session.memory[i], 0.25)
        # The whole text is written under no guard, which is not felt here.
        assert relative_error(after[i], wanted) < 1e-5
    lines = have(chat, "/audit").splitlines()
    assert "ingest: a page?.txt" in lines[3] and lines[1].split()[1] == "user"
    assert "ingest" in have(chat, "/audit largest")


def test_lines_that_say_nothing_or_begin_with_a_slash():
    chat = recall_chat()
    assert have(chat, "") == have(chat, "   ") == "" and chat.session.turns == 0
    have(chat, "//etc is a folder")
    assert chat.session.messages[0]["content"] == "/etc is a folder"
    have(chat, "broken \udcff byte")
    assert chat.session.messages[2]["content"] == "broken ? byte"


def test_quit(chat):
    have(chat, "/quit")
    assert chat.ended
    chat.ended = False


def test_memory_shows_figures_and_a_picture():
    chat = recall_chat()
    assert "norm 0." in have(chat, "/memory")
    have(chat, TOLD)
    shown = have(chat, "/memory")
    assert shown.count("layer 3 head") == 4 and "4,096 bytes" in shown and "of 8" in shown
    have(chat, "/off")
    assert "It is off" in have(chat, "/memory")


def test_memory_of_many_layers_draws_those_that_hold_most(monkeypatch):
    chat = recall_chat()
    have(chat, TOLD)
    monkeypatch.setattr("deltamem_fast.chat.commands.MOST_DRAWN", 8)
    shown = have(chat, "/memory")
    assert "2 layers that hold most" in shown
    assert sum(f"layer {layer} head 0" in shown for layer in range(4)) == 2
    everything = have(chat, "/memory all")
    assert all(f"layer {layer} head 0" in everything for layer in range(4)) and "hold most" not in everything


def test_context_shows_what_is_in_sight_and_sets_limits():
    chat = recall_chat(context_turns=2)
    assert "In sight: 0 turns, 0 tokens. Allowed: 2 turns" in have(chat, "/context")
    for line in (TOLD, "The rain sang all day.", ASKED):
        have(chat, line)
    shown = have(chat, "/context")
    assert shown.splitlines()[0].startswith("2|") and f"3|13|{ASKED}|42" in shown
    assert "1 earlier turn left to the memory" in shown
    assert "Allowed: 1 turn " in have(chat, "/context 1").replace("From the next turn on", "Allowed")
    have(chat, ASKED)
    assert len(chat.session.context) == 2
    assert "40 tokens" in have(chat, "/context tokens 40")
    assert "everything" not in have(chat, "/context all")
    for _ in range(5):
        have(chat, ASKED)
    assert 2 < len(chat.session.context) < 10
    assert "everything" in have(chat, "/context tokens all")
    assert "out of sight" in have(chat, "/context drop") and chat.session.context == []


def test_context_shows_a_system_message():
    chat = recall_chat(system="The rain sang all day.")
    have(chat, TOLD)
    assert have(chat, "/context").startswith("-|")


def test_reset_keeps_the_settings():
    chat = recall_chat(context_turns=3, system="The rain sang.", generation={"do_sample": False, "max_new_tokens": 4})
    have(chat, TOLD)
    have(chat, "/off")
    have(chat, "/reset")
    session = chat.session
    assert (session.turns, session.limits.turns, session.system, session.remembers) == (0, 3, "The rain sang.", False)
    assert session.generation == {"do_sample": False, "max_new_tokens": 4}
    assert not any(state.any() for _, state in session.memory.items())


def test_set():
    chat = recall_chat()
    shown = have(chat, "/set")
    assert "temperature|0|" in shown and "max_new_tokens|512|" in shown and "greedy" in shown
    assert "temperature|0.7|" in have(chat, "/set temperature 0.7")
    assert chat.session.generation == {"do_sample": True, "temperature": 0.7}
    have(chat, "/set top_p 0.9")
    have(chat, "/set max_new_tokens 5")
    assert "sampled" in have(chat, "/set seed 3")
    assert chat.session.generation == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}
    assert torch.initial_seed() == 3 and chat.seed == 3
    have(chat, "/set temperature 0")
    assert chat.session.generation == {"do_sample": False, "max_new_tokens": 5}
    have(chat, "/set top_p 0.5")
    assert chat.session.generation["temperature"] == 1.0


def test_a_seed_repeats_what_is_sampled():
    chat = recall_chat()
    have(chat, "/set temperature 3")
    answers = []
    for _ in range(2):
        have(chat, "/set seed 5")
        answers.append([have(chat, "The rain sang all day.") for _ in range(3)])
        have(chat, "/reset")
    assert answers[0] == answers[1] and len(set(answers[0])) > 1


def test_without_a_seed_each_chat_draws_anew():
    drawn = set()
    for _ in range(3):
        torch.manual_seed(0)  # as every process begins
        chat = recall_chat(generation={"do_sample": True, "temperature": 5.0})
        drawn.add(tuple(have(chat, "The rain sang all day.") for _ in range(5)))
    assert len(drawn) > 1


def test_the_context_of_a_turn_without_words():
    """As an agent's session may have it, which was saved by another program."""
    chat = tiny_chat(ListScreen(), "Yes.")
    chat.session.answer([{"role": "tool", "reasoning_content": "42"}])
    assert "Yes." in have(chat, "/context")
