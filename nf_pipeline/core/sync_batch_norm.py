"""Batch normalisation over the batches of all processes of a group, on a CPU.

It computes what one process would with the concatenated batch, and takes the memory of the native layer: the
output, the input's gradient and a few numbers per channel. torch has such a layer for GPUs only.

**Statistics.** Each process sends count, mean and sum of squared deviations per channel; they are merged by
the parallel form of Welford's method (Chan, Golub and LeVeque, 1979), in float64 and in the order of the
ranks: every process gets the same bits, and no small variance is lost between two large sums.

**Gradients.** Let process r hold n_r of the N samples. Its loss is the mean over its own, so the loss of the
whole batch is L = sum_r (n_r / N) L_r. Each process carries g = (N / n_r) * dL/dy instead of dL/dy: true at its
loss, where g is simply the gradient of L_r, and kept so by every layer that treats samples one by one. With
m_r elements per channel (m_r / n_r is the same everywhere), M their sum, and x^ the normalised input, batch
normalisation has

    dL/dx = w / std * (dL/dy - (1 / M) sum_s sum(dL/dy) - (x^ / M) sum_s sum(dL/dy * x^))

and, with dL/dy = (n_s / N) g in process s, after multiplying by N / n_r:

    g_x = w / std * (g - S1 - x^ * S2),    S1 = sum_s m_s sum(g) / (m_r M),    S2 = sum_s m_s sum(g * x^) / (m_r M)

So the sums travel weighted by m_s. The gradients of weight and bias stay sums over the process's own samples, in
the same measure as those of all other weights: summed over the group with the share n_r / N they are dL/dw.

Knows nothing of units, optimisers or how the group came to be. Entry function: `synchronise_batch_norms`.

Shapes: N batch, C channels, further axes of any number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from nf_pipeline.core.collectives import gather_from_group, is_in_group, sum_over_group

# Pieces of this size stay in the cache between the three passes over them; bf16 is widened piece by piece.
_PIECE_BYTES = 2**17


def synchronise_batch_norms(module: nn.Module) -> None:
    """Replaces every batch norm below a module by a synchronised one with the same weights and buffers.

    Optimisers that hold the weights go on holding them; names in the state dict stay. Outside a group the new
    layers do what the old ones did.

    Args:
        module: not a batch norm itself: what contains it must learn of the replacement.
    """
    replaced: dict[nn.Module, SynchronisedBatchNorm] = {}
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and not isinstance(child, SynchronisedBatchNorm):
                if child not in replaced:
                    replaced[child] = SynchronisedBatchNorm.taking_over(child)
                parent._modules[name] = replaced[child]


class SynchronisedBatchNorm(_BatchNorm):
    """`nn.BatchNorm1d`, `2d` and `3d` in one, with statistics over the batches of all processes.

    In evaluation mode, and outside a group, it is the native layer.
    """

    @classmethod
    def taking_over(cls, native: _BatchNorm) -> "SynchronisedBatchNorm":
        """Makes a layer that shares the parameters and buffers of a native one."""
        taken = cls(
            native.num_features,
            eps=native.eps,
            momentum=native.momentum,
            affine=native.affine,
            track_running_stats=native.track_running_stats,
            device="meta",
        )
        taken._parameters.update(native._parameters)
        taken._buffers.update(native._buffers)
        return taken.train(native.training)

    def forward(self, x_NC: torch.Tensor) -> torch.Tensor:
        """Normalises [N, C, ...]."""
        if not self.training or not is_in_group():
            return super().forward(x_NC)
        self._check_input_dim(x_NC)
        moments = _moments_of_group(x_NC.detach())
        self._update_running(moments)
        return _Normalise.apply(x_NC, self.weight, self.bias, moments, self.eps)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"want [N, C, ...], got {tuple(input.shape)}")

    def _update_running(self, moments: "_Moments") -> None:
        if not self.track_running_stats or self.running_mean is None:
            return
        weight = self.momentum
        if self.num_batches_tracked is not None:  # it is while a batch is computed again
            self.num_batches_tracked.add_(1)
            weight = weight if weight is not None else 1.0 / float(self.num_batches_tracked)
        unbiased_C = moments.var_C * (moments.count_all / max(1, moments.count_all - 1))
        self.running_mean.lerp_(moments.mean_C.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), weight)


@dataclass(frozen=True, kw_only=True)
class _Moments:
    """Statistics of the whole batch.

    Attributes:
        mean_C, var_C: biased variance; float32 for inputs of less.
        count_own, count_all: elements per channel, of this process and of all.
    """

    mean_C: torch.Tensor
    var_C: torch.Tensor
    count_own: int
    count_all: int


def _moments_of_group(x_NC: torch.Tensor) -> _Moments:
    count_own = x_NC.numel() // x_NC.shape[1]
    mean_C, var_C = _own_moments(x_NC)
    row = torch.cat([mean_C.double(), var_C.double() * count_own, mean_C.new_tensor([count_own], dtype=torch.double)])
    rows = gather_from_group(row)
    means_RC, deviations_RC, counts_R1 = rows.split([len(mean_C), len(mean_C), 1], dim=1)
    count_all = counts_R1.sum()
    mean_all_C = (means_RC * counts_R1).sum(dim=0) / count_all
    deviation_all_C = (deviations_RC + counts_R1 * (means_RC - mean_all_C) ** 2).sum(dim=0)
    return _Moments(
        mean_C=mean_all_C.to(mean_C.dtype),
        var_C=(deviation_all_C / count_all).to(var_C.dtype),
        count_own=count_own,
        count_all=int(count_all),
    )


def _own_moments(x_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and biased variance by the native layer's own kernel (`var_mean` takes five times as long)."""
    running_C = x_NC.new_zeros(x_NC.shape[1], dtype=torch.promote_types(x_NC.dtype, torch.float32))
    return torch.batch_norm_update_stats(x_NC, running_C, running_C.clone(), 0.0)


