"""The losses of the other cures, and what shows the symptoms of the alignment tax.

Fine-tuning for one goal costs a model three things: capability (forgetting), variety of its samples (preference
collapse), and the match of its confidence with its accuracy (calibration).

Throughout: B sequences, T positions, V tokens; ``logits[b, t]`` predicts ``targets[b, t]``; a mask is boolean and True
where a position counts, None where every one does. Losses and entropies are in nats.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_logprob(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B] log-probability of each sequence, summed over the positions that count."""
    logprob = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (logprob if mask is None else logprob.masked_fill(~mask, 0.0)).sum(1)


def dpo_loss(chosen: Tensor, rejected: Tensor, base_chosen: Tensor, base_rejected: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation: -log sigmoid(beta * (margin of the model - margin of the base)), mean over pairs.

    Args:
        chosen, rejected, base_chosen, base_rejected: [B] log-probabilities, from :func:`sequence_logprob`.
        beta: inverse temperature; a large one holds the model close to the base.
    Source: Rafailov et al. 2023, equation 7.
    """
    margin = (chosen - rejected) - (base_chosen - base_rejected)
    return -F.logsigmoid(beta * margin).mean()


def kl_penalty(logits: Tensor, base_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(model || base model) in nats per token, averaged over the positions that count.

    Source: Stiennon et al. 2020; Ouyang et al. 2022.
    """
    # F.kl_div(input, target) is KL(target || input).
    kl = F.kl_div(base_logits.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return (kl if mask is None else kl[mask]).mean()


def ptx_loss(loss: Tensor, pretraining_loss: Tensor, gamma: float) -> Tensor:
    """``loss + gamma * pretraining_loss``: pre-training data mixed in, for one backward pass over both.

    ``Directions(1, ("mix", gamma))`` steps along the same gradient from two backward passes.
    Source: Ouyang et al. 2022, equation 2.
    """
    return loss + gamma * pretraining_loss


def ewc_penalty(
    parameters: Sequence[Tensor], start: Sequence[Tensor], importance: Sequence[Tensor], strength: float
) -> Tensor:
    """Elastic weight consolidation: ``strength / 2 * sum of importance * (parameter - start)^2``.

    Args:
        importance: the diagonal of the Fisher information.
    Source: Kirkpatrick et al. 2017, equation 3.
    """
    total = torch.zeros(())
    for p, p0, f in zip(parameters, start, importance, strict=True):
        total = total.to(p) + (f * (p - p0).square()).sum()
    return strength / 2 * total


def interpolate(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """State dict of ``(1 - alpha) base + alpha tuned``, as new tensors. What is not floating is taken from ``base``.

    Source: Wortsman et al. 2022 (WiSE-FT); Lin et al. 2024 for the alignment tax.
    """
    return {k: torch.lerp(a, tuned[k], alpha) if a.is_floating_point() else a.clone() for k, a in base.items()}


class Calibration(NamedTuple):
    """Bins of equal width over (0, 1], lowest confidence first: the bars of a reliability diagram.

    Attributes:
        ece: 0-d expected calibration error: mean over predictions of |accuracy - confidence| of their bin.
        confidence: [bins] mean confidence; NaN in an empty bin.
        accuracy: [bins] share of right predictions; NaN in an empty bin.
        counts: [bins] int64, predictions in each bin.
    """

    ece: Tensor
    confidence: Tensor
    accuracy: Tensor
    counts: Tensor


def calibration(logits: Tensor, targets: Tensor, mask: Tensor | None = None, bins: int = 15) -> Calibration:
    """How far the probability of the most likely token is from how often that token is right, in float64.

    Source: Guo et al. 2017.
    """
    top, guess = logits.detach().double().softmax(-1).max(-1)
    right = (guess == targets).double()
    if mask is not None:
        top, right = top[mask], right[mask]
    top, right = top.flatten(), right.flatten()
    which = (top * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(which, minlength=bins)
    confidence = torch.zeros(bins, dtype=torch.float64, device=top.device).index_add_(0, which, top)
    accuracy = torch.zeros_like(confidence).index_add_(0, which, right)
    ece = (accuracy - confidence).abs().sum() / len(top)
    return Calibration(ece, confidence / counts, accuracy / counts, counts)


def entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the next-token distributions, in nats per token; near 0 where samples have collapsed."""
    values = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    return (values if mask is None else values[mask]).mean()


def distinct_n(samples: Iterable[Sequence[int] | Tensor], n: int) -> float:
    """Different n-grams over all n-grams of the samples together: 1 when none repeats.

    Args:
        samples: token ids, each a sequence or a 1-d tensor; those shorter than n have no n-gram.
    Source: Li et al. 2016.
    """
    grams: list[tuple] = []
    for sample in samples:
        ids = sample.tolist() if isinstance(sample, Tensor) else list(sample)
        grams += zip(*(ids[i:] for i in range(n)), strict=False)
    return len(set(grams)) / len(grams)
