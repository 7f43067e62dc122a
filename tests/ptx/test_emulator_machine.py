"""Memory, control flow and the meeting of lanes and warps on the emulator, in kernels written by hand."""

import re

import numpy as np
import pytest
from emulator import STRATEGIES, EmuError
from hand_written import aligned, found, launch

U32, F32 = np.uint32, np.float32
OWN = "mad.wide.u32 %rd8, %r1, 4, %rd0; "  # the address of this thread's number in the first array


def numbers(n=32):
    return aligned(np.arange(n), U32)


def test_each_lane_stores_its_number():
    out = numbers() * 0
    launch(OWN + "st.global.b32 [%rd8], %r0; ret;", out)
    assert out.tolist() == list(range(32))


def test_a_guard_holds_lanes_back():
    out = numbers() + U32(100)
    launch(OWN + "setp.lt.u32 %p0, %r0, 5; @%p0 st.global.b32 [%rd8], 1; @!%p0 st.global.b32 [%rd8], 2; ret;", out)
    assert out.tolist() == [1] * 5 + [2] * 27


def test_lanes_leave_a_loop_one_after_another():
    out = numbers()
    body = """
    mov.b32 %r5, 0; mov.b32 %r6, 0;
$loop:
    add.u32 %r5, %r5, %r6; add.u32 %r6, %r6, 1;
    setp.le.u32 %p0, %r6, %r0;
    @%p0 bra $loop;
    """
    launch(body + OWN + "st.global.b32 [%rd8], %r5; ret;", out)
    assert out.tolist() == [n * (n + 1) // 2 for n in range(32)]


def test_both_sides_of_a_branch_and_an_early_exit():
    out = numbers() * 0
    body = f"""
    {OWN}
    setp.ge.u32 %p1, %r0, 30;
    @%p1 exit;
    and.b32 %r5, %r0, 1; setp.eq.u32 %p0, %r5, 0;
    @%p0 bra $even;
    mov.b32 %r6, 7;
    bra.uni $end;
$even:
    mov.b32 %r6, 9;
$end:
    st.global.b32 [%rd8], %r6;
    ret;
    """
    launch(body, out)
    assert out.tolist() == [9, 7] * 15 + [0, 0]


def test_wide_loads_and_narrow_stores():
    a, out = numbers(128), aligned(np.zeros(64), np.uint16)
    body = """
    mad.wide.u32 %rd8, %r0, 16, %rd0; mad.wide.u32 %rd9, %r0, 4, %rd1;
    ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd8];
    cvt.u16.u32 %rs1, %r6; cvt.u16.u32 %rs2, %r8;
    st.global.v2.b16 [%rd9], {%rs1, %rs2};
    ret;
    """
    made = launch(body, a, out)
    assert out.reshape(32, 2).tolist() == [[4 * n + 1, 4 * n + 3] for n in range(32)]
    assert (made.counts.load_sectors, made.counts.store_sectors) == (16, 4)


def test_narrow_loads_are_extended():
    a, out = aligned(np.arange(-16, 16), np.int32), aligned(np.zeros(32), np.uint64)
    body = "mad.wide.u32 %rd8, %r0, 4, %rd0; mad.wide.u32 %rd9, %r0, 8, %rd1; {} st.global.b64 [%rd9], %rd10; ret;"
    launch(body.format("ld.global.s32 %rd10, [%rd8];"), a, out)
    assert out.view(np.int64).tolist() == a.tolist()
    launch(body.format("ld.global.u32 %rd10, [%rd8];"), a, out)
    assert out.tolist() == a.view(U32).tolist()
    launch(body.format("ld.global.s8 %rs1, [%rd8]; cvt.s64.s16 %rd10, %rs1;"), a, out)
    assert out.view(np.int64).tolist() == a.tolist()


def test_shuffles():
    out = numbers()
    tree = "".join(f"shfl.sync.bfly.b32 %r6, %r5, {n}, 31, -1; add.u32 %r5, %r5, %r6; " for n in (16, 8, 4, 2, 1))
    launch("mov.b32 %r5, %r0; " + tree + OWN + "st.global.b32 [%rd8], %r5; ret;", out)
    assert out.tolist() == [496] * 32

    def shuffled(code):
        launch(
            code + "selp.b32 %r7, 1000, 0, %p0; add.u32 %r6, %r6, %r7;" + OWN + "st.global.b32 [%rd8], %r6; ret;", out
        )
        return out.tolist()

    # The predicate says whether the lane asked for exists; where not, a lane gets its own number.
    assert shuffled("shfl.sync.idx.b32 %r6|%p0, %r0, 3, 31, -1;") == [1003] * 32
    assert shuffled("shfl.sync.up.b32 %r6|%p0, %r0, 1, 0, -1;") == [0, *range(1000, 1031)]
    assert shuffled("shfl.sync.down.b32 %r6|%p0, %r0, 2, 31, -1;") == [*range(1002, 1032), 30, 31]
    # Parts of eight lanes.
    assert shuffled("shfl.sync.idx.b32 %r6|%p0, %r0, 1, 0x181f, -1;") == [1000 + 8 * (n // 8) + 1 for n in range(32)]


def test_votes_and_reductions():
    out = numbers()
    body = f"""
    setp.gt.u32 %p0, %r0, 29;
    vote.sync.ballot.b32 %r5, %p0, -1; vote.sync.any.pred %p1, %p0, -1; vote.sync.all.pred %p2, %p0, -1;
    redux.sync.add.s32 %r6, %r0, -1;
    selp.b32 %r7, 1, 0, %p1; selp.b32 %r8, 2, 0, %p2;
    add.u32 %r7, %r7, %r8; add.u32 %r7, %r7, %r6; xor.b32 %r5, %r5, %r7;
    {OWN} st.global.b32 [%rd8], %r5; ret;
    """
    launch(body, out)
    assert out.tolist() == [0xC0000000 ^ (496 + 1)] * 32


# Each thread of 64 leaves its number in shared memory and takes that of its opposite, in the other warp.
SWAP = """
    shl.b32 %r5, %r1, 2; st.shared.b32 [%r5], %r1;
    {barrier}
    xor.b32 %r6, %r5, 252; ld.shared.b32 %r7, [%r6];
    {own} st.global.b32 [%rd8], %r7; ret;
"""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shared_memory_behind_a_barrier(strategy):
    out = numbers(128)
    made = launch(SWAP.format(barrier="bar.sync 0;", own=OWN), out, threads=64, shared=256, strategy=strategy)
    assert out[:64].tolist() == list(range(63, -1, -1)) and not made.problems


def test_a_missing_barrier_is_found():
    for seed in range(4):
        made = launch(SWAP.format(barrier="", own=OWN), numbers(64), threads=64, shared=256, seed=seed)
        kinds = {f"race in shared between warps ({kind})" for kind in ("read/write", "write/read")}
        assert found(made) and found(made) <= kinds


def test_a_missing_barrier_within_a_warp_is_found():
    body = SWAP.replace("252", "124")
    assert found(launch(body.format(barrier="", own=OWN), numbers(), shared=128)) == {
        "race in shared within a warp, no bar between (write/read)"
    }
    assert not launch(body.format(barrier="bar.warp.sync -1;", own=OWN), numbers(), shared=128).problems


def test_asynchronous_copies_arrive_when_waited_for():
    a, out = numbers(), numbers() * 0
    body = """
    shl.b32 %r5, %r0, 2; {own}
    st.shared.b32 [%r5], 77;
    setp.lt.u32 %p0, %r0, 16; selp.b32 %r9, 4, 0, %p0;
    cp.async.ca.shared.global [%r5], [%rd8], 4, %r9;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r7, [%r5];
    mad.wide.u32 %rd9, %r1, 4, %rd1; st.global.b32 [%rd9], %r7; ret;
    """
    launch(body.format(own=OWN, wait="cp.async.wait_group 0;"), a, out, shared=128, races=False)
    assert out.tolist() == [*range(16), *[0] * 16]
    launch(body.format(own=OWN, wait=""), a, out, shared=128, races=False)
    assert out.tolist() == [77] * 32


def test_ldmatrix_hands_out_rows():
    out = numbers()
    body = f"""
    shl.b32 %r5, %r1, 2; st.shared.b32 [%r5], %r1; bar.warp.sync -1;
    and.b32 %r6, %r1, 7; shl.b32 %r6, %r6, 4;
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r7}}, [%r6];
    {OWN} st.global.b32 [%rd8], %r7; ret;
    """
    made = launch(body, out, shared=128)
    assert out.tolist() == list(range(32)) and not made.problems  # two halves of row n / 4 for lane n
    # Transposed: lane n gets numbers (2 (n % 4), n / 4) and the one below, of a matrix of 16-bit numbers.
    launch(body.replace(".x1.shared", ".x1.trans.shared"), out, shared=128)
    matrix = np.arange(32, dtype=U32).view(np.uint16).reshape(8, 8)
    assert out.view(np.uint16).reshape(32, 2).tolist() == [
        [int(matrix[2 * (n % 4) + k, n // 4]) for k in (0, 1)] for n in range(32)
    ]


def test_memory_and_registers_start_as_rubbish():
    out = numbers()
    launch(f"{OWN} ld.shared.b32 %r5, [%r31]; st.global.b32 [%rd8], %r29; ret;".replace("%r31", "0"), out, shared=64)
    assert np.isnan(out.view(F32)).all()
    launch(f"mov.b32 %r4, 0; {OWN} ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd8], %r5; ret;", out, shared=64)
    assert out.tolist() == [0xCDCDCDCD] * 32


@pytest.mark.parametrize("kind", ("ld.global.b32 %r5, [%rd8+4];", "st.global.b32 [%rd8+4], %r0;",
                                  "atom.global.gpu.relaxed.add.u32 %r5, [%rd8+4], 1;"))  # fmt: skip
def test_an_access_out_of_bounds_is_found(kind):
    with pytest.raises(EmuError, match=r"out of bounds .* of 4 bytes .* array 0 has 128 bytes, this is at 128"):
        launch(OWN + kind + " ret;", numbers())
    # A lane that is held back may point anywhere.
    launch(OWN + "setp.lt.u32 %p0, %r0, 31; @%p0 " + kind + " ret;", numbers())


def test_an_access_out_of_shared_memory_is_found():
    with pytest.raises(EmuError, match="out of bounds store in shared memory, 0 to 124 of 64"):
        launch("shl.b32 %r5, %r1, 2; st.shared.b32 [%r5], %r1; ret;", shared=64)


@pytest.mark.parametrize("kind", ("ld.global.v2.b32 {%r5, %r6}, [%rd8];", "st.global.b64 [%rd8], %rd0;"))
def test_a_misaligned_access_is_found(kind):
    with pytest.raises(EmuError, match="misaligned .* of 8 bytes"):
        launch("mad.wide.u32 %rd8, %r1, 4, %rd0; " + kind + " ret;", numbers(64))
    launch("mad.wide.u32 %rd8, %r1, 8, %rd0; " + kind + " ret;", numbers(64), races=False)


def test_a_misaligned_access_to_shared_memory_is_found():
    with pytest.raises(EmuError, match="misaligned load of 4 bytes in shared memory"):
        launch("shl.b32 %r5, %r1, 1; ld.shared.b32 %r6, [%r5]; ret;", shared=256)


def test_lanes_missing_at_a_shuffle_are_found():
    body = "setp.lt.u32 %p0, %r0, 16; @%p0 bra $there; ret;\n$there:\n shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1; ret;"
    with pytest.raises(EmuError, match="for the lanes 0xffffffff, 0xffff have come"):
        launch(body)


def test_a_barrier_that_a_warp_never_reaches_is_found():
    body = "setp.lt.u32 %p0, %r1, 32; @%p0 bra $end; bar.sync 0;\n$end:\n ret;"
    with pytest.raises(EmuError, match="a barrier after some warps have ended"):
        launch(body, threads=64)


def test_a_barrier_that_half_a_warp_reaches_is_found():
    body = "setp.lt.u32 %p0, %r1, 16; @%p0 exit; bar.sync 0; ret;"
    with pytest.raises(EmuError, match="divergent barrier"):
        launch(body)


def test_two_values_for_one_address_are_found():
    made = launch("st.global.b32 [%rd0], %r0; ret;", numbers())
    assert found(made) == {"two lanes store different values to one address"}
    assert not launch("st.global.b32 [%rd0], 5; ret;", numbers()).problems


def test_atomics_count():
    out, counter = numbers(256), aligned([0], U32)
    body = """
    atom.global.gpu.acq_rel.add.u32 %r5, [%rd1], 1;
    mad.lo.u32 %r6, %r2, 64, %r1; mad.wide.u32 %rd8, %r6, 4, %rd0;
    st.global.b32 [%rd8], %r5; ret;
    """
    made = launch(body, out, counter, threads=64, grid=4)
    assert counter[0] == 256 and sorted(out.tolist()) == list(range(256)) and not made.problems
    less = aligned([2**32 - 3], U32)
    launch("atom.global.relaxed.min.s32 %r5, [%rd0], 1; atom.global.max.u32 %r5, [%rd0], 7; ret;", less)
    assert less[0] == 2**32 - 3


def test_instructions_and_sectors_are_counted():
    a, far = numbers(64), aligned(np.zeros(1024), U32)
    body = """
    mad.wide.u32 %rd8, %r1, 4, %rd0; ld.global.b32 %r5, [%rd8]; ld.global.b32 %r6, [%rd8];
    mad.wide.u32 %rd9, %r0, 128, %rd1; st.global.b32 [%rd9], 1;
    ret;
    """
    counts = launch(body, a, far, threads=64, races=False).counts
    assert counts.instructions == 2 * (5 + 6) and counts.longest == 11  # five read parameters and numbers
    assert (counts.load_sectors, len(counts.loaded), counts.load_repeats) == (16, 8, 8)
    assert (counts.store_sectors, len(counts.stored), counts.store_repeats) == (64, 32, 32)
    assert (counts.load_bytes, counts.store_bytes, counts.asked, counts.distinct) == (512, 256, 80, 40)
    assert counts.beyond_l1 == 72 and counts.mix["st.global.b32"] == 2


def test_the_seed_decides_the_order():
    body = "atom.global.gpu.acq_rel.add.u32 %r5, [%rd1], 1; mad.wide.u32 %rd8, %r2, 4, %rd0; "
    body = "setp.eq.u32 %p0, %r0, 0; @!%p0 exit; " + body + "st.global.b32 [%rd8], %r5; ret;"

    def order(seed, strategy=None):
        out, counter = numbers(8), aligned([0], U32)
        launch(body, out, counter, grid=8, seed=seed, strategy=strategy)
        return tuple(out.tolist())

    assert order(3) == order(3) and len({order(seed) for seed in range(20)}) > 10
    assert order(0, "blocks") == tuple(range(8))


def test_messages_name_the_line():
    with pytest.raises(EmuError) as raised:
        launch(".loc 1 7 3 // made_up.py:7:3\n" + OWN + "ld.global.b32 %r5, [%rd8+400]; ret;", numbers())
    assert re.search(r"program 0, warp 0: line \d+: ld.global.b32 .* \(made_up.py:7:3\)", str(raised.value))
