"""The laboratory's losses and measures against the formulas written out in float64."""

import math
from types import SimpleNamespace

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import gradproj
from laboratory import formulas, train
from laboratory.model import Batch, Objective

given = hypothesis.given(
    seed=st.integers(0, 2**16), b=st.integers(1, 4), t=st.integers(1, 6), v=st.integers(1, 9), masked=st.booleans()
)


def logits_and_tokens(seed, b, t, v, masked):
    """Random logits with one extreme, tokens, and a mask that counts at least one position."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(b, t, v, generator=generator, dtype=torch.float64)
    logits[0, 0, 0] = 300.0
    tokens = torch.randint(v, (b, t), generator=generator)
    mask = torch.rand(b, t, generator=generator) < 0.6
    mask[-1, -1] = True
    return logits, tokens, mask if masked else None


def counted(mask, b, t):
    return [(i, j) for i in range(b) for j in range(t) if mask is None or mask[i, j]]


@given
def test_sequence_logprob(seed, b, t, v, masked):
    logits, tokens, mask = logits_and_tokens(seed, b, t, v, masked)
    expected = [0.0] * b
    for i, j in counted(mask, b, t):
        expected[i] += (logits[i, j, tokens[i, j]] - logits[i, j].logsumexp(0)).item()
    torch.testing.assert_close(
        formulas.sequence_logprob(logits, tokens, mask), torch.tensor(expected, dtype=torch.float64)
    )


@given
def test_kl_penalty(seed, b, t, v, masked):
    logits, _, mask = logits_and_tokens(seed, b, t, v, masked)
    base = logits_and_tokens(seed + 1, b, t, v, masked)[0].roll(1, 1)
    terms = []
    for i, j in counted(mask, b, t):
        p, q = logits[i, j] - logits[i, j].logsumexp(0), base[i, j] - base[i, j].logsumexp(0)
        terms.append((p.exp() * (p - q)).sum().item())
    found = formulas.kl_penalty(logits, base, mask)
    assert found.item() == pytest.approx(sum(terms) / len(terms), abs=1e-9)
    assert formulas.kl_penalty(logits, logits, mask).item() == pytest.approx(0.0, abs=1e-12)


def test_kl_penalty_holds_the_model_to_the_base():
    """The direction matters: KL(base || model) has another gradient, and another minimum over a narrow family."""
    base = torch.tensor([[[2.0, 0.0, -1.0]]])
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    formulas.kl_penalty(logits, base).backward()
    p = torch.full((3,), 1 / 3)
    difference = p.log() - base[0, 0].log_softmax(0)
    torch.testing.assert_close(logits.grad[0, 0], p * (difference - (p * difference).sum()))
    assert base.grad is None


@hypothesis.given(seed=st.integers(0, 2**16), b=st.integers(1, 5), beta=st.floats(0.01, 10.0))
def test_dpo_loss(seed, b, beta):
    rows = 20 * torch.randn(4, b, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    margins = [beta * (c - r - (bc - br)) for c, r, bc, br in rows.T.tolist()]
    expected = sum(max(-m, 0.0) + math.log1p(math.exp(-abs(m))) for m in margins) / b
    assert formulas.dpo_loss(*rows, beta=beta).item() == pytest.approx(expected, rel=1e-9)


def test_dpo_loss_starts_at_log_2_and_pushes_the_two_apart():
    chosen, rejected = (torch.tensor([-3.0, -5.0], requires_grad=True) for _ in range(2))
    loss = formulas.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.5)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(chosen.grad, torch.full((2,), -0.5 * 0.5 / 2))
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_dpo_with_the_likelihood_of_what_is_preferred():
    torch.manual_seed(0)
    pupil, base, tokens, mask = nn.Embedding(9, 9), nn.Embedding(9, 9), torch.randint(9, (2, 3, 6)), torch.ones(2, 3, 5)
    mask[0, 1, 2:] = mask[1, 0, 4:] = 0
    model = SimpleNamespace(device="cpu", dpo_beta=0.3, base=lambda: base, logits=lambda m, t: m(t)[:, :-1])
    batch = Batch(tokens, mask.bool())

    def value(likelihood):
        task = Objective("", "", "", lambda *_: batch, preferences=True, likelihood=likelihood)
        return train.loss(model, pupil, task, 0.0, batch)

    nats = F.cross_entropy(pupil(tokens[0])[:, :-1].transpose(1, 2), tokens[0][:, 1:], reduction="none")
    expected = (nats * mask[0]).sum() / mask[0].sum()
    torch.testing.assert_close(value(2.0) - value(0.0), 2 * expected)


def test_ptx_loss_steps_where_mix_steps():
    """One backward pass over the mixed loss and ("mix", gamma) over two are the same cure."""
    torch.manual_seed(0)
    gamma, x, y = 0.3, torch.randn(5, 3), torch.randn(5, 3)
    stepped = []
    for mixed in (True, False):
        weight = torch.nn.Parameter(torch.ones(3))
        opt = torch.optim.SGD([weight], lr=0.1)
        if mixed:
            opt = gradproj.ProjectedOptimizer(opt, gradproj.Directions(1, ("mix", gamma)))
            with opt.protect():
                (y @ weight).square().mean().backward()
            (x @ weight).exp().mean().backward()
        else:
            formulas.ptx_loss((x @ weight).exp().mean(), (y @ weight).square().mean(), gamma).backward()
        opt.step()
        stepped.append(weight.detach())
    torch.testing.assert_close(stepped[0], stepped[1])


@hypothesis.given(seed=st.integers(0, 2**16), n=st.integers(0, 4), strength=st.floats(0.0, 10.0))
def test_ewc_penalty(seed, n, strength):
    generator = torch.Generator().manual_seed(seed)
    now, start, importance = (
        [torch.rand(i + 1, 2, generator=generator, dtype=torch.float64) for i in range(n)] for _ in range(3)
    )
    terms = [
        f * (p - p0) ** 2
        for lists in zip(now, start, importance, strict=True)
        for p, p0, f in zip(*(t.flatten().tolist() for t in lists), strict=True)
    ]
    found = formulas.ewc_penalty(now, start, importance, strength)
    assert found.item() == pytest.approx(strength / 2 * sum(terms), abs=1e-9)


@hypothesis.given(seed=st.integers(0, 2**16), alpha=st.floats(-1.0, 2.0))
def test_interpolate(seed, alpha):
    torch.manual_seed(seed)
    base, tuned = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) for _ in range(2))
    before = {k: v.clone() for k, v in base.state_dict().items()}
    mixed = formulas.interpolate(base.state_dict(), tuned.state_dict(), alpha)
    for key, a in before.items():
        if a.is_floating_point():
            b = tuned.state_dict()[key]
            expected = (1 - alpha) * a.double() + alpha * b.double()
            torch.testing.assert_close(mixed[key].double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(base.state_dict()[key], a)
        assert mixed[key].data_ptr() != base.state_dict()[key].data_ptr()
    base.load_state_dict(mixed)


def test_interpolate_ends_exactly_where_it_should():
    base, tuned = {"w": torch.randn(7)}, {"w": torch.randn(7)}
    assert torch.equal(formulas.interpolate(base, tuned, 0.0)["w"], base["w"])
    assert torch.equal(formulas.interpolate(base, tuned, 1.0)["w"], tuned["w"])


@hypothesis.given(seed=st.integers(0, 2**16), n=st.integers(1, 60), v=st.integers(1, 5), bins=st.integers(1, 12))
def test_calibration(seed, n, v, bins):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, v, generator=generator, dtype=torch.float64)
    targets = torch.randint(v, (n,), generator=generator)
    found = formulas.calibration(logits, targets, bins=bins)
    members = [[] for _ in range(bins)]
    for row, target in zip(logits, targets, strict=True):
        p = row.softmax(0)
        k = next(k for k in range(bins) if p.max() <= (k + 1) / bins or k == bins - 1)
        members[k].append((p.max().item(), float(p.argmax() == target)))
    ece = 0.0
    for k, inside in enumerate(members):
        assert found.counts[k] == len(inside)
        if not inside:
            assert found.confidence[k].isnan() and found.accuracy[k].isnan()
            continue
        confidence, accuracy = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        assert found.confidence[k].item() == pytest.approx(confidence)
        assert found.accuracy[k].item() == pytest.approx(accuracy)
        ece += len(inside) / n * abs(accuracy - confidence)
    assert found.ece.item() == pytest.approx(ece, abs=1e-12)


def test_calibration_counts_only_the_mask():
    logits = torch.tensor([[[9.0, 0.0], [0.0, 9.0]]])
    found = formulas.calibration(logits, torch.tensor([[0, 0]]), torch.tensor([[True, False]]), bins=2)
    assert found.counts.tolist() == [0, 1] and found.accuracy[1] == 1.0


@given
def test_entropy(seed, b, t, v, masked):
    logits, _, mask = logits_and_tokens(seed, b, t, v, masked)
    terms = []
    for i, j in counted(mask, b, t):
        p = logits[i, j].softmax(0)
        terms.append(-sum(x * math.log(x) for x in p.tolist() if x > 0))
    assert formulas.entropy(logits, mask).item() == pytest.approx(sum(terms) / len(terms), abs=1e-9)
    assert formulas.entropy(torch.zeros(b, t, v)).item() == pytest.approx(math.log(v), abs=1e-6)


def test_distinct_n():
    assert formulas.distinct_n([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert formulas.distinct_n(torch.tensor([[1, 2, 3], [1, 2, 3]]), 3) == 0.5
    assert formulas.distinct_n([torch.tensor([7]), [1, 2]], 2) == 1.0  # too short to have a pair
