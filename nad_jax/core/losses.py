# SPDX-License-Identifier: Apache-2.0
"""The losses of both defences: pure functions of arrays.

NAD compares attention maps and gives one value per example, ``[B]``, as does the
divergence of logits that our variant of it adds. Of EFRAP's three
terms the one about activations does, too; the two about a layer's weights are scalars.
The public code weights EFRAP's terms by 1, 1 and 0.01::

    total = mean(activation_preservation_loss(...))    # L_A
          + 1 * flip_loss(...)                         # L_F
          + 0.01 * binarization_penalty(...)           # L_P

Weighting, masking and averaging over the batch are left to the caller. Differences and
sums are computed in float32 (float64 for float64 inputs), which is also what comes
back. What acts as a target is cut from the gradient here, inside.
"""

import math
from collections.abc import Mapping

import jax
import jax.core
import jax.numpy as jnp

from nad_jax import errors
from nad_jax.core import attention, shapes


def attention_distance(
    student: jax.Array,
    teacher: jax.Array,
    *,
    p: float = 2,
    reduction: str = "sum",
    teacher_is_map: bool = False,
) -> jax.Array:
    """Mean squared difference of two attention maps, one value per example.

    ``mean over h, w of (map(student) - map(teacher)) ** 2``, with `attention_map` of
    unit norm. The mean over the batch is the public code's value; the paper's equation
    is usually quoted with the norm, ``sqrt(H * W * distance)``. The code is followed
    because the published betas (500, 1000, 1000) belong to it.

    Args:
      student: Features of the student, ``[B, H, W, C]``.
      teacher: Features of the teacher, ``[B, H, W, D]``; only the number of channels
        may differ, since maps have none. With `teacher_is_map` ``[B, H, W]``.
      p: Power of the attention map; the public code uses 2.
      reduction: ``"sum"`` or ``"mean"`` over channels; see `attention_map`.
      teacher_is_map: Whether teacher is its `attention_map` already, made earlier with
        the same `p` and `reduction`: a frozen teacher's can be kept.

    Returns:
      ``[B]``, from 0 (equal maps) to ``2 / (H * W)`` (maps that nowhere overlap).

    Raises:
      InputError: For different batch or spatial sizes, for features that
        `attention_map` refuses, such as 1x1 maps, and for a teacher that is a map and
        not said to be one, or the other way round.

    Gradients:
      The teacher gets none.

    Example:
      >>> left = jnp.asarray([[[[1.0], [0.0]], [[0.0], [0.0]]]])  # one hot pixel
      >>> right = jnp.asarray([[[[0.0], [0.0]], [[0.0], [7.0]]]])
      >>> print(attention_distance(left, right))  # (1 + 0 + 0 + 1) / 4
      [0.5]

    References:
      Li et al., "Neural Attention Distillation", ICLR 2021, equation 2.
    """
    teacher_map = jax.lax.stop_gradient(teacher)
    # Said, not guessed: features without their channel axis look like maps.
    if teacher_is_map:
        shapes.check_rank("a teacher that is a map", teacher, "B H W")
        shapes.check_floating("a teacher that is a map", teacher)
    else:
        shapes.check_rank("a teacher without teacher_is_map", teacher, "B H W C")
        teacher_map = attention.attention_map(teacher_map, p=p, reduction=reduction)
    student_map = attention.attention_map(student, p=p, reduction=reduction)
    shapes.check_same_shape(
        "the attention maps of student", student_map, "teacher", teacher_map
    )
    difference = student_map - teacher_map.astype(student_map.dtype)
    return jnp.mean(jnp.square(difference), axis=(1, 2))


