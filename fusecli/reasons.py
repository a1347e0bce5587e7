"""Every reason why a group is refused or a norm stays: the closed list of codes, and what each one means.

In the formulas y = W x + b is what the layer gives, s and t are the scale and the shift of the norm behind
it: s = gamma / sqrt(var + eps), t = beta - mean s. A fold stores s W and s b + t: the layer gives s y + t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One code: what was seen, what would silently go wrong otherwise, and what the user can do."""

    code: str
    meaning: str
    why: str
    remedy: str


_TOPOLOGY = (
    Reason(
        "not-adjacent",
        "The listed modules do not follow each other in the recorded run: another operation or another "
        "layer stands between them.",
        "A fold moves the norm in front of whatever stands between. For conv -> relu -> bn, with s and t "
        "the scale and shift of the norm, relu(s y + t) would be computed instead of s relu(y) + t. Of two "
        "swapped pairs, each layer would be scaled by the statistics of another one; the shapes often fit "
        "all the same.",
        "List the layer that really feeds the norm; the refusal names what was seen there. If an activation "
        "or a pooling stands between, leave the group out of the spec.",
    ),
    Reason(
        "multiple-consumers",
        "Something else also reads the tensor between two members: a skip connection, the model's output, a "
        "hook, or an attribute that keeps the activation.",
        "After the fold that tensor is no longer there: every reader gets what the norm would have given. "
        "With s and t the scale and shift of the norm, bn(y) + y would become (s y + t) + (s y + t).",
        "Leave the group out of the spec. If only a hook or a kept activation reads the tensor, take that "
        "out of the model's code.",
    ),
    Reason(
        "no-linear-producer",
        "What feeds the norm is no layer that it could be folded into: an activation, a pooling, an "
        "addition, a concatenation or the model's input.",
        "There is no weight that could take the scale of the norm, nor a bias that could take its shift. "
        "The nearest layer further up is separated by an operation that does not pass them on: relu(s y + "
        "t) is not s relu(y) + t.",
        "Nothing has to be done: the norm stays and computes what it did.",
    ),
    Reason(
        "activation-inside",
        "The norm's class has an activation or a drop inside, and no single layer stands directly in front "
        "of it, but a concatenation, a sum or a pooling.",
        "Across these the norm is folded as a whole, and the activation would go with it: act(y1) + act(y2) "
        "is not act(y1 + y2). To fold s and t alone, and leave act where it is, is done where one layer "
        "stands directly in front.",
        "Nothing has to be done: the class is as it should be, the norm stays and computes what it did. To "
        "have it folded, make the activation a module of its own behind the norm.",
    ),
    Reason(
        "no-linear-consumer",
        "What the norm gives is read by something that could not take it over: an activation, a sum, the "
        "model's output.",
        "A norm with nothing to fold into before it may fold into the layers after it, if all of its readers "
        "are layers: W (s x + t) = (W s) x + W t. An activation in between sees other numbers.",
        "Nothing has to be done: the norm stays and computes what it did.",
    ),
    Reason(
        "padded-rows",
        "The norm is at the end of an nn.TransformerEncoder, or directly behind one, which fills padded rows "
        "with zeros as soon as it is given a padding mask.",
        "In eval mode and without gradients torch takes a fast path: padded rows are left out and come back "
        "as zeros, behind the norm. W 0 + b would become (W s) 0 + (b + W t), and a norm folded into "
        "the encoder would give 0 instead of t. No recorded run shows it: to record is to leave that path.",
        "Say enable_nested_tensor=False where the nn.TransformerEncoder is built, or give it a norm of its "
        "own: that one comes behind the padding and folds.",
    ),
    Reason(
        "bare-identity",
        "A branch of a sum is the input itself, added by an operator: there is no module that could give a "
        "zero instead.",
        "The sum W x + x is (W + I) x, but forward would go on to add x: fusecli replaces modules, it does "
        "not rewrite forward, and (W + I) x + x is another function.",
        "Give the branch a module of its own (nn.Identity) in the class, or leave the group out.",
    ),
    Reason(
        "not-executed",
        "The recorded run never called the module, so that nothing is known about it.",
        "What feeds it, on which axis its channels are and who reads its output is unknown. A wrong fold "
        "would pass every comparison of outputs, because no output depends on it.",
        "Give sample inputs that run it ('inputs' in the spec), or leave it out of the spec.",
    ),
    Reason(
        "other-path",
        "Beside a member, in the same list or dict of modules, stand others that the inputs never ran, and a "
        "part of the group lies outside of the one that ran.",
        "Another input may go there. For heads[task](ln(x)) with the gain g of the norm folded into heads.a, "
        "heads.b would be given x without g; for bns[k](conv(x)) with bns.0 folded into the convolution, "
        "bns.1 would normalise what is normalised already.",
        "Give sample inputs that together run all of them, or say --assume-same-path (verify: "
        "{assume_same_path: true}) if the model is only ever run this way.",
    ),
    Reason(
        "unseen",
        "Ops ran that the recording does not show: in another thread, or in code that torch does not see.",
        "Who runs there may read the tensor between two members as well as anybody. With s and t the scale "
        "and shift of the norm, it would get s y + t instead of y, and no reader of y is on record.",
        "Let forward do its work in the thread that calls it. What runs after the last of their results was "
        "used is folded as ever.",
    ),
    Reason(
        "bn-axis",
        "At the recorded shapes the channels of the norm are not the output channels of the layer.",
        "BatchNorm1d takes axis 1 for the channels, Linear gives them on the last one: behind a Linear that "
        "gives (n, l, c) it scales the l positions. Where l = c a fold fits, raises no error and scales the "
        "wrong axis. The same holds for an unbatched Conv1d, which gives (c, l).",
        "Leave the group out of the spec. If the channels were meant, transpose the tensor in front of the "
        "norm, or feed batches; that is another function, so the model has to be trained again.",
    ),
    Reason(
        "functional-norm",
        "The norm is computed by a function call in a forward, so that there is no norm module to take out.",
        "The call would still run after the fold and normalise a second time: s (s y + t) + t, with s and t "
        "the scale and shift of the norm, instead of s y + t.",
        "Use a norm module instead of the function call (nn.BatchNorm2d for F.batch_norm) and load the same "
        "tensors into it.",
    ),
    Reason(
        "norm-on-weights",
        "The norm normalises weights, not activations (weight standardisation).",
        "It is part of how a weight is computed. No layer feeds it, and its statistics are those of a "
        "weight: folded into the layer that runs before it, they would scale activations that it never saw.",
        "Leave it out of the spec. To get rid of the computation, store the standardised weight in an "
        "ordinary layer and save the checkpoint again.",
    ),
)

