"""Copies of a picture are found, other pictures are not; what is found is told before training, and kept."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_shape
from PIL import Image
from small_run import settings, shapes, trained

from mvcr_cli.data.duplicates import Fingerprint, find_alike, fingerprint, read_fingerprints
from mvcr_cli.data.images import read_size
from mvcr_cli.engine import findings
from mvcr_cli.engine.prepare import Prepared, prepare
from mvcr_cli.engine.train import train
from mvcr_cli.errors import DataError
from mvcr_cli.records import CheckReport, PicturePair, Problem

COPIES, TEXTURES = 100, 2000


def texture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Coloured noise with more power at low frequencies, as photographs have."""
    chance, pixels = np.random.default_rng(seed), np.zeros((size[1], size[0], 3), np.float32)
    for octave in range(1, 6):
        grid = chance.standard_normal((2**octave, 2**octave, 3)).astype(np.float32) * 0.75**octave
        channels = [Image.fromarray(grid[..., channel]).resize(size, Image.Resampling.BICUBIC) for channel in range(3)]
        pixels += np.stack([np.asarray(channel) for channel in channels], axis=-1)
    pixels -= pixels.min()
    return Image.fromarray((pixels / pixels.max() * 255).astype(np.uint8))


def photos() -> list[Image.Image]:
    """Parts of the two photographs that come with scikit-learn; none overlap."""
    from sklearn.datasets import load_sample_images

    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    boxes = [(x, y, x + 120, y + 100) for y in range(0, 400, 105) for x in range(0, 500, 125)]
    return [photo.crop(box) for photo in whole for box in boxes]


def copy(image: Image.Image, chance: np.random.Generator) -> bytes:
    """The picture at another size, in another lossy format."""
    scale = chance.uniform(0.5, 1.5)
    size = (round(image.width * scale), round(image.height * scale))
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    small, out = image.resize(size, filters[chance.integers(3)]), io.BytesIO()
    if chance.random() < 0.5:
        small.save(out, "JPEG", quality=int(chance.integers(40, 96)))
    else:
        small.save(out, "WEBP", quality=int(chance.integers(40, 96)), method=0)
    return out.getvalue()


def print_of(image: Image.Image) -> Fingerprint:
    return fingerprint(image.convert("RGB"), image.size)


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_re_encoded_and_resized_copies_are_found(figure: Callable[[str], None]) -> None:
    originals = [*photos(), *(texture(seed) for seed in range(COPIES))][:COPIES]
    chance = np.random.default_rng(0)
    copies = [print_of(decoded(copy(image, chance))) for image in originals]
    prints = [*map(print_of, originals), *copies]
    pairs = find_alike(prints, [0] * COPIES + [1] * COPIES)
    right = sum(other - COPIES == one for one, other in pairs)
    figure(f"{right} of {COPIES} copies found")
    assert right >= 0.95 * COPIES
    assert len(pairs) == right


def test_different_textures_are_not_alike(figure: Callable[[str], None]) -> None:
    prints = [print_of(texture(seed, (72, 64))) for seed in range(TEXTURES)]
    false = find_alike(prints, range(TEXTURES))
    figure(f"{len(false)} false alarms among {TEXTURES} textures")
    assert len(false) <= 0.01 * TEXTURES


def test_simple_pictures_with_like_hashes_are_not_alike() -> None:
    """Digits on black: the hash alone takes most of them for copies of others."""
    from sklearn.datasets import load_digits

    digits = load_digits().images[:400]
    prints = [print_of(Image.fromarray((digit * 15.9).astype(np.uint8)).resize((28, 28))) for digit in digits]
    bits = np.stack([print_.bits for print_ in prints])
    near = ((bits[:, None] != bits[None]).sum(-1) <= 4).sum(1) > 1
    assert near.mean() > 0.5
    assert find_alike(prints, range(len(prints))) == []


@pytest.mark.parametrize("groups", [2, 5])
def test_the_search_finds_what_comparing_every_pair_finds(groups: int) -> None:
    chance = np.random.default_rng(groups)
    images = [texture(seed, (72, 64)) for seed in range(40)]
    images += [decoded(copy(images[chance.integers(40)], chance)) for _ in range(300)]
    prints, group = [print_of(image) for image in images], chance.integers(0, groups, len(images)).tolist()

    def apart(a: Fingerprint, b: Fingerprint) -> float:
        x, y = (print_.small.astype(float) for print_ in (a, b))
        near = (a.bits != b.bits).sum() <= 4
        difference = float(np.sqrt(np.square(x - y).mean()))
        return difference if near and difference <= 0.12 * min(x.std(), y.std()) + 0.5 else np.inf

    expected = {}
    for other, print_ in enumerate(prints):
        lower = [(apart(prints[one], print_), one) for one in range(len(prints)) if group[one] < group[other]]
        if lower and min(lower)[0] < np.inf:
            expected[other] = min(lower)[0]
    found = find_alike(prints, group)
    assert [other for _, other in found] == sorted(expected)
    assert len(found) > 50
    for one, other in found:
        assert group[one] < group[other]
        assert apart(prints[one], prints[other]) == pytest.approx(expected[other], abs=0.05)


