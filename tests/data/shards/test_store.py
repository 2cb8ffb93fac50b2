"""How many shards a process has open; reading itself: test_remote.py and test_loader.py."""

import resource

import pytest

from data.shards.store import OPEN_SHARDS, OTHER_FILES, STORES, most_open

WANTED = 2 * STORES * OPEN_SHARDS + OTHER_FILES


@pytest.mark.parametrize(
    ("limits", "asked", "most"),
    [
        ((1024, 524_288), WANTED, OPEN_SHARDS),
        ((1024, resource.RLIM_INFINITY), WANTED, OPEN_SHARDS),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, OPEN_SHARDS),
        ((WANTED, WANTED), None, OPEN_SHARDS),
        ((1024, 1024), 1024, (1024 - OTHER_FILES) // 2 // STORES),
        ((256, 256), 256, 1),
    ],
)
def test_four_stores_stay_within_what_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], asked: int | None, most: int
) -> None:
    found = list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: found.append(values))
    assert most_open() == most
    assert found == ([] if asked is None else [(asked, limits[1])])
