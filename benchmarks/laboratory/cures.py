"""The record that says how a model is taught, for every model and objective."""

from typing import NamedTuple


class Cure(NamedTuple):
    """One setting of a way to teach with less forgetting.

    Attributes:
        family: what it is known as, with other settings of it.
        strength: in words, what is turned within the family.
        lr, steps: factors on the objective's learning rate and on the model's number of steps.
        late: another factor, on the rate of the last third of a transformer's layers.
        kl: weight of the divergence from the base model, on what is taught.
        text: that is captured, replayed or distilled, by its name in ``Model.texts``; None: the objective's capability.
        gamma: weight of the text's loss (PTX).
        distil: weight of the divergence from the base model, on the text.
        ewc: weight of the penalty on parameters that mattered.
        alpha: share of the tuned weights, from the finished run of ``NONE`` with the same seed.
        method, directions: of gradproj.Directions; no method is without.
        space, share, max_rank: of gradproj.NullSpace, which is captured before the first step; share 0 is without.
        pinned: False leaves only the layer-wise learning rates of a NullSpace.
        damping: of those rates.
        allocation: of a NullSpace: "all" is one over all layers, "each" gives every layer the same share of its width.
        labels: of a capture's loss: the "text" itself, or "sampled" from the base model.
        kfac: damping of the two-sided K-FAC reference; 0 is without.
        elastic: K-FAC acts on the whole displacement after every step, a pull towards the base model, instead of on
            the step's update.
        frozen: whether embeddings, norms and positions are held. None: as the cure does; NullSpace and K-FAC hold them.
        lora: adapters of rank 8 on all linear layers train, instead of the weights.
        init: how those adapters start, from the text: "corda" as PEFT's CorDA sets them to preserve its knowledge,
            "null" as LoRA-Null does; None without the text.
        osf: PEFT's OSF trains instead, which holds this share of each matrix's singular directions; 0 is without.
        every: steps between capability batches.
        fill: capability batches before the first step: a direction each, or all of a capture.
    """

    family: str
    strength: str = ""
    lr: float = 1.0
    steps: float = 1.0
    late: float = 1.0
    kl: float = 0.0
    text: str | None = None
    gamma: float = 0.0
    distil: float = 0.0
    ewc: float = 0.0
    alpha: float | None = None
    method: str | None = None
    directions: int = 1
    space: str = "weights"
    share: float = 0.0
    max_rank: int | None = None
    pinned: bool = True
    damping: float = 0.0
    allocation: str = "all"
    labels: str = "text"
    kfac: float = 0.0
    elastic: bool = False
    frozen: bool | None = None
    lora: bool = False
    init: str | None = None
    osf: float = 0.0
    every: int = 1
    fill: int = 1

    @property
    def name(self) -> str:
        return f"{self.family}, {self.strength}" if self.strength else self.family

    @property
    def slug(self) -> str:
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in self.name).split()).lower()

    @property
    def turned(self) -> dict:
        """The fields that are not at their defaults. Runs are kept by these: a field more leaves old runs valid."""
        return {
            k: v for k, v in self._asdict().items() if k not in self._field_defaults or v != self._field_defaults[k]
        }


BASE = Cure("base model")  # measured, not taught
NONE = Cure("none", "lr x 1")
