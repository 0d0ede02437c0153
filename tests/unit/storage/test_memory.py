"""MemoryStorage and its sorted keys."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3queue_async.errors import StoreUnavailable
from s3queue_async.storage._sorted import SortedStrings
from s3queue_async.storage.base import IfVersion, NotFound
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.conformance import keys_of


async def test_shared_by_name() -> None:
    """Two storages of one name see the same objects, others do not, and forgetting a name begins anew."""
    one, two, other = MemoryStorage("shared"), MemoryStorage("shared"), MemoryStorage()
    for storage in (one, two, other):
        await storage.open()
    await one.put("k", b"1")
    assert await keys_of(two) == ["k"]
    assert await keys_of(other) == []
    MemoryStorage.forget("shared")
    fresh = MemoryStorage("shared")
    await fresh.open()
    assert await keys_of(fresh) == []
    MemoryStorage.forget("shared")


async def test_versions_are_hashes() -> None:
    """Equal bodies have equal versions, as on S3: a stale version passes when the body came back."""
    storage = MemoryStorage()
    await storage.open()
    first = await storage.put("k", b"A")
    await storage.put("k", b"B")
    await storage.put("k", b"A")
    await storage.put("k", b"C", when=IfVersion(first.version))


async def test_dates_come_from_the_given_clock() -> None:
    """Dates are the given clock's, cut down to the resolution."""
    now = 1000.7
    storage = MemoryStorage(now=lambda: now, date_resolution_s=1.0)
    await storage.open()
    assert (await storage.put("k", b"")).date_s == 1000.0
    now = 1002.9
    found = await storage.get("k")
    assert found.date_s == 1002.0
    assert (await storage.list("")).entries[0].modified_s == 1000.0


async def test_must_be_open() -> None:
    """Before open and after close every call says so, and is not worth trying again."""
    storage = MemoryStorage("closed")
    with pytest.raises(StoreUnavailable, match="is not open") as caught:
        await storage.get("k")
    assert not caught.value.retriable
    await storage.open()
    with pytest.raises(NotFound):
        await storage.get("k")
    await storage.close()
    with pytest.raises(StoreUnavailable, match="is not open"):
        await storage.list("")


@given(
    st.lists(st.tuples(st.booleans(), st.text(alphabet="ab/é🎉", max_size=4)), max_size=200),
    st.text(alphabet="ab/é🎉", max_size=4),
    st.booleans(),
)
def test_sorted_strings_are_a_sorted_set(steps: list[tuple[bool, str]], bound: str, inclusive: bool) -> None:
    """Whatever is added and removed, iteration is what a sorted list would give."""
    strings, model = SortedStrings(chunk_max=4), set[str]()
    for adds, value in steps:
        if adds and value not in model:
            model.add(value)
            strings.add(value)
        elif not adds and value in model:
            model.remove(value)
            strings.remove(value)
    assert len(strings) == len(model)
    expected = sorted(value for value in model if value > bound or (inclusive and value == bound))
    assert list(strings.after(bound, inclusive=inclusive)) == expected


def test_sorted_strings_with_many() -> None:
    """Growing at the end, and shrinking from the front, keeps few and full chunks."""
    strings = SortedStrings()
    values = [f"{number:07}" for number in range(50_000)]
    for value in values:
        strings.add(value)
    assert len(strings._chunks) <= 26
    assert list(islice(strings.after(values[25_000], inclusive=False), 3)) == values[25_001:25_004]
    for value in values[:49_999]:
        strings.remove(value)
    assert list(strings.after("", inclusive=True)) == values[49_999:]
