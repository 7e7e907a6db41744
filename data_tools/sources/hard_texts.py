"""Texts on which tokenizers differ that agree on all others: what a sample of a source seldom holds."""

from __future__ import annotations

from collections.abc import Iterator

_WHITE = (
    *(" ", "  ", "\t", "\n", "\r\n", "\n\n", "\x0b", "\x0c", "\x85", "\u00a0", "\u200b", "\u2028", "\u3000"),
    *("\u2581", "\ufeff"),
)
_ODD = (
    *("", "\0", "a\0b", "\x01\x1f\x7f", "e\u0301 \u00e9 \u0301", "\u1e9b\u0323", "\ufb01 \uff21\uff11 \u2460 \u00bd"),
    *("\u212b \u00c5", "\u0130\u0131 \u1e9e \u00df", "\u05e9\u05dc\u05d5\u05dd \u200f\u0645\u0631\u062d\u0628\u0627"),
    *(
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "\ud55c\uae00 \u1112\u1161\u11ab",
    ),
    *("\u4e2d\u6587\u3002\u65e5\u672c\u8a9e\u30ab\u3099", "\U0001f468\u200d\U0001f469\u200d\U0001f467"),
    *("\U0001f1e9\U0001f1ea\u2764\ufe0f", "\ud7ff\ue000\ufffd\uffff\U00010000\U0010ffff", "\u0661\u0662"),
    *("1234567890 3.14 1,000", "<0x41> <0x0A> <0xFF>", "a<0x0A>b", "<s", "/s>", "<s >", "<unk", "<pad>", "<sep>"),
    *("<|endoftext|>", "[CLS][SEP][PAD][MASK]", "don't I'LL we've", "snake_case camelCase kebab-case HTTPServer2"),
    *("a.b..c...d", "\"'`\u2018\u2019\u201c\u201d\u2013\u2014\u2026", "def f(x):\n    return x\n\n\nclass A:\n\tpass"),
    *("x = [1,2,  3]\n\n# end", "\\n \\t \\u0041 %20 &amp; {{}}", "https://a.b/c?d=e&f=%C3%A9#g"),
)


def around(content: str) -> Iterator[str]:
    """A token's name in the places where tokenizers treat it differently: alone, in and between words, by spaces."""
    yield from (content, f" {content}", f"{content} ", f"  {content}  ", f"a{content}b", f"a {content} b")
    yield from (
        content + content,
        f"{content}\n{content}",
        content[:-1],
        content + "s",
        content.upper(),
        f"a.{content},b",
    )


_LENGTHS = (*range(2, 20), 31, 32, 33, 64, 65)
HARD_TEXTS = (
    *_ODD,
    *_WHITE,
    *(before + "a" + after for before in _WHITE for after in ("", *_WHITE)),
    *(character * count for character in "a -=_.#0\n\t\u2581/<\u00e9\u4e2d" for count in _LENGTHS),
)
