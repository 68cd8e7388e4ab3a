from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from random import Random

import pytest
from conftest import PhotoFolder
from nasty import HOSTILE_NAMES, bad_files, non_files
from PIL import Image

from mvcr_cli.data import files, images
from mvcr_cli.data.folder import (
    FolderIndex,
    Layout,
    Sample,
    check_trainable,
    conflicts,
    find_layout,
    iter_images,
    leaks,
    relabel,
    scan,
    split,
)
from mvcr_cli.errors import DataError, InputMissing, MvcrError, NotPermitted, WorkerFailed
from mvcr_cli.paths import display_name
from mvcr_cli.records import Problem


def codes(problems: Iterable[Problem]) -> dict[str, str]:
    return {os.path.basename(problem.path): problem.code for problem in problems}


def names(samples: Iterable[Sample]) -> list[str]:
    return [os.path.basename(sample.path) for sample in samples]


def touch(*paths: Path) -> None:
    """Picture names are enough for the index: it decodes nothing. Equal names, equal contents."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)


def index_of(*classes: str, root: str = "data") -> FolderIndex:
    """Each class is a string with one letter a picture; equal letters are equal files."""
    samples = [
        Sample(f"{root}/{label}/{place}.png", label, hashlib.md5(letter.encode()).hexdigest())
        for label, letters in enumerate(classes)
        for place, letter in enumerate(letters)
    ]
    return FolderIndex(Path(root), tuple(f"class{n}" for n in range(len(classes))), tuple(samples), ())


def letters(count: int, first: int = 0) -> str:
    return "".join(chr(0x4E00 + first + n) for n in range(count))


def tree(root: Path) -> list[tuple[str, int, bytes]]:
    return sorted((str(p), p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in root.rglob("*"))


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders_are_found(val: str, photo_folder: PhotoFolder, tmp_path: Path) -> None:
    train = photo_folder("data/train")
    assert find_layout(tmp_path / "data") == Layout(train, None, None)
    photo_folder(f"data/{val}", first=10)
    photo_folder("data/test", first=20)
    (tmp_path / "data/annotations").mkdir()
    assert find_layout(tmp_path / "data") == Layout(train, tmp_path / "data" / val, tmp_path / "data/test")


def test_class_folders_are_their_own_training_set(photo_folder: PhotoFolder) -> None:
    root = photo_folder()
    assert find_layout(root) == Layout(root, None, None)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    touch(tmp_path / "car/a.png", tmp_path / "train/b.png")
    assert find_layout(tmp_path).train == tmp_path
    assert scan(tmp_path).classes == ("car", "train")


@pytest.mark.parametrize("present", [["train", "val", "valid"], ["val"], ["test", "val"]])
def test_unclear_splits_are_refused(present: list[str], tmp_path: Path) -> None:
    for name in present:
        (tmp_path / name / "cat").mkdir(parents=True)
    with pytest.raises(DataError):
        find_layout(tmp_path)


@pytest.mark.parametrize("look", [find_layout, scan, lambda root: list(iter_images(root))])
def test_no_folder_is_missing_and_a_file_is_bad_data(look, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path / "a\0b", tmp_path / "loop", tmp_path / ("n" * 5000)):
        if path.name == "loop":
            path.symlink_to("loop")
        with pytest.raises(InputMissing) as missing:
            look(path)
        assert missing.value.exit_code == 66
    touch(tmp_path / "picture.png")
    with pytest.raises(DataError, match="is a file") as caught:
        look(tmp_path / "picture.png")
    assert caught.value.exit_code == 65


def test_a_folder_without_class_folders_says_what_it_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing") as caught:
        scan(tmp_path)
    assert "DATA/<class>/" in caught.value.hint
    assert "DATA/train/<class>/" in caught.value.hint
    touch(tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "labels.csv")
    with pytest.raises(DataError, match="1 other files, 2 pictures in no class folder"):
        scan(tmp_path)


def test_class_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "cat/a.txt")
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match="no pictures in the 2 class folders"):
        scan(tmp_path)


def test_an_unreadable_folder_stops_the_scan_but_not_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "cat/a.png", tmp_path / "dog/deep/b.png")
    read = os.scandir

    def refuse(folder: str) -> object:
        if os.fspath(folder).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return read(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(NotPermitted, match="dog/deep") as caught:
        scan(tmp_path)
    assert caught.value.exit_code == 77
    found = list(iter_images(tmp_path))
    assert [item.code for item in found if isinstance(item, Problem)] == ["permission"]
    assert str(tmp_path / "cat/a.png") in found


def test_training_needs_two_classes(photo_folder: PhotoFolder) -> None:
    index = scan(photo_folder(classes=1))
    with pytest.raises(DataError, match="one class, circle"):
        check_trainable(index)
    check_trainable(scan(photo_folder("two", classes=2)))


def test_training_needs_a_good_picture_in_every_class(photo_folder: PhotoFolder) -> None:
    root = photo_folder(classes=2, images=1)
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in class empty"):
        check_trainable(scan(root))
    touch(root / "empty/text.png", root / "empty/text2.png")
    with pytest.raises(DataError, match="every picture of class empty is broken"):
        check_trainable(scan(root))
    Image.new("RGB", (9, 9)).save(root / "empty/zzz.png")
    check_trainable(scan(root))


def test_every_picture_is_indexed_under_its_folder_and_nothing_is_written(photo_folder: PhotoFolder) -> None:
    root = photo_folder(classes=3, images=4)
    before = tree(root)
    index = scan(root)
    check_trainable(index)
    assert index.classes == ("circle", "square", "triangle")
    assert Counter(sample.label for sample in index.samples) == {0: 4, 1: 4, 2: 4}
    assert all(Path(sample.path).parent.name == index.classes[sample.label] for sample in index.samples)
    assert all(Path(sample.path).is_file() for sample in index.samples)
    assert len({sample.digest for sample in index.samples}) == 12
    assert index.skipped == ()
    assert tree(root) == before


def test_nothing_is_decoded(photo_folder: PhotoFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(images.Image, "open", refuse)
    assert len(scan(photo_folder()).samples) == 12


def test_the_order_is_that_of_bytes(tmp_path: Path) -> None:
    for name in ("b", "a", "B", "é", "Z", "10", "9"):
        touch(tmp_path / name / "2.png", tmp_path / name / "10.png", tmp_path / name / "1/x.png")
    index = scan(tmp_path)
    assert index.classes == ("10", "9", "B", "Z", "a", "b", "é")
    assert names(index.samples)[:3] == ["x.png", "10.png", "2.png"]


def test_pictures_below_a_class_count_at_any_depth(tmp_path: Path) -> None:
    touch(tmp_path / "cat" / Path(*["d"] * 200) / "a.png", tmp_path / "dog/b.png")
    assert names(scan(tmp_path).samples) == ["a.png", "b.png"]


def test_everything_passed_over_is_listed(tmp_path: Path) -> None:
    touch(tmp_path / "cat/a.PNG", tmp_path / "cat/notes.txt", tmp_path / "cat/phone.HEIC", tmp_path / "cat/none")
    touch(tmp_path / "loose.jpg", tmp_path / "readme.md", tmp_path / ".cache/x.png", tmp_path / "__MACOSX/y.png")
    touch(tmp_path / "cat/.hidden.png", tmp_path / "cat/._a.png", tmp_path / "cat/.thumbs/z.png")
    touch(tmp_path / "Thumbs.db", tmp_path / ".DS_Store", tmp_path / "cat/Thumbs.db")
    index = scan(tmp_path)
    assert names(index.samples) == ["a.PNG"]
    assert codes(index.skipped) == {
        "notes.txt": "not_an_image",
        "phone.HEIC": "unknown_format",
        "none": "not_an_image",
        "readme.md": "not_an_image",
        "loose.jpg": "outside_class",
        ".cache": "hidden",
        "__MACOSX": "hidden",
    }
    paths = [os.fsencode(problem.path) for problem in index.skipped]
    assert paths == sorted(paths)
    assert "convert" in next(problem.detail for problem in index.skipped if problem.path.endswith("HEIC"))


def test_what_cannot_be_read_is_listed_and_what_cannot_be_decoded_is_not(tmp_path: Path) -> None:
    touch(tmp_path / "dog/good.png")
    (tmp_path / "cat").mkdir()
    unreadable = non_files(tmp_path / "cat")
    expected = {path.name: code for path, code in unreadable.items() if path.name not in ("absent.png", "folder.png")}
    broken = bad_files(tmp_path / "cat")
    index = scan(tmp_path)
    skipped = codes(index.skipped)
    assert {name: skipped.pop(name) for name in expected} == expected
    assert skipped == {"zero.jpg": "empty", "photo.heic": "unknown_format"}
    assert len(index.samples) == 1 + len(broken) - 2


def test_a_failing_disk_costs_the_file_and_a_failing_process_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "cat/a.png", tmp_path / "cat/b.png")

    def fail(file: BufferedReader, size: int) -> str:
        if file.read() == b"b.png":
            raise OSError(errno.EIO, "Input/output error")
        return "digest"

    monkeypatch.setattr(files, "_digest", fail)
    index = scan(tmp_path)
    assert names(index.samples) == ["a.png"]
    assert codes(index.skipped) == {"b.png": "corrupt"}

    def exhaust(_: str) -> None:
        raise WorkerFailed("cannot open more files")

    monkeypatch.setattr(files, "open_regular", exhaust)
    with pytest.raises(WorkerFailed):
        scan(tmp_path)


def test_hostile_names_are_just_names(tmp_path: Path) -> None:
    for name in HOSTILE_NAMES:
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, name[:200] + b".jpg"), "wb") as file:
            file.write(name)
    index = scan(tmp_path)
    hidden = [problem for problem in index.skipped if problem.code == "hidden"]
    assert len(hidden) == 2
    assert len(index.classes) == len(set(index.classes)) == len(HOSTILE_NAMES) - 2
    assert len(index.samples) == len(index.classes)
    for sample in index.samples:
        assert Path(sample.path).read_bytes() == os.fsencode(Path(sample.path).parent.name)
    for name in index.classes:
        name.encode()  # valid Unicode
        assert display_name(name).isprintable()
    assert {"007", "None", "true", "1e5", "-rf", "caf\\xe9"} <= set(index.classes)


def test_look_alike_classes_stay_apart_with_one_warning(tmp_path: Path) -> None:
    for name in ("Dog", "dog", "caf\u00e9", "cafe\u0301", "cat"):
        touch(tmp_path / name / f"{name}.png")
    index = scan(tmp_path)
    assert len(index.classes) == 5
    assert {problem.detail for problem in index.skipped} == {
        "look alike: 'Dog', 'dog'",
        "look alike: 'cafe\\u0301', 'caf\\xe9'",
    }
    assert {problem.code for problem in index.skipped} == {"twin_classes"}


def test_links_to_folders_are_followed_only_on_demand(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere/cat/a.png", tmp_path / "elsewhere/more/b.png")
    touch(tmp_path / "data/dog/c.png")
    (tmp_path / "data/cat").symlink_to(tmp_path / "elsewhere/cat")
    (tmp_path / "data/dog/more").symlink_to(tmp_path / "elsewhere/more")
    index = scan(tmp_path / "data")
    assert index.classes == ("dog",)
    assert names(index.samples) == ["c.png"]
    assert codes(index.skipped) == {"cat": "link", "more": "link"}
    followed = scan(tmp_path / "data", follow_links=True)
    assert followed.classes == ("cat", "dog")
    assert names(followed.samples) == ["a.png", "c.png", "b.png"]
    assert followed.skipped == ()


@pytest.mark.parametrize("follow_links", [False, True])
def test_a_loop_is_reported_once_and_adds_nothing(follow_links: bool, tmp_path: Path) -> None:
    touch(tmp_path / "cat/1.png", tmp_path / "dog/2.png")
    (tmp_path / "cat/up").symlink_to("..")
    index = scan(tmp_path, follow_links=follow_links)
    assert names(index.samples) == ["1.png", "2.png"]
    assert codes(index.skipped) == {"up": "link"}
    found = list(iter_images(tmp_path, follow_links=follow_links))
    assert len(found) == 3


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    for one in range(8):
        touch(tmp_path / f"c{one}/{one}.png")
        for other in range(8):
            (tmp_path / f"c{one}/to{other}").symlink_to(tmp_path / f"c{other}")
    index = scan(tmp_path, follow_links=True)
    assert sorted(names(index.samples)) == [f"{n}.png" for n in range(8)]
    assert len(index.skipped) < 200


def test_every_real_file_counts_once(tmp_path: Path) -> None:
    touch(tmp_path / "cat/a.png", tmp_path / "outside.png", tmp_path / "dog/c.png")
    (tmp_path / "cat/b.png").symlink_to("a.png")
    os.link(tmp_path / "cat/a.png", tmp_path / "dog/d.png")
    index = scan(tmp_path)
    assert names(index.samples) == ["a.png", "c.png"]
    assert codes(index.skipped) == {
        "b.png": "duplicate_link",
        "d.png": "duplicate_link",
        "outside.png": "outside_class",
    }
    (tmp_path / "dog/e.png").symlink_to(tmp_path / "outside.png")
    assert "e.png" in names(scan(tmp_path).samples)


def test_small_files_are_told_apart_by_any_byte(tmp_path: Path) -> None:
    touch(tmp_path / "cat/a.png")
    for name, data in (("b", b"x" * 5000), ("c", b"x" * 4999 + b"y"), ("d", b"x" * 5000)):
        (tmp_path / f"cat/{name}.png").write_bytes(data)
    a, b, c, d = (sample.digest for sample in scan(tmp_path).samples)
    assert b == d
    assert len({a, b, c}) == 3
    assert b == hashlib.blake2b(b"x" * 5000, digest_size=16).hexdigest()


def test_large_files_are_told_apart_by_size_start_middle_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MEBIBYTE", 10)
    monkeypatch.setattr(files, "WHOLE_BYTES", 40)
    (tmp_path / "cat").mkdir()

    def digest(data: bytes) -> str:
        (tmp_path / "cat/a.png").write_bytes(data)
        return scan(tmp_path).samples[0].digest

    def changed(place: int) -> str:
        return digest(bytes(place) + b"x" + bytes(99 - place))

    same = digest(bytes(100))
    assert digest(bytes(101)) != same
    for place in (0, 9, 45, 54, 90, 99):
        assert changed(place) != same
    assert changed(30) == same  # between the parts that are read


@pytest.mark.parametrize("head", [b"BM", b"P6\n", b"PF\n", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"])
def test_large_files_without_compression_are_told_apart_by_any_byte(
    head: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small thing in a large picture changes a few bytes in the middle of such a file, and not its size."""
    monkeypatch.setattr(files, "MEBIBYTE", 10)
    monkeypatch.setattr(files, "WHOLE_BYTES", 40)
    for name, data in (("a", bytes(100)), ("b", bytes(30) + b"x" + bytes(69)), ("c", bytes(100))):
        path = tmp_path / "cat" / f"{name}.tif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(head + data)
    a, b, c = (sample.digest for sample in scan(tmp_path).samples)
    assert a == c != b
    monkeypatch.setattr(files, "UNCOMPRESSED_BYTES", 50)
    a, b, c = (sample.digest for sample in scan(tmp_path).samples)
    assert a == b == c


