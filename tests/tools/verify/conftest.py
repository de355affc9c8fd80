"""Two runs, each made once: `honest`, of the whole recipe, and `ntp`, which is cheap; and copies to be changed."""

import shutil

import pytest

from tests.tools.verify.runs import Copy, made


@pytest.fixture(scope="session")
def honest(tmp_path_factory) -> Copy:
    return made(tmp_path_factory.mktemp("honest"), "--with_baseline")


@pytest.fixture(scope="session")
def ntp(tmp_path_factory) -> Copy:
    """A short run without reference and without dropout, whose masks another layout would draw in another way."""
    return made(tmp_path_factory.mktemp("ntp"), "--objective", "NTP", dropout=0.0)


@pytest.fixture
def copy_of_ntp(ntp, tmp_path) -> Copy:
    return Copy(ntp.tiny, shutil.copytree(ntp.run, tmp_path / "run"))


@pytest.fixture
def copy(honest, tmp_path) -> Copy:
    """Its rows lie where the honest run's do, and are put back."""
    rows = honest.tiny.train.read_bytes()
    shutil.copytree(honest.run, tmp_path / "run")
    yield Copy(honest.tiny, tmp_path / "run")
    honest.tiny.train.write_bytes(rows)
