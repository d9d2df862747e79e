# SPDX-License-Identifier: Apache-2.0
import doctest
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from nad_jax import errors
from nad_jax.core import attention, losses

property_test = hypothesis.settings(
    max_examples=15, deadline=None, derandomize=True, database=None
)
seeds = strategies.integers(0, 1000)

BETAS = {"stage1": 500.0, "stage2": 1000.0}
FIRST_STAGE_ONLY = {"stage1": 500.0, "stage2": 0.0}

# One compilation instead of dozens of dispatched operations: the tests stay quick.
attention_distance = jax.jit(losses.attention_distance)
preservation_loss = jax.jit(losses.activation_preservation_loss)
flip_loss = jax.jit(losses.flip_loss)
gram_preservation_loss = jax.jit(losses.gram_preservation_loss)
rounding_error_weight = jax.jit(losses.rounding_error_weight, static_argnames="form")


@jax.jit
def nad_loss(student_features, teacher_features):
    return losses.nad_loss(student_features, teacher_features, betas=BETAS)


# Per dtype: nothing, tiny, ordinary, huge.
SIZES = {
    jnp.float32: [0.0, 1e-30, 1.0, 1e30],
    jnp.bfloat16: [0.0, 1e-30, 1.0, 1e30],
    jnp.float16: [0.0, 1e-2, 1.0, 6e4],
}


