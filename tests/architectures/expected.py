"""What `checks.examine` says that is not EXACT: {part of the reason: the architectures with it}."""


def _by_name(groups):
    return {name: reason for reason, names in groups.items() for name in names.split(", ")}


# Not decoders that run alone, or that transformers itself does not build from a configuration alone.
NOT_BUILT = _by_name(
    {
        "requires the timm library": "gemma3n",
        "validate_architecture": "gemma4_assistant",
        "layer types producing a cache": "gemma4_unified_assistant",
        "Multiple valid text configs": "musicgen, musicgen_melody",
    }
)
REFUSED = _by_name(
    {
        "its head does not take what its last layer gives": "deepseek_v4, hy_v4, reformer",
        "those of its head": "cpmant, prophetnet",
        "of one sample, expected hidden states": "gemma3n_text, xlnet",
        "differs from its own": "zaya",  # its routers see what those below have done
        "does something around its layers": "inkling2_text",
        "is tied to": "zamba, zamba2",
        "has no nn.ModuleList": "hrm_text",
        "has several lists of": "xlm",
        "has no num_hidden_layers": "blt",
    }
)
