"""``TorchBackend``: plain torch, on every device.

It dequantizes a slice of rows and multiplies.  The other backends extend it and are held to it:
``native`` for CPUs, ``triton`` for GPUs.

Shapes: T tokens, N rows out, K columns in or experts a token, D hidden_size, H heads, R
kv_lora_rank, E routed experts.
"""

import timeit
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.network import layer_types
from slotmoe.network.layer_types import (
    Chunk,
    Geometry,
    HyperGeometry,
    Layer,
    Mixed,
    Mixing,
    Pending,
    Router,
)
from slotmoe.network.shapes import SWIGLU, Activation
from slotmoe.network.state import Empty as Empty
from slotmoe.quant.backends.attention import TorchAttention
from slotmoe.quant.codecs.codec import TILE
from slotmoe.quant.codecs.weight import Int8Weight, Placed, Weight, dequantize, map_tensors, rows
from slotmoe.quant.export.layout import PROJECTIONS, RecordLayout
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.quant.kernels.cpu.weights import Absorbed, Matrix
from slotmoe.quant.kernels.cpu.weights import Prepared as Prepared
from slotmoe.system import Placement

_SLICE = 1 << 22  # weights dequantized at once, so that no temporary grows with a matrix


class Compiles:
    """Hears of each kernel that Triton compiles, once on a machine; another thread may ask."""

    count, running = 0, False  # kernels asked for; whether the last of them is not there yet

    def begin(self, **_: object) -> None:
        self.count, self.running = self.count + 1, True

    def end(self, **_: object) -> None:
        self.running = False


COMPILES = Compiles()


class Records:
    """Expert records side by side: ``slab`` uint8 [S, record_bytes], laid out by ``layout`` and
    coded by its ``levels`` (float32 [2, 16]), all on one device.  ``bound``: for native calls, once
    they have been there."""

    def __init__(self, slab: Tensor, layout: RecordLayout, levels: Tensor):
        self.slab, self.layout, self.levels = slab, layout, levels
        self.bound: bindings.ExpertSlab | None = None

    def mlp(self, slot: int) -> layer_types.Mlp[Prepared]:
        """The expert in row ``slot``, as views."""
        record, layout = self.slab[slot], self.layout
        gate, up, down = (layout.weight(record, name, self.levels) for name in PROJECTIONS)
        return layer_types.Mlp(gate, up, down, layout.biases(record))


class SlotTable(NamedTuple):
    """Which expert is in which row of ``records``: ``slots_ME``, int32 [MoE layers, E] on the
    device, -1 for an expert that is in none.  ``complete``: each expert has a slot, for good."""

    records: Records
    slots_ME: Tensor
    complete: bool


class RoutedExperts(Protocol):
    """The routed experts, wherever they are; what network and backend ask of them."""

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """The weighted sum of each token's experts, in gate order, float32 [T, D]."""

    def slot_table(self) -> SlotTable:
        """Where experts are now."""

    def passed(self, layer: int, indices_MTK: Tensor, x_MTD: Tensor | None) -> None:
        """The backend has computed M MoE layers from ``layer`` on by the slot table; the gates
        chose ``indices_MTK`` for ``x_MTD``, which it need not keep where all experts have slots."""


class Runner(Protocol):
    """Runs layers."""

    def run_layers(
        self, chunk: Chunk, experts: RoutedExperts, stop: int | None = None
    ) -> Pending | None:
        """Go on with ``chunk`` until a layer lacks an expert, which is returned, or up to the layer
        ``stop``, which is not begun, or to the end.

        It may compute layers whose experts all have slots (``slot_table``), and tells ``passed``.
        """


class Decoder(Runner, Protocol):
    """Runs layers for a few tokens of each sequence, each bitwise what it gives alone."""

    @property
    def rows(self) -> int:
        """Tokens that a pass may have."""


def unbound(weight: Prepared) -> Weight:
    """Raises ``TypeError`` for a weight that was prepared for another backend."""
    if isinstance(weight, Matrix | Absorbed | Placed):
        raise TypeError("a matrix that was prepared for other kernels is for these alone")
    return weight