_MATHEMATICS = (
    Reason(
        "no-rule",
        "No rule fuses this sequence of layers.",
        "A rule is an equation that holds exactly. Without one, fusing would be a guess: for conv -> "
        "max-pool -> bn it is right only while every gamma is positive.",
        "Compare the group with the list of 'fusecli rules'. A sequence or a class of your own can be "
        "taught with extra_mappings in the spec.",
    ),
    Reason(
        "batch-dependent",
        "The norm computes its mean and variance from each input (LayerNorm, GroupNorm, InstanceNorm "
        "without running statistics).",
        "Its scale gamma / sqrt(var(x) + eps) is another one for every input, and a weight holds one "
        "number. Folded with the statistics of one sample, it would be wrong for all others.",
        "Leave it out of the spec: no such norm can be folded.",
    ),
    Reason(
        "shape",
        "Sizes do not fit each other, such as the channels of a norm and the output channels of the layer "
        "in front of it.",
        "These two cannot follow each other, so that the pairing or the kind of the layer is wrong. "
        "Broadcasting could hide it: a norm of one channel would scale all of them.",
        "Correct the pairing. Without the model's code, say what a state dict cannot: {modules: [...], "
        "kind: conv_transpose2d, groups: 2}.",
    ),
    Reason(
        "not-linear-in-weight",
        "The layer's class computes something else from its weight than its base class does, or could not "
        "be probed.",
        "Scaling the weight then does not scale the output. A convolution that standardises its weight, (W "
        "- mean W) / std W, gives the same output for s W as for W: the fold would lose s.",
        "Teach the class with extra_mappings (sequence and fuser), or leave it out of the spec.",
    ),
    Reason(
        "not-affine",
        "What stands behind the layer computes something else than its tensors promise, or could not be "
        "probed.",
        "A subclass may do more in its forward than s y + t, with s and t read from its statistics: clamp, "
        "gate, or add something. The fold would drop that silently.",
        "Teach the class with extra_mappings (sequence and fuser), or leave it out of the spec.",
    ),
    Reason(
        "no-weight",
        "The layer has no parameter called weight.",
        "A fold reads W and stores s W. Another tensor taken for the weight would be scaled in its place, "
        "and the output would not.",
        "Teach the class with extra_mappings (sequence and fuser).",
    ),
    Reason(
        "no-geometry",
        "The layer is a convolution by its class, but lacks attributes that a convolution has, such as "
        "stride or padding.",
        "They say what the weight means, and whether an equation holds: with zero padding a shift in front "
        "of the layer is not the same as a larger bias. A default in their place would be a guess.",
        "Teach the class with extra_mappings (sequence and fuser).",
    ),
    Reason(
        "no-container",
        "There is no fused module class for this layer with this activation.",
        "A container such as ConvReLU2d promises what its name says. With another activation inside, a "
        "program that reads the name would compute a plain ReLU.",
        "Leave the activation out of the group: the norm is folded and the activation stays where it is.",
    ),
    Reason(
        "no-training-container",
        "No container takes these layers for training with simulated quantization (`qat: true`).",
        "While it trains, such a container computes with fake_quantize(s W), where s is the scale of the "
        "norm: the weight that will be folded. For a transposed convolution or another norm nobody has "
        "defined it, and a checkpoint trained otherwise would not be what it seems.",
        "Leave the group out of this spec. After training, the norm is folded like any other.",
    ),
    Reason(
        "no-affine",
        "The norm has no gamma and beta (affine=False), and is to be trained beside its layer.",
        "Simulated quantization scales the weight by s = gamma / sqrt(var + eps) before it is quantized, and "
        "learns gamma. Without one there is nothing to learn or to load.",
        "Build the norm with affine=True; gamma 1 and beta 0 are the same function.",
    ),
    Reason(
        "eval-mode",
        "The model is to be fused for training, and some of the members are in eval mode.",
        "In eval mode a norm neither learns statistics nor uses those of the batch: training would go on, "
        "and fit the weights to statistics that never change.",
        "Call model.train() first. For inference leave out qat: then the norms are folded.",
    ),
    Reason(
        "other-purpose",
        "The group is fused already, for the other purpose: folded where it is to be trained, or in a "
        "container that trains where it is to be folded.",
        "What trains has its norm inside: called fused for inference, it would be shipped with it. What is "
        "folded has none: trained as if it had, gamma and the statistics would never be learned.",
        "Start from the model as it was before, or fold what is inside the container, [conv.0, conv.1].",
    ),
    Reason(
        "bias-not-read",
        "The layer has no bias, and nothing reads one if it is given one.",
        "The shift t = beta - mean s of the norm goes into the bias. A forward that calls F.conv2d(x, "
        "self.weight) without it would leave every channel off by t.",
        "Pass self.bias to the function call in that forward; it may be None before the fold.",
    ),
    Reason(
        "padding-border",
        "A shift stands in front of a layer that pads with zeros.",
        "The padding is 0 and not t, with t the shift: outputs at the border read fewer taps of t than "
        "those inside. The bias W t is right inside and wrong at the border.",
        "Keep both layers. Without padding, or with reflect, replicate or circular padding, the fold is "
        "exact.",
    ),
    Reason(
        "transposed-shift",
        "A shift stands in front of a transposed convolution.",
        "Each of its outputs sums other taps of the kernel, so that a constant input does not give a "
        "constant output: no bias is right at every position.",
        "Keep both layers.",
    ),
    Reason(
        "grouped",
        "Two layers in a row have different numbers of groups.",
        "Each weight is block diagonal, the product of different blocks is not: what lies outside of the "
        "blocks would be lost.",
        "Keep both layers.",
    ),
    Reason(
        "not-pointwise",
        "Neither of two layers in a row is pointwise, which is kernel 1 with stride 1.",
        "A 3x3 after a 3x3 is a 5x5 inside only: at the border the second one reads zeros where one layer "
        "alone would go on computing.",
        "Keep both layers.",
    ),
    Reason(
        "not-aligned",
        "The kernels of two layers whose outputs are added do not share a centre.",
        "A smaller kernel is filled up with taps of 0. An unpadded 1x1 is the centre of a 3x3 padded by 1, "
        "and of no unpadded 3x3: taps that read different positions would be added.",
        "Keep both layers.",
    ),
    Reason(
        "transposed-mix",
        "Of two layers whose outputs are added, one is a transposed convolution.",
        "One gathers its taps, the other scatters them: a weight that is the sum would be neither.",
        "Keep both layers.",
    ),
    Reason(
        "different-groups",
        "Two layers whose outputs are added have different numbers of groups.",
        "With other groups the same entry of the weight connects other channels, and entries are what is "
        "added.",
        "Keep both layers.",
    ),
    Reason(
        "different-stride",
        "Two layers whose outputs are added have different strides.",
        "Output n reads the input from position stride * n on: one tap of the sum would stand for two "
        "positions.",
        "Keep both layers.",
    ),
    Reason(
        "different-dilation",
        "Two layers whose outputs are added have different dilations.",
        "Tap u reads the input at a distance of dilation * u: one tap of the sum would stand for two "
        "positions.",
        "Keep both layers.",
    ),
    Reason(
        "different-output-padding",
        "Two transposed convolutions whose outputs are added have different output paddings.",
        "It is part of how long the output is, and one layer has only one of them: the sum could be longer "
        "or shorter than what the model adds up.",
        "Keep both layers.",
    ),
    Reason(
        "fixed-size",
        "The fold needs a layer with another kernel or other channels, and its class is one whose code is "
        "not known.",
        "Such a class may have used its sizes when it was built, for a mask or a padding of its own: the "
        "larger weight would meet the old ones.",
        "Keep both layers.",
    ),
    Reason(
        "rule-off",
        "The rule that would fold it is turned off, by rules or no_rules in the spec or on the command line.",
        "Nothing goes wrong: the layer stays as it is, because somebody has said so.",
        "Allow the rule: --rules and --no-rules name those that may and may not be used.",
    ),
    Reason(
        "grows",
        "One layer would have more parameters than the two that it stands for.",
        "It would compute the same, and need more memory and more operations: a bottleneck of 4 channels "
        "between 256 and 256 is 2048 numbers, their product is 65536.",
        "Keep both layers.",
    ),
    Reason(
        "different-padding-mode",
        "Two padded layers whose outputs are added pad in different ways.",
        "At the border one reads zeros and the other repeats its input; one layer has one padding mode, "
        "which would be wrong for the other half of the sum.",
        "Keep both layers.",
    ),
)

