# SPDX-License-Identifier: Apache-2.0
"""Images that stay in their files and are read by rows.

`Images` stands in a `Dataset` where the array of all images would, for data that fit
neither on a device nor in memory. Who wants some rows indexes it, training reads it
batch by batch (`nad_jax.data.stream`), and who wants an array of everything is refused.
Files are opened when rows are read, by every process for itself.

N = examples, M = rows asked for, H = height, W = width, C = channels.
"""

from typing import Any, Protocol

import numpy as np

from nad_jax import errors


class Reader(Protocol):
    """Rows of images out of files; each format has its own, beside its source.

    Readers are sent to other processes, and used by several threads at once.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(N, H, W, C)`."""
        ...

    @property
    def identity(self) -> str:
        """The same for readers of the same images, on every machine."""
        ...

    def read(self, rows: np.ndarray) -> np.ndarray:
        """A new array, uint8 `[M, H, W, C]`, for rows int `[M]`.

        Raises:
          InputError: a file is gone, damaged, or not what it was.
        """
        ...


class Images:
    """Images uint8 `[N, H, W, C]` in files, of which some may have been changed.

    Attributes:
      reader: Reads them as they are stored.
      changed_rows: Rows that are different here, int64 `[M]`, ascending.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, reader: Reader):
        self.reader = reader
        self.changed_rows = np.zeros(0, np.int64)
        # In memory: a poisoned tenth of the data set is a tenth of its size.
        self._changed = np.zeros((0, *reader.shape[1:]), np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.reader.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """A new array, uint8 `[M, H, W, C]`, of a slice or of rows int `[M]`."""
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        rows = np.asarray(rows)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise errors.InputError(
                f"rows must be a slice or integers [M], got {rows.dtype} "
                f"{list(rows.shape)}"
            )
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise errors.InputError(
                f"rows must be in [0, {len(self)}), got {rows.min()} to {rows.max()}"
            )
        if not rows.size:  # no file is asked, so no reader has to know of this
            return np.empty((0, *self.shape[1:]), np.uint8)
        images = self.reader.read(rows)
        self.apply_changes(rows, images)
        return images

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise errors.InputError(
            f"{len(self):,} images stay in their files and cannot become one array; "
            "use config.data.loader=device"
        )

    def replaced(self, rows: np.ndarray, images: np.ndarray) -> "Images":
        """The same with other images, uint8 `[M, H, W, C]`, at `rows`, all different.

        They are held in memory.
        """
        untouched = ~np.isin(self.changed_rows, rows)
        all_rows = np.concatenate([self.changed_rows[untouched], rows])
        order = np.argsort(all_rows)
        result = Images(self.reader)
        result.changed_rows = all_rows[order]
        result._changed = np.concatenate([self._changed[untouched], images])[order]
        return result

    def apply_changes(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Puts what was changed of `rows` into `images`, just read, in place."""
        places = np.searchsorted(self.changed_rows, rows)
        inside = np.flatnonzero(places < len(self.changed_rows))
        hits = inside[self.changed_rows[places[inside]] == rows[inside]]
        images[hits] = self._changed[places[hits]]
