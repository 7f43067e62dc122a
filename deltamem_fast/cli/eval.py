"""``deltamem eval``: benchmarks with and without a memory, under policies of what stays in context."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deltamem_kernels.dispatch import BACKENDS

from ..errors import ArgumentError
from ..eval.defaults import BATCH, CHUNK, CHUNK_TOKENS, EMBEDDER
from ..eval.policies import NAMES
from ..model.loading import ATTENTIONS, DTYPES
from ..model.threads import HELP, check_threads
from ..storage.files import as_path

DIFFERENT = 1  # the exit code if --verify found that a row's way of feeding does not equal plain forwards

_RUN = """\
Every task under every policy, without a memory (the rows +off) and with each adapter, into one directory: answers,
scores, and a report of quality beside cost (report.md, report.html, report.json). The same command again goes on
where a run was killed; more tasks, policies or adapters add rows to it.
"""
_TASKS = """\
TASK is a name, or name=FILE with its data: locomo, memory-agent-bench, memory-agent-bench-paper (scored as the paper's
code does), longmemeval-s, changes, changes-small are ours; ifeval, gpqa, hotpotqa, ruler-niah, ruler-vt, babilong-qa1
to -qa5 are lm-evaluation-harness's.
POLICY is what stays in context:
"""


def add_command(commands) -> None:
    """Add ``eval`` to argparse's ``commands``."""
    parser = commands.add_parser(
        "eval",
        help="benchmarks: what the memory, retrieval, a longer context, and their combinations give and cost",
        description="Benchmarks of long texts and conversations, each row a context policy with a memory or without.",
    )
    parser.set_defaults(command=lambda arguments: _no_action(parser))
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    _add_run(actions)
    _add_score(actions)
    report = actions.add_parser(
        "report", help="write the report of a run's directory anew", description="From the answers and scores there."
    )
    report.add_argument("output", metavar="DIR", help="the directory of a run")
    report.set_defaults(command=_report)


def _no_action(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return 2


def _add_run(actions) -> None:
    run = actions.add_parser(
        "run",
        help="run tasks and write a report",
        description=_RUN,
        epilog=_TASKS + "".join(f"  {name:14} {meaning}\n" for name, meaning in NAMES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument(
        "model", metavar="MODEL", help="a directory or hub id, smollm2, or recall (the recall proof's small backbone)"
    )
    run.add_argument("--task", nargs="+", required=True, metavar="TASK[=FILE]", help="what is asked")
    run.add_argument("--policy", nargs="+", default=["nothing"], metavar="POLICY", help="(nothing)")
    run.add_argument(
        "--adapter", nargs="+", default=None, metavar="[LABEL=]ADAPTER",
        help="a directory, hub id or shipped name, with a label for its rows (its strategy: tsw, ssw, ssw-sentence, "
        "msw); of smollm2 and recall the strategy alone names a shipped one, and msw is the default; off: none",
    )  # fmt: skip
    run.add_argument("--no-frozen", dest="frozen", action="store_false", help="leave the rows without a memory out")
    run.add_argument("--output", metavar="DIR", required=True, help="the run's directory, made or gone on with")
    group = run.add_argument_group("how much")
    group.add_argument("--documents", type=int, metavar="N", help="of each task of ours, the first N (all)")
    group.add_argument(
        "--questions", type=int, metavar="N", help="of each document, drawn; of lm_eval's tasks the first N (all)"
    )
    group.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    group.add_argument(
        "--verify", type=int, default=0, metavar="N",
        help="documents of each row that are compared with one plain forward; exit code 1 if they differ (%(default)s)",
    )  # fmt: skip
    group = run.add_argument_group("how documents are told and questions asked")
    group.add_argument(
        "--window", type=int, default=0, metavar="TOKENS", help="of a context that is told (the model's, at most 8192)"
    )
    group.add_argument("--chunk", type=int, default=CHUNK, metavar="TOKENS", help="of a forward (%(default)s)")
    group.add_argument(
        "--batch-size", type=int, default=BATCH, metavar="N", help="documents, or questions, together (%(default)s)"
    )
    group.add_argument(
        "--retrieval-chunk",
        type=int,
        default=CHUNK_TOKENS,
        metavar="TOKENS",
        help="of what retrieval finds (%(default)s)",
    )
    group.add_argument("--embedder", help=f"of dense retrieval: a sentence-transformers model ({EMBEDDER})")
    group.add_argument("--new-tokens", type=int, default=0, metavar="N", help="of an answer at most (the task's)")
    group.add_argument(
        "--template", metavar="JSON", help='arguments of the chat template, such as {"enable_thinking": false}'
    )
    _add_judge(run)
    group = run.add_argument_group("machine")
    group.add_argument("--device", help="where the model is put (a GPU if there is one)")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="(as saved)")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="(%(default)s)")
    group.add_argument("--attention", choices=ATTENTIONS, help="(transformers' choice)")
    group.add_argument("--threads", type=int, metavar="N", help=HELP)
    run.add_argument("--json", action="store_true", help="the report as one JSON object")
    run.set_defaults(command=_run)


def _add_score(actions) -> None:
    score = actions.add_parser(
        "score",
        help="score answers that are already there, without a model",
        description="ANSWERS.jsonl has an object a line: id, the question's, and answer. Prints JSON.",
    )
    score.add_argument("task", metavar="TASK", help="one of ours: see deltamem eval run --help")
    score.add_argument("answers", metavar="ANSWERS.jsonl")
    score.add_argument("--data", metavar="FILE", help="the task's data, where it is not had from elsewhere")
    _add_judge(score)
    score.set_defaults(command=_score)


def _add_judge(parser) -> None:
    group = parser.add_argument_group("judge")
    group.add_argument("--judge", metavar="URL", help="an OpenAI-compatible endpoint; its key is OPENAI_API_KEY")
    group.add_argument("--judge-model", metavar="NAME", help="what it calls its model")


def _judge_of(arguments: argparse.Namespace, kept: Path):
    """The judge that was asked for, which keeps what it has judged; None: there is none."""
    if (arguments.judge is None) != (arguments.judge_model is None):
        raise ArgumentError("--judge, --judge-model: got one of them, allowed both or neither")
    if arguments.judge is None:
        return None
    from ..eval.judge import Endpoint, keeping

    return keeping(Endpoint(arguments.judge, arguments.judge_model), kept)


# --- run


def _run(arguments: argparse.Namespace) -> int:
    from ..eval.policies import policy_named

    check_threads(arguments.threads)
    output = as_path(arguments.output, "--output")
    policies = tuple(policy_named(text) for text in arguments.policy)
    tasks = tuple(_task(text) for text in arguments.task)
    template = _template(arguments.template)
    judge = _judge_of(arguments, output / "judged.jsonl")
    model, adapters, shown = _model_and_adapters(arguments)
    from ..eval.answering import Settings
    from ..eval.plan import Plan
    from ..eval.record import feeding_holds
    from ..eval.run import run

    settings = Settings(
        window=arguments.window, chunk=arguments.chunk, batch=arguments.batch_size,
        chunk_tokens=arguments.retrieval_chunk, embedder=arguments.embedder, new_tokens=arguments.new_tokens,
        template=template,
    )  # fmt: skip
    names = ("frozen", "documents", "questions", "seed", "verify", "device", "dtype", "backend", "attention", "threads")
    options = {name: getattr(arguments, name) for name in names}
    plan = Plan(
        model, output, tasks, policies, adapters, settings=settings, judge=arguments.judge_model, shown=shown, **options
    )
    files = run(plan, judge=judge, say=lambda text: print(text, file=sys.stderr, flush=True))
    if arguments.json:
        print(json.dumps(json.loads(files["report.json"].read_text(encoding="utf-8")), indent=2))
    else:
        print("\n".join(str(path) for path in files.values()))
    return 0 if feeding_holds(output, plan) else DIFFERENT


def _task(text: str) -> tuple[str, Path | None]:
    name, equals, path = text.partition("=")
    return name, as_path(path, f"--task {name}") if equals else None


def _template(text: str | None) -> dict:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"--template: got {text!r:.120}, which is not JSON ({error}), allowed an object") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"--template: got {text!r:.120}, allowed a JSON object")
    return found