def random_array(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_shares(seed, *shape):
    """Away from 0 and 1, so that differences may step to both sides."""
    shares = np.random.default_rng(seed).uniform(0.05, 0.95, size=shape)
    return np.asarray(shares, np.float32)


def central_differences(function, point, step=1e-5):
    """Gradient of a float64 numpy function, entry by entry."""
    point = np.asarray(point, np.float64)
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        shift = np.zeros_like(point)
        shift[index] = step
        difference = function(point + shift) - function(point - shift)
        gradient[index] = difference / (2 * step)
    return gradient


def reference_map(features):
    strength = (np.abs(np.asarray(features, np.float64)) ** 2).sum(axis=-1)
    norm = np.sqrt((strength**2).sum(axis=(1, 2), keepdims=True))
    return strength / (norm + 1e-6)


def reference_distance(student, teacher):
    """The public code: mean square over batch and positions, float64."""
    return ((reference_map(student) - reference_map(teacher)) ** 2).mean()


def two_stages(seed, examples=3):
    return {
        "stage1": random_array(seed, examples, 4, 4, 2),
        "stage2": random_array(seed + 1, examples, 2, 2, 4),
    }


# Attention distance ----------------------------------------------------------------


@pytest.mark.slow
def test_batch_mean_of_the_distance_equals_the_reference_code():
    """And each example is compared with its own teacher."""
    student, teacher = random_array(0, 5, 4, 3, 6), random_array(1, 5, 4, 3, 6)
    distance = attention_distance(student, teacher)
    singles = [
        reference_distance(student[i : i + 1], teacher[i : i + 1]) for i in range(5)
    ]
    np.testing.assert_allclose(distance, singles, rtol=1e-5)
    np.testing.assert_allclose(
        np.mean(distance), reference_distance(student, teacher), rtol=1e-6
    )


@pytest.mark.slow
@property_test
@hypothesis.given(seed=seeds)
def test_distance_is_bounded_symmetric_and_free_of_scale(seed):
    left, right = random_array(seed, 3, 4, 4, 2), random_array(seed + 1, 3, 4, 4, 2)
    distance = attention_distance(left, right)
    assert (distance > 0).all() and (distance <= 2 / 16).all()
    np.testing.assert_allclose(attention_distance(left, left), 0, atol=1e-12)
    np.testing.assert_allclose(
        attention_distance(right * 1024, left / 1024), distance, rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("p, reduction", [(2, "sum"), (1, "mean")])
def test_a_teachers_map_can_be_given_instead_of_its_features(p, reduction):
    generator = np.random.default_rng(8)
    student, teacher = generator.random((2, 3, 4, 5, 6), np.float32)
    options = {"p": p, "reduction": reduction}
    kept = attention.attention_map(teacher, **options)
    expected = losses.attention_distance(student, teacher, **options)

    def distance(kept):
        return losses.attention_distance(student, kept, teacher_is_map=True, **options)

    np.testing.assert_array_equal(distance(kept), expected)
    loss = losses.nad_loss(
        {"a": student}, {"a": kept}, betas={"a": 2.0}, teacher_is_map=True, **options
    )
    np.testing.assert_array_equal(loss, 2 * expected)
    assert not np.any(jax.grad(lambda kept: distance(kept).sum())(kept))
    with pytest.raises(errors.InputError, match="attention maps of student"):
        distance(kept[:, :-1])


@pytest.mark.parametrize(
    ("shape", "dtype", "is_map", "message"),
    [
        ((2, 4, 4), "float32", False, r"without teacher_is_map .* got shape \[2, 4, 4"),
        ((2, 4, 4, 3), "float32", True, r"that is a map .* got shape \[2, 4, 4, 3"),
        ((2, 4, 4), "int32", True, "that is a map must be floating .* int32"),
    ],
)
def test_features_without_channels_are_no_map_unless_said_so(
    shape, dtype, is_map, message
):
    student, teacher = {"a": np.ones((2, 4, 4, 3))}, {"a": np.ones(shape, dtype)}
    with pytest.raises(errors.InputError, match=message):
        losses.attention_distance(student["a"], teacher["a"], teacher_is_map=is_map)
    with pytest.raises(errors.InputError, match=message):
        losses.nad_loss(student, teacher, betas={"a": 1.0}, teacher_is_map=is_map)


def test_maps_without_overlap_reach_the_bound():
    student, teacher = np.zeros((2, 3, 4, 4, 2), np.float32)
    student[:, :2], teacher[:, 2:] = 1, 1
    np.testing.assert_allclose(attention_distance(student, teacher), 2 / 16, rtol=1e-6)


@pytest.mark.slow
def test_a_wider_teacher_is_welcome_because_maps_have_no_channels():
    narrow = random_array(0, 2, 4, 4, 3)
    wide = np.concatenate([narrow, np.zeros((2, 4, 4, 5), np.float32)], axis=-1)
    np.testing.assert_allclose(attention_distance(narrow, wide), 0, atol=1e-12)


@pytest.mark.slow
def test_attention_alone_moves_the_student_downhill_and_never_the_teacher():
    """The first public release cut the gradient of the whole term."""
    student, teacher = random_array(0, 3, 4, 4, 2), random_array(1, 3, 4, 4, 2)

    @jax.jit
    def gradients(student, teacher):
        def total(*pair):
            return jnp.sum(losses.attention_distance(*pair))

        return jax.grad(total, argnums=(0, 1))(student, teacher)

    to_student, to_teacher = gradients(student, teacher)
    assert (np.abs(to_student).max(axis=(1, 2, 3)) > 0).all()
    np.testing.assert_array_equal(to_teacher, 0)
    closer = attention_distance(student - 0.1 * np.asarray(to_student), teacher)
    assert (closer < attention_distance(student, teacher)).all()


@pytest.mark.slow
def test_distance_gradient_agrees_with_finite_differences():
    student, teacher = random_array(0, 2, 2, 3, 2), random_array(1, 2, 2, 3, 2)
    gradient = jax.jit(
        jax.grad(lambda s: losses.attention_distance(s, teacher).mean())
    )(student)
    expected = central_differences(lambda s: reference_distance(s, teacher), student)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("other", [(2, 2, 2, 3), (1, 4, 4, 3)])
def test_distance_refuses_maps_of_different_size(other):
    message = rf"\[2, 4, 4\] and \{list(other[:3])}"
    with pytest.raises(errors.InputError, match=message):
        attention_distance(np.ones((2, 4, 4, 3)), np.ones(other))


# logits ----------------------------------------------------------------------------


def reference_divergence(student, teacher, temperature):
    """T^2 KL(teacher || student) of softened probabilities, float64 [B]."""

    def softened(logits):
        odds = np.exp(np.asarray(logits, np.float64) / temperature)
        return odds / odds.sum(axis=-1, keepdims=True)

    wanted, given = softened(teacher), softened(student)
    return temperature**2 * np.sum(wanted * np.log(wanted / given), axis=-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logit_distance_is_the_divergence_of_softened_probabilities(temperature):
    student, teacher = random_array(0, 5, 7), random_array(1, 5, 7)
    distance = losses.logit_distance(student, teacher, temperature=temperature)
    expected = reference_divergence(student, teacher, temperature)
    assert distance.shape == (5,) and distance.dtype == jnp.float32
    np.testing.assert_allclose(distance, expected, rtol=1e-4, atol=1e-6)
    # Only differences of logits count.
    moved = losses.logit_distance(student + 3.0, teacher, temperature=temperature)
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_only_the_student_of_a_logit_distance_gets_a_gradient():
    student, teacher = random_array(0, 3, 4), random_array(1, 3, 4)
    of_student, of_teacher = jax.grad(
        lambda s, t: jnp.sum(losses.logit_distance(s, t, temperature=3.0)),
        argnums=(0, 1),
    )(student, teacher)
    expected = central_differences(
        lambda s: np.sum(reference_divergence(s, teacher, 3.0)), student
    )
    np.testing.assert_allclose(of_student, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(of_teacher)


@pytest.mark.slow
def test_logits_far_apart_and_classes_ruled_out_make_no_nan():
    far = jnp.asarray([[1e4, 0.0]])
    assert losses.logit_distance(far, -far, temperature=1.0)[0] == pytest.approx(1e4)
    assert losses.logit_distance(far, far)[0] == 0.0
    student, teacher = jnp.zeros((1, 2)), jnp.asarray([[0.0, -jnp.inf]])
    distance, gradient = jax.value_and_grad(
        lambda s: losses.logit_distance(s, teacher, temperature=1.0)[0]
    )(student)
    assert distance == pytest.approx(math.log(2))
    np.testing.assert_allclose(gradient, [[-0.5, 0.5]], atol=1e-6)


def test_logit_distance_refuses_other_classes_temperatures_and_integers():
    with pytest.raises(errors.InputError, match="student"):
        losses.logit_distance(jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3)))
    with pytest.raises(errors.InputError, match=r"\[2, 3\].*\[2, 4\]"):
        losses.logit_distance(jnp.ones((2, 3)), jnp.ones((2, 4)))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(errors.InputError, match="temperature"):
            losses.logit_distance(
                jnp.ones((2, 3)), jnp.ones((2, 3)), temperature=temperature
            )


# NAD loss --------------------------------------------------------------------------


@pytest.mark.slow
def test_nad_loss_is_the_weighted_sum_of_the_reference_terms():
    student, teacher = two_stages(0), two_stages(10)
    loss = nad_loss(student, teacher)
    expected = sum(
        BETAS[stage] * reference_distance(student[stage], teacher[stage])
        for stage in BETAS
    )
    assert loss.shape == (3,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(np.mean(loss), expected, rtol=1e-6)


@pytest.mark.slow
def test_nad_loss_hands_the_operator_down():
    student, teacher = two_stages(0), two_stages(10)
    options = {"p": 1, "reduction": "mean"}

    @jax.jit
    def both(student, teacher):
        return (
            losses.nad_loss(student, teacher, betas=FIRST_STAGE_ONLY, **options),
            losses.attention_distance(student["stage1"], teacher["stage1"], **options),
        )

    loss, distance = both(student, teacher)
    np.testing.assert_allclose(loss, 500.0 * distance, rtol=1e-6)
    assert (np.abs(loss / nad_loss(student, teacher) - 1) > 0.01).all()


@pytest.mark.slow
def test_nad_loss_is_linear_in_the_betas():
    student, teacher = two_stages(0), two_stages(10)
    doubled = {stage: 2 * beta for stage, beta in BETAS.items()}
    np.testing.assert_allclose(
        losses.nad_loss(student, teacher, betas=doubled),
        2 * nad_loss(student, teacher),
        rtol=1e-6,
    )


@pytest.mark.slow
def test_betas_may_be_traced():
    """One program for many weights; a mistake of shape is found all the same."""
    student, teacher = two_stages(0), two_stages(10)
    traced = jax.jit(lambda betas: losses.nad_loss(student, teacher, betas=betas))
    np.testing.assert_allclose(traced(BETAS), nad_loss(student, teacher), rtol=1e-6)
    np.testing.assert_array_equal(traced(dict.fromkeys(BETAS, 0.0)), np.zeros(3))
    with pytest.raises(errors.InputError, match=r"got shape \[3\] for 'stage1'"):
        traced(BETAS | {"stage1": np.ones(3, np.float32)})


@pytest.mark.slow
def test_the_order_of_the_mappings_changes_no_bit():
    """With these weights (a + b) + c and (c + b) + a differ in the last bit."""
    student = {name: random_array(i, 64, 4, 4, 2) for i, name in enumerate("abc")}
    teacher = {name: random_array(i, 64, 4, 4, 2) for i, name in enumerate("bca")}

    def loss(names):
        betas = {name: {"a": 7.0, "b": 1.1, "c": 0.3}[name] for name in names}
        ordered = {name: student[name] for name in names}
        return losses.nad_loss(ordered, teacher, betas=betas)

    np.testing.assert_array_equal(loss("cba"), loss("abc"))


@pytest.mark.slow
def test_a_stage_with_beta_zero_is_not_computed():
    """The fine-tuning control stays clean even when a stage holds NaN."""
    student, teacher = two_stages(0), two_stages(10)
    student["stage2"] = np.full_like(student["stage2"], np.nan)

    @jax.jit
    def gradient(student):
        return jax.grad(
            lambda s: jnp.sum(losses.nad_loss(s, teacher, betas=FIRST_STAGE_ONLY))
        )(student)

    np.testing.assert_array_equal(gradient(student)["stage2"], 0)
    assert np.abs(gradient(student)["stage1"]).max() > 0
    control = losses.nad_loss(student, teacher, betas={"stage1": 0, "stage2": 0.0})
    np.testing.assert_array_equal(control, np.zeros(3))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SIZES)
def test_nad_loss_is_finite_in_value_and_gradient_at_any_size(dtype):
    """One example per size. In float16 weights of 1000 leave no room for less."""
    sizes = np.asarray(SIZES[dtype]).reshape(4, 1, 1, 1)

    def scaled(seed):
        features = two_stages(seed, examples=4)
        return {k: (np.tanh(v) * sizes).astype(dtype) for k, v in features.items()}

    def total(student, teacher):
        loss = losses.nad_loss(student, teacher, betas=BETAS)
        return jnp.sum(loss), loss

    student, teacher = scaled(0), scaled(10)
    both = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    (to_student, to_teacher), loss = both(student, teacher)
    assert loss.dtype == jnp.float32
    assert loss[0] == 0 and np.isfinite(loss).all() and (loss[1:] > 0).all()
    for stage in BETAS:
        assert to_student[stage].dtype == dtype
        gradient = np.asarray(to_student[stage], np.float32)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient[2]).max() > 0
        np.testing.assert_array_equal(np.asarray(to_teacher[stage], np.float32), 0)


@pytest.mark.slow
def test_nad_loss_maps_over_a_further_axis():
    pair = two_stages(0), two_stages(10)
    stacked = jax.tree.map(lambda x: np.stack([x, -x, 2 * x]), pair)
    expected = np.stack([nad_loss(*pair)] * 3)
    np.testing.assert_allclose(jax.vmap(nad_loss)(*stacked), expected, rtol=1e-5)


@pytest.mark.slow
def test_the_teacher_may_compute_in_another_precision():
    student, teacher = two_stages(0), two_stages(10)
    halves = {stage: x.astype(jnp.bfloat16) for stage, x in teacher.items()}
    loss = nad_loss(student, halves)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, nad_loss(student, teacher), rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"betas": {"stage1": 1.0}},
            r"betas and student_features .* \['stage1'\] and \['stage1', 'stage2'\]",
        ),
        (
            {"teacher_features": {"stage1": np.ones((3, 4, 4, 2))}},
            r"betas and teacher_features .* \['stage1', 'stage2'\] and \['stage1'\]",
        ),
        (
            {"student_features": two_stages(0) | {"stage3": np.ones((3, 2, 2, 2))}},
            r"\['stage1', 'stage2'\] and \['stage1', 'stage2', 'stage3'\]",
        ),
        (
            {"student_features": two_stages(0) | {"stage2": np.ones((3, 4, 4, 2))}},
            r"\[3, 4, 4\] and \[3, 2, 2\]",
        ),
        (
            {"student_features": two_stages(0) | {"stage2": np.ones((3, 1, 1, 2))}},
            r"1x1 .* got shape \[3, 1, 1, 2\]",
        ),
        (
            {
                "student_features": two_stages(0) | {"stage2": np.ones((1, 2, 2, 4))},
                "teacher_features": two_stages(0) | {"stage2": np.ones((1, 2, 2, 4))},
            },
            r"one batch size, got shape \[3, 4, 4, 2\] for 'stage1' and \[1, 2, 2, 4\]",
        ),
        ({"betas": BETAS | {"stage2": np.ones(3)}}, r"got shape \[3\] for 'stage2'"),
        ({"betas": BETAS | {"stage2": -1.0}}, "got -1.0 for 'stage2'"),
        ({"betas": BETAS | {"stage2": math.nan}}, "got nan for 'stage2'"),
        (
            {"betas": {}, "student_features": {}, "teacher_features": {}},
            "at least one stage",
        ),
    ],
)
def test_nad_loss_errors_print_both_sides(changes, message):
    arguments = {
        "student_features": two_stages(0),
        "teacher_features": two_stages(10),
        "betas": BETAS,
    } | changes
    betas = arguments.pop("betas")
    with pytest.raises(errors.InputError, match=message):
        jax.eval_shape(lambda kw: losses.nad_loss(betas=betas, **kw), arguments)


