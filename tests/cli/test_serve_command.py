"""``deltamem serve``: it answers, ends when it is told to, and names what is wrong before anything is loaded."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from chat_support import write_tiny_model

from deltamem_fast.adapter.record import record_of
from deltamem_fast.cli.main import main
from deltamem_fast.cli.serve import KEY, checked_key
from deltamem_fast.errors import ArgumentError
from deltamem_fast.serving.jobs import Limits
from deltamem_kernels.rule import DeltaRule


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("serve"))


def test_it_serves_until_it_is_told_to_end(places, tmp_path):
    model, adapter = places
    command = [sys.executable, "-m", "deltamem_fast", "serve", model, "--adapter", adapter, "--port", "0"]
    state = os.environ | {"XDG_STATE_HOME": str(tmp_path), KEY: "a-token"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=state) as process:
        line = process.stdout.readline()
        found = re.fullmatch(r"model at (http://127.0.0.1:\d+/v1), memories in (.*)\n", line)
        assert found, (line, process.communicate(timeout=60))
        assert found[2] == str(tmp_path / "deltamem" / "model.bank")
        body = {"model": "model", "memory_id": "ada", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4}
        request = urllib.request.Request(f"{found[1]}/chat/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        request.add_header("Authorization", "Bearer a-token")
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        assert answer["memory"]["version"] > 0 and answer["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
    assert os.stat(found[2]).st_mode & 0o777 == 0o600


def test_mistakes_are_named_before_anything_is_loaded(places, tmp_path, capsys, monkeypatch):
    model, adapter = places
    monkeypatch.delenv(KEY, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for more, said in (
            ((model, "--adapter", adapter, "--host", "0.0.0.0"), f"--host: got '0.0.0.0', .* without a token in {KEY}"),
            ((model, "--adapter", adapter, "--host", "example.invalid"), "--host: got 'example.invalid'"),
            ((model, "--adapter", adapter, "--port", str(taken.getsockname()[1])), "--host, --port: .*in use"),
            ((model, "--adapter", adapter, "--port", "70000"), "--port: got 70000"),
            ((model, "--adapter", adapter, "--max-batch", "0"), "--max-batch: got 0"),
            ((model, "--adapter", adapter, "--max-tokens", "1"), "--max-tokens: got 1"),
            ((model, "--adapter", adapter, "--trust", "2"), "--trust: got 2"),
            ((model, "--adapter", adapter, "--budget", "0"), "--budget: got 0"),
            ((model, "--adapter", adapter, "--budget", "inf"), "--budget: got inf, allowed a finite number"),
            ((model,), "--adapter: not given"),
            (("--adapter", adapter), "--adapter: given without MODEL"),
            ((str(tmp_path / "none"), "--adapter", adapter), "MODEL: .*no such directory"),
        ):
            assert main(["serve", "--bank", str(tmp_path / "bank"), "--port", "0", *more]) == 2
            told = capsys.readouterr().err
            assert told.count("\n") == 1 and re.search(said, told), (more, told)
    assert not (tmp_path / "bank").exists()


def test_trust_budget_and_guard_reach_the_server(places, tmp_path, monkeypatch):
    """What is loaded and what is taken, as the command line says; nothing is served."""
    from deltamem_fast.serving import run

    found = {}
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.setattr(run, "run", lambda engine, *rest: found.update(engine=engine))
    model, adapter = places
    given = ["serve", model, "--adapter", adapter, "--port", "0", "--bank", str(tmp_path / "users.bank")]
    more = ["--trust", "0.5", "--budget", "2", "--guard", "on", "--max-waiting", "7", "--answer-tokens", "9"]
    assert main([*given, *more]) == 0
    limits = found["engine"].limits
    assert (limits.trust, limits.budget, limits.waiting, limits.answer) == (0.5, 2.0, 7, 9)
    guarding = record_of(found["engine"].model).guarding
    assert guarding.always and guarding.rule.beta_max < 1
    assert main(given) == 0
    assert (found["engine"].limits.trust, found["engine"].limits.budget) == (1.0, None)
    assert not record_of(found["engine"].model).guarding.always


@pytest.mark.parametrize(
    "guard, limits, normalize, wanted",
    [("on", {}, True, True), ("off", {"trust": 0.5}, True, False), ("auto", {}, True, False)]
    + [
        ("auto", {"trust": 0.5}, True, True),
        ("auto", {"budget": 1.0}, True, True),
        ("auto", {"trust": 0}, False, False),
    ],
)
def test_an_engine_of_vllm_is_guarded_where_turns_are_held_back(guard, limits, normalize, wanted):
    from deltamem_fast.vllm.serve import is_guarded

    assert is_guarded(guard, Limits(**limits), DeltaRule(8, normalize=normalize)) is wanted
    with pytest.raises(ArgumentError, match="guard: got one for an adapter with normalize_qk=false"):
        is_guarded("on", Limits(), DeltaRule(8, normalize=False))


def test_a_token_is_needed_beyond_this_machine(monkeypatch):
    monkeypatch.setenv(KEY, "")
    assert [checked_key(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost")] == [None] * 4
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ArgumentError, match="which others can reach"):
            checked_key(host)
    monkeypatch.setenv(KEY, "two words")
    with pytest.raises(ArgumentError, match="visible ASCII"):
        checked_key("127.0.0.1")
    monkeypatch.setenv(KEY, "token")
    assert checked_key("0.0.0.0") == "token"
