"""Walk a transformers model layer by layer: only one decoder layer has weights at a time.

Two streams of hidden states go through every layer: one through the weights of the source, and one in which each linear
layer is quantized at the moment it is about to run, so that everything after it sees what it has become.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlformat import conversions, skeleton
from qlformat.errors import QlfError

if TYPE_CHECKING:
    import torch

Tensors = Callable[[str], "torch.Tensor"]
"""Name of a weight of the source -> float32 tensor, in the source's own orientation."""

Visit = Callable[[str, Any, "torch.Tensor", "torch.Tensor"], None]
"""Called with (name of the weight, module, its input, the input it has in the model of the source) to quantize it."""


_FAILURES = (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError)
"""What a model raises that was called in a way it does not know."""


class _Enough(Exception):
    """Raised from inside a model to end its forward pass: what was wanted is there."""


class LayerWalk:
    """The decoder layers of one model, and what flows through them.

    Args:
        directory: config.json is read from there.
        names: of all weights of the source.
        wanted: of the weights to be quantized.
        tensors: gives a weight.

    Raises:
        QlfError: transformers does not know the model, its weights have other names, or it has no list of layers.
    """

    def __init__(self, directory: Path, names: Iterable[str], wanted: Iterable[str], tensors: Tensors) -> None:
        self._tensors = tensors
        self.model = _empty_model(directory)
        places = self.model.state_dict().keys()
        prefix = f"{self.model.base_model_prefix}."
        self._source = {}  # parameter of the model -> weight of the source
        for name in names:
            for candidate in (name, prefix + name, name.removeprefix(prefix)):
                if candidate in places:
                    self._source[candidate] = name
                    break
        converted = conversions.first_converted(self.model, self._source.values())
        wanted = set(wanted)
        self._path, self.layers = self._find_layers({key for key, name in self._source.items() if name in wanted})
        if converted:
            raise self._unfit(f"transformers renames or merges {converted} while loading")
        self._wanted = wanted
        self._hidden: torch.Tensor
        self._exact: torch.Tensor
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._as_tuple = False

    def _unfit(self, reason: str) -> QlfError:
        return QlfError(
            f"the layers of {type(self.model).__name__} cannot be walked one by one ({reason}); "
            "convert it without --calibration"
        )

    def _find_layers(self, keys: set[str]) -> tuple[str, Any]:
        """The list of modules that holds most of the weights to be quantized, the outermost of equal ones."""
        import torch

        best, found = 0, None
        for path, module in self.model.named_modules():
            if isinstance(module, torch.nn.ModuleList):
                inside = sum(key.startswith(f"{path}.") for key in keys)
                if inside > best:
                    best, found = inside, (path, module)
        if found is None:
            raise self._unfit("found no list of layers that holds weights to quantize")
        return found

    def embed(self, windows: torch.Tensor) -> None:
        """Run everything before the first layer, and note what each layer is called with.

        Args:
            windows: int64 [windows, tokens].

        Raises:
            QlfError: the layers are not called one after another with the hidden state first.
        """
        inner = f"{self._path}."
        base = self.model.base_model
        owned = {id(parameter) for parameter in base.parameters()}
        for key, parameter in list(self.model.named_parameters()):
            if not key.startswith(inner) and id(parameter) in owned:
                self._fill(self.model, key, key)
        try:
            self._record(base, windows)
            if self._hidden.shape[:2] != windows.shape or not self._chained:
                self._as_tuple = True
                self._record(base, windows)
        except _Enough:
            raise self._unfit("its forward pass ended early") from None
        except _FAILURES as error:
            raise self._unfit(" ".join(str(error).split())[:150]) from error
        if not self._chained or len(self._calls) != len(self.layers):
            raise self._unfit("its layers are not called one after another")
        self._exact = self._hidden
        self._empty_all()  # the embeddings are not needed any more

    def _record(self, base: Any, windows: torch.Tensor) -> None:
        self._calls, self._chained = [], True
        with _replaced_forward(self.layers, self._stand_in), contextlib.suppress(_Enough):
            base(input_ids=windows, use_cache=False)

    def _stand_in(self, index: int) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **options: Any) -> Any:
            self._chained &= len(self._calls) == index
            if index == 0:
                self._hidden = hidden_states.float()
            else:
                self._chained &= hidden_states.shape == self._hidden.shape
            self._calls.append((args, options))
            if index == len(self.layers) - 1:
                raise _Enough
            return (hidden_states,) if self._as_tuple else hidden_states

        return forward

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all its weights, float32, for the time of the context.

        Raises:
            QlfError: the source lacks one, or the model failed in the context.
        """
        for key in [key for key, _ in self.model.named_parameters() if key in self._source]:
            self._fill(self.model, key, key)
        self.model.tie_weights()
        missing = [key for key, value in self.model.named_parameters() if value.device.type == "meta"]
        if missing:
            raise self._unfit(f"the source has no {missing[0]}")
        try:
            yield self.model
        except _FAILURES as error:
            raise self._unfit(" ".join(str(error).split())[:150]) from error
        finally:
            self._empty_all()

    def quantize(self, index: int, visit: Visit) -> None:
        """Run one layer on both streams; in the second, every linear layer is visited before it runs.

        A linear layer that does not run is not visited.
        """
        self._enter(index)
        layer = self.layers[index]
        exact: dict[str, torch.Tensor] = {}

        def note(name: str, module: Any, entering: torch.Tensor) -> None:
            exact.setdefault(name, entering)

        def visit_once(name: str, module: Any, entering: torch.Tensor) -> None:
            if name in exact:
                visit(name, module, entering, exact.pop(name))

        try:
            with self._hooked(index, note):
                self._exact = self._run(index, self._exact)
            with self._hooked(index, visit_once):
                self._hidden = self._run(index, self._hidden)
        finally:
            for module in layer.modules():
                _empty(module)
        self._calls[index] = ((), {})

    @contextlib.contextmanager
    def _hooked(self, index: int, call: Callable[[str, Any, torch.Tensor], None]) -> Iterator[None]:
        """`call` before each linear layer to be quantized."""

        def hook_of(name: str) -> Callable[..., None]:
            return lambda module, args: call(name, module, args[0])

        hooks = []
        for path, module in self.layers[index].named_modules():
            name = self._source.get(f"{self._path}.{index}.{path}.weight")
            if name in self._wanted and getattr(module, "weight", None) is not None and module.weight.dim() == 2:
                hooks.append(module.register_forward_pre_hook(hook_of(name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, index: int) -> None:
        """Give one layer its weights, float32."""
        layer = self.layers[index]
        for key, _ in [*layer.named_parameters(), *layer.named_buffers()]:
            full = f"{self._path}.{index}.{key}"
            if full in self._source:
                self._fill(layer, key, full)
            elif key in dict(layer.named_parameters()):
                raise self._unfit(f"the source has no {full}")

    def _run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        args, options = self._calls[index]
        result = self.layers[index](hidden, *args, **options)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def _empty_all(self) -> None:
        for module in self.model.modules():
            _empty(module)

    def _fill(self, root: Any, key: str, full: str) -> None:
        import torch

        if full not in self._source:
            raise self._unfit(f"the source has no {full}")
        path, _, name = key.rpartition(".")
        module = root.get_submodule(path)
        value = self._tensors(self._source[full])
        if name in module._parameters:
            module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[name] = value


def _empty_model(directory: Path) -> Any:
    """The model with its parameters on the meta device and its buffers computed.

    Raises:
        QlfError: transformers does not know the model.
    """
    import importlib

    import torch

    config = skeleton.read_config(directory)
    cls = skeleton.model_class(config)
    skeleton.set_dtype(config, torch.float32)
    accelerate = importlib.import_module("accelerate")  # it has no annotations
    with accelerate.init_empty_weights(include_buffers=False):
        return cls(config).eval()


def _empty(module: Any) -> None:
    """Take the memory of a module's own parameters away."""
    import torch

    for name, value in module._parameters.items():
        if value is not None and value.device.type != "meta":
            module._parameters[name] = torch.nn.Parameter(value.to("meta"), requires_grad=False)


@contextlib.contextmanager
def _replaced_forward(layers: Any, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Every layer's forward replaced for the time being; its attributes stay, since models read them."""
    for index, layer in enumerate(layers):
        layer.forward = make(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
