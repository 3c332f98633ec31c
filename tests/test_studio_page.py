"""The page as it is served: what can be reached, and each tab's main job in a real browser."""

import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from pushforward.studio.page import TABS
from support.cli import invoke, refused

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="the page needs Gradio")
ROOT = Path(__file__).parent.parent
MODEL = "fashion-vp"
OTHER = "emoji-2"
WAIT = 90_000  # milliseconds, for a machine that is busy


@pytest.fixture(scope="module")
def address():
    """Of a page that runs as a user starts it."""
    command = [sys.executable, "-m", "pushforward", "studio", MODEL, OTHER, "--no-open", "--device", "cpu"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        ready, _, _ = select.select([page.stdout], [], [], 60)
        assert ready, "the page does not start"
        line = page.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line + page.stdout.read()
        yield found[0]
    finally:
        page.terminate()
        page.wait(20)
        page.stdout.close()


def status(url, data=None, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def multipart(name, data):
    head = f'--B\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    return head + data + b"\r\n--B--\r\n"


def upload(address, name, data):
    return status(f"{address}gradio_api/upload", multipart(name, data),
                  **{"Content-Type": "multipart/form-data; boundary=B"})  # fmt: skip


# -- what can be reached -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "pyproject.toml"), "pyproject.toml", "../../etc/passwd"])
def test_no_file_of_the_server_can_be_read(address, path):
    for way in ("gradio_api/file=", "file="):
        code, text = status(f"{address}{way}{path}")
        assert code in (403, 404)
        assert b"root:" not in text
        assert b"[project]" not in text


def test_the_page_says_nothing_of_where_it_runs_and_offers_no_energy_of_python(address):
    code, text = status(address)
    assert code == 200
    assert str(ROOT).encode() not in text
    assert b"python:" not in text


def test_a_path_that_was_not_uploaded_is_no_picture(address):
    """A request made by hand, which names a file of the server as if it had been uploaded."""
    _, text = status(f"{address}config")
    config = json.loads(text)
    names = [one.get("api_name") for one in config["dependencies"] if one.get("api_visibility") == "public"]
    assert names == []  # nothing can be called by name
    part = next(one for one in config["components"] if one["props"].get("elem_id") == "inpaint-photo")["id"]
    job = next(one for one in config["dependencies"] if [part, "change"] in [list(target) for target in one["targets"]])
    asked = {"data": [{"path": str(ROOT / "docs/images/demo.png"), "meta": {"_type": "gradio.FileData"}}, MODEL],
             "fn_index": job["id"], "session_hash": "byhand"}  # fmt: skip
    code, _ = status(
        f"{address}gradio_api/queue/join", json.dumps(asked).encode(), **{"Content-Type": "application/json"}
    )
    _, events = status(f"{address}gradio_api/queue/data?session_hash=byhand") if code == 200 else (code, b"")
    assert b'"success":false' in events.replace(b" ", b""), events


def test_the_classifiers_classes_are_offered_whatever_the_model(address):
    """Emoji's captions were offered as classes of a classifier of clothes."""
    config = json.loads(status(f"{address}config")[1])
    (classes,) = [one for one in config["components"] if one["props"].get("label") == "A class"]
    assert ["sneaker", "sneaker"] in classes["props"]["choices"]
    assert classes["props"].get("value") is None
    loading = [one for one in config["dependencies"] if "load" in [event for _, event in one["targets"]]]
    by_model = [one for one in loading if one["backend_fn"]]  # the browser's own gives back what was written
    assert by_model
    assert all(classes["id"] not in one["outputs"] for one in by_model)


def test_uploads_are_limited(address):
    assert upload(address, "a.png", b"0" * 1000)[0] == 200
    assert upload(address, "a.png", b"0" * 21_000_000)[0] == 413


def test_only_this_machine_is_listened_to_without_a_password():
    refused(invoke("studio", "--host", "0.0.0.0"), "add --auth")
    refused(invoke("studio", "--host", "example.org"), "add --auth")
    refused(invoke("studio", "--auth", "nobody"), "a name and a password")
    refused(invoke("studio", "--device", "nowhere"), "cannot be used here")


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="tests in a browser need Playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"there is no Chromium here: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, address):
    """A function that opens the page as another visitor, at a tab."""
    contexts = []

    def opened(tab="Sample", **settings):
        contexts.append(context := browser.new_context(**settings))
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.get_by_role("tab", name=tab, exact=True).click()
        page.wait_for_function("() => !document.querySelector('.loading')")
        return page

    yield opened
    for context in contexts:
        context.close()


def fill(page, label, text):
    """Write into a control that offers choices; by the keyboard, as all can be used."""
    box = page.get_by_label(label, exact=True).locator("visible=true").first
    box.fill(text)
    box.press("Enter")


def slide(page, label, value):
    box = page.get_by_role("spinbutton", name=re.compile(f"number input for {label}$", re.IGNORECASE))
    box.locator("visible=true").first.fill(str(value))
    box.locator("visible=true").first.press("Tab")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def says(page, tab, text):
    place = page.locator(f"#{tab}-says")
    try:
        place.get_by_text(text).wait_for()
    except Exception as error:
        raise AssertionError(f"{text!r} is not said, but {place.inner_text()!r}") from error


def downloaded(page, name):
    button = page.locator(f"#{name}-files")
    with page.expect_download() as download:
        button.click()
    return zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))


