"""Single instructions of the emulator against known results."""

from fractions import Fraction

import numpy as np
import pytest
from emulator import Approx, EmuError
from emulator.arithmetic import h_fma
from hand_written import launch, per_lane

F32, U16, U32, I32, U64 = np.float32, np.uint16, np.uint32, np.int32, np.uint64


def vector(*values, dtype=F32):
    """These numbers, over and over, in 32 lanes."""
    return np.resize(np.array(values, dtype), 32)


def bits(*values):
    return vector(*values, dtype=U32)


def test_fma_rounds_once_and_mul_add_twice():
    a, c = vector(1 + 2.0**-12), vector(-(1 + 2.0**-11))
    assert (per_lane("fma.rn.f32 %r20, %r10, %r10, %r11;", a, c, dtype=F32) == 2.0**-24).all()
    two = "mul.rn.f32 %r20, %r10, %r10; add.rn.f32 %r20, %r20, %r11;"
    assert (per_lane(two, a, c, dtype=F32) == 0).all()


def nearest(exact: Fraction) -> np.float32:
    """The float32 nearest to a fraction, of two the even one; found by trying, not by rounding."""
    near = F32(float(exact))
    some = [near, np.nextafter(near, F32(np.inf)), np.nextafter(near, F32(-np.inf))]
    return min(some, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(U32)) & 1))


def test_fma_is_the_nearest_float():
    make = np.random.default_rng(0)
    # Products that lie on the middle between two floats, but for an addend far below; and sums below normal ones.
    a = F32(1) + make.integers(0, 4096, 32).astype(F32) * F32(2.0**-12)
    b = F32(1) + make.integers(0, 4096, 32).astype(F32) * F32(2.0**-12)
    far = make.choice([1, -1], 32).astype(F32) * F32(2.0**-70)
    small = (make.standard_normal(32) * 2.0**-70).astype(F32)
    cases = [(a, b, far), (a, b, -a), (small, small, (small * F32(2.0**-70)).astype(F32)), (small, small, 0 * small)]
    cases += [tuple(make.standard_normal((3, 32)).astype(F32)) for _ in range(20)]
    for x, y, z in cases:
        exact = [Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r)) for p, q, r in zip(x, y, z)]
        assert h_fma(x, y, z).tolist() == [nearest(e) for e in exact]


@pytest.mark.parametrize(
    ("instruction", "inputs", "expected"),
    [
        ("add.s32 %r20, %r10, %r11;", [(2**32 - 1, 5), (1, 7)], (0, 12)),
        ("mul.lo.s32 %r20, %r10, %r11;", [(2**31, 65537), (2, 65537)], (0, 65537**2 % 2**32)),
        ("mul.hi.u32 %r20, %r10, %r11;", [(2**31, 3), (6, 4)], (3, 0)),
        ("mul.hi.s32 %r20, %r10, %r11;", [(2**32 - 1,), (5,)], (2**32 - 1,)),
        ("mad.lo.s32 %r20, %r10, %r11, %r10;", [(3,), (2**32 - 2,)], (2**32 - 3,)),
        ("shl.b32 %r20, %r10, %r11;", [(3, 3, 3), (1, 31, 32)], (6, 2**31, 0)),
        ("shr.u32 %r20, %r10, %r11;", [(2**31, 2**31), (31, 32)], (1, 0)),
        ("shr.s32 %r20, %r10, %r11;", [(2**31, 2**31), (31, 99)], (2**32 - 1, 2**32 - 1)),
        ("div.s32 %r20, %r10, %r11;", [(2**32 - 7, 7), (2, 2**32 - 2)], (2**32 - 3, 2**32 - 3)),
        ("rem.s32 %r20, %r10, %r11;", [(2**32 - 7, 7), (2, 2**32 - 2)], (2**32 - 1, 1)),
        ("div.u32 %r20, %r10, %r11;", [(2**32 - 7,), (2,)], (2**31 - 4,)),
        ("bfe.u32 %r20, %r10, 4, 8;", [(0x12345678,)], (0x67,)),
        ("bfe.s32 %r20, %r10, 4, 8;", [(0x12345F78,)], (2**32 - 9,)),
        ("bfi.b32 %r20, %r10, %r11, 8, 4;", [(0xABCD,), (0x11111111,)], (0x11111D11,)),
        ("prmt.b32 %r20, %r10, %r11, 0x5410U;", [(0x11223344,), (0x55667788,)], (0x77883344,)),
        # 9 is the sign of byte 1, all over.
        ("prmt.b32 %r20, %r10, %r11, 0x9;", [(0x0000F000,), (0,)], (0xFF,)),
        ("not.b32 %r20, %r10;", [(0xF0F0F0F0,)], (0x0F0F0F0F,)),
        ("neg.s32 %r20, %r10;", [(5, 0)], (2**32 - 5, 0)),
        ("min.s32 %r20, %r10, %r11;", [(2**32 - 1, 3), (1, 2)], (2**32 - 1, 2)),
        ("max.u32 %r20, %r10, %r11;", [(2**32 - 1,), (1,)], (2**32 - 1,)),
        ("setp.lt.s32 %p0, %r10, %r11; selp.b32 %r20, 7, 9, %p0;", [(2**32 - 1, 1), (0, 0)], (7, 9)),
        ("setp.lt.u32 %p0, %r10, %r11; selp.b32 %r20, 7, 9, %p0;", [(2**32 - 1, 0), (0, 1)], (9, 7)),
    ],
    ids=lambda x: x.split(" ")[0] if isinstance(x, str) else "",
)
def test_integers(instruction, inputs, expected):
    assert per_lane(instruction, *(bits(*x) for x in inputs)).tolist() == bits(*expected).tolist()


