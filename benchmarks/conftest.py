"""Collects the rows of a run and prints them as one table at its end."""

import pytest

from harness import Row, heading, machine, table

TITLE = "projection, one direction unless given: fused against naive, plain torch and the limit"
_rows: list[Row] = []
_host_cost: list[float] = []
_tables: dict[str, list[str]] = {}


@pytest.fixture
def rows() -> list[Row]:
    return _rows


@pytest.fixture
def host_cost() -> list[float]:
    """Seconds per buffer."""
    return _host_cost


@pytest.fixture
def tables() -> dict[str, list[str]]:
    """Title -> lines of markdown, for what has columns of its own."""
    return _tables


def pytest_terminal_summary(terminalreporter):
    if _rows:
        terminalreporter.section(TITLE)
        terminalreporter.write_line(table(_rows, machine()))
    for seconds in _host_cost:
        terminalreporter.write_line(
            f"\nhost cost: {seconds * 1e6:.2f} us per buffer (300 tensors of 64 elements, K = 1: 600 buffers, one "
            "call, everything included)"
        )
    for title, lines in _tables.items():
        terminalreporter.section(title)
        terminalreporter.write_line("\n".join([heading(machine()), "", *lines]))
