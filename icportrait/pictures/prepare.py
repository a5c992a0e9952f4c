"""Pictures as the pipeline takes them: decoded, upright, cropped; and a store of those that were prepared lately."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from icportrait.contract import Array
from icportrait.errors import InvalidRequest
from icportrait.pictures.faces import Crop, crop_to_square, find_crop
from icportrait.pictures.imaging import decode_base64, decode_picture

Box = tuple[float, float, float, float]


def prepare(data: bytes, name: str, box: Box | None, is_base64: bool, size: int) -> tuple[Crop, Array]:
    """Decode a picture and cut out what is used of it.

    Args:
        data: the file, as base64 text where ``is_base64`` says so.
        name: the input that it came in, for messages.
        box: the caller's crop, in 0..1 of the upright picture.
        is_base64: see ``data``.
        size: S.

    Returns:
        The crop, and its pixels [S, S, 3] uint8.

    Raises:
        InvalidRequest: the picture can't be read or is too large, or the box is invalid.
    """
    try:
        picture = decode_picture(decode_base64(data, name) if is_base64 else data, name)
        crop = find_crop(picture, box, f"{name}_box")
        return crop, crop_to_square(picture, crop, size)
    except MemoryError as error:
        raise InvalidRequest(f"{name}: the picture takes too much memory to be decoded; scale it down") from error


class Kept:
    """Prepared pictures by keys, so that one that returns isn't decoded and searched again. For any thread."""

    def __init__(self, count: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin without any.

        Args:
            count: of pictures, the one that was used last staying longest; 0 keeps none.
            seconds: that one is kept, however often it is used.
            clock: seconds.
        """
        self._count, self._seconds, self._clock = count, seconds, clock
        self._kept: OrderedDict[Any, tuple[float, tuple[Crop, Array]]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> tuple[Crop, Array] | None:
        with self._lock:
            self._forget_old()
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][1]

    def put(self, key: Any, prepared: tuple[Crop, Array]) -> None:
        with self._lock:
            self._kept[key] = self._clock() + self._seconds, prepared
            while len(self._kept) > self._count:
                self._kept.popitem(last=False)

    def _forget_old(self) -> None:
        now = self._clock()
        for key in [key for key, (until, _) in self._kept.items() if until <= now]:
            del self._kept[key]