_NUMBERS = (
    Reason(
        "no-statistics",
        "The norm keeps no running statistics (track_running_stats=False), or not under the names "
        "running_mean, running_var and eps.",
        "Without them it normalises by each batch, at inference too: there is no fixed scale that a weight "
        "could take.",
        "Train it with running statistics, or leave it out of the spec. A class that keeps them under other "
        "names can be taught with extra_mappings (sequence and fuser).",
    ),
    Reason(
        "batch-statistics",
        "The norm has running statistics, but in eval mode it used those of the batch.",
        "Its output depends on which samples share a batch. A fold of the running statistics is another "
        "function, which on large batches comes close enough to go unnoticed.",
        "Find what sets it so: training=True in a call of F.batch_norm, or a forward that calls train(). If "
        "the running statistics were meant, correct the model's code.",
    ),
    Reason(
        "bad-statistics",
        "A statistic, gamma, beta or eps is NaN or infinite, a variance is negative, or var + eps is 0.",
        "The scale gamma / sqrt(var + eps) would be NaN or infinite, and with it a whole channel of the "
        "weight. Comparisons do not find it where both sides are NaN.",
        "Recompute the running statistics on clean data, or leave this norm as it is.",
    ),
    Reason(
        "not-finite",
        "The weights hold NaN or Inf.",
        "They were broken before the fold. 0 * Inf is NaN, so that a fold spreads it, and a comparison of "
        "NaN with NaN proves nothing.",
        "Repair the checkpoint, or take an earlier one.",
    ),
    Reason(
        "overflow",
        "A folded value is larger than its dtype can hold.",
        "It would be stored as Inf, and the first output that it takes part in is Inf or NaN. In float16, "
        "which ends at 65504, gamma 10 at variance 0 and eps 1e-5 scales by 3162: a weight of 21 is enough.",
        "Store this layer in float32 or bfloat16, or leave the group out of the spec.",
    ),
    Reason(
        "dtype",
        "A tensor holds no floating-point numbers, or is of a dtype that fusecli does not round to.",
        "A quantized or packed weight stands for other numbers than those stored. Scaling what is stored "
        "and cutting it back to integers gives a wrong weight of the right shape.",
        "Fuse the floating-point checkpoint, and quantize afterwards.",
    ),
    Reason(
        "uninitialised",
        "The layer is a lazy one whose weight has no shape yet.",
        "There are no numbers to fold, and whatever is written now would be replaced by the first call.",
        "Run the model once, then save the checkpoint.",
    ),
    Reason(
        "parametrized",
        "The weight or bias is computed from other tensors by weight_norm, spectral_norm, a pruning mask or "
        "a parametrization.",
        "The next call computes it again and overwrites what the fold has stored. To scale what it is "
        "computed from may not help: weight_norm divides v by the norm of v.",
        "Say `bake: true` in the spec, or --bake: then it becomes an ordinary tensor on the way, rounded "
        "once. Or make it one first (torch.nn.utils: remove_weight_norm, remove_spectral_norm, prune.remove, "
        "parametrize.remove_parametrizations) and save the checkpoint again.",
    ),
    Reason(
        "derived-weight",
        "The weight that the layer uses is computed in forward from other tensors.",
        "No stored tensor is the weight, so there is none to scale. Scaling one of those that it is "
        "computed from gives s W only if the computation is linear in it: standardisation takes s out "
        "again.",
        "Store the computed weight in an ordinary layer and save the checkpoint again, or teach the class "
        "with extra_mappings (sequence and fuser).",
    ),
    Reason(
        "written-in-forward",
        "The model's forward writes to a parameter or a statistic of the module.",
        "A fold keeps the numbers of one moment. What forward writes afterwards would replace the folded "
        "weight, or go into statistics that nothing reads any more.",
        "Take the write out of forward (or make it depend on self.training), or leave the group out of the "
        "spec.",
    ),
)