# Units of beta ---------------------------------------------------------------------

WIDE_RESNET_SHAPES = {"stage1": (32, 32), "stage2": (16, 16), "stage3": (8, 8)}


def test_published_betas_are_1_to_8_to_32_on_squared_distances():
    published = {"stage1": 500, "stage2": 1000, "stage3": 1000}
    converted = losses.convert_betas(
        published, WIDE_RESNET_SHAPES, to="squared_distance"
    )
    assert converted == {"stage1": 0.48828125, "stage2": 3.90625, "stage3": 15.625}
    back = losses.convert_betas(converted, WIDE_RESNET_SHAPES, to="mean_square")
    assert back == published


@pytest.mark.slow
def test_converted_betas_give_the_same_loss_on_squared_distances():
    student, teacher = two_stages(0), two_stages(10)
    converted = losses.convert_betas(
        BETAS, {"stage1": (4, 4), "stage2": (2, 2)}, to="squared_distance"
    )
    squared = sum(
        converted[stage]
        * ((reference_map(student[stage]) - reference_map(teacher[stage])) ** 2).sum(
            axis=(1, 2)
        )
        for stage in BETAS
    )
    np.testing.assert_allclose(
        losses.nad_loss(student, teacher, betas=BETAS), squared, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("betas", "spatial_shapes", "to", "message"),
    [
        ({"a": 1.0}, {"b": (2, 2)}, "mean_square", r"\['a'\] and \['b'\]"),
        ({"a": 1.0}, {"a": (0, 2)}, "mean_square", r"\(0, 2\) for 'a'"),
        ({"a": -1.0}, {"a": (2, 2)}, "mean_square", "-1.0 for 'a'"),
        ({"a": 1.0}, {"a": (2, 2)}, "norm", "'squared_distance'.*got 'norm'"),
    ],
)
def test_convert_betas_errors(betas, spatial_shapes, to, message):
    with pytest.raises(errors.InputError, match=message):
        losses.convert_betas(betas, spatial_shapes, to=to)


