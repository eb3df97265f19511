"""What ``edgeforge synth`` needs to know to write a model's folder: its JSON files and tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeforge.families.registry import read_spec
from edgeforge.synth.shapes import tensor_shapes, vector_centres

Config = dict[str, object]

CONFIG_STYLES = ("hub", "rope_parameters")
TINY_VOCAB = 512
TINY_BOS, TINY_EOS, TINY_PAD = 256, 257, 258


@dataclass(frozen=True)
class Preset:
    """A model's shape: the JSON files of its folder, and the weights that follow from them.

    Attributes:
        config: config.json as released; ``torch_dtype`` is set when it is written.
        generation_config: the content of generation_config.json.
        byte_tokenizer: whether the folder gets a byte-level tokenizer of ``TINY_VOCAB`` entries.
    """

    config: Mapping[str, object]
    generation_config: Mapping[str, object] = field(default_factory=dict)
    byte_tokenizer: bool = False

    @property
    def model_type(self) -> str:
        """The family's name in config.json."""
        return str(self.config["model_type"])

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Returns name and shape of every weight, in the order of the model's layers."""
        return tensor_shapes(self.config)

    def centres(self) -> dict[str, float]:
        """Returns around which number the elements of each vector lie, by name."""
        return vector_centres(self.config)

    @property
    def parameters(self) -> int:
        """Number of parameters in the folder; a tied head counts once."""
        return sum(math.prod(shape) for _, shape in self.tensors())

    def config_json(self, dtype: str, style: str = "hub") -> Config:
        """Returns the content of config.json for weights stored in ``dtype``.

        The style ``hub`` is the released spelling. The style ``rope_parameters`` is that of
        transformers 5: one object for the base frequency and its scaling, and ``dtype`` instead of
        ``torch_dtype``. OpenELM, which transformers does not know, has only the style ``hub``.

        Raises:
            ValueError: the style is unknown, or the family does not have it.
        """
        if style not in CONFIG_STYLES:
            raise ValueError(
                f"config style {style!r} is unknown: use one of {', '.join(CONFIG_STYLES)}"
            )
        config = dict(self.config)
        if style == "hub":
            return dict(sorted({**config, "torch_dtype": dtype}.items()))
        if "rope_parameters" in config:  # as released
            return dict(sorted({**config, "dtype": dtype}.items()))
        if "rope_theta" not in config:
            raise ValueError(
                f"a {self.model_type} config has no rope_parameters spelling: use config style hub"
            )
        scaling = config.pop("rope_scaling", None)
        rope: Config = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
        if isinstance(scaling, Mapping):
            rope.update({k: v for k, v in scaling.items() if k != "type"})
            rope["rope_type"] = scaling.get("rope_type", scaling.get("type"))
            original = "original_max_position_embeddings"
            rope.setdefault(original, config.get(original))
        if len(read_spec(self.config).ropes) > 1:  # one for each kind of layers
            theta = config.pop("rope_local_base_freq", rope["rope_theta"])
            local = {"rope_type": "default", "rope_theta": theta}
            rope = {"full_attention": rope, "sliding_attention": local}
        return dict(sorted({**config, "rope_parameters": rope, "dtype": dtype}.items()))


def make_preset(config: Config, **generation: object) -> Preset:
    """Returns the preset of a config.json, with the generation config that repeats its ids."""
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    version = {"transformers_version": config["transformers_version"]}
    return Preset(
        config=config,
        generation_config={"_from_model_config": not generation} | ids | generation | version,
        byte_tokenizer=_text_part(config).get("vocab_size") == TINY_VOCAB,
    )


def _text_part(config: Config) -> Mapping[str, object]:
    part = config.get("text_config", config)
    assert isinstance(part, Mapping)
    return part
