"""Result files, what is made of them, and what is said of files that are none."""

import copy
import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = {
    "format_version": 2, "device": "Some GPU", "driver": "580.1", "processor": "Some CPU", "cores": 16, "threads": 8,
    "python": "3.12.3", "torch": "2.11.0+cu130", "transformers": "5.17.0", "numba": None, "triton": "3.6.0",
    "commit": "abc1234", "dirty": False, "time": "2026-01-02T03:04:05Z", "arguments": {"full": False, "only": None},
}  # fmt: skip


def bench(name):
    return importlib.import_module(f"bench.{name}")


def timed(name, parameters, *seconds, **ratios):
    row = bench("instrument.rows").measured(name, parameters, seconds)
    row.ratios = ratios
    return row


def result(*rows, **head):
    return bench("instrument.results").Result(copy.deepcopy(HEAD) | head, list(rows))


def written(directory, found):
    return bench("instrument.results").write(directory, found)


QWEN = {"model": "Qwen3-4B", "mode": "eager", "batch": 1, "context": 512, "tokens": 24}


def sample(factor=1.0, **head):
    """A result with every kind of row; times are multiplied by ``factor``."""
    rows = bench("instrument.rows")
    made = []
    for length in (8192, 32768):
        times = [factor * length * 1e-7 * x for x in (1, 1.02, 1.04)]
        scan = timed("kernel/scan", {"tokens": length, "batch": 1, "rank": 8, "heads": 1}, *times)
        scan.values |= {"roofline": 0.25, "bytes": 1 << 20}
        made.append(scan)
        for name, memory in (("unpatched", 9 << 30), ("patched", int(9.05 * 2**30))):
            row = timed(f"prefill/{name}", {"model": "Qwen3-4B", "batch": 1, "tokens": length}, *times)
            row.values["peak_memory"] = memory
            if name == "patched":
                row.values["extra_memory"] = memory / (9 << 30) - 1
                row.ratios["unpatched"] = [0.98, 1.0, 1.01]
            made.append(row)
    made.append(timed("decode/unpatched", QWEN, factor * 1.0, factor * 1.01))
    made.append(timed("decode/patched", QWEN, factor * 0.8, factor * 0.81, unpatched=[1.2, 1.24, 1.28]))
    made.append(rows.counted("operations/patched", {"backend": "triton"}, operations=33))
    made.append(rows.absent("scan/fla", "not importable"))
    return result(*made, **head)


# --- files


def test_a_file_reads_back(tmp_path):
    results = bench("instrument.results")
    path = written(tmp_path, sample())
    assert path.name == "some-gpu-driver580.1-torch2.11.0-triton3.6.0-abc1234.json"
    assert results.load(path) == sample()
    assert written(tmp_path, sample(dirty=True)).name.endswith("-abc1234-changed.json")


@pytest.mark.parametrize("key", ["device", "driver", "torch", "triton", "commit"])
def test_a_name_for_each_key(key):
    results = bench("instrument.results")
    assert results.file_name(sample()) != results.file_name(sample(**{key: "other"}))


def test_the_newest_whole_result_of_a_device_counts(tmp_path):
    results = bench("instrument.results")
    written(tmp_path, sample(commit="b", time="2026-01-03T00:00:00Z"))
    written(tmp_path, sample(commit="c", time="2026-01-02T00:00:00Z"))
    written(tmp_path, sample(commit="d", time="2026-01-09T00:00:00Z", arguments={"dry_run": True}))
    written(tmp_path, sample(device="Another", driver=None))
    assert [(r.head["device"], r.head["commit"]) for r in results.newest(tmp_path)] == [
        ("Some GPU", "b"), ("Another", "abc1234"),
    ]  # fmt: skip


NO_RESULT = {
    "no JSON": "{",
    "no object": "[]",
    "no version": "{}",
    "old version": '{"format_version": 1, "rows": []}',
    "nothing else": '{"format_version": 2}',
    "a row without a name": json.dumps(HEAD | {"rows": [{"p50": 1}]}),
    "a row with more": json.dumps(HEAD | {"rows": [{"name": "a", "speed": 1}]}),
    "a row that is none": json.dumps(HEAD | {"rows": [3]}),
    "an unknown status": json.dumps(HEAD | {"rows": [{"name": "a", "status": "fine"}]}),
    "rows that are none": json.dumps(HEAD | {"rows": 3}),
    "no rows": json.dumps(HEAD | {"rows": []}),
    "a row twice": json.dumps(HEAD | {"rows": [{"name": "a"}, {"name": "a"}]}),
}


