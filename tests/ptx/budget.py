"""Counts what the kernels cost for the batch norm shapes of ResNet-50, and compares it with a budget.

    budget.py FOLDER      writes counters.json and budget.json there

Small cases are executed from PTX and counted (counters.json: one object for each launch). The twelve shapes at
three batch sizes are planned for an H200, and their counts are extrapolated: every count is a linear function of a few
numbers of the plan (`features`), whose factors are fitted to the small cases. Some of the real cases are small enough
to be executed with their real plans; they show how well the formula agrees, and enter the table as counted.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from ptx.counts import ITEM_BYTES, KB, PASSES, count, counted_library, plan_of
from ptx.predict import limit_us, predicted_us
from simt.build import JOBS

SHAPES = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14),
          (512, 7), (2048, 7)]  # fmt: skip
BATCHES = (32, 128, 256)
H200 = 132  # multiprocessors; small cases run on fewer of them

# What a launch may cost: GPU_PLAN's budget for every case.
INSTRUCTIONS_PER_VECTOR = {"forward": 125, "backward": 190}
OTHER_BYTES = (0.02, 256 * KB)  # of the tensor's bytes, or this many where that is more
SECTORS = 1.02  # of the least that the accesses need
SHARED_CYCLES = 1.1  # a request without conflicts is 1
BUSY_WARPS = 7.0  # of 8, in reductions of a block
TILE_ROUND_TRIPS = 4

# N, C, S, multiprocessors. Each kind of plan in several sizes, groups and waves.
SMALL = {
    "first": [(32, 8, 784, 4), (64, 8, 784, 8),
              (2, 4, 3136, 4), (8, 2, 3136, 8), (4, 8, 784, 4), (16, 4, 784, 16), (8, 6, 3136, 16), (32, 2, 784, 4),
              (64, 2, 784, 33), (3, 9, 784, 2), (8, 16, 196, 4), (32, 8, 196, 8), (16, 64, 49, 4), (64, 32, 49, 16),
              (128, 8, 196, 16), (256, 16, 49, 16), (96, 16, 196, 6), (64, 64, 49, 3), (64, 4, 3136, 24),
              (32, 2, 12544, 33), (256, 16, 196, 24), (256, 8, 196, 33), (512, 32, 49, 24)],
    "last": [(2, 64, 784, 16), (4, 32, 784, 8), (8, 64, 196, 4), (2, 128, 784, 33), (4, 64, 784, 40), (2, 256, 196, 16),
             (16, 32, 196, 2), (8, 128, 196, 8), (32, 64, 49, 6), (64, 32, 49, 12), (2, 64, 3136, 24), (5, 96, 196, 9),
             (8, 32, 3136, 33), (16, 64, 784, 24), (32, 64, 784, 33), (8, 64, 3136, 20), (32, 32, 784, 66),
             (64, 32, 196, 66)],
}  # fmt: skip
# channels_last with cooperative launches forbidden, and items that no block holds: the streaming strategy.
STREAMING = [(8, 64, 784, 4), (8, 128, 784, 8), (8, 64, 784, 16), (2, 256, 3136, 8), (32, 64, 196, 33),
             (32, 32, 196, 8), (8, 256, 784, 4), (128, 64, 49, 12), (32, 128, 196, 20), (2, 64, 3136, 40),
             (16, 128, 784, 33)]  # fmt: skip
# Real cases that are executed with their real plans: (C, side), batch.
COUNTED = [((512, 7), 32), ((256, 14), 32), ((128, 28), 32)]
# How far the formula may be from what these are counted as; bytes that are not the tensor's, in parts of all bytes.
# What a group does at its barrier is not linear in its blocks, which instructions of tiles without one show.
AGREEMENT = 0.12


def ceil_div(a, b):
    return -(-a // b)


def kind_of(plan, dtype, direction):
    """Plans of one kind run the same code: channels that span vectors are summed in another way, clusters merge so."""
    wide = "wide " if plan["access_pattern"] == "columns" and plan["columns_per_channel"] > 1 else ""
    clusters = " in clusters" if plan["cluster"] > 1 else ""
    return f"{plan['strategy']} {wide}{plan['access_pattern']}{clusters} {direction} {dtype}"


# ---- the formula -----------------------------------------------------------------------------------------------------


def merge_lanes(plan):
    """Lanes that share a channel in merge.cuh."""
    lanes = 32
    while lanes > 8 and lanes * plan["channels_per_tile"] > plan["threads"]:
        lanes //= 2
    return lanes


def features(plan):
    """Numbers of the plan that counts are linear in: how often each part of the kernels is executed."""
    blocks, items, channels, threads = (
        plan[k] for k in ("batch_splits", "channel_tiles", "channels_per_tile", "threads")
    )
    rows, vectors, lanes = plan["rows"], plan["vectors_per_row"], plan["lanes_per_row"]
    shares, several, parts = items * blocks, blocks > 1, ceil_div(blocks, plan["subgroup"])
    clusters = plan["cluster"] > 1
    levels = plan["subgroup"] > 1 and not clusters
    meets = parts > 1 if clusters else several  # at the barrier of a group
    publishers = items * parts if clusters else shares
    a_turn, pieces, width = (
        (threads, rows * vectors, 1) if plan["access_pattern"] == "rows" else (threads // lanes, rows, lanes)
    )
    a_share = ceil_div(pieces, blocks)
    each = [min(a_share, max(0, pieces - rank * a_share)) for rank in range(blocks)]
    in_warps = lambda share: share // a_turn * ceil_div(a_turn * width, 32) + ceil_div(share % a_turn * width, 32)  # noqa: E731
    row_bytes = plan["columns_per_channel"] * channels * 16 // plan["vector"]  # of an item
    at_once = threads // merge_lanes(plan)  # channels that are merged at the same time
    passes = ceil_div(channels, at_once)
    return {
        "shares": shares,
        "turns": items * sum(in_warps(share) for share in each),  # of the loops over vectors, by warps
        "longest turns": items * sum(ceil_div(share, a_turn) for share in each),  # by the warp with most of them
        "warps of channels": shares * ceil_div(channels, 32),
        "channels of shares": shares * channels,
        "shares in groups": shares * meets,
        "published": publishers * channels * meets,
        "merges": shares * passes * several,
        "records": publishers * parts * channels * meets,
        "records of subgroups": shares * channels * levels,
        "merges of subgroups": items * parts * passes * levels,
        "channels of subgroups": items * parts * channels * levels,
        "last records": items * parts * channels * several,
        "last merges": items * passes * several,
        "channels": items * channels,
        "unaligned rows": rows * items * (vectors * 16 % 32 != 0 or row_bytes % 32 != 0),
        "waves": plan["waves"],
        "group waves": plan["waves"] * meets,
        "subgroup waves": plan["waves"] * levels,
        "one": 1,
        "in group": int(meets),
        "in subgroups": int(levels),
        "passes": passes * several,
    }


RESIDENT_WORK = ["shares", "turns", "channels of shares", "shares in groups", "merges", "merges of subgroups"]
STREAMING_WORK = ["shares", "turns", "channels of shares", "channels", "last merges", "merges of subgroups"]
USED = {  # count -> the features it depends on, by strategy
    "instructions": {"resident": RESIDENT_WORK, "streaming": STREAMING_WORK},
    "loop_instructions": {"resident": ["turns", "shares"], "streaming": ["turns", "shares"]},
    "busy_all": dict.fromkeys(("resident", "streaming"), ["turns", "shares"]),
    "busy_longest": dict.fromkeys(("resident", "streaming"), ["longest turns", "shares"]),
    "tensor_sectors": dict.fromkeys(("resident", "streaming"), ["unaligned rows", "channels of shares"]),
    "least_sectors": dict.fromkeys(("resident", "streaming"), ["unaligned rows", "channels of shares"]),
    "other_sectors": {"resident": ["shares", "channels of shares", "published", "records", "records of subgroups",
                                   "channels of subgroups", "channels"],
                      "streaming": ["shares", "channels of shares", "channels", "last records",
                                    "channels of subgroups"]},
    "round_trips": {"resident": ["one", "waves", "group waves", "subgroup waves"],
                    "streaming": ["one", "passes", "in subgroups"]},
    "tile_round_trips": {"resident": ["one", "in group", "in subgroups"], "streaming": ["one"]},
}  # fmt: skip


def known(name, plan):
    """The part of a count that is known from the plan: sectors are those of its bytes, and some more."""
    return plan["bytes"] / 32 if name in ("tensor_sectors", "least_sectors") else 0


class Formula:
    """Fitted to the small cases of one kind, with relative errors weighed alike."""

    def __init__(self, samples):
        self.factors, self.samples = {}, samples
        strategy = samples[0][0]["strategy"]
        for name, used in USED.items():
            matrix = np.array([[features(plan)[f] for f in used[strategy]] for plan, _ in samples], float)
            counts = np.array([counted[name] - known(name, plan) for plan, counted in samples], float)
            weights = 1 / np.maximum(np.abs(counts), 1)
            scale = np.maximum(np.abs(matrix * weights[:, None]).max(0), 1e-300)
            found, *_ = np.linalg.lstsq(matrix * weights[:, None] / scale, counts * weights, rcond=1e-10)
            self.factors[name] = dict(zip(used[strategy], found / scale, strict=True))

    def __call__(self, plan):
        of = features(plan)
        counts = {
            name: known(name, plan) + sum(of[f] * k for f, k in factors.items())
            for name, factors in self.factors.items()
        }
        counts["launches"] = self.samples[0][1]["launches"]
        # A ratio: of the cases whose rows have as many lanes, or of those that come nearest.
        nearest = min(abs(p["lanes_per_row"] - plan["lanes_per_row"]) for p, _ in self.samples)
        alike = [c for p, c in self.samples if abs(p["lanes_per_row"] - plan["lanes_per_row"]) == nearest]
        for name in ("shared_cycles", "shared_least"):
            counts[name] = sum(c[name] for c in alike) / len(alike)
        return counts


def row_of(shape, batch, dtype, layout, direction, plan, counts, counted):
    """One object of budget.json."""
    channels, side = shape
    x_bytes = batch * channels * side * side * ITEM_BYTES[dtype]
    tensor, other = counts["tensor_sectors"] * 32, counts["other_sectors"] * 32
    vectors = x_bytes / 16 / 32  # of whole warps
    quantities = {
        "instructions_per_vector": (counts["loop_instructions"] / vectors, INSTRUCTIONS_PER_VECTOR[direction]),
        "other_bytes": (other, max(OTHER_BYTES[0] * tensor, OTHER_BYTES[1])),
        "sectors": (counts["tensor_sectors"] / counts["least_sectors"], SECTORS),
        "shared_cycles_per_request": (counts["shared_cycles"] / max(1, counts["shared_least"]), SHARED_CYCLES),
        "tile_round_trips": (counts["tile_round_trips"], TILE_ROUND_TRIPS),
        "launches": (counts["launches"], 1),
    }
    # Extrapolated counts are exact to some digits.
    over = {name: {"is": round(v, 3), "limit": round(most, 3)} for name, (v, most) in quantities.items()
            if v > most * (1 + 1e-6)}  # fmt: skip
    busy = min(8.0, 8 * counts["busy_all"] / counts["busy_longest"] / (plan["threads"] / 32))
    if busy < BUSY_WARPS:
        over["busy_warps"] = {"is": round(busy, 2), "limit": BUSY_WARPS}
    return {
        "shape": [channels, side, side], "batch": batch, "dtype": dtype, "layout": layout, "pass": direction,
        "strategy": plan["strategy"], "access_pattern": plan["access_pattern"], "blocks": plan["blocks"],
        "counted": counted,
        "tensor_bytes": round(tensor), "other_bytes": round(other),
        "instructions": round(counts["instructions"]),
        "instructions_per_vector": round(quantities["instructions_per_vector"][0], 1),
        "shared_cycles_per_request": round(quantities["shared_cycles_per_request"][0], 3),
        "busy_warps": round(busy, 2),
        "round_trips": round(counts["round_trips"], 1), "tile_round_trips": round(counts["tile_round_trips"], 1),
        "launches": counts["launches"],
        "predicted_us": round(predicted_us(tensor, other, counts["instructions"], counts["round_trips"],
                                           counts["launches"]), 2),
        "limit_us": round(limit_us(plan["least_bytes"]), 2),
        "within": not over, "over": over,
    }  # fmt: skip


# ---- the table -------------------------------------------------------------------------------------------------------


def count_all(small=SMALL, streaming=STREAMING, counted=COUNTED, dtypes=tuple(ITEM_BYTES)):
    """(samples by kind, real cases that were counted by (shape, batch, dtype, layout, pass), counters of launches)."""
    jobs = [(case, layout, dtype, True, None) for layout in small for case in small[layout] for dtype in dtypes]
    jobs += [(case, "last", dtype, False, None) for case in streaming for dtype in dtypes]
    jobs += [((batch, c, side * side, H200), layout, dtype, True, ((c, side), batch))
             for (c, side), batch in counted for layout in small for dtype in dtypes]  # fmt: skip
    counted_library()
    with ThreadPoolExecutor(JOBS) as pool:
        done = list(pool.map(lambda job: count(*job[0], job[1], job[2], job[3]), jobs))
    samples, real, records = {}, {}, []
    for (_, layout, dtype, _, name), (passes, launches) in zip(jobs, done, strict=True):
        records += launches
        for direction, plan, counts in passes:
            if name is None:
                samples.setdefault(kind_of(plan, dtype, direction), []).append((plan, counts))
            else:
                real[(*name, dtype, layout, direction)] = (plan, counts)
    return samples, real, records


def agreement(formulas, real):
    """[(case, count, formula, counted, difference)] of the real cases that were executed."""
    found = []
    for (shape, batch, dtype, layout, direction), (plan, counts) in real.items():
        said = formulas[kind_of(plan, dtype, direction)](plan)
        case = f"{shape[0]}x{shape[1]}x{shape[1]} batch {batch} {dtype} {layout} {direction}"
        for name in USED:
            whole = counts["tensor_sectors"] if name == "other_sectors" else 0
            difference = abs(said[name] - counts[name]) / (whole + max(counts[name], 1))
            found.append((case, name, said[name], counts[name], difference))
    return found


def table(formulas, real):
    rows = []
    for layout in ("first", "last"):
        for dtype in ITEM_BYTES:
            for direction in PASSES:
                for shape in SHAPES:
                    for batch in BATCHES:
                        plan = plan_of(batch, shape[0], shape[1] ** 2, layout, dtype, direction, H200)
                        _, counts = real.get((shape, batch, dtype, layout, direction), (None, None))
                        counted = counts is not None
                        counts = counts or formulas[kind_of(plan, dtype, direction)](plan)
                        rows.append(row_of(shape, batch, dtype, layout, direction, plan, counts, counted))
    return rows


def print_counters(records):
    titles = f"{'blocks':>6} {'instr':>9} {'tensor':>8} {'other':>8} {'conflicts':>9} {'barriers':>8} {'trips':>5}"
    print(f"{'launch':56} {titles} instr/vec")
    for r in records:
        case = "{N}x{C}x{S} {dtype} {layout} on {multiprocessors}".format(**r["case"])
        instructions, sectors = sum(r["instructions"].values()), f"{r['tensor']['sectors']:8} {r['other']['sectors']:8}"
        conflicts = r["shared_cycles"] / max(1, r["shared_cycles_without_conflicts"])
        waits = f"{r['block_barriers'] // r['blocks']:8} {r['tile_round_trips']:5}"
        name = f"{case:32} {r['pass']:9} {r['kernel'].split('<')[0]:13}"
        loops = f"{r['instructions_per_vector']:9}"
        print(f"{name} {r['blocks']:6} {instructions:9} {sectors} {conflicts:9.2f} {waits} {loops}")


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    samples, real, records = count_all()
    formulas = {kind: Formula(of) for kind, of in samples.items()}
    rows = table(formulas, real)
    (folder / "counters.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    (folder / "budget.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print_counters(records)
    agreed = agreement(formulas, real)
    print(f"{'the formula beside what was counted':44} {'count':18} {'formula':>12} {'counted':>12}")
    for case, name, said, counted, difference in agreed:
        print(f"{case:44} {name:18} {said:12.1f} {counted:12.1f} {difference:7.1%}")
    titles = f"{'blocks':>6} {'instr/vec':>9} {'other MB':>9} {'trips':>6} {'us':>8} {'limit':>8}"
    print(f"\n{'case':44} {titles}  over budget")
    for r in rows:
        case = f"{'x'.join(map(str, r['shape']))} batch {r['batch']} {r['dtype']} {r['layout']} {r['pass']}"
        numbers = f"{r['blocks']:6} {r['instructions_per_vector']:9.1f} {r['other_bytes'] / 1e6:9.2f}"
        times = f"{r['tile_round_trips']:6.1f} {r['predicted_us']:8.1f} {r['limit_us']:8.1f}"
        print(f"{case:44} {numbers} {times}  {', '.join(r['over'])}")
    within = sum(r["within"] for r in rows)
    print(f"\n{within} of {len(rows)} rows within budget. Over it, by quantity:")
    for name in dict.fromkeys(name for r in rows for name in r["over"]):
        print(f"  {name}: {sum(name in r['over'] for r in rows)}")
    worst = max(agreed, key=lambda found: found[-1])
    if worst[-1] > AGREEMENT:
        sys.exit(f"budget.py: the formula is off by {worst[-1]:.1%}: {worst[1]} of {worst[0]}")


if __name__ == "__main__":
    main()
