r"""Where the final answer of a text stands, and which number it is.

An answer is looked for in what is said outside the thinking: behind the last `</think>` (or what other models
write for it), up to a `<think>` that is not closed. A prompt may have opened the thinking, so the closing tag
alone counts; a response that opens it and never closes it says nothing. If `<answer>` tags stand there, it is
what the last of them hold. There the last box that is not empty is the answer, else the last
`#### ...`, `Answer: ...` or `answer is ...` of a line.
"""

import re
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

THINK = re.compile(  # a group where the thinking ends
    r"""(?i:<\s*(/?)\s*(?:\w+:)?(?:think|thinking|thoughts?|reasoning)\s*>)    # and seed:think
    | \[(/?)THINK\] | ◁(/?)think▷                                             # Mistral, Kimi
    | <\|(?:begin_of_thought|START_THINKING|channel\|>analysis<\|message)\|>   # Sky-T1, Command A, gpt-oss
    | (<\|(?:end_of_thought|END_THINKING|channel\|>final<\|message)\|>)
    | <unused94> | (<unused95>)                                               # MedGemma""",
    re.VERBOSE,
)
ANSWER_TAGS = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.IGNORECASE | re.DOTALL)
END_MARKS = re.compile(r"(?:\s*(?:<\|[^|<>\s]+\|>|</s>|<eos>|<end_of_turn>))+\s*\Z")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
STATED = re.compile(r"^.*(?:####|\banswer[ \t]*(?:[ \t*]*:|is\b:?))(.*)$", re.IGNORECASE | re.MULTILINE)
SENTENCE_END = re.compile(r"[.!?。！？](?:\s|\$|$)|\n\s*\n")
FORMULA = re.compile(r"[\s*:]*\$([^$]+)\$[\s*.]*")
ANSWER_LINE = re.compile(
    r"^[ \t>*_$]*(?:####|(?:the )?(?:final )?answer[ \t*]*:)(.*)$", re.IGNORECASE | re.MULTILINE
)
JOINED = re.compile(  # nothing but delimiters and `and`: two displays, say
    r"(?:\\\]|\\\[|\\\)|\\\(|[\s$,;]|\\(?:quad|qquad|text\s*\{\s*(?:and|or)\s*\})|\band\b|\bor\b)*"
)
PLACEHOLDER = re.compile(r"(?:your |the )?(?:final )?answer(?: here)?|[.?_\s]+|\\?[lc]?dots", re.IGNORECASE)
DIGITS = 6  # to which a decimal answer must agree: after the point, or significant ones where that is more

SPACES = re.compile(r"\\[,;:!> ]|\\q?quad\b|~|[\s\u00a0\u2009\u202f]")
STYLES = (
    "text",
    "textbf",
    "textrm",
    "textit",
    "mathbf",
    "mathrm",
    "mathit",
    "boldsymbol",
    "bm",
    "boxed",
    "fbox",
)
WRAPPED = re.compile(rf"\\(?:{'|'.join(STYLES)})\s*(?=\{{)")
LEADING = re.compile(
    r"^(?:\s*(?:\\text\w*\s*\{\s*)?(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|:)\s*:?\s*\}?|\\displaystyle\b)",
    re.IGNORECASE,
)
UNIT = re.compile(
    r"(?:\\[,;:! ]|[\s~])*\\(?:text|mathrm|mbox|textrm|operatorname)\s*\{[^{}]*\}(?:\^\{?-?\d+\}?)?\s*$"
)
MINUS = str.maketrans("−–⁻⁺⁰¹²³⁴⁵⁶⁷⁸⁹", "---+0123456789")
SUPERSCRIPT = re.compile(r"(?<=10)[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
MANTISSA = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)"
POWER = r"10\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d+)\s*\}|\(\s*([-+]?\d+)\s*\)|([-+]?\d+))"
NUMBER = re.compile(
    rf"([-+]?)(?:({MANTISSA})(?:[eE]([-+]?\d+)|(?:\\times|\\cdot|\\ast|\*|×|·|x|X){POWER})?|{POWER})"
)
E_NOTATION = re.compile(r"(?<![\w\\.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?![\w.]*\w)")
QUOTED = re.compile(r"""(["'])(.*?)(?<!\\)\1""")
QUOTED_LIST = re.compile(rf"\s*\[\s*{QUOTED.pattern}(?:\s*,\s*([\"'])(.*?)(?<!\\)\3)*\s*\]\s*")
UNIT_WORDS = re.compile(r"(?<=[\d.$])\s*[a-z]{4,}(?: [a-z]{2,}){0,2}$|(?<=[\d$]) +[kcm]?m\^\{?[23]\}?$")
MARKUP = re.compile(r"\\(?:text\w*|math\w+|mbox|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+")
PLAIN_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]{3,}(?![A-Za-z])")
NAMES = r"pi|oo|inf|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|abs|gcd|lcm|max|min"
PLAIN_NAMES = re.compile(  # `3pi`, `Fraction(1, 2)`, `equals`; single letters and capitals are variables
    rf"(?<![A-Za-z])(?:{NAMES})(?![a-z]{{2}})|[A-Za-z]?[a-z]{{3,}}|[A-Z][a-z]\w*\(|\[\["
)
WIDE = Context(prec=2000, Emax=MAX_EMAX, Emin=MIN_EMIN)
MAX_EXPONENT = 400  # beyond it a number is compared and never written out


