"""The page of `python -m smpconv_models.demo`, on a loopback address."""
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from io import BytesIO

import programs
import pytest
import timm
import torch
from PIL import Image

import smpconv_models
from smpconv_models import demo
from smpconv_models.prediction import Predictor, inputs

BROWSER, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')


@pytest.fixture(scope='module')
def server(run_folder):
    loaded, = inputs.ModelSource(checkpoints=[str(run_folder)]).load()
    with demo.DemoServer(Predictor(loaded)) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def ask(server, path, data=None, **headers):
    """Return the status, headers and body of an answer."""
    request = urllib.request.Request(server.url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_an_image_has_classes_and_a_heat_map(server, run_folder, photos):
    status, _, body = ask(server, 'predict', (photos / 'b.webp').read_bytes())
    result = json.loads(body)
    expected, = smpconv_models.predict(photos / 'b.webp', run_folder)
    assert status == 200
    assert [ranked['label'] for ranked in result['predictions']] == expected.labels
    kind, content = result['heat_map'].split(',')
    assert kind == 'data:image/png;base64'
    with Image.open(BytesIO(base64.b64decode(content))) as picture:
        assert min(picture.size) >= 224


def test_the_page_and_the_kernels(server):
    status, headers, body = ask(server, '')
    assert status == 200 and b'<!doctype html>' in body
    assert "default-src 'none'" in headers['Content-Security-Policy']
    assert not re.search(rb'(?:src|href)="?(?:https?:)?//', body)  # nothing from elsewhere
    _, headers, body = ask(server, 'kernels.png')
    with Image.open(BytesIO(body)) as picture:
        assert headers['Content-Type'] == 'image/png' and picture.width > 300
    assert json.loads(ask(server, 'model')[2]) == {
        'label': 'smpconv_nano, epoch 7', 'has_kernels': True, 'max_bytes': 64 << 20}


def test_a_damaged_image_is_reported(server, photos):
    status, _, body = ask(server, 'predict', (photos / 'broken.jpg').read_bytes())
    assert status == 200 and json.loads(body) == {'image': 'image 0', 'error': 'not an image of a known format'}


@pytest.mark.parametrize(('path', 'headers', 'status'), [
    ('nothing', {}, 404),
    ('', {'Host': 'example.com'}, 403),
    ('predict', {'Origin': 'http://example.com'}, 403),
    ('predict', {'Content-Length': str(1 << 40)}, 413),
    ('predict', {'Content-Length': '-1'}, 411),
    ('predict', {'Content-Length': '9' * 5000}, 411),
])
def test_other_requests_are_refused(server, path, headers, status):
    found, _, body = ask(server, path, b'x' if path == 'predict' else None, **headers)
    assert found == status and list(json.loads(body)) == ['error']
    assert ask(server, 'model')[0] == 200  # it still answers


def test_a_network_without_points(photos, tmp_path):
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'weights.pth')
    options = inputs.ModelOptions(model='test_resnet', num_classes=3)
    loaded, = inputs.ModelSource(options, [str(tmp_path / 'weights.pth')]).load()
    with demo.DemoServer(Predictor(loaded)) as server:
        assert server.kernels is None


@pytest.mark.slow(reason='a process of its own, 15 s: the other tests have the server in theirs')
def test_the_program_starts_and_ends(run_folder):
    command = [sys.executable, '-m', 'smpconv_models.demo', '--checkpoint', run_folder, '--port', '0']
    with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        url = re.search(r'http://127\.0\.0\.1:\d+/', process.stdout.readline())[0]
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.status == 200
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ''


def test_errors_are_one_line(server, run_folder, capsys):
    assert 'GONE' in programs.refused(demo.main, capsys, '--checkpoint', 'GONE')
    argv = ['--checkpoint', run_folder, '--port', server.server_port]
    assert f'port {server.server_port} cannot be used: Address already in use; --port 0' in programs.refused(
        demo.main, capsys, *argv)


@pytest.mark.slow(reason='needs Chromium and its driver, which are no Python packages')
def test_a_person_drops_an_image(server, run_folder, photos):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ('headless', 'no-sandbox', 'disable-gpu', 'no-first-run', 'disable-background-networking'):
        options.add_argument(f'--{argument}')
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(server.url)
        choose = driver.find_element(By.TAG_NAME, 'input')
        result, message = (driver.find_element(By.ID, name) for name in ('result', 'message'))
        choose.send_keys(str(photos / 'b.webp'))
        WebDriverWait(driver, 60).until(lambda _: result.is_displayed())
        expected, = smpconv_models.predict(photos / 'b.webp', run_folder)
        lines = driver.find_element(By.ID, 'classes').text.splitlines()
        assert [line.split(':')[0] for line in lines] == expected.labels
        for name in ('image', 'heat', 'kernels'):
            width = driver.execute_script('return document.getElementById(arguments[0]).naturalWidth', name)
            assert width > 0, name
        choose.send_keys(str(photos / 'broken.jpg'))
        WebDriverWait(driver, 60).until(lambda _: 'not an image' in message.text)
        assert not result.is_displayed()
        assert driver.get_log('browser') == []
    finally:
        driver.quit()