# EFRAP: activation preservation (L_A) ----------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (4, 5, 7), (4, 3, 5, 7)])
def test_preservation_is_a_sum_over_channels_and_a_mean_over_the_rest(shape):
    quantized, target = random_array(0, *shape), random_array(1, *shape)
    loss = preservation_loss(quantized, target)
    squares = np.square(quantized.astype(np.float64) - target)
    assert loss.shape == (4,)
    np.testing.assert_allclose(np.mean(loss), squares.sum(axis=-1).mean(), rtol=1e-6)


def test_preservation_gradient_reaches_the_quantized_side_only():
    quantized, target = random_array(0, 2, 2, 2, 3), random_array(1, 2, 2, 2, 3)

    def total(quantized, target):
        return jnp.mean(losses.activation_preservation_loss(quantized, target))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))
    to_quantized, to_target = gradients(quantized, target)
    expected = central_differences(
        lambda x: np.square(x - target).sum(axis=-1).mean(), quantized
    )
    np.testing.assert_allclose(to_quantized, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(to_target, 0)


@pytest.mark.parametrize("dtype", SIZES)
def test_preservation_squares_and_sums_in_float32(dtype):
    """400 ** 2 does not fit float16, and 4096 * 1 is no bfloat16 sum of ones."""
    far = np.full((1, 2, 2, 4096), 400.0, dtype)
    loss = preservation_loss(far, np.zeros_like(far))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [4096 * 400.0**2], rtol=1e-6)


