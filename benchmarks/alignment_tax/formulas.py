"""The alignment tax: the other cures, to combine with projection or to compare it with, and what shows the symptoms.

Fine-tuning for one goal costs a model three things: capability (forgetting), variety of its samples (preference collapse), and
the match of its confidence with its accuracy (calibration). Cures beside projection: a KL penalty towards the base model, mixing
pre-training data in (PTX), and interpolating between the weights of base and tuned model.

Throughout: B sequences, T positions, V tokens; ``logits[b, t]`` predicts ``targets[b, t]``; a mask is boolean and True where a
position counts. Losses and entropies are in nats.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_logprob(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Log-probability of each sequence, summed over the positions that count.

    Args:
        logits: [B, T, V] floating.
        targets: [B, T] integer token ids.
        mask: [B, T] bool; None counts every position.
    Returns:
        [B] nats, differentiable in ``logits``.
    Raises:
        ValueError, TypeError: naming the argument whose shape or dtype does not fit.
    """
    _check("sequence_logprob", logits, targets, mask)
    if logits.dim() != 3:
        raise ValueError(f"sequence_logprob: logits must be [B, T, V], got shape {tuple(logits.shape)}")
    logprob = -F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none").view(targets.shape)
    return (logprob if mask is None else logprob.masked_fill(~mask, 0.0)).sum(1)


def dpo_loss(chosen: Tensor, rejected: Tensor, base_chosen: Tensor, base_rejected: Tensor, beta: float = 0.1) -> Tensor:
    """Direct preference optimisation: -log sigmoid(beta * (margin of the model - margin of the base model)).

    Args:
        chosen, rejected: [B] log-probabilities under the model, from :func:`sequence_logprob`.
        base_chosen, base_rejected: [B] of the same sequences under the base model, without gradient.
        beta: inverse temperature > 0; a large one holds the model close to the base.
    Returns:
        0-d mean over the pairs.
    Raises:
        ValueError: shapes that differ, no pair, or a beta that is not positive and finite.
    Source: Rafailov et al. 2023, equation 7.
    """
    for name, value in (("rejected", rejected), ("base_chosen", base_chosen), ("base_rejected", base_rejected)):
        if value.shape != chosen.shape:
            raise ValueError(f"dpo_loss: {name} has shape {tuple(value.shape)} but chosen has {tuple(chosen.shape)}")
    if chosen.dim() != 1 or not len(chosen):
        raise ValueError(f"dpo_loss: chosen must be [B] with B >= 1, got shape {tuple(chosen.shape)}")
    if not 0.0 < beta < math.inf:
        raise ValueError(f"dpo_loss: beta must be positive and finite, got {beta}")
    margin = (chosen - rejected) - (base_chosen - base_rejected)
    return -F.logsigmoid(beta * margin).mean()


