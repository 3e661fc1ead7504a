"""What people do on the playground, in a real Chromium, with the starter models behind it."""

from __future__ import annotations

import io
import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import expect

from benchmarks.recovery import process_of
from deployments.settings import ROOT
from serve_app.access.editing import revoke_key

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Page

    from tests.browser.conftest import Guarded, Visit

SAMPLES = ROOT / "serve_app/playground/samples"
LIMIT_MS = 60_000
SEEN = "#result:not([hidden])"
REFUSED = ("Failed to load resource: the server responded with a status of 4",)
LOST = ("Failed to load resource",)
GIVE = """([kind, bytes, name]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
        : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""
SCROLLED = """(box, before) => new Promise((done) => {
    const look = () => (box.scrollLeft > before ? done() : requestAnimationFrame(look));
    look();
})"""
FORGOTTEN = """() => new Promise((done) => {
    const open = indexedDB.open("imagen-playground", 1);
    const item = { id: "f", at: Date.now() + 1e6, task: "comic", name: "a.png", source: null,
        fields: {}, state: "queued", count: 1, job: "/api/v1/jobs/" + "0".repeat(32) };
    open.onsuccess = () => {
        const store = open.result.transaction("items", "readwrite").objectStore("items");
        store.put(item).onsuccess = () => done();
    };
})"""
"""Puts a running job into the history that the service knows nothing of."""


def choose(page: Page, task: str) -> None:
    page.get_by_role("button", name=task).and_(page.locator(".task-name")).click()


def run(page: Page) -> None:
    """Press Run, and wait for the one result."""
    before = page.locator("#history .completed").count()
    page.click("#run")
    expect(page.locator("#history .completed")).to_have_count(before + 1, timeout=LIMIT_MS)
    page.wait_for_selector(SEEN)


def picture(page: Page, name: str = "PNG") -> Image.Image:
    """The result, as the menu saves it."""
    page.click("#acts button:has-text('Download')")
    with page.expect_download() as saved:
        page.locator("#download button", has_text=name).click()
    return Image.open(io.BytesIO(saved.value.path().read_bytes()))


def facts(page: Page) -> dict[str, str]:
    names = page.locator("#facts dt").all_inner_texts()
    return dict(zip(names, page.locator("#facts dd").all_inner_texts(), strict=True))


def codes(made: str) -> set[str]:
    """Of the notes that a result's metadata have."""
    return {note["code"] for note in json.loads(made)["notes"]}


def split_of(page: Page) -> float:
    return float(page.input_value("#split"))


def test_two_clicks_lead_to_a_result_and_its_call_makes_it_again(
    address: str, visit: Visit, tmp_path: Path
) -> None:
    page = visit(address, permissions=["clipboard-read", "clipboard-write"])
    page.click("#samples button")
    page.click("#run")
    page.wait_for_selector(SEEN)
    assert facts(page)["Size"].startswith("2400 ")
    assert facts(page)["Model"].startswith("upscale-starter@")
    assert page.locator(".bar-of-times span").count() >= 3
    # Before and after, by keyboard and by hand; then real pixels.
    page.wait_for_selector("#viewer.compares")
    assert "ignored" not in page.inner_text("#notes"), "nobody asked for it"
    page.focus("#split")
    page.keyboard.press("End")
    expect(page.locator("#after")).to_have_css("clip-path", "inset(0px 0px 0px 100%)")
    expect(page.locator(".after-tag")).not_to_be_visible()
    expect(page.locator(".before-tag")).to_be_visible()
    box = page.locator("#viewer").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert 10 < split_of(page) < 40
    # By the whole name: a result of 11:15 has "1:1" in its own.
    page.get_by_role("button", name="1:1, real pixels", exact=True).click()
    assert page.inner_text("#zoom") == "100 %"
    page.focus("#scroll")
    before = page.locator("#scroll").evaluate("box => box.scrollLeft")
    page.keyboard.press("ArrowRight")
    page.locator("#scroll").evaluate(SCROLLED, before)
    made = picture(page)
    page.click("#copy")
    call = page.evaluate("navigator.clipboard.readText()")
    (tmp_path / "coffee.jpg").write_bytes((SAMPLES / "coffee.jpg").read_bytes())
    subprocess.run(["bash", "-c", call], cwd=tmp_path, check=True, capture_output=True)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "upscale.png")), np.asarray(made))
    page.locator(".call label", has_text="Python").click()
    script = page.inner_text("#code")
    compile(script, "call", "exec")
    assert "imagen.run(" in script


