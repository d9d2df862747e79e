# SPDX-License-Identifier: Apache-2.0
"""Bad pickles inside a sound legacy stream: wrong tensors, wrong programs.

Nothing here tries to run code (that is `malicious_pickles`); these lie about sizes,
break the stack machine's rules or cost more than they should.
"""

import struct

import good_files as good
from good_files import (
    EMPTY_ORDERED,
    Raw,
    Tensor,
    global_,
    integer,
    legacy_file,
    program,
    reduce,
    storage_id,
    text,
    tuple_,
)
from hostile_case import Case

WEIGHT = Tensor("0", "float32", 4, (2, 2), (2, 1))
STORAGES = {"0": good.storage("float32", (1, 2, 3, 4))}


def legacy_raw(body: bytes) -> bytes:
    """A legacy stream whose main pickle is `body` between PROTO and STOP."""
    storages = STORAGES if b"FloatStorage" in body else {}
    return legacy_file(b"\x80\x02" + body + b".", storages)


def with_tensor(view: object) -> bytes:
    """A legacy stream with one good and one odd tensor."""
    state = {"state_dict": {"w": WEIGHT, "odd": view}}
    return legacy_file(program(state), STORAGES)


def rebuilt(
    *,
    identifier: object = None,
    offset: object = 0,
    shape: object = (2, 2),
    strides: object = (2, 1),
    requires_grad: object = False,
    hooks: object = EMPTY_ORDERED,
    extra: tuple = (),
    function: str = "_rebuild_tensor_v2",
) -> Raw:
    """A tensor of which one argument is wrong."""
    storage = storage_id("0", "float32", 4) if identifier is None else identifier
    return reduce(
        global_("torch._utils", function),
        storage,
        offset,
        shape,
        strides,
        requires_grad,
        hooks,
        *extra,
    )


def odd_id(*parts: object) -> Raw:
    return Raw(tuple_(*parts) + b"Q")


FLOAT = global_("torch", "FloatStorage")

