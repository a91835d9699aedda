"""DeepSeek-V4, V3.2 and GLM-5 over more tokens than a window, a compressed row and ``index_topk``:
the reference path beside transformers, and all ways to compute a text beside each other."""

from contextlib import contextmanager

import pytest
import torch

from slotmoe.model.attention import new_state
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.quant.backends.base import new
from slotmoe.state import plain_row
from tests.support import v4
from tests.support.native import reference_network
from tests.support.oracle import relative_error

TOKENS = 3 * 128 + 5
BORDERS = (1, 3, 4, 5, 7, 8, 9, 13, 17, 32, 33, 127, 128, 129, 136, 137, 256, 257, TOKENS)
MASKED = -1e30  # what is below is no score
# So that no token has all of its heads' products negative, and a tie for it.
HEADS = {"index_n_heads": 16}
CASES = [*v4.V4_CASES, *v4.SPARSE_CASES]


@contextmanager
def margins(found):
    """Appends to ``found`` by how much the last of what a ``topk`` has chosen was better than the
    best of the rest, as a share of the largest score."""
    method, function = torch.Tensor.topk, torch.topk

    def note(scores, k):
        if k < scores.shape[-1]:
            best = method(scores.float(), k + 1, dim=-1).values[..., -2:]
            gaps = (best[..., 0] - best[..., 1])[best[..., 1] > MASKED]
            largest = scores[scores > MASKED].abs().max()
            found.extend((gaps / largest).flatten().tolist())

    def as_method(scores, k, *args, **kwargs):
        note(scores, k)
        return method(scores, k, *args, **kwargs)

    def as_function(scores, k, *args, **kwargs):
        note(scores, k)
        return function(scores, k, *args, **kwargs)

    torch.Tensor.topk, torch.topk = as_method, as_function
    try:
        yield
    finally:
        torch.Tensor.topk, torch.topk = method, function


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Case -> its folder, a text, and the oracle's logits; the text is one in which rounding
    decides no choice."""
    known = {}

    def make(case):
        if case not in known:
            folder = tmp_path_factory.mktemp(case)
            v4.write_v4(folder, case, max_position_embeddings=1024, **HEADS)
            for seed in range(40):
                generator = torch.Generator().manual_seed(seed)
                ids = torch.randint(2, 4000, (TOKENS,), generator=generator)
                gaps = []
                with margins(gaps):
                    logits = v4.v4_logits(folder, ids.tolist())
                if min(gaps, default=1) > 3e-6:
                    break
            else:
                raise AssertionError("in every text rounding decides a choice")
            known[case] = folder, ids, logits
        return known[case]

    return make


def opened(folder):
    with open_checkpoint(folder) as checkpoint:
        weights = {name: checkpoint.tensor(name) for name in checkpoint.infos}
        return reference_network(checkpoint.config, weights)


def empty(network, row=plain_row, context=512):
    return new_state(network.config, context, row, new)


def fed(network, ids, sizes, state):
    """Logits of ``ids`` in passes of ``sizes``, then of the rest one by one."""
    parts = [*ids[: sum(sizes)].split(sizes), *ids[sum(sizes) :].split(1)]
    return torch.cat([network.head(network.forward(part, [state])) for part in parts if len(part)])


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "lengths", [BORDERS, pytest.param(range(1, TOKENS + 1), marks=pytest.mark.slow)]
)
def test_every_prompt_length(lengths, case, made):
    folder, ids, wanted = made(case)
    network = opened(folder)
    for length in lengths:
        got = network.head(network.forward(ids[:length], [empty(network)])[-1:])
        assert relative_error(got, wanted[length - 1 : length]) <= 1e-5, length


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("case", CASES)
def test_passes_of_any_size_beside_the_oracle(case, made):
    folder, ids, wanted = made(case)
    network = opened(folder)
    for sizes in ([TOKENS], [1] * 20 + [220, 3, 130], [127, 1, 16, 17, 100, 122]):
        assert relative_error(fed(network, ids, sizes, empty(network)), wanted) <= 1e-5
