"""How three readers of pictures judge the same unusual, broken and hostile files: mvcr, ultralytics and timm.

    python examples/peer_pictures.py --python PATH/TO/python/of/ultralytics/and/timm

Data      the files of tests/nasty.py and tests/nastier.py, made on the spot: 64 x 48 pixels in four colours, in every format
          and orientation, and files that are no pictures, or claim to be huge
Readers   mvcr: what every command uses; ultralytics: its verification of a classification set, then the reading of it;
          timm: an item of `ImageDataset`, beside one good picture
Judged    each file in a forked process of its own; "hang" after 10 seconds of work or of waiting, in which time that it waits
          for a busy processor does not count; "over 1 GiB" is its peak memory
Time      minutes; nothing is installed or downloaded
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS, MOST_MEMORY = 10, 1 << 30
READERS = ("mvcr", "ultralytics", "timm")
REFUSED = "refused"
ROOT = Path(__file__).resolve().parents[1]


def make_files(folder: Path) -> list[dict[str, Any]]:
    """All files below `folder`, each in a folder of its own; what must become of it, and the tolerance in grey levels."""
    sys.path.insert(0, str(ROOT / "tests"))
    import nastier
    import nasty

    def place(name: str) -> Path:
        where = folder / f"{len(list(folder.iterdir())):03d}" / "a"
        where.mkdir(parents=True)
        return where / name

    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        right = {path.name: (path.read_bytes(), tolerance) for path, tolerance in nasty.good_pictures(made).items()}
        grey = {path.name: path.read_bytes() for path in nasty.grey_pictures(made)}
        bad = {path.name: path.read_bytes() for path in nasty.bad_files(made)}
    for name, (data, tolerance) in (right | nastier.right_pictures()).items():
        path = place(name)
        path.write_bytes(data)
        cases.append({"path": str(path), "kind": "colour", "tolerance": tolerance})
    for name, data in (grey | nastier.right_grey_pictures()).items():
        path = place(name)
        path.write_bytes(data)
        cases.append({"path": str(path), "kind": "grey", "tolerance": 2})
    for name, data in (bad | {name: data for name, (data, _) in nastier.wrong_files().items()}).items():
        path = place(name)
        path.write_bytes(data)
        cases.append({"path": str(path), "kind": "refuse", "tolerance": 0})
    pipe = place("pipe.png")
    os.mkfifo(pipe)
    endless = place("endless.jpg")
    endless.symlink_to("/dev/zero")
    return cases + [{"path": str(path), "kind": "refuse", "tolerance": 0} for path in (pipe, endless)]


def reader_of(name: str) -> Callable[[str], Any]:
    """Takes a path; gives an RGB picture as an array, or raises `Refused` where the reader leaves the file out."""
    import numpy as np
    from PIL import Image

    if name == "mvcr":
        from mvcr_cli.data.images import load_rgb
        from mvcr_cli.errors import BadImage

        def read(path: str) -> Any:
            try:
                return np.asarray(load_rgb(path))
            except BadImage as bad:
                raise Refused from bad
    elif name == "ultralytics":
        import cv2
        from ultralytics.data.dataset import ClassificationDataset
        from ultralytics.data.utils import verify_image

        def read(path: str) -> Any:
            if not verify_image(((path, 0), ""))[1]:
                raise Refused
            return cv2.cvtColor(ClassificationDataset.imread(path), cv2.COLOR_BGR2RGB)
    else:
        from timm.data import ImageDataset

        def read(path: str) -> Any:
            root = Path(path).parents[1]
            (root / "b").mkdir(exist_ok=True)
            Image.new("RGB", (7, 7)).save(root / "b" / "good.png")  # a picture of another class
            images = ImageDataset(str(root))
            names = [images.filename(index, basename=True) for index in range(len(images))]
            if os.path.basename(path) not in names:
                raise Refused
            return np.asarray(images[names.index(os.path.basename(path))][0])

    return read


class Refused(Exception):
    pass


def judge(read: Callable[[str], Any], case: dict[str, Any]) -> str:
    """One word or two for what became of a file."""
    import numpy as np

    try:
        shown = read(case["path"])
    except Refused:
        return REFUSED
    except Exception:
        return "exception in training"
    if shown.shape == (7, 7, 3):
        return "another picture in its place"
    reference = np.zeros((48, 64, 3), int)
    reference[:24, :32, 0] = reference[:24, 32:, 1] = reference[24:, :32, 2] = reference[24:, 32:] = 255
    if case["kind"] == "grey":
        reference[:] = (reference @ [0.299, 0.587, 0.114]).round()[..., None]
    places = np.ix_([12, 36], [16, 48])
    right = shown.shape == (48, 64, 3) and np.abs(shown.astype(int) - reference)[places].max() <= case["tolerance"]
    return "used" if case["kind"] == "refuse" else "right" if right else "wrong pixels"


def judge_all(name: str) -> None:
    """Cases from stdin, verdicts to stdout, one JSON line each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    read = reader_of(name)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for line in sys.stdin:
        case = json.loads(line)
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
            os.write(writing, judge(read, case).encode())
            os._exit(0)
        os.close(writing)
        verdict = _ended(process, reading)
        os.close(reading)
        out.write(json.dumps(verdict) + "\n")
        out.flush()