def nad_loss(
    student_features: Mapping[str, jax.Array],
    teacher_features: Mapping[str, jax.Array],
    *,
    betas: Mapping[str, float | jax.Array],
    p: float = 2,
    reduction: str = "sum",
    teacher_is_map: bool = False,
) -> jax.Array:
    """Weighted sum of the attention distances of all stages, one value per example.

    ``sum over stages of betas[stage] * attention_distance(student, teacher)``. This is
    the distillation term alone: add it to the classification loss of the student.

    Args:
      student_features: Stage name to ``[B, H, W, C]``; only B is the same in all
        stages.
      teacher_features: The same names, each with the same B, H and W; with
        `teacher_is_map` ``[B, H, W]``.
      betas: The same names; weight of each stage in mean-square units (the paper's
        beta; the public code uses 500, 1000, 1000 for three stages of a WRN-16-1).
        Numbers, not negative. See `convert_betas` for the other unit. A stage with
        beta 0 is not computed; all 0 is the fine-tuning control. Traced numbers have
        no value to check or to skip a stage by.
      p: Power of the attention map; the public code uses 2.
      reduction: ``"sum"`` or ``"mean"`` over channels; see `attention_map`.
      teacher_is_map: Whether the teacher's are its attention maps already, see
        `attention_distance`.

    Returns:
      ``[B]``; the mean over the batch is the public code's attention term.

    Raises:
      InputError: For unequal stage names, no stage, a negative beta, sizes that do not
        fit, features that `attention_map` refuses, or maps where features are expected.

    Gradients:
      Only the student's features get one.

    Example:
      >>> left = jnp.asarray([[[[1.0], [0.0]], [[0.0], [0.0]]]])
      >>> right = jnp.asarray([[[[0.0], [0.0]], [[0.0], [7.0]]]])
      >>> print(nad_loss({"stage1": left}, {"stage1": right}, betas={"stage1": 500}))
      [250.]

      In a training loop of your own:

      >>> def loss(scale):
      ...     features = {"stage1": left + scale}
      ...     return nad_loss(features, {"stage1": right}, betas={"stage1": 500}).mean()
      >>> value, gradient = jax.jit(jax.value_and_grad(loss))(1.0)

    References:
      Li et al., "Neural Attention Distillation", ICLR 2021, equation 3.
    """
    shapes.check_same_names("betas", betas, "student_features", student_features)
    shapes.check_same_names("betas", betas, "teacher_features", teacher_features)
    _check_betas(betas)

    first_stage, some_features = next(iter(student_features.items()))
    for stage, features in student_features.items():
        if features.shape[:1] != some_features.shape[:1]:
            raise errors.InputError(
                "student_features must have one batch size, got shape "
                f"{list(some_features.shape)} for {first_stage!r} and "
                f"{list(features.shape)} for {stage!r}"
            )
    loss = jnp.zeros(some_features.shape[:1], shapes.accumulation_dtype(some_features))
    # Sorted: a float sum must not depend on the order of somebody's dict.
    for stage in sorted(betas):
        if counts(betas[stage]):
            distance = attention_distance(
                student_features[stage],
                teacher_features[stage],
                p=p,
                reduction=reduction,
                teacher_is_map=teacher_is_map,
            )
            loss = loss + betas[stage] * distance
    return loss


def counts(beta: float | jax.Array) -> bool:
    """Whether a stage is computed: with a beta above 0, or one that is traced."""
    return isinstance(beta, jax.core.Tracer) or bool(beta > 0)


