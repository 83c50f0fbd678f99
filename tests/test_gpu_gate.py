"""The GPU gate without a GPU: a dry run in a checkout that is only read, and stages that are killed, fail and hang."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gradproj

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_build
import gpu_gate
import gpu_measure
import gpu_stages
import harness
import machine


def call(device, second=False, only=None):
    options = SimpleNamespace(device=device, quick=True, library=None, second=second, only=only)
    return [gpu_gate.first_stage(device), *gpu_gate.stages(options, {})]


def names(device, second=False, only=None):
    return [stage.name for stage in call(device, second, only)]


def test_pins_come_first_then_projections():
    """They came ninth, after 885 s of limits within a deadline of 530; Triton's need no compiler."""
    first = call("cuda")
    assert names("cuda")[:7] == ["machine", "package", "measure-pin", "build", "load", "smoke", "measure-cuda"]
    assert sum(stage.limit for stage in first[:3]) <= 150 and sum(stage.limit for stage in first[:7]) <= 530
    assert names("cpu")[:5] == ["machine", "build", "load", "smoke", "measure-pin"]
    second = call("cuda", second=True)
    assert [s.name for s in second] == ["machine", "build", "load", "tests", "memcheck", "racecheck"]
    assert sum(stage.limit for stage in second if stage.name != "build") <= 530
    assert names("cuda", only=["tests"]) == [*names("cuda"), *names("cuda", second=True)[3:]]


def cpu_library():
    found = sorted(Path(gradproj.__file__).parent.glob("_cpu*.so"))
    if not found:
        pytest.skip("the CPU kernels are not built here")
    return found[0]


@pytest.fixture
def checkout(tmp_path):
    """A copy without .git that is only read, but for build/, where a library lies that an earlier call has built."""
    copy = tmp_path / "checkout"
    leave = ("__pycache__", ".*", "build", "demo", "dist", "results", "*.so", "*.egg-info", "*_experiments")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*leave))
    found = copy / "build" / "gpu_gate" / gpu_build.key("cpu", "") / "lib" / "gradproj" / "_cpu.so"
    found.parent.mkdir(parents=True)
    shutil.copy(cpu_library(), found)
    paths = [copy, *(p for p in copy.rglob("*") if copy / "build" not in (p, *p.parents) and not p.is_symlink())]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    yield copy
    for path in paths:
        path.chmod(path.stat().st_mode | 0o200)


