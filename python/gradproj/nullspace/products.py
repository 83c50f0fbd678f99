"""How torch's functions multiply by a matrix that trains: of a call its input, and of each matrix its rows of both."""

import functools
import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gradproj.nullspace.matrices import At

SMALLEST = 32  # weights of a slice; what is smaller, such as a depthwise filter, is held as a norm is


class Part(NamedTuple):
    """One matrix in one call.

    Attributes:
        at, bias: where the weight and the bias are; the bias None if it does not train.
        rows: the call's input -> [tokens, inputs].
        outputs: what the call returns, or its gradient -> [tokens, outputs].
        reading: equal for calls on one input if ``rows`` gives the same.
    """

    at: At
    bias: At | None
    rows: Callable[[Tensor], Tensor]
    outputs: Callable[[Tensor], Tensor]
    reading: tuple


class Heard(NamedTuple):
    """One call: its input, the operands that it is multiplied by (the biases that train among them), and its parts."""

    input: Tensor
    weights: tuple[Tensor, ...]
    parts: list[Part]


class Find(Protocol):
    def __call__(
        self, operand: Tensor, outputs: Sequence[int], inputs: Sequence[int] = (), part: Tensor | None = None
    ) -> At | None:
        """Where ``operand``, or a slice ``part`` of it, lies in a parameter; None if it does not.

        Args:
            outputs, inputs: the dimensions of the part that are read as such.
        """


def _linear(find: Find, input, weight, bias=None) -> Heard | None:
    tokens = "abcdefgh"[: input.dim() - 1]
    return _contract(find, input, weight, f"{tokens}i", "oi", f"{tokens}o", bias)


def _matmul(find: Find, a, b, bias=None) -> Heard | None:
    many = "abcdefgh"
    forms = []  # of a weight on the right, and of one on the left
    if b.dim() == 2:
        forms.append((a, b, f"{many[: a.dim() - 1]}i", "io", f"{many[: a.dim() - 1]}o"))
    elif b.dim() == 3 and a.dim() == 3 and len(a) == len(b):
        forms += [(a, b, "eti", "eio", "eto"), (b, a, "eit", "eoi", "eot")]
    elif b.dim() == 3 and a.dim() == 2:
        forms.append((a, b, "ti", "eio", "eto"))
    if a.dim() == 2:
        tokens = many[: b.dim() - 2] if b.dim() > 1 else ""
        after = "t" if b.dim() > 1 else ""
        forms.append((b, a, f"{tokens}i{after}", "oi", f"{tokens}o{after}"))
    return _first(find, forms, bias)


def _addmm(find: Find, bias, a, b, *, beta=1, alpha=1) -> Heard | None:
    if beta != 1 or alpha != 1:
        return None
    return _matmul(find, a, b, bias if bias.dim() == 1 and b.requires_grad else None)


def _einsum(find: Find, equation, *operands) -> Heard | None:
    if len(operands) == 1 and not isinstance(operands[0], Tensor):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return None
    left, y = equation.replace(" ", "").split("->")
    a, b = left.split(",")
    return _first(find, [(*operands, a, b, y), (*reversed(operands), b, a, y)])


def _first(find: Find, forms, bias=None) -> Heard | None:
    """The form that is a product with a parameter; none if both operands are one, which makes a weight."""
    for x, w, of_x, of_w, of_y in forms:
        if w.requires_grad and not (x.requires_grad and find(x, range(x.dim()))):
            heard = _contract(find, x, w, of_x, of_w, of_y, bias)
            if heard:
                return heard
    return None


