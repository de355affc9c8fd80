"""`components NAME --check`, and what its checks can be told."""

import sys

import pytest

WRONG = "DFT: the gradient is not the loss's by finite differences. If the loss detaches a factor"


@pytest.mark.parametrize(("name", "code"), [("DFT", 0), ("EAFT", 0), ("NTP", 0)])
def test_a_loss_with_detached_parts_can_be_checked(sftmix, name, code):
    done = sftmix("components", name, "--check", "--finite_differences", "false")
    assert (done.code, f"{name} keeps the contract of Objective" in done.out) == (code, True), done.err


def test_the_failure_names_the_argument(sftmix):
    done = sftmix("components", "DFT", "--check")
    assert (done.code, WRONG in done.err) == (2, True), done.err
    assert "finite_differences=False (`components --check --finite_differences false`)" in done.err
    assert sftmix("components", "DFT", "--check", "--finite_differences").code == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("RandomPairs", "--check", "--finite_differences", "false"), "is for --check of an objective; leave it out"),
        (("FromFile", "--check", "--finite_differences", "false"), "is for --check of an objective; leave it out"),
        (("DFT", "--finite_differences", "false"), "--finite_differences is for --check of an objective; leave it out"),
        (
            ("Longest", "--check"),
            "every input was refused (options, or the check's scores, may fit), last: ",
        ),
    ],
)
def test_what_a_check_does_not_take_is_refused(sftmix, words, named):
    done = sftmix("components", *words)
    assert (done.code, named in done.err) == (2, True), done.err


def test_without_hypothesis_the_extra_that_brings_it_is_named(sftmix, monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)  # find_spec finds nothing, and to import it is an error
    done = sftmix("components", "All", "--check")
    assert (done.code, "needs hypothesis, which is not installed: pip install -e '.[test]'" in done.err) == (2, True)


@pytest.mark.parametrize("kind", ["RowFormat", "Renderer", "Splitter"])
def test_a_kind_shows_what_chooses_it(sftmix, kind):
    done = sftmix("components", kind)
    assert done.code == 0, done.err
    first, *_, last = done.out.strip().splitlines()
    assert f"({kind}: " in first
    assert "--objective" not in done.out
    assert last.endswith("(docs/components.md has an example of each kind).")