def answer_region(response: str) -> str:
    """What the response says outside its thinking."""
    start, opened = 0, False
    end = len(response)
    for tag in THINK.finditer(response):
        if any(tag.groups()):
            start, opened, end = tag.end(), False, len(response)
        elif not opened:
            opened, end = True, tag.start()
    said = END_MARKS.sub("", response[start:end]) if end >= start else ""
    tagged = [text for text in ANSWER_TAGS.findall(said) if undecorated(text) and not is_placeholder(text)]
    return tagged[-1] if tagged else said


def is_placeholder(text: str) -> bool:
    """Whether it only says where an answer goes: `your answer`, `...`."""
    return PLACEHOLDER.fullmatch(undecorated(text)) is not None


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of every closed `\boxed{...}` or `\fbox{...}` that is not empty; outermost."""
    found: list[tuple[int, int, str]] = []
    for match in BOXED.finditer(text):
        if found and match.start() < found[-1][1]:
            continue
        end = _closing(text, match.end())
        if end is None:
            continue
        content = text[match.end() + 1 : end].strip()
        if undecorated(content) and not is_placeholder(content):
            found.append((match.start(), end + 1, content))
    return found


def _closing(text: str, opening: int) -> int | None:
    """Place of the brace that closes the one at `opening`; None where there is none."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1 : place] != "\\" else 0
        if depth == 0:
            return place
    return None


def boxed_answer(text: str, parts: int = 1) -> str | None:
    """Content of the last box; of the last `parts` boxes, joined by commas, where one sentence holds them."""
    found = boxes(text)
    if not found:
        return None
    last = found[-parts:]
    one_sentence = all(
        not SENTENCE_END.search(between) or JOINED.fullmatch(between)
        for between in (text[a[1] : b[0]] for a, b in zip(last, last[1:], strict=False))
    )
    if parts > 1 and len(last) == parts and one_sentence and part_count(last[-1][2]) == 1:
        return ", ".join(undecorated(content) for _, _, content in last)
    return undecorated(last[-1][2])


def number_behind_boxes(text: str) -> str | None:
    """The number on the last line `Answer: ...` or `#### ...` of its own behind the last box."""
    start = max((end for _, end, _ in boxes(text)), default=0)
    stated = (undecorated(line.group(1)) for line in reversed(list(ANSWER_LINE.finditer(text, start))))
    return next((text for text in stated if as_number(text) is not None), None)


def stated_answer(text: str) -> str | None:
    """The last `#### ...`, `Answer: ...` or `answer is ...` of a line."""
    stated = (undecorated(match.group(1)) for match in reversed(list(STATED.finditer(text))))
    return next((text for text in stated if text), None)


