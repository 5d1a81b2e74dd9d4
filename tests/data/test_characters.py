"""Character Trajectories: lengths of letters, splits, and damaged files."""
import io

import made_sequences as made
import numpy as np
import pytest
import scipy.io
import torch

import train
from smpconv_models.data import characters, create_sequence_dataset


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Return a function that publishes a file of given contents and opens a split."""
    def open_(split='train', **published):
        made.publish_characters(tmp_path / characters.ARCHIVE, monkeypatch, **published)
        return create_sequence_dataset('characters', tmp_path, split)
    return open_


# --- letters ---


def test_zeros_at_the_ends_are_cut_off_and_the_last_values_repeated():
    letter = np.zeros((3, 12))
    letter[:, 2:9] = np.arange(1, 22).reshape(3, 7)
    letter[0, 2] = letter[1, 8] = letter[2, 5] = 0  # of one channel alone: a value like others
    fitted = characters._fit(letter)
    assert fitted.shape == (3, 182)
    assert np.array_equal(fitted[:, :7], letter[:, 2:9])
    assert np.array_equal(fitted[:, 7:], np.repeat(letter[:, 8:9], 175, axis=1))


def test_what_is_longer_is_cut_at_the_end():
    letter = np.arange(1, 601.).reshape(3, 200)
    assert np.array_equal(characters._fit(letter), letter[:, :182])


def test_each_channel_is_normalised_over_the_training_letters(opened):
    found, labels = made.letters()
    train, _ = characters._split_indices(np.array(labels) - 1, 'train')
    fitted = np.stack([characters._fit(letter) for letter in found])
    mean, std = fitted[train].mean((0, 2)), fitted[train].std((0, 2))
    dataset = opened()
    expected = (fitted[train[5]] - mean[:, None]) / std[:, None]
    torch.testing.assert_close(dataset[5][0], torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)
    assert dataset.classes[dataset.labels[5]] == made.LETTERS[labels[train[5]] - 1]


# --- splits ---

FROZEN = {
    'train': [2471, 340, 2765, 321], 'validation': [880, 253, 25, 820], 'test': [946, 766, 787, 2758]}


def test_the_splits_are_stratified_and_fixed():
    labels = np.repeat(np.arange(20), 143)[:2858]  # as many as the published file has
    parts = {split: characters._split_indices(labels, split)[1] for split in ('train', 'validation', 'test')}
    assert [len(part) for part in parts.values()] == [2000, 429, 429]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(2858))
    for part in parts.values():
        counts = np.bincount(labels[part], minlength=20)
        assert counts.max() - counts.min() <= 2
    # frozen: another version of scikit-learn must not divide otherwise
    assert {split: part[:4].tolist() for split, part in parts.items()} == FROZEN


# --- contents ---


def changed(change):
    """Return a file whose letter 7 is changed, by a function or to have another value."""
    found, labels = made.letters()
    if callable(change):
        found[7] = change(found[7])
    else:
        found[7][1, 30] = change
    return made.mat(found, labels)


def saved(**variables):
    file = io.BytesIO()
    scipy.io.savemat(file, variables)
    return file.getvalue()


@pytest.mark.parametrize('content, message', [
    (lambda: b'', 'cannot be read: '),
    (lambda: b'<html>' * 200, 'cannot be read: '),
    (lambda: made.mat(*made.letters())[:3000], 'cannot be read: '),
    (lambda: b'MATLAB 7.3 MAT-file'.ljust(124) + b'\x00\x02IM' + bytes(600), 'cannot be read: NotImplementedError'),
    (lambda: made.mat(*made.letters(), key='abc'), r"expected the classes \('a', .*found \('a', 'b', 'c'\)"),
    (lambda: made.mat(made.letters()[0], made.letters()[1][:-1]), 'from 1 to 20 for each of 240 letters, found 239'),
    (lambda: made.mat(made.letters()[0], [21] + made.letters()[1][1:]), 'found 240 from 1 to 21'),
    (lambda: made.mat(made.letters()[0], [0] + made.letters()[1][1:]), 'found 240 from 0 to 20'),
    (lambda: made.mat(made.letters()[0], [2] * 12 + made.letters()[1][12:]), r"needs 10 letters .*found \{'a': 0\}"),
    (lambda: made.mat(made.letters()[0], [2] * 5 + made.letters()[1][5:]), r"needs 10 letters .*found \{'a': 7\}"),
    (lambda: changed(np.nan), r'letter 7 \(mixoutALL_shifted.mat, mixout\{8\}\) has NaN or inf'),
    (lambda: changed(np.inf), r'letter 7 .* has NaN or inf'),
    (lambda: changed(lambda letter: letter[:2]), r'letter 7 .*expected numbers .* found float64 of \(2'),
    (lambda: changed(lambda letter: 0 * letter), r'letter 7 .*is empty: the pen does not move'),
    (lambda: changed(lambda letter: letter[:, :0]), r'letter 7 .*is empty'),
    (lambda: changed(lambda letter: 'text'), r'letter 7 .*found <U4'),
    (lambda: made.mat([letter * [[1], [0], [1]] for letter in made.letters()[0]], made.letters()[1]),
     'a channel is constant'),
    (lambda: saved(mixout=np.ones((3, 4))), r"expected mixout, consts.key and consts.charlabels in .* \['mixout'\]"),
    (lambda: saved(mixout=np.ones((3, 4)), consts={'key': 1.}), 'expected mixout, consts.key and consts.charlabels'),
])
def test_damaged_contents_are_reported(opened, content, message):
    with pytest.raises(ValueError, match=f'^[^\n]*{message}[^\n]*$'):
        opened(content=content())


def test_another_archive_is_reported(opened):
    with pytest.raises(ValueError, match=r'cannot be read: KeyError .*mixoutALL_shifted.mat'):
        opened(member='other.mat')


def test_letters_are_not_cropped(tmp_path, monkeypatch, capsys):
    made.publish_characters(tmp_path / 'data' / characters.ARCHIVE, monkeypatch)
    argv = [
        '--model', 'smpconv_characters', '--dataset', 'seq/characters', '--data-dir', str(tmp_path / 'data'),
        '--random-crop-pad', '2', '--output', str(tmp_path / 'runs')]
    with pytest.raises(SystemExit, match='2'):
        train.main(argv)
    line, = capsys.readouterr().err.strip().splitlines()
    assert '--random-crop-pad is for images, and the sequences of seq/characters are none' in line
    assert not list((tmp_path / 'runs').glob('*'))
