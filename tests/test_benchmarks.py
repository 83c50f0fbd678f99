"""The benchmarks' own promise: no time for a wrong result. The GPU gate has a file of its own."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness
import peers
from laboratory import __main__ as laboratory
from laboratory import demo, tiny_lm


def tiny(**kwargs):
    return harness.Case("tiny", [(40, 3), (7,), (300,)], rounds=3, **kwargs)


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("name", peers.EAGER)
def test_peers_compute_the_same(name, directions):
    case = tiny(directions=directions)
    grads, directions, *_ = harness.make_rows(case, "cpu")
    weights = harness.expected_weights(case, grads, directions)
    assert harness.is_right(peers.EAGER[name], case, grads, directions, weights)


def test_row_of_a_right_result():
    row = harness.measure(tiny(), peers.EAGER)
    assert row.seconds and row.times_naive and row.times_best_torch and row.share_of_limit and not row.wrong
    assert row.buffers == 6 and row.extra_bytes is not None
    assert "| tiny | " in harness.table([row], harness.machine())


def test_wrong_peer_is_named_and_not_timed():
    row = harness.measure(tiny(), {"lazy": lambda g, d: None, "dot + add_": peers.dot_add})
    assert row.wrong == ["lazy"] and row.best_torch == "dot + add_"
    assert "wrong result: lazy" in harness.table([row], harness.machine())


def test_wrong_fused_result_prints_no_time(monkeypatch):
    monkeypatch.setattr(harness, "fused", lambda g, d: g[0].add_(1.0))
    row = harness.measure(tiny(), peers.EAGER)
    assert row.seconds is None and row.times_naive is None
    text = harness.table([row], harness.machine())
    assert "wrong result: fused" in text and " us" not in text and " ms" not in text


def test_torchjd_is_right_and_timed():
    bench_torchjd = pytest.importorskip("bench_torchjd", reason="torchjd is not installed", exc_type=ImportError)
    results = bench_torchjd.contest(tiny(directions=3))
    assert all(r.seconds and r.extra_bytes is not None and r.error < 1e-5 for r in results.values())
    assert bench_torchjd.line(tiny(), results).count(" x |") == 2


def test_wrong_torchjd_result_prints_no_time(monkeypatch):
    bench_torchjd = pytest.importorskip("bench_torchjd", reason="torchjd is not installed", exc_type=ImportError)
    monkeypatch.setitem(bench_torchjd.TOLERANCE, "gradproj", 0.0)
    results = bench_torchjd.contest(tiny(directions=3))
    assert results["gradproj"].seconds is None
    assert " x |" not in bench_torchjd.line(tiny(), results)


def test_naive_memory_is_seen():
    """The probe sees what the naive version allocates, so a small figure for the fused one means something."""
    case = harness.Case("large", [(1 << 24,)])  # beyond what malloc keeps for the next call
    grads, directions, *_ = harness.make_rows(case, "cpu")
    assert harness.extra_memory(lambda: harness.naive(grads, directions), "cpu") > 2 * case.list_bytes
    assert harness.extra_memory(lambda: harness.fused(grads, directions), "cpu") < 1 << 20


@pytest.mark.parametrize(
    "form", [{"parts": (0, 1, 0)}, {"directions": 3, "gram_dd": True}], ids=["parts", "known Gram"]
)
def test_what_only_the_op_takes_is_checked_and_timed(form):
    case = tiny(**form)
    row = harness.measure(case, {}, backend="cpu")
    assert row.seconds and row.backend == "cpu" and not row.wrong


def test_parts_projected_together_are_wrong():
    case = tiny(parts=(0, 1, 0))
    grads, directions, *_ = harness.make_rows(case, "cpu")
    weights = harness.expected_weights(case, grads, directions)
    assert len(weights) == 2 and not harness.is_right(harness.fused, case, grads, directions, weights)


def test_demo_runs_through(tmp_path, capsys, monkeypatch):
    """A few steps of everything that `make demo` does, --retrain included; what it finds then is not asserted."""
    pytest.importorskip("matplotlib")
    small = dict.fromkeys(("base_batch", "batch", "capability_batch", "held_out_windows"), 2)
    small |= {"exercises": 6, "held_out_pairs": 8}
    monkeypatch.setattr(demo, "SETTINGS", dataclasses.replace(demo.SETTINGS, **small))
    path, out = tmp_path / "models" / "base.safetensors", tmp_path / "out"
    few = ["--seeds", "1", "--steps", "2", "--workers", "1"]
    laboratory.main(["demo", "--retrain", "2", "--base", str(path), *few, "--out", str(out)])
    printed = capsys.readouterr().out
    _, facts = tiny_lm.load_base(path, steps=2)
    assert facts["command"] == "make demo ARGS='--retrain 2'"
    assert f"2 steps, held-out nats per byte: Python {facts['held_out']['Python']:.3f}" in printed
    for cure in demo.CURES:
        assert f"| {cure.name} |" in printed
    written = (out / "demo.md").read_text()
    assert "torch " in written and written.split("\n\n", 1)[1].strip() in printed
    assert (out / "alignment_tax.png").stat().st_size > 10_000
    found = json.loads((out / "results.json").read_text())["runs"]
    assert [r["seed"] for r in found] == [demo.FIRST_SEED] * len(demo.CURES)
    passes = {r["cure"]["family"]: r["cost"]["capability_backwards"] for r in found}
    assert list(passes.values()) == [0, 2, 1, 17, 16]


def point(cure, behaviour, loss, passes=0):
    values = {"behaviour": [behaviour - 0.01, behaviour + 0.01], "loss": [loss - 0.01, loss + 0.01]}
    return demo.Point("sft", cure, values, [], 1.0, passes, 0)


def test_demo_says_what_the_figures_say():
    unprotected, better, worse, *_ = demo.CURES
    start = {"behaviour": 0.5, "loss": 1.0}
    said = demo.finding(start, [point(unprotected, 0.9, 2.0), point(worse, 0.8, 2.5, 3), point(better, 0.7, 1.2, 4)])
    assert "(90.0% right) cost the unprotected model 1.000 nats" in said
    assert f"{better.family} 80% less (70.0% right, 4 capability passes), {worse.family} 50% more (80.0%" in said
    said = demo.finding(start, [point(unprotected, 0.9, 1.005), point(better, 0.9, 0.9)])
    assert "no tax to prevent" in said and better.family not in said
