"""The arithmetic of the budget: the predicted time, what is over budget, and the formula that extrapolates counts."""

import pytest
from ptx.budget import Formula, features, kind_of, plan_of, row_of
from ptx.predict import limit_us, predicted_us

pytestmark = pytest.mark.cpu

COUNTS = {
    "instructions": 0, "loop_instructions": 125 * 1000, "tensor_sectors": 10**5, "least_sectors": 10**5,
    "other_sectors": 8192, "shared_cycles": 110, "shared_least": 100, "round_trips": 4, "tile_round_trips": 4,
    "busy_all": 14, "busy_longest": 1, "launches": 1,
}  # fmt: skip


def test_predicted_time():
    # 4.3 TB/s, 6 TB/s of the second-level cache, 132 x 4 instructions a cycle of 1.755 GHz, 400 cycles a round trip
    assert predicted_us(43e6, 0, 0, 0, 1) == pytest.approx(2.5 + 10)
    assert predicted_us(10e6, 50e6, 0, 0, 2) == pytest.approx(5 + 10)
    assert predicted_us(0, 0, 132 * 4 * 1755 * 3, 0, 1) == pytest.approx(2.5 + 3)
    assert predicted_us(0, 0, 0, 1755 / 400, 1) == pytest.approx(2.5 + 1)
    assert limit_us(43e6) == pytest.approx(10)


def row(**changed):
    # 1000 vectors of whole warps: 512 KB
    plan = plan_of(4, 64, 1000, "last", "bf16", "forward", 132)
    return row_of((64, 1), 4000, "bf16", "last", "forward", plan, COUNTS | changed, True)


def test_a_row_at_its_limits_is_within():
    at_limit = row()
    assert at_limit["within"] and at_limit["over"] == {}
    assert at_limit["instructions_per_vector"] == 125 and at_limit["other_bytes"] == 256 * 1024


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"loop_instructions": 126 * 1000}, "instructions_per_vector"),
        ({"other_sectors": 8200}, "other_bytes"),
        ({"least_sectors": 97000}, "sectors"),
        ({"shared_cycles": 120}, "shared_cycles_per_request"),
        ({"tile_round_trips": 5}, "tile_round_trips"),
        ({"busy_longest": 1.1}, "busy_warps"),
        ({"launches": 2}, "launches"),
    ],
)
def test_a_row_says_what_it_is_over_by(changed, name):
    over = row(**changed)
    assert not over["within"] and list(over["over"]) == [name]
    assert over["over"][name]["is"] != over["over"][name]["limit"]


def test_the_formula_finds_what_is_linear_in_the_plan():
    cases = [
        (n, 64, s, m)
        for n, s, m in [
            (5, 784, 2),
            (16, 784, 4),
            (64, 784, 33),
            (8, 3136, 20),
            (16, 196, 24),
            (40, 784, 16),
            (30, 784, 48),
            (9, 3136, 33),
            (50, 196, 4),
            (3, 784, 7),
        ]
    ]
    plans = [plan_of(n, c, s, "last", "bf16", "forward", m) for n, c, s, m in cases]
    assert len({kind_of(plan, "bf16", "forward") for plan in plans}) == 1

    def counts(plan):
        f = features(plan)
        return COUNTS | {"loop_instructions": 130 * f["turns"] + 7 * f["shares"], "other_sectors": 3 * f["records"]}

    formula = Formula([(plan, counts(plan)) for plan in plans])
    other = plan_of(32, 64, 784, "last", "bf16", "forward", 132)
    assert formula(other)["loop_instructions"] == pytest.approx(counts(other)["loop_instructions"])
    assert formula(other)["other_sectors"] == pytest.approx(counts(other)["other_sectors"])


def test_records_of_a_tile():
    """128 x 64 x 56 x 56 channels_last: the blocks of a cluster share what they read of the others."""
    plan = plan_of(128, 64, 56 * 56, "last", "bf16", "forward", 132)
    blocks, cluster, items = plan["batch_splits"], plan["cluster"], plan["channel_tiles"]
    assert cluster == 8 and blocks % 8 == 0 and blocks >= 128
    assert features(plan)["records"] == items * (blocks // 8) ** 2 * plan["channels_per_tile"]
