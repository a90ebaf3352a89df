"""Measures a case: sets up its peers, checks them against float64, times them in turns; a record for each pass."""

import math
import random
from collections.abc import Callable, Iterator

from check import Mismatch, Reference
from limits import OF_PASS, limits
from peers import PEERS, ModuleRunner, backend_of_torch
from records import Record, speedup
from suite import Case, Tensors, make_tensors
from timing import Protocol, Times, measure, noise, pooled

# A relative error of a ratio above this means that other programs used the machine meanwhile.
DISTURBED = 0.5
# Rounds are repeated up to this many times while it is uncertain whether torch or fastbn is faster. Otherwise the
# slowest of a hundred cases would be the one with the most noise.
PATIENCE = 9


def last_line(error: BaseException) -> str:
    """An exception in one line; compilers' messages are pages long."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:300]}"


def checked_runners(
    case: Case, sets: list[Tensors], peers: list[str], reference: Reference, device: str = "cpu"
) -> tuple[dict[str, object], list[Record]]:
    """The peers that can do the case and do it right, set up; and a record for each of the others, which says why."""
    runners, records = {}, []
    for name in peers:
        peer, about = PEERS[name], {**case.fields(), "peer": name}
        if reason := peer.refuses(case, device):
            records.append({"kind": "unsupported", **about, "error": reason})
            continue
        try:
            runner = peer.runner(peer, case, sets)
            reference.check(runner.outputs(), peer.slack, runner.strided)
        except Mismatch as error:
            records.append({"kind": "wrong", **about, "error": str(error)})
        except Exception as error:  # an error of one peer must not stop the others
            records.append({"kind": "failed", **about, "error": last_line(error)})
        else:
            runners[name] = runner
    return runners, records


def measure_until_clear(
    functions: dict[str, Callable[[], object]], protocol: Protocol, rng: random.Random, failed: dict[str, Exception]
) -> Times:
    """Measures again if the ratio of torch and fastbn is too uncertain, and keeps the less uncertain result. Otherwise
    adds rounds, up to PATIENCE times, until the ratio differs from 1 by more than its noise."""

    def apart(times: Times) -> tuple[float, float]:
        """How far torch and fastbn are from each other, as a logarithm, and the noise of that."""
        if not {"torch", "fastbn"} <= times.keys():
            return math.inf, 0.0
        return abs(math.log(speedup({"seconds": times}))), noise(times, "torch", "fastbn")

    times = measure(functions, protocol, rng, failed=failed)
    left = {name: functions[name] for name in times}
    if apart(times)[1] > DISTURBED:
        times = min(times, measure(left, protocol, rng), key=lambda t: apart(t)[1])
    for _ in range(PATIENCE):
        distance, uncertain = apart(times)
        if distance > uncertain or uncertain > DISTURBED:
            break
        times = pooled(times, measure(left, protocol, rng))
    return times


def measure_case(
    case: Case, peers: list[str], protocol: Protocol, seed: int, sets: int = 1, fresh: bool = True
) -> Iterator[Record]:
    """A record for each pass, and one for each peer that does not take part. ``sets`` of tensors are used in turns;
    ``fresh`` says whether clone and add are timed beside the copy."""
    rng = random.Random(seed)
    tensors = [make_tensors(case, seed + i) for i in range(sets)]
    runners, records = checked_runners(case, tensors, peers, Reference(tensors[0], case.epilogue))
    yield from records
    if "fastbn" not in runners:
        return
    # another module object, so that the noise includes what that changes
    runners["fastbn again"] = PEERS["fastbn"].runner(PEERS["fastbn"], case, tensors)
    by_variant = {name: runner.calls() for name, runner in runners.items()}
    bounds = limits(tensors)
    about = {"inputs": "cold" if sets > 1 else "warm", "torch_backend": backend_of_torch(tensors[0])}
    plain = None
    if case.epilogue:  # fastbn's batch norm alone, which fusing is compared with
        bare = [Tensors(t.x, t.dy, t.module) for t in tensors]
        plain = ModuleRunner(PEERS["fastbn"], Case(case.suite, case.shape, case.dtype, case.layout), bare).calls()
    for name in case.passes:
        functions = {variant: by_pass[name] for variant, by_pass in by_variant.items() if name in by_pass}
        functions |= {bound: bounds[bound] for bound in OF_PASS[name] if fresh or bound == "copy"}
        if plain and name == "forward":
            functions["fastbn plain"] = plain[name]
        failed: dict[str, Exception] = {}
        times = measure_until_clear(functions, protocol, rng, failed)
        for variant, error in failed.items():
            yield {"kind": "failed", **case.fields(), "peer": variant, "pass": name, "error": last_line(error)}
        if "fastbn" not in times:
            continue
        yield {"kind": "fused" if case.epilogue else "case", **case.fields(), **about, "pass": name, "seconds": times}
