"""The rows of docs/models.md: small random models of transformers, and adapters of PEFT on them.

Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers
from situations import floats, labelled, padded, rows_of_batch
from torch import Tensor, nn

VOCABULARY = 40
CLASSES = (11, 12, 13)  # tokens
QV = ("q_proj", "v_proj")
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=32,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(num_experts_per_tok=2, experts_implementation="eager")
ENCODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=32,
    initializer_range=0.2,
    pad_token_id=0,
    num_labels=3,
)
BART = dict(
    vocab_size=VOCABULARY,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    max_position_embeddings=32,
    pad_token_id=1,
    bos_token_id=0,
    eos_token_id=2,
    decoder_start_token_id=2,
    init_std=0.2,
)
T5 = dict(
    vocab_size=VOCABULARY,
    d_model=16,
    d_kv=8,
    d_ff=16,
    num_layers=2,
    num_heads=2,
    decoder_start_token_id=0,
    pad_token_id=0,
)
WHISPER = BART | dict(
    num_mel_bins=4,
    max_source_positions=8,
    max_target_positions=16,
    pad_token_id=0,
    bos_token_id=1,
    decoder_start_token_id=3,
)
IMAGES = dict(image_size=8, patch_size=4)


@dataclass(frozen=True)
class Recipe:
    """One row.

    Attributes:
        name: in the table.
        base: makes the model, with random weights.
        adapter: PEFT's configuration, made anew for every model, or `{adapter name: configuration}`.
        batches: makes the data, with labels.
        arguments: of LaplaceLoRA.
        causal: whether there is a causal head, so that it has a vocabulary, and a text to score.
        cap: of a causal model's soft cap, behind which logits are no longer Gaussian.
        last_position: whether the truth too calls the head on the last position only: what K-FAC's A of an adapted head
            is a mean over.
        prepare: what is done to the adapted model last.
    """

    name: str
    base: Callable[[], nn.Module]
    adapter: Callable[[], peft.PeftConfig | dict[str, peft.PeftConfig]]
    batches: Callable[[], list[dict[str, Tensor]]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = False
    text: Callable[[], dict[str, Tensor]] | None = None
    cap: float | None = None
    last_position: bool = False
    prepare: Callable[[Any], Any] = lambda model: None

    def model(self, dtype: torch.dtype = torch.float64) -> Any:
        """The adapted model in eval mode, of which no trainable weight is what its initialisation left (often zero).

        In bfloat16 that is the base; the adapter is what PEFT makes of it, in float32.
        """
        model = self.frozen(dtype)
        adapters = self.adapter()
        adapters = adapters if isinstance(adapters, dict) else {"default": adapters}
        for i, (name, config) in enumerate(adapters.items()):
            if i:
                model.add_adapter(name, config)
            else:
                model = peft.get_peft_model(model, config, adapter_name=name)
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in (p for name, p in model.named_parameters() if p.requires_grad or ".lora_" in name):
                p.add_(0.1 * torch.randn(p.shape, generator=noise).to(p.dtype))
        self.prepare(model)
        return (model.double() if dtype == torch.float64 else model).eval()

    def frozen(self, dtype: torch.dtype) -> nn.Module:
        """The base model, the same at every call."""
        torch.manual_seed(0)
        model = self.base()
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():  # some initialise to zero what would hide a fault then: positions, biases
            for p in model.parameters():
                if not p.any():
                    p.copy_(0.3 * torch.randn(p.shape, generator=noise))
        return model.to(torch.float32 if dtype == torch.float64 else dtype).eval()  # PEFT's SVDs know no float64

    def reloaded(self, folder: str) -> Any:
        """A new base with the adapters that `save_pretrained` left in a folder."""
        adapters = self.adapter()
        names = list(adapters) if isinstance(adapters, dict) else ["default"]
        where = {name: folder if name == "default" else f"{folder}/{name}" for name in names}
        model = peft.PeftModel.from_pretrained(self.frozen(torch.float64), where[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(where[name], name)
        self.prepare(model)
        return model.double().eval()


def lora(targets: Sequence[str] | str, **settings: Any) -> Callable[[], peft.LoraConfig]:
    chosen = targets if isinstance(targets, str) else list(targets)
    return lambda: peft.LoraConfig(**{"r": 2, "target_modules": chosen, **settings})


def built(model: str, config: str, settings: Mapping[str, Any]) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))


# Data: two batches, of padded texts of different lengths, or of images


def texts() -> list[dict[str, Tensor]]:
    return [labelled(padded([6, 4, 5], VOCABULARY)), labelled(padded([3, 5], VOCABULARY, seed=4))]


def images() -> list[dict[str, Tensor]]:
    return [labelled({"pixel_values": floats(n, 3, 8, 8, seed=n).float()}) for n in (3, 2)]


def illustrated(lengths: Sequence[int] = (6, 4, 5), seed: int = 2) -> dict[str, Tensor]:
    """Texts, each behind the four tokens of an image."""
    text = padded(lengths, VOCABULARY - 1, seed=seed)
    n = len(lengths)
    return {
        "input_ids": torch.cat([torch.full((n, 4), VOCABULARY - 1), text["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones(n, 4).long(), text["attention_mask"]], dim=1),
        "pixel_values": floats(n, 3, 8, 8, seed=seed).float(),
    }


def with_decoder(sources: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches whose decoder has three tokens, after which it chooses between the classes."""
    return [
        {**labelled(x), "decoder_input_ids": padded([3] * rows_of_batch(x), VOCABULARY, seed=6)["input_ids"]}
        for x in sources
    ]


