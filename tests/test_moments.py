"""Second moments of inputs, gathered by hooks: what is counted, what is shared, and how good a sketch is."""

import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradproj import NullSpace
from gradproj.nullspace.basis import make_bases
from gradproj.nullspace.gather import Gather
from gradproj.nullspace.hearing import Hearing
from gradproj.nullspace.matrices import find_slots
from gradproj.nullspace.moments import Moment


def gather(model, run, sketch=lambda matrix: None):
    gathered = Gather(sketch)
    with torch.compiler.set_stance("force_eager"), Hearing(find_slots(model), [gathered]):
        run()
    gathered.end()
    return gathered.matrices, gathered


def mean(gathered, name):
    number = next(n for matrix, n in zip(gathered.matrices, gathered.moment_of, strict=True) if matrix.name == name)
    return gathered.moments[number].sum / gathered.moments[number].tokens


def moment(rows, ones=False):
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1) if ones else rows
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", [True, False], ids=["input needs a gradient", "input is data"])
def test_inputs_and_output_gradients_of_a_linear_layer(bias, trains):
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3, bias=bias), torch.randn(4, 6, 5, requires_grad=trains)
    weights = torch.randn(4, 6, 3)
    found, gathered = gather(model, lambda: (model(x) * weights).sum().backward())
    torch.testing.assert_close(mean(gathered, found[0].name), moment(x.detach().view(-1, 5), bias))
    assert gathered.tokens == [24]
    assert gathered.squares[0].item() / 24 == pytest.approx(weights.square().mean().item(), rel=1e-5)


def test_tokens_without_a_gradient_do_not_count():
    """Padding: its gradient is exactly zero."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 3), torch.randn(7, 5)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 0, 1])
    _, gathered = gather(model, lambda: (model(x).square().sum(1) * mask).sum().backward())
    assert gathered.tokens == [4]
    torch.testing.assert_close(mean(gathered, ""), moment(x[mask.bool()], True))


class Attention(nn.Module):
    """Three layers on one input, and a fourth on another."""

    def __init__(self, k_bias=False):
        super().__init__()
        self.q, self.k = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=k_bias)
        self.v, self.out = nn.Linear(6, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x):
        y = torch.sigmoid(self.q(x) * self.k(x))[..., :4] * self.v(x)
        return self.out(F.elu_(y))


def test_layers_with_the_same_input_share_its_moment():
    torch.manual_seed(0)
    model = Attention()
    x = [torch.randn(3, 6) for _ in range(2)]
    _, gathered = gather(model, lambda: [model(batch).sum().backward() for batch in x])
    assert gathered.moment_of[:3] == [0, 0, 0] and gathered.moment_of[3] == 1
    torch.testing.assert_close(gathered.moments[0].sum / 6, moment(torch.cat(x)))
    model = Attention(k_bias=True)
    _, gathered = gather(model, lambda: model(x[0]).sum().backward())
    assert gathered.moment_of == [0, 1, 0, 2]  # a bias is an input that the others do not have


def test_layers_that_part_keep_what_they_saw():
    """The second batch goes through one of two layers only."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)
    model = nn.ModuleDict({"a": a, "b": b})
    x = [torch.randn(5, 4) for _ in range(3)]

    def run():
        (a(x[0]) * b(x[0])).sum().backward()
        a(x[1]).sum().backward()
        (b(x[2]) * a(x[2])).sum().backward()

    _, gathered = gather(model, run)
    torch.testing.assert_close(mean(gathered, "a"), moment(torch.cat(x)))
    torch.testing.assert_close(mean(gathered, "b"), moment(torch.cat([x[0], x[2]])))


