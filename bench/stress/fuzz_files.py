"""Every file that is read: profiles, quantised models, nunchaku's, pruned U-Nets, measured kernels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random

import folder_paths
import torch
from safetensors.torch import load, load_file

from demo import emoji

from .mutate import damaged_bytes, damaged_tensors, damaged_tree, dumped, every_cut, file_of
from .target import NAME, Case, Target, place_of, sample


def profile_bytes(model: str = "fuzz") -> bytes:
    """A profile with everything in it that a profile can hold."""
    from slipstream.engine.calibration.profile import Profile

    whole = Profile.load(next((emoji.MODELS.parent / "profiles").glob("tiny_flux*")))
    extras = {
        "blocks": torch.ones(whole.steps, 4, dtype=torch.uint8),
        "moments": torch.rand(whole.steps, 3, 16),
        "activation/double_blocks.0.img_mlp.0/absmax": torch.rand(256),
        "activation/double_blocks.0.img_mlp.0/square": torch.rand(256),
    }
    return dataclasses.replace(whole, model=model, extras=extras).to_bytes()


class Profiles(Target):
    """Profile files: bytes, header, tensors; those that are read are used on three schedules."""

    share = 6.0

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.whole = profile_bytes()
        self.key = "slipstream_profile"
        length = int.from_bytes(self.whole[:8], "little")
        self.plan = json.loads(json.loads(self.whole[8 : 8 + length])["__metadata__"][self.key])
        self.tensors = load(self.whole)
        self.cuts = every_cut(self.whole)

    def data(self, rng: Random) -> bytes:
        way = rng.randrange(5)
        if way == 0:
            return rng.choice(self.cuts)
        if way == 1:
            return damaged_bytes(rng, self.whole)
        plan = self.plan if way == 2 else damaged_tree(rng, self.plan)
        tensors = self.tensors if way == 3 else damaged_tensors(rng, self.tensors)
        text = rng.choice(("[" * 10**5, "NaN", "null", "0")) if rng.random() < 0.02 else dumped(plan)
        return file_of(tensors, {self.key: text} if rng.random() < 0.97 else None)

    def case(self, rng: Random) -> Case:
        from slipstream.engine.calibration.profile import Profile

        data = self.data(rng)

        def run() -> None:
            profile = Profile.from_bytes(data, NAME)
            for sigmas in (profile.sigmas, (1.0, 0.7, 0.2, 0.0)):
                profile.keys_for(sigmas)
                profile.rows_for(sigmas)
            for factor in (0.5, 1.0, 2.0):
                profile.relaxed(factor)
            assert Profile.from_bytes(profile.to_bytes(), NAME).keys == profile.keys

        return run


class SampledProfiles(Profiles):
    """The same through the Cache Loader, the compensator and a short sampling."""

    share = 0.4

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.place = place_of(folder, "slipstream_profiles")
        self.model = emoji.load_flux()
        from slipstream.host.profiles.folder import fingerprint

        self.plan["model"] = fingerprint(self.model)

    def case(self, rng: Random) -> Case:
        from slipstream.engine.run.plan import CacheConfig, CompensatorConfig, PredictorConfig
        from slipstream.host.model import add_cache, add_compensator, add_predictor

        data, name = self.data(rng), rng.choice((NAME, "auto", NAME))

        def run() -> None:
            (self.place / NAME).write_bytes(data)
            folder_paths.filename_list_cache.pop("slipstream_profiles", None)
            model = add_cache(self.model, CacheConfig(node_id="1", profile=name))
            model = add_compensator(model, CompensatorConfig(profile=name, node_id="3"))
            sample(add_predictor(model, PredictorConfig(order=1, node_id="2")))

        return run


class Layers(Target):
    """Files of quantised layers, read layer by layer as the loader does it, without the host's network."""

    share = 4.0

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.path = folder / "layers.safetensors"
        torch.manual_seed(0)
        from slipstream.quant.files import quantisation
        from slipstream.quant.layer import quantise_group

        from lab.methods import METHODS, with_spec

        self.tensors, described = {"plain.weight": torch.randn(4, 4)}, {}
        for name, method, options in (("a", "svdquant", {"rank": 16}), ("b", "convrot", {}), ("c", "int8_convrot", {})):
            spec = with_spec(METHODS[method], **options)
            layer = quantise_group([torch.randn(64, 256)], [torch.randn(64)], spec).layer
            self.tensors |= layer.state_dict(name)
            described[name] = layer.description()
        self.metadata = quantisation(described)
        self.whole = file_of(self.tensors, self.metadata)
        self.cuts = every_cut(self.whole)

    def data(self, rng: Random) -> bytes:
        way = rng.randrange(4)
        if way == 0:
            return rng.choice(self.cuts)
        if way == 1:
            return damaged_bytes(rng, self.whole)
        tensors = damaged_tensors(rng, self.tensors)
        metadata = dict(self.metadata)
        for key in [k for k in tensors if k.endswith(".comfy_quant")]:
            if rng.random() < 0.3:
                tree = damaged_tree(rng, json.loads(bytes(self.tensors[key].tolist()))) if key in self.tensors else {}
                text = rng.choice(("[" * 10**5, dumped(tree), dumped(tree), dumped(tree)))
                tensors[key] = torch.tensor(list(text.encode(errors="replace")), dtype=torch.uint8)
        if rng.random() < 0.5:
            (key,) = metadata
            text = rng.choice(("[" * 10**5, dumped(damaged_tree(rng, json.loads(metadata[key])))))
            metadata = {rng.choice((key, key, "other")): text.encode(errors="replace").decode()}
        return file_of(tensors, metadata)

    def case(self, rng: Random) -> Case:
        from slipstream.quant.files import Described, File
        from slipstream.quant.linear import W4A4Linear
        from slipstream.quant.packed import read_layer

        data = self.data(rng)

        def run() -> None:
            self.path.write_bytes(data)
            file = File(self.path)
            try:
                described = Described(file, file.metadata)
                for name in described.layers:
                    own = {key: described[key].clone() for key in described if key.startswith(name)}
                    layer = W4A4Linear(read_layer(name, own))
                    if layer.in_features <= 4096:
                        layer(torch.zeros(2, layer.in_features, dtype=layer.original_dtype))
            finally:
                file.close()

        return run