def test_preservation_errors():
    with pytest.raises(errors.InputError, match=r"\[2, 3\] and \[2, 1\]"):
        losses.activation_preservation_loss(np.ones((2, 3)), np.ones((2, 1)))
    with pytest.raises(errors.InputError, match=r"\[B, ..., C\], got shape \[3\]"):
        losses.activation_preservation_loss(np.ones(3), np.ones(3))


# EFRAP: flipping (L_F) -------------------------------------------------------------


def reference_flip(soft, nearest, weight):
    """The two-sided cross-entropy of the public code, float64."""
    target = 1 - np.asarray(nearest, np.float64)
    cross_entropy = -target * np.log(soft + 1e-8) - (1 - target) * np.log(
        1 - soft + 1e-8
    )
    return (np.asarray(weight, np.float64) * cross_entropy).sum()


def flip_problem(seed):
    soft = random_shares(seed, 4, 3)
    nearest = np.round(random_shares(seed + 1, 4, 3))
    return soft, nearest, random_shares(seed + 2, 4, 3)


@property_test
@hypothesis.given(seed=seeds)
def test_flip_loss_equals_the_two_sided_cross_entropy(seed):
    soft, nearest, weight = flip_problem(seed)
    expected = reference_flip(soft.astype(np.float64), nearest, weight)
    np.testing.assert_allclose(flip_loss(soft, nearest, weight), expected, rtol=1e-5)


