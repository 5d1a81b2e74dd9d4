"""The embedded digits: the data set that needs no download."""
from typing import Any, Tuple

from PIL import Image
from torch.utils.data import Dataset

# Names by which timm finds the folder of a split.
TRAIN_SYNONYMS = ('train', 'training')
EVAL_SYNONYMS = ('val', 'valid', 'validation', 'eval', 'evaluation')


class Digits(Dataset):
    """Handwritten digits, as scikit-learn ships them: 1,797 gray images of 8x8 pixels, 10 classes.

    The validation split is a fixed, stratified fifth of the images (360).

    Args:
        split: 'train' or 'validation', or a synonym that timm knows.
        mode: PIL mode of the images, 'L' (gray) or 'RGB'.
        transform: Transform of the PIL image; timm's loader sets it.

    Raises:
        ValueError: If the split is unknown or scikit-learn is not installed.
    """

    classes = tuple('0123456789')

    def __init__(self, split: str, mode: str = 'L', transform: Any = None) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ValueError('the digits need scikit-learn: pip install scikit-learn') from error
        if split not in TRAIN_SYNONYMS + EVAL_SYNONYMS:
            raise ValueError(f'split of the digits must be one of {TRAIN_SYNONYMS + EVAL_SYNONYMS}, got {split!r}')
        images, labels = load_digits(return_X_y=True)
        train, validation = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        indices = train if split in TRAIN_SYNONYMS else validation
        pixels = (images[indices] * (255 / 16)).round().astype('uint8').reshape(-1, 8, 8)
        self.images = [Image.fromarray(image).convert(mode) for image in pixels]
        self.labels = labels[indices].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.labels[index]
