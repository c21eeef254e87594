"""A report as a browser shows it, wide and narrow, light and dark. Slow: a browser starts."""

import shutil

import pytest
from report_facts import facts, margins, pair

from repo_jax.report import write_report

pytestmark = pytest.mark.slow
LONG = "word" * 200  # what wraps nowhere by itself


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright: it drives the browser")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"there is no Chromium here (apt-get install chromium): {error}".splitlines()[0])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    worst = [pair(LONG, -3.0, -2.0, text=f"{LONG} <b>{LONG}")]
    long = {"title": f"repo on {LONG}", "about": [LONG, f"  {LONG}"], "recipe": LONG, "command": f"repo-jax {LONG}"}
    versions = {"devices": "1 x cpu", "system": LONG}
    return write_report(
        tmp_path_factory.mktemp("report"), facts(margins=margins(worst=worst), versions=versions, **long)
    )


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_there_and_nothing_runs_over_the_side(browser, report, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = page.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().toJSON())")
    assert len(drawn) == 10 and all(box["height"] > 100 and 200 < box["width"] < width for box in drawn)
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    ink, behind = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (brightness(ink) > brightness(behind)) == (scheme == "dark")
    assert page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill") == ink
    assert asked == [report.as_uri()] and not said
    page.close()


def brightness(color: str) -> int:
    return sum(int(part) for part in color.removeprefix("rgb(").removesuffix(")").split(","))
