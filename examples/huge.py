"""Peak memory and processor time of pictures of 400 megapixels, as JPEG and as TIFF.

Data: the two photographs that come with scikit-learn (CC BY), enlarged, repeated and mixed with noise to 20000x20000
pixels; written in bounded memory to WORK: baseline JPEG (quality 90), TIFF in strips and TIFF in tiles of 256 px (both
deflated). The model is trained on crops of the same photographs for one epoch: it is only there to be run.
Result: one row for each file and way of reading it, each in a process of its own, with all that it loads; "decode" is
libvips alone, without mvcr. Needs `pip install 'mvcr[large]' scikit-learn`.

    python examples/huge.py [WORK] [--side 20000] [--imgsz 224] [--model mvcr18] [--zoom] [--threads 1]

WORK should lie outside of the project; without it, a temporary folder is made and removed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = ("strips.jpg", "strips.tif", "tiles.tif")

# Every step runs in a child, so that this process stays small: a child's peak begins at its parent's size.
MAKE = """
import sys
from pathlib import Path
import numpy, pyvips
from sklearn.datasets import load_sample_images
work, side = Path(sys.argv[1]), int(sys.argv[2])
photos = [pyvips.Image.new_from_array(photo) for photo in load_sample_images().images]
for name, photo in zip(("china", "flower"), photos):
    (work / "photos" / name).mkdir(parents=True)
    for number in range(16):
        photo.crop(10 * number, 5 * number, 400, 300).jpegsave(str(work / "photos" / name / f"{number}.jpg"), Q=95)
large = photos[0].resize(4, kernel="cubic").join(photos[1].resize(4, kernel="cubic"), "horizontal").copy_memory()
across, down = -(-side // large.width), -(-side // large.height)
picture = large.replicate(across, down).crop(0, 0, side, side)
picture = (picture + pyvips.Image.gaussnoise(side, side, sigma=6)).cast("uchar").copy(interpretation="srgb")
picture.jpegsave(str(work / "strips.jpg"), Q=90)
picture.tiffsave(str(work / "strips.tif"), compression="deflate", bigtiff=True)
picture.tiffsave(str(work / "tiles.tif"), compression="deflate", bigtiff=True, tile=True, tile_width=256, tile_height=256)
"""
DECODE = """
import sys, pyvips
pyvips.cache_set_max(0)
load = pyvips.Image.jpegload if sys.argv[1].endswith(".jpg") else pyvips.Image.tiffload
picture = load(sys.argv[1], access="sequential")
region = pyvips.Region.new(picture)
for top in range(0, picture.height, 32):
    region.fetch(0, top, picture.width, min(32, picture.height - top))
"""
READ = """
import sys
from mvcr_cli.data.huge import open_huge
with open_huge(sys.argv[1]) as picture:
    {}
"""
GRID = "[(x, y, x + 224, y + 224) for x in range(0, w, w // 8) for y in range(0, h, h // 8)]"
WAYS = {
    "strips of 256 rows": "for top, strip in picture.strips(256): pass",
    "strips shrunk by 2": "for top, strip in picture.strips(256, shrink=2): pass",
    "64 tiles of 224 px": f"w, h = picture.size; picture.tiles({GRID}, 224)",
    "glance of 448 px": "picture.glance(448)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--imgsz", type=int, default=224)
    parser.add_argument("--model", default="mvcr18")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--zoom", action="store_true", help="train and predict with tiles as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mvcr-huge-") as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        if not all((work / name).exists() for name in FILES):
            report("making the files", [sys.executable, "-c", MAKE, str(work), str(options.side)], options.threads)
        run = work / ("zoomed" if options.zoom else "plain")
        if not run.exists():
            train(run, work / "photos", options)
        print("| file | read as | CPU s | peak RSS MB |\n|---|---|---|---|")
        for name in FILES:
            measure(work / name, run, options.threads, options.zoom)


def train(run: Path, photos: Path, options: argparse.Namespace) -> None:
    command = [sys.executable, "-m", "mvcr_cli", "train", str(photos), "--run", str(run), "--weights", "none", "--offline",
               "--model", options.model, "--imgsz", str(options.imgsz), "--epochs", "1", "--batch", "8"]  # fmt: skip
    report("training", command + (["--zoom", "on"] if options.zoom else []), options.threads)


def measure(path: Path, run: Path, threads: int, zoom: bool) -> None:
    rows = {"decode": ["-c", DECODE, str(path)]}
    rows |= {way: ["-c", READ.format(code), str(path)] for way, code in WAYS.items()}
    kind = "predict with zoom" if zoom else "predict"
    rows[kind] = ["-m", "mvcr_cli", "predict", str(path), "--run", str(run), "--format", "jsonl"]
    for way, arguments in rows.items():
        seconds, megabytes = spent([sys.executable, *arguments], threads)
        print(f"| {path.name} | {way} | {seconds:.2f} | {megabytes:.0f} |", flush=True)


def report(what: str, command: list[str], threads: int) -> None:
    seconds, megabytes = spent(command, threads)
    print(f"{what}: {seconds:.1f} CPU s, {megabytes:.0f} MB", file=sys.stderr)


def spent(command: list[str], threads: int) -> tuple[float, float]:
    """CPU seconds and peak resident megabytes of one process."""
    limits = {"OMP_NUM_THREADS": str(threads), "VIPS_CONCURRENCY": str(threads)}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | limits)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... ended with {child.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)


if __name__ == "__main__":
    main()
