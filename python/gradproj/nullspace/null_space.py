"""NullSpace: every layer keeps computing what it computed on the inputs that a capability uses."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradproj.capture import CaptureBlock, gradients_aside
from gradproj.nullspace import adapters, allocation, coverage, files
from gradproj.nullspace.allocation import NoDecay, is_vector
from gradproj.nullspace.basis import Basis, add_earlier, make_bases
from gradproj.nullspace.estimate import Estimate, estimate
from gradproj.nullspace.gather import Gather
from gradproj.nullspace.hearing import Hearing, experts, without_noise
from gradproj.nullspace.lists import PinLists, refuse_optimizers
from gradproj.nullspace.matrices import Matrix, Wanted, refuse_overlaps, unreached
from gradproj.nullspace.moments import sketch_columns
from gradproj.nullspace.over_ranks import group_of, sum_over_ranks
from gradproj.nullspace.precision import without_autocast
from gradproj.nullspace.progress import progress
from gradproj.nullspace.proof import Proof
from gradproj.nullspace.uncovered import Uncovered
from gradproj.protection import Closure, Protection
from gradproj.rows import sharding
from gradproj.rows.results import Pin


class NullSpace(Protection):
    """Pins what each layer computes on the inputs that a capability uses: after every step W <- W - (W U - B) U^T.

    U spans the inputs of largest curvature, gathered once in ordinary backward passes of the capability's loss, and
    B = W U is what the layer made of them then. This holds after every step of any optimizer; nothing accumulates, and
    no capability data are needed afterwards. What the capture did not see is not protected.

    Covered is what the model multiplies inputs by, a parameter or a slice of one, whatever module holds it, with its
    bias; PEFT's LoRA adapters become blind to the protected inputs. What else of the model trains is held (embeddings,
    a head tied to one, norms, weights that are computed); :attr:`coverage` counts it. Parameters of an optimizer that
    are not ``model``'s, such as a critic's, learn freely.

    Args:
        model: whose matrices are protected.
        share: part of the covered weights' dimensions that is kept for the capability, in (0, 1), where the curvature
            is. The bases take about three times that part of the weights' memory; four in bfloat16 with Triton.
        max_rank: of a matrix, at most. Those of more than 2,048 inputs, and experts of more than 512, are sketched and
            keep at most 512, or twice their share, without it.
        modules: ``(name, module) -> bool``, whose own parameters to cover; None covers all.
        space: ``"weights"`` pins after the step. ``"gradient"`` takes the part of the gradient in U out before it, for
            optimizers whose parameters are copies; Adam's scaling and weight decay then leak.
        rest: ``"hold"`` keeps all other trained parameters where they are, so that protected activations do not change
            at all; ``"train"`` lets them go.
        every: after how many steps the weights are pinned; :meth:`pin` does it now.
        group: the process group whose ranks hold this model and capture together. None: that of its DTensors, of the
            DistributedDataParallel module that the capture goes through, or of the wrapper's ``sharding``.
    Raises:
        ValueError, NotImplementedError: a setting out of range, no layer to cover, an adapter other than plain LoRA.

    Example::

        protection = gradproj.NullSpace(model)
        with protection.capture():
            for batch in anchors:
                capability_loss(model, batch).backward()
        inner = torch.optim.AdamW(protection.param_groups(lr=1e-5))
        opt = gradproj.ProjectedOptimizer(inner, protection)

    Source: Saha et al. 2021 (GPM), Wang et al. 2021 (Adam-NSCL), Fang et al. 2025 (AlphaEdit) for projections into the
    null space of inputs; Martens & Grosse 2015 (K-FAC) for the curvature of a layer as inputs times output gradients.
    """

    captures_once = True

    def __init__(
        self,
        model: nn.Module,
        *,
        share: float = 0.05,
        max_rank: int | None = None,
        modules: Wanted | None = None,
        space: Literal["weights", "gradient"] = "weights",
        rest: Literal["hold", "train"] = "hold",
        every: int = 1,
        group: Any = None,
    ):
        super().__init__()
        for name, number in (("max_rank", max_rank), ("every", every)):
            if number is not None and number < 1:
                raise ValueError(f"NullSpace: {name} must be >= 1, got {number}")
        for name, word, known in (("space", space, ("weights", "gradient")), ("rest", rest, ("hold", "train"))):
            if word not in known:
                raise ValueError(f'NullSpace: {name} must be "{known[0]}" or "{known[1]}", got {word!r}')
        self.model, self.modules, self.share, self.max_rank = model, modules, share, max_rank
        allocation.check(self.share)
        self.space, self.rest, self.every, self.group = space, rest, every, group
        self._last: Pin | None = None
        self._told_of_nothing = False
        self._uncovered = Uncovered(model)
        self._slots, self._adapters = adapters.candidates(model, modules)
        self._protect([], {})

    def _protect(self, matrices: list[Matrix], bases: dict[str, Basis]) -> None:
        self.matrices, self.bases = matrices, bases  # by the matrices' names
        self._uncovered.captured()
        if bases and self.rest == "hold" and (warning := coverage.warning(self.model, matrices)):
            warnings.warn(warning, RuntimeWarning, stacklevel=5)
        self._lists: PinLists | None = None
        self._since_pin = 0

    def __len__(self) -> int:
        """How many matrices are protected now."""
        return len(self.bases)

    def clear(self) -> None:
        self._protect([], {})
        self._told_of_nothing = True  # it is what the caller wants

    @property
    def coverage(self) -> coverage.Coverage:
        """How many of the weights that train are covered, held, and reached by no captured token. Before a capture all
        matrices count as covered."""
        return coverage.coverage(self.model, self.matrices, self.bases, () if self.bases else self._slots)

    @property
    def last(self) -> Pin | None:
        return self._last

    def metrics(self) -> dict[str, float]:
        """``moved``: how far the last step had moved the protected products, over all layers."""
        return {} if self._last is None else {"moved": self._last.moved.norm().item()}

    def bind(self, optimizers: Sequence[Optimizer], sharding: sharding.Sharding | None) -> None:
        refuse_optimizers(self._slots, optimizers, sharding)
        super().bind(optimizers, sharding)

    def capture(self, scale: float = 1.0) -> CaptureBlock:
        """Context manager: the inputs of the matrices in the backward passes inside are protected.

        Every backward pass is one batch; its gradients are dropped, and ``p.grad`` is afterwards what it was before.
        Needs no optimizer. A further block pins the weights, hears what trains since then too, and adds to what was
        gathered, each token counting the same. The rank is then allocated anew: with the same ``share``, directions of
        least curvature of either capture are given up; raise ``protection.share`` first to keep all.

        Every product of an input with a parameter that trains, or with a slice of one, is heard; that all were is
        proved: inside, products take their weights detached, so that a weight gets a gradient from another use alone,
        which is an error. So the passes cost less than others. A parameter that is multiplied by nowhere is held.
        Dropout, stochastic depth and NEFTune are off inside; a model with other noise is to be in eval mode.

        Args:
            scale: what you multiply the losses inside by, and is divided out: 2**12, say, where gradients are float16,
                which has no room for those of a mean over many tokens.
        Raises:
            RuntimeError: no backward pass inside; a use of a weight that was not heard; inputs that are not finite;
                running statistics in training mode; ranks that hold different layers, or may.
            NotImplementedError: a weight that is sharded over its inputs, or has no matrix in memory.
        Warns:
            RuntimeWarning: more than a tenth of what trains, embeddings and norms apart, is held; gradients of some
                tokens are about to become zero in float16.
        """
        return CaptureBlock(self._capture(scale))

    @contextlib.contextmanager
    def _capture(self, scale: float) -> Iterator[None]:
        allocation.check(self.share)
        self._uncovered.begin_capture()
        self.pin()
        self._slots, self._adapters = adapters.candidates(self.model, self.modules, self._slots, self._adapters)
        blind = [adapter for adapter in self._adapters if adapter.starts_at_zero]
        proof = Proof()
        with (
            self._while_capturing(),
            gradients_aside(self._uncovered.trained) as aside,
            progress("capture", "passes") as tick,
        ):
            gather = Gather(self._sketch, adapters.names(blind), tick, scale)
            for matrix in self.matrices:  # of earlier captures; an adapter that has learned is a matrix like others
                if self.bases[matrix.name].tokens:
                    gather.number(matrix if matrix.consumer in [a.up for a in blind] else matrix.without_consumer())
            with (
                experts(self.model, "eager"),
                without_noise(self.model),
                torch.compiler.set_stance("force_eager"),
                proof.listening(self._slots),
                adapters.listening(blind, gather),
                Hearing(self._slots, [proof, gather], adapters.heard(self._adapters, blind)),
            ):
                yield
            reached = proof.heard | {slot.name for slot in self._slots if slot.get().grad is not None}
            empty = gather.last_pass is None and all(p.grad is None for p in self._uncovered.trained())
        gather.end()
        sum_over_ranks(gather, self._slots, reached, group_of(self.model, self.group, self.sharding, gather.ddp))
        if not any(gather.tokens):
            raise RuntimeError(f"NullSpace: {aside.why_empty() if empty else gather.why_nothing()}")
        with without_autocast(self._slots[0].get().device):
            self._close(gather, reached)

    def _close(self, gather: Gather, reached: set[str]) -> None:
        """What was gathered on all ranks becomes the bases. ``reached``: parameters that a gradient has reached."""
        add_earlier(gather, self.bases)
        refuse_overlaps(gather.matrices)
        # Held is what captured inputs were multiplied by without any gradient: it may be a router's, of which only the
        # largest output counts.
        silent = {m.slot.name for m in gather.matrices} - gather.names_with_tokens()
        gather.order([m for m, matrix in enumerate(gather.matrices) if matrix.slot.name not in silent])
        for matrix in unreached(gather.matrices, self._slots, reached | silent):
            gather.number(matrix)
        self._protect(gather.matrices, make_bases(gather, self.share, self._most))
        # Adapters become blind at once; elsewhere W U = B holds already.
        PinLists([matrix for matrix in self.matrices if matrix.to_zero], self.bases).pin()

    def _most(self, matrix: Matrix) -> int | None:
        """The largest rank that a matrix may have; None for any."""
        return self.max_rank or ((self._sketch(matrix) or 0) // 2 or None)

    def _sketch(self, matrix: Matrix) -> int | None:
        return sketch_columns(matrix.shape[1], matrix.is_one_of_many, self.share, self.max_rank)

    def estimate(self, run: Callable[[nn.Module], Any] | None = None) -> Estimate:
        """What a capture and the pins would take, from shapes alone, for one device that holds the whole model; also of
        a model on the meta device. Printed it is a table. What is held depends on the ranks, which are foreseen.

        Args:
            run: makes one forward pass, of any size; None passes eight ``input_ids``.
        """
        ids = torch.zeros(1, 8, dtype=torch.int64, device=self._slots[0].get().device)
        run = run or (lambda model: model(input_ids=ids))
        return estimate(self.model, self._slots, self.share, self._sketch, self._most, run)

    def before_step(self, closure: Closure | None, begins: bool = True) -> Closure | None:
        self._check_step()
        if begins:
            self._uncovered.begin_step()
        if closure is not None:
            return self._guarded(closure, then=lambda: self.before_step(None, begins=False))
        if self.bases:
            covered = self._current_lists().covered  # an error now leaves everything as it is
            if self.space == "gradient":
                self.project()
            self._uncovered.before_step(self.parameters(), covered, self.rest)
        elif not self._told_of_nothing:
            self._told_of_nothing = True
            text = (
                "step() before anything was captured: a plain step, nothing is protected; put the capability's "
                "backward passes into `with opt.protect():` first"
            )
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return None

    def after_step(self) -> None:
        if self.bases and self.space == "weights" and not self._step_was_skipped():
            self._since_pin += 1
            if self._since_pin >= self.every:
                self.pin()
        self._uncovered.after_step(self._optimizers)

    @contextlib.contextmanager
    def switching(self) -> Iterator[None]:
        if self.bases:
            self._uncovered.begin_step()
            self._uncovered.before_step(self.parameters(), self._current_lists().covered, self.rest)
        try:
            yield
        finally:
            self._uncovered.after_step(self._optimizers)
        self.pin()

    @torch.no_grad()
    def pin(self) -> Pin | None:
        """Bring the weights back to W U = B now, for evaluation and before a checkpoint. None if nothing is to pin."""
        if not self.bases or self.space != "weights":
            return None
        self._last, self._since_pin = self._current_lists().pin(), 0
        self._uncovered.settled()
        return self._last

    def _current_lists(self) -> PinLists:
        if self._lists is None or not self._lists.current():
            self._lists = PinLists(self.matrices, self.bases)
        return self._lists

    def project(self) -> Pin | None:
        if self.space == "weights":
            super().project()  # refuses
        if not self.bases:
            return None
        self._last = self._current_lists().project_gradients()
        return self._last

    def param_groups(
        self, lr: float, damping: float = 0.3, *, weight_decay: float | None = None, no_decay: NoDecay = is_vector
    ) -> list[dict[str, Any]]:
        """Parameter groups for any optimizer, in which layers that the capability needs learn slower.

        A layer's rate is ``lr`` times m = 1 / (1 + left / c): left is the curvature that the kept directions leave in
        it, and c is such that 1 - m is ``damping`` in the mean over the covered weights that have any. Costs no memory
        and no time.

        Args:
            lr: learning rate of a layer without curvature.
            damping: in [0, 1); 0 gives every layer ``lr``.
            weight_decay: of the groups, 0 where ``no_decay(name, parameter)`` is true. None leaves it to the optimizer.
        Returns:
            at most 16 groups (32 with ``weight_decay``) of the parameters that train, without those that are held.
        Raises:
            RuntimeError: nothing has been captured. ValueError: damping out of range.
        """
        if not self.bases:
            raise RuntimeError("param_groups(): nothing has been captured yet: run capture() first")
        factors = allocation.factors(self.matrices, self.bases, damping)
        free = self.rest == "train"
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad and (free or id(p) in factors)]
        return allocation.groups(named, factors, lr, weight_decay, no_decay)

    def report(self) -> str:
        """A table: size, rank, part of the curvature that is kept, and bytes of each layer; and the coverage."""
        return coverage.report(self.matrices, self.bases, self.coverage, self.rest)

    def __repr__(self) -> str:
        settings = f"NullSpace(share={self.share}, space={self.space!r}, rest={self.rest!r}, every={self.every})"
        return f"{settings}\n{self.report()}" if self.bases else f"{settings}, nothing captured yet"

    def save(self, path) -> None:
        """Write the bases to a safetensors file, by the layers' names. The weights are pinned first."""
        if not self.bases:
            raise RuntimeError("save(): nothing has been captured yet: run capture() first")
        self.pin()
        files.save(path, self.matrices, self.bases, self.share)

    @classmethod
    def load(cls, path, model: nn.Module, **settings) -> "NullSpace":
        """What :meth:`save` has written, for a model with the same layers; ``settings`` as of :class:`NullSpace`. A
        ValueError names a layer that is absent from the model, or has another size."""
        found, share = files.load(path)
        protection = cls(model, **{"share": share, **settings})
        protection._take(found)
        return protection

    @torch.no_grad()
    def _take(self, found: files.Found) -> None:
        self._protect(*files.on_rank(found, {slot.name: slot for slot in self._slots}))

    def state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        if not self.bases:
            return state_dict
        entry = {"steps_since_pin": self._since_pin, "bases": files.pack(self.matrices, self.bases)}
        return {**state_dict, "null_space": entry}

    def strip(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state_dict.items() if key != "null_space"}

    def load_state(self, state_dict: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        if entry := state_dict.get("null_space"):
            self._take(files.unpack(entry["bases"]))
            self._since_pin = entry["steps_since_pin"]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lists": None}
