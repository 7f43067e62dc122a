"""Races on the emulator: an arrival protocol written by hand, right and broken on purpose."""

import numpy as np
import pytest
from hand_written import aligned, found, launch

PROGRAMS, THREADS = 6, 64
# Each program of two warps leaves its part, then arrives; the one that arrives last adds the parts up.
ARRIVAL = f"""
    mad.lo.u32 %r5, %r2, {THREADS}, %r1; mad.wide.u32 %rd8, %r5, 4, %rd0;
    add.u32 %r6, %r5, 1; st.global.b32 [%rd8], %r6;
    bar.sync 0;
    setp.ne.u32 %p0, %r1, 0;
    @%p0 bra $wait;
    atom.global.gpu.acq_rel.add.u32 %r7, [%rd1], 1;
    mov.b32 %r8, 0; st.shared.b32 [%r8], %r7;
$wait:
    bar.sync 0;
    mov.b32 %r8, 0; ld.shared.b32 %r7, [%r8];
    setp.ne.u32 %p1, %r7, {PROGRAMS - 1};
    @%p1 bra $end;
    mov.b32 %r9, 0; mov.b32 %r10, 0; mul.wide.u32 %rd9, %r1, 4; add.u64 %rd10, %rd0, %rd9;
$add:
    ld.global.b32 %r11, [%rd10]; add.u32 %r10, %r10, %r11; add.u64 %rd10, %rd10, {4 * THREADS};
    add.u32 %r9, %r9, 1; setp.lt.u32 %p2, %r9, {PROGRAMS};
    @%p2 bra $add;
    add.u64 %rd11, %rd2, %rd9; st.global.b32 [%rd11], %r10;
    @%p0 bra $end;
    st.global.b32 [%rd1], 0;
$end:
    ret;
"""
EXPECTED = (np.arange(PROGRAMS * THREADS).reshape(PROGRAMS, THREADS) + 1).sum(0).tolist()
BROKEN = {
    "relaxed atomic": ("acq_rel", "relaxed"),
    "only acquires": ("acq_rel", "acquire"),
    "only releases": ("acq_rel", "release"),
    "the first to arrive writes": (f"%p1, %r7, {PROGRAMS - 1}", "%p1, %r7, 0"),
    "the last but one to arrive writes": (f"%p1, %r7, {PROGRAMS - 1}", f"%p1, %r7, {PROGRAMS - 2}"),
    "no barrier before the arrival": ("bar.sync 0;\n    setp.ne.u32 %p0", "setp.ne.u32 %p0"),
    "no barrier after the arrival": ("$wait:\n    bar.sync 0;", "$wait:"),
}


def run(body, seed):
    parts, counter, sums = (aligned(np.zeros(n), np.uint32) for n in (PROGRAMS * THREADS, 1, THREADS))
    made = launch(body, parts, counter, sums, threads=THREADS, grid=PROGRAMS, shared=16, seed=seed)
    return made, sums.tolist(), int(counter[0])


def test_the_protocol_is_right():
    for seed in range(12):
        made, sums, counter = run(ARRIVAL, seed)
        assert sums == EXPECTED and counter == 0 and not made.problems


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_protocol_is_found_in_every_schedule(how):
    old, new = BROKEN[how]
    assert ARRIVAL.count(old) == 1
    wrong = 0
    for seed in range(12):
        made, sums, _ = run(ARRIVAL.replace(old, new), seed)
        wrong += sums != EXPECTED
        assert any(what.startswith("race in") for what in found(made)), seed
    # That the result is right most of the time is why it takes a detector.
    assert wrong < 12 or "arrive writes" in how or "no barrier" in how


def test_atomics_alone_do_not_race():
    counter = aligned([0], np.uint32)
    assert not launch("red.global.gpu.relaxed.add.u32 [%rd0], 1; ret;", counter, grid=4).problems
    assert counter[0] == 128


def test_programs_that_store_to_one_place_race():
    made = launch("st.global.b32 [%rd0], %r2; ret;", aligned([0], np.uint32), grid=3)
    assert found(made) == {"race in global between warps (write/write)"} and made.hard
    # The same value from all: copies of one thread's.
    assert not launch("st.global.b32 [%rd0], 9; ret;", aligned([0], np.uint32), grid=3).problems


def test_a_race_is_seen_whatever_the_order():
    body = "setp.eq.u32 %p0, %r2, 0; @%p0 bra $store; ld.global.b32 %r5, [%rd0]; ret;\n$store:\n"
    body += "st.global.b32 [%rd0], 1; ret;"
    kinds = {frozenset(found(launch(body, aligned([0], np.uint32), grid=2, seed=seed))) for seed in range(10)}
    assert kinds == {frozenset({f"race in global between warps ({k})"}) for k in ("read/write", "write/read")}


def test_without_detection_nothing_is_logged():
    made = launch("st.global.b32 [%rd0], %r2; ret;", aligned([0], np.uint32), grid=3, races=False)
    assert not made.problems
