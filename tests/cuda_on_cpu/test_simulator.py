"""The simulated device itself: it computes what PTX says, catches planted bugs, and passes clean kernels."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda_on_cpu.ptx import UnsupportedInstruction, parse, translate
from tests.cuda_on_cpu.simulator import HERE, Module, SimulationError, compile_module

SEEDS = range(5)


@pytest.fixture(scope="session")
def planted(build_folder: Path) -> Module:
    return compile_module((HERE / "planted.cu").read_text(), build_folder)


def pack(*arguments: torch.Tensor | int) -> bytes:
    """Parameter memory: pointers and int32."""
    packed = b""
    for argument in arguments:
        is_int = isinstance(argument, int)
        packed += b"" if is_int else bytes(-len(packed) % 8)
        packed += struct.pack("i", argument) if is_int else struct.pack("P", argument.data_ptr())
    return packed


def run(
    module: Module, kernel: str, values: torch.Tensor, *more: int, grid: int = 1, threads: int = 64, **options
) -> None:
    module.launch(
        kernel, (grid, 1, 1), (threads, 1, 1), pack(values, *more), reads={}, writes={"values": values}, **options
    )


@pytest.mark.parametrize("kernel", ["rotate_values", "rotate_in_warp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_clean_kernels_pass(kernel: str, seed: int, planted: Module):
    values = torch.arange(64.0)
    run(planted, kernel, values, seed=seed)
    parts = 1 if kernel == "rotate_values" else 2
    assert torch.equal(values, torch.arange(64.0).view(parts, -1).roll(-1, 1).flatten())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "more", "message"),
    [
        ("bug_missing_barrier", (), "race: shared variable 0 at byte|is read before it was written"),
        ("bug_missing_second_barrier", (), "race: shared variable 0 at byte"),
        ("bug_missing_warp_barrier", (), "race: shared variable 0 at byte|is read before it was written"),
        ("bug_divergent_barrier", (), "deadlock|barrier after threads of the block have exited"),
        ("bug_one_past_the_end", (), "outside every buffer, 0 bytes past the end of values"),
        ("bug_shared_out_of_bounds", (1,), "outside every variable, 0 bytes past the end of shared variable 0"),
        ("bug_shared_out_of_bounds", (-1,), "outside every variable, 4 bytes before shared variable 0"),
        ("bug_uninitialised_shared", (63,), "shared variable 0 at byte 252 is read before it was written"),
        ("bug_misaligned", (), "misaligned access to global memory"),
    ],
)
def test_planted_bugs_are_caught(kernel: str, more: tuple[int, ...], message: str, seed: int, planted: Module):
    values = torch.zeros(64)
    with pytest.raises(SimulationError, match=message):
        run(planted, kernel, values, *more, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_that_write_one_element_are_caught(seed: int, planted: Module):
    with pytest.raises(SimulationError, match="race: values at byte .* of block . and written by thread .* of block ."):
        run(planted, "bug_blocks_collide", torch.zeros(64), grid=2, seed=seed)


def test_the_race_check_can_be_left_out(planted: Module):
    values = torch.zeros(64)
    run(planted, "bug_blocks_collide", values, grid=2, check_races=False)
    assert values[0] in (0, 1)


def test_the_seed_draws_the_order(planted: Module):
    """Without the race check the last block to run wins: it is not always the same one, and the same for one seed."""
    winners = []
    for seed in range(20):
        values = torch.zeros(64)
        run(planted, "bug_blocks_collide", values, grid=4, check_races=False, seed=seed)
        again = torch.zeros(64)
        run(planted, "bug_blocks_collide", again, grid=4, check_races=False, seed=seed)
        assert torch.equal(values, again)
        winners.append(values[0].item())
    assert len(set(winners)) > 1


def test_an_input_must_not_be_written(planted: Module):
    values = torch.zeros(64)
    with pytest.raises(SimulationError, match="values is written though it is an input"):
        planted.launch("rotate_values", (1, 1, 1), (64, 1, 1), pack(values), reads={"values": values}, writes={})


@pytest.mark.parametrize(
    "grid, block", [((1, 1, 1), (1025, 1, 1)), ((1, 70000, 1), (32, 1, 1)), ((1, 1, 1), (1, 1, 65))]
)
def test_launches_beyond_the_limits_are_refused(grid, block, planted: Module):
    values = torch.zeros(64)
    with pytest.raises(SimulationError, match="too large"):
        planted.launch("rotate_values", grid, block, pack(values), reads={}, writes={"values": values})


@pytest.mark.parametrize("seed", SEEDS)
def test_dynamic_shared_memory_and_shuffles(seed: int, planted: Module):
    values, total = torch.arange(256.0), torch.zeros(2)
    planted.launch(
        "sum", (2, 1, 1), (128, 1, 1), pack(values, total), dynamic_shared=16, seed=seed,
        reads={"values": values}, writes={"total": total},
    )  # fmt: skip
    assert torch.equal(total, values.view(2, 128).sum(1))


def test_too_much_shared_memory_is_refused(planted: Module):
    values, total = torch.arange(256.0), torch.zeros(2)
    with pytest.raises(SimulationError, match="more shared memory than a block can have"):
        planted.launch(
            "sum", (2, 1, 1), (128, 1, 1), pack(values, total), dynamic_shared=(48 << 10) + 4,
            reads={"values": values}, writes={"total": total},
        )  # fmt: skip


def test_too_little_dynamic_shared_memory_is_caught(planted: Module):
    values, total = torch.arange(256.0), torch.zeros(2)
    with pytest.raises(SimulationError, match="outside every variable, 0 bytes past the end of dynamic shared memory"):
        planted.launch(
            "sum", (2, 1, 1), (128, 1, 1), pack(values, total), dynamic_shared=12,
            reads={"values": values}, writes={"total": total},
        )  # fmt: skip


def test_shuffle_modes(planted: Module):
    out = torch.zeros(160, dtype=torch.int32)
    planted.launch("shuffles", (1, 1, 1), (32, 1, 1), pack(out), reads={}, writes={"out": out})
    lanes = range(32)
    expected = [lane - 3 if lane >= 3 else lane for lane in lanes]
    expected += [lane + 5 if lane % 16 + 5 < 16 else lane for lane in lanes]
    expected += [lane // 8 * 8 + (lane + 9) % 8 for lane in lanes]
    expected += [lane ^ 6 for lane in lanes]
    expected += [sum(1 << lane for lane in lanes if lane % 3 == 0)] * 32
    assert out.tolist() == expected


def signed(value: int, bits: int) -> int:
    """``value`` modulo 2^bits, as a signed number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def quotient(x: int, y: int) -> int:
    """Rounded towards zero, as C does."""
    magnitude = abs(x) // abs(y)
    return magnitude if (x < 0) == (y < 0) else -magnitude


