"""`make bench`: pinning GPT-2's linear layers, against two matrix products a layer and against the formula."""

import pytest
import torch

import parameter_lists as lists
import pinned
from pinned import PinCase

CASES = [
    PinCase("GPT-2 124M float32", lists.gpt2_124m_linear()),
    PinCase("GPT-2 124M float32, transposed", lists.gpt2_124m_linear(), transposed=True),
    PinCase("GPT-2 124M bfloat16", lists.gpt2_124m_linear(), dtype=torch.bfloat16, rounds=3),
]
TITLE = "pin_, rank 64: against the loop of mm + addmm_ and the formula"
HEAD = "| case | time | x mm + addmm_ | x formula | extra memory | the formula's |"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_pin(case, tables, benchmark):
    row = pinned.measure(case)
    assert row.seconds is not None, f"wrong result: {row.wrong}"
    benchmark.extra_info.update(row._asdict())
    tables.setdefault(TITLE, [HEAD, "| --- |" + " ---: |" * 5]).append(pinned.line(row))
    layers = pinned.make_layers(case, "cpu")
    benchmark.pedantic(pinned.fused, (layers,), rounds=3)


@pytest.mark.parametrize("biased", [False, True], ids=["", "biases"])
def test_small_layers(biased, tables):
    each, above = pinned.small_layers(biased)
    heads = ["| case | pin_ | above three torch calls (five with a bias) |", "| --- | ---: | ---: |"]
    case = f"{pinned.SMALL} layers of 32 x 32{', with biases' if biased else ''}, rank {pinned.SMALL_RANK}"
    tables.setdefault("pin_ of small layers: us a layer", heads).append(f"| {case} | {each:.1f} | {above:+.1f} |")
