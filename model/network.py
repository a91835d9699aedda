"""The network of DeepSeek-V2 (arXiv 2405.04434) and of the families of ``slotmoe.model.families``:
their attention, and DeepSeekMoE.

A pass is over one or several sequences, with some tokens of each.  Activations are float32.  What
it asks of the routed experts is in ``slotmoe.quant.backends.base``.

Shapes: T tokens of this pass, D hidden_size, C half of qk_rope_head_dim, V vocabulary rows; of the
head that predicts one token more R rows, P a piece of them, E routed experts, K a token, M MoE
layers.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from operator import add
from typing import Any, TypeAlias

import torch
from torch import Tensor

from slotmoe.model import names
from slotmoe.model.attention_config import Rope
from slotmoe.model.config import Config
from slotmoe.model.layers import LayerByLayer, as_tensor, geometry_of, layer_of
from slotmoe.model.names import EMBEDDING, FINAL_NORM, HEAD, HEAD_MIX_PARTS, layer_tensor
from slotmoe.network.layer_types import Chunk, Ends, Mixing, Timer
from slotmoe.network.state import SequenceState
from slotmoe.quant.backends.base import Prepared, RoutedExperts, Runner, SlotTable, TorchBackend

States: TypeAlias = Sequence[SequenceState]
_PIECE = 512  # rows whose doubly wide input is in memory at once
_FEW = 15  # tokens that a decoder takes beside one of each sequence; more are a prompt's


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """RoPE's angle per position, float32 [dim / 2], by YaRN's ramp (arXiv 2309.00071, 3.2)."""
    plain = 1.0 / rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.factor == 1.0:
        return plain
    context = rope.original_max_position_embeddings

    def dimension(rotations: float) -> float:  # that makes so many over the original context
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, dim - 1)
    span = high - low if high != low else 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


class Positions:
    """Makes chunks: what positions make of tokens in each kind of layer, on ``where``'s device."""

    def __init__(self, config: Config, where: Tensor, backend: TorchBackend):
        def frequencies(rope: Rope) -> Tensor:
            angles_C = inverse_frequencies(rope, config.qk_rope_head_dim)
            return (angles_C * bool(config.family.rotated)).to(where.device)

        self._rope, compressed, self._backend = config.rope, config.compressed, backend
        self.frequencies_C = frequencies(config.rope)
        self._compressed_C = None if compressed is None else frequencies(compressed.rope)

    def chunk(self, h_TD: Tensor, *of: Any, embeds: bool = False) -> Chunk:
        """A chunk ``of`` the rest that ``Chunk`` begins with, from ``caches`` on.  A runner that
        ``embeds`` rotates by itself."""
        caches, before, counts, *_ = of
        chunk, scales = Chunk(h_TD, h_TD, None, *of), self._rope.llama_4_scaling_beta
        chunk.compressed_C = self._compressed_C
        if embeds and not scales and self._compressed_C is None:
            return chunk
        starts = [cache.length + count for cache, count in zip(caches, before, strict=True)]
        arange = partial(torch.arange, device=self.frequencies_C.device)
        positions_T = torch.cat([*map(arange, starts, map(add, starts, counts))]).float()
        if scales:
            lengths_T = torch.floor(positions_T / self._rope.original_max_position_embeddings)
            chunk.query_scale_T = 1 + scales * torch.log(1 + lengths_T)
        rotations = partial(self._backend.rotations, positions_T)
        if not embeds:
            chunk.rope_TC = rotations(self.frequencies_C, self._rope.table_scale)
        if self._compressed_C is not None:
            chunk.compressed_rope_TC = rotations(self._compressed_C)
        return chunk


def _chunk_bounds(states: States, counts: Sequence[int], size: int) -> list[int]:
    """Return where chunks of at most ``size`` tokens of a pass begin, and its end: each ends where
    a state can be marked.  ``counts`` are tokens of each state's sequence."""
    cuts, first = set[int](), 0
    for state, count in zip(states, counts, strict=True):
        cuts.update(first + length - state.length for length in state.cuts(count))
        first += count
    bounds = [0]
    for cut in sorted({*cuts, first}):
        while bounds[-1] < cut:
            bounds.append(min(bounds[-1] + size, cut))
    return bounds


