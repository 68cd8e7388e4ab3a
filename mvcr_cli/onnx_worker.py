"""A foreign ONNX file is parsed and run here, in a process of its own that may use little, write nothing and open nothing.

`engine/onnx_predictor.py` starts it, as `mvcr_cli.confined` tells. The first message is the file; then, for each run, what the
inputs are and one message for each.

Nothing of torch is loaded here: the process starts fast and its memory can be bounded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from typing import Any

from mvcr_cli.confined import Refused, allow_processor_time, confine, open_nothing, receive, refuse, send, streams

SECONDS = 60  # for the file, and for each picture
LEAST_MEMORY = 2 << 30
LONGEST_ANSWER = 64 << 20
_NUMBERS = {"float32": "<f4", "float64": "<f8", "int64": "<i8"}


def main() -> None:
    requests, answers = streams()
    _import_all()
    confine(_memory())
    open_nothing()
    _allow_seconds()
    raw = receive(requests, sys.maxsize)
    if raw is None:
        return
    try:
        facts = inspect(raw)
        session = _session(raw)
    except Refused as refused:
        refuse(answers, refused)
        return
    del raw
    send(answers, b"+" + json.dumps(facts).encode())
    while (described := receive(requests, 1000)) is not None:
        inputs = {name: (kind, shape, receive(requests, sys.maxsize))
                  for name, (kind, shape) in json.loads(described).items()}  # fmt: skip
        _allow_seconds()
        try:
            send(answers, b"+" + _run(session, inputs))
        except Exception as error:  # onnxruntime's exceptions share no public base class
            refuse(answers, Refused(f"cannot judge a picture: {str(error)[:200]}"))


def _import_all() -> None:
    """What `open_nothing` would keep from being imported."""
    import numpy  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401


def _memory() -> int:
    """Half of the machine's."""
    with contextlib.suppress(ValueError, OSError):
        return max(LEAST_MEMORY, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return LEAST_MEMORY


def _allow_seconds() -> None:
    allow_processor_time(SECONDS * (os.cpu_count() or 1))


def inspect(raw: bytes) -> Any:
    """The metadata of a self-contained file.

    Raises: Refused when it is no ONNX file, or keeps data or operators elsewhere.
    """
    import onnx

    try:
        model = onnx.load_from_string(raw)
    except Exception as error:  # protobuf's DecodeError and others
        raise Refused("is no ONNX file", "export a run with: mvcr export") from error
    if model.training_info or model.functions:
        raise Refused("holds functions or training graphs of its own, which mvcr never exports")
    if any(t.data_location == onnx.TensorProto.EXTERNAL or t.external_data for t in _tensors(model.graph)):
        raise Refused("keeps its weights in other files", "only self-contained ONNX files are opened")
    domains = {entry.domain for entry in model.opset_import} | {node.domain for node in _nodes(model.graph)}
    if foreign := domains - {"", "ai.onnx"}:
        raise Refused(f"needs foreign operators: {', '.join(sorted(foreign))[:200]}")
    try:
        return json.loads({prop.key: prop.value for prop in model.metadata_props}["mvcr"])
    except (KeyError, ValueError, RecursionError) as error:
        raise Refused("was not exported by mvcr", "export a run with: mvcr export") from error


def _nodes(graph: Any) -> list[Any]:
    """Every node of a graph and of the graphs in its attributes."""
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            for sub in (attribute.g, *attribute.graphs):
                found += _nodes(sub)
    return found


def _tensors(graph: Any) -> list[Any]:
    """Every tensor of a graph, in initialisers, attributes and the graphs in those."""
    found = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        found += [sparse.values, sparse.indices]
    for node in graph.node:
        for attribute in node.attribute:
            found += [attribute.t, *attribute.tensors]
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                found += [sparse.values, sparse.indices]
            for sub in (attribute.g, *attribute.graphs):
                found += _tensors(sub)
    return found


def _session(raw: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise Refused(f"cannot be run: {str(error)[:200]}") from error


def _run(session: Any, inputs: dict[str, tuple[str, list[int], bytes | None]]) -> bytes:
    """All outputs, packed. `inputs`: kind of number, shape and bytes by name."""
    import numpy as np

    feeds = {name: np.frombuffer(raw or b"", kind).reshape(shape) for name, (kind, shape, raw) in inputs.items()}
    outputs = [np.ascontiguousarray(output) for output in session.run(None, feeds)]
    head = json.dumps([[output.dtype.name, output.shape] for output in outputs]).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *(output.tobytes() for output in outputs)])


def unpack(answer: bytes) -> list[Any]:
    """The arrays of an answer, of numbers only and read-only.

    Raises: ValueError, TypeError or KeyError when it is none.
    """
    import numpy as np

    end = 8 + int.from_bytes(answer[:8], "little")
    arrays = []
    for kind, shape in json.loads(answer[8:end]):
        array = np.frombuffer(answer, _NUMBERS[kind], math.prod(shape), end).reshape(shape)
        end += array.nbytes
        arrays.append(array)
    return arrays


if __name__ == "__main__":
    main()
