"""``python -m hwnas`` is ``hwnas``."""

from hwnas.cli import app

app()
