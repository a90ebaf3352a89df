"""Parses the PTX that nvcc writes: entries with their parameters, registers, statements and source locations.

Only what nvcc emits for the kernels of csrc/cuda is accepted; everything else raises `Unknown` with file and line.
"""

import re
import subprocess
from dataclasses import dataclass, field

# PTX type -> C++ type.
CTYPE = {
    "pred": "bool", "b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t", "b16": "uint16_t", "u16": "uint16_t",
    "s16": "int16_t", "f16": "uint16_t", "bf16": "uint16_t", "b32": "uint32_t", "u32": "uint32_t", "s32": "int32_t",
    "f16x2": "uint32_t", "bf16x2": "uint32_t", "f32": "float", "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t",
    "f64": "double",
}  # fmt: skip
SIZE = {"bool": 1, "uint8_t": 1, "int8_t": 1, "uint16_t": 2, "int16_t": 2, "uint32_t": 4, "int32_t": 4, "float": 4,
        "uint64_t": 8, "int64_t": 8, "double": 8}  # fmt: skip


class Unknown(Exception):
    """Something in the PTX that the translator does not know."""


class Statement:
    """One instruction: `@!%p1 ld.global.f32 %f1, [%rd1+4];` has a predicate, a name, dotted parts and operands."""

    def __init__(self, line, text, source):
        self.line, self.source = line, source
        self.predicate = None
        if match := re.match(r"@(!?)(%?\w+)\s+(.*)", text, re.S):
            self.predicate, text = (match[1], match[2]), match[3]
        self.text = text.strip()
        self.name = re.match(r"[^\s{\[]+", self.text)[0]
        self.parts = self.name.split(".")
        self.op = self.parts[0]
        self.operands = split_operands(self.text[len(self.name) :])


def split_operands(text):
    """Splits at the commas that are outside of brackets and braces."""
    return [piece.strip() for piece in re.split(r",(?![^{\[]*[}\]])", text) if piece.strip()]


class Locations:
    """The `.file` and `.loc` directives: the source of an instruction, through all inlined calls."""

    def __init__(self, lines):
        self.files, self.seen, self.names = {}, {}, {}
        for line in lines:
            if match := re.match(r'\s*\.file\s+(\d+)\s+"(.*)"', line):
                self.files[match[1]] = match[2].rsplit("/", 1)[-1]
        label, data = None, []
        for line in lines:
            if match := re.match(r"(\$L__info_string\w*):", line):
                label, data = match[1], []
            elif label and line.startswith(".b8 "):
                data += [int(x) for x in line[4:].split(",")]
                if 0 in data:
                    self.names[label] = bytes(data[: data.index(0)]).decode()
                    label = None
        self.names = dict(zip(self.names, base_names(list(self.names.values())), strict=True))

    def at(self, line):
        """The chain of (file, line, function) of a `.loc` directive, innermost function first."""
        match = re.match(
            r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:,\s*function_name\s+(\$\w+)(?:\+\d+)?,"
            r"\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?",
            line,
        )
        own = (match[1], match[2], match[3])
        function = self.names.get(match[4], "?") if match[4] else ""
        outer = ()
        if match[5]:
            key = (match[5], match[6], match[7])
            outer = self.seen.get(key, ((self.files.get(key[0], "?"), int(key[1]), "?"),))
        chain = ((self.files.get(own[0], "?"), int(own[1]), function), *outer)
        if int(own[1]) != 0:
            self.seen[own] = chain
        return chain


def base_name(text):
    """The name of a demangled function without namespaces, arguments and templates; `{}` marks a lambda in it."""
    flat, depth = "", 0
    for c in text.replace("operator()", "operator"):
        depth += c in "<("
        flat += c if depth == 0 else ""
        depth -= c in ">)"
    if "::{lambda" in flat:
        return flat.split("::{lambda")[0].split("::")[-1] + "{}"
    return flat.removesuffix(" const").split(" ")[-1].split("::")[-1]


def base_names(mangled):
    if not mangled:
        return []
    result = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [base_name(text) for text in result.stdout.rstrip("\n").split("\n")]


def normalized(name):
    """nvcc gives unnamed namespaces a name of their own for each file; g++ calls them all the same."""
    while match := re.search(r"(\d+)_GLOBAL__N__", name):
        name = name[: match.start(1)] + "12_GLOBAL__N_1" + name[match.end(1) + int(match[1]) :]
    return name


