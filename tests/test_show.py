"""The picture of a null space, and the progress line of a capture."""

import pytest
import torch

from gradproj import NullSpace
from gradproj.nullspace import progress as lines
from gradproj.nullspace import show
from test_nullspace import captured, network
from test_promise import package


def test_a_bar_for_each_matrix(few, tmp_path):
    package("matplotlib")
    protection = captured(network(), few, share=0.1)  # of six tokens, so that not all is kept
    figure = show(protection)
    kept, left = figure.axes
    assert [bar.get_height() for bars in kept.containers for bar in bars] == [
        basis.rank / basis.curvature.inputs for basis in protection.bases.values()
    ]
    assert max(bar.get_height() for bars in left.containers for bar in bars) == 1.0
    figure.savefig(tmp_path / "null_space.png")
    with pytest.raises(RuntimeError, match="nothing has been captured"):
        show(NullSpace(network()))


def test_a_line_for_what_takes_long(few, monkeypatch, capsys):
    tqdm = package("tqdm.auto").tqdm

    class Shown(tqdm):
        def __init__(self, **settings):
            super().__init__(**{**settings, "disable": False})

    monkeypatch.setattr("tqdm.auto.tqdm", Shown)
    captured(network(), few)
    assert capsys.readouterr().err == ""  # not for what is over at once
    monkeypatch.setattr(lines, "PATIENCE", 0.0)
    model = network()
    with NullSpace(model).capture():
        for _ in range(3):
            model(torch.randn(4, 12)).square().sum().backward()
    shown = capsys.readouterr().err
    assert "capture: 3 passes" in shown and "eigenvalues: 100%" in shown
