"""Public networks with depthwise convolutions, with random weights, built without downloads.

Images: models of timm. Sequences: encoders of transformers with the published widths and kernels but few layers, and
backbones of one-dimensional ConvNeXt blocks. Nothing in a network is random in training, so its results can be
compared: stochastic depth, layer dropout, dropout and masking are off.
"""
from typing import Callable, Dict, NamedTuple, Tuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRANSFORMER_LAYERS = 2
TIMM = (
    'convnext_atto', 'convnext_tiny', 'convnextv2_atto', 'inception_next_tiny', 'rdnet_tiny', 'mambaout_femto',
    'edgenext_small', 'fastvit_t8', 'repvit_m0_9', 'starnet_s1', 'mobilenetv4_conv_small', 'mobilenetv3_large_100',
    'efficientnet_b0', 'efficientnet_lite0', 'tf_efficientnetv2_b0', 'ghostnet_100', 'lcnet_100', 'hgnetv2_b0')

# As timm creates it, its backward pass in channels_last overwrites memory: "double free or corruption" in oneDNN's
# tensors, 2 images of 160x160 and of 224x224, training, torch 2.14.1 on AVX2, November 2026.
CRASHING_IN_CHANNELS_LAST = ('fastvit_t8',)


class Sizes(NamedTuple):
    """Size of a batch: images of ``image_size`` pixels a side, sequences of ``frames`` in the blocks."""
    batch: int
    image_size: int
    frames: int


class Network(NamedTuple):
    """A network: how to create it, the shape of its input, and the layouts to measure."""
    create: Callable[[], nn.Module]
    shape: Callable[[Sizes], Tuple[int, ...]]
    layouts: Tuple[str, ...] = ('nchw',)


# --- sequences ---


class FirstOutput(nn.Module):
    """Return the first output, the last hidden state, of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


def wav2vec2_conformer() -> nn.Module:
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel
    model = Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(
        num_hidden_layers=TRANSFORMER_LAYERS, hidden_dropout=0., activation_dropout=0., attention_dropout=0.,
        feat_proj_dropout=0., conformer_conv_dropout=0., layerdrop=0., apply_spec_augment=False))
    model.freeze_feature_encoder()  # as in fine-tuning; otherwise it changes its input, which then has no gradient
    return FirstOutput(model)


def wav2vec2_bert() -> nn.Module:
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel
    return FirstOutput(Wav2Vec2BertModel(Wav2Vec2BertConfig(
        num_hidden_layers=TRANSFORMER_LAYERS, hidden_dropout=0., activation_dropout=0., attention_dropout=0.,
        feat_proj_dropout=0., conformer_conv_dropout=0., layerdrop=0., apply_spec_augment=False)))


def seamless_m4t() -> nn.Module:
    from transformers import SeamlessM4TConfig
    from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TSpeechEncoder
    return FirstOutput(SeamlessM4TSpeechEncoder(SeamlessM4TConfig(
        speech_encoder_layers=TRANSFORMER_LAYERS, speech_encoder_dropout=0., speech_encoder_layerdrop=0.,
        adaptor_dropout=0.)))


def parakeet() -> nn.Module:
    from transformers import ParakeetEncoder, ParakeetEncoderConfig
    return FirstOutput(ParakeetEncoder(ParakeetEncoderConfig(
        num_hidden_layers=TRANSFORMER_LAYERS, dropout=0., dropout_positions=0., layerdrop=0., activation_dropout=0.,
        attention_dropout=0.)))


class ResponseNorm(nn.Module):
    """Global response normalization of ConvNeXt V2 over the length, of ``(N, L, C)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 0.1))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        response = x.norm(dim=1, keepdim=True)
        return x + self.bias + self.weight * x * response / (response.mean(-1, keepdim=True) + 1e-6)


class ConvNeXtBlock1d(nn.Module):
    """Block of ConvNeXt for ``(N, C, L)``, or of ConvNeXt V2 with the response normalization in place of the scale."""

    def __init__(self, channels: int, hidden: int, has_response_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, hidden)
        self.response = ResponseNorm(hidden) if has_response_norm else nn.Identity()
        self.reduce = nn.Linear(hidden, channels)
        self.scale = None if has_response_norm else nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).transpose(1, 2))
        y = self.reduce(self.response(F.gelu(self.expand(y))))
        return x + (y if self.scale is None else self.scale * y).transpose(1, 2)


def vocos() -> nn.Module:
    """Create a backbone of the sizes of Vocos for 24 kHz: 8 blocks of 512 channels from 100 mel bands."""
    return nn.Sequential(
        nn.Conv1d(100, 512, 7, padding=3), *(ConvNeXtBlock1d(512, 1536, False) for _ in range(8)))


def f5_tts_text() -> nn.Module:
    """Create the convolutions of the sizes of F5-TTS's text encoder: 4 blocks of ConvNeXt V2 with 512 channels."""
    return nn.Sequential(*(ConvNeXtBlock1d(512, 1024, True) for _ in range(4)))


# --- all ---


def _of_timm(name: str) -> Network:
    return Network(
        lambda: timm.create_model(name, drop_rate=0.),
        lambda sizes: (sizes.batch, 3, sizes.image_size, sizes.image_size),
        ('nchw',) if name in CRASHING_IN_CHANNELS_LAST else ('nchw', 'nhwc'))


TRANSFORMERS: Dict[str, Network] = {
    'wav2vec2_conformer': Network(wav2vec2_conformer, lambda sizes: (sizes.batch, 320 * sizes.frames + 80)),
    'wav2vec2_bert': Network(wav2vec2_bert, lambda sizes: (sizes.batch, sizes.frames, 160)),
    'seamless_m4t': Network(seamless_m4t, lambda sizes: (sizes.batch, sizes.frames, 160)),
    'parakeet': Network(parakeet, lambda sizes: (sizes.batch, 8 * sizes.frames, 80)),
}
NETWORKS: Dict[str, Network] = {
    **{name: _of_timm(name) for name in TIMM},
    **TRANSFORMERS,
    'vocos': Network(vocos, lambda sizes: (sizes.batch, 100, sizes.frames)),
    'f5_tts_text': Network(f5_tts_text, lambda sizes: (sizes.batch, 512, sizes.frames)),
}
