import pytest
from matplotlib.figure import Figure


@pytest.fixture
def saved_figures(monkeypatch):
    """Figures in the order in which they are saved."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: saved.append(self) or save(
        self, *args, **kwargs))
    return saved
