import pytest

from ldm.data.splits import split_images
from ldm.errors import ConfigError

from .table import table

HASHES = ["a", "b", "a", "c", "d"]
CAPTIONS = [("cat", "Katze"), ("dog",), ("cat again",), ("bird",), ("fish",)]


def split(tmp_path, validation=(), test=(), percent=0.0):
    held_out = {}
    for name, captions in (("validation", validation), ("test", test)):
        if captions:
            (tmp_path / name).write_text("\n".join(captions), encoding="utf-8")
            held_out[name] = str(tmp_path / name)
    return split_images(HASHES, CAPTIONS.__getitem__, held_out, percent)


def test_equal_images_follow_a_held_out_caption(tmp_path):
    splits = split(tmp_path, validation=["dog"], test=["cat"])
    assert splits["test"] == (0, 2)
    assert splits["validation"] == (1,)
    assert splits["train"] == (3, 4)


def test_a_caption_of_any_language_holds_its_image_out(tmp_path):
    assert split(tmp_path, test=["Katze"])["test"] == (0, 2)


def test_an_image_in_both_lists_is_a_test_image(tmp_path):
    splits = split(tmp_path, validation=["cat again", "dog"], test=["cat"])
    assert splits["test"] == (0, 2)
    assert splits["validation"] == (1,)


def test_a_caption_without_an_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="'unicorn'"):
        split(tmp_path, test=["unicorn"])


def test_a_missing_file_says_where_it_was_looked_for():
    with pytest.raises(ConfigError, match=r"nowhere\.txt"):
        split_images(HASHES, CAPTIONS.__getitem__, {"test": "nowhere.txt"}, 0)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'tset'"):
        split_images(HASHES, CAPTIONS.__getitem__, {"tset": "x"}, 0)


def test_holding_everything_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is left"):
        split(tmp_path, test=["cat", "dog", "bird", "fish"])


def test_splits_by_hash_have_their_share_and_do_not_move_when_the_set_grows():
    hashes = [str(number) for number in range(10_000)]
    large = split_images(hashes, lambda _: (), {}, 5.0)
    small = split_images(hashes[:1000], lambda _: (), {}, 5.0)
    for name in ("validation", "test"):
        assert abs(len(large[name]) - 500) < 4 * 21.8  # four standard errors of a binomial(10000, 0.05)
        assert small[name] == tuple(index for index in large[name] if index < 1000)


def test_the_hash_names_what_is_held_out(tmp_path):
    first = split(tmp_path, test=["cat"]).held_out_hash
    assert split(tmp_path, test=["cat again"]).held_out_hash == first  # the same image
    assert split(tmp_path, test=["dog"]).held_out_hash != first


def test_a_list_that_is_no_text_is_named(tmp_path):
    for data, why in ((b"caf\xe9\n", "not text in UTF-8 at byte 3"), (b"c\0a\0t", "not text in UTF-16-LE at byte 4")):
        (tmp_path / "test").write_bytes(data)
        with pytest.raises(ValueError, match=rf"data\.held_out\.test: .*: {why}"):
            split_images(HASHES, CAPTIONS.__getitem__, {"test": str(tmp_path / "test")}, 2.0)


@table("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@table("end", ["\n", "\r\n", "\r"])
def test_r26_lists_of_every_editor_are_read(encoding, end, tmp_path):
    captions = ["cat", "größe", "日本\u2028two lines"]  # U+2028 is a character of its caption and ends no line
    (tmp_path / "test").write_bytes(end.join([f" {captions[0]} ", "", *captions[1:]]).encode(encoding))
    of = [*((caption,) for caption in captions), ("dog",)]
    splits = split_images("abcd", of.__getitem__, {"test": str(tmp_path / "test")}, 0)
    assert splits["test"] == (0, 1, 2)


@table("count", range(2, 40))
def test_r26_tiny_sets_have_a_validation_image_and_growing_never_holds_out_what_was_trained_on(count, caplog):
    hashes = [str(number) for number in range(count)]
    small, large = (split_images(some, lambda _: (), {}, 2.0) for some in (hashes, [*hashes, "another"]))
    assert small.filled("train")
    assert small.filled("validation")
    moved = set(small["train"]) & {*large["validation"], *large["test"]}
    assert not moved
    if freed := set(small["validation"]) & set(large["train"]):
        assert len(freed) == 1
        assert "one is taken from training" in caplog.text
        assert small.held_out_hash != large.held_out_hash


def test_r26_too_few_images_are_told_apart_from_enough():
    for hashes, percent in (["a"], 2.0), (["a", "a"], 2.0), (["a", "b", "c"], 0.0):
        splits = split_images(hashes, lambda _: (), {}, percent)
        with pytest.raises(
            ValueError, match=rf"validation split has no images, of {len(hashes)} in all; .* two or more"
        ):
            splits.filled("validation")


@table("held_out", [True, False])
def test_r26_a_limit_keeps_the_first_images_by_hash_of_the_whole_set(held_out, tmp_path):
    hashes = [str(number) for number in range(4000)]
    (tmp_path / "test").write_text("\n".join(hashes[:400]))
    lists = {"test": str(tmp_path / "test")} if held_out else {}

    def splits_of(rows, limit=None):
        return split_images([hashes[row] for row in rows], lambda i: (hashes[rows[i]],), lists, 10.0, limit)

    whole, kept = splits_of(range(4000)), splits_of(range(4000), 1000)
    assert sum(len(kept[name]) for name in kept.indices) == 1000
    assert all(set(kept[name]) <= set(whole[name]) for name in whole.indices)
    assert abs(len(kept["test"]) - 100) < 4 * 9.5  # four standard errors of a binomial(1000, 0.1)
    assert kept.held_out_hash == whole.held_out_hash
    assert set(kept["train"]) > set(splits_of(range(4000), 300)["train"])
    backwards = splits_of(range(3999, -1, -1), 1000)
    assert {3999 - row for row in backwards["train"]} == set(kept["train"]), "whatever the order of the rows"


def test_films_with_an_equal_clip_share_a_split():
    """Whose hash decides must not depend on which of them comes last; a third film that shares one of theirs joins."""
    origins = [f"film {number:02d}" for number in range(40) for _ in range(2)]
    hashes = [f"{number:032x}" for number in range(80)]
    hashes[1] = hashes[20] = "f" * 32  # an intro that films 0 and 10 share
    hashes[21] = hashes[60] = "e" * 32  # and one of films 10 and 30
    splits = split_images(hashes, lambda row: (), {}, 20.0, origins=origins)
    split_of = {row: name for name, rows in splits.indices.items() for row in rows}
    assert len({split_of[row] for row in (0, 1, 20, 21, 60, 61)}) == 1
    for film in range(40):
        assert split_of[2 * film] == split_of[2 * film + 1]
    assert len({*split_of.values()}) == 3
