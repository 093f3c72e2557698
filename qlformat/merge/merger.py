"""Put adapters into a base and write the result (`qlf merge`): checked, streamed, measured, published when complete."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat import __version__, native, remote
from qlformat.adapter import WEIGHTS_NAME
from qlformat.errors import FormatError, QlfError, SourceError, TargetError
from qlformat.file_names import MERGE_PICTURE, MERGE_REPORT
from qlformat.layout import Recipe
from qlformat.merge import combined_adapter, compatibility, figures, matching, options, planning, retention
from qlformat.merge.adapter_files import AdapterFiles, open_adapter, told_apart
from qlformat.merge.base import Base, open_base
from qlformat.merge.combining import SPARSE, Method
from qlformat.merge.merged import MergedFile
from qlformat.merge.options import AdapterSpec, MergeOptions
from qlformat.merge.planning import MergePlan
from qlformat.merge.run import Run
from qlformat.progress import Progress
from qlformat.source import is_repo_id
from qlformat.staging import Staging

if TYPE_CHECKING:
    import torch

    from qlformat.calibration.engine import Calibration


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the new model.
        content: merge_report.json.
        fingerprint: of a 4-bit result, else None.
        seconds: wall time.
        output_bytes: size of the weight files.
        notes: what the user should know, the most important first.
    """

    out: Path
    content: Mapping[str, Any]
    fingerprint: str | None
    seconds: float
    output_bytes: int
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report for --json."""
        return {
            "out": str(self.out),
            **self.content,
            "fingerprint": self.fingerprint,
            "seconds": round(self.seconds, 3),
            "output_bytes": self.output_bytes,
            "notes": list(self.notes),
        }


def merge(
    base: str | Path,
    adapters: Sequence[AdapterSpec],
    out: str | Path,
    asked: MergeOptions,
    *,
    source: str | Path | None = None,
    calibration: Path | None = None,
    eval_data: Path | None = None,
    shard_size: int = options.DEFAULT_SHARD_SIZE,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Merge adapters into a base: weight = base + sum of the scaled deltas in float32, rounded once.

    Args:
        base: a 4-bit checkpoint or a 16-bit model: a directory or a Hub repository.
        adapters: at least one.
        out: directory of the new model.
        asked: target, method and so on.
        source: the 16-bit model that a 4-bit base was made from.
        calibration: text for feedback rounding.
        eval_data: held-out rows or text, to measure the retention; below asked.min_retention nothing is published.
        shard_size: most bytes of tensors in one file.
        threads: workers; all CPUs of the process by default. The bytes do not depend on it.
        resume: go on with what an interrupted merge of the same inputs left behind.
        overwrite: replace a model that is at `out`.
        progress: called from the workers, under a lock.

    Raises:
        QlfError: something does not fit; nothing is written.
        TargetError: the output cannot be written.
    """
    started = time.monotonic()
    options.check(asked, adapters, source, calibration, eval_data)
    adapters = [_located(spec) for spec in adapters]
    target = Path(out)
    _check_place(target, base, adapters, source)
    if asked.to == "adapter":
        return combine(adapters, target, asked, overwrite=overwrite)
    with ExitStack() as stack:
        read = stack.enter_context(open_base(base))
        opened = told_apart([stack.enter_context(_closing(open_adapter(spec.path, spec.weight))) for spec in adapters])
        original = None if source is None else stack.enter_context(open_base(source))
        job = _Job(read, original, opened, asked)
        plan = job.plan(shard_size)
        calibrated = None if calibration is None else job.calibrate(plan, calibration)
        staging = stack.enter_context(Staging(target, overwrite=overwrite, resume=resume, source=read.path))
        staging.keep = staging.resumed
        run = Run(
            job.onto, job.file, plan, frozenset(job.matched.changes), staging.path, job.key(plan), progress, calibrated
        )
        staging.keep = True
        try:
            run.execute(threads or native.default_threads())
            job.file.check_unchanged()
        except (SourceError, FormatError):
            staging.keep = False
            raise
        title = f"{' + '.join(adapter.name for adapter in opened)} -> {asked.to}"
        picture = figures.picture(run.kept, title)
        content = job.content(run)
        manifest = run.publish({MERGE_REPORT: _json(content), MERGE_PICTURE: picture})
        if eval_data is not None:
            exact = partial(
                merge, base, adapters, asked=replace(asked, to="float32", onto=None, rounding=None, min_retention=None)
            )
            found = retention.measure(
                read.path, adapters, staging.path, eval_data, asked.method, lambda place: _drop(exact(place))
            )
            content = {**content, "retention": found.as_dict()}
            _check_retention(found, asked, staging)
            manifest = run.publish({MERGE_REPORT: _json(content), MERGE_PICTURE: picture})
        run.journal.remove()
        staging.commit()
        written = sum((target / name).stat().st_size for name in plan.shard_names)
        return MergeReport(
            target, content, manifest.fingerprint if manifest else None, time.monotonic() - started, written,
            tuple(job.notes()),
        )  # fmt: skip