def test_split_takes_its_share_of_every_class() -> None:
    for share in (0.05, 0.2, 0.5, 0.95):
        for count in (1, 2, 3, 7, 10, 50):
            index = index_of(letters(count), letters(200, first=100))
            train, val = split(index, share, seed=0)
            expected = 0 if count == 1 else min(max(round(share * count), 1), count - 1)
            assert [sum(sample.label == label for sample in val) for label in (0, 1)] == [expected, round(share * 200)]
            assert sorted(train + val, key=lambda sample: sample.path) == sorted(index.samples, key=lambda s: s.path)


def test_split_ignores_names_and_order() -> None:
    index = index_of(letters(30), letters(40, first=100))
    _, val = split(index, 0.2, seed=5)
    shuffled = list(index.samples)
    Random(0).shuffle(shuffled)
    moved = tuple(replace(sample, path=f"elsewhere/{place}.jpg") for place, sample in enumerate(shuffled))
    _, again = split(replace(index, samples=moved), 0.2, seed=5)
    assert {sample.digest for sample in again} == {sample.digest for sample in val}


def test_split_depends_on_the_seed() -> None:
    index = index_of(letters(40), letters(40, first=100))
    assert len({split(index, 0.2, seed) for seed in range(10)}) == 10
    assert split(index, 0.2, 3) == split(index, 0.2, 3)


