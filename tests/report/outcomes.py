"""Outcomes as `fuse` and `verify` produce them: one per kind of ending, and one full of hostile names."""

from __future__ import annotations

from dataclasses import replace

from fusecli.errors import ExitCode
from fusecli.outcome import (
    Evidence,
    FileFacts,
    GroupReport,
    Judgement,
    LedgerEntry,
    Outcome,
    Refusal,
    Totals,
    Unfused,
    Verdict,
)

ENVIRONMENT = {"torch": "2.13.0", "python": "3.11.9", "fusecli": "0.1.0"}
INPUT = FileFacts("runs/digits/model.pt", "zip pickle", 104_327, "5f2d" * 16)
SPEC = FileFacts("fuse.yaml", "YAML", 214, "a1c3" * 16)
OUTPUT = FileFacts("runs/digits/model.fused.safetensors", "safetensors", 99_120, "0b7e" * 16)
CHECKS = {
    "semantic": "original and fused agree as float64 twins on 4 inputs, in every group and end to end",
    "drift": "the stored float32 model is 1.1 times as far from float64 as the original was; limit 10",
    "power": "every group ran, and 1 % on its weights changed its output",
    "from disk": "load_fused read the written file strictly; its tensors are the correctly rounded fold",
}


def _group(prefix: str, names: str, rule: str, before: str, after: str, error: float) -> GroupReport:
    modules = tuple(prefix + name for name in names.split())
    norm = modules[1]
    return GroupReport(
        modules=modules,
        rule=rule,
        status="equivalent",
        evidence=Evidence.OBSERVED,
        kinds_before=tuple(before.split()),
        kinds_after=tuple(after.split()),
        float64_error=error,
        drift=1.1 * 9.4e-8,
        noise_floor=9.4e-8,
        weight_range_before=3.2,
        weight_range_after=7.9,
        keys_removed=tuple(f"{norm}.{key}" for key in ("weight", "bias", "running_mean", "running_var")),
        keys_added=(f"{modules[0]}.bias",),
    )


THREE = (
    replace(
        _group("", "conv1 bn1 relu1", "conv_bn_relu", "Conv2d BatchNorm2d ReLU", "ConvReLU2d", 3.1e-16),
        keys_renamed=(("conv1.weight", "conv1.0.weight"), ("conv1.bias", "conv1.0.bias")),
    ),
    replace(
        _group("", "conv2 bn2 act2", "conv_bn", "Conv2d BatchNorm2d SiLU", "Conv2d", 4.4e-16), kept=("act2",)
    ),
    _group("head.", "fc bn", "linear_bn", "Linear BatchNorm1d", "Linear", 0.0),
)
EQUIVALENT = Verdict(
    Judgement.EQUIVALENT,
    groups=THREE,
    float64_error=6.7e-16,
    drift=1.04e-7,
    noise_floor=9.4e-8,
    end_to_end=True,
    samples=4,
    checks=CHECKS,
)

FUSED = Outcome(
    command="fusecli fuse runs/digits/model.pt --spec fuse.yaml",
    status="fused",
    exit_code=ExitCode.OK,
    groups=THREE,
    unfused=(Unfused("norm", "LayerNorm", "no-statistics", "it normalises with the input's own statistics"),),
    verification=EQUIVALENT,
    ledger=(
        LedgerEntry("hook", "bn1", "1 forward hook moved to conv1"),
        LedgerEntry("requires-grad", "conv2.bias", "new parameter, requires_grad like conv2.weight"),
    ),
    input=INPUT,
    output=OUTPUT,
    spec=SPEC,
    totals_before=Totals(11, 25_418, 104_327, 3),
    totals_after=Totals(8, 25_194, 99_120, 0),
    environment=ENVIRONMENT,
    next_step="fusecli verify runs/digits/model.pt runs/digits/model.fused.safetensors --spec fuse.yaml",
)


def _resnet() -> tuple[GroupReport, ...]:
    groups = []
    for index in range(52):
        prefix = f"backbone.body.layer{1 + index // 16}.{index % 16}."
        rule = ("conv_bn_relu", "Conv2d BatchNorm2d ReLU", "ConvReLU2d")
        names = "conv1 bn1 relu" if index % 3 else "downsample.0 downsample.1"
        if not index % 3:
            rule = ("conv_bn", "Conv2d BatchNorm2d", "Conv2d")
        group = _group(prefix, names, *rule, 1e-16 * (1 + index % 7))
        groups.append(replace(group, weight_range_after=812.0 if index in (17, 30) else 9.0))
    return tuple(groups)


MANY = _resnet()
FUSED_MANY = replace(
    FUSED,
    groups=MANY,
    unfused=tuple(replace(FUSED.unfused[0], module=f"encoder.layers.{n}.norm") for n in range(9)),
    verification=replace(EQUIVALENT, groups=MANY),
    totals_before=Totals(161, 25_557_032, 102_546_432, 53),
    totals_after=Totals(109, 25_530_472, 102_121_888, 1),
)

CLAIMED = replace(
    FUSED,
    groups=tuple(replace(group, evidence=Evidence.CLAIMED) for group in THREE),
    verification=replace(EQUIVALENT, float64_error=None, drift=None, noise_floor=None, end_to_end=False),
    totals_before=replace(Totals(11, 25_418, 104_327, 3), modules=None),
)

