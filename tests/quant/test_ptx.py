"""What a GPU would run: the PTX of the kernels, on the CPU, by ``tests.support.ptx``.

Nightly every test of the Triton backend's operations, and of its decode step, runs so too, for
GPUs of several generations.  Those of compute capability 9.0 multiply the large tiles of many
tokens by instructions that the interpreter of PTX does not know.
"""

import re
import shutil
import time
from pathlib import Path
from types import FunctionType

import pytest
import torch

from slotmoe.quant import backends
from slotmoe.quant.weights import dequantize

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from triton.runtime import interpreter as interpreting

from tests.offload import test_gpu_steps as steps
from tests.quant import test_prefill, test_triton, test_triton_lists
from tests.quant.test_triton import DEVICE, attention, error, make_weight, randn
from tests.support.ptx import PtxError

pytestmark = [
    pytest.mark.usefixtures("emulator"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is here: it runs the kernels itself"),
    pytest.mark.skipif(
        not hasattr(interpreting, "_LangPatchScope"),
        reason="before Triton 3.6 nothing compiles where something was interpreted",
    ),
]
KEPT = Path(__file__).parents[2] / ".pytest_cache" / "ptx"


@pytest.fixture(scope="session")
def kept():
    """Where Triton keeps what it has compiled, for a day."""
    KEPT.mkdir(parents=True, exist_ok=True)
    for folder in KEPT.iterdir():
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)
    return KEPT


@pytest.fixture
def sm():
    return 89


@pytest.fixture
def emulator(sm, kept, monkeypatch, interpreter, processes):
    """Where the launches of the Triton backend go."""
    from slotmoe.quant.backends.triton import TritonBackend
    from tests.support.ptx_launch import emulated

    def made(device, limit, required):
        return TritonBackend(device, limit)

    monkeypatch.setattr(backends, "_triton_ops", made)
    torch.manual_seed(0)
    return emulated(monkeypatch, kept, sm)


@pytest.fixture
def ops(emulator):
    return backends.pick_backend(DEVICE, "triton")


@pytest.fixture
def triton_ops(ops):
    return ops


def linear(ops):
    """Of one token: the error of its product with an NF4 weight."""
    weight, x_1K = make_weight("nf4", 70, 576), randn(1, 576)
    return error(ops.linear(x_1K, weight), x_1K.double() @ dequantize(weight).double().T)


def attend(ops):
    """In sizes with which the latent rows are copied ahead."""
    q_1HW, rows_SW = randn(1, 20, 80) * 3, randn(290, 80).half()
    return error(ops.mla(q_1HW, rows_SW, 64, 0.2), attention(q_1HW, rows_SW, 64, 0.2))


RUNS = {"linear": (linear, 1e-6), "attend": (attend, 2e-3)}


def test_one_token(ops):
    assert linear(ops) < 1e-6 and attend(ops) < 2e-3
    test_triton.test_norm_logits_and_choice_in_one_launch(ops, 20)


def without(kernel, pattern, numbers=slice(None)):
    """An edit of PTX: of the places in a kernel that fit a pattern, some become nothing."""

    def edit(text):
        if f".entry {kernel}(" in text:
            for place in [*re.finditer(pattern, text)][numbers][::-1]:
                text = text[: place.start()] + text[place.end() :]
        return text

    return edit


@pytest.mark.parametrize("kernel", RUNS)
def test_without_barriers_numbers_are_wrong(ops, emulator, kernel):
    run, most = RUNS[kernel]
    emulator.edit = without(kernel, r"bar\.sync\s+0;")
    assert not run(ops) < most


def test_without_waits_for_what_is_copied_numbers_are_wrong(ops, emulator):
    emulator.edit = without("attend", r"cp\.async\.wait_group\s+\d+;")
    assert not attend(ops) < 2e-3


@pytest.mark.parametrize("kernel", RUNS)
def test_without_a_mask_an_address_is_outside_of_all_tensors(ops, emulator, kernel):
    emulator.edit = without(kernel, r"@%p\d+ (?=ld\.global)")
    with pytest.raises(PtxError, match=r"\.py:\d+.* bytes at 0x\w+ .* this is byte -?\d+"):
        RUNS[kernel][0](ops)


# Half of linear's barriers are those of a second weight, which is not here.
@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize(("kernel", "share"), [("linear", 0.45), ("attend", 0.7)])
def test_nearly_each_barrier_is_missed(ops, emulator, kernel, share):
    """In one of a few orders of the warps; some are there twice."""
    run, most = RUNS[kernel]
    barrier, texts, missed = r"bar\.sync\s+0;", set(), 0
    emulator.edit = lambda text: texts.add(text) or text
    assert run(ops) < most
    (count,) = (len(re.findall(barrier, x)) for x in texts if f".entry {kernel}(" in x)
    for number in range(count):
        emulator.edit = without(kernel, barrier, slice(number, number + 1))
        missed += any(not run(ops) < most for _ in range(4))
    assert missed >= share * count


def again(module, *names):
    """Copies of a module's tests: those named, or all that take the backend's operations."""
    for name, test in list(vars(module).items()):
        if name.startswith("test_") and getattr(test, "__module__", None) == module.__name__:
            code = test.__code__
            taken = {*code.co_varnames[: code.co_argcount]}
            if name in names or ({"ops", "triton_ops"} & taken and "arch" not in taken):
                copy = FunctionType(code, test.__globals__, name)
                copy.pytestmark = list(getattr(test, "pytestmark", []))
                yield name, staticmethod(copy)


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize("sm", [80, 89, 120])
class TestOperations:
    locals().update(again(test_triton))
    locals().update(again(test_prefill))


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize("sm", [80, 89, 120])
class TestLists:
    locals().update(again(test_triton_lists))


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize("sm", [89, 90])
class TestSteps:
    locals().update(
        again(
            steps,
            "test_captured_steps_plain_calls_prefill_and_plain_torch_agree",
            "test_graphs_replay_what_plain_calls_do",
            "test_each_token_of_a_step_is_bitwise_as_alone",
        )
    )

    @pytest.fixture(autouse=True)
    def caches(self, emulator, monkeypatch):
        """Kernels read their addresses from memory."""
        made = steps.cache_of

        def cache_of(*arguments):
            cache = made(*arguments)
            emulator.named.append(cache.layers)
            return cache

        monkeypatch.setattr(steps, "cache_of", cache_of)