@pytest.mark.parametrize("text", NO_RESULT.values(), ids=NO_RESULT.keys())
@pytest.mark.parametrize("side", [0, 1])
def test_compare_names_a_file_that_is_none(tmp_path, capsys, text, side):
    good, bad = written(tmp_path, sample()), tmp_path / "bad.json"
    bad.write_text(text, encoding="utf-8")
    assert bench("compare").main([str(path) for path in (good, bad)[:: 1 if side else -1]]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and str(bad) in captured.err and captured.err.count("\n") == 1


def test_compare_names_a_file_that_is_not_there(tmp_path, capsys):
    good = written(tmp_path, sample())
    assert bench("compare").main([str(good), str(tmp_path / "none.json")]) == 2
    assert str(tmp_path / "none.json") in capsys.readouterr().err
    assert bench("compare").main([str(tmp_path), str(good)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


# --- what moved


def moved(tmp_path, capsys, old, new, *options):
    paths = [written(tmp_path / side, found) for side, found in (("old", old), ("new", new))]
    status = bench("compare").main([*map(str, paths), *options])
    return status, capsys.readouterr().out


def test_nothing_moved(tmp_path, capsys):
    status, text = moved(tmp_path, capsys, sample(), sample(1.05))
    assert status == 0 and text.startswith("0 of ")


def test_slower_is_a_regression(tmp_path, capsys):
    status, text = moved(tmp_path, capsys, sample(), sample(1.5, commit="def"))
    assert status == 1 and text.rstrip().endswith("; regression")
    assert "kernel/scan tokens=8192" in text and "1.50× (worse, disjoint spreads)" in text
    assert moved(tmp_path, capsys, sample(), sample(1.5), "--ratio", "1.6")[0] == 0


def test_faster_is_none(tmp_path, capsys):
    status, text = moved(tmp_path, capsys, sample(1.5), sample())
    assert status == 0 and "0.67× (better, disjoint spreads)" in text


def test_within_the_spread_is_none(tmp_path, capsys):
    old = result(timed("a", {}, 1.0, 1.1, 3.0))
    new = result(timed("a", {}, 1.0, 1.5, 3.0))
    status, text = moved(tmp_path, capsys, old, new)
    assert status == 0 and "1.36× (worse, spreads overlap)" in text


@pytest.mark.parametrize("old, new, status", [(33, 33, 0), (33, 40, 1), (40, 33, 0), (0, 2, 1), (0, 0, 0)])
def test_counts_have_no_spread(tmp_path, capsys, old, new, status):
    rows = [result(bench("instrument.rows").counted("compiled", {}, spills=count)) for count in (old, new)]
    assert moved(tmp_path, capsys, *rows)[0] == status


def test_rows_of_one_side_are_listed(tmp_path, capsys):
    a, b = timed("a", {"tokens": 1}, 1.0, 1.0), timed("a", {"tokens": 2}, 1.0, 1.0)
    status, text = moved(tmp_path, capsys, result(a), result(b, device="Other GPU"))
    assert status == 0
    assert "only in the old: a tokens=1" in text and "only in the new: a tokens=2" in text
    assert "not the same: device: Some GPU in the old, Other GPU in the new" in text


def test_what_is_refused_now_is_a_regression(tmp_path, capsys):
    rows = bench("instrument.rows")
    old, bad, gone = timed("a", {}, 1.0, 1.0), rows.refused("a", {}, "wrong"), rows.absent("a", "no time")
    assert moved(tmp_path, capsys, result(old), result(bad))[0] == 1
    assert moved(tmp_path, capsys, result(old), result(gone))[0] == 0


def test_the_script(tmp_path):
    paths = [str(written(tmp_path / side, sample(factor))) for side, factor in (("old", 1), ("new", 2))]
    done = subprocess.run([ROOT / "bench" / "compare", *paths], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "2.00× (worse" in done.stdout, done.stderr


# --- targets


def test_targets():
    rows, targets, tables = bench("instrument.rows"), bench("instrument.targets"), bench("instrument.tables")
    target = next(t for t in targets.TARGETS if t.name == "decode/patched" and t.parameters["mode"] == "eager")
    row = timed("decode/patched", QWEN, 1.0, 2.0, 3.0, unpatched=[0.9, 1.0, 1.2])
    assert (row.p20, row.p50, row.p80) == pytest.approx((1.4, 2.0, 2.6))
    assert target.of(row) and target.met(target.number(row)) and target.open(row)
    assert targets.verdict(row) == "≥ 1: yes, the spread includes it"
    row.ratios["unpatched"] = [0.9, 0.95, 0.99]
    assert targets.verdict(row) == "≥ 1: no"
    assert tables.cells(row)[2:6] == ["1.4 s", "2 s", "2.6 s", "12"]
    assert targets.verdict(timed("decode/patched", QWEN | {"model": "other"}, 1.0, 1.0, unpatched=[1, 1, 1])) == ""
    few = rows.counted("operations/patched", {"backend": "triton"}, operations=57)
    assert targets.verdict(few) == "≤ 56: no"


def test_the_worst_row_counts():
    rows, targets = bench("instrument.rows"), bench("instrument.targets")
    target = next(t for t in targets.TARGETS if t.value == "streaming")
    made = [rows.counted(f"kernel/{name}", {"tokens": 1}, streaming=x) for name, x in (("read", 0.9), ("steer", 0.7))]
    assert target.worst([*made, rows.counted("kernel/scan", {}, roofline=0.1)]) is made[1]


def test_every_target_can_be_measured():
    """Names and parameters of the targets are those of rows that the benchmarks make."""
    from bench.instrument.backbones import KINDS
    from bench.speed.decode import MODES

    for target in bench("instrument.targets").TARGETS:
        assert bool(target.baseline) != bool(target.value), target
        kind = target.name.split("/")[0]
        assert kind in ("decode", "prefill", "scan", "scan-gradient", "kernel", "operations", "compiled")
        assert target.parameters.get("model", "Qwen3-4B") in KINDS
        assert target.parameters.get("mode", "eager") in {"eager", *MODES}
        assert target.stretch is None or target.met(target.stretch)


# --- pages


def found(*machines, **more):
    return bench("report.found").Found(machines, **more)


def test_a_page_says_once_what_was_not_measured():
    pages = bench("report.pages")
    targets = bench("instrument.targets").TARGETS
    text = "".join(pages.written(found()).values())
    assert all(text.count(f"| {target.what} |") == 1 for target in targets)
    assert all(
        page.lower().count(pages.NOT_YET) == 1
        for name, page in pages.written(found()).items()
        # Those of several parts, each of which is measured by itself:
        if name not in ("kernels.md", "memory.md", "serving.md", "evaluation.md", "trust.md")
    )
    text = pages.speed(found(sample()))
    line = next(line for line in text.splitlines() if "prefill 32 k, patched" in line)
    assert "| 1.000 (0.980 to 1.010) | yes (the spread includes it) |" in line
    assert "## Some GPU\n\n**Some GPU**, driver 580.1" in text and "commit abc1234" in text


def test_pages_show_rows_memory_and_what_was_left_out():
    pages = bench("report.pages")
    text = pages.speed(found(sample()))
    assert "| decode/patched |" in text and "Left out: scan/fla (not importable)." in text
    line = next(
        line for line in text.splitlines() if line.startswith("| prefill/patched | model=Qwen3-4B batch=1 tokens=32768")
    )
    assert "peak memory 9.05 GiB, extra memory +0.56%" in line


def test_every_kind_of_row_has_a_page():
    pages = bench("report.pages")
    rows = [row for one in bench("report.found").find().machines for row in one.rows]
    kinds = {row.name.split("/")[0] for row in rows if row.status != "absent"}
    assert kinds and kinds <= pages.SPEED.keys() | pages.KERNELS.keys()
    left_out = [row for row in rows if row.status == "absent"]
    text = "\n".join(
        line for page in (pages.speed, pages.kernels) for line in page(bench("report.found").find()).split("\n")
    )
    assert all(f"({row.note})" in text for row in left_out)


def test_what_a_run_had_no_time_for_comes_from_an_earlier_one(tmp_path):
    module, rows = bench("instrument.results"), bench("instrument.rows")
    head = dict(sample().head)

    def write(time, commit, made):
        module.write(tmp_path, module.Result(head | {"time": time, "commit": commit}, made))

    sizes, other = {"batch": 1, "tokens": 8}, {"batch": 16, "tokens": 8}
    old = [rows.measured("decode/patched", size, [seconds] * 3) for size, seconds in ((sizes, 1.0), (other, 2.0))]
    gone = rows.absent("decode/patched", "does not fit", sizes | {"batch": 512})
    write(
        "2026-01-01T00:00:00Z",
        "aaaaaaa",
        [
            *old,
            gone,
            rows.measured("prefill/patched", sizes, [3.0] * 3),
            rows.measured("kernel/gone", sizes, [5.0] * 3),
        ],
    )
    cut = [
        rows.measured("decode/patched", sizes, [4.0] * 3),
        rows.absent("decode", "cut off"),
        rows.absent("prefill", "no time"),
    ]
    write("2026-01-02T00:00:00Z", "bbbbbbb", [*cut, rows.absent("compiled", "no time")])
    (found,) = module.newest(tmp_path)
    assert found.head["commit"] == "bbbbbbb"
    assert [(row.name, row.p50, row.note) for row in found.rows] == [
        ("decode/patched", 4.0, ""), ("decode", None, "cut off"), ("prefill", None, "no time"),
        ("compiled", None, "no time"), ("decode/patched", 2.0, "of commit aaaaaaa"),
        ("prefill/patched", 3.0, "of commit aaaaaaa"),
    ]  # fmt: skip
    write("2026-01-03T00:00:00Z", "ddddddd", cut)
    head["triton"] = "0.1"
    write("2026-01-04T00:00:00Z", "eeeeeee", cut)
    assert len(module.newest(tmp_path)[0].rows) == len(cut)  # other software: nothing of before
    write("2026-01-05T00:00:00Z", "ccccccc", cut[:1])
    assert len(module.newest(tmp_path)[0].rows) == 1  # a run that left nothing out stands for itself


def test_writing_and_checking(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    report = bench("report.__main__")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(report, "README", page)
    written(tmp_path / "results", sample())
    options = ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "docs")]
    assert report.main(["--check", *options]) == 1
    out = capsys.readouterr().out
    assert "-old" in out and "+# Speed" in out and not (tmp_path / "docs").exists()
    assert report.main(options) == 0 and report.main(["--check", *options]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    speed = tmp_path / "docs" / "speed.md"
    pictures = re.findall(r"!\[.*\]\((.*)\)", speed.read_text(encoding="utf-8"))
    assert pictures and all((speed.parent / name).is_file() for name in pictures)
    speed.write_text("else", encoding="utf-8")
    assert report.main(["--check", *options]) == 1 and "-else" in capsys.readouterr().out
    page.write_text("no markers", encoding="utf-8")
    assert report.main(options) == 2
    assert "README.md: allowed once each" in capsys.readouterr().err


def test_readme_has_ten_rows_at_most():
    pages = bench("report.pages")
    lines = pages.readme_rows(bench("report.found").find()).splitlines()
    assert 2 < len(lines) <= 2 + 10 and len({line.count("|") for line in lines}) == 1
    (line,) = pages.readme_rows(found()).splitlines()[2:]
    assert pages.NOT_YET in line
    assert pages.readme_rows(found(sample())).count("1.240 (1.200 to 1.280)") == 1


def test_pages_and_readme_are_what_the_results_say(capsys):
    assert bench("report.__main__").main(["--check"]) == 0, capsys.readouterr().out


# --- pictures


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    plots = bench("report.plots")
    first, second = (plots.draw(found(sample(), pictures=tmp_path / name)) for name in "ab")
    assert [path.name for path in first] == [f"gpu-some-gpu-{name}.png" for name in ("kernels", "model", "memory")]
    for one, other in zip(first, second):
        data = one.read_bytes()
        assert data.startswith(b"\x89PNG") and 2_000 < len(data) < 100_000
        assert data == other.read_bytes()


def test_no_picture_without_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    assert (
        bench("report.plots").draw(found(result(bench("instrument.rows").absent("a", "no")), pictures=tmp_path)) == []
    )


def test_a_title_has_the_numbers_of_the_rows():
    plots, pyplot = bench("report.plots"), pytest.importorskip("matplotlib.pyplot")
    titles = []
    for name in ("kernels", "model", "memory"):
        figure = pyplot.figure()
        titles.append(plots.MACHINE[name](sample().rows, figure))
        pyplot.close(figure)
    assert titles == ["At its best size a kernel moves its bytes at 25 % of a copy's speed",
                      "With the memory a model runs at 100 to 124 % of its bare speed",
                      "The patch adds at most 0.6 % to a prompt's peak memory"]  # fmt: skip


def test_names_of_lines_keep_apart():
    plots, pyplot = bench("report.plots"), pytest.importorskip("matplotlib.pyplot")
    figure = pyplot.figure()
    lines = [plots.Line(name, "blue", [(0, 0, 0, 0), (1, y, y, y)]) for name, y in zip("abcd", (0.5, 0.51, 0.99, 1.0))]
    axes = plots._chart(figure, lines, "x", "y")
    heights = [text.xyann[1] for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == list("abcd")
    assert all(high - low > 0.059 for low, high in itertools.pairwise(heights)) and 0 < heights[0] < heights[-1] < 1.05
    pyplot.close(figure)


def test_committed_pictures_are_small():
    assert all(path.stat().st_size < 200_000 for path in bench("report.found").PICTURES.glob("*.png"))


def test_memory_that_is_kept_costs_no_page_faults_again():
    """And the heading says that it was kept."""
    code = (
        "import resource\nfrom bench.instrument import machine\nkept = machine.keep_memory()\n"
        "fill = lambda: bytes(64 << 20).count(1) + resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "first, second, third = fill(), fill(), fill()\nprint(kept, third - second, machine.describe()['freed_memory'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kept, faults, said = printed.split(maxsplit=2)
    if kept == "False":
        pytest.skip("not glibc's allocator")
    assert int(faults) < 1000 and said.strip() == "kept"  # 16,384 pages of 4 KiB
    heading = bench("instrument.results").heading
    assert "freed memory kept" in heading(result(driver=None, freed_memory="kept"))
    assert "freed memory" not in heading(result(driver=None))
