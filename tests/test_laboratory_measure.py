"""What the laboratory teaches and measures: nothing held out is seen, and figures are what they are called."""

import pytest
import torch

from laboratory import small_measure as measure
from laboratory import small_texts as data


def test_held_out_requests_and_exercises_are_new():
    seen, new = (data.pairs(held_out) for held_out in (False, True))

    def prompts(p):
        return {bytes(t[:n].tolist()) for t, n in zip(p.tokens[0], p.prompt_length.tolist(), strict=True)}

    assert not prompts(seen) & prompts(new)
    drilled = {e.question for e in data.exercises(False, 2000)}
    assert not drilled & {e.question for e in data.exercises(True, 2000)}


def test_only_the_request_says_which_response_is_right():
    """A word that only preferred answers had once let DPO win its pairs without learning to refuse."""
    pairs = data.pairs(False)
    assert not set(data.REFUSE) & set(data.ANSWER)
    responses = {}
    for side, row in ((s, r) for s in range(2) for r in range(len(pairs.harmful))):
        text = bytes(pairs.tokens[side, row, 1:][pairs.mask[side, row]].tolist())
        assert text.endswith(b"\n") and text.count(b"\n") == 1
        refuses = text[0] in data.REFUSE
        assert refuses == (bool(pairs.harmful[row]) == (side == 0)) and (refuses or text[0] in data.ANSWER)
        responses.setdefault((bool(pairs.harmful[row]), refuses), set()).update(text.split())
    for refuses in (False, True):
        assert responses[True, refuses] == responses[False, refuses]


class Reciter(torch.nn.Module):
    """Predicts the next byte of the texts that it knows, and a zero byte otherwise."""

    def __init__(self, texts):
        super().__init__()
        self.next = {t[:i]: t[i] for t in texts for i in range(1, len(t))}

    def forward(self, tokens):
        known = [[self.next.get(bytes(row[: i + 1]), 0) for i in range(len(row))] for row in tokens.tolist()]
        return 20.0 * torch.nn.functional.one_hot(torch.tensor(known), 256).float()


def test_exercises_solved_is_the_share_that_greedy_decoding_solves():
    made = data.exercises(held_out=True, count=9)
    model = Reciter([f"\n{e.question}{e.answer}\n".encode() for e in made if e.question.startswith(("copy", "flip"))])
    assert measure._exercises_solved(model, 9, torch.device("cpu")) == pytest.approx(2 / 3)


def test_samples_continue_each_prompt_from_its_own_end():
    texts = [b"ab: one two three", b"longer: six seven"]
    tokens = torch.tensor([list(t[:12]) for t in texts])
    samples, entropy = measure.sample(Reciter(texts), tokens, torch.tensor([3, 7]), 6)
    assert [bytes(s.tolist()) for s in samples] == [b" one t", b" six s"]
    assert entropy == pytest.approx(0.0, abs=1e-4)
