"""The survey's methods of whole models in the table, and what those who ask `patch` for them are told."""

from __future__ import annotations

import pytest

from moerge_ext.methods import METHODS, get_method
from moerge_ext.methods.survey import SURVEY
from moerge_ext.methods.table import rows
from moerge_ext.methods.whole_models import WHOLE_MODELS

NUMBERS = {"branch_train_mix": 21, "calm": 12}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_method_of_whole_models(name):
    row, printed = WHOLE_MODELS[name], {row["name"]: row for row in rows()}
    assert row.survey == NUMBERS[name] and printed[name]["survey"] == str(NUMBERS[name])
    assert row.taxonomy == SURVEY[NUMBERS[name]].taxonomy and SURVEY[row.survey].name in ("Branch-Train-Mix", "CALM")
    assert printed[name].keys() == printed["phatgoose"].keys() and printed[name]["differs"] != "-"
    assert name not in METHODS
    with pytest.raises(ValueError, match=f"method '{name}' is of whole models, .*moerge .*a model of its own"):
        get_method(name)
