"""The page in a real browser, without a window: what a person does with it, and what then stands there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch

from kd_multiresolution.results.decision import Decision
from tests.results.generated import RUN, SIZE, batch, page, scored

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip install -e '.[test]')")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NASTY = '<img src=x onerror=document.title="broken">&"\'.png'
SCORES = [0.1, 0.2, 0.3, 0.4, 0.6, 0.35, 0.55, 0.7, 0.8, 0.9]
TRUTHS = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
NAMES = [f"set/good/{n}.png" for n in range(5)] + [f"set/scratch/{n}.png" for n in range(4)] + [f"set/scratch/{NASTY}"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def labelled() -> ImageBatch:
    masks = torch.zeros(10, SIZE, SIZE)
    masks[5:, 4:12, 4:12] = 1
    return batch(SCORES, TRUTHS, NAMES, gt_mask=masks)


class Page:
    """A page that is open."""

    def __init__(self, browser: Any, folder: Path, *batches: ImageBatch, width: int = 1280, **settings: Any) -> None:
        self.browser = browser
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        file = folder / "report.html"
        file.write_text(page(scored(RUN, *batches), **settings), encoding="utf-8")
        browser.get_log("browser")  # what an earlier page has said
        browser.get(file.as_uri())

    def __getitem__(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def choose(self, name: str, value: str) -> None:
        Select(self[name]).select_by_value(value)

    @property
    def raw(self) -> float:
        return float(self["raw"].get_property("value"))

    @property
    def place(self) -> float:
        x = 2 * (self.raw - 5) / 10
        return 0.5 + x / (1 + abs(x)) / 2

    @property
    def counts(self) -> list[str]:
        return [card.text for card in self.all("#cards strong")]

    @property
    def shown(self) -> list[str]:
        # A threshold that has moved sorts the tiles with the next picture.
        self.browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        return self.browser.execute_script(
            "return [...document.querySelectorAll('#tiles .caption b')].map(name => name.textContent)"
        )

    @property
    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


def expected_counts(raw: float) -> list[str]:
    alarms = sum(10 * score > raw for score, truth in zip(SCORES, TRUTHS, strict=True) if not truth)
    misses = sum(10 * score <= raw for score, truth in zip(SCORES, TRUTHS, strict=True) if truth)
    return [f"{alarms} of 5", f"{misses} of 5"]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Page:
    return Page(browser, tmp_path, labelled())


def test_the_threshold_can_be_dragged(open_page: Page) -> None:
    assert open_page.raw == 5
    assert open_page.counts == ["1 of 5", "1 of 5"]
    point = open_page["point"].get_attribute("cy")
    line = open_page["line"]
    start = line.rect["x"]
    drag = ActionChains(open_page.browser).move_to_element(line).click_and_hold()
    drag.move_by_offset(-200, 10).move_by_offset(-50, 0).release().perform()
    assert open_page["line"].rect["x"] == pytest.approx(start - 250, abs=3)
    assert open_page.raw < 4
    assert open_page.counts == expected_counts(open_page.raw) != ["1 of 5", "1 of 5"]
    assert open_page["point"].get_attribute("cy") != point
    assert "the model's is 5" in open_page["moved"].text
    said = open_page.all("#settings code")[0].text.split()
    assert said[1] == f"{open_page['raw'].get_property('value')},"
    assert float(said[3].rstrip(",")) == pytest.approx(1 - open_page.place, rel=1e-6)
    assert said[5] == open_page.counts[0].split()[0]
    open_page["reset"].click()
    assert (open_page.raw, open_page.counts) == (5, ["1 of 5", "1 of 5"])
    assert open_page.complaints == []


def test_the_slider_listens_to_keys(open_page: Page) -> None:
    slider = open_page["slider"]
    slider.send_keys(Keys.ARROW_RIGHT)
    assert 5 < open_page.raw < 5.2
    slider.send_keys(Keys.END)
    assert open_page.raw > 9
    assert open_page.counts == ["0 of 5", "5 of 5"]
    assert "5 missed" in slider.get_attribute("aria-valuetext")
    slider.send_keys(Keys.HOME)
    assert open_page.counts == ["5 of 5", "0 of 5"]


def test_a_threshold_can_be_typed(open_page: Page) -> None:
    field = open_page["raw"]
    field.clear()
    field.send_keys("6.5")
    assert open_page.counts == ["0 of 5", "2 of 5"]
    assert open_page["slider"].get_property("value") > "500"


def test_images_are_filtered_and_sorted(open_page: Page) -> None:
    assert open_page.shown[:2] == [f"scratch/{NASTY}", "scratch/3.png"]
    open_page.choose("folder", "0")
    assert open_page.shown == [f"good/{n}.png" for n in (4, 3, 2, 1, 0)]
    open_page.choose("outcome", "false")
    assert open_page.shown == ["good/4.png"]
    open_page.choose("folder", "all")
    open_page.choose("outcome", "miss")
    assert open_page.shown == ["scratch/0.png"]
    open_page["slider"].send_keys(Keys.END)
    assert len(open_page.shown) == 5, "the filter follows the threshold"
    open_page["reset"].click()
    open_page.choose("outcome", "all")
    open_page.choose("sort", "nearest")
    first, *others = open_page.shown
    assert (first, {*others[:2]}) == ("scratch/1.png", {"good/3.png", "good/4.png"})
    open_page.choose("sort", "lowest")
    assert open_page.shown[0] == "good/0.png"
    open_page.choose("sort", "name")
    assert open_page.shown[:2] == ["good/0.png", "good/1.png"]


def test_a_click_enlarges(open_page: Page) -> None:
    tile = open_page.all(".tile")[1]
    tile.click()
    large = open_page["large"]
    assert large.get_property("open")
    assert open_page["large-name"].text == "scratch/3.png"
    assert len(open_page.all("#large-panels .panel")) == 4
    width = open_page.all("#large-panels img")[0].rect["width"]
    assert width > 1.5 * tile.find_element(By.TAG_NAME, "img").rect["width"]
    facts = open_page["large-facts"].text
    assert "defective" in facts
    assert "left, top, right, bottom: 0, 0, 16, 16" in facts
    ActionChains(open_page.browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert open_page["large-name"].text == "scratch/2.png"
    ActionChains(open_page.browser).send_keys(Keys.ESCAPE).perform()
    WebDriverWait(open_page.browser, 5).until(lambda _: not large.get_property("open"))
    assert open_page.browser.switch_to.active_element == tile, "the keyboard goes on where it was"
    assert open_page.complaints == []


def test_names_are_shown_and_not_obeyed(open_page: Page) -> None:
    assert open_page.browser.title == "Test with KdMultiresolution"
    open_page.all(".tile")[0].click()
    assert open_page["large-name"].text == f"scratch/{NASTY}"
    assert open_page.browser.title == "Test with KdMultiresolution"


def test_every_picture_has_words_and_none_comes_from_elsewhere(open_page: Page) -> None:
    pictures = open_page.browser.execute_script(
        "return [...document.querySelectorAll('#tiles img')].map(e => [e.getAttribute('alt'), e.naturalWidth])"
    )
    assert len(pictures) == 40
    assert sum(words == "" for words, _ in pictures) == 20, "what lies below a layer"
    assert all(words is not None and width > 0 for words, width in pictures)
    assert open_page.all("#tiles svg")
    assert not open_page.all("#tiles svg:not([aria-label])")
    entries = open_page.browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [entry for entry in entries if not entry.startswith("data:")] == []


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_overflows(browser: Any, tmp_path: Path, width: int) -> None:
    names = [f"{'a long folder name ' * 3}/{'x' * 120}{n}.png" for n in range(3)]
    about = Page(browser, tmp_path, labelled(), batch([0.2, 0.5, 0.8], [0, 0, 1], names), width=width)
    for click in (False, True):
        if click:
            about.all(".tile")[0].click()
        sizes = browser.execute_script(
            "return [document.documentElement.scrollWidth, innerWidth, large.scrollWidth, large.clientWidth]"
        )
        assert sizes[0] <= sizes[1] == width
        assert sizes[2] <= sizes[3]


@pytest.mark.parametrize(
    ("truths", "decision", "counts"),
    [
        ([0] * 10, None, ["5 of 10"]),
        ([1] * 10, None, ["5 of 10"]),
        (None, None, ["5 of 10"]),
        ([0] * 10, Decision(), ["0 of 10"]),
    ],
)
def test_pages_of_one_kind_of_images(
    browser: Any, tmp_path: Path, truths: list[int] | None, decision: Decision | None, counts: list[str]
) -> None:
    about = Page(browser, tmp_path, batch(SCORES, truths, NAMES), decision=decision)
    assert about.counts == counts
    assert not about["roc-figure"].is_displayed()
    assert len(about.shown) == 10
    about["slider"].send_keys(Keys.HOME)
    assert about.counts == ["10 of 10"] if truths != [1] * 10 else ["0 of 10"]
    assert about.complaints == []


def test_more_images_come_when_asked_for(browser: Any, tmp_path: Path) -> None:
    about = Page(browser, tmp_path, batch([0.01 * n for n in range(70)], [0] * 70))
    assert len(about.shown) == 60
    about["more"].click()
    assert len(about.shown) == 70
    assert not about["more"].is_displayed()


def test_a_single_image_has_a_page(browser: Any, tmp_path: Path) -> None:
    about = Page(browser, tmp_path, batch([0.5], [0]), decision=Decision())
    assert about.shown == ["memory/0.5"]
    assert about.complaints == []
