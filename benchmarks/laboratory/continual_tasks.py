"""Fashion-MNIST as a sequence of tasks, and the network that learns them one after the other."""

import dataclasses
import functools
import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laboratory.runs import FIRST_REPORTED

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
KINDS = {
    "split": "5-split, task-incremental: two classes a task, a head for each task, and the task is known",
    "permuted": "10-permuted, domain-incremental: ten classes, pixels permuted anew in each task, one head for all",
}
FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
PIXELS, LEARNED = 784, 50_000  # of the training images, those that are learned; the others choose settings


@dataclasses.dataclass(frozen=True)
class Sequences:
    """What a :class:`runs.Plan` asks of a model, and the sizes of everything.

    Attributes:
        images, held_out: of a task: learned in one epoch; measured on, half as many where settings are chosen.
        batch, kept: GPM's: images a step, images whose activations a finished task leaves its bases from. All methods
            that look back at a finished task see as many of its images.
        memory: images that replay and Directions keep, in equal parts of the tasks so far.
        every: steps between two pins of a NullSpace.
    """

    data: Path = DEBIAN
    images: int = 3_000
    held_out: int = 2_000
    width: int = 256
    batch: int = 10
    kept: int = 300
    memory: int = 1_000
    every: int = 10

    name, device = "fashion-mnist", "cpu"

    def facts(self) -> Any:
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k != "data"}
        return [settings, digest(self.data)]


class Task(NamedTuple):
    """Images [n, 784] and labels [n] that are learned, in order, and those that it is measured on."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def check(folder: Path) -> None:
    """Raises ValueError: the files are not in ``folder``."""
    if missing := [name for name in FILES if not (folder / f"{name}-ubyte.gz").exists()]:
        raise ValueError(
            f"{folder} has no {missing[0]}-ubyte.gz: apt-get install dataset-fashion-mnist, or name the folder that "
            "holds Fashion-MNIST's four files: --data FOLDER"
        )


def idx(path: Path) -> Tensor:
    """The bytes of a gzipped idx file, in the shape that its header says."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of bytes: it begins with {raw[:4].hex()}")
    shape = np.frombuffer(raw, ">i4", raw[3], 4).tolist()
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape).copy())


@functools.cache
def load(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [60000, 784] and labels, test images and labels; images are standardised by the training ones'
    mean and deviation over all pixels."""
    images, labels, test_images, test_labels = (idx(folder / f"{name}-ubyte.gz") for name in FILES)
    deviation, mean = torch.std_mean(images.float())
    pixels = [((x.flatten(1) - mean) / deviation) for x in (images, test_images)]
    return pixels[0], labels.long(), pixels[1], test_labels.long()


@functools.cache
def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join((folder / f"{name}-ubyte.gz").read_bytes() for name in FILES)).hexdigest()


def tasks(of: Sequences, kind: str, seed: int) -> Iterator[Task]:
    """Seeds that are reported are measured on test images, those that choose on training images that none learns."""
    images, labels, *test = load(of.data)
    parts = [(images[:LEARNED], labels[:LEARNED], of.images)]
    if seed >= FIRST_REPORTED:
        parts.append((*test, of.held_out))
    else:
        parts.append((images[LEARNED:], labels[LEARNED:], of.held_out // 2))
    generator = torch.Generator().manual_seed(seed)
    for number in range(5 if kind == "split" else 10):
        pixels = torch.randperm(PIXELS, generator=generator) if kind == "permuted" else torch.arange(PIXELS)
        task: list[Tensor] = []
        for x, y, count in parts:
            rows = torch.arange(len(y)) if kind == "permuted" else (y // 2 == number).nonzero().squeeze(1)
            rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
            task += [x[rows][:, pixels], y[rows] if kind == "permuted" else y[rows] % 2]
        yield Task(*task)


class Mlp(nn.Module):
    """Two hidden layers; a head for each task of "split", one for all of "permuted"."""

    def __init__(self, width: int, kind: str):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(PIXELS, width), nn.Linear(width, width)])
        heads, classes = (5, 2) if kind == "split" else (1, 10)
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))

    def forward(self, x: Tensor, task: int) -> Tensor:
        for layer in self.hidden:
            x = layer(x).relu()
        return self.heads[task % len(self.heads)](x)

    def loss(self, images: Tensor, labels: Tensor, task: int) -> Tensor:
        return F.cross_entropy(self(images, task), labels)

    @torch.no_grad()
    def accuracy(self, task: Task, number: int) -> float:
        guess = self(task.held_out_images, number).argmax(1)
        return (guess == task.held_out_labels).float().mean().item()
