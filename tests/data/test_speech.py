"""Speech Commands: sound files, coefficients, splits, cached coefficients, and damaged folders."""
import io
import math
import os
import shutil
import wave

import made_sequences as made
import numpy as np
import pytest
import torch
from made_sequences import files_below

from smpconv_models.data import create_sequence_dataset, speech

NAMES = ('speech', 'speech-mfcc')


# --- sound files ---


def written(tmp_path, content):
    path = tmp_path / 'clip.wav'
    path.write_bytes(content)
    return path


def test_samples_are_between_minus_one_and_one(tmp_path):
    file = io.BytesIO()
    with wave.open(file, 'wb') as out:
        out.setparams((1, 2, 16000, 0, 'NONE', ''))
        out.writeframes(np.array([-2 ** 15, 2 ** 15 - 1, 0, 256], '<i2').tobytes())
    found = speech.read_wav(written(tmp_path, file.getvalue()))
    assert found.dtype == torch.float32 and found.shape == (16000,)
    assert found[:4].tolist() == [-1, 1 - 2 ** -15, 0, 2 ** -7]
    assert not found[4:].any()  # a shorter clip ends in silence


@pytest.mark.parametrize('content, told', [
    (b'', 'is no sound file, or damaged: EOFError'),
    (b'<html>' * 100, 'is no sound file, or damaged: file does not start with RIFF id'),
    (made.sound(0)[:20], 'is no sound file, or damaged'),
    (made.sound(0)[:9000], 'is damaged: expected 32000 bytes of sound by its header, found 8956'),
    (made.sound(0, channels=2), 'expected 1 channel of 16 bits at 16000 Hz, found 2 of 16 at 16000 Hz'),
    (made.sound(0, width=1), 'found 1 of 8 at 16000 Hz'),
    (made.sound(0, rate=8000), 'found 1 of 16 at 8000 Hz'),
    (made.sound(0, samples=16001), 'expected 1 to 16000 samples, found 16001'),
    (made.sound(0, samples=0), 'expected 1 to 16000 samples, found 0'),
])
def test_damaged_sound_is_told(tmp_path, content, told):
    with pytest.raises(ValueError, match=f'^[^\n]*clip.wav[^\n]*{told}[^\n]*$'):
        speech.read_wav(written(tmp_path, content))


def test_a_header_of_any_size_takes_no_memory(tmp_path):
    content = bytearray(made.sound(0))
    content[40:44] = (2 ** 32 - 2).to_bytes(4, 'little')  # of the data
    with pytest.raises(ValueError, match='expected 1 to 16000 samples, found 2147483647'):
        speech.read_wav(written(tmp_path, bytes(content)))


# --- cepstral coefficients ---

# For float32. A coefficient is a sum of 64 logarithms with factors of at most sqrt(2 / 64). The error of a logarithm is
# a rounding of its magnitude, at most 14 (of the offset 1e-6), plus the relative error of its energy, about 100
# roundings: a transform of 200 samples, squared, in bands beside much stronger bands.
TOLERANCE = 64 * math.sqrt(2 / 64) * (14 + 100) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_coefficients_equal_torchaudios(golden, dtype):
    read = golden('mfcc')
    found = speech.mfcc(read['samples'].to(dtype) / 2 ** 15)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), read['coefficients'], atol=TOLERANCE, rtol=0)


def test_a_second_has_161_steps_of_20():
    samples = torch.randn(2, 3, 16000, generator=torch.Generator().manual_seed(0))
    found = speech.mfcc(samples)
    assert found.shape == (2, 3, 20, 161)
    torch.testing.assert_close(found[1, 2], speech.mfcc(samples[1, 2]), atol=TOLERANCE, rtol=0)


def test_silence_has_the_logarithm_of_the_offset_in_its_first_coefficient():
    found = speech.mfcc(torch.zeros(16000, dtype=torch.float64))
    expected = torch.zeros(20, 161, dtype=torch.float64)
    expected[0] = math.log(1e-6) * math.sqrt(64)
    torch.testing.assert_close(found, expected)


# --- splits ---