_SHARING = (
    Reason(
        "shared-module",
        "A member is called in several places and not always with the same partner, or is known under "
        "several names.",
        "A layer has one weight: scaled for one call it is scaled for all of them. The calls without this "
        "norm would give s y + t instead of y, with s and t its scale and shift.",
        "Give each place its own module, or leave the group out of the spec. A pair that is always called "
        "as a pair is folded, and so is a norm with all the layers that feed it, each listed with it. Where "
        "the module has several names, `shared: clone` gives each name its own copy.",
    ),
    Reason(
        "shared-weight",
        "The layer's weight is also read by something other than the layer, as in F.conv2d(x, "
        "self.conv.weight).",
        "After the fold that reader gets s W instead of W, with s the scale of the norm, and gives other "
        "numbers without an error.",
        "Give the other reader a parameter of its own, or leave the group out of the spec.",
    ),
    Reason(
        "tied-weights",
        "A parameter is the same memory as a parameter of another module.",
        "Scaled for one module it is scaled for the other too, which has no norm behind it, or one with "
        "other statistics.",
        "Untie it (clone the parameter) before fusing, let `shared: clone` do so, or leave the group out of "
        "the spec.",
    ),
    Reason(
        "functional-layer",
        "The layer's weight is only used by a function call outside of the layer's own forward.",
        "The call decides what is computed: its stride, its padding and whether it reads the bias. The "
        "attributes of the layer may say something else, and a bias that the fold adds would not be read.",
        "Call the layer itself instead of the function, or leave the group out of the spec.",
    ),
    Reason(
        "held-elsewhere",
        "The model holds the module a second time, in a list, a dict, a closure or another object, and "
        "forward calls it there.",
        "A fold puts another module in its place in the module tree. What forward calls would stay as it "
        "was: nothing would be folded, and a model that loads the file would call layers without them.",
        "Call the module by its attribute, or let an nn.ModuleList or nn.Sequential hold it and nothing "
        "else; where names change by that, save the checkpoint again.",
    ),
)

