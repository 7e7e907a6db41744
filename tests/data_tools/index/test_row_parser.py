"""Every kernel of the C++ core accepts what JSON allows, refuses all else with its column, and agrees with Python."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.dataset.format import AMBER_SOURCES
from data_tools.index._core import SLACK_BYTES, SLACK_IDS, RowParser, kernels
from tests.data_tools.slow_row import slow_row

ROW_LENGTH, VOCAB = 37, 32000
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "2500"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def parse(text: bytes, kernel: str, row_length: int = ROW_LENGTH, vocab_size: int = VOCAB):
    """Parses whole lines: ((ids, codes), (lines, column, reason))."""
    capacity = text.count(b"\n")
    ids = np.full(capacity * row_length + SLACK_IDS, 77, dtype="<u2")
    codes = np.full(capacity, 77, dtype=np.uint8)
    # The slack holds digits, as it would in a buffer that is used again.
    parser = RowParser(row_length, vocab_size, list(AMBER_SOURCES), kernel)
    rows, consumed, lines, column, reason = parser.parse(bytearray(text + b"1" * SLACK_BYTES), 0, len(text), ids, codes)
    assert bool(column) == bool(reason) == (consumed < len(text))
    return (ids[: rows * row_length].reshape(rows, row_length).tolist(), codes[:rows].tolist()), (lines, column, reason)


def line_of(ids: list[int], source: str = "book") -> bytes:
    return json.dumps({"token_ids": ids, "source": source}).encode()


def some_ids(seed: int = 0, count: int = ROW_LENGTH) -> list[int]:
    """Ids of all numbers of digits."""
    random = np.random.RandomState(seed)
    return np.minimum(10 ** (random.random_sample(count) * 4.6), VOCAB - 1).astype(int).tolist()


@pytest.mark.parametrize("kernel", kernels())
def test_rows_of_the_true_length_come_back(kernel: str) -> None:
    rows = [some_ids(seed, 2049) for seed in range(8)]
    rows += [[0] * 2049, [9] * 2049, [10] * 2049, [31999] * 2049]
    text = b"".join(line_of(ids, AMBER_SOURCES[i % 7]) + b"\n" for i, ids in enumerate(rows))
    (ids, codes), fault = parse(text, kernel, 2049)
    assert fault == (len(rows), 0, "")
    assert ids == rows
    assert codes == [i % 7 for i in range(len(rows))]


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("size", range(1, 140))
def test_an_array_may_end_anywhere_in_a_block(kernel: str, size: int) -> None:
    ids = some_ids(size, size)
    assert parse(line_of(ids) + b"\n", kernel, size) == (([ids], [1]), (1, 0, ""))


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize(
    "line",
    [
        b'{"source": "book", "token_ids": [1, 22, 333]}',
        b'{"token_ids":[1,22,333],"source":"book"}',
        b' {\t"token_ids" :\r[ 1 ,22, 333 ] , "source" : "book" } \r',
        b'{"token_ids": [1, 22, 333], "source": "\\u0062oo\\u006b"}',
        b'{"\\u0074oken_ids": [1, 22, 333], "source": "book"}',
    ],
)
def test_any_layout_that_json_allows_is_read(kernel: str, line: bytes) -> None:
    assert parse(line + b"\n\n  \r\n" + line + b"\n", kernel, 3) == (([[1, 22, 333]] * 2, [1, 1]), (4, 0, ""))


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize(
    ("line", "column", "reason"),
    [
        (b"", 0, ""),
        (b"[]", 1, "expected '{'"),
        (b'\xef\xbb\xbf{"token_ids": [1, 2, 3], "source": "book"}', 1, "a byte order mark (save it as UTF-8 without)"),
        (b'{"token_ids": [1, 2], "source": "book"}', 20, "2 ids, expected 3"),
        (b'{"token_ids": [1, 2, 3, 4], "source": "book"}', 26, "4 ids, expected 3"),
        (b'{"token_ids": [], "source": "book"}', 16, "0 ids, expected 3"),
        (b'{"token_ids": [1, 2, 32000], "source": "book"}', 22, "an id that is not below 32000"),
        (b'{"token_ids": [1, 2, 4294967297], "source": "book"}', 22, "an id that is not below 32000"),
        (b'{"token_ids": [1, 2, 18446744073709551617], "source": "book"}', 22, "an id that is not below 32000"),
        (b'{"token_ids": [1, 02, 3], "source": "book"}', 19, "a number with a leading zero"),
        (b'{"token_ids": [00, 2, 3], "source": "book"}', 16, "a number with a leading zero"),
        (b'{"token_ids": [1, -2, 3], "source": "book"}', 19, "expected an id (an integer without sign)"),
        (b'{"token_ids": [1, 2.0, 3], "source": "book"}', 20, "an id is not an integer"),
        (b'{"token_ids": [1, 2e0, 3], "source": "book"}', 20, "an id is not an integer"),
        (b'{"token_ids": [1, s29898, 3], "source": "book"}', 19, "expected an id (an integer without sign)"),
        (b'{"token_ids": [1, null, 3], "source": "book"}', 19, "expected an id (an integer without sign)"),
        (b'{"token_ids": [1, 2, 3,], "source": "book"}', 24, "expected an id (an integer without sign)"),
        (b'{"token_ids": [1,, 2, 3], "source": "book"}', 18, "expected an id (an integer without sign)"),
        (b'{"token_ids": [1 2, 3], "source": "book"}', 18, "expected ',' or ']'"),
        (b'{"token_ids": [1, 2, 3], "source": "github"}', 36, "an unknown source"),
        (b'{"token_ids": [1, 2, 3], "source": "Book"}', 36, "an unknown source"),
        (b'{"token_ids": [1, 2, 3], "source": "book\\u0000"}', 36, "an unknown source"),
        (b'{"token_ids": [1, 2, 3], "source": null}', 36, "expected '\"'"),
        (b'{"token_ids": [1, 2, 3]}', 25, "no key source"),
        (b'{"source": "book"}', 19, "no key token_ids"),
        (b'{"token_ids": [1, 2, 3], "source": "book", "source": "c4"}', 44, "a key stands twice"),
        (b'{"token_ids": [1, 2, 3], "source": "book", "id": 1}', 44, "a key other than token_ids and source"),
        (b'{"token_ids": [1, 2, 3], "source": "book"', 42, "expected ',' or '}', but the line ends"),
        (b'{"token_ids": [1, 2, 3', 23, "expected ',' or ']', but the line ends"),
        (b'{"token_ids": [1, 2, 3], "source": "book"}}', 43, "something after the closing '}'"),
        (b'{"token_ids": [1, 2, 3], "source": "book"}\x00', 43, "something after the closing '}'"),
        (b'{"token_ids": [1, 2, 3], "source": "bo\tok"}', 39, "a control character in a string"),
    ],
)
def test_a_fault_is_named_with_its_column(kernel: str, line: bytes, column: int, reason: str) -> None:
    good = b'{"token_ids": [1, 2, 3], "source": "book"}\n'
    (ids, _), fault = parse(good + line + b"\n" + good, kernel, 3)
    assert fault == ((1, column, reason) if reason else (3, 0, ""))
    assert len(ids) == (1 if reason else 2)


@pytest.mark.parametrize("kernel", kernels())
def test_buffers_that_do_not_fit_are_refused(kernel: str) -> None:
    parser = RowParser(3, 10, list(AMBER_SOURCES), kernel)
    ids, codes = np.zeros(3 + SLACK_IDS, "<u2"), np.zeros(1, np.uint8)
    line = b'{"token_ids": [1, 2, 3], "source": "book"}\n'
    with pytest.raises(ValueError, match="slack"):
        parser.parse(bytearray(line), 0, len(line), ids, codes)
    with pytest.raises(ValueError, match="newline"):
        parser.parse(bytearray(line + bytes(64)), 0, len(line) - 1, ids, codes)
    with pytest.raises(ValueError, match="no room"):
        parser.parse(bytearray(line + bytes(64)), 0, len(line), ids[:-1], codes)


@pytest.mark.parametrize("codes", [[0, 1, 2], [6, 6, 0]])
def test_lines_are_those_of_json_dumps(codes: list[int]) -> None:
    rows = [some_ids(seed) for seed in range(2)] + [[0, 65535, 10000] + [7] * (ROW_LENGTH - 3)]
    text = RowParser(ROW_LENGTH, 65536, list(AMBER_SOURCES)).format(np.array(rows, "<u2"), np.array(codes, np.uint8))
    assert text == b"".join(line_of(ids, AMBER_SOURCES[code]) + b"\n" for ids, code in zip(rows, codes, strict=True))


MUTATIONS = [
    *(b"", b"0", b"9", b"00", b"32000", b"99999", b"100000", b"-1", b"1.5", b"1e3", b",", b", ", b" ", b"  ", b"]"),
    *(b"[", b"}", b"{", b'"', b"\\", b"\x00", b"\xff", b"\t", b"\r", b"/", b":", b";", b"null", b'"source"'),
    *(b'"token_ids"', b"s29898", b"\xc3\xa9"),
]


@st.composite
def mutated_lines(draw: st.DrawFn) -> bytes:
    """A line of json.dumps, compact or shuffled, with up to three pieces cut, inserted, replaced or copied."""
    ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=ROW_LENGTH - 1, max_size=ROW_LENGTH + 1))
    if draw(st.integers(0, 3)):
        ids = (ids * 2)[:ROW_LENGTH]
    source = draw(st.sampled_from(AMBER_SOURCES))
    separators = draw(st.sampled_from([(", ", ": "), (", ", ": "), (", ", ": "), (",", ":")]))
    line = json.dumps({"token_ids": ids, "source": source}, separators=separators).encode()
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(line)))
        stop = min(len(line), start + draw(st.integers(0, 7)))
        piece = draw(st.one_of(st.sampled_from(MUTATIONS), st.binary(max_size=3), st.just(line[start:stop] * 2)))
        line = line[:start] + piece.replace(b"\n", b" ") + line[stop:]
    return line


@FUZZ
@given(mutated_lines())
def test_mutated_lines_are_judged_as_python_judges_them(line: bytes) -> None:
    expected = slow_row(line, ROW_LENGTH, VOCAB, AMBER_SOURCES)
    results = {}
    for kernel in kernels():
        rows, (_, column, reason) = parse(line + b"\n", kernel)
        results[kernel] = (rows, column, reason)
        if not line.strip(b" \t\r"):
            assert (rows, column) == (([], []), 0)
        elif expected is None:
            assert column and reason and not rows[0], (kernel, line)
            assert column <= len(line) + 1
        else:
            assert not column, (kernel, line, reason)
            assert (rows[0][0], AMBER_SOURCES[rows[1][0]]) == expected, kernel
    assert len({str(result) for result in results.values()}) == 1


def test_any_byte_of_an_array_may_be_wrong() -> None:
    line = line_of(some_ids(3))
    start, stop = line.index(b"[") + 1, line.index(b"]") + 1
    changed = {
        line[:at] + piece + line[at + cut :]
        for at in range(start, stop)
        for piece in (b"", b"0", b"1", b"9", b",", b" ", b", ", b", 0", b"]", b"-", b"/", b":", b"!")
        for cut in (0, 1, 2)
    }
    good = line + b"\n"
    for bad in sorted(changed):
        expected = slow_row(bad, ROW_LENGTH, VOCAB, AMBER_SOURCES)
        for kernel in kernels():
            (ids, _), (_, column, _) = parse(good + bad + b"\n" + good, kernel)
            assert (column == 0) == (expected is not None), (kernel, bad)
            assert expected is None or ids[1] == expected[0], (kernel, bad)


@FUZZ
@given(st.lists(st.sampled_from([b"1", b"0", b"9", b"12345", b", ", b", ", b",", b" ", b"]", b"1, 2, 3"]), max_size=60))
def test_arrays_of_separators_and_digits_are_judged_alike(pieces: list[bytes]) -> None:
    line = b'{"token_ids": [' + b"".join(pieces) + b'], "source": "c4"}'
    for row_length in (1, 4, ROW_LENGTH):
        expected = slow_row(line, row_length, VOCAB, AMBER_SOURCES)
        for kernel in kernels():
            rows, (_, column, _) = parse(line + b"\n", kernel, row_length)
            assert (column == 0) == (expected is not None), (kernel, line)
            if expected is not None:
                assert rows == ([expected[0]], [2])
