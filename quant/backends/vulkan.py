"""``VulkanBackend``: a Vulkan device with the shaders of ``slotmoe.quant.kernels.vulkan``.

Weights, experts in slots and latents lie in memory that torch does not know; they are named by its
addresses.  What the rest of the network sees of a pass lies in RAM.  A pass over up to 8 tokens is
one submit, from their ids to logits, that was recorded once; more go in tiles.  It stops by itself
at a layer whose experts are not all where shaders read them, and goes on when they are.

Shapes: T tokens, D hidden_size, V vocab_size, E routed experts, K experts a token, M MoE layers; of
latents L layers, S positions, X elements of a row.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from slotmoe.errors import ConfigError
from slotmoe.network.layer_types import Chunk, Ends, Geometry, Grouped, Layer, Mla
from slotmoe.network.state import GroupedCache, LatentCache
from slotmoe.quant.backends.base import Empty, Prepared, RoutedExperts, TorchBackend, new
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, Placed, Weight
from slotmoe.quant.export.layout import RecordLayout
from slotmoe.quant.kernels import vulkan as kernels
from slotmoe.quant.shapes import WIDENED
from slotmoe.system import Placement

_ALIGNMENT = 256  # bytes, of a tensor among others
_INT8 = 0
_DENSE = {torch.float32: 9, torch.float16: 10, torch.bfloat16: 11}
SCORINGS = "softmax", "sigmoid"


class DeviceRows:
    """Latent rows [L, S, X], float16, in a device's memory, in place of a tensor: a slice of S is a
    copy in RAM, and is assigned to from there.  Raises ``torch.OutOfMemoryError``."""

    dtype, itemsize = torch.float16, 2

    def __init__(self, vulkan: kernels.Vulkan, shape: tuple[int, ...]):
        self.shape, self._vulkan = shape, vulkan
        self.layer_bytes = 2 * shape[1] * shape[2]
        self.address = allocate(vulkan, shape[0] * self.layer_bytes)

    def _move(self, how: Callable[..., None], at: slice, host_LSX: Tensor) -> Tensor:
        place, size = self.address + 2 * self.shape[2] * (at.start or 0), host_LSX[0].nbytes
        if size:
            how(place, host_LSX.data_ptr(), self.shape[0], size, self.layer_bytes, size)
        return host_LSX

    def __getitem__(self, at: tuple[slice, slice]) -> Tensor:
        count = len(range(*at[1].indices(self.shape[1])))
        host_LSX = torch.empty(self.shape[0], count, self.shape[2], dtype=self.dtype)
        return self._move(self._vulkan.read, at[1], host_LSX)

    def __setitem__(self, at: tuple[slice, slice], rows_LSX: Tensor) -> None:
        self._move(self._vulkan.write, at[1], rows_LSX.contiguous())


def allocate(vulkan: kernels.Vulkan, nbytes: int) -> int:
    """The address of so much of the device's memory.  Raises ``torch.OutOfMemoryError``."""
    try:
        return vulkan.allocate(kernels.DEVICE, max(nbytes, 16)).address
    except kernels.VulkanError as problem:
        if problem.code != kernels.REFUSED:
            raise
        raise torch.OutOfMemoryError(str(problem)) from None


