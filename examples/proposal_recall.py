"""How many of the digits that decide are among the tiles: proposed, chosen, and with how much of the attention.

Data: Megapixel-MNIST of examples/megapixel_mnist.py, whose places.json says where the digits are.

    python examples/proposal_recall.py DATA --run runs/black [--pictures 200]

A digit is found when its centre lies within a quarter of a tile of a tile's centre. Printed as JSON:
grid        share of digits in as many tiles of an even grid
detector    share of digits among the candidates of SIFT's detector and the grid
candidates  the same with the learned search
chosen      share of digits among the tiles that the trunk looks at
attention   share of the attention's weight on tiles with a digit
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.data.tiles import open_picture, propose, stack_tiles
from mvcr_cli.engine import find_run
from mvcr_cli.engine.evaluate import tile_reader
from mvcr_cli.engine.zoom_step import look
from mvcr_cli.models.zoom import ZoomResNet

HALF_DIGIT = 14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=200)
    options = parser.parse_args()
    checkpoint = Checkpoint.load(find_run(options.run))
    network, preprocess = checkpoint.network(), checkpoint.preprocess
    assert isinstance(network, ZoomResNet)
    reader = tile_reader(network, preprocess, 0)
    assert reader is not None
    places = json.loads((options.data / "places.json").read_text())
    names = [name for name in sorted(places) if name.startswith("val/")]
    rows = []
    for name in names[:: max(1, len(names) // options.pictures)]:
        digits = np.array(places[name]) + HALF_DIGIT
        with open_picture(str(options.data / name)) as picture:
            even, _ = propose(picture, replace(network.zoom, grid=1.0, learned=0.0), None)
            detected, _ = propose(picture, network.zoom, None)
            glance, tiles = reader.look(picture)
        with torch.inference_mode():
            found = look(network, preprocess.tensor(glance)[None], stack_tiles([tiles]), preprocess)
        chosen = tiles.boxes[found.chosen[0].numpy()]
        weight = found.verdict.weights[0].numpy()[hits(chosen, digits).any(1)].sum()
        rows.append([hits(boxes, digits).any(0).mean() for boxes in (even, detected, tiles.boxes, chosen)] + [weight])
    shares = np.mean(rows, 0)
    print(json.dumps({"pictures": len(rows)} | {
        key: round(float(share), 4)
        for key, share in zip(("grid", "detector", "candidates", "chosen", "attention"), shares, strict=True)
    }))  # fmt: skip


def hits(boxes: NDArray[np.int32], digits: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tile (first axis) has which digit (second axis)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    apart = np.abs(centres[:, None] - digits[None]).max(-1)
    near: NDArray[np.bool_] = apart <= ((boxes[:, 2] - boxes[:, 0]) / 4)[:, None]
    return near


if __name__ == "__main__":
    main()
