"""Damaged and hostile inputs of all kinds: each is refused in one line, or taken rightly; see hostile.py."""

import pytest
import torch

from tests import hostile, hostile_files

KINDS = list(hostile.KINDS)
CASES, MANY = 200, 2000  # in all


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has no threads of its parent
    assets = hostile_files.make_assets(tmp_path_factory.mktemp("hostile"))
    with hostile.warm(assets):
        yield assets
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_some(kind, assets):
    check(hostile.campaign([kind], len(range(KINDS.index(kind), CASES, len(KINDS))), 0, assets))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many(kind, assets):
    check(hostile.campaign([kind], len(range(KINDS.index(kind), MANY, len(KINDS))), 1000, assets))


def check(outcomes):
    report = hostile.table(outcomes).encode(errors="backslashreplace").decode()  # names may be no text
    assert not any(o.failure for o in outcomes), report