def _model_and_adapters(arguments: argparse.Namespace) -> tuple[str, dict[str, str], dict[str, str]]:
    """The model's name; label → adapter; and what records call those that lie in the package."""
    from ..adapter.files import read_adapter
    from ..eval.opening import SMALL, shipped_adapters, small_backbone, strategy_of

    model, shown = arguments.model, {}
    shipped = shipped_adapters(model)
    if model == SMALL and not Path(SMALL).is_dir():
        model, shipped, shown = small_backbone()
    given = arguments.adapter
    if given is None:
        given = ["msw"] if "msw" in shipped else []
        if not given and not arguments.frozen:
            raise ArgumentError("--adapter: not given; without it only the frozen rows can run")
        if not given:
            print(f"{model}: no adapter was given and none is shipped: without a memory only", file=sys.stderr)
    if given == ["off"]:
        given = []
    found: dict[str, str] = {}
    for text in given:
        label, equals, name = text.partition("=")
        if not equals:
            name = shipped.get(text, text)
            label = text if text in shipped else strategy_of(read_adapter(name).config)
        if label in found:
            raise ArgumentError(f"--adapter: got two with the label {label!r:.80}, allowed each once: LABEL=ADAPTER")
        found[label] = shipped.get(name, name)
    return model, found, shown


# --- score, report


def _score(arguments: argparse.Namespace) -> int:
    from ..eval.scoring import read_answers, score_answers
    from ..eval.tasks import task_named

    task = task_named(arguments.task)
    path = as_path(arguments.answers, "ANSWERS.jsonl")
    answers = read_answers(path)
    judge = _judge_of(arguments, path.with_suffix(".judged.jsonl"))
    documents = task.load(None if arguments.data is None else as_path(arguments.data, "--data"))
    print(json.dumps(score_answers(task, documents, answers, judge), indent=2))  # names in the data may hold anything
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ..eval.report import write_report

    print("\n".join(str(path) for path in write_report(as_path(arguments.output, "DIR")).values()))
    return 0