def test_sampling_shows_rounds_and_hands_over_files(visit):
    page = visit()
    fill(page, "Solver", "ddim")
    slide(page, "Steps", 8)
    slide(page, "Images", 2)
    page.get_by_label("All steps at once").check()
    began = time.perf_counter()
    press(page, "Sample")
    page.locator("#sample-picture img").wait_for()
    assert time.perf_counter() - began < 30  # 10 s where nothing else runs
    says(page, "sample", "network evaluations each")
    assert page.locator("#sample-rounds tbody tr").count() > 1
    assert page.locator("#sample-picture img").evaluate("image => image.naturalHeight") > 300  # of 28 pixels
    page.set_viewport_size({"width": 390, "height": 844})
    states = page.locator("#sample-rounds tbody img").first.evaluate("image => image.getBoundingClientRect().width")
    assert 130 < states < 300  # eight states and the start, each of 15 at least, and all of them to be seen
    page.get_by_text("The same without this page").locator("visible=true").click()
    page.locator("#samples-command .cm-line").first.wait_for()
    colours = page.locator("#samples-command .cm-line").evaluate_all(
        "all => all.flatMap(line => [line, ...line.querySelectorAll('*')]).map(part => getComputedStyle(part).color)"
    )
    assert len(set(colours)) == 1  # that of text: options were pale orange on white
    archive = downloaded(page, "samples")
    assert set(archive.namelist()) == {"samples.png", "codes.safetensors", "settings.txt"}
    assert "--parallel" in archive.read("settings.txt").decode()
    fill(page, "Solver", "nonsense")
    press(page, "Sample")
    says(page, "sample", "Unknown solver 'nonsense'")
    for left in ("#sample-picture img", "#sample-rounds img", "#samples-files:enabled"):
        assert not page.locator(left).count()  # it stood there, marked "Error"


def test_what_is_written_while_a_model_is_loaded_stays(visit):
    """It went as the model was there; what was written for the one before goes."""
    page = visit()
    words = page.locator(".token").locator("visible=true")
    fill(page, "Draw", "bag")
    assert words.count() == 1
    page.locator("#model input").click()
    page.get_by_role("option", name=OTHER, exact=True).click()
    fill(page, "Draw", "a prompt of my own")  # sooner than it can be loaded
    box = page.get_by_label("Draw", exact=True).locator("visible=true").first
    for _ in range(60):  # until the captions of the other are offered
        box.blur()
        box.click()
        if page.get_by_role("option").filter(has_text="noto").count():
            break
        page.wait_for_timeout(500)
    else:
        pytest.fail("the captions are not offered")
    assert words.all_inner_texts() == ["a prompt of my own"]
    slide(page, "Steps", 7)
    page.reload()
    words.get_by_text("a prompt of my own").wait_for()
    assert page.locator("#model input").input_value() == OTHER
    assert page.get_by_role("spinbutton", name="number input for Steps").locator("visible=true").input_value() == "7"


def test_comparing_copies_commands(visit):
    page = visit("Compare", permissions=["clipboard-read", "clipboard-write"])
    slide(page, "Images", 1)
    press(page, "Compare")
    says(page, "compare", "12 samplers")
    page.locator("#compare-table tbody tr").nth(1).get_by_role("button", name="Command").click()
    page.locator("#compare-table").get_by_role("button", name="Copied").wait_for()
    text = page.evaluate("navigator.clipboard.readText()")
    assert text.startswith(f"pushforward sample {MODEL} --count 1 --solver ddim --steps 5")


def test_editing_and_inverting(visit, tmp_path):
    page = visit("Edit")
    Image.radial_gradient("L").resize((90, 60)).save(tmp_path / "photo.png")
    page.locator("#edit-photo input[type=file]").set_input_files(tmp_path / "photo.png")
    page.locator("#edit-photo img").wait_for()
    fill(page, "The picture shows", "bag")
    fill(page, "It is to show", "sneaker")
    slide(page, "Steps", 5)
    press(page, "Change")
    says(page, "edit", "8 results")
    assert page.locator("#edit-row figure").count() == 9
    assert "sdedit.png" in downloaded(page, "edited").namelist()
    page.get_by_role("tab", name="Invert it").click()
    slide(page, "Steps", 10)
    press(page, "Invert")
    page.locator("#invert-figures table").wait_for()
    assert page.locator("#invert-slider img").count() >= 2
    assert {"codes.safetensors", "both.png", "picture-0.png"} <= set(downloaded(page, "codes").namelist())


