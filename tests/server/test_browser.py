"""The page in a real browser: chat, and what happens inside meanwhile."""

import shutil
import time
from unittest import mock

import mlx.core as mx
import pytest
from chat_model import saying, write_chat_model
from serving import served

import mlx_flash
from mlx_flash.server import Settings, open_server
from mlx_flash.server.answering import Answering

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_MS = 60_000  # a busy machine
# Notes each length that the last answer's text has had.
WATCH = """() => {
  window.lengths = [];
  const note = () => {
    const texts = document.querySelectorAll(".model > .text");
    if (texts.length) window.lengths.push(texts[texts.length - 1].textContent.length);
  };
  const options = { childList: true, subtree: true, characterData: true };
  new MutationObserver(note).observe(document.getElementById("log"), options);
}"""
DRAWN = "() => document.getElementById('map').toDataURL()"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(NAMES)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo():
    settings = Settings(port=0)
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        yield made


@pytest.fixture
def open_page(browser):
    """open_page(listener, …) → its page, which may complain of nothing."""
    contexts, complaints = [], []

    def complain(said):
        if said.type in ("error", "warning"):
            complaints.append(said.text)

    def make(listener, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", complain)
        page.goto(f"http://127.0.0.1:{listener.port}/")
        return page

    make.complaints = complaints
    yield make
    for context in contexts:
        context.close()
    assert complaints == []


def slowly(logprobs):
    """The likeliest token, and time to stop the answer meanwhile."""
    time.sleep(0.05)
    return mx.argmax(logprobs, axis=-1)


def until(page, expression):
    """Wait for it; the page itself may not evaluate strings."""
    for _ in range(WAIT_MS // 50):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it never came to {expression}")


def test_tokens_arrive_and_the_heat_map_changes(demo, open_page):
    page = open_page(demo)
    page.wait_for_selector(".example")
    assert page.inner_text("#model").startswith("demo_model 11.8 MB")
    until(page, "() => document.getElementById('map').width > 300")
    before = page.evaluate(DRAWN)
    page.evaluate(WATCH)
    page.click("summary:has-text('Settings')")
    page.fill("#max-tokens", "40")
    page.fill("#message", "Once upon a time")
    page.press("#message", "Enter")
    page.wait_for_selector(".figures")
    lengths = page.evaluate("window.lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 10, "the text came at once"
    text = page.inner_text(".model > .text")
    assert "little girl named Lily" in text and len(text) == lengths[-1]
    said = page.inner_text(".figures")
    assert said.startswith("40 tokens · ") and "% hits" in said
    page.wait_for_selector("#phase:has-text('the last one, 40 tokens')")
    assert page.evaluate(DRAWN) != before
    figures = page.locator("#figures .value").all_inner_texts()
    assert all(float(figure) > 0 for figure in figures)
    assert figures[3] == "4.00"
    page.focus("#map")
    page.keyboard.press("ArrowDown")
    assert "Layer 1, neurons 0 to 7" in page.inner_text("#map-cell")
    page.click("summary:has-text('As a table')")
    page.select_option("#since", "lately")


def test_an_answer_can_be_stopped_and_asked_again(demo, open_page):
    page = open_page(demo)
    page.wait_for_selector(".example")
    with mock.patch.object(Answering, "_sampler", lambda *_: slowly):
        page.click(".example >> nth=0")
        page.wait_for_selector(".model > .text:has-text('little girl')")
        page.click("#stop")
        page.wait_for_selector(".figures:has-text('stopped')")
    assert page.is_visible("#send") and not page.is_visible("#stop")
    page.click("#new")
    assert page.locator(".entry").count() == 0 and page.is_visible("#welcome")


def test_errors_are_shown(demo, open_page):
    page = open_page(demo)
    page.wait_for_selector(".example")
    page.fill("#message", "word " * 200)
    page.press("#message", "Enter")
    said = page.inner_text(".error")
    assert "this server has room for 128" in said
    assert page.get_attribute(".error", "role") == "alert"
    assert page.is_visible("#send")
    assert len(open_page.complaints) == 1 and "400" in open_page.complaints.pop()


def test_markup_is_text(demo, open_page):
    page = open_page(demo)
    page.wait_for_selector(".example")
    page.fill("#message", "<img src=x onerror=alert(1)>")
    page.press("#message", "Enter")
    page.wait_for_selector(".figures")
    assert page.inner_text(".user .text") == "<img src=x onerror=alert(1)>"
    assert page.locator(".entry img").count() == 0


def test_what_a_model_thinks_is_apart_from_its_answer(tmp_path, open_page):
    folder = write_chat_model(tmp_path / "chatty")
    settings = Settings(port=0, max_tokens=20)
    with open_server(str(folder), "1GB", settings) as made, served(made):
        page = open_page(made, color_scheme="dark")
        page.wait_for_selector(".example")
        with saying(made.worker.tokenizer, "<think> w7 w8 </think> w9 w10"):
            page.fill("#message", "w5 w6")
            page.click("#send")
            page.wait_for_selector(".figures")
        assert "w7 w8" in page.inner_text(".thought")
        assert page.inner_text(".model > .text").split() == ["w9", "w10"]
        page.fill("#message", "w6")
        page.press("#message", "Enter")
        page.locator(".figures").nth(1).wait_for()
        roles = page.locator(".entry").evaluate_all("all => all.map(e => e.className)")
        assert roles == ["entry user", "entry model"] * 2


def test_a_phone_shows_one_view_at_a_time(demo, open_page):
    size = {"width": 390, "height": 844}
    page = open_page(demo, viewport=size, has_touch=True, is_mobile=True)
    page.wait_for_selector(".example")
    assert not page.is_visible("#inside")
    page.tap("#tab-inside")
    assert page.is_visible("#map") and not page.is_visible("#chat")
    assert page.get_attribute("#tab-inside", "aria-pressed") == "true"
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


def test_a_key_is_asked_for_once(open_page):
    settings = Settings(port=0, api_key="sesame")
    with open_server(str(mlx_flash.DEMO_MODEL), "50%", settings) as made, served(made):
        page = open_page(made)
        page.fill("#key-value", "sesame")
        page.press("#key-value", "Enter")
        page.wait_for_selector(".example")
        assert not page.is_visible("#key")
        complaints = open_page.complaints
        assert complaints and all("401" in said for said in complaints)
        complaints.clear()


def test_everything_has_a_name(demo, open_page):
    """For those who hear the page instead of seeing it."""
    page = open_page(demo)
    page.wait_for_selector(".example")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
        .filter((e) => !(e.labels?.length || e.textContent.trim()))
        .map((e) => e.id)"""
    )
    assert unnamed == []
    label = page.get_attribute("#map", "aria-label")
    assert label.startswith("Heat map of 4 layers with 8,192 neurons")
