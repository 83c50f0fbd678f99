"""Rows that are more than a list of tensors: differences from a base, float8 with block scales, columns in several parts."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import gradproj
from cases import DTYPES, assert_gram_close, clone, make_buffer, rows
from gradproj import float8, methods, reference


def difference(base, grads):
    return [None if b is None else b.double() - g.double() for b, g in zip(base, grads, strict=True)]


def plain(direction):
    return float8.dequantize(direction, torch.float64) if isinstance(direction, float8.Float8Row) else direction


def of_part(row, parts, part):
    return [t for t, p in zip(row, parts, strict=True) if p == part]


@st.composite
def forms(draw, on):
    """(grads, directions, base, parts), every form there or not."""
    grads, directions = draw(rows(device=on.device, max_directions=3, max_buffers=3 if on.slow else 5))
    if draw(st.booleans()):
        directions = [float8.quantize(d) if draw(st.booleans()) else d for d in directions]
    base = None
    if draw(st.booleans()):
        rng = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        dtypes = [None if g is None else draw(st.sampled_from([g.dtype, torch.float32])) for g in grads]
        base = [
            None
            if g is None
            else make_buffer(g.shape, t, draw(st.sampled_from(["contiguous", "sliced"])), rng, on.device)
            for g, t in zip(grads, dtypes, strict=True)
        ]
    parts = draw(st.lists(st.integers(0, 2), min_size=len(grads), max_size=len(grads))) if draw(st.booleans()) else None
    return grads, directions, base, parts


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_gram_matches_float64_oracle(on, data):
    if on.slow and data.draw(st.integers(0, 3)):
        return  # interpreted: a quarter of the examples
    grads, directions, base, parts = data.draw(forms(on))
    result = gradproj.gram(grads, *directions, base=base, parts=parts)
    row0 = grads if base is None else difference(base, grads)
    lists = [row0, *map(plain, directions)]
    if parts is None:
        assert_gram_close(result, reference.oracle_gram(*lists))
        return
    assert result.shape == (max(parts) + 1, len(lists), len(lists))
    for p in range(max(parts) + 1):
        assert_gram_close(result[p], reference.oracle_gram(*[of_part(row, parts, p) for row in lists]))


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150)
def test_combine_matches_float64_oracle(on, data):
    if on.slow and data.draw(st.integers(0, 3)):
        return  # interpreted: a quarter of the examples
    grads, directions, base, parts = data.draw(forms(on))
    count, width = 1 if parts is None else max(parts) + 1, 1 + len(directions)
    values = st.sampled_from([0.0, 1.0, -0.5, 2.25, 1e-3])
    weights = np.array(data.draw(st.lists(values, min_size=count * width, max_size=count * width))).reshape(
        count, width
    )
    written, lists = clone(grads), [plain(d) for d in directions]
    tensor = torch.as_tensor(weights, device=on.device)
    gradproj.combine_(written, directions, tensor if parts else tensor[0], base=base, parts=parts)
    for i, g in enumerate(grads):
        if g is None:
            assert written[i] is None
            continue
        w = weights[parts[i] if parts else 0].tolist()
        if w[0] == 1 and not any(w[1:]):
            assert torch.equal(written[i], g)
            continue
        origin = None if base is None else base[i].double()
        column = [g if origin is None else origin - g.double(), *(d[i] for d in lists)]
        (expected,) = reference.oracle_combine(column[:1], [[t] for t in column[1:]], w)
        terms = [(abs(x), t) for x, t in zip(w, column, strict=True) if t is not None and x != 0]
        if origin is not None:
            expected = origin.cpu().numpy().reshape(-1) - expected
            terms += [(1.0, origin), (1.0, g)]
        size = sum(x * t.double().cpu().abs().numpy().reshape(-1) for x, t in terms)
        inputs = [g, *(() if base is None else (base[i],)), *(d[i] for d in directions if isinstance(d, list))]
        wide = g.dtype == torch.float64 and any(t is not None and t.dtype == torch.float64 for t in inputs)
        info = torch.finfo(g.dtype)
        bound = 1.01 * info.eps / 2 * np.abs(expected) + info.smallest_normal + (1e-14 if wide else 1e-6) * size
        assert (np.abs(written[i].double().cpu().numpy().reshape(-1) - expected) <= bound).all()


def test_difference_does_not_cancel(on):
    """An update is a millionth of the parameters: products of parameters minus products of parameters would be noise."""
    rng = torch.Generator().manual_seed(0)
    n = 700 if on.slow else 7000
    base, d = (make_buffer((n,), torch.float64, "contiguous", rng, on.device) for _ in range(2))
    after = base - 1e-6 * (d + make_buffer((n,), torch.float64, "contiguous", rng, on.device))
    base32, after32 = base.float(), after.float()
    result = gradproj.gram([after32], [d.float()], base=[base32])
    assert_gram_close(result, reference.oracle_gram([base32.double() - after32.double()], [d.float()]))
    gradproj.project_([after], [d], base=[base])
    update = base - after
    assert abs(float(update @ d / update.norm() / d.norm())) < 1e-9
    assert float(update.norm()) > 5e-7 * n**0.5


def test_conflict_on_a_difference_means_descent(on):
    """The step took off what raises the direction's loss: that part is put back."""
    base, after = [torch.tensor([1.0, 1.0], device=on.device)], [torch.tensor([1.5, 0.5], device=on.device)]
    info = gradproj.project_(after, [torch.tensor([1.0, 0.0], device=on.device)], base=base, method="conflict")
    assert after[0].tolist() == [1.0, 0.5] and info.applied
    after = [torch.tensor([0.5, 0.5], device=on.device)]
    info = gradproj.project_(after, [torch.tensor([1.0, 0.0], device=on.device)], base=base, method="conflict")
    assert after[0].tolist() == [0.5, 0.5] and not info.applied


