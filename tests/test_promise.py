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


# What modules do not know of.


class TwoUses(nn.Module):
    """A weight that its module applies, and somebody else once more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out = nn.Linear(12, 12, bias=False), nn.Linear(12, 3)

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


class InDouble(nn.Module):
    """As routers do, in more precision than the model's; and once more through a view."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.router = nn.Linear(12, 12), nn.Linear(12, 6, bias=False)

    def forward(self, x):
        y = self.layer(x)
        return F.linear(y.double(), self.router.weight.double()).float() + y @ self.router.weight.T.contiguous()


@pytest.mark.parametrize(
    "model", [TwoUses(), FusedHead(), nn.Sequential(nn.Linear(12, 12), Halved(12, 4)), InDouble()],
    ids=["functional", "fused head", "another forward", "cast"],
)  # fmt: skip
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["", "checkpoint reentrant", "checkpoint"])
def test_every_product_is_heard_wherever_it_is_made(model, reentrant, few):
    before_training = {key: value.clone() for key, value in model.state_dict().items()}
    protection = NullSpace(model, share=0.9)
    with protection.capture():
        x = few.clone().requires_grad_()
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
    assert protection.coverage.held == 0
    before = model(few).detach()
    step_away(model, ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), protection))
    assert (model(few) - before).abs().max() < 1e-4
    assert any((model.state_dict()[key] - value).abs().max() > 1e-3 for key, value in before_training.items())
    model.load_state_dict(before_training)


def test_a_backward_pass_where_gradients_are_off(few):
    """Checkpointing makes the products again in it, and they were not heard."""
    model = network()
    with NullSpace(model, share=0.9).capture():
        loss = checkpoint(model, few.requires_grad_(), use_reentrant=False).square().sum()
        with torch.no_grad():
            loss.backward()


def test_a_weight_with_a_bias_and_without_is_refused(few):
    model = nn.Linear(12, 12)
    with pytest.raises(NotImplementedError, match="with a bias and without it.*modules="), NullSpace(model).capture():
        F.linear(torch.tanh(model(few)), model.weight).square().sum().backward()


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


def test_a_layer_that_returns_a_tuple(few):
    """What it returns does not matter: its product is heard."""
    model = Routed()
    protection, opt, before = protecting(model, few)
    assert protection.coverage.held == 0 and protection.bases["router"].rank > 0
    step_away(model, opt)
    assert (model(few) - before).abs().max() < 1e-4


class HardRouter(nn.Module):
    """Only which of its outputs is the largest counts, so that no gradient reaches it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(12, 3), nn.Parameter(torch.randn(3, 12, 12))

    def forward(self, x):
        scores = self.router(x)
        chosen = scores.argmax(-1)
        y = torch.stack([row @ self.experts[e] for row, e in zip(x, chosen.tolist(), strict=True)])
        return y * (scores / scores.detach()).prod(1, keepdim=True).detach() + 0 * scores.sum()


def test_what_no_gradient_reaches_is_held_if_captured_inputs_do(few):
    model = HardRouter()
    router = model.router.weight.detach().clone()
    protection, opt, before = protecting(model, few)
    assert protection.coverage.held == 3 * 13
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
    """Experts as one parameter, and a matrix that is computed with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(12, 4)
        self.experts = nn.Parameter(torch.randn(4, 12, 12) / 4)
        self.own = nn.Parameter(torch.randn(12, 12) / 4)

    def forward(self, x):
        y = torch.einsum("ti,eio,te->to", x, self.experts, self.gate(x).softmax(-1))  # three operands are not read
        return F.linear(y, self.own.tanh())


