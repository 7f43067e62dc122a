"""The page in a real, headless Chromium.

Needs the package playwright and a Chromium, which DELTAMEM_BROWSER names or the PATH has; playwright's own download is
never used. Without them the tests are skipped, unless DELTAMEM_REQUIRE_BROWSER=1 is set: then they fail.
"""

import contextlib
import dataclasses
import os
import re
import shutil

import pytest
import torch
from inspection_support import CHAT, CONFIGS, TOKENIZER, filled, model_with, random_memory, random_trace, report

from deltamem_fast.inspection import page as module
from deltamem_fast.inspection.page import write_page
from deltamem_fast.inspection.trace import trace
from deltamem_fast.memory.figures import distance

pytestmark = pytest.mark.xdist_group("browser")  # one worker starts one browser

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SIZE = {"width": 1280, "height": 900}
# Whether the page is wider than the window, or a part of it is without a scroll bar of its own.
OVERFLOW = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
# Contrast (WCAG) of an element's text with what is behind it; a canvas resolves every way to write a colour.
CONTRAST = """([element, behind]) => {
  const context = Object.assign(document.createElement('canvas'), { width: 1, height: 1 })
    .getContext('2d', { willReadFrequently: true });
  const paint = (...colours) => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    const light = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
  };
  const style = getComputedStyle(element), card = getComputedStyle(behind).backgroundColor;
  const [a, b] = [paint(card, style.backgroundColor), paint(card, style.backgroundColor, style.color)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def missing(reason):
    if os.environ.get("DELTAMEM_REQUIRE_BROWSER") == "1":
        pytest.fail(f"DELTAMEM_REQUIRE_BROWSER=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the package playwright is not installed")
    names = (os.environ.get("DELTAMEM_BROWSER"), "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if path is None:
        missing("no Chromium was found")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


@contextlib.contextmanager
def opened(browser, path, scheme="light", size=SIZE):
    """A page that asked for nothing but itself, and had nothing to say on the console, when it is closed again."""
    context = browser.new_context(color_scheme=scheme, viewport=size)
    page = context.new_page()
    page.set_default_timeout(5000)
    requests, said = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.add_init_script(
        "window.broken = []; addEventListener('securitypolicyviolation', (e) => broken.push(e.violatedDirective))"
    )
    page.goto(path.as_uri())
    yield page
    assert requests == [path.as_uri()] and said == [] and page.evaluate("window.broken") == []
    context.close()


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """MSW, a text, and another memory: (path, memory, other, trace)."""
    model = model_with(CONFIGS["msw"])
    memory, other = filled(model), filled(model, seed=5)
    found = trace(model, TOKENIZER, CHAT, memory)
    path = tmp_path_factory.mktemp("page") / "page.html"
    facts = {"File": "alice.safetensors", "Backbone": "a small one"}
    return write_page(path, memory, trace=found, other=other, other_name="bob", facts=facts), memory, other, found


def number(text):
    return float(text.replace("−", "-"))


def near(value):
    return pytest.approx(float(value), rel=1e-3, abs=1e-12)


def shown(page, kind="state"):
    """The colours of a heat map's cells."""
    return page.eval_on_selector_all(f"#map-{kind} .map > div", "cells => cells.map(c => c.style.backgroundColor)")


def value_at(page, row, column, rank, kind="state"):
    """What the page says of a cell that is pointed at: the state, and the others if there are two memories."""
    page.locator(f"#map-{kind} .map > div").nth(row * rank + column).hover()
    text = page.locator("#readout").inner_text()
    assert text.startswith(f"Value row {row}, key column {column}: ")
    return [number(part) for part in re.findall(r": ([−\d.e+-]+)", text)]


def title(page):
    return page.locator("#state-title").inner_text()


def tip_figures(page):
    """The tooltip's rows: name → (this state, all layers)."""
    rows = page.eval_on_selector_all("#tip tbody tr", "rows => rows.map(r => [...r.children].map(c => c.textContent))")
    return {name: (number(one), number(total)) for name, one, total in rows}


