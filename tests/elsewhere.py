"""A second device, of which every machine has one: it computes on the processor and refuses what a GPU refuses.

Importing this registers it for the whole process, for good: only a process of a test's own may do so. Inside
``with Elsewhere():`` tensors are created on it and moved to it by name; an operation on tensors of two devices raises,
as on a GPU, unless it moves them or one of them is a single number.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
_setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere:0")


class Moved(torch.Tensor):
    """A tensor elsewhere; `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        kept = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **kept)

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Creates tensors where it is asked to."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_there(kwargs.get("device")) or any(issubclass(kind, Moved) for kind in types):
            return compute(func, args, kwargs)
        return func(*args, **kwargs)


def is_there(device):
    return device is not None and torch.device(device).type == DEVICE.type


def held(tensor):
    return tensor.held if isinstance(tensor, Moved) else tensor


def compute(func, args, kwargs):
    """Return what `func` returns: where it is asked for; else elsewhere, if one of the arguments is."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = {id(held(tensor)): tensor for tensor in tensors if isinstance(tensor, Moved)}
    if func is aten.copy_.default:
        held(args[0]).copy_(held(args[1]))
        return args[0]
    stray = [tensor for tensor in tensors if not isinstance(tensor, Moved) and tensor.dim()]
    if there and stray and func is not aten._to_copy.default:
        raise RuntimeError(f"{func}: tensors of two devices: {[(t.device.type, tuple(t.shape)) for t in tensors]}")
    device = kwargs.get("device")
    goes_there = bool(there) if device is None else is_there(device)
    kwargs = kwargs if device is None else kwargs | {"device": "cpu"}
    args, kwargs = tree_map_only(Moved, held, (args, kwargs))
    with _disable_current_modes():
        result = func(*args, **kwargs)
    if not goes_there:
        return result
    return tree_map_only(
        torch.Tensor, lambda tensor: there[id(tensor)] if id(tensor) in there else Moved(tensor), result
    )


def _storage_address(storage, real=torch.UntypedStorage.data_ptr):
    return storage._cdata if is_there(storage.device) else real(storage)


def _copy_from(source, target, non_blocking=False):
    held(target).copy_(held(source))
    return target


torch.UntypedStorage.data_ptr = _storage_address  # asked for by those who look for tensors that share memory
kernels = torch.library.Library("aten", "IMPL")  # what torch itself calls beneath any mode
KEY = "PrivateUse1"
kernels.impl("_copy_from", _copy_from, KEY)
kernels.impl("empty.memory_format", lambda size, **kw: Moved(torch.empty(size, dtype=kw.get("dtype"))), KEY)
kernels.impl(
    "empty_strided", lambda size, stride, **kw: Moved(torch.empty_strided(size, stride, dtype=kw.get("dtype"))), KEY
)
