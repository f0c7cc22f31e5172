"""What a text may be: UTF-8 of a sane length that says something."""

from featcache.errors import UnreadableSample

MOST_TEXT_BYTES = 1 << 20  # a long novel; a larger file is a log or a dump, whose first words say nothing of it
TEXT_SUFFIXES = frozenset({".txt"})


def decode_text(content: bytes) -> str:
    """Return a sample's text, without a byte order mark.

    Raises:
        UnreadableSample: it is empty, no UTF-8, or longer than 1 MiB.
    """
    if len(content) > MOST_TEXT_BYTES:
        raise UnreadableSample(f"a text of {len(content) / 1e6:.1f} MB, over the limit of {MOST_TEXT_BYTES / 1e6:.1f} MB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableSample(f"no text in UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UnreadableSample("an empty text")
    return text
