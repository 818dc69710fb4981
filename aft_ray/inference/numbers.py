r"""Numbers as people and models write them.

    read_number("9{,}500 apples")       9500          LaTeX, English, Swiss, Indian, European and spaced thousands
    read_number("US$ -1,234.50")        -1234.5       currencies by sign or code
    read_number("x = 4\frac{2}{3}")     14/3          fractions, mixed numbers, what stands after the last =
    read_number("50 %")                 50 percent    equals 50 and 0.5
    read_number("4.2 million")          4200000       equals 4.2 as well
    read_number("3 km")                 3 km          equals 3, 3000 m and 3 kilometres
    read_number("2\sqrt{3}")            None          an expression, not a number
    last_number("40 left of 50, so 42") 42

A number is exact (a fraction). Every search takes time linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

MOST_DIGITS = 400
"""Longest run of digits that counts as a number."""

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
SIGNS = str.maketrans({"−": "-", "–": "-", "٫": ".", "٬": ",", "⁄": "/", "’": "'", "÷": "/", "∕": "/", "﹣": "-"})
SUPERSCRIPT = re.compile(r"[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,400}")
VULGAR = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
LATEX_COMMA = re.compile(r"\{,\}|,\\!")
LATEX_SPACE = re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])")
LATEX_NOTHING = re.compile(r"\\!|\\(?:left|right|displaystyle)(?![a-zA-Z])|\\(?=[$%#&])")
LATEX_WORDS = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|bb)|mbox|bm|boldsymbol)\s?\{([^{}]{0,200})\}")

_MONEY = (
    r"(?:[A-Z]{0,3}[$€£¥₹₩₽₺₫฿₱₦₪]|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD|NZD|HKD|SGD|KRW|BRL|MXN|SEK|NOK|DKK"
    r"|PLN|RUB|TRY|ZAR|Rs\.?))"
)
_DIGITS = (
    r"(?:(?P<grouped>\d{1,3}(?:(?P<mark>[,' ])\d{3})(?:(?P=mark)\d{3}){0,99}(?!\d)(?:\.\d{1,400})?"
    r"|\d{1,2}(?:,\d\d){1,99},\d{3}(?!\d)(?:\.\d{1,400})?)"
    r"|(?P<european>\d{1,3}(?:\.\d{3}){1,99},\d{1,400}(?!\d)|\d{1,3}(?:\.\d{3}){2,99}(?![\d.]))"
    r"|(?P<plain>(?:\d{1,400}(?:\.\d{1,400})?|\.\d{1,400})(?!\d)))"
)
_FRACTION = (
    r"(?:(?P<whole>\d{1,30})(?: |\s?(?=\\)))?"
    r"(?:\\[dtc]?frac\s?(?:\{\s?(?P<top_sign>-?)(?P<top>\d{1,100})\s?\}|(?P<top_digit>\d))\s?"
    r"(?:\{\s?(?P<bottom>(?!0+\D)\d{1,100})\s?\}|(?P<bottom_digit>[1-9]))"
    r"|(?<!\d/)(?P<over>\d{1,100})\s?/\s?(?P<under>(?!0+(?!\d))\d{1,100})(?![\d/]|[.,]\d))"
)
NUMBER = re.compile(
    r"(?<![A-Za-zÀ-ɏ\d])(?<!\d\.)(?<![A-Za-z\d]_)(?<!_\{)"
    rf"(?P<sign>(?<![)\]}}])[-+])?(?P<money>{_MONEY}\s?)?(?P<inner_sign>-)?(?:{_FRACTION}|{_DIGITS}"
    r"(?:[eE](?P<exponent>[+-]?\d{1,3})(?![A-Za-z\d])"
    r"|\s?(?:\\times|\\cdot|[x*×·])\s?10\s?\^\s?\{?(?P<power>[+-]?\d{1,3})\}?)?)"
    r"(?P<end>)(?:\s?(?:(?P<percent>%|percent(?![a-z])|per cent(?![a-z])|pct(?![a-z])|パーセント)"
    r"|(?P<scale>thousand|million|billion|trillion|lakh|crore|bn|[kKMB])(?![A-Za-z])"
    r"|(?P<myriad>百万|千万|万|萬|億|亿|千(?![克米瓦焦卡]))"
    r"|(?P<unit>[A-Za-zµμ°℃℉]{1,12}(?:/[a-z])?\^?[23]?)(?![A-Za-z\d])))?"
)
"""One number in a text that `plain` returned. Letters before it make it a name (b2), digits after a point no number."""
LIST_MARK = re.compile(r"(?:(?<=\n)|\A)[ \t]{0,20}(?P<number>\d{1,3})[.)][ \t]{1,20}(?=\S)")
EXPRESSION_BEFORE = re.compile(
    r"(?:(?<!\\)\{|\\\{|√\(?|\\(?:sqrt|log|ln|sin|cos|tan)\s?|\^|[^\W\d_]/|[)}]\s?/|[\d)]\s?\*\*\s?)\Z"
)
EXPRESSION_AFTER = re.compile(
    r"\s?(?:\^|\*\*\s?(?=[\d(])|\\(?:sqrt|pi|cdot|times|frac|ln|log)|√|π)|[abcijnpqruvwxyz](?![A-Za-z.])"
)
JOINED = re.compile(r"\s*(?:[-+*/×·,;:^(<>]+|x|and|or|to|\\[a-z]{1,10}|和|或|と|から)\s*[$({\[\\]*", re.IGNORECASE)
"""What stands between two numbers of a list, a range or a sum, none of which is one number."""
SPACED_SIGN = re.compile(r"\A\s{0,9}-\s{1,9}(?=[\d.$\\])|(?<=[=:≈])\s{0,3}-\s{1,3}(?=[\d.$\\])")
VARIABLE = re.compile(r"\A\s?[A-Za-z]\s?[=≈]\s?")
COMMA_DECIMAL = re.compile(r"[^\d,.]{0,40}(?:0|[1-9]\d{0,399}),(?:\d{1,2}|\d{4,400})(?:\s?[^\d\s,.]{1,20})?")

SCALES = {
    **{"thousand": 10**3, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "million": 10**6, "billion": 10**9},
    **{"bn": 10**9, "trillion": 10**12, "lakh": 10**5, "crore": 10**7},
    **{"千": 10**3, "万": 10**4, "萬": 10**4, "百万": 10**6, "千万": 10**7, "億": 10**8, "亿": 10**8},
}
_F = Fraction
UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, factor)
    for dimension, rows in {
        "length": {
            "mm millimeter millimetre": _F(1, 1000),
            "cm centimeter centimetre": _F(1, 100),
            "m meter metre": _F(1),
            "km kilometer kilometre": _F(1000),
            "inch inche": _F(254, 10_000),
            "ft foot feet": _F(3048, 10_000),
            "yd yard": _F(9144, 10_000),
            "mi mile": _F(1_609_344, 1000),
        },
        "mass": {"mg milligram": _F(1, 10**6), "g gram": _F(1, 1000), "kg kilogram": _F(1), "t tonne": _F(1000)},
        "time": {
            "ms millisecond": _F(1, 1000),
            "s sec second": _F(1),
            "min minute": _F(60),
            "h hr hour": _F(3600),
            "day": _F(86_400),
            "week": _F(604_800),
        },
        "volume": {"ml milliliter millilitre": _F(1, 1000), "l liter litre": _F(1)},
        "area": {"cm^2": _F(1, 10_000), "m^2": _F(1), "km^2": _F(10**6)},
        "money": {"cent ¢": _F(1, 100)},
    }.items()
    for names, factor in rows.items()
    for name in names.split()
}
"""Units that can be converted: dimension, and factor to the dimension's first unit of factor 1."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number as it was written."""

    value: Fraction
    """The digits, without what stands behind them."""
    scale: Fraction = Fraction(1)
    """What a word such as million multiplies it by."""
    dimension: str | None = None
    """What its unit measures, `percent` for a percent sign; None for a bare number."""
    factor: Fraction = Fraction(1)
    """What the unit multiplies it by."""
    unit: str = ""
    """The unit, as it was written."""

    def equals(self, other: Number, relative: float = 0.0, absolute: float = 0.0) -> bool:
        """Whether both are the same number, up to the larger of two tolerances (`self` is the one that is right).

        A bare number equals another in any of its readings: 0.5 and 50 equal 50 %, 4.2 equals 4.2 million, and 3
        equals 3 km. Where both have a unit, the units count.
        """
        if self.dimension and other.dimension:
            return self.dimension == other.dimension and _close(self._full, other._full, relative, absolute)
        both_scaled = self.scale != 1 and other.scale != 1
        return any(
            _close(right, found, relative, absolute)
            for right in self._readings(both_scaled)
            for found in other._readings(both_scaled)
        )

    @property
    def _full(self) -> Fraction:
        return self.value * self.scale * self.factor

    def _readings(self, both_scaled: bool) -> set[Fraction]:
        readings = {self.value * self.scale}
        if not both_scaled:
            readings.add(self.value)
        if self.dimension in {"percent", "money"}:
            readings.add(self._full)
        return readings

    @property
    def key(self) -> str:
        """The same text for equal numbers: `0.5` for 1/2 and .50, `1/3`, `4200000` for 4.2 million, `3 km`."""
        if self.dimension == "money":
            return _decimal(self._full)
        return f"{_decimal(self.value * self.scale)} {self.unit}".strip()


