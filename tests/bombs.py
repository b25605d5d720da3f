"""Pickles of a few kilobytes whose values would take hundreds of times as much memory."""

import struct

SIZE = 50_000
TIMES = 1200


def _text(length):
    return b"X" + struct.pack("<I", length) + b"a" * length


_ENCODE = b"c_codecs\nencode\n"
_LATIN1 = b"X\x06\x00\x00\x00latin1"
_CALL = b"h\x00h\x01h\x02\x86R"  # of the memo's function, with its text and the name of the encoding
_MEMO = _ENCODE + b"q\x00" + _text(SIZE) + b"q\x01" + _LATIN1 + b"q\x02"
_BYTES = _ENCODE + _text(SIZE) + _LATIN1 + b"\x86Rq\x00"
_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
_DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87Rq\x04"
_STATE = b"(K\x01M" + struct.pack("<H", SIZE) + b"\x85h\x04\x89h\x01t"


def _dict(key, values):
    """A pickled dict with one list."""
    return b"\x80\x02}X" + struct.pack("<I", len(key)) + key + b"](" + values + b"es."


BOMBS = {
    "a copy a call": (_dict(b"data", _MEMO + _CALL * TIMES), "strings that make more than 2 times the file's"),
    "a copy an array": (
        _dict(b"data", _MEMO + _DTYPE + (_ARRAY + _STATE + b"b") * TIMES),
        "strings that make more than 2 times the file's",
    ),
    "a copy a key": (_dict(b"data", _BYTES + b"}h\x00K\x01s" * TIMES), "a dict's key that is bytes"),
}
"""What they are -> content, and what the refusal says."""
NAMES = _dict(b"label_names", _BYTES + b"h\x00" * TIMES)
"""For ``batches.meta``: one name, very often."""
SLOW = b"\x80\x02]q\x00" + b"h\x00h\x00\x86q\x00" * 50_000
"""Pairs of the last one, and as many opcodes as are read."""