def test_a_cut_out_gets_a_white_background_and_is_saved_in_each_format(
    address: str, visit: Visit
) -> None:
    page = visit(address)
    page.click("#samples button:nth-child(2)")
    choose(page, "Background")
    run(page)
    assert picture(page).mode == "RGBA"
    assert "conic-gradient" in page.evaluate("getComputedStyle(layer).backgroundImage")
    below = page.locator("#field-background-background")
    expect(below).to_be_visible()
    page.locator("label", has_text="plain colour, white").click()
    assert page.input_value("#field-background-color") == "#ffffff"
    expect(below, "one colour is enough").not_to_be_visible()
    run(page)
    assert facts(page)["Output"] == "color"
    for kind in ("PNG", "WEBP", "JPEG"):
        saved = picture(page, kind)
        assert saved.format == kind
        assert min(saved.convert("RGB").getpixel((511, 0))) > 240


def test_a_text_becomes_a_picture_and_the_history_says_which(address: str, visit: Visit) -> None:
    page = visit(address)
    choose(page, "Generate")
    expect(page.locator("#settings")).to_contain_text("landscapes (mountains at dawn)")
    page.get_by_label("Prompt", exact=True).fill("a red star")
    run(page)
    assert facts(page)["Prompt"] == "a red star"
    assert picture(page).size == (256, 256)
    expect(page.locator("#history small")).to_contain_text("a red star")


def test_seeds_side_by_side_again_with_another_strength_and_on_to_another_task(
    address: str, visit: Visit
) -> None:
    page = visit(address)
    page.click("#samples button")
    choose(page, "Aged")
    page.fill("#count", "2")
    page.get_by_label("Also run Background").check()
    page.click("#run")
    expect(page.locator("#grid .completed")).to_have_count(3, timeout=LIMIT_MS)
    seeds = page.locator("#grid small").all_inner_texts()
    assert len({seed for seed in seeds if seed.startswith("seed")}) == 2
    page.locator("#grid li", has_text="seed").first.locator("button").click()
    page.wait_for_selector(SEEN)
    seed = facts(page)["Seed"]
    assert "VAE" in page.inner_text("#timings")
    page.click("#again")
    strength = page.get_by_label("Strength", exact=True)
    expect(strength).to_be_in_viewport()
    strength.fill("0.4")
    run(page)
    assert (facts(page)["Seed"], facts(page)["Strength"]) == (seed, "0.4")
    assert f"-F seed={seed}" in page.inner_text("#code")
    page.click("#acts button:has-text('Send on to')")
    page.locator("#send-on button", has_text="Background").click()
    run(page)
    assert facts(page)["Task"] == "Background"
    # All of it is there after a reload, and can be deleted.
    page.reload()
    page.wait_for_selector("#history li:nth-child(5)")
    page.locator("#history li").first.hover()
    page.locator("#history .delete").first.click()
    expect(page.locator("#history li")).to_have_count(4)
    assert page.locator("#history img").first.evaluate("e => e.decode().then(() => e.naturalWidth)")


def test_pictures_come_by_paste_camera_and_drop_and_a_result_brings_its_settings(
    address: str, visit: Visit
) -> None:
    page = visit(address)
    page.evaluate(GIVE, ["paste", list(png()), "pasted.png"])
    page.click("#camera-button")
    page.click("text=Take the picture")
    page.get_by_role("button", name="Show camera.jpg").wait_for()
    hostile = {
        "task": "generate",
        "parameters": {"guidance_scale": 2.5, "prompt": "<img src=x onerror=alert(1)>", "odd": {}}
        | {"webhook": "https://example.com/", "priority": "high", "strict": True},
    }
    dropped = png(json.dumps(hostile))
    page.evaluate(GIVE, ["drop", list(dropped), "earlier.png"])
    page.get_by_label("Prompt", exact=True).wait_for()
    assert page.get_by_label("Prompt", exact=True).input_value().startswith("<img")
    assert page.locator("#field-generate-guidance_scale").input_value() == "2.5"
    assert page.locator("#field-generate-strict").is_checked()
    assert page.locator("#field-generate-webhook").input_value() == "", "of a job"
    assert page.locator("#tray li").count() == 2