TENSOR_CASES = [
    Case(name, words, lambda odd=odd: with_tensor(odd))
    for name, words, odd in [
        ("shape beyond the storage", "of a storage of", rebuilt(shape=(3, 2))),
        ("offset beyond the storage", "of a storage of", rebuilt(offset=1)),
        ("offset far beyond", "of a storage of", rebuilt(offset=2**31)),
        ("stride beyond the storage", "of a storage of", rebuilt(strides=(3, 1))),
        ("huge stride", "of a storage of", rebuilt(strides=(2**32, 1))),
        ("stride of 2**63", "stride", rebuilt(strides=(2**63, 1))),
        ("offset of 2**63", "offset", rebuilt(offset=2**63)),
        ("negative stride", "stride -1", rebuilt(strides=(-1, 1))),
        ("negative offset", "offset -1", rebuilt(offset=-1)),
        ("negative size", "a size of -1", rebuilt(shape=(-1, 2))),
        ("two negative sizes", "a size of -2", rebuilt(shape=(-2, -2))),
        ("size that is a float", "a size of 2.0", rebuilt(shape=(2.0, 2))),
        ("size that is a bool", "a size of True", rebuilt(shape=(True, 2))),
        ("size that is a text", "a size of '2'", rebuilt(shape=("2", 2))),
        ("size that is None", "a size of None", rebuilt(shape=(None, 2))),
        ("offset that is a bool", "offset False", rebuilt(offset=False)),
        ("stride that is a float", "stride 1.0", rebuilt(strides=(2, 1.0))),
        ("fewer strides than axes", "2 axes with 1", rebuilt(strides=(2,))),
        ("shape that is a list", "not a tuple", rebuilt(shape=[2, 2])),
        ("strides that are None", "not a tuple", rebuilt(strides=None)),
        ("17 axes", "17 axes", rebuilt(shape=(1,) * 17, strides=(1,) * 17)),
        (
            "product of 2**64",
            "more than",
            rebuilt(shape=(2**32, 2**32), strides=(0, 0)),
        ),
        (
            "product that wraps to 0",
            "more than",
            rebuilt(shape=(2**32, 2**16, 2**16), strides=(0, 0, 0)),
        ),
        (
            "empty with a huge axis",
            "more than",
            rebuilt(shape=(0, 2**41), strides=(1, 1)),
        ),
        (
            "broadcast of a million",
            "repeats the 4",
            rebuilt(shape=(1_000_000,), strides=(0,)),
        ),
        (
            "overlap of a million",
            "repeats the 4",
            rebuilt(shape=(500_000, 2), strides=(0, 1)),
        ),
        ("hooks", "hooks", rebuilt(hooks=Raw(b"}" + text("a") + b"Ns"))),
        ("hooks that are a list", "hooks", rebuilt(hooks=[])),
        ("requires_grad that is 1", "requires_grad 1", rebuilt(requires_grad=1)),
        ("conjugate bit", "metadata", rebuilt(extra=({"conj": True},))),
        ("too many arguments", "arguments", rebuilt(extra=(None, None))),
        ("storage that is a number", "expected a storage", rebuilt(identifier=5)),
        (
            "storage that is a class",
            "expected a storage",
            rebuilt(identifier=FLOAT),
        ),
        (
            "v3 without an untyped storage",
            "two dtypes",
            rebuilt(
                function="_rebuild_tensor_v3", extra=(global_("torch", "float32"),)
            ),
        ),
        (
            "v3 without a dtype",
            "with the dtype",
            rebuilt(function="_rebuild_tensor_v3", extra=(None,)),
        ),
        (
            "v2 on untyped bytes",
            "two dtypes or none",
            rebuilt(
                identifier=odd_id(
                    "storage",
                    global_("torch.storage", "UntypedStorage"),
                    "1",
                    "cpu",
                    16,
                    None,
                )
            ),
        ),
        (
            "parameter of a number",
            "expected a tensor",
            reduce(
                global_("torch._utils", "_rebuild_parameter"), 5, True, EMPTY_ORDERED
            ),
        ),
        (
            "parameter with hooks",
            "hooks",
            reduce(
                global_("torch._utils", "_rebuild_parameter"),
                rebuilt(),
                True,
                Raw(b"}K\x01Ns"),
            ),
        ),
        (
            "tensor without arguments",
            "0 arguments",
            reduce(global_("torch._utils", "_rebuild_tensor_v2")),
        ),
        (
            "sparse tensor",
            "_rebuild_sparse_tensor",
            reduce(global_("torch._utils", "_rebuild_sparse_tensor"), 0, ()),
        ),
        (
            "quantized tensor",
            "_rebuild_qtensor",
            reduce(global_("torch._utils", "_rebuild_qtensor"), 0, ()),
        ),
        (
            "tensor of a subclass",
            "_rebuild_from_type_v2",
            reduce(global_("torch._tensor", "_rebuild_from_type_v2"), 0),
        ),
        (
            "complex storage",
            "ComplexFloatStorage",
            odd_id("storage", global_("torch", "ComplexFloatStorage"), "1", "cpu", 4),
        ),
        (
            "quantized storage",
            "QInt8Storage",
            odd_id("storage", global_("torch", "QInt8Storage"), "1", "cpu", 4),
        ),
        ("persistent id that is a text", "persistent id", Raw(text("0") + b"Q")),
        ("persistent id of 4 parts", "persistent id", odd_id("storage", FLOAT, "0", 4)),
        (
            "persistent id of another kind",
            "only storages",
            odd_id("module", FLOAT, "0", "cpu", 4, None),
        ),
        (
            "storage class that is a text",
            "only storages",
            odd_id("storage", "FloatStorage", "0", "cpu", 4, None),
        ),
        (
            "storage class that is a dtype",
            "only storages",
            odd_id("storage", global_("torch", "float32"), "0", "cpu", 4, None),
        ),
        (
            "kind of id that is a dtype",
            "only storages",
            odd_id(global_("torch", "float32"), FLOAT, "0", "cpu", 4, None),
        ),
        (
            "storage key with a path",
            "the key",
            odd_id("storage", FLOAT, "../0", "cpu", 4, None),
        ),
        (
            "storage key that is a number",
            "the key",
            odd_id("storage", FLOAT, 0, "cpu", 4, None),
        ),
        (
            "storage key in other digits",
            "the key",
            odd_id("storage", FLOAT, "\u0661", "cpu", 4, None),
        ),
        ("empty storage key", "the key", odd_id("storage", FLOAT, "", "cpu", 4, None)),
        (
            "storage without a device",
            "the key",
            odd_id("storage", FLOAT, "0", None, 4, None),
        ),
        (
            "negative storage size",
            "storage size -4",
            odd_id("storage", FLOAT, "0", "cpu", -4, None),
        ),
        (
            "storage size of 2**62",
            "storage size",
            odd_id("storage", FLOAT, "0", "cpu", 2**62, None),
        ),
        (
            "storage declared with two sizes",
            "in two ways",
            odd_id("storage", FLOAT, "0", "cpu", 5, None),
        ),
        (
            "storage declared with two dtypes",
            "in two ways",
            odd_id("storage", global_("torch", "IntStorage"), "0", "cpu", 4, None),
        ),
        (
            "view beyond its storage",
            "a storage view",
            odd_id("storage", FLOAT, "0", "cpu", 4, ("9", 2, 3)),
        ),
        (
            "negative storage view",
            "view offset",
            odd_id("storage", FLOAT, "0", "cpu", 4, ("9", -1, 3)),
        ),
        (
            "storage view of two parts",
            "a storage view",
            odd_id("storage", FLOAT, "0", "cpu", 4, ("9", 0)),
        ),
        (
            "storage never stored",
            "is missing",
            storage_id("77", "float32", 4),
        ),
    ]
]