# Families


def causal(
    name: str, kind: str, targets: Sequence[str] | str = QV, *, config: str = "", cap: float | None = None, **more: Any
) -> Recipe:
    settings = {k: v for k, v in {**SIZES, **more.pop("settings", {})}.items() if v is not None}
    adapter = lora(targets, task_type="CAUSAL_LM", **more)
    base = built(kind, config or kind.replace("ForCausalLM", "Config").replace("LMHeadModel", "Config"), settings)
    return Recipe(
        name,
        base,
        adapter,
        texts,
        {"class_token_ids": list(CLASSES)},
        causal=True,
        text=lambda: padded([4, 3], VOCABULARY, seed=5),
        cap=cap,
    )


def classifier(name: str, kind: str, targets: Sequence[str] | str, **settings: Any) -> Recipe:
    base = built(f"{kind}ForSequenceClassification", f"{kind}Config", {**ENCODER, **settings})
    return Recipe(name, base, lora(targets, task_type="SEQ_CLS"), texts)


def of_images(name: str, kind: str, config: str, targets: Sequence[str], settings: Mapping[str, Any]) -> Recipe:
    base = built(kind, config, settings)
    return Recipe(name, base, lora(targets, modules_to_save=["classifier"]), images)


def encoder_decoder(name: str, kind: str, config: str, targets: Sequence[str], settings: Mapping[str, Any]) -> Recipe:
    base, pad = built(kind, config, settings), settings["pad_token_id"]

    def batches() -> list[dict[str, Tensor]]:
        if kind.startswith("Whisper"):
            return with_decoder([{"input_features": floats(n, 4, 16, seed=n).float()} for n in (3, 2)])
        sources = [padded([6, 4, 5], VOCABULARY, pad=pad), padded([3, 5], VOCABULARY, pad=pad, seed=4)]
        return with_decoder(sources)

    # PEFT's own class for these models knows no input_features.
    task = {} if kind.startswith("Whisper") else {"task_type": "SEQ_2_SEQ_LM"}
    return Recipe(name, base, lora(targets, **task), batches, {"class_token_ids": list(CLASSES)}, causal=True)