def place(vulkan: kernels.Vulkan, *tensors: Tensor) -> list[int]:
    """The addresses of copies of ``tensors``, side by side."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    starts = [*accumulate(sizes, initial=allocate(vulkan, sum(sizes)))]
    for start, tensor in zip(starts, tensors, strict=False):
        data = tensor.contiguous()
        vulkan.write(start, data.data_ptr(), 1, data.nbytes)
    return starts[:-1]


def _matrix(weight: Prepared | None) -> Any:
    assert weight is None or isinstance(weight, Placed)
    return kernels.Matrix(weight.kind, *weight.shape, *weight[2:]) if weight else kernels.Matrix()


class VulkanBackend(TorchBackend):
    """Of one model, and its decoder.  ``layout`` of its records is told before there is that."""

    kind = name = "vulkan"
    absorbs = decodes_all = embeds = True
    rows, at_once = 512, 1e9  # of a pass; products of the first of its submits
    layout: RecordLayout

    def __init__(self, vulkan: kernels.Vulkan):
        super().__init__()
        self.vulkan = vulkan
        # Positions, and of each row's latents the address and the bytes of a layer.
        self._places = np.zeros((3, self.rows), np.int64)
        names = "positions", "caches", "layer_bytes"
        places = {name: row.ctypes.data for name, row in zip(names, self._places, strict=True)}
        self._step = kernels.Step(**places)

    def run_on(self, placement: Placement) -> None:
        """What torch still does is small: a thread that waited for more of it would take a core."""
        torch.set_num_threads(1)

    def prepare(
        self, role: str, weight: Weight, empty: Empty = new, head: tuple[int, int] = (0, 0)
    ) -> Prepared:
        """Norms and gates stay in RAM until ``decoder``."""
        if isinstance(weight, Int8Weight):
            kind, parts = _INT8, [weight.q, weight.scale]
        elif isinstance(weight, CodedWeight):
            kind, parts = weight.kind, [weight.codes, weight.scales, weight.levels]
        elif weight.dim() == 1 or role in WIDENED:
            return super().prepare(role, weight, empty, head)
        else:
            kind, parts = _DENSE[weight.dtype], [weight]
        N, K = weight.shape
        return Placed(kind, (N, K), *place(self.vulkan, *parts))

    def embed(self, ids_T: Tensor, weight: Prepared) -> Tensor:
        """Memory for the residual stream of several chunks, which read the table by their ids."""
        return torch.empty(len(ids_T), weight.shape[1])

    def decoder(
        self, geometry: Geometry, layers: Sequence[Layer[Prepared]], ends: Ends[Prepared]
    ) -> "VulkanBackend":
        """Raises ``ConfigError`` for shapes that shaders do not take."""
        g, router, layout, head = geometry, geometry.router, self.layout, ends.head
        norm, levels = place(self.vulkan, ends.norm_D, layout.levels())
        natives = [self._layer(layer) for layer in layers]
        self._count, experts = len(layers), max(layer.gate.n for layer in natives)
        grouped, one = (0, False, False), layers[0].attention
        if g.grouped and isinstance(one, Grouped):
            by_row = one.q_norm is not None and len(one.q_norm) > g.grouped.Z
            grouped = g.grouped.G, g.grouped.norm_last, by_row
        codecs, scoring = layout.codecs, SCORINGS.index(router.scoring)
        model = kernels.Model(
            self.at_once, self.rows, len(layers), len(ends.norm_D), head.shape[0], *g[:5], g.halves,
            *grouped, g.eps, g.latent_eps, g.softmax_scale, ends.factor, experts,
            router.n_group, router.topk_group, router.top_k, router.group_best, scoring,
            router.normalized, router.factor, layout.moe_intermediate_size,
            codecs.gate_up.kind, codecs.down.kind,
            (*layout.gate_up_places, *layout.down_places), levels, _matrix(ends.embedding),
            _matrix(head), norm, (kernels.Layer * len(layers))(*natives),
            ends.frequencies_C.data_ptr(),
        )  # fmt: skip
        try:
            self._decoder = self.vulkan.decoder(model)
        except kernels.VulkanError:
            raise
        except ValueError as problem:
            told = f"this model's shapes are not computed on Vulkan yet ({problem})"
            raise ConfigError(f"{told}; use --device cpu") from None
        self._views = views = self._decoder.views
        shown = map(torch.from_numpy, (views.hidden, views.logits, views.indices))
        hidden_TD, logits_TV, indices_MTK = shown
        self._told = lru_cache(lambda T: (hidden_TD[:T], logits_TV[:T], indices_MTK[:, :T]))
        return self

    def _layer(self, layer: Layer[Prepared]) -> Any:
        """A layer's weights, with norms and gate on the device."""
        a, mlp, biases = layer.attention, layer.mlp, list[Tensor]()
        matrices: tuple[Prepared | None, ...]
        if isinstance(a, Grouped):
            assert not a.window and a.sinks is a.o_bias is a.q_gate is None
            norms, matrices = (a.q_norm, a.k_norm), (a.q_proj, None, a.k_proj, a.v_proj)
            biases += [part for part in (a.q_bias, a.k_bias, a.v_bias) if part is not None]
        else:
            assert isinstance(a, Mla) and a.indexer is None
            norms, matrices = (a.q_a_layernorm, a.kv_a_layernorm), (a.kv_a_proj, a.kv_b_proj)
            matrices = a.q_a_proj or a.q_proj, a.q_b_proj, *matrices
        kept = [layer.input_layernorm, *norms, layer.post_attention_layernorm, layer.gate]
        kept += [layer.gate_bias, torch.cat(biases) if biases else None]
        places = iter(place(self.vulkan, *(part for part in kept if part is not None)))
        *first, gate, bias, own = (0 if part is None else next(places) for part in kept)
        rows = (0, 0) if layer.gate is None else layer.gate.shape
        parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if mlp else (None, None, None)
        return kernels.Layer(
            *first, *map(_matrix, (*matrices, a.o_proj)),
            kernels.Matrix(_DENSE[torch.float32], *rows, gate), bias, own, *map(_matrix, parts),
        )  # fmt: skip

    def run_layers(self, chunk: Chunk, experts: RoutedExperts, stop: int | None = None) -> None:
        """All of them: where experts are missing they are brought and it goes on."""
        assert stop is None
        placed: Any = experts  # ``slotmoe.offload.devices.vulkan.PlacedExperts``
        views, step, ids_T, at = self._views, self._step, cast(Tensor, chunk.ids_T), 0
        T = len(ids_T)
        caches = cast(Sequence[LatentCache | GroupedCache], chunk.caches)
        for cache, before, count in zip(caches, chunk.before, chunk.counts, strict=True):
            held = cache.rows if isinstance(cache, GroupedCache) else cache.layers
            rows, first = cast(DeviceRows, held), cache.length + before
            self._places[0, at : at + count] = np.arange(first, first + count)
            self._places[1, at : at + count] = rows.address
            self._places[2, at : at + count] = rows.layer_bytes
            at += count
        ends = chunk.ends and T <= kernels.ROWS
        last, moe_layer, parts = views.logits_end if ends else views.hidden_end, 0, iter([False])
        step.rows, step.first, scale_T = T, views.begin, chunk.query_scale_T
        step.tokens = ids_T.data_ptr()
        step.query_scale = None if scale_T is None else scale_T.data_ptr()
        placed.write_addresses(views.table)
        while True:
            for more in parts:
                step.last = views.sums[moe_layer] if more else last
                self._decoder.run(step)
            if (moe_layer := int(views.stopped[0])) < 0:
                break
            parts = placed.bring(moe_layer, views.indices[moe_layer, :T].tolist(), views.table)
            step.first = views.gates[moe_layer]
        hidden_TD, logits_TV, indices_MTK = self._told(T)
        chunk.h_TD = chunk.h_TD.copy_(hidden_TD) if len(chunk.h_TD) else hidden_TD
        chunk.logits_TV = logits_TV if ends else None
        if chunk.timer is not None:
            chunk.timer.mark("captured layers")
        chunk.layer = self._count
        experts.passed(0, indices_MTK, None)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        """The head's, which ``linear`` computes with it: the same."""
        return x_TD

    def linear(self, x_TK: Tensor, weight: Prepared) -> Tensor:
        """The head's."""
        views, parts = self._views, list[Tensor]()
        for rows_TD in x_TK.contiguous().split(kernels.ROWS):
            given = {"rows": len(rows_TD), "hidden": rows_TD.data_ptr()}
            self._decoder.run(kernels.Step(first=views.hidden_end, last=views.logits_end, **given))
            parts.append(self._told(len(rows_TD))[1].clone())
        return torch.cat(parts)
