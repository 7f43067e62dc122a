"""The command line: info, convert, errors, pipes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support import GOLDEN, tiny_model

from deltamem_fast import __version__
from deltamem_fast.adapter.files import RELEASED_NAME, SAFETENSORS_NAME, read_adapter
from deltamem_fast.cli.main import main
from deltamem_fast.inspection.facts import KERNELS, PACKAGES, devices, versions

ADAPTER = GOLDEN / "qwen3_tsw" / "adapter"
OPTIONAL = ("triton", "numba", "flash_attn")


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


def error_of(capsys):
    """The one line on stderr, with nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("deltamem: error: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


# --- info


def test_info_as_text(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("deltamem-fast", "python", *PACKAGES, "device cpu", "Triton kernels"):
        assert name in out
    assert __version__ in out and torch.__version__ in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"] == versions()
    assert facts["devices"] == devices()
    assert facts["devices"][-1]["device"] == "cpu"
    assert facts["devices"][-1]["backend"] in ("numba", "reference")
    assert set(facts["kernels"]["available"]) <= set(KERNELS)


def test_info_without_the_optional_packages():
    # None in sys.modules makes every import of that name fail.
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        "from deltamem_fast.cli.main import main\n"
        "raise SystemExit(main(['info', '--json']))\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {facts["versions"][name] for name in ("triton", "numba", "flash-attn")} == {"not installed"}
    assert facts["devices"][-1]["backend"] == "reference"
    assert facts["kernels"] == {"available": [], "note": "triton is not installed"}


def test_info_says_why_kernels_cannot_be_imported(monkeypatch):
    from deltamem_fast.inspection import facts as environment

    monkeypatch.setattr(environment, "installed", lambda package: True)
    monkeypatch.delattr("deltamem_kernels.triton.ops", raising=False)
    monkeypatch.setitem(sys.modules, "deltamem_kernels.triton.ops", None)
    found = environment.kernels()
    assert found["available"] == []
    assert "cannot be imported" in found["note"]


# --- convert


def bits(directory):
    weights = read_adapter(directory).weights
    return {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in weights.items()}


def test_convert_there_and_back_is_bit_equal(tmp_path, capsys):
    ours, released = tmp_path / "ours", tmp_path / "released"
    assert main(["convert", str(ADAPTER), str(ours), "--to", "safetensors"]) == 0
    assert sorted(os.listdir(ours)) == [SAFETENSORS_NAME, "delta_mem_config.json"]
    assert main(["convert", str(ours), str(released), "--to", "released"]) == 0
    assert sorted(os.listdir(released)) == [RELEASED_NAME, "delta_mem_config.json"]
    assert bits(ADAPTER) == bits(ours) == bits(released)
    assert read_adapter(ADAPTER).config == read_adapter(ours).config == read_adapter(released).config
    original = json.loads((ADAPTER / "delta_mem_config.json").read_text())
    written = json.loads((released / "delta_mem_config.json").read_text())
    assert "format_version" not in written and original.items() <= written.items()
    weights = read_adapter(ADAPTER).weights
    out = capsys.readouterr().out
    parameters = sum(tensor.numel() for tensor in weights.values())
    size = sum(path.stat().st_size for path in released.iterdir())
    assert f"{len(weights)} tensors, {parameters:,} parameters, {size:,} bytes" in out


def test_convert_weights_that_share_storage(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "delta_mem_config.json").write_text((ADAPTER / "delta_mem_config.json").read_text())
    shared = torch.arange(12.0)
    weights = {"a": shared[:4], "b": shared[2:8].view(2, 3).T, "c": torch.full((2,), float("nan"))}
    torch.save(weights, source / RELEASED_NAME)
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", "safetensors"]) == 0
    read = read_adapter(tmp_path / "target").weights
    assert torch.equal(read["a"], weights["a"]) and torch.equal(read["b"], weights["b"])


def test_convert_refuses_the_source_as_target(tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(ADAPTER, target_is_directory=True)
    for target in (ADAPTER, ADAPTER / "..", link):
        target = target / "adapter" if target.name == ".." else target
        assert main(["convert", str(ADAPTER), str(target), "--to", "safetensors", "--force"]) == 2
        assert "which is SOURCE" in error_of(capsys)
    assert sorted(os.listdir(ADAPTER)) == [RELEASED_NAME, "delta_mem_config.json"]


def test_convert_refuses_a_filled_target_unless_forced(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    command = ["convert", str(ADAPTER), str(tmp_path), "--to", "safetensors"]
    assert main(command) == 2
    assert "is not empty; --force" in error_of(capsys)
    assert os.listdir(tmp_path) == ["notes.txt"]
    assert main([*command, "--force"]) == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    # The other format takes the place of this one.
    assert main(["convert", str(ADAPTER), str(tmp_path), "--to", "released", "--force"]) == 0
    assert sorted(os.listdir(tmp_path)) == [RELEASED_NAME, "delta_mem_config.json", "notes.txt"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "neither a directory nor a hub id"),
        (lambda path: path.mkdir(), "delta_mem_config.json: no such file"),
        (lambda path: broken(path), "cannot be read as weights"),
    ],
)
def test_convert_tells_a_bad_source_in_one_line(tmp_path, capsys, make, message):
    source, target = tmp_path / "source", tmp_path / "target"
    make(source)
    assert main(["convert", str(source), str(target), "--to", "safetensors"]) == 2
    assert message in error_of(capsys)
    assert not target.exists()


def broken(path):
    path.mkdir()
    (path / "delta_mem_config.json").write_text((ADAPTER / "delta_mem_config.json").read_text())
    (path / RELEASED_NAME).write_bytes(b"not a checkpoint")


def test_convert_refuses_a_file_as_target(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["convert", str(ADAPTER), str(tmp_path / "file"), "--to", "released"]) == 2
    assert "which is a file" in error_of(capsys)


# --- the command itself


def test_version_help_and_usage(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"deltamem-fast {__version__}\n"
    assert main(["--help"]) == 0
    assert "convert" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage: deltamem" in capsys.readouterr().err
    assert main(["convert", "a", "b", "--to", "pickle"]) == 2
    assert "invalid choice" in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback():
    # The reading end is closed before the command writes.
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "deltamem_fast", "info"],
            stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 141
    assert done.stderr == ""


def test_output_to_a_pipe_that_knows_ascii_only(tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = python("-m", "deltamem_fast", "--help", env=environment)
    assert done.returncode == 0, done.stderr
    assert "8\\xd78" in done.stdout


def test_info_of_a_model(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [layer["path"] for layer in facts["layers"]] == ["fast"] * 3
    assert facts["memory_bytes"] == 3 * 8 * 8 * 4 and facts["adapter_parameters"] == 3 * (4 * 8 * 64 + 8 + 8 * 128)
    tiny_model(hidden_size=66, head_dim=16).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "layers 0-2  generic: a row of 66" in capsys.readouterr().out
    for arguments, message in (
        (["/no/such"], "MODEL: /no/such: no such directory"),
        ([str(tmp_path), "--adapter", "/no/such"], "adapter: got '/no/such'"),
        ([str(tmp_path), "--device", "nonsense"], "device: got 'nonsense'"),
    ):
        assert main(["info", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["info", "--adapter", "x"]) == 2 and "MODEL" in capsys.readouterr().err
