"""A GPU that is not there: tensors that say that they are on `cuda`, are computed by the CPU, and cannot be mixed with
the CPU's own.

Code that forgets to move a tensor fails only where there is a GPU. Here it fails without one: the code that runs is the
same, operation by operation, and its results are the CPU's. What it cannot show: kernels, memory, streams, speed.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._C import TensorBase
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

GPU = torch.device("cuda", 0)
MOVES = {"aten._to_copy.default", "aten.copy_.default"}
BY_POSITION = {
    "aten.index.Tensor",
    "aten.index_put.default",
    "aten.index_put_.default",
    "aten._index_put_impl_.default",
}
"""Whose positions may lie on the CPU."""
operations = 0
"""Run on the GPU so far."""


class Mixed(RuntimeError):
    """An operation was given tensors of the GPU and of the CPU."""


class OnGpu(Tensor):
    """A tensor of the GPU. held: the CPU's that computes in its place."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=GPU,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    # What torch answers by looking into memory.
    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "OnGpu":
        return OnGpu(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


def is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def _check(name: str, args: Any, tensors: list[Tensor]) -> None:
    """Raise Mixed as the CUDA build does. Scalars of the CPU may be anywhere."""
    if name in MOVES or not any(not isinstance(t, OnGpu) and t.dim() > 0 for t in tensors):
        return
    if name in BY_POSITION and isinstance(args[0], OnGpu):
        value = args[2] if len(args) > 2 else None
        if value is None or isinstance(value, OnGpu) or value.dim() == 0:
            return
    raise Mixed(f"{name}: tensors on the CPU and on the GPU: {[(tuple(t.shape), t.device.type) for t in tensors]}")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    global operations
    name, device = str(func), kwargs.get("device")
    tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    if not ours and not is_gpu(device):
        return func(*args, **kwargs)
    operations += 1
    if ours:
        _check(name, args, tensors)
    if name == "aten._fused_sdp_choice.default":
        return 0  # attention by plain products, since its kernels are CUDA's alone
    if name == "aten.copy_.default":
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    to_gpu = bool(ours) if device is None else is_gpu(device)
    if to_gpu and device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not to_gpu:
        return found
    known = {id(tensor.held): tensor for tensor in ours}  # what is changed in place stays the same object

    def raised(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnGpu):
            return value
        return known[id(value)] if id(value) in known else OnGpu(value)

    return tree_map(raised, found)


class _Dispatch(TorchDispatchMode):
    """New tensors, which no tensor of the GPU goes into."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _put(tensor: Tensor, value: Tensor) -> None:
    """tensor.data = value, which may bring it to the GPU."""
    if isinstance(tensor, OnGpu) != isinstance(value, OnGpu):
        fresh = OnGpu(value.held.detach()) if isinstance(value, OnGpu) else value.detach()
        is_parameter = isinstance(tensor, nn.Parameter)
        torch.utils.swap_tensors(tensor, nn.Parameter(fresh, tensor.requires_grad) if is_parameter else fresh)
        return
    TensorBase.data.__set__(tensor, value)
    if isinstance(tensor, OnGpu):
        tensor.held = value.held


class _Functions(TorchFunctionMode):
    """What writes into memory itself: torch.tensor(..., device="cuda"), and positions that are lists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and is_gpu(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnGpu):
            given = args[1] if isinstance(args[1], tuple) else (args[1],)
            positions = tuple(torch.tensor(list(one)) if isinstance(one, list | range) else one for one in given)
            args = (args[0], positions, *args[2:])
        return func(*args, **kwargs)


ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": "a pretended GPU",
    "get_device_capability": (9, 0),
    "get_device_properties": SimpleNamespace(
        name="a pretended GPU", total_memory=24 * 2**30, major=9, minor=0, multi_processor_count=100
    ),
    "is_bf16_supported": True,
    "mem_get_info": (20 * 2**30, 24 * 2**30),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 2**20),
    **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "reset_peak_memory_stats", "empty_cache")),
    **dict.fromkeys(("manual_seed", "manual_seed_all")),
}
"""Of torch.cuda's functions."""


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """In it torch has a GPU, and moves models and tensors there. gpu.cpp must have been loaded before torch."""
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        # One stream of random numbers, the CPU's.
        stack.enter_context(mock.patch.object(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state()))
        stack.enter_context(mock.patch.object(torch.cuda, "get_rng_state_all", lambda: [torch.get_rng_state()]))
        stack.enter_context(mock.patch.object(torch.cuda, "set_rng_state", lambda new, *_: torch.set_rng_state(new)))
        stack.enter_context(mock.patch.object(Tensor, "data", property(TensorBase.data.__get__, _put), create=True))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self, *_: self))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # a thread of its own has no modes
        stack.enter_context(_Dispatch())
        stack.enter_context(_Functions())
        torch.__future__.set_swap_module_params_on_conversion(True)  # keeps tied parameters tied
        try:
            yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
