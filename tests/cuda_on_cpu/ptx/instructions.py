"""What each PTX instruction does, in C++. An opcode that is not here raises ``UnsupportedInstruction``: a kernel whose
meaning is not known in full is never run.

Two tables. ``EXPRESSIONS`` holds the instructions that compute one value from their operands: a row gives opcode, types
and the C++ expression over ``a``, ``b``, ``c``. ``HANDLERS`` holds the rest: a function, marked with ``@handles``, that
gets the instruction and the ``Operands`` of the kernel and returns C++ statements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tests.cuda_on_cpu.ptx.parser import Instruction, split_operands

CPP_TYPES = {
    "pred": "bool",
    **{f"{kind}{bits}": f"uint{bits}_t" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
}

UNSIGNED = ("u16", "u32", "u64")
SIGNED = ("s16", "s32", "s64")
INTEGER = UNSIGNED + SIGNED
BITS = ("b16", "b32", "b64")
FLOAT = ("f32", "f64")


class UnsupportedInstruction(Exception):
    """The translator has no entry for an opcode, one of its modifiers, types or operands."""


class Operands(Protocol):
    """Access to a kernel's registers and names; ``type_name`` is a PTX type (``"s32"``)."""

    def read(self, operand: str, type_name: str) -> str:
        """C++ expression of the operand's value."""

    def write(self, operand: str, type_name: str, value: str) -> str:
        """C++ statement that gives the destination register the value."""

    def address(self, operand: str) -> str:
        """C++ expression (uint64_t) of ``[base + offset]``."""

    def label(self, operand: str) -> str:
        """C++ label."""


@dataclass(frozen=True)
class Expression:
    code: str
    types: tuple[str, ...]  # of a, b, c
    result: str


Handler = Callable[[Instruction, Operands], str]

EXPRESSIONS: dict[str, Expression] = {}
HANDLERS: dict[str, Handler] = {}


def _add(opcode: str, types: tuple[str, ...], code: str, operands: str, result: str = "T") -> None:
    """One row for each type T: ``opcode.T``. Operands and result are named ``T``, ``W`` (a T twice as wide) or by a PTX
    type."""
    for type_name in types:
        names = {"T": type_name, "W": _twice_as_wide(type_name)}
        EXPRESSIONS[f"{opcode}.{type_name}"] = Expression(
            code, tuple(names.get(kind, kind) for kind in operands.split()), names.get(result, result)
        )


def _twice_as_wide(type_name: str) -> str:
    return f"{type_name[0]}{2 * int(type_name[1:] or 0)}" if type_name != "pred" else "pred"


_add("add", INTEGER + FLOAT, "a + b", "T T")
_add("sub", INTEGER + FLOAT, "a - b", "T T")
_add("add.rn", FLOAT, "a + b", "T T")
_add("sub.rn", FLOAT, "a - b", "T T")
_add("mul", FLOAT, "a * b", "T T")
_add("mul.rn", FLOAT, "a * b", "T T")
_add("fma.rn", FLOAT, "std::fma(a, b, c)", "T T T")
_add("div.rn", FLOAT, "a / b", "T T")
_add("rcp.rn", FLOAT, "1 / a", "T")
_add("sqrt.rn", FLOAT, "std::sqrt(a)", "T")
_add("neg", FLOAT + SIGNED, "-a", "T")
_add("abs", FLOAT, "std::fabs(a)", "T")
_add("abs", SIGNED, "a < 0 ? -a : a", "T")
_add("min", FLOAT, "std::fmin(a, b)", "T T")
_add("max", FLOAT, "std::fmax(a, b)", "T T")
_add("min", INTEGER, "a < b ? a : b", "T T")
_add("max", INTEGER, "a < b ? b : a", "T T")
_add("mul.lo", INTEGER, "a * b", "T T")
_add("mul.hi", INTEGER, "sim::multiply_high(a, b)", "T T")
_add("mad.lo", INTEGER, "a * b + c", "T T T")
_add("mul.wide", ("u16", "u32", "s16", "s32"), "Result(a) * Result(b)", "T T", "W")
_add("mad.wide", ("u16", "u32", "s16", "s32"), "Result(a) * Result(b) + c", "T T W", "W")
_add("div", INTEGER, "sim::divide(a, b)", "T T")
_add("rem", INTEGER, "sim::remainder(a, b)", "T T")
_add("and", BITS, "a & b", "T T")
_add("or", BITS, "a | b", "T T")
_add("xor", BITS, "a ^ b", "T T")
_add("not", BITS, "~a", "T")
_add("and", ("pred",), "a && b", "T T")
_add("or", ("pred",), "a || b", "T T")
_add("xor", ("pred",), "a != b", "T T")
_add("not", ("pred",), "!a", "T")
_add("shl", BITS, "sim::shift_left(a, b)", "T u32")
_add("shr", BITS + INTEGER, "sim::shift_right(a, b)", "T u32")
_add("bfe", ("u32", "u64", "s32", "s64"), "sim::extract_bits(a, b, c)", "T u32 u32")
_add("popc", ("b32", "b64"), "__builtin_popcountll(a)", "T", "u32")
_add("selp", BITS + INTEGER + FLOAT, "c ? a : b", "T T pred")


