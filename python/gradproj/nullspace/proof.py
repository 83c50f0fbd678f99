"""That a capture has heard every use of a weight: its gradient is the sum of y x^T over the calls of its modules.

A weight may be multiplied by where no hook hears it: by a functional call, by a loss that is fused with the head, by an
adapter that rescales. What it computes there would not be protected. In every backward pass of a capture both sides are
multiplied by one vector v of random signs, which finds any difference for the cost of a few matrix-vector products, and
holds no matrix.

Source: Freivalds 1977, "Probabilistic machines can use less running time".
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from gradproj.nullspace.layers import Layer, call_input, input_rows, is_product, matrix, output_rows
from gradproj.nullspace.precision import eps, wide, without_autocast
from gradproj.rows.dtensors import is_dtensor


class _Sums:
    """Of one layer in one backward pass. Sums over tokens are [outputs].

    Attributes:
        heard: sum of y (x . v).
        gradient: G v; None until the weight has one.
        size2: sum of |y|^2 |x|^2, and of |G|^2: squares of what was rounded.
        tokens, eps: how many were summed, and the coarsest rounding of any number.
    """

    def __init__(self) -> None:
        self.heard: Tensor | None = None
        self.gradient: Tensor | None = None
        self.size2: Tensor | float = 0.0
        self.tokens, self.eps = 0, 0.0

    def error(self) -> Tensor:
        """[2]: the difference of the sides, and what rounding explains of it, as parts of the larger side."""
        assert self.gradient is not None
        heard = torch.zeros_like(self.gradient) if self.heard is None else self.heard
        larger = torch.maximum(heard.norm(), self.gradient.norm())
        # Inputs, outputs and the gradient are rounded once or twice each; a float32 sum loses a few bits more.
        allowed = 2 * self.eps + 8 * torch.finfo(torch.float32).eps * max(1, self.tokens) ** 0.5
        rounding = allowed * torch.as_tensor(self.size2).sqrt()
        return (torch.stack([(heard - self.gradient).norm(), rounding.to(larger)]) / larger).double().cpu()


class Proof:
    """Listens to the calls and the gradients of ``layers``, and compares them whenever a backward pass ends.

    A weight that is sharded where it is multiplied by (tensor parallelism) has no whole gradient and is not proved;
    under FSDP2 it is whole there.

    Attributes:
        silent: numbers of layers whose module returns something else than its product, so that it cannot be heard.
    """

    def __init__(self, layers: Sequence[Layer]):
        self._layers = layers
        self.silent: set[int] = set()
        self._outputs = [None if layer.to_zero else layer.outputs for layer in layers]
        self._inputs = [matrix(layer.owner, layer.weight).shape[1] for layer in layers]
        self._signs: dict[tuple, Tensor] = {}
        self._watched: dict[int, Tensor] = {}  # by identity, and alive, so that no other tensor gets it
        self._passes: dict[int, dict[int, _Sums]] = {}  # by the number of the backward pass, then of the layer
        self._handles: list = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """
        Raises:
            RuntimeError: out of ``backward()``: a gradient is not what was heard; it names the layer.
        """
        try:
            for l, layer in enumerate(self._layers):
                self._watch(l, layer.owner)
                for module in layer.products:
                    self._listen(l, module)
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles, self._watched, self._passes = [], {}, {}

    def _listen(self, l: int, module: nn.Module) -> None:
        product: Tensor | None = None
        coarse = 0.0  # how the inputs are rounded; not asked of a tensor, which would wait for the device

        def before(module, args, kwargs):
            nonlocal product, coarse
            self._watch(l, module)  # FSDP2 puts another tensor there for the call
            x = call_input(module, args, kwargs)[0].detach()
            heard = torch.is_grad_enabled() and not is_dtensor(module.weight)
            product, coarse = self._multiply(l, module, x) if heard else None, eps(x)

        def after(module, args, y):
            if not is_product(module, self._outputs[l], y):
                self.silent.add(l)
            elif product is not None and y.requires_grad:
                y.register_hook(partial(self._hear, l, module, product, coarse))

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))

    def _multiply(self, l: int, module: nn.Module, x: Tensor) -> Tensor:
        """[2, tokens]: x . v and |x|^2, the bias's 1 included."""
        with torch.no_grad(), without_autocast(x.device):
            rows = wide(input_rows(module, x))
            one = float(self._layers[l].bias is not None)
            return torch.stack([rows @ self._v(l, rows), torch.linalg.vector_norm(rows, dim=1).square()]) + one

    def _v(self, l: int, like: Tensor) -> Tensor:
        """Random signs, one for each input without the bias's."""
        inputs = self._inputs[l]
        key = inputs, like.device, like.dtype
        if key not in self._signs:
            bits = torch.randint(2, (inputs,), generator=torch.Generator().manual_seed(inputs))
            self._signs[key] = (2 * bits - 1).to(like)
        return self._signs[key]

    def _watch(self, l: int, module: nn.Module) -> None:
        parts = {False: module.weight, True: None if self._layers[l].bias is None else module.bias}
        for is_bias, t in parts.items():
            if isinstance(t, Tensor) and id(t) not in self._watched and t.requires_grad and not is_dtensor(t):
                self._watched[id(t)] = t
                self._handles.append(t.register_hook(partial(self._take, l, is_bias)))

    def _sums(self, l: int) -> _Sums:
        number = torch._C._current_graph_task_id()
        if number not in self._passes:
            self._passes[number] = {}
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._compare(number))
        return self._passes[number].setdefault(l, _Sums())

    @torch.no_grad()
    def _hear(self, l: int, module: nn.Module, product: Tensor, coarse: float, gradient: Tensor) -> None:
        sums = self._sums(l)
        with without_autocast(gradient.device):
            y = wide(output_rows(module, gradient.detach()))
            heard, size2 = product[0].to(y) @ y, product[1].to(y) @ torch.linalg.vector_norm(y, dim=1).square()
        sums.heard = heard if sums.heard is None else sums.heard + heard
        sums.size2 = sums.size2 + size2
        sums.tokens += len(y)
        sums.eps = max(sums.eps, eps(gradient), coarse)

    @torch.no_grad()
    def _take(self, l: int, is_bias: bool, gradient: Tensor) -> None:
        sums = self._sums(l)
        with without_autocast(gradient.device):
            own = wide(gradient.detach())
            taken = own if is_bias else matrix(self._layers[l].owner, own) @ self._v(l, own)
        sums.gradient = taken if sums.gradient is None else sums.gradient + taken
        sums.size2 = sums.size2 + torch.linalg.vector_norm(own).square()
        sums.eps = max(sums.eps, eps(gradient))

    def _compare(self, number: int) -> None:
        found = {l: s for l, s in self._passes.pop(number).items() if s.gradient is not None and l not in self.silent}
        if not found:
            return
        errors = torch.stack([sums.error() for sums in found.values()]).tolist()
        for (l, sums), (difference, rounding) in zip(found.items(), errors, strict=True):
            if difference > rounding:  # False where something is not finite: that is said when the capture ends
                raise RuntimeError(_said(self._layers[l], sums, difference))


def _said(layer: Layer, sums: _Sums, difference: float) -> str:
    stock = (nn.Linear.forward, nn.Conv2d.forward)
    own = [type(m).__name__ for m in layer.products if type(m).forward not in stock and not layer.to_zero]
    other = f"; or {own[0]} overrides forward, and what it returns is not the product" if own else ""
    if sums.heard is None:
        part, uses = "none", "its weight is used outside of its module only"
    else:
        part, uses = f"{difference:.1%}", "its weight is also used outside of its module"
        part = f"all but {part}"
    return (
        f"NullSpace: the calls of layer {layer.name} explain {part} of its gradient: {uses} (a functional call, a loss that is fused "
        f"with it, an adapter or a parametrization){other}. What it computes there would not be protected; leave it out with "
        f"modules=, and it is held"
    )
