"""The page: what it refuses, what it answers, and a real browser in front of it."""

import shutil
import time

import numpy as np
import pytest
from PIL import Image

from input_pipeline import DataError
from magnet_jax import demo
from magnet_jax.demo import Answers, heat, masks_at, read_picture, read_sentences
from magnet_jax.predict import Prediction, Predictor
from tests.test_predict import TEXTS, pictures, trained


def test_sentences():
    assert read_sentences(" the red ring \n\nblue star\nblue star") == ["the red ring", "blue star"]
    for text, said in (
        (" \n", "no sentence"),
        ("\n".join(map(str, range(9))), "9 sentences; 8 at most"),
        ("x" * 201, "has 201 characters; 200 at most"),
    ):
        with pytest.raises(DataError, match=said):
            read_sentences(text)


def test_pictures_are_turned_and_made_to_fit(tmp_path):
    wide = Image.new("RGB", (3000, 1000), "red")
    wide.paste("blue", (0, 0, 100, 1000))
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned right by a quarter.
    wide.save(tmp_path / "x.png", exif=exif)
    picture = read_picture(tmp_path / "x.png")
    assert picture.size == (341, 1024)
    assert picture.getpixel((170, 2)) == (0, 0, 255)
    assert picture.getpixel((170, 1000)) == (255, 0, 0)
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(DataError, match="the file: not a readable image"):
        read_picture(tmp_path / "bad.png")


def test_masks_at_a_threshold():
    logits = np.array([[-2.0, 0.1], [1.0, 3.0]], np.float32)
    prediction = Prediction("x", logits > 0, logits, 1.0)
    probability = 1 / (1 + np.exp(-logits))
    for threshold in (0.05, 0.5, 0.9):
        np.testing.assert_array_equal(masks_at([prediction], threshold)[0], probability > threshold)


def test_answers_are_the_predictor_s():
    answers, picture = Answers(trained()), pictures(1)[0]
    *lines, found = answers.find(picture, "\n".join(TEXTS))
    assert "compiling the network, once" in lines[0]
    for a, b in zip(found, Predictor(trained()).predict(picture, TEXTS), strict=True):
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5 * np.abs(b.logits).max())
    assert next(answers.find(picture, TEXTS[0])) == "looking for 1 sentence ..."
    answers._seconds["find"] = 4.2  # As of a large network.
    assert (
        next(answers.find(picture, "a\nb")) == "looking for 2 sentences ... a large network here: about 8 s"
    )
    with pytest.raises(DataError, match="no picture; upload one"):
        list(answers.find(None, "x"))
    *_, maps = answers.words(picture, TEXTS[0])
    assert [caption for _, caption in maps][:2] == ["the: looked for", "the: like it"]
    assert {image.shape for image, _ in maps} == {(picture.height, picture.width, 3)}


def test_heat_is_brightest_where_the_value_is_largest():
    values = np.zeros((4, 5))
    values[2, 3] = 1
    drawn = heat(np.full((4, 5, 3), 100, np.uint8), values).astype(int).sum(-1)
    assert np.unravel_index(drawn.argmax(), drawn.shape) == (2, 3)


def test_files_to_download_are_the_masks():
    picture = pictures(1)[0]
    mask = np.zeros((picture.height, picture.width), bool)
    mask[3:9, 4:20] = True
    overlay, file = demo.write_files(picture, [None], [mask])
    np.testing.assert_array_equal(np.asarray(Image.open(file)) == 255, mask)
    assert np.asarray(Image.open(overlay)).shape == (*mask.shape, 3)


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    driver, binary = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not binary:
        pytest.skip("no chromium and chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "window-size=1300,1500",
    ):
        options.add_argument(f"--{flag}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def address():
    pytest.importorskip("gradio")
    blocks = demo.page(Answers(trained()))
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", server_port=None, quiet=True, prevent_thread_lock=True, share=False
    )
    yield address
    blocks.close()


def wait_for(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            found = condition()
        except Exception:  # An element that is being replaced.
            found = None
        if found:
            return found
        time.sleep(0.3)
    raise AssertionError(f"{what}: not within {seconds} s")


@pytest.mark.slow
def test_upload_type_and_see_the_mask(browser, address, tmp_path):
    def one(selector):
        return browser.find_element("css selector", selector)

    browser.get(address)
    upload = wait_for(lambda: one("#file input[type=file]"), "the place for a file")
    # What is no picture is refused in a line, and nothing is shown.
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    upload.send_keys(str(tmp_path / "bad.png"))
    wait_for(lambda: "Refused: the file: not a readable image" in one("#status").text, "the refusal")
    browser.refresh()
    pictures(2)[1].save(tmp_path / "good.png")
    wait_for(lambda: one("#file input[type=file]"), "the place for a file").send_keys(
        str(tmp_path / "good.png")
    )
    wait_for(lambda: one("#picture img"), "the picture")
    one("#text textarea").send_keys("the red ring\nthe largest star")
    one("#find").click()
    wait_for(lambda: "compiling" in one("#status").text or one("#found img"), "a word about compiling")
    wait_for(
        lambda: len(browser.find_elements("css selector", "#found img")) == 3, "the picture and two masks"
    )
    said = wait_for(lambda: one("#said").text, "the answers")
    assert "the red ring:" in said
    assert "the largest star:" in said
    assert len(browser.find_elements("css selector", "#downloads a[download]")) >= 4
    one("#look").click()
    wait_for(lambda: len(browser.find_elements("css selector", "#maps img")) >= 6, "maps of the words")
    # Another picture: what was found in the last one is gone.
    browser.find_elements("css selector", "#examples button img")[-1].click()
    wait_for(lambda: not one("#said").text, "the answers to go")
    wait_for(lambda: not browser.find_elements("css selector", "#found img"), "the masks to go")
