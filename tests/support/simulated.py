"""``torch.cuda`` without a GPU, for the product's own ``cuda.py`` and ``graphs.py``.

An operation on a GPU's tensor is queued in a stream (``tests/support/streams.py``).  Memory is
poisoned (0xff: NaN, -1) until what fills it has run, from the moment that a copy into it begins
until that ends, and once it is free.  The host's writes to page-locked RAM happen at once.  A GPU's
tensor is one in RAM whose operations come here.
"""

import importlib.util
import weakref
from functools import cache, partial
from types import SimpleNamespace

import torch

from tests.support import streams
from tests.support.streams import (
    KIND,
    PINNED,
    Stream,
    current_stream,
    gpu_of,
    here,
    refuse,
    running,
)

aten = torch.ops.aten
# What makes the host wait for a GPU, or a GPU for the host's memory: no graph can hold it.
NEEDS_THE_HOST = (aten.item, aten._local_scalar_dense, aten.nonzero, aten.masked_select)
NEEDS_THE_HOST += (aten._unique2, aten.lift_fresh, aten.equal, aten.is_nonzero, aten.nonzero_numpy)


class Memory:
    """Some of a GPU's, which only the same stream gets again: by torch's rule it is free when the
    last tensor is, though kernels that are queued go on with it."""

    def __init__(self, gpu, size, fresh):
        self.gpu, pool = gpu, here.capture.pool if here.capture else current_stream(gpu.device)
        free = gpu.free[pool, size]
        with torch.inference_mode(False):
            reused = free and not fresh
            self.raw = free.pop() if reused else torch.full((size,), 255, dtype=torch.uint8)
        weakref.finalize(self, _freed, gpu, pool, self.raw).atexit = False


def _freed(gpu, pool, raw):
    poison = partial(raw.fill_, 255)
    if isinstance(pool, Stream):
        pool.items.append(poison)
    elif here.capture is not None:
        here.capture.items.append(poison)
    gpu.free[pool, len(raw)].append(raw)


class Tensor(torch.Tensor):
    """A GPU's; ``elem`` is the RAM that it lies in."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem, memory):
        made = torch.Tensor._make_subclass(cls, elem)
        made.elem, made.memory = elem, memory
        return made

    device = property(lambda self: self.memory.gpu.device)
    is_cuda = property(lambda self: True)

    def cpu(self):
        return _to_host(self)

    def tolist(self):
        return _to_host(self).tolist()

    def __repr__(self, **_):
        return f"<{tuple(self.shape)} {self.dtype} on {self.device}>"

    __format__ = lambda self, how: repr(self)  # noqa: E731

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _dispatched(operation, args, kwargs or {})


def made(gpu, shape, stride, dtype, fresh=False):
    """A tensor in memory that is free."""
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    memory = Memory(gpu, -(-extent * dtype.itemsize // 16) * 16 if 0 not in shape else 0, fresh)
    return Tensor(memory.raw.view(dtype).as_strided(shape, stride), memory)


def _mapped(value, change):
    """``value`` with its tensors changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(entry, change) for entry in value])
    if isinstance(value, dict):
        return {name: _mapped(entry, change) for name, entry in value.items()}
    return value


def _tensors(value):
    found = []
    _mapped(value, found.append)
    return found


def _in_ram(tensor):
    """What a kernel gets: a number in the host's memory goes along as it is now."""
    return tensor.elem if isinstance(tensor, Tensor) else tensor.clone()


@cache
def _kind(operation):
    schema = operation._schema
    if operation.overloadpacket in NEEDS_THE_HOST:
        return "host"
    if any(own.alias_info and own.alias_info.is_write for own in schema.arguments):
        return "write"
    if any(returned.alias_info for returned in schema.returns):
        implicit = torch._C.DispatchKey.CompositeImplicitAutograd
        return "composite" if operation.has_kernel_for_dispatch_key(implicit) else "view"
    return "empty" if schema.name.startswith(("aten::empty", "aten::new_empty")) else "pure"


