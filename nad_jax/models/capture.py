# SPDX-License-Identifier: Apache-2.0
"""Any Flax Linen module with the contract of this package's models.

    model = Captured(MyNet(), stages={"early": "Block_0", "late": "body/Block_3"})
    logits, features = model.apply(variables, images, train=False)

Stages are read from the outputs of submodules while the module runs; it is not edited.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from nad_jax import errors


@dataclasses.dataclass(frozen=True)
class Captured:
    """A module whose submodules' outputs are its stages.

    Attributes:
      module: Called on float images `[B, H, W, C]`; returns logits, or a tuple that
        starts with them.
      stages: Stage name -> path of a submodule, its names joined by "/". The outputs
        have the axes `[B, h, w, c]`.
      train_kwargs: Keyword arguments of the module's call during training.
      eval_kwargs: The same for evaluation.
    """

    module: nn.Module
    stages: Mapping[str, str]
    train_kwargs: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"train": True}
    )
    eval_kwargs: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"train": False}
    )

    def apply(
        self,
        variables: Mapping[str, Any],
        images: jax.Array,
        train: bool = False,
        mutable: list[str] | bool = False,
    ) -> Any:
        """`(logits, features)`, with `mutable` followed by the updated variables.

        Raises:
          InputError: no submodule of that path was called.
        """
        seen: dict[str, Any] = {}

        def record(next_fun, args, kwargs, context):
            outputs = next_fun(*args, **kwargs)
            if context.method_name == "__call__" and context.module.scope is not None:
                seen["/".join(context.module.path)] = outputs
            return outputs

        with nn.intercept_methods(record):
            output = self.module.apply(
                variables,
                images,
                mutable=mutable,
                **(self.train_kwargs if train else self.eval_kwargs),
            )
        output, updated = output if mutable else (output, None)
        logits = output[0] if isinstance(output, tuple) else output
        missing = [path for path in self.stages.values() if path not in seen]
        if missing:
            raise errors.InputError(
                f"no submodule {missing[0]!r} is called; there are "
                f"{', '.join(sorted(path for path in seen if path))}"
            )
        features = {stage: seen[path] for stage, path in self.stages.items()}
        return ((logits, features), updated) if mutable else (logits, features)
