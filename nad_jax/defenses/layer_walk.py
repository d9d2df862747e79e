# SPDX-License-Identifier: Apache-2.0
"""Two forward passes that walk side by side, one layer at a time.

Layer-wise reconstruction needs, at every layer, what the *float* network feeds into it
and what the network *quantized so far* feeds into it. Storing all of that for all
layers does not fit; recomputing it for every layer costs a pass per layer. So both
passes run at once and meet at every Conv and Dense:

    float pass      images -> conv1 -------> conv2 -------> ... -> fc
                                | x            | x                 | x
                              visit          visit               visit
                                | kernel^      | kernel^           | kernel^
    quantized pass  images -> conv1^ ------> conv2^ ------> ... -> fc^

`visit` sees a layer with both inputs and answers with the kernel (and, where
activations are quantized, the inputs) with which the quantized pass goes on. Two
forward passes in all, and only the two frontiers are alive.

Flax runs a module as one call from images to logits, so a pass can only pause inside
an intercepted layer call. The float pass therefore lives in a thread of its own and
hands over one layer at a time; the two never run at once. Models know nothing of this.
"""

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.core

from nad_jax import errors
from nad_jax.models import common
from nad_jax.models import layers as layers_lib
from nad_jax.training import environment

# (layer, float_inputs, inputs) -> (kernel, inputs) for the quantized pass.
Visit = Callable[[layers_lib.Layer, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def walk(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    layers: list[layers_lib.Layer],
    visit: Visit,
    *,
    revisit: Callable[[layers_lib.Layer, jax.Array], jax.Array] | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Calls `visit` once per layer, in the order of the forward pass.

    A layer called again in the same pass keeps the kernel of its first visit; `visit`
    is not called again, so statistics come from the first call alone. The inputs of
    later calls go through `revisit`. What must be known of all calls can be had before,
    from `look_ahead`.

    Args:
      module: The Linen module.
      variables: Its float variables.
      images: All calibration images at once.
      layers: From `layers.find_layers`.
      visit: Decides kernel and inputs of the quantized pass.
      revisit: (layer, inputs) -> inputs of the quantized pass at later calls; None
        leaves them as they are.
      apply_kwargs: Keyword arguments of the module's call.

    Raises:
      InputError: a layer is called inside `jit`, `remat` or `scan`, where its inputs
        have no values.
    """
    module = _without_features(module)
    by_path = {layer.path: layer for layer in layers}

    def forward(interceptor):
        with nn.intercept_methods(interceptor):
            module.apply(variables, images, **(apply_kwargs or {}))

    def float_pass(hand_over):
        forward(_float_calls(by_path, hand_over))

    visited: dict[layers_lib.Path, jax.Array] = {}

    with _Stepper(float_pass) as float_layers:

        def replace(next_fun, args, kwargs, context):
            if not layers_lib.is_layer_call(context):
                return _between(next_fun, args, kwargs, context)
            inputs = layers_lib.input_of(args, kwargs)
            _check_concrete(context.module.path, inputs)
            path, float_inputs = next(float_layers)
            assert path == context.module.path, (path, context.module.path)
            layer = by_path[path]
            if path in visited:
                inputs = inputs if revisit is None else revisit(layer, inputs)
            else:
                visited[path], inputs = visit(layer, float_inputs, inputs)
                environment.give_memory_back()
            params = context.module.variables["params"]
            return _run(layer.geometry, visited[path], inputs, params)

        forward(replace)
    for path in by_path:
        # Compiled code that ran before runs again without passing by here.
        if path not in visited:
            raise _hidden(path)


def look_ahead(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    layers: list[layers_lib.Layer],
    visit: Callable[[layers_lib.Layer, list[jax.Array]], None],
    *,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Calls `visit` on layers called several times, with the float inputs of all calls.

    A forward pass of its own, in front of `walk`, for what the first call has to be
    given and later ones decide about. Inputs are kept until the layer's last call.

    Args:
      module: The Linen module.
      variables: Its float variables.
      images: All calibration images at once.
      layers: From `layers.find_layers`.
      visit: (layer, inputs of its calls), after the last one.
      apply_kwargs: Keyword arguments of the module's call.

    Raises:
      InputError: as for `walk`.
    """
    module = _without_features(module)
    by_path = {layer.path: layer for layer in layers}
    pending: dict[layers_lib.Path, list[jax.Array]] = {
        layer.path: [] for layer in layers if layer.calls > 1
    }
    if not pending:
        return

    def keep(call):
        path, inputs = call
        if path not in pending:
            return
        pending[path].append(inputs)
        if len(pending[path]) == by_path[path].calls:
            visit(by_path[path], pending.pop(path))

    with nn.intercept_methods(_float_calls(by_path, keep)):
        module.apply(variables, images, **(apply_kwargs or {}))
    for path in pending:
        raise _hidden(path)


def _without_features(module: nn.Module) -> nn.Module:
    """The module; of ours one that does not keep its features until the pass ends."""
    kinds = type(module).mro()
    is_ours = any(kind.__module__.startswith("nad_jax.models.") for kind in kinds)
    # A block of ours has none.
    if is_ours and hasattr(module, "keep_features"):
        return module.clone(keep_features=False)
    return module


def _float_calls(by_path, on_call):
    """An interceptor that tells `on_call` of each layer's (path, inputs) before it."""

    def tell(next_fun, args, kwargs, context):
        if not layers_lib.is_layer_call(context):
            return _between(next_fun, args, kwargs, context)
        path, inputs = context.module.path, layers_lib.input_of(args, kwargs)
        _check_concrete(path, inputs)
        on_call((path, inputs))
        params = context.module.variables["params"]
        return _run(by_path[path].geometry, params["kernel"], inputs, params)

    return tell


def _between(next_fun, args, kwargs, context) -> Any:
    """Any other call; a BatchNorm that only scales and shifts in one program.

    Its three operations one by one would read and write all images three times, and
    keep two more copies of them.
    """
    module = context.module
    if not (
        # A subclass may do anything; that of our models only converts.
        type(module) in (nn.BatchNorm, common.BatchNorm)
        and context.method_name == "__call__"
        and isinstance(module.axis, int)
        and len(args) == 1
        and kwargs.keys() <= {"use_running_average"}
        # Within that program the copy comes by here, and it has no path.
        and module.scope is not None
        and bool(module.path)
    ):
        return next_fun(*args, **kwargs)
    uses_running = kwargs.get("use_running_average")
    if uses_running is None:
        uses_running = module.use_running_average
    if not uses_running:
        return next_fun(*args, **kwargs)
    # A copy that differs in nothing but what it computes, so that programs are shared;
    # it starts from nothing, so it needs no initialisers.
    unbound = module.clone(
        parent=None,
        name=None,
        use_running_average=None,
        scale_init=nn.initializers.ones,
        bias_init=nn.initializers.zeros,
    )
    return _normalize(unbound, module.variables, *args)


@functools.partial(jax.jit, static_argnums=0)
def _normalize(module: nn.BatchNorm, variables: Any, inputs: jax.Array) -> Any:
    return module.apply(variables, inputs, use_running_average=True)


def _check_concrete(path: layers_lib.Path, inputs: jax.Array) -> None:
    if isinstance(inputs, jax.core.Tracer):
        raise _hidden(path)


def _hidden(path: layers_lib.Path) -> errors.InputError:
    return errors.InputError(
        f"layer {'/'.join(path)} is called inside jit, remat, scan or vmap, where "
        "its inputs cannot be seen; build the module without it for quantization"
    )


@functools.partial(jax.jit, static_argnums=0)
def _run(geometry, kernel, inputs, params) -> jax.Array:
    """Output of a layer, its own bias included, with this kernel."""
    return layers_lib.run(geometry, kernel, inputs, params.get("bias"))


# What JAX's context managers set for their own thread only.
_THREAD_SETTINGS = (
    "default_device",
    "default_matmul_precision",
    "disable_jit",
    "enable_x64",
    "numpy_dtype_promotion",
    "numpy_rank_promotion",
)


def _thread_settings() -> dict[str, Any]:
    return {name: getattr(jax.config, f"jax_{name}") for name in _THREAD_SETTINGS}


class _Closed(BaseException):
    """The consumer has gone; unwinds the producer's thread.

    Not an `Exception`, which a module might catch: the thread would never end.
    """


class _Stepper(Iterator):
    """Turns `function(emit)` into an iterator over what it emits.

    `function` runs in its own thread, but only while the consumer waits in `next`, and
    with the JAX settings of the thread that made the iterator.
    """

    def __init__(self, function: Callable[[Callable[[Any], None]], None]):
        self._values: queue.SimpleQueue = queue.SimpleQueue()
        self._turn = threading.Semaphore(0)
        self._closed = False

        def emit(value):
            self._values.put((value, None))
            self._turn.acquire()
            if self._closed:
                raise _Closed

        settings = _thread_settings()

        def run():
            self._turn.acquire()
            try:
                with contextlib.ExitStack() as stack:
                    for name, value in _thread_settings().items():
                        if value != settings[name]:
                            stack.enter_context(getattr(jax, name)(settings[name]))
                    if not self._closed:
                        function(emit)
                self._values.put((None, StopIteration()))
            except _Closed:
                pass
            except BaseException as error:
                self._values.put((None, error))

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def __next__(self):
        self._turn.release()
        value, error = self._values.get()
        if error is not None:
            raise error
        return value

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._closed = True
        self._turn.release()
        self._thread.join()
