"""Images of preferences: read within limits and processed to pixels like the model's Hugging Face processor.

Pillow (a dependency of matplotlib) reads PNG, JPEG, WebP, GIF and BMP; of several frames, the first. An image is rotated
according to its EXIF data, converted to RGB (transparent areas become white), and resized to the fixed size of the encoder
regardless of its aspect ratio, as in Gemma 3.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.pairs import BadRow, Cause
from dpo_jax.untrusted import LIMITS, Unreadable, cause_of, read_bytes, read_object

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 2**26
"""Largest number of pixels of an image: a square of side 8,192."""
PROCESSOR = "preprocessor_config.json"
Source = bytes | str | os.PathLike[str]
"""An image: the bytes of a file, its path, or a `data:` URL."""


class Processing(NamedTuple):
    """Image preprocessing of an encoder; the defaults are Gemma 3's.

    A pixel from 0 to 255 becomes `(pixel * scale - mean) / std`, per color channel.
    """

    height: int = 896
    width: int = 896
    resample: int = 2  # Pillow's filter number; 2 is bilinear
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    tokens: int = 256  # tokens that an image takes in the text

    @property
    def identity(self) -> str:
        """Its identity in keys and digests."""
        return json.dumps(self._asdict(), sort_keys=True)


def load_processing(folder: str | os.PathLike[str], *, tokens: int | None = None) -> Processing:
    """The preprocessing of a model folder: its `preprocessor_config.json`, or Gemma 3's if it has none.

    `tokens` is from the model's config.json (`mm_tokens_per_image`), used if the processor does not state it. Raises
    `Unreadable` for a damaged file, and for preprocessing that `Processing` cannot express.
    """
    path = Path(folder) / PROCESSOR
    default = Processing() if tokens is None else Processing(tokens=tokens)
    try:
        found = read_object(path)
    except FileNotFoundError:
        return default
    size = found.get("size", {})
    for name, refused in (("do_pan_and_scan", True), ("do_resize", False), ("do_rescale", False), ("do_convert_rgb", False)):
        if found.get(name) is refused:
            raise Unreadable(f"{path}: {name}: {json.dumps(refused)} is not supported; images are resized whole")
    if not isinstance(size, Mapping) or not size.keys() >= {"height", "width"}:
        raise Unreadable(f"{path}: size: height and width are expected, got {size!r}")
    neutral: Mapping[str, Any] = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    plain = neutral if found.get("do_normalize") is False else {}
    read = {**_DEFAULTS, **found, **plain}
    try:
        processing = Processing(
            height=int(size["height"]),
            width=int(size["width"]),
            resample=int(read["resample"]),
            scale=float(read["rescale_factor"]),
            mean=_colors(read["image_mean"]),
            std=_colors(read["image_std"]),
            tokens=int(found.get("image_seq_length") or default.tokens),
        )
    except (TypeError, ValueError) as error:
        raise Unreadable(f"{path}: {cause_of(error)}") from error
    if min(processing.height, processing.width, processing.tokens, *processing.std) <= 0 or processing.resample not in range(6):
        raise Unreadable(f"{path}: sizes and deviations must be above 0, and resample from 0 to 5, got {processing}")
    return processing


_DEFAULTS = {"resample": 2, "rescale_factor": 1 / 255, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}


def _colors(value: Any) -> tuple[float, ...]:
    found = (float(value),) * 3 if isinstance(value, int | float) else tuple(map(float, value))
    if len(found) != 3:
        raise ValueError(f"three numbers are expected, for red, green and blue, got {value!r}")
    return found


class ImageFile(NamedTuple):
    """An image that decodes. If it has a file, only the path is kept and the file is read again on use."""

    source: bytes | str
    size: tuple[int, int]  # height, width in pixels
    digest: str  # SHA-256 of the file in hexadecimal: equal files are one image

    @property
    def content(self) -> bytes:
        """The bytes of its file. Raises `Unreadable` if they have changed, and OSError if the file is gone."""
        if isinstance(self.source, bytes):
            return self.source
        content = read_bytes(self.source)
        if hashlib.sha256(content).hexdigest() != self.digest:
            raise Unreadable(f"{self.source}: the image has changed since the row was read; begin again")
        return content


def open_image(source: Source, *, root: str | os.PathLike[str] = ".", field: str = "image") -> ImageFile:
    """The image of a row, decoded once as a check. Paths are relative to `root`, the folder of the data file.

    Raises `BadRow` for a missing file (`NO_IMAGE`), a value that is no image (`BAD_IMAGE`), and no or too many pixels
    (`IMAGE_SIZE`). Nothing is fetched from other machines.
    """
    content = _content(source, Path(root), field)
    size = _decoded(content, field).size[::-1]
    kept: bytes | str = content
    if not isinstance(source, bytes) and not os.fspath(source).startswith("data:"):
        kept = str(Path(root) / source)
    return ImageFile(kept, size, hashlib.sha256(content).hexdigest())


def pixels(image: ImageFile, processing: Processing) -> np.ndarray:
    """The encoder's input: float32[height, width, 3]."""
    decoded = _decoded(image.content, "image").resize((processing.width, processing.height), processing.resample)
    values = np.asarray(decoded, np.float32) * np.float32(processing.scale)
    return (values - np.array(processing.mean, np.float32)) / np.array(processing.std, np.float32)


