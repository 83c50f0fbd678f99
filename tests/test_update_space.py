"""Update space: what an optimizer's step did to the parameters keeps off the protected directions."""

import numpy as np
import pytest
import torch

from gradproj import checkpoint, reference
from training import assert_same, closure, descend, loss, model_and_batches, parameters, projected, protect, twins

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("per", ["model", "tensor"])
@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_is_the_oracle_s(name, method, per, dtype):
    """Momentum and weight decay undo the orthogonality of a gradient; here the update is projected. Beside that, only the
    rounding of the parameters is left."""
    model, x = model_and_batches(dtype=dtype)
    twin, _ = model_and_batches(dtype=dtype)
    opt = projected(OPTIMIZERS[name](model.parameters()), 2, method, space="update", per=per)
    plain = OPTIMIZERS[name](twin.parameters())
    parts = [range(4)] if per == "model" else [[i] for i in range(4)]
    eps, applied = torch.finfo(dtype).eps, False
    for batch in x[:6]:
        rows = [[torch.randn_like(p, dtype=dtype) for p in model.parameters()] for _ in range(2)]
        empty = {"state": {}, "param_groups": [{"params": range(4)}]}
        opt.protection.load_state(checkpoint.insert(empty, rows), list(model.parameters()))
        twin.load_state_dict(model.state_dict())
        before = [p.double() for p in parameters(model)]
        for m, o in ((model, opt), (twin, plain)):
            if name == "lbfgs":  # the gradients come into being inside the step, after the parameters were copied
                o.step(closure(m, o, batch, -1.0))
            else:
                descend(m, o, batch, -1.0)
        update = [b - p for b, p in zip(before, parameters(twin), strict=True)]
        for part in parts:
            expected = reference.oracle_project([update[i] for i in part], [[r[i] for i in part] for r in rows], method)
            for i, e in zip(part, expected, strict=True):
                after = before[i].numpy() - e.reshape(before[i].shape)
                bound = eps * np.abs(before[i].numpy()) + 1e2 * eps * float(update[i].abs().max())
                assert (np.abs(parameters(model)[i].double().numpy() - after) <= bound).all()
        applied |= bool(opt.last.applied)
    assert applied
    with pytest.raises(RuntimeError, match=r"project\(\): Directions with these settings acts inside step\(\)"):
        opt.project()


def test_unprotected_parts_of_the_model_are_left_as_the_optimizer_left_them():
    """No gradient: no copy, no change. The memory of the copy is that of the last step."""
    model, twin, x = twins()
    model[0].weight.requires_grad_(False)
    opt = projected(torch.optim.AdamW(model.parameters(), lr=0.01), space="update")
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
    twin[0].weight.requires_grad_(False)
    memory = set()
    for i in range(4):
        protect(model, opt, x[i])
        for m, o in ((model, opt), (twin, plain)):
            o.zero_grad()
            loss(m, x[i + 1], -1.0).backward()
            m[2].bias.grad = None
            o.step()
        assert torch.equal(model[0].weight, twin[0].weight) and torch.equal(model[2].bias, twin[2].bias)
        assert opt.last.applied
        assert set(opt.protection._before) == {model[0].bias, model[2].weight}
        memory.add(tuple(t.data_ptr() for t in opt.protection._before.values()))
    assert len(memory) == 1
    opt.unprotect()
    assert not opt.protection._before


def test_a_step_that_is_not_finite_is_left_as_it_is():
    model, twin, x = twins()
    opt = projected(model, space="update")
    protect(model, opt, x[0])
    for m, o in ((model, opt), (twin, torch.optim.SGD(twin.parameters(), lr=0.1))):
        loss(m, x[1]).backward()
        m[0].bias.grad[0] = float("nan")
        o.step()
    assert not opt.last.applied and not opt.last.finite
    for p, q in zip(parameters(model), parameters(twin), strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=0.0, equal_nan=True)


def test_a_learning_rate_of_zero():
    """At the start of a warm-up nothing moves, and ``removed`` was 0 / 0."""
    model, x = model_and_batches()
    opt = projected(torch.optim.AdamW(model.parameters(), lr=0.0), space="update")
    protect(model, opt, x[0])
    before = parameters(model)
    descend(model, opt, x[1])
    assert_same(before, parameters(model))
    assert opt.last.removed == 0.0 and opt.last.finite and not opt.last.applied
