"""Folders as strangers leave them: every layout, link and broken file gets its verdict, and the folder stays as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nastier
import pytest
from forked import ROOT, Done, Forks
from nasty import bad_files, good_pictures, non_files
from small_commands import SMALL, Place
from small_run import shapes

from mvcr_cli.config import TrainConfig
from mvcr_cli.engine.prepare import prepare
from mvcr_cli.errors import MvcrError

Figure = Callable[[str], None]
CLASSES = ("circle", "square", "triangle")


def some(root: Path, *classes: str, images: int = 2, first: int = 0) -> None:
    """Class folders of any names with different pictures."""
    for number, name in enumerate(classes):
        shapes(root.parent / ".draw", classes=("circle",), images=images, first=first + 100 * number)
        (root / name).mkdir(parents=True, exist_ok=True)
        for picture in (root.parent / ".draw" / "circle").iterdir():
            shutil.copyfile(picture, root / name / picture.name)
        shutil.rmtree(root.parent / ".draw")


def files_in_root(root: Path) -> None:
    some(root, "cat")
    shutil.copyfile(root / "cat" / "000.png", root / "1.png")
    for name in ("Thumbs.db", ".DS_Store", "__MACOSX/._1.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")


def empty_class(root: Path) -> None:
    some(root, "cat")
    (root / "dog").mkdir()


def only_broken(root: Path) -> None:
    some(root, "cat")
    (root / "dog").mkdir()
    (root / "dog" / "1.jpg").write_bytes(b"x")


def nested(root: Path) -> None:
    some(root, "cat/deep/er", "dog")


def flat_splits(root: Path) -> None:
    """Pictures in train/ and val/ without class folders."""
    some(root, "train", "val")


def only(*names: str) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        for number, name in enumerate(names):
            some(root / name, "circle", "square", first=10 * number)

    return build


def val_lacks_class(root: Path) -> None:
    some(root / "train", *CLASSES)
    some(root / "val", "square", "triangle", first=50)


def val_has_more(root: Path) -> None:
    some(root / "train", "circle", "square")
    some(root / "val", *CLASSES, first=50)


def link_loop(root: Path) -> None:
    some(root, "circle", "square")
    (root / "circle" / "up").symlink_to("..")


def link_out(root: Path) -> None:
    some(root, "circle", "square")
    (root / "etc").symlink_to("/etc")


def link_class(root: Path) -> None:
    some(root, "real/circle", "square")
    (root / "circle").symlink_to("real/circle")


def one_picture_each(root: Path) -> None:
    some(root, *CLASSES, images=1)


def all_the_same(root: Path) -> None:
    some(root, "circle", images=1)
    for name in CLASSES:
        (root / name).mkdir(exist_ok=True)
        if name != "circle":
            shutil.copyfile(root / "circle" / "000.png", root / name / "000.png")


def pickled_cache(root: Path) -> None:
    some(root, "circle", "square")
    for name in ("train.cache", "circle/labels.npy", "data.yaml"):
        (root / name).write_bytes(b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR.")


# How `train --dry-run` and `eval` judge each, and words that must stand in the explanation of the first.
LAYOUTS: dict[str, tuple[Callable[[Path], None], int, int, str]] = {
    "empty root": (lambda root: None, 65, 65, "holds no class folders; found nothing"),
    "single class": (lambda root: some(root, "circle"), 65, 0, "has one class, circle; training needs two"),
    "empty class": (empty_class, 65, 65, "no pictures in class dog"),
    "only broken class": (only_broken, 65, 65, "every picture of class dog is broken"),
    "files in root": (files_in_root, 65, 65, "has one class, cat"),
    "nested": (nested, 0, 65, ""),
    "no class folders in splits": (flat_splits, 65, 65, "holds no class folders"),
    "test only": (only("test"), 65, 0, "holds test but no train folder"),
    "val only": (only("val"), 65, 0, "holds val but no train folder"),
    "validation and test": (only("validation", "test"), 65, 0, "but no train folder"),
    "two vals": (only("train", "val", "valid"), 65, 65, "which one validates?"),
    "all splits": (only("train", "val", "test"), 0, 0, ""),
    "train only": (only("train"), 0, 0, ""),
    "val lacks class": (val_lacks_class, 0, 65, "classes without a validation picture: 1: circle"),
    "val has more": (val_has_more, 65, 65, "unknown classes: triangle"),
    "link loop": (link_loop, 0, 0, "skipped (link): 1"),
    "link out": (link_out, 0, 0, "skipped (link): 1"),
    "link to a class": (link_class, 0, 65, "skipped (link): 1"),
    "one picture each": (one_picture_each, 65, 65, "no picture is left to validate on"),
    "all the same": (all_the_same, 65, 65, "no picture is left to validate on"),
    "pickled cache": (pickled_cache, 0, 0, "skipped (not_an_image)"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_its_verdict(name: str, trained_place: Place, tmp_path: Path) -> None:
    build, train_code, eval_code, words = LAYOUTS[name]
    root = tmp_path / "data"
    root.mkdir()
    build(root)
    before = tree(root)
    done = trained_place.forks.run("train", str(root), "--dry-run", "--offline", cwd=tmp_path)
    assert done.code == train_code, done.err.decode()
    assert words in done.err.decode()
    assert b"Traceback" not in done.err
    evaluated = trained_place.forks.run("eval", str(root), "--run", str(trained_place.run), cwd=tmp_path)
    assert evaluated.code == eval_code, evaluated.err.decode()
    assert b"Traceback" not in evaluated.err
    assert tree(root) == before
    assert sorted(os.listdir(tmp_path)) == ["data"]  # nothing was unpickled, and no run was begun


@pytest.mark.parametrize(("links", "expected"), [([], 4), (["--follow-links"], 4)])
def test_every_real_file_is_used_once_whatever_links_there_are(
    links: list[str], expected: int, forks: Forks, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    link_loop(root)
    first, second = sorted((root / "square").iterdir())
    (root / "square" / "again.png").symlink_to(first.name)
    os.link(second, root / "square" / "hard.png")
    done = forks.run("train", str(root), "--dry-run", "--split", "0.5", "--json", *links, cwd=tmp_path)
    assert done.code == 0, done.err.decode()
    report = done.records[-1]
    assert report["train_images"] + report["val_images"] == expected


@pytest.mark.parametrize(("one", "other"), [("Dog", "dog"), ("caf\u00e9", "cafe\u0301")], ids=["case", "accent"])
def test_strict_refuses_class_names_that_look_alike(one: str, other: str, tmp_path: Path) -> None:
    some(tmp_path / "data", one, other)
    assert len(prepare(TrainConfig(data=tmp_path / "data", offline=True)).classes) == 2
    with pytest.raises(MvcrError, match="look alike") as caught:
        prepare(TrainConfig(data=tmp_path / "data", offline=True, strict=True))
    assert caught.value.exit_code == 65


Entry = tuple[str, int, int, int, int, bytes]


def tree(root: Path) -> list[Entry]:
    """Everything below a folder, itself included: names, modes, times of change, sizes and contents."""

    def entry(path: Path) -> Entry:
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() and status.st_size < 1 << 20 else b""
        return str(path), status.st_mode, status.st_mtime_ns, status.st_ctime_ns, status.st_size, content

    return sorted(map(entry, (root, *root.rglob("*"))))


def commands(data: str, run: str, new: str) -> dict[str, list[str]]:
    """Everything that reads a data folder."""
    return {
        "dry run": ["train", data, "--dry-run", "--json"],
        "train": ["train", data, *SMALL, "--run", f"{new}/train", "--json"],
        "eval": ["eval", data, "--run", run, "--workers", "1", "--out", f"{new}/eval.jsonl"],
        "predict": ["predict", data, "--run", run, "--workers", "1", "--json"],
        "export": ["export", "--run", f"{new}/train", "--format", "safetensors", "--out", f"{new}/x.safetensors"],
        "benchmark": [
            "benchmark",
            "cnn",
            "--data",
            data,
            "--imgsz",
            "32",
            "--batch",
            "1",
            "--rounds",
            "1",
            "--no-onnx",
        ],
    }


@pytest.fixture
def messy(trained_place: Place, tmp_path: Path) -> Path:
    """The data of the run, with every kind of broken file among it."""
    root = Path(shutil.copytree(trained_place.root / "data", tmp_path / "messy"))
    bad_files(root / "circle")
    nastier.odd_links(root / "square")
    return root


def test_no_command_writes_to_the_data(messy: Path, trained_place: Place, tmp_path: Path) -> None:
    before = tree(messy)
    for name, argv in commands(str(messy), str(trained_place.run), str(tmp_path)).items():
        done = trained_place.forks.run(*argv, cwd=tmp_path)
        assert done.code in (0, 65), f"{name}: {done.err.decode()}"
        assert b"Traceback" not in done.err
        assert tree(messy) == before, name


READ_ONLY = """
import subprocess, sys
data = sys.argv[1]
subprocess.run(["mount", "--bind", data, data], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", data], check=True)
try:
    open(data + "/probe", "w")
except OSError:
    pass
else:
    sys.exit("the folder can be written")
from mvcr_cli import cli
for line in sys.argv[2:]:
    try:
        cli.main(line.split("\\t"))
    except SystemExit as error:
        print(line.split("\\t")[0], error.code, file=sys.stderr)
"""


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    probe = ["unshare", "-m", "mount", "--bind", "/tmp", "/tmp"]
    return unshare is not None and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a mount namespace of its own (Linux, root)")
def test_every_command_works_on_a_read_only_medium(messy: Path, trained_place: Place, tmp_path: Path) -> None:
    lines = ["\t".join(argv) for argv in commands(str(messy), str(trained_place.run), str(tmp_path)).values()]
    argv = ["unshare", "-m", sys.executable, "-c", READ_ONLY, str(messy), *lines]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment)
    ends = [
        line
        for line in done.stderr.splitlines()
        if line.split(" ")[0] in ("train", "eval", "predict", "export", "benchmark")
    ]
    assert [end for end in ends if len(end.split()) == 2] == [
        "train 0", "train 0", "eval 65", "predict 65", "export 0", "benchmark 0",
    ], done.stderr  # fmt: skip


def report_of(done: Done, kind: str) -> list[dict[str, Any]]:
    return [record for record in done.records if record["record"] == kind]


def by_name(records: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    return Counter((os.path.basename(record["path"]), record["error"]["code"]) for record in records)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_every_broken_file_is_reported_once_and_never_used(workers: str, trained_place: Place, tmp_path: Path) -> None:
    root, forks = tmp_path / "data", trained_place.forks
    shapes(root, images=20)
    good_pictures(root / "circle")
    expected = {path.name: code for path, code in (bad_files(root / "square") | non_files(root / "circle")).items()}
    wrong = nastier.wrong_files()
    nastier.write_all(root / "square", {name: data for name, (data, _) in wrong.items()})
    expected |= {name: code for name, (_, code) in wrong.items()}
    expected["claims_1.5g.png"] = "corrupt"  # small enough to be read reduced, if it were true
    del expected["absent.png"]
    folder = expected.pop("folder.png")  # an empty folder is nobody's picture
    assert folder == "not_a_file"
    files = [path for path in root.rglob("*") if not path.is_dir()]
    common = ["--workers", workers]

    predicted = forks.run("predict", str(root), "--run", str(trained_place.run), *common, "--json", cwd=tmp_path)
    assert predicted.code == 65
    images = report_of(predicted, "prediction")
    assert by_name(report_of(predicted, "error")) == Counter(expected.items())
    assert len(images) + len(expected) == len(files)
    assert not {os.path.basename(image["path"]) for image in images} & set(expected)

    checked = forks.run("train", str(root), "--dry-run", "--json", cwd=tmp_path)
    assert checked.code == 0
    assert by_name(report_of(checked, "error")) == Counter(expected.items())
    report = checked.records[-1]
    assert report["train_images"] + report["val_images"] + report["skipped"] == len(files)
    assert report["broken"] + report["skipped"] == len(expected)

    run = tmp_path / "run"
    trained = forks.run("train", str(root), *SMALL, *common, "--run", str(run), "--json", cwd=tmp_path)
    assert trained.code == 0, trained.err.decode()
    kept = [json.loads(line) for line in (run / "findings.jsonl").read_text().splitlines()]
    assert by_name([line for line in kept if line["record"] == "error"]) == Counter(expected.items())
    assert trained.records[-1]["skipped"] == len(expected)
    lines = trained.err.decode().splitlines()
    assert all(sum(name in line for line in lines) <= 1 for name in expected)

    out = tmp_path / "out.jsonl"
    evaluated = forks.run("eval", str(root), "--run", str(trained_place.run), *common, "--out", str(out), cwd=tmp_path)
    assert evaluated.code == 65
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert by_name([line for line in results if line["record"] == "error"]) == Counter(expected.items())
    assert sum(line["record"] == "image" for line in results) == len(images)
    for done in (predicted, evaluated):
        summaries = [line.split(":")[0] for line in done.err.decode().splitlines()]
        codes = [line for line in summaries if line in set(expected.values())]
        assert len(codes) == len(set(codes))
    assert b"TIFF" not in predicted.err  # libtiff talks past Python


def test_a_folder_that_may_not_be_read_is_one_record(trained_place: Place, tmp_path: Path) -> None:
    place = trained_place
    shutil.copytree(place.root / "data", tmp_path / "data")
    (tmp_path / "data" / "circle" / "000.png").chmod(0)
    (tmp_path / "locked").mkdir(mode=0)
    argv = ["predict", "locked", "data/circle", "--run", str(place.weights), "--workers", "1", "--json"]
    done = place.forks.run(*argv, cwd=tmp_path, meek=True)
    assert done.code == 65, done.err.decode()
    assert by_name(report_of(done, "error")) == Counter({("locked", "permission"): 1, ("000.png", "permission"): 1})
    assert len(report_of(done, "prediction")) == 15
    (tmp_path / "data" / "square").chmod(0)
    refused = place.forks.run("train", "data", "--dry-run", cwd=tmp_path, meek=True)
    assert refused.code == 77
    assert b"cannot read folder data/square" in refused.err
    for path in (tmp_path / "locked", tmp_path / "data" / "square"):
        path.chmod(0o700)


def large(root: Path, classes: int, files: int) -> float:
    """Seconds until a folder of so many files that are no pictures is refused."""
    for number in range(classes):
        (root / f"class{number}").mkdir(parents=True)
    for number in range(files):
        (root / f"class{number % classes}" / f"{number}.jpg").write_bytes(b"%d" % number)
    began = time.perf_counter()
    with pytest.raises(MvcrError) as caught:
        prepare(TrainConfig(data=root, offline=True))
    assert caught.value.exit_code == 65
    return time.perf_counter() - began


@pytest.mark.slow
def test_errors_of_large_folders_come_soon(tmp_path: Path, figure: Figure) -> None:
    one = large(tmp_path / "one", 1, 10_000)
    many = large(tmp_path / "many", 10_000, 10_000)
    more = large(tmp_path / "more", 10, 100_000)
    figure(
        f"refused after {one:.1f} s (10,000 files of one class), {many:.1f} s (in 10,000 classes), {more:.1f} s (100,000)"
    )
