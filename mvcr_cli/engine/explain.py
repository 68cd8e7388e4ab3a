"""What decided, as a picture: the tiles of a zooming network, or a class-activation map a view of another one."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from mvcr_cli.config import factor_text
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.turning import Box
from mvcr_cli.errors import CannotCreate
from mvcr_cli.lettering import drawable, load_font
from mvcr_cli.models.mvcr import MultiScaleResNet
from mvcr_cli.paths import check_creatable, display_name, make_folder, refuse_inside, write_whole
from mvcr_cli.records import Tile

Heat = NDArray[np.float32]  # (H, W), 0 nothing .. 1 most
PANEL = 1024  # pixels of the longer side
STRENGTH = 0.6  # of the hottest place's colour
NAMED_TILES = 8
COUNTS = 0.005  # share of a verdict, at least, that is shown
LETTERS, SMALL_LETTERS = 44, 18  # pixels
_RAMP = np.array([(30, 60, 255), (0, 220, 220), (120, 255, 60), (255, 220, 0), (255, 40, 0)], np.float32)


@dataclass(frozen=True, slots=True)
class SeenView:
    """One view of a picture that was looked at.

    Args:
        share: how much it counts in the verdict.
        label: the class that it finds itself, by number.
        probability: that it gives this class.
        heat: where it sees the class of the verdict.
    """

    scale: float
    share: float
    label: int
    probability: float
    heat: Heat


@torch.inference_mode()
def seen_views(network: MultiScaleResNet, x: Tensor, classes: NDArray[np.int64]) -> list[list[SeenView]]:
    """The views that every picture's verdict comes from, the one at scale 1 first.

    Heat is the last layer's weights of the picture's class on the map before pooling.

    Shape: (N, 3, S, S), (N,) -> N lists of views, each with an (S, S) map.
    Sources: Zhou et al. 2016 (arXiv 1512.04150).
    """
    weights = network.fc.weight[torch.from_numpy(classes).to(x.device)].float()  # N x C
    logits, maps = [], []
    views = network.views_at(min(x.shape[-2:]))[: 1 if network.look == "1" else None]
    for view in views:
        own, detail = network.view_of(x, view)
        features = network.view_features(own, view, detail)
        logits.append(network.judge(*features).float())
        heat = torch.einsum("nchw,nc->nhw", features[2].float(), weights).clamp(min=0)
        heat = heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-8)
        maps.append(
            F.interpolate(heat[:, None], x.shape[-2:], mode="bilinear", align_corners=False)[:, 0].cpu().numpy()
        )
    shares = network.shares(logits, views).cpu().numpy()
    found, labels = (part.cpu().numpy() for part in torch.stack(logits).softmax(-1).max(-1))
    return [
        [
            SeenView(network.config.scales[view], share, int(labels[place, number]), float(found[place, number]),
                     maps[place][number])
            for place, view in enumerate(views)
            if not math.isnan(share := float(shares[place, number]))
        ]
        for number in range(len(classes))
    ]  # fmt: skip


def draw_views(image: Image.Image, views: Sequence[SeenView], probabilities: NDArray[np.float64],
               classes: Sequence[str], preprocess: Preprocess) -> Image.Image:  # fmt: skip
    """The picture with its verdict, and beside it once more for every view with its heat, as strong as the view counts.

    The largest scale comes first; views that count for nothing are left out.
    """
    image = _panel(image, image.size)
    width, height = preprocess.fitted(image.width, image.height)
    left, top = (preprocess.size - width) // 2, (preprocess.size - height) // 2
    best = int(probabilities.argmax())
    panels = [_captioned(image, "verdict", says(classes, best, probabilities[best]))]
    most = max(view.share for view in views)
    counting = [view for view in views if view.share >= COUNTS or view.share == most]
    for view in sorted(counting, key=lambda view: -view.scale):
        heat = view.heat[top : top + height, left : left + width] * np.float32(max(0.0, view.share) / most)
        panels.append(_captioned(_heated(image, heat), f"view {factor_text(view.scale)}",
                                 says(classes, view.label, view.probability), f"weight {view.share:.2f}"))  # fmt: skip
    sheet = Image.new("RGB", (sum(panel.width for panel in panels), max(panel.height for panel in panels)))
    for number, panel in enumerate(panels):
        sheet.paste(panel, (sum(other.width for other in panels[:number]), 0))
    return sheet


def draw_tiles(image: Image.Image, tiles: Sequence[Tile], size: tuple[int, int], verdict: str) -> Image.Image:
    """The glance with a box around every tile, heat where the weight lies, and what the weightiest tiles find themselves.

    Args:
        image: the glance.
        tiles: the weightiest first.
        size: width and height of the original in pixels, in which the boxes are given.
        verdict: on the whole picture, for the caption.
    """
    image = _panel(image, size)
    scale = image.width / size[0]
    heat = np.zeros((image.height, image.width), np.float32)
    boxes = [tuple(round(edge * scale) for edge in tile.box) for tile in tiles]
    for tile, (left, top, right, bottom) in zip(tiles, boxes, strict=True):
        heat[top : max(top + 1, bottom), left : max(left + 1, right)] += tile.weight
    most = max((tile.weight for tile in tiles), default=1.0)
    sheet = _heated(image, (heat / max(float(heat.max()), 1e-8)))
    pen = ImageDraw.Draw(sheet)
    colours = [_colour(np.float32(tile.weight / most)) for tile in tiles]
    for number, (box, colour) in enumerate(zip(boxes, colours, strict=True)):
        pen.rectangle(box, outline=colour, width=2 if number < NAMED_TILES else 1)
    taken: list[Box] = []
    for tile, box, colour in list(zip(tiles, boxes, colours, strict=True))[:NAMED_TILES]:
        _name(pen, f"{ascii(tile.label)[1:-1]} {100 * tile.probability:.0f} %", box, colour, taken)
    return _captioned(sheet, "verdict", verdict, "the hotter a tile, the more it counts")


def _name(pen: ImageDraw.ImageDraw, text: str, box: tuple[int, ...], colour: tuple[int, int, int],
          taken: list[Box]) -> None:  # fmt: skip
    """Text below a box, or above it at the lower edge, unless it would lie on another's; `taken` is where there is text."""
    font, (width, height) = load_font(SMALL_LETTERS), pen.im.size
    across, down = math.ceil(font.getlength(text)) + 4, SMALL_LETTERS * 5 // 4
    left = max(0, min(box[0], width - across))
    top = box[3] + 1 if box[3] + 1 + down <= height else max(0, box[1] - down - 1)
    place = left, top, left + across, top + down
    if any(place[0] < x1 and x0 < place[2] and place[1] < y1 and y0 < place[3] for x0, y0, x1, y1 in taken):
        return
    taken.append(place)
    pen.rectangle(place, fill=(0, 0, 0))
    pen.text((left + 2, top), text, fill=colour, font=font)


