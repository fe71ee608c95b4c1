"""The web page in a real Chromium, in front of the real server: what a person does with it."""

from __future__ import annotations

import io
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fluxserve_client import AsyncClient, Client, Result
from fluxserve_gateway import Fleet, Server
from fluxserve_gateway.keys import Keys, Limits
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from fluxserve.supervisor import TritonServer
from tests.client.fakes import FakeFlux
from tests.gateway.serving import Gateway, png, server_of
from tests.support import programs
from tests.triton.conftest import ROOT, plain, wait_for

pytestmark = pytest.mark.xdist_group("triton")

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1100, "height": 900}
SCREENSHOTS = os.environ.get("FLUXSERVE_SCREENSHOTS", "")
"""The folder that gets the documentation's screenshots, such as `docs`."""

PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)

_BARS = """() => {
  window.bars = [];
  window.previews = new Set();
  new MutationObserver(() => {
    const bar = document.querySelector('#stage progress[max]');
    if (bar && window.bars.at(-1) !== bar.value) window.bars.push(bar.value);
    const unfinished = document.querySelector('#stage img[alt="The unfinished picture"]');
    if (unfinished) window.previews.add(unfinished.src);
  }).observe(document.querySelector('#stage'), {subtree: true, childList: true, attributes: true});
}"""


class Watched(AsyncClient):
    """Keeps the id of the last request."""

    last = ""

    async def generate(self, *given: Any, **fields: Any) -> Result:
        self.last = fields["request_id"]
        return await super().generate(*given, **fields)


@pytest.fixture(scope="module")
def gateway(server: TritonServer) -> Iterator[Gateway]:
    with Gateway(Fleet({"tiny": [Server("triton", Watched(server.grpc_url))]}), page=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = programs.needed("chromium")
    options = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=options)
        yield opened
        opened.close()


@pytest.fixture
def context(browser: Browser, gateway: Gateway) -> Iterator[BrowserContext]:
    """A person's browser. It reaches the gateway alone; that it asks for anything else is a failure of any test."""
    context = browser.new_context(viewport=DESK)
    foreign, complaints = list[str](), list[str]()

    def asked(request: Request) -> None:
        if not request.url.startswith((gateway.url, "data:", "blob:")):
            foreign.append(request.url)

    context.route(lambda url: not url.startswith((gateway.url, "data:", "blob:")), lambda route: route.abort())
    context.on("request", asked)
    context.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    yield context
    context.close()
    wait_for(lambda: all(server.in_flight == 0 for server in gateway.fleet.servers))
    refused = "Failed to load resource: the server responded with a status of 400 (Bad Request)"
    assert (foreign, [text for text in complaints if text != refused]) == ([], [])


@pytest.fixture
def page(context: BrowserContext, gateway: Gateway) -> Page:
    return opened(context, gateway)


def opened(context: BrowserContext, gateway: Gateway) -> Page:
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(gateway.url)
    expect(page.get_by_label("Seed", exact=True)).not_to_have_value("0")  # it has been rolled: all is there
    page.evaluate(_BARS)
    return page


def setting(page: Page, label: str, value: object) -> None:
    field = page.get_by_role("spinbutton", name=re.compile(label))
    field.fill(str(value))
    field.press("Tab")


def size(page: Page, value: str) -> None:
    page.get_by_label("Size").fill(value)
    page.get_by_label("Size").press("Enter")


def long_one(page: Page) -> None:
    """Begin a picture that takes seconds."""
    page.get_by_label("Prompt").fill("a red apple")
    size(page, "512x512")
    setting(page, "Steps", 100)
    page.get_by_role("button", name="Draw", exact=True).click()


