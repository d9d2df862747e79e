# SPDX-License-Identifier: Apache-2.0
"""`nad_loss` in a training loop and a model of one's own: JAX and optax, no Flax."""

import jax
import jax.numpy as jnp
import optax
import poisoned_digits

import nad_jax


def init(key):
    shapes = {"conv1": (3, 3, 1, 16), "conv2": (3, 3, 16, 32), "dense": (32, 10)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    make = jax.nn.initializers.he_normal()
    return {name: make(keys[name], shape) for name, shape in shapes.items()}


def conv(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def apply(params, x):
    """Logits, and the feature maps by stage name."""
    stage1 = jax.nn.relu(conv(x, params["conv1"], 1))
    stage2 = jax.nn.relu(conv(stage1, params["conv2"], 2))
    return jnp.max(stage2, (1, 2)) @ params["dense"], {"s1": stage1, "s2": stage2}


def train(params, images, labels, *, steps, teacher=None):
    def loss_fn(params):
        logits, features = apply(params, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if teacher is not None:  # all there is to NAD; the teacher gets no gradient
            loss += nad_jax.nad_loss(features, teacher, betas={"s1": 1e3, "s2": 1e3})
        return jnp.mean(loss)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


tx = optax.adam(2e-2)
data = poisoned_digits.load()
victim = train(init(jax.random.key(0)), *data["poisoned"], steps=120)
tuned = train(victim, *data["clean"], steps=80)
teacher = jax.jit(apply)(tuned, data["clean"][0])[1]
student = train(victim, *data["clean"], steps=80, teacher=teacher)
for name, params in {"victim": victim, "NAD": student}.items():
    predict = jax.jit(lambda x, params=params: apply(params, x)[0].argmax(-1))
    print(f"{name}: {poisoned_digits.acc_and_asr(predict, data)}")
