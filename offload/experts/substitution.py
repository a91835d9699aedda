"""Between a gate's choice and the look-up of its experts: others stand in for some of them.

Shapes: T tokens, D hidden_size, E routed experts, K experts a token, R experts that are looked at.
"""

from collections.abc import Callable

from torch import Tensor

from slotmoe.model.network import Network
from slotmoe.model.routing import route, router_of
from slotmoe.offload.devices.device import Device
from slotmoe.offload.policy.substitutes import RandomSwaps, RouteBudget
from slotmoe.quant.backends.base import Prepared


class Substitution:
    """Stand-ins come from the gate's next K experts, of the groups that it has chosen."""

    def __init__(
        self, network: Network[Prepared], device: Device, chooser: RouteBudget | RandomSwaps
    ):
        config, router = network.config, router_of(network.config)
        ranks = min(2 * router.top_k, config.n_routed_experts // router.n_group * router.topk_group)
        self._ranks = router._replace(top_k=ranks, factor=1.0, normalized=False)
        self._layers = [network.layers[layer] for layer in config.moe_layers]
        self._router, self._backend = router, network.backend
        self._device, self.chooser = device, chooser

    def __call__(
        self,
        row: int,
        x_TD: Tensor,
        weights_TK: Tensor,
        indices_TK: Tensor,
        present: Callable[[int], bool],
    ) -> tuple[Tensor, Tensor]:
        """Weights and indices as they are used, the same bits for tokens that keep their choice.
        ``present`` says of an expert of layer ``row`` whether it is in memory or on its way."""
        layer = self._layers[row]
        assert layer.gate is not None
        inputs = self._backend.linear(x_TD, layer.gate), self._ranks, layer.gate_bias, None
        scores_TR, indices_TR = self._backend.route(*inputs) or route(*inputs)
        download, K = self._device.download(scores_TR, indices_TR), self._router.top_k
        scores_TR, (indices_TR,) = download.get(), download.others()
        used_TR = scores_TR * self._factor(scores_TR[:, :K])
        changed = False
        for token, weights in enumerate(used_TR.tolist()):
            at_hand = [present(expert) for expert in indices_TR[token].tolist()]
            ranks = self.chooser.choose(row, weights, at_hand)
            if ranks[-1] < K:
                continue
            if not changed:
                weights_TK, indices_TK, changed = weights_TK.clone(), indices_TK.clone(), True
            scores_K, upload = scores_TR[token, ranks], self._device.upload
            weights_TK[token] = upload(scores_K * self._factor(scores_K))
            indices_TK[token] = upload(indices_TR[token, ranks])
        return weights_TK, indices_TK

    def _factor(self, scores_K: Tensor) -> Tensor | float:
        """What makes weights of scores, [..., K]."""
        if self._router.normalized:
            return self._router.factor / (scores_K.sum(dim=-1, keepdim=True) + 1e-20)
        return self._router.factor
