"""Ranks that exchange through memory. In: batches in several processes. Out: the values that they have through the
group, bit for bit; and an error in each of them for whatever goes wrong in one."""

import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
import torch.distributed as dist
from inputs import channels_last, contiguous
from ranks import Ranks
from test_sync import ADD_RELU, LEAKY, PLAIN, RELU, Collectives, module_for

import fastbn
from fastbn import _C, exchange

pytestmark = pytest.mark.cpu
CHANNELS = 8


def temporary(size):
    """A file without a name."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(size)
        return os.dup(file.fileno())


@contextlib.contextmanager
def changed(name, value):
    """fastbn.exchange with another of its names."""
    kept = getattr(exchange, name)
    setattr(exchange, name, value)
    try:
        yield
    finally:
        setattr(exchange, name, kept)


def new_group(seconds=30):
    """Another group of the same ranks: what fails in it fails nowhere else."""
    return dist.new_group(timeout=datetime.timedelta(seconds=seconds))


def step(module, x, residual, dy):
    """Everything that a step makes."""
    leaves = [t.detach().requires_grad_() for t in (x, *([] if residual is None else [residual]))]
    output = module(*leaves)
    grads = torch.autograd.grad(output, [*leaves, *module.parameters()], dy)
    return [output.detach(), *grads, *module.buffers()]


def check_same_bits(counts, channels, shape, layout, dtype, ending, threads):
    rank = dist.get_rank()
    torch.set_num_threads(threads[rank % len(threads)])
    activation, param, adds = ending
    found, world = [], exchange.exchange_of(dist.group.WORLD)
    try:
        for wanted in (True, False):
            torch.manual_seed(rank)
            x, residual, dy = (layout((counts[rank], channels, *shape)).add_(rank).to(dtype) for _ in range(3))
            turns, group = world.turns, None if wanted else new_group()
            module = module_for(activation, param, torch.float32, process_group=group, channels=channels)
            with changed("WANTED", wanted):
                found.append(step(module, x, residual if adds else None, dy))
            assert (world.turns > turns) == wanted
    finally:
        torch.set_num_threads(1)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


CASES = [
    ((3, 3), 64, (56, 56), contiguous, torch.float32, PLAIN, (1,)),  # a channel at a time
    ((2, 5), 64, (56, 56), contiguous, torch.bfloat16, RELU, (2, 1)),
    ((4, 1), 3, (60, 60), contiguous, torch.float32, ADD_RELU, (1, 3)),  # in segments
    ((16, 4), 96, (14, 14), contiguous, torch.float32, PLAIN, (2,)),  # small maps
    ((5, 30), 96, (14, 14), channels_last, torch.float32, ADD_RELU, (2, 1)),
    ((4, 9), 300, (7, 7), channels_last, torch.bfloat16, LEAKY, (1,)),
    ((2, 1), 5, (1, 1), contiguous, torch.float32, PLAIN, (1,)),  # a value a channel in one of them
    ((0, 7), 200, (3, 3), contiguous, torch.float32, RELU, (1,)),
    ((3, 2), exchange.CHANNELS + 5, (1, 2), contiguous, torch.float32, PLAIN, (1,)),  # more than at once
]


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def three():
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.mark.sanitize
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}x{c[2]}-{c[3].__name__}-{c[4]}-{c[5][0]}-{c[6]}")
def test_same_bits_as_through_the_group(two, case):
    two.run(check_same_bits, *case)


def check_one_exchange_a_pass():
    module = fastbn.SyncBatchNormAct(CHANNELS, activation="silu")
    x = torch.randn(4, CHANNELS, 3, 3, requires_grad=True)
    made = exchange.exchange_of(dist.group.WORLD)
    turns = [made.turns]
    output = module(x, x * 2)
    turns.append(made.turns)
    output.sum().backward()
    turns.append(made.turns)
    module(x.detach()).sum().backward()  # no gradient of the input: nothing of other ranks
    turns.append(made.turns)
    module.eval()(x).sum().backward()
    turns.append(made.turns)
    return [after - before for before, after in zip(turns, turns[1:], strict=False)]


def test_one_exchange_a_pass(two):
    assert two.run(check_one_exchange_a_pass) == [[1, 1, 1, 0]] * 2


def check_mixed_ways():
    """Ranks that call the kernels, an operator in a graph, and one that somebody watches: each tells the same."""
    torch._dynamo.reset()
    begun = exchange.exchange_of(dist.group.WORLD).turns
    rank = dist.get_rank()
    right, module = (fastbn.SyncBatchNorm(CHANNELS) for _ in range(2))
    torch.manual_seed(rank)
    x = torch.randn(3 + rank, CHANNELS, 5, 5)
    expected = step(right, x, None, x)
    if rank == 0:
        found = step(module, x, None, x)
    elif rank == 1:
        found = step(torch.compile(module, backend="aot_eager", fullgraph=True), x, None, x)
    else:
        with Collectives():
            found = step(module, x, None, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    return exchange.exchange_of(dist.group.WORLD).turns - begun


def test_ranks_that_call_in_different_ways(three):
    assert three.run(check_mixed_ways) == [4, 4, 4]


def full(*arguments):
    raise OSError(28, "No space left on device")


OBSTACLES = {  # of one rank, and what is different there
    "unwanted": (1, "WANTED", False),
    "another machine": (1, "_join", lambda *arguments: None),
    "no folder": (0, "FOLDER", exchange.Path("/nowhere")),
    "full": (0, "os", type("os", (), {**vars(os), "posix_fallocate": staticmethod(full)})),
}


def check_not_shared(what):
    rank, *change = OBSTACLES[what]
    group = new_group()
    with changed(*change) if dist.get_rank() == rank else contextlib.nullcontext():
        x = torch.randn(3, CHANNELS)
        fastbn.SyncBatchNorm(CHANNELS, process_group=group)(x)
        assert exchange.exchange_of(group) is None
    return len(list(exchange.Path("/dev/shm").glob("fastbn-*")))


@pytest.mark.parametrize("what", OBSTACLES)
def test_one_rank_that_cannot_share_is_enough(two, what):
    assert two.run(check_not_shared, what) == [0, 0]


def check_new_world(store):
    """After the group is gone, another one of the same name is another one."""
    rank = dist.get_rank()
    x = torch.randn(3, CHANNELS, requires_grad=True)
    module = fastbn.SyncBatchNorm(CHANNELS)
    output = module(x)
    old = exchange.exchange_of(dist.group.WORLD)
    output.sum().backward()
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    output = module(x)
    new = exchange.exchange_of(dist.group.WORLD)
    output.sum().backward()
    assert new is not old and (old.turns, new.turns) == (2, 2)
    return len(list(exchange.Path("/dev/shm").glob("fastbn-*")))


def test_a_group_that_is_made_anew(tmp_path):
    ranks = Ranks(2)
    try:
        assert ranks.run(check_new_world, f"file://{tmp_path}/store") == [0, 0]
    finally:
        ranks.close()


def error_of(function):
    with pytest.raises(RuntimeError) as caught:
        function()
    return str(caught.value)


def check_different_channels():
    rank, group = dist.get_rank(), new_group(8)
    fastbn.SyncBatchNorm(CHANNELS, process_group=group)(torch.randn(3, CHANNELS))
    channels = (CHANNELS, CHANNELS + 1)[rank]
    module = fastbn.SyncBatchNorm(channels, process_group=group)
    first = error_of(lambda: module(torch.randn(3, channels)))
    return first, error_of(lambda: module(torch.randn(3, channels)))


def check_forward_and_backward():
    x = torch.randn(3, CHANNELS, requires_grad=True)
    module = fastbn.SyncBatchNorm(CHANNELS, process_group=new_group(8))
    output = module(x)
    return error_of((lambda: module(x)) if dist.get_rank() else lambda: output.sum().backward())


def test_ranks_that_exchange_different_things(two):
    (first, then), (other, _) = two.run(check_different_channels)
    assert f"moments of {CHANNELS + 1} channels" in first + other and f"moments of {CHANNELS} channels" in first + other
    assert "has failed before" in then
    found = two.run(check_forward_and_backward)
    assert any(f"gradients of {CHANNELS} channels" in text for text in found), found


def check_absence(leaves):
    """Rank 1 is done with the group, or stays away; what the others say, and after how long."""
    group = new_group(30 if leaves else 2)
    module = fastbn.SyncBatchNorm(CHANNELS, process_group=group)
    output = module(torch.randn(3, CHANNELS, 64, 64, requires_grad=True))
    dist.barrier()
    if dist.get_rank() == 1 and leaves:
        del output, module
        dist.destroy_process_group(group)
        del group
        return "", 0
    if dist.get_rank() == 1:
        time.sleep(4)
    begun = time.monotonic()
    return error_of(lambda: output.sum().backward()), time.monotonic() - begun


def test_a_rank_that_stays_away(three):
    (first, seconds), (late, _), (third, _) = three.run(check_absence, False)
    assert "rank 1 of the process group did not come within 2 s" in first + third
    assert 1.9 < seconds < 4 and "given up" in late


def test_a_rank_that_leaves_the_group(three):
    (first, seconds), _, (third, _) = three.run(check_absence, True)
    assert "rank 1 of the process group has ended" in first + third and seconds < 5


def check_one_value():
    """What no rank can know alone is an error in all of them, and no failure of the exchange."""
    module = fastbn.SyncBatchNorm(CHANNELS)
    for _ in range(2):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            module(torch.randn(dist.get_rank(), CHANNELS))
    before = [b.clone() for b in module.buffers()]
    module(torch.randn(1, CHANNELS))
    assert not torch.equal(before[0], module.running_mean)


def test_too_few_values_are_no_failure(two):
    two.run(check_one_value)


def check_threads():
    """Passes of several threads wait for each other; the order is the same in all ranks, as it has to be."""
    module = fastbn.SyncBatchNorm(CHANNELS)
    turn = [threading.Event() for _ in range(8)]
    turn[0].set()

    def run(i):
        turn[i].wait()
        module(torch.randn(3, CHANNELS, 9, requires_grad=True)).sum().backward()
        if i + 1 < len(turn):
            turn[i + 1].set()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(turn))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return module.num_batches_tracked.item()


def test_threads(two):
    assert two.run(check_threads) == [8, 8]


@pytest.mark.sanitize
def test_bad_arguments():
    size = _C.Exchange.bytes(2, CHANNELS)
    for wrong, message in (
        ((0, 2, 2, CHANNELS, 1.0), "rank should be 0 to 1, not 2"),
        ((0, -1, 2, CHANNELS, 1.0), "rank should be 0 to 1, not -1"),
        ((0, 0, 0, CHANNELS, 1.0), "ranks should be 1 to 65536, not 0"),
        ((0, 0, 2, 0, 1.0), "channels should be 1 to 524288, not 0"),
        ((0, 0, 2, CHANNELS, 0.0), "timeout should be positive, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.Exchange(*wrong)
    with pytest.raises(RuntimeError, match="cannot look at shared memory"):
        _C.Exchange(-1, 0, 2, CHANNELS, 1.0)
    short = temporary(size - 1)
    with pytest.raises(RuntimeError, match="cannot fill shared memory"):
        _C.Exchange(short, 0, 2, CHANNELS, 1.0)
    os.close(short)  # it stays open then
    read_only = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(RuntimeError, match="shared memory"):
        _C.Exchange(read_only, 0, 2, CHANNELS, 1.0)
    os.close(read_only)
    with pytest.raises(TypeError):
        _C.Exchange("file", 0, 2, CHANNELS, 1.0)


@pytest.mark.sanitize
def test_alone():
    """A rank that is all there is: what it hears is what it tells."""
    alone = _C.Exchange(temporary(_C.Exchange.bytes(1, CHANNELS)), 0, 1, CHANNELS, 1.0)
    values = torch.randn(3, 5 * CHANNELS + 3, dtype=torch.float64)
    assert torch.equal(alone.gather(values), values[None]) and alone.turns == 6
    assert torch.equal(alone.gather(values.T[:, :3].T), values.T[:, :3].T[None])
    assert alone.gather(values[:, :0]).shape == (1, 3, 0)
    for wrong, message in (
        (values.float(), "should be float64"),
        (values[0], r"\[1 to 3, C\]"),
        (torch.cat([values, values]), r"\[1 to 3, C\]"),
        (values.to_sparse(), "dense"),
    ):
        with pytest.raises(RuntimeError, match=message):
            alone.gather(wrong)
    x = torch.randn(4, CHANNELS, 6, requires_grad=True)
    plain, module = fastbn.BatchNorm1d(CHANNELS), fastbn.BatchNorm1d(CHANNELS)
    arguments = (module.weight, module.bias, module.running_mean, module.running_var, module.num_batches_tracked)
    output = alone.batch_norm(x, *arguments, 0.1, 1e-5)
    assert torch.equal(output, plain(x)) and torch.equal(module.running_var, plain.running_var)
    found, right = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (output, plain(x)))
    torch.testing.assert_close(found, right)
    for odd in (x[:1, :, 0], x.long(), torch.randn(4, CHANNELS + 1, 6), None, "input"):
        assert alone.batch_norm(odd, *arguments, 0.1, 1e-5) is NotImplemented
    many = torch.randn(4, CHANNELS + 1)
    assert alone.batch_norm(many, None, None, None, None, None, 0.1, 1e-5) is NotImplemented


def test_environment(tmp_path):
    environment = os.environ | {"FASTBN_SHARED_MEMORY": "maybe"}
    done = subprocess.run(
        [sys.executable, "-c", "import fastbn"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("FASTBN_SHARED_MEMORY should be 0 or 1, not 'maybe'")