PLAIN = good.opcodes({"w": WEIGHT})


def nested_lists(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1)


def shared(levels: int, width: int, close: bytes, start: bytes) -> bytes:
    """A container of `width` times the last one of `width` times the last one of ..."""
    body = start + b"q\x00"
    for level in range(1, levels):
        below = (b"h" + bytes([level - 1])) * width
        body += close.replace(b"*", below) + b"q" + bytes([level])
    return body


def pile(levels: int, width: int, close: bytes, start: bytes) -> bytes:
    """`shared`, with only the last container left in the value."""
    parts = shared(levels, width, close, start)
    return b"](" + parts + b"e"


def numbered(count: int, form: bytes) -> bytes:
    """So many times BININT of the next number, and something behind it."""
    return b"".join(b"J" + struct.pack("<i", i) + form for i in range(count))


OBJECT = global_("collections", "OrderedDict")
SIZE = global_("torch", "Size")

PICKLE_CASES = [
    Case(name, words, lambda body=body: legacy_raw(body))
    for name, words, body in [
        ("no value", "STOP with 0", b""),
        ("two values", "STOP with 2", PLAIN + PLAIN),
        ("open mark", "STOP with", b"(" + PLAIN),
        ("empty stack", "empty stack", b"R"),
        ("tuple of nothing", "empty stack", b"\x86"),
        ("mark never opened", "never opened", b"t"),
        ("APPENDS without a mark", "never opened", b"]e"),
        ("value from below a mark", "empty stack", b"}(\x85"),
        ("target below a mark", "empty stack", b"}(NNs"),
        ("SETITEM on a list", "not a dict", b"]NNs"),
        ("SETITEMS on a tensor", "not a dict", rebuilt() + b"(NNu"),
        ("APPEND to a dict", "not a list", b"}Na"),
        ("APPEND to a tuple", "not a list", b")Na"),
        ("odd number of items", "no value", b"}(NNNu"),
        ("memo entry unknown", "never written", b"h\x05"),
        ("long memo entry unknown", "never written", b"j\xff\xff\xff\xff"),
        ("memo entry twice", "written twice", b"}q\x00q\x00"),
        ("memo of nothing", "empty stack", b"q\x00"),
        ("memo entry far beyond the others", "at most 8 is", b"}r\xff\xff\xff\x7f"),
        ("MEMOIZE of a used entry", "written twice", b"}q\x01\x94"),
        ("dict key that is a list", "a dict key that is a list", b"}]Ns"),
        ("dict key that is a tuple", "a dict key that is a tuple", b"})Ns"),
        ("dict key that is a dict", "a dict key that is a dict", b"}}Ns"),
        ("dict key that is a tensor", "a dict key", b"}" + rebuilt() + b"Ns"),
        ("dict key that is None", "a dict key that is None", b"}NNs"),
        ("dict key that is a float", "a dict key", b"}G" + bytes(8) + b"Ns"),
        ("dict key of 80 bits", "64 bits", b"}\x8a\x0a" + b"\x01" * 10 + b"Ns"),
        ("duplicate key", "duplicate key 'a'", b"}(" + (text("a") + b"N") * 2 + b"u"),
        ("duplicate number as key", "duplicate key 1", b"}(K\x01NM\x01\x00Nu"),
        ("integer of 11 bytes", "11 bytes", b"\x8a\x0b" + bytes(11)),
        ("integer of 255 bytes", "255 bytes", b"\x8a\xff" + bytes(255)),
        ("LONG4", "LONG4", b"\x8b\x04\x00\x00\x00" + bytes(4)),
        ("text longer than the file", "are declared", b"X\xff\xff\xff\xffabc"),
        ("text of 2**63 bytes", "are declared", b"\x8d" + b"\xff" * 7 + b"\x7fabc"),
        ("bytes of 2**63", "are declared", b"\x8e" + b"\xff" * 7 + b"\x7fabc"),
        ("text that is not UTF-8", "not UTF-8", b"X\x02\x00\x00\x00\xff\xfe"),
        ("text with a surrogate", "not UTF-8", b"X\x03\x00\x00\x00\xed\xa0\x80"),
        ("global without an end", "without an end", b"c" + b"a" * 300),
        ("global that is not ASCII", "not ASCII", b"c\xc3\xa4\nb\n"),
        ("global with a newline less", "without an end", b"ccollections"),
        ("STACK_GLOBAL of numbers", "not a text", b"K\x01K\x02\x93"),
        ("STACK_GLOBAL of nothing", "empty stack", b"\x93"),
        ("whole module", "'torch.nn.modules", b"ctorch.nn.modules.conv\nConv2d\n"),
        ("argparse.Namespace", "argparse", b"cargparse\nNamespace\n"),
        ("REDUCE of a class", "REDUCE", FLOAT + b")R"),
        ("REDUCE of a dict", "REDUCE", b"})R"),
        ("REDUCE with a list", "REDUCE", OBJECT + b"]R"),
        ("REDUCE with a dict", "REDUCE", OBJECT + b"}R"),
        ("OrderedDict of a dict", "made of a dict", OBJECT + b"}\x85R"),
        ("OrderedDict of triples", "than pairs", OBJECT + b"](NNNta\x85R"),
        (
            "OrderedDict with one key twice",
            "duplicate key 1",
            OBJECT + b"](" + b"](K\x01Ne" * 2 + b"e\x85R",
        ),
        ("Size of negatives", "a size of -1", SIZE + integer(-1) + b"\x85\x85R"),
        ("Size of a number", "a torch.Size made of 3", SIZE + b"K\x03\x85R"),
        ("OBJ of an allowed class", "opcode OBJ", b"(" + OBJECT + b"o"),
        ("INST of an allowed class", "opcode INST", b"(icollections\nOrderedDict\n"),
        ("NEWOBJ of an allowed class", "opcode NEWOBJ", OBJECT + b")\x81"),
        ("NEWOBJ_EX of an allowed class", "opcode NEWOBJ_EX", OBJECT + b")}\x92"),
        ("BUILD of attributes", "BUILD", EMPTY_ORDERED + b"}" + text("x") + b"Nsb"),
        ("BUILD of a list", "BUILD", b"]}b"),
        ("BUILD of a plain dict", "BUILD", b"}}b"),
        ("BUILD with a tuple", "BUILD", EMPTY_ORDERED + b"N}\x86b"),
        ("BUILD of a tensor", "BUILD", rebuilt() + b"}b"),
        ("DUP", "opcode DUP", b"}2"),
        ("POP", "opcode POP", b"}N0"),
        ("EMPTY_SET", "opcode EMPTY_SET", b"\x8f"),
        ("FROZENSET", "opcode FROZENSET", b"(\x91"),
        ("text opcode INT", "opcode INT", b"I1\n"),
        ("text opcode FLOAT", "opcode FLOAT", b"F1.0\n"),
        ("text opcode UNICODE", "opcode UNICODE", b"Vx\n"),
        ("text opcode GET", "opcode GET", b"g0\n"),
        ("opcode of no protocol", "opcode 0xff", b"\xff"),
        ("second PROTO", "PROTO in the middle", b"N\x80\x02"),
        ("FRAME beyond the end", "longer than the stream", b"\x95" + b"\xff" * 8),
        (
            "FRAME that cuts an argument",
            "crosses the end",
            b"\x95" + struct.pack("<Q", 3) + text("abc"),
        ),
        (
            "FRAME in a FRAME",
            "inside a frame",
            b"\x95" + struct.pack("<Q", 11) + b"\x95" + struct.pack("<Q", 1) + b"N",
        ),
        ("STOP inside a FRAME", "STOP inside", b"\x95" + struct.pack("<Q", 4) + b"N"),
        ("list that contains itself", "contains itself", b"]q\x00h\x00a"),
        ("dict that contains itself", "contains itself", b"}q\x00K\x01h\x00s"),
        ("cycle of two", "contains itself", b"]q\x00]h\x00aa"),
        ("65 lists deep", "nested deeper", nested_lists(66)),
        (
            "ten thousand million leaves",
            "content is a list",
            pile(11, 10, b"](*e", b"]N" + b"a"),
        ),
        ("tuple of 2**59 leaves", "content is a list", pile(60, 2, b"*\x86", b"N\x85")),
        (
            "tuple of 2**59 leaves as key",
            "that is a tuple",
            b"}(" + shared(60, 2, b"*\x86", b"N\x85") + b"u",
        ),
        ("top that is a number", "content is 5", integer(5)),
        ("top that is None", "content is None", b"N"),
        ("top that is a tensor", "content is a StridedArray", rebuilt()),
    ]
]

