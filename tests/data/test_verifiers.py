"""What a verifier says of an answer is right, or there is a reason why it says nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from aft_ray.config import Config, ScoresConfig, validate
from aft_ray.config.data import VERIFIERS as NAMES
from aft_ray.data.scorers import build_scorer
from aft_ray.data.scoring import Score
from aft_ray.data.verifiers import VERIFIERS, verify
from aft_ray.data.verifiers.maths import MathProcess
from aft_ray.data.verifiers.own import OwnVerifier
from aft_ray.errors import ConfigError, InputError
from aft_ray.pipeline.checks import check_tasks
from aft_ray.storage import Folder
from tests.command_line import ROOT
from tests.data.test_scorers import row, scores_of, values

IFEVAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ifeval"
"""Published answers, beside the checkout where somebody put them."""


def score(name: str, reference: str | None, text: str, **metadata: Any) -> Score:
    [found] = scores_of(build_scorer(ScoresConfig(scorer=name)), row(name, reference, **metadata), [text])  # type: ignore[arg-type]
    return found


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported, the checkers would fetch the data that some of their instructions need."""
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)


def test_every_verifier_has_a_name_in_the_config() -> None:
    assert set(VERIFIERS) == NAMES


def examples() -> list[dict[str, Any]]:
    """The examples of docs/data.md."""
    section = (ROOT / "docs" / "data.md").read_text().partition("## Verifiers")[2].partition("## Targets")[0]
    return yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("example", examples(), ids=lambda example: f"{example['verifier']}: {example['answer'][:30]}")
def test_the_examples_of_the_documentation_are_true(example: dict[str, Any], no_downloads: None) -> None:
    name, reference, text, expected = (example.pop(key, None) for key in ("verifier", "reference", "answer", "score"))
    if name in {"ifeval", "ifbench"}:
        pytest.importorskip("lm_eval.tasks.ifeval.utils" if name == "ifeval" else "if_verifiable")
    found = score(name, reference, text, **example)
    assert found.value == expected
    assert (found.value is None) == (found.reason is not None)


def test_the_documentation_has_an_example_of_every_verifier_of_a_text() -> None:
    assert {example["verifier"] for example in examples()} == NAMES - {"reasoning_gym"}


# ── mathematics ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("reference", "text", "value"),
    [
        (r"\frac{3}{2}", r"\boxed{\frac{1}{2}}", 0.0),
        ("1/2", "The answer is 3/2.", 0.0),
        ("4 2/3", "2 2/3", 0.0),
        (r"5\sqrt{3}", r"\boxed{2\sqrt{3}}", 0.0),
        ("3^5", "The answer is $10^5$.", 0.0),
        ("1/2", "0.5", 1.0),
        ("4 2/3", r"The answer is $\frac{14}{3}$.", 1.0),
        (r"5\sqrt{3}", r"The answer is $5\sqrt{3}$ cm.", 1.0),
        ("3^5", r"\boxed{243}", 1.0),
        ("2√2", r"so $\sqrt{8}$", 1.0),
        (r"\{1, 2\}", r"The values are \boxed{2} and \boxed{1}.", 1.0),
        (r"\{1, 2\}", r"\boxed{1}", 0.0),
        ("(1, 2)", "(2, 1)", 0.0),
        ("[1, 2)", r"\boxed{[1,2)}", 1.0),
        ("x > 2", r"\boxed{(2, \infty)}", 1.0),
        ("x^2 + 2x + 1", "So $(x+1)^2$", 1.0),
        ("y = 2x + 1", "y=2x+1", 1.0),
        ("x = 5", "5", 1.0),
        ("9{,}500", "9500", 1.0),
        ("50%", r"\boxed{\frac{1}{2}}", 1.0),
        ("3 km", "The answer is 3000 m.", 1.0),
        ("3 km", "The answer is 3 m.", 0.0),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", 1.0),
        (r"\text{no solution}", "The answer is: No solution.", 1.0),
        (r"\text{odd}", "The answer is even.", 0.0),
        ("Worked out.\n\\boxed{\\dfrac{9}{7}}", "So it is 9/7.", 1.0),
        ("42", "I do not know.", 0.0),
        ("42", "", 0.0),
    ],
)
def test_mathematics_is_compared_by_its_value(reference: str, text: str, value: float) -> None:
    assert score("math", reference, text) == Score(value=value)