def test_flip_gradient_agrees_with_finite_differences_and_is_the_only_one():
    soft, nearest, weight = flip_problem(0)
    gradients = jax.jit(jax.grad(losses.flip_loss, argnums=(0, 1, 2)))
    to_soft, to_nearest, to_weight = gradients(soft, nearest, weight)
    expected = central_differences(lambda h: reference_flip(h, nearest, weight), soft)
    np.testing.assert_allclose(to_soft, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(to_nearest, 0)
    np.testing.assert_array_equal(to_weight, 0)


@pytest.mark.parametrize("dtype", SIZES)
def test_flip_loss_at_the_ends_is_minus_log_eps_or_nothing(dtype):
    """Under jit too, where XLA would simplify (1 - h) + eps to 1 - h."""
    soft = np.asarray([0, 1], dtype)
    ones = np.ones_like(soft)
    for loss in (losses.flip_loss, flip_loss):
        np.testing.assert_allclose(loss(soft, soft, ones), 36.841361, rtol=1e-6)
        np.testing.assert_allclose(loss(soft, 1 - soft, ones), 0, atol=1e-7)


def test_flip_gradient_at_the_ends_is_weight_over_eps():
    soft = np.asarray([0, 1], np.float32)
    gradient = jax.jit(jax.grad(losses.flip_loss))(soft, soft, np.float32([1, 3]))
    np.testing.assert_allclose(gradient, [-1e8, 3e8], rtol=1e-6)


def test_flip_gradient_through_a_sigmoid_is_weight_times_residual():
    """Also at an exact grid point, where the logit is infinite and the weight 0."""
    soft, nearest, weight = flip_problem(3)
    soft[0, 0], weight[0, 0] = 0, 0
    with np.errstate(divide="ignore"):
        logits = np.log(soft) - np.log1p(-soft)

    @jax.jit
    def gradient(logits):
        return jax.grad(lambda v: losses.flip_loss(jax.nn.sigmoid(v), nearest, weight))(
            logits
        )

    np.testing.assert_allclose(
        gradient(logits), weight * (soft - (1 - nearest)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_nearest_rounding_may_be_bool_or_int(dtype):
    soft, nearest, weight = flip_problem(5)
    expected = flip_loss(soft, nearest, weight)
    assert flip_loss(soft, nearest.astype(dtype), weight) == expected


def test_weights_near_a_tie_start_to_flip_and_others_start_to_settle():
    """Flip and penalty at the reference's 1 and 0.01 balance 12.5 steps from a tie.

    With a step of 0.02 weight units that is |0.5 - fraction| = 0.25, on either side.
    """
    step = 0.02
    fraction = np.asarray([0.1, 0.2, 0.24, 0.26, 0.4, 0.6, 0.74, 0.76, 0.9], np.float32)
    starts_to_flip = [0, 0, 0, 1, 1, 1, 1, 0, 0]
    nearest = np.round(fraction)
    error = step * np.abs(fraction - nearest)

    @jax.jit
    def gradient(logits):
        def total(logits):
            soft = jax.nn.sigmoid(logits)
            flip = losses.flip_loss(soft, nearest, error)
            return flip + 0.01 * losses.binarization_penalty(soft)

        return jax.grad(total)(logits)

    downhill = -np.asarray(gradient(np.log(fraction) - np.log1p(-fraction)))
    away_from_nearest = np.sign(downhill) == np.sign(0.5 - nearest)
    np.testing.assert_array_equal(away_from_nearest, starts_to_flip)


@pytest.mark.parametrize(
    ("nearest", "weight", "eps", "message"),
    [
        ((3,), (2, 3), 1e-8, r"nearest_rounding .* \[2, 3\] and \[3\]"),
        ((2, 3), (1, 3), 1e-8, r"error_weight .* \[2, 3\] and \[1, 3\]"),
        ((2, 3), (2, 3), 0, "eps must lie .* got 0"),
    ],
)
def test_flip_loss_errors(nearest, weight, eps, message):
    with pytest.raises(errors.InputError, match=message):
        losses.flip_loss(np.ones((2, 3)), np.ones(nearest), np.ones(weight), eps=eps)


# EFRAP: error weights --------------------------------------------------------------


def test_element_form_is_the_absolute_error():
    error = random_array(0, 3, 3, 2, 4)
    np.testing.assert_array_equal(losses.rounding_error_weight(error), np.abs(error))


def test_neuron_form_shares_the_norm_of_each_output_channel():
    error = random_array(0, 3, 3, 2, 4)
    weight = rounding_error_weight(error, form="neuron")
    norms = np.linalg.norm(error.astype(np.float64).reshape(-1, 4), axis=0)
    np.testing.assert_allclose(
        weight, np.broadcast_to(norms, error.shape), rtol=1e-6, strict=False
    )
    assert weight.shape == error.shape


@pytest.mark.parametrize("form", ["element", "neuron"])
@property_test
@hypothesis.given(seed=seeds, exponent=strategies.integers(-20, 20))
def test_counted_in_steps_the_weight_forgets_the_scale_of_the_layer(
    form, seed, exponent
):
    error, step = random_array(seed, 6, 4), random_shares(seed, 4)
    scale = np.float32(2.0**exponent)
    np.testing.assert_array_equal(
        rounding_error_weight(error * scale, form=form, step=step * scale),
        rounding_error_weight(error, form=form, step=step),
    )


@pytest.mark.parametrize("shape", [(), (4,), (1, 1, 1, 4), (1, 1, 1, 1)])
def test_a_step_divides_each_output_channel(shape):
    error, step = random_array(0, 3, 3, 2, 4), random_shares(1, *shape)
    weight = rounding_error_weight(error, step=step)
    np.testing.assert_allclose(weight, np.abs(error) / step, rtol=1e-6)


@pytest.mark.parametrize("form", ["element", "neuron"])
def test_error_weights_are_constants(form):
    error = np.zeros((3, 2), np.float32)
    error[0, 0] = 1
    gradient = jax.grad(
        lambda e: jnp.sum(losses.rounding_error_weight(e, form=form, step=0.1))
    )(error)
    np.testing.assert_array_equal(gradient, 0)


def test_half_precision_errors_are_summed_in_float32():
    weight = rounding_error_weight(np.ones((4096, 2), jnp.bfloat16), form="neuron")
    assert weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, 64.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3), {"form": "layer"}, r"\['element', 'neuron'\], got 'layer'"),
        ((), {}, r"rounding_error must have the axes \[..., C\]"),
        ((2, 3), {"step": np.ones((2, 3))}, r"\(2, 3\), got \(2, 3\)"),
        ((2, 3), {"step": np.ones(2)}, r"\(2, 3\), got \(2,\)"),
    ],
)
def test_error_weight_errors(shape, options, message):
    with pytest.raises(errors.InputError, match=message):
        losses.rounding_error_weight(np.ones(shape), **options)


