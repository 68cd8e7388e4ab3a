"""A torch file is read here, in a process of its own that may use little, write nothing and open nothing, as safetensors.

`engine/convert.py` starts it, as `mvcr_cli.confined` tells. The one message is the file, the one answer safetensors bytes.

A torch file is a zip archive with a pickle in it. Of the archive, torch gets to see only what was checked; the pickle is read
by torch's unpickler that knows tensors and plain values, and its result must be a state dict.
"""

from __future__ import annotations

import io
import math
import re
import sys
import zipfile
from typing import TYPE_CHECKING, Any

from mvcr_cli.confined import (
    Refused,
    allow_processor_time,
    confine,
    open_nothing,
    receive,
    refuse,
    send,
    start_nothing,
    streams,
)
from mvcr_cli.errors import is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 120  # with some for the import of torch
LONGEST_ANSWER = 4 << 30  # what a weights file may have
MEMORY = 2 << 30  # and `MEMORY_TIMES` the file
MEMORY_TIMES = 10  # the archive, its tensors, and three copies of those, each `MOST_GROWTH` times the file at most
MOST_GROWTH = 2  # tensors that share their numbers are written one by one
WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "ema",
    "state_dict_ema",
    "model_ema",
)  # where training scripts put it
_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"})
_FOREIGN = re.compile(r"GLOBAL ([\w.]{1,100})")
_SAVE = "where it was made, save the weights alone: torch.save(model.state_dict(), 'weights.pt')"


def main() -> None:
    requests, answers = streams()
    raw = receive(requests, sys.maxsize)
    if raw is None:
        return
    confine(MEMORY + MEMORY_TIMES * len(raw))
    allow_processor_time(SECONDS)
    try:
        archive = repacked(raw)
        del raw
        rehearse()
        open_nothing()
        start_nothing()
        answer = converted(archive)
    except Refused as refused:
        refuse(answers, refused)
    else:
        send(answers, b"+" + answer)


def rehearse() -> None:
    """Convert a file of our own, for all that torch imports when it reads, refuses and writes."""
    import torch

    for value in ({"w": torch.zeros(1)}, {"w": torch.nn.Identity()}):
        own = io.BytesIO()
        torch.save(value, own)
        try:
            converted(repacked(own.getvalue()))
        except Refused:
            continue


def repacked(raw: bytes) -> io.BytesIO:
    """The archive written anew from its checked files, so that two readers cannot see two archives in the same bytes.

    Raises: Refused when it is no archive of `torch.save`, is damaged, or would grow when it is unpacked.
    """
    if not raw.startswith(b"PK\3\4"):
        raise Refused("is no torch file of today's format, which is a zip archive; older pickles are not opened", _SAVE)
    new = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(new, "w") as out:
            entries = old.infolist()
            _check_entries(entries, len(raw))
            for entry in entries:
                out.writestr(zipfile.ZipInfo(entry.filename), old.read(entry))
    except Refused:
        raise
    except Exception as error:  # zipfile's, struct's, and others
        raise _reason(error, "is a damaged zip archive") from error
    new.seek(0)
    return new


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Stored as they are, no larger together than the file, each once, all in one folder with the pickle of a torch file."""
    names = {entry.filename for entry in entries}
    if len(names) < len(entries):
        raise Refused("is a zip archive that holds a file twice")
    if any(entry.flag_bits & 1 for entry in entries):
        raise Refused("is an encrypted zip archive")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries):
        raise Refused("is a compressed zip archive, which torch.save never writes", _SAVE)
    if sum(entry.file_size for entry in entries) > size:
        raise Refused("is a zip archive that claims more than it holds")
    folders = {name.partition("/")[0] for name in names}
    if len(folders) != 1 or f"{(folder := folders.pop())}/data.pkl" not in names:
        raise Refused("is a zip archive, but not one that torch.save wrote", _SAVE)
    if f"{folder}/constants.pkl" in names:
        raise Refused("is a TorchScript program, which is not opened", _SAVE)


def converted(archive: io.BytesIO) -> bytes:
    """The state dict in an archive as safetensors bytes.

    Raises: Refused when there is none, or not exactly one, or anything else than tensors of plain numbers in it.
    """
    import torch
    from safetensors.torch import save

    size = len(archive.getbuffer())
    try:
        tensors = state_dict(torch.load(archive, weights_only=True, map_location="cpu"))
        _check_tensors(tensors, size)
        return save({name: tensor.detach().clone(memory_format=torch.contiguous_format)
                     for name, tensor in tensors.items()})  # fmt: skip
    except Refused:
        raise
    except Exception as error:  # on damaged files, torch raises a dozen kinds
        raise _reason(error, "is damaged, or holds more than tensors and plain values") from error


def state_dict(found: object) -> dict[str, Tensor]:
    """The one state dict in what a file holds, at its top or one level below; names without the `module.` of DataParallel.

    Raises: Refused.
    """
    if isinstance(found, dict) and not _is_state_dict(found):
        inside = [name for name in WRAPPERS if _is_state_dict(found.get(name))]
        if len(inside) > 1:
            raise Refused(f"holds {len(inside)} state dicts ({', '.join(inside)}), and only one can be meant", _SAVE)
        found = found[inside[0]] if inside else found
    if not _is_state_dict(found):
        raise Refused("holds no state dict, which is names and tensors and nothing else", _SAVE)
    assert isinstance(found, dict)
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _is_state_dict(value: object) -> bool:
    import torch

    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items())
    )


def _check_tensors(tensors: dict[str, Tensor], size: int) -> None:
    """Dense numbers on the CPU, and not many times the `size` of the file they came from, as a repeated one could be."""
    import torch

    total = 0
    for name, tensor in tensors.items():
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_nested
        is_dense = is_plain and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not is_dense or str(tensor.dtype).removeprefix("torch.") not in _DTYPES or tensor.is_neg():
            raise Refused(f"holds {name[:100]!r}, which is no dense tensor of floats or integers")
        total += math.prod(tensor.shape) * tensor.element_size()
    if total > MOST_GROWTH * size:
        raise Refused(f"holds tensors that grow from {size:,} bytes to {total:,}")


def _reason(error: Exception, otherwise: str) -> Refused:
    """Not in torch's words, which advise to open the file without protection."""
    if is_out_of_memory(error):
        return Refused("needs more memory than a file of its size should")
    foreign: Any = _FOREIGN.search(str(error))
    if foreign:
        return Refused(f"asks for {foreign[1]}, which is no tensor; it was not run", _SAVE)
    return Refused(otherwise, _SAVE)


if __name__ == "__main__":
    main()