@pytest.mark.parametrize(
    ("reference", "text", "reason"),
    [
        (r"\pi", "I do not know.", "no answer is stated"),
        (r"\frac{1}{2}", r"The answer is the set \{1\}", "is not mathematics alone: the"),
        ("1/2", r"so it is 2\sqrt{2}", "belongs to an expression"),
        ("2^x", r"\boxed{" + "x+" * 300 + "1}", "characters is not compared"),
        (None, "1", "needs a reference"),
        (r"\frac{", r"\boxed{\frac{1}{x}}", "cannot read the reference"),
    ],
)
def test_what_cannot_be_compared_has_a_reason(reference: str | None, text: str, reason: str) -> None:
    found = score("math", reference, text)
    assert found.value is None
    assert found.reason is not None and reason in found.reason


def test_a_row_may_allow_a_tolerance() -> None:
    assert score("math", "3.14159", "3.14").value == 0.0
    assert score("math", "3.14159", "3.14", relative_tolerance=0.01).value == 1.0
    assert score("numeric", "100", "101", absolute_tolerance=1).value == 1.0
    assert score("math", r"\pi", "3.14", absolute_tolerance=0.01).value == 1.0
    assert score("math", r"\pi", "3.1", absolute_tolerance=0.01).value == 0.0
    wrong = score("math", "1", "1", relative_tolerance="1%")
    assert wrong.reason is not None and "expected numbers from 0" in wrong.reason


def test_a_comparison_that_never_ends_costs_its_own_row_only() -> None:
    process = MathProcess(cpu_seconds=2)
    try:
        assert process.compare("x+1", "1+x", 0, 0)
        first = process._process
        with pytest.raises(InputError, match="needs more than 2 s"):
            process.compare("10^{10^{10}}", "5", 0, 0)
        assert process.compare("x+1", "1+x", 0, 0)
        assert process._process is not first
    finally:
        process.close()


def test_a_process_that_was_killed_is_started_again() -> None:
    process = MathProcess()
    try:
        assert not process.compare("x+1", "x", 0, 0)
        assert process._process is not None
        process._process.kill()
        process._process.wait()
        assert process.compare("x+1", "1+x", 0, 0)
    finally:
        process.close()


def test_the_process_ends_with_its_owner() -> None:
    process = MathProcess()
    assert process.compare("x", "x", 0, 0)
    child = process._process
    assert child is not None and child.stdin is not None
    child.stdin.close()
    assert child.wait(20) == 0
    process.close()


@pytest.mark.parametrize("piece", ["$", "\\(", "\\[", "a ", "1 ", "= ", "{", "x+", "(A) ", "\\text{"])
def test_any_answer_is_read_in_time_linear_in_it(piece: str) -> None:
    text = f"{piece * 40_000} so it is 3 or B"
    started = time.process_time()
    for name in ("math", "numeric", "choice", "exact"):
        score(name, "B", text)
        score(name, "42", text)
    assert time.process_time() - started < 3


# ── choices and exact matches ────────────────────────────────────────────────────────────────────────────────────────

CITIES = {"choices": ["Lyon", "Paris", "Nice"]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("B", 1.0),
        ("(b)", 1.0),
        ("B. Paris", 1.0),
        ("The answer is (B).", 1.0),
        ("**Answer: B**", 1.0),
        ("**B) Paris**", 1.0),
        ("The answer is B because it is the capital.", 1.0),
        ("The answer is Paris.", 1.0),
        (r"\boxed{\text{B}}", 1.0),
        ("A. Lyon is not.\nB. Paris is.\n\nAnswer: B", 1.0),
        ("答案：B", 1.0),
        ("所以选B。", 1.0),
        ("I think that (B) fits.", 1.0),
        ("It is the capital.\nAnswer - B", 1.0),
        ("B is the answer.", 1.0),
        ("The correct option is C.", 0.0),
        (r"\boxed{A}", 0.0),
        ("C is correct.", 0.0),
        ("", 0.0),
    ],
)
def test_a_choice_is_read_by_letter_or_text(text: str, value: float) -> None:
    assert score("choice", "B", text, **CITIES) == Score(value=value)


@pytest.mark.parametrize("text", ["A or B", "(A), (B)", "A cat sat there.", "Nobody knows.", "The answer is Rome."])
def test_a_text_that_chooses_no_single_option_has_no_score(text: str) -> None:
    found = score("choice", "B", text, **CITIES)
    assert found.value is None and "option is chosen" in (found.reason or "")


