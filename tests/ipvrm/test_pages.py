"""The pages in a browser, a chromium of the system (`browser.py`)."""

import json
import math
from random import Random

import numpy as np
import pytest
from browser import CHROMIUM, Chromium

from ipvrm.view.page import page
from ipvrm.view.traces import Choice, Item, Judge, Reading, data_block

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (IPVRM_CHROMIUM names one)"),
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
ODD = [
    "<b>",
    "</script>",
    "<!--",
    "\u2028",
    "",
    "\t",
    "\r\n",
    "שלום",
    "漢",
    "😀",
    " ",
    " the",
    "\n\n",
    "a&amp;",
    '"x"',
]


def reading(pieces, td, ends, threshold=0.0):
    td = np.array(td, dtype=float)
    starts = [0, *(end + 1 for end in ends[:-1])]
    scores = np.array([np.nansum(td[a : end + 1]) for a, end in zip(starts, ends, strict=True)])
    below = [i for i, score in enumerate(scores) if score < threshold]
    return Reading(tuple(pieces), list(ends), np.linspace(0.1, 0.9, len(td)), td, scores, (below or [-1])[0])


def sample():
    """Traces: odd tokens with a step of none; no label and a null; one token."""
    rng = Random(0)
    pieces = [*ODD, *(f" w{n}" for n in range(40)), "<end>"]
    td = [rng.gauss(0, 1) for _ in pieces]
    td[20], td[30], td[40] = -8.0, 0.0, 5000.0
    ends = [9, 9, 30, len(pieces) - 2]
    first = reading(pieces, td, ends)
    first.choices = {20: Choice([0, 1], [" other", pieces[20]], [0.8, 0.17])}
    first.choices_td = {20: [9.3, -8.0]}
    second = reading(["x", "y"], [math.nan, -1.0], [1])
    third = reading(["1"], [0.5], [0])
    items = [
        Item("odd <b>", "<img src=x onerror=alert(1)>\nsecond line", ("a",) * 4, 2),
        Item("unlabelled", "p", ("a",), None),
        Item("one", "p", ("a",), -1),
    ]
    return items, [first, second, third]


def scaled(readings, factor):
    found = []
    for r in readings:
        copy = reading(r.pieces, r.td * factor, r.ends)
        copy.choices = r.choices
        copy.choices_td = {t: [x * factor for x in td] for t, td in r.choices_td.items()}
        found.append(copy)
    return found


