"""The GPU gate's measurements before there is a GPU: predictions beside rows, and stand-ins for torch.cuda."""

import contextlib
import itertools
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gradproj

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_gate
import gpu_measure
import gpu_predicted
import gpu_stages
import harness
import pin_model
import pinned
import timing


def told_rows(capsys):
    return [gpu_stages.understand(line)[1]["row"] for line in capsys.readouterr().out.splitlines()]


def test_every_row_of_the_cuda_kernels_has_a_prediction():
    rows = [case.name for case, _ in gpu_measure.jobs("cuda", "cuda", quick=False)]
    assert len(rows) == len(set(rows)) and set(rows) == set(gpu_predicted.OF_PROJECTIONS)
    assert [case.name for case, _ in gpu_measure.jobs("triton", "cuda", quick=False)] == rows


H100, H200 = gpu_predicted.GPUS["NVIDIA H100 80GB HBM3"], gpu_predicted.GPUS["NVIDIA H200"]


@pytest.mark.parametrize(
    ("of", "case", "gpu", "low", "high"),
    [
        ("cuda", "124M fp32", H100, 0.93, 0.98),
        ("cuda", "124M fp32", H200, 0.90, 0.97),  # the same launches beside faster memory
        ("cuda", "K = 32 fp32", H200, 0.178, 0.204),
        ("cuda", "300 x 64", H200, 75e-6, 230e-6),
    ],
)
def test_predictions_are_of_the_device(of, case, gpu, low, high):
    assert gpu_predicted.PREDICTED[of][case].on(gpu) == pytest.approx((low, high), rel=0.02)


def test_what_a_pin_moves_by_hand():
    """LLaMA-7B's square matrix in bfloat16 with r = 64, on an H200: 132 x 2 programs of 128 rows x 8 KiB, of which half
    of L2 keeps a ninth; U for each of 32 programs, 6 bytes an element."""
    pytest.importorskip("triton")
    tile = pin_model.tile_of(torch.bfloat16, 64)
    found = pin_model.traffic(4096, 4096, 64, torch.bfloat16, tile, H200)
    n, kept = 4096 * 4096 * 2, 30e6 / (132 * 2 * 128 * 4096 * 2)
    assert found.minimal == 2 * n and found.memory == pytest.approx((3 - kept) * n + 2 * 4096 * 64 * 4)
    assert found.l2 == 3 * n + 4096 * 64 * 4 + 32 * 4096 * 64 * 6 and found.operations == 2 * 3 * 4096 * 4096 * 64


@pytest.mark.parametrize("gpu", [H100, H200], ids=["H100", "H200"])
def test_predictions_of_pins(gpu):
    """Between nothing and what two readings of W leave of 2 N, and less where there is more to read."""
    pytest.importorskip("triton")
    cases = {case.name: case for case in gpu_measure.pin_cases(quick=False)}
    assert len(cases) == 20
    shares = {name: pin_model.share(c.shapes, c.rank, c.dtype, gpu) for name, c in cases.items()}
    assert all(0.0 < low < high < 0.75 for low, high in shares.values())
    for name, kind in itertools.product(("LLaMA-7B", "Qwen3-30B-A3B"), ("bf16", "fp32")):
        by_rank = [shares[f"pin {name} {kind}, r = {r}"] for r in (64, 128, 205, 256, 512)]
        assert by_rank == sorted(by_rank, reverse=True)


def test_an_unknown_device_gets_no_prediction():
    """One of an H100 stood beside whatever was measured."""
    row = harness.Row("124M fp32", "cuda", 2, [], share_of_limit=0.95)
    for name in ("NVIDIA H100 PCIe", "NVIDIA H200 MIG 1g.18gb", "NVIDIA B200", "no CUDA device"):
        assert gpu_measure.judged(row, gpu=gpu_predicted.GPUS.get(name))["predicted"] is None


@pytest.mark.parametrize(
    ("share", "word"), [(0.95, "inside"), (0.5, "OUTSIDE"), (1.0, "OUTSIDE"), (None, "not measured")]
)
def test_predicted_beside_measured(share, word):
    told = gpu_measure.judged(harness.Row("124M fp32", "cuda", 2, [], share_of_limit=share), gpu=H100)
    assert told["inside"] is (word == "inside")
    measured = "" if share is None else f"{share:.0%}"
    assert f"| 124M fp32 | cuda | 93% to 98% | {measured} | {word} |" in gpu_gate.table([told])
    assert gpu_gate.show({"row": told}).endswith(f"{measured}; predicted 93% to 98%: {word}")
    assert gpu_measure.judged(harness.Row("124M fp32", "triton", 2, []), gpu=H100)["predicted"] is None


def test_rows_without_a_time_are_shown():
    wrong = gpu_measure.judged(harness.Row("124M fp32", "triton", 2, ["fused"]))
    broken = gpu_measure.judged(harness.Row("1B fp32", "cuda", 0, []), "OutOfMemoryError: too much")
    assert "wrong: fused" in gpu_gate.table([wrong]) and "wrong: fused" in gpu_gate.show({"row": wrong})
    assert "too much" in gpu_gate.table([broken]) and "too much" in gpu_gate.show({"row": broken})


def test_a_row_that_fails_does_not_cost_the_next(capsys):
    def broken():
        raise RuntimeError("reason\nand more")

    case = gpu_measure.cases(True)[0]
    todo = [(case, broken), (case, lambda: harness.Row("fine", "cpu", 2, []))]
    assert gpu_measure.tell_rows(todo, "cpu") == 1
    first, second = told_rows(capsys)
    assert first["error"] == "RuntimeError: reason" and second["case"] == "fine" and not second["error"]