@pytest.mark.parametrize(
    ("reference", "choices"),
    [
        ("B", None),
        ("(B) Paris", CITIES["choices"]),
        ("Paris", CITIES["choices"]),
        ("1", CITIES["choices"]),
        ("B", {"text": ["Lyon", "Paris"], "label": ["A", "B"]}),
        ("Paris", ["A) Lyon", "B) Paris"]),
    ],
)
def test_the_right_choice_is_a_letter_a_text_or_a_number_from_zero(reference: str, choices: Any) -> None:
    metadata = {} if choices is None else {"choices": choices}
    assert score("choice", reference, "The answer is B.", **metadata).value == 1.0
    assert score("choice", reference, "The answer is A.", **metadata).value == 0.0


@pytest.mark.parametrize(
    ("reference", "choices"), [("D", ["x", "y"]), (None, ["x", "y"]), ("1", ["1", "0"]), ("A", "x")]
)
def test_a_right_choice_that_is_not_known_leaves_no_score(reference: str | None, choices: Any) -> None:
    assert score("choice", reference, "A", choices=choices).value is None


@pytest.mark.parametrize(
    ("reference", "text", "value"),
    [
        ("The Café", "So the answer is: cafe\u0301.", 1.0),
        ("New York", "new  york!", 1.0),
        ("42", "４２", 1.0),
        ("東京", "答えは東京です。", 1.0),
        ("New York", "It is New York, I believe.", 0.0),
        ("New York", "York", 0.0),
    ],
)
def test_an_exact_match_ignores_spelling_but_not_words(reference: str, text: str, value: float) -> None:
    assert score("exact", reference, text) == Score(value=value)


def test_aliases_are_right_answers_too() -> None:
    assert score("exact", "New York City", "NYC", aliases=["NYC", "New York"]).value == 1.0
    assert score("exact", None, "NYC").value is None
    assert score("exact", "x", "NYC", aliases="NYC").value is None


# ── a function of the user's own ─────────────────────────────────────────────────────────────────────────────────────

CODE = """
def starts(row, text):
    return text.startswith(row["reference"])

def share(row, text):
    return len(text) / 10 if text else None

def fails(row, text):
    raise KeyError("no such column")

def words(row, text):
    return "yes"

def one(row):
    return True
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder."""
    name = f"checks_{os.getpid()}_{tmp_path.name.rpartition('test_')[2][-20:]}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return name


def own(path: str, texts: list[str]) -> list[Score]:
    return scores_of(build_scorer(ScoresConfig(verifier=path)), row("numeric", reference="4"), texts)


def test_a_function_by_import_path_is_the_verifier_of_every_row(module: str) -> None:
    assert values(own(f"{module}:starts", ["42", "24"])) == [1.0, 0.0]
    assert own(f"{module}:share", ["abcde", ""]) == [
        Score(value=0.5),
        Score(value=None, reason="InputError: the verifier gave no verdict"),
    ]
    assert verify(row("numeric", reference="4"), "42", f"{module}:starts") is True
    assert build_scorer(ScoresConfig(verifier=f"{module}:starts")).name_of(row()) == f"{module}:starts"
    assert values(own("exact", ["4", "42"])) == [1.0, 0.0]


def test_what_a_function_raises_or_returns_wrongly_is_the_reason(module: str) -> None:
    [failed], [strange] = own(f"{module}:fails", ["42"]), own(f"{module}:words", ["42"])
    assert failed == Score(value=None, reason="KeyError: 'no such column'")
    assert strange.value is None and "returned 'yes'; expected True, False" in (strange.reason or "")


def test_a_row_cannot_name_a_function(module: str) -> None:
    assert verify(row(f"{module}:starts", reference="4"), "42") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", "failed on the prompt p-1 with the answer '4': KeyError: 'no such column'"),
        ("words", "returned 'yes' for the prompt p-1"),
        ("one", r"expected a function of \(row, text\)"),
        ("start", "has no start; its functions: starts, share, fails, words, one"),
    ],
)
def test_a_function_is_tried_on_the_first_prompt_before_anything_is_paid_for(
    module: str, name: str, words: str, tmp_path: Path
) -> None:
    raw = {"run": {"dir": "r"}, "engine": {"type": "scripted"}, "scores": {"verifier": f"{module}:{name}"}}
    config = validate(Config, raw, origin="test")
    prompts = Folder.at(str(tmp_path / "prompts"))
    prompts.write_table("0.parquet", pa.Table.from_pylist([row("numeric", reference="4")]))
    with pytest.raises(ConfigError, match=words):
        check_tasks(config, prompts)