def test_inpainting_what_is_painted_over(visit):
    page = visit("Inpaint")
    page.set_viewport_size({"width": 390, "height": 844})
    button = page.get_by_role("button", name="Inpaint", exact=True)
    assert page.locator("#inpaint-editor").bounding_box()["y"] < button.bounding_box()["y"]  # paint, then press
    press(page, "Have the model draw one")
    page.locator("#inpaint-photo img").wait_for()
    fill(page, "Paint anew", "lower half")
    slide(page, "Steps", 5)
    slide(page, "Draws", 1)
    press(page, "Inpaint")
    says(page, "inpaint", "1 draw,")
    assert {"mask.png", "0.png"} <= set(downloaded(page, "inpainted").namelist())


def test_guiding_can_be_stopped_and_kept(visit):
    page = visit("Guide")
    stop = page.get_by_role("button", name="Stop", exact=True).locator("visible=true")
    assert stop.is_disabled()  # there is nothing to stop
    fill(page, "A class", "sneaker")
    slide(page, "Chains", 2)
    slide(page, "Moves", 400)
    press(page, "Guide")
    page.locator("#guide-traces polyline").first.wait_for()
    press(page, "Stop")
    says(page, "guide", "Stopped")
    assert "codes.safetensors" in downloaded(page, "guided").namelist()
    page.wait_for_function("stop => stop.disabled", arg=stop.element_handle())
    slide(page, "Moves", 5)
    press(page, "Guide")  # the model is free again
    says(page, "guide", "after 5 moves")
    fill(page, "Like a picture, in", "all of it")
    press(page, "Guide")
    says(page, "guide", "Give the reference first")  # this tab has no button for the model to draw one


def test_plans_have_words_on_their_coefficients(visit):
    page = visit("Plan")
    press(page, "Show the plan")
    page.locator("#plan-picture svg").first.wait_for()
    assert "takes" in page.locator("#plan-picture rect title").first.text_content()


def test_bad_uploads_and_settings_are_one_sentence(visit, tmp_path):
    page = visit("Edit")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    page.locator("#edit-photo input[type=file]").set_input_files(tmp_path / "bad.png")
    fill(page, "The picture shows", "bag")
    fill(page, "It is to show", "sneaker")
    page.wait_for_timeout(1000)
    press(page, "Change")
    says(page, "edit", "This file cannot be read as a picture")
    for told in page.locator(".toast-body").all_inner_texts():
        assert str(tempfile.gettempdir()) not in told  # where it lies on the server
    assert "Traceback" not in page.content()
    page.get_by_role("tab", name="Sample", exact=True).click()
    fill(page, "Solver", "<b>no</b>")
    press(page, "Sample")
    says(page, "sample", "Unknown solver '<b>no</b>'")
    fill(page, "Draw", "x" * 10_000)
    assert page.locator(".token").locator("visible=true").bounding_box()["height"] < 200  # the button is in reach
    fill(page, "Solver", "ddim")
    press(page, "Sample")
    says(page, "sample", "has no class")
    page.get_by_text("The same without this page").locator("visible=true").click()
    assert page.locator("#samples-command").bounding_box()["height"] < 600  # and so is the download
    page.locator(".token-remove").locator("visible=true").first.click()
    page.get_by_label("Seed", exact=True).locator("visible=true").first.fill("-3")
    press(page, "Sample")
    says(page, "sample", "network evaluations each")  # as the command takes it


def test_a_double_click_two_visitors_and_a_reload(visit):
    first, second = visit(), visit()
    for page in (first, second):
        slide(page, "Images", 2)
    first.get_by_role("button", name="Sample", exact=True).dblclick()
    press(second, "Sample")
    for page in (first, second):
        says(page, "sample", "network evaluations each")
    slide(first, "Steps", 200)
    press(first, "Sample")
    first.locator("#sample-says").get_by_text("Call").wait_for()
    first.reload()  # in the middle: the work ends, and the model is free
    slide(first, "Images", 1)
    press(first, "Sample")
    says(first, "sample", "1 image, ")


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_a_phone_shows_all_of_it(visit, scheme):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for tab, (_, does) in TABS.items():
        found = page.get_by_role("tab", name=tab, exact=True)
        if not found.is_visible():
            page.locator(".overflow-menu button").first.click()
            found = page.get_by_role("button", name=tab, exact=True).first
        found.click()
        page.wait_for_timeout(200)
        assert page.get_by_text(does).is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shade)[:3])) < 200) == (scheme == "dark")


def test_the_keyboard_reaches_the_button(visit):
    page = visit()
    button = page.get_by_role("button", name="Sample", exact=True)
    page.get_by_role("tab", name="Sample", exact=True).focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if button.evaluate("(it) => it === document.activeElement"):
            break
    else:
        pytest.fail("Tab does not lead to the button")
    page.keyboard.press("Enter")
    says(page, "sample", "images")
