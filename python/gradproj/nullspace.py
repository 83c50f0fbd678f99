"""NullSpace: every layer keeps computing what it computed on the inputs that a capability uses."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradproj import allocation, basis_file, functional, layers, sharding
from gradproj.basis import Basis, add_earlier, local_weight, make_bases, report
from gradproj.capture import Direction, captured
from gradproj.layers import Layer
from gradproj.moments import WIDE, Gather
from gradproj.projection import Pin
from gradproj.protection import CaptureBlock, Closure, Protection

SKETCH = 512  # eigenvectors that a wide layer keeps at most, unless max_rank says otherwise


class NullSpace(Protection):
    """Pins what each layer computes on the inputs that a capability uses: after every step W <- W - (W U - B) U^T.

    U spans the inputs of largest curvature, gathered once during ordinary backward passes of the capability's loss; B = W U is
    what the layer made of them then. The statement is about the weights, not about one step: any optimizer, momentum, weight
    decay and skipped steps included, nothing accumulates, and no capability data are needed afterwards. What the capture did
    not see is not protected.

    Covered: ``nn.Linear`` and its bias, transformers' ``Conv1D``, ``nn.Conv2d`` (groups=1), and PEFT's LoRA adapters, which
    become blind to the protected inputs. Embeddings, norms and a head tied to an embedding are the rest.

    Args:
        model: whose layers are protected.
        share: of the covered weights' dimensions that is given up to the capability, in (0, 1); the memory of the bases, beside
            that of the weights, is about three times as much. The rank goes to the layers where the curvature is.
        max_rank: of a layer, at most. Layers of more than 4,096 inputs are sketched and keep at most 512 without it.
        modules: ``(name, module) -> bool``, which layers to cover; None covers all.
        space: ``"weights"`` pins after the step. ``"gradient"`` takes the part of the gradient in U out before it, for optimizers
            whose parameters are copies; Adam's scaling and weight decay then leak.
        rest: ``"hold"`` keeps all other trained parameters where they are, so that protected activations do not change at all;
            ``"train"`` lets them go.
        every: after how many steps the weights are pinned; :meth:`pin` does it now.
    Raises:
        ValueError, NotImplementedError: a setting out of range, no layer to cover.

    Example::

        protection = gradproj.NullSpace(model)
        with protection.capture():
            for batch in anchors:
                capability_loss(model, batch).backward()
        inner = torch.optim.AdamW(protection.param_groups(lr=1e-5))
        opt = gradproj.ProjectedOptimizer(inner, protection)

    Source: Saha et al. 2021 (GPM), Wang et al. 2021 (Adam-NSCL), Fang et al. 2025 (AlphaEdit) for projections into the null space
    of inputs; Martens & Grosse 2015 (K-FAC) for the curvature of a layer as inputs times output gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        share: float = 0.05,
        max_rank: int | None = None,
        modules: layers.Wanted | None = None,
        space: Literal["weights", "gradient"] = "weights",
        rest: Literal["hold", "train"] = "hold",
        every: int = 1,
    ):
        super().__init__()
        if not 0.0 < share < 1.0:
            raise ValueError(f"NullSpace: share must be between 0 and 1, got {share}")
        for name, number in (("max_rank", max_rank), ("every", every)):
            if number is not None and number < 1:
                raise ValueError(f"NullSpace: {name} must be >= 1, got {number}")
        for name, word, known in (("space", space, ("weights", "gradient")), ("rest", rest, ("hold", "train"))):
            if word not in known:
                raise ValueError(f'NullSpace: {name} must be "{known[0]}" or "{known[1]}", got {word!r}')
        self.model, self.share, self.max_rank, self.modules = model, share, max_rank, modules
        self.space, self.rest, self.every = space, rest, every
        self.layers = layers.find(model, modules)
        self.bases: dict[str, Basis] = {}  # by the layers' names
        self.last: Pin | None = None  # type: ignore[assignment]
        self._since_pin = 0
        self._held: list[tuple[Tensor, Tensor]] = []  # parameters of the rest and their gradients, during a step
        self._told_of_rest = self._told_of_nothing = False

    def __len__(self) -> int:
        """How many layers are protected now."""
        return len(self.bases)

    def clear(self) -> None:
        self.bases = {}
        self._since_pin = 0
        self._told_of_nothing = True  # it is what the caller wants

    def bind(self, optimizers: Sequence[Optimizer], sharding: sharding.Sharding | None) -> None:
        stepped = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        if not any(id(layer.weight) in stepped for layer in self.layers):
            raise ValueError(
                "this NullSpace is of another model than the optimizer's: none of its layers' weights is among the optimizer's "
                "parameters; make both from the same model, the optimizer after adapters were added"
            )
        super().bind(optimizers, sharding)

    def capture(self) -> CaptureBlock:
        """Context manager: the inputs of the layers in the backward passes inside are protected.

        Every backward pass is one batch; its gradients are dropped, and ``p.grad`` is afterwards what it was before. Needs no
        optimizer. A further block adds to what was gathered, each token counting the same; the weights are pinned first,
        so that what was protected stays.

        Raises:
            RuntimeError: no backward pass inside; a layer without a gradient; inputs that are not finite.
        """
        return CaptureBlock(self._capture())

    @contextlib.contextmanager
    def _capture(self) -> Iterator[None]:
        self._check_capture()
        self.pin()
        gather = Gather(self.layers, self._sketch)
        self._capturing = True
        try:
            with captured(lambda: [p for p in self.model.parameters() if p.requires_grad]) as taken, gather.listening():
                yield
        finally:
            self._capturing = False
        if not any(gather.tokens) and not taken.gradients:
            raise RuntimeError(f"NullSpace: {taken.why_empty()}")
        add_earlier(gather, self.layers, self.bases, self._group())
        self.bases = make_bases(gather, self.layers, self.share, self._most)
        adapters = [layer for layer in self.layers if layer.to_zero]
        if adapters:  # blind at once; the weights of other layers are their own targets
            with torch.no_grad():
                self._apply(adapters, lambda p: p.detach(), zero=False)

    def _add(self, taken: Direction) -> None:
        raise NotImplementedError("a NullSpace is made of inputs, not of gradients")

    def _group(self):
        """The ranks whose batches count together: those that share the model."""
        if self.sharding is not None and self.sharding.group is not None:
            return self.sharding.group
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return dist.group.WORLD if several else None

    def _sketch(self, layer: Layer) -> int | None:
        return 2 * (self.max_rank or SKETCH) if layer.shape[1] > WIDE else None

    def _most(self, layer: Layer) -> int | None:
        return self.max_rank or (SKETCH if layer.shape[1] > WIDE else None)

    def before_step(self, closure: Closure | None, begins: bool = True) -> Closure | None:
        self._check_step()
        if closure is not None:
            return self._guarded(closure, self._prepare_gradients)
        self._prepare_gradients()
        return None

    def after_step(self) -> None:
        for p, grad in self._held:
            p.grad = grad
        self._held = []
        if self.bases and self.space == "weights" and not self._skipped():
            self._since_pin += 1
            if self._since_pin >= self.every:
                self.pin()

    @torch.no_grad()
    def pin(self) -> Pin | None:
        """Bring the weights back to W U = B now, for evaluation and before a checkpoint; None if nothing is protected or the
        protection is in gradient space."""
        if not self.bases or self.space != "weights":
            return None
        self.last = self._apply(self.layers, lambda p: p.detach(), zero=False)
        self._since_pin = 0
        return self.last

    def project(self) -> Pin | None:  # type: ignore[override]
        if self.space == "weights":
            super().project()
        return self._project_gradients()

    @torch.no_grad()
    def _project_gradients(self) -> Pin | None:
        if not self.bases:
            return None
        self.last = self._apply(self.layers, lambda p: p.grad, zero=True)
        return self.last

    def _prepare_gradients(self) -> None:
        if not self.bases:
            if not self._told_of_nothing:
                self._told_of_nothing = True
                warnings.warn(
                    "step() before anything was captured: a plain step, nothing is protected; put the capability's backward "
                    "passes into `with opt.protect():` first",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        for layer in self.layers:
            self._trains(layer)  # an error now leaves everything as it is
        if self.space == "gradient":
            self._project_gradients()
        covered = {id(p) for layer in self.layers for p in layer.parameters}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in covered]
        if self.rest == "hold":
            # Without a gradient an optimizer leaves a parameter alone, its weight decay included.
            self._held += [(p, p.grad) for p in others if p.grad is not None]
            for p in others:
                p.grad = None
        elif others and not self._told_of_rest:
            self._told_of_rest = True
            names = {id(p): name for name, p in self.model.named_parameters()}
            shown = ", ".join(names.get(id(p), f"a parameter of shape {tuple(p.shape)}") for p in others[:8])
            warnings.warn(
                f'NullSpace(rest="train"): {len(others)} trained parameters are not covered, and change what protected layers '
                f"see: {shown}{', ..' if len(others) > 8 else ''}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _apply(self, some: Sequence[Layer], of: Callable[[Tensor], Tensor | None], zero: bool) -> Pin:
        """M <- M - (M U - B) U^T on what ``of`` gives of every weight and bias; with ``zero``, B is zeros."""
        names, weights, bases, targets, biases = [], [], [], [], []
        for layer in some:
            basis, weight = self.bases[layer.name], of(layer.weight)
            if weight is None or not basis.rank or not self._trains(layer):
                continue
            bias = None if layer.bias is None else of(layer.bias)
            names.append(layer.name)
            weights.append(layers.matrix(layer.owner, local_weight(layer, weight)))
            # A bias without a gradient beside a weight that has one would be a frozen one; then it is no input.
            bases.append(basis.vectors if layer.bias is None or bias is not None else basis.vectors[:-1])
            targets.append(None if zero else basis.target)
            biases.append(None if bias is None else sharding.local_tensors([bias])[0])
        return Pin(tuple(names), functional.pin_(weights, bases, targets, biases))

    def _trains(self, layer: Layer) -> bool:
        """Whether a layer may have moved; raises if it trains other parameters than those that were captured."""
        frozen = not layer.weight.requires_grad
        if frozen and layer.bias is None:
            return False
        if frozen or self.bases[layer.name].vectors.shape[0] != layer.shape[1]:
            raise RuntimeError(
                f"NullSpace: layer {layer.name} does not train what it trained when it was captured: its weight or bias was "
                f"frozen or freed since, or has another size; capture again"
            )
        return True

    def _skipped(self) -> bool:
        """Whether a fused optimizer has been told by a GradScaler to step over an inf: then nothing has moved."""
        found = [getattr(ref(), "found_inf", None) for ref in self._optimizers]
        return any(f is not None and bool(f) for f in found)

    def param_groups(
        self,
        lr: float,
        damping: float = 0.3,
        *,
        weight_decay: float | None = None,
        no_decay: Callable[[str, Tensor], bool] = lambda name, p: p.dim() < 2,
    ) -> list[dict[str, Any]]:
        """Parameter groups with layer-wise learning rates, for any optimizer: layers that the capability needs learn slower.

        A layer's rate is ``lr`` times m = 1 / (1 + rest / c): rest is the curvature that the kept directions leave in it, and c is
        such that 1 - m is ``damping`` in the mean over all covered weights. Costs no memory and no time.

        Args:
            lr: learning rate of a layer without curvature.
            damping: in [0, 1); 0 gives every layer ``lr``.
            weight_decay: given to the groups; parameters of which ``no_decay(name, parameter)`` is true get 0. None leaves it to
                the optimizer.
        Returns:
            at most 16 groups (twice that with ``weight_decay``) of the parameters that train; with ``rest="hold"`` held ones are
            in none of them.
        Raises:
            RuntimeError: nothing has been captured. ValueError: damping out of range.
        """
        if not self.bases:
            raise RuntimeError("param_groups(): nothing has been captured yet: run capture() first")
        rests = [
            allocation.rest(self.bases[layer.name].curvature, self.bases[layer.name].rank) for layer in self.layers
        ]
        rates = allocation.rates(rests, [layer.numel for layer in self.layers], damping)
        factor = {id(p): rate for layer, rate in zip(self.layers, rates, strict=True) for p in layer.parameters}
        groups: dict[tuple, dict[str, Any]] = {}
        for name, p in self.model.named_parameters():
            if not p.requires_grad or (id(p) not in factor and self.rest == "hold"):
                continue
            decay = {} if weight_decay is None else {"weight_decay": 0.0 if no_decay(name, p) else weight_decay}
            key = factor.get(id(p), 1.0), *decay.values()
            groups.setdefault(key, {"params": [], "lr": lr * key[0], **decay})["params"].append(p)
        return list(groups.values())

    def report(self) -> str:
        """A table: per layer its inputs, rank, the part of its curvature that is kept, and the bytes of its basis."""
        return report(self.layers, self.bases)

    def __repr__(self) -> str:
        settings = f"NullSpace(share={self.share}, space={self.space!r}, rest={self.rest!r}, every={self.every})"
        return f"{settings}\n{self.report()}" if self.bases else f"{settings}, nothing captured yet"

    def save(self, path) -> None:
        """Write the bases to a safetensors file, by the layers' names. The weights are pinned first.

        Raises:
            RuntimeError: nothing has been captured. ImportError: safetensors is not installed.
        """
        if not self.bases:
            raise RuntimeError("save(): nothing has been captured yet: run capture() first")
        self.pin()
        basis_file.save(path, self.layers, self.bases, self.share)

    @classmethod
    def load(cls, path, model: nn.Module, **settings) -> "NullSpace":
        """What :meth:`save` has written, for a model with the same layers; ``settings`` are those of :class:`NullSpace`.

        Raises:
            ValueError: a layer of the file is absent from the model, or of another size; it is named.
        """
        bases, share = basis_file.load(path)
        settings.setdefault("share", share)
        protection = cls(model, **settings)
        protection._take(bases)
        return protection

    @torch.no_grad()
    def _take(self, found: dict[str, Basis]) -> None:
        self.layers = basis_file.matching(self.layers, found)
        self.bases = basis_file.on_rank(self.layers, found)
        self._since_pin = 0

    def state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        if not self.bases:
            return state_dict
        bases = basis_file.pack(self.layers, self.bases)
        entry = {"share": self.share, "steps_since_pin": self._since_pin, "bases": bases}
        return {**state_dict, "null_space": entry}

    def load_state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        entry = state_dict.get("null_space")
        if entry is not None:
            self._take(basis_file.unpack(entry["bases"]))
            self._since_pin = int(entry["steps_since_pin"])
