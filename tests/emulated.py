"""A device emulated on the CPU: operations check, as CUDA's would, that their tensors are on one device, and what waits
for the device is counted. Its tensors hold their values on the CPU and say that they are on "meta"."""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

COPIES = ("aten::_to_copy", "aten::copy_")
INDEXING = (
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
)  # a CPU index of a device tensor is copied
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")


class OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, value):
        shape = dict(strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, value.size(), **shape, device="meta")

    def __init__(self, value):
        self.value = value

    def __torch_dispatch__(self, *args):
        raise RuntimeError("an emulated tensor outside Emulated()")

    def tolist(self):
        Emulated.waits += 1
        return self.value.tolist()

    def __format__(self, spec):
        return format(self.tolist(), spec)

    __torch_function__ = torch._C._disabled_torch_function_impl


def on_cpu(tree):
    return tree_map(lambda leaf: leaf.value if isinstance(leaf, OnDevice) else leaf, tree)


class Emulated(TorchDispatchMode):
    """`waits` counts the operations for which the host waits for the device."""

    waits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), operation._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inside = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        outside = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim]
        if name in INDEXING and isinstance(args[0], OnDevice):
            outside = [value for value in args[2:3] if not isinstance(value, OnDevice) and value.ndim]
        if inside and outside and name not in COPIES:
            raise RuntimeError(f"{name} mixes devices: {[tuple(tensor.shape) for tensor in outside]} on the CPU")
        target, result = kwargs.get("device"), bool(inside)
        if target is not None:
            result = torch.device(target).type == "meta"
            kwargs["device"] = "cpu"
        result = isinstance(args[0], OnDevice) if name == "aten::copy_" else result
        masked = name in INDEXING and any(getattr(index, "dtype", None) == torch.bool for index in args[1])
        Emulated.waits += bool(inside) and (name in WAITS or masked or (name in COPIES and not result))
        out = operation(*on_cpu(args), **on_cpu(kwargs))
        for argument, given in zip(operation._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                return given if operation._schema.returns else None  # changed in place
        return tree_map(lambda leaf: OnDevice(leaf) if result and isinstance(leaf, torch.Tensor) else leaf, out)


def emulate(monkeypatch, common):
    """The flag --device then means the emulated one."""
    autocast, tensor, save = torch.autocast, torch.tensor, common.save
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else autocast(kind, *a, **k)
    )
    monkeypatch.setattr(torch, "tensor", lambda data, device=None, **k: tensor(data, **k).to(device or "cpu"))
    monkeypatch.setattr(common, "device_flag", lambda text: "meta")
    monkeypatch.setattr(common, "hardware", lambda device: "emulated")
    monkeypatch.setattr(common, "save", lambda content, *paths: save(on_cpu(content), *paths))