@pytest.mark.parametrize("again", [False, True], ids=["", "on the same tensors"])
@pytest.mark.parametrize("seed", range(12))
def test_layers_that_part_and_meet_within_a_pass(seed, again):
    """Gradients come in the reverse order of calls: what a layer is called on alone is heard of before what it was
    called on with others, which then missed those rows. zaya's calls are so."""
    rng = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear(4, 2, bias=False) for name in "abc"})
    few = torch.randn(3, 5, 4, generator=rng).unbind()
    seen = {name: [] for name in "abc"}
    passes = []
    for _ in range(3):
        calls = []
        for _ in range(4):
            x, users = torch.randn(5, 4, generator=rng), torch.rand(3, generator=rng) < 0.7
            x = few[torch.randint(3, (), generator=rng)] if again else x
            names = [name for name, user in zip("abc", users.tolist(), strict=True) if user]
            calls.append((x, names))
            for name in names:
                seen[name].append(x)
        passes.append(calls)

    def run():
        for calls in passes:
            sum(model[name](x).sum() for x, names in calls for name in names).backward()

    _, gathered = gather(model, run)
    for name, rows in seen.items():
        torch.testing.assert_close(mean(gathered, name), moment(torch.cat(rows)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_called_twice_in_one_forward_pass():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(5, 4)
    _, gathered = gather(model, lambda: model(x).sum().backward())
    hidden = torch.tanh(model.layer(x)).detach()
    torch.testing.assert_close(mean(gathered, "layer"), moment(torch.cat([x, hidden])))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(5, 6, requires_grad=True)
    _, plain = gather(model, lambda: model(x).square().sum().backward())
    _, again = gather(model, lambda: checkpoint(model, x, use_reentrant=reentrant).square().sum().backward())
    assert plain.tokens == again.tokens and plain.moment_of == again.moment_of
    for a, b in zip(plain.moments, again.moments, strict=True):
        torch.testing.assert_close(a.sum, b.sum)
    torch.testing.assert_close(plain.squares, again.squares)


def test_compiled_autocast_and_eval_models():
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(5, 6)
    _, plain = gather(model, lambda: model(x).sum().backward())
    compiled = torch.compile(model, backend="eager")
    compiled(x)  # hooks that come after the first call would not be traced
    _, again = gather(compiled, lambda: compiled(x).sum().backward())
    assert [layer.name for layer in again.matrices] == ["q", "k", "v", "out"]
    torch.testing.assert_close(plain.moments[0].sum, again.moments[0].sum)

    def mixed():
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().sum().backward()

    _, again = gather(model, mixed)
    assert again.moments[0].sum.dtype == torch.float32
    torch.testing.assert_close(plain.moments[0].sum, again.moments[0].sum)


def test_shared_by_two_names_and_tied_to_an_embedding():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, tokens):
            return self.head(self.b(torch.tanh(self.a(self.embed(tokens)))))

    torch.manual_seed(0)
    model, tokens = Model(), torch.arange(7)
    found, gathered = gather(model, lambda: model(tokens).square().sum().backward())
    assert [layer.name for layer in found] == ["a"] and gathered.tokens == [14]
    first = model.embed(tokens).detach()
    torch.testing.assert_close(mean(gathered, "a"), moment(torch.cat([first, torch.tanh(model.a(first)).detach()])))


@pytest.mark.parametrize("ones", [False, True])
def test_sketch_finds_the_leading_eigenpairs(ones):
    """Of inputs whose spectrum falls as a language model's does, at twice the rank: against the exact eigenpairs."""
    torch.manual_seed(0)
    width, rank, tokens = 300, 20, 4000
    scales = torch.arange(1, width + 1).double().pow(-1.0)
    mix = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    rows = (torch.randn(tokens, width, dtype=torch.float64) * scales @ mix).float()
    exact, sketch = (
        Moment(width + ones, ones, columns, torch.device("cpu"), torch.float32, {}) for columns in (None, 2 * rank)
    )
    for part in rows.split(500):
        exact.add(part)
        sketch.add(part)
    whole = rows.double()
    whole = torch.cat([whole, torch.ones(tokens, 1).double()], 1) if ones else whole
    whole = whole.T @ whole / tokens
    assert sketch.sum.shape == (width + ones, 2 * rank)
    values, found = exact.eigenvalues(width), sketch.eigenvalues(rank)
    vectors, basis = exact.eigenvectors(len(values)).double(), sketch.eigenvectors(rank).double()
    assert found.shape[0] >= rank
    assert (basis[:, :rank].T @ basis[:, :rank] - torch.eye(rank)).abs().max() < 1e-6
    tail = values[rank:].sum()  # what no approximation of this rank has; the bound in expectation is about twice that
    assert (values[:rank] - found[:rank]).abs().sum() < 2 * tail
    captured = (basis[:, :rank].T @ whole @ basis[:, :rank]).trace()
    assert captured / values[:rank].sum() > 0.97
    assert (vectors.T @ vectors - torch.eye(vectors.shape[1])).abs().max() < 1e-6
    assert float(sketch.trace) == pytest.approx(float(exact.trace))


@pytest.mark.parametrize(("width", "count"), [(300, 29), (600, 29), (600, 200)], ids=["narrow", "leading", "all"])
def test_few_tokens_are_spanned(width, count):
    """Small ones too, of a 300th of the largest: what a basis leaves of them, adapters blind to it let through.
    Leading eigenpairs in float32 alone leave more."""
    torch.manual_seed(0)
    x = torch.randn(12, width) * torch.logspace(0, -2.5, 12)[:, None]
    moment = Moment(width, False, None, torch.device("cpu"), torch.float32, {})
    moment.add(x)
    basis = moment.eigenvectors(len(moment.eigenvalues(count)))
    assert basis.shape[1] == 12 and not moment.has_more
    assert ((x - x @ basis @ basis.T).norm(dim=1) < 1e-3 * x.norm(dim=1)).all()


@pytest.mark.parametrize("sketch", [None, 16], ids=["exact", "sketched"])
def test_inputs_that_are_all_zero_have_no_eigenpairs(sketch):
    moment = Moment(600, False, sketch, torch.device("cpu"), torch.float32, {})
    moment.add(torch.zeros(30, 600))
    assert moment.is_finite() and moment.eigenvalues(20).numel() == 0
    assert moment.eigenvectors(0).shape == (600, 0)


@pytest.mark.parametrize("fall", [0.0, 0.5, 1.5], ids=["flat", "slow", "fast"])
def test_leading_eigenpairs_without_the_others(fall):
    """Of a wide moment only the leading ones are computed: what they capture is right to a part in 1e4."""
    torch.manual_seed(0)
    width, count = 700, 60
    mix = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    scales = torch.arange(1, width + 1).double().pow(-fall)
    made = Moment(width, False, None, torch.device("cpu"), torch.float32, {})
    made.add((torch.randn(2000, width, dtype=torch.float64) * scales @ mix).float())
    whole = (made.sum.tril() + made.sum.tril(-1).T).double() / made.tokens
    exact = torch.linalg.eigvalsh(whole).flip(0)[:count]
    found = made.eigenvalues(count)
    assert made.has_more and (found - exact).abs().sum() < 0.05 * exact.sum()
    vectors = made.eigenvectors(count).double()
    assert made.sum.numel() == 0 and (vectors.T @ vectors - torch.eye(count)).abs().max() < 1e-6
    captured = (vectors.T @ whole @ vectors).trace()
    assert captured > (1 - (1e-4 if fall else 0.05)) * exact.sum()  # if all are alike, it matters little which


def test_one_moment_at_a_time_is_closed(monkeypatch):
    """All moments and eigenvectors in float64 at once took 20 GB for a model of 7 billion weights."""
    torch.manual_seed(0)
    stack = [nn.Linear(64, 64, bias=False) for _ in range(6)]
    model = nn.Sequential(*(part for layer in stack for part in (layer, nn.Tanh())))
    made, alive, eigh = [], [], torch.linalg.eigh

    def counted(total):
        alive.append(sum(ref() is not None for ref in made))
        made.append(weakref.ref(total))
        return eigh(total)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    _, gathered = gather(model, lambda: model(torch.randn(100, 64)).square().sum().backward())
    bases = make_bases(gathered, 0.1, lambda matrix: None)
    assert len(made) == 6 and max(alive) == 0
    assert all(moment.sum.numel() == 0 for moment in gathered.moments)
    assert sum(basis.vectors.untyped_storage().nbytes() for basis in bases.values()) <= 0.1 * 6 * 64 * 64 * 4


def test_what_is_not_covered_is_refused():
    with pytest.raises(ValueError, match="Embedding has no matrix to protect"):
        find_slots(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="no matrix to protect"):
        find_slots(nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.LayerNorm(4)))
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert [slot.name for slot in find_slots(model, lambda name, _: name == "1")] == ["1.weight", "1.bias"]


