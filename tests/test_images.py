"""Rows with images: pixels as the Hugging Face processor makes them, every bad image counted by its cause."""

import base64
import dataclasses
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dpo_jax.data.encode import encode
from dpo_jax.data.image_prompts import ImageTokens, encode_images
from dpo_jax.data.image_rows import image_marks, image_starts
from dpo_jax.data.images import Processing, load_processing, open_image, pixels
from dpo_jax.data.loader import make_batch, plan_layout
from dpo_jax.data.pairs import BadRow, Cause
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.tfds import write_tfds
from dpo_jax.data.tokenizer import train_tokenizer
from dpo_jax.untrusted import Unreadable

# Gemma 3's, without its system turn.
TEMPLATE = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{% if m.content is string %}{{ m.content | trim }}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
MARKS = ["<start_of_image>", "<image_soft_token>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="module")
def tokenizer():
    found = train_tokenizer(["What is this? A cat. A dog."], vocab_size=300)
    found.add_special_tokens({"additional_special_tokens": MARKS})
    found.chat_template = TEMPLATE
    return found


def picture(format="PNG", size=(20, 13), mode="RGB", **options):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(values, "RGBA").convert(mode).save(file, format, **options)
    return file.getvalue()


PNG = picture()


def test_pixels_are_those_of_the_hugging_face_processor(tmp_path):
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    content = {"size": {"height": 16, "width": 12}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**content, "image_seq_length": 4}))
    processing, theirs = load_processing(tmp_path), Gemma3ImageProcessorPil(**content)
    assert processing.tokens == 4
    for format, mode in (("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("GIF", "P")):
        file = picture(format, mode=mode)
        given = theirs([Image.open(io.BytesIO(file))], return_tensors="np")["pixel_values"][0]
        ours = pixels(open_image(file), processing)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, given.transpose(1, 2, 0), atol=1e-6, err_msg=f"{format} {mode}")


def test_an_image_is_turned_as_its_exif_data_say():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = open_image(picture(size=(20, 13), exif=exif))
    assert found.size == (20, 13)  # height, width


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"size": {"shortest_edge": 3}}, "height and width"),
        ({"size": {"height": 4, "width": 4}, "do_pan_and_scan": True}, "do_pan_and_scan"),
        ({"size": {"height": 0, "width": 4}}, "above 0"),
        ({"size": {"height": 4, "width": 4}, "image_mean": [0.5]}, "three numbers"),
    ],
)
def test_a_processing_that_cannot_be_repeated_is_refused(tmp_path, content, words):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(Unreadable, match=words):
        load_processing(tmp_path)


def test_without_a_file_the_processing_is_gemma_3s(tmp_path):
    assert load_processing(tmp_path) == Processing()
    assert load_processing(tmp_path, tokens=16) == Processing(tokens=16)


def header(width, height):
    """A PNG whose header says so."""
    file = bytearray(PNG)
    file[16:24] = struct.pack(">II", width, height)
    file[29:33] = struct.pack(">I", zlib.crc32(bytes(file[12:29])))
    return bytes(file)


BAD = {
    "absent.png": Cause.NO_IMAGE,
    "https://example.org/cat.png": Cause.NO_IMAGE,
    "": Cause.NO_IMAGE,
    "text.txt": Cause.BAD_IMAGE,
    "cut.png": Cause.BAD_IMAGE,
    "data:image/png;base64,???": Cause.BAD_IMAGE,
    "empty.png": Cause.IMAGE_SIZE,
    "bomb.png": Cause.IMAGE_SIZE,
}


@pytest.fixture
def files(tmp_path):
    contents = {"cat.png": PNG, "dog.jpg": picture("JPEG"), "text.txt": b"no image", "cut.png": PNG[:200], "empty.png": b""}
    for name, content in {**contents, "bomb.png": header(50_000, 50_000)}.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def load(folder, rows, tokenizer, **options):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_preferences(folder / "train.jsonl", "train", tokenizer=tokenizer, **options)


def row(*parts, answers=("A cat.", "A dog."), **columns):
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
    content = [*parts, {"type": "text", "text": "What is this?"}]
    return {"prompt": [{"role": "user", "content": content}], "chosen": chosen, "rejected": rejected, **columns}


PLACE = {"type": "image"}


def test_bad_images_are_counted_by_cause(files, tokenizer):
    rows = [row(PLACE, images=[name]) for name in ("cat.png", *BAD)]
    more = [row(PLACE, PLACE, images=["cat.png"]), row(PLACE, images=["cat.png", "dog.jpg"]), row(PLACE)]
    data = load(files, [*rows, *more], tokenizer, on_bad="drop")
    expected = {}
    for cause in (*BAD.values(), *[Cause.IMAGE_COUNT] * 3):
        expected[cause.value] = expected.get(cause.value, 0) + 1
    assert (data.report.read, data.report.kept, data.report.dropped) == (len(rows) + 3, 1, expected)
    with pytest.raises(ValueError, match=r"train\.jsonl:2: images\.0: no_image: there is no file"):
        load(files, rows, tokenizer)


