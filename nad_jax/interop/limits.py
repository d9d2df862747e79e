# SPDX-License-Identifier: Apache-2.0
"""Bounds on what a file from a stranger may ask for, in one place.

Each bound is far above what an image classifier needs (a ViT-L training checkpoint
has about 1,000 tensors and 4 GB) and low enough that a file built to hurt is refused
within two seconds and within its own size plus 300 MB of memory. They are not
settings: a file beyond a bound is refused, and the message names the bound.
"""

# Whole file. Also keeps every offset of a zip archive below its 64-bit extension.
MAX_FILE_BYTES = 4 * 2**30

# Arrays in one file, model entry or not, and axes of one array.
MAX_TENSORS = 50_000
MAX_AXES = 16

# Elements of one array, zero-length axes counted as one: an empty array must not
# carry a shape that overflows whatever multiplies it next.
MAX_ELEMENTS = 2**40

# Containers inside containers. The deepest honest file seen has 5.
MAX_DEPTH = 64

# Characters of an array's name.
MAX_NAME_CHARS = 512

# One pickle stream. A Python object costs at most about 120 bytes per opcode, so the
# opcode bound is the memory bound; text is counted apart because one emoji makes a
# string four bytes a character.
MAX_PICKLE_BYTES = 32 * 2**20
MAX_PICKLE_OPCODES = 800_000
# Dicts and lists while a pickle runs; in the end containers of any kind, tuples, too.
MAX_PICKLE_CONTAINERS = 100_000
# Arguments of the callables together, and what the lists and tuples among them hold. A
# writer pushes each of them by an opcode; a hostile file takes a long list from the
# memo for each of many calls.
MAX_PICKLE_ARGUMENTS = MAX_PICKLE_OPCODES
# Integers can be chosen so that each walks past most others of a dict. Those below the
# first bound (numbers of parameters, of images) have a place of their own once a dict
# is large; few others are honest (addresses of parameters, by old versions of torch).
PICKLE_NARROW_KEYS = 2**17
MAX_PICKLE_WIDE_KEYS = 2_048
MAX_PICKLE_TEXT_BYTES = 48 * 2**20
# Module or attribute name of a pickle's GLOBAL.
MAX_GLOBAL_CHARS = 256
# Widest integer of a pickle: the 80-bit number that opens a legacy torch stream.
MAX_PICKLE_INT_BYTES = 10

# Header of a safetensors file. The format allows 100 MB; MAX_TENSORS entries with
# names of 200 characters need 15 MB, and parsed JSON is up to 24 times its text.
MAX_HEADER_BYTES = 16 * 2**20
# Pairs of its metadata; the texts of all keys and values, five for each array; and the
# commas between them, six for an array of three axes and one more for each other axis.
MAX_HEADER_NOTES = 10_000
MAX_HEADER_TEXTS = 5 * MAX_TENSORS + 2 * MAX_HEADER_NOTES + 1
MAX_HEADER_COMMAS = 8 * MAX_TENSORS + MAX_HEADER_NOTES

# Card of an artefact, a JSON text; parsed JSON is up to 24 times its text.
MAX_CARD_CHARS = 2**20

# Values (numbers, texts, containers, arrays) in one msgpack file.
MAX_MSGPACK_VALUES = 300_000

# A strided view may repeat elements (a broadcast buffer), up to this many elements or
# the size of its storage, whichever is more.
MAX_BROADCAST_ELEMENTS = 65_536
# The chosen arrays together, shared storages counted once per name (tied weights).
MAX_SHARING_FACTOR = 4
SHARING_SLACK_BYTES = 16 * 2**20

# Scalars kept as metadata, and characters of one of their texts.
MAX_METADATA_ENTRIES = 64
MAX_METADATA_CHARS = 256
