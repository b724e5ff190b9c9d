"""The card of products of matrices, one per sample: bilinear, each derivative is another such product."""

from __future__ import annotations

from torch import Tensor

from cvfast.ops.card import Card, call, register

# batched_product: left [B, M, K], right [B, K, N] (transposed: [B, N, K]) -> [B, M, N], contiguous. float32, float64.


def product_fake(left: Tensor, right: Tensor, transposed: bool) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[1], right.shape[1 if transposed else 2])


def product_setup(ctx, inputs, output) -> None:
    left, right, ctx.transposed = inputs
    ctx.save_for_backward(left, right)


def product_backward(ops, ctx, needs, grad: Tensor):
    left, right = ctx.saved_tensors
    op = ops.batched_product.default
    grad_left = call(op, grad, right, not ctx.transposed) if needs[0] else None
    if not needs[1]:
        return grad_left, None, None
    factors = (grad.transpose(1, 2), left) if ctx.transposed else (left.transpose(1, 2), grad)
    return grad_left, call(op, *factors, False), None


def product_vmap(ops, info, in_dims, left, right, transposed):
    size = info.batch_size

    def folded(tensor: Tensor, dim: int | None) -> Tensor:
        tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return tensor.flatten(0, 1)

    result = ops.batched_product(folded(left, in_dims[0]), folded(right, in_dims[1]), transposed)
    return result.unflatten(0, (size, -1)), 0


register(
    [
        Card(
            "batched_product(Tensor left, Tensor right, bool transposed) -> Tensor",
            product_fake, product_setup, product_backward, product_vmap,
        ),
    ]
)  # fmt: skip