class _Normalise(torch.autograd.Function):
    """The native layer's arithmetic around given statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: torch.Tensor,
        weight_C: torch.Tensor | None,
        bias_C: torch.Tensor | None,
        moments: _Moments,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_NC, weight_C, moments.mean_C, torch.rsqrt(moments.var_C + eps))
        ctx.counts = (moments.count_own, moments.count_all)
        return functional.batch_norm(x_NC, moments.mean_C, moments.var_C, weight_C, bias_C, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NC, weight_C, mean_C, invstd_C = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        sums_2C = _own_sums(dy_NC, x_NC, mean_C, invstd_C)
        dweight_C, dbias_C = (_gradient(sum_C, weight_C) for sum_C in sums_2C.unbind())
        dx_NC = None
        if needs_dx:
            count_own, count_all = ctx.counts
            totals_2C = sums_2C * count_own
            sum_over_group([totals_2C])
            totals_2C /= count_own * count_all
            scale_C = invstd_C if weight_C is None else invstd_C * weight_C
            dx_NC = _input_gradient(dy_NC, x_NC, _coefficients(scale_C, mean_C, invstd_C, totals_2C))
        return dx_NC, dweight_C if needs_dweight else None, dbias_C if needs_dbias else None, None, None


def _own_sums(dy_NC: torch.Tensor, x_NC: torch.Tensor, mean_C: torch.Tensor, invstd_C: torch.Tensor) -> torch.Tensor:
    """Returns sum(dy * x^) and sum(dy) per channel, [2, C], from the native kernel without its input gradient."""
    one_C = torch.ones_like(mean_C)  # tells the kernel in which type to return the sums
    _, product_C, plain_C = torch.ops.aten.native_batch_norm_backward(
        dy_NC, x_NC, one_C, None, None, mean_C, invstd_C, True, 0.0, [False, True, True]
    )
    return torch.stack([product_C, plain_C])


def _coefficients(
    scale_C: torch.Tensor, mean_C: torch.Tensor, invstd_C: torch.Tensor, totals_2C: torch.Tensor
) -> torch.Tensor:
    """Returns a, b, c per channel, [3, C], with dx = a * dy + b * x + c."""
    product_C, plain_C = totals_2C
    slope_C = -scale_C * product_C * invstd_C
    return torch.stack([scale_C, slope_C, -scale_C * plain_C - slope_C * mean_C])


def _input_gradient(dy_NC: torch.Tensor, x_NC: torch.Tensor, coefficients_3C: torch.Tensor) -> torch.Tensor:
    """Combines piece by piece, so that nothing of the input's size but the result is allocated."""
    dx_NC = torch.empty_like(x_NC)
    a_C, b_C, c_C = coefficients_3C.view(3, -1, *[1] * (x_NC.dim() - 2))
    is_narrow = x_NC.dtype != coefficients_3C.dtype
    for rows, channels in _pieces(x_NC):
        dy, x, dx = (tensor[rows, channels] for tensor in (dy_NC, x_NC, dx_NC))
        wide = dy.to(a_C.dtype) if is_narrow else dx
        torch.mul(wide if is_narrow else dy, a_C[channels], out=wide)
        wide.addcmul_(x.to(b_C.dtype), b_C[channels]).add_(c_C[channels])
        if is_narrow:
            dx.copy_(wide)
    return dx_NC


def _pieces(x_NC: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields ranges of samples and channels: some whole samples, or some channels of a sample that is large."""
    num, channels = x_NC.shape[:2]
    sample_bytes = max(1, x_NC[0].nbytes)
    rows = max(1, _PIECE_BYTES // sample_bytes)
    width = max(1, min(channels, _PIECE_BYTES * channels // sample_bytes))
    for start in range(0, num, rows):
        for first in range(0, channels, width):
            yield slice(start, start + rows), slice(first, first + width)


def _gradient(sum_C: torch.Tensor, weight_C: torch.Tensor | None) -> torch.Tensor:
    return sum_C if weight_C is None else sum_C.to(weight_C.dtype)
