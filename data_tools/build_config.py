"""What `run` and `fetch` read from a YAML file such as data_tools/amber.yaml."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_tools.dataset.format import AMBER_SOURCES, MAX_SOURCES, NUM_SEGMENTS, ROW_LENGTH, SEED, SOURCE_NAME
from data_tools.files.errors import DataError
from data_tools.files.strict_yaml import NotYaml, read_yaml


class Published(BaseModel):
    """Where the published segments and their tokenizer are."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    address: str
    tokenizer: str


class BuildConfig(BaseModel):
    """A whole build; paths are relative to the command's --input."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    tokenizer: Path
    row_length: int = Field(ROW_LENGTH, ge=2, strict=True)
    num_segments: int = Field(NUM_SEGMENTS, ge=1, strict=True)
    held_out_per_source: int = Field(0, ge=0, strict=True)
    seed: int = Field(SEED, ge=0, strict=True)
    direct: bool = Field(True, strict=True)
    sources: dict[str, Path]
    published: Published | None = None

    @field_validator("sources")
    @classmethod
    def _named_sources(cls, sources: dict[str, Path]) -> dict[str, Path]:
        if bad := [name for name in sources if not SOURCE_NAME.fullmatch(name)]:
            raise ValueError(f"{bad[0]!r} is no source's name: 1 to 64 letters, digits, _ . + -")
        if not 1 <= len(sources) <= MAX_SOURCES:
            raise ValueError(f"{len(sources)} sources; a data set has 1 to {MAX_SOURCES}")
        return sources

    @property
    def source_names(self) -> tuple[str, ...]:
        """The data set's list of sources: the names under `sources` in the order in which they stand there.

        A selection of Amber's keeps Amber's whole list and order, so that a source has one code in all of them.
        """
        names = tuple(self.sources)
        return AMBER_SOURCES if set(names) <= set(AMBER_SOURCES) else names


def read_config(path: Path) -> BuildConfig:
    """Reads and checks a configuration.

    Raises:
        DataError: missing file, not YAML, an unknown key, or a value that does not fit.
    """
    remedy = "compare it with data_tools/amber.yaml"
    try:
        return BuildConfig.model_validate(read_yaml(path))
    except FileNotFoundError:
        raise DataError("no such file", file=path, remedy="name a YAML file with --config") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(first["msg"], file=path, place=place, remedy=remedy) from None
    except NotYaml as error:
        raise DataError(f"not YAML: {error}", file=path, remedy=remedy) from None
