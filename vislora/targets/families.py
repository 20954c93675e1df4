"""Which layers hold q, k, v and o in each attention class of timm, in open_clip's towers and in torch's own attention.

What counts as attention is a module that projects tokens (in channel attention: channels) and mixes the projected
values by weights that it makes from the same input. Gates that scale a feature map (squeeze-and-excite and its
relatives) don't count, nor do pooling, convolution and state-space mixers.
"""

from collections.abc import Sequence

from vislora.targets.layouts import QKV, Held

_FUSED = (Held("qkv", "qkv"), Held("proj", "o"))
_SEPARATE = (Held("q", "q"), Held("k", "k"), Held("v", "v"), Held("proj", "o"))
_Q_KV = (Held("q", "q"), Held("kv", "kv"), Held("proj", "o"))
_QK_V = (Held("qk", "qk"), Held("v", "v"), Held("proj", "o"))
_PROJ = (Held("q_proj", "q"), Held("k_proj", "k"), Held("v_proj", "v"))
_SPLIT_BY_HEAD = (Held("qkv", "qkv", lambda a: (a.key_dim, a.key_dim, a.val_dim)), Held("proj", "o"))
_MAXXVIT = (
    Held("qkv", "qkv", lambda a: [a.dim_head if a.head_first else a.num_heads * a.dim_head] * 3),
    Held("proj", "o"),
)
_CONV_ATTENTION = (
    Held("pwise", "qkv", lambda a: [a.head_dim] * 3),
    Held("o_proj", "o"),
    Held("upsampling", "o"),
    Held("upsampling.0", "o"),
)
_PARALLEL = (
    Held("in_proj", ("mlp", *QKV), lambda a: a.in_split),
    Held("attn_out_proj", "o"),
    Held("mlp_out_proj", ("mlp",)),
    Held("out_proj", "o"),  # of attention and MLP at once
    Held("out_proj", ("mlp",)),
)
_ATTENTION_POOL_2D = (Held("qkv", "qkv"), *_SEPARATE)

