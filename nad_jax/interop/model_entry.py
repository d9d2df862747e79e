# SPDX-License-Identifier: Apache-2.0
"""Finds the model among what a checkpoint holds: weights, optimizer, epoch, extras.

A torch file is one flat state dict, alone or under one of `WRAPPERS` (a BackdoorBench
result file keeps it under "model", beside its poisoned data). A Flax file has "params"
and perhaps "batch_stats", at the top or under a wrapper. Where two entries qualify the
file does not say which one is meant, and neither does this module: it lists them and
the caller names one.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from nad_jax import errors
from nad_jax.interop import bounded_file, limits
from nad_jax.interop.stored_array import StoredArray

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
FLAX_COLLECTIONS = ("params", "batch_stats")
_TOP_LEVEL = "(top level)"
_PARALLEL_PREFIX = "module."

Array = TypeVar("Array")
Selected = tuple[dict[str, StoredArray], dict[str, object]]


def select_state_dict(
    tree: object, *, file: bounded_file.BoundedFile, entry: str | None = None
) -> Selected:
    """The one state dict in a torch file's value, and the scalars beside it."""
    top = _mapping(tree, file)
    # Each dict is looked through once, however many entries of the file share it.
    mappings = {id(value): value for value in top.values() if isinstance(value, dict)}
    holding = {key for key, value in mappings.items() if _holds_arrays(value)}
    candidates = {key: value for key, value in top.items() if id(value) in holding}
    if _holds_arrays(top):
        candidates[_TOP_LEVEL] = top
    wrappers = [name for name in (*WRAPPERS, _TOP_LEVEL) if name in candidates]
    chosen = _choose(file, wrappers, candidates, entry)
    arrays: dict[str, StoredArray] = {}
    for name, value in candidates[chosen].items():
        if not isinstance(value, StoredArray):
            raise file.error(
                f"entry {bounded_file.shown(name)} of {bounded_file.shown(chosen)} is "
                f"{bounded_file.shown(value)}; a state dict holds tensors only"
            )
        arrays[name] = value
    # Checked before too: a name of megabytes must not be copied around.
    arrays = without_parallel_prefix(checked_names(arrays, file))
    return checked_names(arrays, file), _scalars(top)


def select_collections(
    tree: object, *, file: bounded_file.BoundedFile, entry: str | None = None
) -> Selected:
    """The one set of Flax variables in a msgpack file, names joined by slashes."""
    top = _mapping(tree, file)
    candidates = {
        key: value
        for key, value in top.items()
        if isinstance(value, dict) and "params" in value
    }
    if "params" in top:
        candidates[_TOP_LEVEL] = top
    if not candidates and entry is None:
        # Parameters alone, as `to_bytes(params)` writes them.
        return checked_names(_flatten(top, file), file), {}
    wrappers = [name for name in (*WRAPPERS, _TOP_LEVEL) if name in candidates]
    chosen = candidates[_choose(file, wrappers, candidates, entry)]
    wanted = {key: chosen[key] for key in FLAX_COLLECTIONS if key in chosen}
    return checked_names(_flatten(wanted, file), file), _scalars(top)


def _choose(
    file: bounded_file.BoundedFile,
    wrappers: list[str],
    candidates: Mapping[object, object],
    entry: str | None,
) -> str:
    known = _listed(candidates)
    if entry is not None:
        if entry not in candidates:
            raise file.error(
                f"no model entry {bounded_file.shown(entry)}; it holds {known}"
            )
        return entry
    if len(wrappers) > 1:
        raise file.error(
            f"several model entries: {_listed(wrappers)}; say which one with entry="
        )
    if not wrappers:
        raise file.error(
            f"no model entry: accepted are {', '.join(WRAPPERS)} or tensors at the "
            f"top level, it holds {known}"
        )
    return wrappers[0]


def _mapping(tree: object, file: bounded_file.BoundedFile) -> dict:
    if not isinstance(tree, dict):
        raise file.error(
            f"its content is {bounded_file.shown(tree)}; expected a dict of tensors"
        )
    return tree


def _holds_arrays(mapping: dict) -> bool:
    return any(isinstance(value, StoredArray) for value in mapping.values())


def _listed(names: Iterable[object]) -> str:
    shown = [bounded_file.shown(name, 40) for name in names]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return (", ".join(shown[:8]) or "none") + more


def _flatten(tree: dict, file: bounded_file.BoundedFile) -> dict[str, StoredArray]:
    flat: dict[str, StoredArray] = {}
    for name, value in _walk(tree, "", file):
        if not isinstance(value, StoredArray):
            raise file.error(
                f"{bounded_file.shown(name)} is {bounded_file.shown(value)}; expected "
                "an array"
            )
        if name in flat:
            raise file.error(f"duplicate array {bounded_file.shown(name)}")
        flat[name] = value
    return flat


def _walk(
    tree: dict, prefix: str, file: bounded_file.BoundedFile
) -> Iterator[tuple[str, object]]:
    # Lazily and with the bound inside: joined names of nested long keys would grow
    # far beyond the file. The readers bound the depth.
    for key, value in tree.items():
        name = prefix + key
        if len(name) > limits.MAX_NAME_CHARS:
            raise _bad_name(name, file)
        if isinstance(value, dict):
            yield from _walk(value, name + "/", file)
        else:
            yield name, value


def without_parallel_prefix(arrays: dict[str, Array]) -> dict[str, Array]:
    """Names without the `module.` that DataParallel puts before every one of them."""
    # Twice at most: a data-parallel model inside a distributed one.
    for _ in range(2):
        if all(name.startswith(_PARALLEL_PREFIX) for name in arrays):
            arrays = {
                name.removeprefix(_PARALLEL_PREFIX): array
                for name, array in arrays.items()
            }
    return arrays


def checked_names(
    arrays: dict[str, Array], file: bounded_file.BoundedFile
) -> dict[str, Array]:
    """`arrays` again; `InputError` if there is none, too many, or an odd name."""
    if not arrays:
        raise file.error("its model entry is empty")
    if len(arrays) > limits.MAX_TENSORS:
        raise file.error(f"{len(arrays)} arrays; at most {limits.MAX_TENSORS} are read")
    for name in arrays:
        if not is_sane_name(name):
            raise _bad_name(name, file)
    return arrays


def _bad_name(name: object, file: bounded_file.BoundedFile) -> errors.InputError:
    return file.error(
        f"array name {bounded_file.shown(name)}; expected printable text of at most "
        f"{limits.MAX_NAME_CHARS} characters that is no path"
    )


def is_sane_name(name: object) -> bool:
    """Whether an array's name is safe to print, to store and to join to others."""
    return (
        isinstance(name, str)
        and len(name) <= limits.MAX_NAME_CHARS
        and name.isprintable()
        and "\\" not in name
        # Also refuses an empty name and one that starts or ends with a slash.
        and not any(part in ("", ".", "..") for part in name.split("/"))
    )


def _scalars(top: dict) -> dict[str, object]:
    """Numbers and short texts at the top of the file: epoch, accuracy, model name."""
    kept = (
        (key, value)
        for key, value in top.items()
        if is_sane_name(key)
        and (
            isinstance(value, (bool, int, float))
            or (isinstance(value, str) and len(value) <= limits.MAX_METADATA_CHARS)
        )
    )
    pairs = zip(range(limits.MAX_METADATA_ENTRIES), kept, strict=False)
    return {key: value for _, (key, value) in pairs}
