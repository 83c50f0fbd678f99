"""Finished runs on disk: one file each, written whole or not at all, and never mixed with those of other settings."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from laboratory.cures import Cure
from laboratory.model import VERSION


class Store:
    """``folder/NAME-FINGERPRINT/``: the tuned weights that interpolation needs, and a JSON a run.

    Raises:
        ValueError: a file there is not what its name says; it names the file and what to do. Nothing is deleted.
    """

    def __init__(self, folder: Path, name: str, fingerprint: str):
        self.folder = folder / f"{name}-{fingerprint}"
        self.fingerprint = fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self.others = sorted(p for p in folder.iterdir() if p.is_dir() and p != self.folder)

    def path(self, objective: str, cure: Cure, seed: int) -> Path:
        return self.folder / f"{objective}-{cure.slug}-seed{seed}.json"

    def has(self, objective: str, cure: Cure, seed: int) -> bool:
        return self.path(objective, cure, seed).exists()

    def save(self, objective: str, cure: Cure, seed: int, result: dict[str, Any]) -> None:
        header = {"version": VERSION, "fingerprint": self.fingerprint}
        run = {**header, "objective": objective, "cure": cure.turned, "seed": seed, **result}
        text = json.dumps(run, indent=1, allow_nan=False)
        with whole(self.path(objective, cure, seed)) as part:
            part.write_text(text)

    def load(self, objective: str, cure: Cure, seed: int) -> dict[str, Any]:
        path = self.path(objective, cure, seed)
        try:
            run = json.loads(path.read_text())
        except json.JSONDecodeError as e:
            raise ValueError(f"{path} is not JSON ({e}); delete it, and the run is made again") from None
        expected = {"version": VERSION, "fingerprint": self.fingerprint, "objective": objective, "seed": seed}
        expected["cure"] = cure.turned
        for key, value in expected.items():
            found = run.get(key) if isinstance(run, dict) else None
            if found != value:
                raise ValueError(
                    f"{path}: {key} is {found!r}, expected {value!r}; move the file away to make the run again"
                )
        return run

    def save_weights(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        with whole(self.folder / f"{name}.pt") as part:
            torch.save(weights, part)

    def load_weights(self, name: str, device: str) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / f"{name}.pt", map_location=device, weights_only=True)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that takes the final name only when everything is written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
