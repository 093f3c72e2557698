"""What of a model's directory goes along to one made from it: a tokenizer does, what describes the model does not."""

from __future__ import annotations

from qlformat import manifest
from qlformat.checkpoint import Checkpoint
from qlformat.file_names import CARD, CARD_PICTURE, MERGE_PICTURE, MERGE_REPORT
from qlformat.stored import CONFIG_NAME

DESCRIPTIONS = frozenset((CARD, CARD_PICTURE, MERGE_REPORT, MERGE_PICTURE, CONFIG_NAME, manifest.FILE_NAME))
"""Files about one model, which would be wrong about another."""

_WEIGHTS = (".safetensors", ".index.json", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack")


def carried_names(checkpoint: Checkpoint) -> list[str]:
    """The files of a 4-bit checkpoint that go along: of those that qlf.json lists, or that lie beside the weights."""
    if checkpoint.manifest is not None:
        names = [entry.name for entry in checkpoint.manifest.files]
    else:
        names = sorted(entry.name for entry in checkpoint.path.iterdir() if entry.is_file())
    return [
        name for name in names if name not in DESCRIPTIONS and not name.startswith(".") and not name.endswith(_WEIGHTS)
    ]
