"""The tree of NNX modules over a linen network: one for each linen module with parameters, under
the same name, computing with the linen module's own code.

A part that was replaced by another NNX module is called in place of the linen module of its path,
and a part whose `deterministic` differs keeps its own: both by `flax.linen.intercept_methods`,
which is left out where neither is the case.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from vit_common.errors import InputError
from vit_flax.arguments import check_key
from vit_flax.int8 import SCALE, SUMS
from vit_flax.stacked import STACKED

Path = tuple[str, ...]


class Quantized(nnx.Variable):
    """A kernel of 8-bit integers, or the factors or sums beside one (`vit_flax.int8.quantize`).

    It is no `nnx.Param`: gradients and optimizers of `nnx.Param` leave it alone.
    """


class Network:
    """What all parts of one model share and NNX keeps in the `GraphDef`: the linen model, which
    holds no parameters.

    Args:
        model: a `FlaxPreTrainedModel` with `_do_init=False`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._modules: dict[Path, nn.Module] | None = None

    def __repr__(self) -> str:
        return f"Network({type(self.model).__name__})"

    def __deepcopy__(self, memo: dict) -> Network:
        return self  # nothing in it changes

    def module(self, path: Path) -> nn.Module:
        """The linen module at a path, by itself.

        Raises:
            InputError: there is none that can run by itself.
        """
        if STACKED in path:
            raise InputError(
                "a block of a model with `scan_layers=True` cannot be called by itself: its "
                "parameters are stacked with those of all other blocks. Load the model without "
                "`scan_layers`."
            )
        if self._modules is None:
            self._modules = self._traced()
        if path not in self._modules:
            raise InputError(
                f"`{'.'.join(path)}` is not a module that runs by itself; call a part of it, or "
                "the part that it is in."
            )
        return self._modules[path]

    def _traced(self) -> dict[Path, nn.Module]:
        """Every linen module that runs when parameters are drawn, which is traced: no array is
        made."""
        found: dict[Path, nn.Module] = {}

        def note(run, args, kwargs, context):
            # Lifted modules (gradient checkpointing, renaming) call the plain one under the same
            # path; the outermost is what the network calls.
            found.setdefault(context.module.path, context.module)
            return run(*args, **kwargs)

        with _suspended(), nn.intercept_methods(note):
            jax.eval_shape(self._draw, jax.random.PRNGKey(0))
        return {path: module.clone(parent=None) for path, module in found.items()}

    def _draw(self, key: jax.Array) -> Any:
        model, shape = self.model, self.model.input_shape
        if "input_ids" not in inspect.signature(type(model.module).__call__).parameters:
            return model._init_module(key)
        text, image = shape if isinstance(shape[0], tuple) else (shape, None)
        images = () if image is None else (jnp.zeros(image, model.dtype),)
        return model.module.init(key, jnp.zeros(text, jnp.int32), *images)


