# SPDX-License-Identifier: Apache-2.0
"""Reads a pickle without unpickling: a small machine for a few harmless opcodes.

A pickle is a program for a stack machine. The stdlib's machine can import any name and
call it, which is how model files run code. This one knows the opcodes by which
`torch.save` writes dicts, lists, numbers, texts and tensors, and nothing else; it
imports nothing and calls nothing that a file names. A name is looked up in a table that
the caller hands over, whose values are inert or are `Constructor`s: functions of this
package that check their arguments and return a description. Whatever is not in the
opcode table below or in that table ends the reading with the opcode or name and its
offset.

Refused on purpose although honest pickles could hold them: the text opcodes of
protocols 0 and 1, INST, OBJ, NEWOBJ and the extension registry (ways to make objects),
sets (216 bytes of memory per byte of file), POP and DUP (no writer needs them here).
"""

import contextlib
import gc
import itertools
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nad_jax.interop import bounded_file, limits
from nad_jax.interop.bounded_file import Refusal


class Inert:
    """Something the file describes and nobody reads: a device, a numpy scalar."""

    __slots__ = ()


INERT = Inert()


class OrderedMapping(dict):
    """What a file calls an OrderedDict; a dict a BUILD may follow."""

    __slots__ = ()


class Constructor:
    """An allowed callable: checks the arguments of a REDUCE, returns a description."""

    __slots__ = ("build",)

    def __init__(self, build: Callable[[tuple], object]) -> None:
        self.build = build


# The one allowed callable that fills a container. The machine does it itself, because
# the machine counts what it costs: OrderedDict() or, as Python 2 wrote it,
# OrderedDict([[key, value], ...]).
ORDERED_DICT = object()

# (module, name) as the file writes them -> a Constructor or an inert value.
Globals = Mapping[tuple[str, str], object]

_UNWRITTEN = object()