def _dispatched(operation, args, kwargs):
    kind, packet = _kind(operation), operation.overloadpacket
    if packet in (aten.copy_, aten.to, aten._to_copy):
        done = _copied(operation, args, kwargs)
        if done is not None:
            return done
    if kind == "composite":
        return operation.decompose(*args, **kwargs)
    kwargs.pop("device", None)
    tensors, (given, options) = _tensors([args, kwargs]), _mapped((args, kwargs), _in_ram)
    memory = next(tensor.memory for tensor in tensors if isinstance(tensor, Tensor))
    gpu, work = memory.gpu, partial(operation, *given, **options)
    others = {tensor.device for tensor in tensors if tensor.dim()} - {gpu.device}
    assert not others, f"{operation} on {gpu.device} and {others}"
    if kind == "view":
        return _mapped(work(), lambda elem: Tensor(elem, memory))
    if packet in (aten.index, aten.index_put_) and (packet is aten.index or args[2].numel() > 1):
        masks = [mask for mask in args[1] if mask is not None and mask.dtype == torch.bool]
        kind = "host" if masks else kind
    stream = current_stream(gpu.device)
    if kind == "host":
        gpu.seen(stream)
        with running():
            return _mapped(work(), partial(_on_gpu, gpu))
    if kind == "write":
        gpu.put(stream, work)
        return kwargs.get("out", args[0]) if operation._schema.returns else None
    outputs = [made(gpu, *how) for how in _outputs(operation, (args, kwargs))]
    if kind == "pure":
        gpu.put(stream, partial(_fill, work, [tensor.elem for tensor in outputs]))
    return outputs[0] if len(operation._schema.returns) == 1 else tuple(outputs)


def _fill(work, outputs):
    for old, new in zip(outputs, _tensors([work()]), strict=True):
        old.copy_(new)


def _how(tensor):
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


_known = {}


def _outputs(operation, given):
    """Shape, stride and type of each output, by zeros: torch's meta tensors import its compiler."""
    key = operation, repr(_mapped(given, _how))
    if key not in _known:
        with running():
            args, options = _mapped(
                given, lambda x: torch.empty_strided(*_how(x)[:2], dtype=x.dtype).zero_()
            )
            _known[key] = [_how(x) for x in _tensors([operation(*args, **options)])]
    return _known[key]


def launch(kernel, *tensors):
    """Queue a kernel of one GPU's tensors."""
    gpu = tensors[0].memory.gpu
    assert {tensor.device for tensor in tensors} == {gpu.device}
    gpu.put(current_stream(gpu.device), partial(kernel, *(tensor.elem for tensor in tensors)))


def poison(elem):
    """What a copy is about to fill."""
    if elem.dim():
        elem.view(torch.uint8).fill_(255)


def fault():
    raise RuntimeError("an illegal memory access")


# Between host and GPU


def _to_host(tensor, dtype=None):
    gpu = tensor.memory.gpu
    gpu.engine += 1
    gpu.seen(current_stream(gpu.device))
    return tensor.elem.to(dtype or tensor.dtype, copy=True)


def _on_gpu(gpu, source):
    """What the host knows."""
    target = made(gpu, tuple(source.shape), source.stride(), source.dtype)
    gpu.put(current_stream(gpu.device), partial(target.elem.copy_, source))
    return target


def _copied(operation, args, kwargs):
    """Copies between host and GPU, by a copy engine; None of what is none."""
    if operation.overloadpacket is not aten.copy_:
        device = kwargs.pop("device", None)
        if operation._overloadname == "device":
            _, device, *rest = args
            return _to_host(args[0], *rest[:1]) if device.type == "cpu" else args[0].to(*rest[:1])
        if device is None or torch.device(device).type != "cpu":
            return None
        return _to_host(args[0], kwargs.get("dtype"))
    target, source = args[:2]
    if isinstance(target, Tensor) and isinstance(source, Tensor):
        return None
    if isinstance(source, Tensor):
        return target.copy_(_to_host(source))
    gpu, late = target.memory.gpu, kwargs.get("non_blocking") or args[2:] == (True,)
    stream, elem, address = current_stream(gpu.device), target.elem, source.data_ptr()
    pinned = any(first <= address < first + size for first, size in gpu.pinned().items())
    gpu.engine += stream is gpu.default
    if not (late and pinned):  # the driver has the bytes of pageable RAM when the call returns
        source = source.clone()
    gpu.put(stream, lambda: poison(elem))
    gpu.put(stream, partial(elem.copy_, source))
    if not late:
        gpu.seen(stream)
    return target


