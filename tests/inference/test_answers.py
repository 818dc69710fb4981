"""What a text states as its answer, however it is written, and in time linear in the text."""

from __future__ import annotations

import json
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from aft_ray.errors import InputError
from aft_ray.inference.answers import MOST_CHARACTERS, final_number, find_number, num_words, short_answer, stated_answer
from aft_ray.inference.numbers import last_number, read_number

PUBLIC = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "example_model_solutions_public.jsonl"
"""Model solutions with labels, beside the checkout where somebody put them."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"The answer is $\boxed{42}$.", "42"),
        (r"So \boxed{\frac{1}{2}} of it, which took 3 steps", r"\frac{1}{2}"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"$x = \boxed{2}$ and $x = \boxed{3}$", "3"),
        (r"It is \boxed{2} or \boxed{3}.", "2, 3"),
        (r"<answer>\boxed{42}</answer> I hope 7 of you like it", "42"),
        ("<answer>a</answer> no: <answer>b</answer>", "b"),
        ("Let me see. <answer> 42", "42"),
        ("40 left of 50\n#### 42", "42"),
        ("#### 42 apples\nDone.", "42 apples"),
        ("#### Step 2\nSo it is here.\nThe answer is 42", "42"),
        ("#### 3. Compute\nThe answer is 42", "42"),
        ("All clear.\n#### Paris", "Paris"),
        ("<think>\\boxed{3}</think>The answer is 4", "4"),
        ("Is the answer 5? The answer is not 5. I guess the answer is 6.", "6"),
        ("The answer is not B. The answer is not entailed.", "not entailed"),
        ("The answer is A. The answer is not (B).", "A"),
        ("## Answer\r\n\r\nParis\r\n", "Paris"),
        ("The answer to the question is 12 km.", "12 km"),
        ("The final answer is therefore 42", "42"),
        ("**Answer:** B", "B"),
        ("## Answer\n\n42", "42"),
        ('{"answer": 42}', "42}"),
        ("The answer is U.S. dollars. They are green.", "U.S. dollars"),
        ("The answer is Paris. It lies on the Seine.", "Paris"),
        ("所以答案是42。很简单。", "42"),
        ("正解：B", "B"),
        ("答えは42です。", "42"),
        ("정답은 42입니다.", "42"),
        ("La respuesta es 42. Gracias", "42"),
        ("La réponse est Paris.", "Paris"),
        ("Die Antwort lautet 3,5.", "3,5"),
        ("Ответ: 42", "42"),
        ("6 x 7 = 42\nA: 42", "42"),
        (r"\boxed{4", None),
        ("So 42 it is", None),
    ],
)
def test_a_marked_answer_is_read_without_its_marks(text: str, expected: str | None) -> None:
    assert stated_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9{,}500", 9500),
        (r"9\,500", 9500),
        (r"12,\!345", 12345),
        ("12 345", 12345),
        ("12'345.5", Fraction("12345.5")),
        ("1,23,456", 123456),
        ("1.234,56", Fraction("1234.56")),
        ("1.234.567", 1234567),
        ("3,14", Fraction("3.14")),
        ("_42_", 42),
        ("**42**", 42),
        ("USD42", 42),
        ("US$ -1,234.50", Fraction("-1234.5")),
        ("-$7", -7),
        ("− 5", -5),
        ("- 5", -5),
        ("４２", 42),
        ("٤٢", 42),
        ("42です", 42),
        ("42 apples of 50", 42),
        ("42 a day", 42),
        ("25 cm²", 25),
        ("1/2", Fraction(1, 2)),
        ("½", Fraction(1, 2)),
        ("4½", Fraction(9, 2)),
        ("4 2/3", Fraction(14, 3)),
        (r"x = 4\frac{2}{3}", Fraction(14, 3)),
        (r"\frac12", Fraction(1, 2)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        ("1.5e3", 1500),
        (r"1.5 \times 10^3", 1500),
        ("1.5×10³", 1500),
        ("5 + 7 = 12", 12),
    ],
)
def test_number_formats_of_the_world(text: str, expected: Any) -> None:
    number = read_number(text)
    assert number is not None
    assert number.value == expected


@pytest.mark.parametrize(
    "text",
    [
        r"5\sqrt{3}",
        "3^5",
        "10²",
        r"\frac{\pi}{2}",
        "2x",
        "3 and 4",
        "(3, 4)",
        "2,3,4",
        "6*7",
        "1-2",
        "x=2, y=3",
        "12:30",
        r"\frac{1}{0}",
        "forty-two",
        "b2",
        "x_2",
        "1" * 500,
    ],
)
def test_what_is_not_one_number_is_not_read_as_one(text: str) -> None:
    assert read_number(text) is None


def number(text: str) -> Any:
    found = read_number(text)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("50%", "0.5%", False),
        ("4.2 million", "4,200,000", True),
        ("4.2 million", "4.2", True),
        ("4 million", "4 billion", False),
        ("4.2万", "42000", True),
        ("3 km", "3", True),
        ("3 km", "3000 m", True),
        ("3 km", "3 m", False),
        ("3 km", "3 kg", False),
        ("$0.50", "50 cents", True),
        ("42 apples", "42 pears", True),
        ("12345678901234567890123456789", "12345678901234567890123456788", False),
    ],
)
def test_numbers_are_equal_in_any_reading_that_their_units_allow(first: str, second: str, equal: bool) -> None:
    assert number(first).equals(number(second)) is equal
    assert number(second).equals(number(first)) is equal


def test_tolerances_are_shares_of_the_right_number_or_differences() -> None:
    assert number("100").equals(number("101"), relative=0.01)
    assert not number("100").equals(number("101.1"), relative=0.01)
    assert number("3").equals(number("3.05"), absolute=0.1)
    assert not number("3").equals(number("2.8"), absolute=0.1)


def test_the_last_number_of_a_text_is_no_mark_of_a_list_and_no_exponent_of_a_unit() -> None:
    found = last_number("So it is 42 cm^2.\n1. Read\n2. Add")
    assert found is not None and found.value == 42
    with pytest.raises(ValueError, match="sqrt"):
        last_number("so it is 2\\sqrt{3}")


@pytest.mark.parametrize(
    "text",
    [
        r"The answer is 2\sqrt{3}.",
        r"The answer is 2\sqrt{3}. I checked it 3 times.",
        r"so 2\sqrt{3}",
        r"\boxed{2, 3}",
        "The answer is Paris.",
    ],
)
def test_an_answer_that_is_no_plain_number_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        find_number(text)
    assert final_number(text) is None


def test_an_announced_answer_is_the_number_that_follows() -> None:
    assert final_number("The answer is as follows.\nShe has 42 apples.") == 42


@pytest.mark.parametrize(
    "texts",
    [
        ["1/2", "0.50", ".5", r"\boxed{\frac{1}{2}}", "½", "The answer is $0.5$."],
        ["1,000", "1000.0", r"1{,}000", "The answer is 1 000", "x = 1000"],
        ["Caf\u00e9", "cafe\u0301", "The CAFÉ."],
        ["(A)", "The answer is A.", "**A**", r"\boxed{\text{A}}", "答案：A"],
        ["東京", "答えは東京です。"],
        [r"2\sqrt{3}", r"The answer is $2 \sqrt{3}$."],
    ],
)
def test_equal_answers_have_the_same_short_answer(texts: list[str]) -> None:
    assert len({short_answer(text) for text in texts}) == 1


@pytest.mark.parametrize(
    "texts",
    [
        ["50 km", "50 kg"],
        ["1/3", "0.33"],
        ["12345678901234567890123456789", "12345678901234567890123456788"],
        ["x", "-x"],
    ],
)
def test_different_answers_have_different_short_answers(texts: list[str]) -> None:
    assert len({short_answer(text) for text in texts}) == len(texts)


def test_words_are_characters_in_scripts_without_spaces() -> None:
    assert num_words("It's a well-known trick.") == 4
    assert num_words("我爱北京 2024") == 5
    assert short_answer("她今天在市场上买了四十二个又大又红的苹果") is None


PIECES = [
    "answer is ",
    "the answer is a ",
    "answer to ",
    "answer:",
    "答案是",
    "<answer>",
    "\\boxed{",
    "\\boxed{1}",
    "#### ",
    "####",
]
PIECES += [
    "#### 1\n",
    "answer is not ",
    " ",
    ".",
    "*",
    "\n",
    "a-",
    "$",
    "{,}",
    "1",
    "1,",
    "1 ",
    "1.111",
    "\\frac{",
    "1/",
    "1e",
    "A$",
]
PIECES += ["\\text{", "\n1. ", "12 345 ", "1\\ ", "-", "=- ", "<<", "\n*"]


@pytest.mark.parametrize("piece", PIECES)
def test_any_text_is_read_in_time_linear_in_it(piece: str) -> None:
    """40,000 pieces take milliseconds; a search that starts again at each character takes tens of seconds."""
    text = f"answer is a{piece * 40_000}b"
    started = time.process_time()
    short_answer(text)
    final_number(text)
    read_number(text)
    assert time.process_time() - started < 2


def test_a_long_text_is_read_from_its_end() -> None:
    assert final_number("the answer is 7 " + "x " * MOST_CHARACTERS) is None
    assert final_number("x " * MOST_CHARACTERS + "the answer is 7") == 7


# ── public model solutions ───────────────────────────────────────────────────────────────────────────────────────────

FORMS = {
    "boxed": "{body}\n\\boxed{{{number}}}",
    "headings": "#### Step 1\n{body}\n#### Step 2\nThe answer is {number}.",
    "headings and bold": "#### Step 1: read\n{body}\n#### Step 2: conclude\n\n**{number}**",
    "a number after the box": "{body}\n\\boxed{{{number}}}\nThis was checked 3 times.",
    "a list after the tag": "{body}\n<answer>{number}</answer>\n1. Read\n2. Add\n3. Check",
    "a list after the answer": "{body}\nThe answer is {number}.\n\nSteps:\n1. Read\n2. Add\n3. Check",
    "chinese": "{body}\n答案是{number}。",
    "chinese prose": "{body}\n所以一共有{number}个。",
    "japanese": "{body}\n答えは{number}です",
    "japanese prose": "{body}\n合計{number}円になります。",
    "underscores": "{body}\nSo _{number}_",
    "currency code": "{body}\nSo she pays USD{number}",
    "latex comma": "{body}\n\\boxed{{{latex_comma}}}",
    "latex space": "{body}\nThe answer is ${latex_space}$.",
    "spaces": "{body}\nso {spaced}.",
    "korean": "{body}\n정답은 {number}입니다.",
    "portuguese": "{body}\nA resposta é {number}.",
}


@pytest.fixture(scope="module")
def solutions() -> list[tuple[str, str, bool]]:
    """(ground truth, solution, is_correct) of the four models."""
    if not PUBLIC.exists():
        pytest.skip("the public model solutions are not beside the checkout")
    rows = [json.loads(line) for line in PUBLIC.read_text().splitlines()]
    models = [name for name in rows[0] if isinstance(rows[0][name], dict)]
    return [(row["ground_truth"], row[m]["solution"], row[m]["is_correct"]) for m in models for row in rows]


def is_right(reference: str, text: str) -> bool:
    expected, found = find_number(reference), find_number(text)
    assert expected is not None
    return found is not None and expected.equals(found)


def test_published_labels_of_model_solutions_are_found_again(solutions: list[tuple[str, str, bool]]) -> None:
    counts = Counter(is_right(truth, solution) == label for truth, solution, label in solutions)
    assert counts == {True: len(solutions)}


@pytest.mark.parametrize("form", FORMS)
def test_right_solutions_stay_right_in_any_form(form: str, solutions: list[tuple[str, str, bool]]) -> None:
    right = [(truth, solution) for truth, solution, label in solutions if label][-369:]
    lost = []
    for truth, solution in right:
        body, _, last = solution.rpartition("\nA:")
        plain = last.strip().replace(",", "")
        grouped = f"{int(plain):,}" if plain.isdecimal() else plain
        spellings = {"latex_comma": grouped.replace(",", "{,}"), "latex_space": grouped.replace(",", "\\,")}
        text = FORMS[form].format(body=body, number=last.strip(), spaced=grouped.replace(",", " "), **spellings)
        if not is_right(truth, text):
            lost.append(text[-80:])
    assert not lost