@dataclass
class Entry:
    """A kernel. `items` holds statements and the tuples ("label", name), ("{",), ("}",), ("reg", type, [names])."""

    mangled: str
    params: list = field(default_factory=list)  # (bytes, alignment)
    offsets: dict = field(default_factory=dict)  # parameter -> offset in the parameter block
    items: list = field(default_factory=list)
    locals: list = field(default_factory=list)  # (name, bytes, alignment)

    @property
    def name(self):
        return normalized(self.mangled)


class Parser:
    def __init__(self, text, file):
        self.lines, self.file, self.at = text.split("\n"), file, 0
        self.locations = Locations(self.lines)
        self.entries = []
        self.shared = {}  # name -> (bytes, alignment); None for dynamic shared memory

    def fail(self, line):
        raise Unknown(f"{self.file}:{line}: {self.lines[line - 1].strip()[:80]}")

    def parse(self):
        while self.at < len(self.lines):
            line = self.lines[self.at].strip()
            if match := re.match(r"\.extern \.shared .*?([$\w]+)\[\];", line):
                self.shared[match[1]] = None
            elif match := re.match(r"\.shared \.align (\d+) \.b8 ([$\w]+)\[(\d+)\];", line):
                self.shared[match[2]] = (int(match[3]), int(match[1]))
            elif match := re.match(r"(?:\.visible |\.weak )?\.entry (\w+)\(", line):
                self.parse_entry(Entry(match[1]))
                continue
            elif re.match(r"(\.visible |\.weak |\.extern )?\.(func|global|const)\b", line):
                self.fail(self.at + 1)
            elif line.startswith(".section"):
                break
            self.at += 1
        return self.entries, self.shared

    def parse_params(self, entry):
        offset = 0
        self.at += ")" not in self.lines[self.at]
        while not (text := self.lines[self.at].strip()).startswith("{"):
            if match := re.match(r"\.param (?:\.align (\d+) )?\.(\w+) (\w+?)(?:\[(\d+)\])?,?$", text):
                size = SIZE[CTYPE[match[2]]] * int(match[4] or 1)
                align = int(match[1] or SIZE[CTYPE[match[2]]])
                offset = (offset + align - 1) // align * align
                entry.params.append((size, align))
                entry.offsets[match[3]] = offset
                offset += size
            elif text and not re.match(r"[(){]|\.(maxntid|minnctapersm|maxnreg|reqntid|entry|visible|weak)\b", text):
                self.fail(self.at + 1)
            self.at += 1

    def parse_entry(self, entry):
        self.parse_params(entry)
        self.at += 1
        source, buffer, begin, depth = (), "", None, 1
        while True:
            line = self.lines[self.at]
            self.at += 1
            if line.lstrip().startswith((".loc ", ".loc\t")):
                source = self.locations.at(line)
            if line.lstrip().startswith((".loc ", ".loc\t", ".file", ".pragma")):
                continue
            for c in line.split("//")[0]:
                if not buffer and c.isspace():
                    continue
                if not buffer and c in "{}":
                    depth += 1 if c == "{" else -1
                    if depth == 0:
                        self.entries.append(entry)
                        return
                    entry.items.append((c,))
                elif c == ":" and re.fullmatch(r"[$\w]+", buffer):
                    entry.items.append(("label", buffer))
                    buffer = ""
                elif c == ";":
                    self.add(entry, begin, buffer.strip(), source)
                    buffer = ""
                else:
                    begin = begin if buffer else self.at
                    buffer += " " if c.isspace() else c
            if buffer:
                buffer += " "

    def add(self, entry, line, text, source):
        if match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):
            names = []
            for piece in (piece.strip() for piece in match[2].split(",")):
                many = re.fullmatch(r"(%\w+)<(\d+)>", piece)
                names += [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [piece]
            entry.items.append(("reg", match[1], names))
        elif match := re.match(r"\.shared \.align (\d+) \.b8 ([$\w]+)\[(\d+)\]", text):
            self.shared[match[2]] = (int(match[3]), int(match[1]))
        elif match := re.match(r"\.local \.align (\d+) \.b8\s+(\w+)\[(\d+)\]", text):
            entry.locals.append((match[2], int(match[3]), int(match[1])))
        elif text.startswith("."):
            self.fail(line)
        else:
            entry.items.append(Statement(line, text, source))
