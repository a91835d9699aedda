"""Trains an export's predictor (``slotmoe.offload.predictor``) on text: reads it, watches the
gates, learns to name their choices.

The text goes through the prefill path in windows, each a sequence of its own.  Of every token but a
window's first, what the predictor will see (embedding, the last hidden state before it, the input
of each MoE layer) and what the gates chose are kept in 16 bits, as many tokens as a quarter of the
free memory holds; on these the predictor is trained, then come the next.  Windows are read in
random order, so that each such group is a fair sample of all texts.

The loss is binary cross-entropy, so that ``sigmoid(score)`` is a probability; least squares, as in
a first trial, ranks worse.  The last 5% of each text are not trained on: they give the reported
recall, computed by the quantized predictor.

Shape legend: T tokens, B a batch of them, D hidden_size, L MoE layers (rows), E experts, K experts
a token, R and Q the predictor's widths.
"""

import codecs
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.errors import ConfigError, reading
from slotmoe.jsonfile import Json
from slotmoe.model.config import Config
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.experts.experts import Route
from slotmoe.offload.machine import available_memory, process_bytes
from slotmoe.offload.model_source import read_model
from slotmoe.offload.plan.memory import PREFILL_CHUNK
from slotmoe.offload.predictor import Predictor, rms
from slotmoe.offload.runtime import Runtime
from slotmoe.quant import int8
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.export.layout import predictor_parts
from slotmoe.quant.export.writer import write_predictor
from slotmoe.system import cores

MIN_TOKENS = 5000
_WINDOW = 1024  # tokens read as one sequence
TOKEN_WIDTH, _LAYER_WIDTHS, _LAYER_BYTES = 1024, (256, 128, 64), 4 << 20
_BATCH, EPOCHS, MIN_STEPS = 512, 6, 300
_BYTES_A_PARAMETER = 20  # float32 weight, gradient, two moments, and a copy while it is quantized


def read_text(path: Path, limit: int = -1) -> str:
    """A text file whole, or the characters that end in its first ``limit`` bytes.  Raises
    ``ConfigError`` if it can't be read, is empty or no UTF-8."""
    expected = "; a text file in UTF-8 is expected here"
    with reading(path, ConfigError, advice=expected), path.open("rb") as file:
        data = file.read(limit)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) != limit)
    except UnicodeDecodeError as problem:
        reason = f"byte {problem.start} is not UTF-8 (try iconv -f latin1 -t utf-8)"
        raise ConfigError(f"{path}: {reason}{expected}") from None
    if not text.strip():
        raise ConfigError(f"{path}: is empty; give text like what the model will read and write")
    return text


