"""A page to try a network on pictures: masks of sentences in colour, and the map of each word."""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import input_pipeline
from input_pipeline import DataError, ops
from magnet_jax import visualize
from magnet_jax.errors import UserError
from magnet_jax.explain import Explainer
from magnet_jax.predict import Prediction, in_words
from magnet_jax.trained import Trained, load_trained

# What the page accepts.
MOST_SENTENCES, MOST_CHARACTERS, MOST_MEGABYTES, MOST_WAITING = 8, 200, 25, 16
_SIDE = 1024  # Pixels, of a picture on the page.
_SLOW = 3.0  # Seconds from which the page says how long an answer takes.
_COLOURS = ("#e63c28", "#286ee6", "#28aa46", "#d28c14", "#963cc8", "#14aab4", "#8c5a28", "#646464")


def read_picture(path: str | Path) -> Image.Image:
    """An uploaded picture as it is looked at: turned as its EXIF data say, and no larger than the page shows.

    Raises DataError for what is no picture.
    """
    picture = ops.open_image(path, "the file", upright=True)
    picture.thumbnail((_SIDE, _SIDE))
    return picture


def read_sentences(text: str) -> list[str]:
    """One a line; raises DataError where there is none, or too much."""
    sentences = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not sentences:
        raise DataError("no sentence; write what to look for, one sentence a line")
    if len(sentences) > MOST_SENTENCES:
        raise DataError(f"{len(sentences)} sentences; {MOST_SENTENCES} at most at a time")
    for sentence in sentences:
        if len(sentence) > MOST_CHARACTERS:
            raise DataError(f"'{sentence[:30]}...' has {len(sentence)} characters; {MOST_CHARACTERS} at most")
    return sentences


class Answers:
    """What the page asks of a network."""

    def __init__(self, trained: Trained):
        self.trained = trained
        self.explainer = Explainer(trained)
        self._seconds: dict[
            str, float
        ] = {}  # What the last answer took, for each sentence; the first one compiled.

    def find(self, picture: Image.Image | None, text: str) -> Iterator[str | list[Prediction]]:
        """Lines to show meanwhile, and at last the predictions; raises DataError for what is refused."""
        if picture is None:
            raise DataError("no picture; upload one, or choose an example")
        sentences = read_sentences(text)
        what = f"looking for {len(sentences)} sentence{'s' * (len(sentences) > 1)} ..."
        yield self._status("find", what, len(sentences))
        pairs = [(picture, sentence) for sentence in sentences]
        with self._timed("find", len(sentences)):
            found = list(self.explainer.predictor.predict_pairs(pairs, batch_size=1))
        yield found

    def words(self, picture: Image.Image | None, text: str) -> Iterator[str | list[tuple[np.ndarray, str]]]:
        """The same for pictures with captions: where the network looks for each word of the first sentence."""
        if picture is None:
            raise DataError("no picture; upload one, or choose an example")
        sentence = read_sentences(text)[0]
        yield self._status("words", f"looking at the words of '{sentence}' ...")
        with self._timed("words"):
            explanation = self.explainer.explain(picture, sentence)
        image, shown = np.asarray(picture), []
        for word in explanation.words:
            for name, values in (("looked for", word.attention), ("like it", word.similarity)):
                if values is not None:
                    shown.append((heat(image, values), f"{word.text}: {name}"))
        yield shown

    @contextlib.contextmanager
    def _timed(self, what: str, sentences: int = 1):
        first, start = what not in self._seconds, time.monotonic()
        yield
        self._seconds[what] = 0.0 if first else (time.monotonic() - start) / sentences

    def _status(self, what: str, line: str, sentences: int = 1) -> str:
        if what in self._seconds:
            seconds = sentences * self._seconds[what]
            return line if seconds < _SLOW else f"{line} a large network here: about {seconds:.0f} s"
        return f"compiling the network, once, which takes seconds for a small one and minutes for a large one; then {line}"