def check_tip(page, found, token, layer, head):
    told = tip_figures(page)
    for name, measure in (("write", "writes"), ("read", "reads"), ("β", "beta"), ("state norm", "norms")):
        here, everywhere = getattr(found, measure)[token, layer, head], found.total(measure)[token]
        assert told[name] == (near(here), near(everywhere)), name
    assert f"token {token} of 0 to {len(found) - 1}" in page.locator("#tip").inner_text()


# --- what is shown


def test_the_table_says_what_the_report_says(browser, story):
    path, memory, other, _ = story
    with opened(browser, path) as page:
        rows = page.eval_on_selector_all(
            "#overview tbody tr", "rows => rows.map(row => [...row.children].map(cell => cell.textContent.trim()))"
        )
        assert len(rows) == 9
        for cells, entry, apart in zip(rows, report(memory), distance(memory, other)):
            assert cells[:2] == [str(entry.layer), str(entry.head)]
            figures = (entry.norm, entry.effective_rank, entry.saturation, apart.distance, apart.cosine)
            assert [number(cell) for cell in cells[2:7]] == [pytest.approx(f, rel=6e-3, abs=6e-3) for f in figures]
            assert cells[7].startswith(f"{entry.largest_row} (")


def test_a_layer_is_chosen_by_mouse_select_and_keys(browser, story):
    path, memory, other, _ = story
    with opened(browser, path) as page:
        assert title(page) == "Layer 0, head 0"
        seen = {tuple(shown(page))}

        def check(layer, head):
            assert title(page) == f"Layer {layer}, head {head}"
            assert page.locator("#layer").input_value() == str(layer) and page.locator("#head").input_value() == str(
                head
            )
            assert (
                page.locator("#overview tr.chosen input").get_attribute("aria-label") == f"layer {layer}, head {head}"
            )
            assert page.locator("#overview tr.chosen input").is_checked()
            assert f"layer {layer}, head {head}" in page.locator("#map-state .map").get_attribute("aria-label")
            ours, theirs = (m[layer][0, head, 1, 2].item() for m in (memory, other))
            assert value_at(page, 1, 2, 8) == [near(ours), near(theirs), near(ours - theirs)]
            seen.add(tuple(shown(page)))

        page.locator("#overview tbody tr").nth(5).locator("td").nth(3).click()
        check(1, 2)
        page.locator("#overview tbody tr").nth(5).locator("input").focus()
        page.keyboard.press("ArrowDown")
        check(2, 0)
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowUp")
        check(1, 1)
        page.locator("#layer").select_option("2")
        check(2, 1)
        page.locator("#head").focus()
        page.keyboard.press("ArrowDown")
        check(2, 2)
        assert len(seen) == 6
        cells = memory[2][0, 2].flatten()
        scale = max(cells.abs().max().item(), other[2][0, 2].abs().max().item())
        colours = shown(page)
        for value, colour in zip(cells.tolist(), colours):
            share = float(re.search(r"([\d.]+)%", colour).group(1))
            assert ("--neg" in colour) == (value < 0) and share <= 100 * abs(value) / scale + 0.1


def test_a_heat_map_is_read_with_the_arrow_keys(browser, story):
    path, memory, _, _ = story
    with opened(browser, path) as page:
        hint = page.locator("#readout").inner_text()
        page.locator("#head").focus()
        page.keyboard.press("Tab")
        for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowDown"):
            page.keyboard.press(key)
        text = page.locator("#readout").inner_text()
        assert text.startswith("Value row 2, key column 0: ")
        assert number(text.split(": ")[1].split(";")[0]) == near(memory[0][0, 0, 2, 0])
        assert page.locator(".map .marked").count() == 3
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")
        assert "key column 1" in page.locator("#readout").inner_text()
        page.locator("#layer").focus()
        assert page.locator("#readout").inner_text() == hint and page.locator(".map .marked").count() == 0


