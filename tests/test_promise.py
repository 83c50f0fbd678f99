"""What was captured stays, and what should learn does, in situations that users get into; or it is refused in words.

Every one of these once moved protected outputs, froze what should have trained, or failed with an error that gave no
advice.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradproj
from gradproj import NullSpace, ProjectedOptimizer
from test_nullspace import captured, network, train


def package(name):
    return pytest.importorskip(name, reason=f"needs the package {name}: pip install '.[test]'")


def step_away(model, opt, shape=(16, 12), steps=5):
    train(model, opt, steps, shape=shape)


def protecting(model, x, lr=0.05, share=0.9, **settings):
    protection = captured(model, x, share=share, **settings)
    before = model(x).detach()
    return protection, ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=lr), protection), before


# What the hooks of modules do not see.


class TwoUses(nn.Module):
    """A weight that its module applies, and somebody else once more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.out(F.linear(torch.tanh(self.layer(x)), self.layer.weight))


class FusedHead(nn.Module):
    """The loss multiplies by the head, as fused linear cross-entropies do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(12, 12), nn.Linear(12, 7, bias=False)

    def forward(self, x):
        return self.layer(x) @ self.head.weight.T


class Halved(nn.Linear):
    """Its output is not its product."""

    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize(
    ("model", "name", "advice"),
    [(TwoUses(), "layer", "outside of its module"), (FusedHead(), "head", "outside of its module"),
     (nn.Sequential(nn.Linear(12, 12), Halved(12, 4)), "1", "overrides forward")],
    ids=["functional", "fused head", "another forward"],
)  # fmt: skip
def test_a_use_that_was_not_heard_is_found_in_the_first_batch(model, name, advice, few):
    """Its gradient is not the sum of y x^T over the calls of the module."""
    protection, batches = NullSpace(model), []
    with pytest.raises(RuntimeError, match=rf"layer {name}\b.*{advice}.*modules="), protection.capture():
        for _ in range(2):
            batches.append(model(few).square().sum().backward())
    assert len(batches) == 0 and len(protection) == 0
    without = NullSpace(model, modules=lambda n, _: n != name, share=0.9)  # the way out that the message names
    with without.capture():
        model(few).square().sum().backward()
    before = model(few).detach()
    step_away(model, ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), without))
    assert (model(few) - before).abs().max() < 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_proof_under_gradient_checkpointing(reentrant, few):
    """Calls are made twice, gradients once."""
    few = few.requires_grad_()
    model = network()
    with NullSpace(model, share=0.9).capture():
        checkpoint(model, few, use_reentrant=reentrant).square().sum().backward()
    model = TwoUses()
    with pytest.raises(RuntimeError, match="layer layer .*outside of its module"), NullSpace(model).capture():
        checkpoint(model, few, use_reentrant=reentrant).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_proof_allows_for_rounding(dtype):
    """Sums over thousands of tokens that cancel, in every dtype; and finds a use of a hundredth of a layer's own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32)).to(dtype)
    x = torch.randn(2000, 64).to(dtype)

    def run(extra):
        protection = NullSpace(model, share=0.5)
        with protection.capture():
            y = model(x)
            ((y.float() - y.float().mean()) ** 2).mean().mul(64.0).backward(retain_graph=True)
            if extra:
                (model(x) + extra * F.linear(torch.tanh(model[0](x)), model[2].weight)).float().mean().backward()

    run(0.0)
    with pytest.raises(RuntimeError, match="layer 2"):
        run(1.0)


def test_a_call_by_keyword(few):
    model = network()
    plain = captured(model, few, share=0.9)

    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            for layer in self.net:
                x = layer(input=x)
            return x

    again = captured(ByKeyword(), few, share=0.9)
    for name, basis in plain.bases.items():
        torch.testing.assert_close(basis.target, again.bases[f"net.{name}"].target, rtol=0, atol=0)


