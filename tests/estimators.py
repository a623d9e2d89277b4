"""Models of depth and poses with random weights, as transformers builds and saves them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
)

EYE = {"num_attention_heads": 2, "reshape_hidden_states": False}
DEPTHS: dict[str, dict[str, Any]] = {
    "four layers by number": {
        "backbone_config": EYE | {
            "hidden_size": 36, "num_hidden_layers": 5, "image_size": 70, "mlp_ratio": 3, "out_indices": [1, 3, 4, 5],
        },
        "reassemble_hidden_size": 36, "neck_hidden_sizes": [6, 10, 14, 18], "fusion_hidden_size": 10,
        "head_hidden_size": 7,
    },
    "metric, three layers by name": {
        "backbone_config": EYE | {
            "hidden_size": 24, "num_hidden_layers": 3, "image_size": 42, "patch_size": 7, "layer_norm_eps": 1e-3,
            "out_features": ["stage1", "stage2", "stage3"], "use_mask_token": False,
        },
        "patch_size": 7, "reassemble_hidden_size": 24, "neck_hidden_sizes": [5, 9, 12],
        "reassemble_factors": [3, 1, 0.5], "fusion_hidden_size": 8, "head_hidden_size": 4,
        "depth_estimation_type": "metric", "max_depth": 20,
    },
}  # fmt: skip
LABELS = {"id2label": {k: str(k) for k in range(17)}, "label2id": {str(k): k for k in range(17)}}
POSES: dict[str, dict[str, Any]] = {
    "simple": {
        "backbone_config": {
            "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": [80, 48],
            "patch_size": [8, 8], "mlp_ratio": 3, "out_indices": [3],
        },
        "scale_factor": 3, "use_simple_decoder": True,
    },
    "classic": {
        "backbone_config": {
            "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": [64, 96],
            "layer_norm_eps": 1e-3, "out_features": ["stage2"],
        },
        "use_simple_decoder": False,
    },
}  # fmt: skip


def noised(network: Any, seed: int = 0) -> Any:
    """Every parameter and every buffer that is of fractions."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.data = (
                noise.abs() + 0.5 if name.endswith("running_var") else noise * max(1, tensor[0].numel()) ** -0.5
            )
    return network.eval().requires_grad_(False)


def depth(told: dict[str, Any]) -> Any:
    told = dict(told)
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(backbone_config=Dinov2Config(**told.pop("backbone_config")), **told)
    )


def pose(told: dict[str, Any]) -> Any:
    told = dict(told)
    return VitPoseForPoseEstimation(
        VitPoseConfig(backbone_config=VitPoseBackboneConfig(**told.pop("backbone_config")), **told, **LABELS)
    )


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())