def activated(gate_TI: Tensor, up_TI: Tensor, activation: Activation) -> Tensor:
    """What goes into the down projection, float32 [T, I], in the place of ``gate``."""
    limit, alpha, offset = activation
    if limit:
        gate_TI, up_TI = gate_TI.clamp(max=limit), up_TI.clamp(-limit, limit)
    if alpha == 1:
        F.silu(gate_TI, inplace=True)
    else:
        gate_TI.mul_((alpha * gate_TI).sigmoid_())
    return gate_TI.mul_(up_TI + offset if offset else up_TI)


def new(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a tensor, wherever torch finds it."""
    return torch.empty(shape, dtype=dtype)


class TorchBackend(TorchAttention):
    """Plain torch on any device; products in ``compute``: float32 on a CPU, bfloat16 on CUDA.

    ``absorbs``: whether attention takes the absorbed form always, so that decode and prefill agree.
    ``embeds``: the decoder goes from ids on, and rotates.  ``decodes_all``: it runs passes of any
    length, and ``linear`` is its head.
    ``activation`` is that of every MLP.
    """

    kind = name = "torch"
    absorbs = decodes_all = embeds = False

    def __init__(self, compute: torch.dtype = torch.float32, activation: Activation = SWIGLU):
        self.compute, self.activation = compute, activation

    @property
    def threads(self) -> int:
        """CPU threads that the products use."""
        return torch.get_num_threads()

    def run_on(self, placement: Placement) -> None:
        """Use these CPU threads.  torch's own run where the thread may that makes them."""
        torch.set_num_threads(placement.threads)

    def prepare(
        self, role: str, weight: Weight, empty: Empty = new, head: tuple[int, int] = (0, 0)
    ) -> Prepared:
        """A copy of the weight as these ops want it, in memory from ``empty(shape, dtype)``;
        ``role`` as in ``slotmoe.quant.shapes``; N and V rows of an absorbed one are a head's."""
        return map_tensors(weight, lambda x: empty(tuple(x.shape), x.dtype).copy_(x))

    def read_bandwidth(self, memory: Tensor) -> float:
        """Bytes a second, median of 5, at which the device reads present ``memory``, uint8."""
        seconds = timeit.repeat(lambda: self._read(memory), number=1, repeat=6)
        return memory.nbytes / median(seconds[1:])

    def _read(self, memory: Tensor) -> None:
        memory[: memory.nbytes // 8 * 8].view(torch.int64).sum().item()  # which waits for a GPU

    def linear(self, x_TK: Tensor, weight: Prepared) -> Tensor:
        """``x @ weight.T``, float32 [T, N]."""
        x_TK, plain = x_TK.to(self.compute), unbound(weight)
        N, K = plain.shape
        step = max(TILE, _SLICE // K // TILE * TILE)
        y_TN = torch.empty(len(x_TK), N, dtype=torch.float32, device=x_TK.device)
        for start in range(0, N, step):
            stop = min(start + step, N)
            slice_NK = dequantize(rows(plain, start, stop)).to(self.compute)
            y_TN[:, start:stop] = F.linear(x_TK, slice_NK)
        return y_TN

    def grouped_linear(self, x_TGK: Tensor, weight: Prepared) -> Tensor:
        """Each of G groups times its rows of ``weight`` [G O, K] alone: float32 [T, G, O]."""
        plain, groups = unbound(weight), x_TGK.shape[1]
        count = plain.shape[0] // groups
        parts = (rows(plain, g * count, (g + 1) * count) for g in range(groups))
        return torch.stack([self.linear(x_TGK[:, g], part) for g, part in enumerate(parts)], dim=1)

    def normed_linear(self, x_TK: Tensor, norm_K: Tensor, eps: float, weight: Prepared) -> Tensor:
        """``linear`` of the rows' RMS norms."""
        return self.linear(self.rms_norm(x_TK, norm_K, eps), weight)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        """RMS norm over the last dimension, float32 [T, D], times the weight if there is one."""
        return F.rms_norm(x_TD, x_TD.shape[-1:], weight_D, eps)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """Norm by mean and variance over the last dimension, float32 [T, D]."""
        return F.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, eps)

    def mlp(self, x_TD: Tensor, weights: layer_types.Mlp[Prepared]) -> Tensor:
        """``down`` of what ``activated`` makes of ``gate`` and ``up``, float32 [T, D]."""
        gate_TI, up_TI = self.linear(x_TD, weights.gate_proj), self.linear(x_TD, weights.up_proj)
        if weights.biases is not None:
            gate_TI, up_TI = gate_TI.add_(weights.biases[0]), up_TI.add_(weights.biases[1])
        y_TD = self.linear(activated(gate_TI, up_TI, self.activation), weights.down_proj)
        if weights.biases is not None:
            y_TD += weights.biases[2]
        if weights.output_gate is not None:
            y_TD *= self.linear(x_TD, weights.output_gate).sigmoid()
        return y_TD

    def embed(self, ids_T: Tensor, weight: Prepared) -> Tensor:
        """Rows ``ids`` of the table, float32 [T, D]."""
        if isinstance(weight, Int8Weight):
            return weight.q[ids_T].float() * weight.scale[ids_T, None]
        if isinstance(weight, Tensor):
            return weight[ids_T].float()
        if not isinstance(weight, Matrix) or len(weight.tensors) != 2:
            raise TypeError("an embedding table is gathered row by row, so it is never coded")
        tiles, scale = weight.tensors  # the head is multiplied by it too
        rows_TBCX: Tensor = tiles.unflatten(-1, (-1, TILE, 4))[ids_T // TILE, :, :, ids_T % TILE]
        return rows_TBCX.flatten(1)[:, : weight.shape[1]].float() * scale[ids_T, None]

    def rotations(self, positions_T: Tensor, frequencies_C: Tensor, scale: float = 1.0) -> Tensor:
        """What rotates the pairs at each position, complex [T, C], times ``scale``; on a CPU with
        the kernels the same bits on every system."""
        if positions_T.device.type == "cpu" and (native := bindings.load()) is not None:
            return native.rotations(positions_T, frequencies_C, scale)
        angles_TC = positions_T[:, None] * frequencies_C
        return torch.polar(torch.full_like(angles_TC, scale), angles_TC)

    def rotate(self, x_THP: Tensor, table_TC: Tensor, halves: bool) -> Tensor:
        """Pairs (x0, x1), (x2, x3), ..., or of the two ``halves``, times the complex table
        [T, P / 2]: float32 [T, H, P]."""
        if halves:
            pairs = torch.complex(*x_THP.chunk(2, dim=-1)) * table_TC[:, None]
            return torch.cat([pairs.real, pairs.imag], dim=-1)
        pairs = torch.view_as_complex(x_THP.contiguous().view(*x_THP.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table_TC[:, None]).flatten(-2)

    def absorb_query(self, q_THN: Tensor, kv_b: Prepared) -> Tensor:
        """Each head's query times its first N rows of kv_b [H (N + V), R]: float32 [T, H, R]."""
        _, H, N = q_THN.shape
        heads_HXR = dequantize(unbound(kv_b)).view(H, -1, kv_b.shape[1])
        return torch.bmm(q_THN.transpose(0, 1), heads_HXR[:, :N]).transpose(0, 1)

    def absorb_value(self, o_THR: Tensor, kv_b: Prepared, N: int) -> Tensor:
        """Each head's latent output through its last V rows of ``kv_b``: float32 [T, H, V]."""
        _, H, R = o_THR.shape
        heads_HXR = dequantize(unbound(kv_b)).view(H, -1, R)
        return torch.bmm(o_THR.transpose(0, 1), heads_HXR[:, N:].transpose(1, 2)).transpose(0, 1)

    def expand(self, latent_BR: Tensor, kv_b: Prepared) -> Tensor:
        """Keys and values of all heads, float32 [B, H * (N + V)]."""
        return TorchBackend.linear(self, latent_BR, kv_b)

    def compress(self, both_BS2Y: Tensor, bias_SY: Tensor, norm_Y: Tensor, eps: float) -> Tensor:
        """One row of each S, float32 [B, Y]: their mean, which is the first of ``both``, weighted
        in each column by the softmax of the second + ``bias``, normed (DeepSeek-V4)."""
        kv_BSY, gate_BSY = both_BS2Y.unbind(2)
        weights_BSY = (gate_BSY + bias_SY).softmax(dim=1)
        return self.rms_norm((kv_BSY * weights_BSY).sum(dim=1), norm_Y, eps)

    def mix(self, h_TD: Tensor, mixing: Mixing, hyper: HyperGeometry) -> tuple[Tensor, Mixed]:
        """What a block reads of Q residual streams side by side, float32 [T, D], and how they take
        in what it gives (arXiv 2512.24880): Sinkhorn and Knopp make a matrix doubly stochastic."""
        Q, iterations, small, eps = hyper
        streams_TQD = h_TD.unflatten(-1, (Q, -1))
        logits_TX = TorchBackend.rms_norm(self, h_TD, None, eps) @ mixing.fn.t()
        parts_X = logits_TX.split([Q, Q, Q * Q], dim=-1), mixing.base.split([Q, Q, Q * Q])
        pre_TQ, post_TQ, comb_TX = (
            part * scale + base for part, base, scale in zip(*parts_X, mixing.scale, strict=True)
        )
        pre_TQ, post_TQ = pre_TQ.sigmoid() + small, 2 * post_TQ.sigmoid()
        comb_TQQ = comb_TX.unflatten(-1, (Q, Q)).softmax(dim=-1) + small
        comb_TQQ = comb_TQQ / (comb_TQQ.sum(dim=-2, keepdim=True) + small)
        for _ in range(iterations - 1):
            comb_TQQ = comb_TQQ / (comb_TQQ.sum(dim=-1, keepdim=True) + small)
            comb_TQQ = comb_TQQ / (comb_TQQ.sum(dim=-2, keepdim=True) + small)
        return (pre_TQ[..., None] * streams_TQD).sum(dim=1), Mixed(post_TQ, comb_TQQ)

    def add_mixed(self, y_TD: Tensor, h_TD: Tensor, mixed: Mixed) -> Tensor:
        """The residual streams after a block that has given ``y``, float32 like ``h``."""
        post_TQ, comb_TQQ = mixed
        streams_TQD = comb_TQQ.transpose(1, 2) @ h_TD.unflatten(-1, (post_TQ.shape[-1], -1))
        mixed_TQD: Tensor = streams_TQD + post_TQ[..., None] * y_TD[:, None]
        return mixed_TQD.flatten(1)

    def collapse(self, h_TD: Tensor, mixing: Mixing, hyper: HyperGeometry) -> Tensor:
        """What the output head reads of the residual streams, float32 [T, D]."""
        logits_TQ = TorchBackend.rms_norm(self, h_TD, None, hyper.eps) @ mixing.fn.t()
        weights_TQ = (logits_TQ * mixing.scale + mixing.base).sigmoid() + hyper.small
        weighted_TQD: Tensor = weights_TQ[..., None] * h_TD.unflatten(-1, (hyper.Q, -1))
        return weighted_TQD.sum(dim=1)

    def route(
        self, logits_TE: Tensor, router: Router, bias_E: Tensor | None, chosen_TK: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """What ``slotmoe.model.layers.route`` gives, or None without a kernel."""
        return None

    def decoder(
        self,
        geometry: Geometry,
        layers: Sequence[Layer[Prepared]],
        ends: layer_types.Ends[Prepared],
    ) -> Decoder | None:
        """What runs passes over a few tokens of each sequence, each bitwise what the operations
        give for it alone; None where the network shall run them so."""
        return None

    def experts(
        self, x_TD: Tensor, records: Records, slots_E: Tensor, indices_TK: Tensor, y_TKD: Tensor
    ) -> None:
        """Each token's experts that have a slot: outputs, unweighted, in ``y`` (float32 [T, K, D]).

        ``slots``, int32 [E], says which of ``records`` each expert of the layer is in.  Where it is
        -1 the outputs are left as they are, so experts may come in several calls; a call takes all
        uses of an expert.  On a GPU the host waits for nothing.  With kernels an output depends on
        its token and record alone, bitwise; by torch its last bits depend on the number of rows.
        """
        slots_TK = slots_E[indices_TK]
        for slot in slots_TK[slots_TK >= 0].unique().tolist():
            uses = (slots_TK == slot).nonzero(as_tuple=True)
            y_TKD[uses] = self.mlp(x_TD[uses[0]], records.mlp(slot))

    def outputs(self, x_TD: Tensor, indices_TK: Tensor) -> Tensor:
        """Memory for what ``experts`` gives, float32 [T, K, D], until the next layer."""
        return torch.empty(*indices_TK.shape, x_TD.shape[1], device=x_TD.device)

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        """Sum over K of weight times output, float32 [T, D].  The order of additions is the gate's,
        never that of arrival, so the result is bitwise the same for every cache."""
        total = y_TKD[:, 0] * weights_TK[:, 0, None]
        for k in range(1, y_TKD.shape[1]):
            total = total + y_TKD[:, k] * weights_TK[:, k, None]
        return total
