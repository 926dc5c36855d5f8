"""The base model, resident on its device: its layers and header, its arithmetic, its head a few rows at a time.

Knows: torch modules, devices, dtypes. Refuses to know: phrases, scores, strategies.

Layers and header are handed out as Parts: named tensors that can be merged, tried and installed.
"""

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from modules.checkpoints.architecture import find_layers, header_names, input_first_weights
from modules.checkpoints.candidate import Candidate
from modules.checkpoints.checkpoint import Checkpoint
from modules.checkpoints.conversion import Conversion
from modules.checkpoints.readers import dtype_name
from modules.checkpoints.weight_files import read_file
from modules.model.arithmetic import FALLBACK, Arithmetic
from modules.model.devices import wider
from modules.model.part import Part
from modules.runtime.errors import ConfigError, TooNarrow

Result = TypeVar("Result")

# Root mean square of a float16 tensor below which the bits lost by its smallest numbers may matter. Numbers up to 6e-5
# have lost some; in a normal tensor these are by far the smallest.
SMALL_NUMBERS = 1e-3

# transformers' names of the generation settings that forbid or force tokens.
TOKEN_RULES = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)


class ResidentModel:
    """The base model in device memory; or without weights, as a layout: its tensors' names, ties and stored types."""

    def __init__(
        self,
        module: PreTrainedModel,
        checkpoint: Checkpoint,
        saved_dtype: torch.dtype | None,
        arithmetic: Arithmetic | None = None,
        may_widen: bool = False,
    ) -> None:
        """saved_dtype: the dtype of all saved weights; None keeps what the checkpoint stores, tensor by tensor.
        arithmetic: the one to compute in; None: the module's own type. may_widen: whether FALLBACK may be taken if that
        is too narrow."""
        self.module = module
        self.may_widen = may_widen
        self.arithmetic = arithmetic or Arithmetic(
            module.dtype
        )  # The hook must not hold the model, or that would stay in memory until the garbage is collected.
        module.get_input_embeddings().register_forward_hook(partial(_begin_stream, weakref.ref(self)))
        self.checkpoint = checkpoint
        self.saved_dtype = saved_dtype
        self.layers_name, self.layers = find_layers(module)
        self._takes_columns = "logits_to_keep" in inspect.signature(module.forward).parameters
        self.embedding_name, self.head_name = header_names(module)  # without a head it is None
        # All parameters and buffers, live; where they are tied, the same one under several names.
        self.tensors: Mapping[str, Tensor] = _tensors_of(module)
        self._input_first = input_first_weights(module)
        self.conversion = Conversion(module, checkpoint.tensors)
        self.conversion.check_reversible()
        self._stored_as = self._find_stored_names()
        self.has_base_header = True  # kept up to date by whoever merges into it
        if self.arithmetic.float32_stream:
            self._hold_float32_vectors()
        self._dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}

    def describe(self, saving: bool = True) -> dict[str, object]:
        """The summary's lines on the device, or the number of layers on each of several, and on the dtype."""
        layer_devices = [next(iter(self.layer(index).devices)) for index in range(len(self.layers))]
        counts = {device: layer_devices.count(device) for device in dict.fromkeys([self.device, *layer_devices])}
        device = str(self.device)
        if len(counts) > 1:
            device = ", ".join(f"{layer_device} ({count} layers)" for layer_device, count in counts.items())
        saved = f", saved as {dtype_name(self.saved_dtype or self.checkpoint.main_dtype())}" if saving else ""
        return {"Device": device, "Dtype": self.arithmetic.name + saved}

    def dtypes(self) -> dict[str, str | None]:
        """Device and dtypes for the recipe. saved_dtype None: as the checkpoint stores it, tensor by tensor."""
        saved = None if self.saved_dtype is None else dtype_name(self.saved_dtype)
        return {"device": str(self.device), "dtype": self.arithmetic.name, "saved_dtype": saved}

    @property
    def device(self) -> torch.device:
        """The device of the model; if it is spread over several, the device of its embedding and head."""
        return self.module.device

    @property
    def devices(self) -> set[torch.device]:
        """The devices of its tensors."""
        return {tensor.device for tensor in self.tensors.values()}

    @property
    def dtype(self) -> torch.dtype:
        """The type of products, and of weights with more than one dimension."""
        return self.arithmetic.dtype

    @contextmanager
    def computing_in(self, arithmetic: Arithmetic) -> Iterator[None]:
        """Within it, the model computes in another arithmetic. Weights keep their type, and are cast where used."""
        previous = self.arithmetic
        try:
            self.arithmetic = arithmetic
            yield
        finally:
            self.arithmetic = previous

    def in_range(
        self,
        work: Callable[[], Result],
        is_sound: Callable[[Result], bool] | None = None,
        overflows: type[Exception] = TooNarrow,
    ) -> Result:
        """The result of work; if that overflows and FALLBACK may be taken, its result when done again in FALLBACK.

        is_sound: whether a result is free of NaN and infinity. overflows: the error that work raises where it meets
        one.
        """
        try:
            result = work()
            if not self.may_widen or is_sound is None or is_sound(result):
                return result
        except overflows:
            if not self.may_widen:
                raise
        with self.computing_in(FALLBACK):
            return work()

    @contextmanager
    def products(self) -> Iterator[None]:
        """The context for forwards of the module. With a float32 residual stream, products alone are in half type."""
        if not self.arithmetic.float32_stream:
            yield
            return
        # There are any only within `computing_in`.
        narrow = [vector for vector in self._vectors.values() if vector.dtype != torch.float32]
        original_data = [vector.data for vector in narrow]
        try:
            for vector in narrow:
                vector.data = vector.data.float()
            # Weights are swapped within a forward, so casts must not be cached.
            with torch.autocast(self.device.type, self.dtype, cache_enabled=False):
                yield
        finally:
            for vector, tensor in zip(narrow, original_data, strict=True):
                vector.data = tensor

    @cached_property
    def _vectors(self) -> dict[str, Tensor]:
        """All floating-point tensors of at most one dimension, each once, by name."""
        unique_names = {id(tensor): name for name, tensor in self.tensors.items()}
        floats = ((name, self.tensors[name]) for name in unique_names.values())
        return {name: tensor for name, tensor in floats if tensor.is_floating_point() and tensor.dim() < 2}

    def _hold_float32_vectors(self) -> None:
        """Hold vectors in float32, as float32 norms multiply with them. Loading has rounded them to a half type, so
        they are read from the file again."""
        # If a layer is copied to its device for every forward, the copies take the type of these meta parameters.
        for parameter in self.module.parameters():
            if parameter.is_meta and parameter.dim() < 2:
                parameter.data = parameter.data.float()
        for name, tensor in self._vectors.items():
            if tensor.dtype != torch.float32:
                wide = tensor.float() if tensor.is_meta else self._stored_tensor(name).to(tensor.device, torch.float32)
                tensor.data = wide.data

    @property
    def vocabulary(self) -> int:
        """Number of rows of the input embedding."""
        return self.module.get_input_embeddings().weight.shape[0]

    @property
    def max_tokens(self) -> int | None:
        """The length of the longest text that the model takes, in tokens; None if its configuration sets no limit."""
        return getattr(self.module.config.get_text_config(), "max_position_embeddings", None)

    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text, by the model's configuration and its generation settings."""
        configs = [self.module.config.get_text_config(), self.module.config, self._generation()]
        end_ids = [getattr(config, "eos_token_id", None) for config in configs]
        lists = [ids if isinstance(ids, list) else [ids] for ids in end_ids if ids is not None]
        return frozenset(token for ids in lists for token in ids)

    def token_rules(self) -> dict[str, Any]:
        """The model's generation settings of TOKEN_RULES that are set: tokens that it must not or has to write.

        Other settings, such as top_k, are ignored: the checkpoint does not decide how a text is sampled.
        """
        settings = self._generation()
        rules = {name: getattr(settings, name, None) for name in TOKEN_RULES}
        return {name: value for name, value in rules.items() if value not in (None, [])}

    def _generation(self) -> GenerationConfig:
        """The model's own generation settings; if it has no file of them, those in its configuration."""
        name = "generation_config.json"
        path = self.checkpoint.path
        if name not in self.checkpoint.companions.sizes:
            return GenerationConfig.from_pretrained(path, "config.json", _from_model_config=True, local_files_only=True)
        read_file(path / name)  # raises if it can't be read; transformers would take it for missing
        return GenerationConfig.from_pretrained(path, local_files_only=True)

    @cached_property
    def tuples_returned(self) -> dict[int, tuple[None, ...]]:
        """Number of each layer that returns a tuple -> None for each entry after the hidden states; none is needed."""
        forms: dict[int, tuple[None, ...]] = {}

        def note(number: int, _layer: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, tuple):
                forms[number] = (None,) * (len(output) - 1)

        hooks = [layer.register_forward_hook(partial(note, number)) for number, layer in enumerate(self.layers)]
        with torch.no_grad():
            self._forward(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        return forms

    @contextmanager
    def embeddings_moved(self) -> Iterator[None]:
        """Within it, the input embedding's output is moved at random by up to half of its last bit; the random numbers
        are always the same."""
        chance = torch.Generator().manual_seed(0)

        def move(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            amount = torch.rand(output.shape, generator=chance).to(output.device) - 0.5
            return (output.float() * (1 + torch.finfo(self.dtype).eps * amount)).to(output.dtype)

        hook = self.module.get_input_embeddings().register_forward_hook(move)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def try_columns(self) -> None:
        """Find out whether the forward takes `logits_to_keep` and gives the logits of exactly these columns."""
        if not self._takes_columns:
            return
        ids = torch.arange(3, device=self.device)[None]
        column = torch.tensor([1], device=self.device)
        failures = (TypeError, ValueError, IndexError)
        try:
            all_columns = self._forward(input_ids=ids, use_cache=False).logits
        except failures:
            return  # the forward works only with `logits_to_keep`
        try:
            at_column = self._forward(input_ids=ids, use_cache=False, logits_to_keep=column).logits
        except failures:
            at_column = torch.empty(0)
        same_shape = at_column.shape == all_columns[:, column].shape
        self._takes_columns = same_shape and int((all_columns - at_column).abs().amax(-1).argmin()) == 1

    def logits(self, arguments: Mapping[str, Any], columns: Tensor) -> Tensor:
        """The logits of the model's own forward at the given columns: (B, columns, V)."""
        if self._takes_columns:
            return self._forward(**arguments, logits_to_keep=columns).logits
        return self._forward(**arguments).logits[:, columns]

    def _forward(self, **arguments: Any) -> Any:
        with self.products():
            return self.module(**arguments)

    def layer(self, index: int) -> Part:
        """The floating-point parameters and persistent buffers of one decoder layer. Raises IndexError if there is no
        layer of this number."""
        if index >= len(self.layers):
            raise IndexError(f"the base has layers 0 to {len(self.layers) - 1}, and no layer {index}")
        prefix = f"{self.layers_name}.{index}."
        return self.part_of([name for name in self.tensors if name.startswith(prefix)])

    def header(self) -> Part:
        """The input embedding and the output head; one weight for both if they are tied."""
        embeddings = self.module.get_input_embeddings(), self.module.get_output_embeddings()
        modules = [module for module in embeddings if module is not None]
        owned = {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
        # A tied head is the embedding under a second name; the tensor is taken once, under the first.
        names = {id(tensor): name for name, tensor in reversed(self.tensors.items()) if id(tensor) in owned}
        return self.part_of(sorted(names.values()))

    def outside(self) -> Part:
        """The tensors that are neither in a layer nor in the header: final norm, position tables."""
        header = {id(tensor) for tensor in self.header().tensors.values()}
        inside = f"{self.layers_name}."
        return self.part_of(
            [name for name, tensor in self.tensors.items() if not name.startswith(inside) and id(tensor) not in header]
        )

    # -- the head, some of its rows at a time --------------------------------------------------------------------------

    @property
    def head_size(self) -> int:
        """Number of rows of the output head. Raises ValueError if no head can be found."""
        return self._head_tensors()["weight"].shape[0]

    @contextmanager
    def head_rows(self, first: int, end: int, rows: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Within it, the head has only its rows from first to end. rows: a whole head of the same layout to take them
        from instead."""
        head_tensors = rows or {name: tensor.data for name, tensor in self._head_tensors().items()}
        with self.head_holding({name: tensor[first:end].to(self.device) for name, tensor in head_tensors.items()}):
            yield

    @contextmanager
    def head_holding(self, rows: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it, the head has these rows, any number of them, instead of its own; so has a tied embedding."""
        head_tensors = self._head_tensors()
        embedding = self.module.get_input_embeddings()
        originals = {name: tensor.data for name, tensor in head_tensors.items()}
        padding = getattr(embedding, "padding_idx", None)
        try:
            embedding.padding_idx = None  # there may be no row of this number
            for name, tensor in head_tensors.items():
                tensor.data = rows[name]
            yield
        finally:
            embedding.padding_idx = padding
            for name, tensor in head_tensors.items():
                tensor.data = originals[name]

    def head_names(self) -> dict[str, str]:
        """The head's own tensors, weight and perhaps bias -> their names in the header's part."""
        header = {id(tensor): name for name, tensor in self.header().tensors.items()}
        return {name: header[id(tensor)] for name, tensor in self._head_tensors().items()}

    def as_candidate(self) -> Candidate:
        """The base as its files have it, whatever has been merged into the model; it is read like a candidate."""
        return Candidate(self.checkpoint, self.conversion)

    def original_head(self) -> dict[str, Tensor]:
        """The head's tensors as the base's file has them, on the CPU in the model's dtype."""
        head_tensors = self._head_tensors()
        names = {name: self._stored_as[stored_name] for name, stored_name in self.head_names().items()}
        stored = self.conversion.load(set(names.values()), self.checkpoint.stream)
        return {name: stored[stored_name].to(head_tensors[name].dtype) for name, stored_name in names.items()}

    def _head_tensors(self) -> dict[str, Tensor]:
        head = self.module.get_output_embeddings()
        tensors = dict(head.named_parameters(recurse=False)) if head is not None else {}
        if "weight" not in tensors:
            raise ValueError("the model has no LM head with a row for each token")
        return tensors

    def part_of(self, names: list[str]) -> Part:
        """The floating-point tensors among the named ones, as a part."""
        names = [name for name in names if self.tensors[name].is_floating_point()]
        return Part(
            tensors={name: self.tensors[name] for name in names},
            dtypes={name: self._dtypes[name] for name in names},
            saved_dtypes={name: self.saved_dtype or self.conversion.dtype(self._stored_as[name]) for name in names},
            input_axes={name: -2 if name in self._input_first else -1 for name in names},
        )

    def _find_stored_names(self) -> dict[str, str]:
        """Parameter name -> the name that the base stores it under, which differs only for tied tensors.

        Raises ConfigError for missing weights and for stored types that can't be merged or kept.
        """
        stored = {id(tensor): name for name, tensor in self.tensors.items() if name in self.conversion}
        stored_names = {
            name: name if name in self.conversion else stored.get(id(self.tensors[name])) for name in self.tensors
        }
        missing = [name for name, stored_name in stored_names.items() if stored_name is None]
        if missing:
            raise ConfigError(f"{self.checkpoint.path}: missing weights {', '.join(missing[:3])}")
        for name, tensor in self.tensors.items():
            dtype = self.conversion.dtype(stored_names[name])
            if tensor.is_floating_point() and not dtype.is_floating_point:
                raise ConfigError(f"{self.checkpoint.path}: {name} is stored as {dtype}, not as a floating-point type")
        mixed = [name for name in self.conversion if len(self.conversion.dtypes(name)) > 1]
        if mixed and self.saved_dtype is None:
            kinds = " and ".join(sorted(dtype_name(dtype) for dtype in self.conversion.dtypes(mixed[0])))
            raise ConfigError(f"{self.checkpoint.path}: {mixed[0]} is stored as {kinds}; set dtype to one of them")
        return {name: stored_name for name, stored_name in stored_names.items() if stored_name is not None}

    def check_weights(self) -> None:
        """Raise ConfigError if the files hold NaN or infinite values: every score would be meaningless. Raise TooNarrow
        or ConfigError, as `too_narrow` gives it, if the weights don't fit the compute type."""
        for name, tensor in self.tensors.items():
            if not is_finite(tensor.detach()):
                if is_finite(self._stored_tensor(name)):
                    raise self.too_narrow(f"{name} overflows")
                raise ConfigError(f"{self.checkpoint.path}: {name} holds NaN or infinite values; it can't be merged")
            if self.may_widen and tensor.dtype == torch.float16:
                self._check_small_numbers(name, tensor.detach())

    def _check_small_numbers(self, name: str, tensor: Tensor) -> None:
        """Raise what `too_narrow` gives if a float16 tensor's smallest numbers have lost more than float16's own
        rounding. Only tensors of small root mean square can have, so only these are read again."""
        size = torch.linalg.vector_norm(tensor, dtype=torch.float32)
        if size > SMALL_NUMBERS * math.sqrt(tensor.numel()):
            return
        stored = self._stored_tensor(name).to(tensor.device, torch.float32)
        error_size = torch.linalg.vector_norm(stored - tensor)
        if error_size > torch.finfo(torch.float16).eps / 2 * torch.linalg.vector_norm(stored):
            zeroed = int(((tensor == 0) & (stored != 0)).sum())
            raise self.too_narrow(f"{name} underflows ({zeroed:,} of {tensor.numel():,} values become 0)")

    def _stored_tensor(self, name: str) -> Tensor:
        """A tensor as the base's files have it, on the CPU."""
        return self.conversion.load([self._stored_as[name]], self.checkpoint.stream).popitem()[1]

    def too_narrow(self, what: str) -> TooNarrow | ConfigError:
        """The error for a number that does not fit the compute type: TooNarrow if another type may be taken, else
        ConfigError with advice. what: the message's subject and verb."""
        message = f"{self.checkpoint.path}: {what} in {self.arithmetic.name}"
        return TooNarrow(message) if self.may_widen else ConfigError(f"{message}; {wider(self.dtype)}")

    def no_numbers(self, what: str = "its activations") -> TooNarrow | ConfigError:
        """The error if the base's outputs are NaN or infinite although its weights are not. what: the outputs that
        are, for the message."""
        if self.dtype == torch.float16:
            return self.too_narrow(f"{what} overflow")
        return ConfigError(
            f"{self.checkpoint.path}: its outputs are NaN or infinite even in {dtype_name(self.dtype)}; check that its "
            "weights are intact and match config.json"
        )


def _begin_stream(model: "weakref.ref[ResidentModel]", _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: the input embedding's output in the type of the residual stream."""
    return output.float() if model().arithmetic.float32_stream else output


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite values."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _tensors_of(module: PreTrainedModel) -> dict[str, Tensor]:
    """A model's own parameters and buffers, by name. A layer that accelerate copies to its device for every forward has
    no data of its own; its tensors here are those that are copied."""
    tensors = module.state_dict(keep_vars=True)
    for prefix, child in module.named_modules():
        hook = getattr(child, "_hf_hook", None)
        for child_hook in getattr(hook, "hooks", [hook]):  # accelerate's SequentialHook has several
            for name, tensor in child.named_parameters(recurse=False):
                if tensor.is_meta and getattr(child_hook, "weights_map", None) is not None:
                    tensors[f"{prefix}.{name}"] = child_hook.weights_map[name]
    return tensors
