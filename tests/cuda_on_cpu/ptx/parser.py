"""The structure of a PTX module: kernels, their parameters, declarations, labels and instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
_FUNCTION = re.compile(r"\.func\b[^;{]*\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([a-z]+\d+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.([a-z]+\d+)\s+([\w$]+)(?:\[(\d*)\])?$")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)$", re.DOTALL)
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n]*")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.MULTILINE)
_LABEL = re.compile(r"([\w$]+):")
_INSTRUCTION = re.compile(r"(?:@(!?)(%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_PERFORMANCE_HINTS = (".pragma", ".branchtargets")


class MalformedPtx(Exception):
    """The text is not PTX that this parser knows."""


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int  # bytes
    size: int  # bytes


@dataclass(frozen=True)
class SharedVariable:
    name: str
    align: int  # bytes
    size: int | None  # bytes; None: dynamic shared memory


@dataclass(frozen=True)
class Registers:
    """``.reg``: ``names`` of one type, ``%f<8>`` written out as ``%f0`` ... ``%f7``."""

    type: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Scope:
    """``{`` or ``}`` inside a kernel."""

    brace: str


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with all its modifiers, "ld.global.v4.f32"
    operands: tuple[str, ...]
    predicate: str | None = None
    negated: bool = False
    site: str = ""  # "conv2d.cu:120"

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


Statement = Registers | SharedVariable | Label | Scope | Instruction


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    body: list[Statement]

    @property
    def parameter_bytes(self) -> int:
        last = self.parameters[-1] if self.parameters else Parameter("", 0, 0)
        return last.offset + last.size


@dataclass
class Module:
    kernels: list[Kernel] = field(default_factory=list)
    shared: list[SharedVariable] = field(default_factory=list)  # of the whole module


def type_bytes(type_name: str) -> int:
    """Size of a fundamental type: 4 for ``f32``."""
    return int(re.sub(r"\D", "", type_name)) // 8


def split_operands(text: str) -> tuple[str, ...]:
    """Operands between commas; those in braces and brackets stay together."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        operands.append(current.strip())
    return tuple(operands)


def parse(text: str) -> Module:
    """Reads a module. Anything but kernels, registers, shared memory and instructions raises ``MalformedPtx``."""
    files = {number: path.rsplit("/", 1)[-1] for number, path in _FILE.findall(text)}
    text = _COMMENT.sub("", text)
    if _FUNCTION.search(text):
        raise MalformedPtx("a device function was not inlined; calls are not supported")
    module = Module()
    outside = 0
    for entry in _ENTRY.finditer(text):
        end = _matching_brace(text, entry.end())
        body = list(_statements(text[entry.end() : end], files))
        module.kernels.append(Kernel(entry.group(1), _parameters(entry.group(2)), body))
        module.shared += _module_variables(text[outside : entry.start()])
        outside = end + 1
    if not module.kernels:
        raise MalformedPtx("no .entry found")
    return module


def _matching_brace(text: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise MalformedPtx("a kernel has no end")


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in split_operands(text):
        match = _PARAMETER.fullmatch(declaration)
        if not match:
            raise MalformedPtx(f"parameter not understood: {declaration}")
        align, type_name, name, count = match.groups()
        element = type_bytes(type_name)
        offset = _round_up(offset, int(align or element))
        parameters.append(Parameter(name, offset, element * int(count or 1)))
        offset += parameters[-1].size
    return parameters


def _round_up(offset: int, align: int) -> int:
    return (offset + align - 1) // align * align


def _module_variables(text: str) -> Iterator[SharedVariable]:
    for declaration in re.findall(r"(?:\.extern\s+)?\.(?:shared|global|const)\b[^;]*;", text):
        yield _shared_variable(declaration.rstrip(";").strip())


def _shared_variable(declaration: str) -> SharedVariable:
    match = _SHARED.match(declaration)
    if not match:
        raise MalformedPtx(f"variable not supported: {declaration}")
    extern, align, type_name, name, count = match.groups()
    element = type_bytes(type_name)
    return SharedVariable(name, int(align or element), None if extern else element * int(count or 1))


def _registers(declaration: str) -> Registers:
    type_name, names = _REGISTERS.match(declaration).groups()
    written_out: list[str] = []
    for name in split_operands(names):
        many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
        written_out += [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
    return Registers(type_name, tuple(written_out))


def _statements(body: str, files: dict[str, str]) -> Iterator[Statement]:
    position, site = 0, ""
    while position < len(body):
        if body[position].isspace():
            position += 1
        elif body[position] in "{}":
            yield Scope(body[position])
            position += 1
        elif location := _LOCATION.match(body, position):
            site = f"{files.get(location[1], '?')}:{location[2]}"
            position = location.end()
        elif label := _LABEL.match(body, position):
            yield Label(label[1])
            position = label.end()
        else:
            end = body.index(";", position)
            text = " ".join(body[position:end].split())
            position = end + 1
            if text.startswith(".reg"):
                yield _registers(text)
            elif not text.startswith(_PERFORMANCE_HINTS):
                yield _shared_variable(text) if text.startswith(".") else _instruction(text, site)


def _instruction(text: str, site: str) -> Instruction:
    match = _INSTRUCTION.match(text)
    if not match:
        raise MalformedPtx(f"statement not understood: {text}")
    negation, predicate, opcode, operands = match.groups()
    return Instruction(opcode, split_operands(operands), predicate, negation == "!", site)