def as_png(image: np.ndarray) -> bytes:
    """A picture float[height, width, 3] in [0, 1], encoded as PNG."""
    from PIL import Image as pillow

    file = io.BytesIO()
    pillow.fromarray(np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _content(source: Source, root: Path, field: str) -> bytes:
    if isinstance(source, bytes):
        return source
    name = os.fspath(source)
    if name.startswith("data:"):
        return _address(name, field)
    if "://" in name:
        raise BadRow(Cause.NO_IMAGE, f"{name[:100]!r} is not a local file; fetch it, and name the file", field=field)
    try:
        path = root / name
        if not path.is_file():  # reading a pipe would block
            raise BadRow(Cause.NO_IMAGE, f"there is no file {str(path)!r}", field=field)
        return read_bytes(path)
    except BadRow:
        raise
    except Unreadable as error:
        raise BadRow(Cause.IMAGE_SIZE, str(error), field=field) from error
    except (OSError, ValueError) as error:  # name too long, no permission, or a NUL in the name
        raise BadRow(Cause.NO_IMAGE, cause_of(error), field=field) from error


def _address(name: str, field: str) -> bytes:
    head, comma, body = name.partition(",")
    if not comma or not head.endswith(";base64"):
        raise BadRow(Cause.BAD_IMAGE, "a data: URL needs ;base64 and a comma before its content", field=field)
    return from_base64(body, field)


def from_base64(body: str, field: str) -> bytes:
    """The bytes encoded by a base64 text. Raises `BadRow`."""
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(Cause.BAD_IMAGE, f"base64: {cause_of(error)}", field=field) from error


def _decoded(content: bytes, field: str) -> Any:
    """The image decoded by Pillow, in RGB."""
    from PIL import Image as pillow
    from PIL import ImageOps

    LIMITS.check("file_mb", len(content), field, what="bytes")
    if not content:
        raise BadRow(Cause.IMAGE_SIZE, "the file is empty", field=field)
    try:
        found = pillow.open(io.BytesIO(content), formats=FORMATS)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise BadRow(Cause.IMAGE_SIZE, cause_of(error), field=field) from error
    except Exception as error:
        raise BadRow(Cause.BAD_IMAGE, f"not a readable {', '.join(FORMATS)}", field=field) from error
    width, height = found.size
    if not 0 < width * height <= MAX_PIXELS:
        raise BadRow(Cause.IMAGE_SIZE, f"{width} x {height} pixels, but the limits are 1 to {MAX_PIXELS:,}", field=field)
    try:
        upright = ImageOps.exif_transpose(found)
        if "A" in upright.getbands() or upright.info.get("transparency") is not None:
            white = pillow.new("RGBA", upright.size, (255, 255, 255, 255))
            upright = pillow.alpha_composite(white, upright.convert("RGBA"))
        return upright.convert("RGB")
    except Exception as error:  # decoders raise anything on a damaged file
        raise BadRow(Cause.BAD_IMAGE, f"damaged: {cause_of(error)}", field=field) from error
