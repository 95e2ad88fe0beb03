"""The page in a real browser: searched, paged and sorted by mouse and keyboard; nothing in a row is ever run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from batchgen.checkpoint import RunFolder
from batchgen.report import write
from tests.commands.starts import call, echo, until
from tests.report import folders

Open = Callable[..., Page]


def page_of(run: Path) -> Path:
    made = write(RunFolder(run), run / "report.html", run / "report-plots", rows=100_000, text_characters=2000)
    return made.page


@pytest.fixture(scope="module")
def with_errors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with failed rows, and with texts that are markup."""
    run = folders.with_errors(tmp_path_factory.mktemp("errors"))
    return page_of(run)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 100,000 rows."""
    folder = tmp_path_factory.mktemp("large")
    with open(folder / "p.jsonl", "w", encoding="utf-8") as file:
        for number in range(100_000):
            text = f"what is said of subject {number} " + "and of this and that " * (number % 19)
            file.write(json.dumps({"id": f"doc-{number}", "prompt": text, "max_new_tokens": 400}) + "\n")
    assert call(folder, *echo("p.jsonl", "-o", "out")).code == 0
    return page_of(folder / "out")


def rows(page: Page) -> Locator:
    return page.locator("#rows tr.row")


def found(page: Page, text: str) -> None:
    """Waits until the page says that this many rows were found."""
    expect(page.locator("#found")).to_have_text(text)


def column(page: Page, number: int) -> list[str]:
    return page.locator(f"#rows tr.row td:nth-child({number})").all_inner_texts()


def numbers(page: Page, of: int) -> list[int]:
    return [int(text.replace(",", "")) for text in column(page, of)]


def test_rows_are_paged_sorted_and_filtered(with_errors: Path, opened: Open) -> None:
    page = opened(with_errors)
    found(page, "125 rows")
    assert column(page, 1) == [str(number) for number in range(50)]
    page.click("#next")
    expect(rows(page).first).to_contain_text("row-50")
    page.fill("#page", "3")
    page.press("#page", "Enter")
    expect(rows(page)).to_have_count(25)
    expect(page.locator("#next")).to_be_disabled()
    page.click("#rows th[data-sort=generated]")
    expect(rows(page).first).to_contain_text("long")
    lengths = numbers(page, 5)
    assert lengths == sorted(lengths, reverse=True)
    page.click("#rows th[data-sort=generated]")
    expect(page.locator("#rows th[data-sort=generated]")).to_have_attribute("aria-sort", "ascending")
    expect(rows(page).first).to_have_class("row failed")
    page.select_option("#filter", "failed")
    found(page, "3 of 125 rows")
    assert sorted(column(page, 3)) == ["malformed_json", "missing_prompt", "wrong_type"]
    page.select_option("#filter", "=wrong_type")
    found(page, "1 of 125 rows")


def test_search_finds_ids_prompts_texts_errors_and_columns(with_errors: Path, opened: Open) -> None:
    page = opened(with_errors)
    found(page, "125 rows")
    for words, count in [("ROW-117", 1), ("x" * 49, 3), ("not valid json", 1), ("missing_pr", 1), ("start word", 1)]:
        page.fill("#search", words)
        found(page, f"{count} of 125 rows")
        expect(page.locator("#rows mark").first).to_have_text(re.compile(re.escape(words), re.IGNORECASE))
    page.fill("#search", ".*(")  # not a pattern
    found(page, "0 of 125 rows")
    page.fill("#search", "")
    found(page, "125 rows")


def test_row_opens_to_its_whole_text_and_says_what_was_cut(with_errors: Path, opened: Open) -> None:
    page = opened(with_errors)
    page.fill("#search", "start word")
    found(page, "1 of 125 rows")
    page.locator("#rows tr.row button").press("Enter")
    prompt = page.locator(".texts .prompt")
    assert len(prompt.locator("pre").inner_text()) == 2000
    expect(prompt).to_contain_text("and 2,509 more characters, which this page leaves out")
    page.locator("#rows tr.row button").press("Enter")
    expect(page.locator(".texts")).to_have_count(0)


def test_markup_in_a_row_is_shown_as_text_and_never_run(with_errors: Path, opened: Open) -> None:
    page = opened(with_errors)
    page.fill("#search", "</script>")
    found(page, "2 of 125 rows")
    for row in rows(page).all():
        row.locator("button").click()
    expect(page.locator(".texts .prompt pre").first).to_have_text(folders.EVIL)
    expect(page.locator(".texts .columns pre")).to_contain_text("onerror")
    assert page.locator("img, iframe, object, embed, link, [onerror]").count() == 0
    # As many scripts as were written: the rows' and the page's own.
    assert page.locator("script").count() == 3


def test_page_forbids_itself_the_network_and_every_script_but_its_own(with_errors: Path, browser: Browser) -> None:
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(with_errors.as_uri())
    found(page, "125 rows")
    for attempt in (
        "fetch('http://127.0.0.1:9/').catch(() => 0)",
        "void document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))",
        "void document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))",
    ):
        page.evaluate(attempt)
    assert page.evaluate("window.ran") is None
    for directive in ("connect-src", "img-src", "script-src 'sha256-"):
        # Waiting lets the browser's messages in.
        until(lambda name=directive: page.wait_for_timeout(20) or any(name in line for line in refused))
    page.close()


def test_page_of_100_000_rows_is_searched_and_paged(large: Path, opened: Open) -> None:
    assert large.stat().st_size < 10e6
    page = opened(large)
    found(page, "100,000 rows")
    expect(page.locator("#pages")).to_have_text("2,000")
    page.fill("#page", "2000")
    page.press("#page", "Enter")
    expect(rows(page).last).to_contain_text("doc-99999")
    page.fill("#search", "subject 9876")
    found(page, "11 of 100,000 rows")
    assert column(page, 1) == ["9876", *(str(number) for number in range(98760, 98770))]
    page.fill("#search", "that")
    found(page, "94,736 of 100,000 rows")
    page.click("#rows th[data-sort=prompt]")
    expect(page.locator("#rows th[data-sort=prompt]")).to_have_attribute("aria-sort", "descending")
    expect(rows(page).first.locator("td").nth(3)).to_have_text("408")


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_drawing_shows_in_the_page_colours_and_nothing_is_wider_than_the_page(
    with_errors: Path, opened: Open, width: int, scheme: str
) -> None:
    page = opened(with_errors, width, scheme)
    found(page, "125 rows")
    drawings = page.locator("figure svg[role=img]")
    assert drawings.count() == 6
    ink = page.evaluate("getComputedStyle(document.body).color")
    for drawing in drawings.all():
        box = drawing.bounding_box()
        assert box is not None
        assert box["width"] >= 400
        assert box["height"] >= 100
        assert drawing.get_attribute("aria-label")
        labels = drawing.evaluate("svg => [...svg.querySelectorAll('text')].map(text => getComputedStyle(text).fill)")
        assert labels
        assert "rgb(0, 0, 0)" not in labels  # what a colour without a name in the style sheet comes to
    assert ink == ("rgb(29, 39, 51)" if scheme == "light" else "rgb(228, 233, 240)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_parts_of_a_second_fill_their_bar_too(with_errors: Path, opened: Open) -> None:
    page = opened(with_errors)  # of a run of less than a second
    bar = page.locator("[aria-labelledby=went] .bar")
    widths = bar.evaluate("bar => [bar.clientWidth, ...[...bar.children].map(part => part.clientWidth)]")
    assert sum(widths[1:]) > 0.97 * widths[0]
