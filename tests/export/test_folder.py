import json
import shutil

import peft
import pytest
import transformers
from typer.testing import CliRunner

from rankflow.cli import app
from rankflow.errors import ExportError
from rankflow.export.compress_folder import BaseReader, compress_folder
from rankflow.export.folder import export_folder
from rankflow.export.formats import FORMATS
from rankflow.export.inspect import CONFIG, inspect_adapter
from rankflow.export.options import ExportOptions
from rankflow.export.peft import export_adapter
from rankflow.export.report import REPORT, read_report


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_a_script_gets_the_report(make_adapted, tmp_path):
    adapter = export_adapter(make_adapted(), tmp_path / "adapter")
    result = run(adapter, "--output", tmp_path / "out", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "out" / REPORT).read_text())
    assert "loads in" in result.stderr


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_stock_format_is_written_without_the_base_model_and_says_so(
    make_adapted, tmp_path, stock_base, logits_of, name, use_dora
):
    model = make_adapted(name, use_dora=use_dora)
    adapter = export_adapter(model, tmp_path / "run" / "adapter")
    folder = export_folder(tmp_path / "run", tmp_path / "out")
    report = read_report(folder)
    assert (report.probe, report.relative_error) == (None, None)
    assert report.not_probed == "the base model was not loaded; name it with --base"
    assert report.parameters == read_report(adapter).parameters
    loaded = peft.PeftModel.from_pretrained(stock_base(model), folder)
    assert (logits_of(loaded) - logits_of(model)).abs().max() <= 1e-5


def test_with_the_base_model_outputs_are_compared(make_adapted, tmp_path):
    model = make_adapted(use_dora=True)
    adapter = export_adapter(model, tmp_path / "adapter")
    base = model.get_base_model().config.name_or_path
    report = read_report(export_folder(adapter, tmp_path / "out", base_model=base))
    assert report.relative_error < 1e-5 < report.adapter_effect


def test_a_classifier_is_merged_from_disk_with_its_head(
    make_adapted, tmp_path, logits_of, use_dora
):
    model = make_adapted("bert", use_dora=use_dora)
    adapter = export_adapter(model, tmp_path / "adapter")
    folder = export_folder(adapter, tmp_path / "out", format="merged")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert (logits_of(loaded) - logits_of(model)).abs().max() <= 1e-5


def test_the_number_of_classes_is_the_heads_and_not_the_base_models(make_adapted, tmp_path):
    model = make_adapted("bert")
    adapter = export_adapter(model, tmp_path / "adapter")
    base = tmp_path / "base"
    shutil.copytree(model.get_base_model().config.name_or_path, base)
    encoder = transformers.AutoModel.from_pretrained(base)
    shutil.rmtree(base)
    encoder.save_pretrained(base)  # no head, and two classes by default
    folder = export_folder(adapter, tmp_path / "out", format="merged", base_model=str(base))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.config.num_labels == 3


