"""Every op's schema and fake, in one place.

The same five ops exist in three namespaces: ``gradproj`` (native: C++ on CPU tensors, CUDA C++ on CUDA tensors),
``gradproj_triton`` and ``gradproj_torch``. Declared here, not in C++, they exist even when nothing was built.

``rows`` is row-major: ``num_rows`` lists of n buffers one after the other; ``None`` counts as zeros. Row 0 is the
gradient. ``gram_dd`` is the [num_rows - 1, num_rows - 1] Gram of rows 1.., copied instead of computed if it is given.

``part`` holds the number of every column's part, below ``num_parts``; then ``gram_dd``, Gram and weights have a leading
dimension of that length, and every part is projected by itself.

``pin_`` takes [o, i] weights, [i, r] bases, [o, r] targets, and the biases [o] of the weights numbered ``biased``,
whose bases are [i + 1, r]; it returns the squared Frobenius norms of W U - B before. For a bfloat16 weight a basis may
be a bfloat16 pair [2, i, r] that sums to U, which tensor cores take as it is. The native namespace leaves it to a BLAS
and has none; the one in plain torch expects its caller to have checked the arguments.

A weight of exactly 0 means that its row is not read, and weights (1, 0, .., 0) mean that nothing is read or written.
"""

import torch

_RULE = "str method, float gamma, float eps"
_PART = "int[] part=[], int num_parts=0"
SCHEMAS = (
    f"gram(Tensor?[] rows, int num_rows, Tensor? gram_dd=None, {_PART}) -> Tensor",
    f"weights(Tensor gram, {_RULE}) -> Tensor",
    f"combine_(Tensor(a!)[] grads, Tensor?[] directions, Tensor weights, {_PART}) -> ()",
    f"project_(Tensor(a!)[] grads, Tensor?[] directions, {_RULE}, Tensor? gram_dd=None, {_PART}) -> (Tensor, Tensor)",
    "pin_(Tensor(a!)[] weights, Tensor[] bases, Tensor?[] targets, Tensor(b!)[] biases, int[] biased) -> Tensor",
)
NAMESPACES = ("gradproj", "gradproj_triton", "gradproj_torch")


def _device_of(buffers) -> torch.device:
    devices = {t.device for t in buffers if t is not None}
    if len(devices) != 1:
        raise RuntimeError(f"gradproj: buffers on {len(devices)} devices")
    return devices.pop()


def _fake_gram(rows, num_rows, gram_dd=None, part=(), num_parts=0):
    lead = (num_parts,) if num_parts else ()
    return torch.empty(*lead, num_rows, num_rows, dtype=torch.float64, device=_device_of(rows))


def _fake_project_(grads, directions, method, gamma, eps, gram_dd=None, part=(), num_parts=0):
    gram = _fake_gram([*grads, *directions], 1 + len(directions) // len(grads), num_parts=num_parts)
    return gram, gram.new_empty(gram.shape[:-1])


def _fake_weights(gram, method, gamma, eps):
    return gram.new_empty(gram.shape[:-1])


def _fake_combine_(grads, directions, weights, part=(), num_parts=0):
    _device_of([*grads, *directions, weights])


def _fake_pin_(weights, bases, targets, biases, biased):
    return torch.empty(len(weights), dtype=torch.float64, device=_device_of([*weights, *bases, *targets, *biases]))


# A Library owns its registrations, so these live as long as the module.
_LIBRARIES = {namespace: torch.library.Library(namespace, "DEF") for namespace in NAMESPACES}
for _namespace, _library in _LIBRARIES.items():
    for _schema in SCHEMAS:
        _library.define(_schema)
    for _fake in (_fake_gram, _fake_weights, _fake_combine_, _fake_project_, _fake_pin_):
        torch.library.register_fake(f"{_namespace}::{_fake.__name__.removeprefix('_fake_')}", _fake, lib=_library)


def implement(namespace: str, name: str, function, dispatch_key: str) -> None:
    """Register a Python ``function`` as the implementation of ``namespace::name`` for one dispatch key."""
    _LIBRARIES[namespace].impl(name, function, dispatch_key)
