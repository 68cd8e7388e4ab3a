"""A run on a disk that fills up, and on one that turns read-only. To be run where mounting is private: `unshare --mount`.

python full_disk.py DATA WORK
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_run import stop_at, trained

from mvcr_cli.engine.rundir import RunDirectory
from mvcr_cli.errors import MvcrError
from mvcr_cli.models import TRUNKS


def refused(data: Path, run: Path) -> MvcrError:
    try:
        trained(data, run, resume=True, save_every=1)
    except MvcrError as error:
        return error
    raise SystemExit("nothing was refused")


def states(run: Path) -> list[str]:
    assert not list(run.rglob(".*.tmp")), "temporary files were left"
    loaded = RunDirectory(run).load_state(lambda text: sys.exit(text))
    assert loaded is not None
    return sorted(path.name for path in (run / "state").iterdir())


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main(data: Path, work: Path) -> None:
    TRUNKS["10n"] = dataclasses.replace(TRUNKS["10n"], width=8)
    disk = work / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk))
    run, wanted = disk / "run", work / "wanted"
    trained(data, wanted)
    trained(data, run, stop=stop_at(2), save_every=1)
    before = states(run)

    free = 16 * 2**20 - sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
    (disk / "ballast").write_bytes(bytes(free - 300_000))
    full = refused(data, run)
    assert full.exit_code == 74 and "No space" in full.message and str(run) in full.message, full.message
    assert states(run) == before
    (disk / "ballast").unlink()

    mount("-o", "remount,ro", str(disk))
    locked = refused(data, run)
    assert locked.exit_code == 74 and "Read-only" in locked.message, locked.message
    assert states(run) == before
    mount("-o", "remount,rw", str(disk))

    trained(data, run, resume=True)
    for name in ("last.safetensors", "best.safetensors"):
        assert (run / "weights" / name).read_bytes() == (wanted / "weights" / name).read_bytes()
    print("full: 74, read-only: 74, states intact, then resumed bit for bit")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
