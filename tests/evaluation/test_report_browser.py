"""The report in a real browser: it opens from disk, says nothing on the console, and can be read and used by all."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import browser
import given_predictions as given
import pytest
from external_records import write_external_set
from page_records import write_audit, write_maps, write_view_choices
from report_pages import CONFIG, write_page

import report as synthetic_report
from utils.building import build_commands
from utils.evaluation.evaluate import evaluate

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.found() is None, reason="no Chromium here; make test-browser installs it where it can"),
]
CLASSES = ("<script>document.title = 'taken'</script>", "a \"quoted\" & 'named' class", "line\nbreak", "Apfelbäume")
NAME = "{row} <img src=x onerror=document.title='taken'> \".jpg"
CONTRAST = 4.5  # WCAG 2, level AA, for text
PAPER = 718  # pixels between the margins of A4
COVERED = """
[...document.querySelectorAll('svg.figure')].flatMap(figure => {
  const texts = [...figure.querySelectorAll('text')].filter(node => node.textContent.trim());
  const boxes = texts.map(node => node.getBoundingClientRect());
  return texts.flatMap((node, one) => texts.slice(one + 1).filter((_, later) => {
    const a = boxes[one], b = boxes[one + 1 + later];
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    return across > 1 && down > 0.25 * Math.min(a.height, b.height);  // lines of text have space above and below
  }).map(other => `${node.textContent} / ${other.textContent}`));
})"""
"""Pairs of texts of one figure of which one lies on the other"""


SECTIONS = {
    "external": "#external",
    "audit": "#audit",
    "views": "#learned:has([aria-label='Test-time augmentation, table'])",
    "maps": "#images:has(.pair)",
}
"""{what the page shows: selector of the section that it is in}"""
MISREAD = """
(() => {
  const section = document.querySelector("SELECTOR");
  section.querySelectorAll('details').forEach(node => node.open = true);
  const lines = [], walker = document.createTreeWalker(section, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, range = document.createRange();
    range.selectNodeContents(node);
    if (!node.textContent.trim() || node.parentElement.closest('svg')) continue;
    for (const box of range.getClientRects())
      if (box.width > 1) lines.push({text: node.textContent.trim().slice(0, 60), box, node});
  }
  const found = [];
  for (const {text, box, node} of lines) {
    const scroll = node.parentElement.closest('.scroll');
    const frame = (scroll || document.documentElement).getBoundingClientRect();
    const isBeside = box.right > frame.right + 1 || box.left < frame.left - 1;
    if (isBeside && !(scroll && scroll.scrollWidth > scroll.clientWidth + 1)) found.push(`cut off: ${text}`);
    for (let parent = node.parentElement; parent !== section; parent = parent.parentElement) {
      const style = getComputedStyle(parent), around = parent.getBoundingClientRect();
      const hides = style.overflowX === 'hidden' || style.overflowY === 'hidden';
      if (hides && (box.right > around.right + 1 || box.bottom > around.bottom + 1)) found.push(`hidden: ${text}`);
    }
  }
  lines.forEach((one, place) => lines.slice(place + 1).forEach(other => {
    const across = Math.min(one.box.right, other.box.right) - Math.max(one.box.left, other.box.left);
    const down = Math.min(one.box.bottom, other.box.bottom) - Math.max(one.box.top, other.box.top);
    if (across > 1 && down > 0.35 * Math.min(one.box.height, other.box.height))
      found.push(`one on the other: ${one.text} / ${other.text}`);
  }));
  for (const image of section.querySelectorAll('img')) {
    const box = image.getBoundingClientRect(), around = image.closest('li').getBoundingClientRect();
    if (box.width < 16 || box.height < 16) found.push(`too small: ${image.alt}`);
    if (box.right > around.right + 1 || box.left < around.left - 1) found.push(`beside its frame: ${image.alt}`);
  }
  const box = section.getBoundingClientRect();
  if (!lines.length || box.width < 100 || box.height < 100) found.push('the section is not seen');
  return found;
})()"""
"""Texts and pictures of a section that are cut off, hidden, or lie on others"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    workspace = synthetic_report.synthetic(tmp_path_factory.mktemp("synthetic"), classes=CLASSES, name=NAME)
    write_external_set(workspace, ("ensemble_00", "Custom00"), CLASSES, image=NAME)
    return write_page(workspace)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page with an external set, an audit, views of test-time augmentation and class-activation maps."""
    workspace = synthetic_report.synthetic(tmp_path_factory.mktemp("whole"), classes=CLASSES, name=NAME)
    models = ("ensemble_00", "Custom00")
    write_external_set(workspace, models, CLASSES, image=NAME)
    write_audit(workspace, models)
    write_view_choices(workspace)
    write_maps(workspace, CONFIG)
    return write_page(workspace)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The page of 65 ensembles of 20 members and 13 classes."""
    size = replace(synthetic_report.QUICK, ensembles=65, members=20, classes=13)
    return write_page(synthetic_report.synthetic(tmp_path_factory.mktemp("many"), size))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The page of imported predictions, without images; the test split has no row of one class."""

    def without_cats(arrays):
        return given.fewer(arrays["labels"] != given.CLASSES.index("cat"))(arrays)

    folder = tmp_path_factory.mktemp("imported")
    workspace = given.empty_workspace(folder / "workspace")
    spoiled = given.write(folder / "given", change=lambda _, stem, own: without_cats(own) if stem == "test" else own)
    given.take_in(workspace, spoiled)
    build_commands.build_ensemble(CONFIG, workspace)
    evaluate(CONFIG, workspace)
    return workspace.report("test")


@pytest.fixture(params=["page", "whole", "many", "imported"])
def any_page(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser() as opened:
        yield opened


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_complaint_and_all_images_load(page, chromium, scheme):
    chromium.open(page, scheme=scheme)
    assert chromium.run("document.images.length") == 20
    assert chromium.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert chromium.run("[...document.images].every(image => image.alt)")
    assert chromium.run("document.querySelectorAll('svg.figure').length") >= 9
    assert chromium.run("document.querySelectorAll('script, iframe, object, [onerror], [onload]').length") == 0
    assert chromium.run("document.title") == "ensemble_00: test report"
    assert chromium.complaints == []


def test_user_text_is_shown_as_it_is_written(page, chromium):
    chromium.open(page)
    text = chromium.run("document.body.innerText")
    assert CLASSES[0] in text
    assert CLASSES[1] in text
    assert "line\\nbreak" in text
    assert "<img src=x onerror=document.title='taken'> \".jpg" in text


def test_headings_are_in_order_and_ids_are_one_of_a_kind(page, chromium):
    chromium.open(page)
    levels = chromium.run("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(node => Number(node.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = chromium.run("[...document.querySelectorAll('[id]')].map(node => node.id)")
    assert len(ids) == len(set(ids))
    targets = chromium.run("[...document.querySelectorAll('a[href^=\"#\"]')].map(node => node.hash.slice(1))")
    assert targets
    assert set(targets) <= set(ids)


def test_the_browser_has_a_font_so_that_the_measurements_below_mean_something(page, chromium):
    chromium.open(page)
    assert chromium.run("document.createElement('canvas').getContext('2d').measureText('letters').width") > 20


def test_no_page_complains(any_page, chromium):
    chromium.open(any_page)
    assert chromium.run("document.querySelectorAll('svg.figure').length") >= 9
    assert chromium.complaints == []


@pytest.mark.parametrize("width", [320, 400, 1000, 1280])
def test_nothing_is_wider_than_the_window(any_page, chromium, width):
    chromium.open(any_page, width=width)
    chromium.run("document.querySelectorAll('details').forEach(node => node.open = true)")
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert (
        chromium.run("Math.max(0, ...[...document.images].map(image => image.getBoundingClientRect().right))") <= width
    )
    captions = "[...document.querySelectorAll('caption')].map(node => node.getBoundingClientRect().width)"
    assert chromium.run(f"Math.max(...{captions})") <= width


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("section", SECTIONS)
def test_sections_of_other_commands_are_read_on_a_phone_and_on_a_desktop(whole, chromium, section, width):
    chromium.open(whole, width=width)
    assert chromium.run(MISREAD.replace("SELECTOR", SECTIONS[section])) == []


@pytest.mark.parametrize("width", [400, 1280])
def test_a_map_stands_beside_each_example_image(whole, chromium, width):
    chromium.open(whole, width=width)
    boxes = chromium.run(
        "[...document.querySelectorAll('.pair')].map(pair => [...pair.querySelectorAll('img')]"
        ".map(image => image.getBoundingClientRect()).map(({left, right, top}) => [left, right, top]))"
    )
    assert len(boxes) == 20
    assert all(first[1] <= second[0] and first[2] == second[2] for first, second in boxes)
    warnings = chromium.run("[...document.querySelectorAll('.warning')].map(node => node.innerText).join()")
    assert "looks at the background: in the audit, border pixels alone predict the class of 74%" in warnings


@pytest.mark.parametrize(("width", "medium"), [(1280, ""), (PAPER, "print")])
def test_nothing_is_cut_off_on_a_desktop_and_on_paper(any_page, chromium, width, medium):
    chromium.open(any_page, width=width, medium=medium)
    chromium.run("document.querySelectorAll('details').forEach(node => node.open = true)")
    cut = "[...document.querySelectorAll('.scroll')].filter(node => node.scrollWidth > node.clientWidth + 1)"
    assert chromium.run(f"{cut}.map(node => node.getAttribute('aria-label'))") == []
    assert chromium.run("document.documentElement.scrollWidth") <= width


def test_figures_fit_a_phone(any_page, chromium):
    chromium.open(any_page, width=400)
    widths = chromium.run(
        "[...document.querySelectorAll('svg.figure')].map(node => node.getBoundingClientRect().width)"
    )
    assert max(widths) <= 400


def test_no_label_of_a_figure_covers_another(any_page, chromium):
    chromium.open(any_page, width=1280)
    chromium.run("document.querySelectorAll('details').forEach(node => node.open = true)")
    assert chromium.run(COVERED) == []


def test_at_most_twelve_models_and_the_recommended_ones_stand_before_all(many, chromium):
    chromium.open(many)
    assert chromium.run("document.querySelectorAll('#ranking > .scroll tbody tr').length") <= 14
    assert (
        chromium.run("document.querySelector('#ranking details summary').innerText") == "The other models (85 in all)"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page(page, chromium, scheme):
    chromium.open(page, scheme=scheme)
    colours = chromium.run(
        "['p', '.muted', 'figcaption', 'a', '.mark', 'svg text', '.differs', '.warning', '.cards dt'].map(query => {"
        " const node = document.querySelector(query), style = getComputedStyle(node);"
        " return [query, query.startsWith('svg') ? style.fill : style.color];})"
    )
    grounds = {
        query: chromium.run(f"getComputedStyle(document.querySelector('{query}')).backgroundColor")
        for query in ("body", ".cards div")
    }
    dark = scheme == "dark"
    assert (luminance(grounds["body"]) < 0.1) is dark
    for query, colour in colours:
        for ground in grounds.values():
            assert contrast(colour, ground) >= CONTRAST, (query, colour, ground)


def test_the_keyboard_reaches_the_summary_tables_and_details(page, chromium):
    chromium.open(page)
    chromium.press("Tab")
    assert chromium.run("document.activeElement.className") == "skip"
    chromium.press("Enter")
    assert chromium.run("location.hash") == "#summary"
    scrolling = "[...document.querySelectorAll('.scroll')].filter(node => node.scrollWidth > node.clientWidth)"
    chromium.open(page, width=400)
    assert chromium.run(f"{scrolling}.length") > 0
    assert chromium.run(f"{scrolling}.every(node => node.tabIndex === 0 && node.getAttribute('aria-label'))")
    chromium.run("document.querySelector('.gallery summary').focus()")
    chromium.press("Enter")
    assert chromium.run("document.querySelector('.gallery details').open")


def test_figures_and_tables_have_names(page, chromium):
    chromium.open(page)
    figures = "[...document.querySelectorAll('svg.figure')]"
    assert chromium.run(f"{figures}.every(node => node.getAttribute('role') === 'img')")
    labels = chromium.run(f"{figures}.map(node => node.getAttribute('aria-label'))")
    assert all(len(label) > 20 for label in labels)
    assert chromium.run("[...document.querySelectorAll('th')].every(node => node.scope)")


def test_it_prints(page, chromium):
    chromium.open(page, scheme="dark")
    printed = chromium.pdf()
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") + printed.count(b"/Type /Page/") >= 3


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)` (WCAG 2)."""
    shares = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours (WCAG 2)."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
