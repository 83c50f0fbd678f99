"""A further capture keeps what an earlier one protected; and what surrounds a capture changes nothing."""

import pytest
import torch
from torch import nn

import gradproj
from gradproj import NullSpace, ProjectedOptimizer
from test_nullspace import network, protecting, train


def test_a_second_capture_adds_and_what_was_protected_stays(few):
    model, opt, protection, first = protecting(few)
    train(model, opt, 20)
    other = torch.randn(3, 12, generator=torch.Generator().manual_seed(9))
    with opt.protect():
        model(other).square().sum().backward()
    second = model(other).detach()
    assert protection.bases["0"].tokens == 7 and protection.bases["0"].rank == 7
    train(model, opt, 50)
    assert (model(few) - first).abs().max() < 1e-4 and (model(other) - second).abs().max() < 1e-4


class Apart(nn.ModuleDict):
    """Layers of different inputs, each used or not."""

    def forward(self, inputs):
        return sum(self[name](x).square().sum() for name, x in inputs.items())


def test_layers_without_a_kept_direction_do_not_share_one():
    """Vectors of rank 0 have no memory of their own, so these two were taken for layers of the same inputs."""
    torch.manual_seed(0)
    model = Apart({"wide": nn.Linear(40, 40), "a": nn.Linear(6, 3), "b": nn.Linear(9, 2)})
    inputs = {"wide": 100 * torch.randn(50, 40), "a": torch.randn(50, 6) / 1e3, "b": torch.randn(50, 9) / 1e3}
    protection = NullSpace(model)
    with protection.capture():
        model(inputs).backward()
    with protection.capture():
        model({"wide": inputs["wide"]}).backward()
    assert [(basis.rank, basis.tokens) for basis in protection.bases.values()] == [(2, 100), (0, 50), (0, 50)]


def test_a_second_capture_keeps_what_the_widest_of_a_shared_basis_had():
    """q kept 1 direction and v 10 of the same inputs: afterwards both were made from q's one."""
    torch.manual_seed(0)

    class QV(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)

        def forward(self, x, scale=1e-3):
            return scale * self.q(x) + self.v(x)

    model, x = QV(), torch.randn(10, 12)
    protection = NullSpace(model, share=0.46)
    with protection.capture():
        (model(x) * torch.randn(10, 12)).sum().backward()
    ranks = [protection.bases[name].rank for name in "qv"]
    assert ranks[0] <= 2 and ranks[1] >= 9
    opt = ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), protection)
    train(model, opt, 2)
    first, earlier = model.v(x).detach(), protection.bases["v"].vectors
    protection.share = 0.95  # room for the rank of both
    with protection.capture():
        (model(torch.randn(1, 12)) * torch.randn(1, 12)).sum().backward()
    kept = protection.bases["v"].vectors
    assert (earlier - kept @ (kept.T @ earlier)).abs().max() < 1e-4
    train(model, opt, 10)
    assert (model.v(x) - first).abs().max() < 1e-3


def test_layers_that_come_to_share_inputs_keep_what_each_had():
    """At first two layers see different inputs; in the second capture the same: neither loses its own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(12, 6, bias=False) for name in "ab"})
    x = {name: torch.randn(3, 12) for name in "abc"}
    protection = NullSpace(model, share=0.9)
    with protection.capture():
        (model["a"](x["a"]).square().sum() + model["b"](x["b"]).square().sum()).backward()
    with protection.capture():
        (model["a"](x["c"]) * model["b"](x["c"])).sum().backward()
    for name in "ab":
        inputs = torch.cat([x[name], x["c"]])
        basis = protection.bases[name].vectors
        assert (inputs - inputs @ basis @ basis.T).norm() < 1e-4 * inputs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capture_and_pin_inside_of_autocast(dtype, few):
    """B was made by a bfloat16 product there, off by 2.5e-3, and the moments too."""
    torch.manual_seed(0)
    model = network().to(dtype)
    few = few.to(dtype)
    protection = NullSpace(model, share=0.9)
    with torch.autocast("cpu", torch.bfloat16), protection.capture():
        model(few).float().square().sum().backward()
    for layer in protection.matrices:
        basis = protection.bases[layer.name]
        whole = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().double()
        exact = whole @ basis.vectors.double()
        assert (basis.target.double() - exact).norm() <= 1e-6 * exact.norm()
        assert (basis.vectors.T @ basis.vectors - torch.eye(basis.rank)).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        moved = protection.pin().moved
    assert (moved <= 1e-5 * torch.tensor([b.target.norm() for b in protection.bases.values()])).all()


def test_what_says_that_others_hold_other_rows_is_refused():
    opt = torch.optim.SGD((model := network()).parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match=r"fully_shard.*group="):
        ProjectedOptimizer(opt, NullSpace(model), sharding=gradproj.Sharding(placement="shard"))
