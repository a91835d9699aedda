"""What a model makes of gate and up reaches everything that computes an MLP or an expert."""

from dataclasses import replace

import torch

from slotmoe.model.config import config_among
from slotmoe.offload.engine import loading
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.shapes import SWIGLU, Activation
from tests.support import plain
from tests.support.oracle import relative
from tests.support.tiny import write_checkpoint

CLAMPED, FEW = Activation(0.1, 1.702, 1.0), [(7 * i) % 4096 for i in range(1, 13)]


def test_an_activation_holds_on_every_path_of_a_cpu(monkeypatch, tmp_path):
    def read(*arguments):
        return replace(config_among(*arguments), activation=activations[-1])

    activations, folder, bits = [CLAMPED], tmp_path / "tiny", []
    monkeypatch.setattr(loading, "config_among", read)
    write_checkpoint(folder, swiglu_limit=CLAMPED.limit, swiglu_alpha=CLAMPED.alpha)
    wanted = plain.logits(folder, FEW)
    with Runtime.open(folder, quantize=False, context=64) as runtime:
        assert relative(runtime.logits(FEW), wanted) <= 1e-4
    quantize(folder, tmp_path / "export", resident="int8")
    for options in ({}, {"slots": 6}, {"kernels": "torch"}):
        with Runtime.open(tmp_path / "export", context=64, **options) as runtime:
            bits.append(runtime.logits(FEW))
            assert relative(bits[-1], wanted) < 0.15
            text = runtime.encode("a b c")
            for token in runtime.generate("a b c", 3):  # decode, beside prefill
                assert token.id == int(runtime.logits(text)[-1].argmax())
                text.append(token.id)
    assert torch.equal(bits[0], bits[1])
    for other in (SWIGLU, CLAMPED._replace(alpha=1.0), CLAMPED._replace(offset=0.0)):
        activations.append(other)
        with Runtime.open(tmp_path / "export", context=64) as runtime:
            assert relative(runtime.logits(FEW), wanted) > 0.2
