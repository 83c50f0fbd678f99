"""`make bench`: pinning GPT-2's linear layers, against two matrix products a layer and against the formula; and what is
predicted of the Triton pin on a GPU."""

import pytest
import torch

import gpu_measure
import parameter_lists as lists
import pin_model
import pinned
from gpu_predicted import GPUS
from pinned import PinCase

BF16 = torch.bfloat16
CASES = [
    PinCase("GPT-2 124M float32, r = 64", lists.gpt2_124m_linear()),
    PinCase("GPT-2 124M float32, r = 64, transposed", lists.gpt2_124m_linear(), transposed=True),
    PinCase("GPT-2 124M float32, r = 256", lists.gpt2_124m_linear(), 256),
    PinCase("GPT-2 124M bfloat16, r = 64", lists.gpt2_124m_linear(), dtype=BF16),
    PinCase("GPT-2 124M bfloat16, r = 256", lists.gpt2_124m_linear(), 256, BF16),
]
TITLE = "pin_: against the best plain torch, a loop of products, and the formula"
HEAD = "| case | time | x best torch | x formula | extra memory | the formula's |"
PREDICTION = "pin_ on a GPU: a PREDICTION from bytes and operations, measured by nobody; shares are of 2 N"


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


def test_prediction(tables):
    pytest.importorskip("triton", reason="the tiles of Triton's kernel are asked for")
    heads = [
        "| case |" + "".join(f" {name}: memory | L2 | share |" for name in GPUS),
        "| --- |" + " ---: |" * 3 * len(GPUS),
    ]
    cases = gpu_measure.pin_cases(quick=False)
    tables[PREDICTION] = [*heads, *(pin_model.line(case.name, case.shapes, case.rank, case.dtype) for case in cases)]