class Router(nn.Linear):
    """As phimoe's and llama4's."""

    def forward(self, x):
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = Router(12, 3), nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        scores, _ = self.router(x)
        return sum(scores[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


def test_a_layer_that_returns_a_tuple_is_held_in_words(few):
    model = Routed()
    router = model.router.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="router: its forward returns a tuple.*held"):
        protection, opt, before = protecting(model, few)
    assert protection.coverage.held == model.router.weight.numel() + 3
    step_away(model, opt)
    assert torch.equal(router, model.router.weight) and (model(few) - before).abs().max() < 1e-4


class Experts(nn.Module):
    """Only the first two are ever used by the captured tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x, use=(0, 1)):
        return sum(self.experts[e](x) for e in use)


def test_an_expert_that_no_captured_token_reached_is_free(few, tmp_path):
    model = Experts()
    protection, opt, before = protecting(model, few)
    assert [protection.bases[f"experts.{e}"].rank for e in range(3)] == [4, 4, 0]
    assert protection.coverage.unused == 12 * 13 and "no captured token reached it" in protection.report()
    protection.save(tmp_path / "bases.safetensors")
    assert NullSpace.load(tmp_path / "bases.safetensors", Experts()).report() == protection.report()
    alone = model.experts[2].weight.detach().clone()
    rng = torch.Generator().manual_seed(1)
    for _ in range(5):
        opt.zero_grad()
        (model(torch.randn(8, 12, generator=rng), (1, 2)) - 1).square().mean().backward()
        opt.step()
    assert (model(few) - before).abs().max() < 1e-4 and (model.experts[2].weight - alone).abs().max() > 0.01
    with protection.capture():  # and protected as soon as one does
        model(few, (2,)).sum().backward()
    assert protection.bases["experts.2"].rank > 0 and protection.coverage.unused == 0


# What a model holds.


class OwnMatrices(nn.Module):
    """Experts as one parameter, and a matrix that no module has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(12, 4)
        self.experts = nn.Parameter(torch.randn(4, 12, 12) / 4)
        self.own = nn.Parameter(torch.randn(12, 12) / 4)

    def forward(self, x):
        y = torch.einsum("ti,eio,te->to", x, self.experts, self.gate(x).softmax(-1))
        return F.linear(y, self.own)


def test_a_model_that_is_mostly_held_says_so(few):
    model = OwnMatrices()
    with pytest.warns(RuntimeWarning, match=r"93% .*experts \(576\), own \(144\).*coverage"):
        protection = NullSpace(model, share=0.9)
    assert protection.coverage[:3] == (52, 720, 0)
    assert protection.coverage.largest == (("experts", 576), ("own", 144))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NullSpace(model, rest="train")
        NullSpace(network())
        NullSpace(
            nn.Sequential(nn.Embedding(50, 12), nn.LayerNorm(12), nn.Linear(12, 3))
        )  # those are expected to be held


@pytest.mark.parametrize("trains", [True, False])
def test_a_transformer_encoder(trains):
    """in_proj_weight and out_proj are used inside of a function: held, with a warning that says so. The rest is
    pinned."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, 0.0, batch_first=True), 2).train(trains)
    x = torch.randn(1, 3, 12)
    with pytest.warns(RuntimeWarning, match=r"in_proj_weight"):
        protection, opt, before = protecting(model, x)
    assert {name.split(".")[-1] for name in protection.bases} == {"linear1", "linear2"}
    train(model, opt, 5, shape=(4, 6, 12))
    assert (model(x) - before).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weight_norm(kind, few):
    """A weight that is computed is no matrix that trains: held, or nothing is left to protect, in words that fit."""
    norm = nn.utils.parametrizations.weight_norm if kind == "parametrization" else nn.utils.weight_norm
    with pytest.raises(ValueError, match=r"computed.*weight_norm.*remove"):
        NullSpace(norm(nn.Linear(12, 4)))
    model = nn.Sequential(nn.Linear(12, 12), norm(nn.Linear(12, 4)))
    with pytest.warns(RuntimeWarning, match="1.(parametrizations.weight.original1|weight_v)"):
        protection, opt, before = protecting(model, few)
    step_away(model, opt)
    assert list(protection.bases) == ["0"] and (model(few) - before).abs().max() < 1e-4


# What surrounds a capture.


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
    for layer in protection.layers:
        basis = protection.bases[layer.name]
        whole = torch.cat([layer.weight, layer.bias[:, None]], dim=1).double()
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
