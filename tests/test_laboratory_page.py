"""The laboratory's page, opened from a file and clicked in headless Chromium: what it shows is what was measured."""

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from laboratory import page
from laboratory.cures import NONE, Cure
from laboratory.points import METRICS, Point
from laboratory.small import OBJECTIVES

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CURES = [
    NONE,
    *(Cure("NullSpace", f"share {s}", share=s) for s in (0.05, 0.1, 0.3)),
    Cure("interpolation", "alpha 0.5", alpha=0.5),
    Cure("conflict", "8 directions", method="conflict"),
]


def bins(accuracy):
    return [{"count": 0, "confidence": None, "accuracy": None}, {"count": 9, "confidence": 0.8, "accuracy": accuracy}]


def points():
    result = []
    for i, objective in enumerate(OBJECTIVES):
        for j, cure in enumerate(CURES):
            values = {
                m: [0.1 * (k + 1) + 0.03 * j + 0.01 * i + 0.002 * s for s in range(3)] for k, m in enumerate(METRICS)
            }
            trained = cure.alpha is None
            costs = (10.0 + j, 8 * j, 1000 * j) if trained else (None, None, None)
            result.append(Point(objective, cure, values, bins(0.7), *costs))
    return result


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of made-up points, which no two controls show the same of."""
    path = tmp_path_factory.mktemp("page") / "index.html"
    start = {"measured": {**dict.fromkeys(METRICS, 0.25), "bins": bins(0.8)}}
    page.write(start, points(), {"command": "make tax", "date": "today"}, ["What won: </script><b>nothing</b>."], path)
    return path


def test_nothing_comes_from_outside(written):
    text = written.read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)", text)
    assert len(text) < 100_000


def test_control_without_a_label_would_be_found(written):
    text = written.read_text()
    for control in re.findall(r'<(?:input|select)[^>]* id="([^"]+)"', text):
        assert f'for="{control}"' in text or re.search(rf'<label>[^<]*<select id="{control}"', text), control


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (on Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield running
    running.quit()


@pytest.fixture
def opened(browser, written):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1200, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.get(written.as_uri())
    yield browser
    assert browser.get_log("browser") == []


def find(browser, selector):
    return browser.find_element("css selector", selector)


def shows(browser, point):
    """Every place that says which point is chosen says this one."""
    name = point.cure.name
    assert find(browser, "#verdict b").text == name
    target = METRICS[OBJECTIVES[point.objective].target]
    assert f"{target.show(point.target)} % {target.label}" in find(browser, "#verdict").text
    assert find(browser, "#frontier .strong").text == name
    cells = [c.text for c in browser.find_elements("css selector", "#metrics tbody td:nth-child(4)")]
    assert cells == [f"{m.show(point.mean(k))} ± {m.show(point.spread(k))}" for k, m in METRICS.items()]
    if point.step_ms is None:
        assert "none" in find(browser, "#cost").text
    else:
        assert f"{point.step_ms:.0f} ms" in find(browser, "#cost").text


def at(objective, cure):
    return next(p for p in points() if p.objective == objective and p.cure == cure)


def test_slider_goes_through_the_measured_strengths_only(opened):
    from selenium.webdriver.common.keys import Keys

    slider = find(opened, "#strength")
    shows(opened, at("dpo", CURES[1]))
    for cure in CURES[2:4]:
        slider.send_keys(Keys.ARROW_RIGHT)
        shows(opened, at("dpo", cure))
        assert slider.get_attribute("aria-valuetext") == cure.strength
    slider.send_keys(Keys.ARROW_RIGHT)
    shows(opened, at("dpo", CURES[3]))


def test_every_cure_and_objective_can_be_chosen(opened):
    for objective in OBJECTIVES:
        find(opened, f'input[name=objective][value="{objective}"]').click()
        for cure in (NONE, *CURES[4:]):
            find(opened, f'input[name=family][value="{cure.family}"]').click()
            shows(opened, at(objective, cure))
            assert not find(opened, "#strength").is_enabled()


def test_radios_move_by_keyboard(opened):
    from selenium.webdriver.common.keys import Keys

    find(opened, 'input[name=objective][value="dpo"]').send_keys(Keys.ARROW_RIGHT)
    shows(opened, at("sft", CURES[1]))


def test_click_on_a_point_chooses_it(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    title = next(
        t
        for t in opened.find_elements("css selector", ".point title")
        if "8 directions" in t.get_attribute("textContent")
    )
    dot = title.find_element("xpath", "../*[name()='circle'][last()]")
    ActionChains(opened).move_to_element(dot).click().perform()
    shows(opened, at("dpo", CURES[5]))
    assert find(opened, 'input[name=family][value="conflict"]').is_selected()


def test_other_metrics_can_be_plotted(opened):
    from selenium.webdriver.support.select import Select

    select = Select(find(opened, "#metric"))
    assert [o.get_attribute("value") for o in select.options if o.is_enabled()] == [
        m for m in METRICS if m != "behaviour"
    ]
    for name in METRICS:
        if name != "behaviour":
            select.select_by_value(name)
            assert find(opened, "#frontier").get_attribute("aria-label").startswith(METRICS[name].label)
            assert len(opened.find_elements("css selector", "#frontier .point")) == len(CURES)


def test_target_is_not_plotted_against_itself(opened):
    from selenium.webdriver.support.select import Select

    Select(find(opened, "#metric")).select_by_value("prose")
    find(opened, 'input[name=objective][value="prose"]').click()
    shows(opened, at("prose", CURES[1]))
    assert find(opened, "#metric").get_attribute("value") == "loss"
    label = find(opened, "#frontier").get_attribute("aria-label")
    assert label.startswith(f"{METRICS['loss'].label} against {METRICS['prose'].label}")


def test_table_holds_every_point(opened):
    find(opened, "summary").click()
    rows = opened.find_elements("css selector", "#all tbody tr")
    assert len(rows) == len(points())
    assert points()[0].cure.name in rows[0].text


def test_text_of_the_findings_is_text(opened):
    """A finding that held markup had been able to end the script element."""
    assert find(opened, "#found li").text == "What won: </script><b>nothing</b>."


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_sticks_out(opened, width):
    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    opened.get(opened.current_url)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    wide = opened.execute_script(
        "return [...document.querySelectorAll('.card, #metrics, svg')].filter(e => e.getBoundingClientRect().width && "
        "e.getBoundingClientRect().right > e.parentElement.getBoundingClientRect().right + 1)"
        ".map(e => e.id || e.className)"
    )
    assert wide == []
    shows(opened, at("dpo", CURES[1]))
