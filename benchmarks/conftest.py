"""Collects the rows of a run and prints them as one table at its end."""

import pytest

from harness import Row, machine, table

_rows: list[Row] = []


@pytest.fixture
def rows() -> list[Row]:
    return _rows


def pytest_terminal_summary(terminalreporter):
    if _rows:
        terminalreporter.section(
            "projection, one direction unless given: fused against naive, plain torch and the limit"
        )
        terminalreporter.write_line(table(_rows, machine()))
        for r in _rows:
            if r.seconds is not None and r.case.startswith("300 x 64"):
                cost = r.seconds / r.buffers * 1e6
                terminalreporter.write_line(
                    f"\nhost cost: {cost:.2f} us per buffer ({r.buffers} buffers, everything included)"
                )
