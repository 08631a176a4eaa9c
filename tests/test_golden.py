"""Golden pictures: what every scheduler draws, and every method after two updates, on any machine."""

import json

import pytest

from minisd import registry
from minisd.tiny import golden
from tests.helpers import mostly_slow

# Those that are one on paper, and two of second order.
ALIKE = {frozenset(p) for p in (("ddim", "euler"), ("ddpm", "euler_ancestral"), ("dpmpp_2m", "unipc"))}
KNOWN = json.loads(golden.PATH.read_text())


def test_there_is_one_for_each_scheduler_and_method():
    assert {kind: [*known] for kind, known in KNOWN.items()} == {k: registry.names(k) for k in golden.KINDS}


def test_the_schedulers():
    far = dict(golden.distances("schedulers", registry.names("schedulers")))
    assert max(far.values()) <= golden.BOUND, far


def test_a_picture_of_another_scheduler_is_another():
    pictures = {name: bytes.fromhex(text) for name, text in KNOWN["schedulers"].items()}
    near = {
        frozenset((a, b))
        for a in pictures
        for b in pictures
        if a < b and golden.distance(pictures[a], pictures[b]) <= golden.BOUND
    }
    assert near == ALIKE, near


@pytest.mark.parametrize("method", mostly_slow(registry.names("methods"), "lora"))
def test_the_methods(method):
    (found,) = golden.distances("methods", [method])
    assert found[1] <= golden.BOUND, found
