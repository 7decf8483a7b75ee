"""Where the operands of a streamed product come from and where its result goes.

Arrays, torch tensors on the CPU, memory-mapped files, matrices of a safetensors file and callables are all
read block by block; what lies on disk is never loaded whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .temporal_plan import ITEM_BYTES, Source

ReadBlock = Callable[[int, int, int, int], Any]
StoreBlock = Callable[[int, int, int, int, np.ndarray], None]
_SAFETENSORS = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "U16": "uint16", "U32": "uint32",
}  # fmt: skip
HEADER_LIMIT = 100 << 20  # as safetensors itself


class Operand(Protocol):
    """A matrix that is read by blocks. ``element`` is a name of ITEM_BYTES; a bfloat16 block has uint16."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def element(self) -> str: ...

    @property
    def source(self) -> Source: ...

    def read(self, i0: int, i1: int, j0: int, j1: int) -> np.ndarray:
        """Rows i0..i1, columns j0..j1; a view where there is one."""
        ...

    def fingerprint(self) -> bytes:
        """What tells this matrix from another one; ValueError where nothing does."""
        ...


def _mapped_root(array: np.ndarray) -> np.memmap | None:
    base: Any = array
    found = None
    while isinstance(base, np.ndarray):
        found = base if isinstance(base, np.memmap) else found
        base = base.base
    return found


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


class ArrayOperand:
    """An ndarray or np.memmap ``[rows, columns]`` with any strides; ``bfloat16``: its uint16 are the bits of
    one."""

    def __init__(self, array: np.ndarray, bfloat16: bool = False) -> None:
        self._array = array
        self._element = "bfloat16" if bfloat16 else array.dtype.name
        if not array.dtype.isnative:
            raise TypeError(f"dtype must be in native byte order, got {array.dtype}")
        if not bfloat16 and self._element not in ITEM_BYTES:
            raise TypeError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {array.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        return self._array.shape[0], self._array.shape[1]

    @property
    def element(self) -> str:
        return self._element

    @property
    def source(self) -> Source:
        strides = self._array.strides
        return Source(_mapped_root(self._array) is not None, False, abs(strides[1]) <= abs(strides[0]))

    @property
    def T(self) -> ArrayOperand:  # noqa: N802
        """The transposed matrix, on the same memory."""
        return ArrayOperand(self._array.T, self._element == "bfloat16")

    def read(self, i0: int, i1: int, j0: int, j1: int) -> np.ndarray:
        return self._array[i0:i1, j0:j1]

    def shares_memory(self, array: np.ndarray) -> bool:
        return np.may_share_memory(self._array, array)

    def fingerprint(self) -> bytes:
        array, root = self._array, _mapped_root(self._array)
        if root is not None and root.filename is not None:
            stat = os.stat(root.filename)
            where = array.ctypes.data - root.ctypes.data
            known = (str(root.filename), stat.st_size, stat.st_mtime_ns, root.offset, where)
            return _digest(*known, array.shape, array.strides, self._element)
        content = hashlib.blake2b(repr((array.shape, self._element)).encode(), digest_size=16)
        for i in range(0, array.shape[0], 256):
            content.update(np.ascontiguousarray(array[i : i + 256]).data)
        return content.digest()


class Fetch:
    """A matrix behind a callable: ``fetch(i0, i1, j0, j1)`` returns rows i0..i1, columns j0..j1 of it.

    ``dtype`` names its elements (a bfloat16 block is a torch tensor, or uint16 bits). ``key`` names its
    content, for products that are resumed. Raises ValueError or TypeError for a wrong shape or dtype, here
    and on every block.
    """

    def __init__(
        self,
        fetch: ReadBlock,
        shape: tuple[int, int],
        dtype: Any,
        *,
        key: str | None = None,
        transposed: bool = False,
    ) -> None:
        if len(shape) != 2 or any(type(s) is not int or s < 0 for s in shape):
            raise ValueError(f"shape must be two whole numbers of at least 0, got {shape!r}")
        name = dtype if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype).name
        if name not in ITEM_BYTES:
            raise TypeError(f"dtype must be one of {', '.join(ITEM_BYTES)}, got {name}")
        self._fetch, self._shape, self._element = fetch, shape, name
        self._key, self._transposed = key, transposed

    @property
    def shape(self) -> tuple[int, int]:
        return (self._shape[1], self._shape[0]) if self._transposed else self._shape

    @property
    def element(self) -> str:
        return self._element

    @property
    def source(self) -> Source:
        return Source(on_disk=True, staged=True, row_major=not self._transposed)

    @property
    def T(self) -> Fetch:  # noqa: N802
        """The transposed matrix, fetched from the same callable."""
        return Fetch(self._fetch, self._shape, self._element, key=self._key, transposed=not self._transposed)

    def read(self, i0: int, i1: int, j0: int, j1: int) -> np.ndarray:
        if self._transposed:
            return self._block(j0, j1, i0, i1).T
        return self._block(i0, i1, j0, j1)

    def _block(self, i0: int, i1: int, j0: int, j1: int) -> np.ndarray:
        block = as_numpy(self._fetch(i0, i1, j0, j1))
        bits = "uint16" if self._element == "bfloat16" else self._element
        if block.shape != (i1 - i0, j1 - j0) or block.dtype.name != bits:
            raise ValueError(
                f"fetch({i0}, {i1}, {j0}, {j1}) must return {bits} of shape {(i1 - i0, j1 - j0)}, "
                f"got {block.dtype} of shape {block.shape}"
            )
        return block

    def fingerprint(self) -> bytes:
        if self._key is None:
            raise ValueError("key must be given to Fetch for a product that can be resumed, got None")
        return _digest(self._key, self._shape, self._element, self._transposed)


