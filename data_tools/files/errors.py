"""What every data tool raises where data cannot be used, and what it does about a bad document or row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Data that cannot be used: says which file, which place in it, and what to do."""

    def __init__(self, message: str, *, file: Path | str, place: str = "", remedy: str = "") -> None:
        self.message, self.file, self.place, self.remedy = message, str(file), place, remedy
        where = f"{file}: {place}" if place else str(file)
        super().__init__(f"{where}: {message}" + (f"\n  remedy: {remedy}" if remedy else ""))

    def __reduce__(self) -> tuple[Any, ...]:  # keyword-only arguments do not survive pickling between processes
        return _rebuild_data_error, (self.message, self.file, self.place, self.remedy)


def _rebuild_data_error(message: str, file: str, place: str, remedy: str) -> DataError:
    return DataError(message, file=file, place=place, remedy=remedy)


@dataclass(frozen=True)
class ErrorPolicy:
    """About bad documents or rows: stop at the first, or set up to `max_rejected` of a source or segment aside."""

    quarantine: bool = False
    max_rejected: int = 100

    def set_aside(self, count: int, what: str, reason: str, *, file: Path, place: str, mend: str, look: str) -> None:
        """One more is bad, the `count`-th; the remedies are `mend` for itself and `look` where there are many.

        Raises:
            DataError: none is to be set aside, or not so many `what` (documents, conversations).
        """
        if not self.quarantine:
            remedy = f"{mend} aside with --on-error quarantine"
            raise DataError(reason, file=file, place=place, remedy=remedy)
        if count > self.max_rejected:
            raise DataError(
                f"more than {self.max_rejected} bad {what}, the last: {reason}",
                file=file,
                place=place,
                remedy=f"{look}, or raise --max-rejected",
            )
