"""The rows that RankFlow does not have to pass, each with the reason."""

import re
from dataclasses import dataclass

from steering import SCENES, Scene


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Rows that cannot hold by design.

    Attributes:
        file: Name of the test file.
        pattern: Regex for a part of what follows the file in a row's name.
        reason: Why not.
        error: What their failure must hold.
        scenes: Where not.
    """

    file: str
    pattern: str
    reason: str
    error: str = ""
    scenes: tuple[Scene, ...] = tuple(SCENES)

    def covers(self, row: str, scene: Scene) -> bool:
        """Whether a row is excluded."""
        path, _, test = row.partition("::")
        is_here = scene in self.scenes and path.rpartition("/")[2] == self.file
        return is_here and re.search(self.pattern, test) is not None


def _refused(file: str, what: str, pattern: str) -> Exclusion:
    return Exclusion(file, pattern, f"RankFlow refuses {what}", "rankflow.errors.SiteError")


def _asserts(file: str, what: str, pattern: str, *scenes: Scene) -> Exclusion:
    return Exclusion(file, pattern, f"the test asserts {what}", scenes=scenes or tuple(SCENES))


_CUSTOM = "test_custom_models.py"
_INIT = "test_initialization.py"
_TUNERS = "test_tuners_utils.py"
_TWO_LORA_SITES = r"\[.*(MLP 4|Conv1D 3|Conv2d 2|Conv3d 2) LoRA-"

EXCLUSIONS = (
    # Kinds of adapters that RankFlow refuses, with the reason, when it is attached.
    _refused(_CUSTOM, "VeLoRA", r"\[.*VeLoRA"),
    _refused(_CUSTOM, "BD-LoRA", r"\[.*BD-LoRA"),
    _refused(_CUSTOM, "MonteCLoRA", r"\[.*Monteclora|test_monteclora"),
    _refused(_CUSTOM, "KaSA", r"\[.*KaSA"),
    _refused(
        _CUSTOM,
        "MiCA",
        r"::test_(?!save_|merge_|safe_merge|delete_merged_)\w+\[.*MiCA",
    ),
    _refused(_CUSTOM, "grouped convolutions", r"\[.*Conv2d Groups"),
    _refused(_CUSTOM, "lora_bias", r"\[.*lora_b bias|non_finite_bias|merge_with_lora_bias"),
    _refused(
        _CUSTOM,
        "trained biases",
        r"adapter_with_bias_warns|fsdp_wrapped_learnable_bias|adapters_with_bias_raises",
    ),
    _refused(_CUSTOM, "multi-head attention", r"\[.*MHA|multihead_attention|_mha_"),
    _refused(_CUSTOM, "target_parameters", r"\[.*using nn.Parameter|repr_lora_paramwrapper"),
    _refused(_CUSTOM, "a layer class without factors", r"without_in_features_out_features"),
    _refused(_INIT, "PiSSA", r"pissa"),
    _refused(_INIT, "OLoRA", r"olora"),
    _refused(_INIT, "CorDA", r"TestCordaInitialization"),
    _refused(_INIT, "KaSA", r"TestKasaInit.*::(?!test_kasa_mixing.*False)"),
    _refused(_INIT, "MiCA", r"mica"),
    _refused(_INIT, "orthogonal starts", r"orthogonal"),
    _refused(_INIT, "grouped convolutions", r"divisible by groups|equal to groups|conv2d_groups"),
    _refused(
        _INIT,
        "trained biases",
        r"lora_with_bias_argument\[(all|lora_only)|multiple_configs_with_bias_raises",
    ),
    _refused(_INIT, "lora_bias", r"with_bias_(extra|when)|lora_bias"),
    _refused(_INIT, "multi-head attention", r"test_mha"),
    _refused(_INIT, "target_parameters", r"invalid_target_modules|adapters_with.*target_param"),
    _refused(_INIT, "factors that two sites share", r"tying.*target_modules(_str)?_lora\["),
    _refused(_TUNERS, "target_parameters", r"target(ed)?_parameters"),
    _refused("test_lorafa.py", "trained biases", r"update_non_lora_params"),
    _refused("test_lora_variants.py", "aLoRA", r"alora|test_input_embeds|test_num_beams"),
    _refused("test_lora_variants.py", "KaSA", r"kasa"),
    # Tests of what RankFlow is there to change.
    _asserts(_CUSTOM, "the ranks of its LoraConfig", r"test_multirank"),
    _asserts(
        _CUSTOM,
        "that its own LoraConfig, which states other ranks, loads what was saved",
        r"from_pretrained_config_construction",
    ),
    _asserts(
        _CUSTOM,
        "that a few steps move outputs, and fewer components move them less",
        r"DynamicDispatch::test_training_works",
    ),
    _asserts(_CUSTOM, "target_modules as its LoraConfig has them", r"target_modules_str\[LoraC"),
    _asserts(
        _CUSTOM,
        "that a sum of two adapters is nearly of rank 8, and it is not of rank 3",
        r"with_different_scaling\[(svd-0.99-0.01-weights[034]|dare_ties_svd-0.55-None-weights[03]"
        r"|dare_linear_svd-0.6-None-weights[03]|magnitude_prune_svd-0.9-0.1-weights4)",
    ),
    _asserts(
        _CUSTOM,
        "a movement that PEFT shows for 2 of 12 seeds at rank 8, and for none at rank 3",
        r"test_only_params_are_updated\[.*Conv1D 2 LoRA-",
    ),
    _asserts(_INIT, "the distribution of 8 fresh components", r"test_lora_embedding_(def|gau)"),
    _asserts(
        _INIT, "the ranks of its LoraConfig", r"hotswap.*((?<!same_)rank_padding|_pattern|_config)"
    ),
    _asserts(_INIT, "that alphas are one number, as PEFT's hot-swap demands", r"different_ranks_a"),
    _asserts(
        _INIT, "that site names go on as target_modules in a renamed model", r"old_load_new_l"
    ),
    _asserts(_TUNERS, "the ranks of its LoraConfig", r"TestRankAndAlphaPattern"),
    _asserts(
        _TUNERS,
        "the number of parameters",
        r"test_nb_params|with_modules_to_save|with_trainable_tokens|with_injected_layers",
    ),
    _asserts("test_helpers.py", "that PEFT's cache of DoRA norms is used", r"test_dora_caching"),
    _asserts("test_lorafa.py", "use_rslora as its LoraConfig has it", r"flag_mismatch.*False"),
    # A site of rank 0 has empty tensors, and plain LoRA leaves it out of what is saved.
    _asserts(_CUSTOM, "that every tensor changes, the empty too", r"test_only_params", "dead"),
    _asserts(
        _CUSTOM,
        "that a few steps move outputs, and the magnitude alone moves them less",
        r"disable_adapters_with_merging\[.*Conv1D 2 DoRA",
        "dead",
    ),
    _asserts(_CUSTOM, "a gradient of every tensor", r"test_training_custom_models", "dead"),
    _asserts(
        _CUSTOM,
        "that every site is adapted again when loaded",
        rf"test_(save_pretrained(_pickle)?|parameters_after_loading_model){_TWO_LORA_SITES}|test_saving_and_loading",
        "dead",
    ),
    _asserts(
        _CUSTOM,
        "that the embedding is adapted",
        r"lora_to_embedding_layer\[peft_config0-auto|test_load_resized_embedding",
        "dead",
    ),
    _asserts(
        _CUSTOM,
        "that FSDP finds every tensor in a state dict",
        rf"fsdp_wrapped.*{_TWO_LORA_SITES[2:]}",
        "dead",
    ),
)
