"""Names that were meant, and messages that fit on a line."""

from lightning_prune.base.names import brief, nearest, same_name, shorten, unknown


def test_long_text_is_cut_in_its_middle_to_the_length_that_is_given() -> None:
    assert shorten("ab  cd\nef", 8) == "ab cd ef"
    assert shorten("abcdefghijklmn", 11) == "abc ... lmn"
    assert shorten("abcdefghijklmn", 12) == "abcd ... lmn"
    assert shorten("abcdefghijklmn", 14) == "abcdefghijklmn"
    assert len(brief({str(key): "x" * 100 for key in range(100)})) <= 80


def test_names_are_the_same_in_any_case_and_with_any_hyphens() -> None:
    assert same_name("grad_magnitude", "Grad-Magnitude")
    assert not same_name("wanda", "wandas")
    assert nearest("WANDAA", ["magnitude", "Wanda"]) == "Wanda"
    assert nearest("zzz", ["magnitude", "Wanda"]) is None


def test_an_unknown_name_is_told_with_the_nearest_and_as_many_as_fit() -> None:
    assert unknown("scorer", "wnda", ["wanda", "taylor"]) == (
        "unknown scorer 'wnda'; did you mean 'wanda'? known: taylor, wanda"
    )
    assert unknown("scorer", "zzz", ["wanda"]) == "unknown scorer 'zzz'; known: wanda"
    assert unknown("scorer", "wanda", []) == "unknown scorer 'wanda'; there is nothing to choose from here"
    many = unknown("scorer", "zzz", [f"n{number}" + "x" * 75 for number in range(4)])
    assert many.endswith(" and 2 more")
    alone = "y" * 300
    assert unknown("scorer", "zzz", [alone]).endswith(alone)  # one is always shown