class NNXPart(nnx.Module):
    """A part of a network: its parameters as `nnx.Param`, the parts inside it by name.

    `part.name` and `part[i]` reach what is inside: `model.vit.encoder.layer[0]` is
    `model.vit.encoder.layer` at "0". The names are those of the parameter tree, so
    `nnx.to_pure_dict(nnx.state(part))` is the linen tree.

    A part is called with the arguments of its linen module (`module`), images as (B, H, W, C).
    A part may be replaced by any other NNX module, which the network then calls with the same
    arguments.

    Args:
        network: what it is a part of.
        path: names on the way to it.
        params: nested dict of arrays, which it holds without a copy.
    """

    def __init__(self, network: Network, path: Path, params: Mapping[str, Any]) -> None:
        self._network = network
        self._path = path
        self.deterministic = True  # what `train()` and `eval()` set
        for name, value in params.items():
            if (
                name.startswith("_")
                or name in ("rngs", "deterministic")
                or hasattr(type(self), name)
            ):
                raise InputError(
                    f"an NNX module cannot have a part of the name {name!r}, which NNX modules use "
                    "themselves; rename it in the linen module."
                )
            if isinstance(value, Mapping):
                setattr(self, name, NNXPart(network, (*path, name), value))
            else:
                setattr(self, name, _variable(name, value))

    # -- what is inside

    def _inside(self) -> Iterator[tuple[str, Any]]:
        """Names and values of the variables and modules inside."""
        for name, value in vars(self).items():
            if isinstance(value, (nnx.Variable, nnx.Module)) and name != "rngs":
                yield name, value

    def __getitem__(self, name: int | str) -> Any:
        inside = dict(self._inside())
        if str(name) not in inside:
            raise KeyError(
                f"{name!r}: {'.'.join(self._path) or 'the model'} has {', '.join(inside)}."
            )
        return inside[str(name)]

    def __setitem__(self, name: int | str, value: Any) -> None:
        self[name]  # there must be one
        setattr(self, str(name), value)

    def __len__(self) -> int:
        return sum(1 for _ in self._inside())

    def __iter__(self) -> Iterator[Any]:
        """The blocks of a list of blocks, in order; the parts and parameters of any other part."""
        inside = dict(self._inside())
        numbered = all(name.isdecimal() for name in inside)
        return iter([inside[name] for name in (sorted(inside, key=int) if numbered else inside)])

    def __bool__(self) -> bool:
        return True  # with `__len__`, a part without parameters would be False

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, a nested dict of arrays under linen's names.

        Raises:
            InputError: a part was replaced by another NNX module.
        """
        foreign = {".".join(path) for path, part in self._parts() if not isinstance(part, NNXPart)}
        if foreign:
            raise InputError(
                "the parameters are no linen tree: another NNX module is in the place of "
                f"{', '.join(sorted(foreign))}. `nnx.state(model)` has the parameters of both."
            )
        return self._tree()

    @property
    def module(self) -> nn.Module:
        """The linen module that this part computes with."""
        return self._network.module(self._path)

    def _parts(self) -> Iterator[tuple[Path, nnx.Module]]:
        """Paths and modules of the parts, itself first; nothing inside a foreign one."""
        yield self._path, self
        for name, value in self._inside():
            if isinstance(value, NNXPart):
                # Where it is now, not where it came from: parts may be moved.
                for path, part in value._parts():
                    yield (*self._path, name, *path[len(value._path) :]), part
            elif isinstance(value, nnx.Module):
                yield (*self._path, name), value

    def _tree(self) -> dict[str, Any]:
        """The parameters as linen takes them; of foreign modules, which linen does not run, arrays
        of the right shapes that take no memory."""
        tree: dict[str, Any] = {}
        for name, value in self._inside():
            if isinstance(value, NNXPart):
                tree[name] = value._tree()
            elif isinstance(value, nnx.Variable):
                tree[name] = value.get_value()
            else:
                tree[name] = _placeholders(self._network.model._shapes, (*self._path, name))
        return tree

    # -- calls

    def __call__(self, *args: Any, rngs: Any = None, method: str | None = None, **kwargs: Any):
        """Run this part of the network.

        Args:
            *args, **kwargs: those of its linen module; `deterministic`, if the module has it, is
                the part's own unless it is given.
            rngs: `nnx.Rngs` or a JAX random key, for dropout.
            method: another method of the linen module than `__call__`.

        Returns:
            What the linen module returns.

        Raises:
            InputError: an argument does not fit; the part cannot run by itself.
        """
        module = self.module
        names = inspect.signature(getattr(type(module), method or "__call__")).parameters
        given = kwargs.get("deterministic")
        if "deterministic" in names and [*names].index("deterministic") > len(args):
            kwargs["deterministic"] = self.deterministic if given is None else given
        key = dropout_key(rngs)
        with self._intercepted(given):
            return module.apply(
                {"params": self._tree()},
                *args,
                rngs=None if key is None else {"dropout": key},
                method=method,
                **kwargs,
            )

    def _odd(self, deterministic: bool | None = None) -> dict[Path, nnx.Module] | None:
        """The parts by path from here, if any is foreign or is in another mode than this one."""
        parts = {path[len(self._path) :]: part for path, part in self._parts()}
        if deterministic is not None:  # the call says so for all parts
            parts = {path: part for path, part in parts.items() if not isinstance(part, NNXPart)}
            return parts or None
        odd = any(
            not isinstance(part, NNXPart) or part.deterministic != self.deterministic
            for part in parts.values()
        )
        return parts if odd else None

    @contextlib.contextmanager
    def _intercepted(self, deterministic: bool | None = None) -> Iterator[bool]:
        """Linen calls inside this go to the parts that differ; gives whether any does."""
        parts = self._odd(deterministic)
        if parts is None:
            with _suspended():
                yield False
            return
        with _suspended() as token, nn.intercept_methods(_interceptor(parts, token)):
            yield True


def _variable(name: str, value: Any) -> nnx.Variable:
    integers = not jnp.issubdtype(jnp.result_type(value), jnp.floating)
    kind = Quantized if integers or name in (SCALE, SUMS) else nnx.Param
    return kind(value)


def _placeholders(shapes: Mapping[Path, tuple[int, ...]], path: Path) -> Any:
    """A nested dict of views of one zero, for the parameters under a path."""
    inside = {at[len(path) :]: shape for at, shape in shapes.items() if at[: len(path)] == path}
    zero = np.zeros((), np.float32)
    return unflatten_dict({at: np.broadcast_to(zero, shape) for at, shape in inside.items()})


def dropout_key(rngs: Any) -> jax.Array | None:
    """The key of one call's dropout, of `nnx.Rngs` (the stream "dropout", or the default one) or a
    JAX random key; None of None."""
    if rngs is None:
        return None
    if isinstance(rngs, nnx.Rngs):
        try:
            return rngs.dropout()
        except (AttributeError, ValueError) as error:
            raise InputError(
                "`rngs` has no stream for dropout; give `nnx.Rngs(dropout=0)` or `nnx.Rngs(0)`."
            ) from error
    if isinstance(rngs, nnx.RngStream):
        return rngs()
    check_key("rngs", rngs)
    return rngs


# -- linen calls that go elsewhere

_local = threading.local()


@contextlib.contextmanager
def _suspended() -> Iterator[object]:
    """Interceptors of the calls around this one do nothing inside it: it is a network of its own.
    Gives what says that an interceptor belongs to it."""
    token, before = object(), getattr(_local, "token", None)
    _local.token = token
    try:
        yield token
    finally:
        _local.token = before


def _interceptor(parts: Mapping[Path, nnx.Module], token: object) -> Callable[..., Any]:
    def intercept(run, args, kwargs, context):
        part = parts.get(context.module.path)
        if part is None or _local.token is not token:
            return run(*args, **kwargs)
        name = context.method_name
        if not isinstance(part, NNXPart):
            if name == "setup":
                return None  # its parameters are not there
            return getattr(part, name)(*args, **kwargs)
        method = getattr(type(context.module), name, None)  # a lifted module's has no name
        if name != "setup" and method is not None:
            names = [*inspect.signature(method).parameters][1:]
            if "deterministic" in names:
                at = names.index("deterministic")
                if at < len(args):
                    args = (*args[:at], part.deterministic, *args[at + 1 :])
                else:
                    kwargs = {**kwargs, "deterministic": part.deterministic}
        return run(*args, **kwargs)

    return intercept
