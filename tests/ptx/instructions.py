"""What each PTX instruction is in C++: a statement that computes with the entry's variables or calls ptx::Thread.

`Instructions` is the part of translate.Writer that knows single instructions. An instruction, modifier or operand that
is not handled here raises `Unknown` with its name; nothing is skipped.
"""

from ptx.parse import CTYPE, SIZE, Unknown, split_operands

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
           "hs": ">="}  # fmt: skip
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
APPROXIMATE = ("rcp", "sqrt", "rsqrt", "ex2", "lg2", "tanh")
# Instructions that are one expression of their operands; c is the C++ type.
FUNCTIONS = {
    "min": "minimum<{c}>({0}, {1})", "max": "maximum<{c}>({0}, {1})", "abs": "{c}(std::abs({0}))",
    "copysign": "std::copysign({1}, {0})", "popc": "uint32_t(std::popcount({0}))",
    "clz": "uint32_t(std::countl_zero({0}))", "prmt": "prmt({0}, {1}, {2})",
}  # fmt: skip
# How many operands have the type of the instruction, and how many after them are u32 whatever it is.
COUNTED = {"shl": (1, 1), "shr": (1, 1), "bfi": (2, 2), "bfe": (1, 2)}
ORDERS = ("relaxed", "acquire", "release", "acq_rel", "volatile")


def modifiers(kinds, known):
    return next((k for k in kinds if k in known), ""), [k for k in kinds if k not in known]