def _close(right: Fraction, found: Fraction, relative: float, absolute: float) -> bool:
    return abs(right - found) <= max(Fraction(absolute), Fraction(relative) * abs(right))


def plain(text: str) -> str:
    """Return `text` in Unicode's NFKC form, with LaTeX spaces, text commands and rare signs made plain."""
    if not text.isascii():
        text = SUPERSCRIPT.sub(lambda found: "^" + found.group().translate(SUPERSCRIPTS), text)
        text = unicodedata.normalize("NFKC", VULGAR.sub(" ", text)).translate(SIGNS)
    if "\\" in text or "{" in text or "~" in text:
        text = LATEX_SPACE.sub(" ", LATEX_COMMA.sub(",", text))
        text = LATEX_WORDS.sub(r"\1", LATEX_NOTHING.sub("", text))
    return text


def read_number(answer: str) -> Number | None:
    """Return the number that an answer is, or None where it is none or more than one.

    Words around the number are allowed, and so are further numbers after a word: `42 apples of 50` is 42.
    """
    text = _tidy(answer)
    if text.count("=") > 1 and re.search(r"[,;]|(?<![a-z])(?:and|or)(?![a-z])", text):
        return None  # x = 2, y = 3
    text = re.split(r"[=≈]|\\approx(?![a-z])", text)[-1]
    found = list(NUMBER.finditer(text))[:2]
    if not found or _in_expression(found[0], text):
        return None
    if len(found) == 2 and JOINED.fullmatch(text, _end(found[0]), found[1].start()):
        return None
    return _number(found[0])