class Models(Layers):
    """Whole quantised models through Load Quantized Model."""

    share = 0.15

    def __init__(self, folder: Path):
        Target.__init__(self, folder)
        from slipstream.host.quantise.choose import QuantWish
        from slipstream.host.quantise.save import quantise_file
        from slipstream.quant.files import QUANTISATION

        place = place_of(folder, "diffusion_models")
        (place / "small.safetensors").write_bytes(emoji.SMALL_FLUX.read_bytes())
        emoji.accept_small_flux()
        folder_paths.filename_list_cache.pop("diffusion_models", None)
        made, _ = quantise_file("small.safetensors", "made", QuantWish(rank=0))
        self.whole = (place / made).read_bytes()
        self.tensors = load(self.whole)
        length = int.from_bytes(self.whole[:8], "little")
        self.metadata = {QUANTISATION: json.loads(self.whole[8 : 8 + length])["__metadata__"][QUANTISATION]}
        self.cuts = every_cut(self.whole)
        self.place = place

    def case(self, rng: Random) -> Case:
        from slipstream.host.quantise import load as quant_load

        data, name = self.data(rng), rng.choice((NAME,) * 9 + ("../" + NAME, "x.gguf", "", "\0"))

        def run() -> None:
            (self.place / NAME).write_bytes(data)
            folder_paths.filename_list_cache.pop("diffusion_models", None)
            quant_load.load(name)

        return run


class Pruned(Target):
    """U-Net files through Load Pruned UNet."""

    share = 0.1

    def __init__(self, folder: Path):
        super().__init__(folder)
        emoji.accept_small_unet()
        self.tensors = load_file(emoji.UNET)
        self.whole = emoji.UNET.read_bytes()
        self.path = folder / NAME

    def case(self, rng: Random) -> Case:
        from slipstream.host.switch import pruned

        way = rng.randrange(3)
        if way == 0:
            data = rng.choice(every_cut(self.whole))
        else:
            data = damaged_bytes(rng, self.whole) if way == 1 else file_of(damaged_tensors(rng, self.tensors), None)

        def run() -> None:
            self.path.write_bytes(data)
            pruned.load_file(self.path)

        return run