def _contract(find: Find, x: Tensor, w: Tensor, of_x: str, of_w: str, of_y: str, bias=None) -> Heard | None:
    """Of ``einsum(f"{of_x},{of_w}->{of_y}", x, w)``: a matrix for each index that both operands have and the result
    too."""
    if not w.requires_grad or any(len(set(letters)) < len(letters) for letters in (of_x, of_w, of_y)):
        return None
    batch = [c for c in of_w if c in of_x and c in of_y]
    inputs = [c for c in of_w if c in of_x and c not in of_y]
    outputs = [c for c in of_w if c not in of_x and c in of_y]
    tokens = [c for c in of_x if c not in of_w and c in of_y]
    if not inputs or not outputs or {*batch, *inputs, *outputs} != {*of_w} or {*batch, *inputs, *tokens} != {*of_x}:
        return None
    if not _is_one(w, [of_w.index(c) for c in inputs]):
        return None
    if not _is_one(w, [of_w.index(c) for c in outputs]):
        batch, outputs = batch + outputs[:-1], outputs[-1:]
    sizes = dict(zip(of_w, w.shape, strict=True))
    there = "".join(c for c in of_w if c not in batch)
    slices = w.detach().permute([of_w.index(c) for c in [*batch, *there]])
    of_bias = find(bias, [0]) if bias is not None and bias.requires_grad else None
    parts = []
    for index in itertools.product(*(range(sizes[c]) for c in batch)):
        at = find(w, [there.index(c) for c in outputs], [there.index(c) for c in inputs], slices[index])
        if at is None:
            return None
        pick = dict(zip(batch, index, strict=True))
        rows = functools.partial(_rows, letters=of_x, pick=pick, last=inputs)
        made = functools.partial(_rows, letters=of_y, pick=pick, last=outputs)
        parts.append(Part(at, of_bias, rows, made, (of_x, *inputs, *(i for c, i in pick.items() if c in of_x))))
    return Heard(x, (w, bias) if of_bias else (w,), parts)


def _is_one(w: Tensor, dims: Sequence[int]) -> bool:
    """Whether these dimensions count as one."""
    return all(w.stride(a) == w.stride(b) * w.shape[b] for a, b in itertools.pairwise(dims))


def _rows(t: Tensor, letters: str, pick: dict[str, int], last: Sequence[str]) -> Tensor:
    """[tokens, the dimensions ``last``] of the slice ``pick``."""
    for letter, index in pick.items():
        if letter in letters:
            t = t.select(letters.index(letter), index)
            letters = letters.replace(letter, "")
    first = [c for c in letters if c not in last]
    t = t.permute([letters.index(c) for c in [*first, *last]])
    return t.reshape(-1, t.shape[len(first) :].numel())


