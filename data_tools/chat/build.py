"""Conversations -> packed rows with their marks: the fixed-row data set of `dataset/format.py` and two files more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_tools.chat.parts import Reading, read_parts
from data_tools.chat.rows import SOURCES, ChatOptions, chosen_rows, gathered, write_all
from data_tools.chat.template import ChatTokenizer
from data_tools.dataset.format import (
    CHAT_TEMPLATE_NAME,
    MANIFEST_NAME,
    DatasetManifest,
    TokenizerRecord,
    segment_name,
    tokenizer_name,
)
from data_tools.dataset.segment_files import DatasetPlan, finished_segment, keep_tokenizer, write_dataset_manifest
from data_tools.files.digest import sha256_file
from data_tools.files.durable import folder_lock, write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import content_digest
from data_tools.sources.text_encoder import read_vocab_size


def build(
    path: Path,
    output: Path,
    tokenizer: Path,
    template: Path,
    options: ChatOptions,
    *,
    vocab_size: int | None,
    policy: ErrorPolicy,
    workers: int,
) -> DatasetManifest:
    """Builds the data set `output` from the conversations under `path`; the bytes do not depend on `workers`.

    Raises:
        DataError: tokenizer or template cannot be used; whatever `read_parts` raises; no conversation is left to train
            on; `output` was built from other input or with other options.
        FolderBusy: another process writes `output`.
    """
    judged = ChatTokenizer(tokenizer, template, vocab_size)
    record = TokenizerRecord(tokenizer_name(tokenizer), sha256_file(tokenizer), read_vocab_size(tokenizer))
    made_by = {"tokenizer": record.sha256, "template": judged.template_sha256, "vocab_size": judged.vocab_size}
    with folder_lock(output):
        keep_tokenizer(tokenizer, output)
        parts = read_parts(path, output, Reading(tokenizer, template, judged.vocab_size, made_by, policy, workers))
        source = {
            **made_by,
            "parts": content_digest({"parts": [[part.file, part.digest] for part in parts]}),
            **options.source,
        }
        plan = DatasetPlan(
            1, options.row_length, judged.vocab_size, record, has_held_out=options.held_out_rows > 0, sources=SOURCES
        )
        base = output / segment_name(0)
        manifest = output / MANIFEST_NAME
        if manifest.is_file():
            _refuse_other_files(manifest, [part.file for part in parts])
        if finished_segment(base, plan, source) is not None and manifest.is_file():
            return DatasetManifest.read(manifest)
        write_whole(output / CHAT_TEMPLATE_NAME, judged.template.encode())
        parted = chosen_rows(gathered(parts, options), options, path)
        rejected = sum(part.rejected for part in parts)
        counted = write_all(output, parted, plan, rejected, source)
        chat = parted.record(judged, counted, [part.file for part in parts])
        return write_dataset_manifest(output, replace(plan, chat=chat))


def _refuse_other_files(manifest: Path, files: list[str]) -> None:
    """Raises DataError where a file came or went since the data set was finished; its parts may be gone by then."""
    chat = DatasetManifest.read(manifest).chat
    if chat is not None and (odd := sorted(set(chat.files) ^ set(files))):
        raise DataError(
            "made from other files: "
            + ", ".join(f"{file!a} is {'new' if file in files else 'not there any more'}" for file in odd[:5]),
            file=manifest,
            remedy="bring the files back as they were, or use another --output, or remove the folder",
        )