class Nunchaku(Target):
    """nunchaku's FLUX.1 checkpoints, as the mapping that their reader gets."""

    share = 0.6

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.tensors = nunchaku_checkpoint()
        self.path = folder / "nunchaku.safetensors"

    def case(self, rng: Random) -> Case:
        from slipstream.quant.files import File
        from slipstream.quant.nunchaku import plain_weights, w4a4_layers

        tensors = damaged_tensors(rng, self.tensors)
        data = file_of(tensors, None)
        if rng.random() < 0.3:
            data = damaged_bytes(rng, data)

        def run() -> None:
            self.path.write_bytes(data)
            file = File(self.path)
            try:
                dict(w4a4_layers(file)), dict(plain_weights(file))
            finally:
                file.close()

        return run


def nunchaku_checkpoint(width: int = 128) -> dict[str, torch.Tensor]:
    """One double and one single block as nunchaku's files have them, with random numbers."""
    from slipstream.quant import nunchaku as n

    from lab.nunchaku import pack_layer, pack_modulation

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    def layer(name: str, rows: int, columns: int, smooth: torch.Tensor) -> dict:
        codes = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
        down, up = normal(columns, 16), normal(rows, 16)
        return pack_layer(n.NunchakuLayer(codes, normal(columns // 64, rows), smooth, down, up, normal(rows)), name)

    def modulation(name: str, splits: int) -> dict:
        codes = torch.randint(0, 16, (splits * width, width), generator=generator)
        pair = normal(width // 64, splits * width), normal(width // 64, splits * width)
        return pack_modulation(codes, *pair, normal(splits * width), name, splits)

    def smooth(k: int) -> torch.Tensor:
        return normal(k).abs() + 0.5

    found: dict[str, torch.Tensor] = {}
    block, shared = "transformer_blocks.0", smooth(width)
    for name in n.DOUBLE:
        rows = 3 * width if "qkv" in name else 2 * width if "fc1" in name else width
        columns = 2 * width if "fc2" in name else width
        found |= layer(f"{block}.{name}", rows, columns, smooth(columns))
    for name in n.DOUBLE_MODULATION:
        found |= modulation(f"{block}.{name}", 6)
    found |= {f"{block}.{name}.weight": normal(16) for name in n.DOUBLE_NORMS}
    block = f"single_{block}"
    for name, rows, columns in (("qkv_proj", 3, 1), ("mlp_fc1", 2, 1), ("out_proj", 1, 1), ("mlp_fc2", 1, 2)):
        factors = shared if columns == 1 and name != "out_proj" else smooth(columns * width)
        found |= layer(f"{block}.{name}", rows * width, columns * width, factors)
    found |= modulation(f"{block}.norm.linear", 3)
    found |= {f"{block}.{name}.weight": normal(16) for name in n.SINGLE_NORMS}
    for name in n.OUTSIDE:
        found |= {f"{name}.weight": normal(width, width), f"{name}.bias": normal(width)}
    return found


class KernelChoices(Target):
    """The file of measured kernels in the user's folder."""

    def case(self, rng: Random) -> Case:
        from slipstream.kernels.choices import Choices, header

        entry = {"name": "plain", "config": [1, 2], "milliseconds": {"plain": 1.0}}
        tree = {"header": header("fuzz"), "choices": {"k": entry, "l": entry}}
        text = dumped(damaged_tree(rng, tree)) if rng.random() < 0.9 else rng.choice(("[" * 10**5, "", "{", "1" * 5000))
        data = text.encode(errors="surrogatepass")

        def run() -> None:
            for left in self.folder.glob("*"):
                left.unlink()
            Choices(self.folder, "fuzz").path.write_bytes(data)
            choices = Choices(self.folder, "fuzz")
            choices.get("k").get("name")
            choices.keep("m", entry)
            assert Choices(self.folder, "fuzz").get("m") == entry

        return run