@pytest.mark.parametrize("method", ["orthogonal", "conflict"])
def test_parts_are_projected_each_by_itself(on, method):
    rng = torch.Generator().manual_seed(1)
    shapes, parts = [(40,), (5, 3), (70,), (300,)], [1, 0, 1, 3]
    g, *ds = [[make_buffer(s, torch.float32, "contiguous", rng, on.device) for s in shapes] for _ in range(3)]
    together = clone(g)
    info = gradproj.project_(together, *ds, method=method, parts=parts)
    assert info.gram.shape == (4, 3, 3) and info.weights.shape == (4, 3)
    assert info.cosine.shape == (4, 2) and info.removed.shape == (4,)
    assert info.weights[2].tolist() == [1.0, 0.0, 0.0]
    for p in (0, 1, 3):
        alone = of_part(clone(g), parts, p)
        gradproj.project_(alone, *[of_part(d, parts, p) for d in ds], method=method)
        for a, b in zip(of_part(together, parts, p), alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_part_that_is_not_finite_leaves_only_itself_alone(on):
    g = [torch.tensor([1.0, 2.0], device=on.device), torch.tensor([1.0, float("inf")], device=on.device)]
    d = [torch.tensor([1.0, 0.0], device=on.device)] * 2
    info = gradproj.project_(g, d, parts=[0, 1])
    assert g[0].tolist() == [0.0, 2.0] and g[1].tolist() == [1.0, float("inf")]
    assert info.applied and not info.finite


def test_known_gram_of_every_part(on):
    rng = torch.Generator().manual_seed(2)
    lists = [[make_buffer((90,), torch.float32, "contiguous", rng, on.device) for _ in range(2)] for _ in range(3)]
    full = gradproj.gram(*lists, parts=[1, 0])
    again = gradproj.gram(*lists, parts=[1, 0], known=full[:, 1:, 1:])
    torch.testing.assert_close(full, again, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 700), (511,), (513,)], ids=str)
