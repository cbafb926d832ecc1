"""Models on disk: save_pretrained, from_pretrained and load_upstream."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from python_models import MEGABYTE, HierarchicalTransformer, gMLPGPT
from python_models.pretrained import PretrainedError


def megabyte(**changes: object) -> MEGABYTE:
    options = {"dim": (32, 16), "depth": (2, 1), "max_seq_len": (4, 3), "dim_head": 8, "heads": 2}
    return MEGABYTE(**{"num_tokens": 16, **options, **changes})


def gmlp_gpt() -> gMLPGPT:
    return gMLPGPT(
        num_tokens=16, dim=16, depth=2, seq_len=12, window=(4, (2, 2)), attn_dim=(None, 8)
    )


def hierarchical() -> HierarchicalTransformer:
    return HierarchicalTransformer(
        num_tokens=16, dim=(16, 24), depth=1, seq_len=12, hierarchies=(1, 4), window_sizes=(4, None)
    )


def tokens(length: int = 12) -> Tensor:
    return torch.randint(16, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "build", [megabyte, gmlp_gpt, hierarchical], ids=["megabyte", "gmlp-gpt", "hierarchical"]
)
def test_round_trip(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "new" / "folder")
    other = type(model).from_pretrained(tmp_path / "new" / "folder")
    assert other.options == model.options
    assert other.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(other(tokens()), model(tokens()))


def test_positional_arguments_and_copies_keep_the_options(tmp_path: Path) -> None:
    model = copy.deepcopy(megabyte())
    model.half().float().save_pretrained(tmp_path)
    assert MEGABYTE.from_pretrained(tmp_path).options["dim"] == (32, 16)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}], ids=["plain", "nested"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_load_upstream(prefix: str, wrap: Callable[[dict], dict], tmp_path: Path) -> None:
    from MEGABYTE_pytorch import MEGABYTE as Upstream

    original = Upstream(
        num_tokens=16, dim=(32, 16), depth=(2, 1), max_seq_len=(4, 3), dim_head=8, heads=2
    )
    state = {prefix + name: t for name, t in original.state_dict().items()}
    torch.save(wrap(state), tmp_path / "upstream.pt")
    model = megabyte().load_upstream(tmp_path / "upstream.pt")
    torch.testing.assert_close(model(tokens()), original(tokens()), rtol=1e-4, atol=1e-4)


def test_load_upstream_refuses_and_changes_nothing(tmp_path: Path) -> None:
    model, file = megabyte(), tmp_path / "weights.pt"
    before = copy.deepcopy(model.state_dict())
    state = megabyte(heads=1).state_dict()
    state["extra"] = state.pop("to_logits.bias")
    torch.save(state, file)
    with pytest.raises(
        PretrainedError, match=r"lacks to_logits.bias; has an unknown extra; has tr"
    ):
        model.load_upstream(file)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(PretrainedError, match=r"nowhere.pt does not exist"):
        model.load_upstream(tmp_path / "nowhere.pt")
    file.write_bytes(b"no tensors")
    with pytest.raises(PretrainedError, match=r"weights.pt is no file of tensors"):
        model.load_upstream(file)
    torch.save([1, 2], file)
    with pytest.raises(PretrainedError, match=r"holds no state dict, but list"):
        model.load_upstream(file)
    torch.save(nn.Linear(2, 2), file)  # code, not tensors: never run
    with pytest.raises(PretrainedError, match=r"is no file of tensors"):
        model.load_upstream(file)


def test_save_refuses(tmp_path: Path) -> None:
    model = gMLPGPT(num_tokens=16, dim=16, depth=1, seq_len=8, act=nn.GELU())
    with pytest.raises(TypeError, match=r"gMLPGPT was made with act=GELU"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    megabyte().save_pretrained(tmp_path / "b")
    with pytest.raises(FileExistsError, match=r"config.json exists"):
        megabyte().save_pretrained(tmp_path / "b")


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json is damaged: KeyError"),
        (cut, "model.safetensors is damaged"),
        (lambda f: change(f, format=2), "has format 2, this version reads 1"),
        (lambda f: change(f, model="gMLPGPT"), "is of the model gMLPGPT, expected MEGABYTE"),
        (lambda f: change(f, options={"wings": 2}), "has options that make no MEGABYTE"),
    ],
)
def test_from_pretrained_refuses(
    damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    megabyte().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(PretrainedError, match=words):
        MEGABYTE.from_pretrained(tmp_path)


def test_weights_of_another_size(tmp_path: Path) -> None:
    model = megabyte()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(tmp_path, options={**config["options"], "heads": 1})
    with pytest.raises(
        PretrainedError, match=r"model.safetensors does not fit this MEGABYTE: it has"
    ):
        MEGABYTE.from_pretrained(tmp_path)