ATTENTION: dict[str, Sequence[Held]] = {
    "timm.layers.attention.Attention": _FUSED,
    "timm.layers.attention.AttentionRope": (*_FUSED, *_PROJ),
    "timm.layers.attention2d.Attention2d": _MAXXVIT,
    "timm.layers.attention2d.MultiQueryAttention2d": (
        Held("query.proj", "q"),
        Held("key.proj", "k"),
        Held("value.proj", "v"),
        Held("output.proj", "o"),
    ),
    "timm.layers.attention_pool.AttentionPoolLatent": (*_Q_KV, Held("mlp.fc1", ("mlp",)), Held("mlp.fc2", ("mlp",))),
    "timm.layers.attention_pool2d.AttentionPool2d": _ATTENTION_POOL_2D,
    "timm.layers.attention_pool2d.RotAttentionPool2d": _ATTENTION_POOL_2D,
    "timm.layers.bottleneck_attn.BottleneckAttn": (
        Held("qkv", "qkv", lambda a: (a.dim_out_qk, a.dim_out_qk, a.dim_out_v)),
    ),
    "timm.layers.diff_attention.DiffAttention": _FUSED,
    "timm.layers.halo_attn.HaloAttn": (Held("q", "q"), Held("kv", "kv", lambda a: (a.dim_head_qk, a.dim_head_v))),
    "timm.layers.lambda_layer.LambdaLayer": (
        Held("qkv", "qkv", lambda a: (a.num_heads * a.dim_qk, a.dim_qk, a.dim_v)),
    ),
    "timm.layers.non_local_attn.NonLocalAttn": (Held("t", "q"), Held("p", "k"), Held("g", "v"), Held("z", "o")),
    "timm.models.beit.Attention": _FUSED,
    "timm.models.cait.ClassAttn": _SEPARATE,
    "timm.models.cait.TalkingHeadAttn": _FUSED,
    "timm.models.coat.FactorAttnConvRelPosEnc": _FUSED,
    "timm.models.convit.GPSA": _QK_V,
    "timm.models.convit.MHSA": _FUSED,
    "timm.models.cpubone.ConvAttention": _CONV_ATTENTION,
    "timm.models.crossvit.CrossAttention": (Held("wq", "q"), Held("wk", "k"), Held("wv", "v"), Held("proj", "o")),
    "timm.models.davit.ChannelAttention": _FUSED,
    "timm.models.davit.ChannelAttentionV2": _FUSED,
    "timm.models.davit.WindowAttention": _FUSED,
    "timm.models.edgenext.CrossCovarianceAttn": _FUSED,
    "timm.models.efficientformer.Attention": _SPLIT_BY_HEAD,
    "timm.models.efficientformer_v2.Attention2d": (
        Held("q.conv", "q"),
        Held("k.conv", "k"),
        Held("v.conv", "v"),
        Held("proj.conv", "o"),
    ),
    "timm.models.efficientformer_v2.Attention2dDownsample": (
        Held("q.proj.conv", "q"),
        Held("k.conv", "k"),
        Held("v.conv", "v"),
        Held("proj.conv", "o"),
    ),
    "timm.models.efficientvit_mit.LiteMLA": (Held("qkv.conv", "qkv", lambda a: [a.dim] * 3), Held("proj.conv", "o")),
    "timm.models.efficientvit_msra.CascadedGroupAttention": (
        Held("qkvs.*.conv", "qkv", lambda a: (a.key_dim, a.key_dim, a.val_dim)),
        Held("proj.1.conv", "o"),
    ),
    "timm.models.eva.EvaAttention": (*_FUSED, *_PROJ),
    "timm.models.fastvit.Attention": _FUSED,
    "timm.models.gcvit.WindowAttentionGlobal": (
        # with a global query, q is made elsewhere and qkv holds k and v
        Held("qkv", "qkv", lambda a: [a.num_heads * a.head_dim * part for part in (not a.use_global, 1, 1)]),
        Held("proj", "o"),
    ),
    "timm.models.gemma4_vit.Gemma4Attention": (
        Held("q_proj.linear", "q"),
        Held("k_proj.linear", "k"),
        Held("v_proj.linear", "v"),
        Held("o_proj.linear", "o"),
    ),
    "timm.models.hiera.MaskUnitAttention": _FUSED,
    "timm.models.hieradet_sam2.MultiScaleAttention": _FUSED,
    "timm.models.iformer.SHMA": (
        Held("q.c", "q"),
        Held("k.c", "k"),
        Held("v_gate.c", ("v", "gate")),
        Held("proj.c", "o"),
    ),
    "timm.models.levit.Attention": (
        Held("qkv.linear", "qkv", lambda a: (a.key_dim, a.key_dim, a.val_dim)),
        Held("proj.ln.linear", "o"),
    ),
    "timm.models.levit.AttentionDownsample": (
        Held("q.ln.linear", "q"),
        Held("kv.linear", "kv", lambda a: (a.key_dim, a.val_dim)),
        Held("proj.ln.linear", "o"),
    ),
    "timm.models.lowformer.ConvAttention": _CONV_ATTENTION,
    "timm.models.maxxvit.Attention2d": _MAXXVIT,
    "timm.models.maxxvit.AttentionCl": _MAXXVIT,
    "timm.models.metaformer.Attention": _FUSED,
    "timm.models.mobilevit.LinearSelfAttention": (
        Held("qkv_proj", "qkv", lambda a: (1, a.embed_dim, a.embed_dim)),
        Held("out_proj", "o"),
    ),
    "timm.models.mvitv2.MultiScaleAttention": _FUSED,
    "timm.models.mvitv2.MultiScaleAttentionPoolFirst": _SEPARATE,
    "timm.models.nest.Attention": _FUSED,
    "timm.models.nextvit.EfficientAttention": _SEPARATE,
    "timm.models.pvt_v2.Attention": _Q_KV,
    "timm.models.shvit.SHSA": (Held("qkv.c", "qkv", lambda a: (a.qk_dim, a.qk_dim, a.pdim)), Held("proj.1.c", "o")),
    "timm.models.swiftformer.EfficientAdditiveAttention": (
        Held("to_query", "q"),
        Held("to_key", "k"),
        Held("proj", "o"),
        Held("final", "o"),
    ),
    "timm.models.swin_transformer.WindowAttention": _FUSED,
    "timm.models.swin_transformer_v2.WindowAttention": _FUSED,
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention": _FUSED,
    "timm.models.tiny_vit.Attention": _SPLIT_BY_HEAD,
    "timm.models.tnt.Attention": _QK_V,
    "timm.models.twins.GlobalSubSampleAttn": _Q_KV,
    "timm.models.twins.LocallyGroupedAttn": _FUSED,
    "timm.models.visformer.Attention": _FUSED,
    "timm.models.vision_transformer.DiffParallelScalingBlock": _PARALLEL,
    "timm.models.vision_transformer.ParallelScalingBlock": _PARALLEL,
    "timm.models.vision_transformer_relpos.RelPosAttention": _FUSED,
    "timm.models.vision_transformer_sam.Attention": _FUSED,
    "timm.models.volo.Attention": _FUSED,
    "timm.models.volo.ClassAttention": _Q_KV,
    "timm.models.volo.OutlookAttention": (Held("v", "v"), Held("proj", "o")),  # weighs by positions, without q and k
    "timm.models.xcit.XCA": _FUSED,
    "open_clip.modified_resnet.AttentionPool2d": (*_PROJ, Held("c_proj", "o")),
    "torch.nn.modules.activation.MultiheadAttention": (Held("", "qkv"), Held("out_proj", "o")),
}

GATES = {
    "timm.layers.cbam.ChannelAttn",
    "timm.layers.cbam.LightChannelAttn",
    "timm.layers.cbam.LightSpatialAttn",
    "timm.layers.cbam.SpatialAttn",
    "timm.layers.coord_attn.CoordAttn",
    "timm.layers.coord_attn.EfficientLocalAttn",
    "timm.layers.coord_attn.SimpleCoordAttn",
    "timm.layers.coord_attn.StripAttn",
    "timm.layers.non_local_attn.BatNonLocalAttn",
    "timm.layers.non_local_attn.BilinearAttnTransform",
    "timm.layers.selective_kernel.SelectiveKernelAttn",
    "timm.layers.split_attn.SplitAttn",
    "timm.models.csatv2.SpatialAttention",
    "timm.models.csatv2.SpatialTransformerBlock",  # attends with one channel, to make a gate
    "timm.models.nextvit.ConvAttention",  # a grouped convolution
}
"""Attention by name only."""
