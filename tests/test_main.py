"""Every verb has its module and says what it takes."""

import pytest

from megatron_patch.__main__ import VERBS, main


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m megatron_patch {verb}" in capsys.readouterr().out


def test_unknown_verb_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert "trian" in capsys.readouterr().err