def test_a_copied_call_sends_no_file_that_a_value_names(address: str, visit: Visit) -> None:
    fields = {"prompt": "@/etc/passwd", "negative_prompt": "</etc/passwd"}
    task = {"url": f"{address}/api/v1/images/style/comic"}
    made = "async ([t, i]) => (await import('./playground/calls.js')).curl(t, i)"
    call = visit(address).evaluate(made, [task, {"task": "comic", "fields": fields}])
    assert "--form-string 'prompt=@/etc/passwd'" in call
    assert "--form-string 'negative_prompt=</etc/passwd'" in call
    assert "-F" not in call


def test_a_mask_is_a_file_of_the_form(address: str, visit: Visit) -> None:
    page = visit(address)
    page.evaluate(GIVE, ["paste", list(png()), "pasted.png"])
    choose(page, "Comic")
    mask = {"name": "mask.png", "mimeType": "image/png", "buffer": png()}
    of_a_mask = page.locator("#field-comic-mask_feather_px"), page.get_by_text("Mask changes")
    for field in of_a_mask:
        expect(field).not_to_be_visible()
    page.get_by_label("Mask, file").set_input_files([mask])
    for field in of_a_mask:
        expect(field).to_be_visible()
    run(page)
    made = picture(page).info["imagen"]
    assert "masked" in codes(made)
    # This browser has the mask still; a dropped file only says that there was one.
    page.click("#again")
    chosen = page.get_by_label("Mask, file").evaluate("input => input.files[0].name")
    assert chosen == "mask.png"
    run(page)
    assert "masked" in codes(picture(page).info["imagen"])
    page.evaluate(GIVE, ["drop", list(png(made)), "earlier.png"])
    expect(page.locator("#toast")).to_contain_text("not in it: Mask.")
    run(page)
    again = picture(page).info["imagen"]
    assert json.loads(again)["parameters"]["seed"] == json.loads(made)["parameters"]["seed"]
    assert "masked" not in codes(again)


def test_a_field_takes_a_word_or_a_file_as_the_service_does(address: str, visit: Visit) -> None:
    page = visit(address)
    page.evaluate(GIVE, ["paste", list(png(clear=True)), "clear.png"])
    choose(page, "Comic")
    page.get_by_label("Alpha").check()
    expect(page.locator("#field-comic-mask_feather_px")).to_be_visible()
    expect(page.get_by_text("Mask changes")).not_to_be_visible()
    run(page)
    assert "masked" in codes(picture(page).info["imagen"])
    assert "-F mask=alpha" in page.inner_text("#code")
    choose(page, "Background")
    below = page.get_by_label("Background, file")
    below.set_input_files(SAMPLES / "rocket.jpg")
    run(page)
    assert facts(page)["Background"] == "rocket.jpg"
    assert picture(page).mode == "RGB"
    page.fill("#field-background-background", "navy")
    assert below.input_value() == "", "a colour takes the place of the file"


