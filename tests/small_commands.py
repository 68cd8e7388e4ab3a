"""A place where whole command lines run: pictures, and a finished run of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from forked import Forks
from nasty import HOSTILE_NAMES
from PIL import Image
from small_run import shapes

SMALL = [
    "--model", "cnn", "--weights", "none", "--imgsz", "32", "--epochs", "1", "--batch", "8", "--workers", "1", "--threads", "1",
    "--device", "cpu", "--offline", "--no-augment",
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder to work in, with `data` of two classes or more and `runs/done`, a run that was trained on it."""

    root: Path
    forks: Forks

    @property
    def run(self) -> Path:
        return self.root / "runs" / "done"

    @property
    def weights(self) -> Path:
        return self.run / "weights" / "best.safetensors"


def trained_in(root: Path, forks: Forks, *options: str) -> Place:
    done = forks.run("train", "data", "--name", "done", *SMALL, *options, cwd=root)
    assert done.code == 0, done.err.decode()
    return Place(root, forks)


def plain_place(root: Path, forks: Forks) -> Place:
    """Circles and squares; `test` holds four others of each."""
    shapes(root / "data", images=16)
    shapes(root / "test", images=4, first=50)
    return trained_in(root, forks)


def hostile_place(root: Path, forks: Forks) -> Place:
    """Every hostile name as a class, and as a picture in that class and in the last one."""
    chance = np.random.default_rng(0)

    def write(*parts: bytes) -> None:
        path = os.path.join(os.fsencode(root), b"data", *parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (24, 24, 3), np.uint8)).save(os.fsdecode(path), "PNG")

    for name in HOSTILE_NAMES:
        write(name, name[:200] + b".png")
        write(name, b"2.png")
        write(b"zoo", name[:200] + b".jpg")
    write(b"zoo", b"x[", b"b].jpg")  # as a path this is a tag of Rich: x[/b].jpg
    write(b"zoo", b"y[", b"link=http:", b"e.example]click.jpg")
    return trained_in(root, forks, "--split", "0.5")
