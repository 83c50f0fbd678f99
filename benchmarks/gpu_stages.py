"""Runs commands one after the other until a deadline, and records what they say: the machinery of the GPU gate.

Only the standard library: torch and gradproj are the stages' business, and may not be there.
"""

import contextlib
import ctypes
import datetime
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu_gate"
SITE = WORK / "site"
MARK = "@gate "
TAIL = 6000  # characters of a stage's output in the JSON
GRACE = 3.0  # seconds between an interrupt, on which pytest still says what failed, and the end


def tell(**message) -> None:
    """From a stage to the gate: a row that is done, or facts about the machine."""
    print(MARK + json.dumps(message), flush=True)


def say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads on: no reason to lose what is still to be measured
        print(text, flush=True)


class Stage(NamedTuple):
    """``needs``: a stage without which this one is nothing, unless that was left out on purpose."""

    name: str
    limit: float
    command: list[str]
    needs: str = ""
    environment: tuple[tuple[str, str], ...] = ()


class Record:
    """The JSON and the log. The JSON is replaced as a whole, so that it is complete whenever one looks."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now()
        self.path = folder / f"gpu_gate_{facts['device']}_{now:%Y-%m-%d_%H%M%S}.json"
        self.content: dict[str, Any] = {**facts, "machine": {}, "stages": [], "rows": []}
        self.log = os.open(self.path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.save()

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        try:
            new.write_text(json.dumps(self.content, indent=1))
            new.replace(self.path)
        except OSError as error:  # a full disk: what was saved before stays, and the terminal has the rest
            say(f"not saved: {error}")


def open_record(folders: list[Path], facts: dict[str, Any]) -> Record:
    """In the first folder that can be written."""
    for folder in folders:
        with contextlib.suppress(OSError):
            return Record(folder, facts)
    raise SystemExit(f"gpu_gate: none of {', '.join(map(str, folders))} can be written")


class Listener:
    """Takes a stage's output: to the terminal, the log and the record. ``show`` puts what a stage tells into words."""

    def __init__(self, record: Record, entry: dict[str, Any], show: Callable[[dict[str, Any]], str]):
        self.record, self.entry, self.show, self.rest = record, entry, show, b""

    def take(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self.record.log, data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.line(line.decode(errors="replace"))

    def line(self, text: str) -> None:
        text, told = understand(text)
        self.entry["output"] = (self.entry["output"] + text + "\n")[-TAIL:]
        if told:
            self.record.content["machine"].update(told.get("machine", {}))
            self.record.content["rows"] += [told["row"]] if "row" in told else []
            self.record.save()  # first: what the terminal has shown is never lost
            text += self.show(told)
        say(text)

    def end(self) -> None:
        if self.rest:
            self.line(self.rest.decode(errors="replace"))
            self.rest = b""


def understand(line: str) -> tuple[str, dict[str, Any]]:
    """The part of a line that is for people, and what a stage tells the gate with it."""
    before, _, message = line.partition(MARK)
    with contextlib.suppress(ValueError):
        told = json.loads(message)
        if isinstance(told, dict):
            return before, told
    return line, {}


class Gate:
    """Runs stages one after the other until the deadline, ``left`` seconds from now."""

    def __init__(self, record: Record, left: float, environment: dict[str, str], show: Callable[[dict[str, Any]], str]):
        self.record, self.environment, self.show = record, environment, show
        self.deadline = time.monotonic() + left
        self.results: dict[str, str] = {}

    def run(self, stage: Stage) -> None:
        entry = {"name": stage.name, "result": "running", "seconds": 0.0, "command": stage.command, "output": ""}
        self.record.content["stages"].append(entry)
        say(f"== {stage.name}: {' '.join(stage.command)}")
        self.record.save()
        start = time.monotonic()
        try:
            entry["result"] = self.skipped(stage) or self.execute(stage, entry)
        except BaseException as error:  # Ctrl-C and SIGTERM too
            entry["result"] = f"stopped: {error!r}"
            raise
        finally:
            entry["seconds"] = round(time.monotonic() - start, 1)
            self.results[stage.name] = entry["result"]
            self.record.save()
        say(f"== {stage.name}: {entry['result']}, {entry['seconds']:.0f} s, {self.left():.0f} s left")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def skipped(self, stage: Stage) -> str:
        needed = self.results.get(stage.needs, "passed")
        if needed.startswith("skipped"):
            return needed
        if needed != "passed":
            return f"skipped: {stage.needs} failed"
        return "skipped: no time left" if self.left() < 2 * GRACE else ""

    def execute(self, stage: Stage, entry: dict[str, Any]) -> str:
        limit = min(stage.limit, self.left() - GRACE)
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env={**self.environment, **dict(stage.environment)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                preexec_fn=lead_a_group,  # noqa: PLW1509  there are no threads here
            )
        except OSError as error:
            return f"failed: {error}"
        listener = Listener(self.record, entry, self.show)
        try:
            if follow(process, limit, listener):
                return "passed" if process.returncode == 0 else f"failed: exit code {process.returncode}"
            os.killpg(process.pid, signal.SIGINT)
            follow(process, GRACE, listener)
            return f"failed: stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # the group, whoever of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            listener.end()


LIBC = ctypes.CDLL(None)


def lead_a_group() -> None:
    """In the new process. A group of its own can be killed as a whole; a session of its own would escape whoever cleans
    up after the gate. And it dies with the gate: a GPU must not stay busy for nobody."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what was started in the background ignores it
    os.setpgid(0, 0)
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def follow(process: subprocess.Popen, seconds: float, listener: Listener) -> bool:
    """Hands on what a process prints; whether it ended in time. A child that still holds its pipe is not waited for."""
    assert process.stdout is not None
    pipe, until, more = process.stdout.fileno(), time.monotonic() + seconds, True
    while True:
        ended = process.poll() is not None
        left = until - time.monotonic()
        if left <= 0:
            return ended
        if more and select.select([pipe], [], [], 0 if ended else min(left, 0.1))[0]:
            data = os.read(pipe, 1 << 16)
            listener.take(data)
            more = bool(data)
        elif ended:
            return True
        elif not more:
            time.sleep(0.01)