def judge(name, beta, threshold=0.0):
    return Judge(name, "ipvrm", beta, "step", threshold, "logit 0")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{name: file} of pages, and the data of `same`: one model at beta 10 and at 0.05."""
    folder = tmp_path_factory.mktemp("pages")
    items, first = sample()
    judges = [judge("A <script>", 10.0), judge("B", 0.05)]
    picked = [(i, "") for i in range(len(items))]
    same = data_block(
        picked,
        items,
        [first, scaled(first, 0.005)],
        judges,
        min_prob=0.1,
        ipvrm="0",
        date="d",
        dropped_candidates=3,
    )
    halves = reading(["one tw", "o th", "ree"], [1.0, -2.0, 3.0], [1])
    other = reading(["one", " two", " three"], [1.0, 1.0, -1.0], [1])
    two = data_block([(0, "")], [Item("v", "p", ("a",), 0)], [[halves], [other]], judges, min_prob=0.1)
    rng = Random(1)
    words = [f" word{rng.randrange(900)}" for _ in range(3000)]
    ends = [*range(99, 3000, 100)]
    long = [reading(words, [rng.gauss(0, 1) for _ in words], ends) for _ in range(2)]
    many = data_block(
        [(0, "")], [Item("long", "p", ("a",) * 30, 4)], [[r] for r in long], judges, min_prob=0.1
    )
    runs = [{"name": f"run {n} <b>", "state": "finished", "steps": 9, "seconds": 1} for n in range(3)]
    line = {"step": [1, 2, 3], "seconds": [1, 2, None], "value": [1.0, None, 3.0]}
    report = {
        "runs": runs,
        "groups": [[0, 1]],
        "tables": [{"name": "t", "title": "T", "head": ["a", "b"], "rows": [["<i>", "1"]], "note": ""}],
        "metrics": [{"name": f"m{n}", "lines": [line | {"run": r} for r in range(3)]} for n in range(10)],
    }
    files = {}
    for name, (kind, data) in {
        "same": ("trace", same), "two": ("trace", two), "long": ("trace", many), "report": ("report", report),
    }.items():  # fmt: skip
        files[name] = folder / f"{name}.html"
        files[name].write_text(page(kind, data), encoding="utf-8")
    return files, same


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def opened(browser, pages):
    """open(name, size, dark) -> the tab; at the end it has said nothing and asked for nothing."""
    tabs = []

    def go(name, size="desktop", dark=False):
        width, height = SIZES[size]
        tabs.append(browser.open(pages[0][name].as_uri(), width, height, dark, touch=size == "phone"))
        return tabs[-1]

    yield go
    heard = [tab.heard() for tab in tabs]
    for tab in tabs:
        tab.close()
    assert not any(heard), heard


@pytest.mark.parametrize("name", ["same", "two", "long", "report"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_opens_without_a_word_and_does_not_scroll_sideways(opened, name, size, dark):
    tab = opened(name, size, dark)
    wide, view = tab("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= view == SIZES[size][0]
    assert tab("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)"
    )
    if name != "report":
        dock, read = tab("['dock', 'read'].map(x => document.getElementById(x).offsetHeight)")
        assert dock <= (260 if size == "desktop" else 240) and read <= (130 if size == "desktop" else 160)
        boxes = "[$('dock'), marked[0], $('read')].map(e => e.getBoundingClientRect())"
        top, token, bottom = tab(f"(b => [b[0].bottom, b[1].top, b[2].top])({boxes})")
        assert top <= token <= bottom  # it opens at a token that is in view


def test_every_key_and_what_the_read_out_says(opened, pages):
    tab, data = opened("same"), pages[1]
    assert tab("[cursor, active]") == [20, 0]  # the lowest TD of the labelled step
    read = tab.text("#read")
    for words in ("TD −8.00", "token 21 / 56", "step 3 of 4", "␣other", "+9.30", "▸"):
        assert words in read
    assert "Labelled first error: step 3 of 4" in tab.text("#sentence")
    assert tab("$('problem').textContent").startswith("<img")
    assert "threshold 0 from logit 0" in tab.text("#about") and "3 tokens lost" in tab.text("#about")
    for key, want in (
        ("ArrowRight", 21),
        ("ArrowLeft", 20),
        ("ArrowDown", 31),
        ("ArrowUp", 10),
        ("ArrowUp", 0),
    ):
        tab.press(key)
        assert tab("cursor") == want, key
    assert "no second candidate with p ≥ 0.1" in tab.text("#read")
    tab.press("d")
    assert tab("cursor") == 20
    tab.press("f")
    assert tab("trace.shown[0].text.steps[cursor]") == data["traces"][0]["models"][0]["first_error"]
    tab.press("e")
    assert tab("cursor") == 20
    tab.press("m")
    assert tab("[cursor, active]") == [20, 1]
    tab.press("m")
    tab.press("u")
    assert "one scale for all" in tab.text("#legend")
    tab.press("u")
    assert "98th percentile of each" in tab.text("#legend")
    curve = tab("$('chart').innerHTML")
    tab.press("v")
    assert tab("$('chart').innerHTML") != curve and "A V/t" in tab("$('chart').textContent")
    tab.press("v")
    assert tab("$('chart').innerHTML") == curve
    tab.press("t")
    assert tab.count("#table tbody tr") == 56 and tab.count("#steps .row") == 0
    tab.press("t")
    assert tab("document.querySelectorAll('#table tr').length") == 0
    tab.press("p")
    assert tab("$('problem').className") == "open"
    tab.press("?")
    assert tab("$('keys').open")
    tab.press("ArrowRight")
    tab.press("Escape")
    assert not tab("$('keys').open")
    tab.press("ArrowRight", modifiers=2)  # Ctrl is the browser's
    assert tab("cursor") == 20
    tab.press("]")
    assert tab("location.hash") == "#2" and "No label" in tab.text("#sentence")
    assert "2 values unknown" in tab.text("#legend")
    tab.press("[")
    tab.press("[")
    assert tab("location.hash") == "#3"
    tab("location.hash = '#2'")
    assert tab("new Promise(done => setTimeout(() => done(index), 50))") == 1
    assert (
        tab("new Promise(done => setTimeout(() => done($('live').textContent), 400))")
        == "y, TD −1.00, V −1.00"
    )


def word(tab, text):
    return tab.place(
        f"[...document.querySelectorAll('#steps .text:not(.off) span')].find(e => e.textContent === '{text}')"
    )


def test_click_tap_buttons_and_the_curve(opened):
    tab = opened("same")
    tab.click(*word(tab, "w10"))
    assert tab("trace.shown[0].text.pieces[cursor]") == " w10"
    tab.click(*tab.place("$('mean')"))
    assert tab("asMean")
    x, y, width = tab("(b => [b.x, b.y, b.width])($('chart').getBoundingClientRect())")
    tab.click(x + width - 8, y + 40)
    assert tab("cursor") >= 54
    phone = opened("same", "phone")
    phone.tap(*word(phone, "w12"))
    assert phone("trace.shown[0].text.pieces[cursor]") == " w12"
    assert phone.count("#steps .text") == phone.count("#steps .row")  # one model at a time
    phone.tap(*phone.place("$('model')"))
    assert phone("active") == 1 and "B " in phone.text("#legend")


def test_one_model_at_two_betas_has_the_same_colours_and_nats(opened):
    """Each on its own scale; one token may differ, by rounding to three digits at the edge of a bin."""
    tab = opened("same")
    a, b = tab("[0, 1].map(k => spans[k].map(s => s.className.replace('here', '').trim()))")
    assert sum(x != y for x, y in zip(a, b, strict=True)) <= 1 and len(set(a)) > 4
    nats = tab("models.map(m => m.scale / m.beta)")
    assert nats[0] == pytest.approx(nats[1], rel=0.01)


def test_two_vocabularies_meet_at_the_same_character(opened):
    tab = opened("two")
    assert tab("[0, 1, 2].map(t => { move(t); return tokenOf(1); })") == [1, 2, 2]
    assert "candidates are of A's vocabulary" in tab.text("#read")


def test_odd_tokens_are_text(opened):
    tab = opened("same")
    shown = tab(
        "[...document.querySelectorAll('.row:not(.head)')].map(r => r.children[1].textContent).join('')"
    )
    assert "<b></script><!--" in shown and "שלום漢😀" in shown and "no token of its own" in shown
    assert tab("document.querySelectorAll('#steps .text b, #problem img').length") == 0


def test_speed_of_two_models_of_3000_tokens(opened):
    """Generous here, since other work may run beside it; on an idle core 0.5 s and 5 ms."""
    tab = opened("long")
    load = tab("performance.getEntriesByType('navigation')[0].loadEventEnd")
    moves = "for (let i = 0; i < 100; i++) move(i * 29);"
    each = tab(f"(() => {{ const t = performance.now(); {moves} return (performance.now() - t) / 100; }})()")
    print(json.dumps({"opened_ms": load, "move_ms": each}))
    assert load < 10_000 and each < 100


def test_the_report_shows_values_and_hides_runs(opened):
    tab = opened("report")
    lines = "document.querySelectorAll('figure')[0].querySelectorAll('path[stroke]').length"
    assert tab.count("figure") == 8 and tab(lines) == 3
    tab.click(*tab.place("document.querySelector('#runs button')"))
    assert tab(lines) == 2
    tab.click(*tab.place("$('x')"))
    assert " s" in tab("document.querySelector('figure svg').textContent")
    tab.click(*tab.place("document.querySelector('figure summary')"))
    tab("new Promise(done => setTimeout(done, 300))")  # `toggle` comes after the click
    assert tab.count("figure tbody tr") == 2
    tab.click(*tab.place("document.querySelector('#more > summary')"))
    assert tab.count("figure") == 10
    assert "<i>" in tab.text("#above")
