"""The pytest plugin of the GPU gate: fewer examples on Triton, and no success where every test was skipped."""

import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import pytest_gate


def test_few_examples_on_triton_alone():
    """The plugin leaves the function as it was, which other backends share."""
    calls = []

    @hypothesis.given(hypothesis.strategies.integers())
    @hypothesis.settings(max_examples=30, database=None)
    def test(x):
        calls.append(x)

    def examples(name):
        calls.clear()
        hook = pytest_gate.pytest_runtest_call(SimpleNamespace(obj=test, name=name))
        next(hook)
        test()
        with pytest.raises(StopIteration):
            hook.send(None)
        return len(calls)

    assert [examples(f"test[{on}]") for on in ("triton-gpu", "cuda-gpu", "triton-gpu")] == [8, 30, 8]


@pytest.mark.parametrize(("status", "passed", "expected"), [(0, [1], 0), (0, [], 1), (2, [], 2)])
def test_tests_that_were_all_skipped_have_not_passed(status, passed, expected):
    reporter = SimpleNamespace(stats={"passed": passed}, write_line=lambda line: None)
    plugins = SimpleNamespace(get_plugin={"terminalreporter": reporter}.get)
    session = SimpleNamespace(config=SimpleNamespace(pluginmanager=plugins), exitstatus=status)
    pytest_gate.pytest_sessionfinish(session, status)
    assert session.exitstatus == expected
