"""Every way to multiply an input by a parameter: what is heard of a call explains what the call returns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradproj import NullSpace, ProjectedOptimizer
from gradproj.nullspace.gather import Gather
from gradproj.nullspace.hearing import Hearing
from gradproj.nullspace.matrices import find_slots
from gradproj.nullspace.regions import on_rank


class Check:
    """A listener for which outputs(y) = rows(x) W^T + b, and which notes the matrices' names."""

    def __init__(self):
        self.gather, self.heard = Gather(lambda matrix: None), []

    def before(self, x, weights, parts):
        return x if x.requires_grad else x.detach().requires_grad_(), (x, parts)

    def after(self, call, y):
        x, parts = call
        for part in parts:
            matrix = self.gather.matrices[self.gather._matrix(part)]
            made = part.rows(x) @ on_rank(part.at.region, part.at.slot.get(), matrix.name).part.T.to(x.dtype)
            if part.bias is not None:
                made = made + on_rank(part.bias.region, part.bias.slot.get(), matrix.name).part
            torch.testing.assert_close(made, part.outputs(y), rtol=1e-4, atol=1e-5)
            self.heard.append(matrix.name)


def parameters(**shapes):
    torch.manual_seed(0)
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


def gradients(model, y):
    """How many of the parameters get one of what was heard, which takes them detached."""
    return sum(g is not None for g in torch.autograd.grad(y.sum(), [*model.parameters()], allow_unused=True))


def conv(dims, **settings):
    torch.manual_seed(0)
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](8, 16, 3, **settings)


W = {"w": (6, 5), "b": (6,), "t": (5, 6), "e": (3, 5, 6), "f": (3, 6, 5), "h": (5, 2, 4), "rows": (12, 5)}
CALLS = {
    "linear": (lambda p, x: F.linear(x, p["w"], p["b"]), ["w"]),
    "linear of a chunk": (lambda p, x: F.linear(x, p["rows"].chunk(2)[1]), ["rows[6:12]"]),
    "linear of a slice": (lambda p, x: F.linear(x, p["f"][1]), ["f[1]"]),
    "linear of a view": (lambda p, x: F.linear(x, p["rows"].view(2, 6, 5)[1]), ["rows[6:12]"]),
    "transposed": (lambda p, x: x @ p["w"].T, ["w"]),
    "matmul": (lambda p, x: torch.matmul(x, p["t"]), ["t"]),
    "matmul from the left": (lambda p, x: p["w"] @ x.T, ["w"]),
    "from the left, a batch": (lambda p, x: p["w"] @ x.T.reshape(5, 2, 2).permute(1, 0, 2), ["w"]),
    "method": (lambda p, x: x.matmul(p["e"][0]), ["e[0]"]),
    "mm": (lambda p, x: torch.mm(x, p["t"]), ["t"]),
    "addmm": (lambda p, x: torch.addmm(p["b"], x, p["t"]), ["t"]),
    "addmm of a matrix": (lambda p, x: torch.addmm(torch.zeros(4, 6), x, p["t"]), ["t"]),
    "bmm": (lambda p, x: torch.bmm(x.expand(3, 4, 5), p["e"]), ["e[0]", "e[1]", "e[2]"]),
    "bmm transposed": (lambda p, x: torch.bmm(x.expand(3, 4, 5), p["f"].mT), ["f[0]", "f[1]", "f[2]"]),
    "bmm from the left": (lambda p, x: torch.bmm(p["f"], x.T.expand(3, 5, 4)), ["f[0]", "f[1]", "f[2]"]),
    "baddbmm": (lambda p, x: torch.baddbmm(torch.zeros(1), x.expand(3, 4, 5), p["e"]), ["e[0]", "e[1]", "e[2]"]),
    "one input for all experts": (lambda p, x: x @ p["e"], ["e[0]", "e[1]", "e[2]"]),
    "einsum": (lambda p, x: torch.einsum("ti,oi->to", x, p["w"]), ["w"]),
    "einsum, weight first": (lambda p, x: torch.einsum("oi, ti -> ot", p["w"], x), ["w"]),
    "einsum of experts": (lambda p, x: torch.einsum("ti,eio->teo", x, p["e"]), ["e[0]", "e[1]", "e[2]"]),
    "einsum of heads": (lambda p, x: torch.einsum("td,dhk->thk", x, p["h"]), ["h"]),
    "cast": (lambda p, x: F.linear(x.double(), p["w"].double()), ["w"]),
    "slice of a cast": (lambda p, x: F.linear(x.double(), p["f"].to(torch.float64)[2]), ["f[2]"]),
    "cast of a slice": (lambda p, x: F.linear(x.double(), p["f"][2].to(torch.float64)), ["f[2]"]),
    "by name": (lambda p, x: torch.matmul(input=x, other=p["t"]) + torch.mm(x, mat2=p["t"]), ["t", "t"]),
    "by name, the other way": (lambda p, x: torch.mm(mat2=p["t"], input=x), ["t"]),
    "addmm by name": (lambda p, x: torch.addmm(p["b"], mat1=x, mat2=p["t"], beta=1), ["t"]),
    "linear by name": (lambda p, x: F.linear(weight=p["w"], input=x), ["w"]),
    "matrix times vector": (lambda p, x: p["w"] @ x[0], ["w"]),
    "vector times matrix": (lambda p, x: x[0] @ p["t"], ["t"]),
    "into a buffer": (lambda p, x: torch.mm(x, x.T, out=torch.empty(4, 4)) @ (x @ p["t"]), ["t"]),
    "under autocast": (lambda p, x: autocast(lambda: F.linear(x, p["w"]).float()), []),
    "no product": (lambda p, x: x * p["w"][0], []),
    "two parameters": (lambda p, x: x + p["w"] .mean() * (p["f"][0] @ p["t"]).mean(), []),
    "scaled": (lambda p, x: torch.addmm(p["b"], x, p["t"], alpha=2.0), []),
}  # fmt: skip


