"""What is compiled for pods: three kinds of nets as shapes, and the plain step to compare with."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments import models
from msgd_jax import train

LEARNING_RATE = 0.01


class Net(NamedTuple):
    """A loss with the shapes of its parameters and of one example.

    Attributes:
        loss_vector_fn: ``f(params, batch)`` returns [B].
        params: the shapes of the parameters.
        example: the shapes of one example, without the axis of the examples.
    """

    loss_vector_fn: Callable[[Any, Any], jax.Array]
    params: Any
    example: Any

    @property
    def gradient_bytes(self) -> int:
        """The bytes of its gradient in float32."""
        return 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))


class Places(NamedTuple):
    """Where arrays lie on the chips.

    Attributes:
        rows: the sharding of the examples, along their first axis.
        fsdp: whether each parameter is spread as well, or else the same on all chips.
    """

    rows: NamedSharding
    fsdp: bool = False

    def of_leaf(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """A parameter, spread along its first axis that the chips divide, or the same on all."""
        chips, spec = self.rows.mesh.size, PartitionSpec()
        if self.fsdp:
            axes = [i for i, size in enumerate(leaf.shape) if size % chips == 0 and size]
            spec = PartitionSpec(*(None,) * axes[0], *self.rows.spec) if axes else spec
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(self.rows.mesh, spec)
        )


def flat(inputs: int, hidden: int, dtype: Any = jnp.float32) -> Net:
    """Two fully connected layers."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    params = {
        "w1": shape((inputs, hidden)),
        "b1": shape((hidden,)),
        "w2": shape((hidden, 10)),
        "b2": shape((10,)),
    }

    def loss_vector_fn(params: Any, batch: Any) -> jax.Array:
        features, labels = batch
        hidden = jnp.tanh(features @ params["w1"] + params["b1"][None])
        logits = hidden @ params["w2"] + params["b2"][None]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    return Net(loss_vector_fn, params, (shape((inputs,)), jax.ShapeDtypeStruct((), jnp.int32)))


def images(name: str, shape: tuple[int, int, int], **options: Any) -> Net:
    """A net of the experiments on images as uint8, which it scales."""
    model = models.functional(models.MODELS[name], **options)

    def loss_vector_fn(params: Any, batch: Any) -> jax.Array:
        images, labels = batch
        logits, _ = model.apply(params, {}, images.astype(jnp.float32) / 255)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)

    example = (jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct((), jnp.int32))
    return Net(loss_vector_fn, jax.eval_shape(model.init, jax.random.key(0)), example)


def transformer(
    *, layers: int = 12, width: int = 768, heads: int = 12, words: int = 32_000, length: int = 512
) -> Net:
    """A decoder-only transformer like GPT-2, with 110 million parameters by default."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
    layer = {
        "qkv": shape(width, 3 * width),
        "out": shape(width, width),
        "up": shape(width, 4 * width),
        "down": shape(4 * width, width),
        "scale1": shape(width),
        "scale2": shape(width),
    }
    params = {
        "words": shape(words, width),
        "places": shape(length, width),
        "layers": [layer] * layers,
    }

    def normal(x: jax.Array, scale: jax.Array) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale

    def block(x: jax.Array, p: Any) -> jax.Array:
        size, count, _ = x.shape
        q, k, v = jnp.split(normal(x, p["scale1"]) @ p["qkv"], 3, axis=-1)
        by_head = lambda y: y.reshape(size, count, heads, width // heads)  # noqa: E731
        seen = jax.nn.dot_product_attention(by_head(q), by_head(k), by_head(v), is_causal=True)
        x = x + seen.reshape(x.shape) @ p["out"]
        return x + jax.nn.gelu(normal(x, p["scale2"]) @ p["up"]) @ p["down"]

    def loss_vector_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = params["words"][tokens[:, :-1]] + params["places"]
        for p in params["layers"]:
            x = jax.checkpoint(block)(x, p)
        logits = x @ params["words"].T
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(axis=-1)

    return Net(loss_vector_fn, params, jax.ShapeDtypeStruct((length + 1,), jnp.int32))


def examples(net: Net, num_examples: int, rows: NamedSharding) -> Any:
    """Shapes of the data, filled up for the chips."""
    filled = num_examples + -num_examples % rows.mesh.size
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((filled, *x.shape), x.dtype, sharding=rows), net.example
    )


def ours(net: Net, law: Any, places: Places, num_examples: int, microbatch_size: int | None) -> Any:
    """Our step with its arguments, for `compilers.account`."""
    optimizer = optax.sgd(LEARNING_RATE)
    init = lambda params: train.init(params, optimizer, jax.random.key(0))  # noqa: E731
    state = jax.tree.map(places.of_leaf, jax.eval_shape(init, net.params))
    step = train.make_step(
        net.loss_vector_fn, optimizer, law, microbatch_size=microbatch_size, sharding=places.rows
    )
    return step, state, examples(net, num_examples, places.rows)


def plain(
    net: Net,
    places: Places,
    num_examples: int,
    microbatch_size: int | None,
    batch_size: int | None = None,
) -> Any:
    """A step on the mean loss by `jax.grad`, as one writes it by hand, with its arguments.

    It reports the loss and the norm of the gradient, as ours does, for which the gradient is read
    once more. With `batch_size`, on a mini-batch, of which each chip gathers its share from its own
    examples.
    """
    mesh, names = places.rows.mesh, places.rows.spec[0]
    data = examples(net, num_examples, places.rows)
    chips = mesh.size
    local = (
        jax.tree.leaves(data)[0].shape[0] // chips if batch_size is None else batch_size // chips
    )
    total = num_examples if batch_size is None else batch_size
    size = min(microbatch_size or local, local)

    def part(params: Any, data: Any, listed: Any, counted: jax.Array) -> Any:
        def of_run(start: jax.Array, seen: jax.Array) -> Any:
            if size == local and batch_size is None:
                batch, weights = data, counted
            else:
                cut = functools.partial(
                    jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size
                )
                weights = jnp.where(jnp.arange(size) >= seen, cut(counted), 0)
                if batch_size is None:
                    batch = jax.tree.map(cut, data)
                else:
                    batch = jax.tree.map(lambda x: x[cut(listed)], data)

            def loss(params: Any) -> jax.Array:
                losses = net.loss_vector_fn(params, batch).astype(jnp.float32)
                return (losses * weights).sum() / total

            return jax.value_and_grad(loss)(params)

        def add(sums: Any, k: jax.Array) -> Any:
            seen = jnp.maximum(k * size - (local - size), 0)
            new = of_run(k * size - seen, seen)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, new), None

        if size == local:
            return jax.lax.psum(of_run(jnp.int32(0), jnp.int32(0)), names)
        zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), (counted[0], params))
        return jax.lax.psum(jax.lax.scan(add, zero, jnp.arange(-(-local // size)))[0], names)

    spread = PartitionSpec(names)
    on_parts = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(PartitionSpec(), spread, spread, spread),
        out_specs=PartitionSpec(),
        check_vma=False,
    )

    def step(params: Any, data: Any, listed: Any, counted: jax.Array) -> Any:
        value, grads = on_parts(params, data, listed, counted)
        new = jax.tree.map(lambda p, g: (p - LEARNING_RATE * g).astype(p.dtype), params, grads)
        return new, value, optax.global_norm(grads)

    row = lambda dtype: jax.ShapeDtypeStruct((local * chips,), dtype, sharding=places.rows)  # noqa: E731
    params = jax.tree.map(places.of_leaf, net.params)
    return step, params, data, row(jnp.int32), row(jnp.float32)
