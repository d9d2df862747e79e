# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says about itself, and whether that is true.

A record lists path, dtype, shape and sha256 of every leaf of a saved tree, holds the
caller's metadata, and ends with the sha256 of all that. No files here.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors

_FORMAT = 1
_KEY_IMPLEMENTATIONS = ("threefry2x32", "rbg", "unsafe_rbg")
_MAX_NAMES_IN_MESSAGE = 3


class DamagedStep(Exception):
    """A step on disk is not what was saved; the message says how it shows."""


def name_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as "params/Conv_0/kernel", in the order of the tree.

    Raises:
        InputError: a leaf has no dtype, or two leaves have one path.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise errors.InputError(f"two leaves of the tree are both called {name}")
        if not hasattr(leaf, "dtype"):
            raise errors.InputError(
                f"leaf {name} must be an array, got {type(leaf).__name__}"
            )
        leaves[name] = leaf
    return leaves


def seal(
    leaves: Mapping[str, Any],
    contents: Mapping[str, bytes],
    step: int,
    metadata: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Record of leaves and their bytes, with the hash that `open_sealed` checks.

    Raises:
        InputError: the metadata cannot be written as JSON.
    """
    record = {
        "format": _FORMAT,
        "step": int(step),
        "metadata": dict(metadata or {}),
        "leaves": {
            name: _describe(leaf) | {"sha256": _sha256(contents[name])}
            for name, leaf in leaves.items()
        },
    }
    try:
        # What comes back from disk: lists for tuples, strings for number keys.
        record = json.loads(json.dumps(record))
    except (TypeError, ValueError) as error:
        raise errors.InputError(f"metadata must be JSON: {error}") from None
    return record | {"sha256": _hash_record(record)}


def open_sealed(sealed: Any, step: int) -> dict[str, Any]:
    """The record inside, if it is intact and that of `step`.

    Raises:
        DamagedStep: otherwise.
        InputError: it was written by another version of this library.
    """
    if not isinstance(sealed, dict):
        raise DamagedStep("its record is not a JSON object")
    record = {name: value for name, value in sealed.items() if name != "sha256"}
    if sealed.get("sha256") != _hash_record(record):
        raise DamagedStep("sha256 of its record differs")
    if record.get("format") != _FORMAT:
        raise errors.InputError(
            f"checkpoint format is {record.get('format')}; this version reads {_FORMAT}"
        )
    if not _is_complete(record):
        raise DamagedStep("its record is incomplete")
    if record["step"] != step:
        raise DamagedStep(f"its record is that of step {record['step']}")
    return record


def check_leaves(record: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Raises InputError unless the record is of the leaves of `like`: no casts."""
    stored, wanted = record["leaves"], {k: _describe(v) for k, v in like.items()}
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is not expected" for name in stored if name not in wanted]
    for name in wanted:
        for what in ("dtype", "shape"):
            if name in stored and stored[name][what] != wanted[name][what]:
                problems.append(
                    f"{what} of {name} is {stored[name][what]}, "
                    f"expected {wanted[name][what]}"
                )
    if problems:
        more = len(problems) - _MAX_NAMES_IN_MESSAGE
        raise errors.InputError(
            "the checkpoint is of another model: "
            + "; ".join(problems[:_MAX_NAMES_IN_MESSAGE])
            + (f"; and {more} more" if more > 0 else "")
        )


def check_content(record: Mapping[str, Any], name: str, content: bytes) -> None:
    """Raises DamagedStep unless the bytes are those the record was made of."""
    if _sha256(content) != record["leaves"][name]["sha256"]:
        raise DamagedStep(f"sha256 of {name} differs")


def to_bytes(leaf: Any) -> bytes:
    """Values of a leaf in C order; of a typed key, its key data."""
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf).tobytes()


def num_bytes(like: Any) -> int:
    """Length of `to_bytes` of a leaf of the shape and dtype of `like`."""
    struct = _data_struct(like)
    return math.prod(struct.shape) * np.dtype(struct.dtype).itemsize


def from_bytes(content: bytes, like: Any) -> Any:
    """Inverse of `to_bytes`: numpy where `like` is numpy, else a jax array."""
    struct = _data_struct(like)
    array = np.frombuffer(content, struct.dtype).reshape(struct.shape).copy()
    if isinstance(like, np.ndarray | np.generic):
        return array
    if not _is_key(like):
        return jnp.asarray(array)
    for name in _KEY_IMPLEMENTATIONS:
        make_key = functools.partial(jax.random.key, 0, impl=name)
        if jax.eval_shape(make_key).dtype == like.dtype:
            return jax.random.wrap_key_data(jnp.asarray(array), impl=name)
    raise errors.InputError(f"keys of dtype {like.dtype} cannot be restored")


def _is_complete(record: Mapping[str, Any]) -> bool:
    """Whether all that will be looked up is there; the hash is easy to forge."""
    leaves = record.get("leaves")
    return (
        isinstance(record.get("step"), int)
        and isinstance(record.get("metadata"), dict)
        and isinstance(leaves, dict)
        and all(
            isinstance(leaf, dict) and {"dtype", "shape", "sha256"} <= leaf.keys()
            for leaf in leaves.values()
        )
    )


def _hash_record(record: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(record, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _describe(leaf: Any) -> dict[str, Any]:
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _data_struct(leaf: Any) -> Any:
    """Shape and dtype of what stands for a leaf on disk."""
    return jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