def autocast(run):
    with torch.autocast("cpu", torch.bfloat16):
        return run()


@pytest.mark.parametrize("name", CALLS)
def test_every_function(name):
    model = parameters(**W)
    run, expected = CALLS[name]
    x = torch.randn(4, 5)
    check = Check()
    if name == "under autocast":  # heard, though it is not exact
        check.after = lambda call, y: check.heard.append(call[1][0].at.slot.name)
        expected = ["w"]
    with Hearing(find_slots(model), [check]):
        y = run(model, x)
    assert check.heard == expected
    assert not expected or gradients(model, y) == 0
    torch.testing.assert_close(y, run(model, x), rtol=1e-5, atol=1e-6)  # torch folds batches where gradients are off


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}, {"groups": 2}, {"bias": False},
                 {"padding": 1, "padding_mode": "circular"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("batched", [True, False])
def test_convolutions(dims, settings, batched):
    model, check = conv(dims, **settings), Check()
    x = torch.randn(*((2,) if batched else ()), 8, *[7] * dims)
    with Hearing(find_slots(model), [check]):
        assert gradients(model, model(x)) == 0
    assert check.heard == (["weight[0:8]", "weight[8:16]"] if settings.get("groups") else [""])


def test_transforms_are_refused():
    """torch would name neither the parameter nor what to do."""
    model = parameters(**W)
    with Hearing(find_slots(model), [Check()]), pytest.raises(NotImplementedError, match="parameter w is .*vmap"):
        torch.vmap(lambda row: row @ model["w"].T)(torch.randn(4, 5))


def test_small_filters_are_no_matrices():
    model, check = nn.Conv2d(8, 8, 3, groups=8), Check()
    with Hearing(find_slots(model), [check]):
        model(torch.randn(1, 8, 5, 5))
    assert check.heard == []


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
def test_a_grouped_product():
    model, check = parameters(e=(3, 16, 32)).to(torch.bfloat16), Check()
    x, ends = torch.randn(24, 16).to(torch.bfloat16), torch.tensor([8, 8, 24], dtype=torch.int32)
    check.after = lambda call, y: check.heard.extend(
        (part.at.region.ranges[0][0], len(part.rows(x))) for part in call[1]
    )
    with Hearing(find_slots(model), [check]):
        torch._grouped_mm(x, model["e"], offs=ends)
    assert check.heard == [(0, 8), (1, 0), (2, 16)]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_attention_inside_of_its_function(same, trains):
    torch.manual_seed(0)
    model, check = nn.MultiheadAttention(8, 2, batch_first=True).train(trains), Check()
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with Hearing(find_slots(model), [check]):
        y, _ = model(x, x, x) if same else model(x, memory, memory)
    torch.testing.assert_close(y, (model(x, x, x) if same else model(x, memory, memory))[0], rtol=1e-5, atol=1e-6)
    assert gradients(model, y) == 0
    parts = ["in_proj_weight"] if same else ["in_proj_weight[0:8]", "in_proj_weight[8:24]"]
    assert check.heard == [*parts, "out_proj"]


@pytest.mark.parametrize("at_once", [True, False])
def test_matrices_that_share_elements_are_refused(at_once, few):
    """Both cannot be pinned exactly."""
    model = parameters(w=(12, 12), v=(12, 12))
    protection = NullSpace(model, share=0.9)
    message = "w is multiplied by as several matrices.*modules="
    with pytest.raises(NotImplementedError, match=message), protection.capture():
        if at_once:
            (few @ model["w"] + few @ model["w"].T).square().sum().backward()
        else:
            (few @ model["w"]).square().sum().backward()
            (few @ model["w"].T).square().sum().backward()
    assert len(protection) == 0


class Folded(nn.Module):
    """Experts in one parameter, as transformers keeps them."""

    def __init__(self, transposed):
        super().__init__()
        torch.manual_seed(0)
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, 12, 16) / 4 if transposed else torch.randn(3, 16, 12) / 4)

    def forward(self, x, use=(0, 2)):
        return sum(x @ self.up[e] if self.is_transposed else F.linear(x, self.up[e]) for e in use)


class Outer(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


@pytest.mark.parametrize("transposed", [True, False])
def test_adapters_of_experts_become_blind(transposed, few):
    """PEFT's target_parameters adds B A to all experts at once; each expert's A is blind to what that expert saw."""
    peft = pytest.importorskip("peft")
    base = Outer(Folded(transposed))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"]))
    protection = NullSpace(model, share=0.9)
    with protection.capture():
        model(few).square().sum().backward()
    assert len(protection) == 2 and all(basis.target is None for basis in protection.bases.values())
    before = model(few).detach()
    opt = ProjectedOptimizer(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), protection)
    other = torch.randn(16, 12)
    losses = []
    for _ in range(10):
        opt.zero_grad()
        losses.append((model(other, (0, 1, 2)) - 1).square().mean())
        losses[-1].backward()
        opt.step()
    assert (model(few) - before).abs().max() < 1e-5 and losses[-1] < 0.95 * losses[0]
