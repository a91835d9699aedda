"""Stand-ins for missing experts: what is chosen, what it may cost, and that nothing changes where
none is needed."""

import math
import random
import shutil

import pytest
import torch

from slotmoe.errors import ConfigError, ExportError
from slotmoe.model.routing import route, router_of
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.policy.substitutes import WINDOW, RouteBudget
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.study.calibrate import swap_prices
from slotmoe.quant.export.layout import MAX_SWAP_PRICE, SWAP_PRICES
from slotmoe.quant.export.writer import write_predictor
from tests.support.engine import IDS, decode
from tests.support.predictor import random_tensors
from tests.support.tiny import CONFIG, write_checkpoint

WEIGHTS = [0.4, 0.2, 0.1, 0.09, 0.08, 0.07]


def test_the_best_that_is_present_stands_in_for_the_least():
    for present, ranks in (
        ("111111", [0, 1, 2, 3]),
        ("111011", [0, 1, 2, 4]),
        ("110011", [0, 1, 4, 5]),
        ("110001", [0, 1, 2, 5]),
        ("001111", [0, 1, 2, 3]),  # the first half keeps its experts
    ):
        budget = RouteBudget([1.0], 1.0, 4)
        budget.advance(1)
        assert budget.choose(0, WEIGHTS, [mark == "1" for mark in present]) == ranks


@pytest.mark.parametrize("price", [0.0, 1e-30, 0.3, MAX_SWAP_PRICE])
def test_what_is_spent_stays_within_the_budget(price):
    """For all prices that are read."""
    chance, budget = random.Random(0), RouteBudget([price, 0.1] * 8, 0.01, 4)
    spent = []
    for _ in range(2000):
        budget.advance(1)
        for row in range(16):
            weights = sorted((0.1 * chance.random() for _ in range(8)), reverse=True)
            budget.choose(row, weights, [chance.random() < 0.5 for _ in range(8)])
        spent.append(budget.spent)
    assert 0 < budget.spent / 2000 <= 0.01
    assert price != 0.3 or budget.spent / 2000 > 0.9 * 0.01
    windows = [after - before for before, after in zip(spent, spent[WINDOW:], strict=False)]
    assert max(windows) <= 2 * WINDOW * 0.01
    assert budget.tokens == 2000
    assert not RouteBudget([1.0], 0.1, 4).active  # until a token is decoded


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    write_checkpoint(folder / "checkpoint", n_routed_experts=16, norm_topk_prob=True)
    quantize(folder / "checkpoint", folder / "plain")
    shutil.copytree(folder / "plain", folder / "export")
    tensors = random_tensors(0, 16)
    tensors[SWAP_PRICES] = torch.tensor([0.05, 0.02])
    write_predictor(folder / "export", tensors)
    return folder / "export"


def decoded(export, count=40, **options):
    """Logits of ids decoded one by one, the choices of all gates, and stats."""
    choices = []
    with Runtime.open(export, context=128, threads=1, **options) as runtime:
        runtime.model.experts.on_layer(lambda route: choices.append((route.row, route.indices)))
        rows_RV = decode(runtime, IDS[:1], IDS[1:count])
        return rows_RV, choices, runtime.stats()


def test_swaps_change_the_text_and_save_reads_within_the_groups(export):
    plain, _, before = decoded(export, slots=12)
    same, _, _ = decoded(export, slots=12, route_budget=1e-30)
    swapped, others, stats = decoded(export, slots=12, route_budget=0.3)
    assert torch.equal(plain, same)
    assert not torch.equal(plain, swapped)
    routing = stats["routing"]
    assert 0 < routing["estimated_kl"] <= 0.3 and routing["swaps"] > 5
    assert stats["io"]["disk"]["bytes"] < before["io"]["disk"]["bytes"]
    size = 16 // CONFIG["n_group"]
    for _, ((*indices,),) in others:
        assert len({expert // size for expert in indices}) <= CONFIG["topk_group"]
        assert len(set(indices)) == 3
    whole, _, stats = decoded(export, route_budget=0.3)  # there is room for all experts
    assert torch.equal(whole, plain)
    assert "swaps" not in stats["routing"]


def test_weights_are_the_gates_own_after_a_swap(export):
    """What is computed equals the routing rule over the chosen experts."""
    with Runtime.open(export, context=128, threads=1, slots=12, route_budget=1.0) as runtime:
        experts, layers, swapped = runtime.model.experts, runtime.config.moe_layers, []
        original, router = experts.substitution, router_of(runtime.config)
        alone = router._replace(n_group=1, topk_group=1)

        def check(row, x_TD, weights_TK, indices_TK, present):
            new_TK, chosen_TK = result = original(row, x_TD, weights_TK, indices_TK, present)
            if not torch.equal(chosen_TK, indices_TK):
                gate = runtime.model.network.layers[layers[row]].gate
                logits_TE = runtime.model.backend.linear(x_TD, gate)
                only_TE = torch.full_like(logits_TE, -math.inf)
                only_TE.scatter_(1, chosen_TK, logits_TE.gather(1, chosen_TK))
                wanted, indices = route(only_TE, alone)
                assert torch.equal(indices, chosen_TK)
                torch.testing.assert_close(wanted, new_TK)
                swapped.append(row)
            return result

        check.chooser, experts.substitution = original.chooser, check
        decode(runtime, IDS[:1], IDS[1:20])
    assert swapped


def test_impossible_requests_are_refused(export, tmp_path):
    plain = export.parent / "plain"
    for folder, options, message in (
        (plain, {"route_budget": 0.01}, "--calibrate"),
        (export, {"route_budget": -0.1}, "expected 0 to 1"),
        (export, {"route_budget": math.nan}, "expected 0 to 1"),
        (export, {"route_budget": 0.1, "draft": "ngram"}, "depends on the cache"),
        (export.parent / "checkpoint", {"route_budget": 0.1, "quantize": False}, "reference"),
    ):
        with pytest.raises(ConfigError, match=message):
            Runtime.open(folder, context=128, **options)
    refused = pytest.raises(ConfigError, match="route budget")
    with Runtime.open(export, context=128, route_budget=0.1) as runtime, refused:
        runtime.keep_in(tmp_path)


@pytest.mark.parametrize("price", [-0.05, -1e-30, 1.1e6, math.nan, math.inf, -math.inf])
def test_impossible_prices_are_refused(price, export, tmp_path):
    """A negative one would give budget back with each swap."""
    shutil.copytree(export, tmp_path / "export")
    tensors = random_tensors(0, 16)
    tensors[SWAP_PRICES] = torch.tensor([0.05, price])
    write_predictor(tmp_path / "export", tensors)
    with pytest.raises(ExportError, match=r"predictor-\w+\.safetensors: swap\.prices .*calibrate"):
        Runtime.open(tmp_path / "export", context=128, route_budget=0.1)


def test_prices_are_measured(export):
    with Runtime.open(export, context=256, threads=1) as runtime:
        prices = swap_prices(runtime, [[0, *IDS]], seed=0)
        assert torch.equal(prices, swap_prices(runtime, [[0, *IDS]], seed=0))
        assert runtime.model.experts.substitution is None
    assert prices.shape == (2,) and (prices >= 0).all() and prices.sum() > 0
