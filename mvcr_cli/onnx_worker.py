"""A foreign ONNX file is parsed and run here, in a process of its own that may use little and write nothing.

`engine/onnx_predictor.py` starts `python -P -m mvcr_cli.onnx_worker` and talks to it through two pipes. A message is a
length of eight bytes and that many bytes. The first one from there is the file; then, for each run, what the inputs are
and one message for each. An answer begins with `+` and the result, or with `-` and why there is none.

Nothing of torch is loaded here: the process starts fast and its memory can be bounded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from typing import IO, Any

SECONDS = 60  # for the file, and for each picture
LEAST_MEMORY = 2 << 30
LONGEST_ANSWER = 64 << 20
_NUMBERS = {"float32": "<f4", "float64": "<f8", "int64": "<i8"}


class Refused(Exception):
    """Why a file is not run, and the way out."""


def send(stream: IO[bytes], *messages: bytes | memoryview) -> None:
    for message in messages:
        stream.write(len(message).to_bytes(8, "little"))
        stream.write(message)
    stream.flush()


def receive(stream: IO[bytes], limit: int) -> bytes | None:
    """The next message; None at the end of the stream, or when it is longer than `limit` bytes."""
    head = stream.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > limit:
        return None
    message = stream.read(length)
    return message if len(message) == length else None


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _import_all()
    _confine()
    raw = receive(requests, sys.maxsize)
    if raw is None:
        return
    try:
        facts = inspect(raw)
        session = _session(raw)
    except Refused as refused:
        send(answers, b"-" + json.dumps(refused.args).encode())
        return
    del raw
    send(answers, b"+" + json.dumps(facts).encode())
    while (described := receive(requests, 1000)) is not None:
        inputs = {name: (kind, shape, receive(requests, sys.maxsize))
                  for name, (kind, shape) in json.loads(described).items()}  # fmt: skip
        _allow_processor_time()
        try:
            send(answers, b"+" + _run(session, inputs))
        except Exception as error:  # onnxruntime's exceptions share no public base class
            send(answers, b"-" + json.dumps([f"cannot judge a picture: {str(error)[:200]}", ""]).encode())


def _import_all() -> None:
    """What `_confine` would keep from being imported."""
    import numpy  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401


def _confine() -> None:
    """Nothing is opened any more, neither file nor socket; half of the memory at most; where the system can do that."""
    try:
        import resource
    except ImportError:
        return
    memory = LEAST_MEMORY
    with contextlib.suppress(ValueError, OSError):
        memory = max(memory, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    # RLIMIT_DATA, because address space that is only reserved, as for the stacks of many threads, costs nothing.
    limits = (
        (resource.RLIMIT_DATA, memory), (resource.RLIMIT_NOFILE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0),
    )  # fmt: skip
    for kind, limit in limits:
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))
    _allow_processor_time()


def _allow_processor_time() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        until = math.ceil(time.process_time() + SECONDS * (os.cpu_count() or 1))
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


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
        raise Refused("holds functions or training graphs of its own, which mvcr never exports", "")
    if any(t.data_location == onnx.TensorProto.EXTERNAL or t.external_data for t in _tensors(model.graph)):
        raise Refused("keeps its weights in other files", "only self-contained ONNX files are opened")
    domains = {entry.domain for entry in model.opset_import} | {node.domain for node in _nodes(model.graph)}
    if foreign := domains - {"", "ai.onnx"}:
        raise Refused(f"needs foreign operators: {', '.join(sorted(foreign))[:200]}", "")
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
        raise Refused(f"cannot be run: {str(error)[:200]}", "") from error


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
