"""Rules and remedies explain themselves, in pages and as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rnnguard.decision.rulebook import Rulebook, load_rulebook
from rnnguard.errors import RulesError
from rnnguard.remedies import REMEDIES
from rnnguard.report.explain import remedies_told, rules_told
from rnnguard.report.words import FIXES, remedy_data, remedy_page, rule_data, rule_page

FULL = '''schema = 1
[[rule]]
code = "RG790"
name = "slow"
severity = "info"
what = "It is slow."
why = "Time is short."
method = "recorded step"
how = "A clock is read."
example = """
model = nn.LSTM(5, 8)
"""
twin = "model = nn.GRU(5, 8)"
when = { steps = "> 1000", cell = ["lstm"] }
warning_when = { steps = "> 2000" }
error_when = { steps = "> 9000" }
message = "over {steps} steps"
cure = "Wait."
fix = "values"
implied_by = ["RG401", "RG402"]
refs = ["Somebody 2020", "somewhere #7"]
'''
PAGE = """# slow (RG790)

info; fix: values, by rnnguard.stabilize; of untrained weights only

## What is wrong

It is slow.

## Why it hurts

Time is short.

## How it is found

By watching a real training step. A clock is read.

## Found when

cell = lstm, steps > 1000

## A warning when

* steps > 2000

## An error when

* steps > 9000

## Example

```python
model = nn.LSTM(5, 8)
```

## The same, healthy

```python
model = nn.GRU(5, 8)
```

## What to do

Wait.

## Implied by

RG401, RG402

## References

* Somebody 2020
* somewhere #7"""


@pytest.fixture(scope="module")
def book() -> Rulebook:
    return load_rulebook()


@pytest.fixture
def own(tmp_path: Path) -> Rulebook:
    (tmp_path / "rules.toml").write_text(FULL, encoding="utf-8")
    return load_rulebook([tmp_path])


def test_a_rule_is_told_whole(own: Rulebook) -> None:
    assert rule_page(own.rule("slow")) == PAGE


def test_a_rule_as_data_says_the_same(own: Rulebook) -> None:
    (data,) = json.loads(rules_told(own, "RG790", False, "json"))
    assert data == rule_data(own.rule("slow"))
    assert data["when"] == {"cell": "= lstm", "steps": "> 1000"}
    assert (data["warning_when"], data["error_when"]) == (
        [{"steps": "> 2000"}],
        [{"steps": "> 9000"}],
    )
    words = ("method", "how", "twin", "implied_by")
    assert [data[word] for word in words] == [
        "recorded step", "A clock is read.", "model = nn.GRU(5, 8)", ["RG401", "RG402"],
    ]  # fmt: skip


def test_what_a_rule_does_not_have_is_not_told(book: Rulebook) -> None:
    page = rule_page(book.rule("RG903"))
    assert page.startswith("# parametrized-weight (RG903)\n\nerror; fix: none\n")
    assert "Found when" not in page and "Example" not in page


def test_all_rules_are_told(book: Rulebook) -> None:
    pages = rules_told(book, None, True, "text")
    assert pages.count("## What to do") == len(book.rules)
    assert len(rules_told(book, None, False, "text").splitlines()) == len(book.rules)
    assert len(json.loads(rules_told(book, None, True, "json"))) == len(book.rules)
    assert {rule.fix for rule in book.rules} <= FIXES.keys()


def test_a_remedy_is_told_with_what_applies_it(book: Rulebook) -> None:
    remedy = next(remedy for remedy in REMEDIES if remedy.name == "chrono_bias")
    page = remedy_page(remedy, book)
    assert page.startswith("# chrono_bias\n\nvalues: gives untrained weights other values\n")
    assert "\n* t_max: longest time scale in steps, from 3 on.\n" in page
    assert "\n* lstm-fading-chrono (recurrence): t_max = memory_needed\n" in page
    assert "\n* Tallec and Ollivier 2018, eq. 16 (arXiv 1804.11188)" in page
    assert "What it adds" not in page


def test_a_remedy_for_the_asking_says_so(book: Rulebook) -> None:
    remedy = next(remedy for remedy in REMEDIES if remedy.name == "zoneout")
    page = remedy_page(remedy, book)
    assert "A child `zoneout` of the site's module." in page
    assert "No row of the table applies it" in page
    assert remedy_data(remedy, book)["scenarios"] == []


def test_every_remedy_explains_itself(book: Rulebook) -> None:
    used = {name: set[str]() for name in (remedy.name for remedy in REMEDIES)}
    for row in book.scenarios:
        for name, dose in row.dose.items():
            used[name] |= dose.keys()
    for remedy in REMEDIES:
        assert remedy.refs and all(remedy.refs), f"{remedy.name} cites nothing"
        assert used[remedy.name] <= remedy.doses.keys(), f"{remedy.name}: a word nobody explains"
        assert not any(told.endswith(".") for told in remedy.doses.values()), remedy.name


def test_all_remedies_are_told(book: Rulebook) -> None:
    names = [remedy.name for remedy in REMEDIES]
    listed = remedies_told(book, None, False, "text").splitlines()
    assert [line.split()[0] for line in listed] == names
    pages = remedies_told(book, None, True, "text")
    assert [line[2:] for line in pages.splitlines() if line.startswith("# ")] == names
    data = json.loads(remedies_told(book, None, True, "json"))
    assert [row["name"] for row in data] == names
    rows = {row["id"] for remedy in data for row in remedy["scenarios"]}
    assert rows == {row.id for row in book.scenarios if row.apply}


def test_an_unknown_remedy_is_named_with_the_nearest(book: Rulebook) -> None:
    with pytest.raises(RulesError) as caught:
        remedies_told(book, "chrono-bias", False, "text")
    assert str(caught.value) == (
        "'chrono-bias' is not a known remedy; did you mean 'chrono_bias'? (RG914)"
    )