def whole_number(answer: str) -> Number | None:
    """Return the number that an answer is without any other word than a known unit, or None."""
    found = NUMBER.fullmatch(VARIABLE.sub("", _tidy(answer)).strip())
    return None if found is None or (found["unit"] and _unit(found["unit"]) is None) else _number(found)


def _tidy(answer: str) -> str:
    text = SPACED_SIGN.sub(lambda found: found.group().replace(" ", ""), plain(answer).strip())
    return text.replace(",", ".") if COMMA_DECIMAL.fullmatch(text) else text


def last_number(text: str) -> Number | None:
    """Return the last number in a text. Marks of a list (`2. Then ...`) and exponents of units are no numbers.

    Raises ValueError, with the place, where the last number is part of an expression, such as `5\\sqrt{3}`.
    """
    text = plain(text)
    marks = {found.start("number") for found in LIST_MARK.finditer(text)}
    last = None
    for found in NUMBER.finditer(text):
        if found.start() not in marks and not _is_exponent_of_unit(found, text):
            last = found
    if last is None:
        return None
    if _in_expression(last, text):
        raise ValueError(text[max(0, last.start() - 20) : last.end() + 20].strip())
    return _number(last)


def _is_exponent_of_unit(found: re.Match[str], text: str) -> bool:
    before = re.search(r"([A-Za-z]{1,12})\^\{?\Z", text[max(0, found.start() - 14) : found.start()])
    return before is not None and _unit(before[1]) is not None


def _in_expression(found: re.Match[str], text: str) -> bool:
    before = text[max(0, found.start() - 12) : found.start()]
    return bool(EXPRESSION_BEFORE.search(before) or EXPRESSION_AFTER.match(text, _end(found)))


def _end(found: re.Match[str]) -> int:
    """Return where the number ends: an unknown word behind it is no unit."""
    return found.end("end") if found["unit"] and _unit(found["unit"]) is None else found.end()


def _unit(word: str) -> tuple[str, Fraction] | None:
    name = word if word in UNITS else word.casefold()
    return UNITS.get(name) or UNITS.get(name.removesuffix("s"))


def _number(found: re.Match[str]) -> Number:
    value = _fraction(found) if found["under"] or found["bottom"] or found["bottom_digit"] else _digits(found)
    if "-" in {found["sign"], found["inner_sign"], found["top_sign"]}:
        value = -value
    if found["percent"]:
        return Number(value=value, dimension="percent", factor=Fraction(1, 100))
    scale = found["scale"] or found["myriad"]
    if scale and (scale not in {"M", "B"} or found["money"]):
        return Number(value=value, scale=Fraction(SCALES[scale]))
    unit = _unit(found["unit"]) if found["unit"] else None
    if unit is None:
        return Number(value=value)
    return Number(value=value, dimension=unit[0], factor=unit[1], unit=found["unit"])


def _fraction(found: re.Match[str]) -> Fraction:
    top = int(found["top"] or found["top_digit"] or found["over"])
    bottom = int(found["bottom"] or found["bottom_digit"] or found["under"])
    return int(found["whole"] or 0) + Fraction(top, bottom)


def _digits(found: re.Match[str]) -> Fraction:
    if found["european"]:
        digits = found["european"].replace(".", "").replace(",", ".")
    else:
        digits = re.sub(r"[,' ]", "", found["grouped"] or found["plain"])
    return Fraction(digits) * Fraction(10) ** int(found["exponent"] or found["power"] or 0)


def _decimal(value: Fraction) -> str:
    """Return `value` as a decimal where it has one, else as a fraction."""
    places, bottom = 0, value.denominator
    while bottom % 10 == 0 or bottom % 2 == 0 or bottom % 5 == 0:
        bottom //= 10 if bottom % 10 == 0 else 2 if bottom % 2 == 0 else 5
        places += 1
    if bottom != 1 or not places:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}".rstrip("0")