def test_float8_is_within_a_sixteenth(dtype, shape):
    real = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32) * 1e-5
    t = (torch.complex(real, -real) if dtype.is_complex else real).to(dtype)
    row = float8.quantize([t, None])
    (back, absent) = float8.dequantize(row)
    values = torch.view_as_real(t) if dtype.is_complex else t
    assert absent is None and row.codes[0].element_size() == 1 and back.shape == values.shape
    largest = values.abs().max().item() if values.numel() else 0.0
    assert ((back - values.float()).abs() <= values.float().abs() / 16 + largest * 2.0**-18).all()


def test_float8_keeps_the_strides_and_closes_gaps():
    transposed, sliced = torch.randn(5, 4).t(), torch.randn(4, 9)[:, ::3]
    row = float8.quantize([transposed, sliced])
    assert row.codes[0].stride() == (1, 4) and row.codes[1].is_contiguous()
    for t, back in zip((transposed, sliced), float8.dequantize(row), strict=True):
        torch.testing.assert_close(t, back, rtol=1 / 16, atol=1e-3)


def test_every_code(on):
    """All 256 codes, the NaN of both signs left out, in aligned and odd places."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].repeat(3).view(torch.float8_e4m3fn).to(on.device)
    scales = torch.tensor([0.5, 3.0], device=on.device)
    row = float8.Float8Row([codes], [scales])
    g = [torch.zeros(codes.shape, device=on.device)]
    gradproj.combine_(g, [row], torch.tensor([0.0, 1.0], device=on.device))
    assert torch.equal(g[0], float8.dequantize(row)[0])


def test_a_float8_nan_is_seen(on):
    codes = torch.ones(600, device=on.device).to(torch.float8_e4m3fn)
    codes[590] = float("nan")
    g = [torch.ones(600, device=on.device)]
    info = gradproj.project_(g, float8.Float8Row([codes], [torch.ones(2, device=on.device)]))
    assert not info.finite and g[0].eq(1).all()


def test_refused_by_name(on):
    ones, device = torch.ones(3, device=on.device), on.device
    row = float8.quantize([ones])
    bad = [
        (ValueError, r"base has 2 entries", {"base": [ones, ones]}, [ones]),
        (ValueError, r"parts has 0 entries", {"parts": []}, [ones]),
        (ValueError, r"numbers from 0, got -1", {"parts": [-1]}, [ones]),
        (ValueError, r"base\[0\] has shape \(4,\)", {"base": [torch.ones(4, device=device)]}, [ones]),
        (ValueError, r"directions\[0\]\[0\].*needs \(1,\) float32 scales", {}, float8.Float8Row(row.codes, [ones])),
        (ValueError, r"directions\[0\].scales has 2 entries", {}, float8.Float8Row(row.codes, [ones, ones])),
        (TypeError, r"directions\[0\]\[0\] has dtype torch.float32", {}, float8.Float8Row([ones], [ones[:1]])),
        (TypeError, r"directions\[0\]\[0\] has dtype torch.float8_e4m3fn \(shape", {}, row.codes),
    ]
    for error, message, kwargs, direction in bad:
        g = [torch.full((3,), 2.0, device=device)]
        with pytest.raises(error, match=message):
            gradproj.project_(g, direction, **kwargs)
        assert g[0].eq(2.0).all()
    with pytest.raises(TypeError, match="grads is a Float8Row"):
        gradproj.project_(row, [ones])


def test_opcheck(on):
    def make():
        return [torch.randn(4, 3, device=on.device), torch.randn(70, device=on.device)]

    rule = methods.parse("conflict")
    op = on.namespace.project_.default
    torch.library.opcheck(op, (make(), make(), *rule, None, make(), None, [1, 0], 2))
    row = float8.quantize(make())
    # the check of schemas perturbs its inputs by arithmetic that torch does not have for float8
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (make(), row.codes, *rule, None, None, row.scales), test_utils=checks)
