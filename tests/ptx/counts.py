"""The cost of one pass executed from PTX: instructions, sectors, bank conflicts, barriers, round trips to memory."""

import json
import tempfile
from functools import cache
from pathlib import Path

from ptx.build import library
from ptx.cases import entries, run_case

KB = 1024
CLUSTER = 8  # blocks of the largest cluster of an H200
ITEM_BYTES = {"bf16": 2, "f32": 4}
PASSES = ("forward", "backward")


def plan_of(n, c, s, layout, dtype, direction, multiprocessors, cooperative=True):
    from fastbn._C import cuda_plan

    device = {
        "multiprocessors": multiprocessors, "shared_per_multiprocessor": 228 * KB, "shared_per_block": 227 * KB,
        "shared_reserved": KB, "registers_per_multiprocessor": 64 * KB, "threads_per_multiprocessor": 2048,
        "cooperative": cooperative, "bytes_per_microsecond": 4_300_000, "cluster": CLUSTER,
    }  # fmt: skip
    return cuda_plan([n, c, s, 1], layout == "last", ITEM_BYTES[dtype], direction, True, True, device)


def in_function(record, name):
    """Whether a place of the source is in a function of this name, or in what is inlined into it."""
    return any(part.split(" ")[-1].removesuffix("{}") == name for part in record.split(" < "))


def merges(place):
    """Whether a place of the source is where records are merged, which have 16 bytes as vectors of the tensor have."""
    return in_function(place, "merge_records") or in_function(place, "merge_in_clusters")


def over_vectors(loop):
    return loop["vectors"] > 0 and not merges(loop["source"])


def summary(launches):
    """The counts of one pass, of all of its launches."""
    loops = [loop for launch in launches for loop in launch["loops"]]
    sites = [site for launch in launches for site in launch["sites"]]
    # How often a thread polls is a matter of the schedule.
    waits = [
        w for w in loops if in_function(w["source"], "wait_until") or in_function(w["source"], "sleep_nanoseconds")
    ]
    every = [sum(record["instructions"].values()) for record in launches]
    tensor, other, least = 0, 0, 0
    for site in sites:
        outside = site["sectors_of"].get("other", 0)
        other += outside
        tensor += sum(site["sectors_of"].values()) - outside
        least += 0 if outside else site["least_sectors"]
    vector_sites = [s for s in sites if s["in_vector_loop"] and s["space"] == "shared" and not merges(s["source"])]
    phases = [p for launch in launches for p in launch["phases"] if in_function(p["until"], "block_sums")]
    return {
        "instructions": sum(every) - sum(sum(w["instructions"].values()) for w in waits),
        "loop_instructions": sum(sum(x["instructions"].values()) for x in loops if over_vectors(x)),
        "tensor_sectors": tensor,
        "least_sectors": least,
        "other_sectors": other,
        "shared_cycles": sum(s["cycles"] for s in vector_sites),
        "shared_least": sum(s["least_cycles"] for s in vector_sites),
        "round_trips": sum(launch["round_trips"] for launch in launches),
        "tile_round_trips": max(launch["tile_round_trips"] for launch in launches),
        "busy_all": sum(p["all"] for p in phases),
        "busy_longest": sum(p["longest"] for p in phases),
        "launches": len(launches),
    }


def counters_of(launch, case, direction):
    """One object of counters.json: a launch as a profiler would show it."""
    memory = {name: {"requests": 0, "sectors": 0} for name in ("tensor", "other")}
    for site in launch["sites"]:
        if site["space"] == "global":
            outside = site["sectors_of"].get("other", 0)
            memory["other" if outside else "tensor"]["requests"] += site["requests"]
            memory["other"]["sectors"] += outside
            memory["tensor"]["sectors"] += site["sectors"] - outside
    shared = [site for site in launch["sites"] if site["space"] == "shared"]
    vectors = case["N"] * case["C"] * case["S"] * ITEM_BYTES[case["dtype"]] / 16 / 32
    in_loops = sum(sum(loop["instructions"].values()) for loop in launch["loops"] if over_vectors(loop))
    return {
        "case": case, "pass": direction, "kernel": launch["kernel"], "blocks": launch["blocks"],
        "warps": launch["warps"], "instructions": launch["instructions"], **memory,
        "shared_requests": sum(site["requests"] for site in shared),
        "shared_cycles": sum(site["cycles"] for site in shared),
        "shared_cycles_without_conflicts": sum(site["least_cycles"] for site in shared),
        "block_barriers": launch["block_barriers"], "group_barriers": launch["group_barriers"],
        "round_trips": launch["round_trips"], "tile_round_trips": launch["tile_round_trips"],
        "instructions_per_vector": round(in_loops / vectors, 1),
    }  # fmt: skip


def count(n, c, s, multiprocessors, layout, dtype, cooperative=True):
    """Runs one case from PTX. [(pass, plan, summary)], and the counters of its launches."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "counters"
        said, _ = run_case(
            *(f"{key}={value}" for key, value in [("N", n), ("C", c), ("S", s), ("layout", layout), ("dtype", dtype)]),
            *(f"mps={multiprocessors}", "shared=228", "block=227"),
            *(f"cooperative={int(cooperative)}", f"cluster={CLUSTER}"),
            library=counted_library(),
            FASTBN_PTX_COUNTERS=str(path),
        )
        launches = [json.loads(line) for line in path.read_text().splitlines()]
    case = {"N": n, "C": c, "S": s, "layout": layout, "dtype": dtype, "multiprocessors": multiprocessors}
    split = said["forward_launches"]
    passes, records = [], []
    for direction, part in zip(PASSES, (launches[:split], launches[split:]), strict=True):
        plan = plan_of(n, c, s, layout, dtype, direction, multiprocessors, cooperative)
        passes.append((direction, plan, summary(part)))
        records += [counters_of(launch, case, direction) for launch in part]
    return passes, records


@cache
def counted_library():
    dtypes = tuple(ITEM_BYTES)
    resident = entries(*dtypes, kernels="resident|backward_resident", epilogues="Identity")
    streaming = entries(
        *dtypes, kernels="stats|normalize|backward_reduce|backward_elemt", epilogues="Identity|Li[48]EE"
    )
    return library(only=f"{resident}|(?=.*ColumnAccess){streaming}", counted=True)