def test_a_token_has_its_figures_in_a_tooltip(browser, story):
    path, _, _, found = story
    with opened(browser, path) as page:
        tokens = page.locator("#tokens [role=option]")
        assert tokens.count() == len(found) and page.locator("#tip").is_hidden()
        tokens.nth(7).hover()
        check_tip(page, found, 7, 0, 0)
        bars = page.locator("#tip .charts > div").first.locator("i")
        assert bars.count() == 3 and bars.nth(0).get_attribute("class") == "chosen"
        sizes = found.writes.norm(dim=2)
        shares = [float(bar.evaluate("bar => bar.style.getPropertyValue('--share')")) for bar in bars.all()]
        assert shares == [near(size / sizes.max()) for size in sizes[7]]
        page.keyboard.press("Escape")
        assert page.locator("#tip").is_hidden()
        page.mouse.move(2, 2)

        page.locator("#layer").select_option("2")
        tokens.nth(0).focus()
        for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft"):
            page.keyboard.press(key)
        check_tip(page, found, 2, 2, 0)
        assert (
            tokens.nth(2).get_attribute("aria-describedby") == "tip" and tokens.nth(2).get_attribute("tabindex") == "0"
        )
        page.keyboard.press("End")
        check_tip(page, found, len(found) - 1, 2, 0)
        tokens.nth(1).hover()
        check_tip(page, found, 1, 2, 0)
        page.mouse.move(2, 2)
        check_tip(page, found, len(found) - 1, 2, 0)
        page.keyboard.press("Shift+Tab")
        assert page.locator("#tip").is_hidden()
        page.keyboard.press("Tab")
        check_tip(page, found, len(found) - 1, 2, 0)


def test_writes_and_reads_of_one_state_and_of_all(browser, story):
    path, _, _, found = story

    def strongest(page):
        shares = page.eval_on_selector_all(
            "#tokens .token", "all => all.map(t => +t.style.backgroundColor.match(/([\\d.]+)%/)[1])"
        )
        return shares

    with opened(browser, path) as page:
        for measure in ("writes", "reads"):
            for scope, sizes in (("all", found.total(measure)), ("one", getattr(found, measure)[:, 1, 2])):
                page.locator(f"input[name=measure][value={measure}]").check()
                page.locator(f"input[name=scope][value={scope}]").check()
                page.locator("#overview tbody tr").nth(5).click()
                assert strongest(page) == [pytest.approx(s, abs=0.1) for s in (100 * sizes / sizes.max()).tolist()]
                assert number(page.locator("#heat-max").inner_text()) == near(sizes.max())
                assert measure in page.locator("#tokens").get_attribute("class")
                page.locator("#tokens .token").nth(3).hover()
                heading = "Write by layer" if measure == "writes" else "Read by layer"
                assert heading in page.locator("#tip").inner_text()
        assert page.locator("#scope-one").inner_text() == "layer 1, head 2"


def test_the_scrubber_shows_the_state_after_each_token(browser, story):
    path, memory, other, found = story
    with opened(browser, path) as page:
        step = page.locator("#step")
        assert (step.input_value(), step.get_attribute("max")) == ("0", str(len(found)))
        assert page.locator("#step-name").inner_text() == "before the text"
        assert value_at(page, 3, 1, 8)[0] == near(memory[0][0, 0, 3, 1])
        before = shown(page)
        step.focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        assert value_at(page, 3, 1, 8) == [
            near(x) for x in (found.states[3, 0, 0, 3, 1], other[0][0, 0, 3, 1],
                              found.states[3, 0, 0, 3, 1] - other[0][0, 0, 3, 1])
        ]  # fmt: skip
        assert shown(page) != before and shown(page, "other")
        name = page.locator("#step-name").inner_text()
        assert name.startswith("after token 3: ") and found.tokens[3].strip() in name
        assert page.locator("#tokens [aria-selected=true]").get_attribute("data-token") == "3"
        assert page.locator("#map-state figcaption").inner_text() == "after token 3"

        page.locator("#tokens .token").nth(8).click()
        assert step.input_value() == "9" and value_at(page, 0, 0, 8)[0] == near(found.states[8, 0, 0, 0, 0])
        page.locator("#tokens .token").nth(8).focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        assert step.input_value() == "10"
        page.locator("#layer").select_option("1")
        step.focus()
        page.keyboard.press("End")
        assert value_at(page, 2, 2, 8)[0] == near(found.final[1, 0, 2, 2])
        page.keyboard.press("Home")
        assert shown(page) != before and page.locator("#tokens [aria-selected=true]").count() == 0


