"""The pages in a browser: Playwright's Python package with a chromium of the system."""

import json
import math
import os
import shutil
from random import Random

import numpy as np
import pytest

from ipvrm.view.page import page
from ipvrm.view.traces import Choice, Item, Judge, Reading, data_block

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright's Python package")
CHROMIUM = os.environ.get("IPVRM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (or IPVRM_CHROMIUM)"),
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
    same = data_block(picked, items, [first, scaled(first, 0.005)], judges, min_prob=0.1)
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
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, pages):
    """open(name, size, scheme) -> the page; at the end there was no console message and no request."""
    contexts, heard = [], []

    def go(name, size="desktop", scheme="light"):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=size == "phone"
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: heard.append(message.text))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        tab.on("dialog", lambda dialog: heard.append("dialog"))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else heard.append(r.url))
        tab.goto(pages[0][name].as_uri())
        return tab

    yield go
    for context in contexts:
        context.close()
    assert heard == []


@pytest.mark.parametrize("name", ["same", "two", "long", "report"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_opens_without_a_word_and_does_not_scroll_sideways(opened, name, size, scheme):
    tab = opened(name, size, scheme)
    wide, view = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= view
    if name != "report":
        dock, read = tab.evaluate("['dock', 'read'].map(x => document.getElementById(x).offsetHeight)")
        assert dock <= (260 if size == "desktop" else 240) and read <= (130 if size == "desktop" else 160)


def at(tab):
    return tab.evaluate("[cursor, active]")


def test_every_key_and_what_the_read_out_says(opened, pages):
    tab, data = opened("same"), pages[1]
    read = lambda: tab.inner_text("#read")  # noqa: E731
    assert at(tab) == [20, 0]  # the lowest TD of the labelled step
    assert "TD −8.00" in read() and "token 21 / 56" in read() and "step 3 of 4" in read()
    assert "␣other" in read() and "TD +9.30" in read() and "▸" in read()
    assert "Labelled first error: step 3 of 4" in tab.inner_text("#sentence")
    assert tab.inner_text("#problem").startswith("<img")
    for key, want in (
        ("ArrowRight", 21),
        ("ArrowLeft", 20),
        ("ArrowDown", 31),
        ("ArrowUp", 10),
        ("ArrowUp", 0),
    ):
        tab.keyboard.press(key)
        assert at(tab)[0] == want, key
    assert "no second candidate with p ≥ 0.1" in read()
    tab.keyboard.press("d")
    assert at(tab)[0] == 20
    tab.keyboard.press("f")
    flagged = data["traces"][0]["models"][0]["first_error"]
    assert tab.evaluate("trace.shown[0].text.steps[cursor]") == flagged
    tab.keyboard.press("e")
    assert at(tab)[0] == 20
    tab.keyboard.press("m")
    assert at(tab) == [20, 1]
    tab.keyboard.press("m")
    legend = tab.inner_text("#legend")
    tab.keyboard.press("u")
    assert "one scale for all" in tab.inner_text("#legend") and tab.inner_text("#legend") != legend
    tab.keyboard.press("u")
    before = tab.inner_html("#chart")
    tab.keyboard.press("v")
    assert tab.inner_html("#chart") != before and "A V/t" in tab.inner_html("#chart")
    tab.keyboard.press("v")
    tab.keyboard.press("t")
    assert tab.locator("#table tbody tr").count() == 56 and not tab.is_visible("#steps")
    tab.keyboard.press("t")
    assert tab.locator("#table tr").count() == 0
    tab.keyboard.press("p")
    assert tab.evaluate("document.getElementById('problem').className") == "open"
    tab.keyboard.press("?")
    assert tab.is_visible("#keys")
    tab.keyboard.press("Escape")
    tab.keyboard.press("Control+ArrowRight")
    assert at(tab)[0] == 20
    tab.keyboard.press("]")
    assert tab.url.endswith("#2") and "No label" in tab.inner_text("#sentence")
    assert "2 values unknown" in tab.inner_text("#legend")
    tab.keyboard.press("[")
    tab.keyboard.press("[")
    assert tab.url.endswith("#3")


def test_click_tap_and_the_curve(opened):
    tab = opened("same")
    tab.locator("#steps .text span", has_text="w10").first.click()
    assert tab.evaluate("trace.shown[0].text.pieces[cursor]") == " w10"
    box = tab.locator("#chart").bounding_box()
    tab.mouse.click(box["x"] + box["width"] - 8, box["y"] + 40)
    assert at(tab)[0] >= 54
    phone = opened("same", "phone")
    phone.locator("#steps .text:not(.off) span", has_text="w12").first.tap()
    assert phone.evaluate("trace.shown[0].text.pieces[cursor]") == " w12"
    assert phone.locator("#steps .text:visible").count() == phone.locator("#steps .row:not(.head)").count()


def test_one_model_at_two_betas_has_the_same_colours_and_nats(opened):
    """Each on its own scale; one token may differ, by rounding to three digits at the edge of a bin."""
    tab = opened("same")
    colours = "[0, 1].map(k => spans[k].map(s => s.className.replace(' here', '').replace('here', '')))"
    a, b = tab.evaluate(colours)
    assert sum(x != y for x, y in zip(a, b, strict=True)) <= 1 and len(set(a)) > 4
    nats = tab.evaluate("models.map(m => m.scale / m.beta)")
    assert nats[0] == pytest.approx(nats[1], rel=0.01)


def test_two_vocabularies_meet_at_the_same_character(opened):
    tab = opened("two")
    assert tab.evaluate("[0, 1, 2].map(t => { move(t); return tokenOf(1); })") == [1, 2, 2]
    assert "candidates are of A's vocabulary" in tab.inner_text("#read")


def test_odd_tokens_are_text(opened):
    tab = opened("same")
    rendered = tab.evaluate(
        "[...document.querySelectorAll('.row:not(.head)')].map(r => r.children[1].textContent).join('')"
    )
    assert "<b></script><!--" in rendered and "שלום漢😀" in rendered
    assert tab.locator("#steps b:not(.gutter b)").count() == 0
    assert "no token of its own" in rendered


def test_speed_of_two_models_of_3000_tokens(opened):
    """Generous here, since other work may run beside it; on an idle core 0.5 s and 5 ms."""
    tab = opened("long")
    load = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    moves = "for (let i = 0; i < 100; i++) move(i * 29);"
    each = tab.evaluate(
        f"(() => {{ const t = performance.now(); {moves} return (performance.now() - t) / 100; }})()"
    )
    assert load < 5000 and each < 50, (load, each)
    print(json.dumps({"opened_ms": load, "move_ms": each}))


def test_the_report_shows_values_and_hides_runs(opened):
    tab = opened("report")
    assert tab.locator("figure:visible").count() == 8
    assert tab.locator("figure").first.locator("path[stroke]").count() == 3
    tab.locator("#runs button").first.click()
    assert tab.locator("figure").first.locator("path[stroke]").count() == 2
    tab.click("#x")
    assert " s" in tab.locator("figure").first.inner_html()
    tab.locator("figure summary").first.click()
    assert tab.locator("figure").first.locator("tbody tr").count() == 2
    tab.click("#more > summary")
    assert tab.locator("figure:visible").count() == 10
