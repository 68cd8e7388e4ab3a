"""Where a run's first weights come from: a pretrained trunk, a file, or chance. Decided once, said once, recorded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from mvcr_cli import weights
from mvcr_cli.checkpoint import load_named, read_bytes, unpack
from mvcr_cli.config import PRESET_NAMES, Layer, ModelConfig, Stem, TrainConfig
from mvcr_cli.engine import Say
from mvcr_cli.errors import CannotCreate, ConfigMismatch, NotPermitted, Unavailable, UsageError, WriteFailed
from mvcr_cli.models import build
from mvcr_cli.paths import display_name

DEFAULT_PRETRAINED = "mvcr18"


@dataclass(frozen=True)
class Start:
    """The first weights of a run.

    Args:
        source: for people and for `config.json`.
        pretrained: the trunk is not random, so settings for fine-tuning apply.
        stem: that of the trunk; None where the size of the pictures decides.
        tensors: the trunk's state dict, not recorded.
        classes: names of the rows of the last layer; empty where the file does not tell. Not recorded.
        model: the network that they were taken from; None where the file does not tell. Not recorded.
        options: those of `mvcr train` that fit a file of mvcr; empty for any other. Not recorded.
        new_parts: what the trunk did not fill, by name, once a network has been built; it learns faster.
    """

    source: str
    pretrained: bool
    stem: Stem | None = None
    tensors: dict[str, Tensor] | None = field(default=None, repr=False)
    classes: tuple[str, ...] = ()
    model: ModelConfig | None = None
    options: str = ""
    new_parts: tuple[str, ...] = ()

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> Start:
        """What `to_dict` gave. Raises: KeyError, TypeError for anything else."""
        source, pretrained, stem = stored["source"], stored["pretrained"], stored["stem"]
        new_parts = stored["new_parts"] if pretrained else ()
        return cls(str(source), bool(pretrained), stem, new_parts=tuple(map(str, new_parts)))

    @classmethod
    def of_file(cls, source: str, path: Path) -> Start:
        """Raises: InputMissing or CheckpointError when the file cannot be used."""
        tensors, classes = load_named(path)
        first = tensors.get("conv1.weight")
        stem: Stem = "imagenet"
        recorded = unpack(read_bytes(path), path)[1].get("model")
        if first is not None and first.shape[-1:] == (3,):  # the filter does not tell its stride: own files record it
            stem = "fine" if isinstance(recorded, dict) and recorded.get("stem") == "fine" else "small"
        return cls(source, True, stem, tensors, classes, _model(recorded), _options(recorded))

    def to_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the optimiser's groups depend on the new parts."""
        return {
            "source": self.source, "pretrained": self.pretrained, "stem": self.stem, "new_parts": list(self.new_parts),
        }  # fmt: skip


def _model(recorded: object) -> ModelConfig | None:
    """The model of a weights file of mvcr; None when it is of no version that is known."""
    try:
        return ModelConfig.from_dict(recorded) if isinstance(recorded, dict) else None
    except (TypeError, ValueError, AttributeError, OverflowError, UsageError):
        return None


def _options(recorded: object) -> str:
    """The model of a weights file of mvcr, as options of `mvcr train`."""
    if not isinstance(recorded, dict) or recorded.get("name") not in PRESET_NAMES:
        return ""
    layers = [layer for layer in get_args(Layer) if recorded.get(layer)]
    return f"--model {recorded['name']} --layers {','.join(layers) or 'none'}"


def starting_weights(config: TrainConfig, say: Say) -> Start:
    """The trunk that `--weights` asks for.

    `auto` falls back to random weights, with one line that says why; `imagenet` and a file are had or refused.

    Raises:
        Unavailable: imagenet cannot be had.
        WriteFailed, NotPermitted, CannotCreate: its place in the cache cannot be written or read.
        InputMissing, CheckpointError: the file cannot be used.
    """
    if config.weights == "none":
        return Start("random weights", False)
    if config.weights not in ("auto", "imagenet"):
        path = Path(config.weights)
        return Start.of_file(f"weights of {display_name(path.name)}", path)
    model = config.model or DEFAULT_PRETRAINED
    if config.weights == "auto" and model not in weights.SOURCES:
        say(f"weights: there are no pretrained weights for {model}; training from scratch")
        return Start("random weights", False)
    try:
        path = weights.pretrained(model, offline=config.offline, say=say)
    except (Unavailable, WriteFailed, NotPermitted, CannotCreate) as error:
        if config.weights == "imagenet":
            raise
        say(f"weights: no pretrained weights ({error.message}); training from scratch")
        return Start("random weights", False)
    return Start.of_file(f"ImageNet weights {path.name}", path)


def restarted(config: TrainConfig, stored: Start, say: Say) -> Start:
    """The first weights once more, for a run that was killed before its first state.

    Raises: ConfigMismatch when they are not to be had any more, or are others.
    """
    if not stored.pretrained:
        return stored
    start = starting_weights(config, say)
    if start.source != stored.source:
        raise ConfigMismatch(
            f"the run began from {stored.source} and saved no state yet; now it would begin from {start.source}",
            "start a new run",
        )
    return start


def for_classes(start: Start, config: ModelConfig, classes: tuple[str, ...], say: Say) -> dict[str, Tensor] | None:
    """The first weights for a network of these classes: whatever belongs to a class goes by its name.

    A last layer of as many classes with other names, or without names, would give each class another one's weights. It
    is left out and starts anew.
    """
    if start.tensors is None:
        return None
    of_classes = [name for name, shape in _class_tensors(config).items()
                  if name in start.tensors and start.tensors[name].shape == shape]  # fmt: skip
    if not of_classes or start.classes == classes:
        return start.tensors
    if sorted(start.classes) == sorted(classes):
        say("weights: they have the classes in another order; the rows of the last layer follow the names")
        order = [start.classes.index(name) for name in classes]
        return start.tensors | {name: start.tensors[name][order] for name in of_classes}
    known = f"classes such as {display_name(start.classes[0], 40)!r}" if start.classes else "classes without names"
    say(f"weights: they are of {known}; the last layer starts anew")
    return {name: tensor for name, tensor in start.tensors.items() if name not in of_classes}


def _class_tensors(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the tensors with one row a class: those that grow with the number of classes."""
    with torch.device("meta"):
        own, larger = (
            build(replace(config, classes=count)).state_dict() for count in (config.classes, config.classes + 1)
        )
    return {name: tensor.shape for name, tensor in own.items() if tensor.shape != larger[name].shape}
