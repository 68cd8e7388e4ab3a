"""What decided, as a picture: maps come from what the verdict comes from, and files do not get in each other's way."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import NOWHERE, needs_proc, run_of, shapes

from mvcr_cli.config import PredictConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import explain
from mvcr_cli.engine.contenders import untrained
from mvcr_cli.engine.explain import PANEL, SeenView, draw_tiles, draw_views, for_panel, seen_views
from mvcr_cli.engine.predict import predict
from mvcr_cli.errors import CannotCreate, UsageError
from mvcr_cli.models import TRUNKS, build, config_for
from mvcr_cli.models.mvcr import MultiScaleResNet
from mvcr_cli.models.scale_set import sureness
from mvcr_cli.records import Prediction, Tile


@pytest.fixture(scope="module", autouse=True)
def small_trunk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
        yield


def a_network(look: str = "all", taught: tuple[float, ...] | None = None, **options: Any) -> MultiScaleResNet:
    """One whose norms all differ."""
    torch.manual_seed(0)
    network = build(dataclasses.replace(config_for("mvcr10n", 3, stem="small", **options), taught=taught)).eval()
    assert isinstance(network, MultiScaleResNet)
    network.look = look  # type: ignore[assignment]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return network


@pytest.mark.parametrize(
    "options",
    [{}, {"look": "1"}, {"taught": (1.0,)}, {"scales": (2.0, 1.0, 0.5)}, {"layers": ("detail",)},
     {"layers": ("sift", "sacs", "gem")}, {"layers": ("detail", "sift"), "taught": (1.0,)}],
)  # fmt: skip
def test_the_maps_are_of_the_features_that_the_verdict_comes_from(options):
    network, x = a_network(**options), torch.randn(2, 3, 96, 96)
    seen: list[torch.Tensor] = []
    network.layer4[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))  # type: ignore[index,operator,union-attr]
    with torch.no_grad():
        network(x)
        decided, seen = list(seen), []
        network.layer4[-1]._forward_hooks.clear()  # type: ignore[index,operator,union-attr]
        network.layer4[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))  # type: ignore[index,operator,union-attr]
        views = seen_views(network, x, np.array([0, 2]))
    assert [len(of) for of in views] == [len(decided)] * 2
    assert len(decided) == len(seen) and all(map(torch.equal, decided, seen))


def test_a_network_without_views_has_nothing_to_explain(tmp_path):
    untrained(config_for("cnn", 2), Preprocess(size=32)).save(tmp_path / "best.safetensors")
    picture = str(shapes(tmp_path / "data", images=1) / "circle" / "000.png")
    config = PredictConfig(inputs=(picture,), run=tmp_path / "best.safetensors", explain=tmp_path / "why", workers=1)
    with pytest.raises(UsageError, match="cnn"):
        list(predict(config))
    assert not (tmp_path / "why").exists()


def explained(root: Path, inputs: tuple[str, ...], why: str, run: str = "best.safetensors",
              stdin: tuple[bytes, ...] = ()) -> list[str]:  # fmt: skip
    """The names below `root` that a prediction with explanations adds."""
    before = set(root.rglob("*"))
    config = PredictConfig(inputs=inputs, run=root / run, explain=Path(why), workers=1)
    try:
        assert all(isinstance(item, Prediction) for item in predict(config, stdin=stdin))
    except CannotCreate as error:
        assert set(root.rglob("*")) == before
        raise error
    return sorted(str(path.relative_to(root)) for path in set(root.rglob("*")) - before)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder, with weights, a run of them, its data, and two pictures that it has not seen."""
    weights = untrained(config_for("mvcr10n", 2), Preprocess(size=48))
    weights.save(tmp_path / "best.safetensors")
    run_of(weights, tmp_path / "run", data="data", root=tmp_path / "data", val="more")
    shapes(tmp_path / "data", images=1)
    shapes(tmp_path / "more", images=1)
    shutil.copytree(tmp_path / "data" / "circle", tmp_path / "new")
    shutil.copy(tmp_path / "new" / "000.png", tmp_path / "pic.png")
    (tmp_path / "link").symlink_to("new")
    (tmp_path / "link.png").symlink_to("more/circle/000.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("entry", "why"),
    [("data", "data/why"), ("data", "data"), ("new", "link/why"), ("new/000.png", "new"), ("link/000.png", "new"),
     ("new/000.png", "link"), ("new/*.png", "new"), ("pic.png", "."), ("link.png", "more/circle")],
)  # fmt: skip
def test_explanations_never_lie_among_the_pictures(place, entry, why):
    with pytest.raises(CannotCreate, match="would be written") as caught:
        explained(place, ("data/circle/000.png", entry), why)
    assert "--explain" in caught.value.hint


def test_explanations_never_lie_beside_a_picture_that_is_named_on_stdin(place):
    with pytest.raises(CannotCreate, match="beside new/000"):
        explained(place, ("-",), "new", stdin=(b"new/000.png\n",))


@pytest.mark.parametrize("why", ["data/why", "data", "data/circle", "more/why"])
@pytest.mark.parametrize("run", ["run", "run/weights/best.safetensors"])
def test_explanations_never_lie_in_the_data_of_the_run(place, why, run):
    (place / "elsewhere").mkdir()
    os.chdir(place / "elsewhere")
    with pytest.raises(CannotCreate, match="inside the data folder"):
        explained(place, ("../pic.png",), f"../{why}", run)


@needs_proc
@pytest.mark.parametrize("why", [NOWHERE, NOWHERE / "below", NOWHERE.parent])
def test_a_folder_that_cannot_be_made_is_refused_before_a_picture_is_read(place, why):
    with pytest.raises(CannotCreate, match=f"^cannot create {why}: No such file"):
        explained(place, ("nothing.png",), str(why))


