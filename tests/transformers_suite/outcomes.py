"""A pytest plugin: what came of each test and subtest, as JSON into the file that OUTCOMES names."""

import json
import os

_found = {}


def pytest_runtest_logreport(report):
    name = report.nodeid.rpartition("::")[2]
    context = getattr(report, "context", None)  # of a subtest
    if context is not None:
        values = ", ".join(f"{key}={value}" for key, value in sorted(context.kwargs.items()))
        name = f"{name} [{context.msg or ''} {values}]"
    # A test that is set up but fails when it is taken down has failed.
    if report.when == "call" or report.outcome != "passed":
        worst = _found.get(name, ["passed", ""])
        text = "" if report.outcome == "passed" else str(getattr(report.longrepr, "reprcrash", report.longrepr))
        _found[name] = worst if worst[0] == "failed" else [report.outcome, text[:1000]]


def pytest_sessionfinish():
    with open(os.environ["OUTCOMES"], "w", encoding="utf-8") as file:
        json.dump(_found, file)
