"""Reads PTX: the text of one kernel becomes a list of instructions with their operands.

Only what Triton emits is read: one entry function, its parameters, module-level data, and instructions in scopes.
"""

import re
from dataclasses import dataclass, field

from gpu_without_gpu.errors import Unsupported

TYPES = frozenset(
    "pred b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 u16x2 s16x2 f16 f16x2 bf16 bf16x2 f32 f64 tf32 "
    "e4m3 e5m2 e4m3x2 e5m2x2".split()
)


@dataclass(frozen=True)
class Register:
    """One register of every thread. `bits` is 1 for a predicate."""

    name: str
    index: int
    bits: int


@dataclass(frozen=True)
class Immediate:
    """A constant, as the bits of a two's complement integer or of a float."""

    value: int


@dataclass(frozen=True)
class Special:
    """A name without a declared register: %tid.x and the like, a label, shared memory, module-level data, `_`."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: "Register | Immediate | Special"
    offset: int


@dataclass(frozen=True)
class Group:
    """{a, b, ...}, or a|b."""

    items: "tuple[Operand, ...]"


@dataclass(frozen=True)
class Negated:
    """!p."""

    register: Register


Operand = Register | Immediate | Special | Address | Group | Negated


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode.flag.flag.type operands`."""

    opcode: str
    flags: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    guard_negated: bool
    text: str
    source: str

    def only(self, known: str) -> frozenset[str]:
        """The flags, all of which must be among `known`: what is not understood is not executed."""
        if unknown := set(self.flags) - set(known.split()):
            raise self.unsupported(f"modifier {', '.join('.' + flag for flag in sorted(unknown))}")
        return frozenset(self.flags)

    def unsupported(self, what: str = "") -> Unsupported:
        return Unsupported(f"not executed without a GPU: {what + ' of ' if what else ''}`{self.text}`")


@dataclass
class Kernel:
    """A parsed entry function."""

    name: str
    num_threads: int
    parameters: dict[str, str] = field(default_factory=dict)  # name -> type, in order
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of an instruction
    registers: list[Register] = field(default_factory=list)
    data: dict[str, bytes] = field(default_factory=dict)  # module-level .global name -> contents


_NUMBER = re.compile(r"(-?(?:0x[0-9a-fA-F]+|\d+))U?|0[fFdD]([0-9a-fA-F]+)")
_BLANK = re.compile(r"\s*")
_LABEL = re.compile(r"([$\w]+):")
_STATEMENT = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_SOURCE = re.compile(r"^\s*\.loc\b[^\n]*?//\s*(\S+:\d+)[^\n]*$", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_DATA = re.compile(
    r"^\s*\.(?:global|const)\s+\.align\s+\d+\s+\.b(8|16|32|64)\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\};", re.M
)


def parse(text: str) -> Kernel:
    """The one kernel in `text`. Raises Unsupported where it has a shape that Triton's kernels do not have."""
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1 or re.search(r"^\s*(\.visible\s+)?\.func\b[^;]*\{", text, re.MULTILINE):
        raise Unsupported("not executed without a GPU: PTX that is not one entry function")
    name, parameters, attributes = entries[0].groups()
    threads = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*1)*\s*(?:\.|$)", attributes)
    if threads is None or "cluster" in attributes:
        raise Unsupported(f"not executed without a GPU: a kernel with the attributes `{' '.join(attributes.split())}`")
    kernel = Kernel(name, int(threads.group(1)))
    for declaration in filter(None, parameters.split(",")):
        words = declaration.split()
        kernel.parameters[words[-1]] = words[1].removeprefix(".")
    for bits, symbol, values in _DATA.findall(text):
        width = int(bits) // 8
        kernel.data[symbol] = b"".join(
            (int(v, 0) % (1 << 8 * width)).to_bytes(width, "little") for v in values.split(",")
        )
    _Body(kernel).read(text[entries[0].end() :])
    return kernel


class _Body:
    """Reads the statements between the outer braces, keeping track of the scopes in which registers are declared."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, Register]] = [{}]
        self.source = ""

    def read(self, text: str) -> None:
        text = _SOURCE.sub(r".source \1;", text)
        text = re.sub(r"//[^\n]*|^\s*\.loc\b[^\n]*", "", text, flags=re.MULTILINE)
        position = 0
        while self.scopes:
            position = _BLANK.match(text, position).end()  # type: ignore[union-attr]
            if text[position] == "{":
                self.scopes.append({})
                position += 1
            elif text[position] == "}":
                self.scopes.pop()
                position += 1
            elif label := _LABEL.match(text, position):
                self.kernel.labels[label.group(1)] = len(self.kernel.instructions)
                position = label.end()
            else:
                end = text.index(";", position)
                self.statement(" ".join(text[position:end].split()))
                position = end + 1

    def statement(self, text: str) -> None:
        if text.startswith(".source "):
            self.source = text.removeprefix(".source ")
        elif text.startswith(".reg "):
            self.declare(text)
        elif text.startswith("."):
            if not text.startswith((".pragma", ".param")):
                raise Unsupported(f"not executed without a GPU: `{text}`")
        elif text:
            self.instruction(text)

    def declare(self, text: str) -> None:
        kind, names = text.removeprefix(".reg ").split(maxsplit=1)
        bits = 1 if kind == ".pred" else int(re.sub(r"\D", "", kind))
        for name in names.split(","):
            if many := re.fullmatch(r"([%\w$]+)<(\d+)>", name.strip()):
                fresh = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))]
            else:
                fresh = [name.strip()]
            for each in fresh:
                register = Register(each, len(self.kernel.registers), bits)
                self.kernel.registers.append(register)
                self.scopes[-1][each] = register

    def instruction(self, text: str) -> None:
        match = _STATEMENT.fullmatch(text)
        if match is None:
            raise Unsupported(f"not executed without a GPU: `{text}`")
        negated, guard, dotted, rest = match.groups()
        opcode, *modifiers = dotted.split(".")
        first_type = len(modifiers)
        while first_type and modifiers[first_type - 1] in TYPES:
            first_type -= 1
        self.kernel.instructions.append(
            Instruction(
                opcode,
                tuple(modifiers[:first_type]),
                tuple(modifiers[first_type:]),
                tuple(self.operand(part) for part in _split(rest)),
                self.register(guard) if guard else None,
                bool(negated),
                text,
                self.source,
            )
        )

    def register(self, name: str) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise Unsupported(f"not executed without a GPU: undeclared register {name}")

    def operand(self, text: str) -> Operand:
        text = text.strip()
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            inner = self.operand(base)
            if not isinstance(inner, (Register, Immediate, Special)):
                raise Unsupported(f"not executed without a GPU: address {text}")
            return Address(inner, int(offset, 0) if offset else 0)
        if text[0] in "{(":
            return Group(tuple(self.operand(part) for part in _split(text[1:-1])))
        if "|" in text:
            return Group(tuple(self.operand(part) for part in text.split("|")))
        if text.startswith("!"):
            return Negated(self.register(text[1:]))
        if number := _NUMBER.fullmatch(text):
            return Immediate(int(number.group(2), 16) if number.group(2) else int(number.group(1), 0))
        return Special(text)


def _split(text: str) -> list[str]:
    """At the commas outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in [*parts, text[start:]] if part.strip()]
