"""`python -m smpconv_models.run`: other programs with the models registered."""
import os
import subprocess
import sys

import pytest

from smpconv_models import run as launcher

SCRIPT = """
import subprocess, sys

if __name__ == '__main__':
    print('timm' in sys.modules, 'smpconv_models' in sys.modules, sys.argv[1:], __file__)
    import timm
    print(timm.is_model('smpconv_t'), timm.__spec__.loader.is_package('timm'))
    child = [sys.executable, '-c', "import timm; print(timm.is_model('smpconv_mobile31'))"]
    print(subprocess.run(child, capture_output=True, text=True).stdout.strip())
    sys.exit(7)
"""


def run(*arguments, program=('-m', 'smpconv_models.run'), **environment):
    command = [sys.executable, *map(str, (*program, *arguments))]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_script_and_its_children(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    done = run(path, '--model', 'a b')
    assert done.stdout.splitlines() == [
        f"False False ['--model', 'a b'] {path}", 'True True', 'True'], done.stderr
    assert done.returncode == 7


def test_without_it_the_models_are_unknown():
    """Otherwise the other tests would prove nothing."""
    code = "import timm; print(timm.is_model('smpconv_t'))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'False'


def test_a_module_and_the_sitecustomize_of_somebody_else(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text("import sys; sys.marked = 'by somebody else'")
    (tmp_path / 'program.py').write_text("import sys, timm; print(sys.marked, timm.is_model('smpconv_t'), __name__)")
    done = run('-m', 'program', program=[launcher.__file__], PYTHONPATH=str(tmp_path))  # without importing the package
    assert done.stdout.strip() == 'by somebody else True __main__', done.stderr


@pytest.mark.parametrize('arguments', [(), ('-m',), ('--model', 'x')])
def test_a_wrong_command_is_one_line(arguments, capsys):
    assert launcher.main(list(arguments)) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith('python -m smpconv_models.run: error: expected SCRIPT.py or -m MODULE')