def test_one_more_picture_moves_at_most_one_other() -> None:
    for count in range(2, 40):
        before = {sample.digest for sample in split(index_of(letters(count), "ab"), 0.2, seed=1)[1]}
        index = index_of(letters(count + 1), "ab")
        after = {sample.digest for sample in split(index, 0.2, seed=1)[1]}
        new = index.samples[count].digest
        assert len((before ^ after) - {new}) <= 1


def test_equal_files_stay_on_one_side() -> None:
    chance = Random(0)
    for seed in range(200):
        index = index_of(*("".join(chance.choices("abcdefghijkl", k=chance.randrange(1, 9))) for _ in range(4)))
        train, val = split(index, 0.3, seed)
        assert len(train) + len(val) == len(index.samples)
        assert not leaks(train, val)


def test_classes_that_own_a_picture_are_on_both_sides() -> None:
    chance = Random(1)
    for seed in range(200):
        shared = ["".join(chance.choices("abcd", k=3)) for _ in range(3)]
        index = index_of(*(f"{letters}{own}" for letters, own in zip(shared, ("XY", "ZW", "UV"), strict=True)))
        sides = defaultdict(set)
        for side, samples in enumerate(split(index, 0.2, seed)):
            for sample in samples:
                sides[sample.label].add(side)
        assert all(len(both) == 2 for both in sides.values())


