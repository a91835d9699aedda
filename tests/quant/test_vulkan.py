"""A Vulkan device: its memory and copies, what it refuses, and what becomes of one that fails."""

import ctypes
import mmap
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from slotmoe.quant.kernels import vulkan as vk
from tests.support.families import config_of
from tests.support.tiny import CONFIG, SMALL
from tests.support.vulkan import LOST, NO_ROOM, TIMEOUT, Loader, OnDevice, needs_vulkan

pytestmark = needs_vulkan

FALLIBLE = (
    "CreateInstance EnumeratePhysicalDevices CreateDevice CreateBuffer AllocateMemory MapMemory"
    " BindBufferMemory GetMemoryHostPointerPropertiesEXT CreateShaderModule CreatePipelineLayout"
    " CreateComputePipelines CreateCommandPool AllocateCommandBuffers BeginCommandBuffer"
    " EndCommandBuffer QueueSubmit2 CreateSemaphore WaitSemaphores GetSemaphoreCounterValue"
).split()


def filled(nbytes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def read(device, address, nbytes):
    host = torch.empty(nbytes, dtype=torch.uint8)
    device.read(address, host.data_ptr(), 1, nbytes)
    return host


def test_memory_counts_and_holds(device):
    info, before = vk.devices()[0], device.budget()
    assert info.name and not info.problem and info.heap == before[0]
    memory = device.allocate(vk.DEVICE, 20 << 20)  # more than goes at once
    heap, free, ours = device.budget()
    assert ours - before[2] == 20 << 20 and 0 < free <= heap and memory.mapped is None
    data = filled(20 << 20)
    device.write(memory.address, data.data_ptr(), 1, data.nbytes)
    assert torch.equal(read(device, memory.address, data.nbytes), data)
    # some columns of rows
    rows, at = filled(64 * 100, 1).view(64, 100), memory.address + 40
    device.write(at, rows[:, 30:].data_ptr(), 64, 50, 1000, 100)
    host = torch.zeros(64, 60, dtype=torch.uint8)
    device.read(at, host.data_ptr(), 64, 50, 1000, 60)
    assert torch.equal(host[:, :50], rows[:, 30:80]) and not host[:, 50:].any()
    assert torch.equal(read(device, at + 50, 950), data[90:1040])


def test_copies_between_all_kinds():
    device = vk.Vulkan()
    size = max(device.limits.import_alignment, 1 << 16)
    pages, data = mmap.mmap(-1, size), filled(size)
    host = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    imported = device.allocate(vk.IMPORTED, size, host)
    mapped, own = device.allocate(vk.MAPPED, size), device.allocate(vk.DEVICE, size)
    ctypes.memmove(host, data.data_ptr(), size)
    first = device.copy(np.array([[imported.address, own.address, size]], np.uint64))
    half = size // 2
    parts = (own.address + half, mapped.address, half), (own.address, mapped.address + half, half)
    last = device.copy(np.array(parts, np.uint64))  # behind the first
    assert device.wait(last) and device.wait(first, 0)
    moved = (ctypes.c_uint8 * size).from_address(mapped.mapped)
    assert bytes(moved) == bytes(data.roll(half).tolist())
    device.close()  # before the pages go


REFUSALS = {
    "beyond an allocation": (lambda d: d.allocate(vk.DEVICE, 1 << 60), vk.REFUSED, "more than one"),
    "part of a page": (lambda d: d.allocate(vk.IMPORTED, 100, 1 << 20), vk.NO_IMPORT, "pages"),
    "no memory": (lambda d: d.allocate(vk.DEVICE, 0), 1, "no memory"),
    "a stranger's address": (lambda d: d.copy(np.full((1, 3), 64, np.uint64)), 1, "outside"),
    "nothing": (lambda d: d.copy(np.empty((0, 3), np.uint64)), 1, "nothing"),
    "the future": (lambda d: d.wait(1 << 40), 1, "not submitted"),
    "no such device": (lambda d: vk.Vulkan(99), vk.NO_DEVICE, "no Vulkan device 99"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused(device, case):
    act, code, words = REFUSALS[case]
    with pytest.raises(ValueError, match=words) as caught:
        act(device)
    assert getattr(caught.value, "code", 1) == code


def scenario(loader=None):
    """Open a device, use each kind of memory, decode a token; its logits."""
    device = vk.Vulkan(0, loader.address if loader else None)
    pages = mmap.mmap(-1, 1 << 16)
    try:
        host = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        device.allocate(vk.IMPORTED, 1 << 16, host)
        model = OnDevice(device, {**CONFIG, **SMALL})
        return model.run([7], [0], [model.cache(8)])
    finally:
        device.close()


undisturbed = cache(scenario)


def fails_well(*fault):
    """Whether a scenario came to a fault; it said so, or what it gave is right all the same."""
    loader, code = Loader(*fault), None
    with suppress(MemoryError, torch.OutOfMemoryError):
        try:
            assert torch.equal(scenario(loader), undisturbed())
        except vk.VulkanError as problem:
            code = problem.code
    name, at, result = fault
    lost = result == LOST and loader.calls >= at and name not in UNLOST
    lawful = (vk.LOST,) if lost else (vk.NO_DEVICE, vk.REFUSED, vk.NO_IMPORT)
    assert code in (None, *lawful), code
    return loader.calls >= at


UNLOST = ("CreateInstance", "EnumeratePhysicalDevices", "GetMemoryHostPointerPropertiesEXT")


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("name", FALLIBLE)
def test_a_function_that_fails(name):
    assert fails_well(name, 1, NO_ROOM) and fails_well(name, 1, LOST)
    assert torch.equal(scenario(), undisturbed())  # the next open works


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize("result", [NO_ROOM, LOST])
@pytest.mark.parametrize("name", FALLIBLE)
def test_each_call_that_fails(name, result):
    at = 2
    while fails_well(name, at, result):
        at += 1


@pytest.mark.parametrize(("name", "calls"), [("QueueSubmit2", 1), ("EndCommandBuffer", 0)])
def test_what_a_token_calls(name, calls):
    loader, seen = Loader(name, 0, 0), []
    model = OnDevice(vk.Vulkan(0, loader.address), {**CONFIG, **SMALL})
    for rows in [model.cache(8)] * 3:
        model.run([7], [len(seen)], [rows])
        seen.append(loader.calls)
    model.device.close()
    assert seen[2] - seen[1] == calls


def test_a_driver_that_reads_no_ram_is_refused():
    loader = Loader("EnumerateDeviceExtensionProperties", 1, 0)  # tells none
    assert "lacks VK_EXT_external_memory_host" in vk.devices(loader.address)[0].problem.decode()
    loader.at += loader.calls
    with pytest.raises(vk.VulkanError, match="lacks VK_EXT_external_memory_host") as caught:
        vk.Vulkan(0, loader.address)
    assert caught.value.code == vk.NO_DEVICE


def test_a_device_that_does_not_answer():
    loader = Loader("WaitSemaphores", 1, TIMEOUT)
    device = vk.Vulkan(0, loader.address)
    memory = device.allocate(vk.MAPPED, 64)
    value = device.copy(np.array([[memory.address, memory.address + 32, 32]], np.uint64))
    with pytest.raises(vk.VulkanError, match="not answered for 1000 ms") as caught:
        device.wait(value, 10**9)
    assert caught.value.code == vk.TIMED_OUT
    for act in (lambda: device.wait(value), lambda: device.allocate(vk.DEVICE, 64)):
        with pytest.raises(vk.VulkanError, match="open it again") as caught:
            act()
        assert caught.value.code == vk.LOST
    device.close()
    assert scenario().isfinite().all()


def test_a_build_without_vulkan(monkeypatch):
    monkeypatch.setattr(vk.bindings, "load", lambda: None)
    vk._function.cache_clear()
    with pytest.raises(vk.VulkanError, match="built without Vulkan") as caught:
        vk.devices()
    assert caught.value.code == vk.NO_DEVICE
    monkeypatch.undo()
    assert vk.devices()


SHADERS = Path(vk.__file__).parent / "shaders"
PARTS = {path.stem: path.read_text().split("barrier();") for path in SHADERS.glob("*.comp")}
BARRIERS = [(name, at) for name, parts in PARTS.items() for at in range(1, len(parts))]
# So that what is read too early is no address that ends the process: 16 rows use no more tiles.
TAMED = "tile += taken[before]", "tile += min(taken[before], 1u)"


def crowded(loader=None):
    """What a few rows and many give where several subgroups have work."""
    device = vk.Vulkan(0, loader.address if loader else None)
    try:
        sizes = {"kv_lora_rank": 256, "v_head_dim": 64, "hidden_size": 64, "topk_group": 20}
        sizes |= {"n_routed_experts": 160, "num_experts_per_tok": 20, "n_group": 40}
        model, ids = OnDevice(device, {**CONFIG, **SMALL, **sizes}), [*range(32)]
        found = [model.run(ids[:3], ids[:3], [model.cache()] * 3)]
        found.append(torch.from_numpy(model.views.weights.copy()))
        cache = model.cache()
        for some in (ids[:16], ids[16:32]):
            model.run(some, some, [cache] * 16, None, model.views.hidden_end)
            found.append(torch.from_numpy(model.views.hidden.copy()))
        model = OnDevice(device, config_of("qwen3_moe", head_dim=64))
        found.append(model.run(ids[:3], ids[:3], [model.cache()] * 3))
        return torch.cat([part.flatten() for part in found])
    finally:
        device.close()


usual = cache(crowded)


def compiled(folder, source):
    """The words of a shader."""
    (folder / "a.comp").write_text(source)
    words = [shutil.which("glslangValidator") or "glslang", "-V", "-g0", f"-I{SHADERS}"]
    words += ["--target-env", "vulkan1.3", "-o", folder / "a.spv", folder / "a.comp"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return (folder / "a.spv").read_bytes()


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize(("name", "at"), BARRIERS)
def test_each_barrier_of_a_shader(name, at, tmp_path):
    """Without it something else comes, if threads run in their order or in the other: lavapipe runs
    a subgroup up to the next barrier before it runs another."""
    parts, codes = PARTS[name], []
    without = "barrier();".join(parts[:at]) + ";" + "barrier();".join(parts[at:])
    turned = "(gl_WorkGroupSize.x - 1u - gl_LocalInvocationIndex)"
    for text in ("barrier();".join(parts), without.replace(*TAMED)):
        codes += [compiled(tmp_path, text)]
        codes += [compiled(tmp_path, text.replace("gl_LocalInvocationIndex", turned))]
    outcomes = []
    for code in codes[1:]:

        def change(device, info, *_, code=code):
            size, words = (
                ctypes.c_size_t.from_address(info + 24),
                ctypes.c_void_p.from_address(info + 32),
            )
            if ctypes.string_at(words.value, size.value) == codes[0]:
                size.value, words.value = len(code), ctypes.cast(code, ctypes.c_void_p).value

        outcomes.append(crowded(Loader("CreateShaderModule", 0, 0, change)))
    want = usual()
    same = [torch.equal(found, want) for found in outcomes]
    assert same[0] and not all(same)