def handles(mnemonic: str) -> Callable[[Handler], Handler]:
    """Marks a function as the entry of every opcode that begins with ``mnemonic``."""

    def register(function: Handler) -> Handler:
        HANDLERS[mnemonic] = function
        return function

    return register


def to_cpp(instruction: Instruction, operands: Operands) -> str:
    """C++ statements that do what the instruction does, its predicate left out."""
    expression = EXPRESSIONS.get(instruction.opcode)
    if expression:
        return _expression(expression, instruction, operands)
    handler = HANDLERS.get(instruction.parts[0])
    if handler is None:
        raise _unsupported(instruction, "no entry for this opcode")
    return handler(instruction, operands)


def _unsupported(instruction: Instruction, why: str) -> UnsupportedInstruction:
    text = f"{instruction.opcode} {', '.join(instruction.operands)}"
    return UnsupportedInstruction(f"{text} ({instruction.site or 'unknown source line'}): {why}")


def _expression(expression: Expression, instruction: Instruction, operands: Operands) -> str:
    destination, *sources = instruction.operands
    if len(sources) != len(expression.types):
        raise _unsupported(instruction, f"takes {len(expression.types)} operands")
    result = CPP_TYPES[expression.result]
    inputs = " ".join(
        f"const {CPP_TYPES[type_name]} {name} = {operands.read(source, type_name)};"
        for name, type_name, source in zip("abc", expression.types, sources, strict=False)
    )
    value = f"static_cast<{result}>({expression.code})"
    return f"using Result = {result}; {inputs} {operands.write(destination, expression.result, value)}"


def _modifiers(instruction: Instruction, *allowed: str) -> set[str]:
    """The parts between mnemonic and type; one that is not allowed is unsupported."""
    found = set(instruction.parts[1:-1])
    if unknown := found - set(allowed):
        raise _unsupported(instruction, f"unknown modifier .{min(unknown)}")
    return found


def _type(instruction: Instruction, position: int = -1) -> str:
    name = instruction.parts[position]
    if name not in CPP_TYPES:
        raise _unsupported(instruction, f"unknown type .{name}")
    return name


