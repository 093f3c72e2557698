"""What a run is asked to do: one value per option, from a recipe, a YAML file and the caller, in that order."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qlformat.errors import QlfError, shown

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")
INITS = ("default", "loftq", "pissa")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Options:
    """Every option of a run; the defaults are those of `--recipe qlora`.

    Attributes:
        base: the 4-bit checkpoint, a directory or ORG/MODEL[@revision].
        data: training data, as finetune.dataset.load_rows takes it.
        rank, alpha, dropout, target: of LoRA; target is "all-linear" or names of layers.
        epochs, max_steps: how long; max_steps wins where it is given.
        lr, schedule, warmup: learning rate, and the share of all steps in which it rises.
        batch_size, grad_accum: sequences in one forward pass of one process, and passes before one update.
        seq_len: tokens of a sequence. packing: put several rows into one, without letting them see each other.
        eval_data, eval_split: held-out rows: a file, or the share of `data` to hold back.
        optimizer: transformers' name, or "auto": paged 8-bit AdamW on CUDA, plain AdamW on a CPU.
        init, source: how the adapter begins; "loftq" and "pissa" need the 16-bit model.
        dora, rslora, qalora: peft's variants of LoRA.
        beta2, grad_norm, weight_decay: of the optimizer.
        group_by_length: batches of rows of similar length (without packing).
        checkpointing: recompute activations in the backward pass, which saves memory.
        compute_dtype: "auto" is bfloat16 on CUDA and float32 on a CPU.
        log_steps, eval_steps, save_steps: updates between two of each; None: 1, a tenth and a tenth of the run.
        keep: checkpoints kept while training.
        report_to: "tensorboard", "wandb" ..., beside metrics.jsonl.
        skip_bad_rows: leave malformed rows out and count them.
    """

    base: str
    data: str
    recipe: str = "qlora"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target: str | tuple[str, ...] = ALL_LINEAR
    epochs: float = 1.0
    max_steps: int | None = None
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    batch_size: int = 1
    grad_accum: int = 16
    seq_len: int = 1024
    packing: bool = True
    eval_data: str | None = None
    eval_split: float = 0.0
    optimizer: str = "auto"
    seed: int = 0
    init: str = "default"
    source: str | None = None
    dora: bool = False
    rslora: bool = False
    qalora: bool = False
    beta2: float = 0.999
    grad_norm: float = 0.3
    weight_decay: float = 0.0
    group_by_length: bool = False
    checkpointing: bool = True
    compute_dtype: str = "auto"
    log_steps: int = 1
    eval_steps: int | None = None
    save_steps: int | None = None
    keep: int = 2
    report_to: tuple[str, ...] = ()
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        for found, needed, name in _bounds(self):
            if not found:
                raise QlfError(f"{name} is {shown(getattr(self, name))}, needed {needed}")
        if self.init != "default" and self.source is None:
            raise QlfError(f"init {self.init} needs the 16-bit model that the base was made from; give --source")
        if self.init == "default" and self.source is not None:
            raise QlfError("found a source without a use for it; give --init loftq or --init pissa with it")
        if self.init == "pissa" and self.dora:
            raise QlfError("found dora with init pissa, whose base is not the stored one; leave one of them out")
        if self.eval_data is not None and self.eval_split:
            raise QlfError("found eval_data and eval_split, needed one of them")
        if self.group_by_length and self.packing:
            raise QlfError("found group_by_length with packing, which makes all lengths equal; give --no-packing")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the fields: for YAML and JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def to_yaml(self, heading: str) -> str:
        """A YAML file that replays the run."""
        import yaml

        text: str = yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)
        return "".join(f"# {line}\n" for line in heading.splitlines()) + text


NAMES = tuple(field.name for field in fields(Options))


def read_yaml(path: Path) -> dict[str, Any]:
    """The options that a YAML file sets; names may be written with - or _.

    Raises:
        QlfError: no such file, no YAML mapping, an unknown option, or a value of the wrong kind.
    """
    import yaml

    try:
        root = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QlfError(f"{path}: {error.strerror}; give a YAML file of options") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QlfError(f"{path}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(root, dict):
        raise QlfError(f"{path}: found {shown(root)}, needed options, one 'name: value' on a line")
    return {_known(str(key), str(path)): value for key, value in root.items()}


def _known(key: str, where: str) -> str:
    name = key.replace("-", "_")
    if name in NAMES:
        return name
    near = difflib.get_close_matches(name, NAMES, n=1)
    raise QlfError(f"{where}: found no option {shown(key)}; " + (f"did you mean {near[0]}?" if near else "see --help"))


def make(values: Mapping[str, Any]) -> Options:
    """Options of plain values such as YAML holds.

    Raises:
        QlfError: base or data is missing, or a value is of the wrong kind or out of bounds.
    """
    for name in ("base", "data"):
        if not values.get(name):
            raise QlfError(f"found no {name}, needed one; give it on the command line or in the YAML file")
    if values.get("init") == "pissa" and values.get("dropout"):
        raise QlfError("found dropout with init pissa, needed 0: it would drop principal parts of the model")
    return Options(**{name: _typed(name, value) for name, value in values.items()})


_INTEGERS = frozenset(
    [
        "rank",
        "max_steps",
        "batch_size",
        "grad_accum",
        "seq_len",
        "seed",
        "log_steps",
        "eval_steps",
        "save_steps",
        "keep",
    ]
)
_NUMBERS = frozenset(["alpha", "dropout", "epochs", "lr", "warmup", "eval_split", "beta2", "grad_norm", "weight_decay"])
_FLAGS = frozenset(["packing", "dora", "rslora", "qalora", "group_by_length", "checkpointing", "skip_bad_rows"])
_OPTIONAL = frozenset(["max_steps", "eval_data", "source", "eval_steps", "save_steps"])


def _typed(name: str, value: Any) -> Any:
    if value is None and name in _OPTIONAL:
        return None
    if name in _FLAGS:
        needed, fits = "true or false", isinstance(value, bool)
    elif name in _INTEGERS:
        needed, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif name in _NUMBERS:
        if isinstance(value, str):  # YAML 1.1 reads 2e-4 as text
            try:
                value = float(value)
            except ValueError:
                raise QlfError(f"{name} is {shown(value)}, needed a number") from None
        needed, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    elif name in ("target", "report_to"):
        return _names(name, value)
    else:
        needed, fits = "text", isinstance(value, str)
    if not fits:
        raise QlfError(f"{name} is {shown(value)}, needed {needed}")
    return value


def _names(name: str, value: Any) -> Any:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
        raise QlfError(f"{name} is {shown(value)}, needed names")
    if name == "target":
        if not value:
            raise QlfError(f"target is empty, needed {ALL_LINEAR} or names of layers")
        return ALL_LINEAR if list(value) == [ALL_LINEAR] else tuple(value)
    return tuple(value)


def _bounds(o: Options) -> list[tuple[bool, str, str]]:
    """(fits, what is needed, option) of every option that has bounds."""
    from qlformat.finetune.recipes import RECIPES

    at_least_one = ("rank", "batch_size", "grad_accum", "log_steps", "keep")
    table = [(getattr(o, name) >= 1, "1 or more", name) for name in at_least_one]
    table += [(getattr(o, name) is None or getattr(o, name) >= 1, "1 or more", name)
              for name in ("max_steps", "eval_steps", "save_steps")]  # fmt: skip
    table += [(math.isfinite(getattr(o, name)) and getattr(o, name) > 0, "a positive number", name)
              for name in ("alpha", "epochs")]  # fmt: skip
    return [
        *table,
        (o.recipe in RECIPES, f"one of {', '.join(RECIPES)}", "recipe"),
        (0 < o.lr <= 1000, "a positive number up to 1000", "lr"),
        (0 <= o.dropout < 1, "0 or more and less than 1", "dropout"),
        (0 <= o.warmup < 1, "0 or more and less than 1", "warmup"),
        (0 <= o.eval_split < 1, "0 or more and less than 1", "eval_split"),
        (0 < o.beta2 < 1, "between 0 and 1", "beta2"),
        (o.grad_norm >= 0, "0 (no clipping) or more", "grad_norm"),
        (o.weight_decay >= 0, "0 or more", "weight_decay"),
        (o.seq_len >= 8, "8 or more", "seq_len"),
        (0 <= o.seed < 1 << 32, "0 to 4294967295", "seed"),
        (o.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}", "schedule"),
        (o.init in INITS, f"one of {', '.join(INITS)}", "init"),
        (o.compute_dtype in COMPUTE_DTYPES, f"one of {', '.join(COMPUTE_DTYPES)}", "compute_dtype"),
    ]