def test_one_group_has_no_pairs_and_blank_pictures_are_alike() -> None:
    blank = [print_of(Image.new("RGB", (40 + n, 30), "white")) for n in range(3)]
    assert find_alike([], []) == []
    assert find_alike(blank, [1, 1, 1]) == []
    assert [other for _, other in find_alike(blank, [0, 1, 1])] == [1, 2]


def test_equal_pixels_are_equal_whatever_the_file(tmp_path: Path) -> None:
    image = texture(0)
    names = ("a.png", "b.png", "c.bmp", "d.tif", "e.webp", "f.ppm", "g.jp2")
    for name in names:
        options = {"b.png": {"compress_level": 1}, "d.tif": {"compression": "tiff_lzw"}, "e.webp": {"lossless": True},
                   "g.jp2": {"irreversible": False}}.get(name, {})  # fmt: skip
        image.save(tmp_path / name, **options)
    (tmp_path / "h.png").write_bytes(b"no picture")
    *prints, broken = read_fingerprints([str(tmp_path / name) for name in (*names, "h.png")], 2)
    assert len({print_.pixels for print_ in prints if isinstance(print_, Fingerprint)}) == 1
    assert isinstance(broken, Problem)
    assert broken.code == "unknown_format"
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "i.png")
    (other,) = read_fingerprints([str(tmp_path / "i.png")], 0)
    assert isinstance(other, Fingerprint)
    assert other.pixels != prints[0].pixels  # type: ignore[union-attr]


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """train and val of two classes, with a copy of every kind."""
    root = tmp_path / "leaky"
    for side, first in (("train", 0), ("val", 100)):
        for label, name in enumerate(("cat", "dog")):
            (root / side / name).mkdir(parents=True)
            for number in range(first, first + 8):
                texture(number + 1000 * label).save(root / side / name / f"{number}.png")
    train, val, chance = root / "train", root / "val", np.random.default_rng(0)
    shutil.copyfile(train / "cat/0.png", val / "cat/same_file.png")
    Image.open(train / "cat/1.png").save(val / "cat/same_pixels.bmp")
    (val / "dog/alike.jpg").write_bytes(copy(Image.open(train / "dog/2.png"), chance))
    shutil.copyfile(train / "cat/3.png", train / "dog/other_label.png")
    (train / "dog/alike_other_label.jpg").write_bytes(copy(Image.open(train / "cat/4.png"), chance))
    (train / "cat/cut.png").write_bytes((train / "cat/5.png").read_bytes()[:3000])
    return root


EXPECTED = {
    ("leak", "0.png", "same_file.png"),
    ("leak", "1.png", "same_pixels.bmp"),
    ("alike", "2.png", "alike.jpg"),
    ("conflict", "3.png", "other_label.png"),
    ("alike_conflict", "4.png", "alike_other_label.jpg"),
}


def pairs_of(prepared: Prepared) -> set[tuple[str, str, str]]:
    return {(pair.code, Path(pair.path).name, Path(pair.other).name) for pair in prepared.look.pairs}


def test_every_kind_of_copy_is_told_before_training_and_kept(leaky: Path, tmp_path: Path) -> None:
    said: list[str] = []
    trained(leaky, tmp_path / "run", say=said.append, epochs=1)
    for words in ("pictures in training and in validation: 2, for example", "pictures with two labels: 1, for example",
                  "look the same as a training picture: 1, for example",
                  "two labels that look the same: 1, for example",
                  "cannot be decoded (corrupt): 1 of 38 pictures looked at: "):  # fmt: skip
        assert sum(words in line for line in said) == 1, words
    begins = next(number for number, line in enumerate(said) if line.startswith("run "))
    assert all(number < begins for number, line in enumerate(said) if line.startswith("finding: "))
    assert sum("cut.png" in line for line in said) == 1  # not once more at the end
    kept = [json.loads(line) for line in (tmp_path / "run" / "findings.jsonl").read_text().splitlines()]
    pairs = {
        (line["code"], Path(line["path"]).name, Path(line["other"]).name) for line in kept if line["record"] == "pair"
    }
    assert pairs == EXPECTED
    errors = [(Path(line["path"]).name, line["error"]["code"]) for line in kept if line["record"] == "error"]
    assert errors == [("cut.png", "corrupt")]
    counts = {
        one["code"]: one["count"] for one in json.loads((tmp_path / "run" / "config.json").read_text())["findings"]
    }
    assert counts == {"corrupt": 1, "leak": 2, "alike": 1, "conflict": 1, "alike_conflict": 1}


