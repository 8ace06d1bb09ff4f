"""Tiny random-weight models of the families the host can load, built in process from the host's own classes.

Every one samples on the CPU in well under a second. A family that the installed host does not know yet stays in the
table and is left out of `available()`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from safetensors.torch import save_file
from sampling import random_weights


def _nothing(generator: torch.Generator, tokens: int) -> dict:
    return {}


def _keep(network: torch.nn.Module) -> None:
    pass


@dataclass(frozen=True)
class Family:
    """How to build one family tiny, and what its sampling needs."""

    supported: str  # class name in comfy.supported_models
    config: dict  # unet_config
    latent: tuple  # its shape for batch 1, as given to sampling; one shape per stream where the host nests latents
    context: tuple[int, int]  # tokens, width
    extra: Callable[[torch.Generator, int], dict] = _nothing  # further conditioning values, for that many tokens
    state: Callable[[], dict] = dict  # what get_model itself reads
    trim: Callable[[torch.nn.Module], None] = _keep  # what no config can make small


def _pooled(width: int, **values) -> Callable[[torch.Generator, int], dict]:
    return lambda generator, tokens: {"pooled_output": torch.randn(1, width, generator=generator), **values}


def _constant(**values) -> Callable[[torch.Generator, int], dict]:
    return lambda generator, tokens: dict(values)


def _masked(generator: torch.Generator, tokens: int) -> dict:
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.long), "num_tokens": tokens}


def _hydit(generator: torch.Generator, tokens: int) -> dict:
    return {
        "conditioning_mt5xl": torch.randn(1, 16, 64, generator=generator),
        "attention_mask": torch.ones(1, tokens),
        "attention_mask_mt5xl": torch.ones(1, 16),
    }


def _hidream(generator: torch.Generator, tokens: int) -> dict:
    return {
        "pooled_output": torch.randn(1, 64, generator=generator),
        "conditioning_llama3": torch.randn(1, 2, tokens, 64, generator=generator),
    }


def _lyrics(generator: torch.Generator, tokens: int) -> dict:
    return {"conditioning_lyrics": torch.randint(0, 64, (1, 8), generator=generator)}


def _speech(generator: torch.Generator, tokens: int) -> dict:
    return {"audio_embed": torch.randn(1, 25, 32, 12, generator=generator)}


def _song(generator: torch.Generator, tokens: int) -> dict:
    return {"audio_embed": torch.randn(1, 3, 8, 5, 8, generator=generator)}


def _vision(generator: torch.Generator, tokens: int) -> dict:
    states = torch.randn(1, 5, 1280, generator=generator)
    return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=states)}


def _seconds() -> dict:
    from comfy.ldm.audio.embedders import NumberConditioner

    weights = random_weights(NumberConditioner(768, min_val=0, max_val=512))
    return {
        f"conditioner.conditioners.seconds_{name}.{key}": value
        for name in ("start", "total") for key, value in weights.items()
    }  # fmt: skip


def _total_seconds() -> dict:
    from comfy.ldm.audio.embedders import NumberConditioner

    weights = random_weights(NumberConditioner(768, min_val=0, max_val=384, fourier_features_type="expo"))
    return {f"conditioner.conditioners.seconds_total.{key}": value for key, value in weights.items()}


def _codes(generator: torch.Generator, tokens: int) -> dict:
    return {"conditioning_lyrics": torch.randn(1, 8, 64, generator=generator)}


def _video_condition(generator: torch.Generator, tokens: int) -> dict:
    return {"condition": torch.randn(1, 17, 3, 8, 8, generator=generator)}


def _low_resolution(generator: torch.Generator, tokens: int) -> dict:
    return {"lq_latent": torch.randn(1, 16, 2, 2, generator=generator), "degrade_sigma": torch.zeros(1)}


def _token_ids(generator: torch.Generator, tokens: int) -> dict:
    ids = torch.randint(0, 1000, (1, tokens), generator=generator)
    ids[:, -1] = 151673  # the token that the model replaces with the timestep
    return {"text_input_ids": ids}


def _dance(generator: torch.Generator, tokens: int) -> dict:
    return {"audio_embed": torch.randn(1, 12, 35, generator=generator)}


def _pose(generator: torch.Generator, tokens: int) -> dict:
    return {"pose_video_latent": torch.randn(1, 16, 2, 8, 8, generator=generator)}


def _small_adapter(network: torch.nn.Module) -> None:
    import comfy.ldm.anima.model
    import comfy.ops

    adapter = comfy.ldm.anima.model.LLMAdapter(
        source_dim=64, target_dim=64, model_dim=64, num_layers=1, num_heads=4, dtype=torch.float32,
        operations=comfy.ops.manual_cast,
    )  # fmt: skip
    adapter.embed = torch.nn.Embedding(64, 64)
    network.llm_adapter = adapter


def _one_lyric_layer(network: torch.nn.Module) -> None:
    network.lyric_encoder.encoders = network.lyric_encoder.encoders[:1]


def _no_face(network: torch.nn.Module) -> None:
    network.motion_encoder = network.face_encoder = torch.nn.Identity()  # 35 million weights for 512 pixel faces


def _small_audio_projection(network: torch.nn.Module) -> None:
    import comfy.ldm.wan.model
    import comfy.ops

    network.audio_proj = comfy.ldm.wan.model.AudioProjModel(
        seq_len=8, blocks=5, channels=8, intermediate_dim=16, dtype=torch.float32, operations=comfy.ops.manual_cast
    )


NEWER = ("txt_ids_dims", "vec_in_dim", "meanflow_sum", "use_x0", "use_sequential_txt_ids")  # older classes refuse them

UNET = dict(
    use_checkpoint=False, image_size=32, use_spatial_transformer=True, legacy=False, out_channels=4, in_channels=4,
    use_temporal_resblock=False, use_temporal_attention=False, adm_in_channels=None, model_channels=32,
    num_res_blocks=[1, 1, 1], transformer_depth=[0, 1, 1], transformer_depth_output=[0, 0, 1, 1, 1, 1],
    transformer_depth_middle=1, channel_mult=[1, 2, 2], use_linear_in_transformer=False, context_dim=64,
)  # fmt: skip
AUDIO = dict(audio_model="dit1.0", depth=3, embed_dim=64, num_heads=2, project_cond_tokens=True)
SD3 = dict(
    in_channels=16, patch_size=2, out_channels=16, depth=3, input_size=None, adm_in_channels=64, num_patches=1024,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 192}},
    pos_embed_max_size=32, qk_norm="rms", pos_embed_scaling_factor=None, x_block_self_attn_layers=[],
)  # fmt: skip
FLUX = dict(
    image_model="flux", axes_dim=[4, 6, 6], num_heads=4, mlp_ratio=4.0, theta=10000, out_channels=16, qkv_bias=True,
    in_channels=16, hidden_size=64, context_in_dim=64, patch_size=2, vec_in_dim=32, depth=2, depth_single_blocks=2,
    guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
FLUX2 = dict(
    image_model="flux2", axes_dim=[4, 4, 4, 4], num_heads=4, mlp_ratio=3.0, theta=2000, out_channels=128,
    global_modulation=True, vec_in_dim=None, mlp_silu_act=True, qkv_bias=False, ops_bias=False, in_channels=128,
    default_ref_method="index", ref_index_scale=10.0, hidden_size=64, context_in_dim=64, patch_size=1, depth=2,
    depth_single_blocks=2, guidance_embed=True, txt_ids_dims=[3],
)  # fmt: skip
CHROMA = dict(
    image_model="chroma", axes_dim=[4, 6, 6], num_heads=4, mlp_ratio=4.0, theta=10000, out_channels=64, qkv_bias=True,
    in_channels=64, hidden_size=64, context_in_dim=64, patch_size=2, depth=2, depth_single_blocks=2, in_dim=64,
    out_dim=64, hidden_dim=64, n_layers=2, txt_ids_dims=[], vec_in_dim=None,
)  # fmt: skip
RADIANCE = CHROMA | dict(
    image_model="chroma_radiance", in_channels=3, out_channels=3, patch_size=16, nerf_hidden_size=16, nerf_mlp_ratio=2,
    nerf_depth=2, nerf_max_freqs=4, nerf_tile_size=512, nerf_final_head_type="conv", nerf_embedder_dtype=torch.float32,
    use_x0=False, use_sequential_txt_ids=False,
)  # fmt: skip
QWEN = dict(
    image_model="qwen_image", in_channels=64, num_layers=3, attention_head_dim=16, num_attention_heads=4,
    joint_attention_dim=64, axes_dims_rope=[4, 6, 6],
)  # fmt: skip
LUMINA = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=96, cap_feat_dim=64, n_layers=3, n_refiner_layers=1,
    qk_norm=True, n_heads=4, n_kv_heads=2, axes_dims=[8, 8, 8], axes_lens=[300, 512, 512], rope_theta=10000.0,
    ffn_dim_multiplier=4.0,
)  # fmt: skip
Z_IMAGE = LUMINA | dict(
    dim=256, n_heads=8, n_kv_heads=8, axes_dims=[8, 12, 12], axes_lens=[1536, 512, 512], rope_theta=256.0,
    ffn_dim_multiplier=1.0, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip
WAN = dict(
    image_model="wan2.1", dim=64, out_dim=16, num_heads=4, ffn_dim=128, num_layers=3, patch_size=(1, 2, 2),
    freq_dim=64, text_dim=64, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6, in_dim=16,
    model_type="t2v",
)  # fmt: skip
HUNYUAN_VIDEO = dict(
    image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=32,
    axes_dim=[4, 6, 6], meanflow=False, meanflow_sum=False, context_in_dim=64, hidden_size=64, mlp_ratio=4.0,
    num_heads=4, depth=2, depth_single_blocks=2, theta=256, qkv_bias=True, byt5=False, guidance_embed=True,
    use_cond_type_embedding=False, vision_in_dim=None,
)  # fmt: skip
HUNYUAN_VIDEO15 = HUNYUAN_VIDEO | dict(
    in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, guidance_embed=False, vision_in_dim=64,
    use_cond_type_embedding=True,
)  # fmt: skip
COSMOS = dict(
    image_model="cosmos", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
    patch_spatial=2, patch_temporal=1, model_channels=64, block_config="FA-CA-MLP", concat_padding_mask=True,
    pos_emb_cls="rope3d", pos_emb_learnable=False, pos_emb_interpolation="crop", block_x_format="THWBD",
    affline_emb_norm=True, use_adaln_lora=True, adaln_lora_dim=16, num_blocks=3, num_heads=4, crossattn_emb_channels=64,
    extra_per_block_abs_pos_emb=True, rope_h_extrapolation_ratio=1.0, rope_w_extrapolation_ratio=1.0,
    rope_t_extrapolation_ratio=2.0, extra_per_block_abs_pos_emb_type="learnable",
)  # fmt: skip
PREDICT2 = dict(
    image_model="cosmos_predict2", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
    patch_spatial=2, patch_temporal=1, model_channels=64, concat_padding_mask=True, crossattn_emb_channels=64,
    pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30,
    use_adaln_lora=True, adaln_lora_dim=16, num_blocks=3, num_heads=4, extra_per_block_abs_pos_emb=False,
    rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0, rope_t_extrapolation_ratio=1.0,
    extra_h_extrapolation_ratio=1.0, extra_w_extrapolation_ratio=1.0, extra_t_extrapolation_ratio=1.0,
    rope_enable_fps_modulation=False,
)  # fmt: skip
HIDREAM = dict(
    image_model="hidream", attention_head_dim=16, axes_dims_rope=[4, 6, 6], caption_channels=[64, 64],
    max_resolution=[128, 128], in_channels=16, llama_layers=[0, 1, 1, 1], num_attention_heads=4, num_routed_experts=4,
    num_activated_experts=2, num_layers=2, num_single_layers=2, out_channels=16, patch_size=2, text_emb_dim=64,
)  # fmt: skip
PIXELDIT = dict(
    image_model="pixeldit_t2i", num_groups=4, hidden_size=64, pixel_hidden_size=4, pixel_attn_hidden_size=32,
    pixel_num_groups=2, patch_depth=3, pixel_depth=2, txt_embed_dim=64, txt_max_length=32,
)  # fmt: skip
KANDINSKY = dict(
    image_model="kandinsky5", in_text_dim=64, in_text_dim2=32, time_dim=64, model_dim=64, ff_dim=128,
    visual_embed_dim=132, num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
)  # fmt: skip
OMNIGEN2 = dict(
    image_model="omnigen2", axes_dim_rope=[8, 8, 8], axes_lens=[1024, 1664, 1664], ffn_dim_multiplier=None,
    hidden_size=96, in_channels=16, multiple_of=32, norm_eps=1e-05, num_attention_heads=4, num_kv_heads=2, num_layers=3,
    num_refiner_layers=1, out_channels=None, patch_size=2, text_feat_dim=64, timestep_scale=1000.0,
)  # fmt: skip
ACE = dict(
    audio_model="ace", attention_head_dim=16, in_channels=8, inner_dim=64, max_height=16, max_position=1024,
    max_width=1024, mlp_ratio=2.5, num_attention_heads=4, num_layers=3, out_channels=8, patch_size=[16, 1],
    rope_theta=1000000.0, speaker_embedding_dim=512, text_embedding_dim=64, ssl_encoder_depths=[1, 1],
    ssl_latent_dims=[8, 8], ssl_names=["mert", "m-hubert"], lyric_encoder_vocab_size=64, lyric_hidden_size=1024,
)  # fmt: skip
CASCADE_C = dict(
    stable_cascade_stage="c", c_cond=64, c_hidden=[64, 64], nhead=[4, 4], blocks=[[2, 2], [2, 2]], c_r=16,
    c_clip_text=64, c_clip_text_pooled=64,
)  # fmt: skip
CASCADE_B = dict(
    stable_cascade_stage="b", c_cond=64, c_hidden=[32, 64], nhead=[-1, 4], blocks=[[1, 2], [2, 1]],
    block_repeat=[[1, 1], [2, 1]], level_config=["CT", "CTA"], dropout=[0.0, 0.0], c_r=16, c_clip=64,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "sd15": Family("SD15", UNET, (1, 4, 16, 16), (77, 64)),
    "sd2": Family("SD20", UNET | dict(use_linear_in_transformer=True, model_channels=64), (1, 4, 16, 16), (77, 64)),
    "sdxl": Family(
        "SDXL",
        UNET | dict(
            num_classes="sequential", adm_in_channels=64 + 6 * 256, use_linear_in_transformer=True, model_channels=64,
            transformer_depth=[0, 1, 2], transformer_depth_output=[0, 0, 1, 1, 2, 2], transformer_depth_middle=2,
        ),
        (1, 4, 16, 16), (77, 64), _pooled(64),
    ),
    "koala": Family(  # no middle block
        "KOALA_700M",
        UNET | dict(
            num_classes="sequential", adm_in_channels=64 + 6 * 256, use_linear_in_transformer=True, model_channels=64,
            transformer_depth=[0, 1, 2], transformer_depth_output=[0, 0, 1, 1, 2, 2], transformer_depth_middle=-2,
        ),
        (1, 4, 16, 16), (77, 64), _pooled(64),
    ),
    "stable_cascade_c": Family("Stable_Cascade_C", CASCADE_C, (1, 16, 8, 8), (20, 64), _pooled(64)),
    "stable_cascade_b": Family("Stable_Cascade_B", CASCADE_B, (1, 4, 16, 16), (20, 64), _pooled(64)),
    "sd3": Family("SD3", SD3, (1, 16, 16, 16), (20, 64), _pooled(64)),
    "sd35_medium": Family(
        "SD3", SD3 | dict(x_block_self_attn_layers=[0, 1]), (1, 16, 16, 16), (20, 64), _pooled(64)
    ),
    "stable_audio": Family(
        "StableAudio", AUDIO, (1, 64, 64), (20, 768), state=_seconds
    ),
    "stable_audio3": Family(
        "StableAudio3",
        AUDIO | dict(
            global_cond_dim=768, global_cond_type="adaLN", global_cond_shared_embed=True, local_add_cond_dim=65,
            timestep_features_type="expo", num_memory_tokens=4, norm_type="rms_norm",
            attn_kwargs={"qk_norm": "rms", "differential": True},
        ),
        (1, 64, 64), (20, 768), state=_total_seconds,
    ),
    "auraflow": Family(
        "AuraFlow",
        dict(max_seq=256, cond_seq_dim=64, n_double_layers=2, n_layers=4, dim=64, n_heads=4, global_conddim=64),
        (1, 4, 16, 16), (20, 64), _masked,
    ),
    "pixart": Family(
        "PixArtSigma",
        dict(
            image_model="pixart_sigma", num_heads=4, patch_size=2, hidden_size=64, in_channels=4, depth=3,
            model_max_length=300, micro_condition=False, caption_channels=64,
        ),
        (1, 4, 34, 34), (20, 64),
    ),
    "hydit": Family(
        "HunyuanDiT",
        dict(image_model="hydit", depth=6, hidden_size=64, num_heads=4, text_states_dim=64, text_states_dim_t5=64,
             text_len=20, text_len_t5=16),
        (1, 4, 16, 16), (20, 64), _hydit,
    ),
    "flux": Family("Flux", FLUX, (1, 16, 16, 16), (20, 64), _pooled(32, guidance=3.5)),
    "flux_schnell": Family(
        "FluxSchnell", FLUX | dict(guidance_embed=False), (1, 16, 16, 16), (20, 64), _pooled(32)
    ),
    "flux2": Family("Flux2", FLUX2, (1, 128, 8, 8), (20, 64), _constant(pooled_output=None, guidance=3.5)),
    "chroma": Family("Chroma", CHROMA, (1, 16, 16, 16), (20, 64), _constant(pooled_output=None)),
    "chroma_radiance": Family("ChromaRadiance", RADIANCE, (1, 3, 64, 64), (20, 64), _constant(pooled_output=None)),
    "mochi": Family(
        "GenmoMochi",
        dict(
            image_model="mochi_preview", depth=3, patch_size=2, num_heads=4, hidden_size_x=64, hidden_size_y=64,
            mlp_ratio_x=192.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False,
            out_bias=True, attn_drop=0.0, patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True,
            attend_to_padding=False, timestep_scale=1000.0, use_t5=True, t5_feat_dim=64, t5_token_length=20,
            rope_theta=10000.0,
        ),
        (1, 12, 3, 8, 8), (20, 64), _masked,
    ),
    "ltxv": Family(
        "LTXV",
        dict(image_model="ltxv", num_layers=3, attention_head_dim=16, num_attention_heads=4, cross_attention_dim=64,
             caption_channels=64),
        (1, 128, 3, 4, 4), (20, 64), _masked,
    ),
    "hunyuan_video": Family(
        "HunyuanVideo", HUNYUAN_VIDEO, (1, 16, 3, 8, 8), (20, 64), _pooled(32, guidance=6.0)
    ),
    "hunyuan_image21": Family(
        "HunyuanImage21",
        HUNYUAN_VIDEO | dict(
            in_channels=64, out_channels=64, patch_size=[1, 1], axes_dim=[8, 8], vec_in_dim=None, guidance_embed=False,
        ),
        (1, 64, 8, 8), (20, 64), _constant(pooled_output=None),
    ),
    "hunyuan_video15": Family(
        "HunyuanVideo15", HUNYUAN_VIDEO15, (1, 32, 3, 4, 4), (20, 64), _constant(pooled_output=None)
    ),
    "cosmos": Family("CosmosT2V", COSMOS, (1, 16, 3, 8, 8), (20, 64)),
    "cosmos_predict2": Family("CosmosT2IPredict2", PREDICT2, (1, 16, 1, 16, 16), (20, 64)),
    "lumina2": Family("Lumina2", LUMINA, (1, 16, 16, 16), (20, 64), _masked),
    "z_image": Family("ZImage", Z_IMAGE, (1, 16, 16, 16), (20, 64), _masked),
    "wan21": Family("WAN21_T2V", WAN, (1, 16, 3, 8, 8), (20, 64)),
    "wan21_i2v": Family("WAN21_I2V", WAN | dict(in_dim=36, model_type="i2v"), (1, 16, 3, 8, 8), (20, 64), _vision),
    "wan21_vace": Family(
        "WAN21_Vace", WAN | dict(model_type="vace", vace_layers=2, vace_in_dim=96, num_layers=4), (1, 16, 3, 8, 8),
        (20, 64),
    ),
    "wan22_camera": Family(
        "WAN22_Camera", WAN | dict(in_dim=36, model_type="camera_2.2"), (1, 16, 3, 8, 8), (20, 64)
    ),
    "wan22_5b": Family("WAN22_T2V", WAN | dict(in_dim=48, out_dim=48), (1, 48, 3, 8, 8), (20, 64)),
    "wan22_s2v": Family(
        "WAN22_S2V", WAN | dict(model_type="s2v", audio_dim=32, audio_inject_layers=[0, 2]), (1, 16, 3, 8, 8), (20, 64),
        _speech,
    ),
    "wan22_animate": Family(
        "WAN22_Animate", WAN | dict(in_dim=36, model_type="animate", num_layers=5), (1, 16, 3, 8, 8), (20, 64), _pose,
        trim=_no_face,
    ),
    "wan21_humo": Family(
        "WAN21_HuMo", WAN | dict(model_type="humo"), (1, 16, 3, 8, 8), (20, 64), _song, trim=_small_audio_projection,
    ),
    "hunyuan3d2": Family(
        "Hunyuan3Dv2",
        dict(image_model="hunyuan3d2", in_channels=64, context_in_dim=64, hidden_size=64, mlp_ratio=4.0, num_heads=4,
             depth=2, depth_single_blocks=2, qkv_bias=True, guidance_embed=False),
        (1, 64, 48), (20, 64),
    ),
    "hunyuan3d21": Family(
        "Hunyuan3Dv2_1",
        dict(image_model="hunyuan3d2_1", in_channels=64, context_dim=64, hidden_size=64, num_heads=4, depth=5,
             num_moe_layers=2, qkv_bias=False, guidance_cond_proj_dim=None),
        (1, 64, 48), (20, 64),
    ),
    "hidream": Family("HiDream", HIDREAM, (1, 16, 16, 16), (20, 64), _hidream),
    "ace_step": Family("ACEStep", ACE, (1, 8, 16, 32), (20, 64), _lyrics, trim=_one_lyric_layer),
    "omnigen2": Family("Omnigen2", OMNIGEN2, (1, 16, 16, 16), (20, 64), _masked),
    "qwen_image": Family("QwenImage", QWEN, (1, 16, 1, 16, 16), (20, 64)),
    "longcat": Family(
        "LongCatImage", FLUX | dict(guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2]), (1, 16, 16, 16),
        (20, 64), _constant(pooled_output=None),
    ),
    "lens": Family(
        "Lens",
        dict(image_model="lens", num_layers=3, attention_head_dim=16, num_attention_heads=4, enc_hidden_dim=16,
             axes_dims_rope=(4, 6, 6)),
        (1, 128, 8, 8), (20, 64), _masked,
    ),
    "ltxav": Family(
        "LTXAV",
        dict(
            image_model="ltxav", num_layers=3, attention_head_dim=16, num_attention_heads=4, cross_attention_dim=64,
            audio_attention_head_dim=8, audio_num_attention_heads=4, audio_cross_attention_dim=32, caption_channels=32,
            connector_attention_head_dim=8, connector_num_attention_heads=4, connector_num_layers=1,
        ),
        ((1, 128, 2, 4, 4), (1, 8, 5, 16)), (20, 64), _masked,
    ),
    "minimax_h3": Family(
        "MiniMaxH3",
        dict(
            image_model="minimax_h3", hidden_size=64, num_layers=3, token_refiner_num_layers=1, num_attention_heads=2,
            attention_head_dim=32, ffn_hidden_size=128, text_dim=48, timestep_input_dim=32, time_embed_hidden_size=64,
            time_embed_dim=32, rope_inv_freq_len=4,
        ),
        ((1, 24, 2, 4, 4), (1, 32, 2, 6)), (20, 48),
    ),
    "anima": Family("Anima", PREDICT2 | dict(image_model="anima"), (1, 16, 1, 16, 16), (20, 64), trim=_small_adapter),
    "z_image_pixel": Family(
        "ZImagePixelSpace",
        Z_IMAGE | dict(image_model="zimage_pixel", patch_size=8, in_channels=3, decoder_hidden_size=32,
                       decoder_num_res_blocks=1, decoder_max_freqs=4, decoder_in_channels=192),
        (1, 3, 64, 64), (20, 64), _masked,
    ),
    "pixeldit": Family("PixelDiTT2I", PIXELDIT, (1, 3, 64, 64), (20, 64)),
    "pid": Family(
        "PiD", PIXELDIT | dict(image_model="pid", lq_hidden_dim=16, lq_num_res_blocks=1), (1, 3, 64, 64), (20, 64),
        _low_resolution,
    ),
    "wan21_causal": Family("WAN21_CausalAR_T2V", WAN, (1, 16, 3, 8, 8), (20, 64)),
    "wan22_animate2": Family(
        "WAN_Animate2", WAN | dict(in_dim=36, model_type="animate2"), (1, 16, 3, 8, 8), (20, 64), _pose
    ),
    "wan21_flow_rvs": Family("WAN21_FlowRVS", WAN | dict(model_type="flow_rvs"), (1, 16, 3, 8, 8), (20, 64)),
    "wan21_scail": Family("WAN21_SCAIL", WAN | dict(in_dim=20, model_type="scail"), (1, 16, 3, 8, 8), (20, 64)),
    "wan22_wandancer": Family(
        "WAN22_WanDancer",
        WAN | dict(in_dim=36, model_type="wandancer", audio_inject_layers=[0, 2], music_dim=64, music_latent_dim=64),
        (1, 16, 3, 8, 8), (20, 64), _dance,
    ),
    "triposplat": Family(
        "TripoSplat",
        dict(image_model="triposplat", q_token_length=48, model_channels=64, cond_channels=64, num_blocks=3,
             num_refiner_blocks=1, num_head_channels=32),
        ((1, 48, 16), (1, 1, 5)), (20, 64),
    ),
    "hidream_o1": Family(
        "HiDreamO1",
        dict(
            image_model="hidream_o1",
            text_config_overrides=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                                       num_key_value_heads=1, head_dim=16, rope_dims=[4, 2, 2]),
            vision_config_overrides=dict(hidden_size=32, num_heads=2, intermediate_size=64, depth=1,
                                         num_position_embeddings=16, deepstack_visual_indexes=(0,)),
        ),
        (1, 3, 128, 128), (20, 64), _token_ids,
    ),
    "seedvr2": Family(
        "SeedVR2",
        dict(image_model="seedvr2", norm_eps=1e-5, num_layers=4, mlp_type="swiglu", vid_dim=64, txt_in_dim=32, heads=2,
             head_dim=32, mm_layers=2, rope_dim=32, vid_out_norm=True),
        (1, 16, 3, 8, 8), (20, 32), _video_condition,
    ),
    "ace_step15": Family(
        "ACEStep15",
        dict(
            audio_model="ace1.5", hidden_size=64, text_hidden_dim=64, num_dit_layers=3, num_lyric_layers=1,
            num_timbre_layers=1, num_tokenizer_layers=1, num_heads=4, num_kv_heads=2, head_dim=16,
            intermediate_size=128, fsq_dim=64, encoder_hidden_size=64, encoder_intermediate_size=128,
            encoder_num_heads=4,
        ),
        (1, 64, 50), (20, 64), _codes,
    ),
    "boogu": Family(
        "Boogu",
        dict(
            image_model="boogu", hidden_size=96, num_layers=2, num_double_stream_layers=2, num_refiner_layers=1,
            num_attention_heads=4, num_kv_heads=2, multiple_of=32, axes_dim_rope=(8, 8, 8), axes_lens=(256, 64, 64),
            instruction_feat_dim=64,
        ),
        (1, 16, 16, 16), (20, 64), _masked,
    ),
    "mage_flow": Family(
        "MageFlow",
        dict(image_model="mage_flow", num_layers=3, attention_head_dim=16, num_attention_heads=4,
             joint_attention_dim=64, axes_dims_rope=(4, 6, 6)),
        (1, 128, 8, 8), (20, 64),
    ),
    "joyimage": Family(
        "JoyImage",
        dict(image_model="joyimage", hidden_size=64, num_attention_heads=4, text_dim=64, num_layers=3,
             rope_dim_list=[4, 6, 6]),
        (1, 16, 1, 16, 16), (20, 64),
    ),
    "ideogram4": Family(
        "Ideogram4",
        dict(image_model="ideogram4", num_layers=3, num_attention_heads=2, attention_head_dim=32, intermediate_size=128,
             adaln_dim=32, llm_features_dim=64, mrope_section=[8, 4, 4]),
        (1, 128, 8, 8), (20, 64),
    ),
    "krea2": Family(
        "Krea2",
        dict(image_model="krea2", features=64, tdim=64, txtdim=16, heads=4, kvheads=2, layers=3, txtlayers=4,
             txtheads=2, txtkvheads=2),
        (1, 16, 1, 16, 16), (20, 64),
    ),
    "kandinsky5": Family("Kandinsky5", KANDINSKY, (1, 16, 3, 8, 8), (20, 64), _pooled(32)),
    "kandinsky5_image": Family(
        "Kandinsky5Image", KANDINSKY | dict(visual_embed_dim=64), (1, 16, 16, 16), (20, 64), _pooled(32)
    ),
    "ernie": Family(
        "ErnieImage",
        dict(image_model="ernie", hidden_size=64, num_attention_heads=4, num_layers=3, ffn_hidden_size=128,
             text_in_dim=48, rope_axes_dim=(4, 6, 6)),
        (1, 128, 8, 8), (20, 48),
    ),
    "cogvideox": Family(
        "CogVideoX_T2V",
        dict(image_model="cogvideox", num_attention_heads=4, attention_head_dim=16, time_embed_dim=64,
             text_embed_dim=64, num_layers=3, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=20,
             use_rotary_positional_embeddings=True),
        (1, 16, 3, 8, 8), (20, 64),
    ),
}  # fmt: skip

# Row of the table of families -> the model that its test builds; variants of a family need no entry.
OF_ROW: dict[str, str] = {
    "Stable Diffusion U-Net": "sd15", "SD3": "sd3", "Flux": "flux", "Chroma": "chroma", "Qwen-Image": "qwen_image",
    "Lumina 2 / Z-Image": "lumina2", "Wan": "wan21", "HunyuanVideo": "hunyuan_video", "LTXV": "ltxv",
    "HiDream": "hidream", "Cosmos": "cosmos", "Cosmos-Predict2": "cosmos_predict2", "AuraFlow": "auraflow",
    "PixArt": "pixart", "HunyuanDiT": "hydit", "Mochi": "mochi", "Hunyuan3D 2": "hunyuan3d2",
    "Stable Audio": "stable_audio", "ACE-Step": "ace_step", "ACE-Step 1.5": "ace_step15", "Kandinsky 5": "kandinsky5",
    "Lens": "lens", "MageFlow": "mage_flow", "JoyImage": "joyimage", "MiniMax H3": "minimax_h3", "Krea 2": "krea2",
    "Ideogram 4": "ideogram4", "Ernie Image": "ernie", "CogVideoX": "cogvideox", "Boogu": "boogu",
    "PixelDiT": "pixeldit", "Omnigen2": "omnigen2",
}  # fmt: skip

# Small enough in the sizes that the host's own detection accepts: these go through a file and the stock loader. All
# other families have widths or block counts there that it takes for granted.
LOADED: dict[str, Family] = {
    "sd15 file": Family(
        "SD15",
        UNET | dict(model_channels=320, num_res_blocks=[1, 1], transformer_depth=[1, 1],
                    transformer_depth_output=[1, 1, 1, 1], channel_mult=[1, 1], context_dim=768),
        (1, 4, 8, 8), (20, 768),
    ),
    "sd3 file": Family("SD3", SD3, (1, 16, 16, 16), (20, 64), _pooled(64)),
    "wan21 file": Family(
        "WAN21_T2V", WAN | dict(dim=128, num_heads=1, ffn_dim=256, freq_dim=256, text_dim=4096), (1, 16, 3, 8, 8),
        (20, 4096),
    ),
    "hunyuan_video file": Family(
        "HunyuanVideo",
        HUNYUAN_VIDEO | dict(vec_in_dim=768, axes_dim=[16, 56, 56], context_in_dim=4096, hidden_size=128, num_heads=1),
        (1, 16, 3, 8, 8), (20, 4096), _pooled(768, guidance=6.0),
    ),
    "ltxv file": Family(
        "LTXV", dict(image_model="ltxv", num_layers=3, attention_head_dim=4, cross_attention_dim=128),
        (1, 128, 3, 4, 4), (20, 4096), _masked,
    ),
    "minimax_h3 file": FAMILIES["minimax_h3"],
}  # fmt: skip

NOT_TINY: dict[str, str] = {
    "minimax_music3": "its transformer is hard coded: 36 layers, 2048 channels wide",
    "trellis2": "it denoises sparse voxel latents whose coordinates come from its own nodes",
}


# buffers whose values come with the file
FILED = ("pos_embed", "rotary_pos_emb.inv_freq", "rope.inv_freq", "positive_conditioning", "negative_conditioning")


def moves(name: str) -> bool:
    """Whether the family makes video, sound or shapes: its latents have not the dimensions of a picture's."""
    return len(FAMILIES[name].latent) != 4


