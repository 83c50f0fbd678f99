"""A plugin for pytest (`-p few_examples`): on Triton, a test over random rows sees few of them.

Every kind of row compiles a kernel of its own, for seconds each, and all examples of a test run in one process.
"""

import hypothesis
import pytest

EXAMPLES = 8
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
