import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ldm.config import DataConfig
from ldm.config.conditioners import UNKNOWN_CLASS
from ldm.data.batches import CaptionedImages, PositionDataset
from ldm.data.openmoji import GROUPS, OpenMoji
from ldm.data.sources import build_source
from ldm.errors import ConfigError
from ldm.evaluation.leaks import refuse_leaks

CAPTIONS = ["a red square", None, "", "  ", ["green", "grün"], "blue"]


def image(index):
    return Image.fromarray(np.full((10, 12, 3), index * 40, np.uint8))


@pytest.fixture
def folder(tmp_path):
    rows = []
    for index, caption in enumerate(CAPTIONS):
        image(index).save(tmp_path / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": caption if isinstance(caption, str | None) else caption[0]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def table():
    captions = [c if isinstance(c, list) else [c] for c in CAPTIONS]
    return datasets.Dataset.from_dict(
        {"picture": [image(i) for i in range(6)], "captions": captions},
        features=datasets.Features({"picture": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}),
    )


def test_an_image_folder_is_read_with_its_captions(folder):
    source = build_source(DataConfig(source="imagefolder", path=str(folder)))
    assert len(source) == 6
    found = {source.image(i).getpixel((0, 0))[0] // 40: source.captions(i) for i in range(6)}
    assert found == {0: ("a red square",), 1: (), 2: (), 3: (), 4: ("green",), 5: ("blue",)}


def test_a_csv_does_as_well(folder):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,caption\n" + "\n".join(f"{i}.png,number {i}" for i in range(6)))
    source = build_source(DataConfig(source="imagefolder", path=str(folder)))
    assert {source.captions(i) for i in range(6)} == {(f"number {i}",) for i in range(6)}


def test_classes_are_read_from_the_column_that_is_named(tmp_path):
    classes = datasets.ClassLabel(names=["round", "square"])
    labelled = table().add_column("kind", [0, 1, 1, 0, 1, 0]).cast_column("kind", classes)
    labelled.add_column("width", [0.5] * 6).save_to_disk(tmp_path)
    config = DataConfig(source="dataset", path=str(tmp_path), class_column="kind")
    source = build_source(config)
    assert [source.class_label(row) for row in range(6)] == [0, 1, 1, 0, 1, 0]
    assert build_source(replace(config, class_column=None)).class_label(0) is None
    with pytest.raises(ValueError, match=r"data\.class_column: no column 'sort' among"):
        build_source(replace(config, class_column="sort"))
    with pytest.raises(ValueError, match=r"data\.class_column: row 0: the class is a float"):
        build_source(replace(config, class_column="width")).class_label(0)


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_tables_with_lists_of_captions_are_read(kind, tmp_path):
    if kind == "parquet":
        table().to_parquet(tmp_path / "part.parquet")
    else:
        table().save_to_disk(tmp_path)
    source = build_source(DataConfig(source=kind, path=str(tmp_path)))
    assert source.captions(4) == ("green", "grün")
    assert source.captions(1) == ()
    assert source.image(2).getpixel((3, 3)) == (80, 80, 80)


def test_images_without_a_caption_train_unconditionally_and_are_counted(folder, caplog):
    config = DataConfig(source="imagefolder", path=str(folder), image_size=8, held_out_percent=0.0)
    data = PositionDataset(CaptionedImages(build_source(config), config), "train", 0)
    assert "3 of 6 images have no caption" in caplog.text
    assert sorted(data[p].caption for p in range(6)) == ["", "", "", "a red square", "blue", "green"]


def test_columns_can_be_named_and_a_wrong_name_lists_what_there_is(tmp_path):
    table().save_to_disk(tmp_path)
    config = {"source": "dataset", "path": str(tmp_path)}
    assert build_source(DataConfig(**config, image_column="picture")).rows.image_column == "picture"
    with pytest.raises(ValueError, match=r"data\.caption_column: no column 'txet' among the columns picture, captions"):
        build_source(DataConfig(**config, caption_column="txet"))


def test_images_without_a_caption_column_have_no_captions(tmp_path, folder):
    """CIFAR-10 has images and classes; whatever is told no captions trains on it."""
    bare = table().remove_columns("captions").add_column("label", [0, 1, 1, 0, 1, 0])
    bare.save_to_disk(tmp_path / "table")
    source = build_source(DataConfig(source="dataset", path=str(tmp_path / "table"), class_column="label"))
    assert {source.captions(i) for i in range(6)} == {()}
    assert source.class_label(1) == 1
    rows = [{"file_name": f"{index}.png"} for index in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = build_source(DataConfig(source="imagefolder", path=str(folder)))
    assert {source.captions(i) for i in range(len(source))} == {()}


def test_r11_an_image_that_cannot_be_read_names_its_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:5000])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": "noise"}))
    source = build_source(DataConfig(source="imagefolder", path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"^0\.png: the image cannot be read: "):
        source.image(0)


def test_a_missing_folder_says_so():
    with pytest.raises(ConfigError, match="no folder at nowhere"):
        build_source(DataConfig(source="imagefolder", path="nowhere"))
    with pytest.raises(ValueError, match=r"data\.path: required"):
        build_source(DataConfig(source="parquet"))


@pytest.fixture(scope="module")
def openmoji():
    return OpenMoji(64, ("en", "de"))


def test_openmoji_has_its_images_and_captions(openmoji):
    assert len(openmoji) == 3953
    index = openmoji.names.index("1F469-1F3FE-200D-1F680")
    assert openmoji.captions(index)[0] == "woman astronaut medium-dark skin tone"
    assert openmoji.captions(index)[1].startswith("astronautin")
    assert len(openmoji.all_captions(index)) > 10
    assert openmoji.image(index).size == (64, 64)
    assert openmoji.image(index).mode == "RGBA"


def test_openmoji_holds_the_committed_lists_out_of_training(openmoji):
    held_out = {"validation": "configs/openmoji/validation.txt", "test": "configs/openmoji/heldout.txt"}
    images = CaptionedImages(openmoji, DataConfig(image_size=64, held_out=held_out))
    splits = images.splits
    assert len(splits["test"]) >= 200
    assert len(splits["validation"]) >= 200
    train = {images.hashes[image] for image in splits["train"]}
    assert not train & {images.hashes[image] for name in ("test", "validation") for image in splits[name]}
    for asset in sorted(Path("assets").iterdir()):
        refuse_leaks([str(asset)], images)  # on any machine: no shipped weights have seen those images


def test_openmoji_has_unicodes_groups_as_classes(openmoji):
    grouped = OpenMoji(64, class_column="group")
    group = {
        grouped.captions(i)[0]: GROUPS[label] for i in range(len(grouped)) if (label := grouped.class_label(i)) >= 0
    }
    assert group["woman astronaut medium-dark skin tone"] == "People & Body"
    assert group["grinning face"] == "Smileys & Emotion"
    assert group["Germany"] == "Flags"
    assert group["women holding hands medium skin tone dark skin tone"] == "People & Body", "by its first part"
    assert set(group.values()) == set(GROUPS)
    newest = [i for i in range(len(grouped)) if grouped.class_label(i) == UNKNOWN_CLASS]
    assert 0 < len(newest) < 60
    assert openmoji.class_label(0) is None
    with pytest.raises(ValueError, match=r"data\.class_column: openmoji has no 'kind'; expected group"):
        OpenMoji(64, class_column="kind")


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="no captions in \\['xx'\\]; choose from en"):
        OpenMoji(32, ("en", "xx"))


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    for source in ("dataset", "parquet"):
        with pytest.raises(ConfigError, match=r"^data\.path, data\.split: "):
            build_source(DataConfig(source=source, path=str(tmp_path / "nowhere")))
