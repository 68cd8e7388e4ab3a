"""A folder of class folders as an index: classes, pictures, and everything that was passed over with the reason.

Two layouts are read, and neither is ever written to:

    DATA/<class>/**/picture
    DATA/train/<class>/**/picture, with val (or valid, validation) and test beside it

No picture is decoded here except by `check_trainable`.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mvcr_cli.data.files import (
    LAYOUTS,
    identity,
    is_folder,
    is_hidden,
    link_problem,
    list_root,
    read_contents,
    suffix_problem,
    walk,
)
from mvcr_cli.data.images import HEIC_ADVICE, load_picture
from mvcr_cli.errors import BadImage, DataError, NotPermitted
from mvcr_cli.paths import class_name, display_name
from mvcr_cli.records import Problem

VAL_NAMES = ("val", "valid", "validation")
WARNINGS = frozenset({"twin_classes"})  # problems for which nothing is left out
SPLIT_NAMES = frozenset({"train", "test", *VAL_NAMES})


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture. `label` counts into `FolderIndex.classes`; equal digests are equal files."""

    path: str
    label: int
    digest: str


@dataclass(frozen=True, slots=True)
class FolderIndex:
    """What `scan` found below `root`; `skipped` holds what is not in `samples`, and warnings."""

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    skipped: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    train: Path
    val: Path | None
    test: Path | None


def find_layout(data: Path) -> Layout:
    """Which folders train, validate and test; whether they hold any pictures is for `scan` to say.

    `train` is a split, and not a class of that name, when it holds folders or when only split folders stand beside it.

    Raises:
        InputMissing: there is no such folder.
        DataError: it is a file, has two validation folders, or `val` or `test` without `train`.
        NotPermitted: it cannot be read.
    """
    names = _folder_names(data)
    splits = names & SPLIT_NAMES
    if "train" not in splits or not (splits == names or _folder_names(data / "train")):
        if splits and splits == names:
            raise DataError(f"{display_name(data)} holds {', '.join(sorted(splits))} but no train folder", LAYOUTS)
        return Layout(data, None, None)
    return Layout(data / "train", _val_folder(data, splits), data / "test" if "test" in splits else None)


def find_evaluation(data: Path) -> Path:
    """The folder of class folders to evaluate on: the test split, else val, else train, else `data` itself.

    Raises: see `find_layout`; but `test` and `val` need no `train` here.
    """
    names = _folder_names(data)
    if names and names <= SPLIT_NAMES - {"train"}:
        val = _val_folder(data, names)
        return data / "test" if "test" in names or val is None else val
    layout = find_layout(data)
    return layout.test or layout.val or layout.train


def _val_folder(data: Path, splits: set[str]) -> Path | None:
    vals = [name for name in VAL_NAMES if name in splits]
    if len(vals) > 1:
        raise DataError(f"{display_name(data)} has {' and '.join(vals)}: which one validates?", "keep one of them")
    return data / vals[0] if vals else None


def _folder_names(root: Path) -> set[str]:
    return {entry.name for entry in list_root(root) if is_folder(entry) and not is_hidden(entry.name)}


def scan(root: Path, *, follow_links: bool = False) -> FolderIndex:
    """Index the class folders directly below `root`, with all pictures at any depth.

    Every file counts once, whatever links lead to it. Problem codes in `skipped`: hidden, link, duplicate_link,
    not_an_image, outside_class, twin_classes (a warning: the classes stay), and those of `BadImage` for files that
    cannot be read.

    Raises:
        InputMissing: there is no such folder.
        DataError: it is a file, or holds no class folders, or none of them has a picture.
        NotPermitted: a folder cannot be read.
    """
    folders, skipped = _class_folders(list_root(root), follow_links)
    classes = tuple(dict.fromkeys(class_name(folder.name) for folder in folders))
    if not classes:
        raise DataError(f"{display_name(root)} holds no class folders; found {_summary(skipped)}", LAYOUTS)
    skipped += _twins(folders)
    labels = {name: label for label, name in enumerate(classes)}
    found: list[tuple[str, int]] = []
    seen = {identity(os.stat(root))}
    for folder in folders:
        for item in walk([folder], follow_links, seen):
            if isinstance(item, str):
                found.append((item, labels[class_name(folder.name)]))
            elif item.code == "permission":
                raise NotPermitted(f"cannot read folder {display_name(item.path)}: {item.detail}", "make it readable")
            else:
                skipped.append(item)
    samples = _samples(found, skipped)
    if not samples:
        raise DataError(
            f"no pictures in the {len(classes)} class folders of {display_name(root)}; found {_summary(skipped)}",
            LAYOUTS,
        )
    skipped.sort(key=lambda problem: (os.fsencode(problem.path), problem.code))
    return FolderIndex(root, classes, tuple(samples), tuple(skipped))


