"""Changes of files and of what is in them, at random, for fuzz.py."""
import argparse
import warnings

import torch

warnings.filterwarnings('ignore', 'Sparse CSR')

NESTED = []
for _ in range(150):
    NESTED = [NESTED]
TEXTS = [
    '\x1b[31m', 'a\0b', 'two\nlines', '\u202ea', '\ud800', 'a' * 5000, '', '__class__', 'args.x', 'module.', '%s {}',
    'x', 'digits', 'resnet18', 'smpconv_b', 'smpconv_speech', 'hf-hub:evil/x', 'local-dir:/etc', 'wds/x',
    'hfds/evil/x', 'pipe:touch trap; echo ://', '/etc', '/etc/passwd', '../../..', 'https://127.0.0.1:9/x']
VALUES = [
    None, True, False, -1, -5, 0, 1, 1 << 20, 10 ** 8, 10 ** 30, -10 ** 400, 1e-9, 1e38, float('nan'), float('inf'), 1j,
    [], {}, (), [1], [[1]], [0.5] * 3, [10 ** 6] * 4, {'a': 1}, {'pretrained': True}, [None], b'x', NESTED,
    {1: 2, 'a': 3}, argparse.Namespace(x=1), torch.float16, torch.ones(2), torch.ones(()), torch.ones(4).to_sparse(),
    torch.ones(3, 0), torch.full((4,), float('nan')), torch.tensor(-5.), torch.tensor(1j), torch.tensor(True),
    torch.ones(1).expand(1 << 20), torch.ones(4, dtype=torch.float8_e5m2), torch.ones(2, 2).to_sparse_csr()]
KEYS = ['pretrained', 'file', 'url', 'hf_hub_id', 'dims', 'img_size', 'step', 'state_dict_ema', 0, None, (1, 'a')]
TOKENS = [  # of YAML and of JSON
    b'!!bool x', b'!!timestamp x', b'!!int x', b'!!float x', b'!!binary x', b'!!set x', b'!!omap x', b'!!pairs x',
    b'!!python/object/apply:os.system ["touch trap"]', b'!!python/name:os.system', b'&a [*a]', b'*a', b'{<<: x}',
    b'? x', b'[' * 5000, b'{"a":' * 5000, b'- ' * 3000, b'9' * 6000, b'"a\\0b"', b'"\\e[31m"', b'"\\ud800"', b'"a\\nb"',
    b'NaN', b'Infinity', b'1e999', b'2001-99-99', b'0:0:61', b'.inf', b'null', b'[1]', b'{}', b'true',
    b'"%s"' % (b'a' * 5000), b'\x1b[31m', b'\xff\xfe', b'\xef\xbb\xbf', b'\0', b'---', b'%YAML 9',
    b'"local-dir:/etc"', b'"hf-hub:evil/x"', b'-5']


def copied(value):
    """Return a copy of the containers, with the same tensors."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def widened(tensor):
    """Return a tensor with arithmetic: float8 has none."""
    return tensor.half() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def change_value(value, draw):
    """Return a copy with one value, key or entry changed."""
    node = value = copied(value)
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return value
        key = draw.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        action = draw.random()
        if action < 0.1:
            del node[key]
        elif action < 0.3 and isinstance(node, dict):
            node[draw.choice(KEYS + TEXTS)] = node.pop(key) if action < 0.2 else draw.choice(VALUES + TEXTS)
        elif action < 0.7 and isinstance(node[key], torch.Tensor) and node[key].layout == torch.strided:
            node[key] = draw.choice([
                torch.Tensor.double, torch.Tensor.half, torch.Tensor.bool, torch.Tensor.cfloat, torch.Tensor.flatten,
                torch.Tensor.to_sparse, torch.Tensor.squeeze, lambda own: own[None], lambda own: own.flatten()[:0],
                lambda own: widened(own) * torch.nan, lambda own: widened(own) - torch.inf,
                lambda own: widened(own) - 5])(node[key])
        else:
            node[key] = draw.choice(VALUES + TEXTS)
        return value


def change_state(state, draw):
    """Return a checkpoint with one or two changes, sometimes in the form of another trainer."""
    for _ in range(draw.choice([1, 1, 2])):
        state = change_value(state, draw)
    arguments, weights = state.get('args'), state.get('state_dict')
    if isinstance(arguments, dict) and draw.random() < 0.2 and all(isinstance(key, str) for key in arguments):
        state['args'] = argparse.Namespace()
        vars(state['args']).update(arguments)  # a name such as __class__ cannot be set
    if isinstance(weights, dict) and draw.random() < 0.3:
        prefix = draw.choice(['module.', '_orig_mod.', 'module._orig_mod.', 'model.'])
        state[draw.choice(['state_dict', 'state_dict_ema', 'model_ema'])] = {
            f'{prefix}{key}': item for key, item in weights.items()}
    return state


def change_bytes(content, draw):
    """Return a copy with some bytes changed, left out, repeated or cut off."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        start = draw.randrange(len(content) + 1)
        stop = min(start + draw.choice([1, 1, 4, 8, 64]), len(content))
        action = draw.randrange(4 if draw.random() < 0.9 else 5)
        content[start:stop if action < 3 else start if action == 3 else None] = [
            bytes(draw.randrange(256) for _ in range(stop - start)), b'\xff' * (stop - start), b'',
            content[start:stop], b''][action]
    return bytes(content)


def change_text(content, draw):
    """Return JSON or YAML with a token in place of a line's value, of a line or of everything; or with other bytes."""
    action, token, lines = draw.random(), draw.choice(TOKENS), content.split(b'\n')
    if action < 0.4:
        return token if action < 0.1 else change_bytes(content, draw)
    index = draw.randrange(len(lines))
    key, colon, value = lines[index].partition(b': ')
    lines[index] = key + colon + token + b',' * value.endswith(b',') if colon and action < 0.9 else token
    return b'\n'.join(lines)


def plain(value):
    """Return what JSON and YAML can represent of a value."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
