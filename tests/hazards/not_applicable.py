"""Why a hazard cannot meet a node: (hazards, nodes, a reason that a user would accept). The first one that fits counts.

A reason is only looked at where no test guards the cell.
"""

from __future__ import annotations

SAMPLING = "H01-H33 H40-H49"
NUMBERS = "H50-H55"

REASONS: list[tuple[str, str, str]] = [
    (
        "H61",
        "all",
        "every test runs on the oldest and on the newest host, and a smoke test of all nodes on the releases between "
        "them: see the table of host releases.",
    ),
    (
        "H50-H51",
        "cache quantize files compensator switch calibrate",
        "It forecasts nothing itself; the Taylor Predictor does.",
    ),
    (
        "H70-H72",
        "cache predictor",
        "It sees a layer's outputs, not its weights: for it a 4-bit model is a model like any other, and the tests of "
        "nodes together have it on one.",
    ),
    ("H64", "files", "The layers of a loaded file are those of W4A4 Quantize, which are tested compiled."),
    ("H73-H75", "cache predictor", "It knows one model; the Hybrid Model Switch checks that two fit each other."),
    (
        "H77",
        "cache predictor calibrate quantize files convert compensator switch pruned report",
        "It speaks to no server.",
    ),
    ("H80", "convert pruned", "It samples nothing and leaves nothing in a network's forward."),
    ("H80", "remote", "Its part of the run is computed by the other server, whose own host it is."),
    ("H78-H79", "predictor switch", "It reads and writes no file."),
    ("H79", "compensator", "It reads a profile and writes none; Calibrate does."),
    ("H79", "quantize", "It writes no file; Save Quantized Model and Quantize Model File do."),
    ("H79", "pruned", "It writes no file."),
    ("H79", "remote", "The part of the run comes back as a latent in memory, and no file is written here."),
    (
        SAMPLING + " " + NUMBERS + " H62 H64-H65 H68 H70 H73-H76",
        "convert",
        "It reads a file and writes one, without a MODEL and without sampling; the written file is bit for bit what "
        "Save Quantized Model writes (H71).",
    ),
    ("H63", "convert", "Nothing is loaded: one group of layers at a time is in memory (H69)."),
    (
        SAMPLING + " " + NUMBERS + " H62-H65 H68-H72 H74 H76",
        "pruned",
        "It loads a network and is done: what it gives is the host's own MODEL of an SD1.5, tensor by tensor where it "
        "belongs, and from there on the nodes behind it are asked.",
    ),
    (
        "H32-H33 H52-H55 H64 H68-H69 H73-H76",
        "files",
        "A loaded layer computes bit for bit what the layer of W4A4 Quantize that was saved computes, and is the same "
        "class (H71), so the column of W4A4 Quantize answers.",
    ),
    (
        "H54-H55 H73 H75-H76",
        "quantize",
        "It changes how a layer computes, at every evaluation alike: it skips nothing, forecasts nothing and joins no "
        "models. The bench of quality has what it costs.",
    ),
    (
        "H52-H53 H71-H74",
        "compensator",
        "It adds a difference of two outputs of one model; it has no weights of its own, divides by nothing but sigma, "
        "and of a switched run sees the model it stands on.",
    ),
    (
        "H52-H54 H70-H72",
        "switch",
        "It hands a latent from one model to the other and computes nothing else: no forecast, no weights, no file.",
    ),
    (
        "H07 H22-H25 H27-H33 H46",
        "remote",
        "A prompt goes to the server as text, with the loaders that read it there: areas, masks, schedules, "
        "ControlNets and hooks cannot be wired to the node, and the run over there is the server's own stock sampler.",
    ),
    (
        "H01 H03 H08-H11 H13-H17 H21 H40 H42 H45 H50-H55 H62-H66 H68-H70 H72 H74 H76",
        "remote",
        "It takes no part in the sampling of a MODEL here: it is given a latent and gives one, as a KSampler does, and "
        "the server samples with its stock nodes. Its model, memory and patches are that server's.",
    ),
    ("H71", "remote", "The model is the server's; nothing of it comes here."),
    (
        "H06-H11 H14-H18 H20-H31 H33 H40 H42-H51 H53 H62-H66 H68 H70 H72-H74",
        "report",
        "It compares finished latents, or has the host sample them with the nodes that are connected; it puts nothing "
        "on a MODEL, so what happens within a run is answered in the other columns.",
    ),
    ("H78", "report", "It reads no file."),
    (
        "H16 H17 H64 H68 H70-H73 H74 H76",
        "calibrate",
        "It samples the connected MODEL in full with whatever is on it and only watches; another cache or switch is "
        "answered by the nodes it belongs to.",
    ),
    (
        "H09 H18 H55 H62-H63 H66",
        "calibrate",
        "It runs the host's sampler as KSampler does, with the same hooks as Cache Loader and nothing skipped.",
    ),
    (
        "H01 H21 H28 H33 H52",
        "calibrate",
        "It has no setting that does nothing, one cfg for the whole run, and watches the network through the same "
        "hooks as the Cache Loader, whose tests have ControlNets, context windows and zeros.",
    ),
]