def test_a_newcomer_is_told_what_is_missing_and_finds_settings_menus_and_the_call(
    address: str, visit: Visit
) -> None:
    page = visit(address, viewport={"width": 1280, "height": 800})
    toast = page.locator("#toast")
    page.click("#run")
    expect(toast).to_have_text("Choose a picture first.")
    page.click("#samples button:nth-child(2)")
    expect(toast).not_to_be_visible()
    # A picture of one's own takes the place of the sample, and stands beside another one.
    page.evaluate(GIVE, ["paste", list(png()), "own.png"])
    expect(page.get_by_role("button", name="Show own.png")).to_be_visible()
    page.evaluate(GIVE, ["paste", list(png()), "second.png"])
    expect(page.locator("#tray li")).to_have_count(2)
    page.locator("#tray .delete").last.click()
    page.locator("#tray .delete").click()
    expect(page.locator("#samples"), "nothing is chosen").to_be_visible()
    page.click("#samples button:nth-child(2)")
    choose(page, "Generate")
    tops = [page.get_by_text(words, exact=True).bounding_box()["y"] for words in ("Prompt", "Cut")]
    assert tops == sorted(tops), "what people change most comes first"
    assert "unless Long prompt says" in page.inner_text("#settings")
    choose(page, "Comic")
    prompt = page.get_by_label("Prompt", exact=True)
    expect(prompt, "the starter model ignores it").not_to_be_visible()
    steps = page.get_by_label("Steps", exact=True)
    steps.fill("6")
    page.get_by_label("Also run Background").check()
    expect(steps, "what was changed stays open").to_be_visible()
    assert page.get_by_label("Background", exact=True).get_attribute("placeholder") == "None"
    choose(page, "Background")
    run(page)
    for size in ((1280, 800), (390, 844)):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        page.click("#acts button:has-text('Send on to')")
        for entry in page.locator("#send-on button").all():
            expect(entry).to_be_in_viewport(ratio=1)
        page.keyboard.press("Escape")
    page.click("#acts :text('Code')")
    expect(page.locator("#copy")).to_be_in_viewport()


def test_a_size_that_goes_by_another_is_empty_and_can_be_emptied(
    address: str, visit: Visit
) -> None:
    page = visit(address)
    width = page.get_by_label("Width", exact=True)
    assert width.input_value() == ""
    assert width.get_attribute("placeholder") == "By height or scale"
    reset = page.get_by_role("button", name="Reset Upscale")
    width.fill("640")
    assert reset.is_visible()
    width.fill("")
    assert not reset.is_visible(), "no value is sent"
    slider = page.locator("[aria-label='Output compression, slider']")
    assert slider.get_attribute("aria-valuetext") == "Unset"


def test_a_job_is_shown_step_by_step_survives_a_killed_server_and_a_slow_link_and_is_canceled(
    address: str, visit: Visit
) -> None:
    page = visit(address, allowed=LOST)
    page.click("#samples button")
    choose(page, "Comic")
    slow = page.context.new_cdp_session(page)
    # 400 kbit/s and 300 ms, as on a phone in a train.
    link = {
        "offline": False,
        "latency": 300,
        "downloadThroughput": 50_000,
        "uploadThroughput": 50_000,
    }
    slow.send("Network.emulateNetworkConditions", link)
    page.get_by_label("Steps", exact=True).fill("60")
    page.click("#run")
    expect(page.locator("#progress-text")).to_have_text(
        re.compile(r"Step [1-9]\d* of"), timeout=LIMIT_MS
    )
    assert page.locator("#progress-time").inner_text()
    drawn = page.locator("#after[src^='data:image/jpeg']")
    drawn.wait_for(state="attached")
    victim = process_of("ingress")
    assert victim is not None
    victim.kill()
    page.wait_for_selector(SEEN)
    slow.send(
        "Network.emulateNetworkConditions",
        link | {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1},
    )
    page.get_by_label("Steps", exact=True).fill("150")
    page.click("#run")
    expect(page.locator("#status-text")).to_contain_text("1 at work")
    page.click("#cancel")
    page.wait_for_selector("#progress", state="hidden")
    assert page.locator("#history li").count() == 1


def test_bad_input_is_refused_in_the_services_words_and_nothing_is_lost(
    address: str, visit: Visit, tmp_path: Path
) -> None:
    page = visit(address, allowed=(*REFUSED, "ERR_"))
    name = '<img src=x onerror=alert(1)>";$(touch x).png'
    page.set_input_files(
        "#files", {"name": name, "mimeType": "image/png", "buffer": b"no picture" * 99}
    )
    page.click("#run")
    page.wait_for_selector("#problem:not([hidden])")
    assert "not an image" in page.inner_text("#problem strong")
    assert "Request" in page.inner_text("#problem")
    assert page.locator("#tray li").count() == 1
    page.locator("#tray .delete").click()
    big = tmp_path / "big.png"
    big.write_bytes(bytes(100_000_000))
    page.set_input_files("#files", big)
    page.click("#run")
    page.wait_for_selector("#problem strong:has-text('at most')")
    # A job that the service has forgotten, of a page that was closed meanwhile.
    page.evaluate(FORGOTTEN)
    page.reload()
    page.wait_for_selector("#history .failed >> nth=2")
    page.locator("#history li > button").first.click()
    assert "no such job" in page.inner_text("#problem strong")


