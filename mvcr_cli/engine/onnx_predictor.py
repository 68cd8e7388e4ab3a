"""The exported ONNX file as a predictor: the same records as the run, from onnxruntime.

A file may come from a stranger, and parser and runtime are native code. So both work in a process of their own
(`mvcr_cli.onnx_worker`), which gets bytes and pixels and gives back names and numbers, both checked here.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mvcr_cli import onnx_worker
from mvcr_cli.checkpoint import check_classes, read_bytes
from mvcr_cli.confined import Confined
from mvcr_cli.data.images import load_picture
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.verdict import Ready, Verdict
from mvcr_cli.errors import CheckpointError, ConfigMismatch, UsageError
from mvcr_cli.paths import display_name

if TYPE_CHECKING:
    from mvcr_cli.engine.predict import Predictor


def require_onnx() -> None:
    """Raises: ConfigMismatch with the command that installs what is missing."""
    if find_spec("onnx") is None or find_spec("onnxruntime") is None:
        raise ConfigMismatch("ONNX needs two more packages", 'pip install "mvcr[onnx]"')


def open_exported(path: Path) -> Predictor:
    """The predictor of an exported file, and of those beside it when it zooms."""
    require_onnx()
    raw, shown = read_bytes(path), display_name(path.name)
    graph = Worker(raw, shown)
    if not isinstance(graph.facts, dict) or "lessons" not in graph.facts:
        return OnnxPredictor(graph)
    from mvcr_cli.engine.export_zoom import OnnxZoomPredictor

    return OnnxZoomPredictor.beside(path, graph)


def exported_classes(graph: Worker) -> tuple[str, ...]:
    """Raises: CheckpointError when the names are no names."""
    names = graph.facts.get("classes")
    return check_classes(names, len(names) if isinstance(names, list) else 0, graph.shown)


class OnnxPredictor:
    """An exported file; input (N, H, W, 3) uint8, one size a call."""

    def __init__(self, graph: Worker) -> None:
        self._graph = graph
        try:
            self.size = Preprocess.from_dict(graph.facts["preprocess"]).size
            self.classes = exported_classes(graph)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, UsageError) as error:
            raise CheckpointError(
                f"{graph.shown} was not exported by mvcr", "export a run with: mvcr export"
            ) from error

    @classmethod
    def from_bytes(cls, raw: bytes, shown: str) -> OnnxPredictor:
        require_onnx()
        return cls(Worker(raw, shown))

    def at_once(self, batch: int) -> int:
        return batch

    def read(self, path: str) -> Ready:
        picture = load_picture(path, 2 * self.size)
        return Ready(path, picture.width, picture.height, np.array(picture.image, dtype=np.uint8))

    def judge(self, group: list[Ready]) -> list[Verdict]:
        return [Verdict(row) for row in self.probabilities([ready.input for ready in group])]

    def probabilities(self, inputs: list[NDArray[np.generic]]) -> NDArray[np.float64]:
        return np.stack([self._one(pixels) for pixels in inputs])

    def _one(self, pixels: NDArray[np.generic]) -> NDArray[np.float64]:
        (rows,) = self._graph.run(1, images=pixels[None])
        return as_probabilities(rows, len(self.classes), self._graph.shown)


def as_probabilities(rows: NDArray[np.generic], classes: int, shown: str) -> NDArray[np.float64]:
    """The one row of an answer. Shape: (1, K) -> (K,).

    Raises: CheckpointError.
    """
    if rows.shape != (1, classes) or not np.isfinite(rows).all():
        raise CheckpointError(f"{shown} does not give one number a class")
    row: NDArray[np.float64] = rows[0].astype(np.float64)
    return row


class Worker(Confined):
    """The process that runs one file.

    Attributes: `facts`, the metadata that the file was exported with.

    Raises: CheckpointError when the file is refused.
    """

    def __init__(self, raw: bytes, shown: str) -> None:
        super().__init__(onnx_worker, shown)
        try:
            self.facts: Any = json.loads(self.ask(raw))
        except (ValueError, RecursionError) as error:
            raise self.refusal() from error

    def run(self, count: int, **inputs: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        """The first `count` outputs for some inputs by name.

        Raises: CheckpointError when the file fails, takes too long, takes its process down, or gives something else.
        """
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        described = {name: [array.dtype.name, array.shape] for name, array in arrays.items()}
        answer = self.ask(json.dumps(described).encode(), *map(_bytes, arrays.values()))
        try:
            outputs = onnx_worker.unpack(answer)[:count]
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            outputs = []
        if len(outputs) < count:
            raise self.refusal()
        return outputs

    def refusal(self) -> CheckpointError:
        """For answers that an exported file never gives."""
        return CheckpointError(f"{self.shown} does not give what an exported file gives")


def _bytes(array: NDArray[np.generic]) -> memoryview:
    """The numbers of an array, also where there are none."""
    return array.reshape(-1).view(np.uint8).data