def read_tokens(texts: Sequence[Path], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each file.  Raises ``ConfigError`` like ``read_text``, or for too few."""
    tokens = [tokenizer.encode(read_text(path), add_bos=False) for path in texts]
    count = sum(map(len, tokens))
    if count < MIN_TOKENS:
        needed = f"calibration needs {MIN_TOKENS} or more (100,000 do well)"
        raise ConfigError(f"{', '.join(map(str, texts))}: {count} tokens of text, {needed}")
    return tokens


def split(ids: list[int], tokenizer: Tokenizer, width: int) -> list[list[int]]:
    """Sequences of 2 to ``width`` tokens, each with the tokenizer's beginning."""
    step = width - len(tokenizer.begin)
    windows = [tokenizer.begin + ids[start : start + step] for start in range(0, len(ids), step)]
    return [window for window in windows if len(window) > 1]


class Samples:
    """The predictor's input of T tokens, float16 of mean square 1, and the gates' choices."""

    def __init__(self, config: Config, tokens: int):
        D, L = config.hidden_size, len(config.moe_layers)
        # Embedding and last hidden state before it; input of each MoE layer with a next; experts.
        self.token = torch.empty(tokens, 2 * D, dtype=torch.float16)
        self.inputs = torch.empty(L - 1, tokens, D, dtype=torch.float16)
        self.used = torch.empty(tokens, L, config.num_experts_per_tok, dtype=torch.int16)

    @staticmethod
    def bytes_per_token(config: Config) -> int:
        L = len(config.moe_layers)
        return 2 * ((L + 1) * config.hidden_size + L * config.num_experts_per_tok)


def record(
    runtime: Runtime, windows: Sequence[list[int]], advance: Callable[[int], None] = lambda _: None
) -> Samples:
    """Read each window as a sequence of its own and record it; its first token, before which
    nothing was, is no sample.  ``advance(samples)`` is called after each."""
    model, samples = runtime.model, Samples(runtime.config, _count(windows))
    done, skip = 0, 0

    def on_layer(route: Route) -> None:
        assert route.x_TD is not None
        span = slice(done, done + len(route.x_TD) - skip)
        if route.row < len(samples.inputs):
            samples.inputs[route.row, span] = rms(route.x_TD[skip:]).to(samples.inputs)
        samples.used[span, route.row] = torch.tensor(route.indices)[skip:].to(samples.used)

    experts, call = model.quantized("calibrate"), runtime.engine.call
    stop_listening = call(lambda: experts.on_layer(on_layer, inputs=True))
    try:
        for window in windows:
            skip, last_1D = 1, torch.empty(0, runtime.config.hidden_size, device=runtime.device)
            pieces = torch.tensor(window, device=runtime.device).split(PREFILL_CHUNK)
            hiddens = runtime.hidden(window, PREFILL_CHUNK)
            for ids_T, streams_TD in zip(pieces, hiddens, strict=True):
                hidden_TD = call(partial(model.network.collapse, streams_TD))
                embedding_TD = call(partial(model.backend.embed, ids_T, model.network.embed_tokens))
                before_TD = torch.cat([last_1D, hidden_TD])[:-1]
                token_TX = torch.cat([rms(embedding_TD[skip:]), rms(before_TD)], dim=-1)
                samples.token[done : done + len(token_TX)] = token_TX.to(samples.token)
                done, skip, last_1D = done + len(token_TX), 0, hidden_TD[-1:]
            advance(len(window) - 1)
    finally:
        call(stop_listening)
    return samples


def recall(scores_TRE: Tensor, used_TRK: Tensor, guesses: Sequence[int]) -> list[float]:
    """Share of the used experts among the n best scores, over all tokens and rows, for each n."""
    named = torch.zeros(scores_TRE.shape, dtype=torch.bool).scatter_(-1, used_TRK.long(), True)
    hits = named.gather(-1, scores_TRE.topk(max(guesses), dim=-1).indices)
    return [hits[..., :n].sum().item() / used_TRK.numel() for n in guesses]


def measure(
    predictor: Predictor, samples: Samples, guesses: Sequence[int]
) -> dict[str, list[float]]:
    """Recall with each number of guesses of both horizons (``token``, ``layer``), of the next
    layer's without the token's (``layer_alone``), and of always guessing ``popular`` experts."""
    totals = defaultdict[str, Tensor](lambda: torch.zeros(len(guesses)))
    layer_scores = predictor.layer_scores
    for start in range(0, len(samples.token), 4096):
        part = slice(start, start + 4096)
        used_TLK, inputs_RTD = samples.used[part], samples.inputs[:, part]
        token_TLE = predictor.token_scores(*samples.token[part].chunk(2, dim=-1))
        popular_LE = torch.tensor(predictor.popularity).view(token_TLE.shape[1:])
        rows = list(enumerate(inputs_RTD))
        scored = {
            "token": list(token_TLE.unbind(1)),
            "popular": list(popular_LE.expand_as(token_TLE).unbind(1)),
            "layer": [layer_scores(row, x_TD, token_TLE[:, row + 1]) for row, x_TD in rows],
            "layer_alone": [layer_scores(row, x_TD) for row, x_TD in rows],
        }
        for name, scores in scored.items():
            if scores:  # a model of one MoE layer has no next
                shares = recall(torch.stack(scores, 1), used_TLK[:, -len(scores) :], guesses)
                totals[name] += torch.tensor(shares) * len(used_TLK)
    return {name: (total / len(samples.token)).tolist() for name, total in totals.items()}


class _Net:
    """The predictor in training, its ``tensors`` named as in the file.  Matrices begin uniform, the
    last biases where every expert is as likely as any other."""

    def __init__(self, config: Config, steps: int, seed: int, device: torch.device):
        self._step, self._steps, self._device = 0, steps, device
        self._generator = torch.Generator().manual_seed(seed)
        L, E, K = len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok
        self.rows, self.parts = L, predictor_parts(config.hidden_size, L, E, *widths(config))
        self.tensors: dict[str, Tensor] = {}
        groups = []
        for name, part in self.parts.items():
            rate, decay = 0.002, 0.0
            if name.endswith(".weight"):
                uniform = torch.rand(part.shape, generator=self._generator) * 2 - 1
                value = uniform * part.shape[-1] ** -0.5
                rate, decay = 1 / part.shape[-1], 0.1
            elif name.endswith(".bias"):
                likely = math.log(K / max(E - K, 1)) if ".out." in name else 0.0
                value = torch.full(part.shape, likely)
            elif name == "layer.mix":
                value = torch.tensor([0.5, 0.5, 0.0]).repeat(L - 1, 1)
            else:
                continue  # what is counted, and scales
            self.tensors[name] = tensor = value.to(device).requires_grad_()
            groups.append({"params": [tensor], "lr": rate, "rate": rate, "weight_decay": decay})
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))

    def loss(self, token_BX: Tensor, inputs_RBD: Tensor, used_BLK: Tensor) -> Tensor:
        """Cross-entropies of both horizons and their mixture, summed over experts, a token."""
        w = self.tensors
        hidden_BR = F.silu(F.linear(token_BX, w["token.in.weight"], w["token.in.bias"]))
        scores_BX = F.linear(hidden_BR, w["token.out.weight"], w["token.out.bias"])
        token_BLE = scores_BX.unflatten(-1, (self.rows, -1))
        target_BLE = torch.zeros_like(token_BLE).scatter_(-1, used_BLK, 1.0)
        total = _cross_entropy(token_BLE, target_BLE)
        if self.rows > 1:
            bias_in, bias_out = w["layer.in.bias"][:, None], w["layer.out.bias"][:, None]
            hidden_RBQ = F.silu(torch.baddbmm(bias_in, inputs_RBD, w["layer.in.weight"].mT))
            layer_RBE = torch.baddbmm(bias_out, hidden_RBQ, w["layer.out.weight"].mT)
            layer_BRE, target_BRE = layer_RBE.transpose(0, 1), target_BLE[:, 1:]
            both = layer_BRE.detach(), token_BLE[:, 1:].detach(), torch.ones_like(target_BRE)
            mixed_BRE1 = torch.stack(both, -1) @ w["layer.mix"][..., None]
            total = total + _cross_entropy(layer_BRE, target_BRE)
            total = total + _cross_entropy(mixed_BRE1[..., 0], target_BRE)
        return total

    def train(self, samples: Samples, epochs: int, advance: Callable[[int], None]) -> None:
        """AdamW with a rate of 1 / inputs for each matrix (arXiv 2203.03466), a short warm-up and a
        cosine to zero, over all calls."""
        for _ in range(epochs):
            order = torch.randperm(len(samples.token), generator=self._generator)
            for batch in order.split(_BATCH):
                self._step += 1
                share = self._step / self._steps
                cosine = 0.5 + 0.5 * math.cos(math.pi * share)
                for group in self._optimizer.param_groups:
                    group["lr"] = group["rate"] * min(1.0, 20 * share) * cosine
                token_BX = samples.token[batch].to(self._device, torch.float32)
                inputs_RBD = samples.inputs[:, batch].to(self._device, torch.float32)
                used_BLK = samples.used[batch].to(self._device, torch.int64)
                loss = self.loss(token_BX, inputs_RBD, used_BLK)
                self._optimizer.zero_grad()
                loss.backward()
                self._optimizer.step()
                advance(len(batch))

    def quantized(self, popularity: Tensor) -> dict[str, Tensor]:
        """As the file holds them."""
        tensors = {"popularity": popularity}
        for name, value in self.tensors.items():
            tensors[name] = value = value.detach().cpu()
            if name.endswith(".weight"):
                q, scale = int8.quantize(value.flatten(0, -2))
                tensors[name] = q.view(value.shape)
                tensors[name + ".scale"] = scale.view(value.shape[:-1])
        return {name: tensors[name] for name in self.parts}


