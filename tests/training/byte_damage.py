# SPDX-License-Identifier: Apache-2.0
"""Damages the files of a checkpoint byte by byte, and looks whether it shows.

    python tests/training/byte_damage.py --out results/reliability/byte_damage.json
    python tests/training/byte_damage.py --seconds 120 --out FILE   # and again: goes on
    python tests/training/byte_damage.py --points ::64 --out FILE   # a sample

    cut       every file of the newest of two steps, cut at every 1/256 of its length
    flip      2,000 single bits, as many in each file
    unsealed  500 bits in a step without receipt, where only what is read is hashed

Every cut and flip must be seen, the file named and the step before it restored bit for
bit. Without a receipt a bit that nothing reads may pass, but never a wrong value.

A case damages one file, restores, and puts the file back, all in this process. Where
the step before is taken, the sums of all its files are computed in every case; Orbax
reads them in one case of 32, and else gives what it read of these bytes at the start.
"""

import collections
import logging
import pathlib
import random
import sys
import tempfile

import numpy as np

from nad_jax.training import checkpoints

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import result_file  # noqa: E402

_CASE = "one file of one step damaged in place, and one restore"
_PARTS = 256
# One of so many cases reads the step before from disk.
_READ_EVERY = 32
_FLIPS = {"flip": 2_000, "unsealed": 500}
_RECEIPT = "SHA256SUMS"
KINDS = ("cut", *_FLIPS)


def tree_of(step: int) -> dict:
    """Leaves of several types; those of a small net with its optimiser."""
    generator = np.random.default_rng(step)
    kernel = generator.normal(size=(3, 3, 8, 16)).astype(np.float32)
    return {
        "params": {"kernel": kernel, "bias": generator.normal(size=16)},
        "momentum": kernel / 7,
        "codes": generator.integers(-8, 8, 500).astype(np.int8),
        "step": np.asarray(step, np.int32),
    }


class _Warnings(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Damage:
    """Two steps in a folder, and what can happen to the newer one."""

    def __init__(self, folder: str, seed: int):
        self._folder = pathlib.Path(folder)
        self._seed = seed
        for step in (1, 2):
            checkpoints.save(self._folder, step, tree_of(step), {"step": step})
        newest = self._folder / "2"
        files = [path for path in newest.rglob("*") if path.is_file()]
        # Some names are drawn at random; parts of a sweep need one order.
        files.sort(key=lambda path: (path.parent, path.stat().st_size, path.name))
        self._content = {
            path.relative_to(newest).as_posix(): path.read_bytes() for path in files
        }
        self._spare_reads()
        self._warnings = _Warnings()
        logger = logging.getLogger(checkpoints.__name__)
        logger.addHandler(self._warnings)
        logger.propagate = False

    def _spare_reads(self) -> None:
        """Lets step 1 be read anew in some cases only; its sums are always checked."""
        self._reads_all = True
        read = checkpoints._read
        content = read(self._folder, 1, tree_of(0))

        def read_once(root, step, like):
            if step != 1 or self._reads_all:
                return read(root, step, like)
            checkpoints._check_files(root, step)
            return content

        checkpoints._read = read_once

    def cases(self) -> list[tuple[str, int, str, int]]:
        """Kind, number, file, and the byte to cut at or the bit to flip."""
        cuts = [
            (name, length)
            for name, content in self._content.items()
            for length in sorted({k * len(content) // _PARTS for k in range(_PARTS)})
        ]
        cases = [("cut", number, *cut) for number, cut in enumerate(cuts)]
        for kind, count in _FLIPS.items():
            names = [n for n in self._content if kind == "flip" or n != _RECEIPT]
            for number in range(count):
                generator = random.Random(f"{self._seed}:{kind}:{number}")
                name = names[number % len(names)]
                bit = generator.randrange(8 * len(self._content[name]))
                cases.append((kind, number, name, bit))
        return cases

    def run(self, kind: str, number: int, name: str, place: int) -> dict:
        """Outcome of one case; the files are as before afterwards."""
        content = bytearray(self._content[name])
        if kind == "cut":
            del content[place:]
        else:
            content[place // 8] ^= 1 << place % 8
        path = self._folder / "2" / name
        receipt = self._folder / "2" / _RECEIPT
        self._warnings.lines.clear()
        self._reads_all = number % _READ_EVERY == 0
        try:
            if kind == "unsealed":
                receipt.unlink()
            path.write_bytes(content)
            tree, metadata = checkpoints.restore(self._folder, tree_of(0))
        except Exception as error:
            return {"kind": kind, "number": number, "error": repr(error)}
        finally:
            path.write_bytes(self._content[name])
            receipt.write_bytes(self._content[_RECEIPT])
        restored = metadata["step"]
        line = " ".join(self._warnings.lines)
        return {
            "kind": kind,
            "number": number,
            "detected": restored == 1,
            "named": f"{self._folder / '2'} is damaged" in line and name in line,
            "right_values": _same(tree, tree_of(restored)),
        }


def _same(tree: dict, expected: dict) -> bool:
    import jax

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def is_good(case: dict) -> bool:
    """Whether the damage was seen and named; without a receipt, did no harm."""
    if "error" in case or not case["right_values"]:
        return False
    return case["kind"] == "unsealed" or (case["detected"] and case["named"])


def summarize(cases: list[dict]) -> dict:
    """Counts by kind."""
    return {
        kind: collections.Counter(
            name
            for case in cases
            if case["kind"] == kind
            for name in (
                "cases",
                *(key for key, value in case.items() if value is True),
            )
        )
        for kind in KINDS
    }


def main() -> int:
    """Exit code 1 if a case is bad."""
    options = result_file.sweep_options("Damage checkpoints byte by byte.")
    with tempfile.TemporaryDirectory(dir=result_file.scratch_folder()) as folder:
        damage = Damage(folder, options.seed)
        planned = damage.cases()
        results = result_file.run_cases(planned, damage.run, options, case_is=_CASE)
    return results.finish(is_good=is_good, summarize=summarize)


if __name__ == "__main__":
    sys.exit(main())
