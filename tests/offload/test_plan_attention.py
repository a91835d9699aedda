"""What a plan says of a sequence's state is what the state says of itself."""

from dataclasses import replace

import msgspec
import pytest

from slotmoe.model.attention import new_state
from slotmoe.model.config import parse_config, read_config
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import (
    attention_products,
    kv_bytes,
    kv_read_bytes,
    mark_bytes,
    scratch_bytes,
    waiting_bytes,
)
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.shapes import MARK_TOKENS, MOST_MARKS
from slotmoe.state import plain_row
from tests.support.meta import empty
from tests.support.v4 import CONFIGS, state_bytes

ROWS = {
    "native": lambda R, P: NativeBackend.latent_row(None, R, P),
    "torch": lambda R, P: TorchBackend.latent_row(None, R, P),
    "reference": plain_row,
}
NAMES = ("v2", "v3.2", "glm-5", "v4-flash", "v4-pro")


def on_meta(config, context, kernels):
    return new_state(
        config, context, ROWS[kernels], lambda shape, dtype: empty(*shape, dtype=dtype)
    )


@pytest.mark.parametrize("kernels", ROWS)
@pytest.mark.parametrize("name", [*NAMES, *(f"tiny {name}" for name in CONFIGS)])
def test_bytes_are_those_of_the_state(name, kernels):
    tiny = name.removeprefix("tiny ")
    config = parse_config(CONFIGS[tiny]) if tiny != name else read_config(geometry_path(name))
    given = ("native",) if kernels == "native" else ("torch", 4 if kernels == "reference" else 2)
    for context in (1, 100, 4096, 1 << 20):
        state = on_meta(config, context, kernels)
        assert kv_bytes(config, context, *given) == state_bytes(state)
        state.begin(8 * MARK_TOKENS)
        if state.snapshot_bytes(MARK_TOKENS):
            many = range(MARK_TOKENS * 1000, MARK_TOKENS * 1008, MARK_TOKENS)
            marks = sum(map(state.snapshot_bytes, many))
            assert mark_bytes(config, 8 * MARK_TOKENS, *given) == marks


def test_the_head_that_predicts_one_token_more_has_a_state_too():
    """Its bytes are in the plan's."""
    config = read_config(geometry_path("v4-flash"))
    both = kv_bytes(replace(config, mtp=True), 4096)
    alone = on_meta(config.alone(config.num_hidden_layers), 4096, "native")
    assert both == kv_bytes(config, 4096) + state_bytes(alone)


def test_a_million_positions_of_v4():
    config, positions = read_config(geometry_path("v4-flash")), 1 << 20
    a_token = (kv_bytes(config, positions) - kv_bytes(config, positions // 2)) / (positions // 2)
    assert a_token == 3610.5
    marks = MOST_MARKS * mark_bytes(config, MARK_TOKENS)
    assert kv_bytes(config, positions) - positions * a_token < 200e6 and marks < 30e6


def test_attention_grows_no_more_behind_what_an_indexer_chooses():
    """V3.2's indexer reads one key of 128 values a token; the dense layers of V2 read all rows."""
    v2, v32 = (read_config(geometry_path(name)) for name in ("v2", "v3.2"))
    assert attention_products(v2, 8192) == 60 * 128 * (2 * 512 + 64) * 8192
    more = attention_products(v32, 8192) - attention_products(v32, 2048)
    assert more == 61 * 64 * 128 * 6144
    assert (
        kv_read_bytes(v32, 8192, "native") - kv_read_bytes(v32, 2048, "native") == 6144 * 61 * 144
    )
    v4 = read_config(geometry_path("v4-flash"))
    csa, hca = 21, 20
    more = attention_products(v4, 1 << 20) - attention_products(v4, 1 << 19)
    expected = csa * 64 * 128 * (1 << 17) + hca * 64 * 2 * 512 * (1 << 12)
    assert more == expected
    more = kv_read_bytes(v4, 1 << 20, "native") - kv_read_bytes(v4, 1 << 19, "native")
    assert more == csa * (1 << 17) * 144 + hca * (1 << 12) * 528
    window, chosen = 43 * 127 * 528, csa * 512 * 528 + csa * (1 << 18) * 144
    opened = csa * 2 * 4 * 2 * 2 * (512 + 128) + hca * 2 * 512 * 4
    read = window + chosen + hca * (1 << 13) * 528 + opened
    assert kv_read_bytes(v4, 1 << 20, "native") == read


def test_streams_and_lists_take_scratch_memory():
    v32, v4 = (read_config(geometry_path(name)) for name in ("v3.2", "v4-flash"))
    for kernels in ("native", "torch", "triton"):
        plain = replace(v32, indexer=msgspec.structs.replace(v32.indexer, topk=1))
        assert scratch_bytes(v32, 512, kernels) > scratch_bytes(plain, 512, kernels)
        more = scratch_bytes(v4, 512, kernels) - scratch_bytes(
            replace(v4, hyper=None), 512, kernels
        )
        assert more >= 4 * 512 * (4 * 4 - 1) * v4.hidden_size
    stream = 4 * v4.stream_width
    assert waiting_bytes(v4, 4096) > (4096 - 512) * stream
    assert waiting_bytes(v4, 512) == 0