def _cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, target, reduction="sum") / len(scores)


def widths(config: Config) -> tuple[int, int]:
    """R, and the largest Q whose matrices take at most ``_LAYER_BYTES``, or the smallest."""
    D, L, E = config.hidden_size, len(config.moe_layers), config.n_routed_experts
    fitting = [width for width in _LAYER_WIDTHS if (L - 1) * width * (D + E) <= _LAYER_BYTES]
    return TOKEN_WIDTH, fitting[0] if fitting else _LAYER_WIDTHS[-1]


def calibrate(
    folder: Path,
    texts: Sequence[Path],
    progress: Callable[[int, int], None] = lambda *_: None,
    *,
    threads: int | None = None,
    seed: int = 0,
) -> Json:
    """Train a predictor for the export in ``folder`` on text files and put it there.

    Returns what was reached on the text kept back: ``tokens`` (trained on), ``held_back`` (tokens),
    ``guesses`` (a layer: K, 1.5 K, 2 K), ``recall`` by horizon (``measure``), ``bytes``.
    ``progress(done, total)`` is in bytes of text. The same text, seed and threads give the same
    bytes.  Killed, it leaves the export as it was.

    Raises ``ConfigError`` for bad text, ``ExportError``, and ``PlanError`` for too little memory.
    """
    config, tokenizer = read_model(folder)
    L, E, K = len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok
    training, held_back = _windows(config, tokenizer, texts, seed)
    tokens, kept_back = _count(training), _count(held_back)
    groups = grouped(training, available_memory() // 4 // Samples.bytes_per_token(config))
    epochs = max(EPOCHS, math.ceil(MIN_STEPS * _BATCH / tokens))
    text_bytes, done = sum(path.stat().st_size for path in texts), 0
    total = epochs * (2 * tokens + kept_back)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(text_bytes * done // total, text_bytes)

    def read(count: int) -> None:
        advance(epochs * count)  # reading takes about as long as training

    ram = _ram_left(config, [*groups, held_back])
    context = max(len(window) for window in [*training, *held_back])
    with Runtime.open(folder, ram=ram, context=context, threads=threads) as runtime:
        steps = epochs * sum(math.ceil(_count(group) / _BATCH) for group in groups)
        net = _Net(config, steps, seed, runtime.device)
        uses = torch.zeros(L * E)
        for group in groups:
            samples = record(runtime, group, read)
            ids = samples.used.long() + torch.arange(L)[:, None] * E
            uses += ids.flatten().bincount(minlength=L * E)
            with _torch_threads(threads):
                net.train(samples, epochs, advance)
        tensors = net.quantized(uses / tokens)
        samples = record(runtime, held_back, read)
    guesses = [min(E, math.ceil(K * share)) for share in (1, 1.5, 2)]
    with _torch_threads(threads):
        shares = measure(Predictor(tensors, K, TorchBackend()), samples, guesses)
    write_predictor(folder, tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    counts = {"tokens": tokens, "held_back": kept_back}
    return {**counts, "guesses": guesses, "recall": shares, "bytes": size}


def _ram_left(config: Config, groups: Sequence[Sequence[list[int]]]) -> int:
    """Bytes of RAM that samples and training leave for the runtime."""
    D, L, E = config.hidden_size, len(config.moe_layers), config.n_routed_experts
    parts = predictor_parts(D, L, E, *widths(config)).values()
    parameters = sum(math.prod(part.shape) for part in parts)
    kept = max(sum(map(len, group)) for group in groups) + 4 * _BATCH
    taken = kept * Samples.bytes_per_token(config) + _BYTES_A_PARAMETER * parameters
    return int(available_memory() * 0.9) + process_bytes() - taken


def _windows(
    config: Config, tokenizer: Tokenizer, texts: Sequence[Path], seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The windows to train on, in random order, and those of the last 5% of each text."""
    width = min(_WINDOW, config.max_position_embeddings)
    training, held_back = list[list[int]](), list[list[int]]()
    for ids in read_tokens(texts, tokenizer):
        end = len(ids) - len(ids) // 20
        training += split(ids[:end], tokenizer, width)
        held_back += split(ids[end:], tokenizer, width)
    random.Random(seed).shuffle(training)
    if not held_back:  # many tiny texts
        held_back.append(training.pop())
    return training, held_back


def _count(windows: Sequence[list[int]]) -> int:
    """Samples in the windows: a window's first token is none."""
    return sum(len(window) - 1 for window in windows)


def grouped(windows: list[list[int]], capacity: int) -> list[list[list[int]]]:
    """Windows in order, in as few and as equal groups as hold about ``capacity`` tokens."""
    count = max(1, math.ceil(sum(map(len, windows)) / max(capacity, 1)))
    size = math.ceil(len(windows) / count)
    return [windows[start : start + size] for start in range(0, len(windows), size)]


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    """Torch's threads for training; the runtime leaves it one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
