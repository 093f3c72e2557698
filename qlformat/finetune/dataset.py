"""Training data: load rows from a file or the Hub, tokenize them with their loss masks, and show one.

rows = load_rows("chats.jsonl")
data, stats = tokenize(rows, tokenizer, 1024, packing=True)     # a datasets.Dataset for TRL's SFTTrainer
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qlformat.errors import shown
from qlformat.finetune import formats
from qlformat.finetune.files import RawRow, read_raw
from qlformat.finetune.hub_rows import HubRows, open_dataset
from qlformat.finetune.masking import IGNORED, tokenize_rendered
from qlformat.finetune.packing import pack
from qlformat.finetune.rendering import Renderer
from qlformat.finetune.rows import BadRow, DataError, DataFile, Place, Row, RowError, Rows
from qlformat.hashing import hash_file

if TYPE_CHECKING:
    import datasets

_BATCH = 256
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Stats:
    """What became of the rows.

    Attributes:
        lengths: tokens of every usable row before anything was cut, int64 [rows].
        seq_len: the longest sequence.
        sequences: what is trained on: packed sequences, or rows.
        tokens, trained_tokens: in those sequences, and of these the ones with a label.
        truncated_rows: rows that lost their end; `lost_tokens` is what they lost.
        split_rows: rows of plain text that were cut into pieces, without a loss.
        dropped_rows: rows left out because nothing to train on was left of them after the cut.
        skipped: malformed rows left out while tokenizing.
        notes: what the user should know, in sentences.
        longest: tokens of the longest sequence.
    """

    lengths: npt.NDArray[np.int64]
    seq_len: int
    sequences: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    lost_tokens: int
    split_rows: int
    dropped_rows: int
    skipped: list[BadRow] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    longest: int = 0

    @property
    def truncated_share(self) -> float:
        """Share of the rows that lost their end."""
        return self.truncated_rows / len(self.lengths)

    @property
    def fill(self) -> float:
        """Share of the places in all sequences of full length that hold a token."""
        return self.tokens / (self.sequences * self.seq_len)

    def as_dict(self) -> Mapping[str, Any]:
        """For `--json`: counts, and the lengths by their quantiles."""
        points = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
        return {
            "seq_len": self.seq_len,
            "sequences": self.sequences,
            "longest": self.longest,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "lengths": {name: int(np.percentile(self.lengths, q, method="higher")) for name, q in points.items()},
            "truncated_rows": self.truncated_rows,
            "truncated_share": self.truncated_share,
            "lost_tokens": self.lost_tokens,
            "split_rows": self.split_rows,
            "dropped_rows": self.dropped_rows,
            "skipped_rows": len(self.skipped),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Example:
    """One row as the model sees it: pieces of text, each trained or not; joined they are all of it."""

    place: Place
    tokens: int
    trained_tokens: int
    pieces: list[tuple[str, bool]]


def load_rows(spec: str | Path, *, split: str | None = None, skip_bad: bool = False) -> Rows:
    """Read training data and recognise its format.

    Args:
        spec: a JSONL, JSON, CSV or Parquet file, or a dataset on the Hub: ORG/NAME[@revision][:split].
        split: split of a Hub dataset; "train" by default.
        skip_bad: leave malformed rows out and list them in `skipped`, instead of refusing the data.

    Raises:
        DataError: the data cannot be read, holds no rows, has an unknown format, or a row is malformed.
    """
    path = Path(spec)
    if path.exists():
        size, digest = hash_file(path) if path.is_file() else (0, "")
        files = (DataFile(path.name, size, digest),)
        name, rows, places, skipped = _usable(str(spec), read_raw(path), skip_bad)
        return Rows(str(spec), name, rows, places, skipped, skip_bad, files)
    source = open_dataset(str(spec), split)
    name, rows, places, skipped = _usable(str(spec), _from_hub(source), skip_bad)
    return Rows(
        str(spec), name, rows, places, skipped, skip_bad,
        repo_id=source.repo_id, revision=source.revision, split=source.split,
    )  # fmt: skip


def _from_hub(source: HubRows) -> Iterator[RawRow]:
    return ((Place(source.name, number, "row"), row) for number, row in enumerate(source.rows, 1))


def _usable(spec: str, raws: Iterable[RawRow], skip_bad: bool) -> tuple[str, list[Row], list[Place], list[BadRow]]:
    """(format, rows, places, malformed rows); the first row with known columns decides on the format."""
    name: str | None = None
    rows: list[Row] = []
    places: list[Place] = []
    skipped: list[BadRow] = []
    for place, raw in raws:
        try:
            if isinstance(raw, RowError):
                raise raw
            if name is None and isinstance(raw, dict):
                name = formats.recognise(raw)
            if name is None:
                columns = ", ".join(map(str, raw)) if isinstance(raw, dict) else shown(raw)
                raise RowError(f"found {shown(columns)}, needed the columns of one format: {formats.needed()}")
            rows.append(formats.normalise(name, raw))
            places.append(place)
        except RowError as error:
            skipped.append(BadRow(place, str(error)))
            if not skip_bad:
                raise DataError.of_row(skipped[-1]) from None
    if name is None or not rows:
        why = f"all {len(skipped)} rows are malformed; the first: {skipped[0].message}" if skipped else "found no rows"
        raise DataError(f"{why}; give data with rows to train on", file=spec)
    return name, rows, places, skipped


def tokenize(rows: Rows, tokenizer: Any, seq_len: int, *, packing: bool) -> tuple[datasets.Dataset, Stats]:
    """Render and tokenize rows, mask what is not trained, and cut or pack them to `seq_len` tokens.

    Rows of plain text that are too long are cut into pieces; others lose their end.

    Args:
        rows: from `load_rows`.
        tokenizer: of the base; a chat needs its chat template.
        seq_len: the longest sequence, in tokens.
        packing: put several rows into one sequence, without letting them see each other.

    Returns:
        A dataset in memory with the columns input_ids and labels (IGNORED where not trained) and, when packed,
        seq_lengths, from which TRL's padding-free collator makes the position ids; and what became of the rows.

    Raises:
        DataError: a chat without a chat template, a row that the template refuses, or nothing left to train on.
    """
    renderer = Renderer(tokenizer)
    skipped: list[BadRow] = []
    kept: list[tuple[Tokens, Tokens]] = []
    lengths: list[int] = []
    truncated = lost = cut_rows = dropped = 0
    for row, (ids, labels) in _token_rows(rows, renderer, skipped):
        lengths.append(len(ids))
        pieces = [(ids, labels)]
        if len(ids) > seq_len:
            if "text" in row:
                pieces, cut_rows = _pieces(ids, labels, seq_len), cut_rows + 1
            else:
                pieces, truncated, lost = [(ids[:seq_len], labels[:seq_len])], truncated + 1, lost + len(ids) - seq_len
        useful = [piece for piece in pieces if (piece[1] != IGNORED).any()]
        dropped += not useful
        kept += useful
    if not kept:
        raise DataError(
            f"no row has anything to train on within {seq_len} tokens ({dropped} dropped, {len(skipped)} skipped); "
            "give a longer --seq-len or other data",
            file=rows.name,
        )
    groups = pack([len(ids) for ids, _ in kept], seq_len) if packing else [[index] for index in range(len(kept))]
    stats = Stats(
        np.array(lengths, np.int64), seq_len, len(groups), sum(len(ids) for ids, _ in kept),
        sum(int((labels != IGNORED).sum()) for _, labels in kept), truncated, lost, cut_rows, dropped, skipped,
        tuple(sorted(renderer.notes)), max(sum(len(kept[index][0]) for index in group) for group in groups),
    )  # fmt: skip
    return _dataset(kept, groups, packing), stats


def preview(rows: Rows, tokenizer: Any, index: int = 0) -> Example:
    """The row `index` as the model sees it, its trained tokens told apart; made from the labels themselves.

    Raises:
        DataError: as for `tokenize`.
    """
    chosen = rows.select([index])
    ids, labels = next(pair for _, pair in _token_rows(chosen, Renderer(tokenizer), []))
    trained = labels != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    pieces = [
        (str(tokenizer.decode(ids[begin:end].tolist(), clean_up_tokenization_spaces=False)), bool(trained[begin]))
        for begin, end in pairwise(edges)
    ]
    return Example(chosen.places[0], len(ids), int(trained.sum()), pieces)


def _token_rows(rows: Rows, renderer: Renderer, skipped: list[BadRow]) -> Iterator[tuple[Row, tuple[Tokens, Tokens]]]:
    """(row, (input_ids, labels)) of every row that can be rendered."""
    for start in range(0, len(rows), _BATCH):
        batch, rendered = [], []
        for index in range(start, min(start + _BATCH, len(rows))):
            try:
                rendered.append(renderer.render(rows.rows[index]))
                batch.append(rows.rows[index])
            except RowError as error:
                skipped.append(BadRow(rows.places[index], str(error)))
                if not rows.skip_bad:
                    raise DataError.of_row(skipped[-1]) from None
        yield from zip(batch, tokenize_rendered(renderer.tokenizer, rendered), strict=True)


def _pieces(ids: Tokens, labels: Tokens, size: int) -> list[tuple[Tokens, Tokens]]:
    """A row in pieces; nothing predicts the first token of a piece."""
    pieces = [(ids[at : at + size], labels[at : at + size].copy()) for at in range(0, len(ids), size)]
    for _, piece in pieces:
        piece[0] = IGNORED
    return pieces


def _dataset(kept: list[tuple[Tokens, Tokens]], groups: list[list[int]], packed: bool) -> datasets.Dataset:
    """A datasets.Dataset over arrow arrays: 8 bytes a token instead of Python integers."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    order = [index for group in groups for index in group]
    sizes = np.array([len(kept[index][0]) for index in order], np.int64)
    members = np.cumsum([0, *map(len, groups)])
    ends = np.concatenate([[0], np.cumsum(sizes)])[members]

    def column(part: Callable[[tuple[Tokens, Tokens]], Tokens]) -> Any:
        values = np.concatenate([part(kept[index]) for index in order])
        return pyarrow.LargeListArray.from_arrays(pyarrow.array(ends), pyarrow.array(values))

    columns = {"input_ids": column(lambda pair: pair[0]), "labels": column(lambda pair: pair[1])}
    if packed:
        columns["seq_lengths"] = pyarrow.LargeListArray.from_arrays(pyarrow.array(members), pyarrow.array(sizes))
    # Without a fingerprint of ours, `datasets` would pickle the whole table to make one.
    digest = hashlib.sha256(members.tobytes())
    for index in order:
        digest.update(kept[index][0].tobytes() + kept[index][1].tobytes())
    return Dataset(InMemoryTable(pyarrow.table(columns)), fingerprint=digest.hexdigest()[:16])