def heat(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3], grey, with values [H, W] as colours over it."""
    from matplotlib import colormaps  # Slow to import.

    scaled = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    colours = 255 * colormaps["inferno"](scaled)[..., :3]
    return (0.4 * image.mean(-1, keepdims=True) + 0.6 * colours).astype(np.uint8)


def masks_at(predictions: Sequence[Prediction], threshold: float) -> list[np.ndarray]:
    """Masks bool [H, W] of pixels that are more probable than the threshold."""
    logit = np.log(threshold / (1 - threshold))
    return [(p.logits > logit) & (p.present is None or p.present >= 0.5) for p in predictions]


def write_files(
    picture: Image.Image, predictions: Sequence[Prediction], masks: Sequence[np.ndarray]
) -> list[str]:
    """PNGs to download: the overlay of each sentence, and its mask."""
    folder, names = Path(tempfile.mkdtemp(prefix="magnet-jax.")), []
    for number, mask in enumerate(masks, 1):
        for kind, array in (
            ("overlay", visualize.overlay(np.asarray(picture), mask)),
            ("mask", mask.astype(np.uint8) * 255),
        ):
            path = folder / f"{kind}.{number}.png"
            path.write_bytes(visualize.encode_png(array))
            names.append(str(path))
    return names


def table(predictions: Sequence[Prediction], masks: Sequence[np.ndarray]) -> str:
    """The answers in words: a line for each."""
    shown = [dataclasses.replace(p, mask=mask) for p, mask in zip(predictions, masks, strict=True)]
    return "\n".join(f"- {prediction.text}: {in_words(prediction)}" for prediction in shown)


def example_pictures(config: ConfigDict, count: int = 4) -> list[Image.Image]:
    """Scenes of the built-in data where the network knows them, else none."""
    if config.data.source != "shapes":
        return []
    options = config.data.options.to_dict() | {"scenes": count, "image_size": 256}
    options.pop("cache_dir", None)
    records = input_pipeline.load("shapes", "val", seed=config.data.seed, **options)
    return [ops.open_image(image) for image in records.images]


def page(answers: Answers):
    """The page, as Gradio's Blocks; raises UserError where Gradio is not installed."""
    gr = _gradio()
    examples = example_pictures(answers.trained.config)

    def refuse(error: Exception) -> str:
        return f"**Refused:** {error}"

    def changed(picture, line):
        """Another picture: what was found in the last one goes."""
        return picture, picture, line, ([], None), None, "", []

    def upload(path):
        if path is None:
            return changed(None, "")
        try:
            return changed(read_picture(path), "Now type what to look for.")
        except DataError as error:
            return changed(None, refuse(error))

    def choose(event: gr.SelectData):
        return changed(examples[event.index], "Now type what to look for.")

    def show(answer, threshold):
        predictions, picture = answer  # The one they are of: there may be another on the page by now.
        if not predictions:
            return None, "", []
        masks = masks_at(predictions, threshold)
        labels = [f"{number}. {prediction.text}" for number, prediction in enumerate(predictions, 1)]
        annotated = gr.AnnotatedImage(
            (np.asarray(picture), list(zip(masks, labels, strict=True))),
            color_map=dict(zip(labels, _COLOURS, strict=False)),
        )
        return annotated, table(predictions, masks), write_files(picture, predictions, masks)

    def find(picture, text, threshold):
        try:
            for answer in answers.find(picture, text):
                if isinstance(answer, str):
                    yield answer, ([], None), None, "", []
                else:
                    yield "", (answer, picture), *show((answer, picture), threshold)
        except DataError as error:
            yield refuse(error), ([], None), None, "", []

    def words(picture, text):
        try:
            for answer in answers.words(picture, text):
                yield (answer, []) if isinstance(answer, str) else ("", answer)
        except DataError as error:
            yield refuse(error), []

    with gr.Blocks(title="MagNet", analytics_enabled=False) as blocks:
        gr.Markdown("# What does the sentence mean?\nThe object of the picture that it means is marked.")
        picture, answer = gr.State(None), gr.State(([], None))
        with gr.Row():
            with gr.Column():
                file = gr.File(
                    label="Upload a picture",
                    type="filepath",
                    file_types=["image"],
                    height=120,
                    elem_id="file",
                )
                shown = gr.Image(label="Picture", interactive=False, type="pil", elem_id="picture")
                if examples:
                    gallery = gr.Gallery(
                        examples,
                        label="Examples",
                        columns=4,
                        height=140,
                        allow_preview=False,
                        elem_id="examples",
                    )
                text = gr.Textbox(
                    label="Sentences, one a line",
                    lines=2,
                    placeholder="the red ring on the left",
                    elem_id="text",
                )
                button = gr.Button("Find", variant="primary", elem_id="find")
                status = gr.Markdown(elem_id="status")
            with gr.Column():
                found = gr.AnnotatedImage(label="Found", show_legend=True, elem_id="found", height=420)
                threshold = gr.Slider(
                    0.05, 0.95, 0.5, step=0.05, label="Probability from which a pixel counts"
                )
                said = gr.Markdown(elem_id="said")
                downloads = gr.File(label="Masks and overlays", file_count="multiple", elem_id="downloads")
        look = gr.Button("Show the map of each word of the first sentence", elem_id="look")
        maps = gr.Gallery(label="Words", columns=6, object_fit="contain", elem_id="maps")

        outputs = [status, answer, found, said, downloads]
        file.upload(upload, file, [picture, shown, *outputs])
        if examples:
            gallery.select(choose, None, [picture, shown, *outputs])
        gr.on([button.click, text.submit], find, [picture, text, threshold], outputs, concurrency_limit=1)
        threshold.release(show, [answer, threshold], [found, said, downloads])
        look.click(words, [picture, text], [status, maps], concurrency_limit=1)
    return blocks.queue(max_size=MOST_WAITING)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise UserError("--mode=demo needs Gradio: pip install -r requirements-demo.txt") from error
    return gradio


def demo(workdir: str, host: str, port: int, config: ConfigDict | None = None, wait: bool = True):
    """Serves the page of a run, a portable folder or imported weights until it is interrupted.

    Raises UserError as `load_trained`, and where the port is taken.
    """
    _gradio()
    blocks = page(Answers(load_trained(workdir, config)))
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            max_file_size=f"{MOST_MEGABYTES}mb",
            share=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(
            f"--port is {port}, which cannot be listened on at {host} ({error}); give another"
        ) from error
    print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
    if wait:
        blocks.block_thread()
    return blocks