def iter_images(root: Path, *, follow_links: bool = False) -> Iterator[str | Problem]:
    """Paths of all pictures below `root` in sorted order, with a `Problem` in the place of whatever is passed over.

    Raises: InputMissing, DataError or NotPermitted when `root` itself is no readable folder.
    """
    return walk(list_root(root), follow_links, {identity(os.stat(root))})


def check_trainable(index: FolderIndex) -> None:
    """Refuse what no classifier can learn from; decodes one good picture a class.

    Raises: DataError for a single class, and for classes without any picture that decodes, with their names.
    """
    if len(index.classes) < 2:
        name, root = display_name(index.classes[0]), display_name(index.root)
        raise DataError(f"{root} has one class, {name}; training needs two or more", LAYOUTS)
    by_label: defaultdict[int, list[str]] = defaultdict(list)
    for sample in index.samples:
        by_label[sample.label].append(sample.path)
    empty = [name for label, name in enumerate(index.classes) if label not in by_label]
    if empty:
        raise DataError(f"no pictures in class {_names(empty)}", "add pictures there, or remove the folder")
    broken = [index.classes[label] for label, paths in sorted(by_label.items()) if not any(map(_decodes, paths))]
    if broken:
        raise DataError(f"every picture of class {_names(broken)} is broken", "replace them, or remove the folder")


