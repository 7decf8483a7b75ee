"""Arrays in one ``.npz`` file: written whole or not at all, read only when every byte is as it was written.

The zip container carries a CRC-32 of each member; files written here also carry a SHA-256 over all of them.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

DIGEST = "sha256"


class DamagedFile(ValueError):
    """A file that is not what it should be; nothing of it has been used."""


def _digest(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    whole = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        whole.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        whole.update(array.tobytes())
    return np.frombuffer(whole.digest(), np.uint8)


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Write ``arrays`` with their digest in one atomic replace. Returns the path."""
    path = Path(path)
    fields: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    buffer = io.BytesIO()
    everything: dict[str, Any] = {**fields, DIGEST: _digest(fields)}
    np.savez(buffer, **everything)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as out:
        out.write(buffer.getvalue())
        out.flush()
        os.fsync(out.fileno())
    beside.replace(path)
    return path


def read_arrays(
    path: str | Path, required: Iterable[str], optional: Iterable[str] = (), *, signed: bool = True
) -> dict[str, np.ndarray]:
    """The named arrays of ``path``; ``signed`` asks for the digest of :func:`write_arrays`.

    Raises FileNotFoundError, or DamagedFile for anything that is not such a file: a cut or flipped byte, a
    missing or unknown array, pickled objects.
    """
    path = Path(path)
    raw = path.read_bytes()
    required, optional = tuple(required), tuple(optional)
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # a hostile zip raises a dozen kinds; all of them mean the same
        raise DamagedFile(f"{path.name}: not an .npz archive of arrays, or damaged ({error})") from None
    digest = arrays.pop(DIGEST, None)
    if signed or digest is not None:
        if digest is None or not np.array_equal(digest, _digest(arrays)):
            raise DamagedFile(f"{path.name}: the checksum does not fit the contents")
    missing = [name for name in required if name not in arrays]
    unknown = sorted(set(arrays) - {*required, *optional})
    if missing or unknown:
        named = ", ".join(required) + (f" and optionally {', '.join(optional)}" if optional else "")
        raise DamagedFile(f"{path.name}: must hold {named}; missing {missing}, unknown {unknown}")
    return arrays
