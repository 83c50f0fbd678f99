"""`make bench`: the fused projection on real parameter lists. A row of the table at the end is one test here."""

import statistics

import pytest
import torch

import parameter_lists as lists
import peers
from harness import Case, fused, make_rows, measure
from timing import in_turns

CASES = [
    Case("GPT-2 124M float32", lists.gpt2_124m()),
    Case("GPT-2 124M bfloat16", lists.gpt2_124m(), torch.bfloat16),
    Case("GPT-2 124M float32, K = 8", lists.gpt2_124m(), directions=8, rounds=3),
    Case("decoder 35M float32, K = 8", lists.decoder_35m(), directions=8, rounds=5),
    Case("small net, 300 tensors", lists.small_net(), rounds=21),
    Case("600 x 64", lists.uniform(600, 64), rounds=21),
    Case("300 x 64", lists.uniform(300, 64), rounds=21),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_projection(case, rows, benchmark):
    contenders = dict(peers.EAGER)
    # torch.compile links CPU code with unquoted paths: no contender where torch's own path has a space
    if case.directions == 1 and case.dtype == torch.float32 and "GPT" in case.name and " " not in torch.__file__:
        compiled = torch.compile(peers.device_coefficient)
        contenders["torch.compile"] = lambda g, d: compiled(g, d)
    row = measure(case, contenders)
    rows.append(row)
    assert row.seconds is not None, f"wrong result: {row.wrong}"
    benchmark.extra_info.update(row._asdict())
    grads, directions, *_ = make_rows(case, "cpu")
    benchmark.pedantic(fused, (grads, directions), rounds=5, warmup_rounds=1)


def test_host_cost(host_cost, benchmark):
    """What a call costs before any byte counts: nothing else runs in between, and the buffers stay in cache."""
    case = Case("300 x 64, alone", lists.uniform(300, 64))
    grads, directions, *_ = make_rows(case, "cpu")
    seconds = statistics.median(in_turns({"fused": lambda: fused(grads, directions)}, 51, "cpu")["fused"])
    host_cost.append(seconds / (2 * len(grads)))
    benchmark.pedantic(fused, (grads, directions), rounds=100, warmup_rounds=10)
