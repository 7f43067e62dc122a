"""What make eval-smoke checks at its end: each row that it asks for, and every benchmark and policy among them."""

from pathlib import Path

from bench.evaluation import smoke
from deltamem_fast.eval.answers import Answer, AnswerFile
from deltamem_fast.eval.paper import PAPER_TASKS
from deltamem_fast.eval.policies import KINDS
from deltamem_fast.eval.tasks import TASKS
from deltamem_fast.storage.files import write_json


def place(directory, row, ids=("a", "b"), scored=("a", "b")):
    run, task, name = row.split("/")
    with AnswerFile(directory / run / "answers" / task / f"{name}.jsonl", {"task": task}) as file:
        file.append([Answer(id, "so") for id in ids])
    path = directory / run / "scores" / task / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"scores": dict.fromkeys(scored)})


def test_each_row_has_to_be_there(tmp_path, capsys):
    rows = sorted(smoke.expected())
    for row in rows[1:]:
        place(tmp_path, row)
    assert smoke.main(tmp_path) == 1 and f"missing: {rows[0]}\n" in capsys.readouterr().err
    for ids, scored in (((), ()), (("a", "b"), ("a",))):
        place(tmp_path, rows[0], ids, scored)
        assert smoke.main(tmp_path) == 1
        (tmp_path / "{}/answers/{}/{}.jsonl".format(*rows[0].split("/"))).unlink()
    place(tmp_path, rows[0])
    assert smoke.main(tmp_path) == 0
    place(tmp_path, "harness/gpqa/everything+off")
    assert smoke.main(tmp_path) == 1 and "smoke.py: harness/gpqa/everything+off" in capsys.readouterr().err


def test_every_benchmark_and_policy():
    products = [product for products in smoke.EXPECTED.values() for product in products]
    tasks = {task for tasks, _, _ in products for task in tasks}
    assert tasks == {*TASKS, *PAPER_TASKS} - {f"babilong-qa{n}" for n in range(2, 6)}  # qa1's like
    policies = {policy.partition("-")[0] for _, policies, _ in products for policy in policies}
    assert policies == KINDS.keys()
    text = Path(smoke.__file__).parents[2].joinpath("Makefile").read_text()
    recipe = text.partition("\neval-smoke:")[2].partition("\nevaluation:")[0]
    for run in smoke.EXPECTED:
        assert f"--output build/eval-smoke/{run} " in recipe
    words = set(recipe.replace("=", " ").split())
    assert tasks | {policy for _, policies, _ in products for policy in policies} <= words