_TOOL = (
    Reason(
        "scripted",
        "The module lives inside a scripted (TorchScript) module, whose submodules cannot be replaced.",
        "The compiled code keeps calling the norm that was compiled: with the weight scaled, it would "
        "normalise a second time.",
        "Build the model without torch.jit.script, fuse it, and script the result.",
    ),
    Reason(
        "fuser-error",
        "A custom fuser raised an error, or did not return a module that can stand in for the group.",
        "What it returned would replace the group as it is: a result of another shape fails much later, or "
        "is broadcast.",
        "Correct the fuser: it takes (is_qat, *modules) and returns one nn.Module with the same output.",
    ),
    Reason(
        "not-listed",
        "No group of the spec names the norm.",
        "Only what is listed is fused. That it could be folded is neither said nor denied.",
        "List it together with the layer that feeds it; 'fusecli plan' writes the list, and --discover "
        "does without one.",
    ),
    Reason(
        "excluded",
        "An exclude pattern of the spec covers it.",
        "What you wanted left alone is left alone, whatever else the spec lists.",
        "Narrow or remove the pattern under exclude, if the norm is to be folded.",
    ),
    Reason(
        "held-back",
        "Its group was not refused, but another one was.",
        "A spec is carried out as a whole or not at all. A file in which some of the groups are fused would "
        "be taken for the one that the spec describes.",
        "Follow the remedies of the refused groups, or leave them out of the spec.",
    ),
    Reason(
        "dropped",
        "Its group failed verification and was left out: a discovered one by itself, else by --keep-going.",
        "The fused group did not compute what the original does. The file was made and proven without it.",
        "Correct the pairing of the group, or leave it out of the spec; without --keep-going the failure is "
        "the verdict.",
    ),
)

FAMILIES: Mapping[str, tuple[Reason, ...]] = {
    "topology": _TOPOLOGY,
    "layer mathematics": _MATHEMATICS,
    "state and numbers": _NUMBERS,
    "sharing": _SHARING,
    "tool": _TOOL,
}
REASONS: Mapping[str, Reason] = {reason.code: reason for family in FAMILIES.values() for reason in family}
