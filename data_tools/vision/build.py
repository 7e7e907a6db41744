"""Conversations about images -> packed rows with their marks, and the images that they point to, in shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from data_tools.chat.rows import SOURCES, ChatOptions, chosen_rows, gathered, write_all
from data_tools.dataset.format import (
    CHAT_TEMPLATE_NAME,
    MANIFEST_NAME,
    DatasetManifest,
    TokenizerRecord,
    segment_name,
    tokenizer_name,
)
from data_tools.dataset.images import IMAGES_INDEX_NAME, ImagesRecord, images_per_row
from data_tools.dataset.segment_files import DatasetPlan, finished_segment, keep_tokenizer, write_dataset_manifest
from data_tools.files.digest import digest_file, sha256_file
from data_tools.files.durable import folder_lock, write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import content_digest
from data_tools.sources.text_encoder import read_vocab_size
from data_tools.vision.parts import Part, Reading, read_parts
from data_tools.vision.placeholders import ImageTokenizer


def build(
    file: Path,
    images: Path,
    output: Path,
    tokenizer: Path,
    template: Path,
    options: ChatOptions,
    *,
    placeholder: str,
    tokens: int,
    vocab_size: int | None,
    policy: ErrorPolicy,
    workers: int,
) -> DatasetManifest:
    """Builds the data set `output`; its bytes do not depend on `workers`.

    Args:
        file: the conversations; `images` the folder below which their images lie.
        tokens: what the encoder makes of one image, and so the placeholders that stand for it.

    Raises:
        DataError: tokenizer or template cannot be used; an image does not fit into a row; whatever `read_parts` raises;
            no conversation is left to train on; `output` was built from other input or with other options.
        FolderBusy: another process writes `output`.
    """
    if tokens >= options.row_length:
        raise DataError(
            f"an image of {tokens} tokens fits into no row of {options.row_length} ids",
            file="--image-tokens",
            remedy="raise --row-length, or use an encoder of larger patches or a pixel shuffle",
        )
    if not images.is_dir():
        raise DataError("no such folder", file=images, remedy="name the one that the images' paths begin in")
    judged = ImageTokenizer(tokenizer, template, vocab_size, placeholder, tokens)
    chat = judged.chat
    record = TokenizerRecord(tokenizer_name(tokenizer), sha256_file(tokenizer), read_vocab_size(tokenizer))
    made_by = {
        "tokenizer": record.sha256,
        "template": chat.template_sha256,
        "vocab_size": chat.vocab_size,
        "placeholder": placeholder,
        "tokens": tokens,
    }
    reading = Reading(file, images, tokenizer, template, chat.vocab_size, placeholder, tokens, made_by, policy, workers)
    with folder_lock(output):
        keep_tokenizer(tokenizer, output)
        parts = read_parts(output, reading)
        source = {
            **made_by,
            "parts": content_digest({"parts": [[part.digest, part.shard.digest] for part in parts]}),
            **options.source,
        }
        plan = DatasetPlan(
            1,
            options.row_length,
            chat.vocab_size,
            record,
            has_held_out=options.held_out_rows > 0,
            sources=SOURCES,
            images=_write_index(output, parts, judged, options.row_length, file),
        )
        if finished_segment(output / segment_name(0), plan, source) is not None and (output / MANIFEST_NAME).is_file():
            return DatasetManifest.read(output / MANIFEST_NAME)
        write_whole(output / CHAT_TEMPLATE_NAME, chat.template.encode())
        conversations = gathered(parts, options, _images_of(parts), judged.placeholder_id)
        rows = chosen_rows(conversations, options, file)
        counted = write_all(output, rows, plan, sum(part.rejected for part in parts), source)
        said = rows.record(chat, counted, [file.name])
        return write_dataset_manifest(output, replace(plan, chat=said))


def _write_index(output: Path, parts: list[Part], judged: ImageTokenizer, row_length: int, file: Path) -> ImagesRecord:
    places = np.concatenate([part.places for part in parts]) if parts else np.zeros(0)
    if not len(places):
        raise DataError(
            "no conversation with an image that can be read",
            file=file,
            remedy="use data_tools/build_chat.py for conversations of text alone",
        )
    path = output / IMAGES_INDEX_NAME
    write_whole(path, places.tobytes())
    return ImagesRecord(
        count=len(places),
        tokens=judged.tokens,
        placeholder_id=judged.placeholder_id,
        placeholder=judged.placeholder,
        per_row=images_per_row(row_length, judged.tokens),
        index_digest=digest_file(path),
        shards=[part.shard for part in parts],
    )


def _images_of(parts: list[Part]) -> list[np.ndarray]:
    """Of each conversation of all parts the numbers of its images."""
    numbers = np.concatenate([part.images for part in parts])
    ends = np.cumsum(np.concatenate([part.image_counts for part in parts]))
    return np.split(numbers, ends[:-1])
