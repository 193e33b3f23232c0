"""A sample's logits do not depend on what it is packed with: every causal language model of transformers, tiny.

Run by hand (`make test-slow`); it needs the configurations in shared/tools/arch.
"""

import copy
import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch
from helpers import relative
from test_packing import GROUPS, LENGTHS, LIMIT, Wide, samples
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kunbr_fast.data import pack
from kunbr_fast.model.decoder import Decoder

ROOT = Path(__file__).resolve().parents[2]
FOLDER = next((f for f in (ROOT.parent / "shared/tools/arch", ROOT / "shared/tools/arch") if f.is_dir()), None)


def made(tools, overrides, name):
    """A random model in fp64, with attention and experts that know fp64 where there is a choice."""
    first = None
    sdpa, eager = {"attn_implementation": "sdpa"}, {"experts_implementation": "eager"}
    for options in (sdpa | eager, sdpa, {}):
        config = tools.shrunk(CONFIG_MAPPING[name], copy.deepcopy(tools.OVERRIDES.get(name)))
        overrides.POST.get(name, lambda config: None)(config)
        if getattr(config.get_text_config(), "attn_logit_softcapping", None):
            options = options | {"attn_implementation": "eager"}
        torch.manual_seed(0)
        try:
            model = tools.make(config, **options).double().eval()
            break
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            first = first or error
    else:
        raise first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def largest_error(model):
    """Of any sample in any group; None for a model that is refused, or does not run as small as this."""
    with pytest.MonkeyPatch.context() as patch:
        for name in {"transformers.modeling_rope_utils", *(type(module).__module__ for module in model.modules())}:
            if name.startswith("transformers.") and hasattr(sys.modules[name], "torch"):
                patch.setattr(sys.modules[name], "torch", Wide())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        try:
            truth = [copy.deepcopy(model)(input_ids=sample["input_ids"][None]).logits[0] for sample in samples()]
            decoder = Decoder(model)
        except Exception:  # of a model of another kind, also transformers' own
            return None
        errors = []
        for group in itertools.chain(*GROUPS):
            ours = decoder.logits(pack([samples()[i] for i in group])).split([LENGTHS[i] for i in group])
            errors += [relative(logits, truth[i]) for i, logits in zip(group, ours)]
        return max(errors)


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason=f"no configurations: {ROOT.parent}/shared/tools/arch is not there")
def test_every_architecture(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    tools, overrides = importlib.import_module("build"), importlib.import_module("overrides")
    errors = {}
    for name in tools.MAPPING:
        try:
            model = made(tools, overrides, name)
        except Exception:  # not as small as this
            continue
        errors[name] = largest_error(model)
    accepted = {name: error for name, error in errors.items() if error is not None}
    assert len(accepted) >= 85 and {name: error for name, error in accepted.items() if not error < LIMIT} == {}
