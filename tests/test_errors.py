"""Everything that is refused: the type of the error, what it names, and that nothing was written."""

import pytest
import torch

import gradproj


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


def shared_pair():
    storage = ones(10)
    return storage[:6], storage[4:]


# (grads, directions, error, what the message names)
# fmt: off
CASES = {
    "shape": ([ones(2), ones(64, 3)], [[ones(2), ones(3, 64)]], ValueError,
              r"directions\[0\]\[1\] has shape \(3, 64\)"),
    "broadcastable shape": ([ones(4, 3)], [[ones(3)]], ValueError, r"directions\[0\]\[0\] has shape \(3,\)"),
    "length": ([ones(2), ones(3)], [[ones(2), ones(3)], [ones(2)]], ValueError, r"directions\[1\] has 1 entries"),
    "integer": ([ones(2), ones(3).long()], [[ones(2), ones(3)]], TypeError, r"grads\[1\] has dtype torch.int64"),
    "boolean": ([ones(2)], [[ones(2).bool()]], TypeError, r"directions\[0\]\[0\] has dtype torch.bool"),
    "float8": ([ones(2)], [[ones(2).to(torch.float8_e4m3fn)]], TypeError,
               r"directions\[0\]\[0\] has dtype torch.float8"),
    "sparse": ([ones(2), ones(3).to_sparse()], [[ones(2), ones(3)]], NotImplementedError, r"grads\[1\] has layout"),
    "sparse direction": ([ones(3)], [[ones(3).to_sparse()]], NotImplementedError, r"directions\[0\]\[0\] has layout"),
    "not a tensor": ([ones(2)], [[[1.0, 2.0]]], TypeError, r"directions\[0\]\[0\] is a list"),
    "number in grads": ([1.0], [[ones(2)]], TypeError, r"grads\[0\] is a float"),
    "tensor for a list": (ones(2), [[ones(2)]], TypeError, "grads is a tensor"),
    "expanded gradient": ([ones(2), ones(3).expand(4, 3)], [[ones(2), ones(4, 3)]], ValueError,
                          r"grads\[1\].*overlaps itself"),
    "no direction": ([ones(2)], [], ValueError, "at least one direction"),
    "another device": ([ones(2)], [[ones(2, device="meta")]], ValueError, r"directions\[0\]\[0\] is on meta"),
    "conjugated": ([ones(2).cfloat().conj()], [[ones(2).cfloat()]], NotImplementedError,
                   r"grads\[0\] is a lazy conjugate"),
    "real against complex": ([ones(2).cfloat()], [[ones(2)]], ValueError, r"directions\[0\]\[0\] has shape"),
    "behind a None": ([None, ones(2), ones(4)], [[None, ones(2), ones(5)]], ValueError,
                      r"directions\[0\]\[2\] has shape \(5,\) but grads\[2\] has shape \(4,\)"),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("call", ["project_", "combine_"])
def test_refused_by_name(on, name, call):
    grads, directions, error, message = CASES[name]
    if on.device != "cpu":
        pytest.skip("buffers of these cases are on the CPU")
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in grads]
    with pytest.raises(error, match=message):
        if call == "project_":
            gradproj.project_(grads, *directions)
        else:
            gradproj.combine_(grads, directions, torch.full((1 + len(directions),), 0.5))
    for t, old in zip(grads, before, strict=True):
        if isinstance(t, torch.Tensor):
            assert torch.equal(t.to_dense() if t.is_sparse else t, old.to_dense() if old.is_sparse else old)


def test_memory_written_twice(on):
    a, b = shared_pair()
    for pair in ((a, b), (a, a), (b, a)):
        with pytest.raises(ValueError, match="share memory"):
            gradproj.project_(pair, [ones(t.shape) for t in pair])
    assert torch.equal(a, ones(6)) and torch.equal(b, ones(6))


def test_direction_that_partly_overlaps_a_gradient(on):
    a, b = shared_pair()
    with pytest.raises(ValueError, match=r"share memory"):
        gradproj.project_([a], [b])
    with pytest.raises(ValueError, match=r"share memory"):  # the whole of it, but of another parameter
        gradproj.project_([a, ones(6)], [ones(6), a])
    square = ones(3, 3)
    with pytest.raises(ValueError, match=r"share memory"):  # the same elements in another order
        gradproj.project_([square], [square.t()])


def test_interleaved_views_do_not_share_memory(on):
    """Their byte ranges overlap, their elements do not: the halves of a fused projection are ordinary input."""
    storage = torch.arange(24.0).view(4, 6)
    pairs = [(storage[:, :3], storage[:, 3:]), (storage[:, ::2], storage[:, 1::2]), (storage[::2], storage[1::2])]
    for a, b in pairs:
        storage.copy_(torch.arange(24.0).view(4, 6))
        gradproj.combine_([a], [[b]], torch.tensor([1.0, 1.0]))
        gradproj.combine_([a, b], [[a, b]], torch.tensor([0.5, 0.5]))
        assert a.sum() + 2 * b.sum() - b.sum() == torch.arange(24.0).sum() + b.sum()


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("orthogonl", ValueError, "unknown method 'orthogonl'"),
        ("mix", ValueError, 'pass \\("mix", gamma\\)'),
        (("mix",), ValueError, "the only pair"),
        (("mix", float("nan")), ValueError, "finite gamma"),
        (("pull", 1.0), ValueError, "the only pair"),
        (3, TypeError, "must be a name"),
    ],
)
def test_unknown_method(method, error, message):
    g = [ones(2)]
    with pytest.raises(error, match=message):
        gradproj.project_(g, [ones(2)], method=method)
    assert torch.equal(g[0], ones(2))


@pytest.mark.parametrize("eps", [-1e-8, float("nan")])
def test_negative_eps(eps):
    with pytest.raises(ValueError, match="eps must be >= 0"):
        gradproj.project_([ones(2)], [ones(2)], eps=eps)


def test_weights_of_the_wrong_shape(on):
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        gradproj.combine_([ones(2)], [[ones(2)]], ones(3))
    with pytest.raises(ValueError, match=r"shape \(2,\), got list"):
        gradproj.combine_([ones(2)], [[ones(2)]], [1.0, 2.0])


def test_gram_without_rows():
    with pytest.raises(ValueError, match="at least one list"):
        gradproj.gram()


def test_unknown_and_unavailable_backend():
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"), gradproj.use_backend("cudnn"):
        pass
    if not torch.cuda.is_available():
        message = "'cuda' is not available: torch sees no CUDA device"
        with pytest.raises(RuntimeError, match=message), gradproj.use_backend("cuda"):
            pass


def test_backend_for_another_device():
    with gradproj.use_backend("torch"), pytest.raises(ValueError, match="not on vulkan"):
        from gradproj.kernels.backends import select

        select("vulkan")


def test_uninitialised_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        gradproj.project_([ones(2)], [ones(2)], sharding=gradproj.Sharding("world"))
