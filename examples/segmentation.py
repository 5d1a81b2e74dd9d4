#!/usr/bin/env python3
"""Train a U-Net of segmentation_models_pytorch on a backbone of this package to find the pixels of digits.

    python examples/segmentation.py                              about a minute and a half on 2 cores
    python examples/segmentation.py --encoder smpconv_mobile31 --size 128 --epochs 20

The script generates the images: scikit-learn's handwritten digits in various sizes and colors on darker or lighter
textures. No digit is in both training and validation images. After each epoch the script prints the intersection over
union (IoU) of the foreground. At the end it writes OUTPUT/unet.safetensors and OUTPUT/segmentation.png, with
validation images, masks and predictions.

Exit codes: 0 done, 2 wrong arguments or a folder that cannot be written, 130 interrupted.
"""
import argparse
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any, List, NoReturn, Optional, Tuple

if __name__ == '__main__':  # Ctrl-C while PyTorch loads: no traceback
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'segmentation.py: interrupted\n'), os._exit(130)))

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import smpconv_models  # also registers the models with timm
from smpconv_models.training import Digits, param_groups
from smpconv_models.utils import streams

try:
    import segmentation_models_pytorch as smp
except ImportError:
    sys.stderr.write("segmentation.py: error: this script needs pip install 'smpconv_models[segmentation]'\n")
    sys.exit(2)

DECODER_CHANNELS = (128, 64, 48, 32, 16)  # for five levels; half of the U-Net's defaults


def make_images(split: str, count: int, size: int, seed: int) -> TensorDataset:
    """Generate images ``(N, 3, size, size)`` in [0, 1] and masks ``(N, 1, size, size)`` of 0 and 1, float32."""
    digits = torch.stack([pil_to_tensor(image) for image in Digits(split).images]).float() / 255
    generator = torch.Generator().manual_seed(seed)
    numbers = tqdm(range(count), split, leave=False, disable=None)
    images, masks = zip(*(make_image(digits, size, generator) for _ in numbers))
    return TensorDataset(torch.stack(images), torch.stack(masks))


