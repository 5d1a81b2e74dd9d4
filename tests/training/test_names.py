"""Order of class names, and how names are shown."""
import itertools
import random

import pytest
from timm.utils.misc import natural_key

from smpconv_models.training import class_names

TIES = ['A', 'a', 'B', 'b', '1', '01', '001']


def test_order_depends_on_the_names_alone():
    orders = {tuple(class_names.in_order(order)) for order in itertools.permutations(TIES)}
    assert orders == {('001', '01', '1', 'A', 'a', 'B', 'b')}
    assert len({tuple(sorted(order, key=natural_key)) for order in itertools.permutations(TIES)}) > 1  # timm's alone


def test_order_without_ties_is_timms():
    draw = random.Random(0)
    drawn = {''.join(draw.choices('ab01729_-. éÉ٣', k=draw.randint(1, 8))) for _ in range(2000)}
    distinct = list({str(natural_key(name)): name for name in drawn}.values())
    assert len(distinct) > 1000
    assert class_names.in_order(distinct) == sorted(distinct, key=natural_key)


def test_order_takes_digits_that_are_no_numbers():
    with pytest.raises(ValueError):
        natural_key('1²2')
    assert class_names.in_order(['1²2', '1²1']) == ['1²1', '1²2']


@pytest.mark.parametrize('name, expected', [
    ('cat', 'cat'), ('Café', 'Café'), ('猫', '猫'), ('Cafe\u0301', r'Cafe\u0301'), ('\u1112\u1161', r'\u1112\u1161'),
    ('caf\udce9', r'caf\udce9'), ('a\nb', r'a\nb'), ('zero\u200bwidth', r'zero\u200bwidth'),
    (r'caf\udce9', r'caf\\udce9'),
])
def test_names_are_escaped_if_they_cannot_be_told_apart(name, expected):
    assert class_names.shown(name) == expected
    assert expected == name or expected.encode().decode('unicode_escape') == name


def test_lists_are_in_order_and_bounded():
    assert class_names.listed(['b10', 'b9', "it's", 'e\u0301'], 3) == r"""['b9', 'b10', 'e\u0301']"""
    assert class_names.quoted("it's") == '''"it's"'''
