"""A stand-in for an Apple GPU: tensors that say device "mps", compute on the CPU and write down what was asked of them.

PyTorch sees the device type "mps", so its own code and the engine's take the branches that they take on a Mac. Work on
host tensors passes by unseen. Every operator on a simulated tensor is looked up in the list of kernels that PyTorch
publishes and ships (`native_functions.yaml`): it must have one for MPS, or be made of operators that have one.

What this cannot see: a kernel that exists and refuses a dtype or a shape, or what it computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchgen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

aten = torch.ops.aten
MPS = torch.device("mps", 0)  # with its index: PyTorch asks the absent driver for it otherwise
HOST = torch.device("cpu")
UNSUPPORTED = {torch.float64, torch.complex32, torch.complex64, torch.complex128}  # what the engine must not put there
IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd  # operators that are made of others
EXPLICIT = torch._C.DispatchKey.CompositeExplicitAutograd  # the same, with a derivative of their own

# What a Mac runs, where other builds of PyTorch leave its kernel's call out of an operator that is made of others, or
# (arange) make the tensor by resizing, which a simulated one cannot follow.
RUN_AS = {
    aten.copy_.default: "_copy_from",
    aten.convolution.default: "_mps_convolution",
    aten.scaled_dot_product_attention.default: "_scaled_dot_product_attention_math_for_mps",
    aten.arange.default: "arange.start_out",
    aten.arange.start: "arange.start_out",
    aten.arange.start_step: "arange.start_out",
}
# Methods that first switch to their tensor's device, which needs the absent driver: they get tensors of the host.
SWITCHING_DEVICE = {Tensor.__getitem__, Tensor.__setitem__, Tensor.contiguous, Tensor.copy_, Tensor.__float__}


def names_with_mps_kernel() -> set[str]:
    """Operators, as `name.overload`, that PyTorch's list gives a kernel for MPS, their own or their out= form's."""
    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    listed = parsed.backend_indices[DispatchKey.MPS]
    names = {str(f.func.name) for f in parsed.native_functions if listed.has_kernel(f)}
    return names | {str(f.func.name) for f in parsed.native_functions if str(f.structured_delegate) in names}


class SimulatedTensor(Tensor):
    """A tensor that says it is on `device`; `inner` holds its values on the host."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device = MPS) -> SimulatedTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        with torch.inference_mode(inner.is_inference()):  # a view of a weight is none, also in inference mode
            made = Tensor._make_wrapper_subclass(cls, inner.shape, device=device, requires_grad=False, **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func not in SWITCHING_DEVICE:
                return func(*args, **kwargs)
            return _saying(MPS, func(*_saying(HOST, args), **kwargs))

    def __repr__(self) -> str:
        return f"SimulatedTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise AssertionError(f"{func} was called on a simulated tensor outside of SimulatedMPS.")


class SimulatedMPS(TorchDispatchMode):
    """While active, `device="mps"` works. `used` maps each operator to the dtypes it saw; `problems` says what a Mac
    would refuse."""

    kernels: set[str] = set()

    def __init__(self) -> None:
        super().__init__()
        if not self.kernels:
            self.kernels.update(names_with_mps_kernel())
        self.used: dict[str, set[torch.dtype]] = {}
        self.problems: set[str] = set()
        self._lifting: list[bool] = []

    def __enter__(self) -> SimulatedMPS:
        self._lifting.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device) is made on the host, then copied
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch._C._set_only_lift_cpu_tensors(self._lifting.pop())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        if any(isinstance(x, SimulatedTensor) and x.device == HOST for x in given):
            # One that was handed to a method of SWITCHING_DEVICE: its work is the device's all the same.
            return _saying(HOST, self.__torch_dispatch__(func, types, *_saying(MPS, (args, kwargs))))
        if not any(isinstance(x, SimulatedTensor) or _is_mps(x) for x in given):
            return func(*args, **kwargs)
        name = RUN_AS.get(func, str(func).removeprefix("aten.").removesuffix(".default"))
        if name not in self.kernels:
            relabels = func.is_view or func is aten._unsafe_view.default  # the same memory again: no kernel is needed
            for key in (IMPLICIT, EXPLICIT):
                if func.has_kernel_for_dispatch_key(key) and not (relabels and key is EXPLICIT):
                    with self:
                        return func._op_dk(key, *args, **kwargs)
            if not relabels:
                self.problems.add(f"{name} has no MPS kernel")
        result = self._compute(func, args, kwargs)
        self._note(name, [*given, *tree_leaves(result)])
        return result

    def _compute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Run an operator on the host; what it made is on the device, what it wrote into is what was given."""
        given = {id(x.inner): x for x in tree_leaves((args, kwargs)) if isinstance(x, SimulatedTensor)}
        args, kwargs = tree_map(_on_host, (args, kwargs))
        wanted = (argument.type.kind() for argument in func._schema.arguments)
        args = [torch.tensor(x) if kind == "TensorType" and isinstance(x, int) else x for x, kind in zip(args, wanted)]
        result = func(*args, **kwargs)
        wrap = lambda x: given[id(x)] if id(x) in given else SimulatedTensor(x)  # noqa: E731
        return tree_map(lambda x: wrap(x) if isinstance(x, Tensor) else x, result)

    def _note(self, name: str, values: list[Any]) -> None:
        """Write an operator down with its dtypes, and what a Mac would say to it."""
        tensors = [x for x in values if isinstance(x, Tensor)]
        dtypes = {x.dtype for x in tensors if isinstance(x, SimulatedTensor)}
        self.used.setdefault(name, set()).update(dtypes)
        self.problems.update(f"{name} works on {dtype}" for dtype in dtypes & UNSUPPORTED)
        if name != "_copy_from" and any(x.ndim and not isinstance(x, SimulatedTensor) for x in tensors):
            self.problems.add(f"{name} mixes tensors of the host and of the device")


def _is_mps(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == MPS.type


def _saying(device: torch.device, values: Any) -> Any:
    return tree_map(lambda x: SimulatedTensor(x.inner, device) if isinstance(x, SimulatedTensor) else x, values)


def _on_host(value: Any) -> Any:
    return value.inner if isinstance(value, SimulatedTensor) else HOST if _is_mps(value) else value