def as_numpy(block: Any) -> np.ndarray:
    """An array of the same memory; a torch bfloat16 tensor as its uint16 bits."""
    if isinstance(block, np.ndarray):
        return block
    if type(block).__module__.split(".")[0] == "torch":
        import torch

        block = block.detach()
        if block.device.type != "cpu":
            raise ValueError(f"a block must be on the CPU, got device {block.device}")
        return block.view(torch.uint16).numpy() if block.dtype == torch.bfloat16 else block.numpy()
    return np.asarray(block)


def map_tensor(path: str | Path, name: str) -> tuple[np.ndarray, str]:
    """Tensor ``name`` of a safetensors file, memory-mapped, and its element type (bfloat16 as uint16 bits).

    The header is taken as hostile: sizes and offsets are checked. Raises ValueError naming the file.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise ValueError(f"{path.name} is no safetensors file: its header is cut or too long")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError(f"{path.name} is no safetensors file: its header is no JSON") from None
    names = sorted(key for key in header if key != "__metadata__") if isinstance(header, dict) else []
    if name not in names:
        raise ValueError(f"{path.name} has no tensor {name!r}; it has {', '.join(names[:8]) or 'none'}")
    entry = header[name]
    try:
        element, shape = _SAFETENSORS[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        whole = all(type(x) is int and x >= 0 for x in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path.name}: tensor {name!r} has no valid dtype, shape and data_offsets") from None
    begin = 8 + length + start if whole else 0
    if not whole or stop - start != math.prod(shape) * ITEM_BYTES[element] or 8 + length + stop > size:
        raise ValueError(f"{path.name}: tensor {name!r} does not lie inside the file as its header says")
    stored = np.dtype("uint16" if element == "bfloat16" else element).newbyteorder("<")
    if 0 in shape:
        return np.zeros(shape, stored), element
    return np.memmap(path, stored, "r", begin, shape), element


def open_safetensors(path: str | Path, name: str) -> ArrayOperand:
    """Matrix ``name`` of a safetensors file, memory-mapped, not loaded. Raises as :func:`map_tensor`."""
    array, element = map_tensor(path, name)
    if array.ndim != 2:
        raise ValueError(
            f"{Path(path).name}: tensor {name!r} must have 2 dimensions, got shape {array.shape}"
        )
    return ArrayOperand(array, element == "bfloat16")


class _Slice:
    """What ``safe_open(...).get_slice(name)`` returns: reads allocate, so they are staged."""

    def __init__(self, piece: Any, name: str) -> None:
        self._piece = piece
        shape = tuple(piece.get_shape())
        if len(shape) != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {shape}")
        if piece.get_dtype() not in _SAFETENSORS:
            raise TypeError(
                f"dtype of {name} must be one of {', '.join(_SAFETENSORS)}, got {piece.get_dtype()}"
            )
        self.shape: tuple[int, int] = (shape[0], shape[1])
        self.element = _SAFETENSORS[piece.get_dtype()]
        self.source = Source(on_disk=True, staged=True)

    def read(self, i0: int, i1: int, j0: int, j1: int) -> np.ndarray:
        return as_numpy(self._piece[i0:i1, j0:j1])

    def fingerprint(self) -> bytes:
        raise ValueError(
            "a safetensors slice does not say which file it is of: use open_safetensors to resume"
        )


def as_operand(value: Any, name: str) -> Operand:
    """``value`` as an operand. Raises TypeError or ValueError naming it: not a matrix, other elements, on a
    GPU."""
    if isinstance(value, (ArrayOperand, Fetch, _Slice)):
        return value
    if hasattr(value, "get_shape") and hasattr(value, "get_dtype"):
        return _Slice(value, name)
    torch_tensor = type(value).__module__.split(".")[0] == "torch" and hasattr(value, "dtype")
    if not torch_tensor and not isinstance(value, np.ndarray):
        raise TypeError(
            f"{name} must be an ndarray, torch tensor, np.memmap, safetensors slice or Fetch, "
            f"got {type(value).__name__}"
        )
    if value.ndim != 2:
        raise ValueError(
            f"{name} must have 2 dimensions (loop over a batch yourself), got shape {tuple(value.shape)}"
        )
    bfloat16 = torch_tensor and str(value.dtype) == "torch.bfloat16"
    try:
        return ArrayOperand(as_numpy(value), bfloat16)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def transposed(operand: Operand) -> Operand:
    """The transposed matrix of any operand, read from the same place."""
    if isinstance(operand, (ArrayOperand, Fetch)):
        return operand.T
    return Fetch(operand.read, operand.shape, operand.element).T


class Result:
    """Where tiles go: an ndarray, np.memmap or torch tensor ``[M, N]``, or a callable
    ``store(i0, i1, j0, j1, block)`` that is called once a tile (the block is reused afterwards).

    Raises ValueError for a wrong shape, or an element type that cannot hold the result.
    """

    def __init__(self, out: Any, shape: tuple[int, int], result: str, accumulator: str) -> None:
        self._store: Any = None  # a StoreBlock
        self._array: np.ndarray | None = None
        self._tensor: Any = None
        if callable(out) and not hasattr(out, "shape"):
            self._store = out
            self.element = accumulator
            return
        if not hasattr(out, "shape") or tuple(out.shape) != shape:
            got = tuple(out.shape) if hasattr(out, "shape") else type(out).__name__
            raise ValueError(f"out must have shape {shape}, got {got}")
        is_tensor = not isinstance(out, np.ndarray)
        self.element = str(out.dtype).split(".")[-1]
        floats = ("float16", "bfloat16", "float32", "float64")
        if self.element != result and not (self.element in floats and result in floats):
            raise ValueError(f"out must hold {result}, got {self.element}")
        if is_tensor and self.element == "bfloat16":
            self._tensor = out.detach()
        else:
            self._array = as_numpy(out)
        if self._array is not None and not self._array.flags.writeable:
            raise ValueError("out must be writeable")

    def overlaps(self, operand: Operand) -> bool:
        """Whether writing tiles could change ``operand``, as far as the extents of their memory tell."""
        if self._array is None or not isinstance(operand, ArrayOperand):
            return False
        return operand.shares_memory(self._array)

    def can_spill(self, accumulator: str) -> bool:
        """Whether a partial tile survives being written and read back."""
        return self._array is not None and self.element == accumulator

    @property
    def on_disk(self) -> bool:
        return self._array is not None and _mapped_root(self._array) is not None

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.element]

    def rows(self, i0: int, i1: int, j0: int, j1: int) -> Iterator[np.ndarray]:
        """The rows of a tile as they lie in the output, an array's only."""
        if self._array is not None:
            yield from self._array[i0:i1, j0:j1]

    def write(self, i0: int, i1: int, j0: int, j1: int, block: np.ndarray) -> None:
        if self._store is not None:
            self._store(i0, i1, j0, j1, block)
        elif self._tensor is not None:
            import torch

            self._tensor[i0:i1, j0:j1].copy_(torch.from_numpy(block))
        elif self._array is not None:
            with np.errstate(over="ignore"):  # float16 overflows to infinity, as a product in float16 does
                np.copyto(self._array[i0:i1, j0:j1], block, casting="same_kind")

    def read(self, i0: int, i1: int, j0: int, j1: int, into: np.ndarray) -> None:
        """A partial tile back (see :meth:`can_spill`)."""
        if self._array is not None:
            np.copyto(into, self._array[i0:i1, j0:j1])

    def flush(self) -> None:
        """What was written is on disk, if it goes to a file."""
        root = _mapped_root(self._array) if self._array is not None else None
        if root is not None:
            root.flush()

    def identity(self) -> bytes:
        return _digest(self.element, self._store is not None)
