"""Sets of stable names."""

from hypothesis import given
from hypothesis import strategies as st

from featcache.extraction.files import DigestSet

DIGESTS = st.binary(min_size=32, max_size=32).filter(any)
# all wish the same slot
NEIGHBOURS = st.integers(1, 40).map(lambda number: bytes(28) + number.to_bytes(4, "big"))


@given(st.lists(DIGESTS | NEIGHBOURS), st.lists(DIGESTS | NEIGHBOURS))
def test_digests_are_a_set(before: list[bytes], added: list[bytes]) -> None:
    """Each is new exactly once, a full table and values that wish the same slot included."""
    digests, expected = DigestSet(len(before) + len(added), before), set(before)
    for digest in [*added, *before, *added]:
        assert digests.add(digest) is (digest not in expected)
        expected.add(digest)
