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

from deltamem_fast.cli.main import main
from deltamem_fast.cli.serve import KEY, checked_key
from deltamem_fast.errors import ArgumentError


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
            ((model,), "--adapter: not given"),
            (("--adapter", adapter), "--adapter: given without MODEL"),
            ((str(tmp_path / "none"), "--adapter", adapter), "MODEL: .*no such directory"),
        ):
            assert main(["serve", "--bank", str(tmp_path / "bank"), "--port", "0", *more]) == 2
            told = capsys.readouterr().err
            assert told.count("\n") == 1 and re.search(said, told), (more, told)
    assert not (tmp_path / "bank").exists()


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