# EFRAP: penalty (L_P) --------------------------------------------------------------


@pytest.mark.parametrize("exponent", [1.5, 2, 2.0, 20.0])
def test_penalty_agrees_with_the_formula_and_finite_differences(exponent):
    soft = random_shares(0, 4, 3)

    def reference(h):
        return (1 - np.abs(2 * h - 1) ** exponent).sum()

    value, gradient = jax.jit(
        jax.value_and_grad(lambda h: losses.binarization_penalty(h, exponent=exponent))
    )(soft)
    np.testing.assert_allclose(value, reference(soft.astype(np.float64)), rtol=1e-6)
    np.testing.assert_allclose(
        gradient, central_differences(reference, soft), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("dtype", SIZES)
def test_penalty_vanishes_at_decisions_only_and_is_smooth_between(dtype):
    soft = np.asarray([0.0, 1.0, 0.5], dtype)
    both = jax.jit(jax.vmap(jax.value_and_grad(losses.binarization_penalty)))
    value, gradient = both(soft)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, [0, 0, 1])
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), [4, -4, 0])


@pytest.mark.slow
def test_the_exponent_may_be_a_traced_schedule():
    annealed = jax.jit(lambda h, e: losses.binarization_penalty(h, exponent=e))
    soft = random_shares(0, 5)
    np.testing.assert_allclose(
        annealed(soft, 20.0), losses.binarization_penalty(soft, exponent=20), rtol=1e-6
    )