class Network:
    """The network over weights in memory.  ``weights`` maps checkpoint names to whatever
    ``backend`` understands; norms and gates are float tensors.  A long pass goes through each
    layer in chunks of ``chunk_tokens``: experts serve all its tokens, temporaries are a chunk's."""

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, Prepared],
        backend: TorchBackend,
        experts: RoutedExperts,
        chunk_tokens: int = 1 << 30,
    ):
        self._chunk_tokens = chunk_tokens
        self.config, self.backend, self.experts = config, backend, experts
        self.embed_tokens = weights[EMBEDDING]
        self.layers = [
            layer_of(weights, index, config.window(index))
            for index in range(config.num_hidden_layers)
        ]
        self.norm = as_tensor(weights[FINAL_NORM])
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else weights[HEAD]
        self._mixing = None
        if config.hyper is not None:
            parts = (as_tensor(weights[part.name]).float() for part in HEAD_MIX_PARTS.values())
            self._mixing = Mixing(*parts)
        self._geometry = geometry_of(config)
        self._positions = Positions(config, self.norm, backend)
        self._layer_by_layer = LayerByLayer(self._geometry, self.layers, backend)
        weights_of = self.embed_tokens, self.norm, self.lm_head
        ends = Ends(*weights_of, self._positions.frequencies_C, config.rope.table_scale)
        self._decoder = backend.decoder(self._geometry, self.layers, ends)
        self._unread_0D = self.norm.new_empty(0, 1)
        self._ended: tuple[Tensor, Tensor | None] = self.norm, None  # what a pass gave, its logits
        # Tokens that a pass computes at most in calls that give each bitwise what it gives alone.
        self.rows: int = 0 if self._decoder is None else self._decoder.rows
        self.timer: Timer | None = None

    def forward(
        self, ids_T: Tensor, states: States, counts: Sequence[int] = (), h_TD: Tensor | None = None
    ) -> Tensor:
        """Append ``ids``, int64 [T], to the sequences of ``states``: ``counts`` of them to each, in
        order, or equally many.  Returns the residual stream after the last layer, float32 [T, D],
        or several side by side, which lasts until the next call; ``h_TD`` is that before the first
        one, if the ids do not say it.

        The states grow only when the whole pass is done, so a pass that raises can be repeated.
        """
        T, size, self._ended = ids_T.shape[0], self._chunk_tokens, (self.norm, None)  # freed
        counts = counts or [T // len(states)] * len(states)
        pairs = [*zip(states, counts, strict=True)]
        for state, count in pairs:
            state.begin(count)
        if self.timer is not None:
            self.timer.mark("rest")
        runner: Runner = self._layer_by_layer
        few = min(self.rows, size) >= T and T - len(states) <= _FEW
        if self._decoder and (few or self.backend.decodes_all):
            runner, size = self._decoder, min(size, self.rows)
        decodes = runner is self._decoder
        bounds = [0, T] if decodes and few else _chunk_bounds(states, counts, size)
        embeds = decodes and self.backend.embeds
        if h_TD is None:
            unread = embeds and len(bounds) == 2
            h_TD = self._unread_0D if unread else self.backend.embed(ids_T, self.embed_tokens)
            if self.config.hyper is not None and not unread:
                h_TD = h_TD.repeat(1, self.config.hyper.mult)
        chunks, ends = list[Chunk](), [*accumulate(counts, initial=0)]
        for start, stop in pairwise(bounds):
            of: Sequence[Any] = states, [0] * len(states), counts
            h_CD, ids_C = h_TD, ids_T
            if stop - start < T:
                h_CD, ids_C = h_TD[start:stop], ids_T[start:stop]
                parts = [  # a sequence, its tokens before this chunk, and those in it
                    (state, max(start, first) - first, min(end, stop) - max(start, first))
                    for state, first, end in zip(states, ends, ends[1:], strict=False)
                    if first < stop and start < end
                ]
                of = [*zip(*parts, strict=True)]
            chunks.append(self._positions.chunk(h_CD, *of, self.timer, ids_C, embeds=embeds))
        for chunk in chunks:
            chunk.waits = not few
        chunks[-1].ends, waiting = True, chunks
        while waiting:  # all chunks take a layer's experts before the next layer's
            waiting = [chunk for chunk in waiting if self._advance(chunk, runner)]
        for state, count in pairs:
            state.done(count)
        self._ended = chunks[-1].h_TD, chunks[-1].logits_TV
        return h_TD if len(chunks) > 1 else chunks[0].h_TD

    def _advance(self, chunk: Chunk, runner: Runner) -> bool:
        """Take a chunk to and through the next layer with experts; False if there is none."""
        if (pending := runner.run_layers(chunk, self.experts)) is None:
            return False
        chunk.routed_TD = self.experts(*pending)
        if chunk.waits:  # with the residual stream alone
            runner.run_layers(chunk, self.experts, stop=chunk.layer + 1)
        return chunk.layer < len(self.layers)

    def head(self, h_TD: Tensor) -> Tensor:
        """Logits, float32 [T, vocab], from rows of the residual stream after the last layer, or of
        several."""
        if self._mixing is not None and self._geometry.hyper is not None:
            h_TD = self.backend.collapse(h_TD, self._mixing, self._geometry.hyper)
        how = self.norm, self.config.rms_norm_eps, self.lm_head
        logits_TV = self.backend.normed_linear(h_TD, *how)
        if self.timer is not None:
            self.timer.mark("head")
        return logits_TV

    def head_each(self, h_TD: Tensor) -> Tensor:
        """``head``, each row bitwise what it gives alone; of all that a pass gave, until the next
        one.  torch multiplies a tied head, and its product of several rows differs from that of one
        in the last bit."""
        ended_TD, logits_TV = self._ended
        if h_TD is ended_TD and logits_TV is not None:
            return logits_TV
        by_torch = self.config.tie_word_embeddings and self.backend.kind != "native"
        most = 1 if by_torch else self.rows or len(h_TD)
        if len(h_TD) <= most:
            return self.head(h_TD)
        return torch.cat([self.head(rows_TD) for rows_TD in h_TD.split(most)])


class MtpHead:
    """The head of ``main`` that predicts one token more (multi-token prediction: DeepSeek-V3, arXiv
    2412.19437, section 2.2), over ``weights`` by checkpoint name: a network of one decoder layer
    behind the last one, with an embedding and an output of the model.

    From what the network made of token i, and the token that came as i + 1, it predicts token
    i + 2:

        x_i = eh_proj [enorm(embedding of token i + 1) ; hnorm(h_i)]
        logits = output head(norm(decoder layer(x_1 ... x_i)))

    DeepSeek-V4's does so with each residual stream s, which go through the layer and are collapsed
    by weights of its own:

        x_is = e_proj enorm(embedding of token i + 1) + h_proj hnorm(h_is)

    h_i of V3 is the residual stream after the last layer and the final norm, as other runtimes give
    it to the heads of published checkpoints; on which side of that norm, the paper does not say.
    """

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
        self.head = self._network.head_each

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
        return self._network.forward(ids_R, [state], [len(ids_R)], hidden_RD)


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
