"""The time that counted work would take on an H200: a formula, not a measurement.

    time = launches * LAUNCH + round trips * LATENCY + the longest of
        DRAM:   bytes of tensors / bandwidth of memory
        L2:     all bytes (sectors of 32) / bandwidth of the second-level cache
        issue:  warp instructions / (multiprocessors * schedulers * clock)

What moves bytes and what issues instructions overlaps; the longest chain of dependent accesses to memory does not, as
it is what a block does between its last load and its first store. Bytes that a pass reads twice count twice, whether
or not the second-level cache still has them. PTX instructions stand for those of SASS (within 6 % where both were
counted).
"""

MULTIPROCESSORS = 132
SCHEDULERS = 4  # of a multiprocessor, one warp instruction a cycle each
CLOCK = 1755.0  # cycles a microsecond
DRAM = 4.3e6  # bytes a microsecond, reads and writes together
L2 = 6.0e6
LATENCY = 400 / CLOCK  # microseconds of a round trip to the second-level cache
LAUNCH = 2.5  # microseconds


def predicted_us(tensor_bytes, other_bytes, instructions, round_trips, launches):
    busy = max(
        tensor_bytes / DRAM,
        (tensor_bytes + other_bytes) / L2,
        instructions / (MULTIPROCESSORS * SCHEDULERS * CLOCK),
    )
    return launches * LAUNCH + round_trips * LATENCY + busy


def limit_us(least_bytes):
    """The time of a copy of as many bytes."""
    return least_bytes / DRAM