def test_a_key_is_asked_for_below_a_prefix_and_a_revoked_one_loses_nothing(
    guarded: Guarded, visit: Visit
) -> None:
    page = visit(guarded.url, allowed=REFUSED)
    page.click("#samples button")
    choose(page, "Background")
    page.click("#run")
    page.fill("#key", "wrong")
    page.click("text=Use key")
    page.click("#run")
    page.wait_for_selector("#key-dialog[open]")
    assert "unknown or revoked" in page.inner_text("#key-why")
    page.fill("#key", guarded.token)
    page.click("text=Use key")
    run(page)
    assert "Authorization: Bearer $IMAGEN_KEY" in page.inner_text("#code")
    assert guarded.token not in page.content()
    assert not page.locator("#count-label").is_visible(), "there are no jobs here"
    revoke_key(guarded.keys, guarded.key_id)
    page.wait_for_timeout(1500)  # servers look once a second
    page.click("#run")
    page.wait_for_selector("#key-dialog[open]")
    page.click("text=Close")
    assert page.locator("#tray li").count() == 1
    assert page.locator("#history .completed").count() == 1


def test_a_new_task_and_new_fields_need_no_change(address: str, visit: Visit) -> None:
    from playwright.sync_api import Route

    def another(route: Route) -> None:
        document = route.fetch().json()
        new = json.loads(json.dumps(document["paths"]["/api/v1/images/style/comic"]["post"]))
        new |= {"operationId": "text_to_image", "summary": "Draw a picture."}
        schema = new["requestBody"]["content"]["multipart/form-data"]["schema"]
        schema["required"] = []
        fields = schema["properties"]
        del fields["image"]
        fields["warmth"] = {
            "type": "number",
            "minimum": 0,
            "maximum": 3,
            "default": 1,
            "description": "How warm.",
        }
        fields["template"] = {"type": "string", "format": "binary", "description": "Another file."}
        document["paths"] = {"/api/v1/images/draw": {"post": new}} | document["paths"]
        route.fulfill(json=document)

    context: dict[str, Any] = {"service_workers": "block"}
    page = visit(address, allowed=REFUSED, **context)
    page.route("**/openapi.json", another)
    page.reload()
    page.wait_for_selector("text=Draw a picture")
    page.get_by_label("Warmth", exact=True).fill("2.5")
    page.get_by_label("Template", exact=True).set_input_files(SAMPLES / "rocket.jpg")
    with page.expect_request("**/images/draw") as sent:
        page.click("#run")
    body = (sent.value.post_data_buffer or b"").decode("latin1")
    assert 'name="warmth"\r\n\r\n2.5' in body
    assert 'name="template"; filename="rocket.jpg"' in body


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_it(address: str, visit: Visit, scheme: str) -> None:
    page = visit(address, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")
    for step in ("empty", "result"):
        if step == "result":
            page.click("#samples button:nth-child(3)")
            choose(page, "Background")
            run(page)
        for width in (390, 1024, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            page.evaluate(
                "document.querySelectorAll('#panel details').forEach((d) => d.open = true)"
            )
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{step} scrolls sideways"


def png(said: str = "", *, clear: bool = False) -> bytes:
    """A small picture, with what a result says of itself; a part of it may be clear."""
    file, chunks = io.BytesIO(), PngInfo()
    if said:
        chunks.add_text("imagen", said)
    chunks.add_text("Title", "<script>alert(1)</script>")
    drawn = Image.effect_noise((64, 48), 60).convert("RGB")
    if clear:
        drawn.putalpha(Image.linear_gradient("L").resize(drawn.size))
    drawn.save(file, "PNG", pnginfo=chunks)
    return file.getvalue()