def figures_now(page):
    """The table beside the slider: name → its cells' text."""
    rows = page.eval_on_selector_all("#now tbody tr", "rows => rows.map(r => [...r.children].map(c => c.textContent))")
    return {name: cells for name, *cells in rows}


def test_the_figures_follow_the_slider(browser, story):
    path, memory, _, found = story
    with opened(browser, path) as page:
        assert figures_now(page)["write"] == ["–", "–"]
        before = torch.cat([state.flatten() for _, state in memory.items()]).norm()
        assert [number(cell) for cell in figures_now(page)["state norm"]] == [
            near(memory[0][0, 0].norm()),
            near(before),
        ]
        page.locator("#layer").select_option("2")
        for token in (0, 6, len(found) - 1):
            page.locator("#step").fill(str(token + 1))
            told = figures_now(page)
            for name, measure in (("write", "writes"), ("read", "reads"), ("β", "beta"), ("state norm", "norms")):
                figures = (getattr(found, measure)[token, 2, 0], found.total(measure)[token])
                assert [number(cell) for cell in told[name]] == [near(figure) for figure in figures], (token, name)


def test_the_grid_shows_every_head_and_chooses_one(browser, story):
    path, _, _, found = story
    pixels = "all => all.map(c => [...c.getContext('2d').getImageData(0, 0, 4, 4).data].join())"
    with opened(browser, path) as page:
        thumbs = page.locator("#heads .thumb")
        assert thumbs.count() == 9 and "before the text" in page.locator("#heads-name").inner_text()
        drawn = page.eval_on_selector_all("#heads .thumb", pixels)
        assert len(set(drawn)) == 9
        thumbs.nth(5).click()
        assert title(page) == "Layer 1, head 2"
        assert page.locator("#heads [aria-checked=true]").get_attribute("aria-label") == "layer 1, head 2"
        thumbs.nth(5).focus()
        moves = {"ArrowRight": (2, 2), "ArrowUp": (2, 1), "ArrowLeft": (1, 1), "Home": (0, 0), "End": (2, 2)}
        for key, (layer, head) in moves.items():
            page.keyboard.press(key)
            assert title(page) == f"Layer {layer}, head {head}"
            assert page.locator("#overview tr.chosen input").is_checked()
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "layer 2, head 2"
        assert page.locator("#heads .thumb[tabindex='0']").count() == 1
        page.locator("#step").fill("4")
        assert "after token 3" in page.locator("#heads-name").inner_text()
        assert page.eval_on_selector_all("#heads .thumb", pixels) != drawn
        # One scale for all: the largest of all states at all times has the darkest pixel.
        scale = max(found.states.abs().max(), found.initial.abs().max())
        assert number(page.locator("#heads-name").inner_text().split("up to ")[1]) == pytest.approx(
            scale.item(), rel=6e-3
        )


def test_a_text_too_long_for_figures_of_each_state(browser, tmp_path, monkeypatch):
    found, memory = random_trace()
    whole = write_page(tmp_path / "a.html", memory, trace=found).stat().st_size
    monkeypatch.setattr(module, "KEPT_FIGURES", 4 * found.writes.numel() - 1)
    path = write_page(tmp_path / "b.html", memory, trace=found)
    assert path.stat().st_size < whole - 4 * 4 * found.writes.numel()
    with opened(browser, path) as page:
        assert page.locator("#scope").is_hidden()
        page.locator("#tokens .token").nth(7).click()
        assert number(figures_now(page)["write"][0]) == near(found.total("writes")[7])
        assert "all layers" in page.locator("#tip").inner_text() and page.locator("#tip .bars").count() == 0
        page.locator("#heads .thumb").nth(3).click()
        assert title(page) == "Layer 1, head 1"


