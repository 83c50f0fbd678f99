"""A plugin for the GPU gate's tests (`-p pytest_gate`): few examples on Triton, and no success in which nothing ran."""

import hypothesis
import pytest

EXAMPLES = (
    8  # each kind of row compiles a kernel of its own, for seconds, and all examples of a test run in one process
)
SETTINGS = "_hypothesis_internal_use_settings"  # where @settings leaves them; there is no public name for it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    test = getattr(item, "obj", None)
    if "triton" not in item.name or not hypothesis.is_hypothesis_test(test):
        return (yield)
    chosen = getattr(test, SETTINGS)
    setattr(test, SETTINGS, hypothesis.settings(chosen, max_examples=min(EXAMPLES, chosen.max_examples)))
    try:
        return (yield)
    finally:
        setattr(test, SETTINGS, chosen)  # the function is shared by all backends


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # None in a worker of xdist
    if reporter and exitstatus == pytest.ExitCode.OK and not reporter.stats.get("passed"):
        reporter.write_line("every test was skipped")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
