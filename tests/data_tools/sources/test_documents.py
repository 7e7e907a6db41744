"""A line of raw JSONL is what Python's own JSON reader says it is, whichever reader does the work."""

from __future__ import annotations

import json
import os

from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.sources.documents import TEXT_FIELDS, parse_line

PIECES = [
    *(b"NaN", b"-Infinity", b"1e999", b"12345678901234567890123", b'"\\ud800"', b'"\\ud83d\\ude00"', b"\xef\xbb\xbf"),
    *(b"\xff", b"\x00", b"\t", b"\\u0000", b'"text"', b'"content"', b"null", b"[" * 2000, b"{", b"}", b",", b":", b'"'),
]


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """A JSON object, compact or not, with up to two pieces cut out or put in."""
    value = draw(
        st.dictionaries(
            st.sampled_from(["text", "content", "meta", "é"]),
            st.one_of(st.text(max_size=8), st.none(), st.integers(), st.lists(st.text(max_size=2), max_size=2)),
        )
    )
    line = json.dumps(value, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(line)))
        stop = min(len(line), start + draw(st.integers(0, 6)))
        line = line[:start] + draw(st.sampled_from([b"", *PIECES])) + line[stop:]
    return line.replace(b"\n", b" ")


def judge(line: bytes) -> str | None:
    """The line's text by the `json` module alone; None for a bad line."""
    try:
        value = json.loads(line)
        text = next((value[name] for name in TEXT_FIELDS if name in value), None) if isinstance(value, dict) else None
        text.encode()  # type: ignore[union-attr]
    except (ValueError, RecursionError, AttributeError):
        return None
    return text


@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "1000")), deadline=None, derandomize=True, database=None)
@given(lines())
@example(b'{"text": "a", "score": NaN}')
@example(b'\xef\xbb\xbf{"text": "a"}')
@example(b'{"text": "a", "text": "b"}')
@example(b'{"text": "a", "meta": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(b'{"text": "\\ud800"}')
@example(b'{"text": "a", "n": ' + b"9" * 5000 + b"}")
def test_a_line_is_what_python_says(line: bytes) -> None:
    expected = judge(line)
    document = parse_line(line + b"\n", "line 1")
    assert (document.text if not document.reason else None) == expected
    assert bool(document.reason) == (expected is None)
    assert document.raw == line
