"""What counts as a filled text."""

from tokenizers import Regex
from tokenizers.normalizers import Replace

from sftmix.words.shown import visible

SURROGATES = range(0xD800, 0xE000)


def test_what_unicode_ignores_by_default_shows_nothing():
    """Of all characters; by the tables of another library."""
    without = Replace(Regex(r"[\p{Default_Ignorable_Code_Point}\s\p{Cc}]"), "")
    unseen = {c for c in map(chr, range(0x110000)) if ord(c) not in SURROGATES and not visible(c)}
    ignored = {c for c in map(chr, range(0x110000)) if ord(c) not in SURROGATES and not without.normalize_str(c)}
    assert unseen == ignored | set("\u2800\ufff9\ufffa\ufffb")


def test_one_character_that_is_seen_fills_a_text():
    assert visible("\u3164\ufe0f\n\u2764\ufe0f")
    assert not visible("\u3164\ufe0f\n\u2800")
