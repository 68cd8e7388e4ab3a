"""Kill a training at random moments, start it again, and compare its end with that of an undisturbed one.

    python chaos.py --kills 20 --work DIR -- train DATA --run {run} --resume ...

Prints one JSON record. Children are forked from a process that has loaded everything, so that a start costs nothing and
most kills hit work; with `--exec` each is a program of its own, as a shell starts it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

TIMED = ("seconds", "cpu_seconds", "left_seconds", "images_per_second")
MOST_SECONDS = 120  # to do anything at all, on a busy machine


@dataclass
class Experiment:
    argv: list[str]
    work: Path
    execs: bool
    chance: random.Random
    signals: list[signal.Signals]
    faults: list[str] = field(default_factory=list)
    exits: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    runs: int = 0
    slowest: float = 0.0  # seconds from the polite signal to the end

    def start(self, run: Path) -> int:
        argv = [part.replace("{run}", str(run)) for part in self.argv]
        log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if self.execs:
            process = subprocess.Popen(
                [sys.executable, "-m", "mvcr_cli", *argv], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                start_new_session=True,
            )  # fmt: skip
            process.returncode = 0  # this program waits for it by itself
            os.close(log)
            return process.pid
        pid = os.fork()
        if pid == 0:
            _become(argv, log)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # the child does it, too: whoever is first
        os.close(log)
        return pid

    def wait(self, pid: int, seconds: float) -> int | None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def undisturbed(self, run: Path) -> float:
        began = time.monotonic()
        code = self.wait(self.start(run), 60 * MOST_SECONDS)
        if code != 0:
            raise SystemExit(f"the undisturbed run ended with {code}: {Path(f'{run}.log').read_text()[-2000:]}")
        return time.monotonic() - began

    def disturbed(self, run: Path, usual: float, kills: int) -> None:
        """One run, killed until it is finished or `kills` are reached."""
        self.runs += 1
        newest = 0
        while True:
            pid = self.start(run)
            enough = self.kills >= kills
            code = self.wait(pid, 60 * MOST_SECONDS if enough else self.chance.random() * usual * 0.7)
            if code is None:
                code = self.kill(pid)
            elif code != 0:
                self.faults.append(f"{run.name}: a start ended with {code}")
                return
            newest = self.inspect(run, newest)
            if code == 0 and (run / "summary.json").exists():
                return

    def kill(self, pid: int) -> int:
        number = self.chance.choice(self.signals)
        began = time.monotonic()
        os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)
        code = self.wait(pid, MOST_SECONDS)
        self.kills += 1
        if code is None:
            self.faults.append(f"still there {MOST_SECONDS} s after {number.name}")
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -9
        if number != signal.SIGKILL:
            self.slowest = max(self.slowest, time.monotonic() - began)
        self.exits[f"{number.name} {code}"] += 1
        if code not in (-number, 128 + number, 0):
            self.faults.append(f"{number.name} ended it with {code}")
        if not self.ends(pid):
            self.faults.append("a process of the run is still there")
        return code

    def ends(self, group: int) -> bool:
        """Whether nothing is left of a process group; `ldconfig`, which the import of torch runs, outlives a kill a little."""
        until = time.monotonic() + MOST_SECONDS / 10
        while time.monotonic() < until:
            try:
                os.killpg(group, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.01)
        return False

    def inspect(self, run: Path, newest: int) -> int:
        """What lies on the disk after a kill can be read; the number of the newest state, which never goes back."""
        from mvcr_cli.checkpoint import Checkpoint

        steps = [0]
        for state in run.glob("state/step-*.safetensors"):
            if hashlib.sha256(state.read_bytes()).hexdigest()[:16] != state.stem.rsplit("-", 1)[1]:
                self.faults.append(f"{state} is damaged")
            steps.append(int(state.name.split("-")[1]))
        for weights in run.glob("weights/*.safetensors"):
            try:
                Checkpoint.load(weights)
            except Exception as error:
                self.faults.append(f"{weights}: {error}")
        if (run / "metrics.jsonl").exists():
            for line in (run / "metrics.jsonl").read_text().splitlines():
                json.loads(line)
        if max(steps) < newest:
            self.faults.append(f"{run.name}: the newest state went from step {newest} to {max(steps)}")
        if "Traceback" in (log := Path(f"{run}.log").read_text(errors="replace")):
            self.faults.append(f"{run.name}: {log[-1500:]}")
        return max(steps)

    def compare(self, run: Path, wanted: Path) -> None:
        for name in ("weights/last.safetensors", "weights/best.safetensors"):
            if (run / name).read_bytes() != (wanted / name).read_bytes():
                self.faults.append(f"{run.name}: {name} differs")
        if _metrics(run) != _metrics(wanted):
            self.faults.append(f"{run.name}: metrics.jsonl differs")
        if not (run / "report.html").exists():
            self.faults.append(f"{run.name}: no report")
        if left := [path.name for path in run.rglob(".*") if path.name != ".lock"]:
            self.faults.append(f"{run.name}: left behind: {left}")


def _become(argv: list[str], log: int) -> NoReturn:
    """This forked child is `mvcr` now."""
    code: Any = 99
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor, source in ((0, nowhere), (1, nowhere), (2, log)):
            os.dup2(source, descriptor)
        from mvcr_cli.__main__ import main

        main(argv)
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _metrics(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in one.items() if key not in TIMED} for one in records]


def _load_everything() -> None:
    """What a training imports, and the smallest of all networks: the laws are the same."""
    import dataclasses

    import torch._inductor.config  # noqa: F401, what the optimiser loads when it is made

    import mvcr_cli.engine.train
    import mvcr_cli.report.html
    import mvcr_cli.report.plots  # noqa: F401
    from mvcr_cli.cli import tables  # noqa: F401
    from mvcr_cli.models import TRUNKS

    TRUNKS["10n"] = dataclasses.replace(TRUNKS["10n"], width=8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default="KILL,KILL,KILL,TERM,INT")
    parser.add_argument("--exec", action="store_true")
    parser.add_argument("argv", nargs="+")
    given = parser.parse_args()
    signals = [signal.Signals[f"SIG{name}"] for name in given.signals.split(",")]
    experiment = Experiment(given.argv, given.work, given.exec, random.Random(given.seed), signals)
    given.work.mkdir(parents=True, exist_ok=True)
    _load_everything()
    if given.exec:
        os.environ["OMP_NUM_THREADS"] = "1"
    wanted = given.work / "undisturbed"
    usual = min(experiment.undisturbed(wanted), experiment.undisturbed(given.work / "again"))
    experiment.compare(given.work / "again", wanted)
    while experiment.kills < given.kills and len(experiment.faults) < 10:
        run = given.work / f"run{experiment.runs}"
        experiment.disturbed(run, usual, given.kills)
        if not experiment.faults:
            experiment.compare(run, wanted)
            shutil.rmtree(run)
    print(json.dumps({
        "signals": experiment.kills, "runs": experiment.runs, "faults": experiment.faults, "exits": experiment.exits,
        "sha256": hashlib.sha256((wanted / "weights/last.safetensors").read_bytes()).hexdigest(),
        "slowest_stop_seconds": round(experiment.slowest, 2), "undisturbed_seconds": round(usual, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