def _empty(size, dtype=None, device=None, **_):
    how = tuple(size), torch.empty(size, device="meta").stride()
    return made(gpu_of(device.index), *how, dtype or torch.get_default_dtype())


def _empty_strided(size, stride, dtype=None, device=None, **_):
    how = tuple(size), stride, dtype or torch.get_default_dtype()
    return made(gpu_of(device.index), *how, fresh=True)  # torch itself may fill it at once


def _arange(*bounds, dtype=None, device=None, **_):
    return _on_gpu(gpu_of(device.index), torch.arange(*bounds, dtype=dtype))


_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", _empty, KIND.upper())
_library.impl("empty_strided", _empty_strided, KIND.upper())
for _name in ("arange", "arange.start", "arange.start_step"):
    _library.impl(_name, _arange, KIND.upper())


# torch.cuda


def _register(address, size, flags):
    refuse("RAM is page-locked")
    assert address % 4096 == 0
    for first, (held, _) in PINNED.items():
        assert address + size <= first or first + held <= address
    gpu = gpu_of(here.device)
    if sum(gpu.pinned().values()) + size > gpu.pins:
        here.refusal = "out of memory"  # told again at this thread's next launch
        gpu.locks = False  # as under WSL2
        return 2
    PINNED[address] = size, gpu.index
    return 0


def _host_memory(*given, pin_memory=False, **options):
    if not pin_memory:
        return torch.empty(*given, **options)
    refuse("page-locked RAM is allocated")
    if not gpu_of(here.device).locks:
        raise RuntimeError("CUDA error: out of memory")
    memory = torch.empty(*given, **options)
    memory.pinned_for = here.device
    return memory


def _as_kernels_see(array, device):
    """Page-locked RAM of one GPU is other memory to another, which torch copies."""
    gpu = gpu_of(device.index)
    if array.host.pinned_for != gpu.index:
        return _on_gpu(gpu, array.host)
    memory = SimpleNamespace(gpu=gpu, array=array)
    return Tensor(array.host.view(array.host.shape), memory)


class Torch:
    """``torch``, with the CUDA that is here."""

    device = staticmethod(lambda kind, index: torch.device(KIND, index))
    empty, as_tensor = staticmethod(_host_memory), staticmethod(_as_kernels_see)
    _C = SimpleNamespace(_cuda_endAllocateToPool=lambda device, pool: None)
    cuda = SimpleNamespace(
        Stream=Stream,
        Event=streams.Event,
        CUDAGraph=streams.CUDAGraph,
        current_stream=current_stream,
        stream=streams.on_stream,
        device=streams.on_device,
        current_device=lambda: here.device,
        get_device_name=lambda index: "the twin",
        graph_pool_handle=object,
        memory_allocated=lambda device: gpu_of(device.index).allocated,
        memory_reserved=lambda device: gpu_of(device.index).allocated,
        max_memory_allocated=lambda device: gpu_of(device.index).peak,
        reset_peak_memory_stats=lambda device: None,
        mem_get_info=lambda device: gpu_of(device.index).memory(),
        empty_cache=lambda: None,
        cudart=lambda: SimpleNamespace(
            cudaHostRegister=_register, cudaHostUnregister=lambda address: PINNED.pop(address)
        ),
    )

    def __getattr__(self, name):
        return getattr(torch, name)


def _on_it(name):
    """One more instance of a module of the product, which uses this CUDA."""
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.torch = Torch()
    return module


cuda, graphs = map(_on_it, ("slotmoe.offload.devices.cuda", "slotmoe.quant.backends.graphs"))


def interpreted(executor, *args, **options):
    executor.plain(*args, **options)


@cache
def queue_interpreted_kernels():
    """Triton's kernels too, which run as its interpreter does."""
    from triton.runtime.interpreter import GridExecutor

    def launch(executor, *args, **options):
        there = [tensor for tensor in _tensors([args, options]) if tensor.dim()]
        if not any(isinstance(tensor, Tensor) for tensor in there):
            return executor.plain(*args, **options)
        stream = current_stream()
        assert {tensor.device for tensor in there} == {stream.device}, "a kernel of another GPU"
        args, options = _mapped((args, options), _in_ram)
        stream.gpu.put(stream, partial(interpreted, executor, *args, **options))

    GridExecutor.plain, GridExecutor.__call__ = GridExecutor.__call__, launch
