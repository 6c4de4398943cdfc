"""Rotary embeddings: interleaved and three-dimensional in the decoder, half-split and two-dimensional in the ViT.

Source: the model's remote code as agreed on by transformers 5.23, vLLM 0.32 and FastDeploy. All in float32.
Shapes: T tokens, N patches, F = head_dim / 2 frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TextRope:
    """Angles of the decoder.

    Of the F frequencies, the first h + w alternate height (even) and width (odd); the last t turn with time.
    Text has all three positions equal, so there it is ordinary interleaved rotary embedding.

    Args:
        head_dim: 2 * F.
        theta: base of the frequencies.
        mrope_section: number of frequencies for (height, width, time); height == width.
        device: where the tables live.
    """

    def __init__(self, head_dim: int, theta: float, mrope_section: tuple[int, int, int], device: torch.device) -> None:
        num_spatial = mrope_section[0] + mrope_section[1]
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        self._inverse_F = 1.0 / theta**exponent
        # axis 0 is time, 1 height, 2 width, as in the rows of a position table
        axis = [(1 + i % 2) if i < num_spatial else 0 for i in range(head_dim // 2)]
        self._axis_F = torch.tensor(axis, device=device)

    def __call__(self, positions_3T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [T, F], of int64 positions [3, T]."""
        angle_FT = positions_3T.float().index_select(0, self._axis_F) * self._inverse_F[:, None]
        angle_TF = angle_FT.T.contiguous()
        return angle_TF.cos(), angle_TF.sin()


def rotate_interleaved(x_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Turn the pairs (x[2i], x[2i+1]); float32 inside, dtype of x outside. [T, heads, head_dim]."""
    pairs = torch.view_as_complex(x_THD.float().reshape(*x_THD.shape[:-1], x_THD.shape[-1] // 2, 2))
    turned = pairs * torch.complex(cos_TF, sin_TF)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x_THD.dtype)


def vision_rope(grid_h: int, grid_w: int, merge: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of one frame's patches in merge-block order, float32 [h*w, head_dim].

    Height and width take half of the frequencies each; time takes none.
    """
    rows = torch.arange(grid_h, device=device)[:, None].expand(grid_h, grid_w)
    columns = torch.arange(grid_w, device=device)[None, :].expand(grid_h, grid_w)
    shape = (grid_h // merge, merge, grid_w // merge, merge)
    order = [x.reshape(shape).permute(0, 2, 1, 3).reshape(-1).float() for x in (rows, columns)]
    half = head_dim // 2
    inverse = 1.0 / 10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
    angle = torch.cat([position[:, None] * inverse for position in order], -1)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate_half_split(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]); float32 inside, dtype of x outside. [N, heads, head_dim]."""
    x = x_NHD.float()
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x * cos_ND[:, None] + turned * sin_ND[:, None]).to(x_NHD.dtype)
