"""From encoded bytes to pixels."""

import io
import warnings

from PIL import Image

from backbone.pictures import FORMATS, to_rgb
from training.picture_files import DataError


def decode(content: bytes, name: str) -> Image.Image:
    """Encoded picture -> RGB, as `backbone.pictures.to_rgb` tells it.

    Raises:
        DataError: content that is no picture, or a broken one; names the picture.
    """
    try:
        with warnings.catch_warnings():
            # Odd metadata and palettes: a line for each picture and epoch would bury the log.
            warnings.filterwarnings("ignore", module="PIL")
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                return to_rgb(picture)
    except Exception as error:
        # A decoder may raise anything on bytes that are wrong: Pillow promises no kinds of errors.
        raise DataError(f"picture {name!r} cannot be read: {error}") from error
