"""``python -m gradproj doctor``: what runs here, and what is missing."""

import argparse
import platform

import torch

import gradproj
from gradproj.kernels.backends import how_to_build, library


def doctor() -> None:
    print(f"gradproj {gradproj.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"machine  {platform.machine()}, {torch.get_num_threads()} threads for torch")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        print(f"cuda:{i}   {properties.name}, compute capability {properties.major}.{properties.minor}")
    print("native libraries")
    for name in ("cpu", "cuda"):
        path = library(name)
        found = f"{path}, for torch 2.10 and later" if path.exists() else f"not built: {how_to_build(name)}"
        print(f"  {name:<7}{found}")
    print("backends")
    for name, backend in gradproj.backends().items():
        state = f"works on {' and '.join(backend.device_types)}" if backend.available else f"no: {backend.reason}"
        print(f"  {name:<7}{state}")
    for device in ("cpu", "cuda"):
        if device == "cpu" or torch.cuda.is_available():
            print(f"{device} tensors run on: {_check(device)}")


def _check(device: str) -> str:
    """Project two small vectors; returns the name of the backend that did it."""
    g, d = torch.tensor([3.0, 4.0], device=device), torch.tensor([1.0, 0.0], device=device)
    info = gradproj.project_([g], [d])
    if g.tolist() != [0.0, 4.0]:
        raise SystemExit(f"gradproj doctor: {info.backend} computed {g.tolist()} instead of [0.0, 4.0]")
    return info.backend


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gradproj", description=gradproj.__doc__)
    parser.add_argument("command", nargs="?", choices=["doctor"], help="which backends run here, and what is missing")
    parser.parse_args()
    doctor()


if __name__ == "__main__":
    main()