def test_wide_products():
    a, b = bits(2**32 - 2), bits(3)
    assert (per_lane("mul.wide.s32 %rd20, %r10, %r11;", a, b, result="b64", dtype=U64) == 2**64 - 6).all()
    assert (per_lane("mul.wide.u32 %rd20, %r10, %r11;", a, b, result="b64", dtype=U64) == (2**32 - 2) * 3).all()
    c = vector(10, dtype=U64)
    assert (per_lane("mad.wide.s32 %rd20, %r10, %r11, %rd12;", a, b, c, result="b64", dtype=U64) == 4).all()


def test_numbers_that_are_none():
    a, b = vector(np.nan, 1.0, -0.0), vector(2.0, np.nan, 0.0)
    assert per_lane("min.f32 %r20, %r10, %r11;", a, b, dtype=F32)[:2].tolist() == [2, 1]
    assert np.isnan(per_lane("max.NaN.f32 %r20, %r10, %r11;", a, b, dtype=F32)[:2]).all()

    def holds(comparison):
        code = f"setp.{comparison}.f32 %p0, %r10, %r11; selp.b32 %r20, 1, 0, %p0;"
        return per_lane(code, a, b)[:3].tolist()

    assert holds("lt") == [0, 0, 0] and holds("ltu") == [1, 1, 0] and holds("eq") == [0, 0, 1]
    assert holds("ne") == [0, 0, 0] and holds("neu") == [1, 1, 0] and holds("nan") == [1, 1, 0]
    assert holds("num") == [0, 0, 1] and holds("geu") == [1, 1, 1]


def test_predicates_are_combined():
    code = "setp.gt.u32 %p0, %r10, 3; setp.lt.and.u32 %p1, %r10, 6, %p0; selp.b32 %r20, 1, 0, %p1;"
    assert per_lane(code, bits(*range(8)))[:8].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_conversions():
    x = vector(1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.5, -3.5, np.nan, 1e30, -1e30, 2.0**-149)
    half = per_lane("cvt.rn.bf16.f32 %rs20, %r10;", x, result="b16", dtype=U16)
    # Halves go to the even one.
    assert half[:4].tolist() == [0x3F80, 0x3F82, 0x4060, 0xC060] and half[4] == 0x7FFF
    back = per_lane("cvt.f32.bf16 %r20, %rs10;", vector(0x3F82, 0xC060, dtype=U16), dtype=F32)
    assert back[:2].tolist() == [1 + 2.0**-6, -3.5]
    assert per_lane("cvt.rzi.s32.f32 %r20, %r10;", x, dtype=I32)[2:7].tolist() == [3, -3, 0, 2**31 - 1, -(2**31)]
    assert per_lane("cvt.rni.s32.f32 %r20, %r10;", x, dtype=I32)[2:4].tolist() == [4, -4]
    assert per_lane("cvt.rn.f16.f32 %rs20, %r10;", x, result="b16", dtype=np.float16)[2:6].tolist()[:2] == [3.5, -3.5]
    pair = per_lane("cvt.rn.bf16x2.f32 %r20, %r10, %r11;", vector(1.0), vector(2.0))
    assert (pair == 0x3F804000).all()
    assert (per_lane("cvt.rn.f32.s32 %r20, %r10;", bits(2**32 - 3), dtype=F32) == -3).all()
    wide = per_lane("cvt.s64.s32 %rd20, %r10;", bits(2**32 - 3), result="b64", dtype=U64)
    assert (wide == 2**64 - 3).all()
    assert (per_lane("cvt.u64.u32 %rd20, %r10;", bits(2**32 - 3), result="b64", dtype=U64) == 2**32 - 3).all()


