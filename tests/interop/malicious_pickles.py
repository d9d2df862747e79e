# SPDX-License-Identifier: Apache-2.0
"""Pickles that try to create a file. None of them may succeed in our readers.

`live` marks those that do succeed when the stdlib unpickles them, which a test checks,
so that a list of harmless bytes cannot pass for a list of attacks.
"""

import base64
import dataclasses
import marshal
import struct
from collections.abc import Callable

import good_files as good
from good_files import EMPTY_ORDERED, Raw, global_, program, reduce, text, tuple_


@dataclasses.dataclass(frozen=True)
class Attack:
    """A pickle made for the path of the canary it tries to create."""

    name: str
    make: Callable[[str], bytes]
    live: bool = True


def python(path: str) -> str:
    return f"open({path!r}, 'w').close()"


def python_once(path: str) -> str:
    """Ends in an error, for what would repeat it a million times."""
    return f"{python(path)}; 1 / 0"


def shell(path: str) -> str:
    return f"touch '{path}'"


SYSTEM = global_("os", "system")


def short(value: str) -> bytes:
    """SHORT_BINUNICODE, the text opcode of protocol 4."""
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def framed(body: bytes, version: int = 4) -> bytes:
    """A pickle of protocol 4 or 5 with its body in one frame."""
    frame = b"\x95" + struct.pack("<Q", len(body) + 1)
    return bytes([0x80, version]) + frame + body + b"."


