"""Keys of the environment reach a header whole, or are refused by name without being shown."""

from __future__ import annotations

import pytest

from megatron_r1.errors import PlatformError
from megatron_r1.platform.api_keys import api_key


@pytest.mark.parametrize(
    ("value", "key"),
    [("abc", "abc"), ("abc\n", "abc"), (" abc\r\n", "abc"), ("", ""), ("\n", ""), ("a-b_c=.", "a-b_c=.")],
)
def test_a_key_loses_the_line_break_of_its_file(monkeypatch, value, key):
    monkeypatch.setenv("SOME_KEY", value)
    assert api_key("SOME_KEY") == key
    monkeypatch.delenv("SOME_KEY")
    assert api_key("SOME_KEY") == ""


@pytest.mark.parametrize("value", ["abc\ndef", "ab\tc", "k\u00e9y", "\ufeffabc", "a\x7f"])
def test_a_key_that_no_header_carries_is_named_and_not_shown(monkeypatch, value):
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(PlatformError, match="^SOME_KEY: must be printable ASCII") as refused:
        api_key("SOME_KEY")
    assert value not in str(refused.value) and "abc" not in str(refused.value)
