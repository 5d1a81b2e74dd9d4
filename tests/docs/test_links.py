"""Links from page to page, to headings and to files, and the names of files in the text."""
import pytest
from pages import PAGES, anchors, links, name_of, paths
from programs import ROOT


def broken(page):
    found = []
    for link in links(page):
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    assert broken(page) == []


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_named_files_exist(page):
    assert [path for path in paths(page) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(('link', 'is_broken'), [
    ('other.md', False), ('other.md#a-heading-of-pythons-own-1', False), ('#here', False), ('folder/', False),
    ('https://example.org/nothing', False), ('nothing.md', True), ('other.md#another', True), ('#there', True),
])
def test_a_broken_link_is_found(tmp_path, link, is_broken):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'other.md').write_text(
        "# A heading, of Python's own\n\n```bash\n# no heading\n```\n## A heading of Pythons own\n")
    page = tmp_path / 'page.md'
    page.write_text(f'# Here\n\n[a link]({link}), ![a picture](folder)\n\n```\n[no link](nothing)\n```\n')
    assert broken(page) == ([link] if is_broken else [])