@pytest.mark.parametrize("name", ["peft", "merged", "lora-svd"])
def test_the_command_prints_its_own_lines_and_nothing_else(name, make_adapted, tmp_path, capfd):
    model = make_adapted("bert")
    base = str(model.get_base_model().config.name_or_path)
    adapter = export_adapter(model, tmp_path / "adapter")
    encoder = transformers.AutoModel.from_pretrained(base)
    encoder.save_pretrained(tmp_path / "encoder")  # a head must be made anew, which is worth a note
    capfd.readouterr()
    arguments = ["--output", tmp_path / "out", "--format", name, "--base", tmp_path / "encoder"]
    result = run(adapter, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "".join(capfd.readouterr()) == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith(str(tmp_path / "out"))
    assert all(line.startswith("  ") for line in lines[1:])


NAMES = {0: "red", 1: "green", 2: "blue"}


@pytest.mark.parametrize("steps", [[], ["peft"], ["lora-svd"], ["compress"]])
def test_the_names_of_the_classes_reach_a_merged_model(make_adapted, tmp_path, steps):
    model = make_adapted("bert")
    config = model.get_base_model().config
    config.id2label, config.problem_type = NAMES, "single_label_classification"
    adapter = export_adapter(model, tmp_path / "adapter")
    for step in steps:
        between = tmp_path / step
        if step == "compress":
            compress_folder(adapter, between, error=0.3, base=BaseReader(lambda sites: {}))
        else:
            export_folder(adapter, between, format=step)
        adapter = between
    folder = export_folder(adapter, tmp_path / "out", format="merged")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.config.id2label == NAMES
    assert loaded.config.label2id == {"red": 0, "green": 1, "blue": 2}
    assert loaded.config.problem_type == "single_label_classification"


def test_a_language_model_has_no_classes(make_adapted, tmp_path):
    adapter = export_adapter(make_adapted(), tmp_path / "adapter")
    assert inspect_adapter(adapter).classes is None


def test_dora_reaches_a_server_through_its_approximation(
    make_adapted, tmp_path, stock_base, logits_of
):
    model = make_adapted(use_dora=True)
    adapter = export_adapter(model, tmp_path / "adapter")
    options = ExportOptions(max_error=0.001)
    lora = export_folder(adapter, tmp_path / "lora", format="lora-svd", options=options)
    folder = export_folder(lora, tmp_path / "out", format="peft-uniform")
    loaded = peft.PeftModel.from_pretrained(stock_base(model), folder)
    effect = (logits_of(stock_base(model)) - logits_of(model)).abs().max()
    assert (logits_of(loaded) - logits_of(model)).abs().max() < 0.01 * effect
    assert read_report(folder).max_lora_rank == 16


@pytest.mark.parametrize("name", [n for n, one in FORMATS.items() if "tokenizer" in one.options])
def test_the_tokenizer_beside_an_adapter_goes_along_with_its_chat_template(
    name, make_adapted, tmp_path, word_tokenizer
):
    options = ExportOptions(tokenizer=word_tokenizer)
    adapter = export_adapter(make_adapted(), tmp_path / "adapter", options=options)
    folder = export_folder(adapter, tmp_path / "out", format=name)
    for written in (adapter, folder):
        loaded = transformers.AutoTokenizer.from_pretrained(written)
        assert loaded.get_vocab() == word_tokenizer.get_vocab()
        assert loaded.chat_template == word_tokenizer.chat_template
        assert read_report(written).tokenizer


def test_an_adapter_that_names_no_base_model_asks_for_it(make_adapted, tmp_path):
    adapter = export_adapter(make_adapted(), tmp_path / "adapter")
    config = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": None}
    (adapter / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError, match="does not say what its base model is; name it with"):
        export_folder(adapter, tmp_path / "out", format="merged")


def test_a_base_model_that_is_not_there_is_told(make_adapted, tmp_path):
    adapter = export_adapter(make_adapted(), tmp_path / "adapter")
    with pytest.raises(ExportError, match="cannot load the adapter"):
        export_folder(adapter, tmp_path / "out", format="merged", base_model=str(tmp_path / "no"))
    assert not (tmp_path / "out").exists()


def test_the_command_writes_each_format_and_tells_its_report(make_adapted, tmp_path):
    export_adapter(make_adapted(use_dora=True), tmp_path / "dora")
    export_adapter(make_adapted(), tmp_path / "lora")
    calls = {
        "peft": (tmp_path / "lora", [], "outputs were not compared"),
        "peft-uniform": (tmp_path / "lora", ["--rank", 5], "vLLM needs --max-lora-rank 8"),
        "merged": (tmp_path / "dora", ["--dtype", "bfloat16"], "outputs differ by at most"),
        "lora-svd": (tmp_path / "dora", ["--max-error", 0.2], "this is an approximation"),
    }
    for name, (source, options, told) in calls.items():
        output = tmp_path / f"out-{name}"
        result = run(source, "--output", output, "--format", name, *options)
        assert result.exit_code == 0, result.output
        assert told in result.output
        assert (output / REPORT).is_file()


def test_the_command_says_why_a_format_is_refused(make_adapted, tmp_path):
    result = run(tmp_path, "--output", tmp_path / "out", "--format", "comfyui")
    assert result.exit_code == 2
    assert "dora_scale" in result.stderr
