# SPDX-License-Identifier: Apache-2.0
"""What the variants of several config files have in common."""


def zoo_variant(variant: str) -> tuple[str, str] | None:
    """Name of a victim of the zoo, and the variant of the config a run on it has.

    Args:
      variant: What stands behind the colon of `--config=FILE:VARIANT`.

    Returns:
      As ("digits-pq", "controls") for "zoo/digits-pq+controls"; None where the variant
      names no victim.

    Raises:
      ValueError: anything but "controls" behind the name.
    """
    folder, slash, victim = variant.partition("/")
    if folder != "zoo" or not slash:
        return None
    victim, *changes = victim.split("+")
    if changes not in ([], ["controls"]):
        raise ValueError(
            f"variant must be zoo/NAME or zoo/NAME+controls, got {variant!r}"
        )
    scale = ["cifar10"] if victim.startswith("cifar10") else []
    return victim, "+".join([*scale, *changes])
