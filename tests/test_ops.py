"""The registered ops: schemas, fakes, and what torch.compile does with them."""

import pytest
import torch

import gradproj
from gradproj.kernels.ops import SCHEMAS

NAMES = [schema.split("(")[0] for schema in SCHEMAS]


def sample(name, device):
    rows = [torch.randn(4, 3, device=device), torch.randn(70, device=device)]
    other = [torch.randn(4, 3, device=device), None]
    gram = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64, device=device)
    return {
        "gram": ([*rows, *other], 2, None),
        "weights": (gram, "conflict", 0.0, 0.0),
        "combine_": (rows, other, torch.tensor([1.0, 0.5], dtype=torch.float64, device=device)),
        "project_": (rows, other, "orthogonal", 0.0, 0.0, None),
        "pin_": (rows[:1], [torch.eye(3, 2, device=device)], [None], [torch.ones(4, device=device)][:0], []),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(on, name):
    if name not in gradproj.backends()[on.backend].ops:
        pytest.skip(f"backend {on.backend} leaves {name} to torch's")
    torch.library.opcheck(getattr(on.namespace, name).default, sample(name, on.device))


@pytest.mark.parametrize("parts", [(), ([1, 0], 2)], ids=["one part", "two parts"])
def test_gram_dd_and_parts_pass_opcheck(on, parts):
    gram_dd = torch.ones(*parts[1:], 1, 1, dtype=torch.float64, device=on.device)
    torch.library.opcheck(on.namespace.gram.default, (*sample("gram", on.device)[:2], gram_dd, *parts))
    torch.library.opcheck(on.namespace.project_.default, (*sample("project_", on.device)[:5], gram_dd, *parts))


def test_compiled_projection_equals_eager(on, inductor):
    """One graph: the op must not break it."""
    torch.manual_seed(0)
    g, d = [torch.randn(50, 7), torch.randn(11)], [torch.randn(50, 7), None]
    g, d = [t.to(on.device) for t in g], [None if t is None else t.to(on.device) for t in d]
    eager = [t.clone() for t in g]
    info = gradproj.project_(eager, d)

    op = on.namespace.project_.default

    @torch.compile(fullgraph=True)
    def run(g, d):
        gram, weights = op(g, d, "orthogonal", 0.0, 0.0)
        return gram, weights, [t * 2 for t in g]

    gram, weights, doubled = run(g, d)
    torch.testing.assert_close(weights, info.weights)
    torch.testing.assert_close(gram, info.gram)
    for a, b, c in zip(eager, g, doubled, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(2 * a, c)


def test_a_call_without_a_tensor_is_refused_in_words():
    """The public functions make none; there is no device to make the result on."""
    cpu = gradproj.backends()["cpu"]
    if cpu.reason:
        pytest.skip(cpu.reason)
    with pytest.raises(RuntimeError, match="no tensor among the buffers"):
        cpu.op("gram")([None, None], 2, torch.ones(1, 1, dtype=torch.float64))