def test_a_dry_run_gives_every_finding_as_a_record(leaky: Path) -> None:
    *found, report = train(settings(leaky, None, dry_run=True))
    assert isinstance(report, CheckReport)
    assert (report.train_images, report.val_images, report.decoded, report.broken) == (19, 19, 38, 1)
    problems = [item for item in found if isinstance(item, Problem)]
    assert [(Path(problem.path).name, problem.code) for problem in problems] == [("cut.png", "corrupt")]
    pairs = {(p.code, Path(p.path).name, Path(p.other).name) for p in found if isinstance(p, PicturePair)}
    assert pairs == EXPECTED


@pytest.mark.parametrize(
    "kept", ["val/cat/same_file.png", "val/cat/same_pixels.bmp", "val/dog/alike.jpg", "train/dog/other_label.png",
             "train/dog/alike_other_label.jpg", "train/cat/cut.png", None],
)  # fmt: skip
def test_strict_refuses_each_of_them(leaky: Path, kept: str | None) -> None:
    odd = ("val/cat/same_file.png", "val/cat/same_pixels.bmp", "val/dog/alike.jpg", "train/dog/other_label.png",
           "train/dog/alike_other_label.jpg", "train/cat/cut.png")  # fmt: skip
    for name in odd:
        if name != kept:
            (leaky / name).unlink()
    if kept is None:
        assert prepare(settings(leaky, None, strict=True)).findings == ()
        return
    with pytest.raises(DataError, match="--strict: 1 findings") as caught:
        prepare(settings(leaky, None, strict=True))
    assert caught.value.exit_code == 65


def test_a_large_set_is_looked_at_in_part_and_says_so(leaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "START_PICTURES", 12)
    prepared = prepare(settings(leaky, None))
    assert prepared.look.decoded == 12
    (finding,) = (one for one in prepared.findings if one["code"] == "not_looked_at")
    assert finding["detail"].startswith("looked at 12 of 38 pictures")
    assert finding["count"] == 26
    assert ("leak", "0.png", "same_file.png") in pairs_of(prepared)  # equal files are found without decoding
    again = prepare(settings(leaky, None))
    assert again.look == prepared.look
    whole = prepare(settings(leaky, None, dry_run=True))
    assert whole.look.decoded == 38
    assert pairs_of(whole) == EXPECTED


def test_the_beginning_of_training_reads_a_bounded_amount(leaky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = max(path.stat().st_size for path in leaky.rglob("*.png"))
    monkeypatch.setattr(findings, "START_BYTES", 10 * size)
    assert 10 <= prepare(settings(leaky, None)).look.decoded < 38


def test_the_beginning_of_training_decodes_a_bounded_number_of_pixels(
    leaky: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small file may hold a large picture."""
    width, height = read_size(next(leaky.rglob("*.png")))
    monkeypatch.setattr(findings, "START_PIXELS", 10 * width * height)
    assert 5 <= prepare(settings(leaky, None)).look.decoded < 20
    assert prepare(settings(leaky, None, dry_run=True)).look.decoded == 38


def test_both_sides_are_looked_at_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of the pictures are looked at, both sides are there to be compared."""
    train_side, val_side = (shapes(tmp_path / name, images=count, first=first) for name, count, first in
                            (("train", 20, 0), ("val", 4, 50)))  # fmt: skip
    monkeypatch.setattr(findings, "START_PICTURES", 8)
    seen: list[str] = []
    prepare(settings(train_side, None, val=val_side), track=lambda items, **_: items)
    monkeypatch.setattr(findings, "read_fingerprints", lambda paths, _: seen.extend(paths) or iter(()))
    with pytest.raises(ValueError, match="zip"):  # nothing is read here
        prepare(settings(train_side, None, val=val_side))
    assert len(seen) == 8
    assert sum("/val/" in path for path in seen) == 4


def test_a_resumed_run_does_not_look_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = shapes(tmp_path / "data"), tmp_path / "run"
    trained(data, run, stop=lambda: "SIGINT")
    before = (run / "findings.jsonl").read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("looked again")

    monkeypatch.setattr(findings, "read_fingerprints", refuse)
    with pytest.raises(AssertionError):
        prepare(settings(data, tmp_path / "other", resume=True))
    _, end = trained(data, run, resume=True)
    assert end.stopped_by == "finished"
    assert (run / "findings.jsonl").read_bytes() == before


def test_pictures_that_break_later_are_added_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run, said = shapes(tmp_path / "data"), tmp_path / "run", list[str]()
    for number in range(16):
        draw_shape("circle", 100 + number).save(data / "circle" / f"x{number}.png")
    broken = data / "circle" / "001.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(findings, "START_PICTURES", 0)
    trained(data, run, say=said.append)
    lines = (run / "findings.jsonl").read_text().splitlines()
    assert [json.loads(line)["error"]["code"] for line in lines] == ["corrupt"]
    assert sum("001.png" in line for line in said) == 1
