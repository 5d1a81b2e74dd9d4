#!/usr/bin/env python3
"""Print feature maps of a backbone, for detection, segmentation or other tasks with several scales.

    python examples/features.py
"""
from typing import Any

import timm
import torch

import smpconv_models  # noqa: F401 (registers the models with timm)

backbone: Any = timm.create_model('smpconv_mobile31', features_only=True, out_indices=(1, 2, 3)).eval()
print(backbone.feature_info.channels(), backbone.feature_info.reduction())  # [128, 256, 320] [8, 16, 32]
with torch.inference_mode():
    for features in backbone(torch.rand(1, 3, 320, 480)):  # any size
        print(tuple(features.shape))  # (1, 128, 40, 60), (1, 256, 20, 30), (1, 320, 10, 15)