_WRONG = replace(MANY[20], status="different", float64_error=4.1e-5, drift=3.9e-5)
DIFFERENT = replace(
    FUSED_MANY,
    status="different",
    exit_code=ExitCode.DIFFERENT,
    groups=(*MANY[:20], _WRONG, *MANY[21:]),
    verification=Verdict(
        Judgement.DIFFERENT,
        float64_error=2.2e-5,
        drift=3.9e-5,
        noise_floor=9.4e-8,
        smallest_tolerance=4.1e-5,
        first_different=_WRONG.modules,
        end_to_end=True,
        samples=4,
        checks={**CHECKS, "semantic": "1 of 52 groups differs", "from disk": "not reached"},
        check_results={
            "semantic": Judgement.DIFFERENT,
            "drift": Judgement.DIFFERENT,
            "power": Judgement.EQUIVALENT,
            "from disk": Judgement.INCONCLUSIVE,
        },
    ),
    output=None,
    next_step="",
)

INCONCLUSIVE = replace(
    FUSED,
    status="inconclusive",
    exit_code=ExitCode.INCONCLUSIVE,
    groups=(*THREE[:2], replace(THREE[2], status="inconclusive", float64_error=None, drift=None)),
    verification=replace(
        EQUIVALENT,
        judgement=Judgement.INCONCLUSIVE,
        reasons=("head.fc + head.bn was never executed by the sample inputs",),
        check_results={
            "semantic": Judgement.EQUIVALENT,
            "drift": Judgement.EQUIVALENT,
            "power": Judgement.INCONCLUSIVE,
        },
    ),
    output=None,
    next_step="",
)

REFUSED = Outcome(
    command="fusecli fuse model.safetensors --spec fuse.yaml",
    status="refused",
    exit_code=ExitCode.REFUSED,
    refused=(
        Refusal(
            ("features.denseblock1.denselayer1.conv1", "features.denseblock1.denselayer1.norm2"),
            "multiple-consumers",
            "the convolution's output is also read elsewhere, so scaling it would scale both",
            "conv_bn",
            ("features.denseblock1.denselayer1.norm2", "aten::cat in features.denseblock1"),
            "leave this group out of the spec",
        ),
        Refusal(
            ("conv3", "bn3"),
            "overflow",
            "the folded weight exceeds float16",
            "conv_bn",
            ("channel 17: 7.2e+04",),
        ),
        Refusal(("fc", "relu", "bn"), "no-rule", "no rule fuses Linear, ReLU, BatchNorm1d in this order"),
    ),
    input=replace(INPUT, path="model.safetensors", format="safetensors"),
    spec=SPEC,
    totals_before=Totals(161, 25_557_032, 102_546_432, 53),
    environment=ENVIRONMENT,
)

NOTHING = Outcome(
    command="fusecli fuse model.fused.safetensors --spec fuse.yaml",
    status="nothing to fuse",
    exit_code=ExitCode.NOTHING,
    input=replace(INPUT, notices=("fused by fusecli 0.1.0 already",)),
)

ERROR = Outcome(
    command="fusecli fuse model.pt --spec fuse.yaml",
    status="error",
    exit_code=ExitCode.USAGE,
    problems=(
        "fuse.yaml:14:5: rule 'conv_bm' is unknown; did you mean 'conv_bn'? 'fusecli rules' lists all",
        "fuse.yaml:20:3: key 'group' is unknown; did you mean 'groups'?",
    ),
)

HOSTILE_NAMES = (
    "[red]bold[/red]:bug:",
    "\x1b[31mred\x1b[0m\x9b2J",
    "a\r\n::error file=x::forged",
    "::warning::starts here",
    "deep" * 30 + "::error::" * 12,
    ":" * 300,
    "##[add-mask]x ##vso[task.complete]",
    "]]></script><img src=x onerror=alert(1)>",
    "pipe|`tick`\\|``` @someone #12 ![x](http://x) www.x.org __init__ *b* ~~s~~",
    "\u202egnp.exe\u2066\u200b\ufeff\u2028\u00a0",
    "\udc80 层.卷积 é",
    "x" * 5000,
    "",
    "- [ ] 1. <!-- x",
)


def _hostile() -> Outcome:
    names = HOSTILE_NAMES
    groups = tuple(
        replace(
            THREE[0],
            modules=(name, name),
            rule=name[:40],
            kinds_before=(name,),
            kinds_after=(name,),
            notes=(name,),
            kept=(name,),
            keys_renamed=((name, name),),
            weight_range_after=1e3,
            drift=float("nan"),
            noise_floor=0.0,
        )
        for name in names
    )
    verdict = replace(
        EQUIVALENT,
        judgement=Judgement.DIFFERENT,
        first_different=names,
        checks=dict.fromkeys(names, names[0]),
    )
    return replace(
        FUSED,
        command=f"fusecli fuse {names[2]}",
        status="different",
        exit_code=ExitCode.DIFFERENT,
        groups=groups,
        refused=tuple(Refusal((name,), name, name, name, (name,), name) for name in names),
        unfused=tuple(Unfused(name, name, name, name) for name in names),
        verification=replace(verdict, reasons=names),
        ledger=tuple(LedgerEntry(name, name, name) for name in names),
        input=FileFacts(names[2], names[3], 1, names[1], names),
        environment={name: name for name in names},
        problems=names,
        next_step=names[2],
    )


HOSTILE = _hostile()

SAMPLES = {
    "fused": FUSED,
    "fused many": FUSED_MANY,
    "claimed": CLAIMED,
    "different": DIFFERENT,
    "inconclusive": INCONCLUSIVE,
    "refused": REFUSED,
    "nothing": NOTHING,
    "error": ERROR,
    "hostile": HOSTILE,
}
