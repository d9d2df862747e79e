# SPDX-License-Identifier: Apache-2.0
"""The layers of one EFRAP solve, on their way to disk and back.

`efrap` puts every layer it has solved into a mapping, and takes those from it that are
there. This mapping commits them.
"""

import dataclasses
import math
from collections.abc import Iterator, MutableMapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from nad_jax import workdir as workdir_lib
from nad_jax.core import quantization
from nad_jax.defenses import quantized_module
from nad_jax.models import layers as layers_lib
from nad_jax.training import commits as commits_lib


class SolvedLayers(MutableMapping[str, quantized_module.FinishedLayer]):
    """Layer name -> finished layer.

    Attributes:
      codes: Bytes of the codes of all layers, one layer after the other, uint8 `[N]`;
        0 where a layer is not solved yet.
      notes: Grid and report of each solved layer, as JSON holds them.
    """

    def __init__(self, layers: list[layers_lib.Layer]):
        sizes = [math.prod(layer.geometry.kernel_shape) for layer in layers]
        ends = np.cumsum(sizes).tolist()
        self._parts = {
            layer.name: slice(end - size, end)
            for layer, size, end in zip(layers, sizes, ends, strict=True)
        }
        self.codes = np.zeros(ends[-1], np.uint8)
        self.notes: dict[str, Any] = {}
        self._keep: tuple[commits_lib.Commits, workdir_lib.Workdir] | None = None

    def keep_in(
        self, commits: commits_lib.Commits, workdir: workdir_lib.Workdir
    ) -> None:
        """Brings back the last commit; then commits, and asks whether to stop."""
        restored = commits.restore(self.codes)
        if restored is not None:
            self.codes, notes = restored
            self.notes.update(notes)
        self._keep = commits, workdir

    def __setitem__(self, name: str, layer: quantized_module.FinishedLayer) -> None:
        codes = np.asarray(layer.codes)
        self.codes[self._parts[name]] = codes.view(np.uint8).ravel()
        self.notes[name] = {
            "dtype": str(codes.dtype),
            "scale": np.asarray(layer.params.scale).tolist(),
            "zero_point": np.asarray(layer.params.zero_point).tolist(),
            "report": dataclasses.asdict(layer.report),
        }
        if self._keep is None:
            return
        commits, workdir = self._keep
        # Asked once: processes agree on the answer to each question by itself.
        stopping = workdir.should_stop()
        if stopping or commits.is_due():
            commits.save(len(self.notes), self.codes, self.notes)
        if stopping:
            raise workdir_lib.Interrupted(f"{len(self.notes)} layers are kept")

    def __getitem__(self, name: str) -> quantized_module.FinishedLayer:
        note = self.notes[name]
        fields: dict[str, Any] = {
            field: tuple(value) if isinstance(value, list) else value
            for field, value in note["report"].items()
        }
        report = quantized_module.LayerReport(**fields)
        codes = self.codes[self._parts[name]].view(note["dtype"])
        return quantized_module.FinishedLayer(
            jnp.asarray(codes.reshape(report.kernel_shape)),
            quantization.QuantParams(
                jnp.asarray(note["scale"], jnp.float32),
                jnp.asarray(note["zero_point"], jnp.int32),
            ),
            report,
        )

    def __delitem__(self, name: str) -> None:
        del self.notes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.notes)

    def __len__(self) -> int:
        return len(self.notes)