def split(index: FolderIndex, share: float, seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Train and validation samples, stratified, decided by content and `seed` alone and not by names or order.

    Of the n different pictures of a class, round(share * n) validate, at least 1 and at most n - 1 when n > 1. Equal
    files stay together, even in different classes, where small classes choose first. A class has pictures on both
    sides unless other classes own all of them too. Adding one new picture moves at most one other of its class,
    as long as no picture is in two classes.
    """
    by_label: defaultdict[int, set[str]] = defaultdict(set)
    for sample in index.samples:
        by_label[sample.label].add(sample.digest)
    validates: dict[str, bool] = {}
    for _, digests in sorted(by_label.items(), key=lambda item: (len(item[1]), item[0])):
        free = sorted(digests - validates.keys(), key=lambda digest: _rank(digest, seed))
        wanted = min(max(round(share * len(digests)), 1), len(digests) - 1)
        wanted -= sum(validates.get(digest, False) for digest in digests)
        validates |= {digest: place < wanted for place, digest in enumerate(free)}
    train = tuple(sample for sample in index.samples if not validates[sample.digest])
    return train, tuple(sample for sample in index.samples if validates[sample.digest])


def relabel(
    index: FolderIndex, classes: Sequence[str], *, ignore_extra: bool = False
) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """The samples with labels that count into `classes`, matched by name; and the classes that have no picture here.

    Raises: DataError when the folder has pictures of other classes, unless `ignore_extra`; and when no picture is left.
    """
    known = {name: label for label, name in enumerate(classes)}
    extra = extra_classes(index, classes)
    if extra and not ignore_extra:
        raise DataError(
            f"{display_name(index.root)} has unknown classes: {_names(list(extra))}",
            f"known are {_names(classes)}; `mvcr eval --ignore-extra-classes` leaves the others out",
        )
    kept = tuple(
        replace(sample, label=known[name]) for sample in index.samples if (name := index.classes[sample.label]) in known
    )
    if not kept:
        raise DataError(f"{display_name(index.root)} has no picture of a known class", f"known are {_names(classes)}")
    pictured = {sample.label for sample in kept}
    return kept, tuple(name for label, name in enumerate(classes) if label not in pictured)


def extra_classes(index: FolderIndex, classes: Sequence[str]) -> dict[str, int]:
    """How many pictures the folder has of each class that is not in `classes`, in the order of the folder's classes."""
    pictures, known = Counter(sample.label for sample in index.samples), frozenset(classes)
    return {index.classes[label]: n for label, n in sorted(pictures.items()) if index.classes[label] not in known}


def leaks(a: Iterable[Sample], b: Iterable[Sample]) -> list[tuple[str, str]]:
    """For every picture of `b` that is also in `a`: the path of its first copy in `a`, and its path."""
    first = {sample.digest: sample.path for sample in reversed(list(a))}
    return [(first[sample.digest], sample.path) for sample in b if sample.digest in first]


def conflicts(samples: Iterable[Sample]) -> list[tuple[str, str]]:
    """Equal files under different labels: the path of the first, and of each that contradicts it."""
    first: dict[str, Sample] = {}
    pairs = [(first.setdefault(sample.digest, sample), sample) for sample in samples]
    return [(one.path, other.path) for one, other in pairs if one.label != other.label]


def _class_folders(entries: list[os.DirEntry[str]], follow_links: bool) -> tuple[list[os.DirEntry[str]], list[Problem]]:
    folders, skipped = [], []
    for entry in entries:
        if not is_folder(entry):
            if not is_hidden(entry.name):
                problem = suffix_problem(entry) or Problem(
                    path=entry.path, code="outside_class", detail="in no class folder"
                )
                skipped.append(problem)
        elif is_hidden(entry.name):
            skipped.append(Problem(path=entry.path, code="hidden", detail="hidden folder"))
        elif entry.is_symlink() and not follow_links:
            skipped.append(link_problem(entry))
        else:
            folders.append(entry)
    return folders, skipped


def _twins(folders: list[os.DirEntry[str]]) -> list[Problem]:
    """Names that people and some file systems take for one: they differ in case or Unicode form only."""
    groups: defaultdict[str, list[os.DirEntry[str]]] = defaultdict(list)
    for folder in folders:
        groups[unicodedata.normalize("NFC", class_name(folder.name).casefold())].append(folder)
    return [
        Problem(
            path=group[0].path, code="twin_classes", detail=f"look alike: {', '.join(ascii(f.name) for f in group)}"
        )
        for group in groups.values()
        if len(group) > 1
    ]


def _samples(found: list[tuple[str, int]], skipped: list[Problem]) -> list[Sample]:
    """Read all files, in order; unreadable ones and second paths to one file go to `skipped`."""
    samples = []
    first: dict[tuple[int, int], str] = {}
    for (path, label), content in zip(found, read_contents([path for path, _ in found]), strict=True):
        if isinstance(content, Problem):
            skipped.append(content)
        elif content.identity in first:
            same = f"the same file as {display_name(first[content.identity])}"
            skipped.append(Problem(path=path, code="duplicate_link", detail=same))
        else:
            first[content.identity] = path
            samples.append(Sample(path, label, content.digest))
    return samples


def _rank(digest: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=16).digest()


def _decodes(path: str) -> bool:
    try:
        load_picture(path, at_least=1)
    except BadImage:
        return False
    return True


def _names(names: Sequence[str], limit: int = 10) -> str:
    shown = ", ".join(map(display_name, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _summary(problems: list[Problem]) -> str:
    counts = Counter(problem.code for problem in problems)
    words = {"outside_class": "pictures in no class folder", "not_an_image": "other files", "hidden": "hidden folders",
             "unknown_format": f"in a format that is not read ({HEIC_ADVICE})"}  # fmt: skip
    return ", ".join(f"{n} {words.get(code, code)}" for code, n in sorted(counts.items())) or "nothing"
