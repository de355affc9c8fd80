"""A device `sim` beside the CPU: it computes what the CPU does, and refuses a tensor that was left on the host.

torch lets Python stand for a backend (the dispatch key PrivateUse1), so that `.to`, autograd, autocast and
`torch.accelerator` take `sim` for an accelerator. Its tensors are wrappers around those of the CPU. FakeTensorMode
would find mixed devices, too, but it has no values: a step that reads its sums would end there, and no number could be
compared with those of the CPU. Here all of them must be the same but for the order of sums.

A process keeps the device to its end: begin it in one of its own (`tests/forked.py`), before the first backward.
Not simulated: streams, pinned memory, the allocator's figures and several ranks, for which torch asks C++.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
DYNAMIC = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "equal", "_unique2", "is_nonzero"}
"""Operations for whose value, or the size of whose result, the host waits."""
_registered: list[torch.library.Library] = []


class HostTensor(RuntimeError):
    """A tensor of the host meets one of the device in one operation."""


class OrderOfThreads(RuntimeError):
    """Floats are added to one place in the order in which a GPU's threads come to it: the last bit changes."""


class SimTensor(torch.Tensor):
    """A tensor on `sim`; `values`, on the CPU, is what it holds."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> SimTensor:
        layout: dict[str, Any] = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made = cls._make_wrapper_subclass(cls, values.size(), dtype=values.dtype, device="sim:0", **layout)
        made.values = values
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


class Sim(TorchDispatchMode):
    """Makes the tensors of `sim`, and counts by file what crosses the border.

    reads  values and sizes that the host waits for
    sent   tensors of at least one dimension that the device gets from the host
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode torch does not take operations apart before
                return func.decompose(*args, **kwargs)
        out = _computed(func, args, kwargs)
        name = func.overloadpacket.__name__
        ours = any(isinstance(x, SimTensor) for x in tree_leaves((args, kwargs)))
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            if isinstance(source, SimTensor) and not isinstance(out, SimTensor):
                self.reads[_place()] += 1
            elif source.dim() and isinstance(out, SimTensor) and not isinstance(source, SimTensor):
                self.sent[_place()] += 1
        elif ours and (name in DYNAMIC or (name in ("index", "index_put_") and _by_mask(*args))):
            self.reads[_place()] += 1
        return out


def _by_mask(x: torch.Tensor, indices: list[torch.Tensor | None], values: Any = None, *_: Any) -> bool:
    """Return True if the places are found on the device; a single number goes to them without."""
    single = values is not None and values.numel() == 1
    return not single and any(index is not None and index.dtype == torch.bool for index in indices)


def _refuse_order_of_threads(func: Any, args: Any) -> None:
    """Raise OrderOfThreads where CUDA adds up floats with atomics (torch.use_deterministic_algorithms lists these).

    Not for places that the operation comes to once.
    """
    name = func.overloadpacket.__name__.removesuffix("_")
    if name in ("index_add", "scatter_add") and args[0].is_floating_point():
        dim = args[1] if name == "scatter_add" else 0
        if (args[2].values.sort(dim=dim).values.diff(dim=dim) == 0).any():
            raise OrderOfThreads(f"{func} in {_place()}")


def _place() -> str:
    """Return the file that calls torch; of the optimizers, which are torch's own, theirs."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
        if f"{os.sep}optim{os.sep}" in frame.f_code.co_filename or frame.f_back is None:
            break
        frame = frame.f_back
    return os.path.basename(frame.f_code.co_filename)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what the operation gives, computed on the CPU; it is on `sim` if an operand is, or if that is asked."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in given if isinstance(x, SimTensor)]
    copies = func.overloadpacket in (aten._to_copy, aten.copy_)
    if not copies and ours and any(x.dim() for x in given if not isinstance(x, SimTensor)):
        raise HostTensor(f"{func}: {[f'{x.device.type} {x.dtype} {list(x.shape)}' for x in given]}")
    if ours:
        _refuse_order_of_threads(func, args)
    asked = kwargs.get("device")
    of_operand = args[0].device if copies else ours[0].device if ours else torch.device("cpu")
    device = of_operand if asked is None else torch.device(asked)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if device.type == "sim" else device}
    args, kwargs = tree_map(lambda x: x.values if isinstance(x, SimTensor) else x, (args, kwargs))
    out = func(*args, **kwargs)
    if device.type != "sim":
        return out
    same = {id(x.values): x for x in ours}  # what an operation changes in place

    def wrapped(x: Any) -> Any:
        return same.get(id(x)) if id(x) in same else SimTensor(x) if isinstance(x, torch.Tensor) else x

    return tree_map(wrapped, out)


_STREAM = SimpleNamespace(synchronize=lambda: None)
_MODULE = SimpleNamespace(
    is_available=lambda: True,
    is_initialized=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    get_device_name=lambda device=None: "simulated",
    is_bf16_supported=lambda including_emulation=True: False,
    get_amp_supported_dtype=lambda: [torch.bfloat16],
    current_stream=lambda device=None: _STREAM,
    stream=contextlib.nullcontext,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None,  # its numbers are those of the CPU's generator
)
"""`torch.sim`, by which torch asks what it asks of `torch.cuda`."""


def begin() -> Sim:
    """Give this process the device; return the mode under which it works, entered."""
    _setup_privateuseone_for_python_backend("sim", backend_module=_MODULE)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a wrapper cannot be put into a tensor of the CPU
    kernels, fallbacks = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for name in ("empty_strided", "empty.memory_format"):  # of C++, which passes by the mode
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        kernels.impl(
            name, lambda *args, func=func, **given: _computed(func, args, {**given, "device": "sim"}), "PrivateUse1"
        )
    kernels.impl(
        "_copy_from",
        lambda source, to, non_blocking=False: _computed(aten.copy_.default, (to, source), {}),
        "PrivateUse1",
    )
    fallbacks.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _registered[:] = [kernels, fallbacks]
    torch.accelerator.reset_peak_memory_stats = torch.accelerator.set_device_index = lambda device: None
    torch.accelerator.max_memory_allocated = lambda device: 0
    mode = Sim()
    mode.__enter__()
    return mode