def bare_number(text: str) -> str | None:
    """The text if it is nothing but a number."""
    return undecorated(text) if as_number(text) is not None else None


def stated_formula(text: str) -> str | None:
    """The last stated answer if it is nothing but one formula between dollars."""
    stated = [m.group(1) for m in STATED.finditer(text) if undecorated(m.group(1))]
    formula = FORMULA.fullmatch(stated[-1]) if stated else None
    return undecorated(formula.group(1)) if formula else None


def final_answer(response: str, parts: int = 1) -> str | None:
    r"""The last `\boxed{...}` outside the thinking, else the last `#### ...`, `Answer: ...` or `answer is
    ...` of a line, else all that is said behind the thinking or in `<answer>` tags if that is a number;
    without the dollar signs, stars and full stop around it. None where there is none.

    Args:
        parts: how many the ground truth has; as many boxes of one sentence are taken together.
    """
    text = answer_region(response)
    return (
        boxed_answer(text, parts) or stated_answer(text) or (bare_number(text) if text != response else None)
    )


def ground_truth_answer(answer: str) -> str:
    r"""The ground truth itself: of a worked solution what follows the last `####`, or is in its last box; of
    a list of quoted texts (`["36"]`, as JSON and Python write it) the texts."""
    answer = answer_region(answer)
    if QUOTED_LIST.fullmatch(answer):
        return undecorated(", ".join(text.replace("\\\\", "\\") for _, text in QUOTED.findall(answer)))
    if "####" in answer:
        return undecorated(answer.rpartition("####")[2].strip().partition("\n")[0])
    return boxed_answer(answer) or undecorated(answer)


def is_prose(text: str) -> bool:
    """Whether it is a sentence or a worked solution: nothing that an answer could equal."""
    plain = re.sub(r"\\[a-zA-Z]+", " ", text)
    return len(PLAIN_WORD.findall(plain)) > 3 or ("\n" in text.strip() and r"\begin" not in text)


def is_statement(text: str) -> bool:
    """Whether it says in words what the answer is (`The total is 36`), or holds the way there (GSM8K's
    `<<24+12=36>>`): no answer equals it as a text. Words in markup and a unit do not count."""
    words = PLAIN_WORD.findall(MARKUP.sub(" ", without_unit_words(text)))
    return (
        "\n" in text
        or "<<" in text
        or (len(words) > 1 and re.search(r"\d", text) is not None)
        or (is_prose(text) and re.search("[=.]", text) is not None)
    )


def without_unit_words(text: str) -> str:
    """`36 apples`, `36 m^2` and `$36$ Hz` without their units."""
    inner = re.fullmatch(r"\$?([^$]+)\$\s+\S+", text)
    return undecorated(inner.group(1) if inner else UNIT_WORDS.sub("", text))


def is_not_latex(text: str) -> bool:
    """Whether names stand in it that a reader of LaTeX takes for products of letters."""
    return PLAIN_NAMES.search(MARKUP.sub(" ", text)) is not None


def is_word(text: str) -> bool:
    """Whether an answer is a word (`even`) or a choice (`(B)`), to be compared as such."""
    return re.fullmatch(r"\(?[A-Z]\)?|(?=.*[A-Za-z]{3})[A-Za-z]+(?: [A-Za-z]+)*", text) is not None


def same_word(one: str, other: str) -> bool:
    """Whether two words or choices are the same but for case and parentheses."""
    return undecorated(one).strip("() ").casefold() == undecorated(other).strip("() ").casefold()


def undecorated(text: str) -> str:
    r"""Without what surrounds an answer: dollar signs, stars, a full stop, `\text{...}`, `Answer:`."""
    while True:
        before = text
        text = text.strip(" \t\n*").rstrip(" \t\n*.,;:")
        text = re.sub(r"(?:\\[,;:! ]|\\\\|\\q?quad\b|\\$)+$", "", text).rstrip()
        text = re.sub(r"^(?:\\[,;:! ]|\\q?quad\b)+", "", text).lstrip()
        text = text.strip("$") if text.count("$") != 1 or text[:1] == "$" or text[-1:] == "$" else text
        for opened, closed in ((r"\(", r"\)"), (r"\[", r"\]")):
            if text.startswith(opened) and text.endswith(closed):
                text = text[2:-2]
        match = WRAPPED.match(text)
        if match and _closing(text, match.end()) == len(text) - 1:
            text = text[match.end() + 1 : -1]
        text = LEADING.sub("", text, count=1)
        if text == before:
            return text