class PretendedGpu:
    """What the measurements ask of torch.cuda, on the CPU: what is under test is that they ask for it rightly."""

    def __init__(self, monkeypatch):
        self.happened, self.graph_works = [], True
        real_rows, real_randn, cpu = harness.make_rows, torch.randn, gradproj.backends()["cpu"]

        def fused(*arguments):
            self.captured = arguments
            gradproj.project_(arguments[0], *arguments[1])

        monkeypatch.setattr(harness, "make_rows", lambda case, device: real_rows(case, "cpu"))
        monkeypatch.setattr(harness, "fused", fused)
        real_layers = pinned.make_layers
        monkeypatch.setattr(pinned, "make_layers", lambda case, device: real_layers(case, "cpu"))
        monkeypatch.setattr(harness, "GPU_COPY_BYTES", 1 << 16)
        monkeypatch.setattr(gpu_measure, "device_name", lambda device: "NVIDIA H200")
        randn = lambda *size, device, generator=None: real_randn(*size, generator=generator)
        monkeypatch.setattr(torch, "randn", randn)
        monkeypatch.setattr(gradproj, "use_backend", lambda name, real=gradproj.use_backend: real("cpu"))
        monkeypatch.setattr(gradproj, "backends", lambda: {"cuda": cpu, "triton": cpu})
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda name=name: self.happened.append(name))
        for name in ("memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda: 4096)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(torch.cuda, "stream", self.context)
        monkeypatch.setattr(torch.cuda, "current_stream", self.stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))
        monkeypatch.setattr(torch.cuda, "graph", self.context)

    def event(self, enable_timing):
        assert enable_timing
        made = SimpleNamespace(synchronize=lambda: self.happened.append("synchronize"))

        def record():
            made.time = time.perf_counter()
            self.happened.append("event")

        made.record, made.elapsed_time = record, lambda end: (end.time - made.time) * 1e3
        return made

    def stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.happened.append("wait_stream"))

    def context(self, _):
        return contextlib.nullcontext()

    def replay(self):
        if self.graph_works:
            harness.fused(*self.captured)


@pytest.fixture
def pretended_gpu(monkeypatch):
    if not gradproj.backends()["cpu"].available:
        pytest.skip("the CPU kernels are not built here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # lists this small gain nothing by a second
    yield PretendedGpu(monkeypatch)
    torch.set_num_threads(threads)


def test_rows_of_a_pretended_gpu(pretended_gpu, capsys):
    assert gpu_measure.tell_rows(gpu_measure.jobs("cuda", "cuda", quick=True), "cuda") == 0
    rows = told_rows(capsys)
    assert {row["case"] for row in rows} == set(gpu_predicted.OF_PROJECTIONS)
    for row in rows:
        captured = row["case"].endswith("captured")
        assert row["seconds"] > 0 and row["predicted"]
        assert (row["host_seconds"] is None) == (row["share_of_limit"] is None) == captured


def test_pin_rows_of_a_pretended_gpu(pretended_gpu, capsys):
    assert gpu_measure.tell_rows(gpu_measure.pin_jobs("triton", "cuda", quick=True), "triton") == 0
    for row, case in zip(told_rows(capsys), gpu_measure.pin_cases(quick=True), strict=True):
        assert row["case"] == case.name and row["predicted"] and row["measured"] > 0 and row["host_seconds"] > 0
        assert row["times_naive"] > 0 and row["times_best_torch"] > 0


def test_a_wrong_pin_has_no_time(monkeypatch):
    monkeypatch.setattr(pinned, "fused", lambda layers: layers[-1][0].add_(1.0))
    row = pinned.measure(gpu_measure.pin_cases(quick=True)[1])
    assert row.wrong == ["fused"] and row.seconds is None


def test_smoke_names_a_pin_that_is_wrong(monkeypatch, capsys):
    """Tails, bias, strides and r = 200, each against float64."""
    small = gpu_measure.small_pins("cpu")
    for word in ("tails", "bias", "strided", "transposed", "r = 100", "r = 200", "float32 basis"):
        assert any(word in p.name for p in small)
    biased = next(k for k, p in enumerate(small) if p.bias is not None)

    def wrong(weights, bases, targets, biases, real=gradproj.pin_):
        real(weights, bases, targets, biases)
        weights[0][-1, -1] += 0.1
        biases[biased][-1] += 0.1

    monkeypatch.setattr(gradproj, "pin_", wrong)
    assert gpu_measure.wrong_pins("cpu") == [small[0].name, small[biased].name]
    assert gpu_measure.smoke("cpu", "cpu") == 1 and f"wrong: ['{small[0].name}'" in capsys.readouterr().out


def test_a_graph_that_does_nothing_is_wrong(pretended_gpu):
    case = harness.Case("300 x 64", [(64,)] * 3, rounds=1)
    assert harness.measure_captured(case, "cuda").seconds and pretended_gpu.happened.count("wait_stream") == 2
    pretended_gpu.graph_works = False
    row = harness.measure_captured(case, "cuda")
    assert row.wrong == ["fused"] and row.seconds is None


def test_time_is_between_events_around_calls_in_a_queue(pretended_gpu):
    happened = pretended_gpu.happened
    seconds = harness.in_turns({"run": lambda: happened.append("run")}, 2, "cuda")
    assert len(seconds["run"]) == 2 and min(seconds["run"]) > 0
    turn = ["synchronize", "run", "event", *["run"] * 20, "event", "synchronize"]
    assert happened == ["run", "synchronize", "run", "synchronize", *turn, *turn]


@pytest.mark.parametrize(("once", "calls"), [(1e-5, 20), (5e-3, 20), (2e-2, 5), (1.0, 3)])
def test_calls_in_a_queue(once, calls):
    assert timing._queued_calls(once) == calls
