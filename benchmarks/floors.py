# SPDX-License-Identifier: Apache-2.0
"""The least time a case can take here: its operations and bytes over measured peaks.

Counted are convolutions and the classifier, and float32 arrays that must cross memory
at least once: inputs and outputs of every convolution, in each of its passes. That is a
floor and no estimate: BatchNorm, ReLU, attention and augmentation are free in it.
"""

import dataclasses

_FLOAT = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Product:
    """One convolution or dense product, for one image.

    Attributes:
      outputs: Positions of the output, H * W.
      inputs: Positions of the input.
      window: Positions of the kernel.
      cin: Input channels.
      cout: Output channels.
    """

    outputs: int
    inputs: int
    window: int
    cin: int
    cout: int

    @property
    def operations(self) -> int:
        return 2 * self.outputs * self.window * self.cin * self.cout

    @property
    def bytes(self) -> int:
        return _FLOAT * (self.inputs * self.cin + self.outputs * self.cout)


@dataclasses.dataclass(frozen=True)
class Work:
    """What must be done at least: float operations and bytes across memory."""

    operations: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def times(self, count: int) -> "Work":
        return Work(self.operations * count, self.bytes * count)

    def seconds(self, *, operations_per_second: float, bytes_per_second: float):
        """The larger of both times: they can overlap, neither can be less."""
        return max(
            self.operations / operations_per_second, self.bytes / bytes_per_second
        )


def network(arch: str, size: int = 32, classes: int = 10) -> list[Product]:
    """The products of a network for one RGB image of `size` x `size` pixels.

    Args:
      arch: "wrn_16_1", "resnet_14" or "resnet_18"; see `nad_jax.models`.
    """
    blocks, channels = {
        "wrn_16_1": (2, (16, 32, 64)),
        "resnet_14": (2, (16, 32, 64)),
        "resnet_18": (2, (64, 128, 256, 512)),
    }[arch]
    products = [Product(size**2, size**2, 9, 3, channels[0])]
    width = channels[0]
    for stage, cout in enumerate(channels):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            before, size = size**2, size // stride
            products.append(Product(size**2, before, 9, width, cout))
            products.append(Product(size**2, size**2, 9, cout, cout))
            if width != cout:
                products.append(Product(size**2, before, 1, width, cout))
            width = cout
    products.append(Product(1, 1, 1, width, classes))
    return products


def forward(arch: str, images: int) -> Work:
    """One forward pass."""
    products = network(arch)
    return Work(
        images * sum(product.operations for product in products),
        images * sum(product.bytes for product in products),
    )


def training(arch: str, images: int) -> Work:
    """One forward and backward pass; the stem needs no gradient of its input."""
    stem = network(arch)[0]
    whole = forward(arch, images).times(3)
    return Work(
        whole.operations - images * stem.operations, whole.bytes - images * stem.bytes
    )


def distillation(arch: str, images: int) -> Work:
    """One training pass of the student and one forward pass of the teacher."""
    return training(arch, images) + forward(arch, images)
