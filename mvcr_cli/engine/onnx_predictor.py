"""The exported ONNX file as a predictor: the same records as the run, from onnxruntime.

A file may come from a stranger, and parser and runtime are native code. So both work in a process of their own
(`mvcr_cli.onnx_worker`), which gets bytes and pixels and gives back names and numbers, both checked here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli import onnx_worker
from mvcr_cli.checkpoint import check_classes, read_bytes
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.errors import CheckpointError, ConfigMismatch, UsageError
from mvcr_cli.paths import display_name

# All that the other process gets to know of this one's environment.
_ENVIRONMENT = frozenset(
    {"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"}
)


def require_onnx() -> None:
    """Raises: ConfigMismatch with the command that installs what is missing."""
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        raise ConfigMismatch("ONNX needs two more packages", 'pip install "mvcr[onnx]"')


class OnnxPredictor:
    """An exported file; input (N, H, W, 3) uint8, one size a call."""

    def __init__(self, path: Path) -> None:
        self._open(read_bytes(path), display_name(path.name))

    @classmethod
    def from_bytes(cls, raw: bytes, shown: str) -> OnnxPredictor:
        predictor = cls.__new__(cls)
        predictor._open(raw, shown)
        return predictor

    def _open(self, raw: bytes, shown: str) -> None:
        require_onnx()
        self._worker = Worker(shown)
        facts = self._worker.ask(raw)
        try:
            described = json.loads(facts)
            preprocess = Preprocess.from_dict(described["preprocess"])
            names = described["classes"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, UsageError) as error:
            raise CheckpointError(f"{shown} was not exported by mvcr", "export a run with: mvcr export") from error
        self.classes = check_classes(names, len(names) if isinstance(names, list) else 0, shown)
        self.size = preprocess.size

    def read(self, image: Image.Image) -> NDArray[np.generic]:
        return np.array(image, dtype=np.uint8)

    def probabilities(self, inputs: list[NDArray[np.generic]]) -> NDArray[np.float64]:
        return np.stack([self._one(pixels) for pixels in inputs])

    def _one(self, pixels: NDArray[np.generic]) -> NDArray[np.float64]:
        answer = self._worker.ask(json.dumps(pixels.shape).encode(), np.ascontiguousarray(pixels).data.cast("B"))
        row = np.frombuffer(answer, np.float64) if len(answer) == 8 * len(self.classes) else np.array([np.nan])
        if not np.isfinite(row).all():
            raise CheckpointError(f"{self._worker.shown} does not give one number a class")
        return row


class Worker:
    """The process that runs one file; it ends with this object, or with this process."""

    def __init__(self, shown: str) -> None:
        self.shown = shown
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # The same packages as here, and never the current folder.
        environment["PYTHONPATH"] = os.pathsep.join(folder for folder in sys.path if os.path.isabs(folder))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-m", onnx_worker.__name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=os.sep,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
        )  # fmt: skip
        self._ended = weakref.finalize(self, _end, self._process)

    def ask(self, *messages: bytes | memoryview) -> bytes:
        """The answer to one request.

        Raises: CheckpointError when the file is refused, takes too long, or takes its process down.
        """
        late, process = threading.Event(), self._process

        def stop() -> None:  # does not know this object, whose end is the end of the process
            late.set()
            process.kill()

        timer = threading.Timer(onnx_worker.SECONDS, stop)
        timer.start()
        try:
            assert self._process.stdin is not None and self._process.stdout is not None
            onnx_worker.send(self._process.stdin, *messages)
            answer = onnx_worker.receive(self._process.stdout, onnx_worker.LONGEST_ANSWER)
        except OSError:  # it ended before it had read everything
            answer = None
        finally:
            timer.cancel()
        if answer is None:
            self._ended()
            raise CheckpointError(f"{self.shown} {_reason(late.is_set(), self._process.returncode)}")
        if not answer.startswith(b"+"):
            raise CheckpointError(*_refusal(self.shown, answer[1:]))
        return answer[1:]


def _reason(late: bool, code: int | None) -> str:
    if late:
        return f"takes longer than {onnx_worker.SECONDS} s; it was stopped"
    if code is not None and code < 0:
        return f"took down the process that runs it: {signal.Signals(-code).name}"
    return "took down the process that runs it"


def _refusal(shown: str, answer: bytes) -> tuple[str, str]:
    try:
        message, hint = json.loads(answer)
    except (ValueError, TypeError, RecursionError):
        message, hint = "cannot be run", ""
    return f"{shown} {display_name(str(message))}", display_name(str(hint))


def _end(process: subprocess.Popen[Any]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was still to be written
                stream.close()
    process.kill()
    process.wait()