def says(classes: Sequence[str], label: int, probability: float) -> str:
    """A verdict for people who look at a picture."""
    return f"{drawable(classes[label], label)} {100 * probability:.1f} %"


def prepare_folder(folder: Path, inputs: Iterable[str]) -> None:
    """Make the folder of the explanations, none of which may become an input.

    Raises: WriteFailed, CannotCreate, NotPermitted.
    """
    for entry in inputs:
        refuse_among(folder, entry)
    check_creatable(folder)
    make_folder(folder)


def refuse_among(folder: Path, entry: str) -> None:
    """Refuse a folder for explanations that is or lies in an input folder, or has an input file in it.

    Raises: CannotCreate.
    """
    if os.path.isdir(entry):
        refuse_inside(Path(entry), folder, "the explanations", "an --explain folder")
    elif os.path.lexists(entry):
        beside = {os.path.realpath(os.path.dirname(entry)), os.path.dirname(os.path.realpath(entry))}
        if os.path.realpath(folder) in beside:
            raise CannotCreate(
                f"the explanations would be written beside {display_name(entry)}, into the folder {display_name(folder)}",
                "choose another --explain folder; a new one in it will do",
            )


def save(image: Image.Image, folder: Path, source: str) -> str:
    """Write the explanation of the picture `source`; equal names in different folders get different files."""
    stem = os.fsdecode(os.fsencode(Path(source).stem)[:150])
    path = folder / f"{stem}-{hashlib.blake2b(os.fsencode(source), digest_size=4).hexdigest()}.png"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())
    return str(path)


def for_panel(image: Image.Image) -> Image.Image:
    """The picture as small as it may be kept until it is drawn."""
    return image.reduce(max(1, max(image.size) // PANEL))


def _panel(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture as large as is shown, with the aspect of `size`."""
    width, height = (max(1, round(edge * PANEL / max(size))) for edge in size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)


def _captioned(image: Image.Image, *lines: str) -> Image.Image:
    """The picture with lines of text below it, and as wide as they need."""
    font, line = load_font(LETTERS), LETTERS * 5 // 4
    width = max(image.width, *(math.ceil(font.getlength(text)) for text in lines)) + LETTERS
    sheet = Image.new("RGB", (width, image.height + 3 * line + LETTERS // 2))
    sheet.paste(image, ((width - image.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(lines):
        pen.text((LETTERS // 2, image.height + LETTERS // 4 + number * line), text, fill="white", font=font)
    return sheet


def _heated(image: Image.Image, heat: Heat) -> Image.Image:
    full = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BILINEAR)).clip(0, 1)[..., None]
    place = full[..., 0] * (len(_RAMP) - 1)
    colours = np.stack([np.interp(place, range(len(_RAMP)), _RAMP[:, channel]) for channel in range(3)], -1)
    mixed = np.asarray(image) * (1 - STRENGTH * full) + colours * (STRENGTH * full)
    return Image.fromarray(mixed.astype(np.uint8))


def _colour(share: np.float32) -> tuple[int, int, int]:
    place = float(share) * (len(_RAMP) - 1)
    red, green, blue = (int(np.interp(place, range(len(_RAMP)), _RAMP[:, channel])) for channel in range(3))
    return red, green, blue
