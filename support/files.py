"""For all scripts: files written whole or not at all, and loaded without trusting them; one hash.

A checkpoint is a dict that torch.save has written. It says in "kind" what it holds, and in
"checksum" the hash of the rest, so that a damaged file is refused.
"""

import contextlib
import hashlib
import io
import os
import textwrap
from pathlib import Path

import torch


def hash_of(obj) -> str:
    """SHA-256 over the names, tensors and plain values in nested dicts, lists and tuples.

    Of a tensor it covers the dtype, the shape and the bytes.
    """
    digest = hashlib.sha256()
    for name, value in leaves(obj):
        if torch.is_tensor(value):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            as_bytes = gathered(value).cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(as_bytes.numpy())
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def gathered(tensor):
    """The tensor without its gradient, and whole: fully_shard leaves each process a part of it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def leaves(obj, name=""):
    """Yield (name, value) for all that is in nested dicts, lists and tuples.

    {"a": 1, "b": [2]}  ->  ("", "dict 2"), ("['a']", 1), ("['b']", "list 1"), ("['b'][0]", 2)
    """
    if isinstance(obj, dict):
        items = obj.items()
    elif isinstance(obj, (list, tuple)):
        items = enumerate(obj)
    else:
        yield name, obj
        return
    yield name, f"{type(obj).__name__} {len(obj)}"
    for key, value in items:
        yield from leaves(value, f"{name}[{key!r}]")


def file_size(obj) -> int:
    """The bytes that torch.save takes for obj."""
    file = io.BytesIO()
    torch.save(obj, file)
    return file.tell()


def write(obj, file):
    """Write a dict with torch.save and its hash beside it, a str as text, a PIL image as PNG."""
    if isinstance(obj, dict):
        torch.save({**obj, "checksum": hash_of(obj)}, file)
    elif isinstance(obj, str):
        file.write(obj.encode())
    else:
        obj.save(file, "png")


def save(obj, path):
    """Write obj to path (see write), in folders that are made if they aren't there.

    It is written under another name first, which is then renamed, so path holds the old file or the
    new one, and never half of one. Raises ValueError if that fails, such as on a full disk.
    """
    contents = io.BytesIO()  # in memory first: torch.save hides the error of a full disk
    write(obj, contents)
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(contents.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # nor could it be made, perhaps
            temporary.unlink()
        raise ValueError(
            f"{path} can't be written ({error.strerror}); make room, or give another path"
        ) from None


def load(path, *kinds) -> dict:
    """Read a checkpoint that save wrote, whose "kind" is one of kinds.

    Raises ValueError if it is missing, damaged, of another kind, or not written by save.
    """
    if not Path(path).exists():
        raise ValueError(
            f"{path} doesn't exist; give the path of a checkpoint ({' or '.join(kinds)})"
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        checksum = saved.pop("checksum")
        if hash_of(saved) != checksum:
            raise ValueError("its checksum is another")
    except Exception as error:
        raise ValueError(
            f"{path} is damaged, or not a checkpoint of this project ({reason_of(error)}); "
            "copy or make it again"
        ) from None
    if saved.get("kind") not in kinds:
        wanted = " or ".join(kinds)
        raise ValueError(f"{path} is of kind '{saved.get('kind')}'; give one of kind {wanted}")
    return saved


def reason_of(error) -> str:
    """The start of an error's text, in one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 100)
