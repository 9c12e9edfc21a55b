"""The page in a real Chromium, by a person's clicks and keys, on the real endpoint with the miniature.

The browser is the one at CHROMIUM, or chromium on the path. Screenshots lie in out/page afterwards.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Response, expect, sync_playwright

from instantbooth.images import read_png_metadata
from instantbooth.miniature.corpus import identity_of
from instantbooth.miniature.world import Scene, render
from tests.serve.conftest import Client, Server
from tests.serve.test_endpoint import generated, metric, pixels, wait_until
from tests.serve.test_real import ROOT, running

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path; name one in CHROMIUM"),
]

SHOTS = ROOT / "out" / "page"
SLOW_MS = 120_000
"""A picture may take this long on a busy machine."""
CAT = 1_000_003
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 360, "height": 740}
REFUSED = "Failed to load resource: the server responded with a status of 4"
"""Chromium's own note of an answer that the page then tells in words."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("page"), {}) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Chromium's sandbox does not start for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    SHOTS.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four photos of one cat."""
    folder = tmp_path_factory.mktemp("photos")
    scenes = [Scene(background=place, seed=n) for n, place in enumerate(("beach", "snow", "forest", "living room"))]
    for number, scene in enumerate(scenes):
        render(identity_of(CAT), scene).image.save(folder / f"{number}.png")
    return sorted(folder.iterdir())


@contextmanager
def opened(
    browser: Browser, url: str, key: str | None, size: dict[str, int] = DESKTOP, allow: str = "", **context: str
) -> Iterator[Page]:
    """The page in a tab of its own, that knows the key. The console must stay without errors, but for `allow`."""
    complaints: list[str] = []
    with browser.new_context(viewport=size, **context) as tab:
        page = tab.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => console.error('policy', event.violatedDirective))"
        )
        if key is not None:
            page.add_init_script(f"sessionStorage.setItem('instantbooth-key', '{key}')")
        page.goto(url)
        yield page
    assert not [each for each in complaints if not (allow and each.startswith(allow))]


def made_concept(page: Page, photos: list[Path], name: str) -> None:
    """Waits for the page, and makes a concept as a person would."""
    expect(page.locator("#model")).to_contain_text("64 × 64", timeout=SLOW_MS)
    if not page.locator("#image").is_visible():
        page.get_by_text("Somebody new").click()
    page.locator("#image").set_input_files(photos)
    page.get_by_label("It is a").select_option("cat")
    page.get_by_role("textbox", name="Name").fill(name)
    page.get_by_role("button", name="Make the concept").click()
    expect(page.locator("#subject-status")).to_contain_text(f"{name} is ready", timeout=SLOW_MS)


def slide(page: Page, label: str, value: float) -> None:
    page.get_by_role("slider", name=label).fill(str(value))


def prompt_of(page: Page) -> Locator:
    return page.get_by_role("textbox", name="What is the picture of?")


def create(page: Page) -> None:
    page.get_by_role("button", name="Create").click()


def done(page: Page) -> None:
    expect(page.locator("#composer-status")).to_contain_text("Done in", timeout=SLOW_MS)


def shoot(page: Page, name: str) -> None:
    # Pictures fade in for 0.6 s.
    page.wait_for_timeout(800)
    page.screenshot(path=SHOTS / f"{name}.png")


def facts(page: Page) -> dict[str, str]:
    """What the dialog of a picture tells."""
    dialog = page.get_by_role("dialog")
    return dict(zip(dialog.locator("dt").all_inner_texts(), dialog.locator("dd").all_inner_texts(), strict=True))


def test_a_person_goes_the_whole_way(real: Server, browser: Browser, photos: list[Path]) -> None:
    with opened(browser, real.url, real.ada.key) as page:
        expect(page.locator("#model")).to_contain_text("64 × 64", timeout=SLOW_MS)
        shoot(page, "1-empty")
        page.locator("#image").set_input_files(photos[:2])
        for photo, event in zip(photos[2:], ("drop", "paste"), strict=True):
            bring(page, photo, event)
        expect(page.locator("#photos li")).to_have_count(4)
        page.get_by_role("button", name="Remove 1.png").click()
        expect(page.locator("#photos li")).to_have_count(3)
        shoot(page, "2-photos")
        page.get_by_label("It is a").select_option("kitten")
        page.get_by_role("textbox", name="Name").fill("Tom")
        with page.expect_response("**/v1/concepts") as sent:
            page.get_by_role("button", name="Make the concept").click()
        concept = concept_of(sent.value)
        expect(page.get_by_role("radio", name="Tom")).to_be_checked()
        assert real.ada("GET", f"/v1/concepts/{concept}").json()["num_images"] == 3

        page.get_by_role("button", name="Top hat in the snow").click()
        page.get_by_role("button", name="Watercolor").click()
        wanted = "a watercolor of a {subject} wearing a red sweater and a top hat in the snow"
        expect(prompt_of(page)).to_have_value(wanted)
        slide(page, "Pictures", 2)
        slide(page, "Steps", 12)
        create(page)
        expect(page.locator(".frame img[src^='data:']").first).to_be_visible(timeout=SLOW_MS)
        shoot(page, "3-previews")
        done(page)
        shoot(page, "4-finished")

        seed = int(page.locator(".caption").first.inner_text().split()[1])
        with page.expect_download() as saved:
            page.get_by_role("link", name=f"Download seed {seed}").click()
        data = Path(saved.value.path()).read_bytes()
        assert saved.value.suggested_filename.endswith(f"-{seed}.png")
        assert read_png_metadata(data)["seed"] == str(seed)
        same = generated(real.ada, concept, prompt=wanted, seed=seed, num_inference_steps=12).json()
        assert abs(pixels(same["data"][0]["b64_json"]) - pixels_of(data)).max() <= 1

        slide(page, "Identity", 0.4)
        slide(page, "Guidance", 5)
        slide(page, "Steps", 6)
        slide(page, "Pictures", 1)
        page.get_by_role("checkbox", name="Random").uncheck()
        page.get_by_role("spinbutton", name="Seed").fill("77")
        create(page)
        done(page)
        page.get_by_role("button", name="Details of").first.click()
        shoot(page, "5-details")
        told = facts(page)
        assert (told["Identity β"], told["Guidance"], told["Steps"], told["Seed"]) == ("0.4", "5", "6", "77")
        page.get_by_role("button", name="Close").click()

        page.get_by_role("button", name=f"Use the settings of seed {seed}").click()
        expect(page.get_by_role("spinbutton", name="Seed")).to_have_value(str(seed))
        expect(page.locator("output[for='num_inference_steps']")).to_have_text("12")
        shoot(page, "6-settings")

        page.get_by_role("button", name="Delete Tom").click()
        shoot(page, "7-delete")
        page.get_by_role("button", name="Delete", exact=True).click()
        expect(page.locator("#subject-status")).to_have_text("Tom is deleted.")
        expect(page.get_by_role("radio")).to_have_count(0)
        assert real.ada("GET", f"/v1/concepts/{concept}").status_code == 404


def bring(page: Page, photo: Path, event: str) -> None:
    """Drops or pastes a file onto the page."""
    page.evaluate(
        """([bytes, name, kind]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
            const event = kind === "drop"
                ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
            document.body.dispatchEvent(event);
        }""",
        [list(photo.read_bytes()), photo.name, event],
    )


def concept_of(response: Response) -> str:
    return str(response.json()["id"])


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), int)


def tab_to(page: Page, wanted: Locator, most: int = 60) -> None:
    """Presses Tab until `wanted` has the focus, and asserts that it is seen to have it."""
    for _ in range(most):
        if wanted.count() and wanted.evaluate("element => element === document.activeElement"):
            break
        page.keyboard.press("Tab")
    expect(wanted).to_be_focused()
    assert wanted.evaluate(
        """element => [element, element.closest(".drop, .concept, .sheet")].some(
            each => each && getComputedStyle(each).outlineStyle !== "none")"""
    ), "the focus is not seen"


def test_the_keyboard_alone_suffices(real: Server, browser: Browser, photos: list[Path]) -> None:
    with opened(browser, real.url, None, allow=REFUSED) as page:
        # Long before the key that opens it: Playwright's interception begins some time after its first listener.
        page.on("filechooser", lambda chooser: chooser.set_files(photos))
        expect(page.get_by_role("dialog", name="API key")).to_be_visible(timeout=SLOW_MS)
        page.keyboard.type("ib-wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-reason")).to_have_text("That key is not known here.")
        shoot(page, "8-key")
        page.keyboard.press("Control+A")
        page.keyboard.type(str(real.bob.key))
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_contain_text("64 × 64", timeout=SLOW_MS)

        tab_to(page, page.locator("#image"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Remove 3.png")).to_be_visible()
        tab_to(page, page.get_by_role("button", name="Remove 3.png"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Remove 2.png")).to_be_focused()
        tab_to(page, page.get_by_label("It is a"))
        page.keyboard.type("cat")
        tab_to(page, page.get_by_role("button", name="Make the concept"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("radio", name="A cat")).to_be_focused(timeout=SLOW_MS)

        tab_to(page, page.get_by_role("slider", name="Steps"))
        page.keyboard.press("End")
        expect(page.locator("output[for='num_inference_steps']")).to_have_text("200")
        tab_to(page, page.get_by_role("button", name="Create"))
        page.keyboard.press("Enter")
        expect(page.locator(".caption").first).to_contain_text("of 200", timeout=SLOW_MS)
        expect(page.get_by_role("button", name="Stop")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.locator("#composer-status")).to_have_text("Stopped; 0 pictures finished.")
        wait_until(lambda: metric(real, "instantbooth_queued_work_rows") == 0, 5)

        page.get_by_role("slider", name="Steps").focus()
        page.keyboard.press("Home")
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        prompt_of(page).focus()
        page.keyboard.press("Enter")
        done(page)
        tab_to(page, page.get_by_role("button", name="Details of").first)
        page.keyboard.press("Enter")
        assert facts(page)["Steps"] == "5"
        page.keyboard.press("Escape")
        tab_to(page, page.get_by_role("link", name="Download").first)
        with page.expect_download() as saved:
            page.keyboard.press("Enter")
        assert Image.open(saved.value.path()).size == (64, 64)


def test_what_goes_wrong_is_told_in_words_where_it_belongs(
    real: Server, browser: Browser, photos: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    notes = tmp_path / "notes.txt"
    notes.write_text("no picture either")
    with opened(browser, real.url, real.bob.key, allow="Failed to load resource") as page:
        made_concept(page, photos, "Mia")
        prompt = prompt_of(page)
        problem = page.locator("#composer-problem")

        prompt.fill("a photo of my cat")
        create(page)
        expect(problem).to_contain_text("Write {subject} once, where Mia belongs.")
        expect(prompt).to_be_focused()
        shoot(page, "9-error")
        prompt.fill("a photo of a {subject} and sks")
        expect(problem).to_be_hidden()
        create(page)
        expect(problem).to_contain_text("holds the placeholder token 'sks'")
        expect(prompt).to_have_attribute("aria-invalid", "true")

        page.get_by_text("Somebody new").click()
        page.locator("#image").set_input_files([notes, broken])
        expect(page.locator("#subject-problem")).to_contain_text("“notes.txt” is not a picture")
        page.get_by_role("button", name="Make the concept").click()
        expect(page.locator("#subject-problem")).to_contain_text("is not a picture in a known format")

        prompt.fill("a photo of a {subject} at the beach")
        page.context.set_offline(True)
        create(page)
        expect(problem).to_contain_text("The server does not answer.")
        page.context.set_offline(False)

        concepts = real.bob("GET", "/v1/concepts").json()["data"]
        mia = next(each["id"] for each in concepts if each["name"] == "Mia")
        real.bob("DELETE", f"/v1/concepts/{mia}")
        create(page)
        expect(problem).to_contain_text("It is not there any more.")
        expect(page.get_by_role("radio", name="Mia")).to_have_count(0)


def test_a_full_endpoint_is_asked_again_when_it_said(real: Server, browser: Browser, photos: list[Path]) -> None:
    with opened(browser, real.url, real.ada.key, allow=REFUSED) as page, ThreadPoolExecutor(1) as pool:
        made_concept(page, photos, "Leo")
        slide(page, "Pictures", 10)
        slide(page, "Steps", 2)
        held = pool.submit(occupied, real.ada)
        wait_until(lambda: metric(real, "instantbooth_queued_work_rows") > 0)
        create(page)
        expect(page.locator("#composer-status")).to_contain_text(
            re.compile(r"The booth is full. Trying again in \d+ s")
        )
        assert held.result() == 504
        done(page)
        expect(page.locator(".tile .download:visible")).to_have_count(10)


def occupied(client: Client) -> int:
    """Ten long pictures, given up after some seconds."""
    concept = client("GET", "/v1/concepts").json()["data"][0]["id"]
    return generated(client, concept, n=10, num_inference_steps=200, deadline_s=5).status_code


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    real: Server, browser: Browser, photos: list[Path], scheme: str
) -> None:
    with opened(
        browser, real.url, real.ada.key, PHONE, color_scheme=scheme, reduced_motion="reduce", device_scale_factor=2
    ) as page:
        fits(page)
        made_concept(page, photos, "A name that is longer than the screen of a telephone is wide")
        fits(page)
        shoot(page, f"phone-{scheme}-1")
        page.locator("#settings > summary").click()
        fits(page)
        assert page.evaluate(BEHIND_THE_BAR) == []
        assert page.evaluate(SMALLEST_TEXT) >= 16, "Safari on iOS zooms in on less"
        slide(page, "Steps", 8)
        slide(page, "Pictures", 1)
        create(page)
        done(page)
        fits(page)
        shoot(page, f"phone-{scheme}-2")
        page.get_by_role("button", name="Details of").first.click()
        fits(page)
        shoot(page, f"phone-{scheme}-3")
        assert page.locator(".frame img").evaluate("image => getComputedStyle(image).animationName") == "none"


BEHIND_THE_BAR = """() => {
    const bar = document.querySelector(".go");
    const covered = [];
    for (const each of document.querySelectorAll("main :is(input, select, textarea, button, summary)")) {
        each.focus();
        if (document.activeElement !== each || bar.contains(each)) continue;
        if (each.getBoundingClientRect().bottom > bar.getBoundingClientRect().top) covered.push(each.outerHTML);
    }
    return covered;
}"""
"""Controls that the bar covers while they have the focus."""
SMALLEST_TEXT = """() => {
    const fields = [...document.querySelectorAll("input, select, textarea")];
    return Math.min(...fields.map((each) => parseFloat(getComputedStyle(each).fontSize)));
}"""
"""Pixels, of all fields."""


def fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_the_dark_page_is_dark_and_both_are_legible(real: Server, browser: Browser) -> None:
    paper = {}
    for scheme in ("light", "dark"):
        with opened(browser, real.url, real.ada.key, color_scheme=scheme) as page:
            expect(page.locator("#model")).to_contain_text("64 × 64", timeout=SLOW_MS)
            shoot(page, f"desktop-{scheme}")
            paper[scheme], ink, soft = (
                luminance(page.locator(selector).first.evaluate(f"each => getComputedStyle(each).{name}"))
                for selector, name in (("body", "backgroundColor"), ("body", "color"), (".soft", "color"))
            )
            for text in (ink, soft):
                low, high = sorted((paper[scheme], text))
                assert (high + 0.05) / (low + 0.05) >= 4.5, "WCAG's contrast for text"
    assert paper["dark"] < 0.05 < 0.8 < paper["light"]


def luminance(color: str) -> float:
    """WCAG's relative luminance of a computed colour."""
    values = [int(each) / 255 for each in re.findall(r"\d+", color)[:3]]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in values]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
