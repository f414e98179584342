import pytest

from rankflow.errors import ExportError
from rankflow.export.formats import FORMATS, REFUSED, find_format
from rankflow.export.options import ExportOptions
from rankflow.export.peft import export_adapter


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_found_by_its_name(name):
    assert find_format(name).name == name


@pytest.mark.parametrize("name", ["comfyui", "ComfyUI", "kohya", "kohya-dora"])
def test_formats_with_dora_scale_are_refused_with_the_reason(name):
    with pytest.raises(ExportError, match="one factor for each input"):
        find_format(name)


def test_pefts_own_conversion_is_refused_because_it_drops_magnitudes():
    with pytest.raises(ExportError, match=r"drops DoRA's magnitudes .* use lora-svd"):
        find_format("convert_to_lora")


@pytest.mark.parametrize("name", ["vllm", "sglang", "lorax", "tgi", "gguf"])
def test_a_program_that_wants_one_rank_is_sent_to_the_uniform_format(name):
    with pytest.raises(ExportError, match="peft-uniform"):
        find_format(name)


def test_no_format_is_both_written_and_refused():
    assert not FORMATS.keys() & REFUSED.keys()


def test_a_misspelt_format_names_the_closest():
    with pytest.raises(ExportError, match="did you mean 'merged'"):
        find_format("merge")


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({"dtype": "bfloat16"}, "peft", "does not heed dtype; it belongs to merged"),
        ({"rank": 4}, "merged", "does not heed rank; it belongs to peft-uniform, lora-svd"),
        ({"max_error": 0.1}, "peft-uniform", "does not heed max_error; it belongs to lora-svd"),
        ({"rank": 0}, "lora-svd", "rank is 0"),
        ({"max_error": 1.0}, "lora-svd", "between 0 and 1"),
        ({"dtype": "int8"}, "merged", "must be one of float64, float32"),
    ],
)
def test_options_that_would_be_ignored_or_make_no_sense_are_refused(options, name, message):
    with pytest.raises(ExportError, match=message):
        ExportOptions(**options).check(find_format(name))


def test_a_refused_format_writes_nothing(make_adapted, tmp_path):
    with pytest.raises(ExportError, match="dora_scale"):
        export_adapter(make_adapted(), tmp_path / "out", format="comfyui")
    assert list(tmp_path.iterdir()) == []
