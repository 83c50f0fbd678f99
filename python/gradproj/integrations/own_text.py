"""What a model writes by itself, which is what to protect where nobody has the data that it was made from."""

import contextlib
import secrets
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, register_fsdp_forward_method
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import tqdm

from gradproj.capture import SCALE, evaluating

AT_ONCE = 4096  # tokens written together, so that their keys and values take less than a batch's activations
CHATS = (None, False, True, "turn", "dialogue")


def own_text(
    model: nn.Module,
    tokenizer: Any,
    sequences: int = 128,
    tokens: int = 64,
    *,
    temperature: float = 1.0,
    chat: bool | str | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Tensor:
    """What the model writes by itself: batches to capture where there are no data.

    Sampled from the model's own distribution: top-k, penalties and whatever else ``generation_config`` asks for are
    off. A text that ends is followed by the next one in the same row, as in packed training data, so that no row is
    padded. In several processes each writes its own. Training mode, random states and configurations are afterwards
    what they were before, also after an exception.

    Args:
        model: a causal language model of transformers or PEFT, possibly inside DDP, sharded by FSDP2, or compiled
            (what is written is not).
        tokenizer: the model's own.
        sequences, tokens: the shape; the tokens count what the chat template adds.
        temperature: > 0; 1 is the model's own distribution.
        chat: where a text begins. False: with the BOS token; without one, with EOS, which separates texts in training
            data; without either, with a token drawn from the vocabulary. ``"turn"``: with what the chat template puts
            before a user's words. ``"dialogue"``: the same, and then a question that the model writes in the user's
            turn, at most a third of the tokens that the template leaves, and its answer in the assistant's. True is
            ``"dialogue"``. None: True if the tokenizer has a chat template, else False.
        seed: the same gives the same text; rank r uses seed + r. None: another text every time.
        progress: whether the first process shows a progress bar.
    Returns:
        [sequences, tokens] int64, on the model's device.
    Raises:
        TypeError: no tokenizer; a model that cannot generate, or an encoder-decoder.
        ValueError: an argument out of range; the template leaves no room; a model that writes the same again and again.
        NotImplementedError: FullyShardedDataParallel (FSDP1), tensor parallelism.

    Example::

        with protection.capture():
            for batch in gradproj.hf.own_text(model, tokenizer).split(8):
                model(input_ids=batch, labels=batch).loss.backward()
    """
    model = _writer(model)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a multimodal processor
    _check(tokenizer, sequences, tokens, temperature, chat)
    seed = secrets.randbits(62) if seed is None else seed + _rank()
    device = next(model.parameters()).device
    with random_states(model, seed):
        start, dialogue = _start(model, tokenizer, sequences, tokens, chat)
        settings = GenerationConfig(
            do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=tokens - start.shape[1]
        )
        with evaluating(model), _generating(model):
            rows = _write(model, start.to(device), settings, dialogue, progress and _rank() == 0)
    _check_written(rows[:, start.shape[1] :], tokenizer)
    return rows


def _writer(model: nn.Module) -> nn.Module:
    """The module whose ``generate`` is used, or an error that names what has none."""
    while isinstance(model, DistributedDataParallel | DataParallel) or "_orig_mod" in model._modules:
        model = next(model.children())
    name, config = type(model).__name__, getattr(model, "config", None)
    if isinstance(model, FullyShardedDataParallel):
        raise NotImplementedError(
            "own_text: FullyShardedDataParallel (FSDP1) gathers weights for its own forward() only; shard with FSDP2 "
            "(fully_shard), or write the text before the model is wrapped and pass it as data"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"own_text: {name} is an encoder-decoder, whose text answers an input; capture data instead")
    if not hasattr(model, "generate"):
        raise TypeError(f"own_text: {name} has no generate(), so it cannot write; capture data instead")
    if any((getattr(m, "_tp_size", None) or 1) > 1 for m in model.modules()):
        raise NotImplementedError(
            f"own_text: {name} is tensor parallel, and its ranks would not draw the same tokens; write the text in one "
            f"process and pass it as data"
        )
    return model


def _check(tokenizer: Any, sequences: int, tokens: int, temperature: float, chat: bool | str | None) -> None:
    if not hasattr(tokenizer, "apply_chat_template"):
        raise TypeError(f"own_text: tokenizer must be the model's tokenizer, got {type(tokenizer).__name__}")
    for name, number, least in (("sequences", sequences, 1), ("tokens", tokens, 2)):
        if number < least:
            raise ValueError(f"own_text: {name} must be >= {least}, got {number}")
    if not temperature > 0.0:
        raise ValueError(f"own_text: temperature must be > 0, got {temperature}")
    if chat not in CHATS:
        raise ValueError(f'own_text: chat must be None, True, False, "turn" or "dialogue", got {chat!r}')
    if chat and not tokenizer.chat_template:
        raise ValueError(f"own_text: chat={chat!r}, but the tokenizer has no chat template; pass chat=False")


def _check_written(written: Tensor, tokenizer: Any) -> None:
    if written.numel() < 16:  # too few to tell
        return
    if (written == written[0, 0]).all() or (len(written) > 1 and (written == written[0]).all()):
        raise ValueError(
            f"own_text: the model writes {tokenizer.decode(written[0, :8])!r} again and again: it has collapsed, or "
            f"the temperature is too low; a capture of that would protect next to nothing: capture data instead"
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _start(
    model: nn.Module, tokenizer: Any, sequences: int, tokens: int, chat: bool | str | None
) -> tuple[Tensor, "_Dialogue | None"]:
    """[sequences, n] tokens that every row begins with, and what asks and answers."""
    if chat is None:
        chat = bool(tokenizer.chat_template)
    if not chat:
        return _first(model, tokenizer, sequences), None
    before, after = _template(tokenizer)
    start = torch.tensor(before).expand(sequences, -1) if before else _first(model, tokenizer, sequences)
    dialogue = chat != "turn"
    room = tokens - start.shape[1] - dialogue * len(after)
    if room < 3:
        raise ValueError(
            f"own_text: tokens={tokens} leaves no room for text, since the chat template alone takes {tokens - room}"
        )
    if not dialogue:
        return start, None
    return start, _Dialogue(start.shape[1], room // 3, after, _ends(model, tokenizer))


def _first(model: nn.Module, tokenizer: Any, sequences: int) -> Tensor:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return torch.full((sequences, 1), token)
    known = min(len(tokenizer), model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    return torch.randint(known, (sequences, 1))


def _template(tokenizer: Any) -> list[list[int]]:
    """The tokens that the chat template puts before a user's words, and between them and the assistant's."""
    words = "@@words@@"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = text.partition(words)
    if not (found and after):
        raise ValueError("own_text: the chat template does not tell a user's words from the answer; pass chat=False")
    return [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end a text, as the tokenizer and the model's generation_config know them."""
    known = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = known if isinstance(known, list) else [known]
    return [token for token in (tokenizer.eos_token_id, *known) if token is not None]


class _Dialogue(LogitsProcessor):
    """Lets the model ask, puts the template's tokens after the question, and lets it answer.

    One ``generate`` writes all of it, so that rows with questions of different lengths need no padding.
    """

    def __init__(self, start: int, longest: int, after: list[int], ends: list[int]):
        """
        Args:
            start: tokens before the question.
            longest: tokens of a question, at most.
            after: tokens between question and answer; the first one ends the question.
            ends: other tokens that end a text, and so the question.
        """
        self.start, self.longest, self.after, self.ends = start, longest, after, sorted({after[0], *ends})

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        after = torch.tensor(self.after, device=scores.device)
        question = scores.index_fill(1, torch.tensor(self.ends, device=scores.device), -torch.inf)
        written = input_ids[:, self.start :]
        place = written.shape[1]
        if place == 0:  # no empty question
            return question
        # Whatever would end the text ends the question.
        question[:, after[0]] = scores[:, self.ends].logsumexp(1)
        ended = written == after[0]
        # Of the token to come: its index in `after`, beyond that in the answer, -1 while the question lasts.
        index = torch.where(ended.any(1), place - ended.int().argmax(1), 0 if place == self.longest else -1)[:, None]
        given = torch.full_like(scores, -torch.inf).scatter_(1, after[index.clamp(0, len(after) - 1)], 0.0)
        return torch.where(index < 0, question, torch.where(index < len(after), given, scores))


def _write(
    model: nn.Module, start: Tensor, settings: GenerationConfig, dialogue: _Dialogue | None, progress: bool
) -> Tensor:
    """[sequences, tokens], in batches that fit."""
    size = max(1, AT_ONCE // (start.shape[1] + settings.max_new_tokens))
    processors = LogitsProcessorList([dialogue] if dialogue else [])
    rows: list[Tensor] = []
    done = 0
    with tqdm(total=len(start), desc="own text", disable=not progress) as bar:
        while done < len(start):
            batch = start[done : done + size]
            try:
                written = model.generate(  # type: ignore[operator]
                    input_ids=batch,
                    attention_mask=torch.ones_like(batch),
                    generation_config=settings,
                    logits_processor=processors,
                )
            except torch.OutOfMemoryError:
                if size == 1 or isinstance(model, FSDPModule):  # there the ranks must stay in step
                    raise
                size //= 2
                continue
            rows.append(written)
            done += len(batch)
            bar.update(len(batch))
    return torch.cat(rows)


def own_batches(rows: Tensor) -> list[dict[str, Tensor]]:
    """What :func:`own_text` returned, as a causal language model takes it."""
    return [{"input_ids": batch, "labels": batch} for batch in rows.split(8)]


def backward_own_text(model: nn.Module, tokenizer: Any, sequences: int) -> None:
    """Backward passes over own text, for a capture outside of a Trainer; what it is follows from torch.manual_seed.
    Losses are multiplied by ``SCALE``."""
    seed = torch.initial_seed() % 2**62  # which may be any 64 bits, and takes the rank in addition
    for batch in own_batches(own_text(model, tokenizer, sequences, seed=seed)):
        (SCALE * model(**batch).loss).backward()


def warn_of_few_tokens(protection: Any) -> None:
    """Inputs of n tokens span n dimensions at most; directions that they do not reach are not protected."""
    if not protection.bases:
        return
    tokens = max(basis.tokens for basis in protection.bases.values())
    widest = max(protection.matrices, key=lambda matrix: matrix.shape[1])
    if 8 * tokens < widest.shape[1]:
        warnings.warn(
            f"gradproj: {tokens} tokens were captured, fewer than an eighth of the {widest.shape[1]} inputs of layer "
            f"{widest.name}: most of what it computes is not protected; capture more",
            RuntimeWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def random_states(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """What is drawn on the CPU or on the model's GPUs leaves no trace. Their generators start from ``seed``."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next((d.type for d in devices), "cuda")
    with torch.random.fork_rng([d.index for d in devices], device_type=kind):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for device in devices:
                torch.get_device_module(kind).default_generators[device.index].manual_seed(seed)
        yield


@contextlib.contextmanager
def _generating(model: nn.Module) -> Iterator[None]:
    """Without the defaults of generation_config, not compiled, and under FSDP2 with the root's weights gathered."""
    configs = [(m, c) for m in model.modules() if (c := vars(m).get("generation_config")) is not None]
    own_method = vars(model).get("generate")
    try:
        for module, _ in configs:
            module.generation_config = GenerationConfig()  # type: ignore[assignment]
        register_fsdp_forward_method(model, "generate")
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, config in configs:
            module.generation_config = config
        if isinstance(model, FSDPModule):
            vars(model).pop("generate", None)
            if own_method is not None:
                model.generate = own_method
