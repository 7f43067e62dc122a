"""Every kernel, compiled ahead of time for every target: no spill, no stack. In a process without interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

KERNELS = {
    "token_flags_kernel", "token_parts_kernel", "chunk_transition_kernel", "state_passing_kernel",
    "chunk_scan_kernel", "repair_kernel",
    "read_kernel", "step_kernel", "steer_kernel", "steer_heads_kernel", "decode_kernel",
    "chunk_transition_backward_kernel", "state_passing_backward_kernel", "block_states_kernel",
    "projection_gradient_kernel", "read_backward_kernel", "steer_backward_kernel",
}  # fmt: skip


TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


# Every kernel, in one case, for the two makers; make soak has all of all.
@pytest.mark.compile_ahead
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_no_spill_and_no_stack(target, tmp_path):
    check(target, tmp_path, "--least")


@pytest.mark.soak
@pytest.mark.compile_ahead
@pytest.mark.parametrize("target", TARGETS)
def test_no_spill_and_no_stack_in_every_case(target, tmp_path):
    check(target, tmp_path)


@pytest.mark.soak
@pytest.mark.compile_ahead
@pytest.mark.parametrize("target", TARGETS)
def test_no_spill_and_no_stack_in_the_full_product(target, tmp_path):
    check(target, tmp_path, "--full")


def check(target, tmp_path, *options):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "deltamem_kernels.report", "--target", target, *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines() if f" {target} " in line]
    seen = set()
    for words in lines:
        *_, kernel, there, registers, shared, stack, spills, _ = words
        seen.add(kernel)
        assert there == target and (stack, spills) == ("0", "0"), " ".join(words)
        assert 0 < int(registers) <= 255 and int(shared) <= 48 * 1024, " ".join(words)
    assert seen == KERNELS and len(lines) >= {"--least": 18, "--brief": 44}.get(options[0] if options else "", 80)
