"""Character Trajectories: how letters are fitted and divided, and damaged files."""
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
    """Opens what is published with these contents."""
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


# --- downloads ---


def test_a_download_is_kept(tmp_path, monkeypatch):
    path = made.publish_characters(tmp_path / 'published.zip', monkeypatch)
    root = tmp_path / 'data'
    first = create_sequence_dataset('characters', root, 'test', download=True)
    path.unlink()
    again = create_sequence_dataset('characters', root, 'test', download=True)
    assert torch.equal(first[3][0], again[3][0]) and len(first) == 36


@pytest.mark.parametrize('change', ['missing', 'html', 'truncated'])
def test_a_failed_download_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch, change):
    path = made.publish_characters(tmp_path / 'published.zip', monkeypatch)
    content = path.read_bytes()
    path.unlink()
    if change != 'missing':
        path.write_bytes(b'<html>login</html>' if change == 'html' else content[:5000])
    root = tmp_path / 'data'
    told = r'^file://[^\n]*zip cannot be downloaded \([^\n]*; the file can be put at [^\n]*trajectories.zip by hand$'
    with pytest.raises(ValueError, match=told):
        create_sequence_dataset('characters', root, 'train', download=True)
    assert [file.name for file in root.iterdir() if file.name != '.download.lock'] == []
    path.write_bytes(content)
    assert len(create_sequence_dataset('characters', root, 'train', download=True)) == 168


def test_a_file_of_another_checksum_is_not_parsed(tmp_path, monkeypatch):
    path = made.publish_characters(tmp_path / characters.ARCHIVE, monkeypatch)
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr('scipy.io.loadmat', lambda *args, **options: pytest.fail('parsed'))
    for download in (False, True):
        with pytest.raises(ValueError, match=r'zip is damaged, or another file: its SHA-256 is .*remove it and pass'):
            create_sequence_dataset('characters', tmp_path, 'train', download)


# --- contents ---


def changed(index, change):
    """The letters with one of them changed."""
    found, labels = made.letters()
    found[index] = change(found[index])
    return made.mat(found, labels)


def with_value(value):
    def change(letter):
        letter[1, 30] = value
        return letter
    return change


@pytest.mark.parametrize('content, told', [
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
    (lambda: changed(7, with_value(np.nan)), r'letter 7 \(mixoutALL_shifted.mat, mixout\{8\}\) has NaN or inf'),
    (lambda: changed(7, with_value(np.inf)), r'letter 7 .* has NaN or inf'),
    (lambda: changed(7, lambda letter: letter[:2]), r'letter 7 .*expected numbers .* found float64 of \(2'),
    (lambda: changed(7, lambda letter: 0 * letter), r'letter 7 .*is empty: the pen does not move'),
    (lambda: changed(7, lambda letter: letter[:, :0]), r'letter 7 .*is empty'),
    (lambda: changed(7, lambda letter: 'text'), r'letter 7 .*found <U4'),
])
def test_damaged_contents_are_told(opened, content, told):
    with pytest.raises(ValueError, match=f'^[^\n]*{told}[^\n]*$'):
        opened(content=content())


def test_another_archive_is_told(opened):
    with pytest.raises(ValueError, match=r'cannot be read: KeyError .*mixoutALL_shifted.mat'):
        opened(member='other.mat')


def test_other_variables_are_told(opened):
    file = io.BytesIO()
    scipy.io.savemat(file, {'mixout': np.ones((3, 4))})
    with pytest.raises(ValueError, match=r"expected mixout, consts.key and consts.charlabels in .*found \['mixout'\]"):
        opened(content=file.getvalue())
    file = io.BytesIO()
    scipy.io.savemat(file, {'mixout': np.ones((3, 4)), 'consts': {'key': 1.}})
    with pytest.raises(ValueError, match=r'expected mixout, consts.key and consts.charlabels'):
        opened(content=file.getvalue())


def test_a_still_channel_is_told(opened):
    found, labels = made.letters()
    for letter in found:
        letter[1] = 0
    with pytest.raises(ValueError, match='a channel is constant'):
        opened(content=made.mat(found, labels))


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
