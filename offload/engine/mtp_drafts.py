"""Drafts of one sequence by the head that predicts one token more (``slotmoe.model.mtp``).  Shapes:
R rows, D hidden_size."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from slotmoe.model.state import new_state
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.policy.drafts import Asking, Drafting

Compute = Callable[[Callable[[], Tensor]], Tensor]


class HeadDrafts:
    """The head's latents of a text, and what it expects next.

    A row needs the residual stream behind a token, which is only there when a pass has just
    computed it.  Where one is missing the head begins anew behind it: it sees less of the text
    then, and its drafts are worse, never the text.  ``compute`` runs a step on the device.
    """

    def __init__(self, model: LoadedModel, compute: Compute, drafting: Drafting):
        assert model.head is not None
        self._head, self._experts, self._device = model.head, model.experts, model.device
        self._compute, self._drafting = compute, drafting
        rows, empty = model.backend.latent_row, model.device.empty
        self._state = new_state(self._head.config, model.plan.context, rows, empty)
        self._first = 0  # the token that the state's first row is behind
        self._tokens: list[int] = []  # the text that its rows are of
        self._asking = Asking()

    def read(self, tokens: list[int], hidden_RD: Tensor) -> Tensor:
        """Append rows for the R tokens before the last one of ``tokens``; ``hidden_RD`` is the
        residual stream behind them, which is overwritten.  Returns the stream behind the head."""
        first = len(tokens) - 1 - len(hidden_RD)
        row = first - self._first
        goes_on = self._tokens[: first + 1] == tokens[: first + 1]
        if not (goes_on and 0 <= row <= self._state.length and self._state.reach(row) == row):
            self._first, row = first, 0
        self._state.cut(row)
        ids_R = self._device.upload(torch.tensor(tokens[first + 1 :]))

        def step() -> Tensor:
            self._experts.go_on(len(ids_R))
            return self._head.forward(hidden_RD, ids_R, self._state)

        stream_RD = self._compute(step)
        self._tokens = tokens
        return stream_RD

    def draft(self, tokens: list[int], hidden_RD: Tensor) -> tuple[list[int], list[float]]:
        """The token that is expected behind ``tokens``, and how likely it is; none where asking
        does not pay.  ``hidden_RD`` as in ``read``."""
        asking, drafting = self._asking, self._drafting
        asking.came(tokens)
        if not asking.pays(drafting):
            return [], []
        started = time.perf_counter()
        stream_RD = self.read(tokens, hidden_RD)
        expected = int(self._compute(lambda: self._head.head(stream_RD[-1:])).argmax())
        asking.answered(len(tokens), expected, time.perf_counter() - started)
        return [expected], [asking.chance]
