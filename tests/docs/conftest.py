"""The files and the Hub that the pages' blocks name, so that the blocks run as they are."""
import pytest
import timm
import torch
from programs import ROOT, load
from safetensors.torch import save_file

import train
from smpconv_models import hub
from smpconv_models.training import Digits, TrainOptions, build_trainer, cli

loopback = load('tests/hub/loopback')


@pytest.fixture(scope='session')
def files(tmp_path_factory):
    """Folder with a run of one epoch in output/digits, its weights in FOLDER, and weights of SMPConv-T."""
    folder = tmp_path_factory.mktemp('pages')
    (folder / 'recipes').symlink_to(ROOT / 'recipes')
    trainer = build_trainer(TrainOptions.from_args(cli.parse_args(train.create_parser(), [
        '--config', str(ROOT / 'recipes/digits.yaml'), '--epochs', '1', '--output', str(folder / 'output')])))
    trainer.train()
    trainer.close()
    hub.convert(folder / 'output/digits/model_best.pth.tar', folder / 'FOLDER')
    model = timm.create_model('smpconv_t')
    torch.save(model.state_dict(), folder / 'SMPConv_T.pth')
    save_file(model.state_dict(), folder / 'smpconv_t.safetensors')
    Digits('validation', 'RGB')[0][0].save(folder / 'photo.jpg')
    return folder


@pytest.fixture
def folder(tmp_path, files, monkeypatch):
    """Copy of these files by links, as the current folder."""
    monkeypatch.chdir(tmp_path)
    for path in files.iterdir():
        if path.name != 'output':
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / 'output').mkdir()
    (tmp_path / 'output/digits').symlink_to(files / 'output/digits')
    return tmp_path


@pytest.fixture
def remote(tmp_path, files, monkeypatch):
    """Hub that has the weights of SMPConv-T, and a repository OWNER/NAME with a tag."""
    loopback.set_client(monkeypatch, tmp_path)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    with loopback.LoopbackHub() as remote:
        loopback.point_client(monkeypatch, remote.url)
        remote.add_repo('smpconv/smpconv_t.in1k', {'model.safetensors': files / 'smpconv_t.safetensors'})
        commit = remote.add_repo('OWNER/NAME', {path.name: path for path in (files / 'FOLDER').iterdir()})
        remote.repos['OWNER/NAME'].tags['REVISION'] = commit
        yield remote