def test_a_folder_with_copies_of_all_classes_leaves_something_to_validate() -> None:
    train, val = split(index_of("ab", "cd", "abcd"), 0.2, seed=0)
    for samples in (train, val):
        assert {sample.label for sample in samples} == {0, 1, 2}


def test_labels_map_by_name() -> None:
    index = index_of("ab", "c", "d")
    classes = ("class2", "unseen", "class0", "class1")
    samples, missing = relabel(index, classes)
    assert [sample.path for sample in samples] == [sample.path for sample in index.samples]
    assert [classes[sample.label] for sample in samples] == [index.classes[s.label] for s in index.samples]
    assert missing == ("unseen",)
    assert relabel(index, index.classes) == (index.samples, ())


def test_unknown_classes_are_refused_unless_ignored() -> None:
    index = index_of("ab", "c", "d", "")
    with pytest.raises(DataError, match="unknown classes: class1, class2") as caught:
        relabel(index, ("class0",))
    assert "--ignore-extra-classes" in caught.value.hint
    samples, missing = relabel(index, ("other", "class0"), ignore_extra=True)
    assert [sample.label for sample in samples] == [1, 1]
    assert missing == ("other",)
    with pytest.raises(DataError, match="no picture of a known class"):
        relabel(index, ("other",), ignore_extra=True)
    assert relabel(index, ("class0", "class1", "class2"))[1] == ()  # an empty folder more is no contradiction


