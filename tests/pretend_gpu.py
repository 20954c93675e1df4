"""A device without hardware, "pretend": tensors that hold a CPU tensor and refuse what a GPU refuses.

Mixing them with CPU tensors (but for single numbers and indices), writing into one from the other, or drawing by a CPU
generator is an error, as on CUDA; random numbers come from the device's own generator. The numbers are the CPU's.
Importing this changes torch for the whole process, so that tests run it in one of their own.
"""

from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
import torch.utils._device
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_GENERATOR = torch.Generator()
_HOLDS_FLOAT64 = True
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}


class _Backend(backend_registration._DummyBackendModule):
    """What `torch.cuda` is to CUDA."""

    def manual_seed_all(self, seed: int) -> None:
        _GENERATOR.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> Tensor:
        return _GENERATOR.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        _GENERATOR.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None: ...

    def set_device(self, device: Any) -> None: ...


torch.inference_mode = torch.no_grad  # wrappers have no version counter in there
backend_registration._setup_privateuseone_for_python_backend(rename="pretend", backend_module=_Backend())
DEVICE = torch.device("pretend:0")


class _Pretended(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "_Pretended":
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made = Tensor._make_wrapper_subclass(cls, raw.size(), **layout, device=DEVICE)
        made.raw = raw
        return made

    def __init__(self, raw: Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    __array__ = numpy


class _Everywhere(TorchDispatchMode):
    """So that operators which make tensors on the device come here too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _raw(value: Any) -> Any:
    if isinstance(value, torch.device) and _is_here(value):
        return torch.device("cpu")
    return value.raw if isinstance(value, _Pretended) else value


def _made(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, _Pretended):
        return value
    if value.dtype is torch.float64 and value.dim() and not _HOLDS_FLOAT64:  # a single one may be Python's number
        raise TypeError(f"{DEVICE} holds no float64")
    return _Pretended(value)


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    aten = torch.ops.aten
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, _Pretended)]
    if func is aten._to_copy.default:
        target = kwargs.get("device")
        rest = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
        copy = func(_raw(args[0]), **rest, **({} if target is None or _is_here(target) else {"device": target}))
        return _made(copy) if (_is_here(target) if target is not None else here) else copy
    if func is aten.copy_.default:
        _raw(args[0]).copy_(_raw(args[1]))
        return args[0]
    if func is aten._local_scalar_dense.default:
        return func(_raw(args[0]))
    if func is aten.is_pinned.default:
        return False
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    given = kwargs.get("device")
    if not here and not _is_here(given):
        return func(*args, **kwargs)
    _refuse_mixed(func, args, kwargs, tensors, here)
    arguments, named = tree_map(_raw, args), tree_map(_raw, kwargs)
    result = _with_own_numbers(func, arguments, named)
    if given is not None and not _is_here(given):
        return result
    known = {id(tensor.raw): tensor for tensor in here}  # in place: the same wrapper again
    return tree_map(lambda value: known.get(id(value)) if id(value) in known else _made(value), result)


def _refuse_mixed(func: Any, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], here: list[Tensor]) -> None:
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: expected a {DEVICE.type!r} generator but found 'cpu'")
    away = [tensor for tensor in tensors if not isinstance(tensor, _Pretended)]
    if not here or not away:
        return
    if func._schema.name in _INDEXED and isinstance(args[0], _Pretended):  # indices may lie on the CPU
        away = [tensor for tensor in away if all(tensor is not index for index in args[1])]
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written = tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))
            if any(isinstance(tensor, Tensor) and not isinstance(tensor, _Pretended) for tensor in written):
                raise RuntimeError(f"{func}: output with device cpu doesn't match the desired device {DEVICE}")
    alone = torch.Tag.pointwise in func.tags or func._schema.name in _INDEXED  # takes a single number from the CPU
    if any(tensor.dim() or not alone for tensor in away):
        told = ", ".join(f"{tensor.device} {list(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {told}")


def _with_own_numbers(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return func(*args, **kwargs)
    outside = torch.get_rng_state()
    torch.set_rng_state(_GENERATOR.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        _GENERATOR.set_state(torch.get_rng_state())
        torch.set_rng_state(outside)


def _data(parameter: Tensor) -> Tensor:
    return torch._C.TensorBase.data.__get__(parameter)


def _set_data(parameter: Tensor, value: Tensor) -> None:
    if value.device.type != parameter.device.type:
        torch.utils.swap_tensors(parameter, nn.Parameter(value.detach(), requires_grad=parameter.requires_grad))
        return
    torch._C.TensorBase.data.__set__(parameter, value)
    if isinstance(value, _Pretended):
        parameter.raw = value.raw


def _from_lists(make: Callable) -> Callable:
    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = make(data, *args, device=None if _is_here(device) else device, **kwargs)
        return made.to(device) if _is_here(device) else made

    return tensor


def _on_the_cpu(save: Callable) -> Callable:
    """safetensors copies a GPU's tensors itself, but doesn't know these."""

    def saved(tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, *args, **kwargs)

    return saved


def hold_no_float64() -> None:
    """From now on the device is like Apple's GPUs in this."""
    global _HOLDS_FLOAT64
    _HOLDS_FLOAT64 = False


def train_on(device: str) -> None:
    """Let accelerate choose this device from now on."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    PartialState.default_device = property(lambda self: torch.device(device))


nn.Parameter.data = _Pretended.data = property(_data, _set_data)
torch.utils._device._device_constructors()  # remembers torch's own functions, for `with torch.device(…)`
torch.tensor, torch.as_tensor = _from_lists(torch.tensor), _from_lists(torch.as_tensor)
safetensors.torch.save_file = _on_the_cpu(safetensors.torch.save_file)
torch.__future__.set_swap_module_params_on_conversion(True)
_Everywhere().__enter__()
