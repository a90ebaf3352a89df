"""Errors of synchronized batch norm: in every rank, and within the timeout of the group where one has ended.
In: wrong arguments, ranks that die or stay away. Out: exceptions."""

import contextlib
import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, Ranks
from sync import C

import fastbn


def check_one_value_in_all():
    rank = dist.get_rank()
    module = fastbn.SyncBatchNorm(C)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.randn(1 if rank == 1 else 0, C))
    # nothing at all: an empty output, as in torch, and statistics as they were
    output = module(torch.randn(0, C, 3, requires_grad=True))
    output.sum().backward()
    assert output.shape == (0, C, 3) and module.weight.grad.eq(0).all()
    assert module.running_mean.eq(0).all() and module.running_var.eq(1).all()


@pytest.mark.cpu
def test_too_few_values(pool):
    pool(2).run(check_one_value_in_all)


def check_misuse():
    x, module = torch.randn(3, C), fastbn.SyncBatchNorm(C)
    with pytest.raises(ValueError, match="at least 2D input"):
        module(torch.randn(C))
    with pytest.raises(RuntimeError, match="mixed dtype"):
        module(x.double())
    with pytest.raises(RuntimeError, match="should contain 6 elements not 5"):
        module(torch.randn(3, 6))
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        module(x.long())
    with pytest.raises(RuntimeError, match="residual should have the sizes"):
        fastbn.SyncBatchNormAct(C)(x, x[:2])
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        fastbn.SyncBatchNorm(0)(torch.randn(3, 0))
    with pytest.raises(ValueError, match="eps must be positive"):
        fastbn.SyncBatchNorm(C, eps=0)(x)


def test_wrong_arguments(pool):
    pool(2).run(check_misuse)


def check_death():
    module = fastbn.SyncBatchNorm(C)
    x = torch.randn(3, C, requires_grad=True)
    module(x).sum().backward()
    output = module(x)
    if dist.get_rank() == 1:
        os._exit(3)
    begun = time.monotonic()
    with pytest.raises(RuntimeError):
        output.sum().backward()
    with pytest.raises(RuntimeError):
        module(x)
    return time.monotonic() - begun


@pytest.mark.cpu
def test_a_rank_that_dies_does_not_hang_the_others():
    ranks = Ranks(3, timeout=8)
    try:
        with pytest.raises(RankFailed) as caught:
            ranks.run(check_death)
    finally:
        ranks.close()
    assert str(caught.value) == "rank 1 of 3: ended with status 3", caught.value


def check_silence():
    """A rank that is there and does not take part."""
    if dist.get_rank() == 1:
        time.sleep(5)
        return None
    with contextlib.suppress(RuntimeError):
        fastbn.SyncBatchNorm(C)(torch.randn(3, C))
        raise AssertionError("the batch norm of one rank of two returned")
    return True


@pytest.mark.cpu
def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_the_timeout():
    ranks = Ranks(2, timeout=3)
    try:
        assert ranks.run(check_silence) == [True, None]
    finally:
        ranks.close()