def _convolution(
    find: Find, input, weight, bias=None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Heard | None:
    whole = find(weight, [0], range(1, weight.dim())) if weight.requires_grad else None
    if whole is None or (groups > 1 and weight.numel() // groups < SMALLEST):
        return None
    dims = weight.dim() - 2
    stride, dilation = (n if isinstance(n, Sequence) else (n,) * dims for n in (stride, dilation))
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = [(s // 2, s - s // 2) for s in spans]
    else:
        padding = 0 if padding == "valid" else padding
        sides = [(p, p) for p in (padding if isinstance(padding, Sequence) else (padding,) * dims)]
    pads = [n for side in reversed(sides) for n in side]
    of_bias = find(bias, [0]) if bias is not None and bias.requires_grad else None
    parts = []
    for g in range(groups):
        rows = functools.partial(_patches, weight=weight.shape, pads=pads, stride=stride, dilation=dilation, group=g)
        made = functools.partial(_pixels, dims=dims, groups=groups, group=g)
        reading = (*weight.shape[1:], *pads, *stride, *dilation, g)
        parts.append(Part(_group(whole, g, groups), of_bias and _group(of_bias, g, groups), rows, made, reading))
    return Heard(input, (weight, bias) if of_bias else (weight,), parts)


def _group(at: At, g: int, groups: int) -> At:
    region = at.region
    d = region.outputs[0]
    begin, end = region.ranges[d]
    count = (end - begin) // groups
    mine = (begin + g * count, begin + (g + 1) * count)
    return at._replace(region=region._replace(ranges=(*region.ranges[:d], mine, *region.ranges[d + 1 :])))


def _patches(x: Tensor, weight: torch.Size, pads, stride, dilation, group: int) -> Tensor:
    """[tokens, inputs] of one group: for each output position what the filter covers, channels first."""
    channels, *kernel = weight[1:]
    x = x if x.dim() == len(weight) else x.unsqueeze(0)
    x = F.pad(x[:, group * channels : (group + 1) * channels], pads)
    for d, (k, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(d, apart * (k - 1) + 1, step)[..., ::apart]
    return x.movedim(1, len(kernel) + 1).reshape(-1, weight[1:].numel())


def _pixels(y: Tensor, dims: int, groups: int, group: int) -> Tensor:
    y = y if y.dim() == dims + 2 else y.unsqueeze(0)
    y = y.movedim(1, -1)
    return y.reshape(-1, y.shape[-1]).chunk(groups, 1)[group]


def _grouped_mm(find: Find, a, b, offs=None, bias=None, out_dtype=None) -> Heard | None:
    if offs is None or bias is not None or (a.dim(), b.dim()) != (2, 3) or not b.requires_grad:
        return None
    parts = []
    ends = [0] * len(offs) if offs.is_meta else offs.tolist()  # without values no token goes anywhere
    for e, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        at = find(b, [1], [0], b.detach()[e])
        if at is None:
            return None
        take = functools.partial(_between, begin=begin, end=end)
        parts.append(Part(at, None, take, take, (e, begin, end)))
    return Heard(a, (b,), parts)


def _between(t: Tensor, begin: int, end: int) -> Tensor:
    return t[begin:end]


def look_up(find: Find, tokens, weight, *settings, **others) -> Heard | None:
    """Of ``F.embedding``: a matrix of a single input, which is 1, for each token. Without operands that it is
    multiplied by: what is looked up has a gradient by them alone."""
    if not weight.requires_grad or tokens.is_meta or find(weight, [1], [0]) is None:
        return None
    parts = []
    for token in tokens.unique().tolist():
        at = find(weight, [1], [0], weight.detach()[token : token + 1])
        if at is None:
            return None
        rows, made = functools.partial(_ones, token=token), functools.partial(_of_token, tokens=tokens, token=token)
        parts.append(Part(at, None, rows, made, (token,)))
    return Heard(tokens, (), parts)


def _ones(tokens: Tensor, token: int) -> Tensor:
    return torch.ones(int((tokens == token).sum()), 1, device=tokens.device)


def _of_token(y: Tensor, tokens: Tensor, token: int) -> Tensor:
    return y[tokens == token]


def _by_position(reader: Callable, *settings: str) -> Callable[..., Heard | None]:
    """The reader of a function whose operands may be given by name; torch has several names for the second."""
    first = ("self", "input", "mat_a", "mat1", "batch1")

    def read(find: Find, *args, **kwargs) -> Heard | None:
        operands = sorted(kwargs.keys() - set(settings), key=lambda k: first.index(k) if k in first else len(first))
        return reader(find, *args, *map(kwargs.get, operands), **{k: kwargs[k] for k in settings if k in kwargs})

    return read


_product, _sum = _by_position(_matmul), _by_position(_addmm, "beta", "alpha")
_READERS: dict[Any, Callable[..., Heard | None]] = {
    F.linear: _linear,
    **dict.fromkeys([torch.matmul, torch.mm, torch.bmm], _product),
    **dict.fromkeys([Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm], _product),
    Tensor.__rmatmul__: lambda find, a, b: _matmul(find, b, a),
    **dict.fromkeys([torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm], _sum),
    torch.einsum: _einsum,
    **dict.fromkeys([F.conv1d, F.conv2d, F.conv3d], _convolution),
    **dict.fromkeys(
        [torch._grouped_mm, getattr(F, "grouped_mm", torch._grouped_mm)],
        _by_position(_grouped_mm, "offs", "bias", "out_dtype"),
    ),
}


def read(func: Any, find: Find, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Heard | None:
    """What a call of ``func`` is heard as; None if it is no product with a parameter. One into ``out=`` has no
    gradient."""
    if func not in _READERS or kwargs.get("out") is not None:
        return None
    return _READERS[func](find, *args, **{name: value for name, value in kwargs.items() if name != "out"})


# Functions whose result has the values of their first argument, in another dtype or place.
CASTS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16,
         Tensor.contiguous, Tensor.clone, torch.clone}  # fmt: skip


def _opened(function: types.FunctionType) -> types.FunctionType:
    """The function without the question whether somebody overrides it, so that what it calls is heard."""
    never = dict.fromkeys((n for n in function.__globals__ if n.startswith("has_torch_function")), lambda *_: False)
    names = {**function.__globals__, **never}
    opened = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


# Attention multiplies inside; gradient checkpointing does everything again in the backward pass.
OPENED: dict[Any, Callable] = {
    function: _opened(function)  # type: ignore[arg-type]
    for function in (F.multi_head_attention_forward, Tensor.backward, torch.autograd.backward, torch.autograd.grad)
}
HEARD = {*_READERS, *CASTS, *OPENED, F.embedding}
