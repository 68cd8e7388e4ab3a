"""Peak memory of training on large pictures against the same pictures made small.

Data: two photographs that come with scikit-learn (CC BY), cut and mirrored into 500 different JPEGs of 12 megapixels
(4000x3000), in two classes; and the same pictures at 512 px.
Result: peak resident memory of `mvcr train`, from its summary.json, equal settings on both, one epoch: without zoom, and with
it. Large pictures turn zoom on by themselves; then a quarter of --memory caches tiles, whatever the pictures' size.

    python examples/memory.py WORK [--count 500]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

LARGE, SMALL = (4000, 3000), (512, 384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--options", default="--model mvcr10n --imgsz 128 --batch 32 --epochs 1")
    options = parser.parse_args()
    make(options.work, options.count)
    print("| settings | 12 MP: peak RSS MiB | 512 px | difference |\n|---|---|---|---|")
    for zoom in ("off", "on"):
        large, small = (peak(folder, zoom, options) for folder in ("large", "small"))
        print(f"| `--zoom {zoom}` | {large:.0f} | {small:.0f} | {large - small:+.0f} |", flush=True)


def peak(folder: str, zoom: str, options: argparse.Namespace) -> float:
    """Peak resident memory of a training in MiB."""
    run: Path = options.work / "runs" / f"{folder}-{zoom}"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "mvcr_cli", "train", str(options.work / folder), "--run", str(run), "--weights", "none",
               "--zoom", zoom, *options.options.split()]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    found: float = json.loads((run / "summary.json").read_text())["peak_rss_mb"]
    return found


def make(work: Path, count: int) -> None:
    """Both folders, if they are not there yet."""
    if (work / "large").exists():
        return
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(array) for array in load_sample_images().images]
    for number in range(count):
        rng = random.Random(number)
        label, photo = ("china", "flower")[number % 2], photos[number % 2]
        width = rng.uniform(0.6, 1.0) * photo.width
        height = width * LARGE[1] / LARGE[0]
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, max(0.0, photo.height - height))
        box = (left, top, left + width, min(photo.height, top + height))
        picture = photo.resize(LARGE, Image.Resampling.BICUBIC, box=box)
        for name, size in (("large", LARGE), ("small", SMALL)):
            folder = work / name / label
            folder.mkdir(parents=True, exist_ok=True)
            picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2).save(
                folder / f"{number:04d}.jpg", quality=85
            )


if __name__ == "__main__":
    main()