def test_leaks_name_every_picture_of_the_second_set() -> None:
    a, b = index_of("abca", root="a"), index_of("xca", root="b")
    assert leaks(a.samples, b.samples) == [("a/0/2.png", "b/0/1.png"), ("a/0/0.png", "b/0/2.png")]
    assert leaks(a.samples, index_of("xyz").samples) == []
    assert len(leaks(a.samples, a.samples)) == 4


def test_conflicts_name_equal_files_under_two_labels() -> None:
    assert conflicts(index_of("aab", "ca", "b").samples) == [
        ("data/0/0.png", "data/1/1.png"),
        ("data/0/2.png", "data/2/0.png"),
    ]
    assert conflicts(index_of("aab", "cd").samples) == []


def test_pictures_come_in_sorted_order_with_problems_between(tmp_path: Path) -> None:
    touch(tmp_path / "b/2.png", tmp_path / "b/10.png", tmp_path / "a.jpg", tmp_path / "c.txt", tmp_path / ".git/x.png")
    (tmp_path / "d").symlink_to("b")
    found = [item if isinstance(item, str) else item.code for item in iter_images(tmp_path)]
    assert found == [
        str(tmp_path / "a.jpg"),
        str(tmp_path / "b/10.png"),
        str(tmp_path / "b/2.png"),
        "not_an_image",
        "link",
    ]


def refusal(root: Path) -> MvcrError | None:
    """What keeps the folder from being trained on."""
    try:
        index = scan(find_layout(root).train)
        assert index.samples
        check_trainable(index)
    except MvcrError as error:
        return error
    return None


def test_errors_are_our_own_for_any_layout(tmp_path: Path, photo_folder: PhotoFolder) -> None:
    """Whatever the folder, it is trainable or there is one error with a way out."""
    assert refusal(photo_folder("good")) is None
    for number in range(60):
        chance, root = Random(number), tmp_path / str(number)
        root.mkdir()
        for _ in range(chance.randrange(6)):
            parts = chance.choices(["train", "val", "cat", "dog", ".x", "a.png", "b.txt"], k=chance.randrange(1, 4))
            path = root.joinpath(*parts)
            if not any(parent.is_file() for parent in [path, *path.parents]) and not path.is_dir():
                touch(path) if "." in path.name else path.mkdir(parents=True)
        error = refusal(root)
        assert error is not None  # text is no picture
        assert error.exit_code == 65
        assert error.hint
