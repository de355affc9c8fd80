"""Devices in the place of files: what is written whole would take their place."""

from sftmix.disk.places import unwritable


def test_a_device_is_not_replaced():
    assert "cannot be written" in (unwritable("/dev/null") or "")
    assert unwritable("/dev/null/x")