@pytest.mark.parametrize('name', NAMES)
def test_the_splits_are_the_lists(tmp_path, name):
    folder = made.make_speech(tmp_path)
    files = {}
    for split, each in made.EACH.items():
        dataset = create_sequence_dataset(name, tmp_path, split)
        assert dataset.classes == speech.WORDS and sorted(dataset.labels) == sorted(list(range(10)) * each)
        files[split] = [dataset.name(index) for index in range(len(dataset))]
        assert files[split] == sorted(files[split])
        for file, label in zip(files[split], dataset.labels):
            assert file.startswith(f'{folder}/{speech.WORDS[label]}/')
    for split, list_name in (('validation', 'validation_list.txt'), ('test', 'testing_list.txt')):
        listed = {line for line in (folder / list_name).read_text().split() if not line.startswith('bed/')}
        assert {file[len(str(folder)) + 1:] for file in files[split]} == listed


def test_items_are_the_files_normalised_by_all_training_samples(tmp_path):
    made.make_speech(tmp_path)
    train, test = (create_sequence_dataset('speech', tmp_path, split) for split in ('train', 'test'))
    samples = torch.stack([speech.read_wav(train.name(index)) for index in range(30)]).double()
    std, mean = torch.std_mean(samples, correction=0)
    expected = ((speech.read_wav(test.name(4)).double() - mean) / std).float().unsqueeze(0)
    torch.testing.assert_close(test[4][0], expected, atol=1e-5, rtol=1e-5)


def test_coefficients_are_normalised_each_over_the_training_split(tmp_path):
    made.make_speech(tmp_path)
    train, test = (create_sequence_dataset('speech-mfcc', tmp_path, split) for split in ('train', 'test'))
    found = speech.mfcc(torch.stack([speech.read_wav(train.name(index)) for index in range(30)])).double()
    std, mean = torch.std_mean(found, dim=(0, 2), correction=0)
    expected = ((speech.mfcc(speech.read_wav(test.name(4))) - mean[:, None]) / std[:, None]).float()
    torch.testing.assert_close(test[4][0], expected, atol=1e-4, rtol=1e-4)


# --- folders ---


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('change, told', [
    (lambda folder: shutil.rmtree(folder / 'left'), r"of wav files for each of .*found none for \['left'\]"),
    (lambda folder: [path.unlink() for path in (folder / 'up').iterdir()], r"none for \['up'\]; remove .* and pass"),
    (lambda folder: (folder / 'testing_list.txt').unlink(), 'testing_list.txt, the list of a split, cannot be read: '),
    (lambda folder: (folder / 'validation_list.txt').write_bytes(b'\xff\xfe'), 'validation_list.txt, the list of a'),
    (lambda folder: (folder / 'testing_list.txt').write_text('<html>none</html>'), 'lines such as .*<html>none'),
    (lambda folder: (folder / 'testing_list.txt').write_text('../yes/a.wav'), r"lines such as .*found \['\.\./yes/a"),
    (lambda folder: (folder / 'testing_list.txt').write_text(''), 'lines such as .*found none'),
    (lambda folder: next(iter((folder / 'no').glob('*4_*.wav'))).unlink(), r"lacks 1 files of its lists, such .*'no/"),
    (lambda folder: (folder / 'testing_list.txt').write_text(
        '\n'.join(line for line in (folder / 'testing_list.txt').read_text().split() if not line.startswith('go/'))),
     r"expected the clips .*'test': 10}, found .*'test': 9}; remove .* and pass download=True"),
    (lambda folder: next((folder / 'no').glob('*0_*.wav')).unlink(), r"expected the clips {'train': 30, .*'train': 29"),
])
def test_damaged_folders_are_told(tmp_path, name, change, told):
    change(made.make_speech(tmp_path))
    with pytest.raises(ValueError, match=f'^[^\n]*{told}[^\n]*$'):
        create_sequence_dataset(name, tmp_path, 'test')


