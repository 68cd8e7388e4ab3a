"""Small folders of pictures, the same on every run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from forked import Forks
    from small_commands import Place

SHAPES = {"circle": (220, 60, 40), "square": (40, 90, 220), "triangle": (60, 170, 70)}

PhotoFolder = Callable[..., Path]
FIGURES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What the tests of trust reached."""
    if config.stash[FIGURES]:
        terminalreporter.section("figures")
        for line in config.stash[FIGURES]:
            terminalreporter.write_line(line)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """`figure("20 signals, 0 failures")` shows a line at the end of the test run, under the test's name."""
    return lambda text: request.config.stash[FIGURES].append(f"{request.node.nodeid}: {text}")


def draw_shape(name: str, seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """One coloured circle, square or triangle somewhere on a grey ground. `size` is (width, height) in pixels."""
    chance = np.random.default_rng([seed, *name.encode()])
    ground = chance.integers(150, 220, (size[1], size[0], 1)).repeat(3, axis=2)
    image = Image.fromarray(ground.astype(np.uint8))
    side = int(min(size) * chance.uniform(0.4, 0.7))
    left, top = (int(chance.integers(0, length - side)) for length in size)
    right, bottom = left + side, top + side
    draw, colour = ImageDraw.Draw(image), SHAPES[name]
    if name == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif name == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    else:
        draw.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=colour)
    return image


@pytest.fixture
def photo_folder(tmp_path: Path) -> PhotoFolder:
    """Builder of `name/<class>/<number>.png`: `photo_folder(classes=2, images=6)`. Equal arguments, equal bytes.

    `first` numbers the pictures from there on, so that a second folder can hold others.
    """

    def build(
        name: str = "photos", *, classes: int = 2, images: int = 6, size: tuple[int, int] = (40, 32), first: int = 0
    ) -> Path:
        root = tmp_path / name
        for shape in list(SHAPES)[:classes]:
            (root / shape).mkdir(parents=True)
            for number in range(first, first + images):
                draw_shape(shape, number, size).save(root / shape / f"{number:03d}.png")
        return root

    return build


@pytest.fixture(scope="session")
def draw() -> Callable[[Path, int, int], None]:
    """`draw(root, first, count)` draws that many circles and squares below `root`, for fixtures wider than a test."""

    def build(root: Path, first: int, count: int) -> None:
        for shape in ("circle", "square"):
            (root / shape).mkdir(parents=True)
            for number in range(first, first + count):
                draw_shape(shape, number).save(root / shape / f"{number:03d}.png")

    return build


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts command lines in processes of their own."""
    from forked import Forks

    server = Forks(tmp_path_factory.mktemp("streams"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def trained_place(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Place:
    from small_commands import plain_place

    return plain_place(tmp_path_factory.mktemp("place"), forks)


@pytest.fixture(scope="session")
def named_place(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Place:
    from small_commands import hostile_place

    return hostile_place(tmp_path_factory.mktemp("named"), forks)
