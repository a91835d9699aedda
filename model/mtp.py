"""The head that predicts one token more (multi-token prediction: DeepSeek-V3, arXiv 2412.19437,
section 2.2): one decoder layer behind the last one, with an embedding and an output of the model.

From what the network made of token i, and the token that came as i + 1, it predicts token i + 2:

    x_i = eh_proj [enorm(embedding of token i + 1) ; hnorm(h_i)]
    logits = output head(norm(decoder layer(x_1 ... x_i)))

DeepSeek-V4's does so with each residual stream s, which go through the layer and are collapsed by
weights of its own:

    x_is = e_proj enorm(embedding of token i + 1) + h_proj hnorm(h_is)

h_i of V3 is the residual stream after the last layer and the final norm, as other runtimes give it
to the heads of published checkpoints; on which side of that norm, the paper does not say.

Shapes: R rows, D hidden_size, E routed experts, K experts a token, M MoE layers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from slotmoe.model import names
from slotmoe.model.layers import as_tensor
from slotmoe.model.names import EMBEDDING, FINAL_NORM, HEAD, HEAD_MIX_PARTS, layer_tensor
from slotmoe.model.network import Network
from slotmoe.quant.backends.base import Prepared, RoutedExperts, SlotTable
from slotmoe.state import SequenceState

_PIECE = 512  # rows whose doubly wide input is in memory at once


class MtpHead:
    """The head of ``main`` over ``weights`` by checkpoint name: a network of one layer."""

    def __init__(
        self,
        main: Network,
        weights: Mapping[str, Prepared],
        experts: RoutedExperts,
        chunk_tokens: int,
    ):
        self._main, layer = main, main.config.num_hidden_layers
        both = names.MTP_PARTS | names.V4_MTP_PARTS
        stored = {field: layer_tensor(layer, part.name) for field, part in both.items()}
        parts = {field: weights[name] for field, name in stored.items() if name in weights}
        self._projections = [parts[key] for key in ("eh_proj", "e_proj", "h_proj") if key in parts]
        self._enorm, self._hnorm = as_tensor(parts["enorm"]), as_tensor(parts["hnorm"])
        self.config = main.config.alone(layer)
        prefix, first = (layer_tensor(index, "").removesuffix(".weight") for index in (layer, 0))
        own = {name.replace(prefix, first): weights[name] for name in weights if prefix in name}
        shared = {EMBEDDING: main.embed_tokens, HEAD: main.lm_head, FINAL_NORM: parts["norm"]}
        mixing = {part.name: parts.get(f"hc_{field}") for field, part in HEAD_MIX_PARTS.items()}
        shared |= {name: weight for name, weight in mixing.items() if weight is not None}
        behind = _LastLayer(experts, layer, main.config.n_routed_experts)
        self._network = Network(self.config, own | shared, main.backend, behind, chunk_tokens)
        self.head = self._network.head

    @torch.inference_mode()
    def forward(self, hidden_RD: Tensor, ids_R: Tensor, state: SequenceState) -> Tensor:
        """Append rows to ``state``: ``hidden_RD``, float32, is the residual stream after the main
        network's last layer, or several, which is overwritten, and ``ids_R`` the token behind each.
        Returns the streams after the head's layer, float32 [R, D], of which ``head`` makes logits.
        """
        backend, eps = self._main.backend, self.config.rms_norm_eps
        for rows_PD, ids_P in zip(hidden_RD.split(_PIECE), ids_R.split(_PIECE), strict=True):
            e_PD = backend.embed(ids_P, self._main.embed_tokens)
            e_PD = backend.rms_norm(e_PD, self._enorm, eps)
            if self.config.hyper is None:
                h_PD = backend.rms_norm(rows_PD, self._main.norm, eps)
                h_PD = backend.rms_norm(h_PD, self._hnorm, eps)
                x_PD = backend.linear(torch.cat([e_PD, h_PD], dim=-1), self._projections[0])
            else:
                e_proj, h_proj = self._projections
                h_XD = rows_PD.reshape(-1, e_PD.shape[1])
                h_XD = backend.linear(backend.rms_norm(h_XD, self._hnorm, eps), h_proj)
                x_PD = h_XD.view(len(ids_P), -1, e_PD.shape[1])
                x_PD = (x_PD + backend.linear(e_PD, e_proj)[:, None]).flatten(1)
            rows_PD.copy_(x_PD)
        return self._network.run(hidden_RD, [state], [len(ids_R)])


class _LastLayer:
    """The experts of the head's ``layer`` as those of a network's only layer.  None are computed by
    a slot table: one layer's call saves nothing."""

    def __init__(self, experts: RoutedExperts, layer: int, count: int):
        self._experts, self._layer = experts, layer
        self._none_1E = torch.full((1, count), -1, dtype=torch.int32)

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        return self._experts(self._layer + layer, x_TD, weights_TK, indices_TK)

    def slot_table(self) -> SlotTable:
        return self._experts.slot_table()._replace(slots_ME=self._none_1E, complete=False)

    def passed(self, layer: int, indices_MTK: Tensor, x_MTD: Tensor | None) -> None:
        self._experts.passed(self._layer + layer, indices_MTK, x_MTD)
