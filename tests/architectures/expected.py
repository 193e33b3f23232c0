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
REFUSED = _by_name({})
