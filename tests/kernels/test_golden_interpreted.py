"""The golden cases on the Triton kernels, in the interpreter: a process that has TRITON_INTERPRET=1 from the start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import CASES

pytest.importorskip("triton")
HERE = Path(__file__).parent
ATTENTIONS = ("eager", "sdpa")


def check(pairs):
    """Run test_golden of (case, attention) pairs in such a process."""
    tests = [f"{HERE / 'test_golden.py'}::test_golden[{case}-{attention}-triton]" for case, attention in pairs]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert passed and int(passed[1]) == len(tests) > 0, done.stdout[-2000:]


# The kernels are behind the projections, whatever attention does; so each case under one, and in make soak under both.
# Those whose kernels get nothing that another case has not, there alone, as those of rules whose kernels
# interpreted/test_interpreted_scan.py compares with the reference, which agrees with all golden cases.
ALIKE = (
    "qwen3_all_heads_rmsnorm_scale",
    "qwen3_lambda_outside_uncoupled",
    "qwen3_layers_subset",
    "qwen3_no_lambda_scalar_gates",
    "qwen3_read_only_carry",
    "qwen3_ssw_sentence",
    "qwen3_tsw",  # its prompt is that of qwen3_tsw_grad, its decode that of qwen3_tsw_bf16
    "qwen3_tsw_left_padded",
    "smollm3_tsw",
)
PAIRS = [(case, ATTENTIONS[n % 2]) for n, case in enumerate(CASES) if case not in ALIKE]


@pytest.mark.interpret
def test_golden_cases_interpreted():
    check(PAIRS)


@pytest.mark.soak
@pytest.mark.interpret
def test_all_other_golden_cases_interpreted():
    assert set(ALIKE) < set(CASES)
    check([(case, attention) for case in CASES for attention in ATTENTIONS if (case, attention) not in PAIRS])