def run_pickle(
    data: bytes,
    *,
    start: int,
    file: bounded_file.BoundedFile,
    allowed: Globals,
    persistent: Callable[[object], object] | None = None,
) -> tuple[object, int]:
    """The value a pickle describes, and its length in bytes.

    Args:
        data: bytes that begin with the pickle.
        start: offset of `data` in the file, for messages.
        file: names itself in errors.
        allowed: the only names the pickle may use.
        persistent: turns the argument of a BINPERSID into a value; None refuses them.

    Raises:
        InputError: for anything else than a pickle of allowed opcodes and names whose
            containers form a tree or share parts without a cycle.
    """
    machine = _Machine(data, allowed, persistent)
    try:
        with _collector_paused():
            value = machine.run()
            _check_nesting(value)
    except Refusal as refusal:
        at = start + machine.instruction
        raise file.error(f"pickle: {refusal}", at) from None
    return value, machine.position


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Without it, half of the time of a file of many small tuples goes to searching
    them for cycles, over and over."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Machine:
    """State of one run: the stack, its marks and the memo."""

    def __init__(
        self,
        data: bytes,
        allowed: Globals,
        persistent: Callable[[object], object] | None,
    ) -> None:
        self.data = data
        self.allowed = allowed
        self.persistent = persistent
        self.position = 0
        self.instruction = 0
        self.frame_end = 0
        # What is bounded beside the opcodes, since an opcode may reach, through the
        # memo, what many others have made.
        self.text_bytes = 0
        self.containers = 0
        self.arguments = 0
        self.wide_keys = 0
        self.stack: list[object] = []
        # Heights of the stack at the open MARKs; nothing below the last is touched.
        self.marks: list[int] = []
        # By number. Not a dict: numbers of the file's choice would collide in it.
        self.memo: list[object] = []
        self.remembered = 0

    def run(self) -> object:
        """Executes up to STOP."""
        data, size, handlers = self.data, len(self.data), _HANDLERS
        for _ in range(limits.MAX_PICKLE_OPCODES):
            self.instruction = at = self.position
            if at >= size:
                raise Refusal("it ends without STOP")
            opcode = data[at]
            self.position = at + 1
            if opcode == _STOP:
                return self._stop()
            handler = handlers.get(opcode)
            if handler is None:
                raise Refusal(f"opcode {_opcode_name(opcode)} is not accepted")
            handler(self)
        raise Refusal(f"more than {limits.MAX_PICKLE_OPCODES} opcodes")

    def _stop(self) -> object:
        if self.marks or len(self.stack) != 1:
            raise Refusal(
                f"STOP with {len(self.stack)} values on the stack; expected 1"
            )
        if self.position < self.frame_end:
            raise Refusal("STOP inside a frame")
        return self.stack[0]

    # Arguments ---------------------------------------------------------------

    def take(self, count: int) -> bytes:
        """The next `count` bytes of the stream."""
        start, end = self.position, self.position + count
        if end > len(self.data):
            raise Refusal(
                f"{count} bytes are declared, {len(self.data) - start} are left"
            )
        if start < self.frame_end < end:
            raise Refusal("an argument crosses the end of its frame")
        self.position = end
        return self.data[start:end]

    def byte(self) -> int:
        """The next byte, the argument of the most frequent opcodes."""
        at = self.position
        if at >= len(self.data):
            raise Refusal("1 byte is declared, 0 are left")
        self.position = at + 1
        return self.data[at]

    def number(self, width: int) -> int:
        """The next `width` bytes as an unsigned little-endian number."""
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        """The next line of ASCII, as GLOBAL writes its two names."""
        start = self.position
        end = self.data.find(b"\n", start, start + limits.MAX_GLOBAL_CHARS + 1)
        if end < 0:
            raise Refusal(f"a name without an end in {limits.MAX_GLOBAL_CHARS} bytes")
        line = self.take(end + 1 - start)[:-1]
        try:
            return line.decode("ascii")
        except UnicodeDecodeError:
            raise Refusal(f"name {bounded_file.shown(line)} is not ASCII") from None

    def text(self, raw: bytes) -> str:
        """`raw` as UTF-8 text, counted against the bound on text."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise Refusal(f"text {bounded_file.shown(raw)} is not UTF-8") from None
        self.text_bytes += text.__sizeof__()
        if self.text_bytes > limits.MAX_PICKLE_TEXT_BYTES:
            raise Refusal(f"more than {limits.MAX_PICKLE_TEXT_BYTES} bytes of text")
        return text

    def count_containers(self) -> None:
        """One more dict or list that the file may fill, reachable in the end or not.

        Tuples are not among them; a pickle makes six for each tensor.
        """
        self.containers += 1
        if self.containers > limits.MAX_PICKLE_CONTAINERS:
            raise Refusal(f"more than {limits.MAX_PICKLE_CONTAINERS} containers")

    def count_arguments(self, values: list | tuple) -> None:
        """Counts what a REDUCE is about to look at."""
        self.arguments += len(values)
        if self.arguments > limits.MAX_PICKLE_ARGUMENTS:
            raise Refusal(f"more than {limits.MAX_PICKLE_ARGUMENTS} arguments")

    # Stack -------------------------------------------------------------------

    def pop(self) -> object:
        """Takes the value on top, which must lie above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refusal("it takes a value from an empty stack")
        return self.stack.pop()

    def top(self) -> object:
        """The value on top, left where it is."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refusal("it looks at a value on an empty stack")
        return self.stack[-1]

    def pop_to_mark(self) -> list[object]:
        """Takes all values above the last mark, and the mark."""
        if not self.marks:
            raise Refusal("it closes a MARK that was never opened")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    def remember(self, key: int) -> None:
        """Stores the value on top under a number."""
        # No writer uses a number twice; a reader that differs in which one wins would
        # see another model than we do.
        value, memo = self.top(), self.memo
        if key < len(memo):
            if memo[key] is not _UNWRITTEN:
                raise Refusal(f"memo entry {key} is written twice")
            memo[key] = value
        else:
            # Writers count from 0 or 1 on, and an entry takes more than a byte.
            most = min(self.position, limits.MAX_PICKLE_OPCODES)
            if key > most:
                raise Refusal(f"memo entry {key}; at most {most} is accepted here")
            memo.extend([_UNWRITTEN] * (key - len(memo)))
            memo.append(value)
        self.remembered += 1

    def recall(self, key: int) -> None:
        """Pushes the value stored under a number."""
        if key >= len(self.memo) or self.memo[key] is _UNWRITTEN:
            raise Refusal(f"memo entry {key} was never written")
        self.stack.append(self.memo[key])

    # Opcodes with more than one line ------------------------------------------

    def proto(self) -> None:
        version = self.byte()
        if self.instruction != 0:
            raise Refusal("PROTO in the middle of a stream")
        if not 2 <= version <= 5:
            raise Refusal(f"pickle protocol {version}; 2 to 5 are read")

    def frame(self) -> None:
        if self.position - 1 < self.frame_end:
            raise Refusal("FRAME inside a frame")
        end = self.number(8) + self.position
        if end > len(self.data):
            raise Refusal("FRAME is longer than the stream")
        self.frame_end = end

    def long(self, width: int) -> None:
        if width > limits.MAX_PICKLE_INT_BYTES:
            raise Refusal(
                f"an integer of {width} bytes; at most {limits.MAX_PICKLE_INT_BYTES}"
            )
        self.stack.append(int.from_bytes(self.take(width), "little", signed=True))

    def string(self, width: int) -> None:
        # Python 2 wrote keys and raw bytes alike as strings; only the former are read.
        raw = self.take(width)
        self.stack.append(self.text(raw) if raw.isascii() else INERT)

    def raw_bytes(self, width: int) -> None:
        self.take(width)
        self.stack.append(INERT)

    def look_up(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refusal("a global whose module or name is not a text")
        if (module, name) not in self.allowed:
            full = bounded_file.shown(f"{module}.{name}", limits.MAX_GLOBAL_CHARS)
            raise Refusal(
                f"global {full} is not accepted; save model.state_dict() without "
                "objects of other classes"
            )
        self.stack.append(self.allowed[module, name])

    def global_by_line(self) -> None:
        module = self.line()
        self.look_up(module, self.line())

    def global_from_stack(self) -> None:
        name = self.pop()
        self.look_up(self.pop(), name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        known = isinstance(function, Constructor) or function is ORDERED_DICT
        if not known or type(arguments) is not tuple:
            raise Refusal("REDUCE of something that is not an accepted callable")
        # The tuple before its parts: each may come from the memo, again and again.
        self.count_arguments(arguments)
        for argument in arguments:
            if isinstance(argument, (list, tuple)):
                self.count_arguments(argument)
        if isinstance(function, Constructor):
            self.stack.append(function.build(arguments))
        else:
            self.stack.append(self.ordered_dict(arguments))

    def ordered_dict(self, arguments: tuple) -> OrderedMapping:
        """What `ORDERED_DICT` makes of arguments that have been counted."""
        if len(arguments) > 1:
            raise Refusal(f"{len(arguments)} arguments; expected 0 to 1")
        pairs = arguments[0] if arguments else []
        if type(pairs) is not list:
            raise Refusal(f"an OrderedDict made of {bounded_file.shown(pairs)}")
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise Refusal("an OrderedDict made of something else than pairs")
        self.count_containers()
        mapping = OrderedMapping()
        self.fill(mapping, list(itertools.chain.from_iterable(pairs)))
        return mapping

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            return
        # A module's state_dict carries the version of each layer as an attribute.
        if type(target) is OrderedMapping and isinstance(state, dict):
            if all(key == "_metadata" for key in state):
                return
        raise Refusal("BUILD of something else than the _metadata of an OrderedDict")

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise Refusal("BINPERSID where no storage can be")
        self.stack.append(self.persistent(self.pop()))

    def append(self, values: list[object]) -> None:
        target = self.top()
        if type(target) is not list:
            raise Refusal("APPEND to something that is not a list")
        target.extend(values)

    def set_items(self, values: list[object]) -> None:
        target = self.top()
        if not isinstance(target, dict):
            raise Refusal("SETITEM on something that is not a dict")
        self.fill(target, values)

    def fill(self, target: dict, values: list[object]) -> None:
        """Adds alternating keys and values; refuses odd or repeated keys."""
        if len(values) % 2:
            raise Refusal("a dict with a key and no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Only keys whose hash is quick and cannot be chosen to collide: a tuple of
            # shared tuples takes for ever to hash, wide integers collide at will.
            if type(key) is int:
                if not 0 <= key < limits.PICKLE_NARROW_KEYS:
                    self.count_wide_key(key)
            elif not isinstance(key, (str, Inert)):
                raise Refusal(f"a dict key that is {bounded_file.shown(key)}")
            if key in target:
                raise Refusal(f"duplicate key {bounded_file.shown(key)}")
            target[key] = value

    def count_wide_key(self, key: int) -> None:
        """Counts an integer key that could be chosen to collide with many others."""
        if not -(2**63) <= key < 2**63:
            raise Refusal("an integer key of more than 64 bits")
        self.wide_keys += 1
        if self.wide_keys > limits.MAX_PICKLE_WIDE_KEYS:
            raise Refusal(
                f"more than {limits.MAX_PICKLE_WIDE_KEYS} integer keys that are not in "
                f"0 to {limits.PICKLE_NARROW_KEYS - 1}"
            )


class _Visit:
    """A container on the way down, and how high the part seen so far is."""

    __slots__ = ("node", "parts", "height")

    def __init__(self, node: object) -> None:
        self.node = node
        self.parts = _containers_in(node)
        self.height = 1


def _check_nesting(value: object) -> None:
    """Refuses containers that are too deep, too many, or contain themselves."""
    # Depth first with an explicit stack. A container met again is not walked again, so
    # that a few shared lists cannot stand for a tree of billions.
    heights: dict[int, int] = {}
    path = [_Visit(value)]
    on_path = {id(value)}
    while path:
        visit = path[-1]
        for part in visit.parts:
            if id(part) in on_path:
                raise Refusal("a container that contains itself")
            if id(part) not in heights:
                path.append(_Visit(part))
                on_path.add(id(part))
                break
            visit.height = max(visit.height, heights[id(part)] + 1)
        else:
            path.pop()
            on_path.discard(id(visit.node))
            heights[id(visit.node)] = visit.height
            if path:
                path[-1].height = max(path[-1].height, visit.height + 1)
        if max(visit.height, len(path)) > limits.MAX_DEPTH:
            raise Refusal(f"containers nested deeper than {limits.MAX_DEPTH}")
        if len(heights) > limits.MAX_PICKLE_CONTAINERS:
            raise Refusal(f"more than {limits.MAX_PICKLE_CONTAINERS} containers")


def _containers_in(node: object) -> Iterator[object]:
    """The containers directly inside `node` that hold something themselves."""
    if isinstance(node, dict):
        node = node.values()
    elif not isinstance(node, (list, tuple)):
        node = ()
    return (part for part in node if isinstance(part, (dict, list, tuple)) and part)


def _opcode_name(opcode: int) -> str:
    known = _OPCODES.get(chr(opcode))
    return f"0x{opcode:02x}" if known is None else known.name


def _push(make: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make(machine))


def _tuple2(machine: _Machine) -> tuple[object, ...]:
    second, first = machine.pop(), machine.pop()
    return (first, second)


def _tuple3(machine: _Machine) -> tuple[object, ...]:
    third, second, first = machine.pop(), machine.pop(), machine.pop()
    return (first, second, third)


def _new_dict(machine: _Machine) -> dict:
    machine.count_containers()
    return {}


def _new_list(machine: _Machine) -> list:
    machine.count_containers()
    return []


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


# Only for messages; the stdlib's own names, of which its stubs know nothing.
_OPCODES: dict[str, Any] = pickletools.__dict__["code2op"]
_STOP = ord(".")

# The whole language: opcode -> what it does.
_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    # Protocol.
    0x80: _Machine.proto,  # PROTO
    0x95: _Machine.frame,  # FRAME
    # Constants.
    ord("N"): lambda machine: machine.stack.append(None),  # NONE
    0x88: lambda machine: machine.stack.append(True),  # NEWTRUE
    0x89: lambda machine: machine.stack.append(False),  # NEWFALSE
    # Numbers.
    ord("K"): lambda machine: machine.stack.append(machine.byte()),  # BININT1
    ord("M"): lambda machine: machine.stack.append(machine.number(2)),  # BININT2
    ord("J"): lambda machine: machine.long(4),  # BININT
    0x8A: lambda machine: machine.long(machine.byte()),  # LONG1
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),  # BINFLOAT
    # Texts and bytes.
    ord("X"): _push(lambda m: m.text(m.take(m.number(4)))),  # BINUNICODE
    0x8C: _push(lambda m: m.text(m.take(m.byte()))),  # SHORT_BINUNICODE
    0x8D: _push(lambda m: m.text(m.take(m.number(8)))),  # BINUNICODE8
    ord("U"): lambda machine: machine.string(machine.byte()),  # SHORT_BINSTRING
    ord("T"): lambda machine: machine.string(machine.number(4)),  # BINSTRING
    ord("C"): lambda machine: machine.raw_bytes(machine.byte()),  # SHORT_BINBYTES
    ord("B"): lambda machine: machine.raw_bytes(machine.number(4)),  # BINBYTES
    0x8E: lambda machine: machine.raw_bytes(machine.number(8)),  # BINBYTES8
    # Containers.
    ord("("): lambda machine: machine.marks.append(len(machine.stack)),  # MARK
    ord("}"): _push(_new_dict),  # EMPTY_DICT
    ord("]"): _push(_new_list),  # EMPTY_LIST
    ord(")"): lambda machine: machine.stack.append(()),  # EMPTY_TUPLE
    ord("t"): _push(lambda m: tuple(m.pop_to_mark())),  # TUPLE
    0x85: _push(lambda m: (m.pop(),)),  # TUPLE1
    0x86: _push(_tuple2),  # TUPLE2
    0x87: _push(_tuple3),  # TUPLE3
    ord("a"): lambda machine: machine.append([machine.pop()]),  # APPEND
    ord("e"): lambda machine: machine.append(machine.pop_to_mark()),  # APPENDS
    ord("s"): _set_item,  # SETITEM
    ord("u"): lambda machine: machine.set_items(machine.pop_to_mark()),  # SETITEMS
    # Memo.
    ord("q"): lambda machine: machine.remember(machine.byte()),  # BINPUT
    ord("r"): lambda machine: machine.remember(machine.number(4)),  # LONG_BINPUT
    0x94: lambda machine: machine.remember(machine.remembered),  # MEMOIZE
    ord("h"): lambda machine: machine.recall(machine.byte()),  # BINGET
    ord("j"): lambda machine: machine.recall(machine.number(4)),  # LONG_BINGET
    # Names and what is done with them, all of it through the caller's table.
    ord("c"): _Machine.global_by_line,  # GLOBAL
    0x93: _Machine.global_from_stack,  # STACK_GLOBAL
    ord("R"): _Machine.reduce,  # REDUCE
    ord("b"): _Machine.build,  # BUILD
    ord("Q"): _Machine.persistent_id,  # BINPERSID
}