REBUILD = global_("torch._utils", "_rebuild_tensor_v2")
MANY_AXES = rebuilt(shape=(1,) * 16, strides=(1,) * 16)
# The callable under 0, a long list or a tuple of arguments under 1.
LATER = b"(" + OBJECT + b"q\x00"

# Few bytes that reach, through the memo, what many others have made.
COST_CASES = [
    Case(name, words, lambda make=make: legacy_raw(make()))
    for name, words, make in [
        (
            "40,000 pairs made an OrderedDict 300 times",
            "more than 800000 arguments",
            lambda: (
                LATER
                + (b"](" + numbered(40_000, b"N\x86") + b"eq\x01")
                + (b"h\x00h\x01\x85R" * 300 + b"t")
            ),
        ),
        (
            "300,000 arguments for 100,000 calls",
            "more than 800000 arguments",
            lambda: (
                (b"(" + global_("torch", "device") + b"q\x00")
                + (b"(" + b"N" * 300_000 + b"tq\x01" + b"h\x00h\x01R" * 100_000 + b"t")
            ),
        ),
        (
            "250,000 tensors of 16 axes",
            "more than 800000 arguments",
            lambda: (
                (b"(" + REBUILD + b"q\x00")
                + (MANY_AXES[len(REBUILD) : -1] + b"q\x01R")
                + (b"h\x00h\x01R" * 250_000 + b"t")
            ),
        ),
        (
            "250,000 OrderedDicts of one pair",
            "more than 100000 containers",
            lambda: (
                (LATER + b"](" + numbered(1, b"N\x86") + b"e\x85q\x01")
                + (b"h\x00h\x01R" * 250_000 + b"t")
            ),
        ),
        (
            "60,000 keys that may collide",
            "more than 2048 integer keys",
            lambda: (
                b"}("
                + b"".join(
                    b"\x8a\x08" + struct.pack("<q", i << 40) + b"N"
                    for i in range(1, 60_001)
                )
                + b"u"
            ),
        ),
        (
            "one dict of 100,000 under 5,000 keys",
            "no model entry",
            lambda: (
                (b"}(" + text("a") + b"}(" + numbered(100_000, b"N") + b"uq\x01")
                + (numbered(5_000, b"h\x01") + b"u")
            ),
        ),
    ]
]