def _ended(process: int, reading: int) -> str:
    before, waited, now = _resident(process), 0.0, time.monotonic()
    while True:
        done, status, used = os.wait4(process, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status):
                return f"crash (signal {os.WTERMSIG(status)})"
            grown = used.ru_maxrss * 1024 - before
            return "over 1 GiB" if grown > MOST_MEMORY else os.read(reading, 100).decode() or "crash"
        time.sleep(0.002)
        state, worked = _state(process)
        waited, now = waited + (time.monotonic() - now if state != "R" else 0.0), time.monotonic()
        if worked + waited > SECONDS:
            break
    os.kill(process, 9)
    os.waitpid(process, 0)
    return "hang"


def _state(process: int) -> tuple[str, float]:
    """One letter, R for running or ready to run, and CPU seconds."""
    state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return state, sum(map(int, fields[10:12])) / os.sysconf("SC_CLK_TCK")


def _resident(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", default=sys.executable, help="the Python that ultralytics and timm are installed for"
    )
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        judge_all(options.reader)
        return
    verdicts: dict[str, list[str]] = {}
    for reader in READERS:
        with tempfile.TemporaryDirectory() as folder:  # one each: ultralytics rewrites some files
            cases = make_files(Path(folder))
            python = sys.executable if reader == "mvcr" else options.python
            quiet = {"YOLO_AUTOINSTALL": "false", "YOLO_OFFLINE": "true", "PIP_NO_INDEX": "1", "PYTHONPATH": str(ROOT)}
            argv = [python, __file__, "--reader", reader]
            text = "".join(json.dumps(case) + "\n" for case in cases)
            done = subprocess.run(argv, input=text, capture_output=True, text=True, env=os.environ | quiet, check=True)
            verdicts[reader] = [json.loads(line) for line in done.stdout.splitlines()]
    show(cases, verdicts)


def show(cases: list[dict[str, Any]], verdicts: dict[str, list[str]]) -> None:
    """A Markdown table of counts, and the names behind everything that is neither right nor refused."""
    titles = {"colour": "legal, in colour", "grey": "legal, grey", "refuse": "broken or hostile"}
    print(f"| files | n | {' | '.join(READERS)} |\n|---|---|{'---|' * len(READERS)}")
    for kind, title in titles.items():
        rows = [number for number, case in enumerate(cases) if case["kind"] == kind]
        cells = []
        for reader in READERS:
            counts = Counter(verdicts[reader][row] for row in rows)
            cells.append(", ".join(f"{count} {word}" for word, count in counts.most_common()))
        print(f"| {title} | {len(rows)} | {' | '.join(cells)} |")
    for reader in READERS:
        odd = [f"{Path(case['path']).name}: {verdict}" for case, verdict in zip(cases, verdicts[reader], strict=True)
               if verdict not in ("right", REFUSED)]  # fmt: skip
        print(f"\n{reader}: {'; '.join(odd) or 'nothing else'}")


if __name__ == "__main__":
    main()
