"""Finished runs on disk: one file each, written whole or not at all, and never mixed with those of other settings."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from alignment_tax.settings import VERSION, Cure


class Store:
    """``folder/SCALE-FINGERPRINT/``: the base model, the tuned weights that interpolation needs, and a JSON a run.

    Raises:
        ValueError: a file there is not what its name says; it names the file and what to do. Nothing is deleted.
    """

    def __init__(self, folder: Path, scale: str, fingerprint: str):
        self.folder = folder / f"{scale}-{fingerprint}"
        self.fingerprint = fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self.others = sorted(p for p in folder.iterdir() if p.is_dir() and p != self.folder)

    def path(self, objective: str, cure: Cure, seed: int) -> Path:
        return self.folder / f"{objective}-{cure.slug}-seed{seed}.json"

    def has(self, objective: str, cure: Cure, seed: int) -> bool:
        return self.path(objective, cure, seed).exists()

    def save(self, objective: str, cure: Cure, seed: int, result: dict[str, Any]) -> None:
        header = {"version": VERSION, "fingerprint": self.fingerprint}
        run = {**header, "objective": objective, "cure": cure._asdict(), "seed": seed, **result}
        text = json.dumps(run, indent=1, allow_nan=False)
        with _whole(self.path(objective, cure, seed)) as part:
            part.write_text(text)

    def load(self, objective: str, cure: Cure, seed: int) -> dict[str, Any]:
        path = self.path(objective, cure, seed)
        try:
            run = json.loads(path.read_text())
        except json.JSONDecodeError as e:
            raise ValueError(f"{path} is not JSON ({e}); delete it, and the run is made again") from None
        expected = {"version": VERSION, "fingerprint": self.fingerprint, "objective": objective, "seed": seed}
        expected["cure"] = cure._asdict()
        for key, value in expected.items():
            found = run.get(key) if isinstance(run, dict) else None
            if found != value:
                raise ValueError(
                    f"{path}: {key} is {found!r}, expected {value!r}; move the file away to make the run again"
                )
        return run

    def save_weights(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        with _whole(self.folder / f"{name}.pt") as part:
            torch.save(weights, part)

    def has_weights(self, name: str) -> bool:
        return (self.folder / f"{name}.pt").exists()

    def load_weights(self, name: str, device: str) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / f"{name}.pt", map_location=device, weights_only=True)


class _whole:
    """A path to write to that takes the final name only when everything is written."""

    def __init__(self, path: Path):
        self.path, self.part = path, path.with_name(f"{path.name}.{os.getpid()}.part")

    def __enter__(self) -> Path:
        return self.part

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.part.replace(self.path)
        else:
            self.part.unlink(missing_ok=True)
