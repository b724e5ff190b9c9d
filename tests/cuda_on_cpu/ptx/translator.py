"""A parsed PTX module as a C++ file: one function per kernel, one variable per register, ``goto`` for branches."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.cuda_on_cpu.ptx.instructions import CPP_TYPES, to_cpp
from tests.cuda_on_cpu.ptx.parser import (
    Instruction,
    Kernel,
    Label,
    MalformedPtx,
    Module,
    Registers,
    Scope,
    SharedVariable,
    Statement,
    type_bytes,
)

_SPECIAL_REGISTERS = {
    **{f"%tid.{axis}": f"sim::thread_index().{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"sim::block_size().{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"sim::block_index().{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"sim::grid_size().{axis}" for axis in "xyz"},
    "%laneid": "sim::lane()",
    "WARP_SZ": "sim::kWarpSize",
}
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_SHARED_GAP = 256  # bytes; sim::kSharedGap
_HEX_FLOAT = {"f": ("f32", "u32"), "d": ("f64", "u64")}


def translate(module: Module) -> str:
    """C++ that defines ``sim::kernels``. Raises ``UnsupportedInstruction`` for what the tables do not know."""
    functions, descriptions = [], []
    for number, kernel in enumerate(module.kernels):
        translation = _KernelTranslation(kernel, module.shared)
        lines = "\n".join(translation.lines())
        functions.append(f"// {kernel.name}\nstatic void kernel_{number}() {{\n{lines}\n}}\n")
        parameters = [(parameter.offset, parameter.size) for parameter in kernel.parameters]
        functions.append(
            _extents(f"parameters_{number}", parameters) + _extents(f"shared_{number}", translation.shared)
        )
        descriptions.append(
            f'    {{"{kernel.name}", kernel_{number}, parameters_{number}, {len(parameters)}, '
            f"{kernel.parameter_bytes}, shared_{number}, {len(translation.shared)}}},\n"
        )
    table = "".join(descriptions)
    return (
        '#include "ptx.h"\n\n' + "\n".join(functions) + f"\nnamespace sim {{\nconst Kernel kernels[] = {{\n{table}}};\n"
        f"const size_t kernel_count = {len(descriptions)};\n}}  // namespace sim\n"
    )


def _extents(name: str, extents: list[tuple[int, int]]) -> str:
    """An array of (offset, bytes); C++ has none of length 0."""
    values = ", ".join(f"{{{offset}, {size}}}" for offset, size in extents or [(0, 0)])
    return f"static const sim::Extent {name}[] = {{{values}}};\n"


class _KernelTranslation:
    """The names of one kernel; ``instructions.Operands`` for its instructions."""

    def __init__(self, kernel: Kernel, module_shared: list[SharedVariable]) -> None:
        self._kernel = kernel
        self._scopes: list[dict[str, tuple[str, str]]] = [{}]  # PTX register -> C++ variable, its C++ type
        self._variables = 0
        self._addresses = {p.name: f"uint64_t{{{p.offset}}}" for p in kernel.parameters}
        self.shared: list[tuple[int, int]] = []  # offset and bytes of each variable
        used = " ".join(operand for s in kernel.body if isinstance(s, Instruction) for operand in s.operands)
        for variable in (*module_shared, *(s for s in kernel.body if isinstance(s, SharedVariable))):
            if variable.name in used:
                self._place(variable)

    def lines(self) -> list[str]:
        return [line for statement in self._kernel.body for line in self._statement(statement)] + ["  return;"]

    # ---- instructions.Operands ----

    def read(self, operand: str, type_name: str) -> str:
        cpp_type = CPP_TYPES[type_name]
        if operand.startswith("!"):
            return f"!{self.read(operand[1:], type_name)}"
        if value := _SPECIAL_REGISTERS.get(operand) or self._addresses.get(operand):
            return f"static_cast<{cpp_type}>({value})"
        if operand.startswith("%"):
            return f"sim::read<{cpp_type}>({self._register(operand)[0]})"
        return self._constant(operand, type_name)

    def write(self, operand: str, type_name: str, value: str) -> str:
        value = f"static_cast<{CPP_TYPES[type_name]}>({value})"
        if operand == "_":
            return f"static_cast<void>({value});"
        name, register_type = self._register(operand)
        return f"{name} = sim::write<{register_type}>({value});"

    def address(self, operand: str) -> str:
        match = _ADDRESS.fullmatch(operand)
        if not match:
            raise MalformedPtx(f"address not understood: {operand}")
        base, offset = match.groups()
        type_name = "u64" if base in self._addresses or self._register(base)[1] == "uint64_t" else "u32"
        return f"uint64_t{{{self.read(base, type_name)}}} + ({int(offset or '0', 0)}ll)"

    def label(self, operand: str) -> str:
        return "label_" + re.sub(r"\W", "_", operand)

    # ---- statements ----

    def _statement(self, statement: Statement) -> Iterator[str]:
        match statement:
            case Registers():
                yield f"  {self._declare(statement)}"
            case Scope(brace):
                self._scopes = [*self._scopes, {}] if brace == "{" else self._scopes[:-1]
                yield f"  {brace}"
            case Label(name):
                yield f"{self.label(name)}:;"
            case Instruction():
                yield f"  {self._instruction(statement)}"

    def _instruction(self, instruction: Instruction) -> str:
        code = to_cpp(instruction, self)
        if re.search(r"\bsite\b", code):
            code = f'static const char site[] = "{instruction.opcode} at {instruction.site or "unknown line"}"; {code}'
        condition = ""
        if instruction.predicate:
            condition = f"if ({'!' * instruction.negated}{self._register(instruction.predicate)[0]}) "
        return f"{condition}{{ {code} }}"

    def _declare(self, registers: Registers) -> str:
        cpp_type = "bool" if registers.type == "pred" else f"uint{8 * type_bytes(registers.type)}_t"
        declared = []
        for name in registers.names:
            variable = f"r{self._variables}"
            self._variables += 1
            self._scopes[-1][name] = (variable, cpp_type)
            declared.append(f"{variable} = 0")
        return f"{cpp_type} {', '.join(declared)};"

    def _register(self, name: str) -> tuple[str, str]:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        raise MalformedPtx(f"{self._kernel.name}: unknown register or variable {name}")

    def _place(self, variable: SharedVariable) -> None:
        if variable.size is None:
            self._addresses[variable.name] = "sim::dynamic_shared_address()"
            return
        end = sum(self.shared[-1]) + _SHARED_GAP if self.shared else 0
        offset = (end + variable.align - 1) // variable.align * variable.align
        self._addresses[variable.name] = f"(sim::kSharedBase + {offset})"
        self.shared.append((offset, variable.size))

    def _constant(self, text: str, type_name: str) -> str:
        if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
            float_type, bits_type = _HEX_FLOAT[match[1].lower()]
            if type_name[1:] != float_type[1:]:
                raise MalformedPtx(f"constant {text} used as {type_name}")
            return f"sim::read<{CPP_TYPES[type_name]}>({CPP_TYPES[bits_type]}{{0x{match[2]}}})"
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            raise MalformedPtx(f"{self._kernel.name}: operand not understood: {text}")
        value = int(text.rstrip("U"), 0) & 0xFFFF_FFFF_FFFF_FFFF
        return f"static_cast<{CPP_TYPES[type_name]}>({value:#x}ull)"