class Instructions:
    def instruction(self, s):
        kinds = [p for p in s.parts[1:] if p != "ftz"]
        if method := getattr(self, f"op_{s.op}", None):
            return method(s, kinds, s.operands)
        if not kinds or kinds[-1] not in CTYPE or ("ftz" in s.parts and "approx" not in kinds):
            raise Unknown(s.name)
        text = self.floats(s, kinds) if kinds[-1] in ("f32", "f64") else self.integers(s, kinds)
        if text is None:
            raise Unknown(s.name)
        return text

    def floats(self, s, kinds):
        kind, o = kinds[-1], s.operands
        c = CTYPE[kind]
        v = [self.value(x, kind) for x in o[1:3]]
        rest = kinds[:-1]
        give = lambda text: self.assign(o[0], text, kind)  # noqa: E731
        if s.op in ("add", "sub", "mul") and rest in ([], ["rn"]):
            return give(f"{c}({v[0]} {OPERATORS[s.op]} {v[1]})")
        if s.op == "fma" and rest == ["rn"]:
            return give(f"std::fma({v[0]}, {v[1]}, {self.value(o[3], kind)})")
        if s.op == "fma" and rest == ["rm"] and kind == "f32":
            return give(f"fma_down({v[0]}, {v[1]}, {self.value(o[3], kind)})")
        if s.op in ("div", "rcp", "sqrt") and rest == ["rn"]:
            return give({"div": "{0} / {1}", "rcp": "{c}(1) / {0}", "sqrt": "std::sqrt({0})"}[s.op].format(*v, c=c))
        if s.op in APPROXIMATE and rest == ["approx"]:
            return give(f"{s.op}_approx{'_ftz' if 'ftz' in s.parts else ''}({v[0]})")
        if rest:
            return None
        if s.op == "neg":
            return give(f"{c}(-{v[0]})")
        if s.op == "selp":
            return self.select(s, kind)
        return give(FUNCTIONS[s.op].format(*v, c=c)) if s.op in ("min", "max", "abs", "copysign") else None

    def select(self, s, kind):
        o = s.operands
        text = f"{self.value(o[3], 'pred')} ? {self.value(o[1], kind)} : {self.value(o[2], kind)}"
        return self.assign(o[0], text, kind)

    def integers(self, s, kinds):
        kind, o, op = kinds[-1], s.operands, s.op
        c, u = CTYPE[kind], CTYPE.get("u" + kind[1:])
        rest = kinds[:-1]
        v = lambda k: self.value(o[k], kind)  # noqa: E731
        give = lambda text: self.assign(o[0], text, kind)  # noqa: E731
        if op in ("mul", "mad"):
            return self.product(s, kinds, rest)
        if op == "shf" and kind == "b32" and rest[0] in "lr" and rest[1] in ("wrap", "clamp"):
            return give(f"shf_{rest[0]}({v(1)}, {v(2)}, {v(3)}, {str(rest[1] == 'wrap').lower()})")
        if rest:
            return None
        if op in ("add", "sub"):  # unsigned, so that overflow wraps
            return give(f"{c}({u}({u}({v(1)}) {OPERATORS[op]} {u}({v(2)})))")
        if op in ("and", "or", "xor"):
            return give(f"{c}({v(1)} {OPERATORS[op]} {v(2)})")
        if op in ("div", "rem"):
            return give(f"{'divide' if op == 'div' else 'remainder'}<{c}>({v(1)}, {v(2)})")
        if op == "neg":
            return give(f"{c}(0 - {u}({v(1)}))")
        if op == "not":
            return give(f"!{v(1)}" if kind == "pred" else f"{c}(~{v(1)})")
        if op == "selp":
            return self.select(s, kind)
        if op in COUNTED:
            own, counts = COUNTED[op]
            values = [v(k) for k in range(1, own + 1)]
            values += [self.value(o[k], "u32") for k in range(own + 1, own + 1 + counts)]
            return give(f"{op}<{c}>({', '.join(values)})")
        if op == "lop3":
            return give(f"lop3({v(1)}, {v(2)}, {v(3)}, {int(o[4], 0)})")
        if op in ("popc", "clz"):
            return self.assign(o[0], FUNCTIONS[op].format(v(1)), "u32")
        if op in FUNCTIONS and op != "copysign":
            return give(FUNCTIONS[op].format(*(v(k) for k in range(1, len(o))), c=c))
        return None

    def product(self, s, kinds, rest):
        kind, o = kinds[-1], s.operands
        c, u = CTYPE[kind], CTYPE.get("u" + kind[1:])
        a, b = self.value(o[1], kind), self.value(o[2], kind)
        if rest == ["wide"]:
            wide = kind[0] + str(2 * int(kind[1:]))
            w = CTYPE[wide]
            text = f"{w}({w}({a}) * {w}({b}))"
            return self.assign(o[0], f"{w}({text} + {self.value(o[3], wide)})" if s.op == "mad" else text, wide)
        if rest not in (["lo"], ["hi"]):
            return None
        text = f"{u}(uint64_t({u}({a})) * uint64_t({u}({b})))" if rest == ["lo"] else f"high<{c}>({a}, {b})"
        return self.assign(o[0], f"{c}({u}({text}) + {u}({self.value(o[3], kind)}))" if s.op == "mad" else text, kind)

    def op_mov(self, s, kinds, o):
        if len(kinds) != 1:
            raise Unknown(s.name)
        kind = kinds[0]
        if o[1] == "%globaltimer":
            return self.assign(o[0], "t.globaltimer()", kind)
        bits = 8 * SIZE[CTYPE[kind]]
        whole = f"uint{bits}_t"
        if o[0].startswith("{"):
            targets = split_operands(o[0][1:-1])
            piece = f"b{bits // len(targets)}"
            lines = [f"const {whole} whole = {self.value(o[1], f'b{bits}')};"]
            lines += [
                self.assign(target, f"{CTYPE[piece]}(whole >> {k * bits // len(targets)})", piece)
                for k, target in enumerate(targets)
            ]
            return "{ " + " ".join(lines) + " }"
        if o[1].startswith("{"):
            pieces = split_operands(o[1][1:-1])
            each = bits // len(pieces)
            text = " | ".join(f"{whole}({self.value(p, f'b{each}')}) << {k * each}" for k, p in enumerate(pieces))
            return self.assign(o[0], f"{whole}({text})", f"b{bits}")
        return self.assign(o[0], self.value(o[1], kind), kind)

    def op_cvta(self, s, kinds, o):
        functions = {"to.shared.u64": "t.shared_of", "shared.u64": "t.generic_of"}
        functions |= dict.fromkeys(("to.global.u64", "global.u64", "param.u64", "to.local.u64", "local.u64"), "")
        if ".".join(kinds) not in functions:
            raise Unknown(s.name)
        return self.assign(o[0], f"{functions['.'.join(kinds)]}({self.value(o[1], 'u64')})", "u64")

    def op_cvt(self, s, kinds, o):
        mode, rest = modifiers(kinds, ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"))
        sat, types = modifiers(rest, ("sat",))
        if len(types) != 2 or not set(types) <= set(CTYPE) or "ftz" in s.parts:
            raise Unknown(s.name)
        to, source = types
        if to in ("f16x2", "bf16x2"):
            if mode not in ("rn", "rz") or sat or source != "f32":
                raise Unknown(s.name)
            narrow = f"{'half' if to == 'f16x2' else 'bfloat'}_{mode}"
            high, low = (f"uint32_t({narrow}({self.value(x, 'f32')}))" for x in o[1:3])
            return self.assign(o[0], f"{high} << 16 | {low}", "b32")
        a = self.value(o[1], source)
        floats = ("f16", "bf16", "f32", "f64")
        if to not in floats and source not in floats and not mode and not sat:
            return self.assign_wide(o[0], f"{CTYPE[to]}({a})", to)
        if to in floats and source in floats:
            return self.float_to_float(s, o[0], a, source, to, mode, sat)
        if to in ("f32", "f64") and mode == "rn" and not sat:
            return self.assign(o[0], f"{CTYPE[to]}({a})", to)
        if source in ("f32", "f64") and mode.endswith("i") and not sat:
            return self.assign_wide(o[0], f"to_integer<{CTYPE[to]}>({a}, rounded::{mode})", to)
        raise Unknown(s.name)

    def float_to_float(self, s, target, a, source, to, mode, sat):
        if source in ("f16", "bf16"):
            a, source = f"{'of_half' if source == 'f16' else 'of_bfloat'}({a})", "f32"
        if to in ("f16", "bf16") and mode in ("rn", "rz") and not sat and source == "f32":
            return self.assign(target, f"{'half' if to == 'f16' else 'bfloat'}_{mode}({a})", "b16")
        if mode.endswith("i") and to == source:
            function = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}[mode]
            a = f"{function}({a})"
        elif mode not in ("", "rn") or (mode == "" and SIZE[CTYPE[to]] < SIZE[CTYPE[source]]) or to in ("f16", "bf16"):
            raise Unknown(s.name)
        return self.assign(target, f"saturated({CTYPE[to]}({a}))" if sat else f"{CTYPE[to]}({a})", to)

    def op_setp(self, s, kinds, o):
        compare, kind = kinds[0], kinds[-1]
        if len(kinds) > 3 or "|" in o[0]:
            raise Unknown(s.name)
        a, b = self.value(o[1], kind), self.value(o[2], kind)
        nan = f"(std::isnan({a}) || std::isnan({b}))"
        is_float = kind in ("f32", "f64")
        if is_float and compare in ("num", "nan"):
            text = f"!{nan}" if compare == "num" else nan
        elif is_float and compare == "ne":
            text = f"({a} < {b} || {a} > {b})"
        elif is_float and compare.endswith("u") and compare[:-1] in COMPARE:
            text = f"({nan} || {a} {COMPARE[compare[:-1]]} {b})"
        elif compare in COMPARE:
            text = f"({a} {COMPARE[compare]} {b})"
        else:
            raise Unknown(s.name)
        if len(kinds) == 3:
            if kinds[1] not in ("and", "or", "xor"):
                raise Unknown(s.name)
            c = ("!" if o[3].startswith("!") else "") + self.value(o[3].lstrip("!"), "pred")
            text = f"bool({text} {OPERATORS[kinds[1]]} {c})"
        return self.assign(o[0], text, "pred")

    # -- memory

    def memory(self, s, kinds, allowed):
        """(state space, number of elements, type, the other modifiers) of a load or store."""
        space, rest = modifiers(kinds, ("global", "shared", "param", "local", "shared::cluster"))
        count, rest = modifiers(rest, ("v2", "v4"))
        others = tuple(rest[:-1])
        if others not in allowed:
            raise Unknown(s.name)
        return space or "generic", int(count[1]) if count else 1, rest[-1], others

    def op_ld(self, s, kinds, o):
        caches = {(): "plain", ("nc",): "read_only", ("cs",): "plain", ("ca",): "plain", ("cg",): "fresh",
                  ("cv",): "fresh"}  # fmt: skip
        polls = {("acquire", "gpu"): "acquire", ("relaxed", "gpu"): "relaxed", ("volatile",): "relaxed"}
        space, count, kind, others = self.memory(s, kinds, caches | polls)
        c = CTYPE[kind]
        targets = split_operands(o[0][1:-1]) if o[0].startswith("{") else [o[0]]
        if len(targets) != count:
            raise Unknown(s.text)
        narrow = space in ("shared", "shared::cluster") and self.is_narrow(o[1])
        address = self.address(o[1], "u32" if narrow else "u64")
        if space in ("param", "local"):
            read = f"t.ld_{space}<{c}, {count}>({address})"
        elif space == "shared::cluster":
            read = f"t.ld_cluster<{c}, {count}>({address}, {self.site(s, 'load', 'shared', SIZE[c] * count)})"
        elif space == "shared":
            read = f"t.ld_shared<{c}, {count}>(uint32_t({address}), {self.site(s, 'load', space, SIZE[c] * count)})"
        elif others in polls:
            if count != 1 or SIZE[c] != 4:
                raise Unknown(s.name)
            site = self.site(s, "load", space, 4)
            read = f"std::array{{t.ld_ordered({address}, order::{polls[others]}, {site})}}"
        else:
            site = self.site(s, "load", space, SIZE[c] * count)
            read = f"t.ld_{space}<{c}, {count}>({address}, way::{caches[others]}, {site})"
        body = " ".join(self.assign_loaded(x, f"got[{k}]", kind) for k, x in enumerate(targets))
        return f"{{ const auto got = {read}; {body} }}"

    def assign_loaded(self, target, expression, kind):
        if target == "_":
            return ""
        _, have = self.register(target)
        assign = self.assign_wide if SIZE[have] > SIZE[CTYPE[kind]] else self.assign
        return assign(target, expression, kind)

    def op_st(self, s, kinds, o):
        space, count, kind, _ = self.memory(s, kinds, ((), ("cs",), ("cg",), ("wb",)))
        c = CTYPE[kind]
        sources = split_operands(o[1][1:-1]) if o[1].startswith("{") else [o[1]]
        if len(sources) != count or space == "param":
            raise Unknown(s.text)
        values = ", ".join(self.value(x, kind) for x in sources)
        address = self.address(o[0], "u32" if space == "shared" and self.is_narrow(o[0]) else "u64")
        if space == "local":
            return f"t.st_local<{c}, {count}>({address}, {{{values}}});"
        site = self.site(s, "store", space, SIZE[c] * count)
        address = f"uint32_t({address})" if space == "shared" else address
        return f"t.st_{space}<{c}, {count}>({address}, {{{values}}}, {site});"

    def op_atom(self, s, kinds, o):
        order, rest = modifiers([k for k in kinds if k != "gpu"], ORDERS[:4])
        if len(rest) != 3 or rest[0] != "global" or rest[2] != "u32":
            raise Unknown(s.name)
        new = {"add": "old + v", "inc": "old >= v ? 0u : old + 1", "exch": "v", "max": "std::max(old, v)",
               "min": "std::min(old, v)", "or": "old | v", "and": "old & v"}.get(rest[1])  # fmt: skip
        if new is None:
            raise Unknown(s.name)
        site = self.site(s, "atomic", "global", 4)
        call = (
            f"t.atomic({self.address(o[-2])}, {self.value(o[-1], 'u32')}, order::{order or 'relaxed'}, {site}, "
            f"[](uint32_t old, [[maybe_unused]] uint32_t v) {{ return {new}; }})"
        )
        return self.assign(o[0], call, "u32") if s.op == "atom" else f"{call};"

    op_red = op_atom

    def op_mapa(self, s, kinds, o):
        if kinds != ["shared::cluster", "u32"]:
            raise Unknown(s.name)
        return self.assign(o[0], f"t.mapa({self.value(o[1], 'u32')}, {self.value(o[2], 'u32')})", "u32")

    def op_cp(self, s, kinds, o):
        if s.name == "cp.async.commit_group":
            return "t.copies_commit();"
        if s.name == "cp.async.wait_group":
            return f"t.copies_wait({int(o[0])});"
        if s.name == "cp.async.wait_all":
            return "t.copies_commit(); t.copies_wait(0);"
        sizes = {"cp.async.cg.shared.global": (16,), "cp.async.ca.shared.global": (4, 8, 16)}.get(s.name, ())
        if not sizes or int(o[2]) not in sizes:
            raise Unknown(s.text)
        given = self.value(o[3], "u32") if len(o) > 3 else f"{o[2]}u"
        site = self.site(s, "copy", "global", int(o[2]))
        return f"t.copy_async({self.address(o[0], 'u32')}, {self.address(o[1])}, {o[2]}u, {given}, {site});"

    def op_prefetch(self, s, kinds, o):
        if kinds != ["global", "L2"]:
            raise Unknown(s.name)
        return f"(void)({self.address(o[0])});"

    # -- barriers, warps, order

    def op_bar(self, s, kinds, o):
        if kinds == ["cluster", "arrive", "release", "aligned"]:
            return "t.cluster_arrive();"
        if kinds == ["cluster", "wait", "acquire", "aligned"]:
            return "t.cluster_wait();"
        if kinds == ["warp", "sync"]:
            return f"t.warp_sync({self.value(o[0], 'u32')});"
        site = self.site(s, "barrier", "shared", 0)
        if kinds == ["sync"] and o == ["0"]:
            return f"t.bar_red(false, {site});"
        if kinds[0] == "red" and o[1] == "0":
            p = self.value(o[2], "pred")
            text = {"or": f"t.bar_red({p}, {site}) != 0", "and": f"t.bar_red(!{p}, {site}) == 0",
                    "popc": f"t.bar_red({p}, {site})"}[kinds[1]]  # fmt: skip
            return self.assign(o[0], text, kinds[2])
        raise Unknown(s.text)

    op_barrier = op_bar

    def op_shfl(self, s, kinds, o):
        if kinds[0] != "sync" or kinds[1] not in ("bfly", "up", "down", "idx"):
            raise Unknown(s.name)
        target, _, predicate = o[0].partition("|")
        operands = ", ".join(self.value(x, "u32") for x in o[1:5])
        lines = f"const auto got = t.shfl(shuffle::{kinds[1]}, {operands}); {self.assign(target, 'got.first', 'u32')}"
        return f"{{ {lines} {self.assign(predicate, 'got.second', 'pred') if predicate else ''} }}"

    def op_vote(self, s, kinds, o):
        if kinds[0] != "sync" or kinds[1] not in ("ballot", "any", "all"):
            raise Unknown(s.name)
        p = ("!" if o[1].startswith("!") else "") + self.value(o[1].lstrip("!"), "pred")
        mask = self.value(o[2], "u32")
        text = {"ballot": "{0}", "any": "{0} != 0", "all": "{0} == {1}"}[kinds[1]].format(
            f"t.ballot({mask}, {p})", mask
        )
        return self.assign(o[0], text, "b32" if kinds[1] == "ballot" else "pred")

    def op_membar(self, s, kinds, o):
        if kinds not in (["gl"], ["sys"], ["cta"]):
            raise Unknown(s.name)
        return "t.fence();" if kinds != ["cta"] else ";"

    def op_fence(self, s, kinds, o):
        if kinds not in (["acq_rel", "gpu"], ["sc", "gpu"]):
            raise Unknown(s.name)
        return "t.fence();"

    def op_nanosleep(self, s, kinds, o):
        return "t.nanosleep();"

    def op_bra(self, s, kinds, o):
        return f"goto {self.label(o[0])};"

    def op_ret(self, s, kinds, o):
        return "return;"

    op_exit = op_ret
