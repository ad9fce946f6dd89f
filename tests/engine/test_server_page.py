"""The page of `remask serve`, in a headless Chromium on a server with the embedded model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Running, running

from remask import AsyncLLM

pytestmark = pytest.mark.slow

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

KEY = "the-key"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
HARD = "513264.26..12.1..33...2.1.25......1.="
CELL_LOOKS = "return [...arguments[0].querySelectorAll('.cell')].map(c => [c.className, c.textContent])"


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, server: Running) -> None:
        self.driver, self.server = driver, server

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def resize(self, width: int = 1280, height: int = 1000) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self, width: int = 1280, height: int = 1000) -> None:
        self.resize(width, height)
        self.driver.get(f"{self.server.url}/")

    def fill(self, **values: object) -> None:
        for name, value in values.items():
            field = self.find(f"#{name.replace('_0', '-0').replace('_1', '-1')}")
            field.clear()
            field.send_keys(str(value))

    def wait(self, condition: Any) -> Any:
        return WebDriverWait(self.driver, 60).until(condition)

    def ends(self, panel: int = 0, state: str = "finished") -> Any:
        """Waits until a panel has ended and shows the last step; returns it."""
        own = self.find(f'.panel[data-panel="{panel}"]')
        self.wait(lambda _: own.get_attribute("data-state") == state)
        if state == "finished":
            nfe = own.find_element(By.CSS_SELECTOR, ".nfe").text
            self.wait(lambda _: own.get_attribute("data-step") == nfe)
        return own

    def looks(self, panel: Any) -> list[tuple[str, str]]:
        return [tuple(pair) for pair in self.driver.execute_script(CELL_LOOKS, panel)]


def figure(panel: Any, name: str) -> str:
    return panel.find_element(By.CSS_SELECTOR, f".{name}").text


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    llm = AsyncLLM("tiny", device="cpu", max_num_rows=512)
    with running(llm, api_key=[KEY]) as own:
        own.client.headers["authorization"] = f"Bearer {KEY}"
        yield own
    llm.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, server: Running) -> Page:
    own = Page(browser, server)
    own.open()
    own.wait(lambda _: own.find("#key").is_displayed())
    own.fill(key=KEY)
    own.find("#key").send_keys(Keys.TAB)
    own.wait(lambda _: "tiny" in own.find("#model").text)
    browser.get_log("browser")  # the answers without a key
    return own


def test_a_canvas_fills_and_every_step_can_be_replayed(page: Page, tmp_path: Path) -> None:
    fields = {"max_tokens": 36, "block_length": 18, "temperature": 1.5, "seed": 5}
    policy = {"unmask": "capped_threshold:0.4", "remask": "wino:0.95"}
    page.fill(prompt=HARD, **fields, **{f"{name}_0": value for name, value in policy.items()})
    page.find("#prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    panel = page.ends()
    body = {"prompt": HARD, **fields, **policy}
    expected = page.server.answer(**body)["choices"][0]
    canvas = [
        event["choices"][0]["canvas"]["events"]
        for event in page.server.events(stream_options={"canvas": True}, **body)
        if event["choices"]
    ]
    events = [own for part in canvas for own in part]
    assert panel.find_element(By.CSS_SELECTOR, ".text").text == expected["text"]
    assert figure(panel, "nfe") == str(expected["nfe"])
    assert figure(panel, "rate") == f"{expected['tokens_per_forward']:.2f}"
    num_removed = sum(not own["is_commit"] for own in events)
    assert figure(panel, "removals") == str(num_removed)
    assert num_removed
    assert panel.screenshot(str(tmp_path / "panel.png"))
    slider = panel.find_element(By.CSS_SELECTOR, ".replay")
    slider.send_keys(Keys.HOME)
    for step in range(expected["nfe"] + 1):
        slots: dict[int, str] = {}
        fresh = set()
        for own in events:
            if own["step"] <= step:
                if own["is_commit"]:
                    slots[own["position"]] = own["text"]
                else:
                    slots.pop(own["position"])
                    if own["step"] == step:
                        fresh.add(own["position"])
        for position, (look, text) in enumerate(page.looks(panel)):
            kind = "committed" if position in slots else "remasked" if position in fresh else None
            if kind is not None:
                assert kind in look, (step, position, look)
            else:
                assert "masked" in look or "skipped" in look, (step, position, look)
                assert "committed" not in look
            if position in slots and not slots[position].startswith("<"):
                assert text == slots[position]
        slider.send_keys(Keys.ARROW_RIGHT)
    assert page.driver.get_log("browser") == [], "no script or style was refused"


def test_two_policies_run_side_by_side_on_one_prompt(page: Page) -> None:
    page.find("#compare").send_keys(Keys.SPACE)
    Select(page.find("#preset-1")).select_by_visible_text("wino")
    page.fill(prompt=HARD, max_tokens=36, block_length=36, unmask_0="schedule")
    page.find("#run").click()
    assert figure(page.ends(0), "nfe") == "36"
    other = page.server.answer(prompt=HARD, max_tokens=36, block_length=36, preset="wino")["choices"][0]
    panel = page.ends(1)
    assert figure(panel, "nfe") == str(other["nfe"])
    assert panel.find_element(By.CSS_SELECTOR, ".text").text == other["text"]


def test_an_error_names_the_field(page: Page) -> None:
    page.fill(prompt="1+2=", unmask_0="thresold")
    page.find("#run").click()
    error = page.ends(state="failed").find_element(By.CSS_SELECTOR, ".error")
    assert error.text.startswith("unmask: ")
    assert "did you mean" in error.text
    assert page.find("#unmask-0").get_attribute("aria-invalid") == "true"


def test_stopping_aborts_the_request(page: Page) -> None:
    page.fill(prompt="1+2=", max_tokens=400, block_length=8, unmask_0="schedule")
    page.find("#run").click()
    page.wait(lambda _: page.server.llm.engine.num_live == 1)
    page.find("body").send_keys(Keys.ESCAPE)
    page.ends(state="stopped")
    page.wait(lambda _: page.server.llm.engine.num_live == 0)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_the_width_and_keeps_the_key_out_of_sight(
    page: Page, width: int, tmp_path: Path
) -> None:
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    page.resize(width, 1600)
    page.find("#compare").send_keys(Keys.SPACE)
    page.fill(prompt=HARD, max_tokens=36, block_length=18, temperature=1.5, seed=5)
    page.fill(unmask_0="capped_threshold:0.4", remask_0="wino:0.95")
    page.find("#run").click()
    page.ends(0)
    page.ends(1)
    assert page.driver.execute_script(overflow) == 0
    assert page.driver.save_screenshot(str(tmp_path / f"two-{width}.png"))
    page.open(width, 900)
    assert page.driver.execute_script(overflow) == 0
    stored = page.driver.execute_script(
        "return [localStorage.length, sessionStorage.length, document.cookie]"
    )
    assert stored == [0, 0, ""]
    assert page.find("#key").get_attribute("value") == "", "a new page asks for it again"
    assert page.driver.save_screenshot(str(tmp_path / f"{width}.png"))