def test_a_damaged_clip_is_an_error_of_its_item(tmp_path, caplog):
    folder = made.make_speech(tmp_path)
    names = sorted(path.name for path in (folder / 'yes').iterdir())
    os.truncate(folder / 'yes' / names[0], 3000)
    (folder / 'yes' / names[1]).write_bytes(b'')
    dataset = create_sequence_dataset('speech', tmp_path, 'train')
    message, = caplog.messages
    assert f'2 of 30 clips are left out of mean and deviation, such as: {folder}/yes/{names[0]} is damaged' in message
    by_name = {os.path.basename(dataset.name(index)): index for index in range(len(dataset))}
    for name in names[:2]:
        with pytest.raises(ValueError, match=f'yes/{name} is'):
            dataset[by_name[name]]
    assert dataset[by_name[names[2]]][0].isfinite().all()
    (folder / 'yes' / names[2]).unlink()
    with pytest.raises(OSError, match=names[2]):
        dataset[by_name[names[2]]]


def test_a_damaged_clip_has_no_coefficients(tmp_path):
    folder = made.make_speech(tmp_path)
    path = sorted((folder / 'stop').iterdir())[1]
    content = path.read_bytes()
    path.write_bytes(content[:3000])
    with pytest.raises(ValueError, match=f'^{path} is damaged'):
        create_sequence_dataset('speech-mfcc', tmp_path, 'train')
    assert files_below(tmp_path / 'SpeechCommands') == below_folder(folder)
    path.write_bytes(content)
    assert len(create_sequence_dataset('speech-mfcc', tmp_path, 'train')) == 30


def below_folder(folder):
    return sorted([folder.name, *(f'{folder.name}/{name}' for name in files_below(folder))])


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    made.make_speech(tmp_path)

    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr(speech, 'read_wav', refuse)
    with pytest.raises(ValueError, match=r'^[^\n]*\.wav cannot be read: Permission denied$'):
        create_sequence_dataset('speech-mfcc', tmp_path, 'train')


def test_statistics_are_made_anew_when_a_damaged_clip_is_mended(tmp_path, caplog):
    path = next((made.make_speech(tmp_path) / 'yes').glob('*1_*.wav'))
    content = path.read_bytes()
    path.write_bytes(content[:3000])
    before = create_sequence_dataset('speech', tmp_path, 'test')[0][0]
    path.write_bytes(content)
    assert not torch.equal(create_sequence_dataset('speech', tmp_path, 'test')[0][0], before)
    assert 'speech-statistics.safetensors is of other files or of another version; recomputing it' in caplog.text


def test_silence_alone_is_no_training_split(tmp_path, monkeypatch):
    made.make_speech(tmp_path)
    monkeypatch.setattr(speech, 'read_wav', lambda path: torch.zeros(16000))
    with pytest.raises(ValueError, match='has no sound to train on: 30 files, 30 could be read'):
        create_sequence_dataset('speech', tmp_path, 'train')


# --- what is kept ---


def test_coefficients_are_computed_once(tmp_path, monkeypatch):
    made.make_speech(tmp_path)
    first = {split: create_sequence_dataset('speech-mfcc', tmp_path, split) for split in made.EACH}
    monkeypatch.setattr(speech, 'mfcc', lambda samples: pytest.fail('computed again'))
    for split, dataset in first.items():
        again = create_sequence_dataset('speech-mfcc', tmp_path, split)
        assert again.labels == dataset.labels and torch.equal(again[2][0], dataset[2][0])


def test_held_out_coefficients_need_no_training_clips_once_they_are_kept(tmp_path, monkeypatch):
    made.make_speech(tmp_path)
    first = create_sequence_dataset('speech-mfcc', tmp_path, 'test')[2][0]
    (tmp_path / 'SpeechCommands' / 'speech-mfcc-train.safetensors').unlink()
    monkeypatch.setattr(speech, 'mfcc', lambda samples: pytest.fail('computed again'))
    assert torch.equal(create_sequence_dataset('speech-mfcc', tmp_path, 'test')[2][0], first)


def test_coefficients_of_other_files_are_computed_anew(tmp_path, caplog):
    folder = made.make_speech(tmp_path)
    create_sequence_dataset('speech-mfcc', tmp_path, 'train')
    path = next((folder / 'yes').glob('*2_*.wav'))
    path.write_bytes(made.sound(77))
    create_sequence_dataset('speech-mfcc', tmp_path, 'train')
    assert 'speech-mfcc-train.safetensors is of other files or of another version; recomputing it' in caplog.text
