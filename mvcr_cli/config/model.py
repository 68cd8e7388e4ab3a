"""What a network is: it travels in the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from mvcr_cli.config.checks import check
from mvcr_cli.config.constants import LARGEST_CANVAS, Block, Stem

MOST_TILE_PIXELS = 1 << 27  # of all candidates of a picture: 16 tiles of the largest size


@dataclass(frozen=True, kw_only=True)
class ZoomConfig:
    """How a network looks at large pictures: a glance at the whole, and tiles at native resolution.

    Args:
        tiles: tiles of a picture that the trunk looks at.
        candidates: tiles of a picture that are proposed, from which the scorer takes the best.
        tile_px: side of a tile at the trunk's input.
        octaves: tile scales; a tile of octave o shows `tile_px << o` pixels of the picture.
        grid: share of the candidates that lie on a uniform grid, whatever is there.
        learned: share of the candidates that the learned scorer finds, once it has learned.
        covers: nothing is proposed: the tiles lie side by side over the whole picture, and all are looked at.
    """

    tiles: int = 16
    candidates: int = 128
    tile_px: int = 32
    octaves: int = 2
    grid: float = 0.25
    learned: float = 0.5
    covers: bool = False

    def __post_init__(self) -> None:
        numbers = (self.tiles, self.candidates, self.tile_px, self.octaves)
        check(all(type(number) is int for number in numbers), "tiles, tile_px, octaves", numbers, "whole numbers")
        check(1 <= self.tiles <= 4096, "--tiles", self.tiles, "between 1 and 4096")
        check(self.tiles <= self.candidates <= 65_536, "candidates", self.candidates, "between --tiles and 65,536")
        check(not self.covers or self.tiles == self.candidates, "candidates", self.candidates, "as many as --tiles")
        check(32 <= self.tile_px <= 1024, "--tile-px", self.tile_px, "auto, or between 32 and 1024 pixels")
        check(1 <= self.octaves <= 6, "octaves", self.octaves, "between 1 and 6")
        pixels, coarsest = self.candidates * self.tile_px**2, self.tile_px << (self.octaves - 1)
        check(pixels <= MOST_TILE_PIXELS, "--tiles and --tile-px", f"{pixels:,} pixels of candidates",
              f"at most {MOST_TILE_PIXELS:,}")  # fmt: skip
        check(coarsest <= LARGEST_CANVAS, "octaves", f"{coarsest:,} px a side", f"at most {LARGEST_CANVAS:,}")
        check(0 <= self.grid <= 1 and 0 <= self.learned <= 1 - self.grid, "grid, learned",
               (self.grid, self.learned), "shares that add up to at most 1")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One network, completely described; JSON-able, so that it travels in the checkpoint.

    Args:
        name: the preset it was made from.
        classes: K, the number of outputs.
        block: residual block, or None for the three-layer `cnn`.
        depths: blocks in each of the four stages.
        width: channels of the first stage; later stages double it.
        scales: the scale set; sides of the views relative to the trunk size, largest first. (1,) is a plain ResNet.
        taught: the scales of the set whose views learn labels, with 1 among them; None is all of them.
        surest: the surest view decides alone; otherwise every view votes with how sure it is.
        sure: how sure a view must be for "auto" to stop looking, from 0 to 1 (certain); a network that is taught smoothed
            labels never becomes certain, and its trainer lowers this as much.
        stem: "imagenet" is 7x7 stride 2 with max-pool; "small" is 3x3 stride 2 alone, for small pictures; "fine" is 3x3
            stride 1, for icons.
        blur: SoftBlur before every strided stage.
        gem: generalised-mean pooling; otherwise average pooling.
        max: maximum pooling in the place of both.
        heads: multi-level heads on stages 2 and 3.
        sacs: stages, 1 to 4, whose blocks have a scale-aware convolution.
        detail: a thin branch sees the whole picture; the trunk's view at scale 1 is half as large.
        sift: dense RootSIFT beside stage 2.
        drop: dropout before the last layer.
        zoom: looks at tiles of large pictures as well; None looks at the whole picture only.
    """

    name: str
    classes: int
    block: Block | None
    depths: tuple[int, ...]
    width: int
    scales: tuple[float, ...] = (1.0,)
    taught: tuple[float, ...] | None = None
    surest: bool = False
    sure: float = 0.8
    stem: Stem = "imagenet"
    blur: bool = False
    gem: bool = False
    max: bool = False
    heads: bool = False
    sacs: tuple[int, ...] = ()
    detail: bool = False
    sift: bool = False
    drop: float = 0.0
    zoom: ZoomConfig | None = None

    def __post_init__(self) -> None:
        # A file may say anything, of any type.
        numbers = (self.classes, self.width, *self.depths)
        check(all(type(number) is int for number in numbers), "classes, width, depths", numbers, "whole numbers")
        check(self.block in (None, *get_args(Block)), "block", self.block, f"one of {get_args(Block)} or None")
        check(self.stem in get_args(Stem), "stem", self.stem, f"one of {get_args(Stem)}")
        check(isinstance(self.name, str) and 0 <= self.drop < 1, "drop", self.drop, "between 0 and 1")
        check(1 <= self.classes <= 100_000, "classes", self.classes, "between 1 and 100,000")
        check(all(1 <= depth <= 100 for depth in self.depths), "depths", self.depths, "between 1 and 100")
        check(len(self.scales) <= 16, "scales", len(self.scales), "at most 16")
        check(1.0 in self.scales, "scales", self.scales, "a set that contains 1")
        check(all(1 / 16 <= scale <= 4 for scale in self.scales), "scales", self.scales, "between 1/16 and 4")
        taught = self.scales if self.taught is None else self.taught
        check(
            1.0 in taught and set(taught) <= set(self.scales), "taught", taught, "scales of the set with 1 among them"
        )
        check(0 < self.sure <= 1, "sure", self.sure, "above 0 and at most 1")
        check(len(self.depths) == (0 if self.block is None else 4), "depths", self.depths, "four numbers")
        check(1 <= self.width <= 1024, "width", self.width, "between 1 and 1024")
        stages = 0 if self.block is None else 4
        fits = all(type(stage) is int and 1 <= stage <= stages for stage in self.sacs)
        check(fits and len(set(self.sacs)) == len(self.sacs), "sacs", self.sacs, "stages of the trunk, each once")
        check(type(self.max) is bool and not (self.gem and self.max), "max", self.max, "true or false, without gem")
        switches = (self.detail, self.sift)
        check(all(type(on) is bool for on in switches), "detail, sift", switches, "true or false")
        check(self.block is not None or not any(switches), "detail, sift", switches, "off in a network without stages")
        check(self.zoom is None or self.block is not None, "zoom", self.name, "a network with a residual trunk")

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "zoom" or value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Raises: TypeError, ValueError or UsageError when `values` do not describe a network."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown model fields {sorted(unknown)}")
        lists = [key for key in ("depths", "scales", "taught", "sacs") if values.get(key) is not None]
        tuples: dict[str, Any] = {key: tuple(values[key]) for key in lists}
        zoom = {"zoom": ZoomConfig(**values["zoom"])} if values.get("zoom") is not None else {}
        return cls(**(values | tuples | zoom))