@pytest.mark.parametrize("entry", ["pic.png", "./pic.png", "*.png", "new/000.png", "nothing.png"])
def test_a_new_folder_beside_a_picture_may_hold_explanations(place, entry):
    if entry == "nothing.png":
        assert [item.path for item in predict(PredictConfig(inputs=(entry,), run=place / "run", explain=place))] == [
            entry
        ]
    else:
        assert explained(place, (entry,), "why", "run")[0] == "why"
    if entry == "new/000.png":
        assert explained(place, (entry,), "new/why")[0] == "new/why"


def test_pictures_of_the_same_name_have_explanations_of_their_own(tmp_path):
    untrained(config_for("mvcr10n", 2), Preprocess(size=48)).save(tmp_path / "best.safetensors")
    data = shapes(tmp_path / "data", images=2)
    config = PredictConfig(inputs=(str(data),), run=tmp_path / "best.safetensors", explain=tmp_path / "why", workers=1)
    found = [item for item in predict(config) if isinstance(item, Prediction)]
    assert len({item.explanation for item in found}) == len(list((tmp_path / "why").iterdir())) == 4


def test_a_picture_waits_for_its_explanation_no_larger_than_it_is_shown():
    for size in ((40, 30), (1500, 900), (5000, 3), (2048, 4096)):
        kept = for_panel(Image.new("RGB", size))
        assert min(max(size), PANEL) <= max(kept.size) < 2 * PANEL


@pytest.mark.parametrize("look", ["1", "all", "auto"])
@pytest.mark.parametrize("surest", [False, True])
def test_views_count_as_much_as_the_verdict_is_made_of_them(look, surest):
    network, x = a_network(look, scales=(2.0, 1.0, 0.5)), torch.randn(6, 3, 96, 96)
    assert network.fusion is not None
    network.fusion.surest = surest
    views = network.views_at(96)[: 1 if look == "1" else None]
    with torch.no_grad():
        logits = [network.look_at(x, view).float() for view in views]
        network.sure = float(sureness(logits[-1]).median())  # the cheapest view is sure of half of the pictures
        shares = network.shares(logits, views)
        assert torch.isnan(shares).any() == (look == "auto")
        verdict = (shares.nan_to_num()[..., None] * torch.stack(logits)).sum(0)
        torch.testing.assert_close(verdict, network(x))
    torch.testing.assert_close(shares.nan_to_num().sum(0), torch.ones(6))
    seen = seen_views(network, x, np.zeros(6, np.int64))
    assert [len(of) for of in seen] == (~torch.isnan(shares)).sum(0).tolist()


def test_a_view_that_does_not_count_has_no_heat():
    picture, hot = Image.new("RGB", (64, 64), (90, 90, 90)), np.ones((32, 32), np.float32)
    views = [SeenView(1.0, 0.8, 0, 0.9, hot), SeenView(0.5, 0.4, 1, 0.6, hot), SeenView(0.25, 0.0, 1, 1.0, hot)]
    sheet = draw_views(picture, views, np.array([0.9, 0.1]), ("cat", "dog"), Preprocess(size=32))
    plain, full, half = (
        np.asarray(sheet)[PANEL // 2, column * sheet.width // 3 + PANEL // 2].astype(int) for column in range(3)
    )
    assert 0 < np.abs(half - plain).sum() < np.abs(full - plain).sum()


def test_views_that_count_come_from_the_largest_scale_to_the_smallest():
    hot = np.ones((32, 32), np.float32)
    views = [SeenView(scale, share, 0, 0.9, hot) for scale, share in ((1.0, 0.5), (2.0, 0.5), (0.5, 0.001))]
    sheet = draw_views(Image.new("RGB", (64, 64)), views, np.array([0.9]), ("cat",), Preprocess(size=32))
    swapped = draw_views(Image.new("RGB", (64, 64)), views[1::-1], np.array([0.9]), ("cat",), Preprocess(size=32))
    assert sheet.tobytes() == swapped.tobytes()


@pytest.mark.parametrize("size", [(1800, 1200), (40, 4000), (5000, 3)])
def test_names_of_tiles_lie_in_the_picture_and_not_on_each_other(monkeypatch, size):
    tiles = [
        Tile(box=(x, y, x + 90, y + 90), weight=1 / (number + 1), label="cracked", probability=0.83)
        for number, (x, y) in enumerate([(0, 0), (5, 5), (size[0] - 90, size[1] - 90), (size[0] // 2, size[1] // 2)])
    ]
    places: list[Any] = []
    name = explain._name
    monkeypatch.setattr(explain, "_name", lambda *given: (name(*given), places.append(given[-1])))
    draw_tiles(Image.new("RGB", (64, 64)), tiles, size, "cracked 91.2 %")
    taken = places[-1]
    assert 1 <= len(taken) <= 3  # the second would lie on the first
    for number, (left, top, right, bottom) in enumerate(taken):
        assert left >= 0 and top >= 0
        for other in taken[:number]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_panels_of_every_shape_have_their_captions():
    for size in ((40, 30), (3, 900), (900, 3)):
        view = SeenView(1.0, 1.0, 0, 0.9, np.zeros((32, 32), np.float32))
        sheet = draw_views(
            Image.new("RGB", size), [view], np.array([0.9]), ("a long name of a class",), Preprocess(size=32)
        )
        below = np.asarray(sheet)[round(PANEL * size[1] / max(size)) + 1 :]
        assert all((half > 0).any() for half in np.array_split(below, 2, axis=1))
        assert not below[:, [0, -1]].any()