def kl_penalty(logits: Tensor, base_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(model || base model), averaged over the positions that count. Add ``beta`` times it to the loss.

    Args:
        logits: [B, T, V] of the model, with gradient.
        base_logits: [B, T, V] of the base model on the same tokens, without.
        mask: [B, T] bool; None counts every position.
    Returns:
        0-d, nats per token.
    Raises:
        ValueError, TypeError: naming the argument whose shape or dtype does not fit; a mask that counts nothing.
    Source: Stiennon et al. 2020; Ouyang et al. 2022.
    """
    _check("kl_penalty", logits, None, mask)
    if base_logits.shape != logits.shape:
        raise ValueError(
            f"kl_penalty: base_logits has shape {tuple(base_logits.shape)} but logits has {tuple(logits.shape)}"
        )
    # F.kl_div(input, target) is KL(target || input).
    kl = F.kl_div(base_logits.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return _mean("kl_penalty", kl, mask)


def ptx_loss(loss: Tensor, pretraining_loss: Tensor, gamma: float) -> Tensor:
    """``loss + gamma * pretraining_loss``: pre-training data mixed in, for one backward pass over both.

    ``Directions(1, ("mix", gamma))`` steps along the same gradient from two backward passes, one of them inside
    ``protect()``; use that where the two losses do not fit into memory together.

    Args:
        loss, pretraining_loss: 0-d.
        gamma: weight >= 0 of the pre-training loss.
    Raises:
        ValueError: a loss that is not 0-d, a gamma that is negative or not finite.
    Source: Ouyang et al. 2022, equation 2.
    """
    for name, value in (("loss", loss), ("pretraining_loss", pretraining_loss)):
        if value.dim():
            raise ValueError(f"ptx_loss: {name} must be 0-d, got shape {tuple(value.shape)}")
    if not 0.0 <= gamma < math.inf:
        raise ValueError(f"ptx_loss: gamma must be finite and >= 0, got {gamma}")
    return loss + gamma * pretraining_loss


def ewc_penalty(
    parameters: Sequence[Tensor], start: Sequence[Tensor], importance: Sequence[Tensor], strength: float
) -> Tensor:
    """Elastic weight consolidation: ``strength / 2 * sum of importance * (parameter - start)^2``. Add it to the loss.

    Args:
        parameters, start, importance: of equal shapes; importance is the diagonal of the Fisher information, >= 0.
        strength: finite and >= 0.
    Returns:
        0-d, differentiable in ``parameters``.
    Raises:
        ValueError: lists of different lengths or shapes; a strength that is negative or not finite.
    Source: Kirkpatrick et al. 2017, equation 3.
    """
    if not 0.0 <= strength < math.inf:
        raise ValueError(f"ewc_penalty: strength must be finite and >= 0, got {strength}")
    if not len(parameters) == len(start) == len(importance):
        raise ValueError(
            f"ewc_penalty: {len(parameters)} parameters, {len(start)} start and {len(importance)} importance tensors; pass as many of each"
        )
    total = torch.zeros(())
    for i, (p, p0, f) in enumerate(zip(parameters, start, importance, strict=True)):
        if not p.shape == p0.shape == f.shape:
            raise ValueError(
                f"ewc_penalty: parameters[{i}] is {tuple(p.shape)}, start[{i}] {tuple(p0.shape)}, importance[{i}] {tuple(f.shape)}"
            )
        total = total.to(p) + (f * (p - p0).square()).sum()
    return strength / 2 * total


def interpolate(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """State dict of ``(1 - alpha) base + alpha tuned``; 0 is the base model, 1 the tuned one.

    Args:
        base, tuned: ``model.state_dict()`` of two models of the same architecture. Not modified.
        alpha: finite; outside [0, 1] it extrapolates.
    Returns:
        new tensors for ``model.load_state_dict``, of base's dtypes. Entries that are not floating must agree.
    Raises:
        ValueError: a key, shape or dtype that only one of them has; an alpha that is not finite.
    Reads 2 N bytes and writes N.
    Source: Wortsman et al. 2022 (WiSE-FT); Lin et al. 2024 for the alignment tax.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"interpolate: alpha must be finite, got {alpha}")
    if base.keys() != tuned.keys():
        key = min(base.keys() ^ tuned.keys())
        raise ValueError(f"interpolate: {key!r} is in {'base' if key in base else 'tuned'} only")
    result = {}
    for key, a in base.items():
        b = tuned[key]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise ValueError(
                f"interpolate: {key!r} is {tuple(a.shape)} {a.dtype} in base but {tuple(b.shape)} {b.dtype} in tuned"
            )
        if a.is_floating_point() or a.is_complex():
            result[key] = torch.lerp(a.detach(), b.detach().to(a.device), alpha)
        elif torch.equal(a, b.to(a.device)):
            result[key] = a.clone()
        else:
            raise ValueError(f"interpolate: {key!r} is {a.dtype}, which has no values in between, and differs")
    return result


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
    """How far the probability of the most likely token is from how often that token is right.

    Args:
        logits: [..., V] floating.
        targets: [...] integer.
        mask: [...] bool; None counts every position.
        bins: >= 1.
    Returns:
        Calibration: float64, on the device of ``logits``.
    Raises:
        ValueError, TypeError: naming the argument whose shape or dtype does not fit; nothing to count; bins < 1.
    Source: Guo et al. 2017.
    """
    if bins < 1:
        raise ValueError(f"calibration: bins must be >= 1, got {bins}")
    _check("calibration", logits, targets, mask)
    top, guess = logits.detach().double().softmax(-1).max(-1)
    right = (guess == targets).double()
    if mask is not None:
        top, right = top[mask], right[mask]
    top, right = top.flatten(), right.flatten()
    if not len(top):
        raise ValueError("calibration: no position counts")
    which = (top * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(which, minlength=bins)
    confidence = torch.zeros(bins, dtype=torch.float64, device=top.device).index_add_(0, which, top)
    accuracy = torch.zeros_like(confidence).index_add_(0, which, right)
    ece = (accuracy - confidence).abs().sum() / len(top)
    return Calibration(ece, confidence / counts, accuracy / counts, counts)


def entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean entropy of the next-token distributions, in nats per token; log V at most, near 0 where samples have collapsed.

    Args:
        logits: [..., V] floating.
        mask: [...] bool; None counts every position.
    Returns:
        0-d.
    Raises:
        ValueError, TypeError: naming the argument whose shape or dtype does not fit; nothing to count.
    """
    _check("entropy", logits, None, mask)
    return _mean("entropy", torch.distributions.Categorical(logits=logits, validate_args=False).entropy(), mask)


def distinct_n(samples: Iterable[Sequence[int] | Tensor], n: int) -> float:
    """Different n-grams over all n-grams of the samples together: 1 when none repeats.

    Args:
        samples: token ids, each a sequence or a 1-d tensor; those shorter than n have no n-gram.
        n: >= 1.
    Raises:
        ValueError: n < 1, or no sample is that long.
    Source: Li et al. 2016.
    """
    if n < 1:
        raise ValueError(f"distinct_n: n must be >= 1, got {n}")
    grams: list[tuple] = []
    for sample in samples:
        ids = sample.tolist() if isinstance(sample, Tensor) else list(sample)
        grams += zip(*(ids[i:] for i in range(n)), strict=False)
    if not grams:
        raise ValueError(f"distinct_n: no sample has {n} tokens")
    return len(set(grams)) / len(grams)


def _check(name: str, logits: Tensor, targets: Tensor | None, mask: Tensor | None) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"{name}: logits must be floating, got {logits.dtype}")
    if logits.dim() < 2:
        raise ValueError(f"{name}: logits must be [..., V] with positions before V, got shape {tuple(logits.shape)}")
    if targets is not None:
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise TypeError(f"{name}: targets must be integer token ids, got {targets.dtype}")
        if targets.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name}: targets has shape {tuple(targets.shape)} but logits has {tuple(logits.shape)}; "
                f"drop the last position of one and the first of the other"
            )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: mask must be bool, got {mask.dtype}")
        if mask.shape != logits.shape[:-1]:
            raise ValueError(f"{name}: mask has shape {tuple(mask.shape)} but logits has {tuple(logits.shape)}")


def _mean(name: str, values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        values = values[mask]
    if not values.numel():
        raise ValueError(f"{name}: no position counts")
    return values.mean()
