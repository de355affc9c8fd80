"""A row format of one's own: what is read for it, what it is known by, and what it may not answer."""

import json
from collections import Counter

import pytest

from sftmix.components import RowFormat
from sftmix.config.read import from_dict
from sftmix.testing import check_row_format
from sftmix.text.formats import FORMATS, Messages, PlainText
from sftmix.text.values import field_text
from sftmix.types import Message
from sftmix.words.errors import BadRow, ConfigError, ContractError
from tests.text.converted import convert
from tests.text.test_formats import CASES, A, U

ROW = {
    "question": "2 + 2?",
    "dialogue": [{"q": "x"}],
    "answer": "4",
    "id": "k",
    "system": "S",
    "weight": 0.5,
    "lang": "e",
}


class Quiz(RowFormat):
    """A question and an answer."""

    fields = ("question", "answer", "dialogue")

    def __init__(self, *, mark: str = ""):
        self.mark = mark

    def read(self, row, *, roles):
        return [U(field_text(row, "question")), A(field_text(row, "answer") + self.mark)]


class Fixed(RowFormat):
    """It answers what it was made with."""

    fields = ("question",)

    def __init__(self, *, turns=()):
        self.turns_read = turns

    def read(self, row, *, roles):
        return self.turns_read


def test_what_every_format_has_is_read_for_it():
    unread = Counter()
    found = convert({**ROW, "weight": 0.5, "tags": ["a"]}, Quiz(mark="!"), unread=unread, label="good", label_field="l")
    assert found.messages == tuple(
        Message(m.role, m.content, m.trained, 0.5) for m in [Message("system", "S"), U("2 + 2?"), A("4!")]
    )
    assert (found.id, found.label, found.columns) == ("k", "good", {"weight": 0.5, "lang": "e"})
    assert set(unread) == {"'tags'", "'lang'"}


def test_its_identity_is_in_the_key_of_the_rows(write, read):
    """Its options and its source: the same class with another option, or edited, reads the rows again."""
    path = write("rows.jsonl", [ROW])

    def key(form):
        return read(path, row_format=form).train.key

    class Edited(Quiz):
        def read(self, row, *, roles):
            return super().read(row, roles=roles)

    assert key(Quiz()) == key(Quiz())
    assert len({key(form) for form in (Quiz(), Quiz(mark="!"), Edited())}) == 3
    train = read(path, row_format=Quiz(mark="!")).train
    assert [m.content for e in train.examples(whole=True) for m in e.messages] == ["S", "2 + 2?", "4!"]


def test_a_missing_field_is_named_and_a_mistake_in_its_code_is_not_a_bad_row(write, read, refused):
    path = write("rows.jsonl", [{"question": "u", "id": "k"}])
    assert refused(path, row_format=Quiz())[1] == (
        f"{path}:1: field 'answer' is missing or null; there are 'question', 'id' (data.columns gives them other names)"
    )

    class Careless(Quiz):
        def read(self, row, *, roles):
            return [U(row["question"]), A(row["answer"])]

    with pytest.raises(KeyError, match="answer"):
        read(path, row_format=Careless(), skip_bad=True)


def test_its_fields_may_have_other_names(write, read):
    path = write("rows.jsonl", [{"ask": "u", "say": "a"}])
    train = read(path, row_format=Quiz(), columns={"question": "ask", "answer": "say"}).train
    assert [m.content for e in train.examples(whole=True) for m in e.messages] == ["u", "a"]
    with pytest.raises(
        ConfigError, match=r"no format that row_format .* has prompt; .*Quiz: question, answer, dialogue"
    ):
        read(path, row_format=Quiz(), columns={"prompt": "ask"})


@pytest.mark.parametrize("turns", [[], None, "text", ["text"], ({"role": "user"},)])
def test_an_answer_that_is_no_list_of_messages_is_refused(turns):
    with pytest.raises(ContractError, match=r"row_format Fixed returned .*; allowed: a list of Message"):
        convert({"question": "u"}, Fixed(turns=turns))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Message("assistant", "a", True, -1.0), "weight is -1.0; allowed: a number from 0"),
        (Message("assistant", "a", True, float("nan")), "weight is nan; allowed: a number from 0"),
        (Message("assistant", 4, True), "content must be a string, found 4"),  # type: ignore[arg-type]
        (Message("assistant", "\ud83d", True), "content contains a lone surrogate"),
    ],
)
def test_values_that_no_row_may_have_are_refused_in_its_turns_as_well(answer, words):
    with pytest.raises(BadRow, match=words):
        convert({"question": "u"}, Fixed(turns=[U("u"), answer]))


def test_it_is_chosen_with_its_options_and_stored_like_any_component():
    path = f"{Quiz.__module__}.Quiz"
    config = from_dict({"row_format": path, "row_format.mark": "!"})
    assert isinstance(config.row_format, RowFormat)
    assert config.as_dict()["row_format"] == {"class_path": path, "init_args": {"mark": "!"}}
    assert from_dict(json.loads(json.dumps(config.as_dict()))) == config
    with pytest.raises(ConfigError, match="Quiz has no option 'mrk'"):
        from_dict({"row_format": path, "row_format.mrk": "!"})


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not isinstance(form, PlainText)])
def test_ours_keep_the_contract(name):
    row = {key: value for key, value in CASES[name][0].items() if key != "text"}
    check_row_format(FORMATS[name], [row, {**row, "id": "other"}])


def test_a_list_of_turns_in_a_field_of_another_name():
    row = {"dialogue": CASES["messages"][0]["messages"]}
    check_row_format(Messages(field="dialogue"), [row])
    assert convert(row, Messages(field="dialogue")).messages == tuple(CASES["messages"][1])


class Counting(Quiz):
    """A format with a state."""

    def read(self, row, *, roles):
        self.before = [*getattr(self, "before", []), "!"]
        return [U("u"), A("a" + "".join(self.before))]


class Changing(Quiz):
    """It writes into its rows."""

    def read(self, row, *, roles):
        row["dialogue"].append("more")
        return super().read(row, roles=roles)


class Raising(Quiz):
    """Its errors are of any kind."""

    def read(self, row, *, roles):
        return [U(row["question"]), A(row["answer"])]


class Untrained(Quiz):
    """Nothing is learnt from it."""

    def read(self, row, *, roles):
        return [U("u"), Message("assistant", "a")]


class Eager(Quiz):
    """It reads anything."""

    def read(self, row, *, roles):
        return [U("u"), A("a")]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (Changing(), "changed in place"),
        (Untrained(), "at least one of the assistant's trained"),
        (Eager(), "a row without any field is read"),
        (Fixed(turns=[Message("bot", "a", True)]), "allowed: turns of system, user, assistant and tool, "),
        (Fixed(turns=()), "allowed: turns of"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, RowFormat) else "",
)
def test_what_breaks_the_contract_is_caught(form, words):
    with pytest.raises(AssertionError, match=words):
        check_row_format(form, [ROW])


def test_a_state_between_rows_is_caught():
    with pytest.raises(AssertionError, match="depend on the rows before"):
        check_row_format(Counting(), [ROW, {**ROW, "question": "3 + 3?"}])
    with pytest.raises(BadRow, match="is missing"):
        check_row_format(Quiz(), [{"question": "u"}])
    with pytest.raises(KeyError, match="question"):
        check_row_format(Raising(), [ROW])
