"""A torch file made into a safetensors file, for `mvcr train --weights`: the only way in for a pickle.

It is read in a process of its own (`mvcr_cli.torch_worker`), which gets bytes and gives back safetensors bytes. These are
validated here like the weights of any other tool, and written anew.
"""

from __future__ import annotations

from pathlib import Path

from mvcr_cli import torch_worker
from mvcr_cli.checkpoint import check_numbers, pack, read_bytes, unpack
from mvcr_cli.config import ExportConfig
from mvcr_cli.confined import Confined
from mvcr_cli.engine.export import check_target
from mvcr_cli.errors import CheckpointError
from mvcr_cli.paths import display_name, write_whole
from mvcr_cli.records import ConversionReport


def convert(config: ExportConfig) -> ConversionReport:
    """Write the state dict of `config.from_torch` as bare weights.

    Raises:
        CheckpointError: the file is no state dict, is damaged, or does something else; no file is written.
        InputMissing: there is no such file.
        CannotCreate: the file to write exists and may not be replaced.
    """
    source = config.from_torch
    assert source is not None
    target = config.out or Path(f"{source.stem}.safetensors")
    check_target(target, config)
    raw, shown = read_bytes(source), display_name(source.name)
    # One thread: the memory of more counts, and nothing is computed.
    answer = Confined(torch_worker, shown, OMP_NUM_THREADS="1").ask(raw)
    try:
        tensors, meta = unpack(answer, source)
    except CheckpointError as error:
        raise CheckpointError(f"{shown} did not come back as weights", "use another copy") from error
    if meta:
        raise CheckpointError(f"{shown} came back with more than weights", "use another copy")
    for name, tensor in tensors.items():
        check_numbers(name, tensor, shown)
    written = pack(tensors, {})
    write_whole(target, written)
    return ConversionReport(
        source=str(source),
        file=str(target),
        format=config.format,
        megabytes=len(written) / 1e6,
        tensors=len(tensors),
    )
