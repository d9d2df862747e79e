# SPDX-License-Identifier: Apache-2.0
"""Picture files to arrays and back, with the checks that untrusted files need."""

import io
import warnings
from typing import IO, TYPE_CHECKING

import numpy as np

from nad_jax import errors
from nad_jax.data import sources

if TYPE_CHECKING:
    from PIL import Image

# Decoders that are common and plain; PIL knows others that run external programs.
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")

# Checked from the header: a small file can declare an enormous picture.
MAX_PIXELS = 2**26

# PIL's name for a picture with so many channels.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# 8 bits a channel; others (16-bit, float) would be clipped silently.
_READABLE_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


def decode(
    stream: IO[bytes], *, channels: int = 3, image_size: int | None = None
) -> np.ndarray:
    """The picture in `stream` as uint8 `[H, W, channels]`.

    Args:
      stream: an open file or `io.BytesIO`.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA); other pictures are converted, and a
        transparency that is not asked for is dropped.
      image_size: height and width to resize to with an antialiased bilinear filter;
        None keeps the size. A picture of that size already is returned untouched.

    Raises:
      InputError: if it is not a picture of a known format, is damaged, or is too large.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(stream, formats=FORMATS)
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} pixels, accepted up to {MAX_PIXELS:,}")
        if picture.mode not in _READABLE_MODES:
            raise ValueError(
                f"pixels of type {picture.mode}, accepted 8 bits a channel"
            )
        picture = picture.convert(_MODES[channels])
    # PIL's plugins raise SyntaxError, struct.error and more on malformed files.
    except Exception as error:
        raise errors.InputError(_reason(error)) from error
    return _to_array(picture, image_size)


def encode_png(image: np.ndarray) -> io.BytesIO:
    """A uint8 `[H, W, C]` image with 1, 3 or 4 channels as a lossless PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
        stream, "PNG"
    )
    stream.seek(0)
    return stream


def resize(images: np.ndarray, image_size: int | None) -> np.ndarray:
    """uint8 `[N, H, W, C]` resized as in `decode`; untouched where it already fits.

    Raises:
      InputError: the result would be larger than a data set may be.
    """
    if image_size is None or images.shape[1:3] == (image_size, image_size):
        return images
    from PIL import Image

    shape = (len(images), image_size, image_size, images.shape[-1])
    sources.check_bytes(shape, 1, f"images of image_size {image_size}")
    resized = np.empty(shape, np.uint8)
    # One channel at a time, so that any number of channels will do.
    for row, channel in np.ndindex(shape[0], shape[-1]):
        plane = Image.fromarray(images[row, ..., channel])
        resized[row, ..., channel] = _to_array(plane, image_size)[..., 0]
    return resized


def _to_array(picture: "Image.Image", image_size: int | None) -> np.ndarray:
    from PIL import Image

    if image_size is not None and picture.size != (image_size, image_size):
        picture = picture.resize((image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and "cannot identify" in str(error):
        return f"not a picture in one of the formats {', '.join(FORMATS)}"
    return sources.first_line(error)
