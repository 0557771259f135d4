import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.training.conftest import CPU, ROOT
from training.evaluation import nearest as module
from training.evaluation.nearest import Nearest


def expected(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By one matrix and a stable sort: of equals, the first in the bank."""
    values, order = (queries @ bank.T).sort(dim=1, descending=True, stable=True)
    return values[:, :k], order[:, :k]


@given(
    count=st.integers(1, 90),
    k=st.integers(1, 12),
    batch=st.integers(1, 50),
    block=st.sampled_from([1, 16, 64]),
    similarities=st.sampled_from([9, 100, 10_000]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_equals_are_taken_in_the_order_of_the_bank(
    count: int, k: int, batch: int, block: int, similarities: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: products are exact, and most of them are shared by many.
    bank, queries = (torch.randint(-1, 2, (n, 2), generator=generator).float() for n in (count, 7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr(module, "_SIMILARITIES", similarities)
        found = Nearest(queries, k)
        for part in torch.arange(count).split(batch):
            found.add(part, bank[part])
        if k > count:
            with pytest.raises(ValueError, match=f"k is {k}; the bank holds fewer"):
                found.found()
            return
        values, order = expected(queries, bank, k)
        for result in (found.found(), found.found_by_all(CPU)):
            assert torch.equal(result.similarity, values)
            assert torch.equal(result.places, order)


@pytest.mark.parametrize("k", [1, 20, 300])
def test_real_vectors_through_groups_and_blocks(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (
        F.normalize(torch.randn(n, 32, generator=generator), dim=1) for n in (9_003, 50)
    )
    found = Nearest(queries, k)
    order = torch.randperm(len(bank), generator=generator)  # places need not come in order
    for part in order.split(1_000):
        found.add(part, bank[part])
    values, _ = expected(queries, bank, k)
    torch.testing.assert_close(found.found().similarity, values)
    own = (queries[:, None] * bank[found.found().places]).sum(dim=2)
    torch.testing.assert_close(own, values)


def test_k_below_one() -> None:
    with pytest.raises(ValueError, match="k is 0"):
        Nearest(torch.ones(1, 1), 0)


MEMORY = """
import resource, torch
from training.evaluation.nearest import Nearest
def peak_mib(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
found = Nearest(torch.randn(1000, 8), 20)
def add(start):
    found.add(torch.arange(start, start + 1000), torch.randn(1000, 8))
for i in range(10):
    add(1000 * i)
before = peak_mib()
for i in range(10, 150):
    add(1000 * i)
found.found()
print(peak_mib() - before)
"""


def test_memory_does_not_grow_with_the_bank() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150  # MiB; the whole matrix is 572
