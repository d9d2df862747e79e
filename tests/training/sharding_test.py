# SPDX-License-Identifier: Apache-2.0
"""Meshes that fit a batch, and arrays that come back from them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.data import batches
from nad_jax.training import sharding


@pytest.mark.parametrize("batch_size, devices", [(128, 8), (12, 4), (6, 2), (7, None)])
def test_a_mesh_splits_the_batch_evenly_or_is_none(batch_size, devices):
    mesh = sharding.mesh_for_batch(batch_size)
    assert (None if mesh is None else mesh.size) == devices


def test_unreplicated_arrays_are_bound_to_no_device():
    """Else programs compiled for arrays from a file would not serve them."""
    tree = {"a": jnp.arange(3.0), "b": (jnp.ones((2, 2)),)}
    copies = sharding.replicate(tree, sharding.data_mesh())
    assert len(copies["a"].sharding.device_set) == 8
    back = sharding.unreplicate(copies)
    assert all(not leaf.committed for leaf in jax.tree.leaves(back))
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.slow
def test_varying_the_images_of_a_split_batch_needs_no_other_device():
    """Each device crops its own images; it does not collect those of the others."""
    mesh = sharding.data_mesh()
    images = jnp.asarray(
        np.random.default_rng(0).uniform(size=(16, 6, 6, 3)), "float32"
    )
    key = jax.random.key(0)
    whole = jax.jit(
        lambda key, images: batches.show_views(
            batches.draw_views(key, images.shape[0]), images
        )
    )
    split = sharding.shard_batch(images, mesh)
    program = whole.lower(key, split).compile().as_text()
    assert not re.findall("all-(?:gather|reduce|to-all)|collective-", program)
    np.testing.assert_array_equal(whole(key, split), whole(key, images))