def draw(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#stage img")).to_have_attribute("alt", prompt)


def file_of(page: Page, gateway: Gateway) -> bytes:
    source = page.locator("#stage img").get_attribute("src")
    return gateway.get(f"/{source}").content


def seed_of(page: Page) -> int:
    found = re.search(r"seed (\d+)", page.locator("#stage .settings").inner_text())
    assert found
    return int(found[1])


def test_a_picture_is_drawn_while_the_bar_moves(page: Page, gateway: Gateway, alone: Client) -> None:
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    size(page, "256x192")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_label("Prompt").fill("a red apple on a white background")
    page.get_by_role("button", name="Draw", exact=True).dblclick()
    expect(page.locator("#stage img")).to_have_attribute("alt", "a red apple on a white background")
    expect(page.locator("#gallery button")).to_have_count(1)
    bars = page.evaluate("window.bars")
    assert len(bars) >= 2 and bars == sorted(bars) and bars[-1] <= 20, bars
    previews = page.evaluate("[...window.previews]")
    assert len(previews) >= 2, "glimpses change while it is drawn"
    assert all(preview.startswith("data:image/png;base64,") for preview in previews)
    expected = alone.generate(
        "a red apple on a white background",
        width=256,
        height=192,
        num_inference_steps=20,
        guidance_scale=3.0,
        seed=7,
    )
    assert file_of(page, gateway) == expected.image
    expect(page.locator("#stage .settings")).to_have_text("seed 7 · 256 × 192 · steps 20 · guidance 3 · tiny")
    expect(page.get_by_label("Seed", exact=True)).not_to_have_value("7")
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_enabled()


def test_by_keyboard_alone(page: Page) -> None:
    page.get_by_label("Prompt").focus()
    page.keyboard.type("a yellow fox")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Draw"
    page.keyboard.press("Enter")
    expect(page.locator("#stage img")).to_have_attribute("alt", "a yellow fox")
    picture = page.locator("#gallery button").first
    picture.focus()
    page.keyboard.press("Enter")
    expect(picture).to_have_attribute("aria-pressed", "true")


def test_stop_ends_it_on_the_server_within_two_steps(page: Page, gateway: Gateway, server: TritonServer) -> None:
    probe, (behind,) = plain(server, "grpc"), gateway.fleet.servers
    assert isinstance(behind.client, Watched)
    long_one(page)
    page.wait_for_function("document.querySelector('#stage progress[max]')?.value >= 3")
    page.get_by_role("button", name="Stop").click()
    seen = [probe.control(behind.client.last, "status")]
    while seen[-1][0] != "unknown":
        seen.append(probe.control(behind.client.last, "status"))
    cancelled = [step for state, step, _ in seen if state == "cancelling"]
    assert max(step for _, step, _ in seen) < 100, "it did not run to its end"
    assert not cancelled or cancelled[-1] <= cancelled[0] + 2, cancelled
    expect(page.locator("#stage")).to_contain_text("Stopped")
    wait_for(lambda: behind.in_flight == 0)
    page.get_by_label("Size").fill("128x128")
    setting(page, "Steps", 4)
    draw(page, "another one after it")


def test_a_tab_that_is_closed_stops_too(context: BrowserContext, gateway: Gateway, server: TritonServer) -> None:
    probe, (behind,) = plain(server, "grpc"), gateway.fleet.servers
    assert isinstance(behind.client, Watched)
    page = opened(context, gateway)
    long_one(page)
    page.wait_for_function("document.querySelector('#stage progress[max]')?.value >= 2")
    page.close()
    wait_for(lambda: behind.in_flight == 0, patience=10)
    assert probe.control(behind.client.last, "status")[0] in ("cancelling", "unknown")


def test_a_place_in_the_queue(context: BrowserContext, gateway: Gateway) -> None:
    """Two tabs at once: the second waits for the first, and says so; each gets its own picture."""
    first, second = opened(context, gateway), opened(context, gateway)
    long_one(first)
    first.wait_for_function("document.querySelector('#stage progress[max]')?.value >= 1")
    second.get_by_label("Prompt").fill("a yellow fox")
    second.get_by_role("button", name="Draw", exact=True).click()
    expect(second.locator("#stage")).to_contain_text("In the queue, after up to 1 other request of this gateway")
    first.get_by_role("button", name="Stop").click()
    expect(second.locator("#stage img")).to_have_attribute("alt", "a yellow fox")
    expect(first.locator("#stage")).to_contain_text("Stopped")


def test_an_error_is_said_beside_its_field(page: Page) -> None:
    alert = page.get_by_role("alert").filter(visible=True)
    for label, value, words in (
        ("Prompt", " ", "Got no text; allowed: 1 to 4096 bytes of UTF-8 text"),
        ("Prompt", "é" * 3000, "Got 6000 bytes; allowed: 1 to 4096 bytes of UTF-8 text"),
        ("Size", "100x64", "Got 100; allowed: a multiple of 16 from 64 to 512"),
        ("Size", "large", "Got 'large'; allowed: 'auto' or WIDTHxHEIGHT in pixels, e.g. 1024x1024"),
    ):
        page.get_by_label("Prompt").fill("a red apple")
        page.get_by_label(label).fill(value)
        page.get_by_label(label).press("Tab")
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(alert).to_have_text(words)
        field, said = page.get_by_label(label).bounding_box(), alert.bounding_box()
        assert field and said and 0 < said["y"] - field["y"] < 200
    size(page, "64x64")
    draw(page, "a red apple")
    expect(alert).to_have_count(0)


def test_what_is_kept(page: Page, gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload, both tabs, the settings used again, and the code that draws the same."""
    prompt = "a 'red' \"apple\" ${1+1} {{7}} <b>bold</b> $HOME"
    setting(page, "Pictures", 2)
    setting(page, "Steps", 4)
    setting(page, "Guidance", 2.5)
    size(page, "96x64")
    draw(page, prompt)
    seed = seed_of(page)
    other = opened(page.context, gateway)
    setting(other, "Steps", 2)
    draw(other, "a yellow fox")
    page.reload()
    thumbnails = page.locator("#gallery button")
    expect(thumbnails).to_have_count(3)
    expect(thumbnails.first).to_have_attribute("aria-label", re.compile("^a yellow fox, seed "))
    thumbnails.nth(2).click()
    expect(page.locator("#stage .settings")).to_have_text(f"seed {seed + 1} · 96 × 64 · steps 4 · guidance 2.5 · tiny")
    picture = file_of(page, gateway)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.path().read_bytes() == picture
    page.get_by_role("button", name="Use again").click()
    expect(page.get_by_label("Prompt")).to_have_value(prompt)
    expect(page.get_by_label("Lock")).to_be_checked()
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(thumbnails).to_have_count(4)
    assert (seed_of(page), file_of(page, gateway)) == (seed + 1, picture)
    expect(page.get_by_label("Seed", exact=True)).to_have_value(str(seed + 1))
    page.get_by_role("button", name="As code").click()
    monkeypatch.chdir(tmp_path)
    for tab in ("curl", "Python", "OpenAI SDK"):
        page.get_by_role("tab", name=tab).click()
        shown = page.locator("#details .cm-content").filter(visible=True).inner_text()
        if tab == "curl":
            subprocess.run(["sh", "-c", shown], check=True, timeout=60)
        else:
            exec(shown, {})
        assert (tmp_path / "picture.png").read_bytes() == picture, tab
        (tmp_path / "picture.png").unlink()


def test_an_image_to_redraw(page: Page, gateway: Gateway, alone: Client, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.effect_mandelbrot((96, 80), (-2, -1, 1, 1), 20).convert("RGB").save(path)
    (tmp_path / "a.txt").write_text("no picture")
    setting(page, "Steps", 4)
    page.get_by_role("button", name="Start from a picture").click()
    chosen = page.locator("#images img")
    page.locator("#images input").set_input_files(tmp_path / "a.txt")
    expect(page.locator("#images [role=alert]")).to_have_text("image: got 10 bytes; allowed: a PNG, JPEG or WebP file")
    expect(chosen).to_have_count(0)
    page.locator("#images input").set_input_files(path)
    expect(chosen).to_have_count(1)
    draw(page, "a red apple")
    expected = alone.generate(
        "a red apple", image=path, strength=0.6, num_inference_steps=4, guidance_scale=3.0, seed=seed_of(page)
    )
    assert file_of(page, gateway) == expected.image
    page.get_by_role("button", name="Remove this image").click()
    expect(chosen).to_have_count(0)


def test_a_phone(page: Page, tmp_path: Path) -> None:
    """At 390 pixels nothing is wider than the screen, whatever is open."""
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]

    def fits() -> bool:
        return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))

    assert fits()
    setting(page, "Steps", 4)
    draw(page, "averylongword" * 20)
    page.get_by_role("button", name="As code").click()
    page.get_by_role("tab", name="OpenAI SDK").click()
    page.get_by_role("button", name="Start from a picture").click()
    assert fits()
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    size(page, "1x1")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.get_by_role("alert").filter(visible=True)).to_have_count(1)
    assert fits()


def test_only_what_the_model_takes_is_shown_to_the_holder_of_a_key(browser: Browser, tmp_path: Path) -> None:
    keys, fake = Keys(tmp_path / "keys.sqlite", create=True), FakeFlux(pictures=(png(64),))
    _, secret = keys.create("alice", Limits())
    models = {name: [server_of(fake)] for name in ("flux.1-dev", "flux.2-klein-4b")}
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    with Gateway(Fleet(models), keys=keys, page=True) as gateway:
        context = browser.new_context(http_credentials={"username": "", "password": secret})
        page = opened(context, gateway)
        steps, guidance = (page.get_by_role("slider", name=re.compile(label)) for label in ("Steps", "Guidance"))
        page.get_by_role("button", name="Start from a picture").click()
        expect(page.get_by_role("slider", name=re.compile("Strength"))).to_be_visible()
        expect(steps).to_have_value("28")
        expect(guidance).to_have_value("3.5")
        page.get_by_label("Model").click()
        page.get_by_role("option", name="flux.2-klein-4b").click()
        expect(guidance).to_be_hidden()
        expect(page.get_by_role("slider", name=re.compile("Strength"))).to_be_hidden()
        expect(steps).to_have_value("4")
        expect(steps).to_have_attribute("max", "8")
        page.locator("#images input").set_input_files([tmp_path / "a.png", tmp_path / "b.png"])
        expect(page.locator("#images img")).to_have_count(2)
        draw(page, "a fox")
        (_, sent) = fake.requests[-1]
        assert sent["num_inference_steps"].tolist() == [4] and len(sent["image"]) == 2
        assert not {"guidance_scale", "strength"} & set(sent)
        page.get_by_role("button", name="As code").click()
        page.get_by_role("tab", name="OpenAI SDK").click()
        shown = page.locator("#details .cm-content").filter(visible=True).inner_text()
        assert "FLUXSERVE_KEY" in shown and secret not in page.content()
        context.close()


@pytest.mark.skipif(not SCREENSHOTS, reason="writes documentation; asked for by FLUXSERVE_SCREENSHOTS=docs")
def test_screenshot(context: BrowserContext, gateway: Gateway) -> None:
    page = opened(context, gateway)
    for thing in ("a blue fish on a yellow", "a red apple on a green", "a fox on a blue"):
        draw(page, f"{thing} background")
    page.mouse.move(0, 0)
    target = ROOT / SCREENSHOTS / "page.png"
    page.screenshot(path=target, full_page=True)
    Image.open(io.BytesIO(target.read_bytes())).quantize(128).save(target, optimize=True)
    assert target.stat().st_size <= 300_000