def test_a_memory_alone_and_a_trace_alone(browser, tmp_path):
    memory = random_memory(layers=(2, 7), rank=3)
    with opened(browser, write_page(tmp_path / "a.html", memory)) as page:
        assert page.locator("#text").is_hidden() and page.locator("#scrub").is_hidden()
        assert page.locator("#head-label").is_hidden() and page.locator(".map").count() == 1
        page.locator("#layer").select_option("1")
        assert title(page) == "Layer 7" and value_at(page, 2, 0, 3) == [near(memory[7][0, 0, 2, 0])]

    model = model_with(CONFIGS["ssw"])
    found = trace(model, TOKENIZER, CHAT)
    with opened(browser, write_page(tmp_path / "b.html", trace=found)) as page:
        assert page.locator("#step").input_value() == str(len(found))
        assert value_at(page, 1, 1, 8) == [near(found.final[0, 0, 1, 1])]
        assert "A segment is written once" in page.locator("#text-note").inner_text()
        page.locator("#tokens .token").nth(5).hover()
        check_tip(page, found, 5, 0, 0)
        assert f"segment {found.segment_ids[5]}" in page.locator("#tip").inner_text()


def test_states_that_are_not_finite_are_told(browser, tmp_path):
    memory = random_memory(rank=3)
    memory[0][0, 0, 1, 1] = torch.nan
    memory[0][0, 0, 0, 2] = -torch.inf
    with opened(browser, write_page(tmp_path / "a.html", memory)) as page:
        assert "NaN" in page.locator("#overview tbody tr").first.inner_text()
        page.locator(".map > div").nth(4).hover()
        assert page.locator("#readout").inner_text().endswith(": NaN")
        page.locator(".map > div").nth(2).hover()
        assert page.locator("#readout").inner_text().endswith(": −∞")


def test_untrusted_text_is_shown_and_never_run(browser, tmp_path):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\n\x1b"
    found, memory = random_trace()
    found = dataclasses.replace(found, tokens=(attack, *found.tokens[1:]))
    path = write_page(
        tmp_path / "a.html", memory, trace=found, other=memory, title=attack, other_name=attack, facts={attack: attack}
    )
    with opened(browser, path) as page:
        page.on("dialog", lambda dialog: pytest.fail("a script ran"))
        page.locator("#tokens .token").first.click()
        assert page.locator("#tokens .token").first.text_content() == attack.replace("\n", "⏎\n").replace("\x1b", "␛")
        for place in ("h1", "#facts dt", "#facts dd", "#map-other b"):
            assert attack[:40] in page.locator(place).first.text_content()
        assert (
            attack[:40] in page.locator("#tip").text_content()
            and attack[:40] in page.locator("#step-name").text_content()
        )
        assert page.locator("img").count() == 0 and page.locator("script").count() == 8


def test_the_policy_stops_what_is_put_in_later(browser, story, tmp_path):
    """A script, a style and a picture that are not the template's do nothing."""
    text = story[0].read_text("utf-8")
    alien = (
        '<script>window.ran = 1</script><style>body { display: none }</style><img src="https://example.invalid/a.png">'
    )
    path = tmp_path / "changed.html"
    path.write_text(text.replace("<header>", alien + "<header>"), "utf-8")
    context = browser.new_context()
    page = context.new_page()
    left = []
    page.on("requestfinished", lambda request: left.append(request.url))
    page.goto(path.as_uri())
    assert page.evaluate("window.ran") is None and page.locator("h1").is_visible()
    assert left == [path.as_uri()]
    context.close()