def part_count(answer: str) -> int:
    r"""How many answers a ground truth lists: `3, 4`, `\{3, 4\}` and `3 \pm 1` are two, `(3, 4)` one."""
    text = answer.replace("$", "").strip()
    if text.startswith(r"\{") and text.endswith(r"\}"):
        text = text[2:-2]
    text = re.sub(r"\\text\s*\{\s*(and|or)\s*\}|\b(and|or)\b", ",", text)
    depth, pieces = 0, [""]
    for character in text:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if depth == 0 and character in ",;":
            pieces.append("")
        else:
            pieces[-1] += character
    kept = [piece for piece in pieces if piece.strip()]
    return max(sum(2 if r"\pm" in piece else 1 for piece in kept), 1)


# -------------------------------------------------------------------------------------------------- numbers


def as_number(text: str) -> Decimal | None:
    r"""The number that a text is as a whole, else None.

    `12`, `1,234`, `1\,000\,000`, `1{,}000`, `.5`, `3.83e35`, `3.83 \times 10^{35}`, `10^{-7}`, `2 × 10⁻⁵`,
    with a sign, a currency sign before it or a unit in `\text{...}` behind it; no fraction, no percentage.
    """
    text = SUPERSCRIPT.sub(lambda match: "^{" + match.group().translate(MINUS) + "}", text).translate(MINUS)
    text = undecorated(UNIT.sub("", undecorated(text)))
    text = re.sub(r"\{\s*,\s*\}", ",", text)
    text = re.sub(r"\\text\w*\s*\{\s*\}", "", text)
    text = re.sub(r"^([-+]?)\s*(?:\\\$|[$€£¥₹])\s*", r"\1", text)
    text = re.sub(r"\{?\\(times|cdot)\s*\}?", r"\\\1 ", text)
    groups = SPACES.sub(" ", text).strip()
    if re.search(r"\d +\d", groups) and not re.match(r"[-+]? ?\d{1,3}( \d{3})+(?![\d ]*\d)", groups):
        return None  # `1 2` is no number; `1 000` is
    match = NUMBER.fullmatch(re.sub(r"\\(times|cdot|ast) ", r"\\\1", groups).replace(" ", ""))
    if match is None:
        return None
    sign, mantissa, exponent, *powers = match.groups()
    exponent = exponent or next((power for power in powers if power), "0")
    if len(exponent) > 7:
        return None
    value = Decimal((mantissa or "1").replace(",", "")).scaleb(int(exponent), WIDE)
    return -value if sign == "-" else value


def same_number(truth: Decimal, found: Decimal) -> bool:
    """Equal to half a unit of the sixth digit: after the point, and of a truth below 1 the sixth significant.

    (math-verify rounds to six digits after the point, where 1e-8 and 1e-7 are both 0.)
    """
    if truth == found:
        return True
    place = min(0, truth.adjusted() + 1) if truth else 0
    return WIDE.abs(WIDE.subtract(truth, found)) <= Decimal(5).scaleb(place - DIGITS - 1, WIDE)


def without_e_notation(text: str) -> str:
    """`3.83e35` in the text written out, for a reader to whom e is Euler's number."""

    def plain(match: re.Match[str]) -> str:
        if len(match.group(2)) > 4 or abs(int(match.group(2))) > MAX_EXPONENT:
            return match.group()
        return written_out(Decimal(match.group(1)).scaleb(int(match.group(2))))

    return E_NOTATION.sub(plain, text)


def written_out(value: Decimal) -> str:
    """Digits alone: `0.00001`, `44000000`."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