def combine(adapters: Sequence[AdapterSpec], out: Path, asked: MergeOptions, *, overwrite: bool = False) -> MergeReport:
    """Combine adapters into one, of `asked.rank`; see combined_adapter.write.

    Raises:
        QlfError: they do not fit together.
        TargetError: the output cannot be written.
    """
    started = time.monotonic()
    method = Method(asked.method, options.density(asked), asked.rank, asked.seed)
    with ExitStack() as stack:
        opened = told_apart([stack.enter_context(_closing(open_adapter(spec.path, spec.weight))) for spec in adapters])
        notes = compatibility.differing_pins(opened, asked.allow_base_mismatch)
        fields = {"to": "adapter", **_combination(opened, asked)}
        with Staging(out, overwrite=overwrite) as staging:
            rank, error = combined_adapter.write(opened, staging.path, method, {"merge": fields})
            content = {**fields, "rank": rank, "relative_error_most": float(f"{error:.6g}")}
            (staging.path / MERGE_REPORT).write_bytes(_json(content))
            staging.commit()
    size = (out / WEIGHTS_NAME).stat().st_size
    return MergeReport(out, content, None, time.monotonic() - started, size, tuple(notes))


def _combination(adapters: Sequence[AdapterFiles], asked: MergeOptions) -> dict[str, Any]:
    """What went in, for the report."""
    return {
        "adapters": [
            {
                "name": adapter.name,
                "repo_id": adapter.repo_id,
                "revision": adapter.revision,
                "weight": adapter.weight,
                "sha256": adapter.sha256,
                "config_sha256": adapter.config_sha256,
                "pinned_to": None if adapter.pin is None else adapter.pin.fingerprint,
                "tensors": len(adapter.tensors),
            }
            for adapter in adapters
        ],
        "method": asked.method,
        "density": options.density(asked) if asked.method in SPARSE else None,
        "rank": asked.rank,
        "seed": asked.seed if asked.method.startswith("dare") else None,
        "writer": f"qlformat {__version__}",
    }


def _drop(report: MergeReport) -> None:
    """Only the files are wanted."""


def _check_retention(found: retention.Retention, asked: MergeOptions, staging: Staging) -> None:
    """Refuse to publish a result that lost too much."""
    least = asked.min_retention
    if least is None:
        return
    if found.retention is not None and found.retention >= least:
        return
    staging.keep = False
    losses = (
        f"held-out loss {found.base:.4f} of the base, {found.adapter:.4f} with the adapter, {found.merged:.4f} merged"
    )
    if found.retention is None:
        raise QlfError(
            f"the adapter gains nothing on this data ({losses}), so there is no retention; nothing was written"
        )
    raise QlfError(
        f"found a retention of {found.retention:.3f}, needed {least:g} ({losses}); nothing was written: merge to "
        "bfloat16, or give the original model with --source"
    )


