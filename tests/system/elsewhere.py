"""Runs commands where there is one more device: `elsewhere.py <file of commands>`, a JSON list of lists of words.

Tensors on the device "elsewhere" lie on the CPU in truth, but torch does not know: who mixes them with tensors of the
CPU is refused as on a GPU, and float64 as by Apple's Metal. Prints [exit code, output] of each command, a line of JSON.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
ATEN = torch.ops.aten
MOVES = {ATEN.copy_, ATEN._to_copy}
PICKS = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}


class Backend:
    """What torch and accelerate ask of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)


class There(Tensor):
    """A tensor on that device; `inner` holds its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"There({self.inner!r})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: There) -> None:
        Tensor.data.__set__(self, other)
        self.inner = other.inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first")


def compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What `func` gives, on the device if one of its arguments is there, or if it is to make something there."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, There)]
    here = [tensor for tensor in tensors if not isinstance(tensor, There) and tensor.ndim]
    if there and here and func.overloadpacket not in MOVES and not (func.overloadpacket in PICKS and _picks(*args)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} meets {DEVICE} and cpu")
    target = kwargs.get("device")
    ends_there = bool(there) if target is None else torch.device(target).type == NAME
    inside: dict[str, Any] = {} if target is None else {"device": "cpu" if ends_there else target}
    given, more = tree_map(_inner, (args, kwargs | inside))
    result = func(*given, **more)
    if func.overloadpacket is ATEN.copy_:
        return args[0]
    if not ends_there:
        return result
    if any(isinstance(leaf, Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
        raise TypeError(f"Cannot convert a tensor to float64: {NAME} does not have it ({func})")
    result = tree_map(lambda leaf: There(leaf) if isinstance(leaf, Tensor) else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if there and target is None else result


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, There) else leaf


def _picks(tensor: Tensor, rows: Any, values: Any = None, *others: Any) -> bool:
    """Rows of a tensor there may be picked by numbers here."""
    return isinstance(tensor, There) and not (
        isinstance(values, Tensor) and values.ndim and not isinstance(values, There)
    )


_library = torch.library.Library("_", "IMPL")
_library.fallback(compute, "PrivateUse1")


class Generator(torch.Generator):
    """One for any device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


def _in_two_steps(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Tensors of Python's numbers, of which no fallback is told."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        elsewhere = device is not None and torch.device(device).type == NAME
        tensor = make(data, *args, **kwargs, **({} if device is None or elsewhere else {"device": device}))
        return tensor.to(device) if elsewhere else tensor

    return made


torch.Generator = Generator  # type: ignore[misc]
for _name in ("tensor", "as_tensor", "asarray"):
    setattr(torch, _name, _in_two_steps(getattr(torch, _name)))


def _new_tensor(self: Tensor, data: Any, **kwargs: Any) -> Tensor:
    return torch.tensor(data, **({"dtype": self.dtype, "device": self.device} | kwargs))


Tensor.new_tensor = _new_tensor  # type: ignore[assignment]


def main(file: str) -> None:
    from robustkit.cli.main import main as command

    for words in json.loads(Path(file).read_text()):
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            try:
                code: Any = command(words)
            except SystemExit as stopped:
                code = stopped.code
        print(json.dumps([code, said.getvalue()]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