def stack_global(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


def call4(module: str, name: str, argument: str) -> bytes:
    return framed(stack_global(module, name) + short(argument) + b"\x85R")


def called(module: str, name: str, argument: Callable[[str], str]) -> Callable:
    """One callable with one text argument."""
    return lambda path: program(reduce(global_(module, name), argument(path)))


def inside(attack: bytes) -> bytes:
    """A tensor whose hooks are the result of the attack."""
    return program(
        reduce(
            global_("torch._utils", "_rebuild_tensor_v2"),
            good.storage_id("0", "float32", 1),
            0,
            (1,),
            (1,),
            False,
            Raw(attack),
        )
    )


def _code_object(path: str) -> bytes:
    """marshal.loads of a code object, made a function, called."""
    raw = marshal.dumps(compile(python(path), "x", "exec"))
    latin = reduce(global_("_codecs", "encode"), raw.decode("latin-1"), "latin-1")
    loaded = reduce(global_("marshal", "loads"), latin)
    scope = Raw(b"}" + text("__builtins__") + global_("builtins", "__dict__") + b"s")
    made = reduce(global_("types", "FunctionType"), loaded, scope)
    return program(Raw(made + b")R"))


def _setstate(path: str) -> bytes:
    """An OrderedDict is given a __setstate__ that is os.system, then a state."""
    armed = EMPTY_ORDERED + b"}" + text("__setstate__") + SYSTEM + b"sb"
    return b"\x80\x02" + armed + text(shell(path)) + b"b."


def _popen_newobj(path: str) -> bytes:
    arguments = tuple_(["touch", path])
    return b"\x80\x02" + global_("subprocess", "Popen") + arguments + b"\x81."


def _memo_call(path: str) -> bytes:
    return b"\x80\x02" + SYSTEM + b"q\x00h\x00" + tuple_(shell(path)) + b"R."


def _memo_swap(path: str) -> bytes:
    """Memo entry 0 is OrderedDict when it is stored, os.system when it is called."""
    harmless = global_("collections", "OrderedDict") + b"q\x00"
    return b"\x80\x02" + harmless + SYSTEM + b"q\x00" + _called_memo(path)


def _called_memo(path: str) -> bytes:
    return b"h\x00" + tuple_(shell(path)) + b"R."


def _popped(path: str) -> bytes:
    """The call's result is thrown away; what remains is an ordinary state dict."""
    call = reduce(SYSTEM, shell(path))
    return b"\x80\x02" + call + b"0" + good.opcodes({"state_dict": {}}) + b"."


def _popped_to_mark(path: str) -> bytes:
    call = reduce(SYSTEM, shell(path))
    return b"\x80\x02(" + call + b"1" + good.opcodes({"state_dict": {}}) + b"."


def _getattr_chain(path: str) -> bytes:
    module = reduce(global_("builtins", "__import__"), "os")
    function = reduce(global_("builtins", "getattr"), module, "system")
    return program(Raw(function + tuple_(shell(path)) + b"R"))


def _import_module(path: str) -> bytes:
    module = reduce(global_("importlib", "import_module"), "os")
    function = reduce(global_("builtins", "getattr"), module, "system")
    return program(Raw(function + tuple_(shell(path)) + b"R"))


def _partial(path: str) -> bytes:
    bound = reduce(global_("functools", "partial"), SYSTEM, shell(path))
    return program(Raw(bound + b")R"))


def _method_caller(path: str) -> bytes:
    caller = reduce(global_("operator", "methodcaller"), "touch")
    target = reduce(global_("pathlib", "PosixPath"), path)
    return program(Raw(caller + tuple_(target) + b"R"))


def _dotted_touch(path: str) -> bytes:
    target = stack_global("pathlib", "PosixPath") + short(path) + b"\x85R"
    return framed(stack_global("pathlib", "Path.touch") + target + b"\x85R")


def _map_list(path: str) -> bytes:
    """Nothing is called by REDUCE itself: list() drives a map over os.system."""
    mapped = reduce(global_("builtins", "map"), SYSTEM, [shell(path)])
    return program(reduce(global_("builtins", "list"), mapped))


def _as_key(path: str) -> bytes:
    call = reduce(SYSTEM, shell(path))
    return b"\x80\x02}" + call + b"Ns."


def _persistent_nested(path: str) -> bytes:
    kind = reduce(SYSTEM, shell(path))
    return program(Raw(tuple_("storage", kind, "0", "cpu", 1, None) + b"Q"))


def _module_source(path: str) -> bytes:
    """The legacy 'module' id carries the source of a class."""
    identifier = tuple_("module", EMPTY_ORDERED, "x.py", python(path))
    return program(Raw(identifier + b"Q"))


def _nested_load(path: str) -> bytes:
    inner = called("os", "system", shell)(path).decode("latin-1")
    raw = reduce(global_("_codecs", "encode"), inner, "latin-1")
    return program(reduce(global_("torch.storage", "_load_from_bytes"), raw))


def _pickle_in_pickle(path: str) -> bytes:
    inner = called("os", "system", shell)(path).decode("latin-1")
    raw = reduce(global_("_codecs", "encode"), inner, "latin-1")
    return program(reduce(global_("pickle", "loads"), raw))


def _base64(path: str) -> bytes:
    hidden = base64.b64encode(python(path).encode()).decode()
    raw = reduce(global_("base64", "b64decode"), hidden)
    return program(reduce(global_("builtins", "exec"), raw))


def _frame_hides(path: str) -> bytes:
    """The frame ends before the call begins."""
    call = stack_global("os", "system") + short(shell(path)) + b"\x85R"
    return b"\x80\x04\x95" + struct.pack("<Q", 2) + b"N0" + call + b"."


def _buffer(path: str) -> bytes:
    call = stack_global("os", "system") + short(shell(path)) + b"\x85R"
    return framed(b"\x96" + struct.pack("<Q", 1) + b"x0" + call, 5)


def _out_of_band(path: str) -> bytes:
    return framed(
        b"\x97\x98" + stack_global("os", "system") + short(path) + b"\x85R", 5
    )


def _new_object_ex(path: str) -> bytes:
    arguments = tuple_(["touch", path])
    return framed(stack_global("subprocess", "Popen") + arguments + b"}\x92")


def _two_streams(path: str) -> bytes:
    return b"\x80\x02N0\x80\x04" + call4("os", "system", shell(path))[11:]


def _rebuild_as_loader(path: str) -> bytes:
    """A numpy array is rebuilt from the class that runs the command."""
    make = global_("numpy.core.multiarray", "_reconstruct")
    return program(reduce(make, global_("subprocess", "Popen"), (0,), "b"))


def _extension(opcode: bytes) -> Callable[[str], bytes]:
    return lambda path: b"\x80\x02" + opcode + tuple_(shell(path)) + b"R."


def _slot_state(path: str) -> bytes:
    state = tuple_(None, {"__setstate__": SYSTEM})
    armed = EMPTY_ORDERED + state + b"b"
    return b"\x80\x02" + armed + text(shell(path)) + b"b."


ATTACKS = [
    Attack("reduce os.system", called("os", "system", shell)),
    Attack("reduce posix.system", called("posix", "system", shell)),
    Attack("reduce exec", called("builtins", "exec", python)),
    Attack("reduce eval", called("builtins", "eval", python)),
    Attack("reduce the eval of Python 2", called("__builtin__", "eval", python)),
    Attack("os.popen", called("os", "popen", shell)),
    Attack("os.mkdir", called("os", "mkdir", str)),
    Attack("subprocess.getoutput", called("subprocess", "getoutput", shell)),
    Attack("timeit.timeit", called("timeit", "timeit", python_once)),
    Attack("cProfile.run", called("cProfile", "run", python)),
    Attack("logging.FileHandler", called("logging", "FileHandler", str)),
    Attack("runpy.run_path", called("runpy", "run_path", str), live=False),
    Attack("webbrowser.open", called("webbrowser", "open", str), live=False),
    Attack("numpy.load", called("numpy", "load", str), live=False),
    Attack("torch.load", called("torch", "load", str), live=False),
    Attack("torch.hub.load", called("torch.hub", "load", str), live=False),
    Attack("torch.compile", called("torch", "compile", python), live=False),
    Attack("joblib.load", called("joblib", "load", str), live=False),
    Attack(
        "open for writing",
        lambda path: program(reduce(global_("io", "open"), path, "w")),
    ),
    Attack("INST", lambda path: b"\x80\x02(" + text(shell(path)) + b"ios\nsystem\n."),
    Attack("OBJ", lambda path: b"\x80\x02(" + SYSTEM + text(shell(path)) + b"o."),
    Attack("NEWOBJ", _popen_newobj, live=False),
    Attack("NEWOBJ_EX", _new_object_ex, live=False),
    Attack("STACK_GLOBAL", lambda path: call4("os", "system", shell(path))),
    Attack("dotted name", lambda path: call4("os", "path.os.system", shell(path))),
    Attack(
        "dotted GLOBAL of protocol 4",
        lambda path: framed(
            global_("os", "path.os.system") + short(shell(path)) + b"\x85R"
        ),
    ),
    Attack(
        "dotted name below an allowed one",
        lambda path: call4("collections", "OrderedDict.__init__.__globals__", path),
        live=False,
    ),
    Attack(
        "module of an allowed name",
        lambda path: call4("collections", "_sys.modules.get", "os"),
        live=False,
    ),
    Attack(
        "name through torch", called("torch", "_utils.os.system", shell), live=False
    ),
    Attack(
        "allowed name split elsewhere",
        called("torch", "_utils._rebuild_tensor_v2", shell),
        live=False,
    ),
    Attack("EXT1", _extension(b"\x82\xf0")),
    Attack("EXT2", _extension(b"\x83\xf0\x00")),
    Attack("EXT4", _extension(b"\x84\xf0\x00\x00\x00")),
    Attack("BUILD sets __setstate__", _setstate),
    Attack("BUILD with a slot state", _slot_state),
    Attack("PERSID", lambda path: b"P" + python(path).encode() + b"\n.", live=False),
    Attack("BINPERSID of a call", _persistent_nested),
    Attack("BINPERSID of a module", _module_source, live=False),
    Attack("call through the memo", _memo_call),
    Attack("memo entry replaced", _memo_swap),
    Attack("result popped", _popped),
    Attack("result popped with its mark", _popped_to_mark),
    Attack("getattr of __import__", _getattr_chain),
    Attack("import_module", _import_module),
    Attack("functools.partial", _partial),
    Attack("operator.methodcaller", _method_caller),
    Attack("pathlib.Path.touch", _dotted_touch),
    Attack("map driven by list", _map_list),
    Attack("call as a dict key", _as_key),
    Attack(
        "call in a tensor",
        lambda path: inside(reduce(SYSTEM, shell(path))),
        live=False,
    ),
    Attack("torch.storage._load_from_bytes", _nested_load, live=False),
    Attack("pickle.loads", _pickle_in_pickle),
    Attack("base64 and exec", _base64),
    Attack("marshal and FunctionType", _code_object),
    Attack("call behind a frame", _frame_hides),
    Attack("BYTEARRAY8 first", _buffer),
    Attack("NEXT_BUFFER", _out_of_band, live=False),
    Attack("second PROTO", _two_streams),
    Attack("class for _reconstruct", _rebuild_as_loader, live=False),
    Attack(
        "protocol 0",
        lambda path: b"cos\nsystem\n(S" + repr(shell(path)).encode() + b"\ntR.",
    ),
    Attack(
        "protocol 1",
        lambda path: b"cos\nsystem\n(" + text(shell(path)) + b"tR.",
    ),
    Attack(
        "protocol 3",
        lambda path: b"\x80\x03" + called("os", "system", shell)(path)[2:],
    ),
    Attack(
        "protocol 5",
        lambda path: framed(
            stack_global("os", "system") + short(shell(path)) + b"\x85R", 5
        ),
    ),
]