def make_image(digits: Tensor, size: int, generator: torch.Generator) -> Tuple[Tensor, Tensor]:
    """Generate one to three digits on a texture, lighter or darker; they may overlap and be cropped by the border."""
    image, mask = texture(size, generator), torch.zeros(1, size, size)
    is_light = whole(0, 1, generator)
    image = (image + 1 - is_light) / 2
    for _ in range(whole(1, 3, generator)):
        side = whole(size // 3, 2 * size // 3, generator)
        digit = digits[whole(0, len(digits) - 1, generator)]
        digit = F.interpolate(digit[None], (side, side), mode='bicubic')[0].clamp(0, 1)
        left, top = (whole(-side // 4, size - 3 * side // 4, generator) for _ in range(2))
        # padding by a negative number crops
        ink = F.pad(digit, (left, size - side - left, top, size - side - top))
        color = (torch.rand(3, 1, 1, generator=generator) + 2 * is_light) / 3
        image = torch.lerp(image, color, ink)
        mask = torch.maximum(mask, (ink > 0.5).float())
    return (image + 0.05 * torch.randn(image.shape, generator=generator)).clamp(0, 1), mask


def texture(size: int, generator: torch.Generator) -> Tensor:
    """Generate coarse or fine patches of colors under stripes of a random direction and width."""
    cells = whole(2, size // 4, generator)
    patches = F.interpolate(torch.rand(1, 3, cells, cells, generator=generator), (size, size), mode='bicubic')[0]
    angle, waves = (torch.rand(2, generator=generator) * torch.tensor([math.pi, size / 8])).tolist()
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing='ij')
    stripes = torch.sin(2 * math.pi * waves * (x * math.cos(angle) + y * math.sin(angle)))
    return (patches + 0.15 * stripes).clamp(0, 1)


def whole(low: int, high: int, generator: torch.Generator) -> int:
    """Return a random integer, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def create_model(encoder: str) -> nn.Module:
    """Create a U-Net with one level for each halving of the encoder.

    Raises:
        ValueError: If the encoder is not a model of this package.
    """
    if encoder not in timm.list_models('smpconv*'):
        raise ValueError(f'--encoder must be one of {timm.list_models("smpconv*")}, got {encoder!r}')
    features: Any = timm.create_model(encoder, features_only=True, device='meta')
    depth = int(math.log2(features.feature_info.reduction()[-1]))
    return smp.Unet(
        f'tu-{encoder}', encoder_weights=None, encoder_depth=depth, decoder_channels=DECODER_CHANNELS[-depth:])


def train_epoch(model: nn.Module, loader: DataLoader, optimizer: Any, schedule: Any, description: str) -> float:
    """Train one epoch and return the mean loss."""
    dice, cross_entropy = smp.losses.DiceLoss('binary'), nn.BCEWithLogitsLoss()
    total = 0.
    model.train()
    for images, masks in tqdm(loader, description, leave=False, disable=None):
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = dice(logits, masks) + cross_entropy(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smpconv_models.clip_radius_(model)  # as the paper does
        schedule.step()
        total += loss.item()
    return total / len(loader)


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return masks of 0 and 1."""
    model.eval()
    return torch.cat([model(some.contiguous(memory_format=torch.channels_last)) > 0 for some in images.split(32)])


def iou(predicted: Tensor, masks: Tensor) -> float:
    """Return the intersection over union of the foreground, over the pixels of all images."""
    counts = smp.metrics.get_stats(predicted.long(), masks.long(), mode='binary')
    return smp.metrics.iou_score(*counts, reduction='micro').item()


def save_picture(path: Path, images: Tensor, masks: Tensor, predicted: Tensor) -> None:
    figure = Figure(figsize=(1.6 * len(images), 5), layout='constrained')
    rows = {'image': images.movedim(1, -1).numpy(), 'mask': masks[:, 0].numpy(), 'predicted': predicted[:, 0].numpy()}
    for row, (name, pictures) in zip(figure.subplots(3, len(images), squeeze=False), rows.items()):
        row[0].set_ylabel(name)
        for axes, picture in zip(row, pictures):
            axes.imshow(picture, cmap='gray', vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=130)


class Parser(argparse.ArgumentParser):
    """Parser with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {message}\n')


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog='segmentation.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument('--encoder', metavar='NAME', default='smpconv_nano', help='model (default: %(default)s)')
    parser.add_argument('--output', metavar='FOLDER', default='output/segmentation',
                        help='folder to write to (default: %(default)s)')
    for name, default, what in (
            ('size', 64, 'side of the images, a multiple of 32'), ('images', 1024, 'number of training images'),
            ('epochs', 10, 'number of epochs'), ('batch-size', 16, 'batch size')):
        parser.add_argument(f'--{name}', metavar='N', type=int, default=default, help=f'{what} (default: %(default)s)')
    parser.add_argument(
        '--lr', metavar='LR', type=float, default=2e-3, help='maximum learning rate (default: %(default)s)')
    parser.add_argument('--seed', metavar='N', type=int, default=0, help='random seed (default: %(default)s)')
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for an argument that is out of range."""
    if args.size < 32 or args.size % 32:
        raise ValueError(f'--size must be a multiple of 32, got {args.size}')
    if args.batch_size < 2 or args.images < args.batch_size or args.epochs < 1:
        raise ValueError(
            f'expected at least 1 epoch, a batch of 2 images and one batch of images, got --epochs {args.epochs}, '
            f'--batch-size {args.batch_size} and --images {args.images}')
    if not 0 < args.lr < math.inf:
        raise ValueError(f'--lr must be positive, got {args.lr}')


def run(args: argparse.Namespace) -> float:
    """Train, write the files and return the IoU on the validation images."""
    check(args)
    torch.manual_seed(args.seed)
    model = create_model(args.encoder).to(memory_format=torch.channels_last)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    training = make_images('train', args.images, args.size, args.seed)
    images, masks = make_images('validation', 128, args.size, args.seed + 1).tensors
    loader = DataLoader(training, args.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.01), lr=args.lr)
    lrs = [args.lr * group['lr_scale'] for group in optimizer.param_groups]  # a tenth for the radii
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lrs, total_steps=args.epochs * len(loader))
    print('epoch    loss     IoU')
    for epoch in range(args.epochs):
        loss = train_epoch(model, loader, optimizer, schedule, f'epoch {epoch}')
        predicted = predict(model, images)
        result = iou(predicted, masks)
        print(f'{epoch:5}  {loss:6.4f}  {result:6.4f}', flush=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    (output / 'unet.safetensors').write_bytes(save(weights))
    save_picture(output / 'segmentation.png', images[:8], masks[:8], predicted[:8])
    print(f'IoU {result:.4f} on {len(images)} validation images; {output / "segmentation.png"}')
    return result


def main(argv: Optional[List[str]] = None) -> int:
    parser = create_parser()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted\n')
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams.keep_writable()
    sys.exit(main())
