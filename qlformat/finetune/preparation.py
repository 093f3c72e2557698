"""What happens before training: settle the options, check the base, read the data, and look at the memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError
from qlformat.finetune import base, budget, placement, recipes
from qlformat.finetune import options as opts
from qlformat.finetune.dataset import Stats, load_rows, tokenize
from qlformat.finetune.options import Options
from qlformat.finetune.placement import Placement
from qlformat.finetune.rows import Rows
from qlformat.finetune.session import Prepared

_CONTEXT = "the model's context"
"""Where a seq_len comes from that nobody asked for and that is shorter than the recipe's."""


def prepare(given: Mapping[str, Any], config: Path | None = None) -> Prepared:
    """Settle the options, check the base, and read and tokenize the data; nothing is trained or written.

    Args:
        given: options by name, as the caller set them; they win over the file's and the recipe's.
        config: a YAML file of options.

    Raises:
        QlfError: an option, the base or the data cannot be used; or TRL is missing.
    """
    _require_trl()
    in_file = opts.read_yaml(config) if config is not None else {}
    recipe = given.get("recipe") or in_file.get("recipe") or "qlora"
    if recipe not in recipes.RECIPES:
        raise QlfError(f"recipe is {recipe!r}, needed one of {', '.join(recipes.RECIPES)}")
    opts.make({**in_file, **given})  # what is wrong with the options is said before anything is read
    found = base.open_base({**in_file, **given}["base"])
    values, sources = recipes.resolve(recipe, found.params, in_file, given)
    if "seq_len" not in {*in_file, *given} and found.context is not None and values["seq_len"] > found.context:
        values["seq_len"], sources["seq_len"] = found.context, _CONTEXT
    where = placement.place()
    options, sources = placement.settle(opts.make(values), sources, where)
    base.check_fits(found, options.seq_len, options.target)
    return _with_data(options, sources, found, where)


def _require_trl() -> None:
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise QlfError(
            f"found no {' and '.join(missing)}; install what training needs: pip install 'qlformat[finetune]'"
        )


def _with_data(options: Options, sources: Mapping[str, str], found: base.Base, where: Placement) -> Prepared:
    rows = load_rows(options.data, skip_bad=options.skip_bad_rows)
    held_out = None
    if options.eval_data is not None:
        held_out = load_rows(options.eval_data, skip_bad=options.skip_bad_rows)
    elif options.eval_split:
        rows, held_out = rows.divide(options.eval_split, options.seed)
    tokenizer = base.load_tokenizer(found)
    train, stats = tokenize(rows, tokenizer, options.seq_len, packing=options.packing)
    evaluation = (
        None if held_out is None else tokenize(held_out, tokenizer, options.seq_len, packing=options.packing)[0]
    )
    memory = budget.make(options, found, stats, where)
    notes = (*stats.notes, *_notes(rows, stats, found, memory, sources))
    return Prepared(
        options, sources, found, tokenizer, rows, held_out, (train, evaluation), stats, where, memory, notes
    )


def _notes(rows: Rows, stats: Stats, found: base.Base, memory: budget.Budget, sources: Mapping[str, str]) -> list[str]:
    notes = []
    if sources.get("seq_len") == _CONTEXT:
        notes.append(f"sequences have at most {stats.seq_len} tokens, which is the model's context")
    if rows.skipped or stats.skipped:
        first = (rows.skipped or stats.skipped)[0]
        place = f"{first.place.file}, {first.place.unit} {first.place.number}"
        notes.append(f"{len(rows.skipped) + len(stats.skipped)} malformed rows were skipped; the first: {place}: "
                     f"{first.message}")  # fmt: skip
    if stats.truncated_rows:
        which = "the model's context" if stats.seq_len == found.context else "--seq-len"
        notes.append(f"{stats.truncated_rows} rows ({stats.truncated_share:.1%}) are longer than {which} of "
                     f"{stats.seq_len} tokens and lose their end")  # fmt: skip
    if memory.why_unknown is not None:
        notes.append(f"no memory estimate: {memory.why_unknown}")
    return notes
