"""The exported ONNX file as a predictor: the same records as the run, from onnxruntime.

A foreign file is confined: it is parsed before it is run, and refused when it points outside of itself.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mvcr_cli.checkpoint import check_classes, read_bytes
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
    facts = _inspect(raw, shown)
    if "taught" not in facts:
        return OnnxPredictor.from_bytes(raw, shown)
    from mvcr_cli.engine.export_zoom import OnnxZoomPredictor

    names = facts.get("classes")
    classes = check_classes(names, len(names) if isinstance(names, list) else 0, shown)
    return OnnxZoomPredictor.beside(path, raw, facts, classes)


def open_session(raw: bytes, shown: str) -> Any:
    """An onnxruntime session of a file that keeps to itself.

    Raises: CheckpointError.
    """
    import onnxruntime

    _inspect(raw, shown)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise CheckpointError(f"{shown} cannot be run: {display_name(str(error), 120)}") from error


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
        facts = _inspect(raw, shown)
        try:
            preprocess = Preprocess.from_dict(facts["preprocess"])
            names = facts["classes"]
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise CheckpointError(f"{shown} was not exported by mvcr", "export a run with: mvcr export") from error
        self.classes = check_classes(names, len(names) if isinstance(names, list) else 0, shown)
        self.size = preprocess.size
        self._session = open_session(raw, shown)

    def read(self, path: str) -> Ready:
        picture = load_picture(path, 2 * self.size)
        return Ready(path, picture.width, picture.height, np.array(picture.image, dtype=np.uint8))

    def judge(self, group: list[Ready]) -> list[Verdict]:
        return [Verdict(row) for row in self.probabilities([ready.input for ready in group])]

    def probabilities(self, inputs: list[NDArray[np.generic]]) -> NDArray[np.float64]:
        rows = [self._session.run(None, {"images": pixels[None]})[0][0] for pixels in inputs]
        return np.stack(rows).astype(np.float64)


def _inspect(raw: bytes, shown: str) -> dict[str, Any]:
    """The metadata of a self-contained file.

    Raises: CheckpointError when it is no ONNX file, or keeps data or operators elsewhere.
    """
    import onnx

    try:
        model = onnx.load_from_string(raw)
    except Exception as error:  # protobuf's DecodeError and others
        raise CheckpointError(f"{shown} is no ONNX file", "export a run with: mvcr export") from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in _tensors(model.graph)):
        raise CheckpointError(f"{shown} keeps its weights in other files", "only self-contained ONNX files are opened")
    if foreign := {entry.domain for entry in model.opset_import} - {"", "ai.onnx"}:
        raise CheckpointError(f"{shown} needs foreign operators: {display_name(', '.join(sorted(foreign)))}")
    if model.functions:
        raise CheckpointError(f"{shown} defines functions of its own, which mvcr never exports")
    props = {prop.key: prop.value for prop in model.metadata_props}
    try:
        facts = json.loads(props["mvcr"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown} was not exported by mvcr", "export a run with: mvcr export") from error
    return facts if isinstance(facts, dict) else {}


def _tensors(graph: Any) -> list[Any]:
    """Every tensor of a graph, in initialisers, attributes and subgraphs."""
    found = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        found += [sparse.values, sparse.indices]
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t, *attribute.tensors]
            for sub in (attribute.g, *attribute.graphs):
                if sub.node or sub.initializer:
                    found += _tensors(sub)
    return found
