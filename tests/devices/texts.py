"""Texts on which tokenizers differ: spaces, bytes, scripts, joined marks, digits, control tokens, long repetitions."""

HARD_TEXTS = (
    "", " ", "  ", "   ", "       x", "x ", "x  ", "\n", "\n\n", "\t", " \n ", "\r\n", "a\u00a0b", "\u2581", "a\u2581b",
    "the quick brown fox", " the", "The function returns None.", "def f(x):\n    return x\n", "if a:\n\tpass\n\n\n",
    "1234567890", "3.14159e-10", "0x1F", "1,000,000", "12 34", "\u0661\u0662\u0663", "naïve café", "ﬁ ligature",
    "e\u0301 and \u00e9", "Ünïcödé", "Привет, мир", "שלום", "مرحبا بالعالم", "你好世界", "日本語テキスト",
    "한국어", "ไทย", "नमस्ते",
    "🙂", "👨‍👩‍👧‍👦 family", "🇩🇪🇫🇷", "a\u200bb", "\ufeffstart", "\u202eright", "\x00\x01\x7f", "\U0010ffff",
    "</s>", "a</s>b", "<s>x", "<unk> <0x41>", "</s", "aaaaaaaaaaaaaaaa" * 8, "=" * 50 + "\n" + "-" * 33,
    "https://example.org/a?b=c&d=%20#e", "C:\\path\\file", "{\"key\": [1, 2.5, null]}", "<|user|>\nHi<|end|>",
    "  x" * 20,
)  # fmt: skip
