"""Notes every op of a run below autograd: what it read, what it made, in which module it ran.

Tensors are told apart by storage and layout, not by Python identity: a view, `y.data` and `y.detach()` are
the memory they look at. Only what an nn.Identity gives is told from what it took. The recorder keeps no
tensor alive; memory that is alive when the run is over is read by somebody.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from fusecli.graph.dataflow import Call, Recording, Ref, Value, Visit
from fusecli.graph.escapes import ASKING, COPIES, Escapes
from fusecli.graph.held import Hold
from fusecli.graph.kinds import is_identity
from fusecli.graph.memory import Layout, Memory, expired, key_of, layout_of, shape_of
from fusecli.graph.ops import LOOKS, MOVES
from fusecli.graph.places import place
from fusecli.sample import tensors_in

# The very tensor under another name is no step; a view back to a shape that was there before is one.
_SAME = frozenset({"aten.detach", "aten.alias", "aten.lift_fresh", "aten._to_copy"})
# What tensor subclasses ask about themselves; nothing is read.
_QUESTIONS = ("prim.", "aten.sym_", "aten.is_contiguous", "aten.is_same_size", "aten.is_pinned")


class Recorder(TorchDispatchMode):
    """Records what runs inside `with recorder.watching(model):`."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler, 1.3 seconds of CPU, to say that it leaves this class alone."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Value] = []
        self._calls: list[Call] = []
        self._visits: list[Visit] = []
        self._stack: list[int] = []
        self._memory: dict[Any, Memory] = {}
        self._storages: dict[Any, int] = {}
        # What an nn.Identity gave: its own value, as long as nothing is written to that memory.
        self._given_on: Any = WeakTensorKeyDictionary()
        self._names: dict[str, tuple[str, ...]] = {}
        self._owners: dict[Any, set[str]] = {}
        self._written: set[str] = set()
        self._given: set[Any] = set()
        self._returned: set[Any] = set()
        # Dispatch modes belong to a thread: what runs in another one is not seen, but for its traces.
        self._thread = threading.get_ident()
        self._unmade: dict[Any, int] = {}
        self._elsewhere: dict[str, int] = {}
        self._looks: Any = WeakTensorKeyDictionary()
        self._escaped = False
        self._places: dict[int, str] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, everything that runs is recorded; the modules of `model` are known by name."""
        paths: dict[int, list[str]] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for path, module in modules.items():
            paths.setdefault(id(module), []).append(path)
        self._names = {names[0]: tuple(names) for names in paths.values()}
        self._know(model)
        firsts = {names[0]: modules[names[0]] for names in paths.values()}
        handles = [
            handle
            for path, module in firsts.items()
            if not isinstance(module, torch.jit.ScriptModule)  # its ops are those of the module around it
            for handle in self._follow(module, path)
        ]
        try:
            with Escapes(self._escape), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def takes(self, inputs: Any) -> None:
        """The tensors in `inputs` are what the model is called with."""
        for number, tensor in enumerate(tensors_in(inputs)):
            memory, _ = self._memory_of(tensor, f"input {number}", constant=False)
            self._given.add(memory)

    def returns(self, output: Any) -> None:
        """The tensors in `output` are what the model returns."""
        for tensor in tensors_in(output):
            key, value = self._memory_of(tensor)
            self._returned.add(key)
            self._note(None, "the model's output", (), {}, (value,), ())

    def outlives(self, model: nn.Module) -> None:
        """Whatever memory of the run is alive now has a reader that no op shows: an activation kept on a
        module or by a hook."""
        if self._left_over():
            gc.collect()
        left = self._left_over()
        kept = {
            key_of(tensor)[0]: f"kept after the run as {'.'.join(filter(None, [path, name]))}"
            for path, module in (model.named_modules() if left else ())
            for name, held in {**vars(module), **module._parameters, **module._buffers}.items()
            if not name.startswith("_")
            for tensor in tensors_in(held)
        }
        for key in left:
            name = kept.get(key, "kept after the run by a hook or by something outside the model")
            self._note(None, name, (), {}, (self._memory[key].latest,), ())
        for key in self._given - self._returned:
            latest = self._memory[key].latest
            if self._values[latest].made_by is not None:
                name = ", ".join(sorted(self._owners.get(key, ()))) or "a tensor that the model was given"
                self._note(None, f"written to {name}", (), {}, (latest,), ())

    def _left_over(self) -> list[Any]:
        ours = self._given | self._returned
        return [k for k, memory in self._memory.items() if k not in ours and not expired(memory.watch)]

    def recording(
        self, aliases: tuple[frozenset[str], ...] = (), held: Mapping[str, Hold] | None = None
    ) -> Recording:
        """The run as a graph; `aliases` are names of the same memory in the model that was copied, `held` its
        modules that are held outside of its tree too."""
        return Recording(
            tuple(self._values),
            tuple(self._calls),
            tuple(self._visits),
            self._names,
            frozenset(self._written),
            aliases,
            # What was there before the run is still there after it: a constant that somebody keeps.
            frozenset(v for key, v in self._unmade.items() if expired(self._memory[key].watch)),
            self._elsewhere,
            held or {},
            self._places,
        )

    def _escape(self, name: str, tensor: Tensor) -> None:
        """Something outside torch reads this tensor."""
        self._escaped = True
        if name in ASKING:
            self._places[len(self._calls)] = place()
        value = self._memory_of(tensor)[1]
        self._note(None, f"{name} in {self._place()}", (), {}, (value,), (), lends=name not in COPIES)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name.startswith(_QUESTIONS):
            return func(*args, **kwargs)
        # In inference mode composite ops, such as conv2d, arrive here whole.
        if torch.is_inference_mode_enabled() and isinstance(func, OpOverload):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if name == "aten.lift_fresh":  # a literal, or numbers that come back from outside
            self._memory_of(args[0], constant=not self._escaped)
        refs, named = tree_map_only(Tensor, lambda tensor: Ref(self._memory_of(tensor)[1]), (args, kwargs))
        output = func(*args, **kwargs)
        reads = tuple(leaf.value for leaf in tree_leaves((refs, named)) if isinstance(leaf, Ref))
        self._write_down(func, name, refs, named, reads, _written(func, args, kwargs), output)
        return output

    def _write_down(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reads: tuple[int, ...],
        written: list[Tensor],
        output: Any,
    ) -> None:
        constant = all(self._values[value].constant for value in reads) and not _random(func)
        # An activation derives from everything before it: that would be long to tell, and nobody asks.
        sources = (self._values[value].origins for value in reads)
        origins = frozenset().union(*sources) if constant else frozenset()
        number = len(self._calls)
        made: list[int] = []
        for tensor in written:
            made.append(self._overwrite(tensor, number, constant, origins))
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            key, watch = key_of(tensor)
            memory = self._memory.get(key)
            known = memory.current.get(layout_of(tensor)) if memory is not None else None
            if known is not None and (known in made or name not in MOVES - _SAME):
                if memory is not None and name in _SAME and reads[:1] != (known,):
                    self._given_on[tensor] = reads[0], memory.latest
                continue
            value = self._value(tensor, number, "", constant, origins)
            made.append(value)
            if memory is None:
                memory = self._memory[key] = Memory(watch, value)
            memory.current[layout_of(tensor)] = value
        if made or not outputs:
            if name in LOOKS:
                self._places[len(self._calls)] = place()
            self._note(func, name, args, kwargs, reads, tuple(made))

    def _overwrite(self, tensor: Tensor, number: int, constant: bool, origins: frozenset[str]) -> int:
        key, _ = key_of(tensor)
        self._memory_of(tensor)
        memory = self._memory[key]
        constant = constant and self._values[memory.latest].constant
        value = self._value(tensor, number, "", constant, origins)
        memory.stale.update(memory.current)
        memory.current = {layout_of(tensor): value}
        memory.latest = value
        memory.writes += 1
        self._written |= self._owners.get(key, set())
        return value

    def _memory_of(self, tensor: Tensor, name: str = "", constant: bool | None = None) -> tuple[Any, int]:
        """The key of the storage behind `tensor` and the value that it holds now."""
        key, watch = key_of(tensor)
        layout = layout_of(tensor)
        memory = self._memory.get(key)
        if memory is None:
            # Made where no op shows it, and no part of the model: data.
            origins = frozenset([name]) if name and constant else frozenset()
            value = self._value(tensor, None, name, bool(constant), origins)
            self._memory[key] = Memory(watch, value, {layout: value})
            # What wraps other tensors has no numbers of its own: theirs are recorded.
            if constant is None and not is_traceable_wrapper_subclass(tensor):
                self._unmade[key] = value
            return key, value
        self._look(tensor, key, memory)
        own, latest = self._given_on.get(tensor, (None, None))
        if own is not None and latest == memory.latest:
            return key, own
        if layout not in memory.current:
            memory.current[layout] = self._seen_again(tensor, layout, memory)
        return key, memory.current[layout]

    def _look(self, tensor: Tensor, key: Any, memory: Memory) -> None:
        """Notes a write that no op shows: the tensor counts more than those that were recorded."""
        if key in self._given:
            return
        try:
            with torch._C.DisableTorchFunction():
                version = tensor._version
        except RuntimeError:  # an inference tensor does not count
            return
        known = self._looks.get(tensor)
        if known == (version, memory.writes):
            return
        self._looks[tensor] = version, memory.writes
        before, writes = known or (version, memory.writes)
        if version - before > memory.writes - writes:
            reads, number = (memory.latest,), len(self._calls)
            value = self._overwrite(tensor, number, False, frozenset())
            self._looks[tensor] = version, memory.writes
            self._note(None, "a write that no op shows, as from another thread", (), {}, reads, (value,))

    def _look_around(self) -> None:
        """Looks at every tensor of the run that is alive: it may have been written to and never be read."""
        for tensor in list(self._looks):
            key = key_of(tensor)[0]
            if key in self._memory:
                self._look(tensor, key, self._memory[key])

    def _seen_again(self, tensor: Tensor, layout: Layout, memory: Memory) -> int:
        """The value of a view that was made without an op, or that a write to another view has changed."""
        reads = tuple(dict.fromkeys([*filter(None, [memory.stale.get(layout)]), memory.latest]))
        source = self._values[memory.latest]
        maker = self._calls[source.made_by].name if source.made_by is not None else "a view"
        value = self._value(tensor, len(self._calls), "", source.constant, source.origins)
        self._note(_SEEN_AGAIN, f"{maker} through another view", (), {}, reads, (value,))
        return value

    def _value(
        self, tensor: Tensor, made_by: int | None, name: str, constant: bool, origins: frozenset[str]
    ) -> int:
        number = len(self._values)
        storage = self._storages.setdefault(key_of(tensor)[0], len(self._storages))
        self._values.append(
            Value(number, shape_of(tensor), tensor.dtype, made_by, name, constant, origins, storage)
        )
        return number

    def _note(
        self,
        op: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reads: tuple[int, ...],
        makes: tuple[int, ...],
        lends: bool = False,
    ) -> None:
        number, visits = len(self._calls), tuple(self._stack)
        self._calls.append(Call(number, op, name, args, kwargs, reads, makes, visits, lends))

    def _given_by_identity(self, tensor: Tensor) -> Tensor:
        """The same numbers, but a value of its own: a branch that is an identity is told from its input."""
        memory = self._memory[self._memory_of(tensor)[0]]
        before = dict(memory.current)
        output = tensor.view(tensor.shape)
        self._given_on[output] = memory.current[layout_of(output)], memory.latest
        memory.current = before
        return output

    def _know(self, model: nn.Module) -> None:
        """Names the parameters, buffers and other tensors of the model."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for path, module in modules.items():
            for name, tensor in chain(
                module.named_parameters(recurse=False), module.named_buffers(recurse=False)
            ):
                full = f"{path}.{name}" if path else name
                if self._know_tensor(tensor, full):
                    self._owners.setdefault(key_of(tensor)[0], set()).add(full)
        # Then the others: a list of weights, to let them decay, say, has no names of its own for them.
        for path, module in modules.items():
            for name, value in vars(module).items():
                for tensor in () if name.startswith("_") else tensors_in(value):
                    self._know_tensor(tensor, f"{path}.{name}" if path else name)

    def _know_tensor(self, tensor: Tensor, name: str) -> bool:
        if is_lazy(tensor):
            return False
        key, watch = key_of(tensor)
        self._given.add(key)
        self._name_memory(key, watch, tensor, name)
        return True

    def _name_memory(self, key: Any, watch: Any, tensor: Tensor, name: str) -> None:
        memory, layout = self._memory.get(key), layout_of(tensor)
        if memory is None or layout not in memory.current:
            value = self._value(tensor, None, name, True, frozenset([name]))
            memory = self._memory.setdefault(key, Memory(watch, value))
            memory.current[layout] = value

    def _follow(self, module: nn.Module, path: str) -> Iterator[Any]:
        """Hooks around one module; those of the user run outside of them, as readers of what they watch."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            self._look_around()
            takes = tuple(self._memory_of(tensor)[1] for tensor in tensors_in((args, kwargs)))
            number, begin = len(self._visits), len(self._calls)
            parent = self._stack[-1] if self._stack else None
            self._stack.append(number)
            alone = isinstance(args[0], Tensor) if len(args) == 1 else kwargs.keys() == {"input"}
            plain = alone and len(args) + len(kwargs) == 1
            self._visits.append(Visit(number, path, parent, plain, takes, (), range(begin, begin)))

        def leave(_: nn.Module, __: Any, output: Any) -> Any:
            if threading.get_ident() != self._thread:
                self._elsewhere[path] = len(self._calls)
                return None
            if not self._stack or self._visits[self._stack[-1]].path != path:
                return None  # a pre-hook of the user has raised before this call began
            if is_identity(module) and isinstance(output, Tensor) and not output.is_nested:
                output = self._given_by_identity(output)
            number = self._stack.pop()
            visit = self._visits[number]
            gives = tuple(self._memory_of(tensor)[1] for tensor in tensors_in(output))
            calls = range(visit.calls.start, len(self._calls))
            self._visits[number] = replace(visit, gives=gives, calls=calls)
            return output

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave, prepend=True, always_call=True)

    def _place(self) -> str:
        return (self._visits[self._stack[-1]].path if self._stack else "") or "the model's forward"


_SEEN_AGAIN = object()


def _name(func: Any) -> str:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return str(func)
    # view(dtype) looks at the same bytes as other numbers: no view of elements.
    overload = ".dtype" if schema.overload_name == "dtype" else ""
    return f"{schema.name.replace('::', '.')}{overload}"


def _random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an op writes to, by its schema."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found = []
    for position, argument in enumerate(schema.arguments):
        if argument.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    return found
