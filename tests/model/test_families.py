"""Every family: the reference path beside transformers, and the kernels beside each other."""

import pytest
import torch

from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.kernels.cpu import bindings as kernels
from tests.support.families import CASES, config_of, oracle_logits, write_family
from tests.support.native import LayerByLayerOps, feed, native_cache, network_of
from tests.support.oracle import relative_error

IDS = torch.randint(2, 4000, (40,), generator=torch.Generator().manual_seed(7)).tolist()
native = pytest.mark.skipif(kernels.load() is None, reason="the native kernels are not built")


@pytest.mark.parametrize("name", CASES)
def test_reference_path_equals_transformers(name, tmp_path):
    family, overrides = CASES[name]
    write_family(tmp_path, family, **overrides)
    with Runtime.open(tmp_path, quantize=False, context=64) as runtime:
        assert relative_error(runtime.logits(IDS), oracle_logits(tmp_path, IDS)) <= 1e-5


@native
@pytest.mark.parametrize("name", CASES)
def test_one_token_in_few_calls_is_bitwise_op_by_op_and_one_prefill(name):
    """Wherever experts are."""
    family, overrides = CASES[name]
    config = config_of(family, **overrides)
    network = network_of(config, "int8", NativeBackend(kernels.load()))
    plainly = network_of(config, "int8", LayerByLayerOps(kernels.load()))
    cache, steps = native_cache(plainly), [1] * 20  # past YaRN's original context
    expected = feed(plainly, cache, IDS, steps)
    for sizes, in_table in ((steps, ()), (steps, range(1, 8)), ([20], ())):
        network.experts.in_table, actual = in_table, native_cache(network)
        assert torch.equal(feed(network, actual, IDS, sizes), expected)
        assert torch.equal(actual.layers, cache.layers)