def test_another_content_of_the_module_is_other_work(module: str, tmp_path: Path) -> None:
    before = OwnVerifier(f"{module}:starts").identity()
    (tmp_path / f"{module}.py").write_text(CODE + "\n# changed\n")
    assert OwnVerifier(f"{module}:starts").identity() != before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("numerc", "did you mean 'numeric'"),
        ("mod.fn", "of your own: package.module:function"),
        (":fn", "unknown verifier ':fn'"),
    ],
)
def test_an_unknown_verifier_is_refused_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ScoresConfig(verifier=name)


def test_an_unknown_scorer_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown scorer 'maths'; did you mean 'math'\?"):
        ScoresConfig(scorer="maths")  # type: ignore[arg-type]


# ── instructions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_published_answers_get_the_verdicts_of_the_checkers_themselves(no_downloads: None) -> None:
    """One Unicode form and plain line ends change no verdict on 261 published answers."""
    checkers = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    if not IFEVAL.exists():
        pytest.skip("the published answers are not beside the checkout")
    lines = (IFEVAL / "input_data.jsonl").read_text().splitlines()
    prompts = {item["prompt"]: item for item in map(json.loads, lines)}
    answers = list(map(json.loads, (IFEVAL / "responses_gpt4_20231107_public.jsonl").read_text().splitlines()))
    assert len(answers) == 261
    num_compared = 0
    for answer in answers:
        item = prompts[answer["prompt"]]
        asked = {name: item[name] for name in ("instruction_id_list", "kwargs")}
        prompt = {**row("ifeval", **asked), "messages": [{"role": "user", "content": item["prompt"]}]}
        verdict = verify(prompt, answer["response"])
        if verdict is None or '"letter": "!"' in json.dumps(asked):  # needs data of nltk; is drawn by chance
            continue
        example = checkers.InputExample(key=0, prompt=item["prompt"], **asked)
        expected = checkers.test_instruction_following_strict(example, answer["response"]).follow_all_instructions
        assert verdict is expected
        num_compared += 1
    assert num_compared >= 200


@pytest.mark.parametrize(("text", "value"), [("One! Two! Three!", 1.0), ("One! Two!", 0.0)])
def test_ifeval_counts_the_sign_that_is_asked_for(text: str, value: float, no_downloads: None) -> None:
    pytest.importorskip("lm_eval.tasks.ifeval.utils")
    asked = {"letter": "!", "let_relation": "at least", "let_frequency": 3}
    found = score("ifeval", None, text, instruction_id_list=["keywords:letter_frequency"], kwargs=[asked])
    assert found == Score(value=value)


def test_ifeval_reads_accents_and_line_ends_in_one_form(no_downloads: None) -> None:
    pytest.importorskip("lm_eval.tasks.ifeval.utils")
    found = score(
        "ifeval",
        None,
        "The cafe\u0301 is open.\r\n\r\n***\r\n\r\nYes.",
        instruction_id_list=["keywords:existence", "length_constraints:number_paragraphs"],
        kwargs=[{"keywords": ["caf\u00e9"]}, {"num_paragraphs": 2}],
    )
    assert found == Score(value=1.0)


def test_ifbench_scores_the_share_of_instructions_followed(no_downloads: None) -> None:
    pytest.importorskip("if_verifiable")
    asked = {
        "instruction_id_list": ["count:word_count_range", "format:no_whitespace"],
        "kwargs": [{"min_words": 2, "max_words": 4, "keyword": None}, {}],
    }
    found = [score("ifbench", None, text, **asked).value for text in ("one two three", "onetwo", "")]
    assert found == [0.5, 0.5, 0.0]
    unknown = score("ifbench", None, "tea", instruction_id_list=["smell:nice"], kwargs=[{}])
    assert unknown.reason == "InputError: the installed checkers do not know instruction 'smell:nice'"


def test_ifbench_draws_what_is_left_to_chance_alike_for_every_answer(no_downloads: None) -> None:
    pytest.importorskip("if_verifiable")
    open_range = {"instruction_id_list": ["count:word_count_range"], "kwargs": [{}]}
    text = "word " * 200
    assert len({score("ifbench", None, text, **open_range).value for _ in range(20)}) == 1
