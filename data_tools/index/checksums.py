"""Lists of checksums: the forms in which `sha256sum`, BSD's tools and `openssl` write them."""

from __future__ import annotations

import re
from pathlib import Path

from data_tools.files.errors import DataError

_SHA256 = r"(?P<digest>[0-9a-fA-F]{64})"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"\\?{_SHA256} [ *](?P<name>.+)",  # sha256sum; the backslash says that the name's are doubled
        rf"{_SHA256}\s+(?P<name>.+)",  # written by hand, with a tab or one space
        rf"SHA(2-)?256 ?\((?P<name>.+)\) ?= ?{_SHA256}",  # sha256 of BSD, sha256sum --tag; openssl dgst
    )
)
_ALONE = re.compile(_SHA256)
_OTHER = re.compile(
    r"\\?([0-9a-fA-F]{32,128})\s.*|(MD5|SHA1|SHA(2-)?(224|384|512)|BLAKE2\w*|RMD160)\b.*", re.IGNORECASE
)


def read_checksums(path: Path) -> dict[str, str]:
    """SHA-256 in small letters by file name; folders before a name do not count.

    Raises:
        DataError: the file is empty or cannot be read as text, a line is none of the forms, or one name has two.
    """
    remedy = "write it as sha256sum does: sha256sum train_*.jsonl tokenizer.json > FILE"
    found: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not a list of checksums: {error}", file=path, remedy=remedy) from None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith(("#", ";")):
            continue
        match = next(filter(None, (form.fullmatch(line) for form in _FORMS)), None)
        if match is None and _ALONE.fullmatch(line) and path.suffix == ".sha256":  # beside the file that it is of
            name, digest = path.stem, line
        elif match is None:
            other = "a checksum of another kind" if _OTHER.fullmatch(line) else "no checksum and name"
            raise DataError(f"{other}: only SHA-256 is compared", file=path, place=f"line {number}", remedy=remedy)
        else:
            name, digest = Path(match["name"]).name, match["digest"]
        if found.setdefault(name, digest.lower()) != digest.lower():
            raise DataError(f"{name} has two checksums", file=path, place=f"line {number}", remedy="keep the right one")
    if not found:
        raise DataError("lists nothing", file=path, remedy=remedy)
    return found
