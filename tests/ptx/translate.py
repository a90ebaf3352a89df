"""Translates the PTX that nvcc wrote to C++ for the machine of tests/simt: one function for each entry.

Registers become local variables, branches become `goto`; loads, stores, waits and everything that threads do together
are calls of ptx::Thread (thread.h). `#line` directives carry the lines of the CUDA source, so that an error of the
machine names them. Counted code also reports its basic blocks, for the counters.
"""

import re

from ptx.flow import CLASSES, ENDS, Flow, class_of
from ptx.instructions import Instructions
from ptx.parse import CTYPE, SIZE, Parser, Unknown

SPECIAL = {"%tid.x": "t.tid()", "%ctaid.x": "t.ctaid()", "%ntid.x": "t.ntid()", "%nctaid.x": "t.nctaid()",
           "%laneid": "t.laneid()", "%tid.y": "0u", "%tid.z": "0u", "%ctaid.y": "0u", "%ctaid.z": "0u"}  # fmt: skip
# The value of a register that was not set: unlikely numbers and signalling NaNs, the same in every run.
UNSET = {"bool": "true", "float": "unset_float", "double": "unset_double"}
ENTRIES_A_SOURCE = 6


def register_type(ptx_type):
    if ptx_type in ("pred", "f32", "f64"):
        return CTYPE[ptx_type]
    return f"uint{8 * SIZE[CTYPE[ptx_type]]}_t"