# --- how it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark(browser, story, scheme, tmp_path):
    with opened(browser, story[0], scheme) as page:
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 384) == (scheme == "dark")
        for measure in ("writes", "reads"):
            page.locator(f"input[name=measure][value={measure}]").check()
            for token in page.locator("#tokens .token").element_handles():
                assert page.evaluate(CONTRAST, [token, page.query_selector("#text")]) >= 4.5
        page.locator("#tokens .token").nth(5).hover()
        for place in (
            "h1",
            "#facts dt",
            ".note",
            "summary",
            "#tip th",
            "#overview th",
            ".legend span",
            "footer",
            ".axis",
        ):
            element = page.query_selector(place)
            behind = page.query_selector("body" if place in ("h1", "#facts dt", "footer") else ".card")
            assert page.evaluate(CONTRAST, [element, behind]) >= 4.5, place
        assert not page.evaluate(OVERFLOW)
        picture = page.screenshot(path=tmp_path / f"{scheme}.png")
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"


def test_it_fits_a_narrow_screen(browser, story):
    with opened(browser, story[0], size={"width": 360, "height": 740}) as page:
        assert not page.evaluate(OVERFLOW)
        page.locator("summary").click()
        tokens = page.locator("#tokens .token")
        tokens.nth(0).focus()
        for key in ("Home", *["ArrowRight"] * 9, "End"):
            page.keyboard.press(key)
            box = page.locator("#tip").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] >= 0
            assert not page.evaluate(OVERFLOW)
        page.locator("#overview tbody tr").nth(8).locator("input").focus()
        assert title(page) == "Layer 0, head 0"
        page.keyboard.press("Space")
        assert title(page) == "Layer 2, head 2" and not page.evaluate(OVERFLOW)


def test_every_control_has_a_name_and_is_reached_with_the_tab_key(browser, story):
    with opened(browser, story[0]) as page:
        seen = []
        for _ in range(20):
            page.keyboard.press("Tab")
            seen.append(page.evaluate(
                "(e => [e.id || e.name || e.className || e.tagName, e.labels?.[0]?.textContent || "
                "e.getAttribute('aria-label') || e.textContent])(document.activeElement)"
            ))  # fmt: skip
            if seen[-1][0] == "BODY":
                break
        names = [name for name, _ in seen]
        assert names[:3] == ["state", "SUMMARY", "layer"] or names[:4] == ["state", "scroll", "SUMMARY", "layer"]
        assert {"head", "map", "step", "measure", "scope"} <= set(names) and names.count("map") == 3
        assert any("token" in name for name in names)
        assert all(label.strip() for name, label in seen if name != "BODY")


def test_many_layers_and_a_long_text_without_lag(browser, tmp_path):
    found, memory = random_trace(layers=36, heads=4, rank=8, tokens=2000, states=False)
    path = write_page(tmp_path / "large.html", memory, trace=found, other=random_memory(range(36), 1, 4, 8, seed=9))
    context = browser.new_context(viewport=SIZE)
    page = context.new_page()
    developer = context.new_cdp_session(page)
    # Time that the page's thread ran on a processor: a busy machine makes a page wait, not work.
    developer.send("Performance.enable", {"timeDomain": "threadTicks"})

    def ran():
        """Seconds of processor time that the page's main thread has spent in tasks so far."""
        metrics = developer.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def took(action):
        """Seconds of processor time of an action with the layout and style that follow."""
        before = ran()
        page.evaluate(f"() => {{ {action}; document.body.offsetHeight }}")
        return ran() - before

    before = ran()
    page.goto(path.as_uri())
    page.locator("#tokens .token").nth(1999).wait_for(state="attached")
    assert 0.01 < ran() - before < 2
    assert took("document.querySelectorAll('.token')[1500].focus()") < 1  # the first tooltip finds the bars' scale
    assert took("document.querySelectorAll('.token')[1501].focus()") < 0.25
    assert took("document.querySelector('[name=measure][value=reads]').click()") < 0.5
    assert took("document.querySelectorAll('#overview tbody tr')[140].click()") < 0.5
    assert title(page) == "Layer 35, head 0"
    context.close()

    found, memory = random_trace(layers=36, heads=4, rank=8, tokens=256)
    path = write_page(tmp_path / "states.html", memory, trace=found)
    with opened(browser, path) as page:
        assert page.locator("#step").get_attribute("max") == "256"
        page.locator("#step").fill("200")
        assert value_at(page, 4, 4, 8)[0] == near(found.states[199, 0, 0, 4, 4])