def test_a_model_that_is_mostly_held_says_so(few):
    model = OwnMatrices()
    assert NullSpace(model).coverage[:3] == (48 + 720, 4, 0)  # what may be covered
    with pytest.warns(RuntimeWarning, match=r"93% .*experts \(576\), own \(144\).*coverage"):
        protection = captured(model, few, share=0.9)
    assert protection.coverage[:3] == (52, 720, 0)
    assert protection.coverage.largest == (("experts", 576), ("own", 144))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured(model, few, rest="train")
        captured(network(), few)
        # Embeddings and norms are expected to be held.
        captured(nn.Sequential(nn.Embedding(50, 12), nn.LayerNorm(12), nn.Linear(12, 3)), torch.arange(4))


# Noise that a model has in training mode, in which most people capture, and not when it is used.


class DropPath(nn.Module):
    """As in timm."""

    def forward(self, x):
        return x * x.new_empty(len(x), 1).bernoulli_(0.5) / 0.5 if self.training else x


class Noisy(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first, self.second = nn.Linear(12, 24), nn.Linear(24, 12)
        self.noise = {"dropout": nn.Dropout(0.5), "alpha": nn.AlphaDropout(0.5), "path": DropPath()}.get(kind)

    def forward(self, x):
        if self.kind == "checkpoint":
            return checkpoint(self.inner, x, use_reentrant=False)
        return self.inner(x)

    def inner(self, x):
        x = self.first(x).tanh()
        if self.noise is not None:
            x = self.noise(x)
        elif self.kind == "attention":
            x = F.scaled_dot_product_attention(*[x[None]] * 3, dropout_p=0.5 * self.training)[0]
        elif self.kind == "attention by position":
            x = F.scaled_dot_product_attention(*[x[None]] * 3, None, 0.5 * self.training)[0]
        else:
            x = F.dropout(x, 0.5, self.training)
        return self.second(x)


@pytest.mark.parametrize(
    "kind", ["dropout", "alpha", "path", "functional", "attention", "attention by position", "checkpoint"]
)
def test_what_is_captured_in_training_mode_stays_in_use(kind, few):
    """Of GPT-2 captured in training mode, with its dropout of a tenth, nothing stayed."""
    model = Noisy(kind).train()
    before = model.eval()(few).detach()
    protection = captured(model.train(), few, share=0.9)
    assert all(module.training for module in model.modules())
    step_away(model, ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), protection))
    assert (model.eval()(few) - before).abs().max() < 1e-4


def test_what_rounding_to_16_bits_leaves_does_not_add_up(few):
    model = network().bfloat16()
    _, opt, before = protecting(model, few.bfloat16())
    moved = []
    for _ in range(8):
        for _ in range(10):
            opt.zero_grad()
            (model(torch.randn(16, 12).bfloat16()) - 1.0).square().mean().backward()
            opt.step()
        moved.append((model(few.bfloat16()) - before).abs().max().item())
    assert max(moved) < 0.05 and max(moved[4:]) < 2 * max(moved[:4])


@pytest.mark.parametrize("trains", [True, False])
def test_a_transformer_encoder(trains):
    """in_proj_weight and out_proj are multiplied by inside of a function, which is opened."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, 0.0, batch_first=True), 2).train(trains)
    x = torch.randn(1, 3, 12)
    protection, opt, before = protecting(model, x)
    assert "layers.0.self_attn.in_proj_weight" in protection.bases and "layers.0.self_attn.out_proj" in protection.bases
    train(model, opt, 5, shape=(4, 6, 12))
    assert (model(x) - before).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weight_norm(kind, few):
    """A weight that is computed is no matrix that trains: held, or nothing is left to protect, in words that fit."""
    norm = nn.utils.parametrizations.weight_norm if kind == "parametrization" else nn.utils.weight_norm
    with pytest.raises(RuntimeError, match=r"computed.*weight_norm.*remove"):
        captured(norm(nn.Linear(12, 4)), few)
    model = nn.Sequential(nn.Linear(12, 12), norm(nn.Linear(12, 4)))
    with pytest.warns(RuntimeWarning, match="1.(parametrizations.weight.original1|weight_v)"):
        protection, opt, before = protecting(model, few)
    step_away(model, opt)
    assert list(protection.bases) == ["0"] and (model(few) - before).abs().max() < 1e-4