class _Job:
    """What is known before the first byte is written."""

    def __init__(
        self, base: Base, original: Base | None, adapters: Sequence[AdapterFiles], asked: MergeOptions
    ) -> None:
        self.base, self.adapters, self.asked = base, adapters, asked
        self._calibration: dict[str, Any] | None = None
        self._notes = compatibility.check_pins(base, adapters, asked.allow_base_mismatch)
        on_source = original is not None and asked.onto != "base"
        if original is not None:
            compatibility.check_source(base, original)
        self.onto = original if original is not None and on_source else base
        self.matched = matching.match(self.onto, adapters)
        method = Method(asked.method, options.density(asked), asked.rank, asked.seed)
        if asked.method != "linear":
            compatibility.check_combinable(self.matched)
        self.file = MergedFile(self.onto, adapters, self.matched.changes, method)
        self.on_source = on_source

    def plan(self, shard_size: int) -> MergePlan:
        """Where everything goes."""
        if self.asked.to != "nf4":
            return planning.plan_plain(self.onto, self.asked.to, shard_size, self.file)
        recipe = self.base.recipe or Recipe()
        return planning.plan_quantized(self.onto, recipe, shard_size, self.file, like=self.base)

    def calibrate(self, plan: MergePlan, text: Path) -> Calibration:
        """What chooses the codes of the merged weights by their activations on a text."""
        import torch

        from qlformat.calibration.engine import Calibration
        from qlformat.calibration.settings import CalibrationSettings
        from qlformat.calibration.texts import read_texts, windows

        texts = read_texts(text)
        states = {item.name: item.state for item in plan.items if item.state}
        settings = CalibrationSettings()
        context = self.onto.config.get("max_position_embeddings")
        chosen = windows(texts, self.onto.path, context, settings)

        def tensor(name: str) -> torch.Tensor:
            weight = self.onto.weights[name]
            return torch.from_numpy(self.file.values(name, 0, weight.elements).reshape(weight.shape))

        calibration = Calibration(self.onto.path, self.onto.weights, states, tensor, chosen, texts.sha256, settings)
        self._calibration = asdict(calibration.record)
        return calibration

    def key(self, plan: MergePlan) -> str:
        """Identity of this merge."""
        identity = {"inputs": self.inputs(), "files": planning.identity_of(self._files())}
        return plan.key(identity)

    def inputs(self) -> dict[str, Any]:
        """What went in, as the report has it."""
        asked = self.asked
        return {
            "base": _described(self.base),
            "source": _described(self.onto) if self.on_source else None,
            "onto": "source" if self.on_source else "base",
            "to": asked.to,
            "rounding": "feedback" if self._calibration else "nearest",
            "calibration": self._calibration,
            **_combination(self.adapters, asked),
        }

    def content(self, run: Run) -> dict[str, Any]:
        """merge_report.json: no times, so that the same merge gives the same bytes."""
        return {
            **self.inputs(),
            "applied": dict(zip((a.name for a in self.adapters), self.matched.applied, strict=True)),
            "zero_deltas": {
                adapter.name: idle for adapter, idle in zip(self.adapters, self.matched.idle, strict=True) if idle
            },
            "summary": figures.summary(run.kept),
            "weights": [entry.as_dict() for entry in run.kept],
        }

    def notes(self) -> list[str]:
        """For the user, the most important first."""
        found = []
        for adapter, idle in zip(self.adapters, self.matched.idle, strict=True):
            modules = sum(1 for name in adapter.tensors if "lora_A" in name or "lora_embedding_A" in name)
            if idle and len(idle) == modules and 2 * modules == len(adapter.tensors):
                found.append(f"the adapter {adapter.name} changes nothing: all its deltas are zero")
            elif idle:
                found.append(f"{len(idle)} deltas of the adapter {adapter.name} are zero, such as {idle[0]}")
        found += [
            f"{name}: values beyond the range of float16 became infinite; merge to bfloat16"
            for name in sorted(self.file.overflowed)
        ]
        if self.asked.to == "nf4" and not (self.on_source or self._calibration) and self.base.recipe:
            found.append(
                "rounding a 4-bit base again loses most of a small fine-tune: see the shares, and give the original "
                "model with --source, or merge to bfloat16"
            )
        return [*found, *self.matched.notes, *self._notes]

    def _files(self) -> list[Path]:
        roots = {self.base.path, self.onto.path}
        found = [path for root in sorted(roots) for path in sorted(root.glob("*.safetensors*"))]
        return found + [path for root in sorted(roots) for path in sorted(root.glob("*.bin*"))]


class _closing:  # noqa: N801 (reads like contextlib.closing, typed for what it holds)
    def __init__(self, adapter: AdapterFiles) -> None:
        self._adapter = adapter

    def __enter__(self) -> AdapterFiles:
        return self._adapter

    def __exit__(self, *_: object) -> None:
        self._adapter.close()


def _located(spec: AdapterSpec) -> AdapterSpec:
    """With a directory: a Hub repository is downloaded where needed."""
    if spec.path.exists() or not is_repo_id(str(spec.path)):
        return spec
    return replace(spec, path=remote.local_directory(spec.path))


def _check_place(out: Path, base: str | Path, adapters: Sequence[AdapterSpec], source: str | Path | None) -> None:
    """Refuse to write over an input."""
    inputs = {"the base": Path(base), "the source": None if source is None else Path(source)}
    inputs |= {f"the adapter {spec.path.name}": spec.path for spec in adapters}
    for what, path in inputs.items():
        if path is not None and path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise TargetError(f"{out}: {what} lies here and must not be overwritten; choose another target")


def _described(base: Base) -> dict[str, Any]:
    return {
        "name": base.repo_id or base.path.resolve().name,
        "revision": base.revision,
        "made_from": base.made_from,
        "fingerprint": base.fingerprint,
        "files": [{key: value for key, value in vars(entry).items() if value is not None} for entry in base.files()],
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