def test_gradients_that_float16_hardly_holds_are_told_of():
    """Tokens were lost without a word where the loss is a mean over many, as it is with fp16=True in a Trainer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)).half()
    x = torch.randn(64, 12).half() * torch.logspace(-4, 0, 64)[:, None].half()

    def protection(scale):
        made = NullSpace(model, share=0.9)
        with made.capture(scale):
            y = model(x)
            (scale * y.float().square().mean() * 1e-5).backward()
        return made

    with pytest.warns(RuntimeWarning, match=r"smallest that float16 has.*capture\(scale=4096\)"):
        lost = protection(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = protection(2.0**14)
    assert {basis.tokens for basis in kept.bases.values()} == {64}
    assert min(basis.tokens for basis in lost.bases.values()) < 64


def test_the_scale_of_losses_is_divided_out():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(30, 8)

    def protection(scale):
        made = NullSpace(model, share=0.3)
        with made.capture(scale):
            (scale * model(x).square().mean()).backward()
        return made

    plain, scaled = protection(1.0), protection(4096.0)
    assert plain.report() == scaled.report()
    assert all(torch.equal(basis.vectors, scaled.bases[name].vectors) for name, basis in plain.bases.items())
    rates = [[group["lr"] for group in made.param_groups(1.0)] for made in (plain, scaled)]
    assert rates[0] == rates[1]