def logit_distance(
    student: jax.Array, teacher: jax.Array, *, temperature: float = 2.0
) -> jax.Array:
    """Divergence of softened class probabilities, one value per example.

    ``temperature ** 2 * KL(softmax(teacher / temperature) || softmax(student /
    temperature))``; the square keeps gradients of about one size at any temperature.

    Args:
      student: Logits of the student, ``[B, classes]``.
      teacher: Logits of the teacher, same shape.
      temperature: Above 0; larger values look at the classes that are not the first.

    Returns:
      ``[B]``, at least 0 up to rounding, in nats; a class that the teacher rules out
      with ``-inf`` counts nothing.

    Raises:
      InputError: For different shapes, integers, or a temperature that is not above 0.

    Gradients:
      ``temperature * (softmax(student / temperature) - softmax(teacher /
      temperature))`` for the student; the teacher gets none.

    Example:
      >>> sure = jnp.log(jnp.asarray([[0.8, 0.2]]))
      >>> unsure = jnp.log(jnp.asarray([[0.5, 0.5]]))
      >>> print(f"{logit_distance(sure, unsure, temperature=1.0)[0]:.4f}")
      0.2231

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    shapes.check_rank("student", student, "B K")
    for name, logits in (("student", student), ("teacher", teacher)):
        shapes.check_floating(name, logits)
    shapes.check_same_shape("student", student, "teacher", teacher)
    if not 0 < temperature < float("inf"):
        raise errors.InputError(
            f"temperature must be finite and above 0, got {temperature}"
        )
    dtype = shapes.accumulation_dtype(student)
    soft, wanted = (
        jax.nn.log_softmax(logits.astype(dtype) / temperature)
        for logits in (student, jax.lax.stop_gradient(teacher))
    )
    share = jnp.exp(wanted)
    # Infinitely unlikely times infinitely far is 0 here.
    gap = jnp.where(share > 0, wanted - soft, 0.0)
    return temperature**2 * jnp.sum(share * gap, axis=-1)


def convert_betas(
    betas: Mapping[str, float],
    spatial_shapes: Mapping[str, tuple[int, int]],
    *,
    to: str,
) -> dict[str, float]:
    """Betas in the other unit, leaving the loss they give unchanged.

    A mean square over H, W is the squared distance divided by H * W, so the same loss
    needs ``beta["squared_distance"] = beta["mean_square"] / (H * W)``. The published
    500, 1000, 1000 look like 1 : 2 : 2; on squared distances they are 1 : 8 : 32.

    Args:
      betas: Stage name to weight, a plain number in the unit that is not `to`.
      spatial_shapes: Stage name to ``(H, W)``.
      to: ``"mean_square"`` (what `nad_loss` takes) or ``"squared_distance"``.

    Raises:
      InputError: For unequal stage names, a negative beta, an empty stage or an
        unknown unit.

    Example:
      >>> convert_betas({"stage3": 1000.0}, {"stage3": (8, 8)}, to="squared_distance")
      {'stage3': 15.625}
    """
    shapes.check_same_names("betas", betas, "spatial_shapes", spatial_shapes)
    _check_betas(betas)
    exponents = {"mean_square": 1, "squared_distance": -1}
    if to not in exponents:
        raise errors.InputError(f"to must be one of {sorted(exponents)}, got {to!r}")
    for stage, (height, width) in spatial_shapes.items():
        if height < 1 or width < 1:
            raise errors.InputError(
                f"spatial_shapes must be positive, got {(height, width)} for {stage!r}"
            )
    positions = {stage: h * w for stage, (h, w) in spatial_shapes.items()}
    return {
        stage: float(beta * positions[stage] ** exponents[to])
        for stage, beta in betas.items()
    }


def activation_preservation_loss(
    quantized_output: jax.Array, full_precision_output: jax.Array
) -> jax.Array:
    """Squared error of a layer's output, one value per example (EFRAP's L_A).

    Sum over the channels, mean over the positions in between; the mean over the batch
    is the public code's value. There the output is taken behind batch norm, ReLU and
    activation quantization where these follow, with inputs from the quantized model.

    Args:
      quantized_output: Output with soft-rounded weights, ``[B, ..., C]``.
      full_precision_output: Output of the unquantized model, same shape.

    Returns:
      ``[B]``, in squared units of the output.

    Raises:
      InputError: For different shapes, or fewer than two axes.

    Gradients:
      full_precision_output gets none.

    Example:
      >>> ones = jnp.ones((1, 2, 2, 3))
      >>> print(activation_preservation_loss(3 * ones, ones))  # 3 channels * 2 ** 2
      [12.]
    """
    shapes.check_same_shape(
        "quantized_output",
        quantized_output,
        "full_precision_output",
        full_precision_output,
    )
    if quantized_output.ndim < 2:
        raise errors.InputError(
            "outputs must have the axes [B, ..., C], "
            f"got shape {list(quantized_output.shape)}"
        )
    dtype = shapes.accumulation_dtype(quantized_output)
    target = jax.lax.stop_gradient(full_precision_output).astype(dtype)
    per_channel = jnp.square(quantized_output.astype(dtype) - target)
    per_position = jnp.sum(per_channel, axis=-1)
    return jnp.mean(per_position, axis=tuple(range(1, per_position.ndim)))


def flip_loss(
    soft_rounding: jax.Array,
    nearest_rounding: jax.Array,
    error_weight: jax.Array,
    *,
    eps: float = 1e-8,
) -> jax.Array:
    """Error-weighted cross-entropy to the opposite of nearest rounding (EFRAP's L_F).

    ``sum of error_weight * BCE(soft_rounding, 1 - nearest_rounding)`` with
    ``BCE = -ln(q + eps)`` and q the share given to the flipped choice: soft_rounding
    where nearest rounds down, 1 - soft_rounding where it rounds up. A weight that
    stays on its nearest level costs ``-ln(eps)``, 18.4 times its error weight.

    Args:
      soft_rounding: h(V), 0 = down and 1 = up, in [0, 1], any shape.
      nearest_rounding: What nearest rounding does, 0 or 1 (bool, int or float), same
        shape.
      error_weight: Not negative, same shape; see `rounding_error_weight`.
      eps: Floor inside the logarithm; the public code uses 1e-8.

    Returns:
      Scalar, a sum: it grows with the layer. The public code gives it weight 1.

    Raises:
      InputError: For different shapes or eps out of range.

    Gradients:
      Only soft_rounding gets one: ``-error_weight / (q + eps)`` in q, finite at the
      ends, where it reaches ``error_weight / eps``.

    Example:
      >>> soft = jnp.asarray([0.5, 1.0])
      >>> nearest = jnp.asarray([1, 0])
      >>> weight = jnp.asarray([2.0, 5.0])  # 2 * ln 2, and 5 * 0: already flipped
      >>> print(f"{flip_loss(soft, nearest, weight):.4f}")
      1.3863
    """
    shapes.check_same_shape(
        "soft_rounding", soft_rounding, "nearest_rounding", nearest_rounding
    )
    shapes.check_same_shape(
        "soft_rounding", soft_rounding, "error_weight", error_weight
    )
    if not 0 < eps < 1:
        raise errors.InputError(f"eps must lie between 0 and 1, got {eps}")
    dtype = shapes.accumulation_dtype(soft_rounding)
    soft_rounding = soft_rounding.astype(dtype)
    is_up = nearest_rounding.astype(bool)
    # Selecting q before eps is added is not only shorter than the two-sided BCE: XLA
    # merges the constants of (1 - h) + eps into 1 - h, whose logarithm is -inf at 1.
    flipped_share = jnp.where(is_up, 1 - soft_rounding, soft_rounding)
    cross_entropy = -jnp.log(flipped_share + eps)
    return jnp.sum(jax.lax.stop_gradient(error_weight).astype(dtype) * cross_entropy)


def rounding_error_weight(
    rounding_error: jax.Array,
    *,
    form: str = "element",
    step: jax.Array | float | None = None,
) -> jax.Array:
    """How strongly `flip_loss` pushes each weight of a layer away from nearest.

    ``"element"`` is the public code: ``|rounding_error|``. ``"neuron"`` is the paper's
    wording, the L2 norm of the error of a whole neuron, shared by its weights::

        sqrt(sum over all axes but the last of rounding_error ** 2)

    In weight units both depend on the scale of the layer: with 4 bits nearly all
    weights flip, with 8 bits only those near a tie. Given `step`, the error is counted
    in steps (at most 0.5 per weight unless clipped) and that dependence is gone.

    Args:
      rounding_error: Weight minus its nearest fake quantization, ``[..., C]`` with
        the output channels last. (The public code leaves the error of clipped weights
        in; `nad_jax.core.rounding` sets it to 0.)
      form: ``"element"`` or ``"neuron"``.
      step: Size of one quantization step, above 0, in weight units: a number,
        ``[C]``, or a scale ``[1, ..., C]`` or ``[1, ..., 1]`` of the same rank as
        rounding_error. None keeps weight units, as both paper and code do.

    Returns:
      The shape of rounding_error, not negative, float32 or float64.

    Raises:
      InputError: For an unknown form, an error without axes or a step that does not
        fit.

    Gradients:
      None: the weights are constants of the layer.

    Example:
      >>> error = jnp.asarray([[0.3, 0.1], [-0.4, 0.0]])  # [K, C]
      >>> print(rounding_error_weight(error))
      [[0.3 0.1]
       [0.4 0. ]]
      >>> print(rounding_error_weight(error, form="neuron"))
      [[0.5 0.1]
       [0.5 0.1]]
    """
    if rounding_error.ndim < 1:
        raise errors.InputError("rounding_error must have the axes [..., C], got []")
    dtype = shapes.accumulation_dtype(rounding_error)
    error = jax.lax.stop_gradient(rounding_error).astype(dtype)
    if step is not None:
        error = error / _step_like(error, step)
    if form == "element":
        return jnp.abs(error)
    if form == "neuron":
        per_neuron = jnp.sqrt(jnp.sum(jnp.square(error), axis=range(error.ndim - 1)))
        return jnp.broadcast_to(per_neuron, error.shape)
    raise errors.InputError(f"form must be one of ['element', 'neuron'], got {form!r}")


def binarization_penalty(
    soft_rounding: jax.Array, *, exponent: float | jax.Array = 2.0
) -> jax.Array:
    """Distance of the soft rounding from a decision, summed (EFRAP's L_P).

    ``sum of 1 - |2 * soft_rounding - 1| ** exponent``: 0 at 0 and 1, 1 at one half.

    Args:
      soft_rounding: h(V) in [0, 1], any shape.
      exponent: Above 1; smaller is a broader hill. The public code keeps 2: the range
        20 to 2 and the warm-up in its configuration are never used.

    Returns:
      Scalar, a sum: it grows with the layer. The public code gives it weight 0.01; the
      paper is said to use 1.

    Raises:
      InputError: For an exponent that is no single number, not finite or not above 1
        (a kink at one half). A traced one has no value to check.

    Example:
      >>> print(binarization_penalty(jnp.asarray([0.0, 0.5, 0.75, 1.0])))
      1.75
    """
    if jnp.ndim(exponent):
        raise errors.InputError(
            f"exponent must be a single number, got shape {list(jnp.shape(exponent))}"
        )
    if not isinstance(exponent, jax.core.Tracer) and not 1 < exponent < math.inf:
        raise errors.InputError(f"exponent must be finite and above 1, got {exponent}")
    dtype = shapes.accumulation_dtype(soft_rounding)
    decision = jnp.abs(2 * soft_rounding.astype(dtype) - 1)
    return jnp.sum(1 - decision**exponent)


def gram_preservation_loss(weight_difference: jax.Array, gram: jax.Array) -> jax.Array:
    """Expected squared error of a linear layer's output, from its Gram matrix.

    ``trace(D^T G D)`` with ``D = weight_difference`` and ``G = gram``. For ``G`` the
    mean of ``outer(x, x)`` over the N inputs of a layer it equals the batch mean of
    `activation_preservation_loss` of ``x @ (W + D)`` and ``x @ W``, without keeping an
    input. Behind a ReLU, or when the quantized model sees other inputs than the
    unquantized one, it is a surrogate of L_A and not equal to it.

    Args:
      weight_difference: Quantized minus original weights, ``[K, C]``: a convolution
        kernel with its input axes flattened.
      gram: Mean outer product of the inputs, ``[K, K]``, symmetric.

    Returns:
      Scalar: sum over the channels, mean over the inputs.

    Raises:
      InputError: For shapes that do not fit.

    Gradients:
      ``2 * gram @ weight_difference`` for the difference.

    Example:
      >>> inputs = jnp.asarray([[1.0, 0.0], [1.0, 2.0]])
      >>> gram = inputs.T @ inputs / 2
      >>> difference = jnp.asarray([[1.0], [1.0]])  # outputs off by 1 and by 3
      >>> print(gram_preservation_loss(difference, gram))
      5.0
    """
    shapes.check_rank("weight_difference", weight_difference, "K C")
    shapes.check_rank("gram", gram, "K K")
    inputs = weight_difference.shape[0]
    if gram.shape != (inputs, inputs):
        raise errors.InputError(
            f"gram must be [K, K] for weight_difference [K, C], got "
            f"{list(gram.shape)} and {list(weight_difference.shape)}"
        )
    dtype = shapes.accumulation_dtype(weight_difference)
    difference = weight_difference.astype(dtype)
    # Without `highest`, accelerators multiply in bfloat16 and the trace of a positive
    # matrix can come out negative.
    projected = jnp.matmul(gram.astype(dtype), difference, precision="highest")
    return jnp.sum(difference * projected)


def _step_like(error: jax.Array, step: jax.Array | float) -> jax.Array:
    """`step` spread over the shape of `error`; refuses any other broadcasting."""
    size = jax.lax.stop_gradient(jnp.asarray(step, error.dtype))
    channels, ones = error.shape[-1:], (1,) * (error.ndim - 1)
    accepted = [(), channels, (*ones, *channels), (*ones, 1)]
    if size.shape not in accepted:
        raise errors.InputError(
            f"step must have one of the shapes {accepted} for rounding_error "
            f"{error.shape}, got {size.shape}"
        )
    return jnp.broadcast_to(size, error.shape)


def _check_betas(betas: Mapping[str, float | jax.Array]) -> None:
    if not betas:
        raise errors.InputError("betas must name at least one stage, got {}")
    for stage, beta in betas.items():
        if jnp.ndim(beta):
            raise errors.InputError(
                f"betas must be single numbers, got shape {list(jnp.shape(beta))} for "
                f"{stage!r}"
            )
        if isinstance(beta, jax.core.Tracer):
            continue
        if not (beta >= 0 and math.isfinite(beta)):
            raise errors.InputError(
                f"betas must be finite and not negative, got {beta} for {stage!r}"
            )
