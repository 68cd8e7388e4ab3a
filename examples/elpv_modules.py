"""Put solar cells together to modules: large real pictures in which a few cracked cells of twenty-four decide.

Data: the cells of examples/elpv.py (CC BY-NC-SA 4.0: downloaded, never distributed). A module is six by four cells of
300x300 px, 1800x1200 px in all, each cell mirrored and turned at random. A "cracked" module has some cells, one to three
unless told otherwise, whose defect probability is 1, all other cells have 0; an "intact" one has none. Cells of test
modules come from other blocks of 60 neighbouring cells than those of training modules.

    python examples/elpv_modules.py OUT --wheel elpv_dataset-*.whl [--train 600] [--test 200]
        [--least-cracked 1] [--most-cracked 3] [--seed 0] [--cells]

OUT/{train,val}/{cracked,intact}/*.jpg, half of each. With --cells, the cells that they are made of instead:
OUT/{train,val}/{defective,functional}/*.png.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLUMNS, ROWS, CELL = 6, 4, 300
Cells = list[NDArray[np.uint8]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, required=True, help="pip download --no-deps elpv-dataset")
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--least-cracked", type=int, default=1)
    parser.add_argument("--most-cracked", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", action="store_true")
    options = parser.parse_args()
    cells = read_cells(options.wheel, options.seed)
    if options.cells:
        save_cells(cells, options.out)
        return
    for part, count in (("train", options.train), ("val", options.test)):
        for number in range(count):
            rng = np.random.default_rng([options.seed, part == "val", number])
            cracked = int(rng.integers(options.least_cracked, options.most_cracked + 1)) if number % 2 else 0
            module = draw(cells[part, "defective"], cells[part, "functional"], cracked, rng)
            target = options.out / part / ("cracked" if cracked else "intact") / f"{number:05d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(module).save(target, quality=95)
    print(f"{options.train} training and {options.test} test modules in {options.out}", file=sys.stderr)


def save_cells(cells: dict[tuple[str, str], Cells], out: Path) -> None:
    for (part, state), pictures in cells.items():
        (out / part / state).mkdir(parents=True, exist_ok=True)
        for number, cell in enumerate(pictures):
            Image.fromarray(cell).save(out / part / state / f"{number:04d}.png")


def read_cells(wheel: Path, seed: int) -> dict[tuple[str, str], Cells]:
    """Certain cells only, by part and state; whole blocks of neighbours go to one part."""
    sys.path.insert(0, str(Path(__file__).parent))
    import elpv

    found: dict[tuple[str, str], Cells] = {(p, s): [] for p in ("train", "val") for s in ("functional", "defective")}
    with zipfile.ZipFile(wheel) as archive:
        rows = elpv.read_labels(archive.read("elpv_dataset/data/labels.csv").decode())
        held_out = elpv.choose(rows, argparse.Namespace(seed=seed, split="block", val=0.25, positive=0.5))
        for number, (name, probability, _) in enumerate(rows):
            if probability in (0.0, 1.0):
                key = "val" if number in held_out else "train", "defective" if probability else "functional"
                with Image.open(io.BytesIO(archive.read(f"elpv_dataset/data/{name}"))) as cell:
                    found[key].append(np.asarray(cell.convert("L")))
    return found


def draw(defective: Cells, functional: Cells, cracked: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    module = np.zeros((ROWS * CELL, COLUMNS * CELL), np.uint8)
    bad = set(rng.choice(ROWS * COLUMNS, cracked, replace=False).tolist())
    for place in range(ROWS * COLUMNS):
        pool = defective if place in bad else functional
        cell = np.rot90(pool[rng.integers(len(pool))], 2 * rng.integers(2))
        top, left = place // COLUMNS * CELL, place % COLUMNS * CELL
        module[top : top + CELL, left : left + CELL] = cell[:, ::-1] if rng.random() < 0.5 else cell
    return module


if __name__ == "__main__":
    main()