def _vector(operand: str) -> tuple[str, ...]:
    """``{%f1, %f2}`` or ``%f1``."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else (operand,)


# ---- control ----


@handles("ret")
@handles("exit")
def _return(instruction: Instruction, operands: Operands) -> str:
    return "return;"


@handles("trap")
def _trap(instruction: Instruction, operands: Operands) -> str:
    return 'sim::fail("the kernel executed trap");'


@handles("bra")
def _branch(instruction: Instruction, operands: Operands) -> str:
    if instruction.opcode not in ("bra", "bra.uni"):
        raise _unsupported(instruction, "unknown form of bra")
    return f"goto {operands.label(instruction.operands[0])};"


@handles("bar")
def _barrier(instruction: Instruction, operands: Operands) -> str:
    if instruction.opcode == "bar.warp.sync":
        return f"sim::warp_barrier({operands.read(instruction.operands[0], 'u32')}, site);"
    if instruction.opcode != "bar.sync" or instruction.operands != ("0",):
        raise _unsupported(instruction, "only barrier 0 of the whole block is known")
    return "sim::block_barrier(site);"


# ---- memory ----


@handles("ld")
def _load(instruction: Instruction, operands: Operands) -> str:
    modifiers = _modifiers(instruction, "param", "global", "shared", "nc", "v2", "v4")
    type_name = _type(instruction)
    destinations = _vector(instruction.operands[0])
    space = next((space for space in ("param", "global", "shared") if space in modifiers), "global")
    if "nc" in modifiers:
        if space != "global":
            raise _unsupported(instruction, ".nc is for global memory")
        space = "constant"
    function = "sim::load_parameter" if space == "param" else f"sim::load_{space}"
    writes = " ".join(operands.write(register, type_name, f"values[{i}]") for i, register in enumerate(destinations))
    count = len(destinations)
    address = operands.address(instruction.operands[1])
    return f"{CPP_TYPES[type_name]} values[{count}]; {function}({address}, values, {count}); {writes}"


@handles("st")
def _store(instruction: Instruction, operands: Operands) -> str:
    modifiers = _modifiers(instruction, "global", "shared", "v2", "v4")
    type_name = _type(instruction)
    sources = _vector(instruction.operands[1])
    space = "shared" if "shared" in modifiers else "global"
    values = ", ".join(operands.read(register, type_name) for register in sources)
    address = operands.address(instruction.operands[0])
    return (
        f"const {CPP_TYPES[type_name]} values[] = {{{values}}}; sim::store_{space}({address}, values, {len(sources)});"
    )


@handles("cvta")
def _convert_address(instruction: Instruction, operands: Operands) -> str:
    # Global addresses are generic ones; shared memory has a window of its own among the generic addresses.
    offsets = {
        "cvta.global.u64": "",
        "cvta.to.global.u64": "",
        "cvta.shared.u64": " + sim::kSharedWindow",
        "cvta.to.shared.u64": " - sim::kSharedWindow",
    }
    if instruction.opcode not in offsets:
        raise _unsupported(instruction, "unknown address space")
    destination, source = instruction.operands
    return operands.write(destination, "u64", operands.read(source, "u64") + offsets[instruction.opcode])


# ---- moves, conversions, comparisons ----


@handles("mov")
def _move(instruction: Instruction, operands: Operands) -> str:
    _modifiers(instruction)
    type_name = _type(instruction)
    destination, source = instruction.operands
    if destination.startswith("{"):
        parts = _vector(destination)
        bits = 8 * _bytes(type_name) // len(parts)
        writes = " ".join(operands.write(part, f"u{bits}", f"whole >> {i * bits}") for i, part in enumerate(parts))
        return f"const {CPP_TYPES[type_name]} whole = {operands.read(source, type_name)}; {writes}"
    if source.startswith("{"):
        parts = _vector(source)
        bits = 8 * _bytes(type_name) // len(parts)
        cpp_type = CPP_TYPES[type_name]
        whole = " | ".join(
            f"{cpp_type}{{{operands.read(part, f'u{bits}')}}} << {i * bits}" for i, part in enumerate(parts)
        )
        return operands.write(destination, type_name, whole)
    return operands.write(destination, type_name, operands.read(source, type_name))


def _bytes(type_name: str) -> int:
    return int(type_name[1:]) // 8


_TO_INTEGER = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}


@handles("cvt")
def _convert(instruction: Instruction, operands: Operands) -> str:
    target, source_type = _type(instruction, -2), _type(instruction)
    roundings = instruction.parts[1:-2]
    destination, source = instruction.operands
    value = operands.read(source, source_type)
    to_float, from_float = target in FLOAT, source_type in FLOAT
    widens = to_float and from_float and _bytes(target) > _bytes(source_type)
    needs_rounding = to_float != from_float or (from_float and _bytes(target) < _bytes(source_type))
    if (not roundings and not needs_rounding) or (roundings == ["rn"] and to_float and not widens):
        value = f"static_cast<{CPP_TYPES[target]}>({value})"
    elif len(roundings) == 1 and roundings[0] in _TO_INTEGER and from_float and not to_float:
        value = f"sim::saturate<{CPP_TYPES[target]}>({_TO_INTEGER[roundings[0]]}({value}))"
    elif len(roundings) == 1 and roundings[0] in _TO_INTEGER and target == source_type:
        value = f"{_TO_INTEGER[roundings[0]]}({value})"
    else:
        raise _unsupported(instruction, "unknown conversion")
    return operands.write(destination, target, value)


_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_COMBINATIONS = {"and": "&&", "or": "||", "xor": "!="}


@handles("setp")
def _set_predicate(instruction: Instruction, operands: Operands) -> str:
    type_name = _type(instruction)
    comparison, *combination = instruction.parts[1:-1]
    cpp_type = CPP_TYPES[type_name]
    value = _comparison(instruction, comparison, type_name in FLOAT)
    if combination:
        if len(combination) != 1 or combination[0] not in _COMBINATIONS:
            raise _unsupported(instruction, "unknown combination of predicates")
        value = f"({value}) {_COMBINATIONS[combination[0]]} {operands.read(instruction.operands[3], 'pred')}"
    destinations = instruction.operands[0].split("|")
    if len(destinations) > 1 and combination:
        raise _unsupported(instruction, "a second destination with a combination is not known")
    writes = operands.write(destinations[0], "pred", "holds")
    if len(destinations) > 1:
        writes += " " + operands.write(destinations[1], "pred", "!holds")
    a, b = (operands.read(operand, type_name) for operand in instruction.operands[1:3])
    return f"const {cpp_type} a = {a}, b = {b}; const bool holds = {value}; {writes}"


def _comparison(instruction: Instruction, name: str, is_float: bool) -> str:
    """``a`` compared with ``b``. Ordered comparisons of floats are false where one is NaN, those in -u true."""
    if is_float and name in ("num", "nan"):
        return "sim::unordered(a, b)" if name == "nan" else "!sim::unordered(a, b)"
    if is_float and name.endswith("u") and name[:-1] in _COMPARISONS:
        return f"a {_COMPARISONS[name[:-1]]} b || sim::unordered(a, b)"
    if name == "ne" and is_float:
        return "a != b && !sim::unordered(a, b)"
    operator = _COMPARISONS.get(name) or (None if is_float else _UNSIGNED_COMPARISONS.get(name))
    if operator is None:
        raise _unsupported(instruction, f"unknown comparison .{name}")
    return f"a {operator} b"


# ---- warps ----

_SHUFFLES = {"up": "up", "down": "down", "bfly": "butterfly", "idx": "index"}


@handles("shfl")
def _shuffle(instruction: Instruction, operands: Operands) -> str:
    _, sync, mode, type_name = instruction.parts
    if sync != "sync" or mode not in _SHUFFLES or type_name != "b32":
        raise _unsupported(instruction, "only shfl.sync of 32 bits is known")
    destination, *in_range = instruction.operands[0].split("|")
    arguments = ", ".join(operands.read(operand, "u32") for operand in instruction.operands[1:])
    writes = operands.write(destination, "b32", "result.value")
    if in_range:
        writes += " " + operands.write(in_range[0], "pred", "result.in_range")
    return f"const auto result = sim::shuffle(sim::Shuffle::{_SHUFFLES[mode]}, {arguments}, site); {writes}"


@handles("vote")
def _vote(instruction: Instruction, operands: Operands) -> str:
    if instruction.opcode != "vote.sync.ballot.b32":
        raise _unsupported(instruction, "only the ballot is known")
    destination, predicate, mask = instruction.operands
    call = f"sim::ballot({operands.read(predicate, 'pred')}, {operands.read(mask, 'u32')}, site)"
    return operands.write(destination, "b32", call)
