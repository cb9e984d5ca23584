import pytest

from ldm.data.splits import split_pictures

HASHES = ["a", "b", "a", "c", "d"]
CAPTIONS = [("cat", "Katze"), ("dog",), ("cat again",), ("bird",), ("fish",)]


def split(tmp_path, validation=(), test=(), percent=0.0):
    held_out = {}
    for name, captions in (("validation", validation), ("test", test)):
        if captions:
            (tmp_path / name).write_text("\n".join(captions), encoding="utf-8")
            held_out[name] = str(tmp_path / name)
    return split_pictures(HASHES, CAPTIONS.__getitem__, held_out, percent)


def test_equal_pictures_follow_a_held_out_caption(tmp_path):
    splits = split(tmp_path, validation=["dog"], test=["cat"])
    assert splits["test"] == (0, 2)
    assert splits["validation"] == (1,)
    assert splits["train"] == (3, 4)


def test_a_caption_of_any_language_holds_its_picture_out(tmp_path):
    assert split(tmp_path, test=["Katze"])["test"] == (0, 2)


def test_a_picture_in_both_lists_is_a_test_picture(tmp_path):
    splits = split(tmp_path, validation=["cat again", "dog"], test=["cat"])
    assert splits["test"] == (0, 2)
    assert splits["validation"] == (1,)


def test_a_caption_without_a_picture_is_named(tmp_path):
    with pytest.raises(ValueError, match="'unicorn'"):
        split(tmp_path, test=["unicorn"])


def test_a_missing_file_says_where_it_was_looked_for():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        split_pictures(HASHES, CAPTIONS.__getitem__, {"test": "nowhere.txt"}, 0)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'tset'"):
        split_pictures(HASHES, CAPTIONS.__getitem__, {"tset": "x"}, 0)


def test_holding_everything_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is left"):
        split(tmp_path, test=["cat", "dog", "bird", "fish"])


def test_splits_by_hash_have_their_share_and_do_not_move_when_the_set_grows():
    hashes = [str(number) for number in range(10_000)]
    large = split_pictures(hashes, lambda _: (), {}, 5.0)
    small = split_pictures(hashes[:1000], lambda _: (), {}, 5.0)
    for name in ("validation", "test"):
        assert abs(len(large[name]) - 500) < 4 * 21.8  # four standard errors of a binomial(10000, 0.05)
        assert small[name] == tuple(index for index in large[name] if index < 1000)


def test_the_hash_names_what_is_held_out(tmp_path):
    first = split(tmp_path, test=["cat"]).held_out_hash
    assert split(tmp_path, test=["cat again"]).held_out_hash == first  # the same picture
    assert split(tmp_path, test=["dog"]).held_out_hash != first


def test_a_list_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "test").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"data\.held_out\.test: .*: not text in UTF-8 at byte 3"):
        split_pictures(HASHES, CAPTIONS.__getitem__, {"test": str(tmp_path / "test")}, 2.0)
