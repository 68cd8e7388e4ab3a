"""Where a run's first weights come from: a pretrained trunk, a file, or chance. Decided once, said once, recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mvcr_cli import weights
from mvcr_cli.checkpoint import load_bare
from mvcr_cli.config import Stem, TrainConfig
from mvcr_cli.engine import Say
from mvcr_cli.errors import CheckpointError, Unavailable, WriteFailed
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
    """

    source: str
    pretrained: bool
    stem: Stem | None = None
    tensors: dict[str, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def restored(cls, stored: dict[str, Any]) -> Start:
        return cls(str(stored.get("source")), bool(stored.get("pretrained")), stored.get("stem"))

    @classmethod
    def of_file(cls, source: str, tensors: dict[str, Tensor]) -> Start:
        first = tensors.get("conv1.weight")
        return cls(source, True, "small" if first is not None and first.shape[-1] == 3 else "imagenet", tensors)

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "pretrained": self.pretrained, "stem": self.stem}


def starting_weights(config: TrainConfig, say: Say) -> Start:
    """The trunk that `--weights` asks for.

    `auto` falls back to random weights, with one line that says why; `imagenet` and a file are had or refused.

    Raises: Unavailable (imagenet cannot be had), InputMissing or CheckpointError (the file cannot be used).
    """
    if config.weights == "none":
        return Start("random weights", False)
    if config.weights not in ("auto", "imagenet"):
        path = Path(config.weights)
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            raise CheckpointError(
                f"{display_name(path)} is a pickle-based torch file, which can run code when it is opened",
                "save its state dict with safetensors.torch.save_file and give that file to --weights",
            )
        return Start.of_file(f"weights of {display_name(path.name)}", load_bare(path))
    model = config.model or DEFAULT_PRETRAINED
    if config.weights == "auto" and model not in weights.SOURCES:
        say(f"weights: there are no pretrained weights for {model}; training from scratch")
        return Start("random weights", False)
    try:
        path = weights.pretrained(model, offline=config.offline, say=say)
    except (Unavailable, WriteFailed) as error:
        if config.weights == "imagenet":
            raise
        say(f"weights: no pretrained weights ({error.message}); training from scratch")
        return Start("random weights", False)
    return Start.of_file(f"ImageNet weights {path.name}", load_bare(path))
