"""What is read ahead, and how much: policy alone, with a shelf and idle times of its own."""

import torch

from slotmoe.model.config import parse_config
from slotmoe.model.names import GATE, POST_NORM, layer_tensor
from slotmoe.offload.experts.ahead import Lookahead
from slotmoe.offload.policy.prefetch import Prefetcher
from slotmoe.quant.backends.base import TorchBackend
from tests.support.tiny import CONFIG, random_weights


class Shelf:
    """A target of prefetches that holds keys; room for ``room`` of them."""

    def __init__(self, room=100):
        self.keys, self.room, self.dropped = {}, room, []

    def prefetch(self, key, urgency):
        if len(self.keys) >= self.room:
            return False
        self.keys[key] = urgency
        return True

    def drop(self, key):
        del self.keys[key]
        self.dropped.append(key)

    def __contains__(self, key):
        return key in self.keys


def prefetcher(shelf, idle=1.0):
    """Three layers of ten experts, a disk of 100 records a second, and ``idle`` seconds a layer to
    read ahead."""
    made = Prefetcher(3, 10, 1, shelf, lambda: 100.0)
    made._idle.value = idle
    return made


def test_reads_ahead_are_limited_by_idle_time_accuracy_and_room():
    def begun(idle, right, room=100):
        shelf = Shelf(room)
        ahead = prefetcher(shelf, idle)
        ahead._right["layer"].value = right
        ahead.guess(1, range(10, 20), "layer")
        ahead.more(0)
        return len(shelf.keys)

    shares = [(0.0, 0.5), (0.02, 0.0), (0.02, 0.5), (0.02, 0.75), (1.0, 0.5), (1.0, 0.5, 2)]
    assert [begun(*share) for share in shares] == [0, 2, 4, 8, 10, 2]


def test_guessing_stops_where_it_costs_more_than_it_hides():
    ahead = prefetcher(Shelf())
    ahead._missing.value = 2.0  # 20 ms of reads a layer
    ahead._cost.value = 0.0005
    assert ahead.pays()
    ahead._cost.value = 0.01
    asked = [ahead.pays() for _ in range(32)]
    assert sum(asked) == 2  # but looks again now and then


def test_guesses_are_read_nearest_layer_first_and_judged_by_the_gate():
    shelf = Shelf()
    ahead = prefetcher(shelf)
    ahead.guess(1, [11, 12], "token")
    ahead.guess(2, [21], "token")
    ahead.more(0)
    assert shelf.keys == {11: 1, 12: 1, 21: 2}
    ahead.guess(1, [12, 13], "layer")  # the later word refutes 11
    assert shelf.dropped == [11]
    ahead.more(0)
    ahead.chosen(1, [12, 15], 2)
    assert shelf.dropped == [11, 13]
    token, layer = ahead.stats()["token"], ahead.stats()["layer"]
    assert (token["cancelled"], token["used"], layer["wasted"]) == (1, 1, 1)
    assert (layer["guessed"], layer["right"], layer["asked"]) == (2, 1, 2)
    ahead.reset()
    ahead.chosen(2, [22], 1)
    assert shelf.dropped == [11, 13]  # 21 is forgotten


def test_guesses_are_by_the_next_layers_gate():
    """From what the network gives a layer's gate of the residual stream."""
    config, weights = parse_config(CONFIG), random_weights(CONFIG, torch.float32)
    ahead = Lookahead(config, weights, TorchBackend(), 1, Shelf(), lambda: 100.0, None)
    seeded = torch.Generator().manual_seed(0)
    h_TD = torch.randn(4, config.hidden_size, generator=seeded, dtype=torch.double)

    def gate_input(layer):
        scaled = h_TD / (h_TD.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return scaled * weights[layer_tensor(layer, POST_NORM)].double()

    def scores(layer):
        return gate_input(layer) @ weights[layer_tensor(layer, GATE)].double().T

    for found, wanted in (
        (ahead.next_scores(0, gate_input(1).float()), scores(2)),
        (ahead.first_scores(h_TD.float()), scores(1)),
    ):
        assert torch.allclose(found.double(), wanted, atol=1e-4)
