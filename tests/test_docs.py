"""Every code block of README and docs/ runs, every example runs, and every link between files leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradproj

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|\{include\} (\S+)")


def names():
    """What the pages take for granted: the reader's model, data, losses and trainers; everything tiny."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )
    batches = [{"input_ids": t, "labels": t} for t in torch.randint(50, (3, 2, 7))]

    class DPOTrainer(transformers.Trainer):
        """TRL's is constructed in the same way; tests/test_hf.py runs it."""

    arguments = transformers.TrainingArguments(
        "out", max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    examples = [{k: t[0] for k, t in batch.items()} for batch in batches]

    def loss(model, batch):
        return model(**batch).loss

    from language import character_tokenizer

    return {
        "gradproj": gradproj, "torch": torch, "model": model, "anchors": batches, "data": batches,
        "capability_batches": batches, "capability_loss": loss, "safety_loss": loss,
        "examples": examples, "preferences": examples, "args": arguments,
        "Trainer": transformers.Trainer, "DPOTrainer": DPOTrainer, "tokenizer": character_tokenizer(),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """One after the other, as a reader would paste them."""
    blocks = BLOCK.findall(page.read_text())
    if not blocks:
        pytest.skip("a page without Python")
    monkeypatch.chdir(tmp_path)
    known = names()
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), known)  # noqa: S102  our own pages


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(example):
    text = example.read_text()
    assert len(text.splitlines()) <= 60
    for package in re.findall(r"^(?:import|from) (transformers|peft|trl|datasets|lightning)", text, re.MULTILINE):
        pytest.importorskip(package)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if "torchrun" in text else []
    done = subprocess.run(
        [sys.executable, *launcher, str(example)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    moved = re.findall(r"moved by (\S+)$", done.stdout, re.MULTILINE)
    losses = re.findall(r"capability: (\S+) before, (\S+) after", done.stdout)
    assert all(float(m) < 1e-5 for m in moved) and all(abs(float(a) - float(b)) < 0.01 for a, b in losses), done.stdout
    assert moved or losses or "kernels" in example.name


def anchors(page):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in (a or b for a, b in LINK.findall(page.read_text())):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