def seen(checkout):
    """What a write would change, for root too, whom modes do not stop."""
    outside = [p for p in checkout.rglob("*") if checkout / "build" not in (p, *p.parents)]
    return {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in [checkout, *outside]}


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
def test_dry_run_in_a_checkout_that_is_only_read(checkout, tmp_path, second):
    """Without git, a network, or anything on PATH, with a PYTHONPATH of somebody else's."""
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    changed = {"PATH": str(empty), "PYTHONPATH": "/somebody/else", "OUT": str(out), "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "GRADPROJ_COMMIT"} | changed
    before = seen(checkout)
    command = [
        sys.executable,
        checkout / "benchmarks" / "gpu_gate.py",
        "--device",
        "cpu",
        "--quick",
        "--deadline",
        "300",
        *(["--second"] if second else []),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert seen(checkout) == before
    (path,) = out.glob("*.json")
    result = json.loads(path.read_text())
    wanted = names("cpu", second)
    assert {stage["name"]: stage["result"] for stage in result["stages"]} == dict.fromkeys(wanted, "passed")
    outputs = {stage["name"]: stage["output"] for stage in result["stages"]}
    assert "found: " in outputs["build"]
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["commit"] == "unknown"
    if second:
        assert re.search(r"[1-9]\d* passed", outputs["tests"]) and "PASSED" in path.with_suffix(".log").read_text()
        assert "54 projections went through" in outputs["sanitize"] and "13 pins went through" in outputs["sanitize"]
        return
    assert "16 small projections are right" in outputs["smoke"] and "13 small pins are right" in outputs["smoke"]
    cases = [case.name for case in (*gpu_measure.pin_cases(True), *gpu_measure.cases(True))]
    compiled = [f"{n}, torch.compile" for n in cases if n.startswith("124M")]
    compiled += [f"{n}, torch.compile" for n in cases if n.startswith("pin LLaMA-7B") and n.endswith("r = 64")]
    assert [row["case"] for row in result["rows"]] == [*cases, *compiled]
    assert all(row["seconds"] and not row["wrong"] and not row["error"] for row in result["rows"])
    assert "| K = 32 fp32, Gram known | cpu |" in done.stdout and "measure-compiled passed" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, BENCHMARKS / "gpu_gate.py", "--results", tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stdout


DRIVER = """
import json, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's & has it
sys.path.insert(0, sys.argv[1])
import gpu_gate, gpu_stages
gpu_stages.GRACE, gpu_gate.WORK = 1.0, Path(sys.argv[2])
first, *others = [gpu_stages.Stage(*stage) for stage in json.loads(sys.argv[3])]
gpu_gate.first_stage, gpu_gate.stages = lambda device: first, lambda options, machine: others
sys.exit(gpu_gate.main(sys.argv[4:]))
"""


def told(**message):
    return f"echo '{gpu_stages.MARK}{json.dumps(message)}'; "


def row(name):
    return told(row=gpu_measure.judged(harness.Row(name, "cuda", 2, [])))


HEADER = {"machine": "a machine", "torch": "2", "date": "today", "commit": "abc"}
FIRST = ["machine", 20, ["sh", "-c", told(machine=HEADER)]]
FOREVER = "echo process $$; exec sleep 60"


def sh(name, text, limit=20, needs=""):
    return [name, limit, ["sh", "-c", text], needs]


class Run:
    """The gate with stand-ins, as a process."""

    def __init__(self, folder, stages, *arguments, stdout=subprocess.PIPE):
        self.folder, self.start = folder, time.monotonic()
        command = [sys.executable, "-B", "-c", DRIVER, BENCHMARKS, folder / "work", json.dumps(stages)]
        command += ["--results", folder / "results", *arguments]
        self.process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.STDOUT, text=True)

    def wait_for(self, text):
        """The number after ``text``, in the first line that begins with it."""
        for line in self.process.stdout:
            if line.startswith(text):
                return int(line.removeprefix(text))
        raise AssertionError(f"the gate ended without {text}")

    def end(self):
        """(exit code, stage -> result, cases of the rows); all there is in self.record."""
        self.output = self.process.communicate(timeout=30)[0]
        (path,) = self.folder.glob("*/*.json")
        self.record = json.loads(path.read_text())
        results = {stage["name"]: stage["result"] for stage in self.record["stages"]}
        return self.process.returncode, results, [row["case"] for row in self.record["rows"]]


def assert_gone(*processes):
    """Ended; who collects the rest of an orphan is the machine's business."""

    def there(process):
        try:
            return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
        except FileNotFoundError:
            return False

    until = time.monotonic() + 5
    while any(map(there, processes)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(map(there, processes))


@pytest.mark.parametrize("place", range(len(names("cuda"))), ids=names("cuda"))
def test_killed_in_the_middle_of_a_stage(tmp_path, place):
    """By SIGKILL, which nobody catches, as when a machine's time is up: the rows are there, the stage's process is
    not."""
    stages = [sh(name, told(machine=HEADER) + row(name)) for name in names("cuda")]
    stages[place][2][2] += FOREVER
    run = Run(tmp_path, stages)
    child = run.wait_for("process ")
    run.process.kill()
    code, results, rows = run.end()
    assert code == -signal.SIGKILL
    assert list(results.values()) == ["passed"] * place + ["running"]
    assert rows == names("cuda")[: place + 1] and run.record["machine"] == HEADER
    assert_gone(child)


def test_ended_politely(tmp_path):
    run = Run(tmp_path, [FIRST, sh("one", row("one") + FOREVER), sh("two", "true")])
    child = run.wait_for("process ")
    run.process.terminate()
    code, results, rows = run.end()
    assert code == 1 and results == {"machine": "passed", "one": "stopped: SystemExit(1)"} and rows == ["one"]
    assert "| one | cuda |" in run.output and run.record["stages"][1]["output"].endswith(f"process {child}\n")
    assert_gone(child)


PASSED, SKIPPED, MARK = "passed", "skipped: build failed", gpu_stages.MARK
SEPARATE = [FIRST, sh("build", "true"), sh("load", "false", needs="build"), sh("tests", row("one"), needs="load")]
# fmt: off
RUNS = {  # stages, arguments; the exit code, how each stage ended, what the second one printed. All have the row "one".
    "a stage that fails costs only what needs it": (
        [FIRST, sh("build", "echo reason; false"), sh("load", "true", needs="build"), sh("smoke", "true", needs="load"),
         ["memcheck", 20, ["no-such-tool"]], sh("tests", row("one"))], [],
        1, [PASSED, "failed: exit code 1", SKIPPED, SKIPPED, "failed: [Errno 2]", PASSED], "reason\n"),
    "a stage has its own limit": (
        [FIRST, sh("slow", "exec sleep 60", 0.2), sh("next", row("one"))], [],
        1, [PASSED, "failed: stopped after 0 s", PASSED], ""),
    "only some stages, and what they need to be built": (
        SEPARATE, ["--only", "tests"], 0, [PASSED, PASSED, PASSED], ""),
    "lines that only look like results": (
        [FIRST, sh("talks", f"echo '{MARK}5'; echo '{MARK}{{broken'; echo 'in a line {MARK}{{\"other\": 1}}'; "
                            "printf 'no end'"),
         sh("next", row("one"))], [], 0, [PASSED, PASSED, PASSED], f"{MARK}5\n{MARK}{{broken\nin a line \nno end\n"),
}
# fmt: on


@pytest.mark.parametrize("what", RUNS)
def test_how_stages_end(tmp_path, what):
    stages, arguments, expected_code, expected, output = RUNS[what]
    run = Run(tmp_path, stages, *arguments)
    code, results, rows = run.end()
    assert code == expected_code and rows == ["one"] and run.record["stages"][1]["output"] == output
    for found, wanted in zip(results.values(), expected, strict=True):
        assert found.startswith(wanted)


def test_a_stage_that_does_not_exist(tmp_path):
    run = Run(tmp_path, SEPARATE, "--only", "test")
    assert "--only: no stage test; there are build, load, tests" in run.process.communicate()[0]
    assert run.process.returncode == 2


def test_the_deadline_ends_a_stage_with_its_children(tmp_path):
    # A signal between two commands is noticed at the next; just before `wait` it would not be.
    goes_on = "while :; do sleep 0.1; done"
    hangs = f"trap 'echo last words' INT; sleep 60 & echo child $!; echo process $$; {goes_on}"
    run = Run(tmp_path, [FIRST, sh("hangs", row("one") + hangs, 60), sh("next", "true")], "--deadline", "5")
    processes = run.wait_for("child "), run.wait_for("process ")
    code, results, rows = run.end()
    assert time.monotonic() - run.start < 30 and code == 1 and rows == ["one"]
    assert results["hangs"].startswith("failed: stopped after") and results["next"] == "skipped: no time left"
    assert "last words" in run.record["stages"][1]["output"]
    assert_gone(*processes)


def test_a_child_that_stays_behind_is_not_waited_for(tmp_path):
    run = Run(tmp_path, [FIRST, sh("leaves", "sleep 60 & echo child $!", 60), sh("next", row("one"))])
    child = run.wait_for("child ")
    code, results, rows = run.end()
    assert code == 0 and set(results.values()) == {"passed"} and rows == ["one"] and time.monotonic() - run.start < 30
    assert_gone(child)


def test_nobody_reads_the_output(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    run = Run(tmp_path, [FIRST, sh("one", row("one"))], stdout=writer)
    os.close(writer)
    code, _, rows = run.end()
    assert code == 0 and rows == ["one"]


def test_a_folder_that_cannot_be_written(tmp_path):
    """What was measured goes where it can."""
    (tmp_path / "results").write_text("a file")
    code, _, rows = Run(tmp_path, [FIRST, sh("one", row("one"))]).end()
    assert code == 0 and rows == ["one"]


def test_the_environment_adds_to_what_is_there(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"/one{os.pathsep}/two")
    monkeypatch.setenv("PATH", "/bin")
    environment = gpu_gate.make_environment("abc")
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(gpu_gate.SITE), "/one", "/two"]
    assert environment["PATH"].startswith(f"/bin{os.pathsep}") and environment["GRADPROJ_COMMIT"] == "abc"
    monkeypatch.delenv("PYTHONPATH")
    assert gpu_gate.make_environment("")["PYTHONPATH"] == str(gpu_gate.SITE)


def test_tests_in_parallel_where_that_is_installed(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    command = gpu_gate.tests("cuda", {"pytest-xdist": "3.8"})
    assert command[command.index("-n") + 1] == "14" and command[-3:] == ["-m", "gpu", "tests"]
    assert "-n" not in gpu_gate.tests("cuda", {"pytest-xdist": "missing"})


def test_the_machine_is_described_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("GRADPROJ_COMMIT", "abc")
    assert machine.machine("cuda")["commit"] == "abc"
    monkeypatch.delenv("GRADPROJ_COMMIT")
    assert machine.machine("cpu")["commit"] == "unknown"