def available(table: dict[str, Family] = FAMILIES) -> list[str]:
    """The families this host has, in the table's order."""
    return [name for name, family in table.items() if hasattr(comfy.supported_models, family.supported)]


def _weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random weights; what the network computes for itself stays, and every norm's own scale is about 1."""
    state = random_weights(network)
    for name, buffer in network.named_buffers():
        if name in state and not name.endswith(FILED):
            state[name] = buffer.clone()
    for name, value in state.items():
        if value.ndim == 1 and name.endswith((".scale", ".gamma")):
            state[name] = value + 1.0
    return state


def _build(family: Family, config: dict):
    """The host's model; a setting that this host's class does not take is left out."""
    description = getattr(comfy.supported_models, family.supported)(config)
    description.unet_config.update(config)  # some classes fix their full size there
    description.set_inference_dtype(torch.float32, None)
    try:
        return description.get_model(family.state(), "", device=None)
    except TypeError as error:
        unknown = [key for key in NEWER if key in config and f"'{key}'" in str(error)]
        if not unknown:
            raise
        return _build(family, {key: value for key, value in config.items() if key not in unknown})


def _family(name: str) -> Family:
    return LOADED[name] if name in LOADED else FAMILIES[name]


def load(name: str, folder: Path) -> comfy.model_patcher.ModelPatcher:
    """One of LOADED, saved as a file and read by the host's own diffusion-model loader."""
    path = folder / f"{name.replace(' ', '_')}.safetensors"
    save_file(make(name).model.diffusion_model.state_dict(), path)
    return comfy.sd.load_diffusion_model(str(path))


def make(name: str) -> comfy.model_patcher.ModelPatcher:
    """The named family with random weights, the same at every call."""
    family = _family(name)
    model = _build(family, {**family.config})
    family.trim(model.diffusion_model)
    model.diffusion_model.load_state_dict(_weights(model.diffusion_model))
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        model.eval(), load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )


def conditioning(name: str, seed: int, tokens: int | None = None) -> list:
    """A random prompt in the host's CONDITIONING form."""
    family = _family(name)
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or family.context[0]
    values = family.extra(generator, tokens)
    return [[torch.randn(1, tokens, family.context[1], generator=generator), values]]


def latent(name: str, batch: int = 1):
    """An empty latent of the named family: a tensor, or the host's nested one where it has several streams."""
    shape = _family(name).latent
    if isinstance(shape[0], int):
        return torch.zeros(batch, *shape[1:])
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([torch.zeros(batch, *stream[1:]) for stream in shape])
