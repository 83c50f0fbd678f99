"""That a capture has heard every use of a parameter: its gradient is the sum of y x^T over the products.

A parameter may be used elsewise: by a penalty on weights, an adapter that rescales, an operation that is not read. What
it does there would not be protected. In every backward pass of a capture both sides are multiplied by one vector v
of random signs, which finds any difference for the cost of a few matrix-vector products, and holds no matrix.

Source: Freivalds 1977, "Probabilistic machines can use less running time".
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradproj.nullspace.matrices import Slot
from gradproj.nullspace.precision import eps, wide, without_autocast
from gradproj.nullspace.products import At, Part
from gradproj.nullspace.regions import Region
from gradproj.rows.dtensors import is_dtensor


class _Sums:
    """Of one matrix in one backward pass. Sums over tokens are [outputs].

    Attributes:
        heard: sum of y (x . v).
        gradient: G v, the bias's added; None until there is one.
        size2: sum of |y|^2 |x|^2, and of |G|^2: squares of what was rounded.
        tokens, eps: how many were summed, and the coarsest rounding of any number.
    """

    def __init__(self) -> None:
        self.heard: Tensor | float = 0.0
        self.gradient: Tensor | None = None
        self.size2: Tensor | float = 0.0
        self.tokens, self.eps = 0, 0.0

    def hear(self, product: Tensor, size2: Tensor, tokens: int, coarse: float) -> None:
        self.heard = self.heard + product
        self.size2 = self.size2 + size2
        self.tokens += tokens
        self.eps = max(self.eps, coarse)

    def take(self, product: Tensor, gradient: Tensor, coarse: float) -> None:
        self.gradient = product if self.gradient is None else self.gradient + product
        self.eps = max(self.eps, coarse)
        if self.eps > torch.finfo(torch.float32).eps:  # else the sum over tokens is allowed more than this would add
            self.size2 = self.size2 + torch.linalg.vector_norm(gradient).square()

    def error(self) -> Tensor:
        """[2]: the difference of the sides, and what rounding explains of it, as parts of the larger side."""
        assert self.gradient is not None and isinstance(self.heard, Tensor)
        larger = torch.maximum(self.heard.norm(), self.gradient.norm())
        # Inputs, outputs and the gradient are rounded once or twice each; a float32 sum loses a few bits more.
        allowed = 2 * self.eps + 8 * torch.finfo(torch.float32).eps * max(1, self.tokens) ** 0.5
        rounding = allowed * torch.as_tensor(self.size2).sqrt()
        return (torch.stack([(self.heard - self.gradient).norm(), rounding.to(larger)]) / larger).double().cpu()


class _Pass:
    """One backward pass.

    Attributes:
        unheard: of parameters that were in no product, whether their gradient is not zero.
        outside: of parameters of which parts were in a product, how much of the gradient's sum lies elsewhere.
    """

    def __init__(self) -> None:
        self.unheard: dict[str, Tensor] = {}
        self.outside: dict[str, Tensor] = {}
        self._sums: dict[At, _Sums] = {}
        self._of: dict[str, list[tuple[_Sums, Region]]] = {}  # by the names of weights and biases

    def sums(self, part: Part) -> _Sums:
        if part.at not in self._sums:
            self._sums[part.at] = _Sums()
            for at in (part.at, part.bias):
                if at is not None:
                    self._of.setdefault(at.slot.name, []).append((self._sums[part.at], at.region))
        return self._sums[part.at]

    def of(self, name: str) -> list[tuple[_Sums, Region]]:
        return self._of.get(name, [])

    @property
    def heard(self) -> set[str]:
        return set(self._of)

    def all(self) -> list[tuple[str, _Sums]]:
        return [(at.slot.name, sums) for at, sums in self._sums.items()]


class Proof:
    """Compares whenever a backward pass ends; a listener of :class:`gradproj.nullspace.hearing.Hearing`.

    A parameter that is sharded where it is multiplied by (tensor parallelism) has no whole gradient and is not proved;
    under FSDP2 it is whole there.

    Attributes:
        unheard: names of parameters that had a gradient in some backward pass, but were in no product of it.
        heard: of those that were in one.
    """

    def __init__(self, tick: Callable[[], object] = lambda: None) -> None:
        """``tick``: called after every backward pass."""
        self._tick = tick
        self.unheard: set[str] = set()
        self.heard: set[str] = set()
        self._signs: dict[tuple, Tensor] = {}
        self._watched: dict[int, Tensor] = {}  # by identity, and alive, so that no other tensor gets it
        self._passes: dict[int, _Pass] = {}  # by the number of the backward pass
        self._handles: list = []

    @contextlib.contextmanager
    def listening(self, slots: Sequence[Slot]) -> Iterator[None]:
        """
        Raises:
            RuntimeError: a gradient is not what was heard, out of ``backward()`` or at the end; it names the parameter.
        """
        try:
            for slot in slots:
                self._watch(slot)
            yield
            for name in sorted(self.heard & self.unheard):
                raise RuntimeError(_said(name, "none", " in one of the backward passes"))
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles, self._watched, self._passes = [], {}, {}

    def before(self, x: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Any]:
        for part in parts:
            for at in (part.at, part.bias):
                if at is not None:
                    self._watch(at.slot)  # FSDP2 puts another tensor there for the call
        proved = [part for part in parts if not part.at.consumer and not is_dtensor(part.at.slot.get())]
        # How inputs are rounded is not asked of a tensor, which would wait for the device.
        return x, [(part, self._multiply(part, x.detach()), eps(x)) for part in proved]

    def after(self, call: Any, y: Tensor) -> None:
        if call:
            y.register_hook(partial(self._hear, call))

    def _multiply(self, part: Part, x: Tensor) -> Tensor:
        """[2, tokens]: x . v and |x|^2, the bias's 1 included."""
        with torch.no_grad(), without_autocast(x.device):
            rows = wide(part.rows(x))
            one = float(part.bias is not None)
            return torch.stack([rows @ self._v(rows), torch.linalg.vector_norm(rows, dim=1).square()]) + one

    def _v(self, like: Tensor) -> Tensor:
        """Random signs, one for each input without the bias's, which is the last dimension of ``like``."""
        key = like.shape[-1], like.device, like.dtype
        if key not in self._signs:
            bits = torch.randint(2, (key[0],), generator=torch.Generator().manual_seed(key[0]))
            self._signs[key] = (2 * bits - 1).to(like)
        return self._signs[key]

    def _watch(self, slot: Slot) -> None:
        t = slot.get()
        if id(t) not in self._watched and t.requires_grad and not is_dtensor(t):
            self._watched[id(t)] = t
            self._handles.append(t.register_hook(partial(self._take, slot)))

    def _pass(self) -> "_Pass":
        number = torch._C._current_graph_task_id()
        if number not in self._passes:
            self._passes[number] = _Pass()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._compare(number))
        return self._passes[number]

    @torch.no_grad()
    def _hear(self, call: list[tuple[Part, Tensor, float]], gradient: Tensor) -> None:
        found = self._pass()
        for part, product, coarse in call:
            with without_autocast(gradient.device):
                y = wide(part.outputs(gradient.detach()))
                heard, size2 = product[0].to(y) @ y, product[1].to(y) @ torch.linalg.vector_norm(y, dim=1).square()
            found.sums(part).hear(heard, size2, len(y), max(eps(gradient), coarse))

    @torch.no_grad()
    def _take(self, slot: Slot, gradient: Tensor) -> None:
        found = self._pass()
        mine, gradient = found.of(slot.name), gradient.detach()
        if not mine:
            found.unheard[slot.name] = gradient.any()
            return
        explained: list[Tensor] = []
        in_part = sum(region.cut(gradient).numel() for _, region in mine) < gradient.numel()
        with without_autocast(gradient.device):
            for sums, region in mine:
                own = wide(region.matrix(gradient))
                sums.take(own if own.dim() == 1 else own @ self._v(own), own, eps(gradient))
                if in_part:
                    explained.append(own.abs().sum(dtype=torch.float64))
        if in_part:
            found.outside[slot.name] = 1 - sum(explained) / gradient.abs().sum(dtype=torch.float64)

    def _compare(self, number: int) -> None:
        self._tick()
        found = self._passes.pop(number)
        self.unheard |= {name for name, there in found.unheard.items() if bool(there)}
        self.heard |= found.heard
        taken = [(name, sums) for name, sums in found.all() if sums.gradient is not None]
        errors = [sums.error() for _, sums in taken]
        errors += [torch.stack([part, part.new_tensor(1e-5)]).cpu() for part in found.outside.values()]
        names = [*(name for name, _ in taken), *found.outside]
        if not errors:
            return
        for name, (difference, rounding) in zip(names, torch.stack(errors).tolist(), strict=True):
            if difference > rounding:  # False where something is not finite: that is said when the capture ends
                raise RuntimeError(_said(name, f"all but {difference:.1%}"))


def _said(name: str, part: str, where: str = "") -> str:
    return (
        f"NullSpace: the products that were heard explain {part} of the gradient of {name}{where}: it is also used "
        "elsewise than as a matrix that inputs are multiplied by (a penalty on weights, an adapter or a "
        "parametrization that computes with it, a fused operation). What it does there would not be protected; leave "
        "it out with modules=, and it is held"
    )
