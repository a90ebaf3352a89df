"""The control flow of an entry, which the counters need: basic blocks, natural loops, and classes of instructions."""

# In the order of `class_names` in counting.h. `move` and `param` cost little: ptxas removes most of them.
CLASSES = ["global", "shared", "copy", "fp32", "fp64", "special", "conversion", "integer", "control", "shuffle",
           "barrier", "move", "param"]  # fmt: skip
ENDS = ("bra", "ret", "exit")  # of a basic block


def class_of(s):
    kinds = set(s.parts[1:])
    if s.name.startswith("cp.async"):
        return "copy"
    if s.op in ("ld", "st", "atom", "red"):
        return "param" if "param" in kinds else "shared" if kinds & {"shared", "shared::cluster"} else "global"
    by_op = {
        "bar": "barrier", "barrier": "barrier", "membar": "barrier", "fence": "barrier", "nanosleep": "barrier",
        "shfl": "shuffle", "vote": "shuffle", "match": "shuffle", "activemask": "shuffle", "redux": "shuffle",
        "bra": "control", "ret": "control", "exit": "control", "mov": "move", "cvta": "move", "cvt": "conversion",
        "selp": "integer",
    }  # fmt: skip
    if s.op in by_op:
        return by_op[s.op]
    if "approx" in kinds:
        return "special"
    return "fp64" if "f64" in kinds else "fp32" if "f32" in kinds else "integer"


class Flow:
    """Basic blocks of an entry (`blocks`: indices of its items) and the natural loops that they are in.

    `headers`, `latches` and `bodies` describe the loops, outer ones first; `chain[b]` lists the loops around block b.
    """

    def __init__(self, entry):
        self.blocks, self.labels, self.block_of = [], {}, {}
        open_block = False
        for k, item in enumerate(entry.items):
            if isinstance(item, tuple):
                if item[0] == "label":
                    if not (open_block and not self.blocks[-1]):
                        self.blocks.append([])
                    self.labels[item[1]] = len(self.blocks) - 1
                    open_block = True
                continue
            if not open_block:
                self.blocks.append([])
            self.blocks[-1].append(k)
            self.block_of[k] = len(self.blocks) - 1
            open_block = item.op not in ENDS
        self.find_edges(entry)
        self.find_loops()

    def find_edges(self, entry):
        n = len(self.blocks)
        self.after = [[] for _ in range(n)]
        for b, block in enumerate(self.blocks):
            last = entry.items[block[-1]] if block else None
            if (last is None or last.op not in ENDS or last.predicate) and b + 1 < n:
                self.after[b].append(b + 1)
            if last is not None and last.op == "bra":
                self.after[b].append(self.labels[last.operands[0]])
        self.before = [[] for _ in range(n)]
        for b, targets in enumerate(self.after):
            for to in targets:
                self.before[to].append(b)

    def reverse_postorder(self):
        order, seen, stack = [], {0}, [(0, iter(self.after[0]))]
        while stack:
            b, targets = stack[-1]
            to = next((t for t in targets if t not in seen), None)
            if to is None:
                order.append(b)
                stack.pop()
            else:
                seen.add(to)
                stack.append((to, iter(self.after[to])))
        return order[::-1]

    def find_loops(self):
        """Back edges to dominators (Cooper, Harvey, Kennedy: A simple, fast dominance algorithm)."""
        order = self.reverse_postorder()
        place = {b: k for k, b in enumerate(order)}
        above = {0: 0}  # immediate dominators

        def common(x, y):
            while x != y:
                while place[x] > place[y]:
                    x = above[x]
                while place[y] > place[x]:
                    y = above[y]
            return x

        changed = True
        while changed:
            changed = False
            for b in order[1:]:
                known = [p for p in self.before[b] if p in above]
                new = known[0]
                for p in known[1:]:
                    new = common(p, new)
                if above.get(b) != new:
                    above[b], changed = new, True

        loops, latches = {}, {}
        for b in order:
            for to in self.after[b]:
                x = b
                while place[x] > place[to]:
                    x = above[x]
                if x != to:
                    continue
                body = loops.setdefault(to, {to})
                latches.setdefault(to, []).append(b)
                todo = [b]
                while todo:
                    x = todo.pop()
                    if x not in body:
                        body.add(x)
                        todo += [p for p in self.before[x] if p in place]
        self.headers = sorted(loops, key=lambda h: -len(loops[h]))
        self.latches = [latches[h] for h in self.headers]
        self.bodies = [loops[h] for h in self.headers]
        self.chain = [[k for k, body in enumerate(self.bodies) if b in body] for b in range(len(self.blocks))]