def test_every_way_to_name_an_image(files, tokenizer):
    text = base64.b64encode(PNG).decode()
    own = [{"image": "cat.png"}, {"path": "cat.png"}, {"base64": text}, {"url": f"data:image/png;base64,{text}"}]
    rows = [row({**PLACE, **one}) for one in own]
    rows += [row(PLACE, images=["cat.png"]), row(PLACE, image={"path": "cat.png", "bytes": None})]
    rows += [row({**PLACE, **other}, images=["cat.png"]) for other in ({"index": 0}, {"text": ""}, {"path": None})]
    rows += [row(images=["cat.png"])]  # no place: before the text of the first user
    rows += [{"prompt": "What is this?", "chosen": "A cat.", "rejected": "A dog.", "image": "cat.png"}]
    found = load(files, rows, tokenizer)
    assert len({one.images[0].digest for one in found}) == 1
    assert {one.prompt for one in found} == {found[0].prompt}
    assert found[0].prompt.count("<start_of_image>") == 1
    assert (found[0].chosen, found[0].rejected) == ("A cat.<end_of_turn>\n", "A dog.<end_of_turn>\n")
    pair = load(files, [row(PLACE, {"type": "text", "text": " or "}, PLACE, images=["cat.png", "dog.jpg"])], tokenizer)[0]
    assert "<start_of_image> or <start_of_image>What" in pair.prompt
    assert [one.size for one in pair.images] == [(13, 20)] * 2
    assert pair.images[0].digest != pair.images[1].digest


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row(PLACE, images=["cat.png"], answers=("A <start_of_image>.", "A dog.")), "special token '<start_of_image>'"),
        ({**row(), "chosen": [{"role": "assistant", "content": [PLACE]}]}, "in the prompt only"),
        (row(PLACE, images=["cat.png"], image="dog.jpg"), "both `images` and `image`"),
        (row(PLACE, images=[7]), "got int"),
    ],
)
def test_what_a_row_with_images_cannot_say(files, tokenizer, bad, words):
    with pytest.raises(ValueError, match=words):
        load(files, [bad], tokenizer)


def test_a_tokenizer_without_image_tokens_is_told(files, tokenizer):
    other = train_tokenizer(["What is this?"], vocab_size=300)
    other.chat_template = TEMPLATE
    with pytest.raises(ValueError, match="no token '<start_of_image>' for images"):
        load(files, [row(PLACE, images=["cat.png"])], other)


def test_an_image_that_has_changed_is_noticed(files, tokenizer):
    pair = load(files, [row(PLACE, images=["cat.png"])], tokenizer)[0]
    assert pixels(pair.images[0], Processing(height=4, width=4)).shape == (4, 4, 3)
    (files / "cat.png").write_bytes(picture(size=(3, 3)))
    with pytest.raises(Unreadable, match="has changed"):
        pixels(pair.images[0], Processing())


def test_no_image_is_lost_on_the_way(files, tokenizer):
    pair = load(files, [row(PLACE, images=["cat.png"])], tokenizer)[0]
    with pytest.raises(ValueError, match="shows images"):
        encode(dataclasses.asdict(pair), tokenizer, max_length=64, max_prompt_length=32)
    with pytest.raises(ValueError, match="shows images"):
        write_tfds({"train": [pair]}, files / "tfds")


def test_tokens_of_an_image(tokenizer):
    marks = image_marks(tokenizer)
    ids = np.array(tokenizer(marks.expanded("a <start_of_image> b <start_of_image>", 3), add_special_tokens=False)["input_ids"])
    soft = tokenizer.convert_tokens_to_ids(marks.soft)
    starts = image_starts(ids, soft=soft, tokens=3, images=2)
    assert all((ids[start : start + 3] == soft).all() for start in starts)
    with pytest.raises(BadRow, match="truncation cut an image"):
        image_starts(ids[: starts[1] + 1], soft=soft, tokens=3, images=2)


def test_images_in_parquet(tmp_path, tokenizer):
    """The form that `datasets` writes: a struct of bytes and path."""
    import pyarrow as pa
    from pyarrow import parquet

    given = row({**PLACE, "text": None}, images=[{"bytes": PNG, "path": None}])
    parquet.write_table(pa.Table.from_pylist([given]), tmp_path / "train.parquet")
    found = load_preferences(tmp_path / "train.parquet", "train", tokenizer=tokenizer)
    assert found[0].images == (open_image(PNG),)


def test_a_row_becomes_ids_with_features(files, tokenizer):
    pair = load(files, [row(PLACE, {"type": "text", "text": " or "}, PLACE, images=["cat.png", "dog.jpg"])], tokenizer)[0]
    features = {image.digest: np.full((3, 5), n, np.float32) for n, image in enumerate(pair.images, start=1)}
    options = {"images": ImageTokens(3, features), "max_length": 128}
    found = encode_images(pair, tokenizer, max_prompt_length=100, **options)
    text = tokenizer.decode(found.prompt)
    assert text.count(f"<start_of_image>{'<image_soft_token>' * 3}<end_of_image>\n\n") == 2
    layout = plan_layout([found], kind="shared", batch=1)
    rows = make_batch([found], np.arange(1), layout=layout, batch=1).rows
    soft = tokenizer.convert_tokens_to_ids("<image_soft_token>")
    np.testing.assert_array_equal(rows.images.index[0] >= 0, rows.tokens[0] == soft)
    shown = rows.images.features[0][rows.images.index[0][rows.tokens[0] == soft]]
    np.testing.assert_array_equal(shown[:, 0], [1, 1, 1, 2, 2, 2])
    with pytest.raises(BadRow, match="truncation cut an image"):
        encode_images(pair, tokenizer, max_prompt_length=20, **(options | {"max_length": 40}))
