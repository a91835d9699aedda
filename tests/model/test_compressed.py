"""DeepSeek-V4, V3.2 and GLM-5 over more tokens than a window, a compressed row and ``index_topk``:
the reference path beside transformers, in passes of all sizes."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from slotmoe.model.attention import new_state
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.quant.backends.base import new
from slotmoe.state import plain_row
from tests.support import v4
from tests.support.native import reference_network
from tests.support.oracle import relative_error, transformers_logits

TOKENS = 3 * 128 + 5
MASKED = -1e30  # what is below is no score
# So that no token has all of its heads' products negative, and a tie for it.
HEADS = {"index_n_heads": 16}
CASES = ["v4", "v4-odd", "v4-window", "v3.2-sparse-yarn", "glm-5-shared"]


class Margins(TorchFunctionMode):
    """Notes by how much the last of what a ``topk`` has chosen was better than the best of the
    rest, as a share of the largest score."""

    def __init__(self):
        super().__init__()
        self.gaps = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        scores, k = (*args, *(kwargs or {}).values())[:2] if function.__name__ == "topk" else (0, 0)
        if k and k < scores.shape[-1]:
            best = scores.float().sort(-1, descending=True).values[..., k - 1 : k + 1]
            gaps = (best[..., 0] - best[..., 1])[best[..., 1] > MASKED]
            self.gaps += (gaps / scores[scores > MASKED].abs().max()).flatten().tolist()
        return function(*args, **(kwargs or {}))


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
                with Margins() as margins:
                    logits = transformers_logits(folder, ids.tolist())
                if min(margins.gaps, default=1) > 3e-6:
                    break
            else:
                raise AssertionError("in every text rounding decides a choice")
            known[case] = folder, ids, logits
        return known[case]

    return make


def fed(network, ids, sizes, state):
    """Logits of ``ids`` in passes of ``sizes``, then of the rest one by one."""
    parts = [*ids[: sum(sizes)].split(sizes), *ids[sum(sizes) :].split(1)]
    return torch.cat([network.head(network.forward(part, [state])) for part in parts if len(part)])


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("case", CASES)
def test_passes_of_any_size_beside_the_oracle(case, made):
    folder, ids, wanted = made(case)
    with open_checkpoint(folder) as checkpoint:
        weights = {name: checkpoint.tensor(name) for name in checkpoint.infos}
        network = reference_network(checkpoint.config, weights)
    for sizes in ([TOKENS], [1] * 20 + [220, 3, 130], [127, 1, 16, 17, 100, 122]):
        state = new_state(network.config, 512, plain_row, new)
        assert relative_error(fed(network, ids, sizes, state), wanted) <= 1e-5