def test_halves_of_registers():
    code = "mov.b32 {%rs0, %rs1}, %r10; mov.b32 %r20, {%rs1, %rs0};"
    assert (per_lane(code, bits(0x11112222)) == 0x22221111).all()
    wide = per_lane("mov.b64 %rd20, {%r10, %r11};", bits(1), bits(2), result="b64", dtype=U64)
    assert (wide == (2 << 32) + 1).all()


def test_approximate_instructions_are_as_far_off_as_asked(monkeypatch):
    x = (np.random.default_rng(0).random(32) + F32(0.1)).astype(F32)
    codes = ("ex2.approx.f32", "lg2.approx.f32", "rcp.approx.f32", "rsqrt.approx.f32", "tanh.approx.f32")
    for code in codes:
        exact = per_lane(f"{code} %r20, %r10;", x, dtype=F32)
        monkeypatch.setattr(Approx, "ulps", 2)
        off = per_lane(f"{code} %r20, %r10;", x, dtype=F32)
        monkeypatch.setattr(Approx, "ulps", 0)
        places = np.abs(off.view(I32).astype(np.int64) - exact.view(I32))
        assert places.max() == 2 and (places == 0).any()
    assert per_lane("ex2.approx.f32 %r20, %r10;", vector(3.0, -1.0), dtype=F32)[:2].tolist() == [8, 0.5]
    assert per_lane("div.full.f32 %r20, %r10, %r11;", vector(1.0), vector(4.0), dtype=F32)[0] == 0.25


# Which lane holds which numbers, by the tables of the PTX manual: the group of four lanes, and the place inside of it.
GROUP, INSIDE = np.arange(32) // 4, np.arange(32) % 4
SUMS = [(GROUP + 8 * (x // 2), 2 * INSIDE + x % 2) for x in range(4)]  # of c and d


def bfloat16_pair(matrix, rows, columns):
    """Registers of two numbers each, which follow each other by (rows, columns) [2]."""
    low, high = (matrix[r, c].astype(F32).view(U32) >> U32(16) for r, c in zip(rows, columns))
    return low | (high << U32(16))


def test_tensor_core_bfloat16():
    make = np.random.default_rng(0)
    A, B, C = (make.integers(-8, 8, shape).astype(F32) for shape in ((16, 16), (16, 8), (16, 8)))
    a, b, two = [], [], (2 * INSIDE, 2 * INSIDE + 1)
    for x in range(4):
        a.append(bfloat16_pair(A, [GROUP + 8 * (x % 2)] * 2, [column + 8 * (x // 2) for column in two]))
    for x in range(2):
        b.append(bfloat16_pair(B, [row + 8 * x for row in two], [GROUP] * 2))
    c = [C[place] for place in SUMS]
    code = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, "
    code += "{%r14, %r15}, {%r16, %r17, %r18, %r19}; mov.b32 %r20, "
    for number, place in enumerate(SUMS):
        assert per_lane(f"{code} %r{20 + number};", *a, *b, *c, dtype=F32).tolist() == (A @ B + C)[place].tolist()


def test_tensor_core_tf32():
    make = np.random.default_rng(1)
    A, B = make.integers(-8, 8, (16, 8)).astype(F32), make.integers(-8, 8, (8, 8)).astype(F32)
    A[3, 2] = 5
    whole = A @ B
    A[3, 2] += F32(2.0**-12)  # what tf32 has no place for is cut off
    a = [A[GROUP + 8 * (x % 2), INSIDE + 4 * (x // 2)] for x in range(4)]
    b = [B[INSIDE + 4 * x, GROUP] for x in range(2)]
    code = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, "
    code += "{%r14, %r15}, {%r16, %r16, %r16, %r16};"
    assert per_lane(code, *a, *b, vector(0.0), dtype=F32).tolist() == whole[SUMS[0]].tolist()


@pytest.mark.parametrize("code", ("sin.approx.f32 %r20, %r20;", "fma.rn.f16 %rs0, %rs0, %rs0, %rs0;", "trap;"))
def test_what_is_unknown_raises(code):
    with pytest.raises(EmuError, match="unknown instruction"):
        launch(code + " ret;", np.zeros(1, U32))
