"""One safetensors file with all that a network needs to be used: weights, classes, preprocessing, how it was made.

Safetensors has no checksum and accepts non-finite numbers, so a file is validated here before its weights are used:
structure, digest, model, class list, names, shapes, finite values. Nothing in a file can run code.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mvcr_cli import __version__
from mvcr_cli.config import ModelConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.errors import (
    CheckpointError,
    ConfigMismatch,
    InputMissing,
    NotPermitted,
    UsageError,
    is_out_of_memory,
)
from mvcr_cli.models import Network, build
from mvcr_cli.paths import display_name, write_whole

FORMAT_VERSION = 1
_BY_CHANCE = frozenset({"normal_", "uniform_", "kaiming_uniform_"})  # how torch fills new parameters
MAX_HEADER = 100 << 20
MAX_FILE = 4 << 30  # several times the state of the largest network
_KEY = "mvcr"
_NO_DIGEST = b"0" * 64
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})
_DIGEST_AT = slice(35, 99)  # in the file, behind the header's length and `{"__metadata__":{"sha256":"`


class _Unfilled(TorchFunctionMode):
    """Inside, parameters are not filled by chance: those of a file replace them. Saves their time and memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if isinstance(filled, nn.Parameter) and func.__name__ in _BY_CHANCE:
            return filled
        return func(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained network at rest.

    Args:
        config: the network.
        classes: names in the order of the outputs.
        preprocess: how pictures become inputs.
        tensors: the state dict, on the CPU.
        made: how it was made: version, resolved settings, metrics. Data only; nothing here is imported or run.
    """

    config: ModelConfig
    classes: tuple[str, ...]
    preprocess: Preprocess
    tensors: dict[str, Tensor]
    made: dict[str, Any] = field(default_factory=dict)

    def network(self) -> Network:
        """The network in evaluation mode, on the CPU. Its weights are these tensors, not copies of them."""
        with _Unfilled():
            network = build(self.config)
        network.load_state_dict(self.tensors, assign=True)
        return network.eval()

    def save(self, path: Path) -> None:
        meta = {
            "format_version": FORMAT_VERSION,
            "mvcr": __version__,
            "model": self.config.to_dict(),
            "classes": list(self.classes),
            "preprocess": self.preprocess.to_dict(),
            "made": self.made,
        }
        write_whole(path, pack(self.tensors, meta))

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read and validate a weights file.

        Raises:
            InputMissing: there is no such file.
            CheckpointError: the file is damaged, foreign, or contradicts itself.
            ConfigMismatch: it was written by a newer version of the format.
        """
        tensors, meta = unpack(read_bytes(path), path)
        shown = display_name(path.name)
        if not meta:
            raise CheckpointError(
                f"{shown} holds bare weights: no classes and no preprocessing",
                f"train with them instead: mvcr train DATA --weights {shown}",
            )
        version = meta.get("format_version")
        if not isinstance(version, int):
            raise CheckpointError(f"{shown} has no format version", "use a weights file written by mvcr train")
        if version > FORMAT_VERSION:
            raise ConfigMismatch(
                f"{shown} has format {version}, this is mvcr {__version__} with format {FORMAT_VERSION}",
                f"it needs mvcr {display_name(str(meta.get('mvcr', 'of a later version')))} or newer",
            )
        try:
            config = ModelConfig.from_dict(meta["model"])
            preprocess = Preprocess.from_dict(meta["preprocess"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError) as error:
            raise CheckpointError(f"{shown} does not describe a network: {display_name(str(error))}") from error
        classes = check_classes(meta.get("classes"), config.classes, shown)
        _check_tensors(tensors, config, shown)
        made = meta.get("made")
        return cls(config=config, classes=classes, preprocess=preprocess, tensors=tensors,
                   made=made if isinstance(made, dict) else {})  # fmt: skip


def pack(tensors: dict[str, Tensor], meta: dict[str, Any]) -> bytes:
    """Tensors and a JSON record as safetensors bytes, the same for the same content.

    The header begins with the SHA-256 of the file in which zeros stand for it, so that no byte can change unnoticed.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    raw = safetensors.torch.save(plain)
    (length,) = struct.unpack("<Q", raw[:8])
    described = {"sha256": _NO_DIGEST.decode(), _KEY: json.dumps(meta, allow_nan=False)}
    header = {"__metadata__": described, **json.loads(raw[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head, data = struct.pack("<Q", len(text)) + text, memoryview(raw)[8 + length :]
    digest = _digest(head, data)
    return b"".join((head[: _DIGEST_AT.start], digest, head[_DIGEST_AT.stop :], data))


def unpack(raw: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of safetensors bytes; the record is empty for files that others wrote.

    Raises: CheckpointError when the bytes are not what they claim.
    """
    shown = display_name(path.name)
    described = _read_header(raw, path).get("__metadata__", {})
    meta: dict[str, Any] = {}
    if _KEY in described or "sha256" in described:
        if _digest(raw[: _DIGEST_AT.stop], memoryview(raw)[_DIGEST_AT.stop :]) != raw[_DIGEST_AT]:
            raise CheckpointError(
                f"{shown} is damaged: its digest does not match", "use another copy or the other weights"
            )
        meta = _parse(described.get(_KEY, ""), shown)
    try:
        tensors = safetensors.torch.load(raw)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        if is_out_of_memory(error):  # which is no fault of the file
            raise
        raise CheckpointError(f"{shown} is damaged: {display_name(str(error))}") from error
    return tensors, meta


def _digest(head: bytes, rest: memoryview) -> bytes:
    """The SHA-256 of a file, in two parts, with zeros in the place of the digest."""
    state = hashlib.sha256(head[: _DIGEST_AT.start] + _NO_DIGEST + head[_DIGEST_AT.stop :])
    state.update(rest)
    return state.hexdigest().encode()


def read_bytes(path: Path) -> bytes:
    """Raises: InputMissing, NotPermitted, or CheckpointError for pipes, devices and folders, which could block."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{display_name(path)} is not a file", "name the weights file in the folder")
        if status.st_size > MAX_FILE:
            raise CheckpointError(f"{display_name(path)} has {status.st_size:,} bytes; the limit is {MAX_FILE:,}")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputMissing(f"there is no file {display_name(path)}", "check the path") from None
    except PermissionError:
        raise NotPermitted(f"{display_name(path)} may not be read", "change its permissions") from None
    except OSError as error:
        raise CheckpointError(f"{display_name(path)} cannot be read: {error.strerror}") from error


def _read_header(raw: bytes, path: Path) -> dict[str, Any]:
    shown = display_name(path.name)
    length = struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else len(raw)
    if length > min(MAX_HEADER, len(raw) - 8):
        if path.suffix.lower() == ".pt2":
            raise CheckpointError(
                f"{shown} is a torch.export program, for other tools", "name its run, or its .onnx file"
            )
        # Only now: the length of a good header may begin with the same two bytes.
        if raw[:2] in _PICKLES or path.suffix.lower() in _PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{shown} is no safetensors file but a pickle, which can run code when it is opened",
                f"make weights of it for mvcr train: mvcr export --from-torch {shlex.quote(display_name(path))}",
            )
        raise CheckpointError(f"{shown} is no safetensors file, or it was cut short", "use another copy")
    header = _parse(raw[8 : 8 + length], shown)
    described = header.get("__metadata__", {})
    if not isinstance(described, dict) or not all(isinstance(value, str) for value in described.values()):
        raise CheckpointError(f"{shown} has a malformed header")
    return header


def _parse(text: str | bytes, shown: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown} has a header that is no valid JSON: {display_name(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{shown} has a malformed header")
    return value


def check_classes(names: object, count: int, shown: str) -> tuple[str, ...]:
    """The class list of a file, when it can be one: unique, non-empty texts of at most 255 bytes, one an output."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{shown} has no list of class names")
    if len(names) != count:
        raise CheckpointError(f"{shown} names {len(names)} classes for {count} outputs")
    for name in names:
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            size = 0
        if not 1 <= size <= 255 or "\0" in name:
            raise CheckpointError(f"{shown} has an impossible class name: {display_name(name[:60])!r}")
    if len(set(names)) != len(names):
        raise CheckpointError(f"{shown} names a class twice")
    return tuple(names)


def _check_tensors(tensors: dict[str, Tensor], config: ModelConfig, shown: str) -> None:
    """Names, shapes and types are those of the network; values are finite, variances not negative."""
    with torch.device("meta"):
        expected = build(config).state_dict()
    if wrong := sorted(set(expected) ^ set(tensors)):
        raise CheckpointError(f"{shown} lacks or adds {len(wrong)} tensors, for example {display_name(wrong[0])!r}")
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise CheckpointError(
                f"{shown}: {name} is {tuple(tensor.shape)} {tensor.dtype}, the network needs "
                f"{tuple(want.shape)} {want.dtype}"
            )
        check_numbers(name, tensor, shown)


def check_numbers(name: str, tensor: Tensor, shown: str) -> None:
    """Raises: CheckpointError for values that are not finite, and for negative variances."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{shown}: {display_name(name)} holds numbers that are not finite")
    if name.endswith("running_var") and bool((tensor < 0).any()):
        raise CheckpointError(f"{shown}: {display_name(name)} holds negative variances")


def load_bare(path: Path) -> dict[str, Tensor]:
    """The tensors of any safetensors file, mvcr's own or another tool's, checked to be finite.

    Raises: CheckpointError, InputMissing.
    """
    return load_named(path)[0]


def load_named(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """As `load_bare`, and the class names in the order of the outputs; empty when the file has none."""
    tensors, meta = unpack(read_bytes(path), path)
    shown = display_name(path.name)
    for name, tensor in tensors.items():
        check_numbers(name, tensor, shown)
    names = meta.get("classes")
    classes = check_classes(names, len(names), shown) if isinstance(names, list) else ()
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}, classes