class Writer(Instructions):
    def __init__(self, entry, file, shared, counted):
        self.entry, self.file, self.shared, self.counted = entry, file, shared, counted
        self.flow = Flow(entry)
        self.scopes = [{}]
        self.sites, self.statics = [], []
        self.block = 0  # the basic block that is being written
        self.tracked = self.find_tracked() if counted else set()

    def find_tracked(self):
        """Registers that hold what came from global memory, loaded or moved: the counters follow when it arrives."""
        tracked, moves = set(), []
        for s in self.entry.items:
            if isinstance(s, tuple):
                continue
            if s.op in ("ld", "atom") and class_of(s) == "global":
                tracked |= set(re.findall(r"%\w+", s.operands[0]))
            elif s.op == "mov" and len(s.operands) == 2:
                moves.append([re.findall(r"%\w+", operand) for operand in s.operands])
        while more := {d for to, source in moves if tracked & set(source) for d in to} - tracked:
            tracked |= more
        return tracked - {"%temp"}

    # -- operands

    def register(self, name):
        """(C++ name, C++ type) of a register, or None."""
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def value(self, text, ptx_type):
        """An operand as a C++ expression of the type that the instruction gives it."""
        c = CTYPE[ptx_type]
        if found := self.register(text):
            return found[0] if found[1] == c else f"as<{c}>({found[0]})"
        if text in SPECIAL:
            return SPECIAL[text]
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
            return f"float_of(0x{match[1]}u)" if c == "float" else f"as<{c}>(0x{match[1]}u)"
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
            return f"double_of(0x{match[1]}ull)" if c == "double" else f"as<{c}>(uint64_t(0x{match[1]}ull))"
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text) and c not in ("float", "double"):
            number = int(text.rstrip("U"), 0)
            return str(number != 0).lower() if c == "bool" else f"{c}({number & 0xFFFFFFFFFFFFFFFF:#x}ull)"
        if text in self.entry.offsets:
            return f"{c}(t.address(param) + {self.entry.offsets[text]})"
        if text in self.shared:
            return f"{c}({self.shared_offset(text)})"
        if any(text == name for name, _, _ in self.entry.locals):
            return f"{c}(t.address({text}))"
        raise Unknown(f"operand {text}")

    def shared_offset(self, name):
        if self.shared[name] is None:
            return "0u"
        if name not in self.statics:
            self.statics.append(name)
        return f"t.statics[{self.statics.index(name)}]"

    def address(self, text, wide="u64"):
        match = re.fullmatch(r"\[\s*([$%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not match:
            raise Unknown(f"address {text}")
        base = self.value(match[1], wide)
        return f"{base} + {CTYPE[wide]}({match[2]}ll)" if match[2] else base

    def is_narrow(self, address):
        """Whether a shared address is in a 32-bit register or is the name of an array."""
        name = re.match(r"\[\s*([$%\w]+)", address)[1]
        found = self.register(name)
        return name in self.shared or (found is not None and found[1] == "uint32_t")

    def assign(self, target, expression, ptx_type):
        """Stores an expression that has the C++ type of ptx_type."""
        if target == "_":
            return f"(void)({expression});"
        found = self.register(target)
        if not found:
            raise Unknown(f"register {target}")
        name, have = found
        want = CTYPE[ptx_type]
        return f"{name} = {expression};" if have == want else f"{name} = as<{have}>({want}({expression}));"

    def assign_wide(self, target, expression, ptx_type):
        """Stores to a register that may be wider than the type: extended by the type's sign."""
        name, have = self.register(target)
        if have in ("float", "double", "bool"):
            raise Unknown(f"{target} as {ptx_type}")
        return f"{name} = {have}({expression});"

    def site(self, s, kind, space, size):
        """The number of an instruction that the machine or the counters want to know again."""
        self.sites.append((kind, "global" if space == "generic" else space, size, self.block, s.name, s.source))
        return len(self.sites) - 1

    def label(self, name):
        return "L" + re.sub(r"\W", "_", name)

    # -- when loaded values arrive

    def waits(self, s):
        """C++ before and after an instruction: it waits for its tracked operands, unless it only moves them."""
        target = s.operands[0] if s.operands and s.op not in ("st", "bra", "bar", "red", "cp", "ret") else ""
        known = lambda names: [r for r in dict.fromkeys(names) if r in self.tracked and self.register(r)]  # noqa: E731
        written = known(re.findall(r"%\w+", target))
        read = [r for x in (s.operands[1:] if target else s.operands) for r in re.findall(r"%\w+", x)]
        read = known(read + ([s.predicate[1]] if s.predicate else []))
        if s.op == "mov":
            latest = f"std::max({{0u, {', '.join('w_' + r[1:] for r in read)}}})" if read else "0u"
            return "", "".join(f"w_{r[1:]} = {latest}; " for r in written)
        before = "".join(f"t.wait_for(w_{r[1:]}); " for r in read)
        loaded = "t.arrives" if s.op in ("ld", "atom") and class_of(s) == "global" else "0"
        return before, "".join(f"w_{r[1:]} = {loaded}; " for r in written)

    # -- the whole

    def statement(self, item):
        try:
            text = self.instruction(item)
        except Unknown as error:
            raise Unknown(f"{self.file}:{item.line}: {item.text[:100]}\n    unknown: {error}") from None
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise Unknown(f"{self.file}:{item.line}: {item.text[:100]}\n    not understood: {error!r}") from None
        before, after = self.waits(item) if self.counted else ("", "")
        if item.op not in ENDS:
            text = f"{text} {after}".rstrip()
        if item.predicate:
            negated, p = item.predicate
            text = f"if ({negated}{self.register(p)[0]}) {{ {text} }}"
        return before + text

    def write(self, number):
        registers, body, current, depth = [], [], None, 0
        self.block = -1
        for k, item in enumerate(self.entry.items):
            if isinstance(item, tuple):
                if item[0] == "label":
                    body.append(f"{self.label(item[1])}:;")
                elif item[0] in "{}":
                    depth += 1 if item[0] == "{" else -1
                    self.scopes.append({}) if item[0] == "{" else self.scopes.pop()
                    body.append(item[0])
                else:
                    c, names = register_type(item[1]), [re.sub(r"\W", "", name) for name in item[2]]
                    self.scopes[-1] |= {name: (cname, c) for name, cname in zip(item[2], names, strict=True)}
                    body += [f"{c} {', '.join(names)};"] if depth else []
                    registers += [] if depth else [(c, names)]
                current = None
                continue
            if self.flow.block_of[k] != self.block:
                self.block = self.flow.block_of[k]
                body += [f"t.block({self.block});"] if self.counted else []
                current = None
            text, place = self.statement(item), place_of(item.source)
            # What comes from one line of the source is on one line here, as #line counts lines.
            if place == current:
                body[-1] += " " + text
            else:
                body += [f'#line {place[1]} "{place[0]}"', text]
            current = place
        return "\n".join([*self.declarations(number, registers, "\n".join(body)), *body, "}", self.tables(number)])

    def declarations(self, number, registers, body):
        used = set(re.findall(r"\b\w+\b", body))
        out = [
            f"// {self.entry.name}",
            f"void code_{number}(Thread& t, [[maybe_unused]] const unsigned char* param) {{",
        ]
        ready = sorted({f"w_{r[1:]}" for r in self.tracked} & used)
        for c, names in [*registers, ("uint32_t", ready)]:
            value = "0" if names is ready else UNSET.get(c, f"{c}(unset)")
            names = [name for name in names if name in used]
            for at in range(0, len(names), 12):
                out.append(f"  {c} " + ", ".join(f"{name} = {value}" for name in names[at : at + 12]) + ";")
        return out + [f"  alignas({align}) unsigned char {name}[{size}];" for name, size, align in self.entry.locals]

    def tables(self, number):
        """What launches and counters need to know about the entry."""
        flow = self.flow
        pairs = lambda items: "{" + ", ".join(f"{{{a}, {b}}}" for a, b in items) + "}"  # noqa: E731
        out, tables = [f'#line 1 "tables of {self.file}"'], "nullptr, 0, nullptr, 0, nullptr, 0"
        if self.counted:
            out.append(f"const Block blocks_{number}[] = {{")
            for b, block in enumerate(flow.blocks):
                counts = [0] * len(CLASSES)
                for k in block:
                    counts[CLASSES.index(class_of(self.entry.items[k]))] += 1
                header = flow.headers.index(b) if b in flow.headers else -1
                source = next((s for s in (self.entry.items[k].source for k in block) if s and s[0][1]), ())
                numbers, loops = ", ".join(map(str, counts)), ", ".join(map(str, flow.chain[b]))
                out.append(f"  {{{{{numbers}}}, {header}, {{{loops}}}, {quoted(source)}}},")
            out += ["};", f"const Loop loops_{number}[] = {{"]
            for h, latches in zip(flow.headers, flow.latches, strict=True):
                out.append(f"  {{{h}, {{{', '.join(map(str, latches))}}}}},")
            out += ["  {-1, {}}", "};", f"const Site sites_{number}[] = {{"]
            for kind, space, size, block, name, source in self.sites:
                out.append(f'  {{Kind::{kind}, Space::{space}, {size}, {block}, "{name}", {quoted(source)}}},')
            out += ['  {Kind::load, Space::global, 0, 0, "", ""}', "};"]
            tables = (
                f"blocks_{number}, {len(flow.blocks)}, loops_{number}, {len(flow.headers)}, sites_{number}, "
                f"{len(self.sites)}"
            )
        statics = pairs(self.shared[name] for name in self.statics)
        out.append(
            f'const Entry entry_{number}("{self.entry.name}", code_{number}, {pairs(self.entry.params)}, {statics}, '
            f"{tables});"
        )
        return "\n".join(out)


def quoted(chain):
    return '"' + " < ".join(f"{file}:{line} {function}".rstrip() for file, line, function in chain) + '"'


def place_of(chain):
    """The line to name in an error: the innermost one of the kernels that is not in device.cuh, which all call."""
    for file, line, _ in chain:
        if file.endswith((".cu", ".cuh")) and file != "device.cuh" and line:
            return file, line
    return ("unknown", 1)


def translate(text, file, only=None, counted=False):
    """(C++ sources of a few entries each, number of translated entries, number of entries in the file)."""
    entries, shared = Parser(text, file).parse()
    chosen = [e for e in entries if only is None or re.search(only, e.name)]
    sources = []
    for first in range(0, len(chosen), ENTRIES_A_SOURCE):
        parts = ['#include "thread.h"', "using namespace ptx;", "namespace {"]
        parts += [Writer(e, file, shared, counted).write(k) for k, e in enumerate(chosen[first:][:ENTRIES_A_SOURCE])]
        sources.append("\n".join([*parts, "}  // namespace", ""]))
    return sources, len(chosen), len(entries)
