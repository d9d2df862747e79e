# SPDX-License-Identifier: Apache-2.0
"""`nad_loss` with a Flax NNX model: split it into a pure function and its state."""

import jax
import jax.numpy as jnp
import optax
import poisoned_digits
from flax import nnx

import nad_jax


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        stage1 = nnx.relu(self.conv1(x))
        stage2 = nnx.relu(self.conv2(stage1))
        return self.dense(stage2.max((1, 2))), {"s1": stage1, "s2": stage2}


graph, fresh = nnx.split(Net(nnx.Rngs(0)))
tx = optax.adam(2e-2)


@jax.jit
def apply(state, x):
    return nnx.merge(graph, state)(x)


def train(state, images, labels, *, steps, teacher=None):
    def loss_fn(state):
        logits, features = apply(state, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        if teacher is not None:
            loss += nad_jax.nad_loss(features, teacher, betas={"s1": 1e3, "s2": 1e3})
        return jnp.mean(loss)

    @jax.jit
    def step(state, opt_state):
        updates, opt_state = tx.update(jax.grad(loss_fn)(state), opt_state)
        return optax.apply_updates(state, updates), opt_state

    opt_state = tx.init(state)
    for _ in range(steps):
        state, opt_state = step(state, opt_state)
    return state


data = poisoned_digits.load()
victim = train(fresh, *data["poisoned"], steps=100)
teacher = apply(train(victim, *data["clean"], steps=200), data["clean"][0])[1]
student = train(victim, *data["clean"], steps=200, teacher=teacher)
for name, s in {"victim": victim, "NAD": student}.items():
    rates = poisoned_digits.acc_and_asr(lambda x, s=s: apply(s, x)[0].argmax(-1), data)
    print(f"{name}: {rates}")
