"""Names of requests, and the way back from them."""

from __future__ import annotations

import pytest

from pdserve.api.request_ids import RequestDirectory, check_request_id
from pdserve.core.errors import RequestError


def test_ids_are_never_used_twice():
    directory = RequestDirectory(100)
    seen = [directory.assign("cmpl", name, None)[2][0] for name in ("a", "a", None, None, "b")]
    assert len(set(seen)) == 5
    lists = [directory.assign("cmpl", "a", 3)[2] for _ in range(2)]
    assert len({request_id for ids in lists for request_id in ids}) == 6


def test_no_clients_name_can_be_anothers_id():
    """The random end begins with a character that no client may use."""
    _, _, (own,) = RequestDirectory(9).assign("cmpl", "a", None)
    with pytest.raises(RequestError):
        check_request_id(own, "X-Request-Id")


def test_the_latest_of_a_name_is_found():
    directory = RequestDirectory(100)
    _, _, (first,) = directory.assign("cmpl", "a", None)
    _, public, (second,) = directory.assign("cmpl", "a", None)
    assert directory.find("a") == directory.find(public) == (second,)
    assert directory.find(first) == (first,)


def test_a_list_is_found_whole_and_by_prompt():
    directory = RequestDirectory(100)
    name, public, ids = directory.assign("cmpl", None, 2)
    assert directory.find(name) == directory.find(public) == ids
    assert directory.find(f"{public}-1") == (ids[1],)
    assert ids == (f"{public}-0", f"{public}-1")


def test_old_names_are_forgotten():
    directory = RequestDirectory(6)
    names = [directory.assign("cmpl", f"n{i}", None)[0] for i in range(5)]
    assert directory.find(names[0]) == ()
    assert directory.find(names[-1]) != ()
