"""Words of the command line: what is said of those that are wrong, and which verbs take them."""

import pytest

from graftlm import cli


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "trian: no such verb (did you mean train?)"),
        (["qqq"], "qqq: no such verb;"),
        (["generate", "m", "p", "--max-new-tokens", "x"], "'x' is no whole number; it must be at least 1"),
        (["compare", "c.yaml", "--minutes", "x"], "'x' is no number; it must be above 0"),
        (["pilot", "c.yaml", "--minimum-effect", "x"], "'x' is no number; it must not be negative"),
        (["assess", "m", "--data", "f", "--out", "d", "--mask", "x"], "'x' is no number; it must be between 0 and 1"),
    ],
)
def test_what_is_wrong_with_a_word(capsys, words, says):
    with pytest.raises(SystemExit):
        cli.main(words)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    ["generate m p", "assess m --data f --out d", "eval m --out o.json", "export m", "prune m --sparsity 0.2 --out o"],
)
def test_code_of_a_model_can_be_trusted_by_every_verb_that_opens_one(words):
    assert not cli.parse(words.split()).trust_remote_code
    assert cli.parse([*words.split(), "--trust-remote-code"]).trust_remote_code
