"""Scores are correct, or None with the reason; a reward model is tested before it is used."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import JudgeConfig, ScoresConfig, ScriptedEngineConfig
from aft_ray.data.scorers import PerText, answer_scorer_config, build_scorer
from aft_ray.data.scoring import Score, Scorer
from aft_ray.data.verifiers import verify
from aft_ray.data.verifiers.instructions import _ifeval_checkers
from aft_ray.errors import ConfigError
from aft_ray.inference.answers import final_number, short_answer


def row(task: str | None = None, reference: str | None = None, **metadata: Any) -> dict[str, Any]:
    return {
        "prompt_id": "p-1",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "reference": reference,
        "task": task,
        "metadata": json.dumps(metadata) if metadata else None,
    }


def scores_of(scorer: Scorer, prompt: dict[str, Any], texts: list[str]) -> list[Score]:
    return list(asyncio.run(scorer.score(prompt, texts)).scores)


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


BULLETS = row("constraints", constraints=[{"type": "num_bullets", "count": 2}, {"type": "no_commas"}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 42.", "42"),
        ("5 + 7 = 12", "12"),
        ("She pays $1,200.50 in all.", "1200.50"),
        ("40 left of 50\n#### 42", "42"),
        ("#### 42 apples of 50", "42"),
        ("#### nothing", None),
        ("It is -3", "-3"),
        ("It is −3", "-3"),
        ("A loss of -$7 or $-7", "-7"),
        ("10-5", "5"),
        ("about .5", "0.5"),
        ("1.5e3 metres", "1500"),
        ("12,345,678", "12345678"),
        ("2, 3,4", "4"),
        ("42km", "42"),
        ("see section b2", None),
        ("none", None),
    ],
)
def test_the_final_number_of_a_text(text: str, expected: str | None) -> None:
    assert final_number(text) == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize(
    ("text", "reference", "value"),
    [
        ("So 6 x 7 = 42.0", "6 x 7 = 42\n#### 42", 1.0),
        ("$1,000", "1000", 1.0),
        ("It is 42, not 43", "42", 0.0),
        ("I do not know.", "42", 0.0),
        ("", "42", 0.0),
        (r"So \frac{1}{2}", r"\frac{3}{2}", 0.0),
        ("The answer is 3/2.", "1/2", 0.0),
        ("2 2/3", "4 2/3", 0.0),
        ("50%", "0.5", 1.0),
    ],
)
def test_numeric_compares_final_numbers(text: str, reference: str, value: float) -> None:
    scorer = build_scorer(ScoresConfig(scorer="numeric"))
    assert scores_of(scorer, row(reference=reference), [text]) == [Score(value=value)]


@pytest.mark.parametrize("reference", [None, "forty-two"])
def test_numeric_without_a_number_to_compare_with_has_no_score(reference: str | None) -> None:
    [score] = scores_of(build_scorer(ScoresConfig(scorer="numeric")), row(reference=reference), ["42"])
    assert score.value is None
    assert score.reason is not None and "no number in the reference" in score.reason


@pytest.mark.parametrize(
    ("text", "reference"), [(r"2\sqrt{3}", r"5\sqrt{3}"), ("10^5", "3^5"), ("It is 3\\pi", "3"), ("3 or 4", "4")]
)
def test_numeric_refuses_what_is_not_one_number(text: str, reference: str) -> None:
    [score] = scores_of(
        build_scorer(ScoresConfig(scorer="numeric")), row(reference=reference), [f"The answer is {text}"]
    )
    assert score.value is None
    assert score.reason is not None and "number" in score.reason


def test_constraints_score_the_share_of_constraints_met() -> None:
    scorer = build_scorer(ScoresConfig(scorer="constraints"))
    assert values(scores_of(scorer, BULLETS, ["- tea\n- milk", "- tea, milk\n- salt", "tea, milk"])) == [1.0, 0.5, 0.0]
    [score] = scores_of(scorer, row("constraints"), ["- tea"])
    assert score == Score(value=None, reason="InputError: no constraints in the row's metadata")


def test_auto_uses_the_verifier_of_each_rows_task() -> None:
    scorer = build_scorer(ScoresConfig())
    assert [scorer.name_of(r) for r in (BULLETS, row("numeric"), row("chat"), row())] == [
        "constraints",
        "numeric",
        "none",
        "none",
    ]
    assert values(scores_of(scorer, BULLETS, ["- tea\n- milk"])) == [1.0]
    assert values(scores_of(scorer, row("numeric", reference="4"), ["4", "5"])) == [1.0, 0.0]
    assert scores_of(scorer, row("chat"), ["a", "b"]) == [Score(value=None, reason="no scorer")] * 2


def test_agreement_is_the_share_of_the_others_with_the_same_answer() -> None:
    scorer = build_scorer(ScoresConfig(scorer="agreement"))
    texts = ["Paris", "The answer is Paris.", "paris!", "Lyon"]
    assert values(scores_of(scorer, row(), texts)) == pytest.approx([2 / 3, 2 / 3, 2 / 3, 0])
    assert values(scores_of(scorer, row("numeric"), ["so 4.0", "2 + 2 = 4", "5"])) == [0.5, 0.5, 0.0]


def test_agreement_gives_no_score_to_a_long_text_or_a_single_one() -> None:
    scorer = build_scorer(ScoresConfig(scorer="agreement"))
    long, empty, short = scores_of(scorer, row(), ["word " * 30, "", "Paris"])
    assert (long.value, long.reason) == (None, "no short answer in the text")
    assert empty.value is None
    assert short.value == 0.0
    [alone] = scores_of(scorer, row(), ["Paris"])
    assert (alone.value, alone.reason) == (None, "agreement needs two proposals or more")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Paris.", "paris"),
        (r"Thus \boxed{42}", "42"),
        ("<answer>42.0</answer>", "42"),
        ("Long thoughts here, many of them, on and on and on.\nThe answer is: New York.", "new york"),
        ("The answer is 3.5. Hope this helps!", "3.5"),
        ("First I said the answer is 3.\nNo, the answer is 1,000", "1000"),
    ],
)
def test_the_short_answer_of_a_text(text: str, expected: str) -> None:
    assert short_answer(text) == expected


def test_length_counts_characters() -> None:
    assert values(scores_of(build_scorer(ScoresConfig(scorer="length")), row(), [" abc ", ""])) == [3.0, 0.0]


def test_the_source_s_own_scores_are_those_of_its_answers() -> None:
    responses = [{"text": " Paris. ", "model": "m", "score": 8.5}, {"text": "Rome.", "model": "m", "score": None}]
    found = scores_of(
        build_scorer(ScoresConfig(scorer="source")), {**row(), "responses": responses}, ["Paris.", "Rome.", "x"]
    )
    assert values(found) == [8.5, None, None]
    assert found[2].reason == "the source has no score for this answer"
    assert values(scores_of(build_scorer(ScoresConfig(scorer="source")), {**row(), "responses": None}, ["x"])) == [None]
    assert answer_scorer_config(ScoresConfig(scorer="source")).scorer == "auto"


def test_none_leaves_everything_without_a_score() -> None:
    assert scores_of(build_scorer(ScoresConfig(scorer="none")), BULLETS, ["a"]) == [
        Score(value=None, reason="no scorer")
    ]


def test_a_text_that_makes_its_scorer_raise_has_no_score_and_the_others_do() -> None:
    def inverse(row: Any, text: str) -> float:
        return 1 / len(text)

    assert scores_of(PerText("inverse", inverse), row(), ["ab", "", "abcd"]) == [
        Score(value=0.5),
        Score(value=None, reason="ZeroDivisionError: division by zero"),
        Score(value=0.25),
    ]


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        (BULLETS, "- tea\n- milk", True),
        (BULLETS, "- tea, milk\n- salt", False),
        (row("numeric", reference="#### 42"), "42", True),
        (row("numeric", reference="#### 42"), "41", False),
        (row("numeric"), "41", None),
        (row("constraints"), "41", None),
        (row("chat"), "anything", None),
        (row(), "anything", None),
    ],
)
def test_verify_returns_true_false_or_none(prompt: dict[str, Any], text: str, expected: bool | None) -> None:
    assert verify(prompt, text) is expected


VERIFIER_NAMES = ["constraints", "numeric", "reasoning_gym", "ifeval"]


@pytest.mark.parametrize("name", ["auto", *VERIFIER_NAMES, "agreement", "length", "none"])
def test_scorers_can_be_pickled(name: Any) -> None:
    scorer = pickle.loads(pickle.dumps(build_scorer(ScoresConfig(scorer=name))))
    assert scorer.name_of(row()) == ("none" if name == "auto" else name)


def test_reasoning_gym_that_is_not_installed_stops_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    recipe = {"name": "chain_sum", "size": 1, "seed": 0, "index": 0}
    with pytest.raises(ConfigError, match=r"pip install aft-ray\[tasks\]"):
        scores_of(build_scorer(ScoresConfig()), row("reasoning_gym", reasoning_gym=recipe), ["4"])


def test_reasoning_gym_scores_with_the_tasks_own_scorer() -> None:
    pytest.importorskip("reasoning_gym")
    from aft_ray.config import PromptsConfig
    from aft_ray.data.prompts import read_prompts

    [prompt] = read_prompts(PromptsConfig(source="reasoning_gym:chain_sum", limit=1))
    answer = prompt["reference"]
    texts = [answer, f"Let me see. <answer> {answer} </answer>", "no idea"]
    first, second, third = values(scores_of(build_scorer(ScoresConfig()), prompt, texts))
    assert first == second == 1.0
    assert third is not None and third < 1.0
    other = {**prompt, "messages": [{"role": "user", "content": "Another question"}]}
    [score] = scores_of(build_scorer(ScoresConfig()), other, [answer])
    assert score.reason is not None and "generates another question" in score.reason


# ── IFEval ───────────────────────────────────────────────────────────────────────────────────────────────────────────

NO_COMMA_TWO_BULLETS = row(
    "ifeval",
    instruction_id_list=["punctuation:no_comma", "detectable_format:number_bullet_lists"],
    kwargs=[{}, {"num_bullets": 2, "relation": None}],
)


@pytest.fixture
def checkers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The IFEval checkers. Imported, they would fetch the data that one of their instructions needs."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_: False)
    pytest.importorskip("lm_eval.tasks.ifeval.utils")


def test_ifeval_checkers_that_are_not_installed_stop_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langdetect", None)
    _ifeval_checkers.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install aft-ray\[ifeval\]"):
        scores_of(build_scorer(ScoresConfig()), NO_COMMA_TWO_BULLETS, ["* tea"])


def test_ifeval_rows_without_instructions_have_no_score() -> None:
    [score] = scores_of(build_scorer(ScoresConfig(scorer="ifeval")), row("ifeval"), ["* tea"])
    assert score == Score(value=None, reason="InputError: no instruction_id_list and kwargs in the row's metadata")


def test_ifeval_scores_the_share_of_instructions_followed_strictly(checkers: None) -> None:
    texts = ["* tea\n* milk", "* tea, green\n* milk", "tea, milk", ""]
    assert values(scores_of(build_scorer(ScoresConfig()), NO_COMMA_TWO_BULLETS, texts)) == [1.0, 0.5, 0.0, 0.0]
    assert [verify(NO_COMMA_TWO_BULLETS, text) for text in texts] == [True, False, False, False]


def test_ifeval_instructions_that_the_checkers_do_not_know_leave_no_score(checkers: None) -> None:
    unknown = row("ifeval", instruction_id_list=["smell:nice"], kwargs=[{}])
    [score] = scores_of(build_scorer(ScoresConfig()), unknown, ["tea"])
    assert score.value is None
    assert score.reason == "InputError: the installed checkers do not know instruction 'smell:nice'"


def test_ifeval_without_the_data_that_one_instruction_needs_leaves_that_row_without_a_score(
    checkers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    needs_data = row(
        "ifeval",
        instruction_id_list=["change_case:capital_word_frequency"],
        kwargs=[{"capital_relation": "at least", "capital_frequency": 1}],
    )
    [score] = scores_of(build_scorer(ScoresConfig()), needs_data, ["One. Two."])
    assert score.value is None
    assert score.reason is not None and score.reason.startswith("InputError: nltk data is missing: ")


# ── single texts ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("scorer", "expected"),
    [("judge", "auto"), ("likelihood", "auto"), ("agreement", "auto"), ("numeric", "numeric"), ("length", "length")],
)
def test_evaluated_answers_are_scored_without_comparing_them(scorer: Any, expected: str) -> None:
    scores = ScoresConfig(scorer=scorer, judge=JudgeConfig(engine=ScriptedEngineConfig()))
    assert answer_scorer_config(scores).scorer == expected


# ── reward models ────────────────────────────────────────────────────────────────────────────────────────────────────

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}<|{{ m.role }}|> {{ m.content }} {{ eos_token }}{% endfor %}"
)


def save_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE, pad_token: str = "<pad>") -> int:
    """Save a small word-level tokenizer, and return its vocabulary size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from aft_ray.data.reward_model import SANITY_BAD, SANITY_GOOD, SANITY_QUESTION

    special = ["<unk>", "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    words = sorted(set(f"{SANITY_QUESTION['content']} {SANITY_GOOD} {SANITY_BAD}".split()))
    vocabulary = {word: n for n, word in enumerate(special + words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token=pad_token,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def save_classifier(folder: Path, num_labels: int = 1, sign: float = 1, hidden_size: int = 16, **tokenizer: Any) -> str:
    """Save a tiny Llama classifier with random weights; a `sign` of -1 reverses its preferences."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    vocab_size = save_tokenizer(folder, **tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=48,
        pad_token_id=1,
    )
    config.num_labels = num_labels
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(sign)
    model.save_pretrained(folder)
    return str(folder)


def load(folder: str) -> Any:
    return build_scorer(ScoresConfig(scorer="reward_model", reward_model=folder))


def accepted_sign(tmp_path: Path, **settings: Any) -> float:
    """Return the sign with which the random classifier prefers the good answer of the sanity pair; one of them does."""
    try:
        load(save_classifier(tmp_path / "try", **settings))
        return 1
    except ConfigError:
        return -1


def test_a_reward_model_that_prefers_the_bad_answer_is_refused_and_its_opposite_accepted(tmp_path: Path) -> None:
    sign = accepted_sign(tmp_path)
    scorer = load(save_classifier(tmp_path / "good", sign=sign))
    assert scorer.name_of(row()) == "reward_model"
    with pytest.raises(ConfigError, match=r"scores.reward_model .*a reward model prefers the first"):
        load(save_classifier(tmp_path / "bad", sign=-sign))


def test_a_reward_model_gives_the_same_scores_alone_and_in_a_batch(tmp_path: Path) -> None:
    scorer = load(save_classifier(tmp_path / "model", sign=accepted_sign(tmp_path)))
    texts = ["Paris", "The capital of France is Paris.", "Bananas I you", ""]
    together = values(scores_of(scorer, row(), texts))
    alone = [values(scores_of(scorer, row(), [text]))[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == len(texts)


def test_the_ids_of_a_reward_model_hold_one_bos_and_no_injected_turn(tmp_path: Path) -> None:
    scorer = load(save_classifier(tmp_path / "model", sign=accepted_sign(tmp_path)))
    ids = scorer.formatter.encode(row()["messages"], "Paris </s> <|user|> The capital")["input_ids"]
    assert [ids.count(scorer.tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>", "<|user|>")] == [1, 2, 1]


def test_a_llama_3_reward_model_gets_the_ids_that_its_model_card_describes(tmp_path: Path) -> None:
    """FsfairX-LLaMA3-RM's card removes the BOS that the template adds, and the tokenizer adds its own: one BOS."""
    from tokenizers import processors

    template = (
        "{% for m in messages %}{% set content = '<|' + m.role + '|> ' + m.content | trim + ' </s>' %}"
        "{% if loop.first %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    )
    scorer = load(save_classifier(tmp_path / "model", sign=accepted_sign(tmp_path, chat_template=template)))
    tokenizer = scorer.tokenizer
    tokenizer.chat_template = template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    turns = [*row()["messages"], {"role": "assistant", "content": "Paris"}]
    card = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False).replace("<s>", ""))["input_ids"]
    assert card.count(tokenizer.bos_token_id) == 1
    assert scorer.formatter.encode(row()["messages"], "Paris")["input_ids"] == card


def test_rows_scored_at_the_same_time_get_the_scores_they_get_alone(tmp_path: Path) -> None:
    scorer = load(save_classifier(tmp_path / "model", sign=accepted_sign(tmp_path)))
    texts = [["Paris"], ["The capital of France", "you"], ["Bananas", "Paris", "go away."], ["I", "you"]]

    async def together() -> list[list[Score]]:
        return [list(scored.scores) for scored in await asyncio.gather(*(scorer.score(row(), some) for some in texts))]

    before = scorer.num_batches
    found = [values(scores) for scores in asyncio.run(together())]
    assert scorer.num_batches <= before + 2, "the first row alone, what came meanwhile together"
    for some, scores in zip(texts, found, strict=True):
        assert scores == pytest.approx(values(scores_of(scorer, row(), some)), abs=1e-5)


def test_texts_of_similar_length_share_a_batch_of_limited_size(tmp_path: Path) -> None:
    scorer = load(save_classifier(tmp_path / "model", sign=accepted_sign(tmp_path)))
    scorer.batch_tokens = 40
    texts = ["Paris", "word " * 20, "you", "word " * 19, "I"]
    before = scorer.num_batches
    scores = values(scores_of(scorer, row(), texts))
    assert scorer.num_batches == before + 3, "three short texts together, each long one alone"
    assert scores == pytest.approx([values(scores_of(scorer, row(), [text]))[0] for text in texts], abs=1e-5)


@pytest.mark.soak
def test_a_reward_model_on_vllm_gives_the_scores_of_transformers(tmp_path: Path) -> None:
    sign = accepted_sign(tmp_path, hidden_size=64)
    folder = save_classifier(tmp_path / "model", sign=sign, hidden_size=64)
    texts = ["Paris", "The capital of France is Paris.", "Bananas I you", "", "word " * 60]

    async def on_vllm() -> list[list[Score]]:
        scorer = build_scorer(ScoresConfig(scorer="reward_model", reward_model=folder, reward_engine="vllm"))
        try:
            found = await asyncio.gather(*(scorer.score(row(), some) for some in (texts, texts[:1])))
            await scorer.check()
            with pytest.raises(ConfigError, match="a reward model prefers the first"):
                scorer._sanity = None  # type: ignore[attr-defined]
                scorer.formatter.encode = lambda *_: {"input_ids": [5, 6, 7]}  # type: ignore[attr-defined]
                await scorer.score(row(), texts)
            return [list(scored.scores) for scored in found]
        finally:
            await scorer.close()

    (together, alone), expected = asyncio.run(on_vllm()), scores_of(load(folder), row(), texts)
    assert values(together[:4]) == pytest.approx(values(expected[:4]), abs=1e-4)
    assert values(alone) == pytest.approx(values(expected[:1]), abs=1e-4)
    assert [score.value for score in (together[4], expected[4])] == [None, None]
    assert "the reward model's context window 48" in (together[4].reason or "")


def test_a_reward_model_without_its_own_padding_token_scores_one_by_one(tmp_path: Path) -> None:
    sign = accepted_sign(tmp_path, pad_token="</s>")
    scorer = load(save_classifier(tmp_path / "model", sign=sign, pad_token="</s>"))
    assert scorer.batch_tokens == 0, "every text is a batch of its own"
    texts = ["Paris", "The capital of France is Paris."]
    assert values(scores_of(scorer, row(), texts)) == [values(scores_of(scorer, row(), [text]))[0] for text in texts]


def test_a_reward_model_without_a_chat_template_gets_question_and_answer(tmp_path: Path) -> None:
    sign = accepted_sign(tmp_path, chat_template=None)
    scorer = load(save_classifier(tmp_path / "model", sign=sign, chat_template=None))
    assert None not in values(scores_of(scorer, row(), ["Paris", "The capital"]))


def test_a_text_that_a_reward_model_cannot_read_has_no_score(tmp_path: Path) -> None:
    scorer = load(save_classifier(tmp_path / "model", sign=accepted_sign(tmp_path)))
    short, long = scores_of(scorer, row(), ["Paris", "word " * 60])
    assert short.value is not None
    assert (long.value, long.reason) == (None, "71 tokens > the reward model's context window 48")
    refused = {**row(), "messages": [{"role": "system", "content": "Be brief."}, *row()["messages"]]}
    [score] = scores_of(scorer, refused, ["Paris"])
    assert score.value is None
    assert score.reason is not None and "no system turn" in score.reason


def test_a_classifier_with_other_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"of another shape: .*score.weight.*Expected a sequence-class.* one label"):
        load(save_classifier(tmp_path / "model", num_labels=3))


def test_a_language_model_without_a_reward_head_is_refused(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = save_classifier(tmp_path / "model")
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"not in the checkpoint, .*score.weight"):
        load(folder)


def test_a_reward_model_that_is_missing_or_unnamed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"scores\.reward_model is not set"):
        ScoresConfig(scorer="reward_model")