def llava() -> Recipe:
    def base() -> nn.Module:
        vision = transformers.CLIPVisionConfig(
            **IMAGES, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=transformers.LlamaConfig(**SIZES), image_token_id=VOCABULARY - 1
        )
        config.vision_feature_layer = -1
        return transformers.LlavaForConditionalGeneration(config)

    return Recipe(
        "LLaVA, LoRA on the text model",
        base,
        lora(r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM"),
        lambda: [labelled(illustrated()), labelled(illustrated([3, 5], seed=4))],
        {"class_token_ids": list(CLASSES)},
        causal=True,
        text=lambda: illustrated([3, 2], seed=5),
    )


TWO_TOWERS = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
NO_HEADS = {"num_key_value_heads": None, "head_dim": None}

FAMILIES = [
    causal("Llama", "LlamaForCausalLM"),
    causal("Mistral", "MistralForCausalLM", settings={"sliding_window": 3}),
    causal("Qwen2", "Qwen2ForCausalLM"),
    causal("Qwen3", "Qwen3ForCausalLM"),
    causal("Gemma 2", "Gemma2ForCausalLM", cap=3.0, settings={"final_logit_softcapping": 3.0, "sliding_window": 3}),
    causal(
        "Gemma 3",
        "Gemma3ForCausalLM",
        config="Gemma3TextConfig",
        settings={"query_pre_attn_scalar": 8, "sliding_window": 3},
    ),
    causal("Phi-3", "Phi3ForCausalLM", ("qkv_proj",)),
    causal("GPT-2", "GPT2LMHeadModel", ("c_attn",), fan_in_fan_out=True, settings=NO_HEADS),
    causal("GPT-NeoX", "GPTNeoXForCausalLM", ("query_key_value",)),
    causal("OPT", "OPTForCausalLM", settings={"ffn_dim": 16, "word_embed_proj_dim": 16, "init_std": 0.3}),
    causal("Falcon", "FalconForCausalLM", ("query_key_value",), settings={"head_dim": None}),
    causal("OLMo 2", "Olmo2ForCausalLM"),
    causal("Granite", "GraniteForCausalLM", settings={"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    causal("SmolLM3", "SmolLM3ForCausalLM"),
    causal("Mixtral", "MixtralForCausalLM", settings={"num_local_experts": 4, **EXPERTS}),
    causal(
        "Mixtral, LoRA on experts",
        "MixtralForCausalLM",
        QV,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        settings={"num_local_experts": 4, **EXPERTS},
    ),
    causal("OLMoE", "OlmoeForCausalLM", settings={"num_experts": 4, **EXPERTS}),
    causal(
        "OLMoE, LoRA on experts",
        "OlmoeForCausalLM",
        QV,
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        settings={"num_experts": 4, **EXPERTS},
    ),
    causal("Mamba", "MambaForCausalLM", ("in_proj",), settings={"state_size": 4, "expand": 2}),
    classifier("BERT", "Bert", ("query", "value")),
    classifier("RoBERTa", "Roberta", ("query", "value")),
    classifier(
        "DeBERTa-v2",
        "DebertaV2",
        ("query_proj", "value_proj"),
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    classifier("ModernBERT", "ModernBert", ("Wqkv",)),
    classifier("DistilBERT", "DistilBert", ("q_lin", "v_lin"), dim=16, n_layers=2, n_heads=2, hidden_dim=16),
    encoder_decoder("T5", "T5ForConditionalGeneration", "T5Config", ("q", "v"), T5),
    encoder_decoder("BART", "BartForConditionalGeneration", "BartConfig", QV, BART),
    encoder_decoder("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", QV, WHISPER),
    of_images("ViT", "ViTForImageClassification", "ViTConfig", QV, ENCODER | IMAGES),
    of_images(
        "CLIP's image encoder",
        "CLIPForImageClassification",
        "CLIPConfig",
        QV,
        {"vision_config": TWO_TOWERS | IMAGES, "num_labels": 3},
    ),
    llava(),
]


# PEFT's variants, all on one Llama


def variant(name: str, adapter: Callable[[], Any], classes: bool = True, **more: Any) -> Recipe:
    return Recipe(
        name,
        built("LlamaForCausalLM", "LlamaConfig", {**SIZES, "attention_bias": True}),
        adapter,
        texts,
        {"class_token_ids": list(CLASSES)} if classes else {},
        causal=True,
        text=lambda: padded([4, 3], VOCABULARY, seed=5),
        **more,
    )


def on_llama(name: str, targets: Sequence[str] | str = QV, **settings: Any) -> Recipe:
    return variant(name, lora(targets, task_type="CAUSAL_LM", **settings))


def on_head(name: str, classes: bool, targets: Sequence[str] = ("q_proj", "lm_head"), **settings: Any) -> Recipe:
    return variant(name, lora(targets, task_type="CAUSAL_LM", **settings), classes, last_position=True)


def of(kind: str, **settings: Any) -> Callable[[], peft.PeftConfig]:
    return lambda: getattr(peft, kind)(task_type="CAUSAL_LM", **settings)


def two() -> dict[str, peft.PeftConfig]:
    return {
        "default": lora(QV, task_type="CAUSAL_LM")(),
        "second": lora(("q_proj", "o_proj"), r=3, task_type="CAUSAL_LM")(),
    }


TARGETS = {"target_modules": list(QV)}

VARIANTS = [
    on_llama("LoRA"),
    on_llama("rsLoRA", use_rslora=True),
    on_llama("DoRA", use_dora=True),
    on_llama("PiSSA", init_lora_weights="pissa"),
    on_llama("OLoRA", init_lora_weights="olora"),
    on_llama("lora_bias", lora_bias=True),
    on_llama('bias="lora_only"', ("q_proj", "v_proj"), bias="lora_only"),
    on_llama("rank_pattern, alpha_pattern", rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5}),
    on_llama("all-linear", "all-linear"),
    on_head("LoRA on the output head", classes=False),
    on_head("LoRA on the output head, class_token_ids", classes=True),
    on_llama("LoRA on embeddings", ("q_proj", "embed_tokens")),
    on_llama("trainable_token_indices", trainable_token_indices=[3, 5, 7]),
    on_llama("target_parameters", (), target_parameters=["q_proj.weight", "v_proj.weight"]),
    on_head("modules_to_save, the output head", classes=True, targets=QV, modules_to_save=["lm_head"]),
    variant("two adapters, one active", two, prepare=lambda model: model.set_adapter("second")),
    variant(
        "two adapters, both active", two, prepare=lambda model: model.base_model.set_adapter(["default", "second"])
    ),
    variant("merged into the base", lora(QV, task_type="CAUSAL_LM"), prepare=lambda model: model.merge_adapter()),
    variant("AdaLoRA", of("AdaLoraConfig", init_r=2, target_r=2, total_step=10, **TARGETS)),
    variant("VeRA", of("VeraConfig", r=2, **TARGETS)),
    variant("IA3", of("IA3Config", target_modules=list(QV), feedforward_modules=[])),
    variant("OFT", of("OFTConfig", oft_block_size=4, **TARGETS)),
    variant("LoHa", of("LoHaConfig", r=2, **TARGETS)),
    variant("LoKr", of("LoKrConfig", r=2, **TARGETS)),
    variant("prompt tuning", of("PromptTuningConfig", num_virtual_tokens=2)),
    variant("prefix tuning", of("PrefixTuningConfig", num_virtual_tokens=2)),
]