@pytest.mark.parametrize("kind", [lambda x: x, np.float32, jnp.asarray])
@pytest.mark.parametrize("exponent", [1, 0.5, -2, math.nan, math.inf])
def test_penalty_refuses_an_exponent_with_a_kink(exponent, kind):
    """Be it a number of Python, NumPy or JAX; with -2 one half would cost -inf."""
    with pytest.raises(errors.InputError, match=f"got {kind(exponent)}"):
        losses.binarization_penalty(np.full(2, 0.5), exponent=kind(exponent))


def test_penalty_refuses_several_exponents():
    with pytest.raises(errors.InputError, match=r"single number, got shape \[2\]"):
        losses.binarization_penalty(np.ones(2), exponent=np.full(2, 2.0))


# Gram form of L_A ------------------------------------------------------------------


@pytest.mark.slow
@property_test
@hypothesis.given(seed=seeds)
def test_gram_form_equals_the_preservation_loss_of_the_outputs(seed):
    inputs, original = random_array(seed, 9, 5), random_array(seed + 1, 5, 3)
    quantized = np.round(original * 4) / 4
    gram = inputs.T @ inputs / 9
    loss = gram_preservation_loss(quantized - original, gram)
    outputs = preservation_loss(inputs @ quantized, inputs @ original)
    assert loss >= 0
    np.testing.assert_allclose(loss, np.mean(outputs), rtol=1e-4)


def test_gram_gradient_agrees_with_finite_differences():
    inputs, difference = random_array(0, 9, 4), random_array(1, 4, 3)
    gram = inputs.T @ inputs / 9
    exact = gram.astype(np.float64)
    gradient = jax.jit(jax.grad(losses.gram_preservation_loss))(difference, gram)
    expected = central_differences(lambda d: np.trace(d.T @ exact @ d), difference)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", SIZES)
def test_gram_form_is_summed_in_float32(dtype):
    loss = gram_preservation_loss(np.ones((600, 1), dtype), np.eye(600, dtype=dtype))
    assert loss.dtype == jnp.float32 and loss == 600


@pytest.mark.parametrize(
    ("difference", "gram", "message"),
    [
        ((4, 2), (3, 3), r"got \[3, 3\] and \[4, 2\]"),
        ((4,), (4, 4), r"\[K, C\], got shape \[4\]"),
        ((4, 2), (4,), r"\[K, K\], got shape \[4\]"),
    ],
)
def test_gram_errors(difference, gram, message):
    with pytest.raises(errors.InputError, match=message):
        gram_preservation_loss(np.ones(difference), np.ones(gram))


def test_float64_inputs_are_computed_in_float64():
    with jax.enable_x64(True):
        maps, shares = np.ones((2, 2, 2, 2)), np.full((2, 2), 0.5)
        for loss, arguments in (
            (losses.attention_distance, (maps, maps)),
            (nad_loss, (dict.fromkeys(BETAS, maps), dict.fromkeys(BETAS, maps))),
            (losses.activation_preservation_loss, (maps, maps)),
            (losses.flip_loss, (shares, shares > 1, shares)),
            (losses.rounding_error_weight, (shares,)),
            (losses.binarization_penalty, (shares,)),
            (losses.gram_preservation_loss, (shares, shares)),
        ):
            assert jax.eval_shape(loss, *arguments).dtype == jnp.float64


@pytest.mark.slow
def test_docstring_examples_are_true():
    outcome = doctest.testmod(losses)
    assert outcome.attempted > 0 and outcome.failed == 0