def test_integer_instructions(planted: Module):
    """Against Python's integers of any length."""
    numbers = [1, -1, 7, -7, 255, -128, 2**31, -(2**31), 2**32 + 5, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
    pairs = [(x, y) for x in [0, *numbers] for y in numbers if (x, y) != (-(2**63), -1)]
    pairs = [(x, y) for x, y in pairs if not (signed(x, 32) == -(2**31) and signed(y, 32) | 1 == -1)]
    a, b = (torch.tensor(column, dtype=torch.int64) for column in zip(*pairs, strict=True))
    out = torch.zeros(len(pairs), 12, dtype=torch.int64)
    planted.launch(
        "integers", (1, 1, 1), (len(pairs), 1, 1), pack(a, b, out), reads={"a": a, "b": b}, writes={"out": out}
    )
    for (x, y), row in zip(pairs, out.tolist(), strict=True):
        x32, y32, ux, uy = signed(x, 32), signed(y, 32), x % 2**64, y % 2**64
        expected = [
            quotient(x, y), x - y * quotient(x, y), x * y >> 64, x32 >> (y & 31), (x % 2**32) >> (y & 31), min(x, y),
            ux < uy, x32 * y32, ux.bit_count(), signed(x, 8), quotient(x32, y32 | 1), signed(ux * uy >> 64, 64),
        ]  # fmt: skip
        assert row == expected, (x, y)


def test_float_instructions(planted: Module):
    """Against numpy, NaN and infinities included; conversions to integers saturate and take NaN as 0."""
    special = [0.0, -0.0, 1.5, -2.5, 3.1415927, 1e-40, 3e9, -3e9, np.inf, -np.inf, np.nan]
    pairs = [(x, y) for x in special for y in special]
    a, b = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    out = torch.zeros(len(pairs), 11)
    planted.launch(
        "floats", (1, 1, 1), (len(pairs), 1, 1), pack(a, b, out), reads={"a": a, "b": b}, writes={"out": out}
    )
    x, y = a.numpy(), b.numpy()
    with np.errstate(all="ignore"):
        exact = x.astype(np.longdouble) * y.astype(np.longdouble)
        integer = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0, posinf=2**31 - 1, neginf=-(2**31))
        unsigned = np.nan_to_num(np.rint(x.astype(np.float64)), nan=0, posinf=2**32 - 1, neginf=0)
        expected = [
            (exact + (-x * y)).astype(np.float32), np.fmin(x, y), np.fmax(x, y), x < y, ~(x < y), x != y,
            integer.clip(-(2**31), 2**31 - 1), unsigned.clip(0, 2**32 - 1), x / y, np.sqrt(x),
            (x.astype(np.float64) * y).astype(np.float32),
        ]  # fmt: skip
    for column, want in enumerate(expected):
        np.testing.assert_array_equal(out[:, column].numpy(), want.astype(np.float32), err_msg=f"column {column}")


def test_block_and_thread_indices(planted: Module):
    grid, block = (3, 2, 2), (4, 3, 5)
    out = torch.zeros(12 * 60, dtype=torch.int32)
    planted.launch("reads_grid", grid, block, pack(out), reads={}, writes={"out": out})
    assert out.tolist() == [number * 1000 + thread for number in range(12) for thread in range(60)]


KERNEL = ".version 9.0\n.target sm_80\n.visible .entry k()\n{{\n.reg .b32 %r<3>;\n.reg .f32 %f<2>;\n{}\nret;\n}}\n"


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("brand.new %r1, %r2;", "brand.new .*no entry for this opcode"),
        ("add.sat.s32 %r1, %r2, %r2;", "add.sat.s32 .*no entry for this opcode"),
        ("add.ftz.f32 %f1, %f1, %f1;", "add.ftz.f32"),
        ("ld.global.volatile.u32 %r1, [%r2];", "unknown modifier .volatile"),
        ("bar.sync 1;", "only barrier 0"),
        ("cvt.rz.f32.s32 %f1, %r1;", "unknown conversion"),
        ("setp.weird.s32 %r1, %r2, %r2;", "unknown comparison .weird"),
    ],
)
def test_unknown_instructions_are_refused(instruction: str, message: str):
    with pytest.raises(UnsupportedInstruction, match=message):
        translate(parse(KERNEL.format(instruction)))
