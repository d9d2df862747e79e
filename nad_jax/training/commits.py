# SPDX-License-Identifier: Apache-2.0
"""Commits: where a long computation left off, so that a killed one can go on.

A commit is a checkpoint step (`checkpoints`) of work that is not finished yet. One is
due when the work since the last has taken twenty times as long as a commit does. So
they never take more than 5 % of the time, stages of a few seconds make none, and a kill
costs that much work and no more. Of several processes (`agreement`) the first commits,
at moments that it alone chooses; all restore what it finds.
"""

import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from nad_jax.training import agreement, checkpoints

# Share of the time that may go into commits.
SHARE = 0.05
# Seconds that the first one is expected to take.
_FIRST_COST = 0.5


class Commits:
    """The commits of one computation, in a folder of its own.

    Args:
        folder: made by the first commit; whoever finishes the work removes it.
        remember: what else must come back with a commit, as JSON: called at each.
        recall: given that again when a commit is restored.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        remember: Callable[[], Any] = lambda: None,
        recall: Callable[[Any], None] = lambda remembered: None,
    ):
        self._folder = pathlib.Path(folder)
        self._remember = remember
        self._recall = recall
        self._cost = _FIRST_COST
        self._newest: int | None = None
        self._since = time.monotonic()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Tree and metadata of the newest undamaged commit; None if there is none.

        Args:
            like: pytree of the structure, shapes and dtypes that were saved.

        Raises:
            InputError: as `checkpoints.restore`.
        """
        if not agreement.from_first(lambda: bool(checkpoints.steps(self._folder))):
            return None
        tree, stored = agreement.tree_from_first(
            lambda: checkpoints.restore(self._folder, like, settle=True), like
        )
        self._newest = stored["step"]
        self._recall(stored["remembered"])
        self._since = time.monotonic()
        return tree, stored["metadata"]

    def is_due(self) -> bool:
        """Whether enough work has been done since the last commit."""
        waited = time.monotonic() - self._since
        return agreement.is_first() and waited >= self._cost / SHARE

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any]) -> None:
        """Commits; nothing happens if `step` is the last commit's.

        Args:
            step: how much work is done; never less than at the last commit.
            tree: pytree of arrays; structure, shapes and dtypes are always the same.
            metadata: what JSON can hold.
        """
        if step == self._newest or not agreement.is_first():
            return
        began = time.monotonic()
        stored = {
            "step": step,
            "metadata": dict(metadata),
            "remembered": self._remember(),
        }
        checkpoints.save(self._folder, step, tree, stored)
        self._newest = step
        self._since = time.monotonic()
        self._cost = self._since - began
