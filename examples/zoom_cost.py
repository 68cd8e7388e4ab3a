"""Cost against the size of the pictures: a zooming network, and the plain ResNet of the same trunk at full resolution.

Data: Megapixel-MNIST pictures (examples/megapixel_mnist.py) with the same five digits and fifty strokes on ever larger
black squares, as JPEG of quality 90. For each size and each kind of work a process of its own is started.

    python examples/zoom_cost.py OUT --digits package/src/digits --run runs/black [--megapixels 1,4,16,64,256]
        [--plain-most 16]

Prints one line a size and work: processor seconds (one thread; importing is not counted), peak memory of the process
with everything in it, and whether the run named the right digit.

decode      the file read once from top to bottom, nothing else
predict     glance, search for tiles, verdict, as `mvcr predict` does it, of one picture
read        what a training reads the first time it visits a picture: glance and 128 candidates
step        forward and backward on one picture that was read before, with 16 tiles
plain       the plain ResNet at full resolution: verdict
plain-step  the same, forward and backward

The plain ResNet is left out above --plain-most megapixels: its memory grows with the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

WORKS = ("decode", "predict", "read", "step", "plain", "plain-step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--digits", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--megapixels", default="1,4,16,64,256")
    parser.add_argument("--plain-most", type=float, default=16)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(measure(options.work, options.picture, options.run)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for megapixels in map(float, options.megapixels.split(",")):
        picture, label = draw(options, megapixels)
        for work in WORKS:
            if work.startswith("plain") and megapixels > options.plain_most:
                continue
            print(
                json.dumps({"megapixels": megapixels, "work": work} | start(work, picture, options, label)), flush=True
            )


def draw(options: argparse.Namespace, megapixels: float) -> tuple[Path, int]:
    """A picture of that size, and its digit."""
    sys.path.insert(0, str(Path(__file__).parent))
    import megapixel_mnist as mnist

    side = round((megapixels * 1e6) ** 0.5)
    task = mnist.Task(mnist.read_digits(options.digits, held_out=True), side, True)
    label, pixels, _ = mnist.draw(task, np.random.default_rng(7))
    path = options.out / f"{megapixels:g}.jpg"
    Image.fromarray(pixels).convert("RGB").save(path, quality=90)
    return path, label


def start(work: str, picture: Path, options: argparse.Namespace, label: int) -> dict[str, object]:
    command = [sys.executable, __file__, str(options.out), "--digits", str(options.digits), "--run", str(options.run),
               "--work", work, "--picture", str(picture)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VIPS_CONCURRENCY": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:120] if done.stderr else done.returncode}
    found: dict[str, object] = json.loads(done.stdout)
    if "verdict" in found:
        found["right"] = found.pop("verdict") == str(label)
    return found


def measure(work: str, picture: Path, run: Path) -> dict[str, object]:
    import torch

    torch.set_num_threads(1)
    do = prepare(work, picture, run)
    began = time.process_time()
    verdict = do()
    found: dict[str, object] = {"seconds": round(time.process_time() - began, 3), "peak_rss_mb": peak_mb()}
    return found if verdict is None else found | {"verdict": verdict}


def peak_mb() -> int:
    """Peak resident memory of this process alone (Linux); `ru_maxrss` would count that of the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM:"))


def prepare(work: str, picture: Path, run: Path) -> Callable[[], str | None]:
    """The work itself; what it needs is made before the clock runs."""
    import torch

    from mvcr_cli.checkpoint import Checkpoint
    from mvcr_cli.config import TrainConfig
    from mvcr_cli.data.huge import open_huge
    from mvcr_cli.data.tiles import open_picture, stack_tiles
    from mvcr_cli.engine import find_run
    from mvcr_cli.engine.evaluate import tile_reader
    from mvcr_cli.engine.loss import cross_entropy, soft_targets
    from mvcr_cli.engine.predict import TorchPredictor
    from mvcr_cli.engine.zoom_step import zoom_loss
    from mvcr_cli.models import build, config_for, plain_twin

    checkpoint = Checkpoint.load(find_run(run))
    network, preprocess = checkpoint.network(), checkpoint.preprocess
    target = soft_targets(torch.tensor([0]), len(checkpoint.classes), 0.1)

    def decode() -> None:
        with open_huge(picture) as huge:
            for _ in huge.strips(512):
                pass

    def predict() -> str:
        predictor = TorchPredictor(checkpoint, "cpu")
        row = predictor.judge([predictor.read(str(picture))])[0].probabilities
        return checkpoint.classes[int(row.argmax())]

    reader = tile_reader(network, preprocess, 0)

    def read() -> None:
        assert reader is not None
        with open_picture(str(picture)) as huge:
            reader.look(huge)

    def step() -> Callable[[], None]:
        assert reader is not None
        with open_picture(str(picture)) as huge:
            glance, tiles = reader.look(huge)
        x = preprocess.tensor(glance)[None]
        batch = stack_tiles([tiles])
        config = TrainConfig(data=Path("."))

        def run_step() -> None:
            network.train()
            zoom_loss(network, x, batch, target, None, config, preprocess, 1.0).backward()

        return run_step

    def plain(train: bool) -> Callable[[], None]:
        name = plain_twin(checkpoint.config.name)
        assert name is not None
        twin = build(config_for(name, len(checkpoint.classes))).train(train)

        def run_plain() -> None:
            image = torch.from_numpy(np.array(Image.open(picture).convert("RGB"))).permute(2, 0, 1)[None]
            with torch.set_grad_enabled(train):
                logits = twin(preprocess.normalise(image))
                if train:
                    cross_entropy(logits, target, None).backward()

        return run_plain

    Image.MAX_IMAGE_PIXELS = None
    works: dict[str, Callable[[], Callable[[], str | None]]] = {
        "decode": lambda: decode, "predict": lambda: predict, "read": lambda: read, "step": step,
        "plain": lambda: plain(False), "plain-step": lambda: plain(True),
    }  # fmt: skip
    return works[work]()


if __name__ == "__main__":
    main()
