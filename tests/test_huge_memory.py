"""Peak memory of processes that read pictures of 100 megapixels, which are 300 MB of pixels (400 MB in Pillow)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import ModelConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.models import build

SIDE = 10_000
NAMES = ("a.jpg", "strips.tif", "tiles.tif", "a.png")
MAKE = """
import sys
import numpy, pyvips
blocks = numpy.random.default_rng(0).integers(0, 256, (8, 8, 3), numpy.uint8)
picture = pyvips.Image.new_from_array(blocks).zoom(int(sys.argv[2]) // 8, int(sys.argv[2]) // 8)
picture.jpegsave(sys.argv[1] + "/a.jpg", Q=80)
picture.tiffsave(sys.argv[1] + "/strips.tif", compression="packbits", bigtiff=True)
picture.tiffsave(sys.argv[1] + "/tiles.tif", compression="packbits", tile=True, tile_width=256, tile_height=256)
picture.pngsave(sys.argv[1] + "/a.png", compression=1, filter="none")
"""
PEAK = """
def peak_mb():  # not getrusage(): that begins at the size of the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
"""
READ = (
    PEAK
    + """
import json, sys
import numpy as np
from mvcr_cli.data.huge import open_huge
found = {}
for path in sys.argv[1:]:
    with open_huge(path) as picture:
        w, h = picture.size
        sums = sum(int(strip.astype(np.int64).sum()) for _, strip in picture.strips(100, 4))
        boxes = [(x, y, x + 224, y + 224) for x in range(0, w, w // 8) for y in range(0, h, h // 8)]
        tiles = picture.tiles(boxes, 224)
        glance = picture.glance(500)
    centres = [tile[100, 100].tolist() for tile in tiles]
    found[path] = {"mean": sums / (w // 4 * (h // 4) * 3), "centres": centres, "glance": glance.size}
    found[path]["peak_mb"] = peak_mb()
print(json.dumps(found))
"""
)
PREDICT = (
    PEAK
    + """
import json, sys
from mvcr_cli.config import PredictConfig
from mvcr_cli.engine.predict import predict
from pathlib import Path
rows = []
for path in sys.argv[2:]:
    (record,) = predict(PredictConfig(inputs=(path,), run=Path(sys.argv[1]), device="cpu"))
    rows.append({"path": path, "size": [record.width, record.height], "peak_mb": peak_mb()})
print(json.dumps({"rows": rows, "compiler": "torch._dynamo" in sys.modules}))
"""
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kilobytes of peak memory are counted as Linux does")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("huge")
    child(MAKE, str(folder), str(SIDE))
    return [str(folder / name) for name in NAMES]


def child(code: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    return json.loads(done.stdout or b"null")


def test_reading_in_pieces_needs_little_memory(pictures: list[str]) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for path, found in child(READ, *pictures).items():
        assert found["peak_mb"] < 200, path
        assert found["glance"] == [500, 500] if not path.endswith(".jpg") else [625, 625], path
        assert abs(found["mean"] - blocks.mean()) < 1, path
        expected = [blocks[y, x].tolist() for x in range(8) for y in range(8)]
        assert np.abs(np.array(found["centres"]) - expected).max() <= (3 if path.endswith(".jpg") else 0), path


def test_predicting_costs_little_more_than_for_a_small_picture(pictures: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        name="mvcr10n", classes=2, block="basic", depths=(1, 1, 1, 1), width=8, scales=(1.0,), stem="imagenet", gem=True
    )
    weights, small = tmp_path / "model.safetensors", tmp_path / "small.png"
    tensors = build(config).state_dict()
    Checkpoint(config=config, classes=("a", "b"), preprocess=Preprocess(size=128), tensors=tensors).save(weights)
    Image.new("RGB", (300, 300)).save(small)
    done = child(PREDICT, str(weights), str(small), *pictures)
    assert [row["size"] for row in done["rows"][1:]] == [[SIDE, SIDE]] * len(NAMES)
    assert done["rows"][-1]["peak_mb"] - done["rows"][0]["peak_mb"] < 200
    assert not done["compiler"]  # which costs a second and 100 MB, and is easily loaded by accident
