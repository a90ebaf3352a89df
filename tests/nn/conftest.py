"""What the tests of modules share."""

import pytest
from ranks import Ranks


@pytest.fixture(scope="module")
def pool(request):
    made = {}

    def ranks_of(size, backend="gloo", **options):
        if (backend == "nccl") != (request.config.getoption("--backend") == "cuda"):
            pytest.skip("Gloo ranks are for CPU tensors, and NCCL's for GPUs")
        return made.setdefault((size, *options.items()), Ranks(size, backend, **options))

    yield ranks_of
    for ranks in made.values():
        ranks.close()
